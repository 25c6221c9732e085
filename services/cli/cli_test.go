package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// services answer every call with what the test put in; they record the last request.
type services struct {
	policyv1.UnimplementedPolicyServiceServer
	checkv1.UnimplementedCheckServiceServer

	set         func(*policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) // instead of the rest, if not nil
	request     proto.Message
	calls       int
	ids         []string // of the requests that have one
	allowed     *policyv1.AllowedNets
	changed     bool
	superseded  bool
	pages       []*policyv1.ListAllowedNetsResponse
	changes     []*policyv1.ListChangesResponse
	propagation []any // *policyv1.GetPropagationResponse or error, the last one again and again
	explanation *decisionv1.Decision
	check       *checkv1.CheckResponse
	err         error
	firstErrs   []error // before the answers
	hang        bool
}

func (s *services) SetAllowedNets(ctx context.Context, req *policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) {
	if s.set != nil {
		return s.set(req)
	}
	s.request = req
	return &policyv1.SetAllowedNetsResponse{AllowedNets: s.allowed, Changed: s.changed, Superseded: s.superseded}, s.fail(ctx)
}

func (s *services) ClearAllowedNets(ctx context.Context, req *policyv1.ClearAllowedNetsRequest) (*policyv1.ClearAllowedNetsResponse, error) {
	s.request = req
	return &policyv1.ClearAllowedNetsResponse{AllowedNets: s.allowed, Changed: s.changed, Superseded: s.superseded}, s.fail(ctx)
}

func (s *services) GetAllowedNets(ctx context.Context, req *policyv1.GetAllowedNetsRequest) (*policyv1.GetAllowedNetsResponse, error) {
	s.request = req
	return &policyv1.GetAllowedNetsResponse{AllowedNets: s.allowed}, s.fail(ctx)
}

func (s *services) DeleteMailbox(ctx context.Context, req *policyv1.DeleteMailboxRequest) (*policyv1.DeleteMailboxResponse, error) {
	s.request = req
	return &policyv1.DeleteMailboxResponse{AllowedNets: s.allowed, Changed: s.changed, Superseded: s.superseded}, s.fail(ctx)
}

func (s *services) RenameMailbox(ctx context.Context, req *policyv1.RenameMailboxRequest) (*policyv1.RenameMailboxResponse, error) {
	s.request = req
	return &policyv1.RenameMailboxResponse{AllowedNets: s.allowed, Changed: s.changed}, s.fail(ctx)
}

func (s *services) ExplainAccess(ctx context.Context, req *policyv1.ExplainAccessRequest) (*policyv1.ExplainAccessResponse, error) {
	s.request = req
	return &policyv1.ExplainAccessResponse{Decision: s.explanation}, s.fail(ctx)
}

// ListChanges serves pages as ListAllowedNets does.
func (s *services) ListChanges(ctx context.Context, req *policyv1.ListChangesRequest) (*policyv1.ListChangesResponse, error) {
	s.request = req
	if err := s.fail(ctx); err != nil {
		return nil, err
	}
	page, _ := strconv.Atoi(req.GetPageToken())
	return s.changes[page], nil
}

func (s *services) GetPropagation(ctx context.Context, req *policyv1.GetPropagationRequest) (*policyv1.GetPropagationResponse, error) {
	s.request = req
	if err := s.fail(ctx); err != nil {
		return nil, err
	}
	next := s.propagation[0]
	if len(s.propagation) > 1 {
		s.propagation = s.propagation[1:]
	}
	if err, failed := next.(error); failed {
		return nil, err
	}
	return next.(*policyv1.GetPropagationResponse), nil //nolint:errcheck // the tests' own tables
}

// ListAllowedNets serves pages; the token of page i is its number.
func (s *services) ListAllowedNets(ctx context.Context, req *policyv1.ListAllowedNetsRequest) (*policyv1.ListAllowedNetsResponse, error) {
	s.request = req
	if err := s.fail(ctx); err != nil {
		return nil, err
	}
	page, _ := strconv.Atoi(req.GetPageToken())
	return s.pages[page], nil
}

func (s *services) Check(ctx context.Context, req *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	s.request = req
	return s.check, s.fail(ctx)
}

