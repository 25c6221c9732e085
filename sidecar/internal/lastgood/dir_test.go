package lastgood

import (
	"bytes"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state")
	f := start(t, dir)
	f.wantNothing(resultAbsent, "no state on disk")
	f.keep(f.next())
	for n := 1; n < 60; n++ {
		f.wantMetric("current", "", 1)
		f.stop()
		f = start(t, dir)
		f.wantLoaded(n)
		f.keep(f.next())
	}
	if got := files(t, dir); got != "state" {
		t.Errorf("files %s", got)
	}
}

// TestEmptyState: nobody is restricted, and that is known.
func TestEmptyState(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(State{cluster, f.now.Token, "", new(index.Root)}, nil)
	f.stop()
	f = open(t, dir)
	f.wantNothing(resultDamaged, "revision 0") // no store is at revision 0
	f.stop()
	f = start(t, dir)
	st, c := f.rebuilt(7) // a Clear
	st.Index = new(index.Root)
	f.keep(st, c)
	f.stop()
	f = open(t, dir)
	if f.now.Index == nil || f.now.Index.Count() != 0 || f.now.Token != st.Token {
		t.Errorf("loaded %v", f.now)
	}
}

// TestTheSameAgain: what is on disk already is not written again.
func TestTheSameAgain(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(20))
	before := f.number
	info, err := os.Stat(filepath.Join(dir, fileState))
	if err != nil {
		t.Fatal(err)
	}
	f.keep(f.now, new(Changes))
	f.keep(f.rebuilt(20))
	f.stop()
	again, err := os.Stat(filepath.Join(dir, fileState))
	if err != nil {
		t.Fatal(err)
	}
	if f.number != before || !os.SameFile(info, again) || !again.ModTime().Equal(info.ModTime()) {
		t.Error("it was written again")
	}
	f = open(t, dir)
	if f.number = f.Keep(f.now, new(Changes)); f.number != 0 {
		t.Errorf("what was loaded got number %d", f.number)
	}
}

// TestFold folds all the time while commits go on, some without the way that led there.
func TestFold(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir)
	f.cfg.FoldAt = 100
	f.run()
	rnd := rand.New(rand.NewPCG(1, 1))
	for n := 1; n <= 2000; n++ {
		if n > 100 && rnd.IntN(100) == 0 {
			f.number = f.Keep(f.rebuilt(n))
		} else {
			f.number = f.Keep(f.next())
		}
		if rnd.IntN(3) == 0 || n%100 == 0 {
			f.waitKept()
		}
		if n%100 == 0 {
			if n == 100 && f.metric("snapshots_total", "") < 2 {
				t.Error("nothing was folded")
			}
			f.stop()
			f = open(t, dir)
			f.cfg.FoldAt = 100
			f.run()
			f.wantLoaded(n)
			if size := f.metric("snapshot_bytes", ""); size > 4000 {
				t.Fatalf("a snapshot of %v octets", size)
			}
		}
	}
	f.wait(func() bool { return f.metric("journal_bytes", "") < max(100, f.metric("snapshot_bytes", "")/4) })
}

// TestSlowDisk: as long as the disk does nothing, what waits for it is bounded.
func TestSlowDisk(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir) // and not run
	f.Keep(f.rebuilt(1))
	big := nets(1, 200)
	last := 0
	for n := 2; n < 200; n++ {
		st, c := f.next()
		for range 100 {
			c.Put(mailbox(0), []byte(big)) // and then as before
		}
		id, nets := change(n - n%mailboxes)
		if n-n%mailboxes == 0 {
			nets = ""
		}
		c.Put(id, []byte(nets))
		f.number = f.Keep(st, c)
		if size := len(f.journal); size > 2*maxChanges {
			t.Fatalf("%d octets wait", size)
		}
		last = n
	}
	if kept, _ := f.Kept(); kept != 0 {
		t.Errorf("%d is kept", kept)
	}
	f.run()
	f.waitKept()
	f.stop()
	f = open(t, dir)
	f.wantLoaded(last)
}

// TestManyChanges: too many are written as a whole state.
func TestManyChanges(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(1))
	st, c := f.next()
	for range maxChanges / 100 {
		c.Put(mailbox(1000), []byte(nets(1, 16)))
	}
	if !c.tooMany || c.entries != nil {
		t.Fatal("the changes are not bounded")
	}
	f.keep(st, c)
	f.wantMetric("snapshots_total", "", 2)
	f.stop()
	f = open(t, dir)
	f.wantLoaded(2)
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir)
	_, err := Open(Config{Path: dir, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err == nil || !strings.Contains(err.Error(), "in use by another process") || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second Open: %v", err)
	}
	f.stop()
	open(t, dir)
}

func TestPermissions(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := filepath.Join(t.TempDir(), "state")
	f := start(t, dir)
	f.keep(f.rebuilt(1))
	f.keep(f.next())
	check := func() {
		t.Helper()
		for name, mode := range map[string]fs.FileMode{"": 0o700 | fs.ModeDir, fileLock: 0o600, fileState: 0o600} {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != mode {
				t.Errorf("%q: %v, %v", name, info.Mode(), err)
			}
		}
	}
	check()
	f.stop()
	for _, name := range []string{"", fileState} { // as Kubernetes does
		if err := os.Chmod(filepath.Join(dir, name), 0o770); err != nil {
			t.Fatal(err)
		}
	}
	f = open(t, dir)
	f.wantLoaded(2)
	check()
	if _, err := Open(Config{Path: filepath.Join(dir, fileState), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()}); err == nil {
		t.Error("a file was taken for a directory")
	}
}

