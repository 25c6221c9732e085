package bench

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	// herdSocket names the unix socket on which a herd's process finds its master.
	herdSocket = "ALLOWEDNETS_BENCH_HERD"
	// connectPace stays below the 200 new streams a second that a policy service admits.
	connectPace = 6 * time.Millisecond
	// pingEvery is what a sidecar does.
	pingEvery = 5 * time.Second
)

// herd is a process full of readers, and this side of the talk with it.
type herd struct {
	*stack.Process
	enc *gob.Encoder
	dec *gob.Decoder
}

// order is what a herd is asked to do. Fields that are zero ask nothing.
type order struct {
	Policy string         // address; the first order has it
	TLS    serve.TLSFlags // the first order has it
	Name   string         // of the readers

	Readers int           // how many there shall be
	Fresh   bool          // they all start from nothing at once, and only sum up: no change may follow
	Slow    time.Duration // pause of each reader after each message; negative: none
	Saves   []save        // wait until all have verified them, and report
}

// save is one save, or write of the floor.
type save struct {
	Revision int64
	Due      int64 // Unix time in nanoseconds
}

// report is the answer to an order.
type report struct {
	Err       string
	Latencies []int64 // of every save at every reader, from when it was due, in nanoseconds
	Last      []int64 // of every save at its last reader
	Commits   int     // verified since the last order
	Ready     []int64 // with Fresh: from the order to a reader's first verified commit
}

// startHerd starts a herd without readers.
func startHerd(tb testing.TB, s *stack.Stack, name, policy string) *herd {
	tb.Helper()
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: s.Path(name + ".herd")})
	must(tb, err)
	defer func() { _ = lis.Close() }()
	p, err := s.Start(name, os.Args[0], []string{"-test.run=^$"}, []string{herdSocket + "=" + s.Path(name+".herd")})
	must(tb, err)
	must(tb, lis.SetDeadline(time.Now().Add(startWithin)))
	conn, err := lis.Accept()
	must(tb, err)
	tb.Cleanup(func() { _ = conn.Close() })
	h := &herd{Process: p, enc: gob.NewEncoder(conn), dec: gob.NewDecoder(conn)}
	h.do(tb, order{Policy: policy, TLS: s.Sidecar, Name: name})
	return h
}

// do has an order carried out.
func (h *herd) do(tb testing.TB, o order) report {
	tb.Helper()
	must(tb, h.enc.Encode(o))
	return h.answer(tb)
}

func (h *herd) answer(tb testing.TB) report {
	tb.Helper()
	var r report
	if err := h.dec.Decode(&r); err != nil {
		tb.Fatalf("%v\n%s", err, h.LogTail())
	}
	if r.Err != "" {
		tb.Fatalf("the herd says: %s", r.Err)
	}
	return r
}

