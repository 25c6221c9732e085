package lastgood

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cluster = 0xc1
	epoch   = 3
)

func mailbox(n int) allow.ID {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
	return allow.ID(sum[:16])
}

// nets is the encoding of n neighbouring addresses; equal arguments make equal sets.
func nets(first uint32, n int) string {
	var b []byte
	for i := range n {
		b = binary.BigEndian.AppendUint32(append(b, 4), first<<8+uint32(i))
		b = append(b, 32)
	}
	return string(b)
}

// The history of a store: every revision changes one of so many mailboxes, in turn.
const mailboxes = 40

// change is what revision n does: it gives a mailbox nets, or none.
func change(n int) (allow.ID, string) {
	if n%7 == 0 {
		return mailbox(n % mailboxes), ""
	}
	return mailbox(n % mailboxes), nets(uint32(n%5), 1+n%3)
}

// anchor is that of revision n. Before revision 3 there is none.
func anchor(n int) string { return strings.Repeat(string(rune('a'+n%26)), max(0, min(n-2, MaxAnchor))) }

// want is the content at revision n.
func want(n int) map[allow.ID]string {
	content := make(map[allow.ID]string)
	for i := max(1, n-mailboxes+1); i <= n; i++ {
		if id, nets := change(i); nets != "" {
			content[id] = nets
		}
	}
	return content
}

// source makes states one after another, as a mirror does.
type source struct {
	w   *index.Writer
	now State
}

func newSource() *source { return &source{w: index.NewWriter()} }

// next is one more revision.
func (s *source) next() (State, *Changes) {
	n := int(s.now.Token.Revision) + 1
	b, c := s.w.Edit(), new(Changes)
	id, nets := change(n)
	if err := b.Put(id, []byte(nets)); err != nil {
		panic(err)
	}
	c.Put(id, []byte(nets))
	s.now = State{cluster, revision.Token{Epoch: epoch, Revision: int64(n)}, anchor(n), b.Build()}
	return s.now, c
}

// rebuilt is revision n without the way that led there.
func (s *source) rebuilt(n int) (State, *Changes) {
	b := s.w.Rebuild()
	for id, nets := range want(n) {
		if err := b.Put(id, []byte(nets)); err != nil {
			panic(err)
		}
	}
	s.now = State{cluster, revision.Token{Epoch: epoch, Revision: int64(n)}, anchor(n), b.Build()}
	return s.now, nil
}

// difference says how a state differs from revision n of the history; empty if it does not.
func difference(st State, n int) string {
	want := want(n)
	switch {
	case st.Index == nil:
		return "there is no state"
	case st.Cluster != cluster || st.Token != revision.Token{Epoch: epoch, Revision: int64(n)}:
		return "it is " + st.Token.String()
	case st.Anchor != anchor(n):
		return "its anchor is " + st.Anchor
	}
	have := make(map[allow.ID]string)
	var digest allow.Digest
	for id, number := range st.Index.All() {
		have[id] = string(st.Index.Set(number).AppendEncoding(nil))
		digest = digest.Add(allow.EntryDigest(id, []byte(have[id])))
	}
	if len(have) != len(want) || st.Index.Count() != uint64(len(want)) || st.Index.Digest() != digest {
		return "it does not have the right number of mailboxes"
	}
	for id, nets := range want {
		if set := st.Index.Lookup(id); set == nil || string(set.AppendEncoding(nil)) != nets {
			return "a mailbox has other nets"
		}
	}
	return ""
}

// fixture is an open directory.
type fixture struct {
	t *testing.T
	*Dir
	*source
	metrics *prometheus.Registry
	log     *bytes.Buffer
	number  uint64 // the last one of Keep
	stop    func()
}

func open(t *testing.T, path string) *fixture {
	t.Helper()
	f := &fixture{t: t, source: newSource(), metrics: prometheus.NewRegistry(), log: new(bytes.Buffer)}
	var err error
	f.Dir, err = Open(Config{Path: path, Log: slog.New(slog.NewTextHandler(f.log, nil)), Metrics: f.metrics})
	if err != nil {
		t.Fatal(err)
	}
	if st, w := f.Loaded(); w != nil {
		f.source = &source{w, st}
	}
	f.stop = sync.OnceFunc(f.Close)
	t.Cleanup(func() { f.stop() })
	return f
}

// start opens a directory and runs it until the test ends.
func start(t *testing.T, path string) *fixture {
	t.Helper()
	f := open(t, path)
	f.run()
	return f
}

func (f *fixture) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- f.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			f.t.Errorf("Run: %v", err)
		}
	})
}

// keep hands over a state and waits until it may be acknowledged.
func (f *fixture) keep(st State, c *Changes) {
	f.t.Helper()
	f.number = f.Keep(st, c)
	f.waitKept()
}

func (f *fixture) waitKept() {
	f.t.Helper()
	timeout := time.After(time.Minute)
	for {
		kept, changed := f.Kept()
		if kept >= f.number {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			f.t.Fatalf("state %d is not kept; %d is:\n%s", f.number, kept, f.log)
		}
	}
}

// wait waits until something is so that announces itself in no other way.
func (f *fixture) wait(so func() bool) {
	f.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for timeout := time.After(time.Minute); !so(); {
		select {
		case <-tick.C:
		case <-timeout:
			f.t.Fatal("it does not happen")
		}
	}
}

func (f *fixture) wantLoaded(n int) {
	f.t.Helper()
	if d := difference(f.now, n); d != "" {
		f.t.Fatalf("revision %d was not loaded: %s\n%s", n, d, f.log)
	}
	f.wantMetric("load", "loaded", 1)
}

// wantNothing fails unless nothing was loaded, for this reason.
func (f *fixture) wantNothing(r result, inLog string) {
	f.t.Helper()
	if f.now.Index != nil {
		f.t.Fatalf("revision %v was loaded", f.now.Token)
	}
	f.wantMetric("load", string(r), 1)
	f.wantMetric("load", "loaded", 0)
	if !strings.Contains(f.log.String(), inLog) {
		f.t.Errorf("the log does not say %q:\n%s", inLog, f.log)
	}
}

func (f *fixture) wantMetric(name, label string, want float64) {
	f.t.Helper()
	if got := f.metric(name, label); got != want {
		f.t.Errorf("%s{%s} = %v; want %v", name, label, got, want)
	}
}

func (f *fixture) metric(name, label string) float64 {
	f.t.Helper()
	families, err := f.metrics.Gather()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "allowednets_sidecar_state_"+name {
			continue
		}
		for _, m := range family.GetMetric() {
			if label == "" || m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	f.t.Fatalf("there is no metric %s{%s}", name, label)
	return 0
}

// files returns the names in a directory but that of the lock.
func files(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != fileLock {
			names = append(names, e.Name())
		}
	}
	return strings.Join(names, " ")
}

func readFile(t *testing.T, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, b []byte, path ...string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(path...), b, 0o600); err != nil {
		t.Fatal(err)
	}
}
