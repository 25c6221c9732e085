package login_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// site is a site with nothing but what login serves.
type site struct {
	*httptest.Server
	t       *testing.T
	login   *login.Login
	log     buffer
	metrics *prometheus.Registry
	users   string               // path
	slow    chan chan<- struct{} // requests of /slow wait here
}

// hashed makes hashes once, because they cost.
var hashed = sync.OnceValue(func() map[string]string {
	all := make(map[string]string)
	for _, password := range []string{"correct horse", "battery staple", "Grüße\u00a0dich"} {
		hash, err := login.HashPassword(password)
		if err != nil {
			panic(err)
		}
		all[password] = hash
	}
	return all
})

func users() string {
	h := hashed()
	return fmt.Sprintf(`users:
- {name: Anna@Example.org, password: %q, administrator: [example.org], auditor: [example.net]}
- {name: rex, password: %q, auditor: ["*"]}
- {name: zoë, password: %q, administrator: ["*"]}
`, h["correct horse"], h["battery staple"], h["Grüße\u00a0dich"])
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// serveSite serves a site; change makes its configuration another one.
func serveSite(t *testing.T, change func(cfg *login.Config, url string)) *site {
	t.Helper()
	s := &site{t: t, metrics: prometheus.NewRegistry(), users: filepath.Join(t.TempDir(), "users.yaml"), slow: make(chan chan<- struct{})}
	write(t, s.users, users())
	log := slog.New(slog.NewTextHandler(&s.log, nil))
	files, err := livefile.NewWatcher(log, s.metrics)
	if err != nil {
		t.Fatal(err)
	}
	cfg := login.Config{
		Files: files, UsersFile: s.users, Idle: time.Hour, Lifetime: 2 * time.Hour,
		TrustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Log: log, Metrics: s.metrics,
	}
	s.Server = httptest.NewUnstartedServer(nil)
	if change != nil {
		change(&cfg, "http://"+s.Listener.Addr().String())
	}
	if s.login, err = login.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.login.Close)
	s.Config.Handler = s.login.Sessions(s.routes())
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func (s *site) routes() http.Handler {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, err error, where string) {
		refusal := new(login.Refusal)
		switch {
		case err == nil:
			w.Header().Set("Location", where)
			w.WriteHeader(http.StatusSeeOther)
		case errors.As(err, &refusal):
			w.Header().Set("Retry-After", fmt.Sprint(refusal.Wait.Seconds()))
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, string(refusal.Reason))
		default:
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		_, err := s.login.Password(r, r.FormValue("name"), r.FormValue("password"))
		answer(w, err, login.LocalPath(r.FormValue("next")))
	})
	mux.HandleFunc("GET /login/oidc", func(w http.ResponseWriter, r *http.Request) {
		if err := s.login.StartOIDC(w, r, r.FormValue("next")); err != nil {
			answer(w, err, "")
		}
	})
	mux.HandleFunc("GET "+login.CallbackPath, func(w http.ResponseWriter, r *http.Request) {
		next, err := s.login.FinishOIDC(w, r)
		answer(w, err, next)
	})
	mux.HandleFunc("POST /logout", func(w http.ResponseWriter, r *http.Request) { answer(w, s.login.LogOut(r.Context()), "/") })
	mux.HandleFunc("GET /slow", func(w http.ResponseWriter, _ *http.Request) {
		wait := make(chan struct{})
		s.slow <- wait
		<-wait
		_, _ = io.WriteString(w, "slow")
	})
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		u, ok := login.UserOf(r.Context())
		if !ok {
			_, _ = io.WriteString(w, "nobody")
			return
		}
		actor := s.login.Actor(r)
		all := u.May(login.View, "elsewhere.example")
		names := slices.DeleteFunc([]string{"example.net", "example.org"}, func(domain string) bool { return all || !u.May(login.View, domain) })
		fmt.Fprintf(w, "%s %s %q %v", actor.GetId(), actor.GetAddress(), names, all)
	})
	return mux
}

// browser keeps cookies and follows no redirects.
type browser struct {
	*http.Client
	site *site
	from string // X-Forwarded-For
}

