package check_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// answer is what Dovecot understands: anything else would log the user in unless auth_policy_reject_on_fail is set.
type answer struct {
	Status int
	Msg    string
}

const (
	denied      = "Access from 1.1.1.1 is not allowed for this mailbox. Ask your administrator."
	unavailable = "Access to this mailbox cannot be checked right now. Try again in a minute."
)

// dovecotAnswer reads an answer as strictly as it must be written.
func dovecotAnswer(t testing.TB, resp reply) answer {
	t.Helper()
	if resp.code != http.StatusOK || resp.header.Get("Content-Type") != "application/json" {
		t.Fatalf("%v", resp)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal([]byte(resp.body), &fields); err != nil || len(fields) != 2 {
		t.Fatalf("%s: %v", resp.body, err)
	}
	var a answer
	if err := json.Unmarshal(fields["status"], &a.Status); err != nil || strings.ContainsAny(string(fields["status"]), ".eE\"n") {
		t.Fatalf("status of %s: %v", resp.body, err)
	}
	if err := json.Unmarshal(fields["msg"], &a.Msg); err != nil || fields["msg"][0] != '"' || strings.ContainsFunc(a.Msg, unicode.IsControl) {
		t.Fatalf("msg of %s: %v", resp.body, err)
	}
	return a
}

// attributes returns a body with the attributes of integrations/dovecot, of alice at a wrong address, and changes; the
// value nil takes one away.
func attributes(changes ...any) string {
	a := map[string]any{
		"login": "alice@example.org", "remote": "1.1.1.1", "real_remote": "1.1.1.1", "protocol": "imap", "session_id": "x+y/z",
		"stage": "before", "via": "", "auth_user": "alice@example.org", "device_id": "", "tls": false,
	}
	for i := 0; i < len(changes); i += 2 {
		a[fmt.Sprint(changes[i])] = changes[i+1]
	}
	maps.DeleteFunc(a, func(_ string, v any) bool { return v == nil })
	body, _ := json.Marshal(a)
	return string(body)
}

// read reads one response.
func read(t *testing.T, r *bufio.Reader) reply {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, string(body)}
}

func ask(t *testing.T, h http.Handler, body string) answer {
	t.Helper()
	return dovecotAnswer(t, do(t, h, http.MethodPost, "/dovecot?command=allow", body))
}

