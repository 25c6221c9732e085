package policyapi_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/policyapi"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const soon = 20 * time.Second

var errWire = errors.New("etcdserver: something internal at 192.0.2.77:2379")

// world is a PolicyService on a real etcd behind the product's gRPC server.
type world struct {
	t      *testing.T
	etcd   *etcdtest.Etcd
	wire   *etcdtest.Wire
	conn   *grpc.ClientConn
	client policyv1.PolicyServiceClient
	other  *store.Store // of another replica of the service

	mu      sync.Mutex
	faults  []error
	domains []string // that the caller is limited to; nil: all. Set before the first call.
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldUnder(t, allow.Rules{})
}

func newWorldUnder(t *testing.T, rules allow.Rules) *world {
	t.Helper()
	w := &world{t: t, etcd: etcdtest.Start(t), wire: &etcdtest.Wire{}}
	w.other = w.open(&etcdtest.Wire{})
	lists, mirror := w.open(w.wire), store.NewMirror()
	metrics, log := prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	timing := store.Timing{Tail: 20 * time.Millisecond, Stall: 100 * time.Millisecond, Scrub: time.Hour, Retry: 20 * time.Millisecond}
	replica, err := store.NewReplica(lists, mirror, timing, log, metrics)
	if err != nil {
		t.Fatal(err)
	}
	service := policyapi.New(policyapi.Config{Store: lists, Mirror: mirror, Barrier: replica.Barrier, Tracker: propagation.NewTracker(), Replica: "this", Rules: rules,
		Domains: func(string) ([]string, bool) { return w.domains, w.domains != nil }, Fault: func(_ context.Context, err error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.faults = append(w.faults, err)
		}})
	server, err := serve.NewGRPC(serve.GRPCConfig{Credentials: insecure.NewCredentials(), Log: log, Metrics: metrics},
		func(r grpc.ServiceRegistrar) { policyv1.RegisterPolicyServiceServer(r, service) })
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 20)
	conn, err := grpc.NewClient("passthrough:bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = replica.Run(ctx) })
	running.Go(func() { _ = server.Run(ctx, nil, lis) })
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		running.Wait()
	})
	w.conn, w.client = conn, policyv1.NewPolicyServiceClient(conn)
	if _, err := mirror.Wait(w.ctx(), func(store.State) bool { return true }); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) open(wire *etcdtest.Wire) *store.Store {
	w.t.Helper()
	s, err := store.Open(w.ctx(), store.Config{Endpoints: []string{w.etcd.Endpoint()}, DialOptions: wire.Options()}, true)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = s.Close() })
	return s
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), soon)
	w.t.Cleanup(cancel)
	return ctx
}

// faulty returns what the service said to the operator since the last call.
func (w *world) faulty() []error {
	w.mu.Lock()
	defer w.mu.Unlock()
	faults := w.faults
	w.faults = nil
	return faults
}

func nets(texts ...string) *policyv1.SetAllowedNetsRequest_List {
	list := &policyv1.NetList{}
	for _, text := range texts {
		list.Nets = append(list.Nets, &policyv1.Net{Net: text})
	}
	return &policyv1.SetAllowedNetsRequest_List{List: list}
}

func text(s string) *policyv1.SetAllowedNetsRequest_Text {
	return &policyv1.SetAllowedNetsRequest_Text{Text: s}
}

