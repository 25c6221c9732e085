package allow

import (
	"fmt"
	"math/bits"
	"net/netip"
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

// maxEntry bounds what the search for an entry's meaning is given: a range of two IPv6 addresses in their longest form.
const maxEntry = 128

// maxRange is how many prefixes are suggested for a range.
const maxRange = 32

// refusal says why an entry is no net.
type refusal struct {
	reason      decisionv1.NetRefusal
	message     string // behind the quoted entry, without the full stop
	suggestions []string
	block       netip.Prefix
}

// parseNet reads an entry, which is not empty and has no white space around it.
func (r Rules) parseNet(s string) (netip.Prefix, *refusal) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" {
			return netip.Prefix{}, r.zone(s)
		}
		addr = addr.Unmap()
		return r.check(netip.PrefixFrom(addr, addr.BitLen()))
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		if !p.Addr().Is4In6() {
			return r.check(p)
		}
		addr := p.Addr().Unmap()
		if p.Bits() > 96 {
			return r.check(netip.PrefixFrom(addr, p.Bits()-96))
		}
		refused := &refusal{
			reason:  decisionv1.NetRefusal_NET_REFUSAL_SPECIAL,
			message: "reaches into ::ffff:0:0/96, the IPv6 form of all IPv4 addresses; write the IPv4 network",
			block:   netip.PrefixFrom(netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff}), 96),
		}
		if p.Bits() <= 32 && strings.Contains(s, ".") {
			refused.suggestions = r.suggest(netip.PrefixFrom(addr, p.Bits()).Masked().String())
		}
		return netip.Prefix{}, refused
	}
	if refused := r.explain(s); refused != nil {
		return netip.Prefix{}, refused
	}
	return netip.Prefix{}, syntax("is not an IP address or network; write it like 8.8.8.8, 8.8.8.0/24 or 2a00:1450::/32")
}

// check returns a parsed net if the rules accept it. Of two things that are wrong it names the one that has to change first.
func (r Rules) check(p netip.Prefix) (netip.Prefix, *refusal) {
	net := p.Masked()
	refused := r.refuse(net)
	if p == net {
		return net, refused
	}
	if refused == nil {
		return netip.Prefix{}, &refusal{
			reason:      decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET,
			message:     fmt.Sprintf("names one address but has the length of a network; write %v for that address or %v for the whole network", p.Addr(), net),
			suggestions: []string{p.Addr().String(), FormatNet(net)},
		}
	}
	// The network behind the address is out of the question; the address may be what was meant.
	if addr := netip.PrefixFrom(p.Addr(), p.Addr().BitLen()); r.refuse(addr) == nil {
		return netip.Prefix{}, &refusal{
			reason:      decisionv1.NetRefusal_NET_REFUSAL_HOST_BITS_SET,
			message:     fmt.Sprintf("names one address but has the length of a network; write %v for that address, because %v as a network %s", p.Addr(), net, refused.message),
			suggestions: []string{p.Addr().String()},
			block:       refused.block,
		}
	}
	return netip.Prefix{}, refused
}

// refuse returns why a masked net is refused, or nil.
func (r Rules) refuse(p netip.Prefix) *refusal {
	b, overlap := refusedOverlap(p, r.Permit)
	widest := minBits6
	if p.Addr().Is4() {
		widest = minBits4
	}
	switch {
	case p.Bits() < widest && overlap:
		return &refusal{
			reason:  decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD,
			message: fmt.Sprintf("is too broad and contains %v (%s); list networks of /%d and longer without it", b.net, b.name, widest),
			block:   b.net,
		}
	case p.Bits() < widest:
		return &refusal{
			reason:  decisionv1.NetRefusal_NET_REFUSAL_TOO_BROAD,
			message: fmt.Sprintf("is too broad; list networks of /%d and longer", widest),
		}
	case overlap && p.Bits() < b.net.Bits():
		return &refusal{
			reason:  b.refuse,
			message: fmt.Sprintf("contains %v (%s), where no client comes from; list smaller networks without it", b.net, b.name),
			block:   b.net,
		}
	case overlap:
		return &refusal{
			reason:  b.refuse,
			message: fmt.Sprintf("lies in %v (%s), where no client comes from; list the public address that the Internet sees", b.net, b.name),
			block:   b.net,
		}
	}
	return nil
}

