// Package session ends open sessions of Dovecot that the lists do not permit any more.
//
// A list is asked when somebody logs in. When the lists change, the [Sweeper] asks Dovecot who is connected, lets the
// decider decide about each connection as if it logged in now, and has Dovecot end those that would be denied.
package session

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

const (
	// pause lies between two sweeps, however often the lists change, and a change is followed by two sweeps: a log-in
	// that was let in just before the change may appear among the connections only just after the first.
	pause = time.Second
	// period is the time after which there is a sweep in any case: for log-ins that took longer, for those whose name
	// only Dovecot's userdb turned into that of a restricted mailbox, and for what went wrong before.
	period = time.Minute

	firstDelay = 200 * time.Millisecond // after a failure; doubled at each
	maxDelay   = 10 * time.Second

	maxLines = 100 // in the log, for each sweep
)

// Config configures a [Sweeper].
type Config struct {
	Doveadm *Doveadm
	Decider *check.Decider
	// State and Changed are those of the decider.
	State   func() *mirror.State
	Changed func() <-chan struct{}
	// Spared are addresses whose connections are left alone: those of proxies that may log in for exempt services, which
	// Dovecot does not tell from others.
	Spared  []netip.Prefix
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Sweeper ends what is not permitted any more.
type Sweeper struct {
	cfg         Config
	ended, left prometheus.Counter
	sweeps      *prometheus.CounterVec
	last        atomic.Pointer[time.Time] // of a sweep that worked began
}

// Outcomes of a sweep; labels of a metric.
const (
	outcomeDone    = "done"
	outcomeFailed  = "failed"
	outcomeSkipped = "skipped" // there are no lists yet
)

// New returns a sweeper.
func New(cfg Config) (*Sweeper, error) {
	s := &Sweeper{
		cfg: cfg,
		ended: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_sessions_ended_total", Help: "Open sessions that were ended because a list does not permit them any more.",
		}),
		left: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_sessions_left_total", Help: "Open sessions that a list does not permit and that doveadm cannot end without others.",
		}),
		sweeps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_sidecar_session_sweeps_total", Help: "Looks at all open sessions, by outcome.",
		}, []string{"outcome"}),
	}
	for _, outcome := range []string{outcomeDone, outcomeFailed, outcomeSkipped} {
		s.sweeps.WithLabelValues(outcome)
	}
	for _, c := range []prometheus.Collector{s.ended, s.left, s.sweeps, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "allowednets_sidecar_session_sweep_age_seconds", Help: "Time since all open sessions were last looked at; +Inf if never.",
	}, s.age)} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return s, nil
}

func (s *Sweeper) age() float64 {
	last := s.last.Load()
	if last == nil {
		return math.Inf(1) // an alert on a high age must fire
	}
	return time.Since(*last).Seconds()
}

// Run sweeps until ctx ends. There is one sweep at a time.
func (s *Sweeper) Run(ctx context.Context) error {
	var swept *index.Root // the lists that the last sweep but one began with, of those that worked
	failures := 0
	for ctx.Err() == nil {
		began, lists := time.Now(), s.lists()
		if lists == nil {
			s.sweeps.WithLabelValues(outcomeSkipped).Inc()
			s.await(ctx, nil, period)
			continue
		}
		err := s.sweep(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.sweeps.WithLabelValues(outcomeFailed).Inc()
			delay := min(maxDelay, firstDelay<<min(failures, 10))
			delay = delay/2 + rand.N(delay/2) //nolint:gosec // nothing to guess
			failures++
			s.cfg.Log.WarnContext(ctx, "open sessions cannot be looked at", "error", err, "retry_in", delay)
			sleep(ctx, nil, delay)
			continue
		}
		s.sweeps.WithLabelValues(outcomeDone).Inc()
		s.last.Store(&began)
		failures = 0
		sleep(ctx, nil, pause)
		// One round behind on purpose: after the first sweep with new lists this still compares with the old ones and does not
		// wait. The second sweep finds the logins that were permitted by the old lists and not yet open at the first.
		s.await(ctx, swept, period-pause)
		swept = lists
	}
	return nil
}

// lists returns the present ones, nil if there are none yet. Another state may have the same: then only its age differs.
func (s *Sweeper) lists() *index.Root {
	if st := s.cfg.State(); st != nil {
		return st.Index
	}
	return nil
}

// await waits until the lists are others, for at most d.
func (s *Sweeper) await(ctx context.Context, swept *index.Root, d time.Duration) {
	deadline := time.Now().Add(d)
	for {
		changed := s.cfg.Changed()
		if s.lists() != swept || !sleep(ctx, changed, time.Until(deadline)) {
			return
		}
	}
}

// sleep waits for d, or the end of ctx. It reports whether woken was closed before.
func sleep(ctx context.Context, woken <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-woken:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// sweep looks at all connections once. An error means that not all that should have been ended was.
func (s *Sweeper) sweep(ctx context.Context) error {
	connections, err := s.cfg.Doveadm.Who(ctx)
	if err != nil {
		return err
	}
	denied := make(map[Pair]int) // with the number of denied connections
	for _, c := range connections {
		if s.denied(ctx, c) {
			denied[c.Pair]++
		}
	}
	if len(denied) == 0 {
		return nil
	}
	var kick []Pair
	lines := 0
	for p, n := range denied {
		if exact(p, connections, denied) {
			kick = append(kick, p)
			continue
		}
		s.left.Add(float64(n))
		if lines++; lines <= maxLines {
			s.cfg.Log.WarnContext(ctx, "a session that is not permitted any more stays open: doveadm cannot name it without naming others",
				"mailbox", p.User, "client_address", p.Address)
		}
	}
	ended, err := s.cfg.Doveadm.Kick(ctx, kick)
	for _, p := range ended {
		s.ended.Add(float64(denied[p]))
		if lines++; lines <= maxLines {
			s.cfg.Log.WarnContext(ctx, "session ended", "mailbox", p.User, "client_address", p.Address, "connections", denied[p])
		}
	}
	return err
}

// exact reports whether doveadm's mask for a pair names nothing that may stay: in it, * and ? stand for other octets.
func exact(p Pair, connections []Connection, denied map[Pair]int) bool {
	if strings.Contains(p.User, "*") {
		return false // it may hit whatever is opened in the meantime
	}
	if !strings.Contains(p.User, "?") {
		return true
	}
	for _, c := range connections {
		if c.Address == p.Address && denied[c.Pair] == 0 && matches(p.User, c.User) {
			return false
		}
	}
	return true
}

// matches reports whether a mask, without *, stands for a name.
func matches(mask, name string) bool {
	if len(mask) != len(name) {
		return false
	}
	mask, name = strings.ToLower(mask), strings.ToLower(name)
	for i := range len(mask) {
		if mask[i] != '?' && mask[i] != name[i] {
			return false
		}
	}
	return true
}

// denied reports whether the decider denies what a connection has. No answer is no denial, and neither is data that is too old
// (STALE): a session that was permitted does not end because nobody knows better.
func (s *Sweeper) denied(ctx context.Context, c Connection) bool {
	address, err := netip.ParseAddr(c.Address)
	if err != nil {
		return false // without an address doveadm would end all of the user's connections
	}
	for _, p := range s.cfg.Spared {
		if p.Contains(address.Unmap()) {
			return false
		}
	}
	dec, err := s.cfg.Decider.Review(ctx, check.Request{Mailbox: c.User, Client: c.Address, Service: check.DovecotService(c.Service)})
	return err == nil && dec.Verdict == decisionv1.Verdict_VERDICT_DENY && dec.Reason != decisionv1.Reason_REASON_STALE
}
