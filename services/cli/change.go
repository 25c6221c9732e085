package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

// A write that got no answer is repeated this often, with the same request id and within --timeout.
const writeRepeats = 2

// The pauses before a repetition begin with firstPause and double up to longestPause.
const (
	firstPause   = 200 * time.Millisecond
	longestPause = time.Second
)

// authorFlags say for whom we act.
type authorFlags struct {
	Actor        string `env:"ALLOWEDNETS_ACTOR" help:"Who asks, for the audit record. Default: the name in our certificate."`
	ActorAddress string `env:"ALLOWEDNETS_ACTOR_ADDRESS" help:"IP address the actor came from, for the audit record."`
}

func (f authorFlags) actor() *policyv1.Actor {
	if f.Actor == "" && f.ActorAddress == "" {
		return nil
	}
	return &policyv1.Actor{Id: f.Actor, Address: f.ActorAddress}
}

// requestFlags are common to the commands that make one change.
type requestFlags struct {
	RequestID string `name:"request-id" help:"A UUID that makes it safe to repeat the command. Default: a new one."`
	authorFlags
}

// id returns the request id of this run.
func (f *requestFlags) id() string {
	if f.RequestID == "" {
		f.RequestID = uuid.NewString()
	}
	return f.RequestID
}

// writeFlags are common to the commands that change one list.
type writeFlags struct {
	Etag         string  `env:"ALLOWEDNETS_ETAG" help:"Change the list only if its etag still is this one, as get shows it."`
	ValidateOnly bool    `aliases:"dry-run" env:"ALLOWEDNETS_VALIDATE_ONLY" help:"Run every check and change nothing; also --dry-run."`
	Wait         waitFor `env:"ALLOWEDNETS_WAIT" help:"Wait until the change is active on every sidecar, for at most 1m or as long as --wait=DURATION says."`
	requestFlags
}

// Validate is called by kong.
func (f *writeFlags) Validate() error {
	if f.Wait > 0 && f.ValidateOnly {
		return usageError{"--wait and --validate-only contradict each other: nothing is saved that one could wait for"}
	}
	return nil
}

// unansweredError is the error of a write that may or may not have taken effect.
type unansweredError struct {
	error
	requestID string
}

func (e *unansweredError) Unwrap() error { return e.error }

// write runs an RPC that changes something. If there is no answer it repeats the request as it is: its request id makes all
// attempts together one change. It reports whether it repeated it.
func write[Request interface{ GetRequestId() string }, Response any](
	s *session, rpc func(context.Context, Request, ...grpc.CallOption) (Response, error), req Request,
) (resp Response, repeated bool, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.flags.Timeout)
	defer cancel()
	tell := func(err error) {
		if s.flags.Output != "json" { // there, standard error carries one status
			fmt.Fprintf(s.term.err, "allowednets: no answer: %s. Asking again with the same request id.\n", printable(status.Convert(err).Message()))
		}
	}
	resp, repeats, err := again(ctx, writeRepeats, tell, func() (Response, error) { return rpc(ctx, req) })
	draft, _ := any(req).(interface{ GetValidateOnly() bool })
	if err != nil && (unanswered(err) || status.Code(err) == codes.Canceled) && (draft == nil || !draft.GetValidateOnly()) {
		err = &unansweredError{err, req.GetRequestId()}
	}
	return resp, repeats > 0, err
}

// again calls f, and while nobody answers repeats that up to most times before ctx ends. Before each repetition it calls tell.
func again[Response any](ctx context.Context, most int, tell func(error), f func() (Response, error)) (resp Response, repeats int, err error) {
	for wait := firstPause; ; wait = min(2*wait, longestPause) {
		resp, err = f()
		if status.Code(err) != codes.Unavailable || repeats == most {
			return resp, repeats, err
		}
		tell(err)
		if !pause(ctx, wait) {
			return resp, repeats, err // says more than that the time is over
		}
		repeats++
	}
}

// pause waits for d. It returns false as soon as ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

type setCommand struct {
	Mailbox string   `arg:"" help:"local@domain."`
	Text    []string `arg:"" sep:"none" help:"Addresses and networks, separated by commas, blanks or newlines; - reads them from standard input."`
	writeFlags
}

// Help is shown below the help line.
func (*setCommand) Help() string {
	return `
The list is replaced as a whole or not at all; every bad entry is named. From then on the mailbox can be read from these
networks only.

Only if nobody changed it since, and until every sidecar enforces it:

	allowednets set alice@example.com 198.51.100.0/24 2001:db8:1::/48 --etag=1-17 --wait=30s

Check a file of networks without saving them:

	allowednets set alice@example.com - --dry-run < networks.txt

Exit codes: 0 saved, or saved already; 1 somebody else changed the list (--etag), or not permitted; 2 bad entries, nothing was
saved; 3 no answer, or saved but not active everywhere in time (--wait).
`
}