// suggest returns those of the texts that the rules accept, in canonical form.
func (r Rules) suggest(texts ...string) []string {
	var accepted []string
	for _, t := range texts {
		if p, refused := r.parseNet(t); refused == nil {
			accepted = append(accepted, FormatNet(p))
		}
	}
	return accepted
}

func syntax(message string, suggestions ...string) *refusal {
	return &refusal{reason: decisionv1.NetRefusal_NET_REFUSAL_SYNTAX, message: message, suggestions: suggestions}
}

// explain says what an entry that is no net looks like, or nil if it looks like nothing in particular.
func (r Rules) explain(s string) *refusal {
	if len(s) > maxEntry {
		return syntax("is too long for an address or network; separate entries by commas")
	}
	for _, look := range []func(Rules, string) *refusal{
		Rules.invisible, Rules.spaced, Rules.url, Rules.bracketed, Rules.zone, Rules.wildcard, Rules.rangeOf,
		Rules.slash, Rules.port, Rules.dotted, hostname, Rules.wrapped,
	} {
		if refused := look(r, s); refused != nil {
			return refused
		}
	}
	return nil
}

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
	return syntax(fmt.Sprintf("has an invisible or broken character (%U) in it; type the entry again", c), r.suggest(clean)...)
}

// spaced finds what white space has torn apart: 8.8.8.0 255.255.255.0, 8.8.8.0 /24, 8.8.8.1 - 8.8.8.9.
func (r Rules) spaced(s string) *refusal {
	fields := strings.FieldsFunc(s, ignorable)
	if len(fields) < 2 {
		return nil
	}
	first, err := netip.ParseAddr(strings.TrimRight(fields[0], "/"+dashes))
	if err != nil || first.Zone() != "" {
		return nil
	}
	if len(fields) == 2 {
		if mask, err := netip.ParseAddr(fields[1]); err == nil && mask.Is4() && first.Is4() && fields[0] == first.String() {
			if n, ok := maskBits(mask); ok && n > 0 {
				return r.netmask(first, n)
			}
		}
	}
	joined := fields[0]
	for _, f := range fields[1:] {
		if !strings.ContainsAny(joined[len(joined)-1:], "/") && !strings.HasPrefix(f, "/") && !endsInDash(joined) && !startsWithDash(f) {
			return nil
		}
		joined += f
	}
	p, refused := r.parseNet(joined)
	if refused == nil {
		return syntax("has white space inside; write it without", FormatNet(p))
	}
	if refused.reason == decisionv1.NetRefusal_NET_REFUSAL_SYNTAX && refused.suggestions == nil {
		return nil
	}
	return refused
}

// url finds https://8.8.8.8/ and https://example.com/.
func (r Rules) url(s string) *refusal {
	_, rest, ok := strings.Cut(s, "://")
	if !ok {
		return nil
	}
	host, _, _ := strings.Cut(rest, "/")
	if host == "" {
		return nil
	}
	p, refused := r.parseNet(host)
	if refused == nil {
		return syntax("is a web address; write the IP address alone", FormatNet(p))
	}
	return refused
}

// bracketed finds [2a00:1450::1], [2a00:1450::1]:443 and [2a00:1450::]/32.
func (r Rules) bracketed(s string) *refusal {
	if !strings.HasPrefix(s, "[") {
		return nil
	}
	inner, rest, ok := strings.Cut(s[1:], "]")
	addr, err := netip.ParseAddr(inner)
	switch {
	case !ok || err != nil:
		return nil
	case addr.Zone() != "":
		return r.zone(inner)
	case strings.HasPrefix(rest, ":") && digits(rest[1:]):
		return r.withPort(inner)
	case rest == "" || strings.HasPrefix(rest, "/"):
		return syntax("has brackets around the address; write it without", r.suggest(inner+rest)...)
	}
	return nil
}

