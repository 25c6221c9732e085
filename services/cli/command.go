package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
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
	Version        kong.VersionFlag `help:"Print the version and exit."`

	Set         setCommand         `cmd:"" help:"Replace the list of a mailbox."`
	Get         getCommand         `cmd:"" help:"Show the list of a mailbox."`
	Clear       clearCommand       `cmd:"" help:"Lift the restriction of a mailbox."`
	List        listCommand        `cmd:"" help:"Show the restricted mailboxes of a domain."`
	History     historyCommand     `cmd:"" help:"Show who changed the list of a mailbox, and how."`
	Explain     explainCommand     `cmd:"" help:"Show what would be decided with the saved list or with a draft."`
	Check       checkCommand       `cmd:"" help:"Ask a sidecar whether an address may reach a mailbox."`
	Propagation propagationCommand `cmd:"" help:"Show which sidecars enforce a save."`
	Delete      deleteCommand      `cmd:"" help:"Say that the account of a mailbox is gone."`
	Rename      renameCommand      `cmd:"" help:"Give the list of a mailbox to its new name."`
	Export      exportCommand      `cmd:"" help:"Write all lists as JSON Lines."`
	Import      importCommand      `cmd:"" help:"Save lists from JSON Lines or from a Dovecot passwd-file."`
	Completion  completionCommand  `cmd:"" help:"Write a completion script for a shell."`
}

// Help is shown below the description of the program.
func (commandLine) Help() string {
	return `
To begin with:

	allowednets set alice@example.com 198.51.100.0/24
	allowednets explain alice@example.com 198.51.100.7

Exit codes of all commands:

	0  done, allowed, or active everywhere
	1  denied, or refused because of the present state or of missing rights
	2  wrong usage or refused input; nothing was changed by a single command
	3  no answer in time, or not yet active everywhere; after a write the outcome may be unknown
`
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

type getCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
}

// Help is shown below the help line.
func (*getCommand) Help() string {
	return `
Shows the networks, who saved them when, the etag that set --etag takes, and the revision that propagation takes.

	allowednets get alice@example.com
	allowednets get alice@example.com --output=json

Exit codes: 0 shown, also if the mailbox has no list; 1 not permitted; 2 wrong usage; 3 no answer.
`
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

type listCommand struct {
	Domain string `arg:"" help:"The domain behind the @."`
}

// Help is shown below the help line.
func (*listCommand) Help() string {
	return `
Shows every mailbox of the domain that has a list. For all domains, or very many mailboxes, use export.

	allowednets list example.com
	allowednets list example.com --output=json

Exit codes: 0 shown, also if there is none; 1 not permitted; 2 wrong usage; 3 no answer.
`
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

// accessFlags name an access.
type accessFlags struct {
	Mailbox string `arg:"" help:"local@domain, the authenticated name."`
	Address string `arg:"" help:"IP address of the client; '' if unknown."`
	Service string `default:"imap" complete:"service" env:"ALLOWEDNETS_SERVICE" help:"imap, pop3, managesieve, webmail, smtp-submission, local-delivery, caldav, carddav or webdav."`
}

// verdict makes the exit code tell the decision, which is already shown.
func verdict(d *decisionv1.Decision) error {
	if d.GetVerdict() != decisionv1.Verdict_VERDICT_ALLOW {
		return exitError(exitDenied)
	}
	return nil
}

type explainCommand struct {
	accessFlags
	Draft *string `placeholder:"TEXT" env:"ALLOWEDNETS_DRAFT" help:"Decide with this list instead of the saved one; '' stands for no list, - reads it from standard input."`
}

// Help is shown below the help line.
func (*explainCommand) Help() string {
	return `
The policy service decides as a sidecar does, and changes nothing. To ask a sidecar itself, use check.

	allowednets explain alice@example.com 198.51.100.7
	allowednets explain alice@example.com 198.51.100.7 --service=webmail --draft='198.51.100.0/24, 2001:db8:1::/48'

Exit codes: 0 allowed; 1 denied, or not permitted to ask; 2 wrong usage, or bad entries in the draft; 3 no answer.
`
}

func (c *explainCommand) Run(s *session) error {
	service, err := parseService(c.Service)
	if err != nil {
		return err
	}
	req := &policyv1.ExplainAccessRequest{Mailbox: c.Mailbox, ClientAddress: c.Address, Service: service}
	if c.Draft != nil {
		text, err := s.text(*c.Draft)
		if err != nil {
			return err
		}
		req.Draft = &policyv1.ExplainAccessRequest_Text{Text: text}
	}
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		resp, err := call(s, client.ExplainAccess, req)
		if err != nil {
			return err
		}
		if err := s.show(resp, func(w io.Writer) { writeExplanation(w, c.accessFlags, c.Draft != nil, resp.GetDecision()) }); err != nil {
			return err
		}
		return verdict(resp.GetDecision())
	})
}

type checkCommand struct {
	accessFlags
}

// Help is shown below the help line.
func (*checkCommand) Help() string {
	return `
Asks the sidecar on this machine, exactly as a mail server does, and shows how old its data is.

	allowednets check alice@example.com 198.51.100.7
	allowednets check alice@example.com 2001:db8:1::7 --service=smtp-submission --sidecar=unix:/run/allowednets/sidecar.sock

Exit codes: 0 allowed; 1 denied; 2 wrong usage; 3 no answer, which a mail server must take for a denial.
`
}

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
	if err := s.show(resp, func(w io.Writer) { writeCheck(w, c.accessFlags, resp) }); err != nil {
		return err
	}
	return verdict(resp.GetDecision())
}

// serviceNames are the services as people write them.
func serviceNames() []string {
	var known []string
	for i, s := range decisionv1.Service_name {
		if i != 0 {
			known = append(known, strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s, servicePrefix), "_", "-")))
		}
	}
	slices.Sort(known)
	return known
}

const servicePrefix = "SERVICE_"

// parseService reads a service as people write it, such as "imap".
func parseService(name string) (decisionv1.Service, error) {
	n, ok := decisionv1.Service_value[servicePrefix+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))]
	if !ok || n == 0 {
		return 0, usageError{fmt.Sprintf("--service %q: there is no such service; there are %s", name, strings.Join(serviceNames(), ", "))}
	}
	return decisionv1.Service(n), nil
}