func (w *world) set(req *policyv1.SetAllowedNetsRequest) *policyv1.SetAllowedNetsResponse {
	w.t.Helper()
	resp, err := w.client.SetAllowedNets(w.ctx(), req)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

func (w *world) get(name string) *policyv1.AllowedNets {
	w.t.Helper()
	resp, err := w.client.GetAllowedNets(w.ctx(), &policyv1.GetAllowedNetsRequest{Mailbox: name})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.GetAllowedNets()
}

func shown(a *policyv1.AllowedNets) string {
	texts := make([]string, len(a.GetNets()))
	for i, n := range a.GetNets() {
		texts[i] = n.GetNet()
	}
	return strings.Join(texts, " ")
}

// wantError expects a status with a reason, and no words that are none of the caller's business.
func wantError(t *testing.T, err error, code codes.Code, reason decisionv1.ErrorReason) {
	t.Helper()
	if status.Code(err) != code || rpcerr.Reason(err) != reason {
		t.Errorf("error = %v, want %v with %v", err, code, reason)
	}
	st := status.Convert(err)
	all := st.Message()
	for _, d := range st.Details() {
		all += fmt.Sprint(d)
	}
	for _, word := range []string{"etcd", "192.0.2.77", "rpc error", "goroutine", "context", "/allowednets/v1"} {
		if strings.Contains(all, word) {
			t.Errorf("the error says %q: %s", word, all)
		}
	}
}

func TestSetGetClear(t *testing.T) {
	w := newWorld(t)
	absent := w.get("Alice@EXAMPLE.com")
	if diff := cmp.Diff(&policyv1.AllowedNets{Mailbox: "alice@example.com", Etag: absent.GetEtag()}, absent, protocmp.Transform()); diff != "" || absent.GetEtag() == "" {
		t.Errorf("a mailbox without a list (-want +got):\n%s", diff)
	}
	before := time.Now().Add(-time.Millisecond)
	set := w.set(&policyv1.SetAllowedNetsRequest{
		Mailbox: "ALICE@example.com.", Input: text(" 8.8.8.0/24;\n2A00:1450:0::/32,,\t::ffff:1.1.1.1 8.8.8.0/24"), Etag: absent.GetEtag(),
		RequestId: uuid.NewString(), Actor: &policyv1.Actor{Id: "Jürgen 👩‍💻", Address: "::ffff:9.9.9.9"},
	})
	want := &policyv1.AllowedNets{
		Mailbox: "alice@example.com", Nets: []*policyv1.Net{{Net: "8.8.8.0/24"}, {Net: "2a00:1450::/32"}, {Net: "1.1.1.1"}}, UpdatedBy: "Jürgen 👩‍💻",
		Etag: set.GetAllowedNets().GetEtag(), Revision: set.GetAllowedNets().GetRevision(), UpdateTime: set.GetAllowedNets().GetUpdateTime(),
	}
	if diff := cmp.Diff(want, set.GetAllowedNets(), protocmp.Transform()); diff != "" || !set.GetChanged() {
		t.Errorf("changed %v (-want +got):\n%s", set.GetChanged(), diff)
	}
	if at := set.GetAllowedNets().GetUpdateTime().AsTime(); at.Before(before) || at.After(time.Now()) {
		t.Errorf("updated at %v", at)
	}
	if want.GetEtag() == "" || want.GetRevision() == "" || want.GetEtag() == absent.GetEtag() {
		t.Errorf("etag %q, revision %q", want.GetEtag(), want.GetRevision())
	}
	if diff := cmp.Diff(want, w.get("alice@example.com"), protocmp.Transform()); diff != "" {
		t.Errorf("Get (-want +got):\n%s", diff)
	}

	// The same in other words, with an etag that is long gone.
	same := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.0/24", "2a00:1450::/32", "1.1.1.1/32"), Etag: absent.GetEtag(), Actor: &policyv1.Actor{Id: "other"}})
	if diff := cmp.Diff(want, same.GetAllowedNets(), protocmp.Transform()); diff != "" || same.GetChanged() {
		t.Errorf("the same list: changed %v (-want +got):\n%s", same.GetChanged(), diff)
	}

	draft := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), ValidateOnly: true})
	if diff := cmp.Diff(&policyv1.AllowedNets{Mailbox: "alice@example.com", Nets: []*policyv1.Net{{Net: "9.9.9.9"}}}, draft.GetAllowedNets(), protocmp.Transform()); diff != "" || draft.GetChanged() {
		t.Errorf("a draft: changed %v (-want +got):\n%s", draft.GetChanged(), diff)
	}
	for _, onlyValidate := range []bool{true, false} {
		resp, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", Etag: want.GetEtag(), ValidateOnly: onlyValidate})
		got := resp.GetAllowedNets()
		if err != nil || resp.GetChanged() == onlyValidate || shown(got) != "" || got.GetMailbox() != "alice@example.com" {
			t.Errorf("Clear with validate_only %v = %v, %v", onlyValidate, resp, err)
		}
		if !onlyValidate && (got.GetUpdatedBy() != serve.PlaintextCaller || got.GetEtag() == absent.GetEtag() || got.GetRevision() == "") {
			t.Errorf("a cleared mailbox is %v", got)
		}
	}
	if resp, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com"}); err != nil || resp.GetChanged() {
		t.Errorf("clearing again = %v, %v", resp, err)
	}
	if faults := w.faulty(); len(faults) > 0 {
		t.Errorf("faults %v", faults)
	}
}

