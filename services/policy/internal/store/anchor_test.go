package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// again is a world with the same etcd and a policy service that has just been started.
func (w *world) again() *world {
	w.t.Helper()
	next := &world{t: w.t, etcd: w.etcd, wire: &etcdtest.Wire{}, mirror: NewMirror(), metrics: prometheus.NewRegistry()}
	next.writer = open(w.t, w.etcd, &etcdtest.Wire{})
	var err error
	if next.replica, err = NewReplica(open(w.t, w.etcd, next.wire), next.mirror, quick, slog.New(slog.DiscardHandler), next.metrics); err != nil {
		w.t.Fatal(err)
	}
	next.run()
	w.t.Cleanup(func() { next.stop() })
	next.await()
	return next
}

func (w *world) holds(anchor Anchor, want bool, what string) {
	w.t.Helper()
	if held, err := w.replica.Holds(within(w.t), 1, anchor); err != nil || held != want {
		w.t.Errorf("%s: Holds = %v, %v; want %v", what, held, err, want)
	}
}

// TestHolds: a history holds the newest save of each of its states, whatever that save was, and none of another history.
func TestHolds(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start(quick)
	alice, alicia, bob := mailbox(t, "alice@example.com"), mailbox(t, "alicia@example.com"), mailbox(t, "bob@example.com")
	if s := w.await(); s.Anchor != (Anchor{}) || s.Anchor.Bytes() != nil {
		t.Errorf("an empty store has the anchor %x", s.Anchor)
	}
	live, anchors := w, make(map[string]Anchor)
	step := func(what string) {
		t.Helper()
		s := live.await()
		anchors[what] = s.Anchor
		if parsed, ok := ParseAnchor(s.Anchor.Bytes()); !ok || parsed != s.Anchor {
			t.Errorf("the anchor %x is read as %x", s.Anchor, parsed)
		}
		if again := live.again().await(); again != s {
			t.Errorf("%s: loaded is %+v, followed was %+v", what, again, s)
		}
	}
	mustSave(t, w.writer, Save{Mailbox: alice, List: list(t, "8.8.8.8")})
	step("the first list")
	mustSave(t, w.writer, Save{Mailbox: alice, List: list(t, "9.9.9.9")})
	step("another list")
	if _, _, err := w.writer.Rename(t.Context(), Rename{From: alice, To: alicia}); err != nil {
		t.Fatal(err)
	}
	step("a rename")
	mustSave(t, w.writer, Save{Mailbox: alicia})
	step("a cleared list")
	before := w.await()
	put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 1, Id: w.writer.id}))
	s, err := w.mirror.Wait(within(t), func(s State) bool { return s.Revision > before.Revision })
	if err != nil || s.Anchor != before.Anchor {
		t.Errorf("after a write of meta: %+v, %v; before it %+v", s, err, before)
	}
	step("a write of meta")
	backup := w.etcd.Backup()
	fork := func() {
		t.Helper()
		mustSave(t, live.writer, Save{Mailbox: alice, List: list(t, "1.1.1.1")})
		step("a list since the backup")
		mustSave(t, live.writer, Save{Mailbox: bob, List: list(t, "1.1.1.1")})
		step("a first list since the backup")
		mustSave(t, live.writer, Save{Mailbox: bob})
		step("a cleared list since the backup")
	}
	fork()
	lost := map[string]bool{"a list since the backup": true, "a first list since the backup": true, "a cleared list since the backup": true}
	now := w.again()
	for what, anchor := range anchors {
		now.holds(anchor, true, what)
	}
	w.lost = w.etcd.History()
	w.stop()
	w.etcd.Restore(backup)
	restored := w.again()
	for what, anchor := range anchors {
		restored.holds(anchor, !lost[what], what+", after the restore")
	}
	// The same again, at the same revisions, with the same versions.
	ours := anchors
	live, anchors = restored, make(map[string]Anchor)
	fork()
	restored = w.again()
	for what, anchor := range ours {
		restored.holds(anchor, !lost[what], what+", after the same saves again")
		if theirs := anchors[what]; lost[what] && (theirs.id() != anchor.id() || theirs.version() != anchor.version()) {
			t.Errorf("%s: it is another mailbox, or another version", what)
		}
	}
	for what, anchor := range anchors {
		restored.holds(anchor, true, what+", of the other history")
	}
	for name, forge := range map[string]func(*Anchor){
		"of another mailbox":    func(a *Anchor) { id := bob.ID(); copy(a[:], id[:]) },
		"of no mailbox":         func(a *Anchor) { a[0]++ },
		"of version 0":          func(a *Anchor) { clear(a[16:24]) },
		"of a version to come":  func(a *Anchor) { binary.BigEndian.PutUint64(a[16:], 99) },
		"of a negative version": func(a *Anchor) { a[16] = 0x80 },
		"of another record":     func(a *Anchor) { a[39]++ },
	} {
		anchor := ours["another list"]
		forge(&anchor)
		restored.holds(anchor, false, name)
	}
}