func (s *site) browser() *browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	transport := &http.Transport{}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &browser{site: s, from: "198.51.100.9", Client: &http.Client{
		Jar: jar, Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// answer is a response without its body.
type answer struct {
	StatusCode int
	Status     string
	Header     http.Header
}

// Cookies are those that it sets.
func (a answer) Cookies() []*http.Cookie { return (&http.Response{Header: a.Header}).Cookies() }

// do returns the answer and its body.
func (b *browser) do(method, target string, form url.Values) (answer, string) {
	b.site.t.Helper()
	if strings.HasPrefix(target, "/") {
		target = b.site.URL + target
	}
	req, err := http.NewRequestWithContext(b.site.t.Context(), method, target, strings.NewReader(form.Encode()))
	if err != nil {
		b.site.t.Fatal(err)
	}
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	req.Header.Set("X-Forwarded-For", "203.0.113.77, "+b.from)
	resp, err := b.Do(req)
	if err != nil {
		b.site.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.site.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Status, resp.Header}, string(body)
}

func (b *browser) logIn(name, password string) (answer, string) {
	b.site.t.Helper()
	return b.do(http.MethodPost, "/login", url.Values{"name": {name}, "password": {password}, "next": {"/there"}})
}

// sees returns who the site takes the browser for.
func (b *browser) sees() string {
	b.site.t.Helper()
	_, body := b.do(http.MethodGet, "/", nil)
	return body
}

func (b *browser) token() string {
	u, _ := url.Parse(b.site.URL)
	for _, c := range b.Jar.Cookies(u) {
		if c.Name == "allowednets" {
			return c.Value
		}
	}
	return ""
}

func (b *browser) setToken(value string) {
	u, _ := url.Parse(b.site.URL)
	b.Jar.SetCookies(u, []*http.Cookie{{Name: "allowednets", Value: value, Path: "/"}})
}

const anna = `anna@example.org 198.51.100.9 ["example.net" "example.org"] false`

func TestPassword(t *testing.T) {
	s := serveSite(t, nil)
	for _, c := range []struct{ name, password, want string }{
		{"anna@example.org", "correct horse", anna},
		{"ANNA@EXAMPLE.ORG", "correct horse", anna},
		{"rex", "battery staple", "rex 198.51.100.9 [] true"},
		{"zoe\u0308", "Gru\u0308ße dich", "zoë 198.51.100.9 [] true"}, // decomposed, and another space
	} {
		b := s.browser()
		resp, body := b.logIn(c.name, c.password)
		if resp.StatusCode != http.StatusSeeOther || resp.Header.Get("Location") != "/there" {
			t.Errorf("%s: %d %s", c.name, resp.StatusCode, body)
		}
		if got := b.sees(); got != c.want {
			t.Errorf("%s sees %q", c.name, got)
		}
	}
	for _, c := range []struct{ name, password string }{
		{"anna@example.org", "Correct horse"}, {"anna@example.org", ""}, {"anna@example.org", "correct horse "}, {"anna@example.org", "battery staple"},
		{"anna", "correct horse"}, {"", ""}, {"", "correct horse"}, {"rex\x00", "battery staple"}, {"rex", strings.Repeat("x", 5000)}, {strings.Repeat("x", 100_000), "x"},
		{"anna@example.org\nusers:", "correct horse"},
	} {
		b := s.browser()
		b.from = "198.51.100.10" // less than the budget of an address
		resp, body := b.logIn(c.name, c.password)
		if resp.StatusCode != http.StatusForbidden || body != string(login.WrongCredentials) || len(resp.Cookies()) != 0 || b.sees() != "nobody" {
			t.Errorf("%.30q, %.30q: %d %s %v", c.name, c.password, resp.StatusCode, body, resp.Cookies())
		}
	}
	if got := s.log.String(); strings.Contains(got, "horse") || strings.Contains(got, "staple") || len(got) > 20_000 ||
		!strings.Contains(got, `msg="not logged in" user=anna@example.org client_address=198.51.100.10 way=password reason=wrong_credentials`) {
		t.Errorf("log:\n%.5000s", got)
	}
}

// TestRightsOfTheMoment: what the file of users says holds for those who are logged in already.
func TestRightsOfTheMoment(t *testing.T) {
	s := serveSite(t, nil)
	b := s.browser()
	b.logIn("anna@example.org", "correct horse")
	if got := b.sees(); got != anna {
		t.Fatal(got)
	}
	write(t, s.users, strings.Replace(users(), "[example.net]", "[]", 1))
	if got, want := b.sees(), `anna@example.org 198.51.100.9 ["example.org"] false`; got != want {
		t.Errorf("with fewer rights: %q", got)
	}
	write(t, s.users, "users: [") // broken: the last good ones
	if got, want := b.sees(), `anna@example.org 198.51.100.9 ["example.org"] false`; got != want {
		t.Errorf("with a broken file: %q", got)
	}
	write(t, s.users, strings.Replace(users(), hashed()["correct horse"], hashed()["battery staple"], 1))
	if got := b.sees(); got != "nobody" {
		t.Errorf("with another password: %q", got)
	}
	write(t, s.users, users())
	if got := b.sees(); got != "nobody" {
		t.Errorf("the ended session came back: %q", got)
	}
	b.logIn("anna@example.org", "correct horse")
	write(t, s.users, strings.Replace(users(), "Anna@", "Anne@", 1))
	if got := b.sees(); got != "nobody" {
		t.Errorf("removed: %q", got)
	}
	if b.token() != "" {
		t.Error("the cookie is still there")
	}
}

func TestFixation(t *testing.T) {
	s := serveSite(t, nil)
	attacker, victim := s.browser(), s.browser()
	attacker.logIn("rex", "battery staple")
	planted := attacker.token()
	if planted == "" {
		t.Fatal("no token")
	}
	for _, token := range []string{planted, "chosen-by-somebody"} {
		victim.setToken(token)
		if resp, body := victim.logIn("anna@example.org", "correct horse"); resp.StatusCode != http.StatusSeeOther {
			t.Fatal(body)
		}
		if victim.token() == token || victim.sees() != anna {
			t.Errorf("the token %q goes on: %q", token, victim.sees())
		}
		attacker.setToken(token)
		if got := attacker.sees(); got != "nobody" {
			t.Errorf("the planted token sees %q", got)
		}
	}
}

func TestLogOut(t *testing.T) {
	s := serveSite(t, nil)
	b := s.browser()
	b.logIn("rex", "battery staple")
	token := b.token()

	// A request that is still running when its session ends must not bring it back.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		other := s.browser()
		other.setToken(token)
		other.do(http.MethodGet, "/slow", nil)
	}()
	release := <-s.slow
	resp, _ := b.do(http.MethodPost, "/logout", url.Values{})
	if cookies := resp.Cookies(); len(cookies) != 1 || cookies[0].Name != "allowednets" || cookies[0].Value != "" || cookies[0].MaxAge >= 0 {
		t.Errorf("cookies: %v", cookies)
	}
	close(release)
	<-ended
	b.setToken(token)
	if got := b.sees(); got != "nobody" {
		t.Errorf("after the log-out the token sees %q", got)
	}
}

func TestCookie(t *testing.T) {
	for _, secure := range []bool{false, true} {
		s := serveSite(t, func(cfg *login.Config, _ string) { cfg.Secure = secure })
		resp, _ := s.browser().logIn("rex", "battery staple")
		want := "allowednets"
		if secure {
			want = "__Host-allowednets"
		}
		cookies := resp.Cookies()
		if len(cookies) != 1 {
			t.Fatal(cookies)
		}
		c := cookies[0]
		if c.Name != want || c.Secure != secure || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Domain != "" || c.MaxAge != 0 || !c.Expires.IsZero() || len(c.Value) < 40 {
			t.Errorf("secure %v: %v", secure, c)
		}
	}
	// Who is not logged in gets none, and costs no memory.
	s := serveSite(t, nil)
	if resp, _ := s.browser().do(http.MethodGet, "/", nil); len(resp.Cookies()) != 0 {
		t.Errorf("cookies: %v", resp.Cookies())
	}
}

func TestBruteForce(t *testing.T) {
	s := serveSite(t, nil)
	b := s.browser()
	b.from = "2001:db8::1"
	var answers []string
	for range 12 {
		_, body := b.logIn("rex", "wrong")
		answers = append(answers, body)
	}
	n := slices.Index(answers, string(login.TooManyAttempts))
	if n != 6 {
		t.Errorf("answers: %q", answers)
	}
	resp, body := b.logIn("rex", "battery staple")
	if body != string(login.TooManyAttempts) || resp.Header.Get("Retry-After") == "0" || b.sees() != "nobody" {
		t.Errorf("the right password while waiting: %s after %s", body, resp.Header.Get("Retry-After"))
	}
	b.from = "2001:db8::ffff" // a neighbour in the same /64 is the same host
	if _, body := b.logIn("rex", "battery staple"); body != string(login.TooManyAttempts) {
		t.Errorf("a neighbour: %s", body)
	}
	b.from = "2001:db8:0:1::1"
	if resp, body := b.logIn("rex", "battery staple"); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("from elsewhere: %s", body)
	}
	for _, line := range []string{
		`allowednets_dashboard_logins_total{result="ok",way="password"} 1`, `allowednets_dashboard_logins_total{result="too_many_attempts",way="password"} 8`,
		`allowednets_dashboard_logins_total{result="wrong_credentials",way="password"} 6`, `allowednets_dashboard_sessions 1`,
	} {
		if got := s.gathered(); !strings.Contains(got, line+"\n") {
			t.Errorf("no %s in\n%s", line, got)
		}
	}
}

