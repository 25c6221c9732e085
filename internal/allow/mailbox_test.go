package allow

import (
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseMailbox(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	domain255 := strings.Repeat(label63+".", 3) + label63 // 255 octets
	for _, tt := range []struct{ name, in, want string }{
		{"canonical", "alice@example.org", "alice@example.org"},
		{"case", "Alice@Example.ORG", "alice@example.org"},
		{"trailing dot", "alice@example.org.", "alice@example.org"},
		{"tags are other mailboxes", "alice+shop@example.org", "alice+shop@example.org"},
		{"printing ASCII", "!#$%&'()+,-./:;<=>?[]^_`{|}~@example.org", "!#$%&'()+,-./:;<=>?[]^_`{|}~@example.org"},
		{"dots anywhere", ".a..b.@example.org", ".a..b.@example.org"},
		{"underscore in the domain", "a@_x.my_host.example", "a@_x.my_host.example"},
		{"hyphens inside labels", "a@a-b.c--d.xyz-4.example", "a@a-b.c--d.xyz-4.example"},
		{"one label", "root@localhost", "root@localhost"},
		{"digits in labels", "a@1.2.3.4.example", "a@1.2.3.4.example"},
		{"digits and one letter", "a@1.2.3.4a", "a@1.2.3.4a"},
		{"64 octets", strings.Repeat("l", 64) + "@example.org", strings.Repeat("l", 64) + "@example.org"},
		{"255 octets", "a@" + domain255, "a@" + domain255},
		{"255 octets and a dot", "a@" + domain255 + ".", "a@" + domain255},
		{"umlauts", "Jürgen@Bücher.example", "jürgen@xn--bcher-kva.example"},
		{"decomposed", "ju\u0308rgen@bu\u0308cher.example", "jürgen@xn--bcher-kva.example"},
		{"A-label", "a@XN--BCHER-KVA.example", "a@xn--bcher-kva.example"},
		{"sharp s stays", "a@straße.example", "a@xn--strae-oqa.example"},
		{"full width", "ａｌｉｃｅ@ｅｘａｍｐｌｅ．ｏｒｇ", "alice@example.org"},
		{"ideographic full stops", "a@例え。jp。", "a@xn--r8jz45g.jp"},
		{"Arabic", "علي@مثال.example", "علي@xn--mgbh0fb.example"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := ParseMailbox(tt.in)
			if err != nil || m.String() != tt.want {
				t.Fatalf("ParseMailbox(%q) = %q, %v; want %q", tt.in, m, err, tt.want)
			}
			if _, domain, _ := strings.Cut(tt.want, "@"); m.Domain() != domain {
				t.Errorf("Domain() = %q; want %q", m.Domain(), domain)
			}
			if again, err := ParseMailbox(m.String()); err != nil || again != m {
				t.Errorf("second time: %q, %v", again, err)
			}
		})
	}
}

