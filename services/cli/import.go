package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

const (
	// formatDovecot is the value of --format for its passwd-file.
	formatDovecot = "dovecot-passwd-file"

	// patient repeats a call as often as --timeout allows.
	patient = math.MaxInt

	maxWorkers = 256
	// linesPerWorker bounds what is in memory: so many lines for each worker are read and not yet finished.
	linesPerWorker = 8
	// stateEvery is the time between two writings of the --resume file: what is done twice after a crash.
	stateEvery = 200 * time.Millisecond
)

type importCommand struct {
	File            string `arg:"" optional:"" default:"-" complete:"file" help:"File to read; - is standard input."`
	Format          string `default:"jsonl" enum:"jsonl,dovecot-passwd-file" env:"ALLOWEDNETS_FORMAT" help:"jsonl as export writes it, or dovecot-passwd-file: the allow_nets of its extra fields."`
	DefaultDomain   string `env:"ALLOWEDNETS_DEFAULT_DOMAIN" help:"Domain of the users of a passwd-file that have none."`
	ValidateOnly    bool   `aliases:"dry-run" env:"ALLOWEDNETS_VALIDATE_ONLY" help:"Have the policy service check every list and save none; also --dry-run."`
	Workers         int    `default:"16" env:"ALLOWEDNETS_WORKERS" help:"How many lists to save at the same time, at most 256."`
	ContinueOnError bool   `env:"ALLOWEDNETS_CONTINUE_ON_ERROR" help:"Go on behind lines that are refused."`
	FromLine        int64  `env:"ALLOWEDNETS_FROM_LINE" placeholder:"N" help:"Begin with this line, after an import that stopped there."`
	Resume          string `complete:"file" env:"ALLOWEDNETS_RESUME" placeholder:"STATE" help:"File that remembers how far the import got: begin there if it exists. It is removed when the import is complete."`
	authorFlags
}

// Help is shown below the help line.
func (*importCommand) Help() string {
	return `
Saves one list per line, as set does. Mailboxes that are not in the file keep what they have. To save a list that a mailbox has
already changes nothing, so an import can be repeated as a whole or from any line before the one where it stopped. Several lines
of one mailbox are saved in their order. Of an exported line mailbox and nets are restored; the history begins anew.

	allowednets import lists.jsonl --dry-run --continue-on-error
	allowednets import lists.jsonl --resume=import.state
	zcat example.com.jsonl.gz | allowednets import

From a Dovecot passwd-file (user:password:uid:gid:gecos:home:shell:extra fields); passwords are neither kept nor shown:

	allowednets import /etc/dovecot/users --format=dovecot-passwd-file --default-domain=example.com --dry-run

Exit codes: 0 every line is saved or was saved already; 1 not permitted; 2 wrong usage, or at least one line was refused; 3 no
answer, or interrupted.
`
}

// Validate is called by kong.
func (c *importCommand) Validate() error {
	switch {
	case c.Workers < 1 || c.Workers > maxWorkers:
		return usageError{fmt.Sprintf("--workers must be from 1 to %d, not %d", maxWorkers, c.Workers)}
	case c.FromLine < 0:
		return usageError{fmt.Sprintf("--from-line counts from 1; there is no line %d", c.FromLine)}
	case c.FromLine > 0 && c.Resume != "":
		return usageError{"--from-line and --resume contradict each other: give one"}
	case c.ValidateOnly && c.Resume != "":
		return usageError{"--dry-run and --resume contradict each other: a dry run does nothing that could be continued"}
	case c.DefaultDomain != "" && c.Format != formatDovecot:
		return usageError{"--default-domain is for --format=dovecot-passwd-file only"}
	}
	return nil
}

func (c *importCommand) Run(s *session) error {
	in := s.term.in
	if c.File != "-" {
		file, err := os.Open(c.File)
		if err != nil {
			return usageError{err.Error()}
		}
		defer func() { _ = file.Close() }()
		in = file
	}
	parse := parseJSON
	if c.Format == formatDovecot {
		parse = passwdFile(c.DefaultDomain)
	}
	start := state{Line: max(c.FromLine, 1) - 1}
	if c.Resume != "" {
		var err error
		if start, err = readState(c.Resume); err != nil {
			return err
		}
	}
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		im := &importer{s: s, c: c, client: client, lines: newLineReader(in), parse: parse, start: start, done: start}
		if s.term.errLive {
			im.live.w = s.term.err
		}
		return im.run()
	})
}