// runHerd is the herd's process: it does what it is told until its master is gone.
func runHerd() error {
	conn, err := new(net.Dialer).DialContext(context.Background(), "unix", os.Getenv(herdSocket))
	if err != nil {
		return err
	}
	debug.SetGCPercent(400) // a thousand sidecars share the machine with what is measured, which real ones do not
	enc, dec := gob.NewEncoder(conn), gob.NewDecoder(conn)
	ctx, cancel := context.WithCancel(context.Background())
	g := &group{ctx: ctx}
	defer g.following.Wait()
	defer cancel()
	for {
		var o order
		if dec.Decode(&o) != nil {
			return nil
		}
		r := report{}
		if err := g.obey(o, &r); err != nil {
			r.Err = err.Error()
		}
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
}

// group is all readers of a herd.
type group struct {
	ctx       context.Context //nolint:containedctx // of the process
	policy    string
	name      string
	creds     credentials.TransportCredentials
	following sync.WaitGroup
	readers   []*reader
	base      *base
	slow      atomic.Int64
	failed    atomic.Pointer[error]
}

// base is a verified state that all readers of a herd share, so that a thousand of them need not keep a thousand copies.
type base struct {
	cluster, epoch, count uint64
	revision              int64
	digest                allow.Digest
	entries               map[allow.ID]allow.Digest // restricted mailboxes
}

func (g *group) obey(o order, r *report) error {
	if o.Policy != "" {
		creds, err := o.TLS.Credentials()
		if err != nil {
			return err
		}
		g.policy, g.name, g.creds = o.Policy, o.Name, creds
	}
	if o.Slow != 0 {
		g.slow.Store(max(0, int64(o.Slow)))
	}
	if o.Fresh {
		return g.startFresh(o.Readers, r)
	}
	if err := g.grow(o.Readers); err != nil {
		return err
	}
	return g.await(o.Saves, r)
}

// grow adds readers. The first one reads the whole state; the others continue from what it has verified.
func (g *group) grow(n int) error {
	for len(g.readers) < n {
		rd := newReader(g, g.base)
		if g.base == nil {
			rd.all = make(map[allow.ID]allow.Digest)
		}
		begun := time.Now()
		g.start(rd)
		if g.base != nil && len(g.readers) > 1 { // the first two are waited for
			sleepUntil(g.ctx, begun.Add(connectPace))
			continue
		}
		if err := g.until(func() bool { return rd.applied.Load() > 0 }); err != nil {
			return err
		}
		if g.base == nil {
			if err := g.found(rd); err != nil {
				return err
			}
		}
	}
	return g.until(func() bool {
		return !slices.ContainsFunc(g.readers, func(r *reader) bool { return r.applied.Load() == 0 })
	})
}

// found makes the base of what the first reader has, which ends; nothing may be saved meanwhile.
func (g *group) found(rd *reader) error {
	rd.leave()
	<-rd.done
	g.base = &base{cluster: rd.cluster, epoch: rd.epoch, count: rd.count, revision: rd.applied.Load(), digest: rd.digest, entries: rd.all}
	g.readers = g.readers[:0]
	return nil
}

// startFresh starts readers that all want the whole state at once.
func (g *group) startFresh(n int, r *report) error {
	begun := time.Now()
	fresh := make([]*reader, n)
	for i := range fresh {
		fresh[i] = newReader(g, nil)
		g.start(fresh[i])
	}
	err := g.until(func() bool {
		return !slices.ContainsFunc(fresh, func(r *reader) bool { return r.applied.Load() == 0 })
	})
	for _, rd := range fresh {
		rd.mu.Lock()
		if len(rd.commits) > 0 {
			r.Ready = append(r.Ready, rd.commits[0].at-begun.UnixNano())
		}
		rd.mu.Unlock()
		rd.leave()
		<-rd.done
	}
	g.readers = nil
	return err
}

func (g *group) start(rd *reader) {
	g.readers = append(g.readers, rd)
	ctx, cancel := context.WithCancel(g.ctx)
	rd.leave = cancel
	g.following.Go(func() {
		defer cancel()
		defer close(rd.done)
		rd.run(ctx)
	})
}

// until waits for cond, at most ten minutes, unless a reader fails.
func (g *group) until(cond func() bool) error {
	ctx, cancel := context.WithTimeout(g.ctx, 10*time.Minute)
	defer cancel()
	var failed error
	err := stack.Await(ctx, func(context.Context) error {
		if err := g.failed.Load(); err != nil {
			failed = *err
			return nil
		}
		if !cond() {
			return errors.New("the readers are not in step")
		}
		return nil
	})
	return errors.Join(failed, err)
}

// await waits until all readers have verified the saves, and reports when they did.
func (g *group) await(saves []save, r *report) error {
	var newest int64
	for _, s := range saves {
		newest = max(newest, s.Revision)
	}
	err := g.until(func() bool {
		return !slices.ContainsFunc(g.readers, func(r *reader) bool { return r.applied.Load() < newest })
	})
	if err != nil {
		return err
	}
	slices.SortFunc(saves, func(a, b save) int { return int(a.Revision - b.Revision) })
	r.Last = make([]int64, len(saves))
	for _, rd := range g.readers {
		rd.mu.Lock()
		commits := rd.commits
		rd.commits = nil
		rd.mu.Unlock()
		r.Commits += len(commits)
		i := 0
		for n, s := range saves {
			for commits[i].revision < s.Revision {
				i++
			}
			took := commits[i].at - s.Due
			r.Latencies = append(r.Latencies, took)
			r.Last[n] = max(r.Last[n], took)
		}
	}
	return nil
}

// reader stands in for a sidecar.
type reader struct {
	group *group
	id    string
	leave context.CancelFunc
	done  chan struct{}

	cluster, epoch, count uint64
	digest                allow.Digest
	base                  *base
	changed               map[allow.ID]allow.Digest // since base
	all                   map[allow.ID]allow.Digest // of a reader that is to make the base
	applied               atomic.Int64

	mu      sync.Mutex
	commits []commit // since the last report
}

type commit struct {
	revision, at int64
}

func newReader(g *group, b *base) *reader {
	r := &reader{group: g, id: fmt.Sprintf("%s%05d", g.name, len(g.readers)), done: make(chan struct{}), base: b}
	if b != nil {
		r.cluster, r.epoch, r.count, r.digest = b.cluster, b.epoch, b.count, b.digest
		r.changed = make(map[allow.ID]allow.Digest)
	}
	return r
}

// run follows until ctx ends. A reader of a herd that grows must not be interrupted; one that starts from nothing comes again
// when it is sent away, as a sidecar does.
func (r *reader) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.follow(ctx)
		if errors.Is(err, errDrained) {
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Second):
			}
			continue
		}
		if ctx.Err() == nil {
			err = fmt.Errorf("%s: %w", r.id, err)
			r.group.failed.CompareAndSwap(nil, &err)
			return
		}
	}
}

