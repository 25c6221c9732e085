package check_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lists are the restricted mailboxes of the tests; every other mailbox is unrestricted.
func lists() map[string]string {
	return map[string]string{
		"alice@example.org": "8.8.8.0/24, 8.8.8.64/26, 2a00:1450::/32",
		"bob@example.org":   "9.9.9.9",
	}
}

// stateOf returns a state with these lists, known to be the newest one just now.
func stateOf(t testing.TB, lists map[string]string) *mirror.State {
	t.Helper()
	b := index.NewWriter().Rebuild()
	for name, text := range lists {
		mailbox, err := allow.ParseMailbox(name)
		if err != nil {
			t.Fatal(err)
		}
		list, err := allow.Rules{}.ParseText(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Put(mailbox.ID(), list.Encode()); err != nil {
			t.Fatal(err)
		}
	}
	return &mirror.State{Index: b.Build(), Revision: "1-7", Proven: time.Now()}
}

// fixture is a decider with what its doors need.
type fixture struct {
	t       testing.TB
	state   atomic.Pointer[mirror.State]
	log     logBuffer
	metrics *prometheus.Registry
	decider *check.Decider
	faults  *check.Faults
}

func newFixture(t testing.TB, state *mirror.State, configure ...func(*check.DeciderConfig)) *fixture {
	t.Helper()
	f := &fixture{t: t, metrics: prometheus.NewRegistry()}
	f.state.Store(state)
	log := slog.New(slog.NewTextHandler(&f.log, nil))
	cfg := check.DeciderConfig{State: f.state.Load, Log: log, Metrics: f.metrics}
	for _, c := range configure {
		c(&cfg)
	}
	var err error
	if f.decider, err = check.NewDecider(cfg); err != nil {
		t.Fatal(err)
	}
	if f.faults, err = check.NewFaults(log, f.metrics); err != nil {
		t.Fatal(err)
	}
	return f
}

// metric returns the value of a counter with these label values, in the order of the labels' names; 0 if there is none.
func (f *fixture) metric(name string, labels ...string) float64 {
	f.t.Helper()
	families, err := f.metrics.Gather()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "allowednets_sidecar_"+name {
			continue
		}
	metrics:
		for _, m := range family.GetMetric() {
			for i, l := range m.GetLabel() {
				if l.GetValue() != labels[i] {
					continue metrics
				}
			}
			return m.GetCounter().GetValue()
		}
	}
	return 0
}

// wantLog fails unless the log has a line with all the parts.
func (f *fixture) wantLog(parts ...string) {
	f.t.Helper()
lines:
	for line := range strings.Lines(f.log.String()) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue lines
			}
		}
		return
	}
	f.t.Errorf("no line of the log has all of %q:\n%s", parts, f.log.String())
}

// logBuffer is a log that may be read while it is written to.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
