package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// quick is a timing for tests; scrubs are off.
var quick = Timing{Tail: 20 * time.Millisecond, Stall: 100 * time.Millisecond, Scrub: time.Hour, Retry: 20 * time.Millisecond}

// world is an etcd with somebody who saves, and a replica on a wire of its own.
type world struct {
	t       *testing.T
	etcd    *etcdtest.Etcd
	writer  *Store
	wire    *etcdtest.Wire
	replica *Replica
	mirror  *Mirror
	metrics *prometheus.Registry
	witness *witness
	stop    func()
	saves   int
	listed  [7]bool
	lost    etcdtest.History // for the oracle, when etcd does not have it any more
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, etcd: etcdtest.Start(t), wire: &etcdtest.Wire{}, mirror: NewMirror(), metrics: prometheus.NewRegistry()}
	w.writer = open(t, w.etcd, &etcdtest.Wire{})
	w.stop = func() {}
	return w
}

// start runs a replica until the test ends or stop is called. At the end all that the mirror ever showed must be what was saved.
func (w *world) start(timing Timing) *world {
	w.t.Helper()
	s := open(w.t, w.etcd, w.wire)
	var err error
	if w.replica, err = NewReplica(s, w.mirror, timing, slog.New(slog.DiscardHandler), w.metrics); err != nil {
		w.t.Fatal(err)
	}
	w.witness = observe(w.mirror)
	w.run()
	w.t.Cleanup(func() {
		w.stop()
		if w.lost == nil {
			w.lost = w.etcd.History()
		}
		w.witness.testify(w.t, w.lost)
	})
	return w
}

func (w *world) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	var err error
	go func() {
		defer close(ended) // also if a fault ended the goroutine with t.Fatal
		err = w.replica.Run(ctx)
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if <-ended; !errors.Is(err, context.Canceled) {
			w.t.Errorf("Run = %v", err)
		}
	})
}

// save makes n changes among a few mailboxes, some of them to no list.
func (w *world) save(n int) {
	w.t.Helper()
	for range n {
		w.saves++
		user := w.saves % 7
		save := Save{Mailbox: mailbox(w.t, fmt.Sprintf("user%d@example.com", user))}
		if w.listed[user] = !w.listed[user] || w.saves%5 > 0; w.listed[user] {
			save.List = nthList(w.t, 1000+w.saves)
		}
		if _, changed, err := w.writer.Save(w.t.Context(), save); err != nil || !changed {
			w.t.Fatalf("save %d: changed %v, %v", w.saves, changed, err)
		}
	}
}

// await waits until the mirror has all saves.
func (w *world) await() State {
	w.t.Helper()
	h, err := w.writer.head(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := w.mirror.Wait(within(w.t), func(s State) bool { return s.Version >= h.version && s.Epoch == h.epoch })
	if err != nil {
		w.t.Fatalf("the mirror is at %+v, not at %+v: %v", s, h, err)
	}
	return s
}

// loads returns how many loads each cause had.
func (w *world) loads() map[string]float64 {
	return gather(w.t, w.metrics, "allowednets_policy_store_loads_total")
}

func (w *world) damaged() bool {
	return gather(w.t, w.metrics, "allowednets_policy_store_damaged")[""] == 1
}

// gather returns the values of a metric by the value of its label.
func gather(t testing.TB, reg *prometheus.Registry, name string) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			label := ""
			for _, l := range m.GetLabel() {
				label = l.GetValue()
			}
			values[label] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return values
}

// until polls for what nothing announces.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	deadline := time.After(soon)
	for !cond() {
		select {
		case <-ticker.C:
		case <-deadline:
			t.Fatalf("%s: not within %v", what, soon)
		}
	}
}

func TestReplicaFollows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	w.start(quick).await()
	for range 20 { // each revision is seen
		w.save(1)
		w.await()
	}
	w.save(40)
	w.await()
	if loads := w.loads(); len(loads) != 1 || loads["start"] != 1 || w.damaged() {
		t.Errorf("loads %v, damaged %v", loads, w.damaged())
	}
	if got := gather(t, w.metrics, "allowednets_policy_revision")[""]; got != float64(w.await().Revision) {
		t.Errorf("the metric's revision is %v", got)
	}
	if got := gather(t, w.metrics, "allowednets_policy_restricted_mailboxes")[""]; got != float64(w.await().Count) {
		t.Errorf("the metric counts %v mailboxes", got)
	}
}

func TestEmptyStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start(quick)
	if s := w.await(); s.Version != 0 || s.Count != 0 || s.Revision <= 0 || s.Store == 0 || s.Epoch != 1 {
		t.Errorf("the state of a new store is %+v", s)
	}
	w.save(3)
	w.await()
}

// eventFault changes the messages with events of a watch, from the one numbered at, counting from 1 and from when the
// fault was armed. alter is told all messages since then and returns what takes the place of the last.
type eventFault struct {
	at    int
	alter func(msgs []*pb.WatchResponse) []*pb.WatchResponse
}

