package login_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

const clientID, clientSecret = "dashboard", "s3cr et+/%"

// people are who the provider knows, by user name; their password is "password".
type people map[string]*storage.User

func (p people) GetUserByID(id string) *storage.User         { return p[id] }
func (p people) GetUserByUsername(name string) *storage.User { return p[name] }
func (p people) ExampleClientID() string                     { return "unused" }

// groups are the people's groups.
func groups(user string) []string {
	return map[string][]string{
		"eva": {"staff", "mail-admins"}, "ian": {"mail-readers", "mail-admins"}, "guest": {"guests"}, "unverified": {"mail-admins"}, "anna": {"mail-admins"},
	}[user]
}

// memory is the storage of zitadel's example, with groups.
type memory struct{ *storage.Storage }

func (m memory) SetUserinfoFromRequest(ctx context.Context, info *oidc.UserInfo, req op.IDTokenRequest, scopes []string) error {
	if g := groups(req.GetSubject()); g != nil {
		info.AppendClaims("groups", g)
	}
	return m.Storage.SetUserinfoFromRequest(ctx, info, req, scopes)
}

func (m memory) SetUserinfoFromToken(ctx context.Context, info *oidc.UserInfo, tokenID, subject, origin string) error {
	if g := groups(subject); g != nil {
		info.AppendClaims("groups", g)
	}
	return m.Storage.SetUserinfoFromToken(ctx, info, tokenID, subject, origin)
}

// issuer is a real OpenID provider, whose answers a test can falsify.
type issuer struct {
	*httptest.Server
	t      *testing.T
	memory memory
	forge  func(claims map[string]any) // changes ID tokens
	key    *rsa.PrivateKey             // signs them if it is not the provider's
	down   atomic.Bool
}

func serveIssuer(t *testing.T, redirectURL string) *issuer {
	t.Helper()
	p := &issuer{t: t}
	known := people{}
	for name, email := range map[string]string{
		"eva": "eva@example.org", "ian": "ian@example.org", "guest": "guest@example.org", "unverified": "eva@example.org", "anna": "ANNA@example.org",
	} {
		known[name] = &storage.User{ID: name, Username: name, Password: "password", Email: email, EmailVerified: name != "unverified"}
	}
	p.memory = memory{storage.NewStorageWithClients(known, map[string]*storage.Client{
		clientID: storage.WebClient(clientID, clientSecret, redirectURL),
		"public": storage.NativeClient("public", redirectURL),
	})}
	p.Server = httptest.NewUnstartedServer(nil)
	router := exampleop.SetupServer("http://"+p.Listener.Addr().String(), p.memory, nil, false)
	p.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case p.down.Load():
			http.Error(w, "maintenance", http.StatusServiceUnavailable)
		case r.URL.Path == "/oauth/token" && p.forge != nil:
			recorded := httptest.NewRecorder()
			router.ServeHTTP(recorded, r)
			maps.Copy(w.Header(), recorded.Header())
			w.Header().Del("Content-Length")
			w.WriteHeader(recorded.Code)
			_, _ = w.Write(p.forged(recorded.Body.Bytes()))
		default:
			router.ServeHTTP(w, r)
		}
	})
	p.Start()
	t.Cleanup(p.Close)
	return p
}

// forged returns a token answer with the ID token changed and signed again.
func (p *issuer) forged(answer []byte) []byte {
	var fields map[string]any
	if err := json.Unmarshal(answer, &fields); err != nil {
		p.t.Error(err)
		return answer
	}
	raw, ok := fields["id_token"].(string)
	if !ok {
		return answer // a refusal
	}
	parsed, err := jose.ParseSigned(raw, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		p.t.Error(err)
		return answer
	}
	var claims map[string]any
	if err := json.Unmarshal(parsed.UnsafePayloadWithoutVerification(), &claims); err != nil {
		p.t.Error(err)
		return answer
	}
	p.forge(claims)
	payload, _ := json.Marshal(claims)
	signing, err := p.memory.SigningKey(p.t.Context())
	if err != nil {
		p.t.Error(err)
		return answer
	}
	key := jose.JSONWebKey{Key: signing.Key(), KeyID: signing.ID()}
	if p.key != nil {
		key.Key = p.key
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: key}, nil)
	if err != nil {
		p.t.Error(err)
		return answer
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		p.t.Error(err)
		return answer
	}
	fields["id_token"], _ = signed.CompactSerialize()
	answer, _ = json.Marshal(fields)
	return answer
}

