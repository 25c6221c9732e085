package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

func TestLineReader(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	tests := []struct {
		name, input string
		want        []string // errors begin with "!"
	}{
		{"nothing", "", nil},
		{"a last line without an end", "a\nb", []string{"a", "b"}},
		{"ends, and none", "a\r\n\n\r\nb\r", []string{"a", "", "", "b"}},
		{"a byte order mark at the beginning only", "\uFEFFa\n\uFEFFb\n", []string{"a", "\uFEFFb"}},
		{"the longest line", long + "\r\nb\n", []string{long, "b"}},
		{"too long", "a\n" + long + "x\nb\n", []string{"a", "!" + errLineTooLong.Error(), "b"}},
		{"far too long", long + long + long, []string{"!" + errLineTooLong.Error()}},
		{"far too long, to the end of a buffer", strings.Repeat("x", 2<<20), []string{"!" + errLineTooLong.Error()}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sums := make(map[uint64]bool)
			for name, r := range map[string]io.Reader{"at once": strings.NewReader(tt.input), "in halves": iotest.HalfReader(strings.NewReader(tt.input))} {
				lines := newLineReader(r)
				var got []string
				for {
					line, err := lines.next()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						line = []byte("!" + err.Error())
					}
					got = append(got, string(line))
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
				if lines.number != int64(len(tt.want)) {
					t.Errorf("%s: %d lines", name, lines.number)
				}
				sums[lines.sum] = true
			}
			if len(sums) != 1 {
				t.Errorf("the sum depends on how it was read")
			}
		})
	}
	lines := newLineReader(iotest.TimeoutReader(strings.NewReader("a\nb\n")))
	for range 2 {
		_, _ = lines.next()
	}
	if _, err := lines.next(); !errors.Is(err, iotest.ErrTimeout) {
		t.Errorf("a read error became %v", err)
	}
}

// show renders what a parser made of a line.
func show(p parsed, err error) string {
	switch {
	case err != nil:
		return "!" + err.Error()
	case p.blank:
		return "blank"
	case p.nets == nil && p.mailbox.String() == "":
		return "skipped"
	}
	return fmt.Sprintf("%s %q %s", p.mailbox, p.nets, p.note)
}

func TestParseJSON(t *testing.T) {
	const notJSON = "!not a JSON object as export writes it: "
	tests := []struct{ line, want string }{
		{"", "blank"},
		{" \t", "blank"},
		{`{"mailbox":"Alice@Example.com","nets":["8.8.8.8","2a00:1450::/32"]}`, `alice@example.com ["8.8.8.8" "2a00:1450::/32"] `},
		{`{"mailbox":"a@b","nets":["8.8.8.8"],"update_time":"2026-11-23T16:05:09Z","updated_by":"carol"}`, `a@b ["8.8.8.8"] `},
		{`{"mailbox":"a@b"}`, `a@b [] `}, // the policy service refuses it as it does with set
		{`{"mailbox":"a@b","nets":["8.8.8.8"],"net":[]}`, notJSON + `json: unknown field "net"`},
		{`{"mailbox":"a@b","nets":["8.8.8.8"]} {}`, "!there is more than one JSON object on the line"},
		{`{"mailbox":"a@b","nets":["8.8.8.8"]`, notJSON + "it ends in the middle"},
		{`{"mailbox":"a@b","nets":"8.8.8.8"}`, notJSON + "json: cannot unmarshal string into Go struct field entry.nets of type []string"},
		{`alice:{PLAIN}secret:::::`, notJSON + "invalid character 'a' looking for beginning of value"},
		{"{\"mailbox\":\"\xff@b\"}", "!the line is not UTF-8 text"},
		{`{"nets":["8.8.8.8"]}`, `!"" has no domain; write the mailbox as local@domain`},
	}
	for _, tt := range tests {
		if got := show(parseJSON([]byte(tt.line), 1)); got != tt.want {
			t.Errorf("%s\n got %s\nwant %s", tt.line, got, tt.want)
		}
	}
}