func TestDovecot(t *testing.T) {
	h := newFixture(t, stateOf(t, lists())).http()
	deny := func(address string) answer {
		return answer{-1, "Access from " + address + " is not allowed for this mailbox. Ask your administrator."}
	}
	for _, c := range []struct {
		name, body string
		want       answer
	}{
		{"allowed", attributes("remote", "8.8.8.8"), answer{}},
		{"allowed, mapped", attributes("remote", "::ffff:8.8.8.8"), answer{}},
		{"allowed, IPv6", attributes("remote", "2a00:1450::25"), answer{}},
		{"denied", attributes(), deny("1.1.1.1")},
		{"denied, mapped", attributes("remote", "::ffff:1.1.1.1"), deny("1.1.1.1")},
		{"denied, IPv6", attributes("remote", "2a00:1451:0:0::25"), deny("2a00:1451::25")},
		{"denied, private", attributes("remote", "10.0.0.1"), deny("10.0.0.1")},
		{"denied, unknown", attributes("remote", ""), deny("an unknown address")},
		{"denied after authentication", attributes("stage", "after"), answer{-1, ""}},
		{"denied, nobody knows when", attributes("stage", nil), answer{-1, ""}},
		{"denied, not configured when", attributes("stage", "%{passdb:stage:before}"), answer{-1, ""}},
		{"allowed after authentication", attributes("remote", "8.8.8.8", "stage", "after"), answer{}},
		{"unrestricted", attributes("login", "carol@example.org"), answer{}},
		{"a master user logs in as alice", attributes("auth_user", "admin"), deny("1.1.1.1")},
		{"an alias", attributes("login", "info@example.org", "auth_user", "info@example.org"), answer{}},
		{"pop3", attributes("protocol", "pop3"), deny("1.1.1.1")},
		{"sieve", attributes("protocol", "sieve"), deny("1.1.1.1")},
		{"managesieve", attributes("protocol", "managesieve"), deny("1.1.1.1")},
		{"submission", attributes("protocol", "submission"), answer{}},
		{"smtp", attributes("protocol", "smtp"), answer{}},
		{"lmtp", attributes("protocol", "lmtp"), answer{}},
		{"doveadm", attributes("protocol", "doveadm"), answer{}},
		{"unknown protocol", attributes("protocol", "http"), answer{-1, ""}},
		{"unknown protocol, unrestricted", attributes("protocol", "IMAP", "login", "carol@example.org"), answer{-1, ""}},
		{"no protocol", attributes("protocol", ""), answer{-1, ""}},

		{"webmail", attributes("via", "webmail", "real_remote", "10.1.2.3"), deny("1.1.1.1")},
		{"webmail, allowed", attributes("via", "webmail", "real_remote", "10.1.2.3", "remote", "8.8.8.8"), answer{}},
		{"caldav", attributes("via", "caldav", "real_remote", "10.1.2.3"), answer{}},
		{"carddav", attributes("via", "carddav", "real_remote", "::ffff:10.1.2.3"), answer{}},
		{"webdav", attributes("via", "webdav", "real_remote", "fd00::1"), answer{}},
		{"caldav, from anybody", attributes("via", "caldav"), deny("1.1.1.1")},
		{"caldav, from nobody", attributes("via", "caldav", "real_remote", nil), deny("1.1.1.1")},
		{"caldav, from junk", attributes("via", "caldav", "real_remote", "10.1.2.3, 10.1.2.4"), deny("1.1.1.1")},
		{"caldav, from a zone", attributes("via", "caldav", "real_remote", "fd00::1%eth0"), deny("1.1.1.1")},
		{"caldav, only the client is trusted", attributes("via", "caldav", "remote", "10.1.2.3"), deny("10.1.2.3")},
		{"unknown via, from anybody", attributes("via", "telnet", "remote", "8.8.8.8"), answer{}},
		{"unknown via", attributes("via", "telnet", "remote", "8.8.8.8", "real_remote", "10.1.2.3"), answer{-1, ""}},
		{"webmail through sieve", attributes("via", "webmail", "real_remote", "10.1.2.3", "protocol", "sieve"), deny("1.1.1.1")},
		{"webmail through submission", attributes("via", "webmail", "real_remote", "10.1.2.3", "protocol", "submission"), answer{}},
		{"caldav through sieve", attributes("via", "caldav", "real_remote", "10.1.2.3", "protocol", "sieve"), answer{-1, ""}},
		{"caldav through pop3", attributes("via", "caldav", "real_remote", "10.1.2.3", "protocol", "pop3"), answer{-1, ""}},

		{"no login", attributes("login", nil), answer{-1, ""}},
		{"no remote", attributes("remote", nil), answer{-1, ""}},
		{"no remote, exempt", attributes("remote", nil, "protocol", "lmtp"), answer{-1, ""}},
		{"no protocol at all", attributes("protocol", nil), answer{-1, ""}},
		{"empty login", attributes("login", ""), answer{-1, ""}},
		{"login without domain", attributes("login", "carol"), answer{-1, ""}},
		{"login of a master user", attributes("login", "carol*admin@example.org"), answer{-1, ""}},
		{"login with NUL", attributes("login", "carol\x00@example.org"), answer{-1, ""}},
		{"login with CR LF", attributes("login", "carol@example.org\r\n* OK"), answer{-1, ""}},
		{"address with CR LF", attributes("remote", "8.8.8.8\r\n* OK"), answer{-1, ""}},
		{"address with port", attributes("remote", "8.8.8.8:993"), answer{-1, ""}},
		{"two addresses", attributes("remote", "8.8.8.8, 1.1.1.1"), answer{-1, ""}},
		{"protocol with CR LF", attributes("protocol", "lmtp\r\n"), answer{-1, ""}},
		{"login is a number", attributes("login", 7), answer{-1, ""}},
		{"login is a list", attributes("login", []string{"carol@example.org"}), answer{-1, ""}},
		{"stage is null", strings.Replace(attributes(), `"before"`, "null", 1), answer{-1, ""}},
		{"no body", "", answer{-1, ""}},
		{"no JSON", "login=carol@example.org", answer{-1, ""}},
		{"null", "null", answer{-1, ""}},
		{"array", "[" + attributes("login", "carol@example.org") + "]", answer{-1, ""}},
		{"cut off", attributes("login", "carol@example.org")[:80], answer{-1, ""}},
		{"two bodies", attributes("login", "carol@example.org") + attributes("login", "carol@example.org"), answer{-1, ""}},
		{"two logins", `{"login":"carol@example.org",` + attributes()[1:], answer{-1, ""}},
		{"two logins, the other way round", `{"login":"alice@example.org",` + attributes("login", "carol@example.org")[1:], answer{-1, ""}},
		{"two remotes", `{"remote":"8.8.8.8",` + attributes()[1:], answer{-1, ""}},
		{"the same twice", `{"remote":"8.8.8.8",` + attributes("remote", "8.8.8.8")[1:], answer{}},
		{"other letter case", `{"LOGIN":"carol@example.org",` + attributes()[1:], deny("1.1.1.1")},
		{"10 MB", attributes("session_id", strings.Repeat("x", 10<<20), "login", "carol@example.org"), answer{-1, ""}},
		{"10 MB behind it", attributes("login", "carol@example.org") + strings.Repeat(" ", 10<<20), answer{-1, ""}},
		{"deeply nested", `{"x":` + strings.Repeat("[", 30000) + strings.Repeat("]", 30000) + "," + attributes("login", "carol@example.org")[1:], answer{-1, ""}},
	} {
		if got := ask(t, h, c.body); got != c.want {
			t.Errorf("%s: %v; want %v", c.name, got, c.want)
		}
	}
}

