package mirror_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/sidecar/internal/lastgood"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// onDisk runs a mirror with a state directory. In it, what is published is kept until stop.
func onDisk(t *testing.T, path string, configure ...func(*mirror.Config)) (*fixture, *lastgood.Dir) {
	t.Helper()
	var dir *lastgood.Dir
	f := start(t, append(configure, func(cfg *mirror.Config) {
		var err error
		if dir, err = lastgood.Open(lastgood.Config{Path: path, Log: cfg.Log, Metrics: prometheus.NewRegistry()}); err != nil {
			t.Fatal(err)
		}
		cfg.Keeper = dir
		cfg.Loaded, cfg.Writer = dir.Loaded()
	})...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- dir.Run(ctx) }()
	stop := f.stop
	f.stop = sync.OnceFunc(func() {
		stop()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return f, dir
}

// TestRestart: a mirror begins with what the one before it acknowledged, serves it before it dials, and asks only for what
// came since.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		f, _ := onDisk(t, path)
		was := three()
		c := f.synced(10, was)
		was = was.with(mailbox(4), nets(4, 2)).with(mailbox(1), "")
		c.send(changes(nil, entry(mailbox(4), nets(4, 2))), changes(was.commit(12), entry(mailbox(1), "")))
		c.acked(12)
		f.stop()

		f, _ = onDisk(t, path)
		f.wantState(12, was)
		select {
		case <-f.m.Synced():
		default:
			t.Error("not synced")
		}
		if age, ok := f.m.State().Age(time.Now()); ok {
			t.Errorf("age %v, although nobody knows it", age)
		}
		c = f.accept()
		if h := c.hello; h.GetCluster() != cluster || h.GetEpoch() != epoch || h.GetRevision() != 12 {
			t.Errorf("hello %v", h)
		}
		now := was.with(mailbox(2), nets(2, 1))
		c.send(welcome(cluster, epoch, false), changes(now.commit(15), entry(mailbox(2), nets(2, 1))))
		c.acked(15)
		f.wantState(15, now)
		f.wantMetric("feed_entries_total", "", 1)
		c.send(pong(c.pinged(), 15))
		synctest.Wait()
		if _, ok := f.m.State().Age(time.Now()); !ok {
			t.Error("the age is still unknown")
		}
		f.stop()

		f, _ = onDisk(t, path)
		f.wantState(15, now)
		c = f.accept() // nothing is new
		c.send(welcome(cluster, epoch, false), changes(now.commit(15)))
		c.acked(15)
		f.stop()

		f, _ = onDisk(t, path)
		c = f.accept() // the history of this state went on differently: all of it
		other := content{mailbox(9): nets(9, 9)}
		c.send(welcome(cluster, epoch, false), changes(other.commit(20)))
		c = f.accept()
		f.wantState(15, now)
		f.wantMetric("mismatches_total", "", 1)
		c.send(welcome(cluster, epoch, true), changes(other.commit(20), other.entries()...))
		c.acked(20)
		f.stop()

		f, _ = onDisk(t, path)
		f.wantState(20, other)
	})
}

// TestRestartElsewhere: for a state from disk the same rules hold as for one of this life.
func TestRestartElsewhere(t *testing.T) {
	was, other := three(), content{mailbox(7): nets(7, 7)}
	for name, c := range map[string]struct {
		cluster, epoch uint64
		accept         uint64
		cause          string // empty: accepted
	}{
		"another store":            {0xf0, 1, 0, "foreign_store"},
		"another store, accepted":  {0xf0, 1, 0xf0, ""},
		"another store than that":  {0xf0, 1, 0xf1, "foreign_store"},
		"raised epoch":             {cluster, epoch + 1, 0, ""},
		"lower epoch":              {cluster, epoch - 1, 0, "epoch_lower"},
		"the same, but from zero":  {cluster, epoch, 0, "revision_lower"},
		"the same, accept is idle": {cluster, epoch, cluster, "revision_lower"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path := t.TempDir()
				f, _ := onDisk(t, path)
				f.synced(10, was)
				f.stop()
				accept := func(cfg *mirror.Config) { cfg.AcceptCluster = c.accept }
				f, _ = onDisk(t, path, accept)
				conv := f.accept()
				_ = conv.stream.Send(welcome(c.cluster, c.epoch, true))
				_ = conv.stream.Send(changes(other.commit(5), other.entries()...))
				want, revision := was, token(epoch, 10)
				if c.cause == "" {
					conv.acked(5)
					want, revision = other, token(c.epoch, 5)
				} else {
					f.accept()
					f.wantMetric("resyncs_total", c.cause, 1)
				}
				wantRoot(t, f.m.State(), revision, want)
				f.stop()
				f, _ = onDisk(t, path, accept)
				wantRoot(t, f.m.State(), revision, want)
				if h := f.accept().hello; c.cause == "" && h.GetCluster() != c.cluster {
					t.Errorf("hello %v", h)
				}
			})
		})
	}
}