// TestAudit: who did it, from where, through which service.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	id := uuid.New()
	w.set(&policyv1.SetAllowedNetsRequest{
		Mailbox: "alice@example.com", Input: nets("8.8.8.8"), RequestId: strings.ToUpper(id.String()),
		Actor: &policyv1.Actor{Id: "admin", Address: "2A00::0:1"},
	})
	resp, err := w.etcd.Client().Get(t.Context(), "/allowednets/v1/log")
	if err != nil {
		t.Fatal(err)
	}
	var c storev1.Change
	if err := proto.Unmarshal(resp.Kvs[0].Value, &c); err != nil {
		t.Fatal(err)
	}
	if c.GetActorId() != "admin" || c.GetActorAddress() != "2a00::1" || c.GetCaller() != serve.PlaintextCaller || c.GetRequestId() != id.String() || c.GetAfter().GetUpdatedBy() != "admin" {
		t.Errorf("the audit record is %v", &c)
	}
}

// TestRequestID: a repetition is recognised in every spelling of the UUID, other content is refused.
func TestRequestID(t *testing.T) {
	w := newWorld(t)
	id := uuid.NewString()
	first := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8"), RequestId: id})
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9")})
	for _, spelling := range []string{id, strings.ToUpper(id), "urn:uuid:" + id, strings.ReplaceAll(id, "-", "")} {
		again := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: text("8.8.8.8/32"), RequestId: spelling})
		if diff := cmp.Diff(first.GetAllowedNets(), again.GetAllowedNets(), protocmp.Transform()); diff != "" || again.GetChanged() {
			t.Errorf("repetition with %s: changed %v (-want +got):\n%s", spelling, again.GetChanged(), diff)
		}
	}
	_, err := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("1.1.1.1"), RequestId: id})
	wantError(t, err, codes.AlreadyExists, decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED)
	_, err = w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", RequestId: id})
	wantError(t, err, codes.AlreadyExists, decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED)
	if got := shown(w.get("alice@example.com")); got != "9.9.9.9" {
		t.Errorf("the list is %s", got)
	}
}

func TestEtagMismatch(t *testing.T) {
	w := newWorld(t)
	absent := w.get("alice@example.com").GetEtag()
	first := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8"), Actor: &policyv1.Actor{Id: "first"}})
	now := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), Actor: &policyv1.Actor{Id: "second"}}).GetAllowedNets()
	for _, etag := range []string{absent, first.GetAllowedNets().GetEtag(), "nonsense\r\n", strings.Repeat("x", 10_000)} {
		_, set := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("1.1.1.1"), Etag: etag})
		_, cleared := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", Etag: etag})
		for _, err := range []error{set, cleared} {
			wantError(t, err, codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH)
			want := map[string]string{"etag": now.GetEtag(), "updated_by": "second", "update_time": now.GetUpdateTime().AsTime().Format(time.RFC3339)}
			if diff := cmp.Diff(want, rpcerr.Detail[*errdetails.ErrorInfo](err).GetMetadata()); diff != "" {
				t.Errorf("metadata (-want +got):\n%s", diff)
			}
			if msg := status.Convert(err).Message(); !strings.Contains(msg, "second") || !strings.Contains(msg, want["update_time"]) {
				t.Errorf("the message does not say who and when: %s", msg)
			}
		}
	}
	_, err := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: "bob@example.com", Input: nets("1.1.1.1"), Etag: now.GetEtag()})
	wantError(t, err, codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH)
	if got := rpcerr.Detail[*errdetails.ErrorInfo](err).GetMetadata(); got["etag"] != absent || len(got) != 1 {
		t.Errorf("metadata for a mailbox that never had a list: %v", got)
	}
}

