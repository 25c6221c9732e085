package feed_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/policy/internal/feed"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon bounds the wait for what must happen; a while, the wait for what must not.
const (
	soon  = 20 * time.Second
	while = 150 * time.Millisecond
)

var errWire = errors.New("the wire broke")

// world is a policy service's feed on a real etcd, with somebody who saves.
type world struct {
	t       *testing.T
	etcd    *etcdtest.Etcd
	writer  *store.Store
	wire    *etcdtest.Wire // below the replica
	mirror  *store.Mirror
	tracker *propagation.Tracker
	replica *store.Replica
	feed    *feed.Service
	metrics *prometheus.Registry
	lis     *bufconn.Listener
	saves   atomic.Int64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOn(t, etcdtest.Start(t))
}

// newWorldOn is another policy service of the same etcd.
func newWorldOn(t *testing.T, etcd *etcdtest.Etcd) *world {
	t.Helper()
	w := &world{
		t: t, etcd: etcd, wire: &etcdtest.Wire{}, mirror: store.NewMirror(), tracker: propagation.NewTracker(), metrics: prometheus.NewRegistry(),
		lis: bufconn.Listen(4 << 10),
	}
	w.writer = w.open(&etcdtest.Wire{})
	log := slog.New(slog.DiscardHandler)
	timing := store.Timing{Tail: 20 * time.Millisecond, Stall: 100 * time.Millisecond, Scrub: time.Hour, Retry: 20 * time.Millisecond}
	var err error
	if w.replica, err = store.NewReplica(w.open(w.wire), w.mirror, timing, log, w.metrics); err != nil {
		t.Fatal(err)
	}
	w.feed, err = feed.New(feed.Config{
		Mirror: w.mirror, Barrier: w.replica.Barrier, Holds: w.replica.Holds, Tracker: w.tracker, Log: log, Metrics: w.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	feedv1.RegisterFeedServiceServer(server, w.feed)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(w.lis) })
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
	})
	return w
}

func (w *world) open(wire *etcdtest.Wire) *store.Store {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), soon)
	defer cancel()
	s, err := store.Open(ctx, store.Config{Endpoints: []string{w.etcd.Endpoint()}, DialOptions: wire.Options()}, true)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = s.Close() })
	return s
}

// start runs the replica and waits until it is loaded.
func (w *world) start() *world {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = w.replica.Run(ctx) })
	w.t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	w.await(0)
	return w
}

// await waits until the mirror has a revision.
func (w *world) await(revision int64) store.State {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), soon)
	defer cancel()
	s, err := w.mirror.Wait(ctx, func(s store.State) bool { return s.Revision >= revision })
	if err != nil {
		w.t.Fatalf("the mirror is at %+v, not at %d", s, revision)
	}
	return s
}

func mailbox(t testing.TB, name string) allow.Mailbox {
	t.Helper()
	m, err := allow.ParseMailbox(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// nthList is another list for every n.
func nthList(t testing.TB, n int64) allow.List {
	t.Helper()
	l, err := allow.Rules{}.ParseText(fmt.Sprintf("2a00:%x::/32, 8.%d.%d.0/24", n&0xffff, n>>8&255, n&255))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// save changes the list of a mailbox to a new one, or lifts it, and returns the revision.
func (w *world) save(name string, lift bool) int64 {
	w.t.Helper()
	save := store.Save{Mailbox: mailbox(w.t, name)}
	if !lift {
		save.List = nthList(w.t, w.saves.Add(1))
	}
	rec, _, err := w.writer.Save(w.t.Context(), save)
	if err != nil {
		w.t.Error(err)
	}
	return rec.Revision
}

// meta rewrites the store's meta by hand.
func (w *world) meta(epoch uint64) {
	w.t.Helper()
	value, err := proto.Marshal(&storev1.Meta{Format: 1, Epoch: epoch, Id: w.await(0).Store})
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.etcd.Client().Put(w.t.Context(), "/allowednets/v1/meta", string(value)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) metric(name, label string) float64 {
	w.t.Helper()
	families, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return 0
}

// until polls for what nothing announces.
func (w *world) until(what string, cond func() bool) {
	w.t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(soon); !cond(); <-ticker.C {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %v", what, soon)
		}
	}
}

// position is where a sidecar stands.
type position struct {
	cluster, epoch uint64
	revision       int64
}

// sidecar is a client of the feed that believes nothing. Its state survives its streams.
type sidecar struct {
	w    *world
	conn *grpc.ClientConn
	// breach is told of guarantees that are broken.
	breach func(format string, args ...any)

	at     position
	anchor []byte            // of the commit at the revision
	state  map[string]string // id → nets, at the revision

	// of the stream
	rpc               feedv1.FeedService_SyncClient
	cancel            context.CancelFunc
	staged            map[string]string
	messages, entries int
	commits           int
	sent              map[string][]string // entries by id since the stream began from state.revision
	from              int64
}

func (w *world) sidecar(opts ...grpc.DialOption) *sidecar {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:bufconn", append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.lis.DialContext(ctx) }))...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return &sidecar{w: w, conn: conn, cancel: func() {}, breach: w.t.Errorf}
}

// open opens a stream and sends hello.
func (c *sidecar) open(hello *feedv1.Hello) {
	c.w.t.Helper()
	c.cancel()
	ctx, cancel := context.WithTimeout(c.w.t.Context(), 2*soon)
	c.w.t.Cleanup(cancel)
	rpc, err := feedv1.NewFeedServiceClient(c.conn).Sync(ctx)
	if err != nil {
		c.w.t.Error(err)
	}
	c.rpc, c.cancel = rpc, cancel
	c.staged, c.sent, c.messages, c.entries, c.commits = nil, make(map[string][]string), 0, 0, 0
	c.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: hello}})
}

// resume opens a stream that goes on from the state.
func (c *sidecar) resume() {
	c.w.t.Helper()
	c.open(&feedv1.Hello{Id: "test", Cluster: c.at.cluster, Epoch: c.at.epoch, Revision: c.at.revision, Anchor: c.anchor})
}

