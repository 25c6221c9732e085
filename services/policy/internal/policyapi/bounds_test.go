package policyapi_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/policy/internal/policyapi"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// largest are the most generous rules that --max-nets and --max-nets-text permit.
func largest() allow.Rules { return allow.Rules{MaxNets: 4096, MaxText: 512 << 10} }

// save saves a list as another replica would.
func (w *world) save(name string, list allow.List) {
	w.t.Helper()
	mailbox, err := allow.ParseMailbox(name)
	if err == nil {
		_, _, err = w.other.Save(w.ctx(), store.Save{Mailbox: mailbox, List: list, Author: store.Author{Caller: "other"}})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// TestPagesOfLongLists: a page of the longest lists is no more than a client takes that sets no limit of its own (4 MiB).
func TestPagesOfLongLists(t *testing.T) {
	w := newWorldUnder(t, largest())
	entries := make([]string, 4096)
	for i := range entries {
		entries[i] = fmt.Sprintf("2a00:1111:2222:3333:4444:5555:%x:%x/127", 0x1000+i, 0x1000+2*i) // the longest that is canonical
	}
	list, err := largest().ParseEntries(entries)
	if err != nil {
		t.Fatal(err)
	}
	const lists = 24 // 4.3 MB
	for i := range lists {
		w.save(fmt.Sprintf("user%02d@example.com", i), list)
	}
	for _, size := range []int32{0, 1000, 7} {
		var got []string
		for req := (&policyv1.ListAllowedNetsRequest{Domain: "example.com", PageSize: size}); ; {
			resp, err := w.client.ListAllowedNets(w.ctx(), req)
			if err != nil {
				t.Fatalf("a page of %d: %v", size, err)
			}
			for _, a := range resp.GetAllowedNets() {
				if got = append(got, a.GetMailbox()); len(a.GetNets()) != len(entries) {
					t.Errorf("%s has %d nets", a.GetMailbox(), len(a.GetNets()))
				}
			}
			if resp.GetTotalSize() != lists || len(resp.GetAllowedNets()) == 0 || size > 0 && len(resp.GetAllowedNets()) > int(size) {
				t.Fatalf("a page of %d has %d of %d", size, len(resp.GetAllowedNets()), resp.GetTotalSize())
			}
			if req.PageToken = resp.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
		}
		if len(got) != lists || !slices.IsSorted(got) || len(slices.Compact(got)) != lists {
			t.Errorf("pages of %d show %q", size, got)
		}
	}
}

// TestLargestErrors: as many bad entries as the rules permit, each with as many words and suggestions as there can be,
// arrive at a client that sets no limit of its own.
func TestLargestErrors(t *testing.T) {
	request := func(n int) *policyv1.SetAllowedNetsRequest {
		const one = "2a00:1111:2222:3333:4444:5555:6666:1-2a00:1111:2222:3333:4444:5555:6667:fffe"
		return &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets(slices.Repeat([]string{one}, n)...)}
	}
	complete := func(err error, n int) {
		t.Helper()
		invalid := rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets()
		if status.Code(err) != codes.InvalidArgument || len(invalid) != n {
			t.Fatalf("%d of %d are reported: %.1000v", len(invalid), n, err)
		}
		if n := len(invalid[n-1].GetSuggestions()); n < 30 {
			t.Errorf("only %d suggestions: the test is too easy", n)
		}
	}
	w := newWorld(t)
	_, err := w.client.SetAllowedNets(w.ctx(), request(256))
	complete(err, 256)

	// The largest of all is only measured: gRPC would take seconds over it. It travels in base64 as a trailer, and the limit
	// of Go's client is 16 MiB.
	_, err = policyapi.New(policyapi.Config{Rules: largest()}).SetAllowedNets(t.Context(), request(largest().MaxNets))
	complete(err, largest().MaxNets)
	if size := base64.StdEncoding.EncodedLen(proto.Size(status.Convert(err).Proto())); size > 15<<20 {
		t.Errorf("the error has %d octets", size)
	}
}

// TestWordsAreCut: what comes back of an entry is bounded, and cut between characters.
func TestWordsAreCut(t *testing.T) {
	w := newWorld(t)
	_, err := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets(strings.Repeat("ü", 1000))})
	wantError(t, err, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID)
	for _, n := range rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets() {
		if n.GetText() != strings.Repeat("ü", 100) || len(n.GetMessage()) > 500 {
			t.Errorf("text %q, message of %d octets", n.GetText(), len(n.GetMessage()))
		}
	}
}

