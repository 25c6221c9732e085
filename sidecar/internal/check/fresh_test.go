package check_test

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// news tells of new states, as a mirror does.
type news struct {
	mu      sync.Mutex
	changed chan struct{}
	asked   int
}

func (n *news) subscribe(cfg *check.DeciderConfig) {
	n.changed = make(chan struct{})
	cfg.Changed = func() <-chan struct{} {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.asked++
		return n.changed
	}
}

func (n *news) publish(f *fixture, st *mirror.State) {
	f.state.Store(st)
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.changed)
	n.changed = make(chan struct{})
}

func at(t testing.TB, revision string) *mirror.State {
	st := stateOf(t, lists())
	st.Revision = revision
	return st
}

// TestMinRevision asks a state of revision 7 of epoch 3.
func TestMinRevision(t *testing.T) {
	for _, c := range []struct {
		name, min string
		svc       decisionv1.Service
		fresh     bool
	}{
		{"older", "3-6", imap, true},
		{"this one", "3-7", imap, true},
		{"newer", "3-8", imap, false},
		{"of an epoch before", "2-9", imap, true}, // it may have got lost with a restored backup, and will then never come
		{"of a later epoch", "4-1", imap, false},
		{"no save at all", "0-0", imap, true},
		{"newer, but exempt", "3-8", submission, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t, at(t, "3-7"), new(news).subscribe)
				began := time.Now()
				dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: c.svc, MinRevision: c.min})
				took := time.Since(began)
				if c.fresh && (err != nil || dec.State.Revision != "3-7" || took != 0) {
					t.Errorf("%v, %v after %v", dec, err, took)
				}
				if !c.fresh && (!errors.Is(err, check.ErrNotFresh) || took != 50*time.Millisecond) {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

// TestMinRevisionArrives: the answer is that of the state that was waited for, as soon as it is there.
func TestMinRevisionArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(news)
		f := newFixture(t, nil, n.subscribe)
		ask := func(ctx context.Context) (<-chan check.Decision, <-chan error) {
			decisions, failed := make(chan check.Decision, 1), make(chan error, 1)
			go func() {
				dec, err := f.decider.Decide(ctx, check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: imap, MinRevision: "3-9"})
				if err != nil {
					failed <- err
					return
				}
				decisions <- dec
			}()
			return decisions, failed
		}
		began := time.Now()
		decisions, _ := ask(t.Context())
		for _, revision := range []string{"3-7", "3-8", "3-8"} { // not yet, and only once more is known of its age
			time.Sleep(10 * time.Millisecond)
			n.publish(f, at(t, revision))
			synctest.Wait()
			if len(decisions) > 0 {
				t.Fatalf("an answer from revision %s", revision)
			}
		}
		time.Sleep(10 * time.Millisecond)
		n.publish(f, at(t, "3-9"))
		dec := <-decisions
		if d := time.Since(began); dec.State.Revision != "3-9" || dec.Reason != matched || d != 40*time.Millisecond {
			t.Errorf("%v after %v", dec, d)
		}
		if n.asked != 5 {
			t.Errorf("it looked %d times; want once and once more after every state", n.asked)
		}

		f.state.Store(nil)
		if _, failed := ask(t.Context()); !errors.Is(<-failed, check.ErrNotSynced) {
			t.Error("no state: not ErrNotSynced")
		}
		f.state.Store(at(t, "3-7"))
		ctx, cancel := context.WithCancel(t.Context())
		began = time.Now()
		_, failed := ask(ctx)
		synctest.Wait()
		cancel()
		if err := <-failed; !errors.Is(err, check.ErrNotFresh) || time.Since(began) != 0 {
			t.Errorf("a caller that left: %v after %v", err, time.Since(began))
		}
	})
}

// TestMinRevisionAtTheDoors: what callers see.
func TestMinRevisionAtTheDoors(t *testing.T) {
	f := newFixture(t, at(t, "3-7"), new(news).subscribe)
	client, _ := serveGRPC(t, f)
	door := f.http()
	for _, c := range []struct {
		min, cause string
		http       int
		code       codes.Code
		reason     decisionv1.ErrorReason
	}{
		{"3-8", "not_fresh", http.StatusServiceUnavailable, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_FRESH},
		{"latest", "min_revision_invalid", http.StatusBadRequest, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		{"3-08", "min_revision_invalid", http.StatusBadRequest, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
	} {
		req := request("alice@example.org", "8.8.8.8", imap)
		req.MinRevision = c.min
		_, err := client.Check(t.Context(), req)
		wantGRPC(t, c.min, err, c.code, c.reason)
		stream, err := client.CheckStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&checkv1.CheckStreamRequest{Check: req}); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		wantGRPC(t, c.min+" in a stream", err, c.code, c.reason)
		resp := do(t, door, http.MethodPost, "/v1/check", `{"mailbox":"alice@example.org","clientAddress":"8.8.8.8","service":"SERVICE_IMAP","minRevision":"`+c.min+`"}`)
		wantStatus(t, c.min+" as JSON", resp, c.http, c.code, c.reason)
	}
	for cause, want := range map[string]float64{"not_fresh": 1, "min_revision_invalid": 2} {
		if n := f.metric("unanswered_total", cause, "json"); n != want {
			t.Errorf("json, %s: %v", cause, n)
		}
		if n := f.metric("unanswered_total", cause, "grpc"); n != 2*want {
			t.Errorf("grpc, %s: %v", cause, n)
		}
	}
	req := request("alice@example.org", "8.8.8.8", imap)
	req.MinRevision = "3-7"
	if resp, err := client.Check(t.Context(), req); err != nil || resp.GetDecision().GetRevision() != "3-7" {
		t.Errorf("%v, %v", resp, err)
	}
}

func wantGRPC(t *testing.T, name string, err error, code codes.Code, reason decisionv1.ErrorReason) {
	t.Helper()
	if rpcerr.Reason(err) != reason || status.Code(err) != code {
		t.Errorf("%s: %v; want %v, %v", name, err, code, reason)
	}
}