// outcome is what became of a line.
type outcome int

const (
	blank     outcome = iota // it says nothing
	skipped                  // an account without a list
	saved                    // or with a dry run: it could be
	unchanged                // the mailbox has the list already
	refused                  // because of what stands there
	failed                   // no answer, or nothing may be saved: the import ends here
)

// job is a line on its way.
type job struct {
	number int64
	sum    uint64 // of the input up to and with this line
	parsed parsed
	result outcome // valid before the line was worked on if it needs no work
	err    error
}

// importer reads lines in one goroutine and gives each to the worker of its mailbox, so that the lines of one mailbox stay in
// order; the results are put in order again and counted. A bounded number of lines is on the way at any time.
type importer struct {
	s      *session
	c      *importCommand
	client policyv1.PolicyServiceClient
	lines  *lineReader
	parse  parser
	start  state // where to begin
	live   liveLine

	// What only collect touches.
	done     state // every line up to this one is finished
	counts   [failed + 1]int64
	firstBad int64
	stopped  error // why the import ended before the end of the input
	written  time.Time
}

func (im *importer) run() error {
	ctx, cancel := context.WithCancel(im.s.ctx)
	defer cancel()
	workers := im.c.Workers
	window := make(chan struct{}, workers*linesPerWorker)
	queues := make([]chan job, workers)
	results := make(chan job, cap(window)) // never full: every line in it has a place in the window
	waiting := make(chan error, 1)
	var group sync.WaitGroup
	for i := range queues {
		queues[i] = make(chan job, linesPerWorker)
		group.Go(func() { im.work(ctx, queues[i], results, waiting) })
	}
	// Nobody waits for the reader: while standard input says nothing, it cannot be ended. It touches nothing that is used
	// after the end of ctx.
	go im.read(ctx, window, queues)
	go func() {
		group.Wait()
		close(results)
	}()
	im.collect(cancel, window, results, waiting)
	return im.finish()
}

// read gives every line to a worker and then closes the queues.
func (im *importer) read(ctx context.Context, window chan<- struct{}, queues []chan job) {
	defer func() {
		for _, q := range queues {
			close(q)
		}
	}()
	for {
		line, err := im.lines.next()
		if errors.Is(err, io.EOF) {
			if im.lines.number >= im.start.Line {
				return
			}
			err = usageError{fmt.Sprintf("the input ends at line %d, before the line where to begin", im.lines.number)}
		}
		j := job{number: im.lines.number, sum: im.lines.sum}
		last := err != nil && !errors.Is(err, errLineTooLong)
		switch {
		case last:
			j.number, j.result, j.err = max(im.lines.number, im.start.Line)+1, failed, fmt.Errorf("reading the input: %w", err)
		case err != nil:
			j.result, j.err = refused, err
		default:
			j.parsed, j.err = im.parse(line, j.number)
			j.result = before(j)
		}
		if !last && j.number <= im.start.Line {
			if j.number < im.start.Line || im.start.Sum == "" || im.start.Sum == sumText(j.sum) {
				continue
			}
			j.number, j.result, last = j.number+1, failed, true
			j.err = usageError{fmt.Sprintf("the input is not the one that %s was written for: its first %d lines are different", im.c.Resume, im.start.Line)}
		}
		select {
		case window <- struct{}{}:
		case <-ctx.Done():
			return
		}
		id := j.parsed.mailbox.ID() // of the zero value for lines without a list: order does not matter among them
		select {
		case queues[int(id[0])%len(queues)] <- j:
		case <-ctx.Done():
			return
		}
		if last {
			return
		}
	}
}

// before is the outcome of a line that was not sent anywhere.
func before(j job) outcome {
	switch {
	case j.err != nil:
		return refused
	case j.parsed.blank:
		return blank
	case j.parsed.nets == nil && j.parsed.mailbox.String() == "":
		return skipped
	}
	return saved
}