func (s *services) fail(ctx context.Context) error {
	s.calls++
	if write, ok := s.request.(interface{ GetRequestId() string }); ok {
		s.ids = append(s.ids, write.GetRequestId())
	}
	if s.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	if len(s.firstErrs) > 0 {
		err := s.firstErrs[0]
		s.firstErrs = s.firstErrs[1:]
		return err
	}
	return s.err
}

// start serves s in memory; what comes back dials it whatever the target.
func start(t *testing.T, s *services) dialer {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	policyv1.RegisterPolicyServiceServer(server, s)
	checkv1.RegisterCheckServiceServer(server, s)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // stopped before it served
			t.Errorf("fake services: %v", err)
		}
	})
	return func(_ string, creds credentials.TransportCredentials) (connection, error) {
		return grpc.NewClient("passthrough:memory", grpc.WithTransportCredentials(creds),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	}
}

// execute runs the program against s, in time that passes at once. Request ids that it makes up become <uuid>.
func execute(t *testing.T, s *services, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return executeOn(t, terminal{}, s, stdin, args...)
}

func executeOn(t *testing.T, term terminal, s *services, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	if !slices.Contains(args, "--tls-ca-file=x") {
		args = slices.Concat([]string{"--insecure-plaintext"}, args)
	}
	var out, errs bytes.Buffer
	term.in, term.out, term.err = strings.NewReader(stdin), &out, &errs
	synctest.Test(t, func(t *testing.T) {
		code = run(t.Context(), args, term, start(t, s))
	})
	return code, out.String(), partial.ReplaceAllString(madeUp.ReplaceAllString(errs.String(), "<uuid>"), ".<random>.partial")
}

var partial = regexp.MustCompile(`\.[0-9]+\.partial`)

var madeUp = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// givenID is a request id of a caller; those that the program makes up are of version 4.
const givenID = "0b1f3c1e-8a57-1c42-9f0e-5a3d4f6f7a10"