func TestParsePasswdFile(t *testing.T) {
	const none = "!allow_nets is empty, so that nobody may log in, which no list can say; disable the account instead"
	tests := []struct{ name, line, domain, want string }{
		{name: "empty", line: "", want: "blank"},
		{name: "comment", line: "# alice@b:x::::::allow_nets=8.8.8.8", want: "blank"},
		{name: "no name", line: ":x::::::allow_nets=8.8.8.8", want: "blank"},
		{name: "one net", line: "alice@b:{PLAIN}s:1:1::/home::allow_nets=8.8.8.8", want: `alice@b ["8.8.8.8"] `},
		{name: "many, among other fields", line: "Alice@B:{PLAIN}s:::::: nodelay=y  allow_nets=8.8.8.8,9.9.9.0/24,,2a00:1450::/32 userdb_quota_rule=*:storage=1G", want: `alice@b ["8.8.8.8" "9.9.9.0/24" "2a00:1450::/32"] `},
		{name: "IPv6 with its colons", line: "a@b:x::::::allow_nets=::ffff:8.8.8.8,2a00::1", want: `a@b ["::ffff:8.8.8.8" "2a00::1"] `},
		{name: "no extra fields", line: "a@b:x::::/home:/bin/sh", want: "skipped"},
		{name: "only a name", line: "a@b", want: "skipped"},
		{name: "other extra fields", line: "a@b:x::::::userdb_mail=maildir:~/m", want: "skipped"},
		{name: "a field that ends in the same", line: "a@b:x::::::userdb_allow_nets=8.8.8.8", want: "skipped"},
		{name: "in the password", line: "a@b:allow_nets=8.8.8.8::::::", want: "skipped"},
		{name: "host names are for the policy service to refuse", line: "a@b:x::::::allow_nets=mail.example.com", want: `a@b ["mail.example.com"] `},
		{name: "quotes mean nothing to Dovecot", line: `a@b:x::::::allow_nets="8.8.8.8"`, want: `a@b ["\"8.8.8.8\""] `},
		{name: "nor do backslashes", line: `a@b:x\:y:::::allow_nets=8.8.8.8`, want: `a@b ["8.8.8.8"] `},
		{name: "local", line: "a@b:x::::::allow_nets=local", want: `!allow_nets=local lets nobody log in over the network, which no list can say; disable the account instead`},
		{name: "local beside others", line: "a@b:x::::::allow_nets=local,8.8.8.8", want: `a@b ["8.8.8.8"] "local", for logins without a network address, is left out`},
		{name: "no nets", line: "a@b:x::::::allow_nets=", want: none},
		{name: "only commas", line: "a@b:x::::::allow_nets=,,", want: none},
		{name: "twice", line: "a@b:x::::::allow_nets=8.8.8.8 allow_nets=9.9.9.9", want: "!allow_nets stands there twice; Dovecot demands both, which one list cannot say"},
		{name: "a variable", line: "a@b:x::::::allow_nets=%{rip}", want: "!allow_nets has a variable in it, whose value differs from login to login"},
		{name: "an alias", line: "a@b:x::::::user=c@d allow_nets=8.8.8.8", want: "!the extra field user= makes this another name of a mailbox; set the list of that mailbox"},
		{name: "an eighth colon", line: "a@b:x:::::::allow_nets=8.8.8.8", want: "!allow_nets stands behind an eighth colon, where Dovecot does not look for it"},
		{name: "a bare name", line: "alice:x::::::allow_nets=8.8.8.8", domain: "Example.com", want: `alice@example.com ["8.8.8.8"] `},
		{name: "a bare name without a domain for it", line: "alice:x::::::allow_nets=8.8.8.8", want: `!the user "alice" has no domain; --default-domain completes such names`},
		{name: "a bare name that is not restricted", line: "alice:x::::::", want: "skipped"},
		{name: "no mailbox at all", line: "al ice@b:x::::::allow_nets=8.8.8.8", want: `!"al ice@b" has a character before the @ that a mailbox cannot have: remove spaces, control characters, quotes, \, * and extra @`},
		{name: "not UTF-8", line: "a\xff@b:x::::::allow_nets=8.8.8.8", want: "!the line is not UTF-8 text"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := show(passwdFile(tt.domain)([]byte(tt.line), 1))
			if got != tt.want {
				t.Errorf("%s\n got %s\nwant %s", tt.line, got, tt.want)
			}
		})
	}
}

func TestParsePasswdFileRefusesASecondLine(t *testing.T) {
	parse := passwdFile("example.com")
	want := []string{"skipped", "!the mailbox stands on line 1 already, and that is the line which Dovecot uses", `bob@example.com ["8.8.8.8"] `, "!the mailbox stands on line 3 already, and that is the line which Dovecot uses"}
	for i, line := range []string{"alice:x", "Alice@example.com:x::::::allow_nets=8.8.8.8", "bob:x::::::allow_nets=8.8.8.8", "bob:y"} {
		if got := show(parse([]byte(line), int64(i+1))); got != want[i] {
			t.Errorf("%s: %s", line, got)
		}
	}
}

// Whatever a parser is given, it does not fail, and it does not tell the password.
func FuzzParsers(f *testing.F) {
	f.Add([]byte("alice@b"), []byte("1:1::/home::allow_nets=8.8.8.8 x=y"))
	f.Add([]byte(`{"mailbox":"a@b","nets":["8.8.8.8"]}`), []byte(""))
	f.Fuzz(func(t *testing.T, user, rest []byte) {
		_, _ = parseJSON(user, 1)
		const password = "{PLAIN}corvette-samovar"
		line := bytes.Join([][]byte{user, []byte(password), rest}, []byte(":"))
		if bytes.ContainsRune(user, ':') {
			return
		}
		if got := show(passwdFile("example.com")(line, 1)); strings.Contains(got, password) {
			t.Errorf("%q of %q", got, line)
		}
	})
}