// arm returns the fault of a wire.
func (f eventFault) arm() etcdtest.RecvFault {
	var mu sync.Mutex
	var queue, seen []*pb.WatchResponse
	n := 0
	return func(_ context.Context, msg any, recv func() error) error {
		watch, ok := msg.(*pb.WatchResponse)
		if !ok {
			return recv()
		}
		for {
			mu.Lock()
			if len(queue) > 0 {
				proto.Reset(watch)
				proto.Merge(watch, queue[0])
				queue = queue[1:]
				mu.Unlock()
				return nil
			}
			mu.Unlock()
			if err := recv(); err != nil {
				return err
			}
			if len(watch.GetEvents()) == 0 {
				return nil
			}
			mu.Lock()
			n++
			if n >= f.at {
				seen = append(seen, proto.CloneOf(watch))
				queue = append(queue, f.alter(seen)...)
				mu.Unlock()
				continue
			}
			mu.Unlock()
			return nil
		}
	}
}

// TestWatchFaults: what the watch may do wrong while it goes on.
func TestWatchFaults(t *testing.T) {
	// nth alters the message numbered n, from 0, and leaves the others alone.
	nth := func(n int, alter func(msgs []*pb.WatchResponse) []*pb.WatchResponse) func([]*pb.WatchResponse) []*pb.WatchResponse {
		return func(msgs []*pb.WatchResponse) []*pb.WatchResponse {
			if len(msgs) == n+1 {
				return alter(msgs)
			}
			return msgs[len(msgs)-1:]
		}
	}
	type msgs = []*pb.WatchResponse
	tests := []struct {
		name  string
		alter func(msgs) msgs
		cause string
	}{
		{name: "nothing", alter: func(m msgs) msgs { return m[len(m)-1:] }},
		{name: "drops an event", cause: "gap", alter: nth(0, func(msgs) msgs { return nil })},
		{name: "drops three events", cause: "gap", alter: func(m msgs) msgs {
			if len(m) <= 3 {
				return nil
			}
			return m[len(m)-1:]
		}},
		{name: "repeats an event", cause: "gap", alter: nth(0, func(m msgs) msgs { return msgs{m[0], m[0]} })},
		{name: "repeats an old event", cause: "gap", alter: nth(3, func(m msgs) msgs { return msgs{m[3], m[0]} })},
		{name: "swaps two events", cause: "gap", alter: func(m msgs) msgs {
			switch len(m) {
			case 1:
				return nil
			case 2:
				return msgs{m[1], m[0]}
			}
			return m[len(m)-1:]
		}},
		{name: "swaps two events in a message", cause: "gap", alter: func(m msgs) msgs {
			switch len(m) {
			case 1:
				return nil
			case 2:
				both := proto.CloneOf(m[1])
				both.Events = append(both.Events, m[0].GetEvents()...)
				return msgs{both}
			}
			return m[len(m)-1:]
		}},
		{name: "makes a deletion of a save", cause: "gap", alter: nth(0, func(m msgs) msgs {
			m[0].Events[0].Type = mvccpb.Event_DELETE
			return m
		})},
		{name: "garbles an event", cause: "damaged", alter: nth(0, func(m msgs) msgs {
			m[0].Events[0].Kv.Value = []byte("\xff")
			return m
		})},
		{name: "empties an event", cause: "damaged", alter: nth(0, func(m msgs) msgs {
			m[0].Events[0].Kv.Value = nil
			return m
		})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.save(10)
			w.start(Timing{Tail: time.Hour, Scrub: time.Hour, Retry: quick.Retry}).await() // the event itself must tell
			w.save(1)
			w.await() // now each save comes in its own message
			w.wire.OnRecv(eventFault{at: 3, alter: tt.alter}.arm())
			if tt.cause == "" {
				w.save(12)
				w.await()
			} else {
				until(t, "a load", func() bool { w.save(1); return w.loads()[tt.cause] > 0 })
			}
			w.wire.OnRecv(nil)
			w.save(12)
			w.await()
			if loads := w.loads(); tt.cause == "" && len(loads) != 1 || w.damaged() {
				t.Errorf("loads %v, damaged %v", loads, w.damaged())
			}
		})
	}
}

// hang is a stream that stays open and says nothing more.
func hang(ctx context.Context, msg any, recv func() error) error {
	if _, ok := msg.(*pb.WatchResponse); !ok {
		return recv()
	}
	<-ctx.Done()
	return ctx.Err()
}

