package propagation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func token(rev int64) revision.Token { return revision.Token{Epoch: 2, Revision: rev} }

func summaryOf(t *Tracker, rev int64) string {
	s := t.Summarize(nil, "self", token(rev))
	text := fmt.Sprintf("%d of %d", s.Applied, s.Sidecars)
	for _, l := range s.Laggards {
		text += " " + l.ID
		if !l.Lost.IsZero() {
			text += " lost"
		}
	}
	return text
}

func TestTracker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := NewTracker()
		expect := func(want string) {
			t.Helper()
			if got := summaryOf(tr, 10); got != want {
				t.Errorf("active on %s; want %s", got, want)
			}
		}
		expect("0 of 0")
		a := tr.Connect("a", "c")
		expect("0 of 1 a")
		a.Ack(token(10))
		b := tr.Connect("b", "c")
		expect("1 of 2 b")
		b.Ack(token(11))
		expect("2 of 2")
		a.Leave(true)
		expect("1 of 1")
		b.Leave(false)
		expect("1 of 1") // it acknowledged the save before it was lost
		b2 := tr.Connect("b", "c")
		expect("0 of 1 b") // whatever it enforces, it has not acknowledged it on this stream
		b2.Ack(token(9))
		b3 := tr.Connect("b", "c")
		b3.Ack(token(12))
		b2.Leave(false) // the old stream's end comes late
		expect("1 of 1")
		b3.Leave(false)
		c := tr.Connect("c", "c")
		c.Ack(token(3))
		c.Leave(false)
		expect("1 of 2 c lost")
		time.Sleep(lostFor + time.Second)
		expect("0 of 0")
	})
}

func TestLostOnesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := NewTracker()
		for i := range maxLost + 5 {
			tr.Connect(fmt.Sprint(i), "c").Leave(false)
			time.Sleep(time.Millisecond)
		}
		rec := tr.record(2, false)
		if len(rec.GetLost()) != maxLost {
			t.Fatalf("%d are remembered", len(rec.GetLost()))
		}
		if slices.ContainsFunc(rec.GetLost(), func(s *storev1.Sidecar) bool { return s.GetId() == "4" }) {
			t.Error("the oldest were not forgotten first")
		}
	})
}

// board is where a tracker publishes. Whoever publishes there hears that etcd is away: nothing must depend on it.
type board struct {
	mu      sync.Mutex
	records []*storev1.Replica
}

func (b *board) Publish(_ context.Context, rec *storev1.Replica) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.records = append(b.records, proto.CloneOf(rec))
	return errors.New("away")
}

func (b *board) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.records)
}

func (b *board) last() *storev1.Replica {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.records[len(b.records)-1]
}

func TestRunPublishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr, b := NewTracker(), &board{}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- tr.Run(ctx, b, func() uint64 { return 2 }, slog.New(slog.DiscardHandler)) }()

		s := tr.Connect("a", "c")
		s.Ack(token(1))
		time.Sleep(publishEvery + time.Millisecond)
		if got := b.last().GetConnected(); len(got) != 1 || got[0].GetRevision() != 1 {
			t.Fatalf("published %v", got)
		}
		// However often it changes, at most two records a second.
		n := b.count()
		for rev := range int64(1000) {
			s.Ack(token(rev + 2))
			time.Sleep(10 * time.Millisecond)
		}
		if got := b.count() - n; got < 15 || got > 21 {
			t.Errorf("%d records in 10 s of changes", got)
		}
		// Without a change, a heartbeat.
		n = b.count()
		time.Sleep(time.Minute)
		if got := b.count() - n; got < 11 || got > 14 {
			t.Errorf("%d records in a quiet minute", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if last := b.last(); len(last.GetConnected()) != 0 || len(last.GetLost()) != 1 || last.GetLost()[0].GetRevision() != 1001 {
			t.Errorf("the last record is %v; want the sidecar as lost", last)
		}
	})
}
