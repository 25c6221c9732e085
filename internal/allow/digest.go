package allow

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
)

// Digest is a number modulo 2^128, big-endian. The digest of a state is the sum of the digests of its restricted
// mailboxes, so both ends of the feed can keep it up to date without looking at more than what changes.
type Digest [16]byte

// EntryDigest returns the first 16 octets of SHA-256(id ‖ encoding), where encoding is that of [List.Encode].
func EntryDigest(id ID, encoding []byte) Digest {
	var small [512]byte
	b := append(small[:0], id[:]...)
	sum := sha256.Sum256(append(b, encoding...))
	return Digest(sum[:16])
}

// Add returns d + o modulo 2^128.
func (d Digest) Add(o Digest) Digest {
	dh, dl := d.words()
	oh, ol := o.words()
	low, carry := bits.Add64(dl, ol, 0)
	high, _ := bits.Add64(dh, oh, carry)
	return digestOf(high, low)
}

// Sub returns d - o modulo 2^128.
func (d Digest) Sub(o Digest) Digest {
	dh, dl := d.words()
	oh, ol := o.words()
	low, borrow := bits.Sub64(dl, ol, 0)
	high, _ := bits.Sub64(dh, oh, borrow)
	return digestOf(high, low)
}

func (d Digest) words() (high, low uint64) {
	return binary.BigEndian.Uint64(d[:8]), binary.BigEndian.Uint64(d[8:])
}

func digestOf(high, low uint64) (d Digest) {
	binary.BigEndian.PutUint64(d[:8], high)
	binary.BigEndian.PutUint64(d[8:], low)
	return d
}
