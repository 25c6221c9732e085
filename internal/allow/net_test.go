package allow

import (
	"errors"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

func TestParseNetAccepts(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"8.8.8.8", "8.8.8.8"},
		{"8.8.8.8/32", "8.8.8.8"},
		{"8.8.8.0/24", "8.8.8.0/24"},
		{"8.0.0.0/8", "8.0.0.0/8"},
		{"172.0.0.1", "172.0.0.1"},
		{"::ffff:8.8.8.8", "8.8.8.8"},
		{"::FFFF:808:808", "8.8.8.8"},
		{"::ffff:8.8.8.8/128", "8.8.8.8"},
		{"::ffff:8.8.8.0/120", "8.8.8.0/24"},
		{"::ffff:8.0.0.0/104", "8.0.0.0/8"},
		{"2A00:1450:0:0:0:0:0:1", "2a00:1450::1"},
		{"2a00:1450::1/128", "2a00:1450::1"},
		{"2a00:1450::/32", "2a00:1450::/32"},
		{"2a00:1450::8.8.8.8", "2a00:1450::808:808"},
		{"2a00::/16", "2a00::/16"},
		// Globally reachable blocks, in refused ones and elsewhere.
		{"192.0.0.9", "192.0.0.9"},
		{"192.0.0.10", "192.0.0.10"},
		{"192.31.196.0/24", "192.31.196.0/24"},
		{"192.52.193.0/24", "192.52.193.0/24"},
		{"192.175.48.0/24", "192.175.48.0/24"},
		{"2001:1::1", "2001:1::1"},
		{"2001:1::2/127", "2001:1::2/127"},
		{"2001:3::/32", "2001:3::/32"},
		{"2001:3:1::/48", "2001:3:1::/48"},
		{"2001:4:112::/48", "2001:4:112::/48"},
		{"2001:20::/27", "2001:20::/27"},
		{"2001:30::/28", "2001:30::/28"},
		{"2620:4f:8000::/48", "2620:4f:8000::/48"},
	} {
		l, err := Rules{}.ParseEntries([]string{tt.in})
		if err != nil || !slices.Equal(l.Strings(), []string{tt.want}) {
			t.Errorf("%q: %v, %v; want %s", tt.in, l.Strings(), err, tt.want)
		}
	}
}

