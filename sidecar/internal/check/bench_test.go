package check_test

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gaissmai/bart"
	"github.com/prometheus/client_golang/prometheus"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/benchtest"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// share is how many mailboxes of a world have the same list.
const share = 20

// world is many restricted mailboxes with three nets each, and questions that are allowed about as many of them as there is
// room for, in random order.
type world struct {
	n         int
	writer    *index.Writer
	questions []check.Request
}

func newWorld(b *testing.B, n int) *world {
	b.Helper()
	w := &world{n: n, writer: index.NewWriter(), questions: make([]check.Request, min(n, 1<<20))}
	bld := w.writer.Rebuild()
	var encoding []byte
	for i := range n {
		encoding = netsOf(encoding[:0], i, false)
		if err := bld.Put(idOf(b, i), encoding); err != nil {
			b.Fatal(err)
		}
	}
	bld.Build()
	rnd := rand.New(rand.NewPCG(1, 1))
	for at := range w.questions {
		i := rnd.IntN(n)
		client := netip.AddrFrom4([4]byte{20 + byte(i/share>>16), byte(i / share >> 8), byte(i / share), 1})
		w.questions[at] = check.Request{Mailbox: nameOf(i), Client: client.String(), Service: decisionv1.Service_SERVICE_IMAP}
	}
	return w
}

func nameOf(i int) string { return fmt.Sprintf("user%08d@customer%05d.example.org", i, i/500) }

func idOf(b *testing.B, i int) allow.ID {
	mailbox, err := allow.ParseMailbox(nameOf(i))
	if err != nil {
		b.Fatal(err)
	}
	return mailbox.ID()
}

// netsOf appends the encoding of the nets of a mailbox: two IPv4 networks, of 256 addresses and of one, and an IPv6 one. With
// own set, it is another list, with the same first network, that nobody else has.
func netsOf(e []byte, i int, own bool) []byte {
	list := uint32(i / share)
	e = append(binary.BigEndian.AppendUint32(append(e, 4), 20<<24+list<<8), 24)
	single := 120<<24 + list
	if own {
		single = 130<<24 + uint32(i)
	}
	e = append(binary.BigEndian.AppendUint32(append(e, 4), single), 32)
	e = append(binary.BigEndian.AppendUint32(append(e, 6), 0x2a001450), byte(list>>16), byte(list>>8), byte(list))
	return append(append(e, make([]byte, 9)...), 56)
}

// decider returns a decider on the world as it is.
func (w *world) decider(b *testing.B) (*check.Decider, *atomic.Pointer[mirror.State]) {
	b.Helper()
	state := new(atomic.Pointer[mirror.State])
	state.Store(&mirror.State{Index: w.writer.Edit().Build(), Revision: "1-1", Proven: time.Now()})
	d, err := check.NewDecider(check.DeciderConfig{State: state.Load, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		b.Fatal(err)
	}
	return d, state
}

// update gives mailboxes a list of their own, and then the shared one back, so many times a second until stop is called. Each
// change makes a root, as one save does.
func (w *world) update(b *testing.B, state *atomic.Pointer[mirror.State], perSecond int) (stop func()) {
	if perSecond == 0 {
		return func() {}
	}
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		var encoding []byte
		for began, made := time.Now(), 0; ; {
			select {
			case <-done:
				// b.Loop begins with one round, which may be over before the first tick.
				if due := perSecond * int(time.Since(began).Milliseconds()) / 1000; made < due-due/10-perSecond/10 {
					b.Errorf("only %d of %d changes", made, due)
				}
				return
			case <-tick.C:
			}
			for due := perSecond * int(time.Since(began).Milliseconds()) / 1000; made < due; made++ {
				i := made / 2 * 7919 % w.n
				encoding = netsOf(encoding[:0], i, made%2 == 0)
				bld := w.writer.Edit()
				if err := bld.Put(idOf(b, i), encoding); err != nil {
					b.Error(err)
					return
				}
				state.Store(&mirror.State{Index: bld.Build(), Revision: "1-1", Proven: time.Now()})
			}
		}
	})
	return func() {
		close(done)
		running.Wait()
	}
}