// TestWatchHangs: a watch that is alive and says nothing is noticed at its tail, and another one goes on where it was, without a load.
func TestWatchHangs(t *testing.T) {
	t.Run("from its beginning", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.save(10)
		w.wire.OnRecv(hang)
		w.start(quick).await()
		w.save(3)
		wantStall(t, w)
	})
	t.Run("later", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.save(10)
		w.start(quick).await()
		w.save(3)
		w.await()
		w.wire.OnRecv(hang)
		w.save(2) // one may be on its way already
		wantStall(t, w)
	})
	t.Run("loses the newest events only", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.save(10)
		w.start(quick).await()
		w.wire.OnRecv(eventFault{at: 1, alter: func([]*pb.WatchResponse) []*pb.WatchResponse { return nil }}.arm())
		w.save(3)
		wantStall(t, w)
	})
	t.Run("with the default timing", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.start(Timing{}).await()
		w.save(3)
		w.await()
		var hung atomic.Bool
		w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
			if hung.CompareAndSwap(false, true) {
				return hang(ctx, msg, recv)
			}
			return recv()
		})
		begin := time.Now()
		for range 2 { // a message that is waited for already still comes
			w.save(1)
			w.await()
		}
		if took := time.Since(begin); took > 5*time.Second || took < time.Second {
			t.Errorf("the hang was over after %v, not about 3 s", took)
		}
	})
}

// wantStall expects the replica not to see the newest save while its watch hangs, and to catch up without a load once
// watches work again.
func wantStall(t *testing.T, w *world) {
	t.Helper()
	before, _ := w.mirror.State()
	ctx, cancel := context.WithTimeout(t.Context(), 5*quick.Stall)
	defer cancel()
	h, err := w.writer.head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := w.mirror.Wait(ctx, func(s State) bool { return s.Version >= h.version }); err == nil {
		t.Errorf("the mirror went from %+v to %+v without a watch", before, s)
	}
	w.wire.OnRecv(nil) // a new watch works; the old one still hangs
	w.await()
	if loads := w.loads(); len(loads) != 1 {
		t.Errorf("loads %v", loads)
	}
	w.save(3)
	w.await()
}

// TestTailDuringErrors: reads that fail now and then do not hide a watch that hangs.
func TestTailDuringErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(quick).await()
	var n atomic.Int64
	w.wire.OnCall(func(_ context.Context, _, _ any, call func() error) error {
		if n.Add(1)%2 == 0 {
			return errWire
		}
		return call()
	})
	var hung atomic.Bool
	w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
		if _, ok := msg.(*pb.WatchResponse); ok && hung.CompareAndSwap(false, true) {
			<-ctx.Done()
			return ctx.Err()
		}
		return recv()
	})
	w.save(2)
	w.await()
	if !hung.Load() {
		t.Error("the watch did not hang")
	}
}

// TestWatchBreaks: the watch ends again and again, also in the middle.
func TestWatchBreaks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(10)
	w.start(quick).await()
	var n atomic.Int64
	w.wire.OnRecv(func(_ context.Context, msg any, recv func() error) error {
		if _, ok := msg.(*pb.WatchResponse); !ok {
			return recv()
		}
		switch n.Add(1) % 5 {
		case 1:
			return errWire
		case 3:
			if err := recv(); err != nil {
				return err
			}
			return io.EOF
		}
		return recv()
	})
	w.save(40)
	w.await()
	w.wire.OnRecv(nil)
	w.save(3)
	w.await()
	if loads := w.loads(); loads["start"] != 1 || len(loads) != 1 {
		t.Errorf("loads %v", loads)
	}
}

