// Package login knows who uses the dashboard and what they may do.
//
// A session is kept in the memory of its replica; the browser has a random token of it. So a log-out ends it for whoever has
// the token, a user who is removed or gets another password is out at once, and there is no key whose loss would let somebody
// make sessions. The price: a restart logs everybody out, and with several replicas in front of browsers the proxy must send a
// browser to the same replica (cookie affinity). What is typed in a form survives a new login, so that neither costs more than that.
// A cookie that is the session would save the affinity, and could not be ended by a log-out.
package login

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/prometheus/client_golang/prometheus"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/hops"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

// Config says how people log in. At least one of UsersFile and OIDC is needed.
type Config struct {
	Files          *livefile.Watcher
	UsersFile      string        // local users; "" for none
	OIDC           *Client       // nil for none
	Idle, Lifetime time.Duration // after which a session ends: without use, and in any case
	Secure         bool          // cookies go over https only
	TrustedProxies hops.Trusted  // whose X-Forwarded-For is believed
	Log            *slog.Logger
	Metrics        prometheus.Registerer
}

// Login is safe for concurrent use.
type Login struct {
	cfg      Config
	users    *livefile.File[localUsers] // nil without
	provider *provider                  // nil without
	sessions *scs.SessionManager
	limits   *limiter
	hashing  chan struct{} // a place for each hash that is computed
	logins   *prometheus.CounterVec
	untold   sync.Once // that a peer which is not trusted sends X-Forwarded-For
}

// New reads the files.
func New(cfg Config) (*Login, error) {
	evicted := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "allowednets_dashboard_sessions_evicted_total", Help: "Sessions that were ended because there were too many.",
	})
	forgotten := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "allowednets_dashboard_login_limits_dropped_total", Help: "Failed or earlier logins that were forgotten because there were too many.",
	})
	kept := newStore(evicted)
	l := &Login{
		cfg: cfg, limits: newLimiter(forgotten), hashing: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))),
		logins: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_dashboard_logins_total", Help: "Attempts to log in.",
		}, []string{"way", "result"}),
	}
	for _, c := range []prometheus.Collector{evicted, forgotten, l.logins, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "allowednets_dashboard_sessions", Help: "Sessions that are open.",
	}, kept.open)} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, err
		}
	}
	var err error
	if cfg.UsersFile != "" {
		if l.users, err = livefile.Open(cfg.Files, "users", cfg.UsersFile, parseUsers); err != nil {
			return nil, err
		}
	}
	if cfg.OIDC != nil {
		if l.provider, err = newProvider(cfg); err != nil {
			return nil, err
		}
	}
	// Not scs.New, which starts a goroutine for a store of its own.
	l.sessions = &scs.SessionManager{
		Store: kept, Codec: scs.GobCodec{}, IdleTimeout: cfg.Idle, Lifetime: cfg.Lifetime, HashTokenInStore: true,
		Cookie: scs.SessionCookie{
			Name: cookieName("allowednets", cfg.Secure), Path: "/", Secure: cfg.Secure, HttpOnly: true, SameSite: http.SameSiteLaxMode,
		},
		ErrorFunc: func(w http.ResponseWriter, r *http.Request, err error) {
			cfg.Log.ErrorContext(r.Context(), "a session cannot be read", "error", err)
			http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
		},
	}
	return l, nil
}

// Close ends connections to the provider.
func (l *Login) Close() {
	if l.provider != nil {
		l.provider.http.CloseIdleConnections()
	}
}

// cookieName adds the prefix with which a browser takes a cookie from this host over https only, and for all of its paths.
func cookieName(name string, secure bool) string {
	if secure {
		return "__Host-" + name
	}
	return name
}

// The ways to log in, and labels of metrics.
const (
	byPassword = "password"
	byOIDC     = "oidc"
)

// The values of a session.
const (
	keyWay    = "way"
	keyName   = "name"
	keyHash   = "hash"   // of the hash of the password with which somebody logged in
	keyGroups = "groups" // that the provider named
)

