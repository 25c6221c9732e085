package feed

import "testing"

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
