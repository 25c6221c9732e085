package allow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/gaissmai/bart"
)

// scanMax is the largest number of nets of one family that is scanned; above it a table is built. BenchmarkMatch: a table is the
// faster one from about 16 nets on. It also takes kilobytes where a scan needs only the encoding, and there may be hundreds
// of thousands of sets.
const scanMax = 16

// Octets of a net in the encoding: family, address, prefix length.
const (
	record4 = 1 + 4 + 1
	record6 = 1 + 16 + 1
)

// Set answers which net of a list contains an address. It is immutable.
type Set struct {
	// encoding is both what AppendEncoding returns and what a scan reads. It is sorted, so of all the nets that contain
	// an address the longest comes last.
	encoding []byte
	ipv4     int // how many octets of it are IPv4 nets
	table    *bart.Lite
}

// DecodeSet reads the encoding that [List.Encode] writes, of at least one net. Anything else, such as nets out of order,
// is an error.
func DecodeSet(encoding []byte) (*Set, error) {
	s := &Set{encoding: append(make([]byte, 0, len(encoding)), encoding...)}
	var last netip.Prefix
	var n4, n6 int
	for rest := s.encoding; len(rest) > 0; {
		p, size, err := decodeNet(rest)
		if err != nil {
			return nil, fmt.Errorf("net %d: %w", n4+n6, err)
		}
		if n4+n6 > 0 && compareNets(last, p) >= 0 {
			return nil, fmt.Errorf("net %d: %v after %v: %w", n4+n6, p, last, errOrder)
		}
		if size == record4 {
			n4++
		} else {
			n6++
		}
		last, rest = p, rest[size:]
	}
	if n4+n6 == 0 {
		return nil, errNoNets
	}
	s.ipv4 = n4 * record4
	if n4 > scanMax || n6 > scanMax {
		s.table = new(bart.Lite)
		for rest := s.encoding; len(rest) > 0; {
			p, size, _ := decodeNet(rest)
			s.table.Insert(p)
			rest = rest[size:]
		}
	}
	return s, nil
}

var (
	errNoNets = errors.New("no nets")
	errFamily = errors.New("unknown address family")
	errLength = errors.New("cut off")
	errBits   = errors.New("prefix length out of range or bits set behind it")
	errMapped = errors.New("IPv4 net in IPv6 form")
	errOrder  = errors.New("nets out of order or twice")
)

// Len returns the number of nets.
func (s *Set) Len() int { return s.ipv4/record4 + (len(s.encoding)-s.ipv4)/record6 }

// AppendEncoding appends what the set was decoded from.
func (s *Set) AppendEncoding(b []byte) []byte { return append(b, s.encoding...) }

// Match returns the longest net that contains addr. An address with a zone, or an IPv4 address in IPv6 form, is in none.
// It does not allocate.
func (s *Set) Match(addr netip.Addr) (netip.Prefix, bool) {
	switch {
	case addr.Is4():
		if s.table != nil {
			return s.table.LookupPrefixLPM(netip.PrefixFrom(addr, 32))
		}
		return s.scan4(addr)
	case addr.Is6() && !addr.Is4In6() && addr.Zone() == "":
		if s.table != nil {
			return s.table.LookupPrefixLPM(netip.PrefixFrom(addr, 128))
		}
		return s.scan6(addr)
	}
	return netip.Prefix{}, false
}

func (s *Set) scan4(addr netip.Addr) (netip.Prefix, bool) {
	a := addr.As4()
	want := binary.BigEndian.Uint32(a[:])
	for i := s.ipv4; i >= record4; i -= record4 {
		r := s.encoding[i-record4 : i]
		bits := r[record4-1]
		if (want^binary.BigEndian.Uint32(r[1:]))>>(32-bits) == 0 {
			return netip.PrefixFrom(addr, int(bits)).Masked(), true
		}
	}
	return netip.Prefix{}, false
}

func (s *Set) scan6(addr netip.Addr) (netip.Prefix, bool) {
	a := addr.As16()
	high, low := binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:])
	for i := len(s.encoding); i > s.ipv4; i -= record6 {
		r := s.encoding[i-record6 : i]
		bits := r[record6-1]
		// Shifts by 64 and more yield 0.
		h := high ^ binary.BigEndian.Uint64(r[1:])
		if bits <= 64 {
			if h>>(64-bits) != 0 {
				continue
			}
		} else if h != 0 || (low^binary.BigEndian.Uint64(r[9:]))>>(128-bits) != 0 {
			continue
		}
		return netip.PrefixFrom(addr, int(bits)).Masked(), true
	}
	return netip.Prefix{}, false
}

// appendNet appends the encoding of a masked net.
func appendNet(b []byte, p netip.Prefix) []byte {
	if p.Addr().Is4() {
		a := p.Addr().As4()
		b = append(append(b, 4), a[:]...)
	} else {
		a := p.Addr().As16()
		b = append(append(b, 6), a[:]...)
	}
	return append(b, byte(p.Bits()))
}

// decodeNet reads the first net of an encoding and returns how many octets it took.
func decodeNet(b []byte) (p netip.Prefix, size int, err error) {
	var addr netip.Addr
	switch {
	case b[0] != 4 && b[0] != 6:
		return netip.Prefix{}, 0, errFamily
	case b[0] == 4 && len(b) >= record4:
		addr, size = netip.AddrFrom4([4]byte(b[1:])), record4
	case b[0] == 6 && len(b) >= record6:
		addr, size = netip.AddrFrom16([16]byte(b[1:])), record6
	default:
		return netip.Prefix{}, 0, errLength
	}
	p = netip.PrefixFrom(addr, int(b[size-1]))
	if !p.IsValid() || p != p.Masked() {
		return netip.Prefix{}, 0, errBits
	}
	if addr.Is4In6() {
		return netip.Prefix{}, 0, errMapped
	}
	return p, size, nil
}

// compareNets is the order of the encoding: by family, address and prefix length. p and o are masked.
func compareNets(p, o netip.Prefix) int { return p.Compare(o) }
