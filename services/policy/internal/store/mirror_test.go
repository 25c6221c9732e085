package store

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/allowednets/allowednets/internal/allow"
)

// naive is a mirror without any index.
type naive struct {
	records map[string]Record
	state   State
}

func (n *naive) put(rec Record) {
	n.records[rec.Mailbox.String()] = rec
	n.state.Version, n.state.Revision = n.state.Version+1, rec.Revision
	c := n.content()
	n.state.Count, n.state.Digest = uint64(len(c)), c.digest()
}

// after is Mirror.After for a reader with all the time in the world.
func (n *naive) after(cursor, skipCleared int64) []Record {
	var found []Record
	for _, rec := range n.records {
		if rec.Revision > cursor && (rec.List.Len() > 0 || rec.Revision > skipCleared) {
			found = append(found, rec)
		}
	}
	slices.SortFunc(found, func(a, b Record) int { return int(a.Revision - b.Revision) })
	return found
}

func (n *naive) content() content {
	c := make(content)
	for _, rec := range n.records {
		if rec.List.Len() > 0 {
			c[rec.Mailbox] = rec.List
		}
	}
	return c
}

// reader is a client of After that keeps what it read.
type reader struct {
	cursor, skip int64
	content      content
	batches      int
}

// step takes one batch and checks what a batch promises.
func (r *reader) step(t *testing.T, m *Mirror, n *naive, maxEntries, maxBytes int) (head bool) {
	t.Helper()
	want := n.after(r.cursor, r.skip)
	b := m.After(r.cursor, r.skip, maxEntries, maxBytes)
	if len(b.Entries) > maxEntries || b.State != n.state {
		t.Fatalf("a batch of %d entries, at most %d, in state %+v, not %+v", len(b.Entries), maxEntries, b.State, n.state)
	}
	if b.Head && len(b.Entries) < len(want) {
		t.Fatalf("a batch of %d of %d entries says that it reaches the head", len(b.Entries), len(want))
	}
	size := 0
	for i, e := range b.Entries {
		if size >= maxBytes {
			t.Fatalf("a batch goes on after %d octets, at most %d", size, maxBytes)
		}
		size += len(e.Encoding)
		if e.Mailbox != want[i].Mailbox || e.Revision != want[i].Revision || !e.List.Equal(want[i].List) {
			t.Fatalf("entry %d is %s at %d, not %s at %d", i, e.Mailbox, e.Revision, want[i].Mailbox, want[i].Revision)
		}
		if e.ID != e.Mailbox.ID() || string(e.Encoding) != string(e.List.Encode()) {
			t.Fatalf("entry %d is inconsistent: %+v", i, e)
		}
		if r.content[e.Mailbox] = e.List; e.List.Len() == 0 {
			delete(r.content, e.Mailbox)
		}
	}
	if b.Next < r.cursor || !b.Head && b.Next == r.cursor {
		t.Fatalf("the cursor went from %d to %d", r.cursor, b.Next)
	}
	r.cursor, r.batches = b.Next, r.batches+1
	if b.Head {
		if want := n.content(); b.Next != n.state.Revision || !r.content.equal(want) {
			t.Fatalf("at the head the reader has %v at %d, not %v at %d", r.content, b.Next, want, n.state.Revision)
		}
	}
	return b.Head
}

// TestMirrorAgainstModel drives a mirror with random saves and several readers that step at random.
func TestMirrorAgainstModel(t *testing.T) {
	var lists []allow.List
	for i := range 20 {
		lists = append(lists, nthList(t, i))
	}
	var mailboxes []allow.Mailbox
	for i := range 60 {
		mailboxes = append(mailboxes, mailbox(t, fmt.Sprintf("user%02d@d%d.example.com", i, i%4)))
	}
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			m, n := NewMirror(), &naive{records: make(map[string]Record)}
			if _, filled := m.State(); filled {
				t.Fatal("a new mirror is not filled")
			}
			m.replace(nil, State{Store: 7, Epoch: 1, Revision: 2})
			n.state = State{Store: 7, Epoch: 1, Revision: 2}
			var readers []*reader
			for range 2500 {
				switch p := rnd.IntN(100); {
				case p < 60:
					rec := Record{Mailbox: mailboxes[rnd.IntN(len(mailboxes))], Revision: n.state.Revision + 1 + rnd.Int64N(3), Epoch: 1}
					if rnd.IntN(4) > 0 {
						rec.List = lists[rnd.IntN(len(lists))]
					}
					rec.Version = n.records[rec.Mailbox.String()].Version + 1
					m.apply(rec, n.state.Version+1, Anchor{})
					n.put(rec)
				case p < 61:
					m.replace(slices.Collect(maps.Values(n.records)), n.state)
				case p < 64:
					readers = append(readers, &reader{skip: n.state.Revision, content: make(content)})
				default:
					if len(readers) > 0 {
						readers[rnd.IntN(len(readers))].step(t, m, n, 1+rnd.IntN(10), 1+rnd.IntN(200))
					}
				}
				if got, _ := m.State(); got != n.state {
					t.Fatalf("the mirror is in state %+v, not %+v", got, n.state)
				}
				if len(m.byRevision) > 2*len(mailboxes)+1024+1 {
					t.Fatalf("%d entries are kept for %d mailboxes", len(m.byRevision), len(m.entries))
				}
			}
			for _, r := range readers {
				for !r.step(t, m, n, 1+rnd.IntN(10), 1+rnd.IntN(200)) {
				}
			}
			checkDomains(t, m, n)
		})
	}
}

