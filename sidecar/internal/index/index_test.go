package index_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

// model is what a root must be equal to: the encodings of the restricted mailboxes.
type model map[allow.ID]string

func (m model) put(id allow.ID, nets string) {
	if nets == "" {
		delete(m, id)
	} else {
		m[id] = nets
	}
}

func (m model) digest() (d allow.Digest) {
	for id, nets := range m {
		d = d.Add(allow.EntryDigest(id, []byte(nets)))
	}
	return d
}

// check compares a root with the model, and looks at the ids in others too.
func (m model) check(t *testing.T, r *index.Root, others ...allow.ID) {
	t.Helper()
	if r.Count() != uint64(len(m)) || r.Digest() != m.digest() {
		t.Fatalf("count %d, digest %x; want %d, %x", r.Count(), r.Digest(), len(m), m.digest())
	}
	for _, id := range slices.AppendSeq(others, maps.Keys(m)) {
		got := ""
		if set := r.Lookup(id); set != nil {
			got = string(set.AppendEncoding(nil))
		}
		if got != m[id] {
			t.Fatalf("Lookup(%x) = %x; want %x", id, got, m[id])
		}
	}
}

// nets returns the encoding of n neighbouring addresses; equal arguments make equal sets.
func nets(first uint32, n int) string {
	var b []byte
	for i := range n {
		b = binary.BigEndian.AppendUint32(append(b, 4), first<<8+uint32(i))
		b = append(b, 32)
	}
	return string(b)
}

// crowded returns ids that share leaves, and differ early or late.
func crowded(n int) []allow.ID {
	ids := make([]allow.ID, n)
	for i := range ids {
		ids[i] = allow.ID{byte(i % 2), byte(i / 2 % 2)}
		ids[i][2+i%14] = byte(i)
	}
	slices.SortFunc(ids, func(a, b allow.ID) int { return bytes.Compare(a[:], b[:]) })
	return slices.Compact(ids)
}

func hashed(i int) allow.ID {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
	return allow.ID(sum[:16])
}

func put(t *testing.T, b *index.Builder, id allow.ID, nets string) {
	t.Helper()
	if err := b.Put(id, []byte(nets)); err != nil {
		t.Fatalf("Put(%x, %x): %v", id, nets, err)
	}
}

// TestAgainstModel edits, abandons and rebuilds at random. Every root must stay what it was.
func TestAgainstModel(t *testing.T) {
	ids := crowded(200)
	for i := range 100 {
		ids = append(ids, hashed(i))
	}
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		w := index.NewWriter()
		now := model{}
		type built struct {
			root *index.Root
			want model
		}
		history := []built{{new(index.Root), model{}}}
		for range 60 {
			next, b := maps.Clone(now), w.Edit()
			if rnd.IntN(10) == 0 {
				next, b = model{}, w.Rebuild()
			}
			for range rnd.IntN(60) {
				id, set := ids[rnd.IntN(len(ids))], ""
				if rnd.IntN(3) > 0 {
					set = nets(rnd.Uint32N(8), 1+rnd.IntN(3))
				}
				put(t, b, id, set)
				next.put(id, set)
			}
			if b.Count() != uint64(len(next)) || b.Digest() != next.digest() {
				t.Fatalf("seed %d: the builder counts %d with %x; want %d with %x", seed, b.Count(), b.Digest(), len(next), next.digest())
			}
			if rnd.IntN(3) == 0 {
				continue // abandon
			}
			now = next
			history = append(history, built{b.Build(), now})
		}
		for _, h := range history {
			h.want.check(t, h.root, ids...)
			b := bulk(t, h.root)
			if b.Count() != h.root.Count() || b.Digest() != h.root.Digest() {
				t.Fatalf("in bulk %d with %x; want %d with %x", b.Count(), b.Digest(), h.root.Count(), h.root.Digest())
			}
			also := maps.Clone(h.want)
			for range 20 {
				id, set := ids[rnd.IntN(len(ids))], nets(rnd.Uint32N(8), rnd.IntN(3))
				put(t, b, id, set)
				also.put(id, set)
			}
			also.check(t, b.Build(), ids...)
			h.want.check(t, h.root, ids...)
		}
	}
}

func FuzzAgainstModel(f *testing.F) {
	f.Add([]byte{0, 1, 1, 1, 255, 0, 1, 0, 254, 0, 2, 2})
	ids := crowded(64)
	f.Fuzz(func(t *testing.T, script []byte) {
		w, now := index.NewWriter(), model{}
		b, next := w.Edit(), model{}
		for len(script) >= 2 {
			op, arg := script[0], script[1]
			script = script[2:]
			switch op {
			case 255:
				now = next
				now.check(t, b.Build(), ids...)
				b, next = w.Edit(), maps.Clone(now)
			case 254:
				b, next = w.Edit(), maps.Clone(now)
			case 253:
				b, next = w.Rebuild(), model{}
			default:
				set := ""
				if arg%8 != 0 {
					set = nets(uint32(arg%8), 1+int(arg/8)%3)
				}
				id := ids[int(op)%len(ids)]
				put(t, b, id, set)
				next.put(id, set)
			}
		}
		r := b.Build()
		next.check(t, r, ids...)
		next.check(t, bulk(t, r).Build(), ids...)
	})
}

