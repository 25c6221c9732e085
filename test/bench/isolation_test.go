package bench

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkIsolation: what a tenth of the readers costs the rest when it is frozen (SIGSTOP) or slow (one message in 200 ms).
// Rounds with and without take turns. p99-ms is that of the rest, x-without that next to the rounds without.
func BenchmarkIsolation(b *testing.B) {
	const sidecars, rate, pairs = 1000, 20, 3
	c := newChain(b)
	rest := startHerd(b, c.Stack, "rest", c.policy.Address)
	tenth := startHerd(b, c.Stack, "tenth", c.policy.Address)
	rest.do(b, order{Readers: sidecars*9/10 - 1})
	tenth.do(b, order{Readers: sidecars / 10})
	for _, kind := range []string{"frozen", "slow"} {
		b.Run(fmt.Sprintf("tenth=%s", kind), func(b *testing.B) {
			var with, without []int64
			quiet := func() int64 {
				var r round
				c.burst(b, &r, 2*rate, 2*time.Second, rest)
				slices.Sort(r.everybody)
				return atShare(r.everybody, 0.99)
			}
			c.burst(b, &round{}, rate, time.Second, rest)
			for b.Loop() {
				for range pairs {
					without = append(without, quiet())
					if kind == "frozen" {
						must(b, tenth.Freeze(within(b, startWithin)))
					} else {
						tenth.do(b, order{Slow: 200 * time.Millisecond})
					}
					c.burst(b, &round{}, rate, time.Second, rest) // until what the tenth does not read has filled its window
					with = append(with, quiet())
					if kind == "frozen" {
						must(b, tenth.Thaw(within(b, startWithin)))
					} else {
						tenth.do(b, order{Slow: -1})
					}
					c.burst(b, &round{}, 1, 100*time.Millisecond, rest, tenth)
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(millis(time.Duration(median(with))), "p99-ms")
			b.ReportMetric(millis(time.Duration(median(without))), "without-p99-ms")
			b.ReportMetric(float64(median(with))/float64(median(without)), "x-without")
		})
	}
}

// BenchmarkIdle: memory of the policy service per open stream on which nothing happens but a sidecar's question every five
// seconds. rss is all that the process holds, live what the garbage collector last found alive, with all stacks.
func BenchmarkIdle(b *testing.B) {
	c := newChain(b)
	h := startHerd(b, c.Stack, "reader", c.policy.Address)
	h.do(b, order{Readers: 1})
	live := func() float64 {
		// The collector begins again when the heap has grown by a share of itself and of the stacks (A Guide to the Go Garbage
		// Collector, "GOGC").
		stacks := metric(b, c.policy.Admin, "go_memstats_stack_inuse_bytes")
		share := metric(b, c.policy.Admin, "go_gc_gogc_percent") / 100
		return (metric(b, c.policy.Admin, "go_memstats_next_gc_bytes")-share*stacks)/(1+share) + stacks
	}
	rss0, _ := resident(b, c.policy.Pid())
	live0 := live()
	for _, streams := range []int{500, 1000, 2000} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			h.do(b, order{Readers: streams})
			var cpu, wall time.Duration
			for b.Loop() {
				begun, before := time.Now(), cpuTime(b, c.policy.Pid())
				sleepUntil(b.Context(), begun.Add(pingEvery+time.Second))
				cpu, wall = cpuTime(b, c.policy.Pid())-before, time.Since(begun)
			}
			rss, _ := resident(b, c.policy.Pid())
			b.ReportMetric(0, "ns/op")
			b.ReportMetric((rss-rss0)/1024/float64(streams-1), "rss-KiB/stream")
			b.ReportMetric((live()-live0)/1024/float64(streams-1), "live-KiB/stream")
			b.ReportMetric(metric(b, c.policy.Admin, "go_goroutines")/float64(streams), "goroutines/stream")
			b.ReportMetric(cpu.Seconds()/wall.Seconds(), "policy-cpu")
		})
	}
}
