package allow

import (
	"crypto/sha256"
	"strings"

	"golang.org/x/net/idna"
	"golang.org/x/text/secure/precis"
)

// Limits of RFC 5321 §4.5.3.1 and RFC 1035 §2.3.4, in octets of the canonical form.
const (
	maxLocal  = 64
	maxDomain = 255
	maxLabel  = 63
)

// maxRaw bounds what the full path is given to chew on. A canonical name has at most 320 octets, and no way to write one
// needs more than six times that.
const maxRaw = 2048

// Mailbox is the canonical name of a mailbox, local@domain. Equal mailboxes are ==. The zero value is no mailbox.
type Mailbox struct{ name string }

// NameError says why a mailbox or domain was refused.
type NameError struct {
	Text    string // what was given, cut to 100 characters
	Problem string // what is wrong with it and what to do, to be read behind Text
}

func (e *NameError) Error() string { return quoted(e.Text) + " " + e.Problem }

// ParseMailbox returns the canonical form of a mailbox: the local part by the PRECIS profile UsernameCaseMapped
// (RFC 8265 §3.3), the domain by IDNA lookup in lower-case A-labels (RFC 5891 §5, UTS #46, non-transitional) without
// trailing dot. Other names for the same person, such as user+tag@, are other mailboxes. The error is a *[NameError].
//
// The result of a name that is canonical already, and ASCII, shares its memory and costs no allocation.
func ParseMailbox(s string) (Mailbox, error) {
	at := strings.LastIndexByte(s, '@')
	if at < 0 {
		return Mailbox{}, nameError(s, "has no domain; write the mailbox as local@domain")
	}
	return newMailbox(s, s[:at], s[at+1:])
}

// CompleteMailbox is [ParseMailbox] for the names a mail client sends: a name without @ is taken to be in defaultDomain,
// unless that is empty.
func CompleteMailbox(s, defaultDomain string) (Mailbox, error) {
	if defaultDomain != "" && strings.IndexByte(s, '@') < 0 {
		return newMailbox(s, s, defaultDomain)
	}
	return ParseMailbox(s)
}

// ParseDomain returns the canonical form of a mail domain, as in [Mailbox.Domain]. The error is a *[NameError].
func ParseDomain(s string) (string, error) {
	d, problem := canonicalDomain(s)
	if problem != "" {
		return "", nameError(s, problem)
	}
	return d, nil
}

// String returns the canonical name, local@domain, or "" for the zero value.
func (m Mailbox) String() string { return m.name }

// Domain returns the canonical domain.
func (m Mailbox) Domain() string { return m.name[strings.LastIndexByte(m.name, '@')+1:] }

// ID stands for a mailbox where the name would take too much memory. It hides nothing: names can be guessed.
type ID [16]byte

// ID returns the first 16 octets of the SHA-256 of the canonical name.
func (m Mailbox) ID() ID {
	var buf [maxLocal + 1 + maxDomain]byte
	sum := sha256.Sum256(buf[:copy(buf[:], m.name)])
	return ID(sum[:16])
}

func nameError(text, problem string) error { return &NameError{Text: shown(text), Problem: problem} }

// newMailbox canonicalises local and domain. text is what the caller was given: it is named by errors, and becomes the
// mailbox itself if it is canonical.
func newMailbox(text, local, domain string) (Mailbox, error) {
	l, problem := canonicalLocal(local)
	if problem != "" {
		return Mailbox{}, nameError(text, problem)
	}
	d, problem := canonicalDomain(domain)
	if problem != "" {
		return Mailbox{}, nameError(text, problem)
	}
	if len(text) == len(l)+1+len(d) && text[:len(l)] == l && text[len(l)+1:] == d {
		return Mailbox{text}, nil
	}
	return Mailbox{l + "@" + d}, nil
}

// What is wrong with a name.
const (
	localEmpty    = "has nothing before the @; write the mailbox as local@domain"
	localLong     = "has more than 64 octets before the @; give the mailbox's real name"
	localChars    = `has a character before the @ that a mailbox cannot have: remove spaces, control characters, quotes, \, * and extra @`
	domainEmpty   = "has an empty domain; write the mailbox as local@domain"
	domainLabel   = "has an empty part in its domain; remove the extra dot"
	domainLong    = "has a domain of more than 255 octets, or a part of it has more than 63; give the real domain"
	domainChars   = "has a domain that no host can have; use letters, digits, hyphens, underscores and dots"
	domainAddress = "has an address in place of a domain; give the mailbox's domain name"
)

