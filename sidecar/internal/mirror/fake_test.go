package mirror_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"log/slog"
	"maps"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cluster = 0xc1
	epoch   = 3
)

// content is the restricted mailboxes of a state with their encoded nets.
type content map[allow.ID]string

func mailbox(n int) allow.ID {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
	return allow.ID(sum[:16])
}

// nets is the encoding of n addresses that begin with first.
func nets(first byte, n int) string {
	var b []byte
	for i := range n {
		b = append(b, 4, first, 0, 0, byte(i), 32)
	}
	return string(b)
}

func (c content) commit(revision int64) *feedv1.Commit {
	var d allow.Digest
	for id, nets := range c {
		d = d.Add(allow.EntryDigest(id, []byte(nets)))
	}
	return &feedv1.Commit{Revision: revision, Count: uint64(len(c)), Digest: d[:]}
}

func (c content) entries() []*feedv1.Entry {
	var entries []*feedv1.Entry
	for id, nets := range c {
		entries = append(entries, entry(id, nets))
	}
	return entries
}

// with returns a copy in which a mailbox has other nets.
func (c content) with(id allow.ID, nets string) content {
	c = maps.Clone(c)
	if nets == "" {
		delete(c, id)
	} else {
		c[id] = nets
	}
	return c
}

func entry(id allow.ID, nets string) *feedv1.Entry {
	return &feedv1.Entry{Id: id[:], Nets: []byte(nets)}
}

// Messages of the server.

func welcome(cluster, epoch uint64, restart bool) *feedv1.SyncResponse {
	return &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Welcome{Welcome: &feedv1.Welcome{Cluster: cluster, Epoch: epoch, Restart: restart}}}
}

func changes(commit *feedv1.Commit, entries ...*feedv1.Entry) *feedv1.SyncResponse {
	return &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Changes{Changes: &feedv1.Changes{Entries: entries, Commit: commit}}}
}

func pong(nonce uint64, revision int64) *feedv1.SyncResponse {
	return &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Pong{Pong: &feedv1.Pong{Nonce: nonce, Revision: revision}}}
}

func drain(after time.Duration) *feedv1.SyncResponse {
	return &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Drain{Drain: &feedv1.Drain{RetryAfterMs: uint32(after.Milliseconds())}}}
}

// feed is a policy service that does what the test says.
type feed struct {
	feedv1.UnimplementedFeedServiceServer
	t      *testing.T
	opened chan *conversation
	deaf   atomic.Bool // of streams: after the Hello nothing more is read
}

// conversation is one stream, as the server sees it.
type conversation struct {
	t      *testing.T
	stream feedv1.FeedService_SyncServer
	hello  *feedv1.Hello
	acks   chan int64
	pings  chan uint64
	end    chan error
	over   chan error // why the sidecar sends no more; io.EOF if it said so
}

func (f *feed) Sync(stream feedv1.FeedService_SyncServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	c := &conversation{
		t: f.t, stream: stream, hello: first.GetHello(),
		acks: make(chan int64, 1000), pings: make(chan uint64, 1000), end: make(chan error, 1), over: make(chan error, 1),
	}
	if c.hello == nil {
		f.t.Errorf("the first message is %v", first)
	}
	select {
	case f.opened <- c:
	case <-stream.Context().Done():
		return nil
	}
	received := make(chan struct{})
	deaf := f.deaf.Load() // not before somebody accepted the stream, so that the test has said what it wants
	go func() {
		defer close(received)
		if deaf {
			<-stream.Context().Done() // and what has arrived by then is not looked at either
			return
		}
		for {
			msg, err := stream.Recv()
			switch {
			case err != nil:
				c.over <- err
				return
			case msg.GetAck() != nil:
				c.acks <- msg.GetAck().GetRevision()
			case msg.GetPing() != nil:
				c.pings <- msg.GetPing().GetNonce()
			default:
				f.t.Errorf("unexpected message %v", msg)
			}
		}
	}()
	select {
	case err := <-c.end:
		return err
	case <-received:
		return nil
	}
}

func (c *conversation) send(msgs ...*feedv1.SyncResponse) {
	c.t.Helper()
	for _, msg := range msgs {
		if err := c.stream.Send(msg); err != nil {
			c.t.Fatalf("sending %v: %v", msg, err)
		}
	}
}

