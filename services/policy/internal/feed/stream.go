package feed

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// stream is one sidecar's cursor into the mirror.
type stream struct {
	rpc      grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse]
	mirror   *store.Mirror
	barrier  func(context.Context) (store.State, error)
	draining <-chan struct{}
	entries  prometheus.Counter
	ackDelay prometheus.Observer

	session     *propagation.Session
	identity    store.State // of which store the cursor speaks
	cursor      int64
	skipCleared int64
	restart     bool
	caughtUp    func()                 // at every commit
	committed   store.State            // newest commit sent
	sent        atomic.Pointer[commit] // the same, for acks

	pings     chan uint64       // newest ping
	answering atomic.Bool       // there is a goroutine for pings
	pongs     chan *feedv1.Pong // newest pong
	received  chan error        // why receiving ended
	acked     chan struct{}     // the newest commit sent was acknowledged
	turn      chan struct{}     // of all streams
	open      *atomic.Int64     // streams
}

// commit is a commit on its way to being enforced.
type commit struct {
	revision int64
	at       time.Time
	acked    atomic.Bool
}

// run owns sending. One goroutine beside it receives, and another answers pings while there are any; both end with the stream's
// context, which gRPC cancels when the handler returns, so they are not waited for by name.
func (st *stream) run() error {
	ctx := st.rpc.Context()
	go func() { st.received <- st.receive() }()

	welcome := &feedv1.Welcome{Cluster: st.identity.Store, Epoch: st.identity.Epoch, Restart: st.restart}
	if err := st.rpc.Send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	for {
		// One after the other, in the order of coming: a save that wakes a thousand streams at once would let the next save, and
		// all else that this process does, wait behind them. Nobody waits for another's Send.
		select {
		case st.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		b := st.mirror.After(st.cursor, st.skipCleared, batchEntries, batchBytes)
		<-st.turn
		switch {
		case b.State.Store != st.identity.Store || b.State.Epoch != st.identity.Epoch:
			return unavailable(decisionv1.ErrorReason_ERROR_REASON_OVERLOADED, "the store has another epoch; say hello again")
		case b.State.Revision < st.cursor:
			return wentBack(st.identity.Epoch, st.cursor, b.State)
		case b.State.Revision == st.committed.Revision && b.State != st.committed:
			// The mirror was wrong and was put right. The sidecar holds what was wrong, and a new hello shows it.
			return unavailable(decisionv1.ErrorReason_ERROR_REASON_OVERLOADED, "what was sent was wrong; say hello again")
		case b.State != st.committed: // else the mirror was filled anew, with the same
			if err := st.send(b); err != nil {
				return err
			}
		}
		if err := st.wait(ctx, b); err != nil {
			return err
		}
	}
}

// send sends a batch and moves the cursor.
func (st *stream) send(b store.Batch) error {
	changes := &feedv1.Changes{Entries: entries(b.Entries)}
	if b.Head {
		st.sent.Store(&commit{revision: b.State.Revision, at: time.Now()})
		changes.Commit = &feedv1.Commit{
			Revision: b.State.Revision, Count: b.State.Count, Digest: b.State.Digest[:], Anchor: b.State.Anchor.Bytes(),
		}
	}
	if err := st.rpc.Send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Changes{Changes: changes}}); err != nil {
		return err
	}
	st.entries.Add(float64(len(b.Entries)))
	st.cursor = b.Next
	if b.Head {
		st.committed = b.State
		st.caughtUp()
	}
	return nil
}

// entries is what a batch says, allocated as a whole: a snapshot has as many as there are mailboxes.
func entries(batch []*store.Entry) []*feedv1.Entry {
	values, all := make([]feedv1.Entry, len(batch)), make([]*feedv1.Entry, len(batch))
	for i, e := range batch {
		values[i].Id, values[i].Nets = e.ID[:], e.Encoding
		all[i] = &values[i]
	}
	return all
}

