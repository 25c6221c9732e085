package faults

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"
)

// mostWrong bounds what is kept of a disaster.
const mostWrong = 50

// report gathers what was seen. Its methods may be called concurrently.
type report struct {
	mu       sync.Mutex
	began    time.Time
	wrong    []string
	more     int
	counts   map[string]int64
	longest  map[string]time.Duration
	fewest   map[string]time.Duration
	progress func(string, ...any)
}

func newReport(progress func(string, ...any)) *report {
	return &report{
		began: time.Now(), counts: make(map[string]int64), longest: make(map[string]time.Duration), fewest: make(map[string]time.Duration),
		progress: progress,
	}
}

// violated notes that a promise was broken.
func (r *report) violated(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := fmt.Sprintf("%8.3f s: ", time.Since(r.began).Seconds()) + fmt.Sprintf(format, args...)
	if len(r.wrong) >= mostWrong {
		r.more++
		return
	}
	r.wrong = append(r.wrong, text)
	r.progress("VIOLATION %s", text)
}

// say logs something with its time.
func (r *report) say(format string, args ...any) {
	r.progress("%8.3f s: %s", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

func (r *report) count(what string, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts[what] += n
}

// most keeps the largest count.
func (r *report) most(what string, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts[what] = max(r.counts[what], n)
}

func (r *report) atMost(what string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.longest[what] = max(r.longest[what], d)
}

func (r *report) atLeast(what string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.fewest[what]; !ok || d < old {
		r.fewest[what] = d
	}
}

// total returns a count.
func (r *report) total(what string) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts[what]
}

// broken returns what was violated.
func (r *report) broken() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.wrong)
}

// tell logs everything, and fails the test for what is wrong.
func (r *report) tell(t *testing.T) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	t.Logf("after %v:", time.Since(r.began).Round(time.Second))
	for _, what := range slices.Sorted(maps.Keys(r.counts)) {
		t.Logf("  %-60s %12d", what, r.counts[what])
	}
	for _, what := range slices.Sorted(maps.Keys(r.longest)) {
		t.Logf("  %-60s %12v at most", what, r.longest[what].Round(time.Millisecond))
	}
	for _, what := range slices.Sorted(maps.Keys(r.fewest)) {
		t.Logf("  %-60s %12v at least", what, r.fewest[what].Round(time.Millisecond))
	}
	for _, w := range r.wrong {
		t.Errorf("violated: %s", w)
	}
	if r.more > 0 {
		t.Errorf("… and %d more violations", r.more)
	}
}
