package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/allowednets/allowednets/test/stack"
)

// session is a browser without a mind: it sends what it is told and keeps cookies.
type session struct {
	t       *testing.T
	site    *site
	base    string
	address string // where it is, as the proxy says
	cookies map[string]string
}

// answer is a response with its body.
type answer struct {
	*http.Response

	body string
}

func (s *site) session(t *testing.T, address string) *session {
	return &session{t: t, site: s, base: s.dashboard.URL, address: address, cookies: make(map[string]string)}
}

// do sends a request and follows no redirect. headers are pairs.
func (c *session) do(method, path string, body io.Reader, headers ...string) answer {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.base+path, body)
	if err != nil {
		c.t.Fatal(err)
	}
	req.Header.Set("X-Forwarded-For", c.address)
	if body != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	for name, value := range c.cookies {
		req.AddCookie(&http.Cookie{Name: name, Value: value})
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return answer{&http.Response{Status: "hung up", Request: req}, ""} // in the middle of a large body
	}
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, cookie := range resp.Cookies() {
		if c.cookies[cookie.Name] = cookie.Value; cookie.MaxAge < 0 {
			delete(c.cookies, cookie.Name)
		}
	}
	return answer{resp, string(content)}
}

func (c *session) get(path string, headers ...string) answer {
	c.t.Helper()
	return c.do(http.MethodGet, path, nil, headers...)
}

// post sends a form; pairs are its fields.
func (c *session) post(path string, pairs ...string) answer {
	c.t.Helper()
	return c.do(http.MethodPost, path, form(pairs...))
}

// form is a form's body. The panel's, which have an action, always say which list they show, and have an id.
func form(pairs ...string) io.Reader {
	values := make(url.Values)
	if slices.Contains(pairs, "action") {
		values = url.Values{"etag": {"1-1"}, "request_id": {uuid.NewString()}}
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		values.Set(pairs[i], pairs[i+1])
	}
	return strings.NewReader(values.Encode())
}

func (c *session) logIn(user string) {
	c.t.Helper()
	if got := c.post("/login", "user", user, "password", dashboardPassword); got.StatusCode != http.StatusSeeOther {
		c.t.Fatalf("logging in as %s: %s", user, got.Status)
	}
}