// raw sends octets as they are, as a client in another language might.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)   { return v.([]byte), nil }                       //nolint:errcheck,forcetypeassert // the test's own
func (raw) Unmarshal(b []byte, v any) error { return proto.Unmarshal(b, v.(proto.Message)) } //nolint:errcheck,forcetypeassert // the test's own
func (raw) Name() string                    { return "proto" }

// TestBrokenMessages: what is no message, or holds text that is not UTF-8, is refused before anybody looks into it.
func TestBrokenMessages(t *testing.T) {
	w := newWorld(t)
	for _, method := range []string{"SetAllowedNets", "ClearAllowedNets", "GetAllowedNets", "ListAllowedNets"} {
		for name, octets := range map[string]string{
			"not UTF-8": "\x0a\x12alice\xff@example.com", // field 1, mailbox or domain
			"cut off":   "\x0a\x12alice",
			"no field":  "\xff\xff\xff\xff",
		} {
			err := w.conn.Invoke(w.ctx(), "/allowednets.policy.v1.PolicyService/"+method, []byte(octets), &emptypb.Empty{}, grpc.ForceCodec(raw{}))
			if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "unmarshal") { // gRPC's own words
				t.Errorf("%s, %s: %v", method, name, err)
			}
		}
	}
	if faults := w.faulty(); len(faults) > 0 {
		t.Errorf("faults %v", faults)
	}
	if n := w.saves(); n != 0 {
		t.Errorf("%d saves", n)
	}
}

// saves returns how many saves there ever were.
func (w *world) saves() int64 {
	w.t.Helper()
	resp, err := w.etcd.Client().Get(w.ctx(), "/allowednets/v1/log")
	if err != nil {
		w.t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return 0
	}
	return resp.Kvs[0].Version
}

// TestNothingToSave: what changes nothing makes no revision, and validate_only makes every check and no revision.
func TestNothingToSave(t *testing.T) {
	w := newWorld(t)
	clearing := func(req *policyv1.ClearAllowedNetsRequest) error {
		_, err := w.client.ClearAllowedNets(w.ctx(), req)
		return err
	}
	setting := func(req *policyv1.SetAllowedNetsRequest) error {
		_, err := w.client.SetAllowedNets(w.ctx(), req)
		return err
	}
	if err := clearing(&policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", Etag: "stale"}); err != nil {
		t.Errorf("clearing what is not restricted: %v", err)
	}
	if err := setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: text("8.8.8.8"), ValidateOnly: true}); err != nil {
		t.Error(err)
	}
	if n := w.saves(); n != 0 {
		t.Errorf("%d saves before the first", n)
	}
	const id = "0b0dbf9c-0f5d-4fb1-a9a0-4a1c2a3e9a77"
	first := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: text("8.8.8.8"), RequestId: id, Actor: &policyv1.Actor{Id: strings.Repeat("a", 255)}})
	for name, test := range map[string]struct {
		err    error
		code   codes.Code
		reason decisionv1.ErrorReason
	}{
		"the same": {setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8"), Etag: "stale"}), codes.OK, 0},
		"checked":  {setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), ValidateOnly: true, Etag: first.GetAllowedNets().GetEtag()}), codes.OK, 0},
		"etag": {
			setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), ValidateOnly: true, Etag: "stale"}),
			codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH,
		},
		"etag to clear": {
			clearing(&policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.com", ValidateOnly: true, Etag: "stale"}),
			codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH,
		},
		"request id": {
			setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), ValidateOnly: true, RequestId: id}),
			codes.AlreadyExists, decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED,
		},
		"nets": {
			setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("10.0.0.1"), ValidateOnly: true}),
			codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID,
		},
		"no nets": {
			setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", ValidateOnly: true}),
			codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY,
		},
	} {
		if status.Code(test.err) != test.code || rpcerr.Reason(test.err) != test.reason {
			t.Errorf("%s: %v", name, test.err)
		}
	}
	stale := setting(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("9.9.9.9"), Etag: "stale"})
	if got := rpcerr.Detail[*errdetails.ErrorInfo](stale).GetMetadata(); len(got["updated_by"]) != 255 || got["update_time"] == "" {
		t.Errorf("after the first save a stale etag is told %v", got)
	}
	if n := w.saves(); n != 1 {
		t.Errorf("%d saves after the first", n)
	}
	if got := w.get("alice@example.com"); shown(got) != "8.8.8.8" || got.GetRevision() != first.GetAllowedNets().GetRevision() || len(got.GetUpdatedBy()) != 255 {
		t.Errorf("the list is %v", got)
	}
}

