package check_test

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// mail returns the headers that nginx's mail proxy sends for alice at a wrong address, and changes as for asks.
func mail(changes ...string) http.Header {
	h := http.Header{
		"Auth-Method": {"plain"}, "Auth-User": {"alice@example.org"}, "Auth-Pass": {"hunter2"}, "Auth-Protocol": {"imap"},
		"Auth-Login-Attempt": {"1"}, "Client-Ip": {"1.1.1.1"},
	}
	return changed(h, changes...)
}

func withBackends(cfg *check.HTTPConfig) {
	cfg.NginxBackends = map[string]netip.AddrPort{
		"imap": netip.MustParseAddrPort("192.0.2.10:143"), "pop3": netip.MustParseAddrPort("[2001:db8::10]:110"), "smtp": netip.MustParseAddrPort("192.0.2.10:587"),
	}
}

// routeOf reads an answer as strictly as it must be written, and returns the server, or what the client gets to read.
func routeOf(t testing.TB, resp reply) string {
	t.Helper()
	status, server, port := resp.header.Get("Auth-Status"), resp.header.Get("Auth-Server"), resp.header.Get("Auth-Port")
	if resp.code != http.StatusOK || resp.body != "" || status == "" || len(status) > 600 || !utf8.ValidString(status) || strings.ContainsFunc(status, unicode.IsControl) {
		t.Fatalf("%v", resp)
	}
	if len(resp.header["Auth-Status"]) != 1 || resp.header.Get("Auth-Wait") != "" || resp.header.Get("Auth-Pass") != "" || resp.header.Get("Auth-User") != "" {
		t.Fatalf("%v", resp)
	}
	if (server != "") != (status == "OK") || (port != "") != (status == "OK") {
		t.Fatalf("%v", resp)
	}
	if status == "OK" {
		return server + " " + port
	}
	return status
}

