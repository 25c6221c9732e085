// Package web is what a browser sees of the dashboard: pages that work without script, in two languages.
package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

// Directory knows which domains and mailboxes there are.
type Directory interface {
	// Domains returns the domains that somebody may see, ordered by name.
	Domains(ctx context.Context, may func(domain string) bool) ([]directory.Domain, error)
	// Mailboxes returns a page of a domain's mailboxes, ordered by name; of a domain that is not there it is empty.
	Mailboxes(ctx context.Context, domain string, q directory.Query) (directory.Page, error)
	// Has reports whether there is such a mailbox.
	Has(ctx context.Context, m allow.Mailbox) (bool, error)
}

// Config is what [New] builds on.
type Config struct {
	Login     *login.Login
	Directory Directory
	Policy    policyv1.PolicyServiceClient
	Log       *slog.Logger
	Metrics   prometheus.Registerer
	Secure    bool // browsers come over HTTPS
}

// site is the dashboard.
type site struct {
	cfg    Config
	policy policy
	views  map[string]*view // by language
	assets assets
}

// New returns the handler of all pages.
func New(cfg Config) (http.Handler, error) {
	files, err := loadAssets()
	if err != nil {
		return nil, err
	}
	s := &site{cfg: cfg, policy: policy{cfg.Policy}, assets: files}
	if s.views, err = newViews(files); err != nil {
		return nil, err
	}
	measure, err := newMeter(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	pages := http.NewServeMux()
	s.routes(func(pattern string, handler http.Handler) { pages.Handle(pattern, measure(pattern, handler)) })
	cross := http.NewCrossOriginProtection()
	cross.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.fail(w, r, errCross) }))
	mux := http.NewServeMux()
	mux.Handle("GET "+assetPrefix, measure("GET "+assetPrefix, files))
	mux.Handle("/", cfg.Login.Sessions(s.bounded(pages)))
	return headers(cfg.Secure, compressed(s.choosing(cross.Handler(mux)))), nil
}

// routes is every page there is. What belongs to a domain goes through [site.in], which decides who may.
func (s *site) routes(handle func(pattern string, handler http.Handler)) {
	open := func(f func(http.ResponseWriter, *http.Request) error) http.Handler { return s.page(f) }
	handle("GET /{$}", http.RedirectHandler("/domains", http.StatusSeeOther))
	handle("GET /login", open(s.showLogin))
	handle("POST /login", open(s.logIn))
	handle("GET /login/oidc", open(s.startOIDC))
	handle("GET "+login.CallbackPath, open(s.finishOIDC))
	handle("POST /logout", open(s.logOut))
	handle("POST /language", open(s.setLanguage))
	handle("GET /domains", s.loggedIn(open(s.showDomains)))
	handle("GET /domains/{domain}", s.in(login.View, s.showDomain))
	handle("GET /domains/{domain}/mailboxes/{mailbox}", s.in(login.View, s.showMailbox))
	handle("POST /domains/{domain}/mailboxes/{mailbox}", s.in(login.Change, s.changeMailbox))
	handle("POST /domains/{domain}/mailboxes/{mailbox}/check", s.in(login.View, s.checkAddress))
	handle("GET /domains/{domain}/mailboxes/{mailbox}/history", s.in(login.View, s.showHistory))
	handle("GET /domains/{domain}/mailboxes/{mailbox}/progress", s.in(login.View, s.showProgress))
	handle("/", s.loggedIn(open(func(http.ResponseWriter, *http.Request) error { return errNotFound })))
}

// page turns the error of a handler into a page.
func (s *site) page(f func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := f(w, r); err != nil {
			s.fail(w, r, err)
		}
	})
}

// loggedIn lets only those through who are logged in. Others are shown the login, and come back afterwards.
func (s *site) loggedIn(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := login.UserOf(r.Context()); !ok {
			s.askLogin(w, r)
			return
		}
		// One deadline for all that a page asks for: a person waits.
		ctx, cancel := context.WithTimeout(r.Context(), allWithin)
		defer cancel()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// place is where in the dashboard a request is: everything below a domain has one.
type place struct {
	user    login.User
	domain  string        // canonical
	mailbox allow.Mailbox // the zero value on the page of the domain
}

func (p place) changes() bool { return p.user.May(login.Change, p.domain) }

// in is the one place that decides about access to a domain and its mailboxes. What is not a person's to see looks like what
// does not exist.
func (s *site) in(action login.Action, handler func(http.ResponseWriter, *http.Request, place) error) http.Handler {
	return s.loggedIn(s.page(func(w http.ResponseWriter, r *http.Request) error {
		user, _ := login.UserOf(r.Context())
		domain, err := allow.ParseDomain(r.PathValue("domain"))
		if err != nil || !user.May(login.View, domain) {
			return errNotFound
		}
		at := place{user: user, domain: domain}
		if name := r.PathValue("mailbox"); name != "" {
			if at.mailbox, err = allow.ParseMailbox(name); err != nil || at.mailbox.Domain() != domain {
				return errNotFound
			}
		}
		if !user.May(action, domain) {
			return errForbidden
		}
		return handler(w, r, at)
	}))
}

var (
	errNotFound       = errors.New("there is no such page")
	errForbidden      = errors.New("not permitted")
	errCrowded        = errors.New("too many large forms at once")
	errCross          = errors.New("a form of another site")
	errUnknownService = errors.New("the form asks about no known service")
)

// formError is a form that cannot be read.
type formError struct{ error }

func (e *formError) Unwrap() error { return e.error }

// parseForm reads the form within the bound of the body. What is not UTF-8 in it is replaced: nothing behind takes it.
func parseForm(r *http.Request) error {
	if err := r.ParseForm(); err != nil {
		return &formError{fmt.Errorf("reading the form: %w", err)}
	}
	for _, values := range r.PostForm {
		for i := range values {
			values[i] = strings.ToValidUTF8(values[i], "\uFFFD")
		}
	}
	return nil
}