type userKey struct{}

// Sessions is the middleware that everything below it needs: it finds out who is logged in, for [UserOf], and keeps the
// session's cookie.
func (l *Login) Sessions(next http.Handler) http.Handler {
	return l.sessions.LoadAndSave(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		if way := l.sessions.GetString(ctx, keyWay); way != "" {
			u, ok := l.current(ctx, way)
			if ok {
				ctx = context.WithValue(ctx, userKey{}, u)
			} else if err := l.sessions.Destroy(ctx); err != nil {
				l.cfg.Log.ErrorContext(ctx, "a session cannot be ended", "error", err)
			}
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	}))
}

// current is the user of the session with the rights of this moment; ok is false if they may not be here any more.
func (l *Login) current(ctx context.Context, way string) (u User, ok bool) {
	name := l.sessions.GetString(ctx, keyName)
	switch way {
	case byPassword:
		if l.users == nil {
			return User{}, false
		}
		local, ok := l.users.Latest().byName[name]
		if !ok || string(fingerprint(local.password)) != string(l.sessions.GetBytes(ctx, keyHash)) {
			return User{}, false
		}
		return User{Name: local.name, rights: local.rights}, true
	case byOIDC:
		if l.provider == nil {
			return User{}, false
		}
		groups, _ := l.sessions.Get(ctx, keyGroups).([]string)
		rights, ok := l.provider.rights(groups)
		return User{Name: name, rights: rights}, ok && !l.isLocal(name)
	}
	return User{}, false
}

// isLocal reports whether name is that of a local user. In the audit trail nobody else may have it.
func (l *Login) isLocal(name string) bool {
	if l.users == nil {
		return false
	}
	canonical, err := canonicalName(name)
	_, there := l.users.Latest().byName[canonical]
	return err == nil && there
}

func fingerprint(h hash) []byte {
	sum := sha256.Sum256([]byte(h.String()))
	return sum[:]
}

// UserOf returns who is logged in; ok is false if nobody is.
func UserOf(ctx context.Context) (u User, ok bool) {
	u, ok = ctx.Value(userKey{}).(User)
	return u, ok
}

// Ways are the ways of logging in that are configured.
func (l *Login) Ways() (password, oidc bool) { return l.users != nil, l.provider != nil }

// busyAfter is how long somebody waits for others' passwords to be checked.
const busyAfter = 5 * time.Second

// Password logs a local user in. Before it nothing of the response may have been written: it changes the cookie. The error
// is a *[Refusal]. It takes as long for a name that does not exist.
func (l *Login) Password(r *http.Request, name, password string) (User, error) {
	ctx, from := r.Context(), l.ClientAddr(r)
	account, err := canonicalName(name)
	if err != nil {
		account = strings.ToLower(name)
	}
	refuse := func(refusal *Refusal) (User, error) {
		return User{}, l.refused(ctx, byPassword, account, from, refusal)
	}
	if l.users == nil {
		return refuse(&Refusal{Reason: WrongCredentials, Detail: "there are no local users"})
	}
	if wait := l.limits.attempt(account, from, time.Now()); wait > 0 {
		return refuse(&Refusal{Reason: TooManyAttempts, Wait: wait})
	}
	enough := time.NewTimer(busyAfter)
	defer enough.Stop()
	select {
	case l.hashing <- struct{}{}:
	case <-enough.C:
		l.limits.untried(account, from, time.Now())
		return refuse(&Refusal{Reason: Busy, Wait: busyAfter})
	case <-ctx.Done():
		l.limits.untried(account, from, time.Now())
		return refuse(&Refusal{Reason: Busy, Wait: busyAfter, Detail: "the browser went away"})
	}
	users := l.users.Latest()
	local, there := users.byName[account]
	if !there {
		local.password = users.strongest.decoy()
	}
	matches := local.password.matches(password)
	<-l.hashing
	if !there || !matches {
		return refuse(&Refusal{Reason: WrongCredentials})
	}
	l.limits.succeeded(account, from, time.Now())
	return l.begin(ctx, User{Name: local.name, rights: local.rights}, from, byPassword, map[string]any{keyHash: fingerprint(local.password)})
}

