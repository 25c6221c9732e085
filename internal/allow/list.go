package allow

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// Default limits of [Rules].
const (
	defaultMaxNets = 256
	defaultMaxText = 64 << 10
)

// Rules says what an operator lets a list hold. The zero value is the default.
type Rules struct {
	// Permit excuses nets from overlapping a refused block as long as the whole overlap lies inside one of these.
	Permit []netip.Prefix
	// MaxNets is how many entries a list may have, before duplicates collapse; 0 means 256.
	MaxNets int
	// MaxText is how many octets of text a list may be given as; 0 means 64 KiB.
	MaxText int
}

// ErrEmpty is returned for a list without entries, which means nothing: lifting a restriction is another operation.
var ErrEmpty = errors.New("the list has no entries; name at least one address or network, or clear the list to lift the restriction")

// InvalidError says which entries of a list were refused. There is at least one.
type InvalidError struct{ Problems []Problem }

// Problem is one refused entry.
type Problem struct {
	// Index is the position of the entry from 0, not counting empty ones. Where white space tears something apart that was
	// one thing to its writer (a range, an address with its netmask), each part counts and Index is that of the first.
	Index int
	// Text is the entry as given, cut to 100 characters.
	Text string
	// Refusal says why it was refused.
	Refusal decisionv1.NetRefusal
	// Message is one English sentence that names the entry and says what to do.
	Message string
	// Suggestions are entries that the same rules accept and that may be what was meant; often none. Those for a range
	// are exactly the range.
	Suggestions []string
	// Block is the special-purpose block that the entry reaches into, for PRIVATE and SPECIAL, and for TOO_BROAD, RANGE and
	// others where it adds to the trouble; else the zero Prefix.
	Block netip.Prefix
}

func (e *InvalidError) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "entry %d: %s", p.Index+1, p.Message)
		if len(p.Suggestions) > 0 {
			fmt.Fprintf(&b, " (try %s)", strings.Join(p.Suggestions, ", "))
		}
	}
	return b.String()
}

// ParseText reads a list as a person typed or pasted it: entries separated by commas, semicolons and white space. Invisible
// characters around an entry are ignored. The error is [ErrEmpty] or an *[InvalidError].
func (r Rules) ParseText(text string) (List, error) {
	if len(text) > r.maxText() {
		return List{}, r.tooMuchText(len(text))
	}
	entries, more := r.split(text)
	return r.parse(entries, more)
}

// ParseEntries reads a list that is already split: each entry is one address or network. The errors are those of
// [Rules.ParseText].
func (r Rules) ParseEntries(texts []string) (List, error) {
	size := 0
	var entries []entry
	var more *entry
	for _, t := range texts {
		if size += len(t); size > r.maxText() {
			return List{}, r.tooMuchText(size)
		}
		if t = strings.TrimFunc(t, ignorable); t == "" || more != nil {
			continue
		}
		e := entry{len(entries), t}
		if len(entries) == r.maxNets() {
			more = &e
			continue
		}
		entries = append(entries, e)
	}
	return r.parse(entries, more)
}

func (r Rules) maxNets() int {
	if r.MaxNets == 0 {
		return defaultMaxNets
	}
	return r.MaxNets
}

func (r Rules) maxText() int {
	if r.MaxText == 0 {
		return defaultMaxText
	}
	return r.MaxText
}

func (r Rules) tooMuchText(n int) error {
	return &InvalidError{[]Problem{{
		Refusal: decisionv1.NetRefusal_NET_REFUSAL_TOO_MANY,
		Message: fmt.Sprintf("The list is %d octets of text and at most %d are permitted; join addresses into networks.", n, r.maxText()),
	}}}
}

// entry is a piece of a list that is to be one net.
type entry struct {
	index int
	text  string
}

// parse reads the entries; more is the first one above MaxNets.
func (r Rules) parse(entries []entry, more *entry) (List, error) {
	if len(entries) == 0 && more == nil {
		return List{}, ErrEmpty
	}
	nets := make([]netip.Prefix, 0, len(entries))
	seen := make(map[netip.Prefix]struct{}, len(entries))
	var problems []Problem
	for _, e := range entries {
		p, refused := r.parseNet(e.text)
		if refused != nil {
			problems = append(problems, Problem{
				Index:       e.index,
				Text:        shown(e.text),
				Refusal:     refused.reason,
				Message:     quoted(e.text) + " " + refused.fault + "; " + refused.remedy + ".",
				Suggestions: refused.suggestions,
				Block:       refused.block,
			})
			continue
		}
		if _, twice := seen[p]; !twice {
			seen[p] = struct{}{}
			nets = append(nets, p)
		}
	}
	if more != nil {
		problems = append(problems, Problem{
			Index:   more.index,
			Text:    shown(more.text),
			Refusal: decisionv1.NetRefusal_NET_REFUSAL_TOO_MANY,
			Message: fmt.Sprintf("%s is entry %d and a list may have %d; join addresses into networks.", quoted(more.text), more.index+1, r.maxNets()),
		})
	}
	if problems != nil {
		return List{}, &InvalidError{problems}
	}
	return List{nets}, nil
}

