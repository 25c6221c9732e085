package web

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"strings"
	"time"

	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

//go:embed templates
var templates embed.FS

// view is the dashboard in one language.
type view struct {
	words
	pages map[string]*template.Template
}

// page is what the frame around every page shows.
type page struct {
	Title string
	User  string // empty if nobody is logged in
	Here  string // path to come back to
	Typed bool   // it holds what somebody typed, which another language would lose
	Wide  bool
	View  any
}

func newViews(files assets) (map[string]*view, error) {
	texts := messages()
	views := make(map[string]*view)
	for _, tag := range languages() {
		w := words{tag: tag, texts: texts}
		v := &view{words: w, pages: make(map[string]*template.Template)}
		functions := template.FuncMap{
			"t": w.text, "tn": w.plural, "number": w.number, "clock": w.clock, "timed": w.timed, "nets": netView, "mailbox": breakable,
			"lang": func() string { return tag }, "languages": languages,
			"languageName": languageName, "languageCode": languageCode,
			"iso": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
			"asset": func(name string) (string, error) {
				if files.names[name] == "" {
					return "", fmt.Errorf("there is no static file %s", name)
				}
				return files.names[name], nil
			},
		}
		for _, name := range []string{"login", "problem", "domains", "domain"} {
			t, err := template.New("").Funcs(functions).ParseFS(templates, "templates/layout.html", "templates/panel.html", "templates/"+name+".html")
			if err != nil {
				return nil, fmt.Errorf("reading the templates: %w", err)
			}
			v.pages[name] = t
		}
		views[tag] = v
	}
	return views, nil
}

// breakable lets a mailbox break in front of its @.
func breakable(mailbox string) template.HTML {
	local, domain, _ := strings.Cut(mailbox, "@")
	return template.HTML(template.HTMLEscapeString(local) + "<wbr>@" + template.HTMLEscapeString(domain)) //nolint:gosec // escaped here
}

// languageName and languageCode name a language in itself.
func languageName(tag string) string {
	if tag == "de" {
		return "Deutsch"
	}
	return "English"
}

func languageCode(tag string) string {
	if tag == "de" {
		return "DE"
	}
	return "EN"
}

// render writes a page, whole or not at all.
func (s *site) render(w http.ResponseWriter, r *http.Request, status int, name string, p page) error {
	if user, ok := login.UserOf(r.Context()); ok {
		p.User = user.Name
	}
	p.Here, p.Typed = "/domains", r.PostForm.Has("text")
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		p.Here = r.URL.RequestURI()
	}
	return s.write(w, r, status, name, "layout", p)
}

// part writes only a part of a page, for the script.
func (s *site) part(w http.ResponseWriter, r *http.Request, part string, data any) error {
	return s.write(w, r, http.StatusOK, "domain", part, data)
}

func (s *site) write(w http.ResponseWriter, r *http.Request, status int, name, part string, data any) error {
	v := s.view(r)
	var b bytes.Buffer
	if err := v.pages[name].ExecuteTemplate(&b, part, data); err != nil {
		return fmt.Errorf("writing the page %s: %w", name, err)
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Language", v.tag)
	h.Add("Vary", "Accept-Language, Cookie")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // the browser went away
	return nil
}

// partly reports whether the script asks, which takes only parts of a page.
func partly(r *http.Request) bool { return r.Header.Get("Panel-Only") != "" }
