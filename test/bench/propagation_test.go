package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/test/stack"
)

// people have a list each. No mailbox is saved again while a save of it is under way.
const people = 1000

// chain is what a save goes through: etcd, one policy service, one sidecar, and beside them a floor.
type chain struct {
	*stack.Stack
	policy  *stack.Policy
	sidecar *stack.Sidecar
	lists   policyv1.PolicyServiceClient
	checks  checkv1.CheckServiceClient
	floor   *floor
	saves   int // so far; each has a net of its own
}

// newChain starts everything. The sidecar keeps its state on disk, as it should.
func newChain(b *testing.B) *chain {
	b.Helper()
	c := &chain{Stack: newStack(b)}
	etcd, err := c.StartEtcd(b.Context(), "etcd", "")
	must(b, err)
	client := etcdClient(b, etcd)
	c.policy = startPolicy(b, c.Stack, stack.PolicyConfig{Etcd: etcd.Endpoint})
	lists, conn, err := c.PolicyClient(c.policy.Address)
	must(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	c.lists = lists
	c.sidecar, err = c.StartSidecar(stack.SidecarConfig{Policy: c.policy.Address, AdditionalArgs: []string{"--state-dir", c.Path("state")}})
	must(b, err)
	must(b, c.sidecar.AwaitReady(within(b, startWithin)))
	checks, socket, err := c.sidecar.Client()
	must(b, err)
	b.Cleanup(func() { _ = socket.Close() })
	c.checks = checks

	var filling sync.WaitGroup
	for part := range 8 {
		filling.Go(func() {
			for i := part; i < people; i += 8 {
				if _, err := c.set(b.Context(), i, "9.9.9.9"); err != nil {
					b.Error(err)
				}
			}
		})
	}
	filling.Wait()
	got, err := client.Get(b.Context(), logKey)
	must(b, err)
	c.floor = newFloor(b, etcd, client, len(got.Kvs[0].Value))
	return c
}

// set saves the list of the n-th mailbox and returns the revision.
func (c *chain) set(ctx context.Context, n int, nets string) (revision.Token, error) {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	resp, err := c.lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
		Mailbox: fmt.Sprintf("user%04d@example.com", n%people),
		Input:   &policyv1.SetAllowedNetsRequest_Text{Text: nets},
		Actor:   &policyv1.Actor{Id: "admin@example.com"},
	})
	if err != nil {
		return revision.Token{}, err
	}
	return revision.Parse(resp.GetAllowedNets().GetRevision())
}

// enforced is a save and how long after it was due it was acknowledged, and the sidecar decided by it.
type enforced struct {
	save
	saved, took time.Duration
}

// nthNet is a net that no other save of a run has.
func nthNet(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(n >> 16), byte(n >> 8), byte(n)}), 32)
}

// save saves a list of three nets, one of them new, and waits until the sidecar allows an address for that net.
func (c *chain) save(ctx context.Context, n int, due time.Time) (enforced, error) {
	net := nthNet(n)
	token, err := c.set(ctx, n, net.Addr().String()+", 8.8.0.0/16, 2a00:1450::/32")
	if err != nil {
		return enforced{}, err
	}
	saved := time.Since(due)
	req := &checkv1.CheckRequest{
		Mailbox: fmt.Sprintf("user%04d@example.com", n%people), ClientAddress: net.Addr().String(),
		Service: decisionv1.Service_SERVICE_IMAP, MinRevision: token.String(),
	}
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	for {
		resp, err := c.checks.Check(ctx, req)
		if status.Code(err) == codes.Unavailable { // it waited for 50 ms
			continue
		}
		if err != nil {
			return enforced{}, err
		}
		took := time.Since(due)
		if d := resp.GetDecision(); d.GetVerdict() != decisionv1.Verdict_VERDICT_ALLOW || d.GetMatchedNet() != net.Addr().String() {
			return enforced{}, fmt.Errorf("save %d at %s is not enforced: %v", n, token, d)
		}
		return enforced{save: save{Revision: token.Revision, Due: due.UnixNano()}, saved: saved, took: took}, nil
	}
}

// burst carries out n actions, evenly over a time, whether or not earlier ones have ended.
func burst(ctx context.Context, n int, over time.Duration, do func(i int, due time.Time) error) error {
	errs := make([]error, n)
	var acting sync.WaitGroup
	begun := time.Now()
	for i := range n {
		due := begun.Add(over * time.Duration(i) / time.Duration(n))
		sleepUntil(ctx, due)
		acting.Go(func() { errs[i] = do(i, due) })
	}
	acting.Wait()
	sleepUntil(ctx, begun.Add(over))
	return errors.Join(errs...)
}

func sleepUntil(ctx context.Context, t time.Time) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Until(t)):
	}
}

// floor is a bare etcd put of the size of a save's newest log, until a watch shows it.
type floor struct {
	client *clientv3.Client
	value  []byte
	puts   int

	mu   sync.Mutex
	due  map[uint64]time.Time
	took chan time.Duration
}

func newFloor(b *testing.B, etcd *stack.Etcd, client *clientv3.Client, size int) *floor {
	b.Helper()
	f := &floor{client: client, value: make([]byte, size), due: make(map[uint64]time.Time), took: make(chan time.Duration, 1000)}
	ctx, cancel := context.WithCancel(b.Context())
	watcher := etcdClient(b, etcd)
	watch := watcher.Watch(ctx, "/floor")
	var watching sync.WaitGroup
	watching.Go(func() {
		for resp := range watch {
			now := time.Now()
			for _, e := range resp.Events {
				f.mu.Lock()
				f.took <- now.Sub(f.due[binary.BigEndian.Uint64(e.Kv.Value)])
				f.mu.Unlock()
			}
		}
	})
	b.Cleanup(watching.Wait)
	b.Cleanup(cancel)
	return f
}

