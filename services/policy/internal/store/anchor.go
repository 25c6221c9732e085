package store

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/allowednets/allowednets/internal/allow"
)

// Anchor names one save: the mailbox's id, the number of its save, and 16 octets of a hash of the audit record and its
// revision. A record holds a request id and a time, so a save of another history has another anchor, whatever revisions that
// history reaches. Histories are prefixes of each other or fork: one that holds a save holds every save before it.
// The zero Anchor names none.
type Anchor [len(allow.ID{}) + 8 + 16]byte

// newAnchor returns the anchor of a mailbox's save with its audit record, as it is below changes/ and, while it is the newest,
// in log.
func newAnchor(id allow.ID, version int64, kv *mvccpb.KeyValue) Anchor {
	a := Anchor(append(binary.BigEndian.AppendUint64(id[:], uint64(version)), make([]byte, 16)...))
	sum := recordSum(kv)
	copy(a[len(a)-len(sum):], sum[:])
	return a
}

func recordSum(kv *mvccpb.KeyValue) [16]byte {
	h := sha256.New()
	_ = binary.Write(h, binary.BigEndian, kv.ModRevision) // never fails
	_, _ = h.Write(kv.Value)
	return [16]byte(h.Sum(nil))
}

// ParseAnchor reads what [Anchor.Bytes] returned. ok is false for anything else.
func ParseAnchor(b []byte) (a Anchor, ok bool) {
	if len(b) != len(a) {
		return Anchor{}, false
	}
	return Anchor(b), true
}

// Bytes returns the anchor's octets, nil for the zero Anchor.
func (a Anchor) Bytes() []byte {
	if a == (Anchor{}) {
		return nil
	}
	return a[:]
}

func (a Anchor) id() allow.ID { return allow.ID(a[:]) }

func (a Anchor) version() int64 { return int64(binary.BigEndian.Uint64(a[len(allow.ID{}):])) }

// of reports whether an audit record is that of the save.
func (a Anchor) of(kv *mvccpb.KeyValue) bool { return [16]byte(a[len(a)-16:]) == recordSum(kv) }

const (
	// rememberedAnchors bounds the answers that are kept.
	rememberedAnchors = 1024
	// absentFor is how long it is believed that a save is not there. It is true for longer, but not for ever: another backup
	// may be restored.
	absentFor = time.Second
)

// anchors remembers which saves the history of an epoch holds. Its zero value knows nothing. It is safe for concurrent use.
type anchors struct {
	mu     sync.Mutex
	epoch  uint64
	held   map[Anchor]time.Time // the zero time, or when it was not there
	oldest int
	order  []Anchor
}

// remember forgets what was known of earlier epochs.
func (a *anchors) remember(epoch uint64, anchor Anchor, held bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if epoch > a.epoch {
		a.epoch, a.held, a.order, a.oldest = epoch, make(map[Anchor]time.Time), nil, 0
	}
	if epoch < a.epoch {
		return
	}
	if _, known := a.held[anchor]; !known {
		if len(a.order) < rememberedAnchors {
			a.order = append(a.order, anchor)
		} else {
			delete(a.held, a.order[a.oldest])
			a.order[a.oldest] = anchor
			a.oldest = (a.oldest + 1) % rememberedAnchors
		}
	}
	a.held[anchor] = time.Time{}
	if !held {
		a.held[anchor] = time.Now()
	}
}

func (a *anchors) recall(epoch uint64, anchor Anchor) (held, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	absent, known := a.held[anchor]
	if !known || epoch != a.epoch {
		return false, false
	}
	return absent.IsZero(), absent.IsZero() || time.Since(absent) < absentFor
}