// docs/semantics.md has more of these, tested by TestDocumentedRefusals.
func TestParseNetRefuses(t *testing.T) {
	const (
		syntax   = decisionv1.NetRefusal_NET_REFUSAL_SYNTAX
		host     = decisionv1.NetRefusal_NET_REFUSAL_HOSTNAME
		port     = decisionv1.NetRefusal_NET_REFUSAL_PORT
		zone     = decisionv1.NetRefusal_NET_REFUSAL_ZONE
		mask     = decisionv1.NetRefusal_NET_REFUSAL_NETMASK
		wildcard = decisionv1.NetRefusal_NET_REFUSAL_WILDCARD
		rng      = decisionv1.NetRefusal_NET_REFUSAL_RANGE
		hostBits = decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET
		private  = decisionv1.NetRefusal_NET_REFUSAL_PRIVATE
		special  = decisionv1.NetRefusal_NET_REFUSAL_SPECIAL
		broad    = decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD
	)
	for _, tt := range []struct {
		in          string
		reason      decisionv1.NetRefusal
		block       string
		suggestions string
		fault       string // part of the message
	}{
		{"8.8.8.0/255.255.255.0", mask, "", "8.8.8.0/24", "/24"},
		{"8.8.8.8/255.255.255.0", mask, "", "8.8.8.8 8.8.8.0/24", "/24"},
		{"8.8.8.0/0.0.0.255", mask, "", "8.8.8.0/24", "/24"},
		{"8.8.8.0/255.0.255.0", mask, "", "", "gaps"},
		{"8.8.8.0/255.255.253.0", mask, "", "", "gaps"},
		{"8.8.8.8/0.0.0.0", mask, "", "8.8.8.8", "netmask"},
		{"10.0.0.0/255.0.0.0", mask, "10.0.0.0/8", "", "private use"},
		{"2a00:1450::/ffff:ffff::", mask, "", "2a00:1450::/32", "/32"},
		{"8.8.8.0 255.255.255.0", mask, "", "8.8.8.0/24", "/24"},
		{"8.8.8.8\t255.255.255.255", mask, "", "8.8.8.8", "/32"},
		{"8.8.8.0 0.0.0.255", mask, "", "8.8.8.0/24", "/24"},
		{"255.255.255.0", mask, "", "", "is a netmask"},
		{"255.0.0.0", mask, "", "", "is a netmask"},
		{"255.255.255.255", special, "240.0.0.0/4", "", "reserved"},
		{"254.0.0.0", special, "240.0.0.0/4", "", "reserved"},

		{"8.8.8.*", wildcard, "", "8.8.8.0/24", "wildcards"},
		{"8.8.8.x", wildcard, "", "8.8.8.0/24", "wildcards"},
		{"8.8.X.XXX", wildcard, "", "8.8.0.0/16", "wildcards"},
		{"8.8.*", wildcard, "", "8.8.0.0/16", "wildcards"},
		{"8.*", wildcard, "", "8.0.0.0/8", "wildcards"},
		{"8.8.x", wildcard, "", "", "wildcards"},
		{"8.8.8.?", wildcard, "", "8.8.8.0/24", "wildcards"},
		{"8.8.8.1?", wildcard, "", "", "wildcards"},
		{"8.*.8.8", wildcard, "", "", "wildcards"},
		{"8.8.8.*.*", wildcard, "", "", "wildcards"},
		{"*", wildcard, "", "", "wildcards"},
		{"*.*.*.*", wildcard, "", "", "wildcards"},
		{"10.1.*.*", wildcard, "10.0.0.0/8", "", "private use"},
		{"8.8.8.*/24", wildcard, "", "8.8.8.0/24", "wildcards"},
		{"8.8.8.*:443", wildcard, "", "", "wildcards"},
		{"2a00:1450:*", wildcard, "", "2a00:1450::/32", "wildcards"},
		{"2a00:1450:*:*:*:*:*:*", wildcard, "", "2a00:1450::/32", "wildcards"},
		{"2a00:1450::*", wildcard, "", "", "wildcards"},

		{"8.8.8.1-8.8.8.9", rng, "", "8.8.8.1 8.8.8.2/31 8.8.8.4/30 8.8.8.8/31", "range"},
		{"8.8.8.1–8.8.8.9", rng, "", "8.8.8.1 8.8.8.2/31 8.8.8.4/30 8.8.8.8/31", "range"},
		{"8.8.8.1 - 8.8.8.9", rng, "", "8.8.8.1 8.8.8.2/31 8.8.8.4/30 8.8.8.8/31", "range"},
		{"8.8.8.1-9", rng, "", "8.8.8.1 8.8.8.2/31 8.8.8.4/30 8.8.8.8/31", "range"},
		{"8.8.8.0-9.255", rng, "", "8.8.8.0/23", "range"},
		{"8.8.8.8-8.8.8.8", rng, "", "8.8.8.8", "range"},
		{"8.8.8.0/24-8.8.9.0/24", rng, "", "8.8.8.0/23", "range"},
		{"8.0.0.0-9.255.255.255", rng, "", "8.0.0.0/8 9.0.0.0/8", "range"},
		{"::ffff:8.8.8.1-::ffff:8.8.8.3", rng, "", "8.8.8.1 8.8.8.2/31", "range"},
		{"2a00::1-2a00::4", rng, "", "2a00::1 2a00::2/127 2a00::4", "range"},
		{"2a00::1-4", rng, "", "2a00::1 2a00::2/127 2a00::4", "range"},
		{"8.8.8.9-8.8.8.1", rng, "", "", "ends before it begins"},
		{"8.8.8.1-300", rng, "", "", "range"},
		{"8.8.8.0/24-25", rng, "", "", "range"},
		{"8.8.8.8-2a00::1", rng, "", "", "range"},
		{"8.8.1-3.0", rng, "", "", "range"},
		{"8.8.1-3.0/24", rng, "", "", "range"},
		{"0.0.0.0-255.255.255.255", rng, "", "", "more than 32"},
		{"8.8.8.1-200.1.1.1", rng, "", "", "more than 32"},
		{"10.0.0.1-10.0.0.9", rng, "10.0.0.0/8", "", "private use"},
		{"9.255.255.0-10.0.0.9", rng, "10.0.0.0/8", "", "10.0.0.0/29 in it lies in"},
		{"8.8.8.1-", syntax, "", "", "not an IP address"},
		{"-8.8.8.1", syntax, "", "", "not an IP address"},
		{"-", syntax, "", "", "not an IP address"},

		{"8.8.8.8:443", port, "", "8.8.8.8", "port"},
		{"8.8.8.8:imaps", port, "", "8.8.8.8", "port"},
		{"8.8.8.0/24:443", port, "", "8.8.8.0/24", "port"},
		{"8.8.8.8/24:443", port, "", "8.8.8.8 8.8.8.0/24", "port"},
		{"8.8.8.0:443/24", port, "", "8.8.8.0/24", "port"},
		{"10.0.0.1:443", port, "10.0.0.0/8", "", "private use"},
		{"[2a00::1]:443", port, "", "2a00::1", "port"},
		{"[8.8.8.8]:443", port, "", "8.8.8.8", "port"},
		{"2a00:1450:1:2:3:4:5:6:443", port, "", "2a00:1450:1:2:3:4:5:6", "port"},
		{"https://8.8.8.8:8443/x", port, "", "8.8.8.8", "port"},

		{"2a00::1%eth0", zone, "", "2a00::1", "zone"},
		{"2a00::%eth0/32", zone, "", "2a00::/32", "zone"},
		{"[2a00::1%eth0]:443", zone, "", "2a00::1", "zone"},
		{"fe80::1%eth0", zone, "fe80::/10", "", "link-local"},
		{"8.8.8.8%eth0", zone, "", "8.8.8.8", "zone"},

		{"example.com", host, "", "", "name"},
		{"mail.example.com:993", host, "", "", "name"},
		{"*.example.com", host, "", "", "name"},
		{"example.com/24", host, "", "", "name"},
		{"https://example.com/x", host, "", "", "name"},
		{"bücher.example", host, "", "", "name"},
		{"ec2-8-8-8-8.example.com.", host, "", "", "name"},
		{"localhost", host, "", "", "name"},
		{"8.8.8.8.example.com", host, "", "", "name"},
		{`"example.com"`, host, "", "", "name"},

		{"008.008.008.008", syntax, "", "8.8.8.8", "leading zeros"},
		{"8.8.8.08", syntax, "", "8.8.8.8", "leading zeros"},
		{"008.8.8.0/24", syntax, "", "8.8.8.0/24", "leading zeros"},
		{"010.0.0.1", syntax, "10.0.0.0/8", "", "leading zeros"},
		{"8.8.8.0/024", syntax, "", "8.8.8.0/24", "leading zeros"},
		{"8.8.8.8/", syntax, "", "8.8.8.8", "nothing behind the slash"},
		{"8.8.8.8/33", syntax, "", "", "8 to 32"},
		{"8.8.8.8/-1", syntax, "", "", "8 to 32"},
		{"8.8.8.8/+8", syntax, "", "", "8 to 32"},
		{"8.8.8.8/24/24", syntax, "", "", "8 to 32"},
		{"8.8.8.8/99999999999999999999", syntax, "", "", "8 to 32"},
		{"2a00::/129", syntax, "", "", "16 to 128"},
		{"8.8.8.0 /24", syntax, "", "8.8.8.0/24", "white space"},
		{"8.8.8.0\u00a0/\u00a024", syntax, "", "8.8.8.0/24", "white space"},
		{"10.0.0.0 /8", syntax, "10.0.0.0/8", "", "white space"},
		{"8.8.8/24", syntax, "", "8.8.8.0/24", "only 3"},
		{"8/8", syntax, "", "8.0.0.0/8", "only 1"},
		{"8.8.8", syntax, "", "", "only 3"},
		{"8.8.8.8.8", syntax, "", "", "more than"},
		{"8.8.8.256", syntax, "", "", "0 to 255"},
		{"300.1.1.1/24", syntax, "", "", "0 to 255"},
		{"134744072", syntax, "", "", "0 to 255"},
		{"0x08080808", syntax, "", "", "not an IP address"},
		{"8.8.8.8.", syntax, "", "8.8.8.8", "other characters"},
		{`"8.8.8.8"`, syntax, "", "8.8.8.8", "other characters"},
		{`["8.8.8.0/24"`, syntax, "", "8.8.8.0/24", "other characters"},
		{"[2a00::1]", syntax, "", "2a00::1", "brackets"},
		{"[2a00::]/32", syntax, "", "2a00::/32", "brackets"},
		{"https://8.8.8.8/", syntax, "", "8.8.8.8", "web address"},
		{"https://10.0.0.1/", syntax, "10.0.0.0/8", "", "web address"},
		{"8.8.\u200b8.8", syntax, "", "8.8.8.8", "U+200B"},
		{"8.8.8.8\x00", syntax, "", "8.8.8.8", "U+0000"},
		{"8.8.8.\xff8", syntax, "", "8.8.8.8", "U+FFFD"},
		{"8.8.8.8 8.8.4.4", syntax, "", "", "more than one thing"},
		{"8.8.8.8,8.8.4.4", syntax, "", "", "more than one thing"},
		{"2a00::1::2", syntax, "", "", "not an IP address"},
		{"2a00:1450", syntax, "", "", "not an IP address"},
		{"alice@example.com", syntax, "", "", "not an IP address"},
		{"#", syntax, "", "", "not an IP address"},
		{strings.Repeat("8.8.8.8", 50), syntax, "", "", "too long"},

		{"8.8.8.8/24", hostBits, "", "8.8.8.8 8.8.8.0/24", "inside the network 8.8.8.0/24"},
		{"2a00::1/32", hostBits, "", "2a00::1 2a00::/32", "inside the network"},
		{"172.1.2.3/8", hostBits, "172.16.0.0/12", "172.1.2.3", "172.16.0.0/12"},
		{"10.1.2.3/8", hostBits, "10.0.0.0/8", "", "private use"},
		{"8.8.8.8/0", hostBits, "10.0.0.0/8", "8.8.8.8", "broader than /8"},
		{"::ffff:8.8.8.8/120", hostBits, "", "8.8.8.8 8.8.8.0/24", "inside the network 8.8.8.0/24"},

		{"10.0.0.1", private, "10.0.0.0/8", "", "lies in 10.0.0.0/8"},
		{"::ffff:10.0.0.1", private, "10.0.0.0/8", "", "lies in 10.0.0.0/8"},
		{"172.0.0.0/8", private, "172.16.0.0/12", "", "contains 172.16.0.0/12"},
		{"fd00::/16", private, "fc00::/7", "", "lies in fc00::/7"},
		{"192.0.0.8/30", special, "192.0.0.0/24", "", "lies in 192.0.0.0/24"},
		{"192.88.0.0/16", special, "192.88.99.0/24", "", "contains 192.88.99.0/24"},
		{"2001::/26", special, "2001::/23", "", "lies in 2001::/23"},
		{"2001:1::/126", special, "2001::/23", "", "lies in 2001::/23"},
		{"2001::/16", special, "2001::/23", "", "contains 2001::/23"},
		{"2002:808:808::1", special, "2002::/16", "", "6to4"},
		{"64:ff9b::8.8.8.8", special, "64:ff9b::/96", "", "translation"},
		{"::ffff:0:0/96", special, "::ffff:0.0.0.0/96", "", "::ffff:0:0/96"},
		{"::ffff:8.8.8.0/24", special, "::ffff:0.0.0.0/96", "8.8.8.0/24", "::ffff:0:0/96"},
		{"::ffff:0:0/64", special, "::ffff:0.0.0.0/96", "", "::ffff:0:0/96"},

		{"0.0.0.0/0", broad, "10.0.0.0/8", "", "contains 10.0.0.0/8"},
		{"10.0.0.0/7", broad, "10.0.0.0/8", "", "contains 10.0.0.0/8"},
		{"64.0.0.0/7", broad, "", "", "broader than /8"},
		{"::/0", broad, "fc00::/7", "", "contains fc00::/7"},
		{"2a00::/15", broad, "", "", "broader than /16"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			p := onlyProblem(t, Rules{}, tt.in)
			if p.Refusal != tt.reason {
				t.Errorf("refused as %v; want %v: %s", p.Refusal, tt.reason, p.Message)
			}
			if got := strings.Join(p.Suggestions, " "); got != tt.suggestions {
				t.Errorf("suggestions %q; want %q", got, tt.suggestions)
			}
			if got := p.Block; tt.block == "" && got.IsValid() || tt.block != "" && got.String() != tt.block {
				t.Errorf("block %v; want %q", got, tt.block)
			}
			if !strings.Contains(p.Message, tt.fault) {
				t.Errorf("message %q lacks %q", p.Message, tt.fault)
			}
			checkProblem(t, Rules{}, p)
		})
	}
}