// checkRequest compares a request with what was expected, which has no request id if the program is to make one up.
func checkRequest(t *testing.T, want, got proto.Message) {
	t.Helper()
	if write, ok := got.(interface{ GetRequestId() string }); ok && !strings.Contains(prototext.Format(want), givenID) {
		if id, err := uuid.Parse(write.GetRequestId()); err != nil || id.Version() != 4 {
			t.Errorf("the request id is %q", write.GetRequestId())
		}
		got = proto.Clone(got)
		got.ProtoReflect().Clear(got.ProtoReflect().Descriptor().Fields().ByName("request_id"))
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

func sample() *policyv1.AllowedNets {
	return &policyv1.AllowedNets{
		Mailbox:    "alice@example.com",
		Nets:       []*policyv1.Net{{Net: "8.8.8.0/24"}, {Net: "2a00:1450::/32"}},
		Etag:       "3-aa",
		Revision:   "1-17",
		UpdateTime: timestamppb.New(time.Date(2026, 11, 23, 16, 5, 9, 1e6, time.UTC)),
		UpdatedBy:  "carol",
	}
}

func TestText(t *testing.T) {
	entry := `Mailbox   alice@example.com
Allowed   8.8.8.0/24
          2a00:1450::/32
Saved     2026-11-23 16:05:09 UTC by carol
Revision  1-17
Etag      3-aa
`
	fresh := decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS, Revision: "1-17"}
	runTable(t, []golden{
		{
			name:    "set",
			fake:    services{allowed: sample(), changed: true},
			args:    []string{"set", "alice@example.com", "8.8.8.0/24, 2a00:1450::/32"},
			request: &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: &policyv1.SetAllowedNetsRequest_Text{Text: "8.8.8.0/24, 2a00:1450::/32"}},
			stdout:  "Saved. alice@example.com can now be reached from these networks only.\n\n" + entry,
		},
		{
			name:    "set, quotes forgotten",
			fake:    services{allowed: sample(), changed: true},
			args:    []string{"set", "alice@example.com", "8.8.8.0/24,", "2a00:1450::/32"},
			request: &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: &policyv1.SetAllowedNetsRequest_Text{Text: "8.8.8.0/24, 2a00:1450::/32"}},
			stdout:  "Saved. alice@example.com can now be reached from these networks only.\n\n" + entry,
		},
		{
			name:  "set from standard input with everything",
			fake:  services{allowed: sample()},
			stdin: "8.8.8.0/24\n2a00:1450::/32\n\xff",
			args:  []string{"set", "--etag=2-bb", "--request-id=" + givenID, "--actor=carol", "--actor-address=192.0.2.1", "alice@example.com", "-"},
			request: &policyv1.SetAllowedNetsRequest{
				Mailbox: "alice@example.com", Input: &policyv1.SetAllowedNetsRequest_Text{Text: "8.8.8.0/24\n2a00:1450::/32\n\uFFFD"},
				Etag: "2-bb", RequestId: givenID, Actor: &policyv1.Actor{Id: "carol", Address: "192.0.2.1"},
			},
			stdout: "Nothing to change: alice@example.com has this list already.\n\n" + entry,
		},
		{
			name:    "set, validate only",
			fake:    services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com", Nets: []*policyv1.Net{{Net: "8.8.8.8"}}}, changed: true},
			args:    []string{"set", "--validate-only", "alice@example.com", "8.8.8.8"},
			request: &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: &policyv1.SetAllowedNetsRequest_Text{Text: "8.8.8.8"}, ValidateOnly: true},
			stdout:  "The list is valid. Nothing was saved.\n\nMailbox   alice@example.com\nAllowed   8.8.8.8\n",
		},
		{
			name:    "get",
			fake:    services{allowed: sample()},
			args:    []string{"get", "alice@example.com"},
			request: &policyv1.GetAllowedNetsRequest{Mailbox: "alice@example.com"},
			stdout:  entry,
		},
		{
			name:   "get, unrestricted",
			fake:   services{allowed: &policyv1.AllowedNets{Mailbox: "bob@example.com", Etag: "0"}},
			args:   []string{"get", "bob@example.com"},
			stdout: "Mailbox   bob@example.com\nAllowed   every address: unrestricted, there is no list\nEtag      0\n",
		},
		{
			name:   "nothing steers the terminal",
			fake:   services{allowed: &policyv1.AllowedNets{Mailbox: "bob@example.com", UpdatedBy: "a\x1b[31m\r\nb\u202e", UpdateTime: sample().GetUpdateTime()}},
			args:   []string{"get", "bob@example.com"},
			stdout: "Mailbox   bob@example.com\nAllowed   every address: unrestricted, there is no list\nSaved     2026-11-23 16:05:09 UTC by a\\u001b[31m\\u000d\\u000ab\\u202e\n",
		},
		{
			name:    "clear",
			fake:    services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}, changed: true},
			args:    []string{"clear", "alice@example.com", "--etag=3-aa", "--actor=carol"},
			request: &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", Etag: "3-aa", Actor: &policyv1.Actor{Id: "carol"}},
			stdout:  "Cleared. alice@example.com can now be reached from every address.\n",
		},
		{
			name:   "clear, nothing there",
			fake:   services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}},
			args:   []string{"clear", "alice@example.com"},
			stdout: "Nothing to change: alice@example.com had no list.\n",
		},
		{
			name: "list, three pages",
			fake: services{pages: []*policyv1.ListAllowedNetsResponse{
				{AllowedNets: []*policyv1.AllowedNets{sample()}, NextPageToken: "1", TotalSize: 2},
				{NextPageToken: "2", TotalSize: 2},
				{AllowedNets: []*policyv1.AllowedNets{{Mailbox: "b@example.com", Nets: []*policyv1.Net{{Net: "9.9.9.9"}}}}, TotalSize: 2},
			}},
			args:    []string{"list", "example.com"},
			request: &policyv1.ListAllowedNetsRequest{Domain: "example.com", PageToken: "2"},
			stdout: `MAILBOX            SAVED                    BY     ALLOWED
alice@example.com  2026-11-23 16:05:09 UTC  carol  8.8.8.0/24, 2a00:1450::/32
b@example.com      -                               9.9.9.9

2 mailboxes are restricted in example.com.
`,
		},
		{
			name:   "list, nobody",
			fake:   services{pages: []*policyv1.ListAllowedNetsResponse{{}}},
			args:   []string{"list", "example.com"},
			stdout: "No mailbox of example.com is restricted.\n",
		},
		{
			name:   "list, a page that repeats",
			fake:   services{pages: []*policyv1.ListAllowedNetsResponse{{NextPageToken: "0"}}},
			args:   []string{"list", "example.com"},
			code:   exitUnavailable,
			stderr: "allowednets: the policy service answered the same page twice; the list of example.com is incomplete\n",
		},
		{
			name: "check, allowed",
			fake: services{check: &checkv1.CheckResponse{
				Decision: &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, MatchedNet: "8.8.8.0/24", Revision: "1-17"},
				DataAge:  durationpb.New(2*time.Second + 1234567),
			}},
			args:    []string{"check", "alice@example.com", "8.8.8.8"},
			request: &checkv1.CheckRequest{Mailbox: "alice@example.com", ClientAddress: "8.8.8.8", Service: decisionv1.Service_SERVICE_IMAP},
			stdout: `Allowed   yes, the address lies in 8.8.8.0/24
Mailbox   alice@example.com
Client    8.8.8.8
Service   imap
Data      proven current 2.001s ago, revision 1-17
`,
		},
		{
			name:    "check, denied",
			fake:    services{check: &checkv1.CheckResponse{Decision: &fresh}},
			args:    []string{"check", "--service=smtp-submission", "alice@example.com", ""},
			request: &checkv1.CheckRequest{Mailbox: "alice@example.com", Service: decisionv1.Service_SERVICE_SMTP_SUBMISSION},
			code:    exitDenied,
			stdout: `Allowed   no, the address lies in none of the mailbox's networks
Mailbox   alice@example.com
Client    -
Service   smtp-submission
Data      never proven current, revision 1-17
`,
		},
		{
			name: "check, an answer without a verdict is a denial",
			fake: services{check: &checkv1.CheckResponse{}},
			args: []string{"check", "alice@example.com", "8.8.8.8"},
			code: exitDenied,
			stdout: `Allowed   no, REASON_UNSPECIFIED
Mailbox   alice@example.com
Client    8.8.8.8
Service   imap
Data      never proven current
`,
		},
		{
			name: "check, no answer",
			fake: services{err: rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED, "no verified state yet")},
			args: []string{"check", "alice@example.com", "8.8.8.8"}, code: exitUnavailable,
			stderr: "allowednets: no verified state yet\n",
		},
		{
			name: "set, bad entries",
			fake: services{err: rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID, "2 entries",
				&errdetails.BadRequest{},
				&policyv1.InvalidNets{InvalidNets: []*policyv1.InvalidNet{
					{Index: 0, Text: "8.8.8.8/24", Refusal: decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET, Message: `"8.8.8.8/24" has host bits set.`, Suggestions: []string{"8.8.8.8", "8.8.8.0/24"}},
					{Index: 2, Text: "9.9.9.0-9.9.9.191\x1b", Refusal: decisionv1.NetRefusal_NET_REFUSAL_RANGE, Message: "\"9.9.9.0-9.9.9.191\x1b\" is a range.", Suggestions: []string{"9.9.9.0/25", "9.9.9.128/26"}},
					{Index: 256, Refusal: decisionv1.NetRefusal_NET_REFUSAL_TOO_MANY, Message: "At most 256 entries."},
				}})},
			args: []string{"set", "alice@example.com", "8.8.8.8/24, 1.1.1.1, 9.9.9.0-9.9.9.191"}, code: exitUsage,
			stderr: `allowednets: 3 entries cannot be used. Nothing was saved.
  entry 1: "8.8.8.8/24" has host bits set.
    instead: 8.8.8.8  or  8.8.8.0/24
  entry 3: "9.9.9.0-9.9.9.191\u001b" is a range.
    instead: 9.9.9.0/25, 9.9.9.128/26
  entry 257: At most 256 entries.
`,
		},
		{
			name: "set, empty", fake: services{err: rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY, "empty")},
			args: []string{"set", "alice@example.com", ""}, code: exitUsage,
			stderr: "allowednets: the list has no entries. Nothing was saved. To lift the restriction: allowednets clear MAILBOX\n",
		},
		{
			name: "set, somebody was faster",
			fake: services{err: rpcerr.WithMetadata(codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH, "changed",
				map[string]string{"updated_by": "dave", "update_time": "2026-11-23T16:00:00Z", "etag": "4-cc"})},
			args: []string{"set", "--etag=3-aa", "alice@example.com", "8.8.8.8"}, code: exitDenied,
			stderr: "allowednets: the list was changed in the meantime by dave at 2026-11-23T16:00:00Z. Nothing was saved.\nLook at it with allowednets get, then repeat with --etag=4-cc\n",
		},
		{
			name: "store unavailable", fake: services{err: rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE, "the store did not answer")},
			args: []string{"clear", "alice@example.com"}, code: exitUnavailable,
			stderr: strings.Repeat("allowednets: no answer: the store did not answer. Asking again with the same request id.\n", 2) +
				"allowednets: the store did not answer\nThe change may or may not have been made. To find out, repeat the command with --request-id=<uuid>\n",
		},
		{
			name: "not permitted", fake: services{err: rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED, "caller may not")},
			args: []string{"get", "alice@example.com"}, code: exitDenied,
			stderr: "allowednets: caller may not\n",
		},
		{
			name: "an error that is not ours", fake: services{err: status.Error(codes.Unimplemented, "unknown service")},
			args: []string{"get", "alice@example.com"}, code: exitUnavailable,
			stderr: "allowednets: Unimplemented: unknown service\n",
		},
		{
			name: "nobody there", fake: services{err: status.Error(codes.Unavailable, "connection refused")},
			args: []string{"--policy-address=localhost:7", "--sidecar=unix:s", "get", "alice@example.com"}, code: exitUnavailable,
			stderr: "allowednets: no answer: connection refused\nIs the service running, and is this the right place? --policy-address is localhost:7, --sidecar is unix:s.\n",
		},
		{
			name: "a server that hangs", fake: services{hang: true},
			args: []string{"--timeout=10ms", "get", "alice@example.com"}, code: exitUnavailable,
			stderr: "allowednets: no answer within 10ms (--timeout)\n",
		},
		{
			name: "no such service", args: []string{"check", "--service=ftp", "alice@example.com", "8.8.8.8"}, code: exitUsage,
			stderr: "allowednets: --service \"ftp\": there is no such service; there are caldav, carddav, imap, local-delivery, managesieve, pop3, smtp-submission, webdav, webmail\n",
		},
		{
			name: "the unset service cannot be asked for", args: []string{"check", "--service=unspecified", "alice@example.com", "8.8.8.8"}, code: exitUsage,
			stderr: "allowednets: --service \"unspecified\": there is no such service; there are caldav, carddav, imap, local-delivery, managesieve, pop3, smtp-submission, webdav, webmail\n",
		},
		{
			name: "a sidecar elsewhere", args: []string{"--sidecar=mail.example.com:7480", "check", "alice@example.com", "8.8.8.8"}, code: exitUsage,
			stderr: "allowednets: --sidecar \"mail.example.com:7480\": give unix:PATH or a loopback host:port; a sidecar serves its own machine only\n",
		},
		{
			name: "plain text to another machine", args: []string{"--policy-address=policy.example.com:7443", "get", "alice@example.com"}, code: exitUsage,
			stderr: "allowednets: --insecure-plaintext is refused for \"policy.example.com:7443\": only a policy service on this machine (localhost:7443) may be called without TLS\n",
		},
		{
			name: "no command", args: nil, code: exitUsage,
			stderr: "allowednets: expected one of \"set\", \"get\", \"clear\", \"list\", \"history\", ...; allowednets --help shows what there is\n",
		},
		{
			name: "unknown flag", args: []string{"get", "--nets", "a@b"}, code: exitUsage,
			stderr: "allowednets: unknown flag --nets; allowednets --help shows what there is\n",
		},
		{
			name: "not UTF-8", args: []string{"get", "a\xff@b"}, code: exitUsage,
			stderr: "allowednets: \"a\\xff@b\" is not UTF-8 text\n",
		},
		{
			name: "too much input", stdin: strings.Repeat("8.8.8.8,", 1<<18), args: []string{"set", "a@b", "-"}, code: exitUsage,
			stderr: "allowednets: standard input is longer than 1048576 octets; no list of networks is\n",
		},
		{
			name: "half of the TLS files", args: []string{"--tls-ca-file=x", "get", "a@b"}, code: exitUsage,
			stderr: "allowednets: --tls-cert-file, --tls-key-file and --tls-ca-file are all needed (or --insecure-plaintext, on loopback only)\n",
		},
	})
}