// logIn does what a person does at the provider, and returns where it sends the browser.
func (p *issuer) logIn(authURL, user string) string {
	p.t.Helper()
	jar, _ := cookiejar.New(nil)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client := &http.Client{Jar: jar, Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	step := func(method, target string, form url.Values) string {
		p.t.Helper()
		req, err := http.NewRequestWithContext(p.t.Context(), method, target, strings.NewReader(form.Encode()))
		if err != nil {
			p.t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := client.Do(req)
		if err != nil {
			p.t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		where, err := resp.Location()
		if err != nil {
			body, _ := io.ReadAll(resp.Body)
			p.t.Fatalf("%s %s: %s\n%s", method, target, resp.Status, body)
		}
		return where.String()
	}
	form := step(http.MethodGet, authURL, nil)
	u, err := url.Parse(form)
	if err != nil {
		p.t.Fatal(err)
	}
	back := step(http.MethodPost, p.URL+"/login/username", url.Values{"id": {u.Query().Get("authRequestID")}, "username": {user}, "password": {"password"}})
	return step(http.MethodGet, back, nil)
}

const roles = `groups:
- {name: mail-admins, administrator: [example.org]}
- {name: mail-readers, auditor: ["*"]}
`

// oidcSite is a site with a provider. change makes the client another one.
func oidcSite(t *testing.T, change func(*login.Client)) (*site, *issuer, string) {
	t.Helper()
	var p *issuer
	path := filepath.Join(t.TempDir(), "roles")
	write(t, path, roles)
	s := serveSite(t, func(cfg *login.Config, u string) {
		p = serveIssuer(t, u+login.CallbackPath)
		cfg.OIDC = &login.Client{
			Issuer: p.URL, ID: clientID, Secret: clientSecret, RedirectURL: u + login.CallbackPath, Scopes: []string{"profile", "email"},
			NameClaim: "email", GroupsClaim: "groups", RolesFile: path,
		}
		if change != nil {
			change(cfg.OIDC)
		}
	})
	return s, p, path
}

// start sends a browser to the provider.
func (b *browser) start(next string) (authURL string) {
	b.site.t.Helper()
	resp, body := b.do(http.MethodGet, "/login/oidc?next="+url.QueryEscape(next), nil)
	if resp.StatusCode != http.StatusSeeOther {
		b.site.t.Fatalf("%s: %s", resp.Status, body)
	}
	return resp.Header.Get("Location")
}

const evaSees = `eva@example.org 198.51.100.9 ["example.org"] false`

func TestOIDC(t *testing.T) {
	s, p, path := oidcSite(t, nil)
	b := s.browser()
	authURL := b.start("/d/example.org?q=1")
	u, err := url.Parse(authURL)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	if q.Get("code_challenge_method") != "S256" || len(q.Get("code_challenge")) != 43 || len(q.Get("state")) < 22 || len(q.Get("nonce")) < 22 || q.Get("scope") != "openid profile email" ||
		q.Get("response_type") != "code" || q.Get("state") == q.Get("nonce") || strings.Contains(authURL, "s3cr") {
		t.Errorf("asks with %s", authURL)
	}
	back := p.logIn(authURL, "eva")
	resp, body := b.do(http.MethodGet, back, nil)
	if resp.StatusCode != http.StatusSeeOther || resp.Header.Get("Location") != "/d/example.org?q=1" || b.sees() != evaSees {
		t.Fatalf("%s to %q: %s; sees %q\n%s", resp.Status, resp.Header.Get("Location"), body, b.sees(), s.log.String())
	}
	// The rights are those of the moment here too.
	write(t, path, strings.Replace(roles, "[example.org]", "[example.net]", 1))
	if got := b.sees(); got != `eva@example.org 198.51.100.9 ["example.net"] false` {
		t.Errorf("with other rights sees %q", got)
	}
	// A local user gets the same name: from then on the name is theirs alone.
	write(t, path, roles)
	write(t, s.users, users()+fmt.Sprintf("- {name: EVA@example.org, password: %q, auditor: [example.net]}\n", hashed()["battery staple"]))
	if got := b.sees(); got != "nobody" {
		t.Errorf("with the name of a local user sees %q", got)
	}
	write(t, s.users, users())
	if resp, body := b.do(http.MethodGet, p.logIn(b.start("/"), "eva"), nil); resp.StatusCode != http.StatusSeeOther || b.sees() != evaSees {
		t.Fatalf("%s: %s; sees %q", resp.Status, body, b.sees())
	}
	write(t, path, strings.Replace(roles, "mail-admins", "mail-chiefs", 1))
	if got := b.sees(); got != "nobody" {
		t.Errorf("without rights sees %q", got)
	}
	if got := s.gathered(); !strings.Contains(got, `allowednets_dashboard_logins_total{result="ok",way="oidc"} 2`) {
		t.Errorf("metrics:\n%s", got)
	}
	if got := s.log.String(); strings.Contains(got, "s3cr") || strings.Contains(got, q.Get("state")) {
		t.Errorf("log:\n%s", got)
	}
}

// TestOIDCClaims: what a provider says, and what comes of it.
func TestOIDCClaims(t *testing.T) {
	ago := func(d time.Duration) float64 { return float64(time.Now().Add(-d).Unix()) }
	for name, c := range map[string]struct {
		user   string
		client func(*login.Client)
		forge  func(claims map[string]any)
		sees   string       // who they are in the end, or
		reason login.Reason // why not
	}{
		"rights of several groups": {user: "ian", sees: `ian@example.org 198.51.100.9 [] true`},
		"public client":            {user: "eva", client: func(c *login.Client) { c.ID, c.Secret = "public", "" }, sees: evaSees},
		"wrong secret":             {user: "eva", client: func(c *login.Client) { c.Secret = "wrong" }, reason: login.ProviderRefused},
		"another name claim":       {user: "unverified", client: func(c *login.Client) { c.NameClaim = "preferred_username" }, sees: `unverified 198.51.100.9 ["example.org"] false`},
		"unverified address":       {user: "unverified", reason: login.NoAccess},
		"no name":                  {user: "eva", client: func(c *login.Client) { c.NameClaim = "nickname" }, reason: login.NoAccess},
		"name of a local user":     {user: "anna", reason: login.NoAccess},
		"unknown group":            {user: "guest", reason: login.NoAccess},
		"no groups":                {user: "eva", client: func(c *login.Client) { c.GroupsClaim = "teams" }, reason: login.NoAccess},
		"groups deep in the token": {
			user: "eva", client: func(c *login.Client) { c.GroupsClaim = "realm_access.roles" }, sees: `eva@example.org 198.51.100.9 [] true`,
			forge: func(claims map[string]any) {
				claims["realm_access"] = map[string]any{"roles": []string{"mail-readers"}}
			},
		},
		"a group that is no list":                 {user: "guest", sees: `guest@example.org 198.51.100.9 [] true`, forge: func(claims map[string]any) { claims["groups"] = "mail-readers" }},
		"groups that are no words":                {user: "guest", reason: login.NoAccess, forge: func(claims map[string]any) { claims["groups"] = []any{1, nil, map[string]any{"mail-readers": 1}} }},
		"name with a line break":                  {user: "eva", reason: login.NoAccess, forge: func(claims map[string]any) { claims["email"], claims["email_verified"] = "eva\n@example.org", true }},
		"address that is not said to be verified": {user: "eva", reason: login.NoAccess, forge: func(claims map[string]any) { claims["email"], claims["email_verified"] = "eva@example.org", "no" }},

		"forged without a change":   {user: "eva", sees: evaSees, forge: func(map[string]any) {}},
		"another nonce":             {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["nonce"] = "x" }},
		"no nonce":                  {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { delete(claims, "nonce") }},
		"another client":            {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["aud"] = "other"; delete(claims, "azp") }},
		"issued to another client":  {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["azp"] = "other" }},
		"for two, nobody's":         {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["aud"] = []string{"other", clientID}; delete(claims, "azp") }},
		"for two, ours":             {user: "eva", sees: evaSees, forge: func(claims map[string]any) { claims["aud"], claims["azp"] = []string{"other", clientID}, clientID }},
		"another issuer":            {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["iss"] = "https://other.example" }},
		"expired":                   {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["exp"] = ago(2 * time.Minute) }},
		"clock 30 s behind":         {user: "eva", sees: evaSees, forge: func(claims map[string]any) { claims["exp"], claims["iat"] = ago(30*time.Second), ago(time.Minute) }},
		"clock 2 min ahead":         {user: "eva", sees: evaSees, forge: func(claims map[string]any) { claims["nbf"], claims["iat"] = ago(-2*time.Minute), ago(-2*time.Minute) }},
		"not valid yet":             {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["nbf"] = ago(-10 * time.Minute) }},
		"info is about another one": {user: "eva", reason: login.ProviderRefused, forge: func(claims map[string]any) { claims["sub"] = "ian" }},
	} {
		t.Run(name, func(t *testing.T) {
			s, p, _ := oidcSite(t, c.client)
			p.forge = c.forge
			b := s.browser()
			resp, body := b.do(http.MethodGet, p.logIn(b.start("/there"), c.user), nil)
			if c.reason != "" {
				if body != string(c.reason) || b.sees() != "nobody" || b.token() != "" {
					t.Errorf("%s: %s; sees %q\n%s", resp.Status, body, b.sees(), s.log.String())
				}
				return
			}
			if resp.Header.Get("Location") != "/there" || b.sees() != c.sees {
				t.Errorf("%s: %s; sees %q\n%s", resp.Status, body, b.sees(), s.log.String())
			}
		})
	}
}

