package login

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
	"golang.org/x/sync/singleflight"

	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

// Client is what the dashboard is to an OpenID provider, and what it makes of the provider's claims.
type Client struct {
	Issuer      string // as the provider calls itself
	ID, Secret  string // without a secret PKCE alone protects the code
	RedirectURL string // our [CallbackPath] as browsers see it
	Scopes      []string
	NameClaim   string // if it is "email", email_verified must be true
	GroupsClaim string // dots lead into objects
	RolesFile   string // which group may do what
}

const (
	pendingFor     = 10 * time.Minute // for somebody to log in at the provider
	skew           = time.Minute      // by which the provider's clock may be behind ours
	providerWait   = 10 * time.Second // for each answer of the provider
	discoverAgain  = time.Hour
	rediscoverFail = 2 * time.Second // a provider that is down is not asked more often
	maxGroups      = 1000            // of a person
)

// provider is an OpenID provider. What it says about itself is asked for when it is needed, so that the dashboard starts without it.
type provider struct {
	Client
	http  *http.Client
	roles *livefile.File[map[string]Rights]

	flight singleflight.Group
	mu     sync.Mutex
	known  *oidc.Provider
	asked  time.Time
	failed error
}

func newProvider(cfg Config) (*provider, error) {
	roles, err := livefile.Open(cfg.Files, "oidc_roles", cfg.OIDC.RolesFile, parseRoles)
	if err != nil {
		return nil, err
	}
	return &provider{
		Client: *cfg.OIDC, roles: roles,
		http: &http.Client{Timeout: providerWait, Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 5 * time.Second, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
		}},
	}, nil
}

// discovered returns what the provider says about itself, which is asked for anew each hour.
func (p *provider) discovered(ctx context.Context) (*oidc.Provider, error) {
	p.mu.Lock()
	known, age, failed := p.known, time.Since(p.asked), p.failed
	p.mu.Unlock()
	switch {
	case known != nil && age < discoverAgain:
		return known, nil
	case failed != nil && age < rediscoverFail:
		return nil, failed
	}
	value, err, _ := p.flight.Do("", func() (any, error) {
		// Nobody's request may end what the others wait for; the client has its timeout.
		found, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), p.http), p.Issuer)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.asked, p.failed = time.Now(), err
		if err == nil {
			p.known = found
		}
		if p.known != nil {
			return p.known, nil // yesterday's answer is better than none
		}
		return nil, err
	})
	found, _ := value.(*oidc.Provider)
	return found, err
}

// oauth is the client in the words of OAuth. With the provider's choice of where the secret goes, nothing is tried out: a code
// is good for one attempt.
func (p *provider) oauth(found *oidc.Provider) *oauth2.Config {
	endpoint := found.Endpoint()
	var claims struct {
		Methods []string `json:"token_endpoint_auth_methods_supported"`
	}
	endpoint.AuthStyle = oauth2.AuthStyleInHeader
	if err := found.Claims(&claims); p.Secret == "" || err == nil && len(claims.Methods) > 0 && !slices.Contains(claims.Methods, "client_secret_basic") {
		endpoint.AuthStyle = oauth2.AuthStyleInParams
	}
	return &oauth2.Config{
		ClientID: p.ID, ClientSecret: p.Secret, Endpoint: endpoint, RedirectURL: p.RedirectURL,
		Scopes: append([]string{oidc.ScopeOpenID}, p.Scopes...),
	}
}

// rights are those of all the groups together; ok is false if there are none.
func (p *provider) rights(groups []string) (all Rights, ok bool) {
	roles := p.roles.Latest()
	for _, group := range groups {
		if rights, there := roles[group]; there {
			ok = true
			all.Administrator = append(all.Administrator, rights.Administrator...)
			all.Auditor = append(all.Auditor, rights.Auditor...)
		}
	}
	return all, ok
}

// pending is a login that is under way at the provider. It stands in a cookie of the browser that began it, so that strangers cannot
// fill our memory with it. What is in it are secrets between that browser and us; who could set the cookie of another browser
// would be that browser's own host (see cookieName).
type pending struct {
	state, nonce, verifier string
	next                   string // a local path
	begun                  time.Time
}

func (p pending) String() string {
	next := base64.RawURLEncoding.EncodeToString([]byte(p.next))
	return strings.Join([]string{p.state, p.nonce, p.verifier, strconv.FormatInt(p.begun.Unix(), 10), next}, ".")
}