// gathered is the counters and gauges as text.
func (s *site) gathered() string {
	families, err := s.metrics.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	var b strings.Builder
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := family.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			fmt.Fprintf(&b, "%s %v\n", name, m.GetCounter().GetValue()+m.GetGauge().GetValue())
		}
	}
	return b.String()
}

func TestClientAddr(t *testing.T) {
	s := serveSite(t, nil)
	b := s.browser()
	b.logIn("rex", "battery staple")
	for from, want := range map[string]string{
		"192.0.2.1":                     "rex 192.0.2.1 ",
		"::ffff:192.0.2.1":              "rex 192.0.2.1 ",
		"1.2.3.4, 192.0.2.7, 127.0.0.5": "rex 192.0.2.7 ",
		"junk":                          "rex  ",
		"<script>":                      "rex  ",
	} {
		b.from = from
		if got := b.sees(); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q", from, got)
		}
	}
}

// TestUntrustedProxy: a proxy that was forgotten in the configuration is noticed, once.
func TestUntrustedProxy(t *testing.T) {
	for trusted, want := range map[string]int{"127.0.0.0/8": 0, "192.0.2.0/24": 1} {
		s := serveSite(t, func(cfg *login.Config, _ string) { cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix(trusted)} })
		b := s.browser()
		b.from = "203.0.113.9"
		b.logIn("rex", "battery staple")
		b.sees()
		if got := strings.Count(s.log.String(), "X-Forwarded-For is not believed"); got != want {
			t.Errorf("with %s it was said %d times", trusted, got)
		}
	}
}

