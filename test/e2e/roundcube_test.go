package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	"github.com/allowednets/allowednets/test/roundcube"
	"github.com/allowednets/allowednets/test/stack"
)

// nichtErlaubt is what a person outside reads in German.
func nichtErlaubt(address string) string {
	return "Der Zugriff von " + address + " auf dieses Postfach ist nicht erlaubt. Bitte wenden Sie sich an Ihren Administrator."
}

const (
	loginFailed    = "Login failed."
	unknownAddress = "Access from an unknown address is not allowed for this mailbox. Ask your administrator."
	permission     = `{"decision":{"verdict":"VERDICT_ALLOW","reason":"REASON_UNRESTRICTED","revision":"1-1"}}`
)

// TestRoundcube is webmail as people see it: Chromium on Debian's Roundcube, the real Dovecot behind it, and lists that
// change.
func TestRoundcube(t *testing.T) {
	w := newWebmailWorld(t)
	t.Run("in a browser", w.testBrowser)
	t.Run("logging in", w.testLogin)
	t.Run("the name as it was typed", w.testNames)
	t.Run("the client's address", w.testAddresses)
	t.Run("every way into a session", w.testWaysIn)
	t.Run("open sessions", w.testSessions)
	t.Run("nonsense in place of an answer", w.testNonsense)
	t.Run("without the plugin", w.testNoPlugin)
	t.Run("without the sidecar", w.testOutage) // last: it leaves the sidecar dead
}

func (w *webmailWorld) testBrowser(t *testing.T) {
	in, out := w.at(t, eager, inside), w.at(t, eager, outside)
	t.Run("mail is read from inside", func(t *testing.T) {
		b := w.window(t, "en-US")
		b.logIn(in, alice, right)
		b.shows("mail", "Lunch")
		b.open(in + "?_task=mail&_action=show&_uid=1&_mbox=INBOX")
		b.shows("mail", secret)
	})
	for _, c := range []struct{ language, text string }{
		{"en-US", notAllowed(outside)}, {"de-DE", nichtErlaubt(outside)}, {"de-CH", nichtErlaubt(outside)},
	} {
		t.Run("refused from outside, "+c.language, func(t *testing.T) {
			b := w.window(t, c.language)
			b.logIn(out, alice, right)
			b.shows("login", c.text)
			b.screenshot("roundcube-denied-" + c.language)
		})
	}
	for name, next := range map[string]func(window){
		"a page":   func(b window) { b.open(in + "?_task=settings") },
		"a script": func(b window) { b.does("rcmail.command('checkmail')") },
		"a frame": func(b window) {
			b.does("document.querySelector('#messagecontframe').src = '?_task=mail&_action=preview&_uid=1&_mbox=INBOX&_framed=1'")
		},
	} {
		t.Run("a tightened list ends the session, by "+name, func(t *testing.T) {
			b := w.window(t, "en-US")
			b.logIn(in, alice, right)
			b.shows("mail", "Lunch")
			w.restrict(t, alice, "2001:db8:a::/48")
			next(b)
			b.shows("login", notAllowed(inside))
			b.screenshot("roundcube-ended-by-" + strings.ReplaceAll(name, " ", "-"))
			w.restrict(t, alice, aliceNets)
		})
	}
	t.Run("without the sidecar", func(t *testing.T) {
		b, other := w.window(t, "en-US"), w.window(t, "de-DE")
		b.logIn(in, alice, right)
		b.shows("mail", "Lunch")
		for name, c := range map[string]struct{ away, back func(context.Context) error }{
			"dead":   {func(context.Context) error { return w.own.Kill() }, w.restartOwn},
			"frozen": {w.own.Freeze, w.own.Thaw},
		} {
			t.Run(name, func(t *testing.T) {
				if err := c.away(within(t, startWithin)); err != nil {
					t.Fatal(err)
				}
				other.logIn(in, alice, right)
				other.shows("login", "Der Zugriff auf dieses Postfach kann gerade nicht geprüft werden. Bitte versuchen Sie es in einer Minute noch einmal.")
				b.open(in + "?_task=mail&_action=show&_uid=1&_mbox=INBOX")
				b.shows("", noAnswerText)
				b.screenshot("roundcube-sidecar-" + name)
				if err := c.back(within(t, startWithin)); err != nil {
					t.Fatal(err)
				}
				b.open(in + "?_task=mail&_action=show&_uid=1&_mbox=INBOX")
				b.shows("mail", secret) // nobody had to log in again
			})
		}
	})
}