// begin makes a new session, so that nobody else knows its token, whatever was the session before.
func (l *Login) begin(ctx context.Context, u User, from netip.Addr, way string, values map[string]any) (User, error) {
	err := l.sessions.RenewToken(ctx)
	if err == nil {
		err = l.sessions.Clear(ctx)
	}
	if err != nil {
		return User{}, l.refused(ctx, way, u.Name, from, &Refusal{Reason: Busy, Wait: busyAfter, Detail: err.Error()})
	}
	l.sessions.Put(ctx, keyWay, way)
	l.sessions.Put(ctx, keyName, u.Name)
	for key, value := range values {
		l.sessions.Put(ctx, key, value)
	}
	l.logins.WithLabelValues(way, "ok").Inc()
	l.cfg.Log.InfoContext(ctx, "logged in", "user", u.Name, "client_address", from.String(), "way", way)
	return u, nil
}

// refused counts and logs a refusal, and returns it.
func (l *Login) refused(ctx context.Context, way, account string, from netip.Addr, refusal *Refusal) error {
	l.logins.WithLabelValues(way, string(refusal.Reason)).Inc()
	l.cfg.Log.WarnContext(ctx, "not logged in", "user", cut(account), "client_address", from.String(), "way", way, "reason", refusal.Reason, "detail", refusal.Detail)
	return refusal
}

// cut bounds what a stranger can make us write.
func cut(s string) string {
	if len(s) <= maxName {
		return s
	}
	return strings.ToValidUTF8(s[:maxName], "") + "…"
}

// LogOut ends the session, for all who have its token. Before it nothing of the response may have been written. A provider's own
// session goes on.
func (l *Login) LogOut(ctx context.Context) error { return l.sessions.Destroy(ctx) }

// ClientAddr is the address of the browser, or the zero value if it is unknown.
func (l *Login) ClientAddr(r *http.Request) netip.Addr {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	if forwarded := r.Header.Get("X-Forwarded-For"); forwarded != "" && !l.cfg.TrustedProxies.Trust(peer.Addr().Unmap().WithZone("")) {
		l.untold.Do(func() {
			l.cfg.Log.WarnContext(r.Context(), "X-Forwarded-For is not believed, because its sender is not in --trusted-proxies: "+
				"if that is your proxy, everybody seems to come from its address", "peer_address", peer.Addr().String())
		})
	}
	client, err := l.cfg.TrustedProxies.Client(peer.Addr().WithZone("").String(), r.Header.Values("X-Forwarded-For"))
	if err != nil {
		return netip.Addr{}
	}
	return client
}

// ClientNet is the network of the browser's address, by which attempts and large forms are counted.
func (l *Login) ClientNet(r *http.Request) string { return keys("", l.ClientAddr(r)).address.String() }

// Actor is who does what r asks for, for the audit trail: the user's name and the browser's address.
func (l *Login) Actor(r *http.Request) *policyv1.Actor {
	u, _ := UserOf(r.Context())
	actor := &policyv1.Actor{Id: u.Name}
	if addr := l.ClientAddr(r); addr.IsValid() {
		actor.Address = addr.String()
	}
	return actor
}

// maxPath bounds what [LocalPath] returns, in octets: it goes into a cookie.
const maxPath = 2048

// LocalPath returns s if it is a path of this site, with or without a query, to go to after the login, and otherwise "/". What a browser
// would take for another site is none: it reads \ as /, skips tabs and line breaks, and takes //host for a host.
func LocalPath(s string) string {
	odd := func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }
	if len(s) > maxPath || !strings.HasPrefix(s, "/") || strings.HasPrefix(s, "//") || strings.ContainsFunc(s, odd) {
		return "/"
	}
	if u, err := url.Parse(s); err != nil || u.Scheme != "" || u.Host != "" {
		return "/"
	}
	return s
}
