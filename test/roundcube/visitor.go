package roundcube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// Visitor is a browser that runs no scripts: it has cookies and a language, and fills in forms.
type Visitor struct {
	// Header is sent with every request.
	Header http.Header

	client *http.Client
	token  string // of the session, against forged requests
}

// NewVisitor returns a visitor without cookies.
func NewVisitor() *Visitor {
	jar, _ := cookiejar.New(nil) // fails never
	return &Visitor{Header: make(http.Header), client: &http.Client{
		Jar: jar, Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Page is an answer.
type Page struct {
	Status int
	Body   string
	// Task is Roundcube's word for where the visitor is: "login", "mail" and so on; empty if there is no page.
	Task string
	// Messages is what a person reads in the corner of the page.
	Messages []string
	// Took is how long the answer took.
	Took time.Duration
}

// In reports whether the visitor sees something of a mailbox.
func (p Page) In() bool {
	return p.Status == http.StatusOK && p.Task != "login" && len(p.Messages) == 0
}

// String is what matters of a page in the message of a test.
func (p Page) String() string {
	return fmt.Sprintf("%d, task %q, messages %q", p.Status, p.Task, p.Messages)
}

// Login fills in the form of the page at site and follows where it leads.
func (v *Visitor) Login(ctx context.Context, site, user, password string) (Page, error) {
	if _, err := v.Get(ctx, site+"?_task=login"); err != nil {
		return Page{}, err
	}
	form := url.Values{"_task": {"login"}, "_action": {"login"}, "_timezone": {"UTC"}, "_url": {""}, "_token": {v.token}, "_user": {user}, "_pass": {password}}
	begun := time.Now()
	page, err := v.Post(ctx, site+"?_task=login", form)
	if err != nil || page.Status != http.StatusFound {
		return page, err
	}
	page, err = v.Get(ctx, site+"?_task=mail")
	page.Took = time.Since(begun)
	return page, err
}

// Get gets a page.
func (v *Visitor) Get(ctx context.Context, target string) (Page, error) {
	return v.do(ctx, http.MethodGet, target, nil)
}

// Post posts a form, with the token that the session's pages contain.
func (v *Visitor) Post(ctx context.Context, target string, form url.Values) (Page, error) {
	if form == nil {
		form = url.Values{"_token": {v.token}}
	}
	return v.do(ctx, http.MethodPost, target, form)
}

var (
	environment = regexp.MustCompile(`rcmail\.set_env\((\{.*\})\);`)
	errorText   = regexp.MustCompile(`<div class="error-text">([^<]*)</div>`)
	inPage      = regexp.MustCompile(`rcmail\.display_message\(("(?:[^"\\]|\\.)*")`)
	inScript    = regexp.MustCompile(`this\.display_message\(("(?:[^"\\]|\\.)*"),"(?:error|warn)`)
)

func (v *Visitor) do(ctx context.Context, method, target string, form url.Values) (Page, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, strings.NewReader(form.Encode()))
	if err != nil {
		return Page{}, err
	}
	req.Header = v.Header.Clone()
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if v.token != "" {
		req.Header.Set("X-Roundcube-Request", v.token) // as Roundcube's scripts do
	}
	begun := time.Now()
	resp, err := v.client.Do(req)
	if err != nil {
		return Page{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return Page{}, err
	}
	page := Page{Status: resp.StatusCode, Body: string(body), Took: time.Since(begun)}
	return page, v.parse(&page)
}

// parse reads what Roundcube's scripts would do: of a page, or of an answer to a script.
func (v *Visitor) parse(page *Page) error {
	scripts, expression := page.Body, inPage
	var answer struct{ Exec string }
	if strings.HasPrefix(page.Body, "{") {
		if err := json.Unmarshal([]byte(page.Body), &answer); err != nil {
			return err
		}
		scripts, expression = answer.Exec, inScript
	}
	var errs []error
	for _, match := range expression.FindAllStringSubmatch(scripts, -1) {
		var message string
		errs = append(errs, json.Unmarshal([]byte(match[1]), &message))
		page.Messages = append(page.Messages, message)
	}
	if match := errorText.FindStringSubmatch(page.Body); match != nil {
		page.Messages = append(page.Messages, match[1])
	}
	if match := environment.FindStringSubmatch(scripts); match != nil {
		var env struct {
			Task  string `json:"task"`
			Token string `json:"request_token"`
		}
		errs = append(errs, json.Unmarshal([]byte(match[1]), &env))
		page.Task = env.Task
		if env.Token != "" {
			v.token = env.Token
		}
	}
	return errors.Join(errs...)
}