// TestRestarts lives through a long history in many lives. What was acknowledged in one is there in the next.
func TestRestarts(t *testing.T) {
	for seed := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 3))
			h, path := newHistory(rnd, 60), t.TempDir()
			for last := int64(0); last != h.revisions[len(h.revisions)-1]; {
				f, _ := onDisk(t, path)
				if got := applied(f.m); got != last {
					t.Fatalf("seed %d: revision %d after a restart; want %d", seed, got, last)
				}
				if last > 0 {
					f.wantState(last, h.states[last])
				}
				for range 1 + rnd.IntN(3) {
					c := f.accept()
					msgs := h.script(rnd, f.m, c.hello.GetRevision())
					h.play(f, c, msgs[:rnd.IntN(len(msgs)+1)])
					c.end <- errCut
				}
				last = applied(f.m)
				f.stop()
			}
		})
	}
}

// keeper is a disk that does what the test says.
type keeper struct {
	mu      sync.Mutex
	given   []int64 // revisions
	whole   []bool  // whether they came without the way that led there
	kept    uint64
	changed chan struct{}
	wrong   chan struct{}
}

func newKeeper() *keeper { return &keeper{changed: make(chan struct{}), wrong: make(chan struct{}, 1)} }

func (k *keeper) Keep(st lastgood.State, c *lastgood.Changes) uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.given, k.whole = append(k.given, st.Token.Revision), append(k.whole, c == nil)
	return uint64(len(k.given))
}

func (k *keeper) Kept() (uint64, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kept, k.changed
}

func (k *keeper) Wrong() <-chan struct{} { return k.wrong }

// keep keeps everything up to a number.
func (k *keeper) keep(number int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = uint64(number)
	close(k.changed)
	k.changed = make(chan struct{})
}

// TestKeptBeforePublished: first the disk, then the decisions, then the acknowledgement.
func TestKeptBeforePublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper()
		f := start(t, func(cfg *mirror.Config) { cfg.Keeper = k })
		c := f.accept()
		c.send(welcome(cluster, epoch, true), changes(three().commit(10), three().entries()...))
		synctest.Wait()
		if !slices.Equal(k.given, []int64{10}) || f.m.State() != nil || len(c.acks) > 0 {
			t.Fatalf("given %v, state %v, %d acknowledgements", k.given, f.m.State(), len(c.acks))
		}
		k.keep(1)
		c.acked(10)
		f.wantState(10, three())
		now := three().with(mailbox(1), "")
		c.send(changes(now.commit(11), entry(mailbox(1), "")))
		synctest.Wait()
		f.wantState(10, three())
		k.keep(2)
		c.acked(11)
		f.wantState(11, now)
		if !slices.Equal(k.whole, []bool{true, false}) {
			t.Errorf("given as a whole: %v", k.whole)
		}
	})
}

// TestSlowKeeper: a disk that hangs delays one commit for a second, and acknowledgements for as long as it hangs.
func TestSlowKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper()
		k.kept = 1
		f := start(t, func(cfg *mirror.Config) { cfg.Keeper = k })
		c := f.synced(10, three())
		began := time.Now()
		for i := range int64(100) {
			changed := f.m.Changed()
			c.send(changes(three().commit(11 + i)))
			<-changed
			f.wantState(11+i, three())
			if d := time.Since(began); d != time.Second {
				t.Fatalf("revision %d was published after %v", 11+i, d)
			}
		}
		if len(c.acks) > 0 {
			t.Fatal("acknowledged before it was kept")
		}
		k.keep(51) // nothing of what is still remembered is older than this
		c.acked(60)
		k.keep(101)
		c.acked(110)
		c.send(changes(three().commit(111)))
		synctest.Wait()
		k.keep(102)
		c.acked(111)
		f.wantState(111, three())
	})
}

