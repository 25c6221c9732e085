package faults

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/test/stack"
)

// reader stands in for a sidecar: it follows the feed, verifies count and digest of every commit, and keeps nothing else.
type reader struct {
	id      string
	report  *report
	creds   credentials.TransportCredentials
	frozen  *atomic.Bool // it reads nothing while this is set
	applied atomic.Int64 // revision

	cluster, epoch uint64
	hashes         map[string][sha256.Size]byte
	digest         [2]uint64
}

// run follows until ctx ends.
func (r *reader) run(ctx context.Context, random *rand.Rand) {
	for patience := 200 * time.Millisecond; ctx.Err() == nil; patience = min(2*patience, 5*time.Second) {
		before := r.applied.Load()
		if err := r.follow(ctx); err != nil && ctx.Err() == nil {
			r.report.count("streams that ended", 1)
		}
		if r.applied.Load() > before {
			patience = 200 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(random.Int64N(int64(patience)))):
		}
	}
}

func (r *reader) follow(ctx context.Context) error {
	conn, err := grpc.NewClient("dns:///"+stack.PolicyName+":7443", grpc.WithTransportCredentials(r.creds))
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
	if err := stream.Send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: &feedv1.Hello{
		Id: r.id, Version: "reader", Cluster: r.cluster, Epoch: r.epoch, Revision: r.applied.Load(),
	}}}); err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		for r.frozen.Load() && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
		switch m := resp.GetMessage().(type) {
		case *feedv1.SyncResponse_Welcome:
			r.cluster, r.epoch = m.Welcome.GetCluster(), m.Welcome.GetEpoch()
			if m.Welcome.GetRestart() {
				r.hashes, r.digest = make(map[string][sha256.Size]byte), [2]uint64{}
			}
		case *feedv1.SyncResponse_Changes:
			if err := r.apply(m.Changes); err != nil {
				r.report.violated("%s: %v", r.id, err)
				return err
			}
			if m.Changes.GetCommit() == nil {
				continue
			}
			if err := stream.Send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: r.applied.Load()}}}); err != nil {
				return err
			}
		case *feedv1.SyncResponse_Drain:
			return errors.New("drained")
		}
	}
}

// apply takes entries, and verifies a commit.
func (r *reader) apply(c *feedv1.Changes) error {
	for _, e := range c.GetEntries() {
		id := string(e.GetId())
		if old, ok := r.hashes[id]; ok {
			r.add(old, true)
			delete(r.hashes, id)
		}
		if len(e.GetNets()) > 0 {
			h := sha256.Sum256(append(bytes.Clone(e.GetId()), e.GetNets()...))
			r.hashes[id] = h
			r.add(h, false)
		}
	}
	commit := c.GetCommit()
	if commit == nil {
		return nil
	}
	digest := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, r.digest[0]), r.digest[1])
	if commit.GetCount() != uint64(len(r.hashes)) || !bytes.Equal(digest, commit.GetDigest()) || commit.GetRevision() < r.applied.Load() {
		return fmt.Errorf("commit %v, after %d with %d mailboxes and digest %x", commit, r.applied.Load(), len(r.hashes), digest)
	}
	r.report.count("commits that readers verified", 1)
	r.applied.Store(commit.GetRevision())
	return nil
}

// add adds to the digest modulo 2^128, or subtracts.
func (r *reader) add(h [sha256.Size]byte, subtract bool) {
	high, low := binary.BigEndian.Uint64(h[:8]), binary.BigEndian.Uint64(h[8:16])
	var carry uint64
	if subtract {
		r.digest[1], carry = bits.Sub64(r.digest[1], low, 0)
		r.digest[0], _ = bits.Sub64(r.digest[0], high, carry)
		return
	}
	r.digest[1], carry = bits.Add64(r.digest[1], low, 0)
	r.digest[0], _ = bits.Add64(r.digest[0], high, carry)
}

// TestReconnectStorm lets many streams lose two of three policy services at once, under saves and checks. All must be in step
// again; then a tenth of them stops reading, which must cost the others nothing.
func TestReconnectStorm(t *testing.T) {
	streams := number(t, "ALLOWEDNETS_FAULTS_STREAMS", 200)
	seed := seed(t)
	w := newWorld(t, settings{seed: seed, resting: 20 * time.Millisecond})
	defer w.report.tell(t)
	creds, err := w.Sidecar.Credentials()
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var readers []*reader
	var frozen, never atomic.Bool
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	for i := range streams {
		r := &reader{id: fmt.Sprintf("reader%04d", i), report: w.report, creds: creds, frozen: &never}
		if i%10 == 0 {
			r.frozen = &frozen
		}
		readers = append(readers, r)
		following.Go(func() { r.run(ctx, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	inStep := func(what string, which func(*reader) bool) {
		t.Helper()
		begun := time.Now()
		w.pass(ctx, 1) // one that nobody can know yet
		newest := w.model.Newest()
		err := stack.Await(within(t, 3*time.Minute), func(context.Context) error {
			behind := 0
			for _, r := range readers {
				if which(r) && r.applied.Load() < newest.Revision {
					behind++
				}
			}
			if behind > 0 {
				return fmt.Errorf("%d streams are behind %s", behind, newest)
			}
			return nil
		})
		if err != nil {
			w.report.violated("%s: %v", what, err)
		}
		w.report.atMost(fmt.Sprintf("%d streams in step, %s", streams, what), time.Since(begun))
	}
	everybody := func(*reader) bool { return true }
	awake := func(r *reader) bool { return r.frozen == &never }
	inStep("from nothing", everybody)
	inStep("nothing amiss", everybody)
	w.memory("before the storm")

	for _, p := range w.policies[:2] {
		w.guard(p.Process, false)
		must(t, p.Kill())
	}
	inStep("two of three policy services killed", everybody)
	w.memory("after the storm, all streams on one")
	for _, p := range w.policies[:2] {
		must(t, p.Restart(within(t, startWithin)))
		w.guard(p.Process, true)
	}
	frozen.Store(true)
	inStep("a tenth frozen", awake)
	for range 5 {
		<-time.After(2 * time.Second)
		inStep("a tenth frozen, later", awake)
	}
	w.memory("with a tenth frozen")
	frozen.Store(false)
	inStep("all awake", everybody)
	must(t, w.caughtUp(within(t, healWithin), revision.Token{}))
	w.finish()
	if n := w.report.total("refusals without an excuse"); n > 0 {
		t.Errorf("%d refusals", n)
	}
}

// memory notes how much memory the policy services have.
func (w *world) memory(when string) {
	for i, p := range w.policies {
		if n := resident(p.Pid()); n > 0 {
			w.report.most(fmt.Sprintf("resident memory in KiB %s: policy%d", when, i), n)
		}
	}
}
