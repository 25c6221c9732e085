package check_test

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// pass is what nginx and its configuration understand of an answer.
type pass struct {
	allowed      bool
	reason, text string
}

// nginxPass reads an answer as strictly as it must be written.
func nginxPass(t testing.TB, resp reply) pass {
	t.Helper()
	if resp.code != http.StatusNoContent && resp.code != http.StatusForbidden || resp.body != "" || resp.header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%v", resp)
	}
	p := pass{resp.code == http.StatusNoContent, resp.header.Get("X-Allowednets-Reason"), resp.header.Get("X-Allowednets-Text")}
	if p.reason == "" || strings.ContainsFunc(p.text, unicode.IsControl) || p.allowed && p.text != "" || len(resp.header) > 4 {
		t.Fatalf("%v", resp)
	}
	return p
}

// asks returns the headers of alice's webmail at a wrong address, and changes: "Name: value" sets one, "Name:" takes it
// away, "+Name: value" adds another.
func asks(changes ...string) http.Header {
	h := http.Header{
		"X-Allowednets-Mailbox": {"alice@example.org"}, "X-Allowednets-Service": {"webmail"}, "X-Allowednets-Client": {"1.1.1.1"},
	}
	return changed(h, changes...)
}

func changed(h http.Header, changes ...string) http.Header {
	for _, c := range changes {
		name, value, set := strings.Cut(c, ": ")
		switch more, add := strings.CutPrefix(name, "+"); {
		case add:
			h.Add(more, value)
		case set:
			h.Set(name, value)
		default:
			h.Del(strings.TrimSuffix(name, ":"))
		}
	}
	return h
}

// send sends a request with these headers to a handler.
func send(t testing.TB, h http.Handler, method, path string, header http.Header) reply {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), method, path, nil)
	req.Header = header
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return reply{w.Code, w.Header(), w.Body.String()}
}