func (c *sidecar) send(msg *feedv1.SyncRequest) {
	c.w.t.Helper()
	if err := c.rpc.Send(msg); err != nil && !errors.Is(err, io.EOF) {
		c.w.t.Error(err)
	}
}

func (c *sidecar) ping(nonce uint64) {
	c.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ping{Ping: &feedv1.Ping{Nonce: nonce}}})
}

// recv takes one message and applies it. A breach of a guarantee that shows without an oracle fails the test.
func (c *sidecar) recv() (*feedv1.SyncResponse, error) {
	c.w.t.Helper()
	msg, err := c.rpc.Recv()
	if err != nil {
		return nil, err
	}
	c.messages++
	if size := proto.Size(msg); size > 2<<20 {
		c.breach("a message of %d octets", size)
	}
	switch m := msg.GetMessage().(type) {
	case *feedv1.SyncResponse_Welcome:
		if c.staged != nil {
			c.breach("a second welcome")
		}
		now := position{cluster: m.Welcome.GetCluster(), epoch: m.Welcome.GetEpoch(), revision: c.at.revision}
		if m.Welcome.GetRestart() {
			now.revision, c.state = 0, make(map[string]string)
		} else if now != c.at {
			c.breach("a stream that goes on at %+v, after %+v", now, c.at)
		}
		c.at, c.from, c.staged = now, now.revision, maps.Clone(c.state)
	case *feedv1.SyncResponse_Changes:
		c.apply(m.Changes)
	}
	return msg, nil
}

func (c *sidecar) apply(changes *feedv1.Changes) {
	c.w.t.Helper()
	if c.staged == nil {
		c.breach("changes before the welcome")
		return
	}
	if n := len(changes.GetEntries()); n > 4096 {
		c.breach("%d entries in a message", n)
	}
	for _, e := range changes.GetEntries() {
		id, nets := string(e.GetId()), string(e.GetNets())
		c.entries++
		c.sent[id] = append(c.sent[id], nets)
		if c.staged[id] = nets; nets == "" {
			delete(c.staged, id)
		}
	}
	commit := changes.GetCommit()
	if commit == nil {
		return
	}
	if commit.GetRevision() < c.at.revision || commit.GetRevision() == c.at.revision && c.commits > 0 {
		c.breach("a commit at %d after %d", commit.GetRevision(), c.at.revision)
	}
	if sum := digest(c.staged); commit.GetCount() != uint64(len(c.staged)) || !bytes.Equal(commit.GetDigest(), sum) {
		c.breach("at revision %d %d mailboxes with digest %x add up to %d with %x", commit.GetRevision(), commit.GetCount(), commit.GetDigest(), len(c.staged), sum)
	}
	c.at.revision, c.anchor, c.state = commit.GetRevision(), commit.GetAnchor(), maps.Clone(c.staged)
	c.commits++
}

// digest adds up what DESIGN §6 says, without allow.
func digest(state map[string]string) []byte {
	sum := new(big.Int)
	for id, nets := range state {
		hash := sha256.Sum256([]byte(id + nets))
		sum.Add(sum, new(big.Int).SetBytes(hash[:16]))
	}
	return sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 128)).FillBytes(make([]byte, 16))
}

// until receives until a commit reaches the revision.
func (c *sidecar) until(revision int64) {
	c.w.t.Helper()
	for c.commits == 0 || c.at.revision < revision {
		if _, err := c.recv(); err != nil {
			c.w.t.Fatalf("waiting for revision %d at %d: %v", revision, c.at.revision, err)
		}
	}
}

// end receives until the stream ends and returns how. drained tells whether a Drain came before.
func (c *sidecar) end() (drained bool, err error) {
	for {
		msg, err := c.recv()
		if err != nil {
			return drained, err
		}
		if d := msg.GetDrain(); d != nil {
			if drained = true; d.GetRetryAfterMs() == 0 {
				c.w.t.Error("a drain without a time")
			}
		}
	}
}

// check compares the state, and every entry of the stream, with what was saved.
func (c *sidecar) check(h etcdtest.History) {
	t := c.w.t
	t.Helper()
	want := make(map[string]string)
	lists, _ := h.At(c.at.revision)
	for m, l := range lists {
		id := m.ID()
		want[string(id[:])] = string(l.Encode())
	}
	if !maps.Equal(c.state, want) {
		t.Fatalf("at revision %d the sidecar has %d lists that are not the %d of the store", c.at.revision, len(c.state), len(want))
	}
	// Unique: each entry is a later version of its mailbox than the one before.
	next := make(map[string]int)
	for _, change := range h {
		id := change.Mailbox.ID()
		sent := c.sent[string(id[:])]
		if i := next[string(id[:])]; change.Revision > c.from && i < len(sent) && sent[i] == string(change.List.Encode()) {
			next[string(id[:])]++
		}
	}
	for id, sent := range c.sent {
		if next[id] < len(sent) {
			t.Fatalf("of %d entries of a mailbox since revision %d only %d are versions of it, in order", len(sent), c.from, next[id])
		}
	}
}

// wantError expects a status.
func wantError(t *testing.T, err error, code codes.Code, reason decisionv1.ErrorReason) {
	t.Helper()
	if status.Code(err) != code || rpcerr.Reason(err) != reason {
		t.Errorf("error = %v, want %v with %v", err, code, reason)
	}
}