func TestParseMailboxRefuses(t *testing.T) {
	label64 := strings.Repeat("a", 64)
	for _, tt := range []struct{ name, in, problem string }{
		{"empty", "", "no domain"},
		{"no domain", "alice", "no domain"},
		{"full-width at", "alice＠example.org", "no domain"},
		{"empty local part", "@example.org", "nothing before the @"},
		{"65 octets", strings.Repeat("l", 65) + "@example.org", "more than 64"},
		{"65 octets of umlauts", strings.Repeat("ü", 32) + "l@example.org", "more than 64"},
		{"much too long", strings.Repeat("ü", 5000) + "@example.org", "more than 64"},
		{"quotes", `"alice"@example.org`, "character before the @"},
		{"backslash", `al\ice@example.org`, "character before the @"},
		{"master user", "alice*admin@example.org", "character before the @"},
		{"two ats", "alice@evil@example.org", "character before the @"},
		{"full-width at in the local part", "alice＠evil@example.org", "character before the @"},
		{"full-width asterisk", "alice＊admin@example.org", "character before the @"},
		{"full-width quote", "alice＂@example.org", "character before the @"},
		{"full-width backslash", "alice＼@example.org", "character before the @"},
		{"space", "alice smith@example.org", "character before the @"},
		{"space in front", " alice@example.org", "character before the @"},
		{"ideographic space", "alice\u3000@example.org", "character before the @"},
		{"no-break space", "alice\u00a0@example.org", "character before the @"},
		{"zero width space", "alice\u200b@example.org", "character before the @"},
		{"NUL", "alice\x00@example.org", "character before the @"},
		{"line feed", "alice\n@example.org", "character before the @"},
		{"DEL", "alice\x7f@example.org", "character before the @"},
		{"C1 control", "alice\u0085@example.org", "character before the @"},
		{"not UTF-8", "alice\xff@example.org", "character before the @"},
		{"directions mixed", "aعلي@example.org", "character before the @"},
		{"empty domain", "alice@", "empty domain"},
		{"dot for a domain", "alice@.", "empty domain"},
		{"ideographic dot for a domain", "alice@。", "empty domain"},
		{"empty label", "alice@example..org", "empty part"},
		{"leading dot", "alice@.example.org", "empty part"},
		{"two trailing dots", "alice@example.org..", "empty part"},
		{"empty label by mapping", "alice@example.。org", "empty part"},
		{"label of 64", "alice@" + label64 + ".example", "more than 255 octets, or a part"},
		{"256 octets", "alice@" + strings.Repeat("a.", 126) + "abcd", "more than 255"},
		{"much too long a domain", "alice@" + strings.Repeat("ü.", 5000) + "org", "more than 255"},
		{"space in the domain", "alice@exam ple.org", "no host can have"},
		{"slash in the domain", "alice@example.org/x", "no host can have"},
		{"asterisk in the domain", "alice@*.example.org", "no host can have"},
		{"full-width at in the domain", "alice@evil＠example.org", "no host can have"},
		{"line feed in the domain", "alice@example.org\n", "no host can have"},
		{"not UTF-8 in the domain", "alice@ex\xffample.org", "no host can have"},
		{"hyphen in front", "alice@-a.example", "no host can have"},
		{"hyphen behind", "alice@a-.example", "no host can have"},
		{"hyphens at the third and fourth place", "alice@ab--cd.example", "no host can have"},
		{"broken A-label", "alice@xn--a.example", "no host can have"},
		{"A-label of ASCII", "alice@xn--abc-.example", "no host can have"},
		{"directions mixed in the domain", "alice@aمثال.example", "no host can have"},
		{"directions mixed by mapping", "alice@lℵl.example", "no host can have"},
		{"IPv4 literal", "alice@192.0.2.1", "an address in place of a domain"},
		{"IPv4 literal in brackets", "alice@[192.0.2.1]", "an address in place of a domain"},
		{"IPv6 literal", "alice@[IPv6:2001:db8::1]", "an address in place of a domain"},
		{"IPv6 without brackets", "alice@2001:db8::1", "an address in place of a domain"},
		{"full-width IPv4", "alice@１９２．０．２．１", "an address in place of a domain"},
		{"IPv4 and a dot", "alice@192.0.2.1.", "an address in place of a domain"},
		{"short IPv4", "alice@127.1", "an address in place of a domain"},
		{"number", "alice@2130706433", "an address in place of a domain"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := ParseMailbox(tt.in)
			var ne *NameError
			if !errors.As(err, &ne) || m != (Mailbox{}) {
				t.Fatalf("ParseMailbox(%q) = %q, %v; want a *NameError", tt.in, m, err)
			}
			if !strings.Contains(ne.Problem, tt.problem) {
				t.Errorf("problem %q; want %q", ne.Problem, tt.problem)
			}
			if msg := err.Error(); strings.ContainsAny(msg, "\r\n\x00") || !utf8.ValidString(msg) || utf8.RuneCountInString(ne.Text) > 100 {
				t.Errorf("message %q", msg)
			}
		})
	}
}

func TestCompleteMailbox(t *testing.T) {
	for _, tt := range []struct{ in, domain, want string }{
		{"alice", "example.org", "alice@example.org"},
		{"ALICE", "Example.org.", "alice@example.org"},
		{"alice@example.net", "example.org", "alice@example.net"},
		{"alice", "", ""},
		{"", "example.org", ""},
		{"alice＠evil.example", "example.org", ""},
		{"alice", "exa mple.org", ""},
		{"alice@", "example.org", ""},
	} {
		m, err := CompleteMailbox(tt.in, tt.domain)
		if m.String() != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("CompleteMailbox(%q, %q) = %q, %v; want %q", tt.in, tt.domain, m, err, tt.want)
		}
	}
}

func TestParseDomain(t *testing.T) {
	if d, err := ParseDomain("Bücher.Example."); d != "xn--bcher-kva.example" || err != nil {
		t.Errorf("ParseDomain = %q, %v", d, err)
	}
	d, err := ParseDomain("alice@example.org")
	var ne *NameError
	if !errors.As(err, &ne) || d != "" || ne.Text != "alice@example.org" {
		t.Errorf("ParseDomain of a mailbox = %q, %v", d, err)
	}
}

func TestMailboxID(t *testing.T) {
	m := mustMailbox(t, "Alice@example.org")
	sum := sha256.Sum256([]byte("alice@example.org"))
	if m.ID() != ID(sum[:16]) {
		t.Errorf("ID() = %x; want %x", m.ID(), sum[:16])
	}
}