func TestNginxAuth(t *testing.T) {
	h := newFixture(t, stateOf(t, lists())).http()
	deny := func(address string) pass {
		return pass{reason: "not_in_allowed_nets", text: "Access from " + address + " is not allowed for this mailbox. Ask your administrator."}
	}
	private := func(address string) pass {
		return pass{reason: "client_address_not_public", text: deny(address).text}
	}
	yes := func(reason string) pass { return pass{allowed: true, reason: reason} }
	no := func(cause string) pass { return pass{reason: cause} }
	const (
		mailbox   = "X-Allowednets-Mailbox: "
		service   = "X-Allowednets-Service: "
		client    = "X-Allowednets-Client: "
		forwarded = "X-Forwarded-For: "
	)
	for _, c := range []struct {
		name    string
		changes []string
		want    pass
	}{
		{"allowed", []string{client + "8.8.8.8"}, yes("matched")},
		{"allowed, mapped", []string{client + "::ffff:8.8.8.8"}, yes("matched")},
		{"allowed, IPv6", []string{client + "2a00:1450::25"}, yes("matched")},
		{"allowed, upper case", []string{client + "8.8.8.8", mailbox + "ALICE@Example.ORG."}, yes("matched")},
		{"denied", nil, deny("1.1.1.1")},
		{"denied, mapped", []string{client + "::ffff:1.1.1.1"}, deny("1.1.1.1")},
		{"denied, upper case", []string{mailbox + "ALICE@Example.ORG."}, deny("1.1.1.1")},
		{"denied, private", []string{client + "10.2.0.1"}, private("10.2.0.1")},
		{"unrestricted", []string{mailbox + "carol@example.org"}, yes("unrestricted")},
		{"unrestricted, not ASCII", []string{mailbox + "jürgen@bücher.example"}, yes("unrestricted")},

		{"caldav", []string{service + "caldav"}, yes("service_exempt")},
		{"carddav", []string{service + "carddav"}, yes("service_exempt")},
		{"webdav", []string{service + "webdav"}, yes("service_exempt")},
		{"caldav, nobody yet", []string{service + "caldav", "X-Allowednets-Mailbox:"}, yes("service_exempt")},
		{"caldav, an empty name", []string{service + "caldav", mailbox}, yes("service_exempt")},
		{"caldav, nobody yet, junk address", []string{service + "caldav", "X-Allowednets-Mailbox:", client + "x"}, yes("service_exempt")},
		{"caldav, no mailbox name", []string{service + "caldav", mailbox + "alice"}, no("mailbox_invalid")},
		{"webmail, nobody yet", []string{"X-Allowednets-Mailbox:"}, no("mailbox_invalid")},
		{"webmail, an empty name", []string{mailbox, client + "8.8.8.8"}, no("mailbox_invalid")},

		{"load balancer, allowed", []string{client + "10.1.2.3", forwarded + "8.8.8.8"}, yes("matched")},
		{"load balancer, denied", []string{client + "10.1.2.3", forwarded + "8.8.8.8, 1.1.1.1"}, deny("1.1.1.1")},
		{"load balancer, that forwards nothing", []string{client + "10.1.2.3"}, private("10.1.2.3")},
		{"load balancer, junk", []string{client + "10.1.2.3", forwarded + "unknown"}, no("client_address_invalid")},
		{"load balancer, two lines", []string{client + "10.1.2.3", forwarded + "1.1.1.1", "+" + forwarded + "8.8.8.8"}, no("bad_request")},
		{"spoofed", []string{forwarded + "8.8.8.8"}, deny("1.1.1.1")},
		{"spoofed in other headers", []string{
			"X-Real-IP: 8.8.8.8", "Forwarded: for=8.8.8.8", "Client-IP: 8.8.8.8", "True-Client-IP: 8.8.8.8", "X-Client-IP: 8.8.8.8",
		}, deny("1.1.1.1")},

		{"no service", []string{"X-Allowednets-Service:"}, no("bad_request")},
		{"no client", []string{"X-Allowednets-Client:", service + "webmail"}, no("bad_request")},
		{"an empty client", []string{client}, no("bad_request")},
		{"two mailboxes", []string{mailbox + "carol@example.org", "+" + mailbox + "alice@example.org"}, no("bad_request")},
		{"the same twice", []string{mailbox + "carol@example.org", "+" + mailbox + "carol@example.org"}, no("bad_request")},
		{"two mailboxes in one", []string{mailbox + "carol,alice@example.org"}, no("bad_request")},
		{"two services", []string{service + "webmail", "+" + service + "caldav"}, no("bad_request")},
		{"two services in one", []string{service + "caldav, webmail"}, no("bad_request")},
		{"two clients", []string{client + "8.8.8.8", "+" + client + "8.8.8.8"}, no("bad_request")},
		{"two clients in one", []string{client + "8.8.8.8, 1.1.1.1"}, no("bad_request")},
		{"unknown service", []string{service + "gopher"}, no("bad_request")},
		{"upper-case service", []string{service + "CalDAV"}, no("bad_request")},
		{"imap", []string{service + "imap"}, no("bad_request")},
		{"client with port", []string{client + "8.8.8.8:443"}, no("client_address_invalid")},
		{"client with zone", []string{client + "fe80::1%eth0"}, no("client_address_invalid")},
		{"unix socket", []string{client + "unix:"}, no("client_address_invalid")},
		{"no domain", []string{mailbox + "carol", client + "8.8.8.8"}, no("mailbox_invalid")},
		{"CR LF", []string{mailbox + "carol@example.org\r\nX-Allowednets-Client: 8.8.8.8"}, no("mailbox_invalid")},
		{"NUL", []string{mailbox + "carol@example.org\x00"}, no("mailbox_invalid")},
		{"not UTF-8", []string{mailbox + "carol\xff@example.org"}, no("mailbox_invalid")},
		{"percent-encoded", []string{mailbox + "carol%40example.org"}, no("mailbox_invalid")},
		{"10 kB", []string{mailbox + strings.Repeat("x", 10_000) + "@example.org"}, no("mailbox_invalid")},
		{"a master user", []string{mailbox + "carol*admin@example.org"}, no("mailbox_invalid")},
	} {
		if got := nginxPass(t, send(t, h, http.MethodGet, "/nginx/auth", asks(c.changes...))); got != c.want {
			t.Errorf("%s: %+v; want %+v", c.name, got, c.want)
		}
	}
	for _, path := range []string{"/nginx/auth", "/nginx/auth/", "//nginx/auth", "/nginx/auth?x=y", "/nginx/auth?command=allow"} {
		if got := nginxPass(t, send(t, h, http.MethodGet, path, asks())); got != deny("1.1.1.1") {
			t.Errorf("%s: %+v", path, got)
		}
	}
	for _, method := range []string{http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, "PROPFIND"} {
		if got := nginxPass(t, send(t, h, method, "/nginx/auth", asks("X-Allowednets-Client: 8.8.8.8"))); got != no("bad_request") {
			t.Errorf("%s: %+v", method, got)
		}
	}
}

