package session_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path"
	"slices"
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
	"github.com/allowednets/allowednets/sidecar/internal/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const key = "s3cret"

// dovecot is a fake: its masks work as those of Dovecot 2.3.19 do (src/doveadm/doveadm-who.c).
type dovecot struct {
	mu    sync.Mutex
	open  []session.Connection
	whos  []time.Time // when it was asked
	kicks int         // commands
	// answer, if set, replaces the fake's own. It may return nil.
	answer func(body []byte) *http.Response
	log    bytes.Buffer // what it got, headers included
}

func connection(user, service, address string) session.Connection {
	return session.Connection{Pair: session.Pair{User: user, Address: address}, Service: service}
}

// RoundTrip implements http.RoundTripper, so that there is no network in a synctest bubble.
func (d *dovecot) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintln(&d.log, r.URL, r.Header, string(body))
	if d.answer != nil {
		if resp := d.answer(body); resp != nil {
			return resp, nil
		}
		return nil, errors.New("connection refused")
	}
	var commands [][]json.RawMessage
	if err := json.Unmarshal(body, &commands); err != nil {
		return response(http.StatusBadRequest, err.Error()), nil
	}
	var replies []any
	for _, c := range commands {
		kind, result := d.execute(string(c[0]), c[1])
		replies = append(replies, []any{kind, result, c[2]})
	}
	text, err := json.Marshal(replies)
	return response(http.StatusOK, string(text)), err
}

func (d *dovecot) execute(name string, args json.RawMessage) (kind string, result any) {
	var parameters struct {
		SeparateConnections bool     `json:"separateConnections"`
		Mask                []string `json:"mask"`
	}
	if err := json.Unmarshal(args, &parameters); err != nil {
		return "error", map[string]any{"type": "invalidRequest", "exitCode": 0}
	}
	switch {
	case name == `"who"` && parameters.SeparateConnections && parameters.Mask == nil:
		d.whos = append(d.whos, time.Now())
		return "doveadmResponse", slices.Clone(d.open)
	case name == `"kick"` && len(parameters.Mask) == 2:
		d.kicks++
		before := len(d.open)
		d.open = slices.DeleteFunc(d.open, func(c session.Connection) bool {
			match, err := path.Match(strings.ToLower(parameters.Mask[0]), strings.ToLower(c.User))
			return err == nil && match && netip.MustParseAddr(parameters.Mask[1]) == netip.MustParseAddr(c.Address)
		})
		if len(d.open) == before {
			return "error", map[string]any{"type": "exitCode", "exitCode": 68}
		}
		return "doveadmResponse", []any{map[string]string{"result": parameters.Mask[0]}}
	}
	return "error", map[string]any{"type": "exitCode", "exitCode": 64}
}

func response(code int, body string) *http.Response {
	w := httptest.NewRecorder()
	w.WriteHeader(code)
	_, _ = w.WriteString(body)
	return w.Result()
}

func (d *dovecot) set(open ...session.Connection) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open = open
}

func (d *dovecot) fail(answer func([]byte) *http.Response) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer = answer
}

func (d *dovecot) asked() (whos []time.Time, kicks int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.whos), d.kicks
}

// left returns the connections that are open, as "user service address".
func (d *dovecot) left() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := []string{}
	for _, c := range d.open {
		left = append(left, c.User+" "+c.Service+" "+c.Address)
	}
	return left
}

// fixture is a sweeper with what it needs.
type fixture struct {
	t       *testing.T
	dovecot *dovecot
	state   atomic.Pointer[mirror.State]
	mu      sync.Mutex
	changed chan struct{}
	log     bytes.Buffer
	metrics *prometheus.Registry
	sweeper *session.Sweeper
}

func newFixture(t *testing.T, configure ...func(*check.DeciderConfig)) *fixture {
	t.Helper()
	f := &fixture{t: t, dovecot: new(dovecot), changed: make(chan struct{}), metrics: prometheus.NewRegistry()}
	log := slog.New(slog.NewTextHandler(&f.log, nil))
	cfg := check.DeciderConfig{State: f.state.Load, Changed: f.awaitChange, Log: log, Metrics: f.metrics}
	for _, c := range configure {
		c(&cfg)
	}
	decider, err := check.NewDecider(cfg)
	if err != nil {
		t.Fatal(err)
	}
	doveadm, err := session.NewDoveadm("http://127.0.0.1:7482", key)
	if err != nil {
		t.Fatal(err)
	}
	session.Over(doveadm, f.dovecot)
	f.sweeper, err = session.New(session.Config{
		Doveadm: doveadm, Decider: decider, State: f.state.Load, Changed: f.awaitChange,
		Spared: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}, Log: log, Metrics: f.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) awaitChange() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fixture) publish(st *mirror.State) {
	f.state.Store(st)
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.changed)
	f.changed = make(chan struct{})
}

// save publishes a state with these lists, text by mailbox.
func (f *fixture) save(lists map[string]string) {
	f.t.Helper()
	b := index.NewWriter().Rebuild()
	for name, text := range lists {
		mailbox, err := allow.ParseMailbox(name)
		if err != nil {
			f.t.Fatal(err)
		}
		list, err := allow.Rules{}.ParseText(text)
		if err != nil {
			f.t.Fatal(err)
		}
		if err := b.Put(mailbox.ID(), list.Encode()); err != nil {
			f.t.Fatal(err)
		}
	}
	f.publish(&mirror.State{Index: b.Build(), Revision: "1-7", Proven: time.Now()})
}

// metric returns the sum of the values of a metric over its labels that contain label.
func (f *fixture) metric(name, label string) (sum float64) {
	f.t.Helper()
	families, err := f.metrics.Gather()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "allowednets_sidecar_"+name {
			continue
		}
		for _, m := range family.GetMetric() {
			if label == "" || len(m.GetLabel()) > 0 && m.GetLabel()[0].GetValue() == label {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}
