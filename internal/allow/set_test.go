package allow

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/gaissmai/bart"
)

func mustSet(t testing.TB, nets ...string) *Set {
	t.Helper()
	l, err := RestoreList(nets)
	if err != nil {
		t.Fatal(err)
	}
	s, err := DecodeSet(l.Encode())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSetMatch(t *testing.T) {
	s := mustSet(t, "8.0.0.0/8", "8.8.0.0/16", "8.8.8.8", "9.9.9.0/24", "2a00::/16", "2a00:1450::/32", "2a00:1450::1")
	for addr, want := range map[string]string{
		"8.1.1.1": "8.0.0.0/8", "8.8.1.1": "8.8.0.0/16", "8.8.8.8": "8.8.8.8", "8.8.8.9": "8.8.0.0/16", "9.9.9.255": "9.9.9.0/24",
		"9.9.10.0": "", "9.9.8.255": "", "1.1.1.1": "", "0.0.0.0": "", "255.255.255.255": "",
		"2a00:1::": "2a00::/16", "2a00:1450:ffff::": "2a00:1450::/32", "2a00:1450::1": "2a00:1450::1", "2a01::": "", "::": "",
		"::ffff:8.8.8.8": "", "::8.8.8.8": "", "2a00:1450::1%eth0": "", "2002:808:808::1": "",
	} {
		net, ok := s.Match(netip.MustParseAddr(addr))
		got := ""
		if ok {
			got = FormatNet(net)
		}
		if got != want {
			t.Errorf("Match(%s) = %q; want %q", addr, got, want)
		}
	}
	if net, ok := s.Match(netip.Addr{}); ok || net.IsValid() {
		t.Errorf("the zero address matches %v", net)
	}
	all := mustSet(t, "0.0.0.0/0", "::/0")
	for _, addr := range []string{"0.0.0.0", "8.8.8.8", "255.255.255.255", "::", "2a00::1", "ffff::"} {
		if net, ok := all.Match(netip.MustParseAddr(addr)); !ok || net.Bits() != 0 {
			t.Errorf("%s: %v, %v", addr, net, ok)
		}
	}
}

func TestDecodeSetRefuses(t *testing.T) {
	const (
		v4  = "\x04\x08\x08\x08\x08\x20"
		v4b = "\x04\x09\x09\x09\x09\x20"
		v6  = "\x06\x2a\x00\x14\x50\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x80"
	)
	for _, tt := range []struct {
		name, in string
		want     error
	}{
		{"nothing", "", errNoNets},
		{"unknown family", "\x05\x08\x08\x08\x08\x20", errFamily},
		{"unknown family behind", v4 + "\x00", errFamily},
		{"cut off", v4[:5], errLength},
		{"cut off behind", v4 + v6[:17], errLength},
		{"IPv4 length", "\x04\x08\x08\x08\x08\x21", errBits},
		{"IPv6 length", v6[:17] + "\x81", errBits},
		{"host bits", "\x04\x08\x08\x08\x08\x18", errBits},
		{"host bits of IPv6", v6[:17] + "\x20", errBits},
		{"twice", v4 + v4, errOrder},
		{"addresses out of order", v4b + v4, errOrder},
		{"families out of order", v6 + v4, errOrder},
		{"lengths out of order", "\x04\x08\x00\x00\x00\x10" + "\x04\x08\x00\x00\x00\x08", errOrder},
		{"mapped", "\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x08\x08\x08\x08\x80", errMapped},
		{"all mapped", "\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x00\x00\x00\x00\x60", errMapped},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if s, err := DecodeSet([]byte(tt.in)); !errors.Is(err, tt.want) || s != nil {
				t.Errorf("%v, %v; want %v", s, err, tt.want)
			}
		})
	}
	if s, err := DecodeSet([]byte(v4 + v4b + v6)); err != nil || s.Len() != 3 {
		t.Errorf("%v", err)
	}
}

func TestSetKeepsItsEncoding(t *testing.T) {
	for _, n := range []int{1, 3, scanMax, scanMax + 1, 2*scanMax - 4, 2 * scanMax, 200} {
		nets := randomNets(n)
		want := encodeNets(nets)
		given := slices.Clone(want)
		s, err := DecodeSet(given)
		if err != nil {
			t.Fatal(err)
		}
		clear(given) // the set has its own copy
		many := func(v6 bool) bool {
			return len(slices.DeleteFunc(slices.Clone(nets), func(p netip.Prefix) bool { return p.Addr().Is6() != v6 })) > scanMax
		}
		if (s.table != nil) != (many(false) || many(true)) {
			t.Errorf("%d nets: table %v", n, s.table != nil)
		}
		if got := s.AppendEncoding([]byte("x")); string(got) != "x"+string(want) || s.Len() != n {
			t.Errorf("%d nets: %d, % x; want % x", n, s.Len(), got, want)
		}
	}
}

