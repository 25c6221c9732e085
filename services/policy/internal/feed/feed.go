// Package feed streams the store's mirror to sidecars.
//
// A stream is a cursor into the mirror: it takes what came after its revision, sends it, and repeats. There is no queue per
// sidecar and nothing is sent under a lock, so a slow or frozen sidecar costs the others nothing; it takes larger steps.
package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// Bounds of a stream and of the service.
const (
	batchEntries = 4096
	batchBytes   = 1 << 20 // of encodings; well below gRPC's limit of 4 MiB for a message
	newPerSecond = 200     // new streams
	snapshots    = 16      // whole states under way at once
	snapshotWait = 5 * time.Second
	// snapshotTimeout is how long a stream may count as a snapshot under way.
	snapshotTimeout = time.Minute
	barrierTimeout  = 5 * time.Second
	retryAfter      = 2 * time.Second
	// ackPatience is how long a commit waits for the acknowledgement of the one before. A sidecar whose disk hangs acknowledges
	// nothing and still has to learn of restrictions.
	ackPatience = 200 * time.Millisecond
	// streamGap times the open streams is the shortest time between two commits of a stream: all of them together are sent ten
	// thousand a second, for which this process needs about half a processor.
	streamGap = 100 * time.Microsecond
)

// Config is what a [Service] works on.
type Config struct {
	Mirror *store.Mirror
	// Barrier returns the mirror's state once it has every save acknowledged before the call.
	Barrier func(context.Context) (store.State, error)
	// Holds reports whether an epoch's history holds a save that was acknowledged before the call.
	Holds func(ctx context.Context, epoch uint64, save store.Anchor) (bool, error)
	// Tracker learns who is connected and what they enforce.
	Tracker *propagation.Tracker
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Service implements feed.v1.FeedService.
type Service struct {
	feedv1.UnimplementedFeedServiceServer
	cfg       Config
	rate      *rate.Limiter
	snapshots chan struct{}
	turn      chan struct{}
	open      atomic.Int64 // streams
	draining  chan struct{}
	drain     sync.Once

	streams   *prometheus.CounterVec
	connected prometheus.Gauge
	entries   prometheus.Counter
	ackDelay  prometheus.Histogram
}

// New returns the service.
func New(cfg Config) (*Service, error) {
	s := &Service{
		cfg: cfg, rate: rate.NewLimiter(newPerSecond, newPerSecond),
		snapshots: make(chan struct{}, snapshots), turn: make(chan struct{}, runtime.GOMAXPROCS(0)), draining: make(chan struct{}),
		streams: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_policy_feed_streams_total", Help: "Streams of sidecars by how they began: resume, snapshot or refused.",
		}, []string{"start"}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_policy_sidecars_connected", Help: "Streams open now.",
		}),
		entries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_policy_feed_entries_total", Help: "Records sent to sidecars.",
		}),
		ackDelay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "allowednets_policy_feed_ack_seconds", Help: "Time from sending a commit to a sidecar's acknowledgement that it enforces it.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
	}
	for _, c := range []prometheus.Collector{s.streams, s.connected, s.entries, s.ackDelay} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return s, nil
}

// Drain asks all sidecars to leave and ends their streams.
func (s *Service) Drain() { s.drain.Do(func() { close(s.draining) }) }

// Sync implements feed.v1.FeedServiceServer.
func (s *Service) Sync(rpc grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse]) error {
	err := s.sync(rpc)
	if err != nil && rpc.Context().Err() == nil {
		s.cfg.Log.InfoContext(rpc.Context(), "feed stream ended", "caller", serve.Caller(rpc.Context()), "error", err)
	}
	return err
}

func (s *Service) sync(rpc grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse]) error {
	first, err := rpc.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if err := checkHello(hello); err != nil {
		s.streams.WithLabelValues("refused").Inc()
		return err
	}
	if !s.rate.Allow() {
		return s.refuse(rpc, "too many sidecars connect at once")
	}
	state, err := s.position(rpc.Context(), hello)
	if err != nil {
		s.streams.WithLabelValues("refused").Inc()
		if status.Code(err) == codes.FailedPrecondition {
			// It enforces another history, so no save of this one is active everywhere.
			s.cfg.Tracker.Connect(hello.GetId(), serve.Caller(rpc.Context())).Leave(false)
		}
		return err
	}
	st := &stream{
		rpc: rpc, mirror: s.cfg.Mirror, barrier: s.cfg.Barrier, draining: s.draining, entries: s.entries, ackDelay: s.ackDelay,
		identity: state, cursor: hello.GetRevision(),
		pings: make(chan uint64, 1), pongs: make(chan *feedv1.Pong, 1), received: make(chan error, 1), acked: make(chan struct{}, 1), turn: s.turn, open: &s.open,
	}
	if restarts(hello, state) {
		st.restart, st.cursor, st.skipCleared = true, 0, state.Revision
		release, ok := s.admitSnapshot(rpc.Context())
		if !ok {
			return s.refuse(rpc, "too many sidecars need the whole state at once")
		}
		st.caughtUp = sync.OnceFunc(release)
		defer st.caughtUp()
		// A sidecar that does not read must not keep the place from others.
		defer time.AfterFunc(snapshotTimeout, st.caughtUp).Stop()
		s.streams.WithLabelValues("snapshot").Inc()
	} else {
		st.caughtUp = func() {}
		s.streams.WithLabelValues("resume").Inc()
	}
	s.connected.Inc()
	defer s.connected.Dec()
	s.open.Add(1)
	defer s.open.Add(-1)
	s.cfg.Log.InfoContext(rpc.Context(), "feed stream begins", "sidecar", hello.GetId(), "caller", serve.Caller(rpc.Context()),
		"version", hello.GetVersion(), "from", st.cursor, "restart", st.restart)
	st.session = s.cfg.Tracker.Connect(hello.GetId(), serve.Caller(rpc.Context()))
	err = st.run()
	st.session.Leave(errors.Is(err, errLeft))
	if errors.Is(err, errLeft) {
		return nil
	}
	return err
}

