package login

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxSessions = 100_000
	// buried is how long an ended session cannot come back: a request that began before its end may save it once more
	// when it is through, which takes at most as long as a request may.
	buried = 5 * time.Minute
)

// store keeps sessions in memory, for scs. In contrast to scs's own it is bounded, needs no goroutine, and a session that
// was ended stays ended.
type store struct {
	evicted prometheus.Counter

	mu       sync.Mutex
	sessions map[string]stored
	sweepAt  int // the number of sessions at which the ended ones are removed
}

// stored is a session; without data one that was ended.
type stored struct {
	data   []byte
	expiry time.Time
}

func newStore(evicted prometheus.Counter) *store {
	return &store{evicted: evicted, sessions: make(map[string]stored), sweepAt: 1024}
}

// Find implements scs.Store.
func (s *store) Find(token string) ([]byte, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.sessions[token]
	if found.data == nil || !time.Now().Before(found.expiry) {
		return nil, false, nil
	}
	return found.data, true, nil
}

// Commit implements scs.Store.
func (s *store) Commit(token string, data []byte, expiry time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, there := s.sessions[token]
	if there && (old.data == nil || !time.Now().Before(old.expiry)) {
		return nil // it has ended
	}
	s.sessions[token] = stored{data, expiry}
	s.sweep()
	return nil
}

// Delete implements scs.Store.
func (s *store) Delete(token string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.sessions[token]; there {
		s.sessions[token] = stored{expiry: time.Now().Add(buried)}
	}
	return nil
}

// sweep makes room once in a while.
func (s *store) sweep() {
	if len(s.sessions) < s.sweepAt {
		return
	}
	now := time.Now()
	maps.DeleteFunc(s.sessions, func(_ string, v stored) bool { return now.Sub(v.expiry) > buried })
	if len(s.sessions) > maxSessions {
		tokens := slices.SortedFunc(maps.Keys(s.sessions), func(a, b string) int {
			return cmp.Or(s.sessions[a].expiry.Compare(s.sessions[b].expiry), cmp.Compare(a, b))
		})
		for _, token := range tokens[:len(tokens)-maxSessions*9/10] {
			delete(s.sessions, token)
			s.evicted.Inc()
		}
	}
	s.sweepAt = min(max(1024, 2*len(s.sessions)), maxSessions+1)
}

// open counts the sessions that have not ended.
func (s *store) open() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, n := time.Now(), 0
	for _, v := range s.sessions {
		if v.data != nil && now.Before(v.expiry) {
			n++
		}
	}
	return float64(n)
}