// TestPagingBesideSaves: while lists come and go, a reader of pages sees every list that stays, once, in order.
func TestPagingBesideSaves(t *testing.T) {
	w := newWorld(t)
	list, err := allow.Rules{}.ParseText("8.8.8.8")
	if err != nil {
		t.Fatal(err)
	}
	var stays []string
	for i := range 40 {
		if i%2 == 0 {
			stays = append(stays, fmt.Sprintf("user%02d@example.com", i))
			w.save(stays[len(stays)-1], list)
		}
	}
	ctx, cancel := context.WithCancel(w.ctx())
	var writers sync.WaitGroup
	for n := range 2 {
		writers.Go(func() {
			for i := n; ctx.Err() == nil; i += 2 {
				mailbox, _ := allow.ParseMailbox(fmt.Sprintf("user%02d@example.com", i%40|1)) // the odd ones
				next := list
				if i/40%2 == 1 {
					next = allow.List{}
				}
				if _, _, err := w.other.Save(ctx, store.Save{Mailbox: mailbox, List: next, Author: store.Author{Caller: "other"}}); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	defer writers.Wait()
	defer cancel()
	sizes := make(map[int]bool)
	for range 20 {
		var got []string
		for req := (&policyv1.ListAllowedNetsRequest{Domain: "example.com", PageSize: 3}); ; {
			resp, err := w.client.ListAllowedNets(w.ctx(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range resp.GetAllowedNets() {
				got = append(got, a.GetMailbox())
			}
			if req.PageToken = resp.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
		}
		sizes[len(got)] = true
		if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("the pages show %q", got)
		}
		for _, name := range stays {
			if !slices.Contains(got, name) {
				t.Fatalf("the pages lack %s: %q", name, got)
			}
		}
	}
	if len(sizes) < 2 {
		t.Errorf("nothing changed between the pages: %v", sizes)
	}
}

// TestServersSideOfPatience: what the server says to a caller who no longer listens, which is what its metrics count.
func TestServersSideOfPatience(t *testing.T) {
	w := newWorld(t)
	service := policyapi.New(policyapi.Config{Store: w.other, Fault: func(context.Context, error) {}})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancelLate := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancelLate()
	for ctx, want := range map[context.Context]codes.Code{gone: codes.Canceled, late: codes.DeadlineExceeded} {
		_, err1 := service.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: "alice@example.com"})
		_, err2 := service.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.com", Input: nets("8.8.8.8")})
		for _, err := range []error{err1, err2} {
			if status.Code(err) != want || strings.Contains(err.Error(), "etcd") {
				t.Errorf("got %v, want %v", err, want)
			}
		}
	}
}
