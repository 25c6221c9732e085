package allow

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// The widest nets a list may hold.
const (
	minBits4 = 8
	minBits6 = 16
)

// maxEntry bounds, in octets, what is searched for a meaning. A range of IPv6 addresses in their longest form fits.
const maxEntry = 128

// maxRange is how many nets are suggested for a range.
const maxRange = 32

// refusal says why an entry is no net. Behind the quoted entry, and with a full stop, "fault; remedy" is a sentence.
type refusal struct {
	reason      decisionv1.NetRefusal
	fault       string
	remedy      string
	suggestions []string
	block       netip.Prefix
}

// parseNet reads an entry, which is not empty and has no white space around it.
//
// Of several faults the form comes before the content: first an entry that is no address or network in CIDR notation, then bits
// behind the prefix length, then a net inside a refused block, then one that is too broad, then one that contains a refused
// block. A fault of the content is told along with one of the form if nothing can be suggested because of it, and a block
// along with the width.
func (r Rules) parseNet(s string) (netip.Prefix, *refusal) {
	p, refused, ok := r.parseCIDR(s)
	if !ok {
		return p, r.explain(s)
	}
	return p, refused
}

// parseCIDR reads an entry that is an address or a network in CIDR notation. Of any other it says that it is not ok.
func (r Rules) parseCIDR(s string) (p netip.Prefix, refused *refusal, ok bool) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		p = netip.PrefixFrom(addr, addr.BitLen())
		refused = r.refuse(p)
		if refused != nil && isMask(addr) {
			refused = &refusal{
				reason: decisionv1.NetRefusal_NET_REFUSAL_NETMASK,
				fault:  "is a netmask",
				remedy: "write its prefix length behind the address it belongs to, as in 8.8.8.0/24",
			}
		}
		return p, refused, true
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, nil, false
	}
	if p.Addr().Is4In6() {
		if p.Bits() <= mappedBlock.Bits() {
			return p, r.mappedNet(s, p), true
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mappedBlock.Bits())
	}
	if p != p.Masked() {
		return p, r.hostBits(p), true
	}
	return p, r.refuse(p), true
}

// refuse returns why a net in CIDR notation, masked and not IPv4-mapped, is refused, or nil.
func (r Rules) refuse(p netip.Prefix) *refusal {
	b, overlap := refusedOverlap(p, r.Permit)
	widest := widestBits(p.Addr())
	switch {
	case overlap && covers(b.net, p):
		return &refusal{
			reason: b.reason,
			fault:  fmt.Sprintf("lies in %s, where no client comes from", b.text),
			remedy: "list the public address that the Internet sees",
			block:  b.net,
		}
	case overlap && p.Bits() < widest:
		return &refusal{
			reason: decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD,
			fault:  fmt.Sprintf("is broader than /%d and contains %s", widest, b.text),
			remedy: "list smaller networks without that block",
			block:  b.net,
		}
	case overlap:
		return &refusal{
			reason: b.reason,
			fault:  fmt.Sprintf("contains %s, where no client comes from", b.text),
			remedy: "list smaller networks without that block",
			block:  b.net,
		}
	case p.Bits() < widest:
		return &refusal{
			reason: decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD,
			fault:  fmt.Sprintf("is broader than /%d", widest),
			remedy: "list smaller networks",
		}
	}
	return nil
}

func widestBits(addr netip.Addr) int {
	if addr.Is4() {
		return minBits4
	}
	return minBits6
}

// hostBits refuses a net with bits set behind its prefix length.
func (r Rules) hostBits(p netip.Prefix) *refusal {
	addr, net := p.Addr().String(), p.Masked()
	refused := &refusal{
		reason:      decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET,
		fault:       fmt.Sprintf("is an address inside the network %v", net),
		remedy:      fmt.Sprintf("write %s for the address alone or %v for the whole network", addr, net),
		suggestions: r.suggest(addr, net.String()),
	}
	switch bad := r.refuse(net); {
	case bad == nil:
	case refused.suggestions != nil: // of the address
		refused.remedy = fmt.Sprintf("write %s for the address alone, because the network %s", addr, bad.fault)
		refused.block = bad.block
	default:
		refused.add(bad)
	}
	return refused
}

// mappedNet refuses a network of IPv4-mapped addresses that is not one of IPv4 addresses.
func (r Rules) mappedNet(s string, p netip.Prefix) *refusal {
	refused := &refusal{
		reason: decisionv1.NetRefusal_NET_REFUSAL_SPECIAL,
		fault:  "reaches over ::ffff:0:0/96 (IPv4-mapped addresses)",
		remedy: "write the IPv4 network instead",
		block:  mappedBlock,
	}
	if v4 := p.Addr().Unmap(); p.Bits() <= v4.BitLen() && strings.Contains(s, ".") {
		refused.suggestions = r.suggest(netip.PrefixFrom(v4, p.Bits()).String())
	}
	return refused
}