// TestGuarantees: several writers, and sidecars with all kinds of trouble. At every commit each has exactly the store.
func TestGuarantees(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range 20 {
		w.save(fmt.Sprintf("user%d@example.com", i), false)
	}
	w.start()
	var writers, sidecars sync.WaitGroup
	for range 3 {
		writers.Go(func() {
			for range 100 {
				w.save(fmt.Sprintf("user%d@example.com", rand.IntN(40)), rand.IntN(4) == 0)
			}
		})
	}
	var last atomic.Int64 // the revision to reach, once it is known
	last.Store(1 << 62)
	ctx, cancel := context.WithCancel(t.Context())
	var ticking sync.WaitGroup
	ticking.Go(func() {
		writers.Wait()
		for ctx.Err() == nil { // so that nobody waits for a message that does not come
			last.CompareAndSwap(1<<62, w.save("tick@example.com", false))
			<-time.After(10 * time.Millisecond)
		}
	})
	var mu sync.Mutex
	type sight struct {
		at    position
		state map[string]string
	}
	var seen []sight
	kinds := map[string]func(c *sidecar, round int){
		"steady": func(*sidecar, int) {},
		"slow":   func(*sidecar, int) { <-time.After(10 * time.Millisecond) },
		"cut after the first, the second, the third message and so on": func(c *sidecar, round int) {
			if c.messages >= 1+round%5 {
				c.resume()
			}
		},
		"cut at random": func(c *sidecar, _ int) {
			if rand.IntN(3) == 0 {
				c.resume()
			}
		},
		"from nothing again": func(c *sidecar, _ int) {
			if c.messages == 7 {
				c.at, c.state = position{}, nil
				c.resume()
			}
		},
		"closes its side": func(c *sidecar, _ int) {
			if c.messages == 5 {
				_ = c.rpc.CloseSend()
				if _, err := c.end(); !errors.Is(err, io.EOF) {
					t.Errorf("after closing its side a sidecar got %v", err)
				}
				c.resume()
			}
		},
	}
	for name, trouble := range kinds {
		c := w.sidecar()
		sidecars.Go(func() {
			c.resume()
			for round := 0; c.at.revision < last.Load(); round++ {
				commits := c.commits
				if _, err := c.recv(); rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_OVERLOADED {
					<-time.After(50 * time.Millisecond) // too many new streams
					c.resume()
					continue
				} else if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				if c.commits > commits {
					c.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: c.at.revision}}})
					mu.Lock()
					seen = append(seen, sight{c.at, c.state})
					mu.Unlock()
				}
				trouble(c, round)
			}
		})
	}
	sidecars.Wait()
	cancel()
	ticking.Wait()
	h := w.etcd.History()
	for _, s := range seen {
		(&sidecar{w: w, at: s.at, state: s.state}).check(h)
	}
	if len(seen) < 50 {
		t.Errorf("only %d commits were seen", len(seen))
	}
}

// TestResumeFromEveryRevision: a stream from any committed revision sends what changed since, no more and no less.
func TestResumeFromEveryRevision(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	begin := w.await(0)
	revisions := []int64{begin.Revision}
	for i := range 40 {
		revisions = append(revisions, w.save(fmt.Sprintf("user%d@example.com", i%9), i%7 == 6 && i > 9))
	}
	w.await(revisions[len(revisions)-1])
	h := w.etcd.History()
	c := w.sidecar()
	for _, revision := range revisions {
		c.at, c.state = position{begin.Store, begin.Epoch, revision}, make(map[string]string)
		lists, _ := h.At(revision)
		for m, l := range lists {
			id := m.ID()
			c.state[string(id[:])] = string(l.Encode())
		}
		changed := make(map[allow.Mailbox]bool)
		for _, change := range h {
			if change.Revision > revision {
				changed[change.Mailbox] = true
			}
		}
		c.resume()
		c.until(revisions[len(revisions)-1])
		c.check(h)
		if c.entries != len(changed) || c.commits != 1 {
			t.Errorf("from revision %d %d entries came in %d commits, not the %d that changed", revision, c.entries, c.commits, len(changed))
		}
	}
}

// TestBookmark: every stream begins with a commit, also of nothing, and then says nothing until something changes.
func TestBookmark(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	for _, name := range []string{"an empty store", "nothing new"} {
		c.resume()
		for i, want := range []string{"welcome", "changes"} {
			msg, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			if got := msg.ProtoReflect().WhichOneof(msg.ProtoReflect().Descriptor().Oneofs().Get(0)).Name(); string(got) != want {
				t.Errorf("%s: message %d is %s, not %s", name, i, got, want)
			}
		}
		if c.commits != 1 || c.at.revision != w.await(0).Revision || c.entries != 0 || c.at.cluster == 0 || c.at.epoch != 1 {
			t.Errorf("%s: %d commits, %d entries, at %+v", name, c.commits, c.entries, c.at)
		}
		if restart := name == "an empty store"; (c.from == 0) != restart {
			t.Errorf("%s: from %d", name, c.from)
		}
	}
	next := make(chan error, 1)
	go func() {
		_, err := c.recv()
		next <- err
	}()
	select {
	case err := <-next:
		t.Errorf("a message although nothing changed; %v", err)
	case <-time.After(while):
	}
	revision := w.save("alice@example.com", false)
	if err := <-next; err != nil || c.at.revision != revision {
		t.Errorf("after a save at %d: at %d, %v", revision, c.at.revision, err)
	}
}

// TestClearedIsNotSentFromZero: a snapshot leaves out mailboxes that are unrestricted, and only these.
func TestClearedIsNotSentFromZero(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.save("alice@example.com", false)
	w.save("bob@example.com", false)
	w.await(w.save("alice@example.com", true))
	c := w.sidecar()
	c.resume()
	c.until(0)
	if c.entries != 1 || len(c.state) != 1 {
		t.Errorf("%d entries, %d mailboxes", c.entries, len(c.state))
	}
	c.until(w.save("bob@example.com", true))
	if c.entries != 2 || len(c.state) != 0 {
		t.Errorf("%d entries, %d mailboxes", c.entries, len(c.state))
	}
}

