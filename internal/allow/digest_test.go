package allow

import (
	"bytes"
	"crypto/sha256"
	"math/big"
	"slices"
	"testing"
)

func TestEntryDigest(t *testing.T) {
	id := mustMailbox(t, "alice@example.org").ID()
	for _, n := range []int{1, 20, 256} {
		encoding := encodeNets(randomNets(n))
		sum := sha256.Sum256(slices.Concat(id[:], encoding))
		if got := EntryDigest(id, encoding); got != Digest(sum[:16]) {
			t.Errorf("%d nets: %x; want %x", n, got, sum[:16])
		}
	}
	small := encodeNets(randomNets(3))
	if n := testing.AllocsPerRun(100, func() { EntryDigest(id, small) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzDigestArithmetic(f *testing.F) {
	full := bytes.Repeat([]byte{0xff}, 16)
	one := append(make([]byte, 15), 1)
	carry := append(append(make([]byte, 7), 1), make([]byte, 8)...)
	f.Add(full, one)
	f.Add(one, full)
	f.Add(carry, one)
	f.Add(make([]byte, 16), one)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) != 16 || len(b) != 16 {
			return
		}
		mod := new(big.Int).Lsh(big.NewInt(1), 128)
		x, y := new(big.Int).SetBytes(a), new(big.Int).SetBytes(b)
		sum := new(big.Int).Add(x, y)
		diff := new(big.Int).Sub(x, y)
		d, o := Digest(a), Digest(b)
		if got := d.Add(o); got != Digest(sum.Mod(sum, mod).FillBytes(make([]byte, 16))) {
			t.Errorf("%x + %x = %x", a, b, got)
		}
		if got := d.Sub(o); got != Digest(diff.Mod(diff, mod).FillBytes(make([]byte, 16))) {
			t.Errorf("%x - %x = %x", a, b, got)
		}
		if d.Add(o).Sub(o) != d || d.Add(o) != o.Add(d) {
			t.Errorf("%x, %x: not a sum", a, b)
		}
	})
}
