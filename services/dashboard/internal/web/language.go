package web

import (
	"context"
	"fmt"
	"html"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/text/language"

	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

const languageCookie = "language"

// languages returns the tags of the languages there are. The first is for those who ask for none of them.
func languages() []string { return []string{"en", "de"} }

// words are the texts in one language.
type words struct {
	tag   string
	texts map[string]message
}

// text returns the text of key with its values. A key without a text is a mistake that TestMessages finds.
func (w words) text(key string, values ...any) string {
	return w.format(w.pick(key), values)
}

// plural is text for a text about a number: the last of values, or n alone. Numbers are written as in the language.
func (w words) plural(key string, n int, values ...any) string {
	one, many, ok := strings.Cut(w.pick(key), "|")
	if !ok || n == 1 {
		many = one
	}
	return w.format(many, append(values, n))
}

func (w words) pick(key string) string {
	m, ok := w.texts[key]
	switch {
	case !ok:
		return key
	case w.tag == "de":
		return m.de
	}
	return m.en
}

// format writes whole numbers with the language's separators, so %d takes what number made of them.
func (w words) format(text string, values []any) string {
	if len(values) == 0 {
		return strings.ReplaceAll(text, "%%", "%")
	}
	shown := make([]any, len(values))
	for i, v := range values {
		if n, ok := v.(int); ok {
			v = w.number(n)
		}
		shown[i] = v
	}
	return fmt.Sprintf(strings.ReplaceAll(text, "%d", "%s"), shown...)
}

func (w words) number(n int) string {
	digits, separator := strconv.Itoa(n), ","
	if w.tag == "de" {
		separator = "."
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + separator + digits[i:]
	}
	return digits
}

// clock shows a time to the minute. The script turns it into the reader's zone.
func (w words) clock(t time.Time) string {
	layout := "2 Jan 2006, 15:04"
	if w.tag == "de" {
		layout = "02.01.2006, 15:04"
	}
	return w.text("time.utc", t.UTC().Format(layout))
}

// timed is text about a time: the last of the values in it, which are strings. The script shows it in the reader's zone.
func (w words) timed(key string, at time.Time, values ...any) template.HTML {
	const mark = "\x1a" // what no value has
	text := html.EscapeString(w.text(key, append(values, mark)...))
	element := fmt.Sprintf(`<time datetime="%s">%s</time>`, at.UTC().Format(time.RFC3339), html.EscapeString(w.clock(at)))
	return template.HTML(strings.Replace(text, mark, element, 1)) //nolint:gosec // escaped here
}

type languageKey struct{}

// choosing finds out which language the reader wants: the one they chose, else what their browser asks for.
func (s *site) choosing(next http.Handler) http.Handler {
	tags := make([]language.Tag, len(languages()))
	for i, tag := range languages() {
		tags[i] = language.Make(tag)
	}
	matcher := language.NewMatcher(tags)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked := r.Header.Get("Accept-Language")
		if cookie, err := r.Cookie(languageCookie); err == nil {
			asked = cookie.Value
		}
		_, i := language.MatchStrings(matcher, asked)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), languageKey{}, languages()[i])))
	})
}

// view returns the templates and texts for the reader of r.
func (s *site) view(r *http.Request) *view {
	tag, _ := r.Context().Value(languageKey{}).(string)
	if v := s.views[tag]; v != nil {
		return v
	}
	return s.views[languages()[0]]
}

// setLanguage remembers a choice for a year.
func (s *site) setLanguage(w http.ResponseWriter, r *http.Request) error {
	if err := parseForm(r); err != nil {
		return err
	}
	tag := r.PostForm.Get("language")
	if s.views[tag] == nil {
		return errNotFound
	}
	http.SetCookie(w, &http.Cookie{ //nolint:gosec // Secure as browsers come
		Name: languageCookie, Value: tag, Path: "/", MaxAge: 365 * 24 * 60 * 60, Secure: s.cfg.Secure, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
	redirect(w, r, http.StatusSeeOther, login.LocalPath(r.PostForm.Get("next")))
	return nil
}