// TestHoldsIsShared: two thousand who come back at once cost a handful of reads, also if the answer is no.
func TestHoldsIsShared(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(3)
	first := w.again().await().Anchor
	w.save(20)
	now := w.again()
	lost := first
	lost[len(lost)-1]++
	var reads atomic.Int64
	now.wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if _, ok := req.(*pb.TxnRequest); ok {
			reads.Add(1)
		}
		return call()
	})
	for anchor, want := range map[Anchor]bool{first: true, lost: false} {
		reads.Store(0)
		begin := time.Now()
		var herd sync.WaitGroup
		for range 2000 {
			herd.Go(func() { now.holds(anchor, want, fmt.Sprint(want)) })
		}
		herd.Wait()
		// Beside the replica's own, once per Tail.
		if most := 10 + 2*int64(time.Since(begin)/absentFor) + int64(time.Since(begin)/quick.Tail); reads.Load() > most {
			t.Errorf("%v: %d reads within %v, more than %d", want, reads.Load(), time.Since(begin), most)
		}
	}
	reads.Store(0)
	newest := now.await().Anchor
	for range 2000 {
		now.holds(newest, true, "the newest")
	}
}

// TestHoldsWithoutAnAnswer: etcd that does not answer, or holds another epoch by now, is neither yes nor no.
func TestHoldsWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(3)
	first := w.again().await().Anchor
	w.save(3)
	now := w.again()
	now.wire.OnCall(func(ctx context.Context, _, _ any, _ func() error) error { <-ctx.Done(); return ctx.Err() })
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var group sync.WaitGroup
	for range 10 {
		group.Go(func() {
			if held, err := now.replica.Holds(short, 1, first); !errors.Is(err, ErrUnavailable) || held {
				t.Errorf("from a frozen etcd: %v, %v", held, err)
			}
		})
	}
	group.Wait()
	now.wire.OnCall(nil)
	now.holds(first, true, "after the thaw")
	if err := w.writer.RaiseEpoch(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	now.await()
	for range 2 {
		if held, err := now.replica.Holds(within(t), 1, first); !errors.Is(err, ErrUnavailable) || held {
			t.Errorf("asked for a lower epoch: %v, %v", held, err)
		}
	}
	if held, err := now.replica.Holds(within(t), 2, first); err != nil || !held {
		t.Errorf("in the epoch: %v, %v", held, err)
	}
}

// TestAnchorsAreForgotten: the newest are remembered, of one epoch; that a save is not there, for a moment.
func TestAnchorsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a anchors
		nth := func(n int) (anchor Anchor) {
			binary.BigEndian.PutUint64(anchor[16:], uint64(n))
			return anchor
		}
		want := func(epoch uint64, n int, held, known bool) {
			t.Helper()
			if h, k := a.recall(epoch, nth(n)); h != held || k != known {
				t.Errorf("%d of epoch %d: %v, %v; want %v, %v", n, epoch, h, k, held, known)
			}
		}
		want(1, 1, false, false)
		for n := range 3 * rememberedAnchors {
			a.remember(1, nth(n), true)
			a.remember(1, nth(n), true) // once more takes no place
		}
		want(1, 2*rememberedAnchors-1, false, false)
		want(1, 2*rememberedAnchors, true, true)
		want(1, 3*rememberedAnchors-1, true, true)
		if len(a.held) != rememberedAnchors || len(a.order) != rememberedAnchors {
			t.Errorf("%d and %d are remembered", len(a.held), len(a.order))
		}
		a.remember(1, nth(7), false)
		want(1, 7, false, true)
		time.Sleep(absentFor)
		want(1, 7, false, false)
		a.remember(1, nth(7), true)
		time.Sleep(time.Hour)
		want(1, 7, true, true)
		a.remember(2, nth(8), true)
		want(1, 7, false, false)
		want(2, 7, false, false)
		want(2, 8, true, true)
		a.remember(1, nth(9), true) // of a search that took long
		want(2, 9, false, false)
		want(1, 9, false, false)
	})
}