func TestNginxMail(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	h := f.http(withBackends)
	const (
		imapServer, popServer, smtpServer = "192.0.2.10 143", "2001:db8::10 110", "192.0.2.10 587"

		user, client, protocol, proxied = "Auth-User: ", "Client-IP: ", "Auth-Protocol: ", "Proxy-Protocol-Addr: "
		wrongIMAP                       = "[AUTHENTICATIONFAILED] Authentication failed."
		wrongPOP3                       = "[AUTH] Authentication failed."
	)
	for _, c := range []struct {
		name    string
		changes []string
		want    string
	}{
		{"allowed", []string{client + "8.8.8.8"}, imapServer},
		{"allowed, IPv6", []string{client + "2a00:1450::25"}, imapServer},
		{"allowed, mapped", []string{client + "::ffff:8.8.8.8"}, imapServer},
		{"allowed, POP3", []string{client + "8.8.8.8", protocol + "pop3"}, popServer},
		{"denied", nil, "[ALERT] " + denied},
		{"denied, POP3", []string{protocol + "pop3"}, "[AUTH] " + denied},
		{"denied, mapped", []string{client + "::ffff:1.1.1.1"}, "[ALERT] " + denied},
		{"denied, upper case", []string{user + "ALICE@EXAMPLE.ORG"}, "[ALERT] " + denied},
		{"denied, percent-encoded", []string{user + "alice%40example.org"}, "[ALERT] " + denied},
		{"denied, all percent-encoded", []string{user + "%61%6C%69%63%65%40%65xample%2eorg"}, "[ALERT] " + denied},
		{"unrestricted", []string{user + "carol@example.org"}, imapServer},
		{"submission", []string{protocol + "smtp"}, smtpServer},
		{"unrestricted, not ASCII", []string{user + "j%C3%BCrgen@example.org"}, imapServer},
		{"a plus is a plus", []string{user + "carol+tag@example.org"}, imapServer},

		{"load balancer", []string{client + "10.1.2.3", proxied + "8.8.8.8"}, imapServer},
		{"load balancer, denied", []string{client + "10.1.2.3", proxied + "1.1.1.1"}, "[ALERT] " + denied},
		{"anybody's word", []string{proxied + "8.8.8.8"}, "[ALERT] " + denied},
		{"spoofed", []string{"X-Forwarded-For: 8.8.8.8", "Client-Host: dns.google"}, "[ALERT] " + denied},

		{"encoded twice", []string{user + "carol%2540example.org"}, wrongIMAP},
		{"half an escape", []string{user + "carol@example.org%2"}, wrongIMAP},
		{"no escape", []string{user + "carol@example.org%zz"}, wrongIMAP},
		{"encoded CR LF", []string{user + "carol@example.org%0d%0aAuth-Status:%20OK"}, wrongIMAP},
		{"encoded NUL", []string{user + "carol@example.org%00"}, wrongIMAP},
		{"encoded blank", []string{user + "carol@example.org%20"}, wrongIMAP},
		{"not UTF-8", []string{user + "carol%ff@example.org"}, wrongIMAP},
		{"no domain", []string{user + "carol"}, wrongIMAP},
		{"a master user", []string{user + "carol@example.org*admin"}, wrongIMAP},
		{"10 kB", []string{user + strings.Repeat("x", 10_000) + "@example.org"}, wrongIMAP},
		{"10 kB, encoded", []string{user + strings.Repeat("%0a", 10_000)}, wrongIMAP},
		{"empty user", []string{user}, wrongIMAP},
		{"no user", []string{"Auth-User:"}, wrongIMAP},
		{"two users", []string{user + "carol@example.org", "+" + user + "alice@example.org"}, wrongIMAP},
		{"no protocol", []string{"Auth-Protocol:", user + "carol@example.org"}, "Authentication failed."},
		{"two protocols", []string{"+" + protocol + "smtp"}, wrongIMAP},
		{"unknown protocol", []string{protocol + "gopher", user + "carol@example.org"}, "Authentication failed."},
		{"upper-case protocol", []string{protocol + "IMAP", user + "carol@example.org"}, "Authentication failed."},
		{"no client", []string{"Client-IP:", user + "carol@example.org"}, wrongIMAP},
		{"two clients", []string{"+" + client + "8.8.8.8"}, wrongIMAP},
		{"unix socket", []string{client + "unix:", user + "carol@example.org"}, wrongIMAP},
		{"client with port", []string{client + "8.8.8.8:993"}, wrongIMAP},
		{"two load balancers", []string{client + "10.1.2.3", proxied + "1.1.1.1", "+" + proxied + "x"}, wrongIMAP},
		{"no method", []string{"Auth-Method:", client + "8.8.8.8"}, wrongIMAP},
		{"CRAM-MD5", []string{"Auth-Method: cram-md5", client + "8.8.8.8"}, wrongIMAP},
		{"APOP", []string{"Auth-Method: apop", protocol + "pop3", client + "8.8.8.8"}, wrongPOP3},
		{"EXTERNAL", []string{"Auth-Method: external", client + "8.8.8.8"}, wrongIMAP},
		{"without authentication", []string{"Auth-Method: none", protocol + "smtp", user}, "Authentication failed."},
		{"no password", []string{"Auth-Pass:", client + "8.8.8.8"}, imapServer},
		{"two passwords", []string{"+Auth-Pass: x", client + "8.8.8.8"}, imapServer},
	} {
		if got := routeOf(t, send(t, h, http.MethodGet, "/nginx/mail", mail(c.changes...))); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
	for _, method := range []string{http.MethodHead, http.MethodPost, http.MethodPut} {
		if got := routeOf(t, send(t, h, method, "/nginx/mail", mail(user+"carol@example.org"))); got != wrongIMAP {
			t.Errorf("%s: %s", method, got)
		}
	}
	if got := routeOf(t, send(t, f.http(), http.MethodGet, "/nginx/mail", mail(client+"8.8.8.8"))); got != wrongIMAP {
		t.Errorf("without --nginx-backend: %s", got)
	}
	f.wantLog("level=WARN", "--nginx-backend names none for imap")
	if log := f.log.String(); strings.Contains(log, "hunter2") {
		t.Errorf("a password was logged:\n%s", log)
	}
}

// TestNginxMailRestrictedSubmission: the operator decides.
func TestNginxMailRestrictedSubmission(t *testing.T) {
	scope, err := allow.NewScope(submission)
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.Scope = scope })
	h := f.http(withBackends)
	if got := routeOf(t, send(t, h, http.MethodGet, "/nginx/mail", mail("Auth-Protocol: smtp"))); got != denied {
		t.Error(got)
	}
	if got := routeOf(t, send(t, h, http.MethodGet, "/nginx/mail", mail("Auth-Protocol: smtp", "Client-IP: 8.8.8.8"))); got != "192.0.2.10 587" {
		t.Error(got)
	}
}

