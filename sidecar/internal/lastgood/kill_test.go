package lastgood

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	childDir  = "ALLOWEDNETS_TEST_STATE_DIR" // makes TestChild a process to be killed
	killTimes = "ALLOWEDNETS_TEST_KILLS"     // how often; if unset 100, or 1,000 with ALLOWEDNETS_E2E=required
)

// TestChild is the process to be killed: it continues the history in a directory, folds often, and prints each revision that
// may be acknowledged.
func TestChild(t *testing.T) {
	dir := os.Getenv(childDir)
	if dir == "" {
		t.Skip("this is the other process of TestKilled")
	}
	d, err := Open(Config{Path: dir, FoldAt: 500, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	s := newSource()
	if st, w := d.Loaded(); w != nil {
		s = &source{w, st}
	}
	go func() { _ = d.Run(t.Context()) }()
	for {
		var number uint64
		for range 1 + rand.IntN(5) {
			if rand.IntN(50) == 0 {
				number = d.Keep(s.rebuilt(int(s.now.Token.Revision) + 1))
			} else {
				number = d.Keep(s.next())
			}
		}
		for {
			kept, changed := d.Kept()
			if kept >= number {
				break
			}
			<-changed
		}
		if _, err := fmt.Fprintln(os.Stdout, s.now.Token.Revision); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKilled kills a process in mid-write again and again. Everything that it acknowledged is there, and nothing else than a
// state that it handed over.
func TestKilled(t *testing.T) {
	times := 100
	if os.Getenv("ALLOWEDNETS_E2E") == "required" {
		times = 1000
	}
	if s := os.Getenv(killTimes); s != "" {
		var err error
		if times, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	acknowledged, commits := 0, 0
	for i := range times {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), childDir+"="+dir, "GOMAXPROCS=2")
		stderr := new(strings.Builder)
		cmd.Stderr = stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(stdout)
		// Some die before they say anything, others after some commits, and at any moment of the next one.
		for range rand.IntN(12) {
			if acknowledged, err = readRevision(lines, acknowledged); err != nil {
				t.Fatalf("%v\n%s", err, stderr)
			}
		}
		<-time.After(rand.N(3 * time.Millisecond))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for {
			last, err := readRevision(lines, acknowledged)
			if err != nil {
				break
			}
			acknowledged = last
		}
		_ = cmd.Wait()

		f := open(t, dir)
		if f.now.Index == nil && acknowledged == 0 {
			f.wantNothing(resultAbsent, "")
			f.stop()
			continue
		}
		n := int(f.now.Token.Revision)
		if n < acknowledged {
			t.Fatalf("kill %d: revision %d was acknowledged, but %d is there\n%s", i, acknowledged, n, f.log)
		}
		f.wantLoaded(n)
		f.stop()
		commits += n - acknowledged
		acknowledged = n
	}
	t.Logf("%d kills, %d revisions, of which %d were written but not yet acknowledged", times, acknowledged, commits)
}

func readRevision(r *bufio.Reader, last int) (int, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return last, io.EOF // a line that was cut off was not said
	}
	n, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || n <= last {
		return last, fmt.Errorf("revision %q after %d", line, last)
	}
	return n, nil
}
