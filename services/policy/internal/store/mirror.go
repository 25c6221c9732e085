package store

import (
	"context"
	"maps"
	"slices"
	"sort"
	"sync"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
)

// State is the position of a [Mirror] and the proof of its content.
type State struct {
	Store    uint64 // the store's id
	Epoch    uint64
	Revision int64  // of the newest save
	Version  int64  // number of saves ever
	Anchor   Anchor // of the newest save, which is older than Revision if meta was written since
	Count    uint64 // restricted mailboxes
	Digest   allow.Digest
}

// Token names the state to others.
func (s State) Token() revision.Token { return revision.Token{Epoch: s.Epoch, Revision: s.Revision} }

// Entry is a record as the feed sends it. It is immutable.
type Entry struct {
	Record
	ID       allow.ID
	Encoding []byte // empty: unrestricted
	digest   allow.Digest
}

func newEntry(rec Record) *Entry {
	e := &Entry{Record: rec, ID: rec.Mailbox.ID(), Encoding: rec.List.Encode()}
	if len(e.Encoding) > 0 {
		e.digest = allow.EntryDigest(e.ID, e.Encoding)
	}
	return e
}

// Mirror is a replica's copy of the newest record of every mailbox, ordered by revision, so that a reader needs no queue:
// it holds a revision as its cursor and asks for what came after. It is empty until it is first filled. It is safe for
// concurrent use by many readers and one writer, the [Replica].
type Mirror struct {
	mu          sync.RWMutex
	filled      bool
	state       State
	entries     map[allow.ID]*Entry
	byRevision  []*Entry            // rising revisions; superseded entries stay until compact
	domains     map[string][]string // sorted restricted mailboxes of each domain that has any
	domainNames []string            // its keys, sorted; replaced, never changed in place
	changed     chan struct{}       // closed and replaced at every change
}

// NewMirror returns an empty mirror.
func NewMirror() *Mirror {
	return &Mirror{entries: make(map[allow.ID]*Entry), domains: make(map[string][]string), changed: make(chan struct{})}
}

// State returns the position; ok is false until the mirror was filled.
func (m *Mirror) State() (state State, ok bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state, m.filled
}

// Wait returns the first state that satisfies cond, or ctx's error.
func (m *Mirror) Wait(ctx context.Context, cond func(State) bool) (State, error) {
	for {
		m.mu.RLock()
		state, filled, changed := m.state, m.filled, m.changed
		m.mu.RUnlock()
		if filled && cond(state) {
			return state, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}

// Batch is a step of a cursor.
type Batch struct {
	Entries []*Entry // rising revisions
	Next    int64    // the cursor after this batch
	// State is the mirror's state at the batch.
	State State
	// Head says that the batch reaches the newest revision: everything up to State is then known to the reader.
	Head bool
	// Changed is closed when there is more after Head.
	Changed <-chan struct{}
}

// After returns the entries with a revision greater than cursor, oldest first, until maxEntries or about maxBytes of
// encodings. Entries without nets up to revision skipCleared are left out: a reader that starts from nothing does not need
// to hear that a mailbox is unrestricted.
func (m *Mirror) After(cursor, skipCleared int64, maxEntries, maxBytes int) Batch {
	m.mu.RLock()
	defer m.mu.RUnlock()
	b := Batch{Next: cursor, State: m.state, Changed: m.changed}
	first := sort.Search(len(m.byRevision), func(i int) bool { return m.byRevision[i].Revision > cursor })
	for _, e := range m.byRevision[first:] {
		if len(b.Entries) == maxEntries || maxBytes <= 0 {
			return b
		}
		b.Next = e.Revision
		if m.entries[e.ID] != e || len(e.Encoding) == 0 && e.Revision <= skipCleared {
			continue
		}
		b.Entries = append(b.Entries, e)
		maxBytes -= len(e.Encoding)
	}
	b.Next, b.Head = m.state.Revision, true
	return b
}

// Domain returns up to limit restricted mailboxes of the domain that come after the given name, ordered, and how many the
// domain has in all.
func (m *Mirror) Domain(domain, after string, limit int) (page []Record, total int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	names := m.domains[domain]
	i, found := slices.BinarySearch(names, after)
	if found {
		i++
	}
	for _, name := range names[i:min(i+limit, len(names))] {
		mailbox, _ := allow.ParseMailbox(name) // canonical: it came from one
		page = append(page, m.entries[mailbox.ID()].Record)
	}
	return page, len(names)
}

// All is [Mirror.Domain] over all domains, ordered by domain and mailbox. after is the last mailbox of the page before, or
// the zero Mailbox.
func (m *Mirror) All(after allow.Mailbox, limit int) (page []Record, total int) {
	m.mu.RLock()
	names := m.domainNames
	i := 0
	if after != (allow.Mailbox{}) {
		i, _ = slices.BinarySearch(names, after.Domain())
	}
	m.mu.RUnlock()
	for ; i < len(names) && len(page) < limit; i++ {
		last := ""
		if names[i] == after.Domain() {
			last = after.String()
		}
		more, _ := m.Domain(names[i], last, limit-len(page))
		page = append(page, more...)
	}
	state, _ := m.State()
	return page, int(state.Count)
}

// Lookup returns a mailbox's entry, the zero Entry if it never had one, and the state it is of.
func (m *Mirror) Lookup(mailbox allow.Mailbox) (Entry, State) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if e := m.entries[mailbox.ID()]; e != nil {
		return *e, m.state
	}
	return Entry{}, m.state
}

// get returns a mailbox's entry, or nil.
func (m *Mirror) get(id allow.ID) *Entry {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.entries[id]
}

// revisions returns the revision of every record.
func (m *Mirror) revisions() map[allow.Mailbox]int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	revs := make(map[allow.Mailbox]int64, len(m.entries))
	for _, e := range m.entries {
		revs[e.Mailbox] = e.Revision
	}
	return revs
}

