package index

import "github.com/allowednets/allowednets/internal/allow"

const chunkSize = 256

// table numbers the sets from 1. Chunks are shared between roots, so only their builder may change them.
type table struct {
	chunks []*chunk
	used   uint32 // the numbers up to this one have been given out
	free   uint32 // the first of those that are free again; 0 if none is
}

type chunk [chunkSize]slot

// slot is a set with the number of mailboxes that have it. If nobody has it, the slot is free, and next is the next free
// number.
type slot struct {
	set  allow.Set // by value: one miss of the cache less
	refs uint32
	next uint32
}

func (t *table) at(number uint32) *slot {
	return &t.chunks[(number-1)/chunkSize][(number-1)%chunkSize]
}