func TestNginxAuthWithoutAnswer(t *testing.T) {
	never := newFixture(t, nil)
	dav := asks("X-Allowednets-Service: caldav")
	if got := nginxPass(t, send(t, never.http(), http.MethodGet, "/nginx/auth", asks())); got != (pass{false, "not_synced", unavailable}) {
		t.Errorf("not synced: %+v", got)
	}
	if got := nginxPass(t, send(t, never.http(), http.MethodGet, "/nginx/auth", dav)); !got.allowed {
		t.Errorf("CalDAV, not synced: %+v", got)
	}
	panics := newFixture(t, nil, func(cfg *check.DeciderConfig) { cfg.State = func() *mirror.State { panic("secret cause") } })
	if got := nginxPass(t, send(t, panics.http(), http.MethodGet, "/nginx/auth", asks())); got != (pass{false, "internal", ""}) {
		t.Errorf("panic: %+v", got)
	}
	panics.wantLog("level=ERROR", "secret cause")
	stale := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Nanosecond })
	if got := nginxPass(t, send(t, stale.http(), http.MethodGet, "/nginx/auth", asks())); got != (pass{false, "stale", unavailable}) {
		t.Errorf("stale: %+v", got)
	}
	f := newFixture(t, stateOf(t, lists()))
	for header, want := range map[string]string{
		"Authorization: Bearer s3cret": "not_in_allowed_nets", "Authorization: Bearer wrong": "unauthorized", "Authorization:": "unauthorized",
		"Authorization: Basic YWxpY2U6aHVudGVyMg==": "unauthorized",
	} {
		if got := nginxPass(t, send(t, f.http(withToken), http.MethodGet, "/nginx/auth", asks(header))); got.reason != want {
			t.Errorf("%s: %+v", header, got)
		}
	}
	for _, text := range []string{"", "no\r\nX-Forged: 1", "n\u0085o"} {
		quiet := f.http(func(cfg *check.HTTPConfig) { cfg.DenialText = text })
		if got := nginxPass(t, send(t, quiet, http.MethodGet, "/nginx/auth", asks())); got.allowed || got.text == "" && text != "" {
			t.Errorf("%q: %+v", text, got)
		}
	}
	if n := f.metric("unanswered_total", "unauthorized", "nginx_auth"); n != 3 {
		t.Errorf("%v refusals were counted", n)
	}
}

// TestNginxAuthDecisions: what passes without a name counts as well.
func TestNginxAuthDecisions(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	send(t, f.http(), http.MethodGet, "/nginx/auth", asks("X-Allowednets-Service: caldav", "X-Allowednets-Mailbox:"))
	send(t, f.http(), http.MethodGet, "/nginx/auth", asks("X-Allowednets-Service: caldav"))
	if n := f.metric("decisions_total", "service_exempt", "caldav"); n != 2 {
		t.Errorf("counted %v", n)
	}
}