// onlyProblem returns what is wrong with a list of one entry.
func onlyProblem(t *testing.T, r Rules, entry string) Problem {
	t.Helper()
	l, err := r.ParseEntries([]string{entry})
	var invalid *InvalidError
	if !errors.As(err, &invalid) || len(invalid.Problems) != 1 || l.Len() != 0 {
		t.Fatalf("%q: %v, %v; want one problem", entry, l.Strings(), err)
	}
	if p := invalid.Problems[0]; p.Index != 0 || p.Text != shown(entry) {
		t.Errorf("index %d, text %q", p.Index, p.Text)
	}
	return invalid.Problems[0]
}

// checkProblem checks what holds for every problem.
func checkProblem(t *testing.T, r Rules, p Problem) {
	t.Helper()
	for _, s := range p.Suggestions {
		if l, err := r.ParseEntries([]string{s}); err != nil || l.Strings()[0] != s {
			t.Errorf("%q: the suggestion %q is refused or not canonical: %v", p.Text, s, err)
		}
	}
	if len(p.Suggestions) > maxRange {
		t.Errorf("%q: %d suggestions", p.Text, len(p.Suggestions))
	}
	if utf8.RuneCountInString(p.Text) > 100 || !utf8.ValidString(p.Text) {
		t.Errorf("text %q", p.Text)
	}
	m := p.Message
	if !strings.HasPrefix(m, quoted(p.Text)) || !strings.HasSuffix(m, ".") || !strings.Contains(m, "; ") ||
		!utf8.ValidString(m) || strings.ContainsFunc(m, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		t.Errorf("message %q", m)
	}
}