// TestDovecotURLs are those that Dovecot makes of what may stand in auth_policy_server_url, and others.
func TestDovecotURLs(t *testing.T) {
	h := newFixture(t, stateOf(t, lists())).http()
	for url, want := range map[string]answer{
		"/dovecot?command=allow":                 {-1, denied},
		"/dovecot?&command=allow":                {-1, denied},
		"/dovecot??command=allow":                {-1, denied},
		"/dovecot/?command=allow":                {-1, denied},
		"//dovecot?command=allow":                {-1, denied},
		"/dovecot?x=y&command=allow":             {-1, denied},
		"/dovecot?command=report":                {0, ""},
		"/dovecot":                               {-1, ""},
		"/dovecot?":                              {-1, ""},
		"/dovecot?command":                       {-1, ""},
		"/dovecot?command=":                      {-1, ""},
		"/dovecot?command=ALLOW":                 {-1, ""},
		"/dovecot?command=allow&command=report":  {-1, ""},
		"/dovecot?command=report&command=allow":  {-1, ""},
		"/dovecot?command=report&command=report": {-1, ""},
		"/dovecot?x=y?command=report":            {-1, ""},
		"/dovecot?command=report;x":              {-1, ""},
		"/dovecot?command=%zz":                   {-1, ""},
		"/?command=allow":                        {-1, ""},
		"/?command=report":                       {-1, ""},
		"/policy?command=allow":                  {-1, ""},
		"/v1?command=report":                     {-1, ""},
		"/dovecot/?x=y&command=allow&" + strings.Repeat("z", 1000): {-1, denied},
	} {
		if got := dovecotAnswer(t, do(t, h, http.MethodPost, url, attributes())); got != want {
			t.Errorf("%s: %v; want %v", url, got, want)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodOptions, "BREW"} {
		for _, command := range []string{"allow", "report"} {
			if got := dovecotAnswer(t, do(t, h, method, "/dovecot?command="+command, attributes("login", "carol@example.org"))); got != (answer{-1, ""}) {
				t.Errorf("%s %s: %v", method, command, got)
			}
		}
	}
}

func TestDovecotReportTakesAnything(t *testing.T) {
	h := newFixture(t, nil).http()
	for _, body := range []string{"", "junk", attributes(), attributes("success", true, "policy_reject", false)} {
		if got := dovecotAnswer(t, do(t, h, http.MethodPost, "/dovecot?command=report", body)); got != (answer{}) {
			t.Errorf("%.20q: %v", body, got)
		}
	}
}

func TestDovecotWithoutState(t *testing.T) {
	f := newFixture(t, nil)
	h := f.http()
	for body, want := range map[string]answer{
		attributes("login", "carol@example.org"):                   {-1, unavailable},
		attributes("stage", "after"):                               {-1, ""},
		attributes("protocol", "submission"):                       {0, ""},
		attributes("via", "caldav", "real_remote", "10.1.2.3"):     {0, ""},
		attributes("via", "webmail", "real_remote", "10.1.2.3"):    {-1, unavailable},
		attributes("login", "carol", "protocol", "submission"):     {-1, ""},
		attributes("protocol", "submission", "remote", "anything"): {-1, ""},
	} {
		if got := ask(t, h, body); got != want {
			t.Errorf("%s: %v; want %v", body, got, want)
		}
	}
	if n := f.metric("unanswered_total", "not_synced", "dovecot"); n != 3 {
		t.Errorf("%v requests without an answer", n)
	}
	if n := f.metric("decisions_total", "service_exempt", "smtp_submission"); n != 1 {
		t.Errorf("%v decisions", n)
	}
}

func TestDovecotStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Minute }).http()
		time.Sleep(time.Hour)
		if got := ask(t, h, attributes("remote", "8.8.8.8")); got != (answer{-1, unavailable}) {
			t.Errorf("%v", got)
		}
	})
}

