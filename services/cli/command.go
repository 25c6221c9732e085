package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/serve"
)

// maxInput bounds what is read from standard input; the policy service's own limit is far lower.
const maxInput = 1 << 20

// commandLine is every flag and command.
type commandLine struct {
	PolicyAddress  string        `default:"localhost:7443" env:"ALLOWEDNETS_POLICY_ADDRESS" help:"Policy service, host:port."`
	Sidecar        string        `default:"unix:/run/allowednets/sidecar.sock" env:"ALLOWEDNETS_SIDECAR" help:"Sidecar, unix:PATH or a loopback host:port."`
	Output         string        `default:"text" enum:"text,json" env:"ALLOWEDNETS_OUTPUT" help:"text, or json (the response message; errors as google.rpc.Status)."`
	Timeout        time.Duration `default:"10s" env:"ALLOWEDNETS_TIMEOUT" help:"How long one call may take."`
	serve.TLSFlags `embed:"" group:"TLS to the policy service"`

	Set   setCommand   `cmd:"" help:"Replace the list of a mailbox."`
	Get   getCommand   `cmd:"" help:"Show the list of a mailbox."`
	Clear clearCommand `cmd:"" help:"Lift the restriction of a mailbox."`
	List  listCommand  `cmd:"" help:"Show the restricted mailboxes of a domain."`
	Check checkCommand `cmd:"" help:"Ask a sidecar whether an address may reach a mailbox."`
}

// writeFlags are common to the commands that change something.
type writeFlags struct {
	Etag         string `env:"ALLOWEDNETS_ETAG" help:"Change the list only if its etag still is this one, as get shows it."`
	RequestID    string `name:"request-id" env:"ALLOWEDNETS_REQUEST_ID" help:"A UUID that makes it safe to repeat the command."`
	ValidateOnly bool   `env:"ALLOWEDNETS_VALIDATE_ONLY" help:"Run every check and change nothing."`
	Actor        string `env:"ALLOWEDNETS_ACTOR" help:"Who asks, for the audit record. Default: the name in our certificate."`
	ActorAddress string `env:"ALLOWEDNETS_ACTOR_ADDRESS" help:"IP address the actor came from, for the audit record."`
}

func (f writeFlags) actor() *policyv1.Actor {
	if f.Actor == "" && f.ActorAddress == "" {
		return nil
	}
	return &policyv1.Actor{Id: f.Actor, Address: f.ActorAddress}
}

// session is one run of the program.
type session struct {
	ctx   context.Context //nolint:containedctx // kong's Run methods take no context of their own
	flags *commandLine
	term  terminal
	dial  dialer
}

// usageError is a mistake on the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

// policy calls f with a client of the policy service; every call it makes must use call's context.
func (s *session) policy(f func(policyv1.PolicyServiceClient) error) error {
	creds, err := s.flags.Credentials()
	if err != nil {
		return usageError{err.Error()}
	}
	if s.flags.InsecurePlaintext && !serve.IsLoopback(s.flags.PolicyAddress) {
		return usageError{fmt.Sprintf("--insecure-plaintext is refused for %q: only a policy service on this machine (localhost:7443) may be called without TLS", s.flags.PolicyAddress)}
	}
	conn, err := s.dial(s.flags.PolicyAddress, creds)
	if err != nil {
		return usageError{fmt.Sprintf("--policy-address %q: %v; give host:port", s.flags.PolicyAddress, err)}
	}
	defer func() { _ = conn.Close() }()
	return f(policyv1.NewPolicyServiceClient(conn))
}

// call runs one RPC within the time limit.
func call[Request, Response any](s *session, rpc func(context.Context, Request, ...grpc.CallOption) (Response, error), req Request) (Response, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.flags.Timeout)
	defer cancel()
	return rpc(ctx, req)
}

type setCommand struct {
	Mailbox string   `arg:"" help:"local@domain."`
	Text    []string `arg:"" sep:"none" help:"Addresses and networks, separated by commas, blanks or newlines; - reads them from standard input."`
	writeFlags
}

func (c *setCommand) Run(s *session) error {
	text := strings.Join(c.Text, " ")
	if text == "-" {
		input, err := io.ReadAll(io.LimitReader(s.term.in, maxInput+1))
		if err != nil {
			return usageError{fmt.Sprintf("reading standard input: %v", err)}
		}
		if len(input) > maxInput {
			return usageError{fmt.Sprintf("standard input is longer than %d octets; no list of networks is", maxInput)}
		}
		text = string(input)
	}
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, err := call(s, client.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: c.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: strings.ToValidUTF8(text, "\uFFFD")},
			Etag: c.Etag, RequestId: c.RequestID, ValidateOnly: c.ValidateOnly, Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		return s.show(resp, func(w io.Writer) { writeSet(w, resp, c.ValidateOnly) })
	})
}

type getCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
}

func (c *getCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, err := call(s, client.GetAllowedNets, &policyv1.GetAllowedNetsRequest{Mailbox: c.Mailbox})
		if err != nil {
			return err
		}
		return s.show(resp, func(w io.Writer) { writeAllowedNets(w, resp.GetAllowedNets()) })
	})
}

type clearCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
	writeFlags
}

func (c *clearCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, err := call(s, client.ClearAllowedNets, &policyv1.ClearAllowedNetsRequest{
			Mailbox: c.Mailbox, Etag: c.Etag, RequestId: c.RequestID, ValidateOnly: c.ValidateOnly, Actor: c.actor(),
		})
		if err != nil {
			return err
		}
		return s.show(resp, func(w io.Writer) { writeClear(w, resp, c.ValidateOnly) })
	})
}

type listCommand struct {
	Domain string `arg:"" help:"The domain behind the @."`
}

// Run reads all pages. The JSON form is one response with the mailboxes of all of them.
func (c *listCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		all := new(policyv1.ListAllowedNetsResponse)
		for req := (&policyv1.ListAllowedNetsRequest{Domain: c.Domain}); ; {
			page, err := call(s, client.ListAllowedNets, req)
			if err != nil {
				return err
			}
			all.AllowedNets = append(all.AllowedNets, page.GetAllowedNets()...)
			next := page.GetNextPageToken()
			if next == "" {
				break
			}
			if next == req.GetPageToken() {
				return fmt.Errorf("the policy service answered the same page twice; the list of %s is incomplete", c.Domain)
			}
			req.PageToken = next
		}
		all.TotalSize = int64(len(all.GetAllowedNets())) // what is shown; pages may differ by saves between them
		return s.show(all, func(w io.Writer) { writeList(w, c.Domain, all) })
	})
}

type checkCommand struct {
	Mailbox string `arg:"" help:"local@domain, the authenticated name."`
	Address string `arg:"" help:"IP address of the client; '' if unknown."`
	Service string `default:"imap" env:"ALLOWEDNETS_SERVICE" help:"imap, pop3, managesieve, webmail, smtp-submission, local-delivery, caldav, carddav or webdav."`
}

// errDenied makes the exit code tell the decision, which is already shown.
var errDenied = errors.New("denied")

func (c *checkCommand) Run(s *session) error {
	service, err := parseService(c.Service)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(s.flags.Sidecar, "unix:") && !serve.IsLoopback(s.flags.Sidecar) {
		return usageError{fmt.Sprintf("--sidecar %q: give unix:PATH or a loopback host:port; a sidecar serves its own machine only", s.flags.Sidecar)}
	}
	conn, err := s.dial(s.flags.Sidecar, insecure.NewCredentials()) // guarded by the socket's mode
	if err != nil {
		return usageError{fmt.Sprintf("--sidecar %q: %v", s.flags.Sidecar, err)}
	}
	defer func() { _ = conn.Close() }()
	resp, err := call(s, checkv1.NewCheckServiceClient(conn).Check, &checkv1.CheckRequest{
		Mailbox: c.Mailbox, ClientAddress: c.Address, Service: service,
	})
	if err != nil {
		return err
	}
	if err := s.show(resp, func(w io.Writer) { writeCheck(w, c, resp) }); err != nil {
		return err
	}
	if resp.GetDecision().GetVerdict() != decisionv1.Verdict_VERDICT_ALLOW {
		return errDenied
	}
	return nil
}

const servicePrefix = "SERVICE_"

// parseService reads a service as people write it, such as "imap".
func parseService(name string) (decisionv1.Service, error) {
	n, ok := decisionv1.Service_value[servicePrefix+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))]
	if !ok || n == 0 {
		var known []string
		for i, s := range decisionv1.Service_name {
			if i != 0 {
				known = append(known, strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s, servicePrefix), "_", "-")))
			}
		}
		slices.Sort(known)
		return 0, usageError{fmt.Sprintf("--service %q: there is no such service; there are %s", name, strings.Join(known, ", "))}
	}
	return decisionv1.Service(n), nil
}