func encodeNets(nets []netip.Prefix) []byte { return List{nets}.Encode() }

// randomNets returns n different nets of the same shape for the same n, a quarter of them IPv6.
func randomNets(n int) []netip.Prefix {
	rnd := rand.New(rand.NewPCG(uint64(n), 7))
	seen := map[netip.Prefix]bool{}
	var nets []netip.Prefix
	for len(nets) < n {
		p := netip.PrefixFrom(randomAddr(rnd, rnd.IntN(4) == 0), 0)
		bits := 8 + rnd.IntN(25)
		if p.Addr().Is6() {
			bits = 16 + rnd.IntN(113)
		}
		p = netip.PrefixFrom(p.Addr(), bits).Masked()
		if !seen[p] {
			seen[p] = true
			nets = append(nets, p)
		}
	}
	return nets
}

// randomAddr returns addresses that often lie near one another.
func randomAddr(rnd *rand.Rand, v6 bool) netip.Addr {
	if v6 {
		return netip.AddrFrom16([16]byte{0x2a, byte(rnd.IntN(4)), 14: byte(rnd.IntN(4)), 15: byte(rnd.Uint32())})
	}
	return netip.AddrFrom4([4]byte{8, byte(rnd.IntN(4)), byte(rnd.IntN(4)), byte(rnd.Uint32())})
}

