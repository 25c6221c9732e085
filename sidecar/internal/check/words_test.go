package check

import (
	"os"
	"regexp"
	"testing"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// TestWords compares the words that the doors know with the table in docs/semantics.md.
func TestWords(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/semantics.md")
	if err != nil {
		t.Fatal(err)
	}
	translate := map[string]func(string) decisionv1.Service{
		"Dovecot, `protocol`": DovecotService, "forwarded by, on IMAP": forwardedService,
		"nginx mail proxy, `Auth-Protocol`": nginxService, "nginx `auth_request` and Envoy, `service`": forwardedService,
	}
	words := 0
	for _, row := range regexp.MustCompile("(?m)^\\| ((?:Dovecot|forwarded|nginx)[^|]*) \\| (.*) \\| `([A-Z0-9_]+)` \\|$").FindAllStringSubmatch(string(doc), -1) {
		for _, word := range regexp.MustCompile("[a-z0-9]+").FindAllString(row[2], -1) {
			words++
			if translate[row[1]] == nil {
				t.Fatalf("nobody knows the peer %s", row[1])
			}
			if got := translate[row[1]](word); got.String() != "SERVICE_"+row[3] {
				t.Errorf("%s %q means %v; the table says %s", row[1], word, got, row[3])
			}
		}
	}
	if words != 19 {
		t.Errorf("the tables have %d words; the code knows 19", words)
	}
	for _, word := range []string{"", "IMAP", "imaps", "http", "webmail", "caldav", "auth"} {
		if got := DovecotService(word); got != decisionv1.Service_SERVICE_UNSPECIFIED {
			t.Errorf("protocol %q means %v", word, got)
		}
	}
	for _, via := range []string{"", "imap", "Webmail", "smtp", "dav"} {
		if got := forwardedService(via); got != decisionv1.Service_SERVICE_UNSPECIFIED {
			t.Errorf("forwarded by %q means %v", via, got)
		}
	}
	for _, word := range []string{"", "IMAP", "imaps", "submission", "sieve", "http"} {
		if got := nginxService(word); got != decisionv1.Service_SERVICE_UNSPECIFIED {
			t.Errorf("nginx's protocol %q means %v", word, got)
		}
	}
}