var errDrained = errors.New("sent away")

func (r *reader) follow(ctx context.Context) error {
	conn, err := grpc.NewClient(r.group.policy, grpc.WithTransportCredentials(r.group.creds), grpc.WithReadBufferSize(0))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := feedv1.NewFeedServiceClient(conn).Sync(ctx)
	if err != nil {
		return err
	}
	hello := &feedv1.Hello{Id: r.id, Version: "bench"}
	if r.base != nil {
		hello.Cluster, hello.Epoch, hello.Revision = r.cluster, r.epoch, max(r.base.revision, r.applied.Load())
	}
	if err := stream.Send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: hello}}); err != nil {
		return err
	}
	var sending sync.Mutex
	send := func(msg *feedv1.SyncRequest) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(msg)
	}
	var pinging sync.WaitGroup
	defer pinging.Wait()
	defer cancel()
	pinging.Go(func() { ping(ctx, send) })
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		switch m := resp.GetMessage().(type) {
		case *feedv1.SyncResponse_Welcome:
			if r.base != nil && m.Welcome.GetRestart() {
				return errors.New("it may not resume")
			}
			r.cluster, r.epoch = m.Welcome.GetCluster(), m.Welcome.GetEpoch()
			if m.Welcome.GetRestart() {
				r.count, r.digest = 0, allow.Digest{}
			}
		case *feedv1.SyncResponse_Changes:
			if err := r.apply(m.Changes); err != nil {
				return err
			}
			if m.Changes.GetCommit() == nil {
				continue
			}
			if err := send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: r.applied.Load()}}}); err != nil {
				return err
			}
		case *feedv1.SyncResponse_Drain:
			return errDrained
		}
		if pause := r.group.slow.Load(); pause > 0 {
			sleepUntil(ctx, time.Now().Add(time.Duration(pause)))
		}
	}
}

