package benchtest

import (
	"math"
	"runtime"
	"runtime/metrics"
	"testing"
	"time"
)

const cycles = "/gc/cycles/total:gc-cycles"

// Cycles is how many cycles of the garbage collector are over.
func Cycles() uint64 {
	s := []metrics.Sample{{Name: cycles}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// Collector reports what the garbage collector does while f runs, which lasts some cycles: its cycles, the CPU time that it takes of all there is
// (gc-cpu-%, as the runtime estimates it), and its pauses.
func Collector(b *testing.B, f func()) {
	b.Helper()
	const cpu, pauses = "/cpu/classes/gc/total:cpu-seconds", "/sched/pauses/total/gc:seconds"
	read := func() (s [3]metrics.Sample) {
		s[0].Name, s[1].Name, s[2].Name = cycles, cpu, pauses
		metrics.Read(s[:])
		return s
	}
	runtime.GC() // the runtime brings its accounts up to date at the end of a cycle
	before, began := read(), time.Now()
	f()
	took := time.Since(began)
	after := read()
	b.ReportMetric(float64(after[0].Value.Uint64()-before[0].Value.Uint64())/took.Seconds(), "gc-cycles/s")
	b.ReportMetric(100*(after[1].Value.Float64()-before[1].Value.Float64())/took.Seconds()/float64(runtime.GOMAXPROCS(0)), "gc-cpu-%")
	h := after[2].Value.Float64Histogram()
	total := uint64(0)
	for i, n := range before[2].Value.Float64Histogram().Counts {
		h.Counts[i] -= n
		total += h.Counts[i]
	}
	for _, q := range []struct {
		unit string
		q    float64
	}{{"gc-pause-p50-ns", 0.5}, {"gc-pause-p99-ns", 0.99}, {"gc-pause-max-ns", 1}} {
		seen := uint64(0)
		for i, n := range h.Counts {
			if seen += n; float64(seen) >= q.q*float64(total) {
				top := h.Buckets[i+1]
				if math.IsInf(top, 1) {
					top = h.Buckets[i]
				}
				b.ReportMetric(top*1e9, q.unit)
				break
			}
		}
	}
}