// TestLoadFaults: what reading all records may do wrong. Nothing is shown until it is right.
func TestLoadFaults(t *testing.T) {
	// chunk changes the messages of a scan, numbered from 0; it may return an error in place of one.
	tests := []struct {
		name    string
		chunk   func(n int, msg *pb.RangeStreamResponse) error
		damaged bool
	}{
		{name: "misses a record", chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs = msg.RangeResponse.Kvs[1:]
			}
			return nil
		}},
		{name: "misses a record and counts accordingly", damaged: true, chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs = msg.RangeResponse.Kvs[1:]
			}
			if msg.RangeResponse.Count > 0 {
				msg.RangeResponse.Count--
			}
			return nil
		}},
		{name: "sends a record twice", chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs = append(msg.RangeResponse.Kvs[:1:1], msg.RangeResponse.Kvs...)
			}
			return nil
		}},
		{name: "sends a record twice and counts accordingly", chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs = append(msg.RangeResponse.Kvs[:1:1], msg.RangeResponse.Kvs...)
			}
			if msg.RangeResponse.Count > 0 {
				msg.RangeResponse.Count++
			}
			return nil
		}},
		{name: "sends a record in place of another", chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs[2] = msg.RangeResponse.Kvs[1]
			}
			return nil
		}},
		{name: "sends an old record", damaged: true, chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n != 0 {
				return nil
			}
			kv := msg.RangeResponse.Kvs[0] // the mailbox that was saved twice
			var m storev1.Mailbox
			if err := proto.Unmarshal(kv.Value, &m); err != nil || m.GetVersion() != 2 {
				return fmt.Errorf("the test is wrong: %v, %w", &m, err)
			}
			m.Version, m.Nets = 1, nil
			kv.Version--
			kv.ModRevision--
			var err error
			kv.Value, err = proto.Marshal(&m)
			return err
		}},
		{name: "sends another's record", damaged: true, chunk: func(n int, msg *pb.RangeStreamResponse) error {
			if n == 1 {
				msg.RangeResponse.Kvs[0].Value = []byte("\xff")
			}
			return nil
		}},
		{name: "ends early", chunk: func(n int, _ *pb.RangeStreamResponse) error {
			if n == 1 {
				return io.EOF
			}
			return nil
		}},
		{name: "ends at once", damaged: true, chunk: func(int, *pb.RangeStreamResponse) error { return io.EOF }},
		{name: "breaks", chunk: func(n int, _ *pb.RangeStreamResponse) error {
			if n == 1 {
				return errWire
			}
			return nil
		}},
	}
	for _, tt := range tests {
		fault := func(faults *atomic.Int64) etcdtest.RecvFault {
			n := make(map[context.Context]int)
			return func(ctx context.Context, msg any, recv func() error) error {
				err := recv()
				if chunk, ok := msg.(*pb.RangeStreamResponse); ok && err == nil {
					faults.Add(1)
					err = tt.chunk(n[ctx], chunk)
					n[ctx]++
				}
				return err
			}
		}
		fill := func(w *world) {
			mustSave(w.t, w.writer, Save{Mailbox: mailbox(w.t, "aaa@example.com"), List: nthList(w.t, 0)})
			mustSave(w.t, w.writer, Save{Mailbox: mailbox(w.t, "aaa@example.com"), List: nthList(w.t, 1)})
			for i := range 40 {
				mustSave(w.t, w.writer, Save{Mailbox: mailbox(w.t, fmt.Sprintf("user%d@example.com", i)), List: nthList(w.t, i)})
			}
		}
		t.Run(tt.name+" at the start", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			fill(w)
			var faults atomic.Int64
			w.wire.OnRecv(fault(&faults))
			w.start(quick)
			until(t, "several loads", func() bool { return w.loads()["start"] >= 3 })
			if s, filled := w.mirror.State(); filled {
				t.Errorf("the mirror was filled: %+v", s)
			}
			if faults.Load() == 0 || w.damaged() != tt.damaged {
				t.Errorf("%d faults, damaged %v, want %v", faults.Load(), w.damaged(), tt.damaged)
			}
			w.wire.OnRecv(nil)
			w.await()
			if w.damaged() {
				t.Error("still damaged")
			}
		})
		t.Run(tt.name+" later", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			fill(w)
			timing := quick
			timing.Scrub = 100 * time.Millisecond
			w.start(timing).await()
			var faults atomic.Int64
			scan := fault(&faults)
			skip := eventFault{at: 1, alter: func(msgs []*pb.WatchResponse) []*pb.WatchResponse { // to provoke loads
				if len(msgs)%3 == 2 {
					return nil
				}
				return msgs[len(msgs)-1:]
			}}.arm()
			w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
				if _, ok := msg.(*pb.WatchResponse); ok {
					return skip(ctx, msg, recv)
				}
				return scan(ctx, msg, recv)
			})
			until(t, "a load", func() bool { w.save(1); return faults.Load() > 0 })
			w.wire.OnRecv(nil)
			w.await()
			w.save(6)
			w.await()
			until(t, "the end of the damage", func() bool { return !w.damaged() })
		})
	}
}