const (
	mailboxPage = "/domains/example.org/mailboxes/dave@example.org"
	cspHeader   = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

// TestDashboardSecurity attacks the dashboard without a browser's manners.
func TestDashboardSecurity(t *testing.T) {
	s := newSite(t, settings{noDovecot: true})
	s.saveAs(t, bert, "dave@example.org", "203.0.113.77")
	for _, attack := range []struct {
		name string
		run  func(*testing.T, *site)
	}{
		{"headers", testHeaders}, {"cookies", testCookies}, {"session fixation", testFixation}, {"forms of other sites", testCrossOrigin},
		{"open redirect", testRedirect}, {"header injection", testInjection}, {"markup", testMarkup}, {"large bodies", testLarge},
		{"routes and roles", testRoles}, {"guessing", testGuessing},
	} {
		t.Run(attack.name, func(t *testing.T) { attack.run(t, s) })
	}
	s.mustHave(t, "dave@example.org", "203.0.113.77", bert) // through all of it
}

// testHeaders looks at every kind of page, those that say what went wrong included.
func testHeaders(t *testing.T, s *site) {
	inline := regexp.MustCompile(`(?i)<style|\sstyle=|<script(>|\s[^>]*>[^<])|\son[a-z]+=|javascript:|https?://`)
	style := regexp.MustCompile(`/assets/style\.[0-9a-f]+\.css`).FindString(s.session(t, inside).get("/login").body)
	anonymous, in := s.session(t, inside), s.session(t, inside)
	in.logIn(anna)
	for _, c := range []struct {
		who    *session
		method string
		path   string
		body   io.Reader
		status int
	}{
		{anonymous, "GET", "/login", nil, 200}, {anonymous, "GET", "/domains", nil, 303}, {anonymous, "POST", mailboxPage, form("text", "x"), 401},
		{anonymous, "POST", "/login", form("user", anna, "password", "wrong"), 401}, {anonymous, "GET", "/nothing", nil, 303},
		{anonymous, "GET", "/assets/nothing.css", nil, 404}, {anonymous, "GET", style, nil, 200}, {anonymous, "DELETE", "/login", nil, 303},
		{in, "GET", "/domains", nil, 200}, {in, "GET", "/domains/example.org", nil, 200}, {in, "GET", mailboxPage, nil, 200},
		{in, "GET", mailboxPage + "/history", nil, 200}, {in, "GET", "/domains/nothing.example", nil, 404}, {in, "GET", "/nothing", nil, 404},
		{in, "POST", mailboxPage, form("action", "save", "text", "10.0.0.1"), 422}, {in, "POST", mailboxPage, form("action", "nothing"), 400},
		{in, "POST", mailboxPage, form("action", "save", "text", "192.0.2.1"), 409},
		{in, "POST", mailboxPage, strings.NewReader("action=%zz"), 400}, {in, "PUT", mailboxPage, form("text", ""), 404},
		// In chunks and an octet too long: it is refused when nearly all is read. One with its length is refused unread, which the client, still
		// writing, may learn from a connection that is closed.
		{in, "POST", mailboxPage, io.MultiReader(bytes.NewReader(make([]byte, 2<<20+1))), 413},
	} {
		got := c.who.do(c.method, c.path, c.body)
		if got.StatusCode != c.status {
			t.Errorf("%s %s: %s, want %d", c.method, c.path, got.Status, c.status)
		}
		want := map[string]string{
			"Content-Security-Policy": cspHeader, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
			"Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store",
		}
		if c.path == style {
			want["Cache-Control"] = "public, max-age=31536000, immutable"
		}
		for name, value := range want {
			if h := got.Header.Values(name); len(h) == 0 || h[0] != value || len(h) > 1 && name != "Cache-Control" { // scs adds to it
				t.Errorf("%s %s: %s is %q", c.method, c.path, name, h)
			}
		}
		if kind := got.Header.Get("Content-Type"); strings.HasPrefix(kind, "text/html") {
			if found := inline.FindString(got.body); found != "" {
				t.Errorf("%s %s has %q", c.method, c.path, found)
			}
		}
	}
}

// testCookies looks at a dashboard as it is run in earnest, behind a proxy that speaks TLS.
func testCookies(t *testing.T, s *site) {
	secure, err := s.StartDashboard(stack.DashboardConfig{
		Name: "secure", Policy: s.policy.Address, Directory: s.Path("directory.yaml"), Users: s.Path("users.yaml"), PublicURL: "https://lists.example.net",
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := secure.AwaitReady(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	c := s.session(t, inside)
	c.base = secure.URL
	login := c.post("/login", "user", anna, "password", dashboardPassword)
	language := c.post("/language", "language", "de")
	if hsts := login.Header.Get("Strict-Transport-Security"); hsts != "max-age=31536000" {
		t.Errorf("Strict-Transport-Security is %q", hsts)
	}
	all := append(login.Cookies(), language.Cookies()...)
	seen := make(map[string]bool)
	for _, cookie := range all {
		seen[cookie.Name] = true
		if !cookie.Secure || !cookie.HttpOnly || cookie.SameSite != http.SameSiteLaxMode || cookie.Path != "/" || cookie.Domain != "" {
			t.Errorf("cookie %s", cookie.Raw)
		}
	}
	if !seen["__Host-allowednets"] || !seen["language"] {
		t.Errorf("the cookies are %v", all)
	}
	if got := c.get("/domains"); got.StatusCode != http.StatusOK || !strings.Contains(got.body, `lang="de"`) {
		t.Errorf("with the cookies: %s", got.Status)
	}
}

// testFixation: what an attacker knew before a login is worth nothing behind it, and what was worth something is nothing after a
// log-out.
func testFixation(t *testing.T, s *site) {
	victim := s.session(t, inside)
	victim.get("/login")
	victim.cookies["allowednets"] = "known-to-the-attacker"
	victim.logIn(anna)
	token := victim.cookies["allowednets"]
	if token == "" || token == "known-to-the-attacker" {
		t.Fatalf("the session is %q", token)
	}
	attacker := s.session(t, outside)
	attacker.cookies["allowednets"] = "known-to-the-attacker"
	if got := attacker.get("/domains"); got.StatusCode != http.StatusSeeOther {
		t.Errorf("the token of before the login: %s", got.Status)
	}
	victim.logIn(bert)
	if victim.cookies["allowednets"] == token {
		t.Error("another login keeps the token")
	}
	last := maps.Clone(victim.cookies)
	victim.post("/logout")
	for name, old := range map[string]string{"of the login before": token, "after the log-out": last["allowednets"]} {
		attacker.cookies["allowednets"] = old
		if got := attacker.get("/domains"); got.StatusCode != http.StatusSeeOther {
			t.Errorf("the token %s: %s", name, got.Status)
		}
	}
}

func testCrossOrigin(t *testing.T, s *site) {
	c := s.session(t, inside)
	c.logIn(anna)
	for _, headers := range [][]string{
		{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "https://evil.example"}, {"Origin", "null"},
		{"Origin", "https://" + strings.TrimPrefix(s.dashboard.URL, "http://") + ".evil.example"},
	} {
		for _, path := range []string{"/login", "/logout", "/language", mailboxPage, mailboxPage + "/check"} {
			body := form("action", "save", "text", "192.0.2.1", "user", bert, "password", dashboardPassword, "language", "de", "client", inside)
			got := c.do(http.MethodPost, path, body, headers...)
			if got.StatusCode != http.StatusForbidden || len(got.Cookies()) > 0 {
				t.Errorf("POST %s with %q: %s, cookies %v", path, headers, got.Status, got.Cookies())
			}
		}
	}
	if got := c.get("/domains"); got.StatusCode != http.StatusOK || !strings.Contains(got.body, anna) {
		t.Errorf("afterwards: %s", got.Status)
	}
}

func testRedirect(t *testing.T, s *site) {
	for _, next := range []string{
		"https://evil.example/", "//evil.example", "///evil.example", `/\evil.example`, `\\evil.example`, "/\t/evil.example", "http:evil.example",
		"javascript:alert(1)", "/\n/evil.example", "evil.example", "@evil.example", " //evil.example", "/%0d%0aLocation:https://evil.example",
		"/" + strings.Repeat("a", 5000),
	} {
		c := s.session(t, inside)
		login := c.post("/login", "user", anna, "password", dashboardPassword, "next", next)
		again := c.get("/login?" + url.Values{"next": {next}}.Encode())
		language := c.post("/language", "language", "de", "next", next)
		for way, got := range map[string]answer{"login": login, "login of somebody logged in": again, "language": language} {
			to, err := url.Parse(got.Header.Get("Location"))
			if err != nil || got.StatusCode != http.StatusSeeOther || to.Host != "" || to.Scheme != "" || !strings.HasPrefix(to.Path, "/") ||
				strings.HasPrefix(to.Path, "//") || strings.ContainsAny(got.Header.Get("Location"), "\\\r\n\t") {
				t.Errorf("%s with next %.60q: %s to %.100q", way, next, got.Status, got.Header.Get("Location"))
			}
		}
	}
	c := s.session(t, inside)
	if got := c.get("/domains/example.org", "X-Forwarded-Host", "evil.example", "X-Forwarded-Proto", "https"); strings.Contains(got.Header.Get("Location"), "evil") {
		t.Errorf("sent to %s", got.Header.Get("Location"))
	}
	if got := c.post("/login", "user", anna, "password", dashboardPassword, "next", mailboxPage); got.Header.Get("Location") != mailboxPage {
		t.Errorf("sent to %s", got.Header.Get("Location"))
	}
}

func testInjection(t *testing.T, s *site) {
	const evil = "x\r\nSet-Cookie: evil=1\r\n\r\n<evil>"
	c := s.session(t, inside)
	c.logIn(anna)
	for _, got := range []answer{
		c.post("/login", "user", evil, "password", evil, "next", "/domains/"+evil), c.post("/language", "language", "de", "next", "/"+evil),
		c.post("/language", "language", evil), c.get("/domains/" + url.PathEscape(evil)), c.get("/domains/example.org?" + url.Values{"q": {evil}, "show": {evil}, "after": {evil}}.Encode()),
		c.get(mailboxPage + "/progress?" + url.Values{"revision": {evil}}.Encode()), c.get(mailboxPage + "?" + url.Values{"saved": {evil}, "restore": {evil}}.Encode()),
		c.post(mailboxPage, "action", "save", "text", evil, "etag", evil, "request_id", evil), c.get("/login?"+url.Values{"next": {"/" + evil}}.Encode(), "X-Forwarded-For", "evil, 1"),
		c.get("/domains", "Accept-Language", "de\tevil;q=zzz"),
	} {
		for name, values := range got.Header {
			if all := strings.Join(values, " "); strings.Contains(all, "evil=1") && strings.Contains(all, "\n") || name == "Evil" {
				t.Errorf("%s %s: %s: %q", got.Request.Method, got.Request.URL, name, values)
			}
		}
		for _, cookie := range got.Cookies() {
			if cookie.Name == "evil" {
				t.Errorf("%s %s sets %s", got.Request.Method, got.Request.URL, cookie.Raw)
			}
		}
		if got.StatusCode >= 500 {
			t.Errorf("%s %s: %s", got.Request.Method, got.Request.URL, got.Status)
		}
	}
}

// testMarkup puts what a browser would run wherever somebody can put text, and finds it on no page as it is.
func testMarkup(t *testing.T, s *site) {
	const evil = `"'></textarea></title></script><xss onload=alert(1)>{{.}}` + "`${1}"
	quoted := url.Values{"x": {evil}}.Encode()[2:]
	in, out := s.session(t, inside), s.session(t, "203.0.113.5")
	in.logIn(anna)
	otherName := "o'<xss>&@example.org" // the policy service takes it, and the history shows it
	s.saveAs(t, "<xss onload=alert(1)>\"'", otherName, "192.0.2.9")
	name := "/domains/example.org/mailboxes/" + url.PathEscape(otherName)
	for _, got := range []answer{
		in.get("/domains/example.org?q=" + quoted), in.get("/domains/example.org?after=" + quoted + "&show=" + quoted),
		in.get("/domains/" + url.PathEscape(evil)), in.get("/domains/example.org/mailboxes/" + url.PathEscape(evil+"@example.org")),
		in.post(mailboxPage, "action", "save", "text", evil, "etag", evil, "request_id", evil), in.post(mailboxPage, "action", "validate", "text", evil),
		in.post(mailboxPage, "action", evil, "text", evil), in.post(mailboxPage+"/check", "client", evil, "service", "SERVICE_IMAP", "text", evil, "etag", evil),
		in.post(mailboxPage+"/check", "client", inside, "service", evil), in.post(mailboxPage, "action", "use?index=0&entry=x&by="+quoted, "text", "x"),
		in.post(mailboxPage, "action", "save", "text", "192.0.2.5, "+evil, "etag", evil), in.get(mailboxPage + "?saved=" + quoted), in.get(mailboxPage + "?restore=" + quoted),
		in.get(mailboxPage + "/history?page=" + quoted), in.get("/domains/example.org"), in.get("/domains/example.org?show=restricted"), in.get(name), in.get(name + "/history"), in.get("/" + quoted),
		out.get("/login?next=/" + quoted), out.post("/login", "user", evil, "password", evil, "next", "/"+evil, "text", evil, "etag", evil),
		out.post(mailboxPage, "text", evil, "etag", evil, "request_id", evil), out.post("/language", "language", evil),
	} {
		if strings.Contains(got.body, "<xss") || strings.Contains(got.body, evil[:4]) || strings.Contains(got.body, "</textarea></title>") {
			t.Errorf("%s %s shows markup:\n%s", got.Request.Method, got.Request.URL, excerpt(got.body, "xss"))
		}
		if strings.Count(got.body, "<!doctype") > 1 || got.StatusCode >= 500 {
			t.Errorf("%s %s: %s", got.Request.Method, got.Request.URL, got.Status)
		}
	}
	if got := in.get(name + "/history"); !strings.Contains(got.body, "&lt;xss onload=alert(1)&gt;") {
		t.Errorf("the history does not name who saved: %s", got.Status)
	}
	s.saveAs(t, bert, otherName, "")
}

func excerpt(body, word string) string {
	i := max(0, strings.Index(body, word))
	return body[max(0, i-200):min(len(body), i+200)]
}

func testLarge(t *testing.T, s *site) {
	in, out := s.session(t, inside), s.session(t, inside)
	in.logIn(anna)
	large := func() io.Reader {
		return strings.NewReader("action=save&language=de&user=x&text=" + strings.Repeat("1", 10<<20))
	}
	for _, path := range []string{"/login", "/language", mailboxPage, mailboxPage + "/check"} {
		for who, c := range map[string]*session{"somebody logged in": in, "a stranger": out} {
			for kind, body := range map[string]io.Reader{"with its length": large(), "in chunks": io.MultiReader(large())} {
				if got := c.do(http.MethodPost, path, body); got.StatusCode != http.StatusRequestEntityTooLarge && got.Status != "hung up" {
					t.Errorf("10 MB of %s %s to %s: %s", who, kind, path, got.Status)
				}
			}
		}
	}
	if got := in.do(http.MethodPost, mailboxPage, form("action", "save", "text", strings.Repeat("192.0.2.1,", 100_000))); got.StatusCode != http.StatusUnprocessableEntity || len(got.body) > 4<<20 {
		t.Errorf("a long list: %s, %d octets", got.Status, len(got.body))
	}
}

// testRoles tries every route with every role.
func testRoles(t *testing.T, s *site) {
	const own, checks = "203.0.113.77", mailboxPage + "/check"
	save := []string{"action", "save", "text", "192.0.2.250"}
	check := []string{"client", inside, "service", "SERVICE_IMAP"}
	routes := []struct {
		name, path string
		fields     []string // of a POST
		// The statuses for an administrator of the domain, its auditor, strangers who are logged in, and those who are not.
		administrator, auditor, other, anonymous int
	}{
		{"domain", "/domains/example.org", nil, 200, 200, 404, 303},
		{"domain, shouted", "/domains/EXAMPLE.ORG", nil, 200, 200, 404, 303},
		{"domain with a dot", "/domains/example.org.", nil, 200, 200, 404, 303},
		{"mailbox", mailboxPage, nil, 200, 200, 404, 303},
		{"mailbox, shouted", "/domains/Example.Org/mailboxes/DAVE@EXAMPLE.ORG", nil, 200, 200, 404, 303},
		{"mailbox below another domain", "/domains/example.net/mailboxes/dave@example.org", nil, 404, 404, 404, 303},
		{"mailbox by a path", "/domains/example.net/mailboxes/..%2f..%2fexample.org%2fmailboxes%2fdave@example.org", nil, 404, 404, 404, 303},
		{"history", mailboxPage + "/history", nil, 200, 200, 404, 303},
		{"history below another domain", "/domains/example.net/mailboxes/dave@example.org/history", nil, 404, 404, 404, 303},
		{"restoring", mailboxPage + "?restore=x", nil, 200, 200, 404, 303},
		{"progress", mailboxPage + "/progress?revision=1-1", nil, 303, 303, 404, 303},
		{"check", checks, check, 200, 200, 404, 303},
		{"check below another domain", "/domains/example.net/mailboxes/dave@example.org/check", check, 404, 404, 404, 303},
		{"save", mailboxPage, save, 409, 403, 404, 401}, // 409: with an etag of yore
		{"save below another domain", "/domains/example.net/mailboxes/dave@example.org", save, 404, 404, 404, 401},
		{"save, shouted", "/domains/EXAMPLE.org/mailboxes/Dave@example.org", save, 409, 403, 404, 401},
		{"lift", mailboxPage, []string{"action", "lift", "text", ""}, 409, 403, 404, 401},
		{"validate", mailboxPage, []string{"action", "validate", "text", own}, 200, 403, 404, 401},
		{"resume", mailboxPage, []string{"action", "resume", "text", own}, 200, 403, 404, 401},
		{"language", "/language", []string{"language", "en"}, 303, 303, 303, 303},
		{"domains", "/domains", nil, 200, 200, 200, 303},
		{"start", "/", nil, 303, 303, 303, 303},
		{"nothing", "/admin", nil, 404, 404, 404, 303},
		{"metrics", "/metrics", nil, 404, 404, 404, 303},
	}
	for _, user := range []struct{ name, role string }{{anna, "administrator"}, {otto, "auditor"}, {nina, "other"}, {nobody, "other"}, {hundred, "other"}, {"", "anonymous"}} {
		c := s.session(t, inside)
		if user.name != "" {
			c.logIn(user.name)
		}
		for _, route := range routes {
			for _, part := range []string{"", "1"} { // what the script asks for is guarded as well
				var got answer
				headers := []string{"Panel-Only", part}
				if part == "" {
					headers = nil
				}
				if route.fields == nil {
					got = c.get(route.path, headers...)
				} else {
					got = c.do(http.MethodPost, route.path, form(route.fields...), headers...)
				}
				want := map[string]int{"administrator": route.administrator, "auditor": route.auditor, "other": route.other, "anonymous": route.anonymous}[user.role]
				switch {
				case part != "" && user.role == "anonymous" && want != 404 && route.name != "start" && route.name != "language":
					want = 401
				case part != "" && want == 409:
					want = 200 // a part of the page is no page
				case part != "" && route.name == "progress" && want == 303:
					want = 200
				}
				if got.StatusCode != want {
					t.Errorf("%s, part %q, by %s %s: %s, want %d", route.name, part, user.role, user.name, got.Status, want)
				}
				if (user.role == "other" || user.role == "anonymous") && route.name != "validate" && route.name != "resume" && strings.Contains(got.body, own) {
					t.Errorf("%s shows a list to %s %s", route.name, user.role, user.name)
				}
				if user.role == "other" && route.name == "domains" && strings.Contains(got.body, "/domains/example.org") {
					t.Errorf("%s sees the domain", user.name)
				}
			}
		}
	}
}

// testGuessing comes last: it uses up what an address may try.
func testGuessing(t *testing.T, s *site) {
	c := s.session(t, "198.51.100.200")
	for i := range 7 {
		got := c.post("/login", "user", anna, "password", fmt.Sprint("guess", i))
		if i < 5 {
			if got.StatusCode != http.StatusUnauthorized {
				t.Errorf("guess %d: %s", i+1, got.Status)
			}
			continue
		}
		if got.StatusCode == http.StatusUnauthorized && i == 5 {
			continue // the one with which the waiting begins
		}
		if wait, err := strconv.Atoi(got.Header.Get("Retry-After")); got.StatusCode != http.StatusTooManyRequests || err != nil || wait < 1 {
			t.Errorf("guess %d: %s, Retry-After %q", i+1, got.Status, got.Header.Get("Retry-After"))
		}
	}
	if got := c.post("/login", "user", anna, "password", dashboardPassword); got.StatusCode != http.StatusTooManyRequests {
		t.Errorf("the right password in the waiting time: %s", got.Status)
	}
	s.session(t, inside).logIn(anna) // from elsewhere, where she has been before

	many := s.session(t, "198.51.100.201")
	refused := 0
	for i := range 40 {
		if got := many.post("/login", "user", fmt.Sprintf("person%d@example.org", i), "password", "guess"); got.StatusCode == http.StatusTooManyRequests {
			refused++
		}
	}
	if refused == 0 {
		t.Error("forty accounts can be tried from one address")
	}
	if got := s.session(t, "198.51.100.202").get("/login"); got.StatusCode != http.StatusOK {
		t.Errorf("the login elsewhere: %s", got.Status)
	}
}