func TestCanonicalMailboxDoesNotAllocate(t *testing.T) {
	domain := strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 63)
	for _, s := range []string{"a@b", "alice.smith+tag@a-b.abc-d.my_host.a--b.example.org", strings.Repeat("l", 64) + "@" + domain} {
		if n := testing.AllocsPerRun(100, func() {
			m, err := ParseMailbox(s)
			if id := m.ID(); err != nil || id == (ID{}) {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%q: %v allocations", s, n)
		}
	}
}

// Every character, alone and between letters, is canonicalised to something that stays as it is.
func TestCanonicalFormIsStable(t *testing.T) {
	for c := rune(0); c <= utf8.MaxRune; c++ {
		if c == 0x32000 {
			c = 0xe0000 // nothing is assigned between
		}
		for _, s := range []string{string(c), "l" + string(c) + "l"} {
			for _, full := range []func(string) (string, string){fullLocal, fullDomain} {
				once, problem := full(s)
				if problem != "" {
					continue
				}
				if again, problem := full(once); again != once || problem != "" {
					t.Fatalf("%q → %q → %q %s", s, once, again, problem)
				}
			}
		}
		if c == 0xe0fff {
			break
		}
	}
}

func mustMailbox(t testing.TB, s string) Mailbox {
	t.Helper()
	m, err := ParseMailbox(s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// The fast paths for ASCII and the full paths give the same names.
func FuzzNameFastPath(f *testing.F) {
	for _, s := range []string{
		"", ".", "a", "A", "alice", "Alice.Smith+Tag", "example.org", "Example.ORG.", "a..b", ".a", "a.", "a..", "-a", "a-", "a-.b",
		"a.-b", "ab--c", "ab--cd", "xn--a", "xn--bcher-kva", "XN--BCHER-KVA", "xn--", "xn--abc-", "_x", "a_b", "1.2.3.4", "1.2.3.4.",
		"1", "1a", "a*b", `a"b`, `a\b`, "a@b", "a b", "a\x00", "a\x7f", "~!#$", "bücher", "ａ", "a。b", "：", "علي", "a\u00ad", "ǆ", "İ",
		"aͅ", "ﬃ", "ß", "ẞ", "ς", "K", "l·l", "a\u200db", "क्\u200dष", "٣", "a\u0338", "www.a-b.c-", "3--4", "r3---sn-x", "a.b-", "\xff",
		strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("a", 65), strings.Repeat("a.", 127) + "a", strings.Repeat("a.", 128),
		strings.Repeat("ü", 32), strings.Repeat("ü", 33),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, path := range []struct {
			name       string
			fast, full func(string) (string, string)
		}{
			{"local", canonicalLocal, fullLocal},
			{"domain", canonicalDomain, fullDomain},
		} {
			fast, p1 := path.fast(s)
			full, p2 := path.full(s)
			if fast != full || (p1 == "") != (p2 == "") {
				t.Errorf("%s %q: fast %q %q, full %q %q", path.name, s, fast, p1, full, p2)
			}
			if p1 != "" {
				continue
			}
			if again, problem := path.fast(fast); again != fast || problem != "" {
				t.Errorf("%s %q → %q → %q %s", path.name, s, fast, again, problem)
			}
		}
	})
}

// What an accepted mailbox promises, whatever was given.
func FuzzParseMailbox(f *testing.F) {
	for _, s := range []string{
		"alice@example.org", "Alice@Example.ORG.", "a@b@c", "a＠b@c", "a@b＠c", "@", "a@", "@b", "ü@ü", "a*b@c", `"a"@b`, "a@1.2.3.4",
		"a@[::1]", "a\r\n@b", "a@b\r\n", "a@b。", "a@b/c", "\xff@\xff", "a@xn--a", "a@a_b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParseMailbox(s)
		if err != nil {
			if msg := err.Error(); !utf8.ValidString(msg) || strings.ContainsAny(msg, "\r\n\x00") || len(msg) > 4096 {
				t.Errorf("%q: message %q", s, msg)
			}
			return
		}
		if again, err := ParseMailbox(m.String()); err != nil || again != m {
			t.Errorf("%q → %q → %q, %v", s, m, again, err)
		}
		local, domain, _ := strings.Cut(m.String(), "@")
		if domain != m.Domain() || local == "" || len(local) > 64 || domain == "" || len(domain) > 255 || !utf8.ValidString(local) {
			t.Errorf("%q → %q", s, m)
		}
		if strings.ContainsAny(local, "\"\\@* \t\r\n\x00\x7f") || strings.Trim(domain, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
			t.Errorf("%q → %q", s, m)
		}
		if d, err := ParseDomain(m.Domain()); d != m.Domain() || err != nil {
			t.Errorf("ParseDomain(%q) = %q, %v", m.Domain(), d, err)
		}
		if c, err := CompleteMailbox(s, "example.org"); c != m || err != nil {
			t.Errorf("CompleteMailbox(%q) = %q, %v", s, c, err)
		}
	})
}

func BenchmarkParseMailbox(b *testing.B) {
	for _, bm := range []struct{ name, in string }{
		{"canonical", "alice.smith@mail.example.org"},
		{"upper", "Alice.Smith@mail.example.org"},
		{"alabel", "alice.smith@xn--bcher-kva.example"},
		{"unicode", "jürgen@bücher.example"},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ParseMailbox(bm.in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("ID", func(b *testing.B) {
		m := mustMailbox(b, "alice.smith@mail.example.org")
		b.ReportAllocs()
		for b.Loop() {
			m.ID()
		}
	})
}