func TestLocalPath(t *testing.T) {
	for path, local := range map[string]bool{
		"/": true, "/domains/example.org?q=a&after=b#c": true, "/d/x@y": true, "/a//b": true, "/%2F%2Fevil.example": true, "/..//evil.example": true,
		"": false, "//evil.example": false, "/\\evil.example": false, "\\\\evil.example": false, "https://evil.example/": false, "https:evil": false,
		"/\t/evil.example": false, "/\n//evil": false, "/a\r\nSet-Cookie: x=y": false, " //evil": false, "javascript:alert(1)": false, "a/b": false,
		"///evil.example": false, "/a\\b": false, "/\x7f": false, "/%zz": false, "/" + strings.Repeat("a", 3000): false,
	} {
		want := "/"
		if local {
			want = path
		}
		if got := login.LocalPath(path); got != want {
			t.Errorf("%q: %q", path, got)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for content, want := range map[string]string{
		"":                                       "it has no users",
		"users: []":                              "it has no users",
		"user: []":                               "field user not found",
		"users: [anna]":                          "line 1: it must have a name",
		"users:\n- {nam: x}":                     `line 2: there is no field "nam"`,
		"users:\n- {name: '', auditor: [a.org]}": "line 2: the user",
		"users:\n- {name: 'a b', auditor: [a.org]}":               `line 2: the user "a b"`,
		"users:\n- {name: a}":                                     "line 2: the user a: has no rights",
		"users:\n- {name: a, auditor: ['*.org']}":                 "line 2: the user a: auditor:",
		"users:\n- {name: a, administrator: [a..b]}":              "administrator:",
		"users:\n- {name: a, auditor: a.org}":                     "line 2",
		"users:\n- {name: a, auditor: [a.org]}":                   "line 2: the password of a is no argon2id hash; 'allowednets-dashboard hash-password' makes one",
		"users:\n- {name: a, password: secret, auditor: [a.org]}": "is no argon2id hash",
		strings.Replace(users(), "m=19456", "m=1945", 1):          "is too weak",
		strings.Replace(users(), "m=19456", "m=19456000", 1):      "costs too much",
		strings.Replace(users(), "v=19", "v=16", 1):               "version 19",
		strings.Replace(users(), "argon2id", "argon2i", 1):        "no argon2id hash",
		strings.Replace(users(), "rex", "ANNA@example.ORG", 1):    "line 3: the user anna@example.org stands there already",
	} {
		path := filepath.Join(t.TempDir(), "users")
		write(t, path, content)
		_, err := login.New(login.Config{Files: newFiles(t), UsersFile: path, Log: discard(), Metrics: registry()})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestHashPassword(t *testing.T) {
	a, err := login.HashPassword("x")
	b, _ := login.HashPassword("x")
	if err != nil || a == b || !strings.HasPrefix(a, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("%s, %s, %v", a, b, err)
	}
	for _, password := range []string{"", "a\x00b", "a\nb", strings.Repeat("x", 1025)} {
		if _, err := login.HashPassword(password); err == nil {
			t.Errorf("%q was taken", password)
		}
	}
}

func discard() *slog.Logger          { return slog.New(slog.DiscardHandler) }
func registry() *prometheus.Registry { return prometheus.NewRegistry() }

func newFiles(t *testing.T) *livefile.Watcher {
	t.Helper()
	w, err := livefile.NewWatcher(discard(), registry())
	if err != nil {
		t.Fatal(err)
	}
	return w
}