// zone finds fe80::1%eth0.
func (r Rules) zone(s string) *refusal {
	base, zone, ok := strings.Cut(s, "%")
	if _, err := netip.ParseAddr(base); !ok || err != nil {
		return nil
	}
	if _, n, ok := strings.Cut(zone, "/"); ok {
		base += "/" + n
	}
	return &refusal{
		reason:      decisionv1.NetRefusal_NET_REFUSAL_ZONE,
		message:     "has a zone behind the %, which means something on one machine only; write the address without it",
		suggestions: r.suggest(base),
	}
}

// wildcard finds 8.8.8.*, 8.8.x.x, 8.8.* and 2a00:1450:*.
func (r Rules) wildcard(s string) *refusal {
	s, _, _ = strings.Cut(s, "/")
	refused := &refusal{
		reason:  decisionv1.NetRefusal_NET_REFUSAL_WILDCARD,
		message: "has wildcards; write the network with its prefix length",
	}
	sep, unit, max := ".", 8, 4
	if strings.Contains(s, ":") {
		sep, unit, max = ":", 16, 8
	}
	parts := strings.Split(s, sep)
	wild := func(p string) bool {
		return p != "" && strings.Trim(p, "*?") == "" || unit == 8 && p != "" && strings.Trim(p, "xX") == ""
	}
	fixed := 0
	for fixed < len(parts) && !wild(parts[fixed]) {
		fixed++
	}
	found := false
	for i, p := range parts {
		switch {
		case wild(p):
			found = true
		case strings.ContainsAny(p, "*?"):
			found, fixed = true, 0
		case !number(p, unit):
			return nil
		case i > fixed:
			fixed = 0
		}
	}
	if !found {
		return nil
	}
	if fixed > 0 && fixed < max && len(parts) <= max && (len(parts) == max || strings.HasSuffix(s, "*")) {
		base := strings.Join(parts[:fixed], sep)
		if unit == 8 {
			base += strings.Repeat(".0", max-fixed)
		} else {
			base += "::"
		}
		refused.suggestions = r.suggest(base + "/" + strconv.Itoa(fixed*unit))
	}
	return refused
}

// number reports whether s can be a part of an IPv4 (unit 8) or IPv6 address (unit 16).
func number(s string, unit int) bool {
	base := 10
	if unit == 16 {
		base = 16
	}
	_, err := strconv.ParseUint(s, base, unit)
	return err == nil
}

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// dashes are the characters that people, and the programs that improve their typing, put between the ends of a range.
const dashes = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212~"

func startsWithDash(s string) bool { return strings.TrimLeft(s, dashes) != s }
func endsInDash(s string) bool     { return strings.TrimRight(s, dashes) != s }

// rangeOf finds 8.8.8.1-8.8.8.9 and 8.8.8.1-9.
func (r Rules) rangeOf(s string) *refusal {
	i := strings.IndexAny(s, dashes)
	if i < 0 {
		return nil
	}
	_, size := utf8.DecodeRuneInString(s[i:])
	left, right := s[:i], s[i+size:]
	refused := &refusal{
		reason:  decisionv1.NetRefusal_NET_REFUSAL_RANGE,
		message: "is a range; write networks with a prefix length",
	}
	first, _, err := ends(left)
	if err != nil || right == "" {
		// Ranges in the middle: 8.8.1-3.0.
		if strings.Count(s, ".") >= 3 && strings.Trim(s, "0123456789./"+dashes) == "" && left != "" && right != "" {
			return refused
		}
		return nil
	}
	_, last, err := ends(right)
	if err != nil {
		if strings.Trim(right, "0123456789abcdefABCDEF.:/") != "" {
			return nil
		}
		if _, last, err = ends(shortEnd(first, right)); err != nil {
			return refused
		}
	}
	if first.Is4() != last.Is4() {
		return refused
	}
	if last.Less(first) {
		refused.message = "is a range that ends before it begins; write networks with a prefix length"
		return refused
	}
	nets := cover(first, last, maxRange)
	if nets == nil {
		refused.message = fmt.Sprintf("is a range that takes more than %d networks; write networks with a prefix length", maxRange)
		return refused
	}
	for _, p := range nets {
		if bad := r.refuse(p); bad != nil {
			refused.message = fmt.Sprintf("is a range, and %v in it %s", p, bad.message)
			refused.block = bad.block
			refused.suggestions = nil
			return refused
		}
		refused.suggestions = append(refused.suggestions, FormatNet(p))
	}
	return refused
}