func TestPermit(t *testing.T) {
	permit := func(nets ...string) Rules {
		var r Rules
		for _, n := range nets {
			r.Permit = append(r.Permit, netip.MustParsePrefix(n))
		}
		return r
	}
	for _, tt := range []struct {
		name  string
		rules Rules
		in    string
		ok    bool
	}{
		{"the block", permit("10.0.0.0/8"), "10.0.0.0/8", true},
		{"inside", permit("10.0.0.0/8"), "10.1.2.3", true},
		{"another block", permit("10.0.0.0/8"), "192.168.0.1", false},
		{"part of a block", permit("10.1.0.0/16"), "10.1.2.0/24", true},
		{"beyond the part", permit("10.1.0.0/16"), "10.0.0.0/15", false},
		{"two halves are not one net", permit("10.0.0.0/9", "10.128.0.0/9"), "10.0.0.0/8", false},
		{"the only block it contains", permit("172.16.0.0/12"), "172.0.0.0/8", true},
		{"wider than the block", permit("0.0.0.0/0"), "172.0.0.0/8", true},
		{"one of two blocks", permit("198.18.0.0/15"), "198.0.0.0/8", false},
		{"both blocks", permit("198.18.0.0/15", "198.51.100.0/24"), "198.0.0.0/8", true},
		{"too broad all the same", permit("0.0.0.0/0", "::/0"), "10.0.0.0/7", false},
		{"everything else", permit("0.0.0.0/0", "::/0"), "::/16", true},
		{"host bits in the permit", permit("10.9.9.9/8"), "10.1.2.3", true},
		{"other family", permit("::/0"), "10.0.0.1", false},
		{"IPv6", permit("2001:db8::/32"), "2001:db8:1::/48", true},
		{"reachable neighbours", permit("2001:db8::/32"), "2001:20::/27", true},
		{"documentation", permit("192.0.2.0/24"), "192.0.2.0/24", true},
		{"mapped stays refused", permit("::/0"), "::ffff:0:0/96", false},
		{"mapped prefix", permit("10.0.0.0/8"), "::ffff:10.0.0.0/104", true},
		{"netmask permitted as an address", permit("240.0.0.0/4"), "255.255.255.0", true},
		{"form", permit("10.0.0.0/8"), "10.1.2.3/8", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := tt.rules.ParseEntries([]string{tt.in}); (err == nil) != tt.ok {
				t.Errorf("%s: %v", tt.in, err)
			}
		})
	}
	p := onlyProblem(t, permit("10.0.0.0/8"), "10.1.2.3/8")
	if want := []string{"10.1.2.3", "10.0.0.0/8"}; !slices.Equal(p.Suggestions, want) {
		t.Errorf("suggestions %v; want %v", p.Suggestions, want)
	}
	if p = onlyProblem(t, permit("10.0.0.0/8"), "10.0.0.0/7"); p.Block.IsValid() {
		t.Errorf("a permitted block is named: %s", p.Message)
	}
}