func TestHello(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	revision := w.save("alice@example.com", false)
	state := w.await(revision)
	const fieldInvalid, wentBack = decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK
	other := slices.Clone(state.Anchor.Bytes())
	other[len(other)-1]++
	hello := func(change func(*feedv1.Hello)) *feedv1.SyncRequest {
		h := &feedv1.Hello{Id: "test", Version: "1", Cluster: state.Store, Epoch: state.Epoch, Revision: revision}
		change(h)
		return &feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: h}}
	}
	tests := []struct {
		name    string
		first   *feedv1.SyncRequest
		code    codes.Code
		reason  decisionv1.ErrorReason
		field   string
		restart bool
	}{
		{name: "in step", first: hello(func(*feedv1.Hello) {})},
		{name: "without state", first: hello(func(h *feedv1.Hello) { h.Cluster, h.Epoch, h.Revision = 0, 0, 0 }), restart: true},
		{name: "from zero on purpose", first: hello(func(h *feedv1.Hello) { h.Revision = 0 }), restart: true},
		{name: "of another store", first: hello(func(h *feedv1.Hello) { h.Cluster++ }), restart: true},
		{name: "of another store and later", first: hello(func(h *feedv1.Hello) { h.Cluster++; h.Revision += 100; h.Epoch = 9 }), restart: true},
		{name: "of a lower epoch", first: hello(func(h *feedv1.Hello) { h.Epoch-- }), restart: true},
		{name: "of a lower epoch and later", first: hello(func(h *feedv1.Hello) { h.Epoch--; h.Revision += 100 }), restart: true},
		{name: "of a higher epoch", first: hello(func(h *feedv1.Hello) { h.Epoch++ }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "of a higher epoch, from zero", first: hello(func(h *feedv1.Hello) { h.Epoch++; h.Revision = 0 }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "ahead", first: hello(func(h *feedv1.Hello) { h.Revision++ }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "far ahead", first: hello(func(h *feedv1.Hello) { h.Revision = 1<<63 - 1 }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "with its anchor", first: hello(func(h *feedv1.Hello) { h.Anchor = state.Anchor.Bytes() })},
		{name: "from zero, with its anchor", first: hello(func(h *feedv1.Hello) { h.Anchor, h.Revision = state.Anchor.Bytes(), 0 }), restart: true},
		{name: "with another anchor", first: hello(func(h *feedv1.Hello) { h.Anchor = other }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "from zero, with another anchor", first: hello(func(h *feedv1.Hello) { h.Anchor, h.Revision = other, 0 }), code: codes.FailedPrecondition, reason: wentBack},
		{name: "with another anchor of a lower epoch", first: hello(func(h *feedv1.Hello) { h.Anchor = other; h.Epoch-- }), restart: true},
		{name: "with another anchor of another store", first: hello(func(h *feedv1.Hello) { h.Anchor = other; h.Cluster++ }), restart: true},
		{name: "with half an anchor", first: hello(func(h *feedv1.Hello) { h.Anchor = other[:20] }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.anchor"},
		{name: "longest names", first: hello(func(h *feedv1.Hello) { h.Id, h.Version = strings.Repeat("ü", 127)+"x", strings.Repeat("v", 255) })},
		{name: "no version", first: hello(func(h *feedv1.Hello) { h.Version = "" })},
		{name: "no id", first: hello(func(h *feedv1.Hello) { h.Id = "" }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.id"},
		{name: "long id", first: hello(func(h *feedv1.Hello) { h.Id = strings.Repeat("ü", 128) }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.id"},
		{name: "line break in the id", first: hello(func(h *feedv1.Hello) { h.Id = "a\r\nb" }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.id"},
		{name: "control character in the id", first: hello(func(h *feedv1.Hello) { h.Id = "a\x00" }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.id"},
		{name: "long version", first: hello(func(h *feedv1.Hello) { h.Version = strings.Repeat("v", 256) }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.version"},
		{name: "escape in the version", first: hello(func(h *feedv1.Hello) { h.Version = "\x1b[2J" }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.version"},
		{name: "negative revision", first: hello(func(h *feedv1.Hello) { h.Revision = -1 }), code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.revision"},
		{name: "an empty message", first: &feedv1.SyncRequest{}, code: codes.InvalidArgument, reason: fieldInvalid, field: "message"},
		{name: "an empty hello", first: &feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{}}, code: codes.InvalidArgument, reason: fieldInvalid, field: "hello.id"},
		{name: "an ack first", first: &feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{}}}, code: codes.InvalidArgument, reason: fieldInvalid, field: "message"},
		{name: "a ping first", first: &feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ping{Ping: &feedv1.Ping{}}}, code: codes.InvalidArgument, reason: fieldInvalid, field: "message"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			defer cancel()
			rpc, err := feedv1.NewFeedServiceClient(w.sidecar().conn).Sync(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := rpc.Send(tt.first); err != nil {
				t.Fatal(err)
			}
			msg, err := rpc.Recv()
			if err != nil {
				wantError(t, err, tt.code, tt.reason)
				if violations := rpcerr.Detail[*errdetails.BadRequest](err).GetFieldViolations(); tt.field != "" && (len(violations) != 1 || violations[0].GetField() != tt.field) {
					t.Errorf("violations %v, want %s", violations, tt.field)
				}
				return
			}
			welcome := msg.GetWelcome()
			if tt.code != codes.OK || welcome.GetCluster() != state.Store || welcome.GetEpoch() != state.Epoch || welcome.GetRestart() != tt.restart {
				t.Errorf("the answer is %v, want code %v, restart %v", msg, tt.code, tt.restart)
			}
		})
	}
}

// TestLaterMessages: after hello only acks and pings are understood.
func TestLaterMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	for name, msg := range map[string]*feedv1.SyncRequest{
		"a second hello":   {Message: &feedv1.SyncRequest_Hello{Hello: &feedv1.Hello{Id: "test"}}},
		"an empty message": {},
	} {
		t.Run(name, func(t *testing.T) {
			c := w.sidecar()
			c.resume()
			c.until(0)
			c.send(msg)
			_, err := c.end()
			wantError(t, err, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
		})
	}
	for _, revision := range []int64{-1, 0, 1 << 62} {
		t.Run(fmt.Sprintf("an ack of %d", revision), func(t *testing.T) {
			c := w.sidecar()
			c.resume()
			c.until(0)
			c.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: revision}}})
			_, err := c.end()
			wantError(t, err, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
		})
	}
	t.Run("acks", func(*testing.T) {
		c := w.sidecar()
		c.resume()
		c.until(0)
		for range 2 {
			c.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: c.at.revision}}})
		}
		w.until("the acks", func() bool { return w.metric("allowednets_policy_feed_ack_seconds", "") == 2 })
		c.until(w.save("alice@example.com", false))
	})
}

// TestNotLoaded: without a verified state nobody is served.
func TestNotLoaded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.sidecar()
	c.resume()
	_, err := c.end()
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED)
	w.start()
	c.resume()
	c.until(0)
}

// TestReplicaCutOff: a replica that etcd does not answer must not fill a sidecar that has nothing: it may have been restarted
// after it enforced a save that the replica does not know. One that continues its state loses nothing.
func TestReplicaCutOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.await(w.save("alice@example.com", false))
	old, fresh := w.sidecar(), w.sidecar()
	old.resume()
	old.until(0)
	w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
	fresh.resume()
	_, err := fresh.end()
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	old.resume()
	old.until(0)
}

// TestReplicaBehind: a sidecar that is ahead of this replica, though not of etcd, waits for it and then goes on.
func TestReplicaBehind(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.await(w.save("alice@example.com", false))
	hang := func(ctx context.Context, msg any, recv func() error) error {
		if _, ok := msg.(*pb.WatchResponse); ok {
			<-ctx.Done()
			return ctx.Err()
		}
		return recv()
	}
	w.wire.OnRecv(hang)
	w.await(w.save("alice@example.com", false)) // takes the message that is waited for
	revision := w.save("bob@example.com", false)
	before := w.await(0)
	if before.Revision >= revision {
		t.Fatal("the test is wrong: the replica is not behind")
	}
	c := w.sidecar()
	c.at = position{before.Store, before.Epoch, revision}
	lists, _ := w.etcd.History().At(revision)
	c.state = make(map[string]string)
	for m, l := range lists {
		id := m.ID()
		c.state[string(id[:])] = string(l.Encode())
	}
	c.resume()
	first := make(chan error, 1)
	go func() {
		_, err := c.recv()
		first <- err
	}()
	select {
	case err := <-first:
		t.Fatalf("an answer from a replica that is behind; %v", err)
	case <-time.After(while):
	}
	w.wire.OnRecv(nil)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	c.until(revision)
	if c.entries != 0 || c.from != revision {
		t.Errorf("%d entries from %d", c.entries, c.from)
	}

	// One that cannot be reached does not say that history went back.
	w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
	c.at.revision++
	c.resume()
	_, err := c.end()
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
}

// TestEpochRaised: streams end, and those who come back start anew.
func TestEpochRaised(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.save("alice@example.com", false)
	c := w.sidecar()
	c.resume()
	c.until(w.save("bob@example.com", false))
	w.meta(2)
	_, err := c.end()
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
	c.resume()
	c.until(0)
	if c.at.epoch != 2 || c.from != 0 || len(c.state) != 2 {
		t.Errorf("after the epoch was raised: %+v from %d, %d mailboxes", c.at, c.from, len(c.state))
	}
	c.check(w.etcd.History())
}

// TestRestoredBackup: an older history has grown beyond what a sidecar has seen. None that enforces a save which it does not hold
// gets anything, until the epoch is raised; the others go on.
func TestRestoredBackup(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		lost, since int
	}{
		{name: "and as many saves", lost: 1, since: 1},
		{name: "and several saves", lost: 3, since: 12},
		{name: "and more than a stream takes at once", lost: 3, since: 5000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t).start()
			w.save("alice@example.com", false)
			early, late := w.sidecar(), w.sidecar()
			early.resume()
			early.until(w.save("bob@example.com", false))
			early.cancel()
			w.await(w.save("carol@example.com", false))
			backup := w.etcd.Backup()
			late.resume()
			for range tt.lost { // the last of them restricts bob
				late.until(w.save("dave@example.com", false))
				late.until(w.save("bob@example.com", false))
			}
			late.cancel()
			w.etcd.Restore(backup)
			if tt.since > 1000 {
				w.fill(tt.since, nthList(t, 1))
			} else {
				for range tt.since {
					w.save("dave@example.com", false)
					w.save("bob@example.com", true)
				}
			}
			now := newWorldOn(t, w.etcd).start()
			if at := now.await(0).Revision; at < late.at.revision {
				t.Fatalf("the other history is at %d, the sidecar at %d", at, late.at.revision)
			}
			move := func(c *sidecar, opened *world) *sidecar {
				moved := opened.sidecar()
				moved.at, moved.anchor, moved.state = c.at, c.anchor, c.state
				return moved
			}
			refused := func(what string) {
				t.Helper()
				c := move(late, now)
				c.resume()
				_, err := c.end()
				wantError(t, err, codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK)
				if c.messages > 0 {
					t.Errorf("%s: %d messages came before", what, c.messages)
				}
				c.at.revision = 0
				c.resume()
				_, err = c.end()
				wantError(t, err, codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK)
				// It must not look as if all had the save that it does not get.
				if sum := now.tracker.Summarize(nil, "", now.await(0).Token()); sum.Sidecars != 1 || sum.Applied != 0 {
					t.Errorf("%s: %d of %d sidecars enforce the newest save", what, sum.Applied, sum.Sidecars)
				}
			}
			refused("at first")
			w.save("bob@example.com", true)
			w.save("carol@example.com", true)
			now.await(w.save("erin@example.com", false))
			refused("after more saves")
			early = move(early, now)
			early.resume()
			early.until(0)
			if early.from == 0 {
				t.Error("a sidecar of what both histories share got everything")
			}
			early.check(w.etcd.History())
			// Without an anchor, nothing is known but the revision.
			old := now.sidecar()
			old.at, old.breach = late.at, func(string, ...any) {} // it finds out by the digest
			old.resume()
			if msg, err := old.recv(); err != nil || msg.GetWelcome() == nil {
				t.Errorf("a sidecar without an anchor got %v, %v", msg, err)
			}
			now.meta(2)
			healed := move(late, now)
			now.until("the new epoch", func() bool { return now.await(0).Epoch == 2 })
			healed.resume()
			healed.until(0)
			if healed.at.epoch != 2 || healed.from != 0 {
				t.Errorf("after the epoch was raised: %+v from %d", healed.at, healed.from)
			}
			healed.check(w.etcd.History())
		})
	}
}

// TestSilentStore: whether its save is there cannot be found out, so a sidecar gets nothing and comes back.
func TestSilentStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c, newest := w.sidecar(), w.sidecar()
	c.resume()
	c.until(w.save("alice@example.com", false))
	c.cancel()
	w.save("bob@example.com", false)
	now := newWorldOn(t, w.etcd).start()
	newest.resume()
	newest.until(w.save("carol@example.com", false))
	newest.cancel()
	now.await(newest.at.revision)
	now.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
	for _, s := range []struct {
		*sidecar
		known bool
	}{{c, false}, {newest, true}} {
		moved := now.sidecar()
		moved.at, moved.anchor, moved.state = s.at, s.anchor, s.state
		moved.resume()
		if s.known {
			moved.until(0)
			continue
		}
		_, err := moved.end()
		wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
		c = moved
	}
	now.wire.OnCall(nil)
	c.resume()
	c.until(0)
	if c.from == 0 {
		t.Error("it got everything")
	}
	c.check(w.etcd.History())
}

// TestMetaTouched: a new revision without a new save is a commit like any other.
func TestMetaTouched(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	revision := w.save("alice@example.com", false)
	c.until(revision)
	w.meta(1)
	c.until(revision + 1)
	c.until(w.save("bob@example.com", false))
	c.check(w.etcd.History())
}

// repeat makes the watch deliver every third message twice, which makes the replica load everything.
func (w *world) repeat() {
	var mu sync.Mutex
	var n int
	var again *pb.WatchResponse
	w.wire.OnRecv(func(_ context.Context, msg any, recv func() error) error {
		watch, ok := msg.(*pb.WatchResponse)
		if !ok {
			return recv()
		}
		mu.Lock()
		repeated := again
		again = nil
		mu.Unlock()
		if repeated != nil {
			proto.Merge(watch, repeated)
			return nil
		}
		err := recv()
		mu.Lock()
		defer mu.Unlock()
		if err == nil && len(watch.GetEvents()) > 0 {
			if n++; n%3 == 0 {
				again = proto.CloneOf(watch)
			}
		}
		return err
	})
}

// TestMirrorReplaced: the replica loads everything anew. If nothing is different, streams do not notice.
func TestMirrorReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	c.until(w.save("alice@example.com", false))
	for range 3 {
		loads := w.metric("allowednets_policy_store_loads_total", "gap")
		w.repeat()
		w.until("a load", func() bool {
			c.until(w.save("alice@example.com", false)) // the one that is repeated, sooner or later
			return w.metric("allowednets_policy_store_loads_total", "gap") > loads
		})
		w.wire.OnRecv(nil)
	}
	c.until(w.save("bob@example.com", false))
	c.check(w.etcd.History())
	if n := w.metric("allowednets_policy_feed_streams_total", "resume"); n != 0 {
		t.Errorf("%v streams were resumed", n)
	}
}

