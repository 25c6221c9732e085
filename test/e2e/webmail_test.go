package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/roundcube"
	"github.com/allowednets/allowednets/test/stack"
)

// needRoundcube is the one place where a test of webmail is skipped.
func needRoundcube(t *testing.T) {
	t.Helper()
	if err := errors.Join(roundcube.Missing(), browser.Missing()); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED against a real Roundcube: %v", err)
	}
	needDovecot(t)
}

// Sites of Roundcube, all on the same Dovecot.
const (
	site      = "main"      // with the plugin, over HTTP with a token
	bySocket  = "socket"    // over the sidecar's unix socket
	noToken   = "no-token"  // lacks the token
	noPlugin  = "no-plugin" // as it was before
	untrusted = "untrusted" // its Dovecot believes no webmail server
	eager     = "eager"     // asks on every request
	onLiar    = "liar"      // asks a server that is no sidecar
	eagerLiar = "eager-liar"
	whitelist = "whitelist" // leaves the browser's address to Roundcube
	bareNames = "domain"    // completes names
)

const secret = "The eagle lands at noon."

// office is a second network of carol's, who is restricted to inside and to this one.
const (
	carol  = "carol@example.org"
	office = "203.0.113.20"
)

// webmail is a world with a webmail server that has a sidecar of its own, as a pod does.
type webmailWorld struct {
	*world

	own     *stack.Sidecar
	server  *roundcube.Server
	browser *browser.Browser
	liar    *liar
}

// liar is a server in the sidecar's place.
type liar struct {
	address string
	answer  atomic.Pointer[http.HandlerFunc]
	asked   atomic.Int64
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.asked.Add(1)
	(*l.answer.Load())(w, r)
}

// says makes it answer like this.
func (l *liar) says(status int, contentType, body string) {
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	l.answer.Store(&h)
}

func startLiar(t *testing.T) *liar {
	t.Helper()
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &liar{address: lis.Addr().String()}
	l.says(http.StatusNotFound, "text/plain", "not found")
	server := &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(lis) }()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return l
}

func newWebmailWorld(t *testing.T) *webmailWorld {
	t.Helper()
	needRoundcube(t)
	w := &webmailWorld{world: newWorld(t, settings{noDovecot: true}), liar: startLiar(t)}
	ctx := within(t, startWithin)
	users := append(people(), dovecot.User{Name: carol, Password: dovecot.Password})
	w.dovecot = startDovecot(t, w.Stack, "dovecot", users, dovecot.Config{Door: "http://" + w.sidecar.HTTP + "/dovecot"})
	distrusting := startDovecot(t, w.Stack, "dovecot-distrusting", users, dovecot.Config{
		Door: "http://" + w.sidecar.HTTP + "/dovecot", After: "login_trusted_networks =",
	})
	const token = "a-token-of-the-webmail-pod"
	file := w.Path("token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	w.own, err = w.StartSidecar(stack.SidecarConfig{
		Name: "webmail", Policy: w.policy.Address, AdditionalArgs: []string{"--http-token-file", file, "--default-domain", "example.org"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.own.AwaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	// PHP runs as another user; its group would own the socket.
	if err := errors.Join(os.Chmod(filepath.Dir(w.own.Socket), 0o711), os.Chmod(w.own.Socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	http, withToken, always := "http://"+w.own.HTTP, "$config['allowednets_token'] = '"+token+"';\n", "$config['allowednets_cache_seconds'] = 0;\n"
	w.server, err = roundcube.Start(ctx, w.Stack, "roundcube",
		roundcube.Site{Name: site, IMAP: w.dovecot.IMAP, Sidecar: http, Settings: withToken},
		roundcube.Site{Name: bySocket, IMAP: w.dovecot.IMAP, Sidecar: "unix:" + w.own.Socket},
		roundcube.Site{Name: noToken, IMAP: w.dovecot.IMAP, Sidecar: http},
		roundcube.Site{Name: noPlugin, IMAP: w.dovecot.IMAP},
		roundcube.Site{Name: untrusted, IMAP: distrusting.IMAP, Sidecar: http, Settings: withToken},
		roundcube.Site{Name: eager, IMAP: w.dovecot.IMAP, Sidecar: http, Settings: withToken + always},
		roundcube.Site{Name: onLiar, IMAP: w.dovecot.IMAP, Sidecar: "http://" + w.liar.address},
		roundcube.Site{Name: eagerLiar, IMAP: w.dovecot.IMAP, Sidecar: "http://" + w.liar.address, Settings: always},
		roundcube.Site{Name: whitelist, IMAP: w.dovecot.IMAP, Sidecar: http, Settings: withToken + "$config['proxy_whitelist'] = ['127.0.0.1'];"},
		roundcube.Site{Name: bareNames, IMAP: w.dovecot.IMAP, Sidecar: http, Settings: withToken + "$config['username_domain'] = 'example.org';"},
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.server.Remove(); err != nil {
			t.Error(err)
		}
	})
	if w.browser, err = browser.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.browser.Close(); err != nil {
			t.Error(err)
		}
	})
	message := "From: Dora <dora@example.net>\nTo: " + alice + "\nSubject: Lunch\nDate: Mon, 02 Jan 2006 15:04:05 +0000\n" +
		"MIME-Version: 1.0\nContent-Type: text/plain\n\n" + secret + "\n"
	if err := errors.Join(w.dovecot.Deliver(alice, message), w.dovecot.Deliver(carol, message)); err != nil {
		t.Fatal(err)
	}
	w.restrict(t, alice, aliceNets)
	w.restrict(t, carol, inside+", "+office)
	return w
}

// restrict saves a list and waits until both sidecars enforce it.
func (w *webmailWorld) restrict(t *testing.T, mailbox, nets string) {
	t.Helper()
	token, err := w.save(t.Context(), mailbox, nets)
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 10*time.Second)
	if err := errors.Join(awaitRevision(ctx, w.checks, token), awaitRevision(ctx, checkClient(t, w.own), token)); err != nil {
		t.Fatal(err)
	}
}