// work saves the lists of a queue until it is closed or ctx ends.
func (im *importer) work(ctx context.Context, queue <-chan job, results chan<- job, waiting chan<- error) {
	for {
		select {
		case <-ctx.Done():
			return
		case j, more := <-queue:
			if !more {
				return
			}
			if j.result == saved {
				j.result, j.err = im.save(ctx, j, waiting)
			}
			results <- j
		}
	}
}

// save saves one list within --timeout, however often that takes.
func (im *importer) save(ctx context.Context, j job, waiting chan<- error) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, im.s.flags.Timeout)
	defer cancel()
	nets := make([]*policyv1.Net, len(j.parsed.nets))
	for i, n := range j.parsed.nets {
		nets[i] = &policyv1.Net{Net: n}
	}
	req := &policyv1.SetAllowedNetsRequest{
		Mailbox: j.parsed.mailbox.String(), Input: &policyv1.SetAllowedNetsRequest_List{List: &policyv1.NetList{Nets: nets}},
		RequestId: uuid.NewString(), ValidateOnly: im.c.ValidateOnly, Actor: im.c.actor(),
	}
	tell := func(err error) {
		select {
		case waiting <- err:
		default: // somebody has told it
		}
	}
	resp, repeats, err := again(ctx, patient, tell, func() (*policyv1.SetAllowedNetsResponse, error) { return im.client.SetAllowedNets(ctx, req) })
	switch {
	case err == nil && (resp.GetChanged() || repeats > 0 || im.c.ValidateOnly):
		return saved, nil
	case err == nil:
		return unchanged, nil
	case status.Code(err) == codes.InvalidArgument, rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED:
		return refused, err
	}
	return failed, err
}

// collect takes the results in the order of the lines, until all lines are finished or one stops the import.
func (im *importer) collect(cancel context.CancelFunc, window <-chan struct{}, results <-chan job, waiting <-chan error) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	early := make(map[int64]job) // finished before a line in front of them
	for {
		select {
		case j, more := <-results:
			if !more {
				return
			}
			early[j.number] = j
		case err := <-waiting:
			if im.stopped == nil {
				im.tellOutage(err)
			}
		case <-tick.C:
			im.live.show(fmt.Sprintf("line %d: %s", im.done.Line, im.summary()))
		}
		for j, ok := early[im.done.Line+1]; ok && im.stopped == nil; j, ok = early[im.done.Line+1] {
			delete(early, j.number)
			<-window
			im.take(j)
		}
		im.saveState(stateEvery)
		if im.stopped != nil {
			cancel()
		}
	}
}

// take counts a line and tells what is wrong with it.
func (im *importer) take(j job) {
	if j.result == failed {
		im.stopped = j.err
		return
	}
	im.counts[j.result]++
	if j.parsed.note != "" || j.err != nil {
		im.live.clear()
		im.tell(j)
	}
	if j.result == refused {
		if im.firstBad == 0 {
			im.firstBad = j.number
		}
		if !im.c.ContinueOnError {
			im.stopped = errRefused
			return
		}
		im.done.Refused++
	}
	im.done.Line, im.done.Sum = j.number, sumText(j.sum)
}

// errRefused stops an import at a line that was refused.
var errRefused = errors.New("a line was refused")

// tell writes what is wrong with a line, or what a person should know of it.
func (im *importer) tell(j job) {
	where := fmt.Sprintf("line %d", j.number)
	if name := j.parsed.mailbox.String(); name != "" {
		where += ", " + name
	}
	w := im.s.term.err
	switch bad := rpcerr.Detail[*policyv1.InvalidNets](j.err).GetInvalidNets(); {
	case j.err == nil:
		fmt.Fprintf(w, "%s: %s\n", printable(where), printable(j.parsed.note))
	case im.s.flags.Output == "json":
		writeLineStatus(w, j)
	case rpcerr.Reason(j.err) == decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY:
		fmt.Fprintf(w, "%s: the list is empty; leave the line out, and lift a restriction with allowednets clear\n", printable(where))
	case len(bad) > 0:
		fmt.Fprintf(w, "%s: %s cannot be used\n", printable(where), count(len(bad), "entry", "entries"))
		writeInvalidNets(w, bad)
	default:
		fmt.Fprintf(w, "%s: %s\n", printable(where), printable(problem(j.err)))
	}
}