// compareWithModel compares what the rules and the model say of one entry.
func compareWithModel(t *testing.T, entry string, permit []netip.Prefix) {
	t.Helper()
	r := Rules{Permit: permit}
	var ranges []modelRange
	for _, p := range permit {
		ranges = append(ranges, modelOf(p.Masked()))
	}
	entry = strings.TrimFunc(entry, ignorable)
	want := modelEntry(entry, ranges)
	l, err := r.ParseEntries([]string{entry})
	if entry == "" {
		if !errors.Is(err, ErrEmpty) {
			t.Errorf("%q: %v; want ErrEmpty", entry, err)
		}
		return
	}
	if err == nil {
		if want.reason != 0 || l.nets[0] != want.net.prefix() {
			t.Errorf("%q permit %v: accepted as %v; the model says %v", entry, permit, l.Strings(), want.reason)
		}
		return
	}
	p := onlyProblem(t, r, entry)
	checkProblem(t, r, p)
	block := ""
	if p.Block.IsValid() {
		block = p.Block.String()
	}
	switch want.reason {
	case decisionv1.NetRefusal_NET_REFUSAL_UNSPECIFIED:
		t.Errorf("%q permit %v: refused, and the model accepts it: %s", entry, permit, p.Message)
	case decisionv1.NetRefusal_NET_REFUSAL_SYNTAX:
		if p.Refusal > decisionv1.NetRefusal_NET_REFUSAL_RANGE {
			t.Errorf("%q: refused for its content: %s", entry, p.Message)
		}
	default:
		if p.Refusal != want.reason || strings.Replace(block, "::ffff:0.0.0.0/96", "::ffff:0:0/96", 1) != want.block {
			t.Errorf("%q permit %v: %v %q; the model says %v %q", entry, permit, p.Refusal, block, want.reason, want.block)
		}
	}
}

func TestNetsLikeModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var edges []modelRange
	for _, b := range modelBlocks() {
		edges = append(edges, b.modelRange)
	}
	for cidr := range strings.FieldsSeq(modelReachable) {
		edges = append(edges, modelParsed(cidr))
	}
	// near returns a prefix that touches or surrounds the edge of a block.
	near := func() netip.Prefix {
		e := edges[rnd.IntN(len(edges))]
		n := new(big.Int).Set(e.lo)
		if rnd.IntN(2) == 0 {
			n.Set(e.hi)
		}
		n.Add(n, big.NewInt(rnd.Int64N(5)-2))
		width := modelWidth(e.v6)
		n.Mod(n.Add(n, new(big.Int).Lsh(big.NewInt(1), uint(width))), new(big.Int).Lsh(big.NewInt(1), uint(width)))
		bits := min(max(e.bits+rnd.IntN(9)-4, 0), width)
		if rnd.IntN(4) == 0 {
			bits = rnd.IntN(width + 1)
		}
		r, _ := modelNet(e.v6, n, bits)
		p := r.prefix()
		if rnd.IntN(8) == 0 {
			p = netip.PrefixFrom(modelRange{e.v6, n, n, width}.prefix().Addr(), bits)
		}
		return p
	}
	rounds := 10_000
	if testing.Short() {
		rounds = 1_000
	}
	for range rounds {
		var permit []netip.Prefix
		for range rnd.IntN(3) {
			permit = append(permit, near())
		}
		compareWithModel(t, near().String(), permit)
	}
}