// TestInvalidNets: every bad entry is reported, in a form for people and in one for programs, and nothing is saved.
func TestInvalidNets(t *testing.T) {
	w := newWorld(t)
	inputs := map[string]*policyv1.SetAllowedNetsRequest{
		"pieces": {Mailbox: "alice@example.com", Input: nets("8.8.8.8", " ", "10.0.0.0/8", "8.8.8.8/24", "1.1.1.1", "bad\r\nentry")},
		"text":   {Mailbox: "alice@example.com", Input: text("8.8.8.8,, 10.0.0.0/8; 8.8.8.8/24\n1.1.1.1 bad\x00entry")},
	}
	for name, req := range inputs {
		t.Run(name, func(t *testing.T) {
			_, err := w.client.SetAllowedNets(w.ctx(), req)
			wantError(t, err, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID)
			type bad struct {
				Index       int32
				Refusal     decisionv1.NetRefusal
				Block       string
				Suggestions []string
			}
			want := []bad{
				{1, decisionv1.NetRefusal_NET_REFUSAL_PRIVATE, "10.0.0.0/8", nil},
				{2, decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET, "", []string{"8.8.8.8", "8.8.8.0/24"}},
				{4, decisionv1.NetRefusal_NET_REFUSAL_SYNTAX, "", nil},
			}
			var got []bad
			violations := rpcerr.Detail[*errdetails.BadRequest](err).GetFieldViolations()
			for i, n := range rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets() {
				got = append(got, bad{n.GetIndex(), n.GetRefusal(), n.GetBlock(), n.GetSuggestions()})
				if n.GetText() == "" || n.GetMessage() == "" || strings.ContainsAny(n.GetMessage(), "\r\n\x00") {
					t.Errorf("entry %d: %q is refused by %q", i, n.GetText(), n.GetMessage())
				}
				v := violations[i]
				if v.GetField() != fmt.Sprintf("nets[%d]", n.GetIndex()) || v.GetDescription() != n.GetMessage() || v.GetReason() != n.GetRefusal().String() {
					t.Errorf("violation %d is %v", i, v)
				}
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" || len(violations) != len(want) {
				t.Errorf("%d violations, (-want +got):\n%s", len(violations), diff)
			}
			if l := w.get("alice@example.com"); shown(l) != "" || l.GetRevision() != "" {
				t.Errorf("it was saved: %v", l)
			}
		})
	}
}

// TestManyInvalidNets: the longest list, all bad, with the longest texts.
func TestManyInvalidNets(t *testing.T) {
	w := newWorld(t)
	bad := make([]string, 256)
	for i := range bad {
		bad[i] = fmt.Sprintf("%d%s", i, strings.Repeat("ü", 120)) // two octets each
	}
	_, err := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets(bad...)})
	wantError(t, err, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID)
	if n := len(rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets()); n != len(bad) {
		t.Errorf("%d of %d are reported", n, len(bad))
	}
}