// TestNginxAuthBody: a location without proxy_pass_request_body off announces a body that never comes.
func TestNginxAuthBody(t *testing.T) {
	server := httptest.NewServer(newFixture(t, stateOf(t, lists())).http())
	defer server.Close()
	defer server.CloseClientConnections() // Close waits for those that wait for a body
	for _, announced := range []string{"Content-Length: 100", "Transfer-Encoding: chunked"} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String()) //nolint:noctx // a test
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err = fmt.Fprintf(conn, "GET /nginx/auth HTTP/1.1\r\nHost: x\r\n%s\r\nX-Allowednets-Mailbox: carol@example.org\r\n"+
			"X-Allowednets-Service: webmail\r\nX-Allowednets-Client: 8.8.8.8\r\n\r\n", announced)
		if err != nil {
			t.Fatal(err)
		}
		resp := read(t, bufio.NewReader(conn))
		if resp.code != http.StatusForbidden || resp.header.Get("X-Allowednets-Reason") != "bad_request" {
			t.Errorf("%s: %v", announced, resp)
		}
		_ = conn.Close()
	}
}

// TestNginxLogs: what a client chose forges no line of the log, at any level, and a password is in none.
func TestNginxLogs(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	debug := slog.New(slog.NewTextHandler(&f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	faults, err := check.NewFaults(debug, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	h := f.http(func(cfg *check.HTTPConfig) { cfg.Faults = faults })
	evil := "x\nlevel=ERROR msg=forged"
	for _, name := range []string{"X-Allowednets-Mailbox", "X-Allowednets-Service", "X-Allowednets-Client", "X-Forwarded-For", "Authorization"} {
		send(t, h, http.MethodGet, "/nginx/auth", asks(name+": "+evil))
		send(t, h, http.MethodGet, "/nginx/auth", asks("+"+name+": "+evil))
	}
	for _, name := range []string{"Auth-User", "Auth-Protocol", "Auth-Method", "Client-IP", "Proxy-Protocol-Addr", "Auth-Pass", "Auth-Salt"} {
		send(t, h, http.MethodGet, "/nginx/mail", mail(name+": "+evil))
		send(t, h, http.MethodGet, "/nginx/mail", mail("+"+name+": "+evil))
	}
	for line := range strings.Lines(f.log.String()) {
		if !strings.HasPrefix(line, "time=") || strings.Contains(line, "forged") && !strings.Contains(line, `\nlevel`) {
			t.Errorf("forged: %s", line)
		}
	}
	if log := f.log.String(); strings.Contains(log, "hunter2") || !strings.Contains(log, "door=nginx_auth") || !strings.Contains(log, "door=nginx_mail") {
		t.Errorf("log:\n%s", log)
	}
}

// FuzzNginxAuth: whatever comes, the answer is 204 or 403, and 204 only if a naive reading agrees.
func FuzzNginxAuth(f *testing.F) {
	f.Add("alice@example.org", "webmail", "8.8.8.8", "")
	f.Add("carol@example.org", "caldav", "10.1.2.3", "8.8.8.8, 1.1.1.1")
	f.Add("", "webdav", "x", "unknown")
	fix := newFixture(f, stateOf(f, lists()))
	h := fix.http()
	f.Fuzz(func(t *testing.T, mailbox, service, client, forwarded string) {
		header := http.Header{"X-Allowednets-Mailbox": {mailbox}, "X-Allowednets-Service": {service}, "X-Allowednets-Client": {client}}
		if forwarded != "" {
			header["X-Forwarded-For"] = []string{forwarded}
		}
		got := nginxPass(t, send(t, h, http.MethodGet, "/nginx/auth", header))
		if !got.allowed || mailbox == "" && strings.HasSuffix(service, "dav") {
			return
		}
		svc := map[string]decisionv1.Service{"webmail": 4, "caldav": 7, "carddav": 8, "webdav": 9}[service]
		if strings.HasPrefix(client, "10.1.") || strings.HasPrefix(client, "fd") || strings.HasPrefix(client, "::ffff:") {
			return // FuzzClient has this
		}
		dec, err := fix.decider.Decide(t.Context(), check.Request{Mailbox: mailbox, Client: client, Service: svc})
		if err != nil || dec.Verdict != decisionv1.Verdict_VERDICT_ALLOW {
			t.Errorf("%q %q %q %q passes", mailbox, service, client, forwarded)
		}
	})
}