// at is the URL of a site for a browser at an address.
func (w *webmailWorld) at(t *testing.T, site, address string) string {
	t.Helper()
	url, err := w.server.From(t.Context(), site, netip.MustParseAddr(address))
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// log logs a visitor in and returns the page that it gets to see.
func logIn(t *testing.T, v *roundcube.Visitor, url, user, password string) roundcube.Page {
	t.Helper()
	page, err := v.Login(t.Context(), url, user, password)
	if err != nil {
		t.Fatal(err)
	}
	return page
}

func visit(t *testing.T, v *roundcube.Visitor, url string) roundcube.Page {
	t.Helper()
	page, err := v.Get(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return page
}

// wantRefused holds a page of the login form against the text it must show, and nothing else.
func wantRefused(t *testing.T, page roundcube.Page, text string) {
	t.Helper()
	if page.Task != "login" || !slices.Equal(page.Messages, []string{text}) || strings.Contains(page.Body, secret) {
		t.Errorf("%s; want the login page with %q", page, text)
	}
}

// window is a window of the browser, with cookies of its own.
type window struct {
	t    *testing.T
	page context.Context //nolint:containedctx // chromedp keeps a page in a context
}

func (w *webmailWorld) window(t *testing.T, language string) window {
	t.Helper()
	page, closePage, err := w.browser.Page(browser.Person{Language: language, Width: 900, Height: 600})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(closePage)
	return window{t, page}
}

func (w window) open(url string) {
	w.t.Helper()
	if err := chromedp.Do(w.page, chromedp.Navigate(url)); err != nil {
		w.t.Fatal(err)
	}
}

// logIn fills in the form as a person does.
func (w window) logIn(url, user, password string) {
	w.t.Helper()
	w.open(url)
	err := chromedp.Do(w.page,
		chromedp.SendKeys(chromedp.CSS("#rcmloginuser"), user),
		chromedp.SendKeys(chromedp.CSS("#rcmloginpwd"), password),
		chromedp.Click(chromedp.CSS("#rcmloginsubmit")),
	)
	if err != nil {
		w.t.Fatal(err)
	}
}

// shows waits until a text can be read where Roundcube is at a task.
func (w window) shows(task, text string) {
	w.t.Helper()
	err := stack.Await(within(w.t, 15*time.Second), func(context.Context) error {
		shown, err := chromedp.Run(w.page, chromedp.Evaluate[string](`(window.rcmail && rcmail.env.task || "") + "\n" + document.body.innerText`))
		if err != nil {
			return err // the page may be changing
		}
		at, body, _ := strings.Cut(shown, "\n")
		if at != task || !strings.Contains(body, text) {
			return fmt.Errorf("task %q shows %q", at, body)
		}
		return nil
	})
	if err != nil {
		w.t.Errorf("waiting for %q at %q: %v", text, task, err)
	}
}

func (w window) does(script string) {
	w.t.Helper()
	if err := chromedp.Do(w.page, chromedp.Evaluate[chromedp.Void](script)); err != nil {
		w.t.Fatal(err)
	}
}

func (w window) screenshot(name string) {
	w.t.Helper()
	if err := browser.Screenshot(w.page, name); err != nil {
		w.t.Error(err)
	}
}