// TestWrong: what is in memory is not what was verified. It is fetched again.
func TestWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper()
		k.kept = 10
		f := start(t, func(cfg *mirror.Config) { cfg.Keeper = k })
		f.synced(10, three())
		k.wrong <- struct{}{}
		c := f.accept()
		f.wantMetric("resyncs_total", "mismatch", 1)
		if r := c.hello.GetRevision(); r != 0 {
			t.Errorf("hello with revision %d; want 0", r)
		}
		was := f.m.State().Index
		c.send(welcome(cluster, epoch, true), changes(three().commit(10), three().entries()...))
		c.acked(10)
		f.wantState(10, three())
		if f.m.State().Index == was {
			t.Error("the index is the same")
		}
		if !slices.Equal(k.whole, []bool{true, true}) {
			t.Errorf("given as a whole: %v", k.whole)
		}
	})
}

func TestGoodbye(t *testing.T) {
	for name, where := range map[string]func(*fixture) *conversation{
		"before the welcome": func(f *fixture) *conversation { return f.accept() },
		"in step":            func(f *fixture) *conversation { return f.synced(10, three()) },
		"in a batch": func(f *fixture) *conversation {
			c := f.synced(10, three())
			c.send(changes(nil, entry(mailbox(1), "")))
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				c := where(f)
				f.stop()
				if err := <-c.over; !errors.Is(err, io.EOF) {
					t.Errorf("the server saw %v; want io.EOF", err)
				}
			})
		})
	}
}

// TestGoodbyeToNobody: a server that does not hear, or goes on talking, holds up the stop for a second.
func TestGoodbyeToNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.deaf.Store(true)
		c := f.accept()
		c.send(welcome(cluster, epoch, true))
		talking := make(chan struct{})
		go func() {
			defer close(talking)
			for i := int64(1); c.stream.Send(changes(content{}.commit(i))) == nil; i++ {
				time.Sleep(time.Millisecond)
			}
		}()
		time.Sleep(time.Second)
		began := time.Now()
		f.stop()
		if d := time.Since(began); d != time.Second {
			t.Errorf("it took %v", d)
		}
		<-talking
	})
}

// TestChanged is closed once with every state, before which it is not.
func TestChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		changed := f.m.Changed()
		c := f.accept()
		c.send(welcome(cluster, epoch, true))
		synctest.Wait()
		select {
		case <-changed:
			t.Error("changed without a state")
		default:
		}
		c.send(changes(three().commit(10), three().entries()...))
		c.acked(10)
		<-changed
		changed = f.m.Changed()
		synctest.Wait()
		select {
		case <-changed:
			t.Error("changed twice by one state")
		default:
		}
		c.send(changes(three().commit(11)))
		<-changed
	})
}

// TestAnchor: every hello carries the anchor of the state that is enforced, whatever else it asks for.
func TestAnchor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		f, _ := onDisk(t, path)
		was := three()
		anchored := func(revision int64, anchor string) *feedv1.Commit {
			commit := was.commit(revision)
			commit.Anchor = []byte(anchor)
			return commit
		}
		wantHello := func(c *conversation, revision int64, anchor string) {
			t.Helper()
			if h := c.hello; h.GetRevision() != revision || string(h.GetAnchor()) != anchor {
				t.Errorf("hello %v; want revision %d and anchor %q", h, revision, anchor)
			}
		}
		c := f.accept()
		wantHello(c, 0, "")
		c.send(welcome(cluster, epoch, true), changes(anchored(10, "ten"), was.entries()...))
		c.acked(10)
		c.send(changes(anchored(11, "eleven")))
		c.acked(11)
		c.send(changes(anchored(12, strings.Repeat("x", 65)))) // longer than there are
		c = f.accept()
		wantHello(c, 11, "eleven")
		c.send(welcome(cluster, epoch, false), changes(content{}.commit(12))) // adds up to something else: all of it, please
		c = f.accept()
		wantHello(c, 0, "eleven")
		f.wantState(11, was)
		f.stop()

		f, _ = onDisk(t, path)
		c = f.accept()
		wantHello(c, 11, "eleven")
		c.send(welcome(cluster, epoch, false), changes(anchored(11, "eleven")))
		c.acked(11)
		c.end <- rpcerr.New(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK, "it went back")
		c = f.accept()
		wantHello(c, 11, "eleven")
		f.wantMetric("resyncs_total", "history_went_back", 1)
		f.wantState(11, was)
		c.send(welcome(cluster, epoch, false), changes(was.commit(12))) // of a server that has no anchors
		c.acked(12)
		f.stop()

		f, _ = onDisk(t, path)
		c = f.accept()
		wantHello(c, 12, "")
		c.send(welcome(cluster, epoch+1, true), changes(anchored(9, "nine"), was.entries()...))
		c.acked(9)
		c.end <- nil
		wantHello(f.accept(), 9, "nine")
	})
}
