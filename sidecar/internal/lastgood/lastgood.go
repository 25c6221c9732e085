// Package lastgood keeps the sidecar's state on disk, so that a sidecar that starts while no policy service can be reached
// enforces what it enforced before.
//
// It rests on one promise: a state that was acknowledged is never taken back by a restart. After a restart there is that
// state or a later one, or, if the disk failed, none at all, and a sidecar without a state gives no answers.
package lastgood

import (
	"errors"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

// State is a verified state of a store.
type State struct {
	Cluster uint64 // the store's id
	Token   revision.Token
	Anchor  string // of the feed's commit; at most [MaxAnchor] octets
	Index   *index.Root
}

// MaxAnchor is how long an anchor may be, in octets.
const MaxAnchor = 64

// identity is what is written down of a state beside its content, and proves the content and where it came from.
type identity struct {
	cluster uint64
	token   revision.Token
	count   uint64
	digest  allow.Digest
	anchor  string
}

func (s State) identity() identity {
	if s.Index == nil {
		return identity{}
	}
	return identity{s.Cluster, s.Token, s.Index.Count(), s.Index.Digest(), s.Anchor}
}

// continues reports whether changes can lead from the other state to i.
func (i identity) continues(o identity) bool {
	return i.cluster == o.cluster && i.token.Epoch == o.token.Epoch
}

// Changes are what leads from one state to the next. The zero value is no change.
type Changes struct {
	entries []byte // as in a commit frame
	tooMany bool
}

// maxChanges bounds the changes that are written one by one, in octets, both of one commit and of those that wait for a slow
// disk. Above it, writing the whole state is no worse.
const maxChanges = 8 << 20

// Put notes that a mailbox now has the nets of an encoding; an empty one lifts its restriction. Neither is kept.
func (c *Changes) Put(id allow.ID, encoding []byte) {
	if c.tooMany || len(c.entries)+len(encoding) > maxChanges {
		*c = Changes{tooMany: true}
		return
	}
	c.entries = appendEntry(c.entries, id, encoding)
}

// errDamaged is wrapped by every error that says that a state file is not what was written.
var errDamaged = errors.New("the state on disk is damaged")
