package index

import (
	"maps"
	"math/bits"
	"slices"

	"github.com/allowednets/allowednets/internal/allow"
)

// Builder prepares the next root of its writer. Dropping it undoes everything. It is not safe for concurrent use.
type Builder struct {
	writer *Writer
	root   *Root             // the next root so far
	known  map[setKey]uint32 // sets of the root it started from; not changed before Build
	added  map[setKey]uint32 // sets that are new
	idle   []uint32          // sets that at some time lost their last mailbox

	// owner is this builder's number, never that of another one of the writer. What bears it was made by this builder, which
	// may therefore change it in place.
	owner uint64

	scratch []byte
}

// Put gives a mailbox the nets of an encoding as in [allow.DecodeSet]; an empty encoding lifts its restriction. The error
// is that of DecodeSet, and then nothing has changed. The encoding is not kept.
func (b *Builder) Put(id allow.ID, encoding []byte) error {
	var number uint32
	if len(encoding) > 0 {
		var err error
		if number, err = b.intern(encoding); err != nil {
			return err
		}
	}
	var l leaf
	if br := b.root.branches[id[0]]; br != nil {
		l = br.leaves[id[1]]
	}
	rest := [14]byte(id[2:])
	i, found := l.search(&rest)
	if number == 0 && !found {
		return nil
	}
	if found {
		old := l[i].number()
		b.scratch = b.root.sets.at(old).set.AppendEncoding(b.scratch[:0])
		b.root.digest = b.root.digest.Sub(allow.EntryDigest(id, b.scratch))
		b.root.count--
		b.release(old)
	}
	own := b.leaf(id)
	if number == 0 {
		*own = slices.Delete(*own, i, i+1)
		return nil
	}
	if !found {
		*own = slices.Insert(*own, i, entry{})
	}
	(*own)[i] = entry{rest: rest, set: splitNumber(number)}
	b.slot(number).refs++
	b.root.digest = b.root.digest.Add(allow.EntryDigest(id, encoding))
	b.root.count++
	return nil
}

// Count is [Root.Count] of the root so far.
func (b *Builder) Count() uint64 { return b.root.count }

// Digest is [Root.Digest] of the root so far.
func (b *Builder) Digest() allow.Digest { return b.root.digest }

// Build makes what was put the writer's newest root and returns it. The builder, and every other one of this writer, must
// not be used any more.
func (b *Builder) Build() *Root {
	for _, br := range &b.root.branches {
		if br == nil || br.owner != b.owner {
			continue
		}
		for i, word := range br.own {
			for ; word != 0; word &= word - 1 {
				l := &br.leaves[i*64+bits.TrailingZeros64(word)]
				switch {
				case len(*l) == 0:
					*l = nil
				case len(*l) < cap(*l):
					*l = append(make(leaf, 0, len(*l)), *l...)
				}
			}
		}
	}
	if len(b.known) == 0 {
		b.known = b.added
	} else {
		maps.Copy(b.known, b.added)
	}
	for _, number := range b.idle {
		s := b.slot(number)
		if s.set.Len() == 0 || s.refs > 0 {
			continue // it is free already, or found a mailbox again
		}
		b.scratch = s.set.AppendEncoding(b.scratch[:0])
		delete(b.known, keyOf(b.scratch))
		*s = slot{next: b.root.sets.free}
		b.root.sets.free = number
	}
	b.writer.root, b.writer.known = b.root, b.known
	return b.root
}

// intern returns the number of a set, which it adds to the table if it is new.
func (b *Builder) intern(encoding []byte) (uint32, error) {
	key := keyOf(encoding)
	if len(b.known) > 0 { // a rebuild need not ask
		if number, ok := b.known[key]; ok {
			return number, nil
		}
	}
	if number, ok := b.added[key]; ok {
		return number, nil
	}
	set, err := allow.DecodeSet(encoding)
	if err != nil {
		return 0, err
	}
	t := &b.root.sets
	number := t.free
	if number != 0 {
		t.free = b.slot(number).next
	} else {
		t.used++
		number = t.used
		if int(number-1)/(chunkSize*shelfSize) == len(t.shelves) {
			t.shelves = append(t.shelves, &shelf{owner: b.owner})
		}
	}
	*b.slot(number) = slot{set: *set}
	b.added[key] = number
	return number, nil
}

func (b *Builder) release(number uint32) {
	s := b.slot(number)
	s.refs--
	if s.refs == 0 {
		b.idle = append(b.idle, number)
	}
}

// slot returns a slot that may be changed.
func (b *Builder) slot(number uint32) *slot {
	i := number - 1
	sh := &b.root.sets.shelves[i/(chunkSize*shelfSize)]
	if (*sh).owner != b.owner {
		own := **sh
		own.owner = b.owner
		*sh = &own
	}
	c := &(*sh).chunks[i/chunkSize%shelfSize]
	if *c == nil {
		*c = &chunk{owner: b.owner}
	} else if (*c).owner != b.owner {
		own := **c
		own.owner = b.owner
		*c = &own
	}
	return &(*c).slots[i%chunkSize]
}

// leaf returns the leaf of an id as one that may be changed.
func (b *Builder) leaf(id allow.ID) *leaf {
	br := &b.root.branches[id[0]]
	if *br == nil {
		*br = &branch{owner: b.owner}
	} else if (*br).owner != b.owner {
		*br = &branch{leaves: (*br).leaves, owner: b.owner}
	}
	l := &(*br).leaves[id[1]]
	if word, bit := &(*br).own[id[1]/64], uint64(1)<<(id[1]%64); *word&bit == 0 {
		*word |= bit
		*l = append(make(leaf, 0, len(*l)+1), *l...)
	}
	return l
}