func TestNginxMailWithoutAnswer(t *testing.T) {
	const wrong = "[AUTHENTICATIONFAILED] Authentication failed."
	never := newFixture(t, nil)
	if got := routeOf(t, send(t, never.http(withBackends), http.MethodGet, "/nginx/mail", mail())); got != "[ALERT] "+unavailable {
		t.Errorf("not synced: %s", got)
	}
	if got := routeOf(t, send(t, never.http(withBackends), http.MethodGet, "/nginx/mail", mail("Auth-Protocol: smtp"))); got != "192.0.2.10 587" {
		t.Errorf("submission, not synced: %s", got)
	}
	panics := newFixture(t, nil, func(cfg *check.DeciderConfig) { cfg.State = func() *mirror.State { panic("secret cause") } })
	if got := routeOf(t, send(t, panics.http(withBackends), http.MethodGet, "/nginx/mail", mail())); got != wrong {
		t.Errorf("panic: %s", got)
	}
	panics.wantLog("level=ERROR", "secret cause")
	if strings.Contains(panics.log.String(), "hunter2") {
		t.Error("the panic was logged with the password")
	}
	stale := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Nanosecond })
	if got := routeOf(t, send(t, stale.http(withBackends), http.MethodGet, "/nginx/mail", mail("Client-IP: 8.8.8.8"))); got != "[ALERT] "+unavailable {
		t.Errorf("stale: %s", got)
	}
	f := newFixture(t, stateOf(t, lists()))
	if got := routeOf(t, send(t, f.http(withBackends, withToken), http.MethodGet, "/nginx/mail", mail("Client-IP: 8.8.8.8"))); got != wrong {
		t.Errorf("no token: %s", got)
	}
	if got := routeOf(t, send(t, f.http(withBackends, withToken), http.MethodGet, "/nginx/mail", mail("Client-IP: 8.8.8.8", "Authorization: Bearer s3cret"))); got != "192.0.2.10 143" {
		t.Errorf("token: %s", got)
	}
	for text, want := range map[string]string{
		"": wrong, "OK": "[ALERT] OK", "no\r\na OK forged": "[ALERT] noa OK forged", "\x01": wrong,
		strings.Repeat("ü", 600): "[ALERT] " + strings.Repeat("ü", 250), "x" + strings.Repeat("ü", 600): "[ALERT] x" + strings.Repeat("ü", 249),
	} {
		h := f.http(withBackends, func(cfg *check.HTTPConfig) { cfg.DenialText = text })
		if got := routeOf(t, send(t, h, http.MethodGet, "/nginx/mail", mail())); got != want {
			t.Errorf("%.20q: %s; want %s", text, got, want)
		}
	}
}

// FuzzNginxMail: whatever comes, the answer is one that nginx understands, and alice is let through only from her nets.
func FuzzNginxMail(f *testing.F) {
	f.Add("alice%40example.org", "imap", "8.8.8.8", "plain")
	f.Add("ALICE@example.org", "pop3", "::ffff:1.1.1.1", "plain")
	f.Add("alice@example.org%0d%0a", "smtp", "", "none")
	h := newFixture(f, stateOf(f, lists())).http(withBackends)
	f.Fuzz(func(t *testing.T, user, protocol, client, method string) {
		got := routeOf(t, send(t, h, http.MethodGet, "/nginx/mail", http.Header{
			"Auth-User": {user}, "Auth-Protocol": {protocol}, "Client-Ip": {client}, "Auth-Method": {method}, "Auth-Pass": {"x"},
		}))
		passed := strings.HasPrefix(got, "192.0.2.10 ") || strings.HasPrefix(got, "2001:db8::10 ")
		if passed && (method != "plain" || protocol != "smtp" && strings.EqualFold(user, "alice@example.org") && netip.MustParseAddr(client).Unmap().Is4() && !strings.Contains(client, "8.8.8.")) {
			t.Errorf("%q %q %q %q gets to %s", user, protocol, client, method, got)
		}
	})
}