// golden is a run of the program and all that it writes.
type golden struct {
	name    string
	fake    services
	term    terminal
	stdin   string
	args    []string
	request proto.Message // the last one
	code    int
	stdout  string
	stderr  string
}

func runTable(t *testing.T, tests []golden) {
	t.Helper()
	for i := range tests {
		tt := &tests[i]
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := executeOn(t, tt.term, &tt.fake, tt.stdin, tt.args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if diff := cmp.Diff(tt.stdout, stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.stderr, stderr); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			if tt.request != nil {
				checkRequest(t, tt.request, tt.fake.request)
			}
		})
	}
}

func TestJSON(t *testing.T) {
	deny := &checkv1.CheckResponse{Decision: &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_STALE}}
	page := &policyv1.ListAllowedNetsResponse{AllowedNets: []*policyv1.AllowedNets{sample()}, TotalSize: 1}
	tests := []struct {
		name string
		fake services
		args []string
		code int
		want proto.Message
		got  proto.Message
	}{
		{"set", services{allowed: sample(), changed: true}, []string{"set", "a@b", "8.8.8.8"}, 0, &policyv1.SetAllowedNetsResponse{AllowedNets: sample(), Changed: true}, &policyv1.SetAllowedNetsResponse{}},
		{"get", services{allowed: sample()}, []string{"get", "a@b"}, 0, &policyv1.GetAllowedNetsResponse{AllowedNets: sample()}, &policyv1.GetAllowedNetsResponse{}},
		{"clear", services{allowed: sample()}, []string{"clear", "a@b"}, 0, &policyv1.ClearAllowedNetsResponse{AllowedNets: sample()}, &policyv1.ClearAllowedNetsResponse{}},
		{"list", services{pages: []*policyv1.ListAllowedNetsResponse{page}}, []string{"list", "b"}, 0, page, &policyv1.ListAllowedNetsResponse{}},
		{"check", services{check: deny}, []string{"check", "a@b", "8.8.8.8"}, exitDenied, deny, &checkv1.CheckResponse{}},
	}
	for i := range tests {
		tt := &tests[i]
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("ALLOWEDNETS_OUTPUT", "json")
			code, stdout, stderr := execute(t, &tt.fake, "", tt.args...)
			if code != tt.code || stderr != "" {
				t.Errorf("exit code %d, want %d; stderr %q", code, tt.code, stderr)
			}
			if err := protojson.Unmarshal([]byte(stdout), tt.got); err != nil {
				t.Fatalf("%v in %s", err, stdout)
			}
			if diff := cmp.Diff(tt.want, tt.got, protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestJSONErrorIsAStatus(t *testing.T) {
	fake := services{err: rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID, "no",
		&policyv1.InvalidNets{InvalidNets: []*policyv1.InvalidNet{{Index: 1, Text: "x"}}})}
	code, stdout, stderr := execute(t, &fake, "", "--output=json", "set", "a@b", "x")
	if code != exitUsage || stdout != "" {
		t.Errorf("exit code %d, stdout %q", code, stdout)
	}
	var got struct {
		Code    int
		Details []struct {
			Reason      string
			InvalidNets []struct{ Text string }
		}
	}
	if err := json.Unmarshal([]byte(stderr), &got); err != nil {
		t.Fatalf("%v in %s", err, stderr)
	}
	if got.Code != int(codes.InvalidArgument) || got.Details[0].Reason != "NETS_INVALID" || got.Details[1].InvalidNets[0].Text != "x" {
		t.Errorf("status is %s", stderr)
	}
}
