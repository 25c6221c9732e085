package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

const (
	// defaultWait is how long --wait without a value waits.
	defaultWait = time.Minute
	// pollEvery is below the half second in which replicas tell each other about their sidecars.
	pollEvery = 300 * time.Millisecond
	// maxNamed is how many sidecars one line names.
	maxNamed = 3
)

// waitFor is the value of --wait: how long to wait at most, 0 if it was not given.
type waitFor time.Duration

// Decode reads the optional value. Kong calls it.
func (w *waitFor) Decode(ctx *kong.DecodeContext) error {
	*w = waitFor(defaultWait)
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return nil
	}
	text := ctx.Scan.Pop().String()
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return fmt.Errorf("%q is not how long to wait, such as 30s or 2m", text)
	}
	*w = waitFor(d)
	return nil
}

// IsBool tells kong that the value may be left out.
func (*waitFor) IsBool() bool { return true }

type propagationCommand struct {
	Revision string  `arg:"" optional:"" help:"Revision of the save, as set, get and history show it. Default: the newest save."`
	Wait     waitFor `env:"ALLOWEDNETS_WAIT" help:"Wait until the save is active on every sidecar, for at most 1m or as long as --wait=DURATION says."`
}

// Help is shown below the help line.
func (*propagationCommand) Help() string {
	return `
Counts the sidecars that are connected, and those that were lost without a goodbye in the last ten minutes: they enforce an older
state as long as nobody reaches them. Each one that does not enforce the save yet is named.

	allowednets propagation
	allowednets propagation 1-17 --wait=2m

Exit codes: 0 active on every sidecar; 1 not permitted; 2 no such save; 3 not active everywhere (in time), or no answer.
`
}

func (c *propagationCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		active, err := s.follow(client, c.Revision, c.Wait)
		switch {
		case err != nil || active:
			return err
		case c.Wait > 0:
			return fmt.Errorf("not active everywhere within %s (--wait)", time.Duration(c.Wait))
		}
		return exitError(exitUnavailable)
	})
}

// awaitSave waits until a save is active everywhere, if that was asked for.
func (s *session) awaitSave(client policyv1.PolicyServiceClient, saved *policyv1.AllowedNets, wait waitFor) error {
	if wait == 0 || saved.GetRevision() == "" { // there never was a save
		return nil
	}
	active, err := s.follow(client, saved.GetRevision(), wait)
	switch {
	case err != nil:
		return fmt.Errorf("saved, but whether it is active everywhere is not known: %s", problem(err))
	case !active:
		return fmt.Errorf("saved, but not active everywhere within %s (--wait). Look again with allowednets propagation %s",
			time.Duration(wait), saved.GetRevision())
	}
	return nil
}

// follow shows how far a save has got: once, or until it is active everywhere or wait is over. While it waits it keeps a line
// of the terminal current, or without one writes a line when something changed. It reports whether the save is active on every
// sidecar that there is; if there is none, nobody enforces it and it is not.
func (s *session) follow(client policyv1.PolicyServiceClient, revision string, wait waitFor) (active bool, err error) {
	ctx := s.ctx
	if wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(wait))
		defer cancel()
	}
	show := s.progress()
	var last *policyv1.GetPropagationResponse
	for {
		resp, err := s.propagation(ctx, client, revision)
		switch {
		case err == nil:
			last, revision = resp, resp.GetRevision()
			active = resp.GetSidecarCount() > 0 && resp.GetAppliedCount() == resp.GetSidecarCount()
		case wait == 0 || s.ctx.Err() != nil || !unanswered(err):
			show.done()
			return false, err
		}
		if wait == 0 || active {
			break
		}
		if ctx.Err() == nil {
			show.line(progressLine(last, err))
		}
		if !pause(ctx, pollEvery) {
			break
		}
	}
	show.done()
	if s.ctx.Err() != nil {
		return false, errInterrupted
	}
	if last == nil {
		return false, fmt.Errorf("no answer within %s (--wait)", time.Duration(wait))
	}
	return active, s.show(last, func(w io.Writer) { writePropagation(w, last) })
}

// propagation asks within --timeout and within ctx.
func (s *session) propagation(ctx context.Context, client policyv1.PolicyServiceClient, revision string) (*policyv1.GetPropagationResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.flags.Timeout)
	defer cancel()
	return client.GetPropagation(ctx, &policyv1.GetPropagationRequest{Revision: revision})
}

func unanswered(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// progress shows how far something has got, on standard output.
type progress struct {
	live  liveLine
	plain io.Writer
	begin time.Time
	last  string
}

// progress returns one for this output: for JSON it shows nothing.
func (s *session) progress() *progress {
	switch {
	case s.flags.Output == "json":
		return &progress{plain: io.Discard}
	case s.term.outLive:
		return &progress{live: liveLine{w: s.term.out}, plain: io.Discard, begin: time.Now()}
	}
	return &progress{plain: s.term.out}
}

func (p *progress) line(text string) {
	p.live.show(fmt.Sprintf("%ds  %s", int(time.Since(p.begin).Seconds()), text))
	if text != p.last {
		p.last = text
		fmt.Fprintln(p.plain, text)
	}
}

func (p *progress) done() { p.live.clear() }

// progressLine is the state in one line that changes only if the state does. resp is nil before the first answer; err is that
// of the last question.
func progressLine(resp *policyv1.GetPropagationResponse, err error) string {
	if resp == nil {
		return "waiting: the policy service does not answer"
	}
	text := activeOn(resp)
	var names []string
	for _, l := range resp.GetLaggards()[:min(len(resp.GetLaggards()), maxNamed)] {
		name := l.GetId()
		if l.GetLost() {
			name += " (lost since " + clock(l.GetLostTime()) + ")"
		}
		names = append(names, name)
	}
	if resp.GetSidecarCount() == 0 {
		names = []string{"a sidecar"}
	}
	if len(names) > 0 {
		text += "; waiting for " + strings.Join(names, ", ")
	}
	if more := int(resp.GetSidecarCount()-resp.GetAppliedCount()) - len(names); more > 0 && len(names) > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	if err != nil {
		text += "; the policy service does not answer"
	}
	return printable(text)
}

func activeOn(resp *policyv1.GetPropagationResponse) string {
	return fmt.Sprintf("active on %d of %d", resp.GetAppliedCount(), resp.GetSidecarCount())
}

func writePropagation(w io.Writer, resp *policyv1.GetPropagationResponse) {
	fmt.Fprintln(w, activeOn(resp))
	if resp.GetSidecarCount() == 0 {
		fmt.Fprintln(w, "No sidecar is connected, so nothing enforces any list.")
	}
	for _, l := range resp.GetLaggards() {
		fmt.Fprintln(w, "  "+printable(laggard(l)))
	}
	if more := int(resp.GetSidecarCount()-resp.GetAppliedCount()) - len(resp.GetLaggards()); more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}

func laggard(l *policyv1.Laggard) string {
	text := l.GetId()
	if l.GetCaller() != "" && l.GetCaller() != l.GetId() {
		text += " (" + l.GetCaller() + ")"
	}
	if l.GetLost() {
		text += ": lost since " + clock(l.GetLostTime())
	} else {
		text += ": connected"
	}
	if l.GetRevision() == "" {
		return text + ", has acknowledged nothing yet"
	}
	return text + ", enforces revision " + l.GetRevision()
}
