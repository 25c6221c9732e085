package web

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/net/html"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const password = "correct horse"

// passwordHash is made once: it is meant to be slow.
var passwordHash = sync.OnceValue(func() string { return must(login.HashPassword(password)) })

// The people of the tests. Each has the rights that the users file below gives.
const (
	owner    = "anna"  // administrator of example.org and empty.example
	auditor  = "otto"  // auditor of example.org
	stranger = "eve"   // administrator of example.net
	operator = "root"  // administrator of everything
	newcomer = "nadia" // auditor of a domain that is not there
	nobody   = ""      // not logged in
)

const sampleDirectory = `domains:
  example.org: [alice, bob, carol, jürgen]
  example.net: [zoe]
  empty.example: []
`

// world is a dashboard with a policy service, both real but for etcd.
type world struct {
	t        *testing.T
	policy   *fakePolicy
	lost     *lostDirectory
	registry *prometheus.Registry
	url      string
	handler  http.Handler
}

func newWorld(t *testing.T) *world { return newWorldWith(t, sampleDirectory) }

func newWorldWith(t *testing.T, mailboxes string) *world {
	t.Helper()
	w := &world{t: t, policy: newFakePolicy(), registry: prometheus.NewRegistry()}
	lis := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	policyv1.RegisterPolicyServiceServer(server, w.policy)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("passthrough:policy", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })

	hash := passwordHash()
	users := "users:\n"
	for _, rights := range []string{
		owner + "\n    administrator: [example.org, empty.example]", auditor + "\n    auditor: [example.org]",
		stranger + "\n    administrator: [example.net]", operator + "\n    administrator: [\"*\"]", newcomer + "\n    auditor: [nowhere.example]",
	} {
		users += "  - name: " + rights + "\n    password: " + hash + "\n"
	}
	log := slog.New(slog.DiscardHandler)
	files, err := livefile.NewWatcher(log, w.registry)
	if err != nil {
		t.Fatal(err)
	}
	directoryFile, err := directory.OpenFile(files, file(t, "directory.yaml", mailboxes))
	if err != nil {
		t.Fatal(err)
	}
	w.lost = &lostDirectory{Directory: directoryFile}
	logins, err := login.New(login.Config{
		Files: files, UsersFile: file(t, "users.yaml", users), Idle: time.Hour, Lifetime: time.Hour, Log: log, Metrics: w.registry,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(logins.Close)
	w.handler, err = New(Config{
		Login: logins, Directory: w.lost, Policy: policyv1.NewPolicyServiceClient(conn), Log: log, Metrics: w.registry,
	})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(w.handler)
	t.Cleanup(web.Close)
	w.url = web.URL
	return w
}

// lostDirectory is a directory that may be away.
type lostDirectory struct {
	Directory
	away  atomic.Bool
	asked atomic.Int32 // while it was away
}

func (d *lostDirectory) err() error {
	if !d.away.Load() {
		return nil
	}
	d.asked.Add(1)
	return directory.ErrUnavailable
}

func (d *lostDirectory) Domains(ctx context.Context, may func(string) bool) ([]directory.Domain, error) {
	if err := d.err(); err != nil {
		return nil, err
	}
	return d.Directory.Domains(ctx, may)
}

func (d *lostDirectory) Mailboxes(ctx context.Context, domain string, q directory.Query) (directory.Page, error) {
	if err := d.err(); err != nil {
		return directory.Page{}, err
	}
	return d.Directory.Mailboxes(ctx, domain, q)
}

func (d *lostDirectory) Has(ctx context.Context, m allow.Mailbox) (bool, error) {
	if err := d.err(); err != nil {
		return false, err
	}
	return d.Directory.Has(ctx, m)
}

func file(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// browser is one without script.
type browser struct {
	*world
	client   *http.Client
	language string
	header   http.Header // sent with every request
	seen     *shownPage
}

// browser opens one, and logs a person in.
func (w *world) browser(person string) *browser {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	transport := &http.Transport{}
	w.t.Cleanup(transport.CloseIdleConnections)
	b := &browser{world: w, client: &http.Client{Jar: jar, Transport: transport}, language: "en", header: make(http.Header)}
	if person != nobody {
		b.get("/login")
		b.submit(b.seen.form("/login"), "", url.Values{"user": {person}, "password": {password}})
		if b.seen.status != http.StatusOK || b.seen.path != "/domains" {
			w.t.Fatalf("%s was not logged in: %d at %s\n%s", person, b.seen.status, b.seen.path, b.seen.text())
		}
	}
	return b
}

func (b *browser) get(path string) *shownPage {
	b.t.Helper()
	return b.send(http.MethodGet, path, nil)
}

func (b *browser) post(path string, form url.Values) *shownPage {
	b.t.Helper()
	return b.send(http.MethodPost, path, form)
}

func (b *browser) send(method, path string, form url.Values) *shownPage {
	b.t.Helper()
	return b.sendBody(method, path, form.Encode())
}

func (b *browser) sendBody(method, path, body string) *shownPage {
	b.t.Helper()
	path, _, _ = strings.Cut(path, "#")
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.url+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header = b.header.Clone()
	req.Header.Set("Accept-Language", b.language)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	resp, err := b.client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	root, err := html.Parse(bytes.NewReader(answer))
	if err != nil {
		b.t.Fatal(err)
	}
	b.seen = &shownPage{t: b.t, status: resp.StatusCode, path: resp.Request.URL.RequestURI(), header: resp.Header, root: root}
	return b.seen
}

// submit presses a button, or a form's first one if it is empty, as a browser without script does.
func (b *browser) submit(form *html.Node, button string, typed url.Values) *shownPage {
	b.t.Helper()
	if form == nil {
		b.t.Fatalf("there is no such form on %s:\n%s", b.seen.path, b.seen.text())
	}
	values := make(url.Values)
	target := attr(form, "action")
	pressed := button == ""
	for n := range form.Descendants() {
		name, value := attr(n, "name"), attr(n, "value")
		switch {
		case n.Data == "textarea":
			value = strings.TrimPrefix(content(n), "\n")
		case n.Data == "select":
			for option := range n.Descendants() {
				if option.Data == "option" && (value == "" || has(option, "selected")) {
					value = attr(option, "value")
				}
			}
		case n.Data == "button":
			if pressed || attr(n, "value") != button {
				continue
			}
			pressed = true
			if has(n, "formaction") {
				target = attr(n, "formaction")
			}
		case n.Data != "input" || attr(n, "type") == "radio" && !has(n, "checked"):
			continue
		}
		if name != "" {
			values.Set(name, value)
		}
	}
	if !pressed {
		b.t.Fatalf("there is no button %q on %s:\n%s", button, b.seen.path, b.seen.text())
	}
	maps.Copy(values, typed)
	if attr(form, "method") != "post" {
		return b.get(target + "?" + values.Encode())
	}
	return b.post(target, values)
}

// edit presses a button of the panel with a text in the field; "=" leaves the text as it is. Validate is not a button but what
// the script asks for.
func (b *browser) edit(text, button string) *shownPage {
	b.t.Helper()
	typed := url.Values{"text": {text}}
	if text == "=" {
		delete(typed, "text")
	}
	if button == actionValidate {
		button = actionSave
		typed.Set("action", actionValidate)
	}
	return b.submit(b.seen.id("edit"), button, typed)
}

// shownPage is what a browser shows.
type shownPage struct {
	t      *testing.T
	status int
	path   string
	header http.Header
	root   *html.Node
}

func (p *shownPage) find(match func(*html.Node) bool) *html.Node {
	for n := range p.root.Descendants() {
		if n.Type == html.ElementNode && match(n) {
			return n
		}
	}
	return nil
}

func (p *shownPage) id(id string) *html.Node {
	return p.find(func(n *html.Node) bool { return attr(n, "id") == id })
}

func (p *shownPage) form(action string) *html.Node {
	return p.find(func(n *html.Node) bool { return n.Data == "form" && attr(n, "action") == action })
}

// link returns where a link with this text, or this label for those who do not see it, leads.
func (p *shownPage) link(text string) string {
	n := p.find(func(n *html.Node) bool {
		if n.Data != "a" {
			return false
		}
		label := p.id(attr(n, "aria-labelledby"))
		return strings.TrimSpace(content(n)) == text || attr(n, "aria-label") == text ||
			label != nil && strings.Join(strings.Fields(content(label)), " ") == text
	})
	if n == nil {
		return ""
	}
	return attr(n, "href")
}

// fixes returns the values of the buttons that offer something else.
func (p *shownPage) fixes() (values []string) {
	for n := range p.root.Descendants() {
		if attr(n, "class") == "fix" {
			values = append(values, attr(n, "value"))
		}
	}
	return values
}

// field returns what stands in the field.
func (p *shownPage) field() string {
	n := p.id("nets")
	if n == nil {
		p.t.Fatalf("%s has no field: %d\n%s", p.path, p.status, p.text())
	}
	return strings.TrimPrefix(content(n), "\n")
}

// mailboxes returns the rows of the table.
func (p *shownPage) mailboxes() (names []string) {
	for n := range p.root.Descendants() {
		if n.Data == "td" && attr(n, "class") == "name" {
			name, _, _ := strings.Cut(strings.TrimSpace(content(n)), " ")
			names = append(names, name)
		}
	}
	return names
}

// domains returns the names in the list of domains.
func (p *shownPage) domains() (names []string) {
	for n := range p.root.Descendants() {
		if n.Data == "span" && attr(n, "class") == "name" {
			names = append(names, strings.TrimSpace(content(n)))
		}
	}
	return names
}

// text is what a person reads, with single spaces.
func (p *shownPage) text() string {
	return strings.Join(strings.Fields(content(p.find(func(n *html.Node) bool { return n.Data == "body" }))), " ")
}

// wants fails unless the page has this status and shows all of these.
func (p *shownPage) wants(status int, texts ...string) {
	p.t.Helper()
	got := p.text()
	if p.status != status {
		p.t.Errorf("%s: status %d, want %d\n%s", p.path, p.status, status, got)
	}
	for _, text := range texts {
		if !strings.Contains(got, text) {
			p.t.Errorf("%s does not say %q:\n%s", p.path, text, got)
		}
	}
}

func (p *shownPage) lacks(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		if strings.Contains(p.text(), text) {
			p.t.Errorf("%s says %q:\n%s", p.path, text, p.text())
		}
	}
}

// focused returns the id or class of what takes the focus.
func (p *shownPage) focused() string {
	n := p.find(func(n *html.Node) bool { return has(n, "autofocus") })
	if n == nil {
		return ""
	}
	if id := attr(n, "id"); id != "" {
		return id
	}
	return attr(n, "class")
}

func attr(n *html.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

func has(n *html.Node, name string) bool {
	return slices.ContainsFunc(n.Attr, func(a html.Attribute) bool { return a.Key == name })
}

func content(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
			breaks := d.NextSibling != nil && d.NextSibling.Data == "wbr"
			if n.Data != "textarea" && n.Data != "a" && n.Data != "td" && !breaks {
				b.WriteByte(' ')
			}
		}
	}
	return b.String()
}

// panelOf is the URL of a mailbox's panel.
func panelOf(mailbox string) string {
	_, domain, _ := strings.Cut(mailbox, "@")
	return fmt.Sprintf("/domains/%s/mailboxes/%s", domain, url.PathEscape(mailbox))
}
