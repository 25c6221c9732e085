package allow

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

func TestDecide(t *testing.T) {
	set := mustSet(t, "8.8.8.0/24", "8.8.8.8", "2a00:1450::/32", "10.1.0.0/16", "192.0.2.0/24")
	for _, tt := range []struct{ client, want, net string }{
		{"8.8.8.1", "MATCHED", "8.8.8.0/24"},
		{"8.8.8.8", "MATCHED", "8.8.8.8"},
		{"::ffff:8.8.8.1", "MATCHED", "8.8.8.0/24"},
		{"2a00:1450::1", "MATCHED", "2a00:1450::/32"},
		{"10.1.2.3", "MATCHED", "10.1.0.0/16"}, // permitted by the operator
		{"8.8.9.1", "NOT_IN_ALLOWED_NETS", ""},
		{"2a00:1451::1", "NOT_IN_ALLOWED_NETS", ""},
		{"192.0.0.9", "NOT_IN_ALLOWED_NETS", ""}, // special, and globally reachable
		{"192.31.196.1", "NOT_IN_ALLOWED_NETS", ""},
		{"10.2.2.3", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"::ffff:10.2.2.3", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"127.0.0.1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"100.64.0.1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"fd00::1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		// IPv4 addresses embedded by translators and tunnels are not those addresses.
		{"2002:808:801::1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"2001:0:808:801::", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"64:ff9b::8.8.8.1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"::8.8.8.1", "CLIENT_ADDRESS_NOT_PUBLIC", ""},
		{"", "CLIENT_ADDRESS_UNKNOWN", ""},
	} {
		client, err := ParseClient(tt.client)
		if err != nil {
			t.Fatal(err)
		}
		got := Decide(set, client)
		want := Outcome{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason(decisionv1.Reason_value["REASON_"+tt.want])}
		if tt.net != "" {
			l, err := RestoreList([]string{tt.net})
			if err != nil {
				t.Fatal(err)
			}
			want.Verdict, want.Net = decisionv1.Verdict_VERDICT_ALLOW, l.nets[0]
		}
		if got != want {
			t.Errorf("%q: %v; want %v", tt.client, got, want)
		}
		if got := Decide(nil, client); got != (Outcome{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_UNRESTRICTED}) {
			t.Errorf("%q without a list: %v", tt.client, got)
		}
	}
	// ParseClient keeps these out. Should one come in another way, it is not let in.
	all := mustSet(t, "0.0.0.0/0", "::/0")
	if got := Decide(all, netip.MustParseAddr("2a00::1%eth0")); got.Verdict != decisionv1.Verdict_VERDICT_DENY {
		t.Errorf("a zone: %v", got)
	}
	if got := Decide(all, netip.MustParseAddr("::ffff:8.8.8.8%eth0")); got.Net.String() != "0.0.0.0/0" {
		t.Errorf("a mapped address with a zone: %v", got)
	}
}

func TestParseClient(t *testing.T) {
	for in, want := range map[string]string{
		"8.8.8.8": "8.8.8.8", "::ffff:8.8.8.8": "8.8.8.8", "2A00::1": "2a00::1", "10.0.0.1": "10.0.0.1", "::": "::", "::ffff:0:0": "0.0.0.0",
	} {
		if addr, err := ParseClient(in); err != nil || addr.String() != want {
			t.Errorf("%q: %v, %v; want %s", in, addr, err, want)
		}
	}
	if addr, err := ParseClient(""); err != nil || addr.IsValid() {
		t.Errorf("empty: %v, %v", addr, err)
	}
	for _, in := range []string{
		" 8.8.8.8", "8.8.8.8\r\n", "8.8.8.8:143", "[2a00::1]", "fe80::1%eth0", "::ffff:8.8.8.8%eth0", "8.8.8.8, 10.0.0.1", "8.8.8.0/24", "unknown",
		"localhost", "08.8.8.8", "0x8080808", "\xff", strings.Repeat("1", 1<<20),
	} {
		addr, err := ParseClient(in)
		var ae *AddressError
		if !errors.As(err, &ae) || addr.IsValid() {
			t.Errorf("%.40q: %v, %v", in, addr, err)
			continue
		}
		if m := err.Error(); strings.ContainsAny(m, "\r\n") || !utf8.ValidString(m) || len(m) > 1000 {
			t.Errorf("%.40q: message %q", in, m)
		}
	}
}

func TestScope(t *testing.T) {
	withSubmission, err := NewScope(decisionv1.Service_SERVICE_SMTP_SUBMISSION)
	if err != nil {
		t.Fatal(err)
	}
	restricted := map[decisionv1.Service]bool{
		decisionv1.Service_SERVICE_IMAP: true, decisionv1.Service_SERVICE_POP3: true, decisionv1.Service_SERVICE_MANAGESIEVE: true,
		decisionv1.Service_SERVICE_WEBMAIL: true,
	}
	for n, name := range decisionv1.Service_name {
		svc := decisionv1.Service(n)
		want := restricted[svc]
		wantKnown := svc != decisionv1.Service_SERVICE_UNSPECIFIED
		if got, known := (Scope{}).Restricts(svc); got != want || known != wantKnown {
			t.Errorf("%s: %v, %v", name, got, known)
		}
		want = want || svc == decisionv1.Service_SERVICE_SMTP_SUBMISSION
		if got, known := withSubmission.Restricts(svc); got != want || known != wantKnown {
			t.Errorf("%s with submission restricted: %v, %v", name, got, known)
		}
		if _, err := NewScope(svc); (err == nil) != (svc == decisionv1.Service_SERVICE_SMTP_SUBMISSION) {
			t.Errorf("%s added: %v", name, err)
		}
	}
	if got, known := (Scope{}).Restricts(99); got || known {
		t.Errorf("an unknown service: %v, %v", got, known)
	}
	if s, err := NewScope(); err != nil || s != (Scope{}) {
		t.Errorf("nothing added: %v, %v", s, err)
	}
}

// BenchmarkDecision is a check but for finding the set of the mailbox: name, id, address and match.
func BenchmarkDecision(b *testing.B) {
	set := mustSet(b, "8.8.8.0/24", "9.9.9.9", "2a00:1450::/32")
	for _, bm := range []struct{ name, client string }{{"match", "8.8.8.8"}, {"no match", "1.1.1.1"}, {"not public", "192.168.0.1"}, {"IPv6", "2a00:1450::1"}} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				m, err := ParseMailbox("alice.smith@mail.example.org")
				if err != nil {
					b.Fatal(err)
				}
				client, err := ParseClient(bm.client)
				if err != nil {
					b.Fatal(err)
				}
				if id := m.ID(); id == (ID{}) {
					b.Fatal("no id")
				}
				Decide(set, client)
			}
		})
	}
}