// bulk builds what a root yields, and checks that it yields it in order.
func bulk(t *testing.T, r *index.Root) *index.Builder {
	t.Helper()
	b := index.NewWriter().Rebuild()
	numbers := make(map[uint32]uint32)
	var last allow.ID
	for id, number := range r.All() {
		if bytes.Compare(id[:], last[:]) < 0 || number > r.MaxNumber() {
			t.Fatalf("%x with set %d of at most %d, after %x", id, number, r.MaxNumber(), last)
		}
		last = id
		if numbers[number] == 0 {
			var err error
			if numbers[number], err = b.AddSet(r.Set(number).AppendEncoding(nil)); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Append(id, numbers[number]); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestBulkErrors(t *testing.T) {
	w := index.NewWriter()
	b := w.Rebuild()
	one, err := b.AddSet([]byte(nets(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddSet([]byte(nets(1, 1))); err == nil {
		t.Error("the same set again")
	}
	if _, err := b.AddSet([]byte("x")); err == nil {
		t.Error("no set at all")
	}
	unused, err := b.AddSet([]byte(nets(2, 1)))
	if err != nil {
		t.Fatal(err)
	}
	id, above, below := allow.ID{1, 2, 3}, allow.ID{1, 2, 4}, allow.ID{1, 2, 2}
	if err := b.Append(id, one); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct {
		id     allow.ID
		number uint32
	}{{above, 0}, {above, unused + 1}, {id, one}, {below, one}} {
		if err := b.Append(bad.id, bad.number); err == nil {
			t.Errorf("Append(%x, %d) succeeded", bad.id, bad.number)
		}
	}
	r := b.Build()
	model{id: nets(1, 1)}.check(t, r, above, below)
	// What was built in bulk is edited like anything else, and the place of the set without a mailbox is free.
	b = w.Edit()
	put(t, b, below, nets(3, 1))
	r = b.Build()
	model{id: nets(1, 1), below: nets(3, 1)}.check(t, r)
	if r.MaxNumber() != unused {
		t.Errorf("%d sets in memory; want %d", r.MaxNumber(), unused)
	}
}

func TestAllStops(t *testing.T) {
	b := index.NewWriter().Edit()
	put(t, b, hashed(1), nets(1, 1))
	put(t, b, hashed(2), nets(2, 1))
	r := b.Build()
	for range r.All() {
		break
	}
}

func TestEqualSetsAreShared(t *testing.T) {
	w := index.NewWriter()
	b := w.Edit()
	for i := range 100 {
		put(t, b, hashed(i), nets(uint32(i%3), 2))
	}
	b.Build()
	b = w.Edit()
	put(t, b, hashed(100), nets(0, 2))
	r := b.Build()
	distinct := map[*allow.Set]bool{}
	for i := range 101 {
		distinct[r.Lookup(hashed(i))] = true
	}
	if len(distinct) != 3 {
		t.Errorf("%d sets in memory; want 3", len(distinct))
	}
}

func TestRefusedNetsChangeNothing(t *testing.T) {
	w := index.NewWriter()
	b := w.Edit()
	put(t, b, hashed(1), nets(1, 2))
	for _, bad := range []string{"x", nets(1, 1) + nets(1, 1), nets(2, 1) + nets(1, 1)} {
		if err := b.Put(hashed(1), []byte(bad)); err == nil {
			t.Errorf("Put(%x) succeeded", bad)
		}
	}
	model{hashed(1): nets(1, 2)}.check(t, b.Build())
}

// TestReadersDuringWrites is for the race detector, too: a root that was built is never written to again.
func TestReadersDuringWrites(t *testing.T) {
	const mailboxes = 500
	w := index.NewWriter()
	var current atomic.Pointer[index.Root]
	write := func(generation int) {
		b := w.Edit()
		if generation%10 == 0 {
			b = w.Rebuild()
		}
		for i := range mailboxes {
			put(t, b, hashed(i), nets(uint32(generation), 1+i%2))
		}
		current.Store(b.Build())
	}
	write(0)
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				r := current.Load()
				want := r.Lookup(hashed(0)).AppendEncoding(nil)[:6]
				for i := range mailboxes {
					if got := r.Lookup(hashed(i)).AppendEncoding(nil)[:6]; !bytes.Equal(got, want) {
						t.Errorf("one root has sets of two generations: %x and %x", got, want)
						return
					}
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for generation := range 100 {
		write(generation)
	}
	close(done)
	readers.Wait()
}

func TestLookupDoesNotAllocate(t *testing.T) {
	w := index.NewWriter()
	b := w.Edit()
	for i := range 1000 {
		put(t, b, hashed(i), nets(uint32(i), 3))
	}
	r := b.Build()
	for _, id := range []allow.ID{hashed(1), hashed(5000)} {
		if n := testing.AllocsPerRun(100, func() { r.Lookup(id) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
	}
}

// TestChangeIsSmall: a change copies little, whatever the size of the index; and what was there before stays.
func TestChangeIsSmall(t *testing.T) {
	const budget = 24 << 10 // octets of a change; measured 17 KiB
	for _, mailboxes := range []int{1_000, 50_000} {
		w := index.NewWriter()
		b, want := w.Rebuild(), model{}
		for i := range mailboxes {
			put(t, b, hashed(i), nets(uint32(i), 3))
			want.put(hashed(i), nets(uint32(i), 3))
		}
		first := b.Build()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const changes = 500
		for i := range changes {
			b := w.Edit()
			put(t, b, hashed(i*97%mailboxes), nets(uint32(1<<20+i), 3))
			b.Build()
		}
		runtime.ReadMemStats(&after)
		if each := (after.TotalAlloc - before.TotalAlloc) / changes; each > budget {
			t.Errorf("a change of %d mailboxes takes %d octets; want at most %d", mailboxes, each, budget)
		}
		want.check(t, first)
	}
}
