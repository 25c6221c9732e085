// Command logins logs in to an IMAP server, or to Roundcube, again and again, and compares each answer with what it must be. It is
// what test/kube/run lets run in a pod that may reach a mailbox and in one that may not, while things are upgraded and broken.
//
// An answer is right, wrong (it contradicts the list), or none: the connection failed, or nobody was asked who could decide. A
// refusal for lack of an answer says so by not saying why. The exit code is 1 if an answer was wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/roundcube"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// denied is in every refusal that was decided, and in no other.
const denied = "Access from "

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("logins", flag.ContinueOnError)
	flags.SetOutput(stderr)
	address := flags.String("address", "", "the IMAP server; without one it only waits for a signal")
	webmail := flags.String("webmail", "", "URL of Roundcube, in place of the IMAP server")
	user := flags.String("user", "alice@example.org", "the mailbox")
	password := flags.String("password", "secret", "its password")
	rate := flags.Int("rate", 20, "logins in a second")
	period := flags.Duration("for", 0, "how long; 0: until a signal")
	eof := flags.Bool("until-eof", false, "end with the standard input")
	settle := flags.Duration("settle", 0, "how long to wait before the first one")
	allowed := flags.Bool("allowed", false, "the list permits this address")
	until := flags.Bool("until-right", false, "end with the first right answer; wrong ones do not count")
	stay := flags.Bool("stay", false, "log in once and stay: to the end if -allowed, else until the server ends the session")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if *address == "" && *webmail == "" {
		<-ctx.Done()
		return 0
	}
	select {
	case <-time.After(*settle):
	case <-ctx.Done():
	}
	if *period > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *period)
		defer cancel()
	}
	if *eof {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		go func() {
			_, _ = io.Copy(io.Discard, stdin)
			cancel()
		}()
	}
	server := &dovecot.Server{IMAP: *address}
	who := dovecot.Attempt{User: *user, Password: *password}
	if *stay {
		if err := session(ctx, server, who, *allowed, stdout); err != nil {
			fmt.Fprintln(stdout, "WRONG:", err)
			return 1
		}
		return 0
	}
	login := func(ctx context.Context) (dovecot.Answer, error) { return server.LoginIMAP(ctx, who) }
	if *webmail != "" {
		login = func(ctx context.Context) (dovecot.Answer, error) { return roundcubeLogin(ctx, *webmail, who) }
	}
	t := &tally{allowed: *allowed, causes: make(map[string]int), out: stdout}
	tick := time.NewTicker(time.Second / time.Duration(*rate))
	defer tick.Stop()
	var running sync.WaitGroup
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			continue
		case <-tick.C:
		}
		running.Go(func() {
			began := time.Now()
			// Not ctx: an attempt that was begun is waited for.
			answer, err := login(context.WithoutCancel(ctx))
			t.add(began, answer, err)
		})
		if *until && t.count(right) > 0 {
			break
		}
	}
	running.Wait()
	fmt.Fprintln(stdout, t)
	if !*until && (t.count(wrong) > 0 || t.count(right) == 0) {
		return 1
	}
	return 0
}

// session logs in and stays. It is an error if the server ends the session of somebody whom the list permits, or does not end
// another's before ctx ends.
func session(ctx context.Context, server *dovecot.Server, who dovecot.Attempt, allowed bool, stdout io.Writer) error {
	s, err := server.OpenIMAP(ctx, who)
	if err != nil {
		return err
	}
	defer s.Close()
	fmt.Fprintln(stdout, "open")
	for {
		switch last, err := s.Ended(time.Second); {
		case err == nil && allowed:
			return fmt.Errorf("ended with %q", last)
		case err == nil:
			fmt.Fprintf(stdout, "ended at %s: %s\n", time.Now().UTC().Format("15:04:05.000"), last)
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case ctx.Err() == nil:
		case !allowed:
			return errors.New("still open")
		default:
			if err := s.Alive(); err != nil {
				return err
			}
			fmt.Fprintln(stdout, "still open")
			return nil
		}
	}
}

// roundcubeLogin is the answer that a person at Roundcube reads.
func roundcubeLogin(ctx context.Context, site string, who dovecot.Attempt) (dovecot.Answer, error) {
	page, err := roundcube.NewVisitor().Login(ctx, site, who.User, who.Password)
	return dovecot.Answer{OK: page.In(), Text: strings.Join(page.Messages, "\n")}, err
}

type outcome int

const (
	right outcome = iota
	wrong
	none
)

// tally counts answers. It is safe for concurrent use.
type tally struct {
	allowed bool
	out     io.Writer

	mu      sync.Mutex
	counts  [3]int
	causes  map[string]int
	failing time.Time     // since when there is no answer; zero if the last attempt had one
	longest time.Duration // without any answer
}

func (t *tally) add(began time.Time, answer dovecot.Answer, err error) {
	o, cause := t.judge(answer, err)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[o]++
	if o != none {
		t.failing = time.Time{}
	} else {
		if t.failing.IsZero() {
			t.failing = began
		}
		t.longest = max(t.longest, time.Since(t.failing))
	}
	if cause == "" {
		return
	}
	if t.causes[cause]++; t.causes[cause] == 1 {
		fmt.Fprintf(t.out, "%s %s\n", time.Now().UTC().Format("15:04:05.000"), cause)
	}
}

// judge also says why there is no answer, or what the wrong one was.
func (t *tally) judge(answer dovecot.Answer, err error) (outcome, string) {
	switch {
	case err != nil && answer.OK: // it was let in, and the connection ended after that
		if t.allowed {
			return right, ""
		}
		return wrong, "WRONG: let in"
	case err != nil:
		text := err.Error()
		cause := text[strings.LastIndex(text, ": ")+2:]
		if lookup := new(net.DNSError); errors.As(err, &lookup) {
			return none, "none: lookup: " + cause
		}
		if op := new(net.OpError); errors.As(err, &op) {
			cause = op.Op + ": " + cause
		}
		return none, "none: " + cause
	case answer.OK && t.allowed, !answer.OK && !t.allowed && strings.Contains(answer.Text, denied):
		return right, ""
	case !answer.OK && !strings.Contains(answer.Text, denied):
		return none, "none: " + answer.Text
	}
	text, _, _ := strings.Cut(answer.Text, "\n")
	return wrong, "WRONG: " + text
}

func (t *tally) count(o outcome) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts[o]
}

func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var causes []string
	for cause, n := range t.causes {
		causes = append(causes, fmt.Sprintf("%d × %s", n, cause))
	}
	slices.Sort(causes)
	return fmt.Sprintf("right %d, wrong %d, no answer %d (longest without one %v) %s",
		t.counts[right], t.counts[wrong], t.counts[none], t.longest.Round(time.Millisecond), strings.Join(causes, "; "))
}