// ignorable reports whether a character around an entry means nothing: white space, and what is invisible, such as
// the zero width space and the byte order mark that come along with a paste.
func ignorable(c rune) bool { return unicode.IsSpace(c) || unicode.Is(unicode.Cf, c) }

// split cuts text at commas, semicolons and white space. It returns the first MaxNets pieces, and the one behind them.
func (r Rules) split(text string) (entries []entry, more *entry) {
	type piece struct {
		start, end int
		joined     bool // only blanks stand between it and the piece before
	}
	var pieces []piece
	joined := false
	add := func(start, end int) {
		piece := piece{start, end, joined}
		t := strings.TrimLeftFunc(text[start:end], ignorable)
		piece.start = end - len(t)
		t = strings.TrimRightFunc(t, ignorable)
		piece.end = piece.start + len(t)
		if t != "" && len(pieces) <= r.maxNets() {
			pieces = append(pieces, piece)
			joined = true
		}
	}
	start := 0
	for i, c := range text {
		if separator(c) {
			add(start, i)
			start = i + utf8.RuneLen(c)
			joined = joined && !strings.ContainsRune(",;\n\r", c)
		}
	}
	add(start, len(text))

	if n := r.maxNets(); len(pieces) > n {
		more = &entry{n, text[pieces[n].start:pieces[n].end]}
		pieces = pieces[:n]
	}
	for i := 0; i < len(pieces); {
		// What blanks have torn apart is refused as the one thing it was, not as two or three puzzles.
		n := 1
		for k := 2; k <= 3 && i+k <= len(pieces) && pieces[i+k-1].joined; k++ {
			if r.spaced(text[pieces[i].start:pieces[i+k-1].end]) != nil {
				n = k
			}
		}
		entries = append(entries, entry{i, text[pieces[i].start:pieces[i+n-1].end]})
		i += n
	}
	return entries, more
}

func separator(c rune) bool { return c == ',' || c == ';' || unicode.IsSpace(c) }

// List is the list of a mailbox: nets in canonical form, in the order in which they were given, without duplicates. The
// zero value is no list.
type List struct{ nets []netip.Prefix }

// RestoreList returns the list that [List.Strings] wrote, applying no rules: what was accepted once stays valid. Text that is
// not exactly canonical is an error.
func RestoreList(canonical []string) (List, error) {
	if len(canonical) == 0 {
		return List{}, nil
	}
	nets := make([]netip.Prefix, 0, len(canonical))
	seen := make(map[netip.Prefix]struct{}, len(canonical))
	for i, s := range canonical {
		p, err := restoreNet(s)
		if err != nil {
			return List{}, fmt.Errorf("net %d: %w", i, err)
		}
		if _, twice := seen[p]; twice {
			return List{}, fmt.Errorf("net %d: %v is there twice", i, p)
		}
		seen[p] = struct{}{}
		nets = append(nets, p)
	}
	return List{nets}, nil
}

func restoreNet(s string) (netip.Prefix, error) {
	var p netip.Prefix
	if addr, err := netip.ParseAddr(s); err == nil {
		p = netip.PrefixFrom(addr, addr.BitLen())
	} else if p, err = netip.ParsePrefix(s); err != nil {
		return netip.Prefix{}, fmt.Errorf("%s is not a net", quoted(s))
	}
	if p.Addr().Is4In6() || p != p.Masked() || FormatNet(p) != s {
		return netip.Prefix{}, fmt.Errorf("%s is not in canonical form", quoted(s))
	}
	return p, nil
}

// Len returns the number of nets.
func (l List) Len() int { return len(l.nets) }

// Strings returns the nets as [FormatNet] writes them, in their order.
func (l List) Strings() []string {
	s := make([]string, len(l.nets))
	for i, p := range l.nets {
		s[i] = FormatNet(p)
	}
	return s
}

// Equal reports whether both lists have the same nets in the same order.
func (l List) Equal(o List) bool { return slices.Equal(l.nets, o.nets) }

// Encode returns the set of nets as Entry.nets of allowednets.feed.v1 carries it: each as one octet 4 or 6, the octets of the
// address and one octet prefix length; sorted by these. An empty list is nil.
func (l List) Encode() []byte {
	var b []byte
	for _, p := range slices.SortedFunc(slices.Values(l.nets), compareNets) {
		b = appendNet(b, p)
	}
	return b
}

// FormatNet returns the canonical text of a net (RFC 5952), which for a single address is the bare address.
func FormatNet(p netip.Prefix) string {
	var buf [len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128")]byte // one allocation instead of two
	if p.IsSingleIP() {
		return string(p.Addr().AppendTo(buf[:0]))
	}
	return string(p.AppendTo(buf[:0]))
}