// TestEditsByHand: somebody writes to etcd past the service. It is never shown, but noticed.
func TestEditsByHand(t *testing.T) {
	name := "user1@example.com"
	edited := &storev1.Mailbox{Nets: []string{"9.9.9.9"}, Version: 1}
	tests := []struct {
		name string
		edit func(t *testing.T, w *world)
		// goes says that saves go on to arrive at a replica that was running.
		goes bool
		// scrub says that only a scrub can notice it.
		scrub bool
		// undamaged says that it is a fault of the operator's configuration, not of the data.
		undamaged bool
		// fresh says that a replica that starts later cannot know, because nothing contradicts it.
		fresh bool
	}{
		{name: "record edited", goes: true, scrub: true, edit: func(t *testing.T, w *world) { put(t, w.etcd, mailboxPrefix+name, encoded(t, edited)) }},
		{name: "record edited, its version kept", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			kv := contents(t, w.etcd)[mailboxPrefix+name]
			put(t, w.etcd, mailboxPrefix+name, encoded(t, &storev1.Mailbox{Nets: []string{"9.9.9.9"}, Version: kv.Version}))
		}},
		{name: "record edited with its version", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			kv := contents(t, w.etcd)[mailboxPrefix+name]
			put(t, w.etcd, mailboxPrefix+name, encoded(t, &storev1.Mailbox{Nets: []string{"9.9.9.9"}, Version: kv.Version + 1}))
		}},
		{name: "record deleted", goes: true, scrub: true, edit: func(t *testing.T, w *world) { remove(t, w.etcd, mailboxPrefix+name) }},
		{name: "record replaced", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			remove(t, w.etcd, mailboxPrefix+name)
			put(t, w.etcd, mailboxPrefix+name, encoded(t, edited))
		}},
		{name: "record added", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			put(t, w.etcd, mailboxPrefix+"zoe@example.com", encoded(t, edited))
		}},
		{name: "record under a bad name", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			put(t, w.etcd, mailboxPrefix+"ZOE@example.com", encoded(t, edited))
		}},
		{name: "all records deleted", goes: true, scrub: true, edit: func(t *testing.T, w *world) {
			if _, err := w.etcd.Client().Delete(t.Context(), mailboxPrefix, clientv3.WithPrefix()); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "log written", edit: func(t *testing.T, w *world) { put(t, w.etcd, logKey, []byte("x")) }},
		{name: "log repeated", edit: func(t *testing.T, w *world) { put(t, w.etcd, logKey, contents(t, w.etcd)[logKey].Value) }},
		{name: "log deleted", edit: func(t *testing.T, w *world) { remove(t, w.etcd, logKey) }},
		{name: "log deleted and written", edit: func(t *testing.T, w *world) {
			value := contents(t, w.etcd)[logKey].Value
			remove(t, w.etcd, logKey)
			put(t, w.etcd, logKey, value)
		}},
		{name: "log and records deleted", fresh: true, edit: func(t *testing.T, w *world) {
			if _, err := w.etcd.Client().Delete(t.Context(), mailboxPrefix, clientv3.WithPrefix()); err != nil {
				t.Fatal(err)
			}
			remove(t, w.etcd, logKey)
		}},
		{name: "meta deleted", edit: func(t *testing.T, w *world) { remove(t, w.etcd, metaKey) }},
		{name: "everything deleted", edit: func(t *testing.T, w *world) {
			if _, err := w.etcd.Client().Delete(t.Context(), "", clientv3.WithPrefix()); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "meta of a later format", edit: func(t *testing.T, w *world) {
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 2, Epoch: 1, Id: w.writer.id}))
		}},
		{name: "meta of another store", undamaged: true, fresh: true, edit: func(t *testing.T, w *world) {
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 1, Id: 7}))
		}},
		{name: "epoch lowered", fresh: true, edit: func(t *testing.T, w *world) {
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 1, Id: w.writer.id}))
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name+" while a replica runs", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 2, Id: w.writer.id}))
			w.save(20)
			timing := quick
			timing.Scrub = 30 * time.Millisecond
			if !tt.scrub {
				timing.Scrub = time.Hour
			}
			w.start(timing)
			good := w.await()
			h := w.etcd.History()
			tt.edit(t, w)
			until(t, "the notice", func() bool {
				if tt.undamaged {
					return w.loads()["history"] >= 2
				}
				return w.damaged()
			})
			if tt.goes {
				mustSave(t, w.writer, Save{Mailbox: mailbox(t, "new@example.com"), List: nthList(t, 3)})
				w.await()
				if !w.damaged() {
					t.Error("the damage is forgotten")
				}
				return
			}
			until(t, "another attempt", func() bool { return w.loads()["history"]+w.loads()["damaged"]+w.loads()["gap"] >= 3 })
			if s, _ := w.mirror.State(); s != good {
				t.Errorf("the mirror went from %+v to %+v", good, s)
			}
			short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if _, err := w.replica.Barrier(short); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Barrier = %v", err)
			}
			w.lost = h
		})
		if tt.fresh {
			continue
		}
		t.Run(tt.name+" before a replica starts", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.save(20)
			h := w.etcd.History()
			w.lost = h
			tt.edit(t, w)
			s, err := Open(within(t), Config{Endpoints: []string{w.etcd.Endpoint()}}, false)
			if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotCreated) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = s.Close()
			w.start(quick)
			until(t, "several loads", func() bool { return w.damaged() && w.loads()["start"] >= 3 })
			if s, filled := w.mirror.State(); filled {
				t.Errorf("the mirror was filled: %+v", s)
			}
		})
	}
}