// suggest returns, in canonical form and without repetition, what the rules accept of the texts or suggest for them. The texts
// are in CIDR notation; others are passed over.
func (r Rules) suggest(texts ...string) []string {
	var accepted []string
	for _, t := range texts {
		p, refused, ok := r.parseCIDR(t)
		var more []string
		switch {
		case refused != nil:
			more = refused.suggestions
		case ok:
			more = []string{FormatNet(p)}
		}
		for _, m := range more {
			if !slices.Contains(accepted, m) {
				accepted = append(accepted, m)
			}
		}
	}
	return accepted
}

// fix refuses an entry for its form. The texts are what may have been meant.
func (r Rules) fix(reason decisionv1.NetRefusal, fault, remedy string, texts ...string) *refusal {
	refused := &refusal{reason: reason, fault: fault, remedy: remedy, suggestions: r.suggest(texts...)}
	if refused.suggestions == nil && len(texts) > 0 {
		if _, bad, _ := r.parseCIDR(texts[0]); bad != nil {
			refused.add(bad)
		}
	}
	return refused
}

func (r Rules) syntax(fault, remedy string, texts ...string) *refusal {
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_SYNTAX, fault, remedy, texts...)
}

// add tells a fault of the content along with one of the form.
func (f *refusal) add(content *refusal) {
	f.fault += " and " + content.fault
	f.remedy = content.remedy
	f.block = content.block
}

// explain says what an entry is that netip can make nothing of.
func (r Rules) explain(s string) *refusal {
	if len(s) > maxEntry {
		return r.syntax("is too long for an address or network", "separate entries by commas")
	}
	for _, look := range []func(Rules, string) *refusal{
		Rules.invisible, Rules.spaced, Rules.url, Rules.bracketed, Rules.zone, Rules.wildcard, Rules.rangeOf,
		Rules.slash, Rules.port, Rules.dotted, Rules.hostname, Rules.wrapped,
	} {
		if refused := look(r, s); refused != nil {
			return refused
		}
	}
	if strings.ContainsFunc(s, separator) {
		return r.syntax("is more than one thing", "make each address or network an entry of its own")
	}
	return r.syntax("is not an IP address or network", "write it like 8.8.8.8, 8.8.8.0/24 or 2a00:1450::/32")
}

// Each of the methods below recognises one way of writing what a list does not take, or returns nil.

// invisible finds characters inside an entry that nobody can see.
func (r Rules) invisible(s string) *refusal {
	hidden := func(c rune) bool { return c == utf8.RuneError || !unicode.IsPrint(c) && !unicode.IsSpace(c) }
	i := strings.IndexFunc(s, hidden)
	if i < 0 {
		return nil
	}
	c, _ := utf8.DecodeRuneInString(s[i:])
	clean := strings.Map(func(c rune) rune {
		if hidden(c) {
			return -1
		}
		return c
	}, s)
	return r.syntax(fmt.Sprintf("has an invisible or broken character (%U) in it", c), "type it again without", clean)
}

// spaced finds one thing with white space in it: 8.8.8.0 255.255.255.0, 8.8.8.0 /24, 8.8.8.1 - 8.8.8.9.
func (r Rules) spaced(s string) *refusal {
	if len(s) > maxEntry {
		return nil
	}
	fields := strings.FieldsFunc(s, ignorable)
	if len(fields) < 2 {
		return nil
	}
	if _, _, err := ends(strings.TrimRight(fields[0], "/"+dashes)); err != nil {
		return nil
	}
	if addr, err := netip.ParseAddr(fields[0]); err == nil && addr.Is4() && len(fields) == 2 {
		mask, err := netip.ParseAddr(fields[1])
		if n, ok := maskBits(mask); err == nil && mask.Is4() && ok && n > 0 {
			return r.netmask(addr, n)
		}
	}
	joined := fields[0]
	for _, f := range fields[1:] {
		if strings.TrimRight(joined, "/"+dashes) == joined && strings.TrimLeft(f, "/"+dashes) == f {
			return nil
		}
		joined += f
	}
	if _, _, ok := r.parseCIDR(joined); ok {
		return r.syntax("has white space inside", "write it without", joined)
	}
	refused := r.explain(joined)
	if refused.suggestions == nil && refused.reason != decisionv1.NetRefusal_NET_REFUSAL_RANGE {
		return nil
	}
	return refused
}