// TestBadInput: one bad field each; the error names it.
func TestBadInput(t *testing.T) {
	w := newWorld(t)
	const mailboxInvalid, fieldInvalid = decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID
	const netsInvalid, netsEmpty, domainInvalid = decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY, decisionv1.ErrorReason_ERROR_REASON_DOMAIN_INVALID
	type set = policyv1.SetAllowedNetsRequest
	type list = policyv1.ListAllowedNetsRequest
	good := func(change func(*set)) *set {
		req := &set{Mailbox: "alice@example.com", Input: nets("8.8.8.8")}
		change(req)
		return req
	}
	token := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	hundredThousand := make([]string, 100_000)
	for i := range hundredThousand {
		hundredThousand[i] = fmt.Sprintf("8.%d.%d.%d", i>>16, i>>8&255, i&255)
	}
	tests := []struct {
		name   string
		req    proto.Message
		reason decisionv1.ErrorReason
		field  string
	}{
		{"no mailbox", good(func(r *set) { r.Mailbox = "" }), mailboxInvalid, "mailbox"},
		{"mailbox without domain", good(func(r *set) { r.Mailbox = "alice" }), mailboxInvalid, "mailbox"},
		{"mailbox with a line break", good(func(r *set) { r.Mailbox = "alice\r\n@example.com" }), mailboxInvalid, "mailbox"},
		{"mailbox with a null", good(func(r *set) { r.Mailbox = "alice\x00@example.com" }), mailboxInvalid, "mailbox"},
		{"mailbox with a slash in its domain", good(func(r *set) { r.Mailbox = "alice@example.com/../bob" }), mailboxInvalid, "mailbox"},
		{"mailbox of 10 kB", good(func(r *set) { r.Mailbox = strings.Repeat("a", 10_000) + "@example.com" }), mailboxInvalid, "mailbox"},
		{"mailbox with a domain of 10 kB", good(func(r *set) { r.Mailbox = "a@" + strings.Repeat("b.", 5_000) + "com" }), mailboxInvalid, "mailbox"},
		{"mailbox to clear", &policyv1.ClearAllowedNetsRequest{Mailbox: "@"}, mailboxInvalid, "mailbox"},
		{"mailbox to get", &policyv1.GetAllowedNetsRequest{Mailbox: "a*b@example.com"}, mailboxInvalid, "mailbox"},
		{"no input", good(func(r *set) { r.Input = nil }), netsEmpty, "nets"},
		{"no nets", good(func(r *set) { r.Input = nets() }), netsEmpty, "nets"},
		{"no list", good(func(r *set) { r.Input = &policyv1.SetAllowedNetsRequest_List{} }), netsEmpty, "nets"},
		{"empty nets", good(func(r *set) { r.Input = nets("", " \n") }), netsEmpty, "nets"},
		{"no text", good(func(r *set) { r.Input = text("") }), netsEmpty, "nets"},
		{"text of separators", good(func(r *set) { r.Input = text(" ,;\r\n\t") }), netsEmpty, "nets"},
		{"100,000 nets", good(func(r *set) { r.Input = text(strings.Join(hundredThousand, "\n")[:900_000]) }), netsInvalid, "nets[0]"},
		{"too many nets", good(func(r *set) { r.Input = nets(hundredThousand[:257]...) }), netsInvalid, "nets[256]"},
		{"a net of 100 kB", good(func(r *set) { r.Input = nets(strings.Repeat("8", 100_000)) }), netsInvalid, "nets[0]"},
		{"request id", good(func(r *set) { r.RequestId = "not a uuid" }), fieldInvalid, "request_id"},
		{"request id with a line break", good(func(r *set) { r.RequestId = "\r\nx" }), fieldInvalid, "request_id"},
		{"request id of 10 kB", good(func(r *set) { r.RequestId = strings.Repeat("0", 10_000) }), fieldInvalid, "request_id"},
		{"request id to clear", &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", RequestId: "1"}, fieldInvalid, "request_id"},
		{"long actor", good(func(r *set) { r.Actor = &policyv1.Actor{Id: strings.Repeat("ü", 128)} }), fieldInvalid, "actor.id"},
		{"actor with a line break", good(func(r *set) { r.Actor = &policyv1.Actor{Id: "a\r\nb"} }), fieldInvalid, "actor.id"},
		{"actor with an escape", good(func(r *set) { r.Actor = &policyv1.Actor{Id: "\x1b[2J"} }), fieldInvalid, "actor.id"},
		{"actor's address", good(func(r *set) { r.Actor = &policyv1.Actor{Address: "here"} }), fieldInvalid, "actor.address"},
		{"actor's address with a port", good(func(r *set) { r.Actor = &policyv1.Actor{Address: "8.8.8.8:80"} }), fieldInvalid, "actor.address"},
		{"actor's address with a zone", good(func(r *set) { r.Actor = &policyv1.Actor{Address: "fe80::1%eth0"} }), fieldInvalid, "actor.address"},
		{"actor's address of 10 kB", good(func(r *set) { r.Actor = &policyv1.Actor{Address: strings.Repeat("\n", 10_000)} }), fieldInvalid, "actor.address"},
		{"actor to clear", &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", Actor: &policyv1.Actor{Id: "\x00"}}, fieldInvalid, "actor.id"},
		{"a mailbox for a domain", &list{Domain: "alice@example.com"}, domainInvalid, "domain"},
		{"domain with a line break", &list{Domain: "example.com\r\n"}, domainInvalid, "domain"},
		{"domain of 10 kB", &list{Domain: strings.Repeat("a", 10_000)}, domainInvalid, "domain"},
		{"negative page", &list{Domain: "example.com", PageSize: -1}, fieldInvalid, "page_size"},
		{"token that is none", &list{Domain: "example.com", PageToken: "!"}, fieldInvalid, "page_token"},
		{"token of nothing", &list{Domain: "example.com", PageToken: token("x")}, fieldInvalid, "page_token"},
		{"token of another domain", &list{Domain: "example.com", PageToken: token("alice@example.org")}, fieldInvalid, "page_token"},
		{"token with a line break", &list{Domain: "example.com", PageToken: token("al\nice@example.com")}, fieldInvalid, "page_token"},
		{"start that is no mailbox", &list{Domain: "example.com", AfterMailbox: "alice"}, fieldInvalid, "after_mailbox"},
		{"start in another domain", &list{Domain: "example.com", AfterMailbox: "alice@example.org"}, fieldInvalid, "after_mailbox"},
		{"start and token", &list{Domain: "example.com", AfterMailbox: "a@example.com", PageToken: token("a@example.com")}, fieldInvalid, "after_mailbox"},
		{"token of 10 kB", &list{Domain: "example.com", PageToken: token(strings.Repeat("a", 10_000) + "@example.com")}, fieldInvalid, "page_token"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := w.call(tt.req)
			wantError(t, err, codes.InvalidArgument, tt.reason)
			violations := rpcerr.Detail[*errdetails.BadRequest](err).GetFieldViolations()
			if len(violations) != 1 || violations[0].GetField() != tt.field || violations[0].GetDescription() == "" {
				t.Errorf("violations %v, want one of %s", violations, tt.field)
			}
			st := status.Convert(err)
			if strings.ContainsAny(st.Message(), "\r\n\x00\x1b") || len(st.Message()) > 2000 || proto.Size(st.Proto()) > 8000 {
				t.Errorf("%d octets with details %d: %q", len(st.Message()), proto.Size(st.Proto()), st.Message())
			}
		})
	}
	t.Run("10 MB", func(t *testing.T) {
		err := w.call(good(func(r *set) { r.Input = text(strings.Repeat("8.8.8.8,", 10<<20/8)) }))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("not UTF-8", func(t *testing.T) {
		err := w.call(good(func(r *set) { r.Mailbox = "\xff@example.com" }))
		if c := status.Code(err); c != codes.Internal { // our own client refuses to send it
			t.Errorf("error = %v", err)
		}
	})
	if faults := w.faulty(); len(faults) > 0 {
		t.Errorf("a caller's fault was reported to the operator: %v", faults)
	}
	if l := w.get("alice@example.com"); l.GetRevision() != "" {
		t.Errorf("something was saved: %v", l)
	}
}

// call calls the RPC of a request.
func (w *world) call(req proto.Message) (err error) {
	w.t.Helper()
	switch req := req.(type) {
	case *policyv1.SetAllowedNetsRequest:
		_, err = w.client.SetAllowedNets(w.ctx(), req)
	case *policyv1.ClearAllowedNetsRequest:
		_, err = w.client.ClearAllowedNets(w.ctx(), req)
	case *policyv1.GetAllowedNetsRequest:
		_, err = w.client.GetAllowedNets(w.ctx(), req)
	case *policyv1.ListAllowedNetsRequest:
		_, err = w.client.ListAllowedNets(w.ctx(), req)
	}
	return err
}

// all is a good request of every RPC.
func all() []proto.Message {
	return []proto.Message{
		&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8"), RequestId: uuid.NewString()},
		&policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com"},
		&policyv1.GetAllowedNetsRequest{Mailbox: "alice@example.com"},
		&policyv1.ListAllowedNetsRequest{Domain: "example.com"},
	}
}

// TestStoreFaults: what is wrong behind the service is said in a reason, and only the operator hears the details.
func TestStoreFaults(t *testing.T) {
	const damaged, unavailable = decisionv1.ErrorReason_ERROR_REASON_STORE_DAMAGED, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE
	value := func(m proto.Message) string {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	put := func(w *world, key, value string) {
		if _, err := w.etcd.Client().Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name   string
		fault  func(w *world)
		code   codes.Code
		reason decisionv1.ErrorReason
		rpcs   int // of all
	}{
		{"etcd does not answer", func(w *world) {
			w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
		}, codes.Unavailable, unavailable, 4},
		{"record edited by hand", func(w *world) {
			put(w, "/allowednets/v1/mailboxes/alice@example.com", "\xff")
		}, codes.DataLoss, damaged, 3},
		{"meta deleted", func(w *world) {
			if _, err := w.etcd.Client().Delete(t.Context(), "/allowednets/v1/meta"); err != nil {
				t.Fatal(err)
			}
		}, codes.DataLoss, damaged, 4},
		{"another store", func(w *world) {
			put(w, "/allowednets/v1/meta", value(&storev1.Meta{Format: 1, Epoch: 1, Id: 7}))
		}, codes.DataLoss, damaged, 4},
		{"a later format", func(w *world) {
			put(w, "/allowednets/v1/meta", value(&storev1.Meta{Format: 2, Epoch: 1, Id: 7}))
		}, codes.DataLoss, damaged, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9")})
			tt.fault(w)
			for i, req := range all() {
				err := w.call(req)
				faults := w.faulty()
				if i >= tt.rpcs {
					if err != nil {
						t.Errorf("%T = %v", req, err)
					}
					continue
				}
				wantError(t, err, tt.code, tt.reason)
				if len(faults) != 1 {
					t.Errorf("%T: the operator was told %v", req, faults)
				}
			}
		})
	}
}

// TestUnknownOutcome: the answer to a write is lost for good; with the same request id the caller finds out.
func TestUnknownOutcome(t *testing.T) {
	w := newWorld(t)
	var written atomic.Bool
	w.wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if txn, ok := req.(*pb.TxnRequest); ok && len(txn.GetSuccess()) == 3 {
			written.Store(true)
			return errors.Join(call(), errWire)
		}
		if written.Load() {
			return errWire // it cannot look whether its write took effect
		}
		return call()
	})
	req := &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8"), RequestId: uuid.NewString()}
	_, err := w.client.SetAllowedNets(w.ctx(), req)
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	if !strings.Contains(status.Convert(err).Message(), "request_id") {
		t.Errorf("the error does not say what to do: %v", err)
	}
	w.wire.OnCall(nil)
	if resp := w.set(req); resp.GetChanged() || shown(resp.GetAllowedNets()) != "8.8.8.8" {
		t.Errorf("the repetition = %v", resp)
	}
}

// TestCallersPatience: a caller that goes away, or whose deadline passes, is not told of a fault of the store.
func TestCallersPatience(t *testing.T) {
	w := newWorld(t)
	entered := make(chan struct{}, 100)
	w.wire.OnCall(func(ctx context.Context, _, _ any, _ func() error) error {
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	for range 2 {
		ctx, cancel := context.WithCancel(w.ctx())
		go func() {
			<-entered
			cancel()
		}()
		_, err := w.client.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: "alice@example.com"})
		if status.Code(err) != codes.Canceled {
			t.Errorf("a cancelled call = %v", err)
		}
		short, cancelShort := context.WithTimeout(w.ctx(), 100*time.Millisecond)
		_, err = w.client.SetAllowedNets(short, &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8")})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a call in a hurry = %v", err)
		}
		cancelShort()
	}
	w.wire.OnCall(nil)
}