// probes returns addresses at and around the ends of the nets.
func probes(nets []netip.Prefix) []netip.Addr {
	var addrs []netip.Addr
	for _, p := range nets {
		first, last := p.Addr(), lastAddr(p)
		addrs = append(addrs, first, last)
		for _, a := range []netip.Addr{first.Prev(), last.Next()} {
			if a.IsValid() {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs
}

// compareMatch compares the scan, the table and the model.
func compareMatch(t *testing.T, nets []netip.Prefix, addrs []netip.Addr) {
	t.Helper()
	var ranges []modelRange
	for _, p := range nets {
		ranges = append(ranges, modelOf(p))
	}
	encoding := encodeNets(nets)
	if want := modelEncode(ranges); !bytes.Equal(encoding, want) {
		t.Fatalf("%v encoded as % x; want % x", nets, encoding, want)
	}
	scan, err := DecodeSet(encoding)
	if err != nil {
		t.Fatal(err)
	}
	scan.table = nil
	table := tableOf(t, encoding)
	for _, addr := range addrs {
		width := addr.BitLen()
		r, _ := modelNet(addr.Is6(), new(big.Int).SetBytes(addr.AsSlice()), width)
		best, ok := modelMatch(ranges, r)
		want := netip.Prefix{}
		if ok && !addr.Is4In6() {
			want = best.prefix()
		}
		for name, s := range map[string]*Set{"scan": scan, "table": table} {
			if got, ok := s.Match(addr); got != want || ok != want.IsValid() {
				t.Errorf("%s: %v in %v is %v, %v; want %v", name, addr, nets, got, ok, want)
			}
		}
	}
}

func tableOf(t testing.TB, encoding []byte) *Set {
	t.Helper()
	s, err := DecodeSet(encoding)
	if err != nil {
		t.Fatal(err)
	}
	s.table = new(bart.Lite)
	for rest := encoding; len(rest) > 0; {
		p, size, err := decodeNet(rest)
		if err != nil {
			t.Fatal(err)
		}
		s.table.Insert(p)
		rest = rest[size:]
	}
	return s
}

func TestMatchLikeModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for n := 1; n <= 80; n += 1 + n/4 {
		for range 3 {
			nets := randomNets(n)
			addrs := probes(nets)
			for i := range 50 {
				addrs = append(addrs, randomAddr(rnd, i%3 == 0))
			}
			compareMatch(t, nets, addrs)
		}
	}
}

func FuzzMatch(f *testing.F) {
	f.Add([]byte{4, 8, 8, 8, 8, 24, 4, 8, 8, 0, 0, 16, 6, 0x2a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 64}, []byte{8, 8, 8, 9})
	f.Add([]byte{4, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, []byte{255, 255, 255, 255})
	f.Add([]byte{4, 255, 255, 255, 255, 32}, []byte{255, 255, 255, 254})
	f.Add([]byte{6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 80}, []byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x08\x08\x08\x08"))
	f.Fuzz(func(t *testing.T, data, addr []byte) {
		var nets []netip.Prefix
		for len(data) > 0 {
			size := 4
			if data[0]%2 == 0 && data[0] != 4 {
				size = 16
			}
			if len(data) < size+2 {
				break
			}
			a, _ := netip.AddrFromSlice(data[1 : size+1])
			p := netip.PrefixFrom(a, int(data[size+1])%(size*8+1)).Masked()
			if data = data[size+2:]; !slices.Contains(nets, p) && !p.Addr().Is4In6() {
				nets = append(nets, p)
			}
		}
		if len(nets) == 0 {
			return
		}
		addrs := probes(nets)
		if a, ok := netip.AddrFromSlice(addr); ok {
			addrs = append(addrs, a)
		}
		compareMatch(t, nets, addrs)
	})
}

// Whatever DecodeSet accepts is what a list encodes.
func FuzzDecodeSet(f *testing.F) {
	for _, n := range []int{1, 2, 30} {
		f.Add(encodeNets(randomNets(n)))
	}
	f.Add([]byte{4, 8, 8, 8, 8, 33})
	f.Add([]byte{6})
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := DecodeSet(data)
		if err != nil {
			return
		}
		var nets []netip.Prefix
		for rest := data; len(rest) > 0; {
			p, size, err := decodeNet(rest)
			if err != nil {
				t.Fatal(err)
			}
			nets, rest = append(nets, p), rest[size:]
		}
		slices.Reverse(nets)
		if got := encodeNets(nets); !bytes.Equal(got, data) || s.Len() != len(nets) || !bytes.Equal(s.AppendEncoding(nil), data) {
			t.Errorf("% x decoded to %v", data, nets)
		}
	})
}

func TestMatchDoesNotAllocate(t *testing.T) {
	for _, n := range []int{1, scanMax, 4 * scanMax} {
		nets := randomNets(n)
		s, err := DecodeSet(encodeNets(nets))
		if err != nil {
			t.Fatal(err)
		}
		addrs := probes(nets)
		if n := testing.AllocsPerRun(10, func() {
			for _, a := range addrs {
				s.Match(a)
				Decide(s, a)
			}
		}); n != 0 {
			t.Errorf("%d nets: %v allocations", len(nets), n)
		}
	}
}

// For the race detector.
func TestSetIsSafeForConcurrentUse(t *testing.T) {
	nets := randomNets(100)
	s, err := DecodeSet(encodeNets(nets))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, a := range probes(nets) {
				s.Match(a)
				if _, err := ParseMailbox("Jürgen@Bücher.example"); err != nil {
					t.Error(err)
				}
				if _, err := (Rules{}).ParseText(a.String()); err == nil && !IsPublic(a) {
					t.Errorf("%v accepted", a)
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkMatch is where scanMax comes from: the number of nets at which a table is no slower than a scan, for addresses that
// match somewhere and for those that match nothing.
func BenchmarkMatch(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, n := range []int{1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 256} {
			nets := benchNets(n, v6)
			encoding := encodeNets(nets)
			scan, err := DecodeSet(encoding)
			if err != nil {
				b.Fatal(err)
			}
			scan.table = nil
			hits, misses := benchAddrs(nets)
			for _, bm := range []struct {
				name  string
				set   *Set
				addrs []netip.Addr
			}{
				{"scan/hit", scan, hits}, {"table/hit", tableOf(b, encoding), hits},
				{"scan/miss", scan, misses}, {"table/miss", tableOf(b, encoding), misses},
			} {
				b.Run(fmt.Sprintf("v6=%v/%d/%s", v6, n, bm.name), func(b *testing.B) {
					b.ReportAllocs()
					i := 0
					for b.Loop() {
						bm.set.Match(bm.addrs[i&1023])
						i++
					}
				})
			}
		}
	}
}

// benchNets returns n nets as an office or a provider has them, spread over the address space.
func benchNets(n int, v6 bool) []netip.Prefix {
	rnd := rand.New(rand.NewPCG(5, 6))
	nets := make([]netip.Prefix, n)
	for i := range nets {
		if v6 {
			a := [16]byte{0x2a, byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), byte(i)}
			nets[i] = netip.PrefixFrom(netip.AddrFrom16(a), 48+8*rnd.IntN(3)).Masked()
		} else {
			a := [4]byte{1 + byte(rnd.IntN(220)), byte(rnd.Uint32()), byte(i), byte(rnd.Uint32())}
			nets[i] = netip.PrefixFrom(netip.AddrFrom4(a), 24+rnd.IntN(9)).Masked()
		}
	}
	return nets
}

// benchAddrs returns 1024 addresses in the nets and 1024 just behind them, in none.
func benchAddrs(nets []netip.Prefix) (hits, misses []netip.Addr) {
	rnd := rand.New(rand.NewPCG(8, 9))
	for len(misses) < 1024 {
		last := lastAddr(nets[rnd.IntN(len(nets))])
		hits = append(hits, last)
		if next := last.Next(); !slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(next) }) {
			misses = append(misses, next)
		}
	}
	return hits[:1024], misses
}

func BenchmarkDecodeSet(b *testing.B) {
	for _, n := range []int{3, scanMax, 256} {
		encoding := encodeNets(benchNets(n, false))
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := DecodeSet(encoding); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