// url finds https://8.8.8.8/ and https://example.com/.
func (r Rules) url(s string) *refusal {
	_, rest, ok := strings.Cut(s, "://")
	host, _, _ := strings.Cut(rest, "/")
	if !ok || host == "" {
		return nil
	}
	if _, _, ok := r.parseCIDR(host); !ok {
		return r.explain(host)
	}
	return r.syntax("is a web address", "write the IP address alone", host)
}

// bracketed finds [2a00:1450::1], [2a00:1450::1]:443 and [2a00:1450::]/32.
func (r Rules) bracketed(s string) *refusal {
	inside, rest, ok := strings.Cut(strings.TrimPrefix(s, "["), "]")
	addr, err := netip.ParseAddr(inside)
	switch {
	case !ok || err != nil || inside == s:
		return nil
	case addr.Zone() != "":
		return r.zone(inside)
	case strings.HasPrefix(rest, ":") && digits(rest[1:]):
		return r.withPort(inside)
	case rest == "" || strings.HasPrefix(rest, "/"):
		return r.syntax("has brackets around the address", "write it without", inside+rest)
	}
	return nil
}

// zone finds fe80::1%eth0.
func (r Rules) zone(s string) *refusal {
	addr, zone, ok := strings.Cut(s, "%")
	if _, err := netip.ParseAddr(addr); !ok || err != nil {
		return nil
	}
	if _, length, ok := strings.Cut(zone, "/"); ok {
		addr += "/" + length
	}
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_ZONE,
		"has a zone", "write the address without the % and what follows", addr)
}

// wildcard finds 8.8.8.*, 8.8.x.x, 8.8.* and 2a00:1450:*.
func (r Rules) wildcard(s string) *refusal {
	s, _, _ = strings.Cut(s, "/")
	if !strings.ContainsAny(s, "*?xX") {
		return nil
	}
	sep, unit, most, wild := ".", 8, 4, "*?xX"
	if strings.Contains(s, ":") {
		sep, unit, most, wild = ":", 16, 8, "*?"
	}
	parts := strings.Split(s, sep)
	fixed := len(parts) // how many parts lead up to the first wildcard
	tail := true        // everything behind it is a wildcard too
	for i, p := range parts {
		switch {
		case p != "" && strings.Trim(p, wild) == "":
			fixed = min(fixed, i)
		case strings.ContainsAny(p, "*?"):
			fixed, tail = min(fixed, i), false
		case p != "" && !number(p, unit):
			return nil
		default:
			tail = tail && i < fixed && p != ""
		}
	}
	if fixed == len(parts) || len(parts) == 1 && strings.Trim(s, "xX") == "" {
		return nil
	}
	const remedy = "write the network with its prefix length, as in 8.8.8.0/24"
	if !tail || fixed == 0 || len(parts) > most || len(parts) < most && parts[len(parts)-1] != "*" {
		return r.fix(decisionv1.NetRefusal_NET_REFUSAL_WILDCARD, "has wildcards", remedy)
	}
	net := strings.Join(parts[:fixed], sep)
	if unit == 8 {
		net += strings.Repeat(".0", most-fixed)
	} else {
		net += "::"
	}
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_WILDCARD, "has wildcards", remedy, net+"/"+strconv.Itoa(fixed*unit))
}

// number reports whether s can be a part of an IPv4 (8 bits) or IPv6 address (16 bits).
func number(s string, bits int) bool {
	base := 10
	if bits == 16 {
		base = 16
	}
	_, err := strconv.ParseUint(s, base, bits)
	return err == nil
}

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// dashes are what people, and the programs that improve their typing, put between the ends of a range.
const dashes = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212~"

