package lastgood

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// version1 is what smallState wrote when there were no anchors.
func version1(t *testing.T) []byte { return readFile(t, "testdata", "state.v1") }

// wantVersion1 fails unless the state is that of version1.
func wantVersion1(t *testing.T, st State) {
	t.Helper()
	if st.Anchor != "" {
		t.Errorf("it has the anchor %q", st.Anchor)
	}
	st.Anchor = anchor(acknowledged)
	if d := difference(st, acknowledged); d != "" {
		t.Fatal(d)
	}
}

// TestVersion1: a state of a sidecar that knew no anchors is loaded, replaced, and continued with them.
func TestVersion1(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, version1(t), dir, fileState)
	f := open(t, dir)
	wantVersion1(t, f.now)
	f.wantMetric("load", "loaded", 1)
	f.run()
	f.wait(func() bool { return f.metric("snapshots_total", "") == 1 })
	if got := readFile(t, dir, fileState); string(got[:len(magic)]) != magic {
		t.Errorf("the file begins with %q", got[:len(magic)])
	}
	same := f.now
	same.Anchor = anchor(acknowledged)
	f.keep(same, new(Changes)) // what the first commit brings if nothing was saved since
	f.keep(f.next())
	f.stop()
	f = open(t, dir)
	f.wantLoaded(acknowledged + 1)
	f.stop()

	// A commit that comes before the file is replaced, or while it is.
	writeFile(t, version1(t), dir, fileState)
	f = open(t, dir)
	f.number = f.Keep(f.next())
	f.run()
	f.waitKept()
	f.wantMetric("current", "", 1)
	f.stop()
	f = open(t, dir)
	f.wantLoaded(acknowledged + 1)
}

// TestVersion1OnAFullDisk: it is good for as long as nothing follows on it.
func TestVersion1OnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, version1(t), dir, fileState)
	f := open(t, dir)
	if err := os.MkdirAll(filepath.Join(dir, fileNew, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.run()
	f.wait(func() bool { return f.metric("errors_total", "snapshot") > 0 })
	f.wantMetric("current", "", 1)
	f.stop()
	if got := readFile(t, dir, fileState); !bytes.Equal(got, version1(t)) {
		t.Error("the file was touched")
	}
	f = start(t, dir)
	wantVersion1(t, f.now)
	f.keep(f.next())
	f.wantMetric("current", "", 0)
	tried := f.metric("errors_total", "snapshot")
	for range 20 {
		f.keep(f.next())
	}
	if again := f.metric("errors_total", "snapshot") - tried; again > 2 { // once it is out of use, it is in no commit's way
		t.Errorf("20 commits tried %v times to replace it", again)
	}
	f.stop()
	if got := files(t, dir); got != "state.behind state.new" {
		t.Errorf("files %s", got)
	}
}

// TestVersion1Damaged: what is not what was written is refused, in a file of version 1 too, and so is a mixture of both.
func TestVersion1Damaged(t *testing.T) {
	whole, f := version1(t), scratch(t)
	for i := range whole {
		for bit := range 8 {
			whole[i] ^= 1 << bit
			if st, err := readBytes(t, f, whole); !errors.Is(err, errDamaged) {
				t.Fatalf("bit %d of octet %d: %v, %v", bit, i, st.Token, err)
			}
			whole[i] ^= 1 << bit
		}
	}
	v1, v2 := split(t, whole), split(t, smallState(t))
	for name, b := range map[string][]byte{
		"a header of version 2":           join(v1...),
		"a commit of version 1 in 2":      join(append(v2[:3:3], v1[3])...),
		"a snapshot of version 1 under 2": join(append(v1[:3:3], v2[3:]...)...),
	} {
		if st, err := readBytes(t, f, b); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v, %v", name, st.Token, err)
		}
	}
}