func TestDenialText(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	for text, want := range map[string]string{
		"":                      "",
		"Nein.":                 "Nein.",
		"{address} {address} ü": "1.1.1.1 1.1.1.1 ü",
		`"\{}<>&`:               `"\{}<>&`,
	} {
		if err := check.ValidateDenialText(text); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		h := f.http(func(cfg *check.HTTPConfig) { cfg.DenialText = text })
		if got := ask(t, h, attributes()); got != (answer{-1, want}) {
			t.Errorf("%q: %v", text, got)
		}
	}
	for _, text := range []string{"a\r\nb", "a\nb", "\x00", "a\tb", "\x7f", "\u0085", "\xff"} {
		if check.ValidateDenialText(text) == nil {
			t.Errorf("%q is accepted", text)
		}
		// Should it get through all the same, the answer is still fit for Dovecot.
		h := f.http(func(cfg *check.HTTPConfig) { cfg.DenialText = text })
		if got := ask(t, h, attributes()); got.Status != -1 {
			t.Errorf("%q: %v", text, got)
		}
	}
	f.state.Store(nil)
	h := f.http(func(cfg *check.HTTPConfig) { cfg.DenialText = "" })
	if got := ask(t, h, attributes()); got != (answer{-1, ""}) {
		t.Errorf("without state and text: %v", got)
	}
}

func TestDovecotPanicDenies(t *testing.T) {
	f := newFixture(t, nil, func(cfg *check.DeciderConfig) { cfg.State = func() *mirror.State { panic("secret cause") } })
	if got := ask(t, f.http(), attributes()); got != (answer{-1, ""}) {
		t.Errorf("%v", got)
	}
	f.wantLog("level=ERROR", "secret cause")
	if n := f.metric("unanswered_total", "internal", "dovecot"); n != 1 {
		t.Errorf("counted %v times", n)
	}
}

// TestNoForgedLogLines: what a client chooses cannot begin a line of the log.
func TestNoForgedLogLines(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	h := f.http()
	evil := "x\nlevel=ERROR msg=forged"
	for _, attribute := range []string{"login", "remote", "real_remote", "protocol", "session_id", "stage", "via", "auth_user"} {
		ask(t, h, attributes(attribute, evil))
		ask(t, h, attributes(attribute, evil, "real_remote", "10.1.2.3"))
		do(t, h, http.MethodPost, "/dovecot?command="+attribute, attributes(), "Authorization: "+attribute)
	}
	for line := range strings.Lines(f.log.String()) {
		if !strings.HasPrefix(line, "time=") || strings.Contains(line, "forged") && !strings.Contains(line, `\nlevel`) {
			t.Errorf("forged: %s", line)
		}
	}
}