// sizes are numbers of mailboxes. Ten million take minutes and gigabytes: BENCH_LARGE=1.
func sizes() []int {
	s := []int{100_000, 1_000_000}
	if os.Getenv("BENCH_LARGE") != "" {
		s = append(s, 10_000_000)
	}
	return s
}

// timesOf is a [benchtest.Side]: f, again and again.
func timesOf(name string, batch int, f func()) benchtest.Side {
	return benchtest.Side{Name: name, Round: func(times *benchtest.Times) int {
		for range batch {
			if times == nil {
				f()
				continue
			}
			began := time.Now()
			f()
			times.Add(time.Since(began))
		}
		return batch
	}}
}

// BenchmarkDecide is a decision for a random mailbox, canonicalisation and id included, next to a floor: SHA-256 of the name,
// one lookup in a Go map, and one in a table of package bart, of names and addresses that are parsed already.
func BenchmarkDecide(b *testing.B) {
	for _, n := range sizes() {
		b.Run(fmt.Sprintf("mailboxes=%d", n), func(b *testing.B) {
			w := newWorld(b, n)
			d, state := w.decider(b)
			lists, tables := make(map[allow.ID]uint32, n), make([]bart.Lite, (n+share-1)/share)
			var encoding []byte
			for i := range n {
				lists[idOf(b, i)] = uint32(i / share)
				if i%share == 0 {
					encoding = netsOf(encoding[:0], i, false)
					for _, net := range []netip.Prefix{
						netip.PrefixFrom(netip.AddrFrom4([4]byte(encoding[1:])), 24),
						netip.PrefixFrom(netip.AddrFrom4([4]byte(encoding[7:])), 32),
						netip.PrefixFrom(netip.AddrFrom16([16]byte(encoding[13:])), 56),
					} {
						tables[i/share].Insert(net)
					}
				}
			}
			mailboxes, clients := make([]allow.Mailbox, len(w.questions)), make([]netip.Addr, len(w.questions))
			for i, q := range w.questions {
				mailboxes[i], _ = allow.ParseMailbox(q.Mailbox)
				clients[i] = netip.MustParseAddr(q.Client)
			}
			i, j := 0, 0
			floor := func() {
				list, ok := lists[mailboxes[i].ID()]
				if !ok || !tables[list].Contains(clients[i]) {
					b.Fatal("not allowed")
				}
				i = (i + 1) % len(mailboxes)
			}
			decide := w.decide(b, d, &j)
			for _, changes := range []int{0, 1000} {
				b.Run(fmt.Sprintf("changes=%d", changes), func(b *testing.B) {
					defer w.update(b, state, changes)()
					benchtest.Compare(b, benchtest.Rounds{}, timesOf("", 10_000, decide), timesOf("floor", 10_000, floor))
				})
			}
		})
	}
}

// decide returns a function that decides the next question.
func (w *world) decide(b *testing.B, d *check.Decider, i *int) func() {
	ctx := b.Context()
	return func() {
		dec, err := d.Decide(ctx, w.questions[*i])
		if err != nil || dec.Reason != matched {
			b.Fatal(dec, err)
		}
		*i = (*i + 1) % len(w.questions)
	}
}

// BenchmarkCollector is what the garbage collector takes, and does to decisions, while one goroutine decides without a pause and
// another one makes 1,000 changes a second. Nothing but the index and the questions is on the heap, as in a sidecar. (Decisions
// alone make no garbage.) An iteration lasts three cycles of the collector.
func BenchmarkCollector(b *testing.B) {
	for _, n := range sizes() {
		b.Run(fmt.Sprintf("mailboxes=%d/changes=1000", n), func(b *testing.B) {
			w := newWorld(b, n)
			w.questions = slices.Clone(w.questions[:1<<16])
			d, state := w.decider(b)
			i := 0
			side := timesOf("", 10_000, w.decide(b, d, &i))
			batch := side.Round
			side.Round = func(times *benchtest.Times) (calls int) {
				for end := benchtest.Cycles() + 3; benchtest.Cycles() < end; {
					calls += batch(times)
				}
				return calls
			}
			defer w.update(b, state, 1000)()
			benchtest.Collector(b, func() { benchtest.Compare(b, benchtest.Rounds{Timed: true}, side) })
		})
	}
}