// writeLineStatus writes the error of a line as one line of JSON.
func writeLineStatus(w io.Writer, j job) {
	st := &spb.Status{Code: int32(codes.InvalidArgument), Message: problem(j.err)}
	if rpc, ok := errors.AsType[statusError](j.err); ok {
		st = rpc.GRPCStatus().Proto()
	}
	text, err := protojson.Marshal(st)
	if err != nil { // details of a type that is unknown here
		text, _ = protojson.Marshal(&spb.Status{Code: st.GetCode(), Message: st.GetMessage()})
	}
	line := struct {
		Line    int64           `json:"line"`
		Mailbox string          `json:"mailbox"`
		Error   json.RawMessage `json:"error"`
	}{j.number, j.parsed.mailbox.String(), text}
	_ = json.NewEncoder(w).Encode(line)
}

func (im *importer) tellOutage(err error) {
	text := "no answer: " + problem(err)
	if im.live.w != nil {
		im.live.show(printable(fmt.Sprintf("line %d: %s", im.done.Line, text)))
		return
	}
	if im.s.flags.Output != "json" {
		fmt.Fprintf(im.s.term.err, "allowednets: %s. Asking again, for up to %s.\n", printable(text), im.s.flags.Timeout)
	}
}

// finish writes the summary and says how the import ended.
func (im *importer) finish() error {
	im.live.clear()
	complete := im.stopped == nil && im.s.ctx.Err() == nil
	if complete {
		im.removeState()
	} else {
		im.saveState(0)
	}
	if err := im.writeSummary(); err != nil {
		return err
	}
	switch {
	case im.s.ctx.Err() != nil:
		return fmt.Errorf("interrupted at line %d. %s", im.done.Line+1, im.howToContinue())
	case errors.Is(im.stopped, errRefused):
		return usageError{fmt.Sprintf("stopped at line %d. Correct it, or give --continue-on-error. %s", im.firstBad, im.howToContinue())}
	case im.stopped != nil:
		return &stoppedError{im.stopped, fmt.Sprintf("stopped at line %d. %s", im.done.Line+1, im.howToContinue())}
	case im.start.Refused+im.counts[refused] > 0:
		return exitError(exitUsage)
	}
	return nil
}

// stoppedError is an error of one line that ended an import, with what to do then.
type stoppedError struct {
	error
	advice string
}

func (e *stoppedError) Unwrap() error { return e.error }

func (im *importer) howToContinue() string {
	switch {
	case im.c.Resume != "":
		return fmt.Sprintf("To continue, repeat the command with --resume=%s", im.c.Resume)
	case im.done.Line == 0:
		return "To begin again, repeat the command."
	}
	return fmt.Sprintf("To continue, repeat the command with --from-line=%d", im.done.Line+1)
}

func (im *importer) writeSummary() error {
	var err error
	if im.s.flags.Output == "json" {
		_, err = fmt.Fprintf(im.s.term.out, `{"lines":%d,"saved":%d,"unchanged":%d,"refused":%d,"without_list":%d,"validate_only":%t}`+"\n",
			im.done.Line, im.counts[saved], im.counts[unchanged], im.start.Refused+im.counts[refused], im.counts[skipped], im.c.ValidateOnly)
	} else {
		_, err = fmt.Fprintf(im.s.term.out, "%s\n", im.summary())
	}
	if err != nil {
		return fmt.Errorf("writing the summary: %w", err)
	}
	return nil
}

func (im *importer) summary() string {
	parts := []string{
		fmt.Sprintf("%d saved", im.counts[saved]), fmt.Sprintf("%d unchanged", im.counts[unchanged]), fmt.Sprintf("%d refused", im.counts[refused]),
	}
	if im.c.ValidateOnly {
		parts = slices.Delete(parts, 0, 2)
		parts = slices.Insert(parts, 0, fmt.Sprintf("%d could be saved", im.counts[saved]))
	}
	if im.c.Format == formatDovecot {
		parts = append(parts, fmt.Sprintf("%d without allow_nets", im.counts[skipped]))
	}
	if im.start.Refused > 0 {
		parts = append(parts, fmt.Sprintf("%d refused before line %d", im.start.Refused, im.start.Line+1))
	}
	return strings.Join(parts, ", ")
}