// TestMirrorCorrected: the replica had shown something wrong, and a load puts it right at the same revision. A sidecar that
// believed it must not stay with it.
func TestMirrorCorrected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.save("alice@example.com", false)
	var forge atomic.Bool
	forge.Store(true)
	w.wire.OnRecv(func(_ context.Context, msg any, recv func() error) error {
		err := recv()
		if scan, ok := msg.(*pb.RangeStreamResponse); ok && err == nil && forge.Swap(false) {
			for _, kv := range scan.GetRangeResponse().GetKvs() {
				var m storev1.Mailbox
				if err := proto.Unmarshal(kv.Value, &m); err != nil {
					return err
				}
				m.Nets = []string{"9.9.9.9"}
				kv.Value, err = proto.Marshal(&m)
			}
		}
		return err
	})
	w.start()
	c := w.sidecar()
	c.resume()
	c.until(0)
	w.await(w.save("bob@example.com", false)) // the watch runs
	w.repeat()
	for n := 0; w.metric("allowednets_policy_store_loads_total", "gap") == 0; n++ {
		if n > 50 {
			t.Fatal("no load")
		}
		w.await(w.save("bob@example.com", false))
		<-time.After(100 * time.Millisecond) // time for a load before the next save
	}
	// If something was saved since, the next commit shows the sidecar that it is wrong. If not, the stream must end.
	noticed := false
	c.breach = func(format string, args ...any) {
		if noticed = true; !strings.Contains(format, "add up to") {
			t.Errorf(format, args...)
		}
	}
	for !noticed {
		if _, err := c.recv(); err != nil {
			wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
			break
		}
	}
	c.breach = t.Errorf
	c.at, c.state = position{}, nil
	c.resume()
	c.until(0)
	c.check(w.etcd.History())
}

