// Package index maps mailbox ids to their sets of nets, in little memory, for readers that never wait.
//
// A [Root] is one state. It is immutable, so whoever holds one sees exactly that state for as long as it likes. A [Builder]
// makes the next root and copies only what it touches. The package does no I/O and knows no clock and no logger.
//
// Ids are hashes, so their first two octets spread mailboxes evenly over 65,536 leaves. A leaf holds the rest of each id
// and the number of its set; equal sets are stored once. Leaves hold no pointers, so the garbage collector skips them.
package index

import (
	"encoding/binary"

	"github.com/allowednets/allowednets/internal/allow"
)

// Root is one state: the restricted mailboxes with their nets. The zero value restricts nobody. It is immutable, and safe
// for concurrent use.
type Root struct {
	branches [256]*branch // by the id's first octet; nil if empty
	sets     table
	count    uint64
	digest   allow.Digest
}

// branch holds the leaves by the id's second octet.
type branch struct {
	leaves [256]leaf
	owner  uint64           // the builder that made it
	own    [256 / 64]uint64 // bits of the leaves that it made too
}

// leaf is sorted by rest.
type leaf []entry

// entry is a restricted mailbox.
type entry struct {
	rest [14]byte  // of the id, behind the octets that lead to the leaf
	set  [2]uint16 // number of the set, high half first: a uint32 would cost two octets of padding
}

func (e *entry) number() uint32 { return uint32(e.set[0])<<16 | uint32(e.set[1]) }

func splitNumber(n uint32) [2]uint16 { return [2]uint16{uint16(n >> 16), uint16(n)} }

// search returns where rest is in the leaf, or belongs. Ids are hashes, so it is near the place that its first octets name.
func (l leaf) search(rest *[14]byte) (int, bool) {
	i := int(uint32(binary.BigEndian.Uint16(rest[:])) * uint32(len(l)) >> 16)
	for i < len(l) && l[i].less(rest) {
		i++
	}
	for i > 0 && !l[i-1].less(rest) {
		i--
	}
	return i, i < len(l) && l[i].rest == *rest
}

func (e *entry) less(rest *[14]byte) bool {
	a, b := binary.BigEndian.Uint64(e.rest[:]), binary.BigEndian.Uint64(rest[:])
	return a < b || a == b && string(e.rest[8:]) < string(rest[8:])
}

// Lookup returns the nets of a mailbox, or nil if it is unrestricted. It does not allocate.
func (r *Root) Lookup(id allow.ID) *allow.Set {
	b := r.branches[id[0]]
	if b == nil {
		return nil
	}
	l := b.leaves[id[1]]
	i, ok := l.search((*[14]byte)(id[2:]))
	if !ok {
		return nil
	}
	return &r.sets.at(l[i].number()).set
}

// Count returns how many mailboxes are restricted.
func (r *Root) Count() uint64 { return r.count }

// Digest returns the sum of the digests of the restricted mailboxes ([allow.EntryDigest]).
func (r *Root) Digest() allow.Digest { return r.digest }
