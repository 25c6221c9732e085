// Package bench measures the product at the size of a large mail host: real etcd, real policy service, real sidecars. Where
// thousands of sidecars are needed, a herd of readers stands in for most: each follows the feed on a connection of its own,
// verifies every commit by count and digest, acknowledges it, asks for its age like a sidecar, and keeps nothing else.
//
// Every benchmark alternates with a floor in the same run and reports figures of its own; ns/op is left out. One iteration is one
// round of fixed length. BENCH_LARGE=1 adds what takes more than two minutes.
package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/allowednets/allowednets/test/stack"
)

func TestMain(m *testing.M) {
	if os.Getenv(herdSocket) != "" {
		if err := runHerd(); err != nil {
			fmt.Fprintln(os.Stderr, "herd:", err)
			os.Exit(1) //nolint:forbidigo // it is the herd's main
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// startWithin bounds the start of anything on a busy machine.
const startWithin = time.Minute

// large reports whether what takes minutes is wanted.
func large() bool { return os.Getenv("BENCH_LARGE") != "" }

func must(tb testing.TB, errs ...error) {
	tb.Helper()
	if err := errors.Join(errs...); err != nil {
		tb.Fatal(err)
	}
}

func within(tb testing.TB, d time.Duration) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), d)
	tb.Cleanup(cancel)
	return ctx
}

// newStack prepares a stack that ends with the benchmark.
func newStack(tb testing.TB) *stack.Stack {
	tb.Helper()
	root, err := stack.Root()
	must(tb, err)
	dir, err := os.MkdirTemp("", "bench-") // b.TempDir is too long for unix sockets
	must(tb, err)
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	must(tb, err)
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Errorf("stopping: %v", err)
		}
		if tb.Failed() {
			tb.Logf("logs are in %s", dir)
			return
		}
		must(tb, os.RemoveAll(dir))
	})
	return s
}

// startPolicy starts a policy service on an etcd and waits until it is ready.
func startPolicy(tb testing.TB, s *stack.Stack, cfg stack.PolicyConfig) *stack.Policy {
	tb.Helper()
	p, err := s.StartPolicy(cfg)
	must(tb, err)
	must(tb, p.AwaitReady(within(tb, startWithin)))
	return p
}

// etcdClient returns a client that ends with the benchmark.
func etcdClient(tb testing.TB, etcd *stack.Etcd) *clientv3.Client {
	tb.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{etcd.Endpoint}, DialTimeout: 5 * time.Second, MaxCallRecvMsgSize: 64 << 20, Logger: zap.NewNop(),
	})
	must(tb, err)
	tb.Cleanup(func() { _ = client.Close() })
	must(tb, stack.Await(within(tb, startWithin), func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := client.Get(ctx, "any")
		return err
	}))
	return client
}

// cpuTime is the processor time a process has used, to 10 ms. Source: proc(5), fields 14 and 15 of stat.
func cpuTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(tb, err)
	_, rest, _ := strings.Cut(string(stat), ") ") // the name may hold spaces
	fields := strings.Fields(rest)
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		must(tb, err)
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}

// resident is the memory of a process in octets; peak is its most so far.
func resident(tb testing.TB, pid int) (now, peak float64) {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(tb, err)
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "VmRSS:" && fields[0] != "VmHWM:" {
			continue
		}
		kib, err := strconv.ParseFloat(fields[1], 64)
		must(tb, err)
		if fields[0] == "VmRSS:" {
			now = kib * 1024
		} else {
			peak = kib * 1024
		}
	}
	return now, peak
}

// metric reads a metric without labels from an admin port.
func metric(tb testing.TB, admin, name string) float64 {
	tb.Helper()
	req, err := http.NewRequestWithContext(within(tb, 10*time.Second), http.MethodGet, "http://"+admin+"/metrics", nil)
	must(tb, err)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	must(tb, err)
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	must(tb, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			must(tb, err)
			return v
		}
	}
	tb.Fatalf("%s has no metric %s", admin, name)
	return 0
}

// atShare returns the value that a share q of sorted values do not exceed; 0 of none.
func atShare[T cmp.Ordered](sorted []T, q float64) T {
	if len(sorted) == 0 {
		var none T
		return none
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// median sorts its values.
func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return atShare(values, 0.5)
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
