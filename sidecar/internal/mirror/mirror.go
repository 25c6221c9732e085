// Package mirror keeps the newest state of the store in memory by following the feed of a policy service (feed.proto).
//
// What it publishes is always a whole state that was verified by count and digest. Whatever goes wrong with the feed, the
// last such state stays. With a [Keeper] it is kept on disk, and the next mirror begins with it.
package mirror

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/lastgood"
)

const (
	firstDelay = 200 * time.Millisecond // of reconnecting; doubled at every failure
	maxDelay   = 30 * time.Second
	maxDrain   = 5 * time.Minute // a server cannot send us away for longer
	maxGoodbye = time.Second     // for the server to end a stream that we leave
	maxKeep    = time.Second     // for the disk, before a commit is published all the same
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
	Dial func() (*grpc.ClientConn, error)
	// Loaded is a state to begin with, and Writer the writer of its index; nil for none.
	Loaded lastgood.State
	Writer *index.Writer
	// Keeper keeps what is published for the next start; nil: nobody does.
	Keeper  Keeper
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Keeper keeps states, as [lastgood.Dir] does.
type Keeper interface {
	// Keep is [lastgood.Dir.Keep].
	Keep(lastgood.State, *lastgood.Changes) (number uint64)
	// Kept is [lastgood.Dir.Kept].
	Kept() (number uint64, changed <-chan struct{})
	// Wrong is [lastgood.Dir.Wrong].
	Wrong() <-chan struct{}
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
	anchor  string
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

	mu      sync.Mutex
	changed chan struct{} // closed with the next state

	// Of Run alone.
	writer   *index.Writer
	fromZero bool // ask for everything: what we had does not add up with what came
}

// New returns a mirror, with a state if one was loaded.
func New(cfg Config) (*Mirror, error) {
	m := &Mirror{cfg: cfg, synced: make(chan struct{}), changed: make(chan struct{}), writer: cfg.Writer}
	if cfg.Writer == nil {
		m.writer = index.NewWriter()
	} else {
		// How old it is, nobody knows: clocks of machines that were restarted prove nothing.
		m.publish(newState(cfg.Loaded))
	}
	var err error
	if m.metrics, err = newMetrics(cfg.Metrics, m); err != nil {
		return nil, err
	}
	return m, nil
}

func newState(st lastgood.State) *State {
	return &State{Index: st.Index, Revision: st.Token.String(), token: st.Token, cluster: st.Cluster, anchor: st.Anchor}
}

// State returns the newest verified state, nil before the first one. It does not block or allocate.
func (m *Mirror) State() *State { return m.state.Load() }

// Changed is closed when there is another state than there was at the time of the call, or more is known of its age.
func (m *Mirror) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

func (m *Mirror) publish(st *State) {
	if m.state.Swap(st) == nil {
		close(m.synced)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.changed)
	m.changed = make(chan struct{})
}

// Synced is closed when there is a state.
func (m *Mirror) Synced() <-chan struct{} { return m.synced }

// Connected reports whether a stream to a policy service of the right store is open.
func (m *Mirror) Connected() bool { return m.connected.Load() }

// ForeignStore reports whether the last policy service that answered serves another store than the state's.
func (m *Mirror) ForeignStore() bool { return m.foreign.Load() }

// Run follows the feed until ctx ends. Then it says goodbye to the policy service, for at most [maxGoodbye], and returns nil.
// It may be called once.
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