// acked waits for the acknowledgement of a revision, which must be the next one.
func (c *conversation) acked(revision int64) {
	c.t.Helper()
	select {
	case got := <-c.acks:
		if got != revision {
			c.t.Fatalf("revision %d was acknowledged; want %d", got, revision)
		}
	case <-time.After(time.Minute):
		c.t.Fatalf("revision %d was not acknowledged", revision)
	}
}

func (c *conversation) pinged() uint64 {
	c.t.Helper()
	select {
	case nonce := <-c.pings:
		return nonce
	case <-time.After(time.Minute):
		c.t.Fatal("no ping")
		return 0
	}
}

// fixture is a mirror that runs against a [feed].
type fixture struct {
	*feed
	m       *mirror.Mirror
	metrics *prometheus.Registry
	log     *bytes.Buffer
	stop    func()
	ended   chan struct{}
}

// start runs a mirror against a feed until the test ends. It must be called in a synctest bubble.
func start(t *testing.T, configure ...func(*mirror.Config)) *fixture {
	f := &fixture{
		feed: &feed{t: t, opened: make(chan *conversation)}, metrics: prometheus.NewRegistry(), log: new(bytes.Buffer), ended: make(chan struct{}),
	}
	lis := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	feedv1.RegisterFeedServiceServer(server, f.feed)
	go func() { _ = server.Serve(lis) }()
	cfg := mirror.Config{
		ID: "sidecar-1", Version: "v1.2.3", Log: slog.New(slog.NewTextHandler(f.log, nil)), Metrics: f.metrics,
		Dial: func() (*grpc.ClientConn, error) {
			return grpc.NewClient("passthrough:feed", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		},
	}
	for _, c := range configure {
		c(&cfg)
	}
	m, err := mirror.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.m = m
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(f.ended)
		if err := m.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	f.stop = func() {
		cancel()
		<-f.ended
	}
	t.Cleanup(func() {
		f.stop()
		server.Stop()
	})
	return f
}

// accept waits for the next stream.
func (f *fixture) accept() *conversation {
	f.t.Helper()
	select {
	case c := <-f.opened:
		return c
	case <-time.After(10 * time.Minute):
		f.t.Fatal("no stream was opened")
		return nil
	}
}

// synced opens a first stream and brings a state over it.
func (f *fixture) synced(revision int64, want content) *conversation {
	f.t.Helper()
	c := f.accept()
	c.send(welcome(cluster, epoch, true), changes(want.commit(revision), want.entries()...))
	c.acked(revision)
	f.wantState(revision, want)
	return c
}

// wantState fails unless the published state is exactly this one.
func (f *fixture) wantState(revision int64, want content) {
	f.t.Helper()
	wantRoot(f.t, f.m.State(), token(epoch, revision), want)
}

func wantRoot(t *testing.T, st *mirror.State, revision string, want content) {
	t.Helper()
	if st == nil {
		t.Fatalf("no state; want revision %s", revision)
	}
	if st.Revision != revision {
		t.Fatalf("revision %s; want %s", st.Revision, revision)
	}
	if c := want.commit(0); st.Index.Count() != c.GetCount() || st.Index.Digest() != allow.Digest(c.GetDigest()) {
		t.Fatalf("state %s has %d mailboxes with digest %x; want %v", revision, st.Index.Count(), st.Index.Digest(), c)
	}
	for id, nets := range want {
		set := st.Index.Lookup(id)
		if set == nil || string(set.AppendEncoding(nil)) != nets {
			t.Fatalf("state %s does not have the nets of %x", revision, id)
		}
	}
}

// wantMetric fails unless a metric has the value; label is the value of its one label, or empty.
func (f *fixture) wantMetric(name, label string, want float64) {
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
			if label != "" && m.GetLabel()[0].GetValue() != label {
				continue
			}
			if got := m.GetCounter().GetValue() + m.GetGauge().GetValue(); got != want {
				f.t.Errorf("%s{%s} = %v; want %v", name, label, got, want)
			}
			return
		}
	}
	f.t.Errorf("there is no metric %s{%s}", name, label)
}
