package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	startRounds = 3
	// crowdWithin bounds the start of a crowd.
	crowdWithin = 10 * time.Minute
)

// host is a store with many mailboxes.
type host struct {
	*stack.Stack
	mailboxes int
	client    *clientv3.Client
	policy    *stack.Policy
	readers   *herd
	sidecars  int
}

func newHost(b *testing.B, mailboxes int) *host {
	b.Helper()
	h := &host{Stack: newStack(b), mailboxes: mailboxes}
	fill(b, h.Path("etcd"), mailboxes)
	etcd, err := h.StartEtcd(b.Context(), "etcd", "")
	must(b, err)
	h.client = etcdClient(b, etcd)
	h.policy = startPolicy(b, h.Stack, stack.PolicyConfig{Etcd: etcd.Endpoint, NoCreate: true})
	h.readers = startHerd(b, h.Stack, "reader", h.policy.Address)
	return h
}

// scan is the floor of a replica's start: all records from etcd, and nothing done with them.
func (h *host) scan(b *testing.B) time.Duration {
	b.Helper()
	begun := time.Now()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	stream, err := h.client.GetStream(ctx, prefix+"mailboxes/", clientv3.WithPrefix())
	must(b, err)
	n := 0
	for chunk := range stream {
		must(b, chunk.Err())
		n += len(chunk.Kvs)
	}
	if n != h.mailboxes {
		b.Fatalf("%d records of %d", n, h.mailboxes)
	}
	return time.Since(begun)
}

// follow is the floor of a sidecar's start: a reader that takes the whole state, sums it up and keeps nothing.
func (h *host) follow(b *testing.B) time.Duration {
	b.Helper()
	return time.Duration(h.readers.do(b, order{Readers: 1, Fresh: true}).Ready[0])
}

// start starts a sidecar. It returns it and how long it took until it answered by the list of the last mailbox.
func (h *host) start(b *testing.B, cfg stack.SidecarConfig) (*stack.Sidecar, time.Duration) {
	b.Helper()
	cfg.Name = fmt.Sprintf("sidecar%d", h.sidecars)
	h.sidecars++
	begun := time.Now()
	s, err := h.StartSidecar(cfg)
	must(b, err)
	must(b, h.decides(b.Context(), s, h.mailboxes-1, nets(h.mailboxes - 1)[1]))
	return s, time.Since(begun)
}

// decides waits until a sidecar allows an address for a mailbox because of the net that is just this address, and denies another.
func (h *host) decides(ctx context.Context, s *stack.Sidecar, n int, address string) error {
	ctx, cancel := context.WithTimeout(ctx, crowdWithin)
	defer cancel()
	checks, conn, err := s.Client()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	conn.Connect()
	ask := func(ctx context.Context, address string) (*decisionv1.Decision, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		conn.ResetConnectBackoff()
		resp, err := checks.Check(ctx, &checkv1.CheckRequest{Mailbox: mailbox(n), ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP})
		return resp.GetDecision(), err
	}
	return stack.Await(ctx, func(ctx context.Context) error {
		yes, err1 := ask(ctx, address)
		no, err2 := ask(ctx, "1.1.1.1")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		if yes.GetMatchedNet() != address || no.GetVerdict() != decisionv1.Verdict_VERDICT_DENY {
			return fmt.Errorf("decisions %v and %v", yes, no)
		}
		return nil
	})
}

// touch gives a share of the mailboxes, the last ones, a list with the address, and returns how many.
func (h *host) touch(b *testing.B, percent int, address string) {
	b.Helper()
	lists, conn, err := h.PolicyClient(h.policy.Address)
	must(b, err)
	defer func() { _ = conn.Close() }()
	work := make(chan int)
	var saving sync.WaitGroup
	for range 32 {
		saving.Go(func() {
			for n := range work {
				_, err := lists.SetAllowedNets(b.Context(), &policyv1.SetAllowedNetsRequest{
					Mailbox: mailbox(n), Input: &policyv1.SetAllowedNetsRequest_Text{Text: address + ", 8.8.8.0/24, 2a00:1450::/32"},
				})
				if err != nil {
					b.Error(err)
				}
			}
		})
	}
	for n := h.mailboxes * (100 - percent) / 100; n < h.mailboxes; n++ {
		work <- n
	}
	close(work)
	saving.Wait()
}

// figures are the medians of some rounds.
type figures struct{ ready, floor []time.Duration }

func (f *figures) report(b *testing.B) {
	b.Helper()
	ready, floor := millis(median(f.ready)), millis(median(f.floor))
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ready, "ready-ms")
	b.ReportMetric(floor, "floor-ms")
	b.ReportMetric(ready/floor, "x-floor")
}

// BenchmarkStart: from the start of a process until it serves; for a sidecar until its first right answer.
//
//   - replica: a policy service that loads all records from etcd. Floor: the same read, thrown away.
//   - snapshot: a sidecar without a state, which it also writes to disk. Floor: a reader that takes the state and throws it away.
//   - disk: a sidecar with its state, while no policy service can be reached. Floor as above, also of the next.
//   - resume: a sidecar with its state, of which a hundredth has changed meanwhile, until it answers by the changes.
//   - crowd: 20 sidecars and 200 readers at once, all from nothing. ready-ms is that of the last sidecar.
func BenchmarkStart(b *testing.B) {
	sizes := []int{10_000, 100_000}
	if large() {
		sizes = append(sizes, 1_000_000)
	}
	for _, size := range sizes {
		b.Run(fmt.Sprintf("mailboxes=%d", size), func(b *testing.B) {
			h := newHost(b, size)
			b.Run("of=replica", h.startReplica)
			b.Run("of=snapshot", h.startFromNothing)
			b.Run("of=disk", h.startFromDisk)
			b.Run("of=resume", h.startAgain)
			b.Run("of=crowd", h.startCrowd)
		})
	}
}

