// Package login knows who uses the dashboard and what they may do.
package login

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

var errSkeleton = errors.New("not built yet")

// Config says how people log in.
type Config struct {
	Files          *livefile.Watcher
	UsersFile      string         // local users; "" for none
	OIDC           *Client        // nil for none
	Idle, Lifetime time.Duration  // of a session
	Secure         bool           // cookies for https only
	TrustedProxies []netip.Prefix // whose X-Forwarded-For is believed
	Log            *slog.Logger
	Metrics        prometheus.Registerer
}

// Client is what the dashboard is to an OpenID provider.
type Client struct {
	Issuer, ID, Secret, RedirectURL string
	Scopes                          []string
	NameClaim, GroupsClaim          string
	RolesFile                       string
}

// Login is safe for concurrent use.
type Login struct{}

// New builds it.
func New(Config) (*Login, error) { return &Login{}, nil }

// Sessions is the middleware that everything below it needs: it finds out who is logged in, for [UserOf], and keeps the
// session's cookie.
func (l *Login) Sessions(next http.Handler) http.Handler { return next }

// UserOf returns who is logged in; ok is false if nobody is.
func UserOf(context.Context) (u User, ok bool) { return User{}, false }

// Ways are the ways of logging in that are configured.
func (l *Login) Ways() (password, oidc bool) { return true, false }

// Password logs a local user in. The error is a *[Refusal].
func (l *Login) Password(r *http.Request, name, password string) (User, error) {
	return User{}, errSkeleton
}

// StartOIDC sends the browser to the OpenID provider; afterwards it comes back to [CallbackPath], and then goes to next, a
// path of this site. The error is a *[Refusal]; nothing was written then.
func (l *Login) StartOIDC(w http.ResponseWriter, r *http.Request, next string) error {
	return errSkeleton
}

// CallbackPath is where [Login.FinishOIDC] must be served.
const CallbackPath = "/login/oidc/callback"

// FinishOIDC logs in who comes back from the provider, and returns where they wanted to go. The error is a *[Refusal].
func (l *Login) FinishOIDC(w http.ResponseWriter, r *http.Request) (next string, err error) {
	return "/", errSkeleton
}

// LogOut ends the session.
func (l *Login) LogOut(ctx context.Context) error { return errSkeleton }

// ClientAddr is the address of the browser.
func (l *Login) ClientAddr(r *http.Request) netip.Addr { return netip.Addr{} }

// Actor is who does what r asks for, for the audit trail: the user's name and the browser's address.
func (l *Login) Actor(r *http.Request) *policyv1.Actor { return &policyv1.Actor{} }

// LocalPath returns s if it is a path of this site to go to after the login, and otherwise "/".
func LocalPath(s string) string { return "/" }

// Refusal says why somebody was not logged in.
type Refusal struct {
	Reason Reason
	Wait   time.Duration // with [TooManyAttempts] and [Busy]: how long to wait, for Retry-After
	Detail string        // for the log; not for the person
}

func (e *Refusal) Error() string { return string(e.Reason) }

// Reason is one of few.
type Reason string

// The reasons, each with what the page should say.
const (
	WrongCredentials    Reason = "wrong_credentials"    // user name or password is wrong
	TooManyAttempts     Reason = "too_many_attempts"    // wait, see Refusal.Wait
	Busy                Reason = "busy"                 // too many logins at this moment
	NoAccess            Reason = "no_access"            // the provider knows them, but they have no rights here: ask the operator
	ProviderUnavailable Reason = "provider_unavailable" // the OpenID provider does not answer
	ProviderRefused     Reason = "provider_refused"     // the provider did not log them in, or they cancelled
	LoginExpired        Reason = "login_expired"        // took too long, or did not begin in this browser: start again
)