// burst puts n values over a time and returns how long after they were due the watch showed them.
func (f *floor) burst(ctx context.Context, n int, over time.Duration) ([]time.Duration, error) {
	first := f.puts
	f.puts += n
	err := burst(ctx, n, over, func(i int, due time.Time) error {
		value := slices.Clone(f.value)
		binary.BigEndian.PutUint64(value, uint64(first+i))
		f.mu.Lock()
		f.due[uint64(first+i)] = due
		f.mu.Unlock()
		_, err := f.client.Put(ctx, "/floor", string(value))
		return err
	})
	took := make([]time.Duration, 0, n)
	for range n {
		select {
		case t := <-f.took:
			took = append(took, t)
		case <-time.After(startWithin):
			return nil, errors.Join(err, errors.New("the watch shows nothing"))
		}
	}
	return took, err
}

// round is what some bursts of saves showed.
type round struct {
	saved     []time.Duration // until the save was acknowledged
	sidecar   []time.Duration // until the real sidecar decided by a save
	everybody []int64         // the same with the herds, in nanoseconds
	last      []int64         // of each save until it was enforced everywhere
	commits   int             // that the herds verified
	floor     []time.Duration
	wall, cpu time.Duration // of the bursts, and the policy service's in them
}

// burst saves n lists over a time and waits until everybody has them.
func (c *chain) burst(b *testing.B, r *round, n int, over time.Duration, herds ...*herd) {
	b.Helper()
	first := c.saves
	c.saves += n
	got := make([]enforced, n)
	begun, before := time.Now(), cpuTime(b, c.policy.Pid())
	must(b, burst(b.Context(), n, over, func(i int, due time.Time) (err error) {
		got[i], err = c.save(b.Context(), first+i, due)
		return err
	}))
	r.wall += time.Since(begun)
	saves := make([]save, n)
	for i, e := range got {
		r.saved = append(r.saved, e.saved)
		r.sidecar = append(r.sidecar, e.took)
		r.everybody = append(r.everybody, int64(e.took))
		saves[i] = e.save
	}
	slices.SortFunc(got, func(a, b enforced) int { return int(a.Revision - b.Revision) })
	last := make([]int64, n)
	for i, e := range got {
		last[i] = int64(e.took)
	}
	for _, h := range herds {
		must(b, h.enc.Encode(order{Saves: saves}))
	}
	for _, h := range herds {
		rep := h.answer(b)
		r.everybody = append(r.everybody, rep.Latencies...)
		r.commits += rep.Commits
		for i, l := range rep.Last {
			last[i] = max(last[i], l)
		}
	}
	r.cpu += cpuTime(b, c.policy.Pid()) - before
	r.last = append(r.last, last...)
}

// report sorts, and shows the figures in milliseconds.
func (r *round) report(b *testing.B) {
	b.Helper()
	slices.Sort(r.sidecar)
	slices.Sort(r.everybody)
	slices.Sort(r.floor)
	ms := func(d int64) float64 { return millis(time.Duration(d)) }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ms(atShare(r.everybody, 0.5)), "p50-ms")
	b.ReportMetric(ms(atShare(r.everybody, 0.99)), "p99-ms")
	b.ReportMetric(ms(median(r.last)), "last-p50-ms")
	b.ReportMetric(millis(median(r.saved)), "saved-p50-ms")
	b.ReportMetric(millis(atShare(r.floor, 0.5)), "floor-p50-ms")
	b.ReportMetric(millis(atShare(r.floor, 0.99)), "floor-p99-ms")
	b.ReportMetric(millis(atShare(r.sidecar, 0.5))/millis(atShare(r.floor, 0.5)), "x-floor")
	b.ReportMetric(r.cpu.Seconds()/r.wall.Seconds(), "policy-cpu")
}

// BenchmarkPropagation: from the moment at which a save is due until it is enforced, at the real sidecar by a Check that is
// answered by the new list, at the readers by a verified commit. The floor takes turns with the saves.
//
// One sidecar is real, the others are readers. x-floor is the real one's median next to the floor's. last-p50-ms is the median
// until a save was enforced everywhere. policy-cpu is in processors.
func BenchmarkPropagation(b *testing.B) {
	c := newChain(b)
	h := startHerd(b, c.Stack, "reader", c.policy.Address)
	for _, sidecars := range []int{1, 100, 1000, 2000} {
		for _, rate := range []int{1, 10, 100} {
			if sidecars == 2000 && rate == 1 {
				continue
			}
			b.Run(fmt.Sprintf("sidecars=%d/rate=%d", sidecars, rate), func(b *testing.B) {
				var herds []*herd
				if sidecars > 1 {
					herds = []*herd{h}
					h.do(b, order{Readers: sidecars - 1})
				}
				// One save and one write of the floor share a second, or seconds of them take turns.
				turns, over := 5, time.Second
				if rate == 1 {
					turns, over = 6, time.Second/2
				}
				var r round
				c.burst(b, &round{}, rate, over, herds...) // what the herd saw while it grew
				for b.Loop() {
					for range turns {
						c.burst(b, &r, rate, over, herds...)
						took, err := c.floor.burst(b.Context(), rate, over)
						must(b, err)
						r.floor = append(r.floor, took...)
					}
				}
				r.report(b)
				if r.commits > 0 {
					b.ReportMetric(float64(r.cpu.Microseconds())/float64(r.commits), "policy-us/commit")
					b.ReportMetric(float64(r.commits)/float64(len(r.last)*(sidecars-1)), "commits/save")
				}
				rss, _ := resident(b, c.policy.Pid())
				b.ReportMetric(rss/(1<<20), "policy-MiB")
			})
		}
	}
}