func (h *host) startReplica(b *testing.B) {
	var f figures
	for b.Loop() {
		for range startRounds {
			f.floor = append(f.floor, h.scan(b))
			must(b, h.policy.Stop())
			begun := time.Now()
			must(b, h.policy.Restart(within(b, startWithin)))
			f.ready = append(f.ready, time.Since(begun))
		}
	}
	f.report(b)
	now, peak := resident(b, h.policy.Pid())
	b.ReportMetric(now/(1<<20), "policy-MiB")
	b.ReportMetric(peak/(1<<20), "policy-peak-MiB")
}

func (h *host) startFromNothing(b *testing.B) {
	var f figures
	var now, peak float64
	for b.Loop() {
		for range startRounds {
			f.floor = append(f.floor, h.follow(b))
			s, ready := h.start(b, stack.SidecarConfig{
				Policy: h.policy.Address, AdditionalArgs: []string{"--state-dir", h.Path(fmt.Sprintf("state%d", h.sidecars))},
			})
			f.ready = append(f.ready, ready)
			now, peak = resident(b, s.Pid())
			must(b, s.Stop())
		}
	}
	f.report(b)
	b.ReportMetric(now/(1<<20), "sidecar-MiB")
	b.ReportMetric(peak/(1<<20), "sidecar-peak-MiB")
}

// kept starts a sidecar once, so that its state is on disk, and returns the flag of its folder.
func (h *host) kept(b *testing.B) []string {
	b.Helper()
	args := []string{"--state-dir", h.Path(fmt.Sprintf("state%d", h.sidecars))}
	s, _ := h.start(b, stack.SidecarConfig{Policy: h.policy.Address, AdditionalArgs: args})
	must(b, s.Stop())
	return args
}

func (h *host) startFromDisk(b *testing.B) {
	var f figures
	nobody, err := h.FreeAddress()
	must(b, err)
	args := h.kept(b)
	for b.Loop() {
		for range startRounds {
			f.floor = append(f.floor, h.follow(b))
			s, ready := h.start(b, stack.SidecarConfig{Policy: nobody, AdditionalArgs: args})
			f.ready = append(f.ready, ready)
			must(b, s.Stop())
		}
	}
	f.report(b)
}

func (h *host) startAgain(b *testing.B) {
	var f figures
	last := h.mailboxes - 1
	defer h.touch(b, 1, nets(last)[1]) // what the others expect; the list is another
	for b.Loop() {
		for i := range startRounds {
			args := h.kept(b)
			address := fmt.Sprintf("9.9.9.%d", i)
			h.touch(b, 1, address)
			f.floor = append(f.floor, h.follow(b))
			begun := time.Now()
			s, err := h.StartSidecar(stack.SidecarConfig{Name: "again", Policy: h.policy.Address, AdditionalArgs: args})
			must(b, err)
			must(b, h.decides(b.Context(), s, last, address))
			f.ready = append(f.ready, time.Since(begun))
			must(b, s.Stop())
			h.touch(b, 1, nets(last)[1])
		}
	}
	f.report(b)
}

func (h *host) startCrowd(b *testing.B) {
	const some, readers = 20, 200
	var f figures
	var first []time.Duration
	var crowd report
	var cpu time.Duration
	for b.Loop() {
		f.floor = append(f.floor, h.follow(b))
		before := cpuTime(b, h.policy.Pid())
		must(b, h.readers.enc.Encode(order{Readers: readers, Fresh: true}))
		took := make([]time.Duration, some)
		errs := make([]error, some)
		var starting sync.WaitGroup
		sidecars := make([]*stack.Sidecar, some)
		begun := time.Now()
		for i := range some {
			var err error
			name := fmt.Sprintf("sidecar%d", h.sidecars)
			h.sidecars++
			sidecars[i], err = h.StartSidecar(stack.SidecarConfig{Name: name, Policy: h.policy.Address, AdditionalArgs: []string{"--state-dir", h.Path(name + ".state")}})
			must(b, err)
			starting.Go(func() {
				errs[i] = h.decides(b.Context(), sidecars[i], h.mailboxes-1, nets(h.mailboxes - 1)[1])
				took[i] = time.Since(begun)
			})
		}
		starting.Wait()
		must(b, errs...)
		crowd = h.readers.answer(b)
		cpu = cpuTime(b, h.policy.Pid()) - before
		f.ready = append(f.ready, slices.Max(took))
		first = append(first, slices.Min(took))
		for _, s := range sidecars {
			must(b, s.Stop())
		}
	}
	f.report(b)
	slices.Sort(crowd.Ready)
	b.ReportMetric(millis(median(first)), "first-ms")
	b.ReportMetric(millis(time.Duration(atShare(crowd.Ready, 0.5))), "readers-p50-ms")
	b.ReportMetric(millis(time.Duration(atShare(crowd.Ready, 1))), "readers-last-ms")
	b.ReportMetric(cpu.Seconds(), "policy-cpu-s")
	_, peak := resident(b, h.policy.Pid())
	b.ReportMetric(peak/(1<<20), "policy-peak-MiB")
}