// ends returns the first and last address of an address or prefix.
func ends(s string) (first, last netip.Addr, err error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" {
			return first, last, strconv.ErrSyntax
		}
		return addr.Unmap(), addr.Unmap(), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return first, last, strconv.ErrSyntax
	}
	return p.Masked().Addr(), lastAddr(p.Masked()), nil
}

// shortEnd completes the end of a range, such as the 9 of 8.8.8.1-9, from its beginning.
func shortEnd(first netip.Addr, end string) string {
	if first.Is4() {
		parts := strings.Split(first.String(), ".")
		if n := 4 - strings.Count(end, ".") - 1; n > 0 {
			return strings.Join(parts[:n], ".") + "." + end
		}
		return end
	}
	text := first.StringExpanded()
	return text[:strings.LastIndexByte(text, ':')+1] + end
}

// cover returns the fewest prefixes that hold exactly the addresses from first to last, or nil if they are more than limit.
func cover(first, last netip.Addr, limit int) []netip.Prefix {
	var nets []netip.Prefix
	for len(nets) < limit {
		p := netip.PrefixFrom(first, first.BitLen())
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(first, p.Bits()-1)
			if wider != wider.Masked() || last.Less(lastAddr(wider)) {
				break
			}
			p = wider
		}
		nets = append(nets, p)
		end := lastAddr(p)
		if end == last {
			return nets
		}
		first = end.Next()
	}
	return nil
}

// slash finds what is wrong on either side of the slash.
func (r Rules) slash(s string) *refusal {
	left, right, ok := strings.Cut(s, "/")
	if !ok {
		return nil
	}
	addr, err := netip.ParseAddr(left)
	if err != nil {
		if refused := r.dotted(left); refused != nil {
			if digits(right) && refused.reason == decisionv1.NetRefusal_NET_REFUSAL_SYNTAX {
				refused.suggestions = r.suggest(undotted(left) + "/" + right)
			}
			return refused
		}
		if refused := r.port(left); refused != nil {
			refused.suggestions = r.suggest(left[:strings.LastIndexByte(left, ':')] + "/" + right)
			return refused
		}
		return nil
	}
	length, port, hasPort := strings.Cut(right, ":")
	switch {
	case right == "":
		return syntax("has no prefix length behind the slash; write the address alone or add the length", r.suggest(left)...)
	case hasPort && digits(length) && digits(port):
		return r.withPort(left + "/" + length)
	}
	if mask, err := netip.ParseAddr(right); err == nil && mask.Is4() == addr.Is4() {
		n, ok := maskBits(mask)
		if !ok {
			return &refusal{
				reason:  decisionv1.NetRefusal_NET_REFUSAL_NETMASK,
				message: "has a netmask with gaps; write the network with its prefix length",
			}
		}
		return r.netmask(addr, n)
	}
	if n, err := strconv.ParseUint(right, 10, 8); err == nil && digits(right) && int(n) <= addr.BitLen() {
		return syntax("has a prefix length with leading zeros; write it without", r.suggest(left+"/"+strconv.FormatUint(n, 10))...)
	}
	widest := minBits6
	if addr.Is4() {
		widest = minBits4
	}
	return syntax(fmt.Sprintf("has no valid prefix length; write a number from %d to %d behind the slash", widest, addr.BitLen()))
}

