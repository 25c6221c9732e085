package index

import "github.com/allowednets/allowednets/internal/allow"

// A change copies a chunk, a shelf and the list of shelves, so none of them is large: with chunks of their own for ten million
// sets the list has 2,442 shelves.
const (
	chunkSize = 64
	shelfSize = 64
)

// table numbers the sets from 1. Shelves and chunks are shared between roots, so only their builder may change them.
type table struct {
	shelves []*shelf
	used    uint32 // the numbers up to this one have been given out
	free    uint32 // the first of those that are free again; 0 if none is
}

type shelf struct {
	chunks [shelfSize]*chunk
	owner  uint64 // the builder that made it
}

type chunk struct {
	slots [chunkSize]slot
	owner uint64 // the builder that made it
}

// slot is a set with the number of mailboxes that have it. If nobody has it, the slot is free, and next is the next free
// number.
type slot struct {
	set  allow.Set // by value: one miss of the cache less
	refs uint32
	next uint32
}

func (t *table) at(number uint32) *slot {
	i := number - 1
	return &t.shelves[i/(chunkSize*shelfSize)].chunks[i/chunkSize%shelfSize].slots[i%chunkSize]
}