// TestOIDCWrongKey: a token that somebody else signed.
func TestOIDCWrongKey(t *testing.T) {
	s, p, _ := oidcSite(t, nil)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p.key, p.forge = key, func(map[string]any) {}
	b := s.browser()
	if _, body := b.do(http.MethodGet, p.logIn(b.start("/"), "eva"), nil); body != string(login.ProviderRefused) || b.sees() != "nobody" {
		t.Errorf("%s; sees %q", body, b.sees())
	}
}

// TestOIDCCallback: what somebody can do with the address to which the provider sends browsers back.
func TestOIDCCallback(t *testing.T) {
	s, p, _ := oidcSite(t, nil)
	want := func(b *browser, target string, reason login.Reason) {
		t.Helper()
		if resp, body := b.do(http.MethodGet, target, nil); body != string(reason) || b.sees() != "nobody" {
			t.Errorf("%s: %s; want %s; sees %q", resp.Status, body, reason, b.sees())
		}
	}
	altered := func(target, key, value string) string {
		u, err := url.Parse(target)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set(key, value)
		u.RawQuery = q.Encode()
		return u.String()
	}
	stateOf := func(authURL string) string {
		u, err := url.Parse(authURL)
		if err != nil {
			t.Fatal(err)
		}
		return u.Query().Get("state")
	}

	// Log-in of a victim by a link: the victim's browser began nothing.
	attacker, victim := s.browser(), s.browser()
	back := p.logIn(attacker.start("/"), "eva")
	want(victim, back, login.LoginExpired)
	// The victim has begun, but something else.
	victim.start("/")
	want(victim, back, login.LoginExpired)
	// ... and even with the victim's own state the code is not the victim's (PKCE).
	want(victim, altered(back, "state", stateOf(victim.start("/"))), login.ProviderRefused)

	for name, change := range map[string][2]string{"wrong state": {"state", "x"}, "empty state": {"state", ""}} {
		b := s.browser()
		t.Log(name)
		want(b, altered(p.logIn(b.start("/"), "eva"), change[0], change[1]), login.LoginExpired)
	}
	b := s.browser()
	want(b, altered(p.logIn(b.start("/"), "eva"), "code", "x"), login.ProviderRefused)
	want(b, altered(p.logIn(b.start("/"), "eva"), "code", ""), login.ProviderRefused)
	want(b, login.CallbackPath+"?error=access_denied&error_description=x&state="+stateOf(b.start("/")), login.ProviderRefused)
	want(b, login.CallbackPath+"?error=access_denied", login.LoginExpired)
	want(b, login.CallbackPath, login.LoginExpired)

	// The same answer twice.
	b = s.browser()
	back = p.logIn(b.start("/"), "eva")
	site, _ := url.Parse(s.URL)
	pending := b.Jar.Cookies(site)
	if len(pending) != 1 || pending[0].Name != "allowednets-oidc" {
		t.Fatalf("cookies: %v", pending)
	}
	if resp, body := b.do(http.MethodGet, back, nil); resp.StatusCode != http.StatusSeeOther {
		t.Fatal(body)
	}
	b.do(http.MethodPost, "/logout", url.Values{})
	want(b, back, login.LoginExpired)
	b.Jar.SetCookies(site, pending)
	want(b, back, login.ProviderRefused)

	// Garbage in the cookie, and one that is too old.
	for _, value := range []string{"", "x", "a.b.c.d.e", "....", "a.b.c.1.Lw", strings.Repeat(".", 3000)} {
		b.Jar.SetCookies(site, []*http.Cookie{{Name: "allowednets-oidc", Value: value, Path: "/"}})
		want(b, login.CallbackPath+"?code=x&state=a", login.LoginExpired)
	}

	// Where to go is a path of ours, in the cookie as well.
	b = s.browser()
	resp, _ := b.do(http.MethodGet, p.logIn(b.start("//evil.example"), "eva"), nil)
	if got := resp.Header.Get("Location"); got != "/" {
		t.Errorf("it leads to %q", got)
	}
}