// canonicalLocal returns the canonical local part, or what is wrong with s. It is [fullLocal] with a fast path for ASCII.
func canonicalLocal(s string) (canonical, problem string) {
	upper := false
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 0x80:
			return fullLocal(s)
		case !localByte(c):
			return "", localChars
		case 'A' <= c && c <= 'Z':
			upper = true
		}
	}
	switch {
	case s == "":
		return "", localEmpty
	case len(s) > maxLocal:
		return "", localLong
	case upper:
		return strings.ToLower(s), ""
	}
	return s, ""
}

// localByte reports whether an ASCII octet may stand in a local part: PRECIS permits all that print except the space
// (RFC 8264 §9.11), and the others are refused because quoting, Dovecot's master users (alice*admin) and the split at
// the last @ give them a second meaning.
func localByte(c byte) bool {
	return c > ' ' && c < 0x7f && c != '"' && c != '\\' && c != '@' && c != '*'
}

func fullLocal(s string) (canonical, problem string) {
	if s == "" {
		return "", localEmpty
	}
	if len(s) > maxRaw {
		return "", localLong
	}
	l, err := precis.UsernameCaseMapped.String(s)
	if err != nil {
		return "", localChars
	}
	// Only now: full-width forms map to the refused characters.
	for i := range len(l) {
		if l[i] < 0x80 && !localByte(l[i]) {
			return "", localChars
		}
	}
	if len(l) > maxLocal {
		return "", localLong
	}
	// A canonical name must stay one. PRECIS does not promise that.
	if again, err := precis.UsernameCaseMapped.String(l); err != nil || again != l {
		return "", localChars
	}
	return l, ""
}

// canonicalDomain returns the canonical domain, or what is wrong with s. It is [fullDomain] with a fast path for ASCII.
func canonicalDomain(s string) (canonical, problem string) {
	upper, number := false, true
	label := 0 // where the current label begins
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', c == '_':
			number = false
		case '0' <= c && c <= '9':
		case c == '.':
			if i == label || i-label > maxLabel {
				return fullDomain(s)
			}
			label = i + 1
		case 'A' <= c && c <= 'Z':
			upper, number = true, false
		case c == '-':
			// IDNA has rules for hyphens at the ends of a label, and at its third and fourth place as in xn--.
			number = false
			if i == label || i-label == 3 && s[i-1] == '-' || i == len(s)-1 || s[i+1] == '.' {
				return fullDomain(s)
			}
		default:
			return fullDomain(s)
		}
	}
	if number || len(s) > maxDomain || len(s)-label > maxLabel {
		return fullDomain(s)
	}
	s = strings.TrimSuffix(s, ".")
	if upper {
		s = strings.ToLower(s)
	}
	return s, ""
}

func fullDomain(s string) (canonical, problem string) {
	if s == "" || s == "." {
		return "", domainEmpty
	}
	if len(s) > maxRaw {
		return "", domainLong
	}
	if strings.ContainsAny(s, "[:]") {
		return "", domainAddress
	}
	d, err := lookupProfile.ToASCII(s)
	if err != nil {
		return "", domainChars
	}
	d = strings.TrimSuffix(d, ".")
	if d == "" {
		return "", domainEmpty
	}
	number := true
	for i := range len(d) {
		c := d[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return "", domainChars
		}
		number = number && (c <= '9' && c != '-')
	}
	if number {
		// Digits and dots alone are an IPv4 address in one of the notations of inet_aton; no top-level domain is a number.
		return "", domainAddress
	}
	if len(d) > maxDomain {
		return "", domainLong
	}
	for label := range strings.SplitSeq(d, ".") {
		if label == "" {
			return "", domainLabel
		}
		if len(label) > maxLabel {
			return "", domainLong
		}
	}
	// A canonical name must stay one. idna makes labels that it refuses itself: of lℵl, because ℵ is no right-to-left letter and
	// what it maps to is, and of broken UTF-8.
	if again, err := lookupProfile.ToASCII(d); err != nil || again != d {
		return "", domainChars
	}
	return d, ""
}

// lookupProfile is [idna.Lookup] without its ban on everything but letters, digits and hyphens, because there are mail
// domains with underscores.
//
//nolint:gochecknoglobals // a constant in all but syntax
var lookupProfile = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false))
