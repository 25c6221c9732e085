package mirror_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// history is what a store went through: its state at every revision that was committed.
type history struct {
	revisions []int64
	states    map[int64]content
}

// newHistory makes n revisions of a few mailboxes that come, change and go.
func newHistory(rnd *rand.Rand, n int) *history {
	state, revision := content{}, int64(0)
	h := &history{states: map[int64]content{0: state}}
	for i := range n {
		revision += 1 + rnd.Int64N(5)
		for range 1 + rnd.IntN(4) {
			set := ""
			if i == 0 || rnd.IntN(3) > 0 {
				set = nets(byte(1+rnd.IntN(5)), 1+rnd.IntN(3))
			}
			state = state.with(mailbox(rnd.IntN(8)), set)
		}
		h.revisions, h.states[revision] = append(h.revisions, revision), state
	}
	return h
}

// script is what a right server, which is not behind the mirror, sends after a Hello with the revision from: up to four
// commits, in small batches.
func (h *history) script(rnd *rand.Rand, m *mirror.Mirror, from int64) []*feedv1.SyncResponse {
	at, next := h.states[from], max(0, slices.Index(h.revisions, applied(m)))
	msgs := []*feedv1.SyncResponse{welcome(cluster, epoch, from == 0)}
	for range 4 {
		if next >= len(h.revisions) {
			break
		}
		to := h.states[h.revisions[next]]
		var entries []*feedv1.Entry
		for n := range 8 {
			id := mailbox(n)
			if at[id] != to[id] {
				if rnd.IntN(3) == 0 { // a version in between
					entries = append(entries, entry(id, nets(9, 9)))
				}
				entries = append(entries, entry(id, to[id]))
			}
		}
		for len(entries) > 2 {
			msgs = append(msgs, changes(nil, entries[:2]...))
			entries = entries[2:]
		}
		msgs = append(msgs, changes(to.commit(h.revisions[next]), entries...))
		at = to
		next += 1 + rnd.IntN(2)
	}
	return msgs
}

// applied is the revision of the published state, 0 without one.
func applied(m *mirror.Mirror) int64 {
	if m.State() == nil {
		return 0
	}
	token, err := revision.Parse(m.State().Revision)
	if err != nil {
		panic(err)
	}
	return token.Revision
}

// play sends a script and checks after every message that what is published is a state of the store, the newest one that was
// committed, and that it is acknowledged once.
func (h *history) play(f *fixture, c *conversation, msgs []*feedv1.SyncResponse) {
	f.t.Helper()
	want := applied(f.m)
	for _, msg := range msgs {
		c.send(msg)
		synctest.Wait()
		commit := msg.GetChanges().GetCommit()
		if commit != nil {
			want = commit.GetRevision()
			c.acked(want)
		}
		if len(c.acks) > 0 {
			f.t.Fatalf("%d more acknowledgements than commits", len(c.acks))
		}
		if want == 0 {
			if f.m.State() != nil {
				f.t.Fatal("a state before the first commit")
			}
			continue
		}
		f.wantState(want, h.states[want])
	}
}

// TestCutsAfterEveryMessage cuts a first stream after every number of messages, then a second one, and lets a third one run.
func TestCutsAfterEveryMessage(t *testing.T) {
	h := newHistory(rand.New(rand.NewPCG(1, 1)), 8)
	const most = 10
	for first := range most {
		for second := range most {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(uint64(first), uint64(second)))
				f := start(t)
				for _, cut := range []int{first, second, most * 2} {
					c := f.accept()
					msgs := h.script(rnd, f.m, c.hello.GetRevision())
					h.play(f, c, msgs[:min(cut, len(msgs))])
					c.end <- errCut
				}
			})
		}
	}
}

// TestLongLife runs through a long history over streams that are cut, drained, silent, wrong and slow, all at random.
func TestLongLife(t *testing.T) {
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 2))
			h := newHistory(rnd, 100)
			f := start(t)
			for applied(f.m) != h.revisions[len(h.revisions)-1] {
				c := f.accept()
				msgs := h.script(rnd, f.m, c.hello.GetRevision())
				n := rnd.IntN(len(msgs) + 1)
				h.play(f, c, msgs[:n])
				switch rnd.IntN(5) {
				case 0:
					c.end <- nil
				case 1:
					c.send(drain(time.Duration(rnd.IntN(1000)) * time.Millisecond))
				case 2: // before a Welcome unexpected, later a mismatch
					c.send(changes(three().commit(1<<40), entry(mailbox(1), "")))
				case 3:
					time.Sleep(time.Minute)
				default:
					c.end <- errCut
				}
			}
		})
	}
}