func TestList(t *testing.T) {
	w := newWorld(t)
	var names []string
	for i := range 25 {
		name := fmt.Sprintf("user%02d@example.com", i)
		w.set(&policyv1.SetAllowedNetsRequest{Mailbox: name, Input: nets(fmt.Sprintf("8.8.%d.0/24", i))})
		names = append(names, name)
	}
	for _, elsewhere := range []string{"alice@example.org", "alice@sub.example.com", "alice@xample.com"} {
		w.set(&policyv1.SetAllowedNetsRequest{Mailbox: elsewhere, Input: nets("9.9.9.9")})
	}
	page := func(req *policyv1.ListAllowedNetsRequest) (*policyv1.ListAllowedNetsResponse, []string) {
		t.Helper()
		resp, err := w.client.ListAllowedNets(w.ctx(), req)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range resp.GetAllowedNets() {
			got = append(got, a.GetMailbox())
		}
		return resp, got
	}
	for _, size := range []int32{0, 1, 7, 24, 25, 26, 1000, 1001, 1<<31 - 1} {
		var got []string
		for req := (&policyv1.ListAllowedNetsRequest{Domain: "EXAMPLE.com.", PageSize: size}); ; {
			resp, some := page(req)
			if got = append(got, some...); size > 0 && len(some) > int(size) || resp.GetTotalSize() != 25 {
				t.Fatalf("a page of %d, at most %d, of %d", len(some), size, resp.GetTotalSize())
			}
			if req.PageToken = resp.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
		}
		if !slices.Equal(got, names) {
			t.Errorf("pages of %d show %v", size, got)
		}
	}
	// What a page shows is what Get shows.
	resp, _ := page(&policyv1.ListAllowedNetsRequest{Domain: "example.com", PageSize: 3})
	for _, a := range resp.GetAllowedNets() {
		if diff := cmp.Diff(w.get(a.GetMailbox()), a, protocmp.Transform()); diff != "" {
			t.Errorf("List differs from Get (-get +list):\n%s", diff)
		}
	}
	// Between two pages the last mailbox of the first is cleared, one before it is added, one after it is added.
	if _, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: names[2]}); err != nil {
		t.Fatal(err)
	}
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "aaa@example.com", Input: nets("9.9.9.9")})
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "user02z@example.com", Input: nets("9.9.9.9")})
	rest, some := page(&policyv1.ListAllowedNetsRequest{Domain: "example.com", PageToken: resp.GetNextPageToken()})
	if want := append([]string{"user02z@example.com"}, names[3:]...); !slices.Equal(some, want) || rest.GetTotalSize() != 26 {
		t.Errorf("after a change the rest is %v of %d, not %v", some, rest.GetTotalSize(), want)
	}
	for after, want := range map[string][]string{
		"User02@Example.COM":  append([]string{"user02z@example.com"}, names[3:]...), // cleared, and spelt as people do
		"user23a@example.com": names[24:],
		"zzz@example.com":     nil,
	} {
		if resp, some := page(&policyv1.ListAllowedNetsRequest{Domain: "example.com", AfterMailbox: after}); !slices.Equal(some, want) || resp.GetTotalSize() != 26 {
			t.Errorf("after %s there are %v of %d, not %v", after, some, resp.GetTotalSize(), want)
		}
	}
	if resp, some := page(&policyv1.ListAllowedNetsRequest{Domain: "empty.example.com"}); len(some) > 0 || resp.GetTotalSize() != 0 || resp.GetNextPageToken() != "" {
		t.Errorf("an empty domain shows %v", resp)
	}
}