func TestOIDCCookie(t *testing.T) {
	s, _, _ := oidcSite(t, nil)
	resp, _ := s.browser().do(http.MethodGet, "/login/oidc", nil)
	if c := resp.Cookies(); len(c) != 1 || !c[0].HttpOnly || c[0].SameSite != http.SameSiteLaxMode || c[0].Path != "/" || c[0].MaxAge != 600 || c[0].Secure {
		t.Errorf("cookies: %v", c)
	}
}

func TestProviderDown(t *testing.T) {
	s, p, _ := oidcSite(t, nil)
	p.down.Store(true)
	b := s.browser()
	for range 3 {
		if resp, body := b.do(http.MethodGet, "/login/oidc", nil); body != string(login.ProviderUnavailable) || len(resp.Cookies()) != 0 {
			t.Fatalf("%s: %s", resp.Status, body)
		}
	}
	if resp, body := b.logIn("rex", "battery staple"); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("local users cannot log in: %s", body)
	}
	b = s.browser()
	p.down.Store(false)
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	for {
		if resp, _ := b.do(http.MethodGet, "/login/oidc", nil); resp.StatusCode == http.StatusSeeOther {
			break
		}
		select {
		case <-deadline.C:
			t.Fatal("it stays unavailable")
		case <-time.After(50 * time.Millisecond):
		}
	}
	back := p.logIn(b.start("/"), "eva")
	p.down.Store(true)
	if _, body := b.do(http.MethodGet, back, nil); body != string(login.ProviderUnavailable) || b.sees() != "nobody" {
		t.Errorf("%s; sees %q", body, b.sees())
	}
	if got := s.log.String(); !strings.Contains(got, "503") {
		t.Errorf("log:\n%s", got)
	}
}