func parsePending(s string) (pending, bool) {
	parts := strings.Split(s, ".")
	if len(parts) != 5 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return pending{}, false
	}
	begun, err := strconv.ParseInt(parts[3], 10, 64)
	next, nextErr := base64.RawURLEncoding.DecodeString(parts[4])
	p := pending{state: parts[0], nonce: parts[1], verifier: parts[2], next: LocalPath(string(next)), begun: time.Unix(begun, 0)}
	age := time.Since(p.begun)
	return p, err == nil && nextErr == nil && age < pendingFor && age > -time.Minute
}

func (l *Login) pendingCookie(value string, maxAge int) *http.Cookie {
	return &http.Cookie{ //nolint:gosec // Secure unless --insecure-http says that there is no https
		Name: cookieName("allowednets-oidc", l.cfg.Secure), Value: value, Path: "/", MaxAge: maxAge,
		Secure: l.cfg.Secure, HttpOnly: true, SameSite: http.SameSiteLaxMode, // the provider sends the browser back from another site
	}
}

// StartOIDC sends the browser to the OpenID provider; afterwards it comes back to [CallbackPath], and then goes to next, a
// path of this site. The error is a *[Refusal]; nothing was written then.
func (l *Login) StartOIDC(w http.ResponseWriter, r *http.Request, next string) error {
	ctx := r.Context()
	if l.provider == nil {
		return l.refused(ctx, byOIDC, "", l.ClientAddr(r), &Refusal{Reason: ProviderRefused, Detail: "there is no provider"})
	}
	found, err := l.provider.discovered(ctx)
	if err != nil {
		return l.refused(ctx, byOIDC, "", l.ClientAddr(r), &Refusal{Reason: ProviderUnavailable, Detail: err.Error()})
	}
	p := pending{state: rand.Text(), nonce: rand.Text(), verifier: oauth2.GenerateVerifier(), next: LocalPath(next), begun: time.Now()}
	http.SetCookie(w, l.pendingCookie(p.String(), int(pendingFor.Seconds())))
	http.Redirect(w, r, l.provider.oauth(found).AuthCodeURL(p.state, oidc.Nonce(p.nonce), oauth2.S256ChallengeOption(p.verifier)), http.StatusSeeOther)
	return nil
}

// CallbackPath is where [Login.FinishOIDC] must be served.
const CallbackPath = "/login/oidc/callback"

// FinishOIDC logs in who comes back from the provider, and returns where they wanted to go. Before it nothing of the response
// may have been written. The error is a *[Refusal].
func (l *Login) FinishOIDC(w http.ResponseWriter, r *http.Request) (next string, err error) {
	ctx, from := r.Context(), l.ClientAddr(r)
	var p pending
	began := false
	if cookie, err := r.Cookie(l.pendingCookie("", 0).Name); err == nil {
		http.SetCookie(w, l.pendingCookie("", -1)) // once
		p, began = parsePending(cookie.Value)
	}
	query := r.URL.Query()
	refuse := func(name string, refusal *Refusal) (string, error) {
		return "/", l.refused(ctx, byOIDC, name, from, refusal)
	}
	if l.provider == nil || !began || subtle.ConstantTimeCompare([]byte(query.Get("state")), []byte(p.state)) != 1 {
		return refuse("", &Refusal{Reason: LoginExpired})
	}
	if problem := query.Get("error"); problem != "" {
		return refuse("", &Refusal{Reason: ProviderRefused, Detail: cut(problem + " " + query.Get("error_description"))})
	}
	if wait := l.limits.attempt("", from, time.Now()); wait > 0 {
		return refuse("", &Refusal{Reason: TooManyAttempts, Wait: wait})
	}
	claims, refusal := l.provider.claims(ctx, query.Get("code"), p)
	if refusal != nil {
		return refuse("", refusal)
	}
	l.limits.succeeded("", from, time.Now())
	name, err := l.provider.name(claims)
	if err != nil {
		return refuse("", &Refusal{Reason: NoAccess, Detail: err.Error()})
	}
	groups := groupsIn(claims, l.provider.GroupsClaim)
	rights, ok := l.provider.rights(groups)
	switch {
	case !ok:
		return refuse(name, &Refusal{Reason: NoAccess, Detail: fmt.Sprintf("none of the %d groups in the claim %q has a role", len(groups), l.provider.GroupsClaim)})
	case l.isLocal(name):
		return refuse(name, &Refusal{Reason: NoAccess, Detail: "a local user has the same name"})
	}
	if _, err := l.begin(ctx, User{Name: name, rights: rights}, from, byOIDC, map[string]any{keyGroups: groups}); err != nil {
		return "/", err
	}
	return p.next, nil
}

