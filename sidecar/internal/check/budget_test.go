package check_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/sidecar/internal/check"
)

// discard is an http.ResponseWriter that costs nothing.
type discard struct {
	header http.Header
	code   int
	body   []byte
}

func (d *discard) Header() http.Header  { return d.header }
func (d *discard) WriteHeader(code int) { d.code = code }
func (d *discard) Write(b []byte) (int, error) {
	d.body = append(d.body[:0], b...)
	return len(b), nil
}

// TestAllocationBudget: how often each door allocates for a mailbox that is allowed, apart from what gRPC and net/http do around
// it. Time is not asserted; this is what it depends on.
func TestAllocationBudget(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	grpc := check.NewGRPC(f.decider, f.faults, nil)
	web := check.NewHTTP(check.HTTPConfig{Decider: f.decider, Faults: f.faults})
	ctx := t.Context()
	post := func(url, body, want string) func() {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		r.ContentLength = int64(len(body))
		read := strings.NewReader(body)
		r.Body = io.NopCloser(read)
		w := &discard{header: make(http.Header), body: make([]byte, 0, 1<<10)}
		return func() {
			read.Reset(body)
			web.ServeHTTP(w, r)
			if !strings.Contains(string(w.body), want) {
				t.Fatalf("%d %s", w.code, w.body)
			}
		}
	}
	req := &checkv1.CheckRequest{Mailbox: "alice@example.org", ClientAddress: "8.8.8.8", Service: decisionv1.Service_SERVICE_IMAP}
	for name, test := range map[string]struct {
		budget float64
		call   func()
	}{
		"gRPC": {2, func() { // the message and the text of the net
			if resp, err := grpc.Check(ctx, req); err != nil || resp.GetDecision().GetReason() != matched {
				t.Fatal(resp, err)
			}
		}},
		"JSON":    {5, post("/v1/check", `{"mailbox":"alice@example.org","clientAddress":"8.8.8.8","service":"SERVICE_IMAP"}`, "REASON_MATCHED")},
		"Dovecot": {3, post("/dovecot?command=allow", `{"login":"alice@example.org","remote":"8.8.8.8","protocol":"imap","stage":"before"}`, `{"status":0,"msg":""}`)},
	} {
		t.Run(name, func(t *testing.T) {
			if n := testing.AllocsPerRun(100, test.call); n > test.budget {
				t.Errorf("%v allocations; want at most %v", n, test.budget)
			} else {
				t.Logf("%v allocations", n)
			}
		})
	}
}
