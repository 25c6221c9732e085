package faults

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/allowednets/allowednets/internal/revision"
)

// save is an acknowledged save.
type save struct {
	token   revision.Token
	mailbox string
	nets    string // canonical, joined by ", "; empty: cleared
	parsed  []netip.Prefix
}

// model is the store as its acknowledged saves tell it: the list of every mailbox at every revision. Its methods may be called
// concurrently.
type model struct {
	mu       sync.Mutex
	epoch    uint64
	saves    map[uint64]map[string][]save // by epoch and mailbox, in the order of revisions
	inFlight map[int]revision.Token       // by client: the newest save that was acknowledged when it began
	acked    []acknowledged               // rising
	states   map[revision.Token]bool      // every state that a save made
	first    revision.Token               // the least of them
	complete bool
}

type acknowledged struct {
	at    time.Time
	token revision.Token
}

func newModel() *model {
	return &model{epoch: 1, saves: map[uint64]map[string][]save{1: {}}, inFlight: make(map[int]revision.Token), states: make(map[revision.Token]bool)}
}

func compare(a, b revision.Token) int {
	return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Revision, b.Revision))
}

// begin notes that a client is about to save. Its save comes after all that are acknowledged by now.
func (m *model) begin(client int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inFlight[client] = m.newest()
}

// saved notes an acknowledgement. It may be of a save that is known already: saving the same list again changes nothing.
func (m *model) saved(client int, s save) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fixed := m.fixed()
	delete(m.inFlight, client)
	if s.token == (revision.Token{}) { // cleared what never had a list
		return nil
	}
	list := m.saves[s.token.Epoch][s.mailbox]
	i, known := slices.BinarySearchFunc(list, s.token, func(s save, t revision.Token) int { return compare(s.token, t) })
	switch {
	case known && list[i].nets != s.nets:
		return fmt.Errorf("revision %s of %s is %q, and was %q before", s.token, s.mailbox, s.nets, list[i].nets)
	case known:
		return nil
	case s.token.Epoch != m.epoch || compare(s.token, fixed) <= 0:
		return fmt.Errorf("revision %s of %s: every save on its way began after %s was acknowledged", s.token, s.mailbox, fixed)
	}
	m.saves[m.epoch][s.mailbox] = slices.Insert(list, i, s)
	m.states[s.token] = true
	if len(m.states) == 1 || compare(s.token, m.first) < 0 {
		m.first = s.token
	}
	if compare(s.token, m.newest()) > 0 {
		m.acked = append(m.acked, acknowledged{at: time.Now(), token: s.token})
	}
	return nil
}

// newest is the newest acknowledged save.
func (m *model) newest() revision.Token {
	if len(m.acked) == 0 {
		return revision.Token{}
	}
	return m.acked[len(m.acked)-1].token
}

// Newest is the newest acknowledged save.
func (m *model) Newest() revision.Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.newest()
}

// before returns the newest save that was acknowledged before a moment.
func (m *model) before(at time.Time) revision.Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, _ := slices.BinarySearchFunc(m.acked, at, func(a acknowledged, t time.Time) int { return a.at.Compare(t) })
	if i == 0 {
		return revision.Token{}
	}
	return m.acked[i-1].token
}

// settled returns the revision up to which no save can be added any more.
func (m *model) settled() revision.Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.complete {
		return revision.Token{Epoch: math.MaxUint64}
	}
	return m.fixed()
}

func (m *model) fixed() revision.Token {
	least := m.newest()
	for _, began := range m.inFlight {
		if compare(began, least) < 0 {
			least = began
		}
	}
	return least
}

// at returns the nets of a mailbox in a state.
func (m *model) at(mailbox string, state revision.Token) []netip.Prefix {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := m.saves[state.Epoch][mailbox]
	i, found := slices.BinarySearchFunc(list, state, func(s save, t revision.Token) int { return compare(s.token, t) })
	if found {
		return list[i].parsed
	}
	if i == 0 {
		return nil
	}
	return list[i-1].parsed
}

// made reports whether a state is what some save left, or the store before all saves.
func (m *model) made(state revision.Token) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.states[state] || compare(state, m.first) < 0
}

// all returns the saves of a mailbox in the present epoch, oldest first.
func (m *model) all(mailbox string) []save {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.saves[m.epoch][mailbox])
}

// count is how many saves of the present epoch are known.
func (m *model) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for list := range maps.Values(m.saves[m.epoch]) {
		n += len(list)
	}
	return n
}

// fork begins the next epoch: a backup that holds the state of the last one at a revision was restored.
func (m *model) fork(state revision.Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := make(map[string][]save)
	for mailbox, list := range m.saves[m.epoch] {
		for _, s := range list {
			if compare(s.token, state) <= 0 {
				s.token.Epoch = m.epoch + 1
				next[mailbox] = append(next[mailbox], s)
				m.states[s.token] = true
			}
		}
	}
	m.epoch++
	m.saves[m.epoch] = next
}

// raised notes the state that raising the epoch made.
func (m *model) raised(state revision.Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.states[state] = true
}

// close says that no save is on its way any more: all states are known.
func (m *model) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.complete = true
}