// refuse sends the sidecar away for a while.
func (s *Service) refuse(rpc grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse], why string) error {
	s.streams.WithLabelValues("refused").Inc()
	if err := rpc.Send(drain()); err != nil {
		return err
	}
	return unavailable(decisionv1.ErrorReason_ERROR_REASON_OVERLOADED, why)
}

func drain() *feedv1.SyncResponse {
	return &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Drain{
		Drain: &feedv1.Drain{RetryAfterMs: uint32(retryAfter.Milliseconds())},
	}}
}

func (s *Service) admitSnapshot(ctx context.Context) (release func(), ok bool) {
	timer := time.NewTimer(snapshotWait)
	defer timer.Stop()
	select {
	case s.snapshots <- struct{}{}:
		return func() { <-s.snapshots }, true
	case <-timer.C:
	case <-ctx.Done():
	case <-s.draining:
	}
	return nil, false
}

func checkHello(hello *feedv1.Hello) error {
	invalid := func(field, problem string) error {
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, field+": "+problem, rpcerr.Field(field, problem))
	}
	switch {
	case hello == nil:
		return invalid("message", "the first message must be hello")
	case !printable(hello.GetId()) || hello.GetId() == "":
		return invalid("hello.id", "must be 1 to 255 printable octets")
	case !printable(hello.GetVersion()):
		return invalid("hello.version", "must be at most 255 printable octets")
	case hello.GetRevision() < 0:
		return invalid("hello.revision", "must not be negative")
	}
	if _, ok := store.ParseAnchor(hello.GetAnchor()); !ok && len(hello.GetAnchor()) > 0 {
		return invalid("hello.anchor", "must be empty or the anchor of a commit")
	}
	return nil
}

func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return len(s) <= 255
}

// position returns the state a stream starts from. A sidecar without a state of this store first waits for the mirror to catch
// up with etcd: it may have been restarted after it enforced a save that a replica cut off from etcd does not know. So does one
// that is ahead of the mirror; if it still is then, the store's history went back and nothing may be sent. Nor may anything be
// sent, not even if all is asked for, if the history does not hold the newest save that the sidecar enforces: it went back, and
// on from there.
func (s *Service) position(ctx context.Context, hello *feedv1.Hello) (store.State, error) {
	state, filled := s.cfg.Mirror.State()
	if !filled {
		return state, unavailable(decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED, "the store was not loaded yet")
	}
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	if restarts(hello, state) || ahead(hello, state) {
		var err error
		if state, err = s.cfg.Barrier(ctx); err != nil {
			return state, silent()
		}
		if ahead(hello, state) {
			return state, wentBack(hello.GetEpoch(), hello.GetRevision(), state)
		}
	}
	save, claimed := store.ParseAnchor(hello.GetAnchor())
	if !claimed || hello.GetCluster() != state.Store || hello.GetEpoch() != state.Epoch {
		return state, nil
	}
	held, err := s.cfg.Holds(ctx, state.Epoch, save)
	if err != nil {
		return state, silent()
	}
	if !held {
		return state, forked(hello.GetEpoch(), hello.GetRevision(), state)
	}
	return state, nil
}

func silent() error {
	return unavailable(decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE, "the store did not answer in time")
}

// restarts reports whether a sidecar needs the whole state.
func restarts(hello *feedv1.Hello, state store.State) bool {
	return hello.GetCluster() != state.Store || hello.GetEpoch() != state.Epoch || hello.GetRevision() == 0
}

func ahead(hello *feedv1.Hello, state store.State) bool {
	return hello.GetCluster() == state.Store &&
		(hello.GetEpoch() > state.Epoch || hello.GetEpoch() == state.Epoch && hello.GetRevision() > state.Revision)
}

func wentBack(epoch uint64, revision int64, state store.State) error {
	return rpcerr.New(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK,
		fmt.Sprintf("the sidecar is at epoch %d revision %d, the store only at epoch %d revision %d: after restoring a backup raise the epoch",
			epoch, revision, state.Epoch, state.Revision))
}

func forked(epoch uint64, revision int64, state store.State) error {
	return rpcerr.New(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK,
		fmt.Sprintf("the sidecar is at epoch %d revision %d and enforces a save that the store, at revision %d, does not hold: after restoring a backup raise the epoch",
			epoch, revision, state.Revision))
}

func unavailable(reason decisionv1.ErrorReason, message string) error {
	return rpcerr.New(codes.Unavailable, reason, message)
}

// errLeft ends a stream whose sidecar said goodbye, by closing its side.
var errLeft = errors.New("the sidecar left")
