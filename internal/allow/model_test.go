package allow

import (
	"bytes"
	"math/big"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// The model says the same as the package about nets, slowly and with nothing but big numbers: an address is a number, a net
// is a range of them.

type modelRange struct {
	v6     bool
	lo, hi *big.Int
	bits   int
}

func (r modelRange) contains(o modelRange) bool {
	return r.v6 == o.v6 && r.lo.Cmp(o.lo) <= 0 && o.hi.Cmp(r.hi) <= 0
}

// and returns what r and o share.
func (r modelRange) and(o modelRange) (shared modelRange, ok bool) {
	shared = r
	if o.lo.Cmp(r.lo) > 0 {
		shared.lo = o.lo
	}
	if o.hi.Cmp(r.hi) < 0 {
		shared.hi = o.hi
	}
	return shared, r.v6 == o.v6 && shared.lo.Cmp(shared.hi) <= 0
}

func modelWidth(v6 bool) int {
	if v6 {
		return 128
	}
	return 32
}

// modelNet returns the range of a prefix and whether bits are set behind it.
func modelNet(v6 bool, addr *big.Int, bits int) (r modelRange, hostBits bool) {
	size := new(big.Int).Lsh(big.NewInt(1), uint(modelWidth(v6)-bits))
	rest := new(big.Int).Mod(addr, size)
	lo := new(big.Int).Sub(addr, rest)
	hi := new(big.Int).Sub(new(big.Int).Add(lo, size), big.NewInt(1))
	return modelRange{v6, lo, hi, bits}, rest.Sign() != 0
}

func (r modelRange) prefix() netip.Prefix {
	b := r.lo.FillBytes(make([]byte, modelWidth(r.v6)/8))
	addr, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(addr, r.bits)
}

func modelOf(p netip.Prefix) modelRange {
	r, _ := modelNet(p.Addr().Is6(), new(big.Int).SetBytes(p.Addr().AsSlice()), p.Bits())
	return r
}

type modelBlock struct {
	modelRange
	cidr   string
	reason decisionv1.NetRefusal
}

// modelBlocks and modelReachable repeat the special-purpose blocks of the product's design.
func modelBlocks() (blocks []modelBlock) {
	add := func(reason decisionv1.NetRefusal, list string) {
		for cidr := range strings.FieldsSeq(list) {
			blocks = append(blocks, modelBlock{modelParsed(cidr), cidr, reason})
		}
	}
	add(decisionv1.NetRefusal_NET_REFUSAL_PRIVATE, "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7")
	add(decisionv1.NetRefusal_NET_REFUSAL_SPECIAL, `0.0.0.0/8 127.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
		198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
		::/96 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32 2002::/16 3fff::/20
		5f00::/16 fe80::/10 fec0::/10 ff00::/8`)
	return blocks
}

const modelReachable = `192.0.0.9/32 192.0.0.10/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:3::/32 2001:4:112::/48 2001:20::/28
	2001:30::/28`

// modelParsed reads a prefix of the tables above.
func modelParsed(cidr string) modelRange {
	addr, length, _ := strings.Cut(cidr, "/")
	v6, n, ok := modelAddr(addr)
	bits, err := strconv.Atoi(length)
	if !ok || err != nil {
		panic(cidr)
	}
	r, hostBits := modelNet(v6, n, bits)
	if hostBits {
		panic(cidr)
	}
	return r
}

// modelAddr reads an address: dotted quads without leading zeros, and RFC 4291 §2.2.
func modelAddr(s string) (v6 bool, n *big.Int, ok bool) {
	if !strings.Contains(s, ":") {
		n, ok = modelQuad(s)
		return false, n, ok
	}
	left, right, gap := strings.Cut(s, "::")
	head, ok1 := modelGroups(left, !gap)
	tail, ok2 := modelGroups(right, true)
	switch {
	case !ok1 || !ok2:
		return true, nil, false
	case !gap:
		tail = nil
		if len(head) != 16 {
			return true, nil, false
		}
	case len(head)+len(tail) > 14:
		return true, nil, false
	}
	b := make([]byte, 16)
	copy(b, head)
	copy(b[16-len(tail):], tail)
	return true, new(big.Int).SetBytes(b), true
}

// modelGroups reads groups of hexadecimal digits, the last two of which may be a dotted quad.
func modelGroups(s string, quad bool) (b []byte, ok bool) {
	if s == "" {
		return nil, true
	}
	groups := strings.Split(s, ":")
	for i, g := range groups {
		if n, ok := modelQuad(g); ok && quad && i == len(groups)-1 {
			return append(b, n.FillBytes(make([]byte, 4))...), true
		}
		if g == "" || len(g) > 4 || strings.Trim(g, "0123456789abcdefABCDEF") != "" {
			return nil, false
		}
		n, _ := new(big.Int).SetString(g, 16)
		b = append(b, n.FillBytes(make([]byte, 2))...)
	}
	return b, true
}

func modelQuad(s string) (*big.Int, bool) {
	parts := strings.Split(s, ".")
	if len(parts) != 4 {
		return nil, false
	}
	n := new(big.Int)
	for _, p := range parts {
		x, err := strconv.Atoi(p)
		if err != nil || x > 255 || strconv.Itoa(x) != p {
			return nil, false
		}
		n.Add(n.Lsh(n, 8), big.NewInt(int64(x)))
	}
	return n, true
}

// modelAnswer is what the model says of an entry. Its reason is UNSPECIFIED for one that is accepted, and SYNTAX, standing for
// all faults of the form, for one that is neither an address nor in CIDR notation.
type modelAnswer struct {
	net    modelRange
	reason decisionv1.NetRefusal
	block  string
}

func modelEntry(s string, permit []modelRange) modelAnswer {
	text, length, slash := strings.Cut(s, "/")
	v6, addr, ok := modelAddr(text)
	bits := modelWidth(v6)
	if slash {
		n, err := strconv.Atoi(length)
		if err != nil || n < 0 || n > bits || strconv.Itoa(n) != length {
			ok = false
		}
		bits = n
	}
	if !ok {
		return modelAnswer{reason: decisionv1.NetRefusal_NET_REFUSAL_SYNTAX}
	}
	if v6 && new(big.Int).Rsh(addr, 32).Cmp(big.NewInt(0xffff)) == 0 {
		if bits <= 96 {
			return modelAnswer{reason: decisionv1.NetRefusal_NET_REFUSAL_SPECIAL, block: "::ffff:0:0/96"}
		}
		v6, bits = false, bits-96
		addr = new(big.Int).And(addr, big.NewInt(0xffffffff))
	}
	net, hostBits := modelNet(v6, addr, bits)
	answer := modelAnswer{net: net}
	b := modelRefused(net, permit)
	if b != nil {
		answer.reason, answer.block = b.reason, b.cidr
	}
	if (v6 && bits < 16 || !v6 && bits < 8) && (b == nil || !b.contains(net)) {
		answer.reason = decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD
	}
	if hostBits {
		answer.reason = decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET
	}
	if b != nil && !v6 && !slash {
		for n := 8; n < 32; n++ {
			if mask := new(big.Int).Lsh(big.NewInt(0xffffffff), uint(32-n)); addr.Cmp(mask.And(mask, big.NewInt(0xffffffff))) == 0 {
				answer.reason, answer.block = decisionv1.NetRefusal_NET_REFUSAL_NETMASK, ""
			}
		}
	}
	return answer
}

// modelRefused returns the first block that net may not reach into and does.
func modelRefused(net modelRange, permit []modelRange) *modelBlock {
next:
	for _, b := range modelBlocks() {
		shared, ok := net.and(b.modelRange)
		if !ok {
			continue
		}
		for _, p := range permit {
			if p.contains(shared) {
				continue next
			}
		}
		// Walk up from the lowest shared address over the globally reachable ranges, which are in ascending order.
		at := new(big.Int).Set(shared.lo)
		for cidr := range strings.FieldsSeq(modelReachable) {
			if r := modelParsed(cidr); r.v6 == net.v6 && r.lo.Cmp(at) <= 0 && at.Cmp(r.hi) <= 0 {
				at.Add(r.hi, big.NewInt(1))
			}
		}
		if at.Cmp(shared.hi) <= 0 {
			return &b
		}
	}
	return nil
}

// modelEncode is the encoding of the feed.
func modelEncode(nets []modelRange) []byte {
	var records [][]byte
	for _, n := range nets {
		r := []byte{4}
		if n.v6 {
			r[0] = 6
		}
		r = append(r, n.lo.FillBytes(make([]byte, modelWidth(n.v6)/8))...)
		records = append(records, append(r, byte(n.bits)))
	}
	slices.SortFunc(records, bytes.Compare)
	return bytes.Join(slices.CompactFunc(records, bytes.Equal), nil)
}

// modelMatch returns the longest net that contains addr.
func modelMatch(nets []modelRange, addr modelRange) (best modelRange, ok bool) {
	for _, n := range nets {
		if n.contains(addr) && (!ok || n.bits > best.bits) {
			best, ok = n, true
		}
	}
	return best, ok
}