// rangeOf finds 8.8.8.1-8.8.8.9, 8.8.8.1-9 and 8.8.1-3.0.
func (r Rules) rangeOf(s string) *refusal {
	i := strings.IndexAny(s, dashes)
	if i < 0 {
		return nil
	}
	_, dash := utf8.DecodeRuneInString(s[i:])
	left, right := s[:i], s[i+dash:]
	if left == "" || right == "" {
		return nil
	}
	const remedy = "write networks with a prefix length, as in 8.8.8.0/24"
	unclear := r.fix(decisionv1.NetRefusal_NET_REFUSAL_RANGE, "is a range", remedy)
	first, _, err := ends(left)
	if err != nil {
		if strings.Count(s, ".") >= 3 && !strings.Contains(left, "/") && strings.Trim(s, "0123456789./"+dashes) == "" {
			return unclear
		}
		return nil
	}
	_, last, err := ends(right)
	if err != nil {
		if strings.Trim(right, "0123456789abcdefABCDEF.:/") != "" {
			return nil
		}
		_, last, err = ends(shortEnd(left, right))
	}
	if err != nil || first.Is4() != last.Is4() {
		return unclear
	}
	if last.Less(first) {
		return r.fix(decisionv1.NetRefusal_NET_REFUSAL_RANGE, "is a range that ends before it begins", remedy)
	}
	nets := cover(first, last, maxRange)
	if nets == nil {
		return r.fix(decisionv1.NetRefusal_NET_REFUSAL_RANGE,
			fmt.Sprintf("is a range that takes more than %d networks", maxRange), remedy)
	}
	texts := make([]string, len(nets))
	for i, p := range nets {
		if bad := r.refuse(p); bad != nil {
			bad.fault = FormatNet(p) + " in it " + bad.fault
			unclear.add(bad)
			return unclear
		}
		texts[i] = FormatNet(p)
	}
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_RANGE, "is a range", remedy, texts...)
}

// ends returns the first and the last address of an address or network.
func ends(s string) (first, last netip.Addr, err error) {
	addr, err := netip.ParseAddr(s)
	if err == nil && addr.Zone() == "" {
		return addr.Unmap(), addr.Unmap(), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Addr{}, netip.Addr{}, strconv.ErrSyntax
	}
	return p.Masked().Addr(), lastAddr(p), nil
}

// shortEnd completes the end of a range, such as the 9 of 8.8.8.1-9, from its beginning.
func shortEnd(first, end string) string {
	sep, n := ".", strings.Count(end, ".")+1
	if strings.Contains(first, ":") {
		sep, n = ":", 1
	}
	parts := strings.Split(first, sep)
	if n >= len(parts) || strings.Contains(first, "/") {
		return end
	}
	return strings.Join(parts[:len(parts)-n], sep) + sep + end
}

// cover returns the fewest nets, none wider than the widest, that hold exactly the addresses from first to last; or nil if
// they are more than limit.
func cover(first, last netip.Addr, limit int) []netip.Prefix {
	var nets []netip.Prefix
	for len(nets) < limit {
		p := netip.PrefixFrom(first, first.BitLen())
		for p.Bits() > widestBits(first) {
			wider := netip.PrefixFrom(first, p.Bits()-1)
			if wider != wider.Masked() || last.Less(lastAddr(wider)) {
				break
			}
			p = wider
		}
		nets = append(nets, p)
		if lastAddr(p) == last {
			return nets
		}
		first = lastAddr(p).Next()
	}
	return nil
}

// slash finds what is wrong on either side of a slash.
func (r Rules) slash(s string) *refusal {
	left, right, ok := strings.Cut(s, "/")
	if !ok {
		return nil
	}
	addr, err := netip.ParseAddr(left)
	if err != nil {
		return r.slashed(left, right)
	}
	length, port, _ := strings.Cut(right, ":")
	switch {
	case right == "":
		return r.syntax("has nothing behind the slash", "add the prefix length or write the address alone", left)
	case digits(length) && digits(port):
		return r.withPort(left + "/" + length)
	}
	if mask, err := netip.ParseAddr(right); err == nil && mask.Is4() == addr.Is4() {
		if n, ok := maskBits(mask); ok {
			return r.netmask(addr, n)
		}
		return r.fix(decisionv1.NetRefusal_NET_REFUSAL_NETMASK,
			"has a netmask with gaps", "write networks with a prefix length, as in 8.8.8.0/24")
	}
	if n, err := strconv.ParseUint(right, 10, 8); err == nil && int(n) <= addr.BitLen() {
		return r.syntax("has a prefix length with leading zeros", "write it without", fmt.Sprintf("%s/%d", left, n))
	}
	return r.syntax("has no valid prefix length",
		fmt.Sprintf("write a number from %d to %d behind the slash", widestBits(addr), addr.BitLen()))
}

// slashed finds what stands before a slash instead of an address: 8.8.8/24, 008.8.8.0/24, 8.8.8.0:443/24.
func (r Rules) slashed(left, right string) *refusal {
	if refused := r.dotted(left); refused != nil {
		if !digits(right) {
			return refused
		}
		return r.syntax(refused.fault, refused.remedy, plain(left)+"/"+right)
	}
	if i := strings.LastIndexByte(left, ':'); r.port(left) != nil {
		return r.withPort(left[:i] + "/" + right)
	}
	return nil
}

