package propagation

import (
	"cmp"
	"maps"
	"slices"
	"time"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

// clockSkew is by how much a goodbye must come after the beginning of a session to end it for certain: replicas have clocks
// of their own.
const clockSkew = 5 * time.Second

// Summary says how far a save has got.
type Summary struct {
	Sidecars int // that count
	Applied  int // of them that acknowledged the save
	Replicas int // alive
	// Laggards are those that did not, the lost ones first.
	Laggards []Laggard
}

// Laggard is a sidecar that has not acknowledged a save.
type Laggard struct {
	ID, Caller string
	Applied    revision.Token // zero if nothing of this epoch
	Lost       time.Time      // zero: it is connected
}

// known is what all replicas together know about a sidecar.
type known struct {
	connected bool
	applied   revision.Token
	lost      time.Time
	since     time.Time // when the session began
}

// Summarize joins what all replicas published, and what this one, called self, knows now.
//
// A sidecar that several replicas say is connected counts with the lowest revision: one of them may not have noticed yet
// that it moved on, or two sidecars share a name. A sidecar that one lost and another has is not lost, nor is one that said
// goodbye to another after the session that was lost had begun. The sidecars of a dead replica are lost until another has
// them. A lost sidecar enforces what it acknowledged: it never goes back.
func (t *Tracker) Summarize(published map[string]*storev1.Replica, self string, save revision.Token) Summary {
	records := make(map[string]*storev1.Replica, len(published)+1)
	maps.Copy(records, published)
	records[self] = t.record(save.Epoch, false)
	return summarize(records, save, time.Now())
}

func summarize(records map[string]*storev1.Replica, save revision.Token, now time.Time) Summary {
	var sum Summary
	sidecars := make(map[name]known)
	goodbyes := make(map[name]time.Time)
	for _, rec := range records {
		alive := now.Sub(rec.GetTime().AsTime()) <= deadAfter
		if alive {
			sum.Replicas++
		}
		for _, s := range rec.GetConnected() {
			if alive {
				merge(sidecars, s, rec.GetEpoch(), known{connected: true})
			} else {
				merge(sidecars, s, rec.GetEpoch(), known{lost: rec.GetTime().AsTime()})
			}
		}
		for _, s := range rec.GetLost() {
			merge(sidecars, s, rec.GetEpoch(), known{lost: s.GetLostTime().AsTime()})
		}
		for _, s := range rec.GetLeft() {
			n := name{s.GetId(), s.GetCaller()}
			if at := s.GetLostTime().AsTime(); at.After(goodbyes[n]) {
				goodbyes[n] = at
			}
		}
	}
	for n, k := range sidecars {
		if !k.connected && (now.Sub(k.lost) > lostFor || goodbyes[n].Sub(k.since) > clockSkew) {
			continue
		}
		sum.Sidecars++
		if includes(k.applied, save) {
			sum.Applied++
			continue
		}
		l := Laggard{ID: n.id, Caller: n.caller, Lost: k.lost}
		if k.connected {
			l.Lost = time.Time{}
		}
		if k.applied.Revision > 0 {
			l.Applied = k.applied
		}
		sum.Laggards = append(sum.Laggards, l)
	}
	slices.SortFunc(sum.Laggards, func(a, b Laggard) int {
		return cmp.Or(b.Lost.Compare(a.Lost), cmp.Compare(a.ID, b.ID), cmp.Compare(a.Caller, b.Caller))
	})
	return sum
}

func merge(sidecars map[name]known, s *storev1.Sidecar, epoch uint64, k known) {
	n := name{s.GetId(), s.GetCaller()}
	k.applied = revision.Token{Epoch: epoch, Revision: s.GetRevision()}
	k.since = s.GetConnectTime().AsTime()
	old, twice := sidecars[n]
	switch {
	case !twice, k.connected && !old.connected:
		sidecars[n] = k
	case old.connected && !k.connected:
	case k.connected && before(k.applied, old.applied):
		sidecars[n] = k
	case !k.connected && k.since.After(old.since):
		sidecars[n] = k // the replica that had it last knows best
	}
}

func before(a, b revision.Token) bool {
	return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Revision, b.Revision)) < 0
}

// includes reports whether a state has a save in it. A later epoch is the same store, restored and taken on.
func includes(state, save revision.Token) bool {
	return state.Epoch == save.Epoch && state.Revision >= save.Revision
}
