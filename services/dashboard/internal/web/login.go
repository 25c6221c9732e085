package web

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

// loginPage is what the login shows.
type loginPage struct {
	Password, OIDC bool
	Name, Next     string
	Problem        string
	Mailbox, Text  string // what somebody typed before the session ended
	Kept           []field
}

// field is a hidden one.
type field struct{ Name, Value string }

// maxShown is how many characters of a text are shown at the login; the hidden field has all of them.
const maxShown = 2000

// mailboxIn returns the mailbox that a path of [mailboxURL] is about.
func mailboxIn(path string) string {
	u, err := url.Parse(path)
	if err != nil {
		return ""
	}
	_, name, _ := strings.Cut(u.Path, "/mailboxes/")
	m, err := allow.ParseMailbox(name)
	if err != nil {
		return ""
	}
	return m.String()
}

// kept returns the fields of a mailbox's form that survive a login, none if there is nothing to lose.
func kept(form url.Values) []field {
	if !form.Has("text") {
		return nil
	}
	fields := []field{{"action", "resume"}}
	for _, name := range []string{"text", "etag", "request_id"} {
		fields = append(fields, field{name, form.Get(name)})
	}
	return fields
}

// askLogin shows the login to somebody who wants something else. What they typed stays on the page, in hidden fields.
func (s *site) askLogin(w http.ResponseWriter, r *http.Request) {
	switch {
	case partly(r):
		w.WriteHeader(http.StatusUnauthorized)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		target := "/login"
		if r.URL.RequestURI() != "/domains" {
			target += "?" + url.Values{"next": {r.URL.RequestURI()}}.Encode()
		}
		redirect(w, r, http.StatusSeeOther, target)
	default:
		if err := parseForm(r); err != nil {
			s.fail(w, r, err)
			return
		}
		fields := kept(r.PostForm)
		if fields == nil {
			redirect(w, r, http.StatusSeeOther, "/login")
			return
		}
		next := *r.URL
		next.Path, next.RawPath = strings.TrimSuffix(next.Path, "/check"), strings.TrimSuffix(next.RawPath, "/check")
		p := loginPage{Next: next.RequestURI(), Mailbox: r.PathValue("mailbox"), Text: clip(r.PostForm.Get("text"), maxShown), Kept: fields}
		if err := s.renderLogin(w, r, http.StatusUnauthorized, p); err != nil {
			s.fail(w, r, err)
		}
	}
}

func (s *site) renderLogin(w http.ResponseWriter, r *http.Request, status int, p loginPage) error {
	p.Password, p.OIDC = s.cfg.Login.Ways()
	title := "login.title"
	if p.Kept != nil {
		title = "expired.title"
	}
	return s.render(w, r, status, "login", page{Title: s.view(r).text(title), View: p})
}

func (s *site) showLogin(w http.ResponseWriter, r *http.Request) error {
	next := login.LocalPath(r.URL.Query().Get("next"))
	if _, ok := login.UserOf(r.Context()); ok {
		redirect(w, r, http.StatusSeeOther, next)
		return nil
	}
	return s.renderLogin(w, r, http.StatusOK, loginPage{Next: next})
}

func (s *site) logIn(w http.ResponseWriter, r *http.Request) error {
	if err := parseForm(r); err != nil {
		return err
	}
	form := r.PostForm
	next := login.LocalPath(form.Get("next"))
	if _, err := s.cfg.Login.Password(r, trim(form.Get("user")), form.Get("password")); err != nil {
		p := loginPage{Next: next, Name: clip(form.Get("user"), 256), Mailbox: mailboxIn(next), Text: clip(form.Get("text"), maxShown), Kept: kept(form)}
		return s.refused(w, r, err, p)
	}
	if form.Has("text") && strings.HasPrefix(next, "/domains/") {
		// The browser sends the form once more, to the page of the mailbox, which goes on with what was typed.
		redirect(w, r, http.StatusTemporaryRedirect, next)
		return nil
	}
	redirect(w, r, http.StatusSeeOther, next)
	return nil
}

func (s *site) startOIDC(w http.ResponseWriter, r *http.Request) error {
	if _, oidc := s.cfg.Login.Ways(); !oidc {
		return errNotFound
	}
	next := login.LocalPath(r.URL.Query().Get("next"))
	if err := s.cfg.Login.StartOIDC(w, r, next); err != nil {
		return s.refused(w, r, err, loginPage{Next: next})
	}
	return nil
}

func (s *site) finishOIDC(w http.ResponseWriter, r *http.Request) error {
	if _, oidc := s.cfg.Login.Ways(); !oidc {
		return errNotFound
	}
	next, err := s.cfg.Login.FinishOIDC(w, r)
	if err != nil {
		return s.refused(w, r, err, loginPage{Next: login.LocalPath(next)})
	}
	redirect(w, r, http.StatusSeeOther, next)
	return nil
}

// refused shows the login again and says why.
func (s *site) refused(w http.ResponseWriter, r *http.Request, err error, p loginPage) error {
	v := s.view(r)
	refusal, ok := errors.AsType[*login.Refusal](err)
	if !ok {
		return fmt.Errorf("logging in: %w", err)
	}
	status := http.StatusUnauthorized
	switch refusal.Reason {
	case login.WrongCredentials:
		p.Problem = v.text("login.wrong_credentials")
	case login.TooManyAttempts:
		status, p.Problem = http.StatusTooManyRequests, v.text("login.too_many_attempts", v.wait(refusal.Wait))
	case login.Busy:
		status, p.Problem = http.StatusServiceUnavailable, v.text("login.busy", v.wait(refusal.Wait))
	case login.ProviderUnavailable:
		status, p.Problem = http.StatusBadGateway, v.text("login.provider_unavailable")
	case login.ProviderRefused:
		p.Problem = v.text("login.provider_refused")
	case login.LoginExpired:
		p.Problem = v.text("login.login_expired")
	case login.NoAccess:
		data := problemPage{Title: v.text("noaccess.title"), Text: v.text("login.no_access"), Again: "/login"}
		return s.render(w, r, http.StatusForbidden, "problem", page{Title: data.Title, View: data})
	default:
		p.Problem = v.text("login.failed")
	}
	if refusal.Wait > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(refusal.Wait.Seconds()))))
	}
	return s.renderLogin(w, r, status, p)
}

// wait says how long, rounded up.
func (w words) wait(d time.Duration) string {
	if d > 90*time.Second {
		return w.plural("minutes", int(math.Ceil(d.Minutes())))
	}
	return w.plural("seconds", max(1, int(math.Ceil(d.Seconds()))))
}

func (s *site) logOut(w http.ResponseWriter, r *http.Request) error {
	if err := s.cfg.Login.LogOut(r.Context()); err != nil {
		return fmt.Errorf("logging out: %w", err)
	}
	redirect(w, r, http.StatusSeeOther, "/login")
	return nil
}