// wait returns nil when there is more to send: at once in the middle of catching up, otherwise when the mirror has changed and
// the sidecar has acknowledged what it was sent, or is late with that, but not before the stream's gap has passed. So commits do
// not queue up before a sidecar, or before this process, that needs longer for one than saves take to follow each other: what
// was saved meanwhile comes at once, in the next one.
func (st *stream) wait(ctx context.Context, b store.Batch) error {
	changed := b.Changed
	if !b.Head {
		ready := make(chan struct{})
		close(ready)
		changed = ready
	}
	var acked <-chan struct{} // once there is more to send
	var pause <-chan time.Time
	for {
		select {
		case err := <-st.received:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-st.draining:
			if err := st.rpc.Send(drain()); err != nil {
				return err
			}
			return unavailable(decisionv1.ErrorReason_ERROR_REASON_OVERLOADED, "the server stops")
		case pong := <-st.pongs:
			if err := st.rpc.Send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Pong{Pong: pong}}); err != nil {
				return err
			}
			continue
		case <-changed:
			changed, acked = nil, st.acked
		case <-acked:
		case <-pause:
		}
		sent := st.sent.Load()
		if !b.Head || sent == nil {
			return nil
		}
		rest := time.Duration(st.open.Load()) * streamGap
		if !sent.acked.Load() {
			rest = max(rest, ackPatience) // late acknowledgements must not quicken what many streams slow down
		}
		if rest = time.Until(sent.at.Add(rest)); rest <= 0 {
			return nil
		}
		pause = time.After(rest)
	}
}

// receive reads the sidecar's messages until it breaks off.
func (st *stream) receive() error {
	for {
		msg, err := st.rpc.Recv()
		if errors.Is(err, io.EOF) {
			return errLeft
		}
		if err != nil {
			return err
		}
		switch msg.GetMessage().(type) {
		case *feedv1.SyncRequest_Ack:
			if err := st.acknowledge(msg.GetAck().GetRevision()); err != nil {
				return err
			}
		case *feedv1.SyncRequest_Ping:
			replace(st.pings, msg.GetPing().GetNonce())
			if st.answering.CompareAndSwap(false, true) {
				go st.answerPings(st.rpc.Context())
			}
		default:
			return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID,
				"message: only ack and ping may follow hello", rpcerr.Field("message", "only ack and ping may follow hello"))
		}
	}
}

// acknowledge notes what the sidecar enforces. It cannot enforce what it was not sent.
func (st *stream) acknowledge(rev int64) error {
	sent := st.sent.Load()
	if sent == nil || rev > sent.revision || rev <= 0 {
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID,
			"ack.revision: no commit with this revision was sent", rpcerr.Field("ack.revision", "not sent"))
	}
	if rev == sent.revision {
		st.ackDelay.Observe(time.Since(sent.at).Seconds())
		sent.acked.Store(true)
		replace(st.acked, struct{}{})
	}
	st.session.Ack(revision.Token{Epoch: st.identity.Epoch, Revision: rev})
	return nil
}

// answerPings answers the newest ping with a read of the store that began after it, until there is no newer one: a goroutine that
// waited for pings would be a sixth of the memory of a stream. A store that does not answer gets no pong, and the sidecar's data ages.
func (st *stream) answerPings(ctx context.Context) {
	for {
		select {
		case nonce := <-st.pings:
			state, err := st.barrier(ctx)
			if err == nil {
				replace(st.pongs, &feedv1.Pong{Nonce: nonce, Revision: state.Revision})
			}
		default:
			st.answering.Store(false)
			if len(st.pings) == 0 || !st.answering.CompareAndSwap(false, true) {
				return
			}
		}
	}
}

// replace puts v into a channel of one place whose only writer is the caller, in place of what was not taken.
func replace[T any](ch chan T, v T) {
	select {
	case <-ch:
	default:
	}
	ch <- v
}
