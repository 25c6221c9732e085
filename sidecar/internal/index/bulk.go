package index

import (
	"errors"
	"iter"

	"github.com/allowednets/allowednets/internal/allow"
)

// Set returns the set with a number that [Root.All] of this root yielded.
func (r *Root) Set(number uint32) *allow.Set { return &r.sets.at(number).set }

// MaxNumber returns a bound of the numbers of this root's sets.
func (r *Root) MaxNumber() uint32 { return r.sets.used }

// All yields the restricted mailboxes by rising id, each with the number of its set.
func (r *Root) All() iter.Seq2[allow.ID, uint32] {
	return func(yield func(allow.ID, uint32) bool) {
		for first, b := range &r.branches {
			if b == nil {
				continue
			}
			for second, l := range &b.leaves {
				for i := range l {
					id := allow.ID{byte(first), byte(second)}
					copy(id[2:], l[i].rest[:])
					if !yield(id, l[i].number()) {
						return
					}
				}
			}
		}
	}
}

var (
	errTwice  = errors.New("a set twice")
	errNumber = errors.New("a set that is not there")
	errOrder  = errors.New("mailboxes out of order or twice")
)

// AddSet adds a set for [Builder.Append] and returns its number. The error is that of [allow.DecodeSet], or says that the
// set is there already. A set that no mailbox gets is dropped by [Builder.Build].
func (b *Builder) AddSet(encoding []byte) (uint32, error) {
	before := len(b.added)
	number, err := b.intern(encoding)
	if err != nil {
		return 0, err
	}
	if len(b.added) == before {
		return 0, errTwice
	}
	b.idle = append(b.idle, number)
	return number, nil
}

// Append is a fast [Builder.Put] for many mailboxes by rising id: number is that of a set of this builder. The error says
// that the id is not above those that share its leaf, or that there is no such set; then nothing has changed.
func (b *Builder) Append(id allow.ID, number uint32) error {
	if number == 0 || number > b.root.sets.used || b.root.sets.at(number).set.Len() == 0 {
		return errNumber
	}
	own := b.leaf(id)
	rest := [14]byte(id[2:])
	if n := len(*own); n > 0 && !(*own)[n-1].less(&rest) {
		return errOrder
	}
	*own = append(*own, entry{rest: rest, set: splitNumber(number)})
	s := b.slot(number)
	s.refs++
	b.scratch = s.set.AppendEncoding(b.scratch[:0])
	b.root.digest = b.root.digest.Add(allow.EntryDigest(id, b.scratch))
	b.root.count++
	return nil
}