// netmask refuses an address with a netmask of n bits.
func (r Rules) netmask(addr netip.Addr, n int) *refusal {
	p := netip.PrefixFrom(addr, n)
	texts := []string{p.Masked().String()}
	if p != p.Masked() {
		texts = []string{addr.String(), p.Masked().String()}
	}
	return &refusal{
		reason:      decisionv1.NetRefusal_NET_REFUSAL_NETMASK,
		message:     fmt.Sprintf("has a netmask; write the prefix length /%d instead", n),
		suggestions: r.suggest(texts...),
	}
}

// maskBits returns the prefix length of a netmask or, as routers have it, of its inverse.
func maskBits(mask netip.Addr) (n int, ok bool) {
	ones, zeros := 0, 0
	b := mask.AsSlice()
	for _, x := range b {
		ones += bits.LeadingZeros8(^x)
		if x != 0xff {
			break
		}
	}
	for _, x := range b {
		zeros += bits.LeadingZeros8(x)
		if x != 0 {
			break
		}
	}
	if p := netip.PrefixFrom(mask, ones); p == p.Masked() {
		return ones, true
	}
	return zeros, zeros > 0 && lastAddr(netip.PrefixFrom(mask, zeros)) == mask
}

// port finds 8.8.8.8:443.
func (r Rules) port(s string) *refusal {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || !digits(s[i+1:]) {
		return nil
	}
	if addr, err := netip.ParseAddr(s[:i]); err != nil || addr.Zone() != "" {
		return nil
	}
	return r.withPort(s[:i])
}

func (r Rules) withPort(rest string) *refusal {
	return &refusal{
		reason:      decisionv1.NetRefusal_NET_REFUSAL_PORT,
		message:     "has a port; a list is for addresses on any port, so write the address alone",
		suggestions: r.suggest(rest),
	}
}

// dotted finds IPv4 addresses with leading zeros, and with too few, too many or too large numbers.
func (r Rules) dotted(s string) *refusal {
	if strings.Trim(s, "0123456789.") != "" || strings.Trim(s, ".") != s {
		return nil
	}
	parts := strings.Split(s, ".")
	for _, p := range parts {
		if !number(p, 8) {
			return syntax("is not an IPv4 address; each of its four numbers goes from 0 to 255")
		}
	}
	if len(parts) != 4 {
		return syntax(fmt.Sprintf("has %d numbers where an IPv4 address has four; write all of it", len(parts)))
	}
	return syntax("has numbers with leading zeros, which some programs read as octal; write it without", r.suggest(undotted(s))...)
}

// undotted returns a dotted number without leading zeros and with zeros for missing parts.
func undotted(s string) string {
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
func hostname(_ Rules, s string) *refusal {
	s, _, _ = strings.Cut(s, "/")
	if i := strings.LastIndexByte(s, ':'); i >= 0 && digits(s[i+1:]) {
		s = s[:i]
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, "*."), ".")
	if s == "" || strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") {
		return nil
	}
	letter := false
	for label := range strings.SplitSeq(s, ".") {
		if label == "" {
			return nil
		}
		for _, c := range label {
			if unicode.IsLetter(c) {
				letter = true
			} else if !unicode.IsDigit(c) && !unicode.IsMark(c) && c != '-' && c != '_' {
				return nil
			}
		}
	}
	if !letter {
		return nil
	}
	return &refusal{
		reason:  decisionv1.NetRefusal_NET_REFUSAL_HOSTNAME,
		message: "is a name; only IP addresses and networks can be listed, so write the addresses behind it",
	}
}

// wrapped finds entries in quotes or brackets, or with a full stop behind.
func (r Rules) wrapped(s string) *refusal {
	inner := strings.Trim(s, "\"'`´‘’‚“”„«»‹›<>()[]{}.")
	if inner == s || inner == "" {
		return nil
	}
	p, refused := r.parseNet(inner)
	if refused == nil {
		return syntax("has extra characters around it; write it without", FormatNet(p))
	}
	return refused
}
