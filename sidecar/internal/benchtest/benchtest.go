// Package benchtest compares what we made with floors that see the same machine at the same time.
package benchtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Side is one of the things that are compared.
type Side struct {
	// Name is "" for ours; metrics of a floor begin with its name, and ours over it is the metric x-NAME.
	Name string
	// Round does the thing some times, and returns how often. If times is not nil, it notes how long each of them took.
	Round func(times *Times) int
	// PID is the process that does the work, if it is another one; 0: its CPU time is not reported.
	PID int
}

// Times are durations of single calls, in nanoseconds; of more than it has room for, the last ones.
type Times struct {
	ns []uint32
	at int
}

// room is for the durations of one side. What is kept must not grow while it is measured: that would be work for the garbage
// collector.
const room = 1 << 21

// Add notes a duration. It does not allocate.
func (t *Times) Add(d time.Duration) {
	t.ns[t.at%room] = uint32(min(d, 1<<32-1))
	t.at++
}

// sorted ends the use of t.
func (t *Times) sorted() []uint32 {
	ns := t.ns[:min(t.at, room)]
	slices.Sort(ns)
	return ns
}

// Rounds is how Compare measures.
type Rounds struct {
	// Timed is whether the ratio comes from rounds in which each call is timed. A call of which the clock would be a good part
	// has rounds for the ratio and rounds for the quantiles.
	Timed bool
	// PerSecond is the unit of how many there were in a second; "": this is not reported.
	PerSecond string
}

// Compare runs a round of each side by turns, beginning with another one each time, until the benchmark has lasted long enough.
// It reports the quantiles of a call of each side, and the mean CPU time of a call in another process. x-NAME is the median of the
// rounds' ratios of the first side to another; x-NAME-q1 and x-NAME-q3 are their quartiles.
func Compare(b *testing.B, how Rounds, sides ...Side) {
	b.Helper()
	type measured struct {
		times  Times
		each   []float64 // nanoseconds of a call, by round
		calls  int
		lasted time.Duration
		cpu    time.Duration
	}
	all := make([]measured, len(sides))
	for i := range all {
		all[i].times.ns = make([]uint32, room)
		all[i].each = make([]float64, 0, 1<<16)
	}
	round := func(i int, times *Times) (int, time.Duration) {
		began := time.Now()
		n := sides[i].Round(times)
		return n, time.Since(began)
	}
	for first := 0; b.Loop(); first++ {
		for i := range sides {
			i = (i + first) % len(sides)
			m := &all[i]
			var times *Times
			if how.Timed {
				times = &m.times
			}
			cpu := cpuOf(sides[i].PID)
			n, took := round(i, times)
			m.cpu += cpuOf(sides[i].PID) - cpu
			m.each = append(m.each, float64(took)/float64(n))
			m.calls, m.lasted = m.calls+n, m.lasted+took
			if !how.Timed {
				round(i, &m.times)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // that of a round of all
	for i, s := range sides {
		m := &all[i]
		prefix := ""
		if s.Name != "" {
			prefix = s.Name + "-"
			ratios := make([]float64, len(m.each))
			for j, each := range m.each {
				ratios[j] = all[0].each[j] / each
			}
			slices.Sort(ratios)
			b.ReportMetric(quantile(ratios, 0.5), "x-"+s.Name)
			b.ReportMetric(quantile(ratios, 0.25), "x-"+s.Name+"-q1")
			b.ReportMetric(quantile(ratios, 0.75), "x-"+s.Name+"-q3")
		}
		ns := m.times.sorted()
		for _, q := range []float64{50, 99, 99.9} {
			b.ReportMetric(float64(quantile(ns, q/100)), fmt.Sprintf("%sp%v-ns", prefix, q))
		}
		if s.PID != 0 {
			b.ReportMetric(float64(m.cpu)/float64(m.calls), prefix+"server-cpu-ns")
		}
		if how.PerSecond != "" {
			b.ReportMetric(float64(m.calls)/m.lasted.Seconds(), prefix+how.PerSecond)
		}
	}
}

// cpuOf is the CPU time that the threads of a process took so far; 0 where the kernel does not tell. It sees less of what else
// the machine does than the time of day.
func cpuOf(pid int) (sum time.Duration) {
	if pid == 0 {
		return 0
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread ended
		}
		running, _, _ := strings.Cut(string(text), " ")
		ns, _ := strconv.ParseInt(running, 10, 64)
		sum += time.Duration(ns)
	}
	return sum
}

// quantile is of sorted values.
func quantile[T any](sorted []T, q float64) T { return sorted[int(q*float64(len(sorted)-1))] }
