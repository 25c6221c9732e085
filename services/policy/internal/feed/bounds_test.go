package feed

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// TestBounds: the mirror keeps to the bounds it is given (its own tests show that); here are those that feed.proto promises
// and that gRPC sets.
func TestBounds(t *testing.T) {
	const promised, received, perEntry = 4096, 4 << 20, 64 // octets around an entry's nets
	if batchEntries > promised {
		t.Errorf("%d entries, %d are promised", batchEntries, promised)
	}
	if largest := batchBytes + 4096*18 + batchEntries*perEntry; largest > received {
		t.Errorf("a message of %d octets, %d are received", largest, received)
	}
}

// TestEntriesAllocateTogether: what a thousand sidecars at once want to start from must not be a thousand times a heap full of
// small pieces.
func TestEntriesAllocateTogether(t *testing.T) {
	batch := make([]*store.Entry, batchEntries)
	for i := range batch {
		batch[i] = &store.Entry{Encoding: []byte{4, 192, 0, 2, 1, 32}}
	}
	if n := testing.AllocsPerRun(10, func() { entries(batch) }); n > 2 {
		t.Errorf("%v allocations for %d entries; want 2", n, len(batch))
	}
}

// TestPace: a commit waits for the acknowledgement of the one before, but not for long, and always for its turn among all streams:
// a replica that is so busy that acknowledgements are late must not send more for it.
func TestPace(t *testing.T) {
	const never = time.Hour
	for name, c := range map[string]struct {
		open        int64
		acked, want time.Duration
	}{
		"few streams":                {open: 100, want: 10 * time.Millisecond},
		"few, acknowledged later":    {open: 100, acked: 50 * time.Millisecond, want: 50 * time.Millisecond},
		"few, not acknowledged":      {open: 100, acked: never, want: ackPatience},
		"many streams":               {open: 5000, want: 500 * time.Millisecond},
		"many, acknowledged later":   {open: 5000, acked: 300 * time.Millisecond, want: 500 * time.Millisecond},
		"many, not acknowledged":     {open: 5000, acked: never, want: 500 * time.Millisecond},
		"as many as patience covers": {open: 2000, acked: never, want: ackPatience},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &stream{acked: make(chan struct{}, 1), open: new(atomic.Int64)}
				st.open.Store(c.open)
				begun := time.Now()
				sent := &commit{revision: 1, at: begun}
				st.sent.Store(sent)
				acknowledgement := time.AfterFunc(c.acked, func() {
					sent.acked.Store(true)
					replace(st.acked, struct{}{})
				})
				defer acknowledgement.Stop()
				synctest.Wait()
				changed := make(chan struct{})
				close(changed)
				if err := st.wait(t.Context(), store.Batch{Head: true, Changed: changed}); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(begun); took != c.want {
					t.Errorf("after %v; want %v", took, c.want)
				}
			})
		})
	}
}