// apply adds the record of the next save.
func (m *Mirror) apply(rec Record, version int64, anchor Anchor) {
	e := newEntry(rec)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(e)
	m.byRevision = append(m.byRevision, e)
	if len(m.byRevision) > 2*len(m.entries)+1024 {
		m.byRevision = slices.DeleteFunc(m.byRevision, func(e *Entry) bool { return m.entries[e.ID] != e })
	}
	m.state.Revision, m.state.Version, m.state.Anchor = rec.Revision, version, anchor
	m.announce()
}

// replace fills the mirror anew. state's count and digest are computed here.
func (m *Mirror) replace(records []Record, state State) {
	next := NewMirror()
	next.byRevision = make([]*Entry, len(records))
	for i, rec := range records {
		next.byRevision[i] = newEntry(rec)
		next.put(next.byRevision[i])
	}
	slices.SortFunc(next.byRevision, func(a, b *Entry) int { return int(a.Revision - b.Revision) })
	state.Count, state.Digest = next.state.Count, next.state.Digest

	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries, m.byRevision, m.domains, m.state, m.filled = next.entries, next.byRevision, next.domains, state, true
	m.domainNames = slices.Sorted(maps.Keys(m.domains))
	m.announce()
}

// put makes e the entry of its mailbox, in all indexes but byRevision.
func (m *Mirror) put(e *Entry) {
	was := false
	if old := m.entries[e.ID]; old != nil && len(old.Encoding) > 0 {
		was = true
		m.state.Count--
		m.state.Digest = m.state.Digest.Sub(old.digest)
	}
	is := len(e.Encoding) > 0
	if is {
		m.state.Count++
		m.state.Digest = m.state.Digest.Add(e.digest)
	}
	m.entries[e.ID] = e
	if was == is {
		return
	}
	domain := e.Mailbox.Domain()
	names := m.domains[domain]
	i, _ := slices.BinarySearch(names, e.Mailbox.String())
	if is {
		names = slices.Insert(names, i, e.Mailbox.String())
	} else {
		names = slices.Delete(names, i, i+1)
	}
	m.domains[domain] = names
	if len(names) == 0 {
		delete(m.domains, domain)
	}
	if at, known := slices.BinarySearch(m.domainNames, domain); m.filled && known != (len(names) > 0) {
		m.domainNames = slices.Clone(m.domainNames)
		if known {
			m.domainNames = slices.Delete(m.domainNames, at, at+1)
		} else {
			m.domainNames = slices.Insert(m.domainNames, at, domain)
		}
	}
}

func (m *Mirror) announce() {
	close(m.changed)
	m.changed = make(chan struct{})
}