// TestReadsAreCurrent: List and Get show every save that was acknowledged before, also by another replica of the service.
func TestReadsAreCurrent(t *testing.T) {
	w := newWorld(t)
	mailbox, err := allow.ParseMailbox("alice@example.com")
	if err != nil {
		t.Fatal(err)
	}
	save := func(i int) string {
		list, err := allow.Rules{}.ParseText(fmt.Sprintf("8.8.%d.0/24", i))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := w.other.Save(t.Context(), store.Save{Mailbox: mailbox, List: list, Author: store.Author{Caller: "other"}}); err != nil {
			t.Fatal(err)
		}
		return list.Strings()[0]
	}
	for i := range 50 {
		want := save(i)
		resp, err := w.client.ListAllowedNets(w.ctx(), &policyv1.ListAllowedNetsRequest{Domain: "example.com"})
		if err != nil || len(resp.GetAllowedNets()) != 1 || shown(resp.GetAllowedNets()[0]) != want {
			t.Fatalf("after saving %s List shows %v, %v", want, resp, err)
		}
		if got := shown(w.get("alice@example.com")); got != want {
			t.Fatalf("after saving %s Get shows %s", want, got)
		}
	}
	// With a watch that hangs, List does not show an old state.
	w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
		if _, ok := msg.(*pb.WatchResponse); ok {
			<-ctx.Done()
			return ctx.Err()
		}
		return recv()
	})
	save(50) // takes the message that is waited for
	want := save(51)
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if resp, err := w.client.ListAllowedNets(short, &policyv1.ListAllowedNetsRequest{Domain: "example.com"}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("behind a watch that hangs List shows %v, %v", resp, err)
	}
	if got := shown(w.get("alice@example.com")); got != want {
		t.Errorf("Get shows %s", got)
	}
	w.wire.OnRecv(nil)
	resp, err := w.client.ListAllowedNets(w.ctx(), &policyv1.ListAllowedNetsRequest{Domain: "example.com"})
	if err != nil || shown(resp.GetAllowedNets()[0]) != want {
		t.Errorf("afterwards List shows %v, %v", resp, err)
	}
}
