package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// content is what a mirror serves: the list of every restricted mailbox, joined.
type content map[string]string

// sum is the digest of a content, in other words than allow's.
func (c content) sum(t testing.TB) allow.Digest {
	sum := new(big.Int)
	for name, nets := range c {
		d := allow.EntryDigest(mailbox(t, name).ID(), list(t, nets).Encode())
		sum.Add(sum, new(big.Int).SetBytes(d[:]))
	}
	sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 128))
	var d allow.Digest
	sum.FillBytes(d[:])
	return d
}

// history is what was saved, from the audit records, which the replica does not read. It is the oracle of all that a mirror shows.
type history struct {
	changes []historic
}

type historic struct {
	revision int64
	mailbox  string
	nets     string
}

// readHistory reads etcd's audit records.
func readHistory(t testing.TB, e *etcdtest.Etcd) (h history) {
	t.Helper()
	resp, err := e.Client().Get(context.WithoutCancel(t.Context()), changePrefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		var c storev1.Change
		if err := proto.Unmarshal(kv.Value, &c); err != nil {
			t.Fatal(err)
		}
		l, err := allow.RestoreList(c.GetAfter().GetNets())
		if err != nil {
			t.Fatal(err)
		}
		h.changes = append(h.changes, historic{kv.ModRevision, c.GetMailbox(), nets(Record{List: l})})
	}
	slices.SortFunc(h.changes, func(a, b historic) int { return cmp.Compare(a.revision, b.revision) })
	return h
}

// at returns the content and the number of saves at a revision.
func (h history) at(revision int64) (c content, saves int64) {
	c = make(content)
	for _, ch := range h.changes {
		if ch.revision > revision {
			break
		}
		saves++
		if c[ch.mailbox] = ch.nets; ch.nets == "" {
			delete(c, ch.mailbox)
		}
	}
	return c, saves
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
			s.content[e.Mailbox.String()] = nets(e.Record)
		}
	}
	return s
}

// check compares what was shown with what was saved.
func (s sight) check(t testing.TB, h history) error {
	want, saves := h.at(s.state.Revision)
	switch {
	case s.state.Version != saves:
		return fmt.Errorf("at revision %d it counts %d saves of %d", s.state.Revision, s.state.Version, saves)
	case !maps.Equal(s.content, want):
		return fmt.Errorf("at revision %d it shows %v, not %v", s.state.Revision, s.content, want)
	case s.state.Count != uint64(len(want)) || s.state.Digest != want.sum(t):
		return fmt.Errorf("at revision %d it counts %d mailboxes with digest %x, not %d with %x", s.state.Revision, s.state.Count, s.state.Digest, len(want), want.sum(t))
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
func (w *witness) testify(t testing.TB, h history) {
	t.Helper()
	w.stop()
	w.done.Wait()
	for i, s := range w.seen {
		if err := s.check(t, h); err != nil {
			t.Errorf("sight %d of %d: %v", i, len(w.seen), err)
			return
		}
		if i > 0 && s.state.Epoch == w.seen[i-1].state.Epoch && s.state.Revision < w.seen[i-1].state.Revision {
			t.Errorf("the mirror went back from revision %d to %d", w.seen[i-1].state.Revision, s.state.Revision)
		}
	}
}