func (c *setCommand) Run(s *session) error {
	text, err := s.text(strings.Join(c.Text, " "))
	if err != nil {
		return err
	}
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, repeated, err := write(s, client.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: c.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: text},
			Etag: c.Etag, RequestId: c.id(), ValidateOnly: c.ValidateOnly, Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		if err := s.show(resp, func(w io.Writer) { writeSet(w, resp, c.ValidateOnly, repeated) }); err != nil {
			return err
		}
		return s.settle(client, resp, repeated, c.Wait)
	})
}

// settle ends a command whose answer is shown: it waits until the save is active everywhere, if that was asked for.
func (s *session) settle(client policyv1.PolicyServiceClient, resp saveResponse, repeated bool, wait waitFor) error {
	if resp.GetSuperseded() && !repeated {
		return exitError(exitDenied)
	}
	return s.awaitSave(client, resp.GetAllowedNets(), wait)
}

// saveResponse is what the answers to set, clear and delete have in common.
type saveResponse interface {
	GetAllowedNets() *policyv1.AllowedNets
	GetChanged() bool
	GetSuperseded() bool
}

// text returns a list that was given as an argument; "-" stands for standard input.
func (s *session) text(argument string) (string, error) {
	if argument != "-" {
		return argument, nil
	}
	var input []byte
	read := make(chan error, 1)
	go func() { // nobody waits for it after Ctrl-C: a read from a terminal cannot be ended
		var err error
		input, err = io.ReadAll(io.LimitReader(s.term.in, maxInput+1))
		read <- err
	}()
	select {
	case <-s.ctx.Done():
		return "", errInterrupted
	case err := <-read:
		if err != nil {
			return "", usageError{fmt.Sprintf("reading standard input: %v", err)}
		}
	}
	if len(input) > maxInput {
		return "", usageError{fmt.Sprintf("standard input is longer than %d octets; no list of networks is", maxInput)}
	}
	return strings.ToValidUTF8(string(input), "\uFFFD"), nil
}

type clearCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
	writeFlags
}

// Help is shown below the help line.
func (*clearCommand) Help() string {
	return `
Without a list a mailbox can be reached from every address.

	allowednets clear alice@example.com

On behalf of an administrator, and until every sidecar knows it:

	allowednets clear alice@example.com --actor=carol --actor-address=198.51.100.9 --wait

Exit codes: 0 cleared, or there was no list; 1 somebody else changed the list (--etag), or not permitted; 2 wrong usage; 3 no answer,
or cleared but not everywhere in time (--wait).
`
}

func (c *clearCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, repeated, err := write(s, client.ClearAllowedNets, &policyv1.ClearAllowedNetsRequest{
			Mailbox: c.Mailbox, Etag: c.Etag, RequestId: c.id(), ValidateOnly: c.ValidateOnly, Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		if err := s.show(resp, func(w io.Writer) { writeLift(w, clearing(), resp, c.ValidateOnly, repeated) }); err != nil {
			return err
		}
		return s.settle(client, resp, repeated, c.Wait)
	})
}

type deleteCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
	writeFlags
}

// Help is shown below the help line.
func (*deleteCommand) Help() string {
	return `
Run it when the account itself was deleted. It lifts the restriction as clear does, under another name in the history, which
stays. A mailbox that is created again under the name starts unrestricted.

	allowednets delete alice@example.com
	allowednets delete alice@example.com --actor=carol --request-id=0b1f3c1e-8a57-4c42-9f0e-5a3d4f6f7a10

Exit codes: 0 deleted, or there was no list; 1 somebody else changed the list (--etag), or not permitted; 2 wrong usage; 3 no answer,
or deleted but not everywhere in time (--wait).
`
}

func (c *deleteCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, repeated, err := write(s, client.DeleteMailbox, &policyv1.DeleteMailboxRequest{
			Mailbox: c.Mailbox, Etag: c.Etag, RequestId: c.id(), ValidateOnly: c.ValidateOnly, Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		if err := s.show(resp, func(w io.Writer) { writeLift(w, deletion(), resp, c.ValidateOnly, repeated) }); err != nil {
			return err
		}
		return s.settle(client, resp, repeated, c.Wait)
	})
}

type renameCommand struct {
	Mailbox    string `arg:"" help:"local@domain, the old name."`
	NewMailbox string `arg:"" help:"local@domain, the new name. It must be unrestricted, or have the same list."`
	requestFlags
}

// Help is shown below the help line.
func (*renameCommand) Help() string {
	return `
Run it before the account itself is renamed. The new name gets the list first and then the old one loses it, so that at no moment
the account is unrestricted under either. Interrupted, the same command completes it.

	allowednets rename alice@example.com alice.miller@example.com
	allowednets rename alice@example.com alice@example.org --actor=carol

Exit codes: 0 renamed, or the old name has no list; 1 the new name has another list, or not permitted; 2 wrong usage; 3 no answer.
`
}

func (c *renameCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, repeated, err := write(s, client.RenameMailbox, &policyv1.RenameMailboxRequest{
			Mailbox: c.Mailbox, NewMailbox: c.NewMailbox, RequestId: c.id(), Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		return s.show(resp, func(w io.Writer) { writeRename(w, c.Mailbox, resp, repeated) })
	})
}
