package lastgood

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/internal/revision"
)

// acknowledged is the revision of what smallState writes.
const acknowledged = 33

// smallState returns the octets of a state file with a snapshot and some commits.
func smallState(t *testing.T) []byte {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	f := start(t, dir)
	f.keep(f.rebuilt(30))
	for range acknowledged - 30 {
		f.keep(f.next())
	}
	f.stop()
	return readFile(t, dir, fileState)
}

// readBytes is read of a file with these octets.
func readBytes(t *testing.T, f *os.File, b []byte) (State, error) {
	t.Helper()
	if err := f.Truncate(int64(len(b))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	c, err := read(f)
	return c.state, err
}

func scratch(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), fileState))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// tail is the frame of one more commit, as it is on disk when a process dies before the commit is acknowledged.
func tail(t *testing.T) []byte {
	t.Helper()
	s := newSource()
	was, _ := s.rebuilt(acknowledged)
	st, c := s.next()
	return appendCommit(nil, was.Token.Revision, st.identity(), c)
}

// TestTruncated: below its acknowledged length a file is refused. What is above belongs to a commit that was not
// acknowledged, whole or torn.
func TestTruncated(t *testing.T) {
	whole, f := smallState(t), scratch(t)
	for n := range whole {
		if st, err := readBytes(t, f, whole[:n]); !errors.Is(err, errDamaged) {
			t.Fatalf("cut to %d of %d octets: %v, %v", n, len(whole), st, err)
		}
	}
	longer := append(bytes.Clone(whole), tail(t)...)
	for n := len(whole); n <= len(longer); n++ {
		st, err := readBytes(t, f, longer[:n])
		if err != nil {
			t.Fatalf("with %d octets behind the state: %v", n-len(whole), err)
		}
		if d := difference(st, acknowledged); d != "" {
			t.Fatalf("with %d octets behind the state: %s", n-len(whole), d)
		}
	}
}

// TestFlipped flips every bit.
func TestFlipped(t *testing.T) {
	whole, f := smallState(t), scratch(t)
	longer := append(bytes.Clone(whole), tail(t)...)
	for i := range longer {
		for bit := range 8 {
			longer[i] ^= 1 << bit
			st, err := readBytes(t, f, longer)
			switch {
			case i < len(whole) && !errors.Is(err, errDamaged):
				t.Fatalf("bit %d of octet %d of %d: %v, %v", bit, i, len(whole), st.Token, err)
			case i >= len(whole) && err != nil:
				t.Fatalf("bit %d of octet %d behind the state: %v", bit, i-len(whole), err)
			case i >= len(whole) && difference(st, acknowledged) != "":
				t.Fatalf("bit %d of octet %d behind the state: %s", bit, i-len(whole), difference(st, acknowledged))
			}
			longer[i] ^= 1 << bit
		}
	}
}

// TestZeroed: a disk that loses a write gives back zeros.
func TestZeroed(t *testing.T) {
	whole, f := smallState(t), scratch(t)
	for from := 0; from < len(whole); from += 64 {
		for to := from + 64; to <= len(whole); to += 64 {
			b := bytes.Clone(whole)
			clear(b[from:to])
			st, err := readBytes(t, f, b)
			if bytes.Equal(b, whole) {
				continue
			}
			if !errors.Is(err, errDamaged) {
				t.Fatalf("octets %d to %d of %d: %v, %v", from, to, len(whole), st.Token, err)
			}
		}
	}
}

// split cuts a state file into its frames.
func split(t *testing.T, file []byte) (frames [][]byte) {
	t.Helper()
	for b := file[headerSize:]; len(b) > 0; {
		n := int(binary.BigEndian.Uint32(b)) + frameExtra
		frames, b = append(frames, b[:n]), b[n:]
	}
	return frames
}

func join(frames ...[]byte) []byte {
	body := bytes.Join(frames, nil)
	return append(header(int64(headerSize+len(body))), body...)
}