// TestEpochRaised: an operator acknowledges a restored backup, and somebody may save before the replica looks.
func TestEpochRaised(t *testing.T) {
	t.Parallel()
	for _, saves := range []int{0, 1} {
		t.Run(fmt.Sprintf("%d saves", saves), func(t *testing.T) {
			w := newWorld(t)
			w.save(20)
			timing := quick
			timing.Tail = 300 * time.Millisecond
			w.start(timing)
			before := w.await()
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 2, Id: w.writer.id}))
			w.save(saves)
			after := w.await()
			if after.Epoch != 2 || after.Revision <= before.Revision || after.Version != before.Version+int64(saves) || after.Store != before.Store {
				t.Errorf("the state went from %+v to %+v", before, after)
			}
			w.save(5)
			w.await()
			if _, err := w.replica.Barrier(within(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestMetaTouched: rewriting meta as it is changes nothing but revisions.
func TestMetaTouched(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	w.start(quick)
	before := w.await()
	put(t, w.etcd, metaKey, contents(t, w.etcd)[metaKey].Value)
	until(t, "the new revision", func() bool { s, _ := w.mirror.State(); return s.Revision > before.Revision })
	w.save(5)
	w.await()
}

// TestMetaComesBack: meta was deleted, and is put back.
func TestMetaComesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	w.start(quick).await()
	meta := contents(t, w.etcd)[metaKey].Value
	remove(t, w.etcd, metaKey)
	until(t, "the notice", w.damaged)
	put(t, w.etcd, metaKey, meta)
	until(t, "the cure", func() bool { return !w.damaged() })
	w.save(5)
	w.await()
}

// TestBackupRestored: etcd goes back to a backup whose epoch nobody raised, then somebody raises it.
func TestBackupRestored(t *testing.T) {
	for _, tt := range []struct {
		name             string
		unrelated, later int
	}{
		{name: "to fewer saves"},
		{name: "to fewer saves, and then more", later: 3},
		{name: "to lower revisions, and then more saves", unrelated: 50, later: 15},
		// Now neither number nor revision tells. The first of these is the very same as before.
		{name: "and then as many saves", later: 10},
		{name: "and then one more", later: 11},
		{name: "and then many more", later: 30},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.save(20)
			backup := w.etcd.Backup()
			for range tt.unrelated {
				put(t, w.etcd, "unrelated", nil)
			}
			w.save(10)
			w.start(quick)
			good := w.await()
			h := w.etcd.History()
			w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire }) // it does not look meanwhile
			w.wire.OnRecv(func(context.Context, any, func() error) error { return errWire })
			w.etcd.Restore(backup)
			w.otherwise()
			w.save(tt.later)
			w.wire.OnCall(nil)
			w.wire.OnRecv(nil)
			until(t, "the notice", func() bool { return w.damaged() })
			if s, _ := w.mirror.State(); s != good {
				t.Errorf("the mirror went from %+v to %+v", good, s)
			}
			w.witness.testify(t, h) // up to here
			put(t, w.etcd, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 2, Id: w.writer.id}))
			if s := w.await(); s.Epoch != 2 || w.damaged() {
				t.Errorf("the mirror is at %+v, damaged %v", s, w.damaged())
			}
			w.witness = observe(w.mirror)
			w.save(5)
			w.await()
		})
	}
}

// TestBackupRestoredBelowALoad: between the load's question for the newest save and its reading of the records, etcd comes back
// with a backup, and with as many saves as before, of which the last has the same revision.
func TestBackupRestoredBelowALoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	backup := w.etcd.Backup()
	w.save(10)
	var heads atomic.Int64
	between, restored := make(chan struct{}), make(chan struct{})
	w.wire.OnCall(func(ctx context.Context, req, _ any, call func() error) error {
		err := call()
		if txn, ok := req.(*pb.TxnRequest); ok && string(txn.GetSuccess()[1].GetRequestRange().GetKey()) == logKey && heads.Add(1) == 2 { // the first opened the store
			close(between)
			select {
			case <-restored:
			case <-ctx.Done():
			}
		}
		return err
	})
	w.start(quick)
	select {
	case <-between:
	case <-within(t).Done():
		t.Fatal("the newest save was not asked for")
	}
	w.etcd.Restore(backup)
	w.otherwise()
	w.save(10)
	until(t, "a way to etcd", func() bool { _, err := w.replica.store.client.Get(within(t), metaKey); return err == nil })
	close(restored)
	s := w.await()
	newest, err := w.writer.head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !s.Anchor.of(newest.newest) {
		t.Error("the mirror has the one history's records and the other's anchor")
	}
}

// otherwise makes the ten saves since the backup again: of the same mailboxes in the same order, but with other lists.
func (w *world) otherwise() {
	w.saves, w.listed = w.saves-10+35*100, [7]bool{}
}

// TestBackupRestoredBelowAWatch: the replica is cut off, but for its watch, which breaks and could go on by itself: the other
// history has the next save's number, at a revision to come.
func TestBackupRestoredBelowAWatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	backup := w.etcd.Backup()
	w.save(9)
	w.start(quick).await()
	w.save(1) // by a watch
	good := w.await()
	w.lost = w.etcd.History()
	w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
	w.etcd.Restore(backup)
	w.otherwise()
	w.save(15)
	<-time.After(20 * quick.Retry)
	if s, _ := w.mirror.State(); s != good {
		t.Errorf("the mirror went from %+v to %+v", good, s)
	}
	w.wire.OnCall(nil)
	until(t, "the notice", w.damaged)
	if s, _ := w.mirror.State(); s != good {
		t.Errorf("the mirror went from %+v to %+v", good, s)
	}
}

// TestTailOfAnotherHistory: the same number of saves at the same revision may be another history all the same.
func TestTailOfAnotherHistory(t *testing.T) {
	t.Parallel()
	kv := &mvccpb.KeyValue{Key: []byte(logKey), Value: []byte("a change"), ModRevision: 9, Version: 4}
	before := State{Store: 7, Epoch: 1, Revision: 9, Version: 4, Anchor: newAnchor(mailbox(t, "alice@example.com").ID(), 2, kv)}
	same := tail{before: before, head: head{meta: meta{id: 7, epoch: 1}, revision: 9, version: 4, newest: kv}}
	if err := same.check(); err != nil {
		t.Errorf("the same: %v", err)
	}
	other := same
	other.head.newest = &mvccpb.KeyValue{Key: kv.Key, Value: []byte("another change"), ModRevision: 9, Version: 4}
	if err := other.check(); !errors.Is(err, errBack) {
		t.Errorf("another: %v", err)
	}
}