// TestOIDCFlood: guessing codes is slowed down.
func TestOIDCFlood(t *testing.T) {
	s, _, _ := oidcSite(t, nil)
	b := s.browser()
	site, _ := url.Parse(s.URL)
	var last string
	for range 40 {
		b.Jar.SetCookies(site, []*http.Cookie{{Name: "allowednets-oidc", Value: fmt.Sprintf("a.b.c.%d.Lw", time.Now().Unix()), Path: "/"}})
		_, last = b.do(http.MethodGet, login.CallbackPath+"?code=x&state=a", nil)
	}
	if last != string(login.TooManyAttempts) {
		t.Errorf("at last: %s", last)
	}
}

func TestRolesRefuse(t *testing.T) {
	for content, want := range map[string]string{
		"":                                "it has no groups",
		"groups:\n- {name: a}":            `line 2: the group "a": has no rights`,
		"groups:\n- {auditor: [a.org]}":   "line 2: a group has no name",
		"groups:\n- {name: a, rights: x}": `line 2: there is no field "rights"`,
		roles + "- {name: mail-admins, auditor: [a.org]}": `line 4: the group "mail-admins" stands there already`,
	} {
		path := filepath.Join(t.TempDir(), "roles")
		write(t, path, content)
		s := newFiles(t)
		_, err := login.New(login.Config{Files: s, OIDC: &login.Client{RolesFile: path}, Log: discard(), Metrics: registry()})
		if err == nil || !strings.Contains(err.Error(), want) || bytes.ContainsRune([]byte(err.Error()), '\n') {
			t.Errorf("%q: %v", content, err)
		}
	}
}
