package allow

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// block is a special-purpose address block that no list may reach into.
type block struct {
	net    netip.Prefix
	reason decisionv1.NetRefusal // PRIVATE or SPECIAL
	text   string                // net and what it is for, as messages name it
}

func private(cidr, use string) block {
	return block{netip.MustParsePrefix(cidr), decisionv1.NetRefusal_NET_REFUSAL_PRIVATE, cidr + " (" + use + ")"}
}

func special(cidr, use string) block {
	return block{netip.MustParsePrefix(cidr), decisionv1.NetRefusal_NET_REFUSAL_SPECIAL, cidr + " (" + use + ")"}
}

// Sources: the IANA IPv4 and IPv6 Special-Purpose Address Registries of 2025-10-09 (RFC 6890,
// https://www.iana.org/assignments/iana-ipv4-special-registry and …/iana-ipv6-special-registry); for multicast, the
// IPv4-compatible and the site-local addresses RFC 5771, RFC 4291 and RFC 3879. Some of these blocks are globally reachable
// by the registry and refused all the same, because no client ever arrives from them. docs/semantics.md has the same table,
// and a test compares the two.
var (
	// refusedBlocks4 and refusedBlocks6 are in the order in which they are named to someone whose net overlaps several.
	refusedBlocks4 = []block{
		private("10.0.0.0/8", "private use"),
		private("172.16.0.0/12", "private use"),
		private("192.168.0.0/16", "private use"),
		private("100.64.0.0/10", "shared address space of carriers"),
		special("0.0.0.0/8", "this network"),
		special("127.0.0.0/8", "loopback"),
		special("169.254.0.0/16", "link-local"),
		special("192.0.0.0/24", "IETF protocol assignments"),
		special("192.0.2.0/24", "documentation"),
		special("192.88.99.0/24", "former 6to4 relay anycast"),
		special("198.18.0.0/15", "benchmarking"),
		special("198.51.100.0/24", "documentation"),
		special("203.0.113.0/24", "documentation"),
		special("224.0.0.0/4", "multicast"),
		special("240.0.0.0/4", "reserved"),
	}
	refusedBlocks6 = []block{
		private("fc00::/7", "unique local addresses"),
		special("::/96", "unspecified, loopback and IPv4-compatible addresses"),
		special("::ffff:0:0/96", "IPv4-mapped addresses"),
		special("64:ff9b::/96", "IPv4/IPv6 translation"),
		special("64:ff9b:1::/48", "local IPv4/IPv6 translation"),
		special("100::/64", "discard-only"),
		special("100:0:0:1::/64", "dummy prefix"),
		special("2001::/23", "IETF protocol assignments"),
		special("2001:db8::/32", "documentation"),
		special("2002::/16", "6to4"),
		special("3fff::/20", "documentation"),
		special("5f00::/16", "segment routing"),
		special("fe80::/10", "link-local"),
		special("fec0::/10", "former site-local addresses"),
		special("ff00::/8", "multicast"),
	}
	// reachableBlocks are the globally reachable blocks inside refused ones. They are accepted and count as public.
	reachableBlocks = []netip.Prefix{
		netip.MustParsePrefix("192.0.0.9/32"),
		netip.MustParsePrefix("192.0.0.10/32"),
		netip.MustParsePrefix("2001:1::1/128"),
		netip.MustParsePrefix("2001:1::2/128"),
		netip.MustParsePrefix("2001:1::3/128"),
		netip.MustParsePrefix("2001:3::/32"),
		netip.MustParsePrefix("2001:4:112::/48"),
		netip.MustParsePrefix("2001:20::/28"),
		netip.MustParsePrefix("2001:30::/28"),
	}
	mappedBlock = netip.MustParsePrefix("::ffff:0:0/96")

	specialBlocks = tableOfBlocks() // all of the above
)

func tableOfBlocks() *bart.Lite {
	t := new(bart.Lite)
	for _, b := range slices.Concat(refusedBlocks4, refusedBlocks6) {
		t.Insert(b.net)
	}
	for _, p := range reachableBlocks {
		t.Insert(p)
	}
	return t
}

// refusedBlocks returns the refused blocks of the family of addr.
func refusedBlocks(addr netip.Addr) []block {
	if addr.Is4() {
		return refusedBlocks4
	}
	return refusedBlocks6
}

// covers reports whether all of inner lies in outer. Bits of outer behind its length do not matter.
func covers(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// refusedOverlap returns the first refused block that p reaches into, unless the whole intersection lies inside one of the
// permitted nets or is made of globally reachable blocks. p is masked and not IPv4-mapped.
func refusedOverlap(p netip.Prefix, permit []netip.Prefix) (block, bool) {
next:
	for _, b := range refusedBlocks(p.Addr()) {
		if !b.net.Overlaps(p) {
			continue
		}
		// Two prefixes that overlap are nested, so their intersection is the longer one.
		both := p
		if b.net.Bits() > p.Bits() {
			both = b.net
		}
		for _, ok := range permit {
			if covers(ok, both) {
				continue next
			}
		}
		if !reachable(both) {
			return b, true
		}
	}
	return block{}, false
}

// reachable reports whether every address of p lies in a globally reachable block.
func reachable(p netip.Prefix) bool {
	overlap := false
	for _, r := range reachableBlocks {
		if covers(r, p) {
			return true
		}
		overlap = overlap || covers(p, r)
	}
	if !overlap {
		return false
	}
	// Two neighbours, such as 2001:20::/28 and 2001:30::/28, may make up p together.
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	high := netip.PrefixFrom(lastAddr(p), p.Bits()+1).Masked()
	return reachable(low) && reachable(high)
}

// IsPublic reports whether a client on the Internet can have the address: it lies in no refused block of docs/semantics.md.
func IsPublic(addr netip.Addr) bool {
	addr = addr.Unmap()
	if !addr.IsValid() || addr.Zone() != "" {
		return false
	}
	net, special := specialBlocks.LookupPrefixLPM(netip.PrefixFrom(addr, addr.BitLen()))
	return !special || slices.Contains(reachableBlocks, net)
}

// lastAddr returns the highest address of p.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}