func (w *webmailWorld) testLogin(t *testing.T) {
	w.lookups(t)
	for _, url := range []string{w.at(t, site, inside), w.at(t, site, inside6), w.at(t, site, "::ffff:"+inside), w.at(t, bySocket, inside)} {
		v := roundcube.NewVisitor()
		if page := logIn(t, v, url, alice, right); !page.In() {
			t.Errorf("from inside: %s", page)
		}
	}
	if got := w.lookups(t); !slices.Contains(got, alice) {
		t.Errorf("the counting passdb saw %q: it does not count", got)
	}
	t.Run("others are refused before the password goes anywhere", func(t *testing.T) {
		for _, address := range []string{outside, outside6, "8.8.8.8", "10.0.0.1", "127.0.0.1", "::ffff:" + outside} {
			for _, password := range []string{right, wrong} {
				page := logIn(t, roundcube.NewVisitor(), w.at(t, site, address), alice, password)
				wantRefused(t, page, notAllowed(strings.TrimPrefix(address, "::ffff:")))
			}
		}
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, bySocket, outside), alice, right), notAllowed(outside))
		if got := w.lookups(t); len(got) != 0 {
			t.Errorf("Dovecot looked up %q", got)
		}
	})
	t.Run("a wrong password inside is a wrong password", func(t *testing.T) {
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, site, inside), alice, wrong), loginFailed)
	})
	t.Run("an unrestricted mailbox is untouched", func(t *testing.T) {
		for _, address := range []string{inside, outside, outside6, "10.0.0.1"} {
			if page := logIn(t, roundcube.NewVisitor(), w.at(t, site, address), bob, right); !page.In() {
				t.Errorf("from %s: %s", address, page)
			}
		}
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, site, outside), bob, wrong), loginFailed)
	})
	t.Run("without the sidecar's token", func(t *testing.T) {
		w.lookups(t)
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, noToken, inside), alice, right), noAnswerText)
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, noToken, outside), bob, right), noAnswerText)
		if got := w.lookups(t); len(got) != 0 {
			t.Errorf("Dovecot looked up %q", got)
		}
		if log, err := w.server.Errors(noToken); err != nil || !strings.Contains(log, "Allowed Nets: no answer from the sidecar") || !strings.Contains(log, "401") {
			t.Errorf("Roundcube's log does not say why: %v\n%s", err, log)
		}
	})
}

func (w *webmailWorld) testNames(t *testing.T) {
	for _, c := range []struct{ name, site, typed string }{
		{"upper case", site, "ALICE@Example.ORG"},
		{"a trailing dot", site, "alice@example.org."},
		{"without a domain, which Roundcube adds", bareNames, "alice"},
		{"upper case without a domain, which Roundcube adds", bareNames, "Alice"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.lookups(t)
			wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, c.site, outside), c.typed, right), notAllowed(outside))
			if got := w.lookups(t); len(got) != 0 {
				t.Errorf("Dovecot looked up %q", got)
			}
			if strings.HasSuffix(c.typed, ".") {
				return // Dovecot knows no such name
			}
			if page := logIn(t, roundcube.NewVisitor(), w.at(t, c.site, inside), c.typed, right); !page.In() {
				t.Errorf("inside: %s", page)
			}
		})
	}
	t.Run("without a domain, which the sidecar adds", func(t *testing.T) {
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, site, outside), "alice", right), notAllowed(outside))
	})
	t.Run("none that a mailbox can have", func(t *testing.T) {
		w.lookups(t)
		for typed, shown := range map[string]string{
			"alice@example..org":                       "alice@example..org",
			"a b@example.org":                          "a b@example.org",
			`<img src=x onerror="alert(1)">@a.example`: "@a.example", // Roundcube removes tags
			`a"&b@example.org`:                         "a&quot;&amp;b@example.org",
			"$address@ex ample":                        "$address@ex ample",
			"alice*admin@example.org":                  "alice*admin@example.org",
			"alice@example.org\r\nx":                   "alice@example.org x",
			strings.Repeat("ä", 2000) + "@a.example":   strings.Repeat("ä", 79) + "…",
		} {
			page := logIn(t, roundcube.NewVisitor(), w.at(t, site, inside), typed, right)
			wantRefused(t, page, `"`+shown+`" is not the name of a mailbox. Use your full email address.`)
		}
		if got := w.lookups(t); len(got) != 0 {
			t.Errorf("Dovecot looked up %q", got)
		}
	})
	t.Run("an alias does not get around the list", func(t *testing.T) {
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, site, outside), sales, right), loginFailed) // Dovecot's second question
		v := roundcube.NewVisitor()
		if page := logIn(t, v, w.at(t, site, inside), sales, right); !page.In() {
			t.Fatalf("inside: %s", page)
		}
		list := "?_task=mail&_action=list&_mbox=INBOX&_remote=1&_refresh=1"
		if page := visit(t, v, w.at(t, site, inside)+list); !strings.Contains(page.Body, "Lunch") {
			t.Errorf("inside: %s", page.Body)
		}
		if page := visit(t, v, w.at(t, site, outside)+list); strings.Contains(page.Body, "Lunch") || !slices.Contains(page.Messages, "Connection to storage server failed.") {
			t.Errorf("a session of an alias went outside and reads on: %s", page.Body)
		}
		denied := `"client_address":"` + outside + `","service":"webmail"`
		if log, err := w.sidecar.Log(); err != nil || !strings.Contains(log, denied) {
			t.Errorf("Dovecot's sidecar was not told of the browser: %v", err)
		}
	})
}

