// Package mirror keeps the newest state of the store in memory by following the feed of a policy service (feed.proto).
//
// What it publishes is always a whole state that was verified by count and digest. Whatever goes wrong with the feed, the
// last such state stays.
package mirror

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

const (
	firstDelay = 200 * time.Millisecond // of reconnecting; doubled at every failure
	maxDelay   = 30 * time.Second
	maxDrain   = 5 * time.Minute // a server cannot send us away for longer
	healthy    = time.Minute     // a stream that was in step for so long ends a row of failures
)

// Config configures a [Mirror].
type Config struct {
	ID      string // the sidecar's name, 1 to 255 octets
	Version string // the sidecar's software version
	// AcceptCluster is the id of a store that may replace the one the state came from; 0 for none.
	AcceptCluster uint64
	// Dial opens a connection to a policy service. Every stream gets a connection of its own, so that a stalled or
	// half-closed one is never used again and names are resolved anew.
	Dial    func() (*grpc.ClientConn, error)
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// State is a verified state of the store. It is immutable.
type State struct {
	Index *index.Root
	// Revision is the text of the state's token.
	Revision string
	// Proven is when the state was last known to be the newest one: the time at which a question was sent whose answer was
	// this state, or one before. Zero if that never happened.
	Proven time.Time

	token   revision.Token
	cluster uint64
}

// Age returns how long before now the state was last known to be the newest one; false if it never was.
func (s *State) Age(now time.Time) (time.Duration, bool) {
	if s == nil || s.Proven.IsZero() {
		return 0, false
	}
	// The monotonic clock stands still while a machine is suspended, and the wall clock may be set back: the longer counts.
	return max(0, now.Sub(s.Proven), now.Round(0).Sub(s.Proven.Round(0))), true
}

// Mirror follows the feed. Its methods are safe for concurrent use.
type Mirror struct {
	cfg       Config
	metrics   *metrics
	state     atomic.Pointer[State]
	synced    chan struct{} // closed with the first state
	connected atomic.Bool
	foreign   atomic.Bool

	// Of Run alone.
	writer   *index.Writer
	fromZero bool // ask for everything: what we had does not add up with what came
}

// New returns a mirror without a state.
func New(cfg Config) (*Mirror, error) {
	m := &Mirror{cfg: cfg, synced: make(chan struct{}), writer: index.NewWriter()}
	var err error
	if m.metrics, err = newMetrics(cfg.Metrics, m); err != nil {
		return nil, err
	}
	return m, nil
}

// State returns the newest verified state, nil before the first one. It does not block or allocate.
func (m *Mirror) State() *State { return m.state.Load() }

// Synced is closed when there is a state.
func (m *Mirror) Synced() <-chan struct{} { return m.synced }

// Connected reports whether a stream to a policy service of the right store is open.
func (m *Mirror) Connected() bool { return m.connected.Load() }

// ForeignStore reports whether the last policy service that answered serves another store than the state's.
func (m *Mirror) ForeignStore() bool { return m.foreign.Load() }

// Run follows the feed until ctx ends, and then returns nil. It may be called once.
func (m *Mirror) Run(ctx context.Context) error {
	failures := 0
	for {
		inStep, end := m.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if inStep >= healthy {
			failures = 0
		}
		// Full jitter: a thousand sidecars that lost the same server come back evenly spread.
		delay := rand.N(min(maxDelay, firstDelay<<min(failures, 16))) //nolint:gosec // nothing to guess
		failures++
		delay += min(end.retryAfter, maxDrain)
		m.metrics.ended(end.cause)
		level := slog.LevelWarn
		if end.cause == causeDrain {
			level = slog.LevelInfo
		}
		m.cfg.Log.LogAttrs(ctx, level, "feed stream ended", slog.String("cause", string(end.cause)), slog.Any("error", end.err),
			slog.Duration("in_step_for", inStep), slog.Duration("retry_in", delay))
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}