// TestVolumeLost: etcd comes back empty, with the same cluster id. Then somebody creates a store there.
func TestVolumeLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	w.start(quick)
	good := w.await()
	h := w.etcd.History()
	w.lost = h
	w.etcd.Lose()
	until(t, "the notice", w.damaged)
	if _, err := Open(within(t), Config{Endpoints: []string{w.etcd.Endpoint()}}, false); !errors.Is(err, ErrNotCreated) {
		t.Errorf("Open = %v", err)
	}
	other := open(t, w.etcd, &etcdtest.Wire{})
	mustSave(t, other, Save{Mailbox: mailbox(t, "user1@example.com"), List: nthList(t, 1)})
	history := w.loads()["history"]
	until(t, "more attempts", func() bool { return w.loads()["history"] > history+1 })
	if s, _ := w.mirror.State(); s != good {
		t.Errorf("the mirror went from %+v to %+v", good, s)
	}
}

// TestRetriesArePatient: neither damage that stays nor a user that etcd refuses makes the replica ask without a break.
func TestRetriesArePatient(t *testing.T) {
	t.Parallel()
	t.Run("damage", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.save(3)
		w.lost = w.etcd.History()
		w.start(quick).await()
		begin := time.Now()
		put(t, w.etcd, logKey, []byte("x"))
		until(t, "nine loads", func() bool { return w.loads()["damaged"] >= 9 })
		if took, least := time.Since(begin), (1+2+4+8+16+3*maxWaits)*quick.Retry/2; took < least {
			t.Errorf("nine loads within %v, less than %v", took, least)
		}
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.start(quick).await()
		var reads atomic.Int64
		w.wire.OnCall(func(context.Context, any, any, func() error) error {
			reads.Add(1)
			return rpctypes.ErrGRPCPermissionDenied
		})
		w.wire.OnRecv(func(context.Context, any, func() error) error { return errWire })
		w.etcd.Restart() // breaks the watch
		until(t, "a read", func() bool { return reads.Load() > 2 })
		begin, first := time.Now(), reads.Load()
		until(t, "ten reads", func() bool { return reads.Load() >= first+10 })
		if took, least := time.Since(begin), 5*quick.Retry/2; took < least {
			t.Errorf("ten reads within %v, less than %v", took, least)
		}
		w.wire.OnCall(nil)
		w.wire.OnRecv(nil)
		w.save(3)
		w.await()
	})
}

// TestEtcdRestarts: the replica goes on where it was, without a load.
func TestEtcdRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	w.start(quick).await()
	for range 3 {
		w.etcd.Restart()
		w.save(5)
		w.await()
	}
	if loads := w.loads(); len(loads) != 1 || loads["start"] != 1 {
		t.Errorf("loads %v", loads)
	}
}

// TestCompaction: etcd forgets what a replica that was away has not seen.
func TestCompaction(t *testing.T) {
	for _, saves := range []int{0, 1, 10} {
		t.Run(fmt.Sprintf("away for %d saves", saves), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.save(20)
			w.start(quick).await()
			w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
			w.wire.OnRecv(func(context.Context, any, func() error) error { return errWire })
			w.etcd.Restart() // breaks the watch
			w.save(saves)
			for range 3 { // so that the compacted revision is after the replica's
				put(t, w.etcd, "unrelated", nil)
			}
			w.etcd.Compact(t.Context())
			rewatched := w.rewatched()
			w.wire.OnCall(nil)
			rewatched()
			w.await()
			w.save(5)
			w.await()
			loads := w.loads()
			if loads["compacted"] > 0 != (saves > 0) {
				t.Errorf("loads %v", loads)
			}
			if delete(loads, "compacted"); len(loads) != 1 || loads["start"] != 1 {
				t.Errorf("loads %v", loads)
			}
		})
	}
	t.Run("stopped", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.save(20)
		w.start(quick).await()
		w.stop()
		w.save(10)
		w.etcd.Compact(t.Context())
		w.run()
		w.await()
		w.save(5)
		w.await()
	})
	t.Run("a watch that was silent for long", func(t *testing.T) { // reconnects by itself, at a revision that is gone
		t.Parallel()
		w := newWorld(t)
		w.save(20)
		w.start(quick).await()
		for range 3 {
			put(t, w.etcd, "unrelated", nil)
		}
		w.etcd.Compact(t.Context())
		rewatched := w.rewatched()
		w.etcd.Restart()
		rewatched()
		w.save(5)
		w.await()
		if loads := w.loads(); len(loads) != 1 || loads["start"] != 1 {
			t.Errorf("loads %v", loads)
		}
	})
}