// testAddresses: whatever a browser says of its own address is not believed.
func (w *webmailWorld) testAddresses(t *testing.T) {
	const balancer = "203.0.113.10" // of real-ip.conf
	for _, c := range []struct {
		name    string
		header  string
		values  []string
		refused string // the address that is; empty: let in
	}{
		{"honest and inside", "X-Forwarded-For", []string{inside}, ""},
		{"honest and outside", "X-Forwarded-For", []string{outside}, notAllowed(outside)},
		{"claims to be inside", "X-Forwarded-For", []string{inside + ", " + outside}, notAllowed(outside)},
		{"claims to be inside, in a header of its own", "X-Forwarded-For", []string{inside, outside}, notAllowed(outside)},
		{"claims to be a load balancer", "X-Forwarded-For", []string{inside + ", " + balancer + ", " + outside}, notAllowed(outside)},
		{"inside, over two load balancers", "X-Forwarded-For", []string{outside + ", " + inside + ", " + balancer}, ""},
		{"outside, over two load balancers", "X-Forwarded-For", []string{inside + ", " + outside + ", " + balancer}, notAllowed(outside)},
		{"inside, with a port", "X-Forwarded-For", []string{inside + ":1234"}, ""},
		{"inside, IPv6", "X-Forwarded-For", []string{outside + ", " + inside6}, ""},
		{"nothing", "X-Forwarded-For", nil, notAllowed("127.0.0.1")},
		{"no address", "X-Forwarded-For", []string{inside + ", unknown"}, notAllowed("127.0.0.1")},
		{"only load balancers", "X-Forwarded-For", []string{balancer}, notAllowed(balancer)},
		{"another header", "X-Real-IP", []string{inside}, notAllowed("127.0.0.1")},
		{"yet another header", "Forwarded", []string{"for=" + inside}, notAllowed("127.0.0.1")},
		{"Dovecot's word", "X-Originating-IP", []string{inside}, notAllowed("127.0.0.1")},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := roundcube.NewVisitor()
			v.Header[http.CanonicalHeaderKey(c.header)] = c.values
			page := logIn(t, v, w.server.Forwarded(site), alice, right)
			if c.refused == "" && !page.In() {
				t.Errorf("%s", page)
			} else if c.refused != "" {
				wantRefused(t, page, c.refused)
			}
		})
	}
	t.Run("headers beside the PROXY protocol", func(t *testing.T) {
		for _, header := range []string{"X-Forwarded-For", "X-Real-IP", "Client-IP", "Forwarded", "Remote-Addr"} {
			v := roundcube.NewVisitor()
			v.Header.Set(header, inside)
			wantRefused(t, logIn(t, v, w.at(t, site, outside), alice, right), notAllowed(outside))
		}
	})
	t.Run("proxy_whitelist hands over what it finds", func(t *testing.T) { // why README.md has nginx do it
		for _, junk := range []string{"unknown", "<b>" + inside, inside + "/24", "fe80::1%eth0"} {
			v := roundcube.NewVisitor()
			v.Header.Set("X-Forwarded-For", junk)
			wantRefused(t, logIn(t, v, w.server.Forwarded(whitelist), alice, right), unknownAddress)
			if page := logIn(t, v, w.server.Forwarded(whitelist), bob, right); !page.In() {
				t.Errorf("an unrestricted mailbox from %q: %s", junk, page)
			}
		}
		v := roundcube.NewVisitor()
		v.Header.Set("X-Forwarded-For", "unknown")
		wantRefused(t, logIn(t, v, w.server.Forwarded(whitelist), sales, right), loginFailed)
		log, err := w.dovecot.Log()
		if err != nil || !strings.Contains(log, "rip=0.0.0.0,") {
			t.Errorf("Dovecot took the address of the webmail server for that of the browser: %v", err)
		}
	})
}