// TestCompaction: the replica was away while etcd forgot, and streams go on.
func TestCompaction(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	c.until(w.save("alice@example.com", false))
	w.wire.OnCall(func(context.Context, any, any, func() error) error { return errWire })
	w.wire.OnRecv(func(context.Context, any, func() error) error { return errWire })
	for i := range 10 {
		w.save(fmt.Sprintf("user%d@example.com", i%4), i == 7)
	}
	w.etcd.Compact(t.Context())
	w.wire.OnCall(nil)
	w.wire.OnRecv(nil)
	c.until(w.save("bob@example.com", false))
	c.check(w.etcd.History())
}

// TestEtcdRestarts: streams stay open and go on.
func TestEtcdRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	c.until(w.save("alice@example.com", false))
	w.etcd.Restart()
	c.until(w.save("bob@example.com", false))
	c.check(w.etcd.History())
}

// TestPing: a pong answers with a read that began after the ping.
func TestPing(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	c.until(0)
	pong := func() *feedv1.Pong {
		t.Helper()
		for {
			msg, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			if p := msg.GetPong(); p != nil {
				return p
			}
		}
	}
	for nonce := range uint64(20) {
		revision := w.save("alice@example.com", false)
		c.ping(nonce)
		if p := pong(); p.GetNonce() != nonce || p.GetRevision() < revision {
			t.Errorf("after a save at %d ping %d got %v", revision, nonce, p)
		}
	}

	// A read that is under way when the ping arrives does not answer it: here its result is known before the save and
	// handed out after the ping.
	held, release := make(chan struct{}), make(chan struct{})
	once := sync.Once{}
	w.wire.OnCall(func(_ context.Context, _, _ any, call func() error) error {
		err := call()
		once.Do(func() {
			close(held)
			<-release
		})
		return err
	})
	<-held
	revision := w.save("alice@example.com", false)
	c.ping(100)
	c.until(revision) // the watch goes on; the ping has long arrived
	close(release)
	if p := pong(); p.GetNonce() != 100 || p.GetRevision() < revision {
		t.Errorf("after a save at %d a ping among reads got %v", revision, p)
	}

	// No pong while etcd is frozen; the newest ping is answered afterwards.
	thaw := make(chan struct{})
	w.wire.OnCall(func(ctx context.Context, _, _ any, call func() error) error {
		select {
		case <-thaw:
			return call()
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	c.ping(200)
	got := make(chan *feedv1.Pong, 1)
	go func() { got <- pong() }()
	select {
	case p := <-got:
		t.Errorf("a pong %v from a frozen etcd", p)
	case <-time.After(while):
	}
	revision = w.save("bob@example.com", false)
	c.ping(201)
	c.ping(202)
	close(thaw)
	first := <-got
	if first.GetNonce() == 200 { // its read had not begun either
		first = pong()
	}
	if first.GetNonce() != 202 && first.GetNonce() != 201 || first.GetRevision() < revision {
		t.Errorf("after the thaw %v, want nonce 201 or 202 and at least revision %d", first, revision)
	}
}

// TestPingBehindHangingWatch: etcd answers but the watch hangs: no pong, since the mirror does not have what etcd has.
func TestPingBehindHangingWatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.await(w.save("alice@example.com", false))
	c := w.sidecar()
	c.resume()
	c.until(0)
	w.wire.OnRecv(func(ctx context.Context, msg any, recv func() error) error {
		if _, ok := msg.(*pb.WatchResponse); ok {
			<-ctx.Done()
			return ctx.Err()
		}
		return recv()
	})
	w.await(w.save("alice@example.com", false))
	revision := w.save("alice@example.com", false)
	c.ping(1)
	type answer struct {
		pong *feedv1.Pong
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		for {
			msg, err := c.recv()
			if p := msg.GetPong(); p != nil || err != nil {
				got <- answer{p, err}
				return
			}
		}
	}()
	select {
	case a := <-got:
		t.Errorf("an answer from a mirror that is behind: %v, %v", a.pong, a.err)
	case <-time.After(while):
	}
	w.wire.OnRecv(nil)
	if a := <-got; a.err != nil || a.pong.GetRevision() < revision {
		t.Errorf("after a save at %d: %v, %v", revision, a.pong, a.err)
	}
}

// TestSlowSidecar: one that does not read delays nobody, and when it reads it gets the newest state in larger steps.
func TestSlowSidecar(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	slow, quick := w.sidecar(), w.sidecar()
	slow.resume()
	quick.resume()
	quick.until(0)
	slow.until(0)
	var revision int64
	for i := range 40 { // more than a stream's window holds
		rec, _, err := w.writer.Save(t.Context(), store.Save{Mailbox: mailbox(t, fmt.Sprintf("user%d@example.com", i)), List: bigList(t, i)})
		if err != nil {
			t.Fatal(err)
		}
		revision = rec.Revision
		quick.until(revision)
	}
	slow.until(revision)
	h := w.etcd.History()
	quick.check(h)
	slow.check(h)
	if slow.commits >= quick.commits-5 {
		t.Errorf("the slow sidecar got %d commits, the quick one %d", slow.commits, quick.commits)
	}
}

// TestCommitsDoNotQueueUp: a sidecar that has not acknowledged a commit gets another one now and then, and in it all that was saved
// meanwhile.
func TestCommitsDoNotQueueUp(t *testing.T) {
	t.Parallel()
	const patience = 200 * time.Millisecond
	w := newWorld(t).start()
	busy := w.sidecar()
	busy.resume()
	busy.until(0)
	begun := time.Now()
	var revision int64
	for i := range 40 {
		revision = w.save(fmt.Sprintf("user%d@example.com", i), false)
	}
	took := time.Since(begun)
	busy.until(revision)
	busy.check(w.etcd.History())
	// The first one, one as soon as there is patience for it again, and one after the last save.
	if most := 3 + int(took/patience); busy.commits > most {
		t.Errorf("%d commits for 40 saves in %v; want at most %d", busy.commits, took, most)
	}
}

// bigList is a list of as many nets as the default permits.
func bigList(t testing.TB, n int) allow.List {
	t.Helper()
	nets := make([]string, 256)
	for i := range nets {
		nets[i] = fmt.Sprintf("2a00:%x:%x::/48", n&0xffff, i)
	}
	l, err := allow.Rules{}.ParseEntries(nets)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// fill saves n records at once, past the checks of a save, in the form that a save gives them.
func (w *world) fill(n int, l allow.List) {
	w.t.Helper()
	client := w.etcd.Client()
	jobs := make(chan int)
	var filling sync.WaitGroup
	for range 32 {
		filling.Go(func() {
			for i := range jobs {
				name := fmt.Sprintf("user%d@example.com", i)
				after := &storev1.Mailbox{Nets: l.Strings(), Version: 1}
				record, err1 := proto.Marshal(after)
				change, err2 := proto.Marshal(&storev1.Change{Mailbox: name, After: after})
				_, err3 := client.Txn(w.t.Context()).Then(
					clientv3.OpPut("/allowednets/v1/mailboxes/"+name, string(record)),
					clientv3.OpPut(fmt.Sprintf("/allowednets/v1/changes/%s/%020d", name, 1), string(change)),
					clientv3.OpPut("/allowednets/v1/log", string(change)),
				).Commit()
				if err := errors.Join(err1, err2, err3); err != nil {
					w.t.Error(err)
				}
			}
		})
	}
	for i := range n {
		jobs <- i
	}
	close(jobs)
	filling.Wait()
}

// TestBatches: a whole state comes in messages that gRPC's limits let through.
func TestBatches(t *testing.T) {
	t.Parallel()
	const records = 300
	w := newWorld(t)
	w.fill(records, bigList(t, 1))
	w.start()
	c := w.sidecar()
	c.resume()
	c.until(0)
	if c.entries != records || c.messages < 3 { // the first of them is the welcome
		t.Errorf("%d entries in %d messages", c.entries, c.messages)
	}
	c.check(w.etcd.History())
	if n := w.metric("allowednets_policy_feed_entries_total", ""); n != records {
		t.Errorf("the metric counts %v entries", n)
	}
}

// TestSnapshotsAreLimited: while sixteen sidecars do not take their state, no other gets a whole state, but those that
// only need what changed do.
func TestSnapshotsAreLimited(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fill(300, bigList(t, 1)) // more than a stream's window holds
	w.start()
	ready := w.sidecar()
	ready.resume()
	ready.until(0)
	var busy []*sidecar
	for range 16 {
		c := w.sidecar()
		c.resume()
		if _, err := c.recv(); err != nil { // the welcome
			t.Fatal(err)
		}
		busy = append(busy, c)
	}
	late := w.sidecar()
	late.resume()
	refused := make(chan error)
	go func() {
		drained, err := late.end()
		if !drained {
			t.Error("no drain")
		}
		refused <- err
	}()
	again := w.sidecar()
	again.at, again.state = ready.at, ready.state
	again.resume()
	again.until(0)
	ready.until(w.save("alice@example.com", false))
	wantError(t, <-refused, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
	busy[0].until(0)
	late.resume()
	late.until(0)
	full := w.sidecar()
	full.resume()
	if _, err := full.recv(); err != nil {
		t.Fatal(err)
	}
	busy[1].cancel() // one that leaves in the middle makes room too
	another := w.sidecar()
	another.resume()
	another.until(0)
	if n := w.metric("allowednets_policy_feed_streams_total", "refused"); n != 1 {
		t.Errorf("%v streams were refused", n)
	}
}

// TestNewStreamsAreLimited: a herd of sidecars is let in 200 at a time.
func TestNewStreamsAreLimited(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	c := w.sidecar()
	c.resume()
	c.until(0)
	var let, refused atomic.Int64
	var herd sync.WaitGroup
	begin := time.Now()
	for range 8 {
		one := w.sidecar()
		one.at, one.state = c.at, c.state
		herd.Go(func() {
			for range 50 {
				one.resume()
				drained := false
				for one.commits == 0 {
					msg, err := one.recv()
					if err != nil {
						wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
						if !drained {
							t.Error("refused without a drain")
						}
						refused.Add(1)
						break
					}
					drained = drained || msg.GetDrain() != nil
				}
				let.Add(int64(one.commits))
			}
		})
	}
	herd.Wait()
	if most := 200 + int64(200*time.Since(begin).Seconds()) + 1; let.Load() > most || let.Load()+refused.Load() != 400 {
		t.Errorf("%d were let in within %v and %d refused", let.Load(), time.Since(begin), refused.Load())
	}
	if refused.Load() == 0 && time.Since(begin) < time.Second {
		t.Error("nobody was refused")
	}
}

// TestDrain: all streams are told to go, at once, whatever they do.
func TestDrain(t *testing.T) {
	t.Parallel()
	w := newWorld(t).start()
	w.await(w.save("alice@example.com", false))
	var group sync.WaitGroup
	for i := range 10 {
		c := w.sidecar()
		c.resume()
		c.until(0)
		if i%2 == 0 {
			c.ping(1)
		}
		group.Go(func() {
			drained, err := c.end()
			if !drained {
				t.Error("no drain")
			}
			wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
		})
	}
	if n := w.metric("allowednets_policy_sidecars_connected", ""); n != 10 {
		t.Errorf("%v sidecars are connected", n)
	}
	w.feed.Drain()
	w.feed.Drain() // once more does no harm
	group.Wait()
	late := w.sidecar()
	late.resume()
	drained, err := late.end()
	wantError(t, err, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED)
	if !drained {
		t.Error("no drain")
	}
	w.until("the metric", func() bool { return w.metric("allowednets_policy_sidecars_connected", "") == 0 })
}

// TestOrderOfEntries: entries come with rising revisions, so that what changed last is sent last.
func TestOrderOfEntries(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range 30 {
		w.save(fmt.Sprintf("user%d@example.com", rand.IntN(12)), i%5 == 4)
	}
	w.start()
	newest := make(map[string]int64)
	for _, change := range w.etcd.History() {
		id := change.Mailbox.ID()
		newest[string(id[:])] = change.Revision
	}
	c := w.sidecar()
	c.resume()
	var order []int64
	for c.commits == 0 {
		msg, err := c.recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range msg.GetChanges().GetEntries() {
			order = append(order, newest[string(e.GetId())])
		}
	}
	if len(order) == 0 || !slices.IsSortedFunc(order, cmp.Compare) {
		t.Errorf("the revisions are %v", order)
	}
}
