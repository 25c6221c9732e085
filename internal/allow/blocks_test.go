package allow

import (
	"net/netip"
	"slices"
	"testing"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// Every special-purpose block: the block, its first and last address, what surrounds it and its neighbours.
func TestBlocks(t *testing.T) {
	const (
		private = decisionv1.NetRefusal_NET_REFUSAL_PRIVATE
		special = decisionv1.NetRefusal_NET_REFUSAL_SPECIAL
		broad   = decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD
	)
	// before and after are the neighbouring addresses and, where they are refused too, the block they lie in. outer is the
	// net of twice the size, why it is refused and for which block.
	for _, tt := range []struct {
		block         string
		reason        decisionv1.NetRefusal
		first, last   string
		before        string
		beforeBlock   string
		after         string
		afterBlock    string
		outer         string
		outerReason   decisionv1.NetRefusal
		outerBlock    string
		firstAsIPv4In string // the first and last address are IPv4 addresses in IPv6 form, in these blocks
		lastAsIPv4In  string
	}{
		{block: "10.0.0.0/8", reason: private, first: "10.0.0.0", last: "10.255.255.255", before: "9.255.255.255", after: "11.0.0.0", outer: "10.0.0.0/7", outerReason: broad},
		{block: "172.16.0.0/12", reason: private, first: "172.16.0.0", last: "172.31.255.255", before: "172.15.255.255", after: "172.32.0.0", outer: "172.0.0.0/11", outerReason: private},
		{block: "192.168.0.0/16", reason: private, first: "192.168.0.0", last: "192.168.255.255", before: "192.167.255.255", after: "192.169.0.0", outer: "192.168.0.0/15", outerReason: private},
		{block: "100.64.0.0/10", reason: private, first: "100.64.0.0", last: "100.127.255.255", before: "100.63.255.255", after: "100.128.0.0", outer: "100.0.0.0/9", outerReason: private},
		{block: "0.0.0.0/8", reason: special, first: "0.0.0.0", last: "0.255.255.255", after: "1.0.0.0", outer: "0.0.0.0/7", outerReason: broad},
		{block: "127.0.0.0/8", reason: special, first: "127.0.0.0", last: "127.255.255.255", before: "126.255.255.255", after: "128.0.0.0", outer: "126.0.0.0/7", outerReason: broad},
		{block: "169.254.0.0/16", reason: special, first: "169.254.0.0", last: "169.254.255.255", before: "169.253.255.255", after: "169.255.0.0", outer: "169.254.0.0/15", outerReason: special},
		{block: "192.0.0.0/24", reason: special, first: "192.0.0.0", last: "192.0.0.255", before: "191.255.255.255", after: "192.0.1.0", outer: "192.0.0.0/23", outerReason: special},
		{block: "192.0.2.0/24", reason: special, first: "192.0.2.0", last: "192.0.2.255", before: "192.0.1.255", after: "192.0.3.0", outer: "192.0.2.0/23", outerReason: special},
		{block: "192.88.99.0/24", reason: special, first: "192.88.99.0", last: "192.88.99.255", before: "192.88.98.255", after: "192.88.100.0", outer: "192.88.98.0/23", outerReason: special},
		{block: "198.18.0.0/15", reason: special, first: "198.18.0.0", last: "198.19.255.255", before: "198.17.255.255", after: "198.20.0.0", outer: "198.16.0.0/14", outerReason: special},
		{block: "198.51.100.0/24", reason: special, first: "198.51.100.0", last: "198.51.100.255", before: "198.51.99.255", after: "198.51.101.0", outer: "198.51.100.0/23", outerReason: special},
		{block: "203.0.113.0/24", reason: special, first: "203.0.113.0", last: "203.0.113.255", before: "203.0.112.255", after: "203.0.114.0", outer: "203.0.112.0/23", outerReason: special},
		{block: "224.0.0.0/4", reason: special, first: "224.0.0.0", last: "239.255.255.255", before: "223.255.255.255", after: "240.0.0.0", afterBlock: "240.0.0.0/4", outer: "224.0.0.0/3", outerReason: broad},
		{block: "240.0.0.0/4", reason: special, first: "240.0.0.0", last: "255.255.255.255", before: "239.255.255.255", beforeBlock: "224.0.0.0/4", outer: "224.0.0.0/3", outerReason: broad, outerBlock: "224.0.0.0/4"},

		{block: "fc00::/7", reason: private, first: "fc00::", last: "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "fe00::", outer: "fc00::/6", outerReason: broad},
		{block: "::/96", reason: special, first: "::", last: "::ffff:ffff", after: "::1:0:0", outer: "::/95", outerReason: special},
		{block: "::ffff:0.0.0.0/96", reason: special, first: "::ffff:0:0", firstAsIPv4In: "0.0.0.0/8", last: "::ffff:255.255.255.255", lastAsIPv4In: "240.0.0.0/4", before: "::fffe:ffff:ffff", after: "::1:0:0:0", outer: "::fffe:0:0/95", outerReason: special},
		{block: "64:ff9b::/96", reason: special, first: "64:ff9b::", last: "64:ff9b::ffff:ffff", before: "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", after: "64:ff9b::1:0:0", outer: "64:ff9b::/95", outerReason: special},
		{block: "64:ff9b:1::/48", reason: special, first: "64:ff9b:1::", last: "64:ff9b:1:ffff:ffff:ffff:ffff:ffff", before: "64:ff9b:0:ffff:ffff:ffff:ffff:ffff", after: "64:ff9b:2::", outer: "64:ff9b::/47", outerReason: special, outerBlock: "64:ff9b::/96"},
		{block: "100::/64", reason: special, first: "100::", last: "100::ffff:ffff:ffff:ffff", before: "ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "100:0:0:1::", afterBlock: "100:0:0:1::/64", outer: "100::/63", outerReason: special},
		{block: "100:0:0:1::/64", reason: special, first: "100:0:0:1::", last: "100::1:ffff:ffff:ffff:ffff", before: "100::ffff:ffff:ffff:ffff", beforeBlock: "100::/64", after: "100:0:0:2::", outer: "100::/63", outerReason: special, outerBlock: "100::/64"},
		{block: "2001::/23", reason: special, first: "2001::", last: "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", before: "2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "2001:200::", outer: "2001::/22", outerReason: special},
		{block: "2001:db8::/32", reason: special, first: "2001:db8::", last: "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", before: "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", after: "2001:db9::", outer: "2001:db8::/31", outerReason: special},
		{block: "2002::/16", reason: special, first: "2002::", last: "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "2003::", outer: "2002::/15", outerReason: broad},
		{block: "3fff::/20", reason: special, first: "3fff::", last: "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", before: "3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "3fff:1000::", outer: "3fff::/19", outerReason: special},
		{block: "5f00::/16", reason: special, first: "5f00::", last: "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "5eff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "5f01::", outer: "5f00::/15", outerReason: broad},
		{block: "fe80::/10", reason: special, first: "fe80::", last: "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", after: "fec0::", afterBlock: "fec0::/10", outer: "fe80::/9", outerReason: broad},
		{block: "fec0::/10", reason: special, first: "fec0::", last: "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", beforeBlock: "fe80::/10", after: "ff00::", afterBlock: "ff00::/8", outer: "fe80::/9", outerReason: broad, outerBlock: "fe80::/10"},
		{block: "ff00::/8", reason: special, first: "ff00::", last: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", before: "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", beforeBlock: "fec0::/10", outer: "fe00::/7", outerReason: broad, outerBlock: "fe80::/10"},
	} {
		t.Run(tt.block, func(t *testing.T) {
			refused := func(entry string, reason decisionv1.NetRefusal, block string) {
				t.Helper()
				p := onlyProblem(t, Rules{}, entry)
				if p.Refusal != reason || p.Block.String() != block {
					t.Errorf("%s: %v, block %v; want %v, %s", entry, p.Refusal, p.Block, reason, block)
				}
				checkProblem(t, Rules{}, p)
			}
			address := func(addr, block string) {
				t.Helper()
				if addr == "" {
					return
				}
				if public := IsPublic(netip.MustParseAddr(addr)); public != (block == "") {
					t.Errorf("IsPublic(%s) = %v", addr, public)
				}
				if block != "" {
					refused(addr, reasonOf(t, block), block)
				} else if _, err := (Rules{}).ParseEntries([]string{addr}); err != nil {
					t.Error(err)
				}
			}
			orBlock := func(other string) string {
				if other == "" {
					return tt.block
				}
				return other
			}
			refused(tt.block, tt.reason, tt.block)
			refused(tt.outer, tt.outerReason, orBlock(tt.outerBlock))
			address(tt.first, orBlock(tt.firstAsIPv4In))
			address(tt.last, orBlock(tt.lastAsIPv4In))
			address(tt.before, tt.beforeBlock)
			address(tt.after, tt.afterBlock)
		})
	}
}

func reasonOf(t *testing.T, cidr string) decisionv1.NetRefusal {
	t.Helper()
	for _, b := range modelBlocks() {
		if b.prefix().String() == cidr {
			return b.reason
		}
	}
	t.Fatalf("%s is no block", cidr)
	return 0
}

// The first, last and neighbouring addresses of the globally reachable blocks inside refused ones.
func TestReachableBlocks(t *testing.T) {
	for _, tt := range []struct{ block, last, before, after string }{
		{"192.0.0.9/32", "192.0.0.9", "192.0.0.8", ""},
		{"192.0.0.10/32", "192.0.0.10", "", "192.0.0.11"},
		{"2001:1::1/128", "2001:1::1", "2001:1::", ""},
		{"2001:1::2/128", "2001:1::2", "", ""},
		{"2001:1::3/128", "2001:1::3", "", "2001:1::4"},
		{"2001:3::/32", "2001:3:ffff:ffff:ffff:ffff:ffff:ffff", "2001:2:ffff:ffff:ffff:ffff:ffff:ffff", "2001:4::"},
		{"2001:4:112::/48", "2001:4:112:ffff:ffff:ffff:ffff:ffff", "2001:4:111:ffff:ffff:ffff:ffff:ffff", "2001:4:113::"},
		{"2001:20::/28", "2001:2f:ffff:ffff:ffff:ffff:ffff:ffff", "2001:1f:ffff:ffff:ffff:ffff:ffff:ffff", ""},
		{"2001:30::/28", "2001:3f:ffff:ffff:ffff:ffff:ffff:ffff", "", "2001:40::"},
	} {
		p := netip.MustParsePrefix(tt.block)
		for _, s := range []string{tt.block, p.Addr().String(), tt.last} {
			if _, err := (Rules{}).ParseEntries([]string{s}); err != nil {
				t.Error(err)
			}
		}
		if !IsPublic(p.Addr()) || !IsPublic(netip.MustParseAddr(tt.last)) {
			t.Errorf("%s is not public", tt.block)
		}
		for _, s := range []string{tt.before, tt.after} {
			if s == "" {
				continue
			}
			if p := onlyProblem(t, Rules{}, s); p.Refusal != decisionv1.NetRefusal_NET_REFUSAL_SPECIAL {
				t.Errorf("%s: %v", s, p.Refusal)
			}
			if IsPublic(netip.MustParseAddr(s)) {
				t.Errorf("%s is public", s)
			}
		}
	}
}

func TestIsPublic(t *testing.T) {
	for s, want := range map[string]bool{
		"8.8.8.8": true, "::ffff:8.8.8.8": true, "::ffff:10.0.0.1": false, "2a00::1": true, "2a00::1%eth0": false, "4000::1": true,
		"2002:808:808::1": false, "2001:0:808:808::1": false, "64:ff9b::808:808": false, "172.0.0.1": true, "192.31.196.1": true,
	} {
		if got := IsPublic(netip.MustParseAddr(s)); got != want {
			t.Errorf("IsPublic(%s) = %v", s, got)
		}
	}
	if IsPublic(netip.Addr{}) {
		t.Error("the zero address is public")
	}
}

// The tables hold what the design lists, no more and no less.
func TestBlocksAreComplete(t *testing.T) {
	var got, want []string
	for _, b := range slices.Concat(refusedBlocks4, refusedBlocks6) {
		got = append(got, b.net.String()+" "+b.reason.String())
	}
	for _, b := range modelBlocks() {
		want = append(want, b.prefix().String()+" "+b.reason.String())
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("blocks %v; want %v", got, want)
	}
}