func FuzzNet(f *testing.F) {
	for _, s := range []string{
		"8.8.8.8", "8.8.8.8/24", "10.0.0.0/7", "::ffff:8.8.8.8", "::ffff:8.8.8.0/120", "::ffff:0:0/96", "::ffff:0:0/95", "::/0", "2a00::1%eth0",
		"2001:20::/27", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1:2:3:4::5:6:7:8", "1:2:3:4:5:6:1.2.3.4", "::1.2.3.4", "2a00::/016", "8.8.8.8/+8",
		"08.8.8.8", "8.8.8.1-9", "8.8.8.1 – 8.8.8.9", "2a00::1-ffff", "8.8.8.*", "2a00:*", "8.8.8.0/255.255.255.0", "8.8.8.0 255.255.255.0", "[2a00::1]:1",
		"8.8.8.8:1", "example.com", "https://8.8.8.8/", "https://a://b", "\"8.8.8.8\"", "8.8.8/24", "300.1.1.1/24", "8.8.\u200b8.8", "\xff", "255.255.255.0",
		"8.8.8.0/255.255.255.0/24", "[[8.8.8.8]]", "8.8.8.0 - 8.8.8.9 /24", "8.8.8.8 -", "1.2.3.4:5:6", "::%/1", "*-*", "~", "/", ":", "x.x", "[]:1", "0/0",
	} {
		f.Add(s, "")
		f.Add(s, "0.0.0.0/0")
	}
	f.Add("10.0.0.0/8", "10.0.0.0/8")
	f.Fuzz(func(t *testing.T, entry, permit string) {
		var nets []netip.Prefix
		if p, err := netip.ParsePrefix(permit); err == nil && !p.Addr().Is4In6() {
			nets = append(nets, p)
		}
		compareWithModel(t, entry, nets)
	})
}

// A range is suggested as exactly its addresses.
func FuzzRange(f *testing.F) {
	f.Add([]byte{8, 8, 8, 1}, []byte{8, 8, 8, 9})
	f.Add([]byte{8, 8, 8, 0}, []byte{8, 8, 9, 7})
	f.Add([]byte{1, 0, 0, 0}, []byte{9, 255, 255, 255})
	f.Add([]byte{9, 255, 255, 255}, []byte{10, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 0}, []byte{255, 255, 255, 255})
	f.Add([]byte("\x2a\x00            \x00\x01"), []byte("\x2a\x00            \x01\x00"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		first, ok1 := netip.AddrFromSlice(a)
		last, ok2 := netip.AddrFromSlice(b)
		if !ok1 || !ok2 || first.Is4() != last.Is4() || first.Is4In6() || last.Is4In6() {
			return
		}
		p := onlyProblem(t, Rules{}, first.String()+"-"+last.String())
		if p.Refusal != decisionv1.NetRefusal_NET_REFUSAL_RANGE {
			t.Fatalf("refused as %v", p.Refusal)
		}
		checkProblem(t, Rules{}, p)
		if p.Suggestions == nil {
			return
		}
		at := first
		for i, s := range p.Suggestions {
			l, err := RestoreList([]string{s})
			if err != nil || l.nets[0].Addr() != at {
				t.Fatalf("suggestion %d is %s; want one from %v", i, s, at)
			}
			at = lastAddr(l.nets[0])
			if i < len(p.Suggestions)-1 {
				at = at.Next()
			}
		}
		if at != last {
			t.Errorf("suggestions %v end at %v; want %v", p.Suggestions, at, last)
		}
	})
}