// testWaysIn carries a session outside and tries everything that Roundcube does for sessions.
func (w *webmailWorld) testWaysIn(t *testing.T) {
	in, out := w.at(t, site, inside), w.at(t, site, outside)
	form := func(kv ...string) url.Values {
		values := url.Values{}
		for i := 0; i < len(kv); i += 2 {
			values.Set(kv[i], kv[i+1])
		}
		return values
	}
	for _, c := range []struct {
		query string
		form  url.Values
	}{
		{"", nil},
		{"?_task=mail", nil},
		{"?_task=mail&_action=show&_uid=1&_mbox=INBOX", nil},
		{"?_task=mail&_action=preview&_uid=1&_mbox=INBOX&_framed=1", nil},
		{"?_task=mail&_action=get&_uid=1&_mbox=INBOX&_part=1&_download=1", nil},
		{"?_task=mail&_action=viewsource&_uid=1&_mbox=INBOX&_save=1", nil},
		{"?_task=mail&_action=list&_mbox=INBOX&_remote=1", nil},
		{"?_task=mail&_action=search&_q=eagle&_mbox=INBOX&_remote=1", nil},
		{"?_task=mail&_action=compose&_reply_uid=1&_mbox=INBOX", nil},
		{"?_task=mail&_action=refresh", form("_remote", "1")},
		{"?_task=mail&_action=check-recent", form("_remote", "1", "_folderlist", "1")},
		{"?_task=mail&_action=keep-alive", form("_remote", "1")},
		{"?_task=mail&_action=upload&_id=1&_uploadid=upload1&_remote=1", form("_unlock", "1")},
		{"?_task=mail&_action=send&_framed=1", form("_to", "dora@example.net", "_id", "1")},
		{"?_task=mail&_action=move", form("_remote", "1", "_uid", "1", "_mbox", "INBOX", "_target_mbox", "Trash")},
		{"?_task=addressbook", nil},
		{"?_task=addressbook&_action=export", nil},
		{"?_task=settings&_action=folders", nil},
		{"?_task=utils&_action=save-pref", form("_remote", "1", "_name", "x", "_value", "y")},
		{"?_task=utils&_action=html2text", form("x", "y")},
		{"?_task=utils&_action=modcss&_u=tmp-1.css&_c=x", nil},
		{"?_task=login", nil},
		{"?_task=login&_action=login", form("_user", bob, "_pass", right)},
		{"?_task=login&_action=oauth&code=1&state=1", nil},
		{"?_task=logout", nil},
		{"?_task=cli", nil},
		{"?_task=nothing&_action=plugin.nothing", nil},
	} {
		t.Run(c.query, func(t *testing.T) {
			v := roundcube.NewVisitor()
			if page := logIn(t, v, in, alice, right); !page.In() {
				t.Fatalf("inside: %s", page)
			}
			w.lookups(t)
			var page roundcube.Page
			var err error
			if c.form == nil {
				page, err = v.Get(t.Context(), out+c.query)
			} else {
				page, err = v.Post(t.Context(), out+c.query, c.form)
			}
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(page.Body, secret) || strings.Contains(page.Body, "Lunch") || !slices.Equal(page.Messages, []string{notAllowed(outside)}) {
				t.Errorf("%s\n%s", page, page.Body)
			}
			if strings.Contains(c.query, "_framed") || strings.Contains(c.query, "_remote") || c.form.Has("_remote") {
				wantRefused(t, visit(t, v, out+"?_task=mail&_err=session"), notAllowed(outside)) // where the script goes next
			}
			if got := w.lookups(t); len(got) != 0 {
				t.Errorf("Dovecot looked up %q", got)
			}
			if page := visit(t, v, in+"?_task=mail"); page.Task != "login" || strings.Contains(strings.Join(page.Messages, " "), "not allowed") {
				t.Errorf("afterwards, inside: %s", page)
			}
		})
	}
}