// TestDiskFails: what cannot be written is enforced and acknowledged, but then what is on disk is out of use.
func TestDiskFails(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	f.stop()
	f = open(t, dir)
	_ = f.file.Close()
	block := filepath.Join(dir, fileNew) // nothing new can be written either
	if err := os.MkdirAll(filepath.Join(block, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.run()
	f.keep(f.next())
	f.keep(f.next())
	f.wantMetric("current", "", 0)
	f.wantMetric("errors_total", "append", 1)
	f.wantMetric("errors_total", "spoil", 0)
	f.stop()
	if !strings.Contains(f.log.String(), "the state cannot be written to disk") {
		t.Errorf("the log does not say it:\n%s", f.log)
	}
	if got := files(t, dir); got != "state.behind state.new" {
		t.Errorf("files %s", got)
	}
	f = start(t, dir)
	f.wantNothing(resultBehind, "taken out of use")
	f.keep(f.rebuilt(13)) // fails, and is acknowledged: there is nothing older
	f.wantMetric("errors_total", "snapshot", 1)
	f.wantMetric("current", "", 0)
	if err := os.RemoveAll(block); err != nil {
		t.Fatal(err)
	}
	f.wait(func() bool { return f.metric("current", "") == 1 })
	f.keep(f.next())
	f.stop()
	if got := files(t, dir); got != "state" {
		t.Errorf("files %s", got)
	}
	f = open(t, dir)
	f.wantLoaded(14)
}

// TestNothingWorks: if what is on disk can neither be continued nor be taken out of use, nothing is acknowledged.
func TestNothingWorks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	f.stop()
	f = open(t, dir)
	_ = f.file.Close()
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	f.run()
	f.number = f.Keep(f.next())
	f.wait(func() bool { return f.metric("errors_total", "snapshot") == 1 })
	f.number = f.Keep(f.next())
	if kept, _ := f.Kept(); kept != 0 {
		t.Errorf("%d is kept", kept)
	}
	f.wantMetric("current", "", 0)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	f.waitKept() // by the next attempt
	f.wantMetric("current", "", 1)
	f.stop()
	if !strings.Contains(f.log.String(), "enforced but not acknowledged") {
		t.Errorf("the log does not say it:\n%s", f.log)
	}
	f = open(t, dir)
	f.wantLoaded(12)
}

// TestUnreadable: a state that cannot be read now may be there at the next start, so it is put aside as well.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, fileState), 0o700); err != nil {
		t.Fatal(err)
	}
	f := start(t, dir)
	f.wantNothing(resultUnreadable, "is a directory")
	f.keep(f.rebuilt(3))
	f.stop()
	if got := files(t, dir); got != "state state.damaged" {
		t.Errorf("files %s", got)
	}
	f = open(t, dir)
	f.wantLoaded(3)
}

// TestFoldFails: the journal goes on.
func TestFoldFails(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	f.stop()
	f = open(t, dir)
	f.cfg.FoldAt = 100
	if err := os.MkdirAll(filepath.Join(dir, fileNew, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.run()
	for n := 11; n < 50; n++ {
		f.keep(f.next())
	}
	f.wait(func() bool { return f.metric("errors_total", "snapshot") > 0 })
	f.wantMetric("current", "", 1)
	f.stop()
	f = open(t, dir)
	f.wantLoaded(49)
}

// TestWrong: a bit of the memory that holds the index flips. Nothing of that reaches the disk.
func TestWrong(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir)
	f.run()
	f.keep(f.rebuilt(30))
	for range 10 {
		f.keep(f.next())
	}
	set := f.now.Index.Lookup(mailbox(1))
	encoding := *(*[]byte)(unsafe.Pointer(set)) // its first field
	if !bytes.Equal(encoding, set.AppendEncoding(nil)) {
		t.Fatal("allow.Set has another layout")
	}
	encoding[3] ^= 1
	f.stop()
	was := f.now
	f = open(t, dir)
	f.wantLoaded(40)
	f.cfg.FoldAt = 1
	f.Keep(was, nil) // the index that is served, in place of the one that was just loaded
	f.take()
	f.run()
	<-f.Wrong()
	f.wantMetric("wrong_total", "", 1)
	f.stop()
	if got := f.metric("snapshots_total", ""); got != 0 {
		t.Errorf("%v snapshots were written", got)
	}
	f = start(t, dir)
	f.wantLoaded(40)
	f.keep(f.next())
}

// TestEmptyChanges: no entries, or one of a mailbox that was not restricted anyway, are a commit like any other.
func TestEmptyChanges(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	st := f.now
	st.Token.Revision = 12
	f.keep(st, new(Changes))
	c := new(Changes)
	c.Put(allow.ID{}, nil)
	st.Token.Revision = 13
	f.keep(st, c)
	f.wantMetric("snapshots_total", "", 1)
	f.stop()
	f = open(t, dir)
	if f.now.identity() != st.identity() {
		t.Errorf("loaded %v", f.now.Token)
	}
}