// rewatched mends the wire and returns a function that waits for a new watch that stays: one at a compacted revision is
// confirmed too, and then ended.
func (w *world) rewatched() (wait func()) {
	w.t.Helper()
	var mu sync.Mutex
	var begun time.Time
	w.wire.OnRecv(func(_ context.Context, msg any, recv func() error) error {
		err := recv()
		watch, ok := msg.(*pb.WatchResponse)
		mu.Lock()
		defer mu.Unlock()
		if ok && err == nil && watch.GetCreated() {
			begun = time.Now()
		} else if ok {
			begun = time.Time{}
		}
		return err
	})
	return func() {
		w.t.Helper()
		until(w.t, "another watch", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return !begun.IsZero() && time.Since(begun) > 10*quick.Retry
		})
	}
}

// TestBarrier: it returns a state that has every save that was acknowledged before the call.
func TestBarrier(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(quick).await()
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			for n := range 10 {
				rec, _, err := w.writer.Save(t.Context(), Save{Mailbox: mailbox(t, fmt.Sprintf("b%d@example.com", i)), List: nthList(t, n)})
				if err != nil {
					t.Error(err)
					return
				}
				if s, err := w.replica.Barrier(within(t)); err != nil || s.Revision < rec.Revision {
					t.Errorf("after a save at %d the barrier is at %+v, %v", rec.Revision, s, err)
				}
			}
		})
	}
	group.Wait()

	// A watch that hangs: the barrier waits rather than return too early.
	w.wire.OnRecv(hang)
	w.save(2)
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if s, err := w.replica.Barrier(short); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Barrier behind a watch that hangs = %+v, %v", s, err)
	}
	w.wire.OnRecv(nil)
	w.await()

	// An etcd that is frozen.
	w.wire.OnCall(func(ctx context.Context, _, _ any, _ func() error) error { <-ctx.Done(); return ctx.Err() })
	frozen, cancelFrozen := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancelFrozen()
	if s, err := w.replica.Barrier(frozen); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Barrier without etcd = %+v, %v", s, err)
	}
	w.wire.OnCall(nil)
}

// TestScrubIsQuiet: a scrub among saves finds nothing.
func TestScrubIsQuiet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	timing := quick
	timing.Scrub = 2 * time.Millisecond
	w.start(timing).await()
	w.save(60)
	w.await()
	if loads := w.loads(); len(loads) != 1 || w.damaged() {
		t.Errorf("loads %v, damaged %v", loads, w.damaged())
	}
}

// TestScrubFindsOurFault: the mirror itself went wrong; a load cures it.
func TestScrubFindsOurFault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(20)
	timing := quick
	timing.Scrub = 100 * time.Millisecond
	w.start(timing).await()
	w.witness.testify(t, w.etcd.History())
	w.mirror.mu.Lock()
	e := w.mirror.entries[mailbox(t, "user1@example.com").ID()]
	delete(w.mirror.entries, e.ID)
	w.mirror.mu.Unlock()
	until(t, "a load", func() bool { return w.loads()["scrub"] > 0 })
	until(t, "the cure", func() bool { return w.mirror.get(e.ID) != nil })
	w.witness = observe(w.mirror)
}

// TestReplicaUnderRandomFaults: everything at once.
func TestReplicaUnderRandomFaults(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save(30)
	timing := quick
	timing.Scrub = 50 * time.Millisecond
	var calm atomic.Bool
	w.wire.OnCall(func(_ context.Context, _, _ any, call func() error) error {
		if !calm.Load() && rand.IntN(10) == 0 {
			return errWire
		}
		return call()
	})
	w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
		err := recv()
		if calm.Load() || err != nil || rand.IntN(15) > 0 {
			return err
		}
		switch msg := msg.(type) {
		case *pb.RangeStreamResponse:
			if kvs := msg.GetRangeResponse().GetKvs(); len(kvs) > 1 {
				i := rand.IntN(len(kvs))
				msg.RangeResponse.Kvs = append(kvs[:i:i], kvs[i+1:]...)
			}
		case *pb.WatchResponse:
			switch rand.IntN(6) {
			case 0:
				return recv() // dropped
			case 1:
				msg.Events = append(msg.Events, msg.Events...)
			case 2:
				for i, j := 0, len(msg.Events)-1; i < j; i, j = i+1, j-1 {
					msg.Events[i], msg.Events[j] = msg.Events[j], msg.Events[i]
				}
			case 3:
				return errWire
			case 4:
				<-ctx.Done()
				return ctx.Err()
			case 5:
				msg.Events = nil
			}
		}
		return nil
	})
	w.start(timing)
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			for n := range 80 {
				save := Save{Mailbox: mailbox(t, fmt.Sprintf("user%d@example.com", (n*7+i)%30)), List: nthList(t, n*4+i)}
				if n%6 == 0 {
					save.List = list(t, "1.1.1.1")
				}
				if _, _, err := w.writer.Save(t.Context(), save); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	calm.Store(true)
	w.await()
	until(t, "the end of the damage", func() bool { return !w.damaged() })
}