// netmask refuses an address with a netmask of n bits.
func (r Rules) netmask(addr netip.Addr, n int) *refusal {
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_NETMASK,
		"has a netmask", fmt.Sprintf("write the prefix length /%d in its place", n), fmt.Sprintf("%v/%d", addr, n))
}

// isMask reports whether an address is the netmask of an IPv4 /8 to /31. As an address it would be reserved.
func isMask(addr netip.Addr) bool {
	n, ok := maskBits(addr)
	return ok && addr.Is4() && addr.As4()[0] == 0xff && n < 32
}

// maskBits returns the prefix length of a netmask or, as routers have it, of its inverse.
func maskBits(mask netip.Addr) (n int, ok bool) {
	m := mask.AsSlice()
	if len(m) > 0 && m[0] < 0x80 && !mask.IsUnspecified() {
		for i := range m {
			m[i] = ^m[i]
		}
	}
	for i, b := range m {
		ones := bits.LeadingZeros8(^b)
		if b<<ones != 0 || n < 8*i && b != 0 {
			return 0, false
		}
		n += ones
	}
	return n, len(m) > 0
}

// port finds 8.8.8.8:443, 8.8.8.8:imaps and 2a00:1450:1:2:3:4:5:6:443.
func (r Rules) port(s string) *refusal {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return nil
	}
	addr, err := netip.ParseAddr(s[:i])
	if err != nil || addr.Zone() != "" {
		return nil
	}
	word := strings.IndexFunc(s[i+1:], func(c rune) bool { return !unicode.IsLetter(c) && !unicode.IsDigit(c) }) < 0
	if digits(s[i+1:]) || addr.Is4() && word && i+1 < len(s) {
		return r.withPort(s[:i])
	}
	return nil
}

func (r Rules) withPort(rest string) *refusal {
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_PORT, "has a port", "write it without, because a list holds for every port", rest)
}

// dotted finds IPv4 addresses with leading zeros, and with too few, too many or too large numbers.
func (r Rules) dotted(s string) *refusal {
	if strings.Trim(s, "0123456789.") != "" || strings.Trim(s, ".") != s {
		return nil
	}
	parts := strings.Split(s, ".")
	for _, p := range parts {
		if !number(p, 8) {
			return r.syntax("is not an IPv4 address", "write four numbers from 0 to 255 with dots between them")
		}
	}
	switch {
	case len(parts) < 4:
		return r.syntax(fmt.Sprintf("has only %d of the four numbers of an IPv4 address", len(parts)), "write all of them")
	case len(parts) > 4:
		return r.syntax("has more than the four numbers of an IPv4 address", "separate entries by commas")
	}
	return r.syntax("has leading zeros, which some programs read as octal", "write the numbers without", plain(s))
}

// plain returns dotted numbers without leading zeros, and zeros for the missing ones.
func plain(s string) string {
	parts := strings.Split(s, ".")
	for i, p := range parts {
		if p = strings.TrimLeft(p, "0"); p == "" {
			p = "0"
		}
		parts[i] = p
	}
	for len(parts) < 4 {
		parts = append(parts, "0")
	}
	return strings.Join(parts, ".")
}

// hostname finds example.com, mail.example.com:993, *.example.com and localhost.
func (r Rules) hostname(s string) *refusal {
	s, _, _ = strings.Cut(s, "/")
	if strings.Contains(s, ":") && strings.Trim(s, "0123456789abcdefABCDEF:") == "" {
		return nil // part of an IPv6 address
	}
	if i := strings.LastIndexByte(s, ':'); i >= 0 && digits(s[i+1:]) {
		s = s[:i]
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, "*."), ".")
	if strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") || strings.IndexFunc(s, unicode.IsLetter) < 0 {
		return nil
	}
	for label := range strings.SplitSeq(s, ".") {
		other := func(c rune) bool {
			return !unicode.IsLetter(c) && !unicode.IsMark(c) && !unicode.IsDigit(c) && c != '-' && c != '_'
		}
		if label == "" || strings.IndexFunc(label, other) >= 0 {
			return nil
		}
	}
	return r.fix(decisionv1.NetRefusal_NET_REFUSAL_HOSTNAME,
		"is a name, and only IP addresses and networks can be listed", "write the addresses behind the name")
}

// wrapped finds entries in quotes or brackets, or with a full stop behind.
func (r Rules) wrapped(s string) *refusal {
	inside := strings.Trim(s, "\"'`´‘’‚“”„«»‹›<>()[]{}.")
	if inside == s || inside == "" {
		return nil
	}
	if _, _, ok := r.parseCIDR(inside); !ok {
		return r.explain(inside)
	}
	return r.syntax("has other characters around it", "write it without", inside)
}
