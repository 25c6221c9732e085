// Package propagation knows which sidecars enforce which save, over all replicas of the policy service.
//
// It errs on one side only: a save counts as active on a sidecar once that sidecar has acknowledged it, and a sidecar that was
// heard of counts until it said goodbye or has been gone for ten minutes. "Active on all" is never said too early.
package propagation

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

const (
	// lostFor is how long a sidecar that went away without a goodbye counts.
	lostFor = 10 * time.Minute
	// maxLost bounds what is remembered; the oldest are forgotten first.
	maxLost = 1000
	// heartbeat is the longest time between two records of a replica, and deadAfter the age at which a record is of a
	// dead one.
	heartbeat = 5 * time.Second
	deadAfter = 3 * heartbeat
	// A record is rewritten when it changed, but the larger it is, the less often: etcd keeps every version for an hour.
	publishEvery = 500 * time.Millisecond
	publishSize  = 16 << 10 // octets per publishEvery
)

// name is who a sidecar is: what it calls itself, and what its certificate calls it.
type name struct{ id, caller string }

// Tracker keeps the sidecars of this replica. It is safe for concurrent use.
type Tracker struct {
	mu       sync.Mutex
	sessions map[*Session]struct{}
	lost     map[name]lost
	left     map[name]time.Time // goodbyes
	changed  chan struct{}      // one place; full when there is something to publish
}

type lost struct {
	at      time.Time
	since   time.Time // when its session began
	applied revision.Token
}

// NewTracker returns a tracker without sidecars.
func NewTracker() *Tracker {
	return &Tracker{sessions: make(map[*Session]struct{}), lost: make(map[name]lost), left: make(map[name]time.Time), changed: make(chan struct{}, 1)}
}

// Session is one stream of a sidecar.
type Session struct {
	tracker *Tracker
	name    name
	since   time.Time
	applied revision.Token // guarded by the tracker
}

// Connect begins a session. What the sidecar says in its hello does not count: a restart may take back what it has not
// acknowledged, and the first commit of a stream is acknowledged at once.
func (t *Tracker) Connect(id, caller string) *Session {
	s := &Session{tracker: t, name: name{id, caller}, since: time.Now()}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sessions[s] = struct{}{}
	delete(t.lost, s.name)
	t.announce()
	return s
}

// Ack says that the sidecar enforces a state.
func (s *Session) Ack(applied revision.Token) {
	s.tracker.mu.Lock()
	defer s.tracker.mu.Unlock()
	s.applied = applied
	s.tracker.announce()
}

// Leave ends the session. Without a goodbye the sidecar still counts, as lost.
func (s *Session) Leave(goodbye bool) {
	t := s.tracker
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.sessions, s)
	switch {
	case goodbye:
		keep(t.left, s.name, time.Now(), time.Time.Compare)
	case !t.connected(s.name):
		keep(t.lost, s.name, lost{at: time.Now(), since: s.since, applied: s.applied},
			func(a, b lost) int { return a.at.Compare(b.at) })
	}
	t.announce()
}

func (t *Tracker) connected(n name) bool {
	for s := range t.sessions {
		if s.name == n {
			return true
		}
	}
	return false
}

// keep puts v into a map that forgets its oldest member rather than grow beyond [maxLost].
func keep[V any](m map[name]V, n name, v V, compare func(a, b V) int) {
	if len(m) >= maxLost {
		oldest := n
		for other, o := range m {
			if oldest == n || compare(o, m[oldest]) < 0 {
				oldest = other
			}
		}
		delete(m, oldest)
	}
	m[n] = v
}

func (t *Tracker) announce() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

// record is what this replica knows at epoch. After closing, its sidecars are on their way to another replica.
func (t *Tracker) record(epoch uint64, closing bool) *storev1.Replica {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(t.lost, func(_ name, l lost) bool { return now.Sub(l.at) > lostFor })
	maps.DeleteFunc(t.left, func(_ name, at time.Time) bool { return now.Sub(at) > lostFor })
	rec := &storev1.Replica{Time: timestamppb.New(now), Epoch: epoch}
	for s := range t.sessions {
		sidecar := message(s.name, s.applied, epoch)
		sidecar.ConnectTime = timestamppb.New(s.since)
		if closing {
			sidecar.LostTime = timestamppb.New(now)
			rec.Lost = append(rec.Lost, sidecar)
		} else {
			rec.Connected = append(rec.Connected, sidecar)
		}
	}
	for n, l := range t.lost {
		sidecar := message(n, l.applied, epoch)
		sidecar.LostTime, sidecar.ConnectTime = timestamppb.New(l.at), timestamppb.New(l.since)
		rec.Lost = append(rec.Lost, sidecar)
	}
	for n, at := range t.left {
		rec.Left = append(rec.Left, &storev1.Sidecar{Id: n.id, Caller: n.caller, LostTime: timestamppb.New(at)})
	}
	slices.SortFunc(rec.Connected, byName)
	slices.SortFunc(rec.Lost, byName)
	slices.SortFunc(rec.Left, byName)
	return rec
}

func byName(a, b *storev1.Sidecar) int {
	return strings.Compare(a.GetId()+"\x00"+a.GetCaller(), b.GetId()+"\x00"+b.GetCaller())
}

// message shows a sidecar. What it acknowledged in another epoch says nothing about this one.
func message(n name, applied revision.Token, epoch uint64) *storev1.Sidecar {
	s := &storev1.Sidecar{Id: n.id, Caller: n.caller}
	if applied.Epoch == epoch {
		s.Revision = applied.Revision
	}
	return s
}

// Publisher writes a replica's record where the others read it.
type Publisher interface {
	// Publish writes the record in place of the one before.
	Publish(ctx context.Context, rec *storev1.Replica) error
}

// Run publishes the record when it changes, and as a heartbeat, until ctx ends; then once more, with all sidecars as lost:
// until another replica has them, they are nowhere.
func (t *Tracker) Run(ctx context.Context, to Publisher, epoch func() uint64, log *slog.Logger) error {
	for {
		rec := t.record(epoch(), false)
		if err := to.Publish(ctx, rec); err != nil && ctx.Err() == nil {
			log.WarnContext(ctx, "publishing which sidecars are connected failed", "error", err)
		}
		if !t.pause(ctx, publishEvery*time.Duration(1+proto.Size(rec)/publishSize)) {
			break
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := to.Publish(last, t.record(epoch(), true)); err != nil {
		log.WarnContext(last, "publishing the last record failed", "error", err)
	}
	return nil
}

// pause waits at least for d and then for a change or the heartbeat. It returns false when ctx ends.
func (t *Tracker) pause(ctx context.Context, d time.Duration) bool {
	beat := time.NewTimer(max(heartbeat, d))
	defer beat.Stop()
	rest := time.NewTimer(d)
	defer rest.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-rest.C:
	}
	select {
	case <-ctx.Done():
		return false
	case <-beat.C:
	case <-t.changed:
	}
	return true
}