// claims exchanges a code for what the provider says about the person.
func (p *provider) claims(ctx context.Context, code string, begun pending) (map[string]any, *Refusal) {
	refuse := func(reason Reason, err error) (map[string]any, *Refusal) {
		return nil, &Refusal{Reason: reason, Detail: err.Error()}
	}
	if code == "" {
		return refuse(ProviderRefused, errors.New("the provider sent no code"))
	}
	found, err := p.discovered(ctx)
	if err != nil {
		return refuse(ProviderUnavailable, err)
	}
	ctx = oidc.ClientContext(ctx, p.http)
	token, err := p.oauth(found).Exchange(ctx, code, oauth2.VerifierOption(begun.verifier))
	if err != nil {
		if said := new(oauth2.RetrieveError); errors.As(err, &said) && said.Response != nil && said.Response.StatusCode < http.StatusInternalServerError {
			return refuse(ProviderRefused, fmt.Errorf("the provider refused the code: %s %s", said.Response.Status, cut(said.ErrorCode+" "+said.ErrorDescription)))
		}
		return refuse(ProviderUnavailable, err)
	}
	raw, ok := token.Extra("id_token").(string)
	if !ok {
		return refuse(ProviderRefused, errors.New("the provider sent no ID token"))
	}
	verifier := found.VerifierContext(ctx, &oidc.Config{ClientID: p.ID, Now: func() time.Time { return time.Now().Add(-skew) }})
	id, err := verifier.Verify(ctx, raw)
	if err != nil {
		return refuse(ProviderRefused, err)
	}
	if subtle.ConstantTimeCompare([]byte(id.Nonce), []byte(begun.nonce)) != 1 {
		return refuse(ProviderRefused, errors.New("the ID token has another nonce: it was made for another login"))
	}
	claims := make(map[string]any)
	if err := id.Claims(&claims); err != nil {
		return refuse(ProviderRefused, err)
	}
	if azp, there := claims["azp"]; there && azp != p.ID || !there && len(id.Audience) > 1 {
		return refuse(ProviderRefused, errors.New("the ID token was issued to another client"))
	}
	complete := find(claims, p.NameClaim) != nil && find(claims, p.GroupsClaim) != nil && (p.NameClaim != "email" || claims["email_verified"] != nil)
	if complete || found.UserInfoEndpoint() == "" {
		return claims, nil
	}
	// Many providers keep the ID token small and tell the rest here.
	info, err := found.UserInfo(ctx, oauth2.StaticTokenSource(token))
	if err != nil {
		return refuse(ProviderUnavailable, err)
	}
	more := make(map[string]any)
	if err := info.Claims(&more); err != nil || info.Subject != id.Subject {
		return refuse(ProviderRefused, errors.New("the provider's answer about the person is about another one"))
	}
	for name, value := range more {
		if _, there := claims[name]; !there {
			claims[name] = value
		}
	}
	return claims, nil
}

// name is what the audit trail calls the person. Its errors are the operator's to mend.
func (p *provider) name(claims map[string]any) (string, error) {
	name, ok := find(claims, p.NameClaim).(string)
	switch {
	case !ok || name == "":
		return "", fmt.Errorf("the provider sent no claim %q: ask for its scope, or choose another one (--oidc-name-claim)", p.NameClaim)
	case len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "", fmt.Errorf("the claim %q is too long or cannot be printed", p.NameClaim)
	case p.NameClaim == "email" && claims["email_verified"] != true && claims["email_verified"] != "true":
		return "", errors.New("the provider has not verified the email address: choose another claim for names (--oidc-name-claim), or have it verified")
	}
	return name, nil
}

// find returns the claim of that name; if there is none, dots in it lead into objects.
func find(claims map[string]any, name string) any {
	if value, there := claims[name]; there {
		return value
	}
	first, rest, dotted := strings.Cut(name, ".")
	inner, ok := claims[first].(map[string]any)
	if !dotted || !ok {
		return nil
	}
	return find(inner, rest)
}

// groupsIn reads a list of groups, or a single one.
func groupsIn(claims map[string]any, name string) []string {
	var groups []string
	switch value := find(claims, name).(type) {
	case string:
		groups = []string{value}
	case []any:
		for _, one := range value[:min(len(value), maxGroups)] {
			if group, ok := one.(string); ok {
				groups = append(groups, group)
			}
		}
	}
	return groups
}