// checkDomains walks all pages of all domains.
func checkDomains(t *testing.T, m *Mirror, n *naive) {
	t.Helper()
	byDomain := make(map[string][]string)
	for name, rec := range n.records {
		if rec.List.Len() > 0 {
			byDomain[rec.Mailbox.Domain()] = append(byDomain[rec.Mailbox.Domain()], name)
		}
	}
	if len(m.domains) != len(byDomain) {
		t.Errorf("the mirror has %d domains, not %d", len(m.domains), len(byDomain))
	}
	for domain, want := range byDomain {
		slices.Sort(want)
		for limit := 1; limit < len(want)+2; limit++ {
			var got []string
			for {
				after := ""
				if len(got) > 0 {
					after = got[len(got)-1]
				}
				page, total := m.Domain(domain, after, limit)
				if total != len(want) || len(page) > limit {
					t.Fatalf("a page of %d of %d, at most %d of %d", len(page), total, limit, len(want))
				}
				for _, rec := range page {
					if got = append(got, rec.Mailbox.String()); nets(rec) != nets(n.records[rec.Mailbox.String()]) {
						t.Fatalf("%s has %s", rec.Mailbox, nets(rec))
					}
				}
				if len(page) < limit {
					break
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("pages of %d show %v, not %v", limit, got, want)
			}
		}
	}
	if page, total := m.Domain("no.example.com", "", 10); len(page) > 0 || total > 0 {
		t.Errorf("a domain without lists has %v, %d", page, total)
	}
	// A mailbox that was cleared since the page before is still a place to go on from.
	for domain, want := range byDomain {
		page, _ := m.Domain(domain, want[0]+"0", 1)
		if i, _ := slices.BinarySearch(want, want[0]+"0"); i < len(want) && page[0].Mailbox.String() != want[i] {
			t.Errorf("after a gap comes %v, not %s", page, want[i])
		}
	}
}

func TestMirrorWait(t *testing.T) {
	m := NewMirror()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := m.Wait(ctx, func(State) bool { return true }); err == nil {
		t.Error("an empty mirror has a state")
	}
	var waiting sync.WaitGroup
	for v := range int64(10) {
		waiting.Go(func() {
			if s, err := m.Wait(within(t), func(s State) bool { return s.Version >= v }); err != nil || s.Version < v {
				t.Errorf("waiting for %d: %+v, %v", v, s, err)
			}
		})
	}
	m.replace(nil, State{Store: 7, Epoch: 1, Revision: 2})
	for v := range int64(10) {
		m.apply(Record{Mailbox: mailbox(t, "a@example.com"), List: nthList(t, int(v)), Revision: 3 + v, Version: v + 1}, v+1, Anchor{})
	}
	waiting.Wait()
}

// bigMirror returns the records of a mirror of n mailboxes with three nets each.
func bigMirror(t testing.TB, n int) []Record {
	records := make([]Record, n)
	for i := range records {
		records[i] = Record{
			Mailbox: mailbox(t, fmt.Sprintf("user%07d@d%d.example.com", i, i%100)), List: list(t, fmt.Sprintf("8.%d.%d.0/24, 9.9.9.9, 2a00::/32", i>>8&255, i&255)),
			Revision: int64(i + 2), Version: 1, Epoch: 1,
		}
	}
	slices.SortFunc(records, func(a, b Record) int { return strings.Compare(a.Mailbox.String(), b.Mailbox.String()) })
	return records
}

func BenchmarkMirror(b *testing.B) {
	const size = 100_000
	records := bigMirror(b, size)
	state := State{Store: 7, Epoch: 1, Revision: size + 1, Version: size}
	b.Run("fill", func(b *testing.B) {
		b.ReportAllocs()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		var m *Mirror
		for b.Loop() {
			m = NewMirror()
			m.replace(records, state)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/size, "B/mailbox")
		runtime.KeepAlive(m)
	})
	m := NewMirror()
	m.replace(records, state)
	b.Run("apply", func(b *testing.B) {
		b.ReportAllocs()
		next := state
		for i := 0; b.Loop(); i++ {
			next.Revision, next.Version = next.Revision+1, next.Version+1
			rec := records[i%size]
			rec.Revision, rec.Version = next.Revision, rec.Version+1
			m.apply(rec, next.Version, Anchor{})
		}
	})
	b.Run("snapshot", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for cursor := int64(0); ; {
				batch := m.After(cursor, 1<<60, 4096, 1<<20)
				if cursor = batch.Next; batch.Head {
					break
				}
			}
		}
	})
	b.Run("one more", func(b *testing.B) {
		b.ReportAllocs()
		s, _ := m.State()
		for b.Loop() {
			m.After(s.Revision-1, 0, 4096, 1<<20)
		}
	})
}