// ping asks for the age of the data until ctx ends. Why a Send fails is what Recv says.
func ping(ctx context.Context, send func(*feedv1.SyncRequest) error) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for nonce := uint64(1); ; nonce++ {
		_ = send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ping{Ping: &feedv1.Ping{Nonce: nonce}}})
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// apply takes entries, and verifies a commit.
func (r *reader) apply(c *feedv1.Changes) error {
	for _, e := range c.GetEntries() {
		r.put(allow.ID(e.GetId()), e.GetNets())
	}
	commit := c.GetCommit()
	if commit == nil {
		return nil
	}
	if commit.GetCount() != r.count || allow.Digest(commit.GetDigest()) != r.digest || commit.GetRevision() < r.applied.Load() {
		return fmt.Errorf("commit %v, after %d with %d mailboxes and digest %x", commit, r.applied.Load(), r.count, r.digest)
	}
	r.verified(commit.GetRevision())
	return nil
}

func (r *reader) verified(revision int64) {
	now := time.Now().UnixNano()
	r.mu.Lock()
	r.commits = append(r.commits, commit{revision: revision, at: now})
	r.mu.Unlock()
	r.applied.Store(revision)
}

// put takes one entry. A reader without a base starts from nothing, where no mailbox comes twice.
func (r *reader) put(id allow.ID, nets []byte) {
	if r.base != nil {
		old, known := r.changed[id]
		if !known {
			old = r.base.entries[id]
		}
		if old != (allow.Digest{}) {
			r.count--
			r.digest = r.digest.Sub(old)
		}
	}
	var now allow.Digest
	if len(nets) > 0 {
		r.count++
		now = allow.EntryDigest(id, nets)
		r.digest = r.digest.Add(now)
	}
	switch {
	case r.base != nil:
		r.changed[id] = now
	case r.all != nil:
		r.all[id] = now
	}
}

// TestReader: a reader takes a commit that adds up, and no other.
func TestReader(t *testing.T) {
	id := func(n byte) []byte { return append(make([]byte, 15), n) }
	old, now := []byte{4, 8, 8, 8, 8, 32}, []byte{4, 9, 9, 9, 9, 32}
	digest := func(n byte, nets []byte) allow.Digest { return allow.EntryDigest(allow.ID(id(n)), nets) }
	right := digest(1, old).Add(digest(2, now)) // of two mailboxes
	for name, test := range map[string]struct {
		entries []*feedv1.Entry
		count   uint64
		digest  allow.Digest
		wrong   bool
	}{
		"changed":           {entries: []*feedv1.Entry{{Id: id(2), Nets: now}}, count: 2, digest: right},
		"changed twice":     {entries: []*feedv1.Entry{{Id: id(2)}, {Id: id(2), Nets: now}}, count: 2, digest: right},
		"lifted":            {entries: []*feedv1.Entry{{Id: id(2)}}, count: 1, digest: digest(1, old)},
		"another count":     {entries: []*feedv1.Entry{{Id: id(2), Nets: now}}, count: 1, digest: right, wrong: true},
		"a missing change":  {count: 2, digest: right, wrong: true},
		"another list":      {entries: []*feedv1.Entry{{Id: id(2), Nets: []byte{4, 9, 9, 9, 8, 32}}}, count: 2, digest: right, wrong: true},
		"one that is older": {entries: []*feedv1.Entry{{Id: id(2), Nets: old}}, count: 2, digest: right, wrong: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := &base{
				count: 2, digest: digest(1, old).Add(digest(2, old)),
				entries: map[allow.ID]allow.Digest{allow.ID(id(1)): digest(1, old), allow.ID(id(2)): digest(2, old)},
			}
			err := newReader(&group{}, b).apply(&feedv1.Changes{
				Entries: test.entries, Commit: &feedv1.Commit{Revision: 5, Count: test.count, Digest: test.digest[:]},
			})
			if (err != nil) != test.wrong {
				t.Errorf("error %v; want one: %v", err, test.wrong)
			}
		})
	}
}
