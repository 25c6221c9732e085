package store

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/big"
	"sync"
	"testing"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// content is what a mirror serves: the list of every restricted mailbox.
type content map[allow.Mailbox]allow.List

// digest is the digest of a content, without allow's arithmetic.
func (c content) digest() (d allow.Digest) {
	sum := new(big.Int)
	for mailbox, l := range c {
		id, hash := mailbox.ID(), sha256.New()
		hash.Write(id[:])
		hash.Write(l.Encode())
		sum.Add(sum, new(big.Int).SetBytes(hash.Sum(nil)[:16]))
	}
	sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 128)).FillBytes(d[:])
	return d
}

func (c content) equal(o content) bool { return maps.EqualFunc(c, o, allow.List.Equal) }

func (c content) String() string {
	text := make(map[string][]string)
	for mailbox, l := range c {
		text[mailbox.String()] = l.Strings()
	}
	return fmt.Sprint(text)
}

// sight is what a mirror showed at one moment.
type sight struct {
	state   State
	content content
}

func look(m *Mirror) sight {
	b := m.After(0, 0, 1<<30, 1<<40)
	s := sight{b.State, make(content)}
	for _, e := range b.Entries {
		if e.List.Len() > 0 {
			s.content[e.Mailbox] = e.List
		}
	}
	return s
}

// check compares what was shown with what was saved.
func (s sight) check(h etcdtest.History) error {
	lists, saves := h.At(s.state.Revision)
	want := content(lists)
	switch {
	case s.state.Version != saves:
		return fmt.Errorf("at revision %d it counts %d saves of %d", s.state.Revision, s.state.Version, saves)
	case !s.content.equal(want):
		return fmt.Errorf("at revision %d it shows %v, not %v", s.state.Revision, s.content, want)
	case s.state.Count != uint64(len(want)) || s.state.Digest != want.digest():
		return fmt.Errorf("at revision %d it counts %d mailboxes with digest %x, not %d with %x", s.state.Revision, s.state.Count, s.state.Digest, len(want), want.digest())
	}
	return nil
}

// witness looks at a mirror whenever it changes.
type witness struct {
	mirror *Mirror
	stop   context.CancelFunc
	done   sync.WaitGroup
	seen   []sight
}

func observe(m *Mirror) *witness {
	ctx, cancel := context.WithCancel(context.Background())
	w := &witness{mirror: m, stop: cancel}
	w.done.Go(func() {
		for {
			m.mu.RLock()
			filled, changed := m.filled, m.changed
			m.mu.RUnlock()
			if filled {
				w.seen = append(w.seen, look(m))
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	return w
}

// testify ends the observation and compares everything that was seen with the history.
func (w *witness) testify(t testing.TB, h etcdtest.History) {
	t.Helper()
	w.stop()
	w.done.Wait()
	for i, s := range w.seen {
		if err := s.check(h); err != nil {
			t.Errorf("sight %d of %d: %v", i, len(w.seen), err)
			return
		}
		if i > 0 && s.state.Epoch == w.seen[i-1].state.Epoch && s.state.Revision < w.seen[i-1].state.Revision {
			t.Errorf("the mirror went back from revision %d to %d", w.seen[i-1].state.Revision, s.state.Revision)
		}
	}
}
