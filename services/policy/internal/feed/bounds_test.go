package feed

import (
	"testing"

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