// TestOversizedBodyOverTheWire: a client that sends all of it before it listens gets its answer.
func TestOversizedBodyOverTheWire(t *testing.T) {
	server := httptest.NewServer(newFixture(t, stateOf(t, lists())).http())
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String()) //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	body := strings.Repeat("x", 10<<20)
	if _, err := fmt.Fprintf(conn, "POST /dovecot?command=allow HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
		t.Fatal(err)
	}
	if got := dovecotAnswer(t, read(t, bufio.NewReader(conn))); got != (answer{-1, ""}) {
		t.Errorf("%v", got)
	}
}

// TestAsDovecotSendsIt replays a recorded request over one connection that is kept alive.
func TestAsDovecotSendsIt(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- serve.HTTP(t.Context(), lis, f.http(withToken), slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	conn, err := net.Dial("tcp", lis.Addr().String()) //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	answers := bufio.NewReader(conn)
	for range 3 {
		body := `{"device_id":"","login":"alice@example.org","protocol":"imap","pwhash":"0de8","remote":"::ffff:1.1.1.1","real_remote":"127.0.0.1","session_id":"AbC+/1","stage":"before","via":"","auth_user":"alice@example.org","tls":false}`
		_, err := fmt.Fprintf(conn, "POST /dovecot?command=allow HTTP/1.1\r\nHost: 127.0.0.1:7480\r\nDate: Mon, 23 Nov 2026 16:20:19 +0000\r\nUser-Agent: dovecot/auth-policy-client\r\nAuthorization: Bearer s3cret\r\nContent-Length: %d\r\nConnection: Keep-Alive\r\nContent-Type: application/json\r\n\r\n%s", len(body), body)
		if err != nil {
			t.Fatal(err)
		}
		if got := dovecotAnswer(t, read(t, answers)); got != (answer{-1, denied}) {
			t.Errorf("%v", got)
		}
	}
}

// FuzzDovecot: whatever comes, the answer is one that Dovecot understands, and only what a naive reading allows is allowed.
func FuzzDovecot(f *testing.F) {
	f.Add("command=allow", attributes())
	f.Add("command=allow", attributes("via", "caldav", "real_remote", "10.1.2.3"))
	f.Add("command=report", "")
	f.Add("?command=allow", `{"login":"carol@example.org","remote":"","protocol":"lmtp","login":"x"}`)
	fix := newFixture(f, stateOf(f, lists()))
	h := fix.http()
	f.Fuzz(func(t *testing.T, query, body string) {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/dovecot", strings.NewReader(body))
		req.URL.RawQuery = query
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		got := dovecotAnswer(t, reply{w.Code, w.Header(), w.Body.String()})
		if got.Status == 0 && !strings.Contains(query, "report") && !naive(t, fix, body) {
			t.Errorf("%q %q is allowed", query, body)
		}
	})
}

// naive is whether a body, read by the book, is a question that the decider allows.
func naive(t *testing.T, f *fixture, body string) bool {
	var a map[string]any
	if json.Unmarshal([]byte(body), &a) != nil {
		return false
	}
	text := func(name string) string {
		s, _ := a[name].(string)
		return s
	}
	svc := map[string]decisionv1.Service{
		"imap": 1, "pop3": 2, "sieve": 3, "managesieve": 3, "submission": 5, "smtp": 5, "lmtp": 6, "doveadm": 6,
	}[text("protocol")]
	if via := map[string]decisionv1.Service{"webmail": 4, "caldav": 7, "carddav": 8, "webdav": 9}[text("via")]; via != 0 && svc == 1 {
		if peer, err := allow.ParseClient(text("real_remote")); err == nil && (strings.HasPrefix(peer.String(), "10.1.") || strings.HasPrefix(peer.String(), "fd")) {
			svc = via
		}
	}
	dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: text("login"), Client: text("remote"), Service: svc})
	return err == nil && dec.Verdict == decisionv1.Verdict_VERDICT_ALLOW
}