// TestForged: the checksums are right, but what they cover is not one history.
func TestForged(t *testing.T) {
	frames := split(t, smallState(t))
	if len(frames) != 6 {
		t.Fatalf("%d frames", len(frames))
	}
	sets, boxes, state, journal := frames[0], frames[1], frames[2], frames[3:]
	frame := func(kind byte, payload []byte) []byte { return endFrame(append(beginFrame(nil, kind), payload...), 0) }
	// commit is a commit that changes nothing, on top of the snapshot.
	commit := func(before int64, change func(*identity)) []byte {
		s := newSource()
		st, _ := s.rebuilt(30)
		is := st.identity()
		is.token.Revision++
		if change != nil {
			change(&is)
		}
		return appendCommit(nil, before, is, new(Changes))
	}
	anchored := identitySize + 1 + len(anchor(31)) // of the first commit
	payload := func(frame []byte) []byte { return bytes.Clone(frame[5 : len(frame)-4]) }
	for name, b := range map[string][]byte{
		"nothing":                       join(),
		"no state":                      join(sets, boxes),
		"journal alone":                 join(journal...),
		"state alone":                   join(state),
		"no sets":                       join(boxes, state),
		"no mailboxes":                  join(sets, state),
		"sets twice":                    join(sets, sets, boxes, state),
		"mailboxes twice":               join(sets, boxes, boxes, state),
		"state twice":                   join(sets, boxes, state, state),
		"mailboxes after the state":     join(sets, state, boxes),
		"commit before the state":       join(sets, boxes, journal[0], state),
		"snapshot twice":                join(sets, boxes, state, sets, boxes, state),
		"first commit missing":          join(sets, boxes, state, journal[1], journal[2]),
		"commit in the middle missing":  join(sets, boxes, state, journal[0], journal[2]),
		"commit twice":                  join(sets, boxes, state, journal[0], journal[0], journal[1], journal[2]),
		"commits in another order":      join(sets, boxes, state, journal[1], journal[0], journal[2]),
		"commit of another store":       join(sets, boxes, state, commit(30, func(i *identity) { i.cluster++ })),
		"commit of another epoch":       join(sets, boxes, state, commit(30, func(i *identity) { i.token.Epoch++ })),
		"commit of a lower revision":    join(sets, boxes, state, commit(30, func(i *identity) { i.token.Revision = 29 })),
		"commit with another base":      join(sets, boxes, state, commit(29, nil)),
		"commit with another count":     join(sets, boxes, state, commit(30, func(i *identity) { i.count++ })),
		"commit with another digest":    join(sets, boxes, state, commit(30, func(i *identity) { i.digest[3]++ })),
		"commit with a long anchor":     join(sets, boxes, state, commit(30, func(i *identity) { i.anchor = strings.Repeat("x", MaxAnchor+1) })),
		"commit cut off":                join(sets, boxes, state, frame(kindCommit, payload(journal[0])[:anchored+4])),
		"commit cut off in its anchor":  join(sets, boxes, state, frame(kindCommit, payload(journal[0])[:anchored-1])),
		"commit without an anchor":      join(sets, boxes, state, frame(kindCommit, payload(journal[0])[:identitySize])),
		"commit cut off in its entry":   join(sets, boxes, state, frame(kindCommit, payload(journal[0])[:anchored+8+5])),
		"commit cut off in its nets":    join(sets, boxes, state, frame(kindCommit, payload(journal[0])[:anchored+8+18])),
		"commit with an unknown family": join(sets, boxes, state, frame(kindCommit, append(payload(commit(30, nil)), append(make([]byte, 16), 1, 9)...))),
		"unknown kind":                  join(sets, boxes, state, frame(5, nil)),
		"kind 0":                        join(frame(0, nil), sets, boxes, state),
		"frame cut off":                 join(sets, boxes, state, journal[0][:7]),
		"garbage":                       join(sets, boxes, state, []byte("garbage that is long enough for a frame")),
		"zeros":                         join(sets, boxes, state, make([]byte, 64)),
		"set cut off":                   join(frame(kindSets, payload(sets)[:9]), boxes, state),
		"mailbox cut off":               join(sets, frame(kindMailboxes, payload(boxes)[:9]), state),
		"mailbox without set":           join(sets, frame(kindMailboxes, payload(boxes)[:16]), state),
		"mailbox with set 0":            join(sets, frame(kindMailboxes, make([]byte, 17)), state),
		"short state":                   join(sets, boxes, frame(kindState, payload(state)[:40])),
		"state without an anchor":       join(sets, boxes, frame(kindState, payload(state)[:identitySize])),
		"state with half an anchor":     join(sets, boxes, frame(kindState, payload(state)[:identitySize+9])),
		"long state":                    join(sets, boxes, frame(kindState, append(payload(state), 0))),
		"state of store 0":              join(frame(kindState, make([]byte, identitySize+1))),
	} {
		t.Run(name, func(t *testing.T) {
			if st, err := readBytes(t, scratch(t), b); !errors.Is(err, errDamaged) {
				t.Errorf("%v, %v", st.Token, err)
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		st, err := readBytes(t, scratch(t), join(frames...))
		if err != nil || difference(st, acknowledged) != "" {
			t.Errorf("%v: %s", err, difference(st, acknowledged))
		}
		st, err = readBytes(t, scratch(t), join(sets, boxes, state, commit(30, nil)))
		if err != nil || st.Token.Revision != 31 {
			t.Errorf("%v, %v", st.Token, err)
		}
	})
}

// TestRefused: what was refused stays until it can be replaced, and is then put aside.
func TestRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	good := smallState(t)
	for round := range 2 {
		bad := bytes.Clone(good)
		bad[600+round] ^= 1
		if round == 0 {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		writeFile(t, bad, dir, fileState)
		for range 2 { // a restart before there is something better changes nothing
			f := start(t, dir)
			f.wantNothing(resultDamaged, "checksum")
			f.stop()
			if got := readFile(t, dir, fileState); !bytes.Equal(got, bad) {
				t.Fatal("the state was touched")
			}
		}
		f := start(t, dir)
		f.wantMetric("current", "", 0)
		f.keep(f.rebuilt(50))
		f.wantMetric("current", "", 1)
		f.stop()
		if got := readFile(t, dir, fileDamaged); !bytes.Equal(got, bad) {
			t.Error("the refused state was not put aside")
		}
		if got := files(t, dir); got != "state state.damaged" {
			t.Errorf("files %s", got)
		}
		f = open(t, dir)
		f.wantLoaded(50)
		f.stop()
	}
}

// TestContinueBehindATornCommit: the next commit is written over it.
func TestContinueBehindATornCommit(t *testing.T) {
	good, torn := smallState(t), tail(t)
	for _, n := range []int{1, len(torn) - 1, len(torn)} {
		dir := t.TempDir()
		writeFile(t, append(bytes.Clone(good), torn[:n]...), dir, fileState)
		f := start(t, dir)
		f.wantLoaded(acknowledged)
		if got := readFile(t, dir, fileState); !bytes.Equal(got, good) {
			t.Error("what was not acknowledged is still there")
		}
		f.keep(f.next())
		f.stop()
		f = open(t, dir)
		f.wantLoaded(acknowledged + 1)
		f.stop()
	}
}

// TestAnotherStore: a state is replaced by that of a store that was accepted.
func TestAnotherStore(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	for _, st := range []State{
		{cluster, revision.Token{Epoch: epoch + 1, Revision: 4}, "", f.now.Index},
		{cluster + 1, revision.Token{Epoch: 1, Revision: 2}, "another", f.now.Index},
	} {
		f.keep(st, new(Changes)) // changes of another history lead nowhere
		f.stop()
		f = start(t, dir)
		if f.now.identity() != st.identity() {
			t.Errorf("loaded %x %v", f.now.Cluster, f.now.Token)
		}
	}
}