func (w *webmailWorld) testSessions(t *testing.T) {
	t.Run("only the session outside ends", func(t *testing.T) {
		here, there := roundcube.NewVisitor(), roundcube.NewVisitor()
		atHome, atOffice := w.at(t, site, inside), w.at(t, site, office)
		for v, url := range map[*roundcube.Visitor]string{here: atHome, there: atOffice} {
			if page := logIn(t, v, url, carol, right); !page.In() {
				t.Fatalf("%s: %s", url, page)
			}
		}
		w.restrict(t, carol, inside)
		ended := time.Now()
		err := stack.Await(within(t, 10*time.Second), func(ctx context.Context) error {
			page, err := there.Get(ctx, atOffice+"?_task=mail")
			if err == nil && page.Task == "mail" { // the last answer holds for 3 s; Dovecot refuses already
				err = fmt.Errorf("%s", page)
			} else if err == nil {
				wantRefused(t, page, notAllowed(office))
			}
			return err
		})
		if took := time.Since(ended); err != nil || took > 5*time.Second {
			t.Errorf("the session outside ended after %v: %v", took, err)
		}
		if page := visit(t, here, atHome+"?_task=mail"); !page.In() {
			t.Errorf("the session inside: %s", page)
		}
		w.restrict(t, carol, inside+", "+office)
	})
	t.Run("a session that is carried outside ends at once", func(t *testing.T) {
		v := roundcube.NewVisitor()
		if page := logIn(t, v, w.at(t, site, inside), carol, right); !page.In() {
			t.Fatalf("%s", page)
		}
		if page := visit(t, v, w.at(t, site, office)+"?_task=mail"); !page.In() {
			t.Errorf("in the other permitted network: %s", page)
		}
		wantRefused(t, visit(t, v, w.at(t, site, outside)+"?_task=mail"), notAllowed(outside))
	})
	t.Run("an answer holds for seconds, a user and an address", func(t *testing.T) {
		w.liar.says(http.StatusOK, "application/json", permission)
		v := roundcube.NewVisitor()
		if page := logIn(t, v, w.at(t, onLiar, inside), alice, right); !page.In() {
			t.Fatalf("%s", page)
		}
		questions := func(n int, address string) int64 {
			before := w.liar.asked.Load()
			for range n {
				if page := visit(t, v, w.at(t, onLiar, address)+"?_task=settings"); page.Task != "settings" {
					t.Errorf("%s", page)
				}
			}
			return w.liar.asked.Load() - before
		}
		if got := questions(5, inside); got > 2 { // 2 if the machine was too busy
			t.Errorf("%d questions for 5 requests", got)
		}
		if got := questions(1, inside6); got != 1 {
			t.Errorf("%d questions after the address had changed", got)
		}
		if got := questions(1, inside); got != 1 {
			t.Errorf("%d questions after the address had changed back", got)
		}
	})
}

