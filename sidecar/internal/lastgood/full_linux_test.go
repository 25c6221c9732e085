package lastgood

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// smallDisk mounts a file system of 64 KiB. Where that cannot be done, the test is skipped, unless ALLOWEDNETS_E2E=required.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=700"); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but a tmpfs cannot be mounted: %v", err)
		}
		t.Skipf("NOT TESTED on a full disk: a tmpfs cannot be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
	return dir
}

// fill leaves no room for another page, and returns a function that makes room again.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for {
		if _, err := f.Write(make([]byte, os.Getpagesize())); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiskFull: a full disk, a restart on it, and room again.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t)
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	free := fill(t, dir)
	for f.metric("errors_total", "append") == 0 {
		f.keep(f.next())
	}
	f.keep(f.next())
	n := int(f.now.Token.Revision)
	f.wantMetric("current", "", 0)
	f.stop()
	if !strings.Contains(f.log.String(), "no space left") {
		t.Errorf("the log does not say why:\n%s", f.log)
	}

	f = start(t, dir)
	f.wantNothing(resultBehind, "taken out of use")
	f.keep(f.rebuilt(n + 1))
	f.keep(f.next())
	f.wantMetric("current", "", 0)
	free()
	f.wait(func() bool { return f.metric("current", "") == 1 })
	f.keep(f.next())
	f.stop()

	f = open(t, dir)
	f.wantLoaded(n + 3)
	if got := files(t, dir); got != "state" {
		t.Errorf("files %s", got)
	}
	f.stop()
}

// TestReadOnlyDisk: a disk that failed and can only be read still has what was acknowledged; nothing more is acknowledged.
func TestReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t)
	f := start(t, dir)
	f.keep(f.rebuilt(10))
	f.stop()
	remount := func(flags uintptr) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(syscall.MS_RDONLY)
	f = start(t, dir)
	f.wantLoaded(10)
	f.number = f.Keep(f.next())
	f.wait(func() bool { return f.metric("errors_total", "spoil") == 1 })
	if kept, _ := f.Kept(); kept != 0 {
		t.Errorf("%d is kept", kept)
	}
	remount(0)
	f.waitKept()
	f.stop()
	f = open(t, dir)
	f.wantLoaded(11)
	f.stop()
}