// testNonsense is the list of test/roundcube, in short, with everything around it.
func (w *webmailWorld) testNonsense(t *testing.T) {
	url := w.at(t, eagerLiar, inside)
	w.liar.says(http.StatusOK, "application/json", permission)
	v := roundcube.NewVisitor()
	if page := logIn(t, v, url, alice, right); !page.In() {
		t.Fatalf("%s", page)
	}
	for _, c := range []struct {
		name        string
		status      int
		contentType string
		body        string
	}{
		{"an error with a permission", http.StatusInternalServerError, "application/json", permission},
		{"another web server", http.StatusOK, "text/html", "<h1>It works!</h1>"},
		{"a permission in HTML", http.StatusOK, "text/html", permission},
		{"nothing", http.StatusOK, "application/json", ""},
		{"an empty object", http.StatusOK, "application/json", "{}"},
		{"a verdict of another kind", http.StatusOK, "application/json", `{"decision":{"verdict":1,"reason":"REASON_MATCHED","revision":"1-1"}}`},
		{"Dovecot's consent", http.StatusOK, "application/json", `{"status":0,"msg":""}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.lookups(t)
			w.liar.says(c.status, c.contentType, c.body)
			wantRefused(t, logIn(t, roundcube.NewVisitor(), url, bob, right), noAnswerText)
			if page := visit(t, v, url+"?_task=mail"); page.Status != http.StatusServiceUnavailable || !slices.Equal(page.Messages, []string{noAnswerText}) {
				t.Errorf("in a session: %s", page)
			}
			if page := visit(t, v, url+"?_task=mail&_action=list&_mbox=INBOX&_remote=1"); !slices.Equal(page.Messages, []string{noAnswerText}) || strings.Contains(page.Body, "Lunch") {
				t.Errorf("a script in a session: %s\n%s", page, page.Body)
			}
			if got := w.lookups(t); len(got) != 0 {
				t.Errorf("Dovecot looked up %q", got)
			}
		})
	}
	w.liar.says(http.StatusOK, "application/json", permission)
	if page := visit(t, v, url+"?_task=mail"); !page.In() {
		t.Errorf("the session did not survive: %s", page)
	}
	t.Run("a lie of the sidecar does not get around Dovecot", func(t *testing.T) {
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, eagerLiar, outside), alice, right), loginFailed)
	})
}

func (w *webmailWorld) testNoPlugin(t *testing.T) {
	w.lookups(t)
	for _, address := range []string{outside, inside} { // Dovecot sees the webmail server, which is on nobody's list
		wantRefused(t, logIn(t, roundcube.NewVisitor(), w.at(t, noPlugin, address), alice, right), loginFailed)
	}
	if got := w.lookups(t); len(got) != 0 {
		t.Errorf("Dovecot looked up %q", got)
	}
	if page := logIn(t, roundcube.NewVisitor(), w.at(t, noPlugin, outside), bob, right); !page.In() {
		t.Errorf("an unrestricted mailbox: %s", page)
	}
	t.Run("with it, but Dovecot does not trust it", func(t *testing.T) {
		for _, address := range []string{outside, inside} {
			if page := logIn(t, roundcube.NewVisitor(), w.at(t, untrusted, address), alice, right); page.In() {
				t.Errorf("from %s: %s", address, page)
			}
		}
	})
}

// restartOwn starts the webmail server's sidecar again.
func (w *webmailWorld) restartOwn(ctx context.Context) error {
	if err := w.own.Restart(ctx); err != nil {
		return err
	}
	return os.Chmod(w.own.Socket, 0o666) // PHP runs as another user
}

func (w *webmailWorld) testOutage(t *testing.T) {
	url := w.at(t, site, inside)
	t.Run("a restart is not noticed", func(t *testing.T) {
		v := roundcube.NewVisitor()
		if page := logIn(t, v, w.at(t, eager, inside), alice, right); !page.In() {
			t.Fatalf("%s", page)
		}
		for range 3 {
			if err := w.own.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := w.own.Start(); err != nil {
				t.Fatal(err)
			}
			if page := visit(t, v, w.at(t, eager, inside)+"?_task=mail"); !page.In() {
				t.Errorf("%s", page)
			}
		}
		if err := w.own.AwaitReady(within(t, startWithin)); err != nil {
			t.Fatal(err)
		}
	})
	session := roundcube.NewVisitor()
	if page := logIn(t, session, w.at(t, eager, inside), alice, right); !page.In() {
		t.Fatalf("%s", page)
	}
	const atOnce = 2 * time.Second // 500 ms, and a busy machine
	for _, state := range []struct {
		name    string
		prepare func(context.Context) error
	}{
		{"frozen", w.own.Freeze},
		{"dead", func(context.Context) error { return w.own.Kill() }},
		{"without data", func(ctx context.Context) error {
			if err := w.policy.Stop(); err != nil {
				return err
			}
			if err := w.own.Start(); err != nil {
				return err
			}
			return stack.Await(ctx, func(ctx context.Context) error {
				_, err := checkClient(t, w.own).GetStatus(ctx, &checkv1.GetStatusRequest{})
				return err
			})
		}},
	} {
		t.Run(state.name, func(t *testing.T) {
			if err := state.prepare(within(t, startWithin)); err != nil {
				t.Fatal(err)
			}
			w.lookups(t)
			for _, user := range []string{alice, bob} {
				page := logIn(t, roundcube.NewVisitor(), url, user, right)
				wantRefused(t, page, noAnswerText)
				if page.Took > atOnce {
					t.Errorf("%s waited %v", user, page.Took)
				}
			}
			page := visit(t, session, w.at(t, eager, inside)+"?_task=mail")
			if page.Status != http.StatusServiceUnavailable || !slices.Equal(page.Messages, []string{noAnswerText}) || page.Took > atOnce {
				t.Errorf("in a session, after %v: %s", page.Took, page)
			}
			if got := w.lookups(t); len(got) != 0 {
				t.Errorf("Dovecot looked up %q", got)
			}
		})
	}
	t.Run("logging out works all the same", func(t *testing.T) {
		wantRefused(t, visit(t, session, w.at(t, eager, inside)+"?_task=logout"), noAnswerText)
	})
}
