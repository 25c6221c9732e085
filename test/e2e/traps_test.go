package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

// TestHostileNames logs in under names made to confuse: nobody gets in, and what they contain does not reach the protocol.
func TestHostileNames(t *testing.T) {
	w := newWorld(t, settings{sidecarArgs: []string{"--log-level", "debug"}})
	long := strings.Repeat("a", 10_000)
	names := map[string]string{
		"empty":                   "",
		"no domain":               "alice",
		"no local part":           "@example.org",
		"empty domain":            "alice@",
		"two at signs":            "alice@@example.org",
		"space before":            " " + alice,
		"space after":             alice + " ",
		"CR LF":                   alice + "\r\n* OK forged",
		"LF":                      alice + "\na OK forged",
		"control character":       "alice\x07@example.org",
		"DEL":                     "alice\x7f@example.org",
		"quote":                   `al"ice@example.org`,
		"backslash":               `al\ice@example.org`,
		"JSON":                    `alice@example.org","remote":"` + inside,
		"percent":                 "alice%example.org",
		"Dovecot variable":        "%{rip}@example.org",
		"tab and fields":          alice + "\tuser=" + bob,
		"full width":              "\uff41lice@example.org",
		"not UTF-8":               "alice\xff@example.org",
		"right-to-left":           "\u202e" + alice,
		"10 kB":                   long,
		"10 kB domain":            "alice@" + long,
		"65 octets":               long[:65] + "@example.org",
		"a master without a name": alice + "*",
		"a name without a user":   "*" + dovecot.Master,
		"two masters":             alice + "*" + dovecot.Master + "*" + dovecot.Master,
	}
	t.Run("names", func(t *testing.T) {
		for name, user := range names {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				tryName(t, w, user)
			})
		}
	})
	t.Run("a name ends at NUL", func(t *testing.T) { // for Dovecot, so that it must for the list
		const padded = alice + "\x00@example.net"
		if got := attempt(t, w.dovecot.LoginIMAP, from(outside, padded, right)); got.OK {
			t.Errorf("outside: %s", got.Text)
		}
		if got := attempt(t, w.dovecot.LoginIMAP, from(inside, padded, right)); !got.OK {
			t.Errorf("inside: %s", got.Text)
		}
	})
	t.Run("nothing is forged in the logs", func(t *testing.T) {
		ours, err := w.sidecar.Log()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(ours) {
			if err := json.Unmarshal([]byte(line), new(struct{ Level, Msg string })); err != nil || len(line) > 2000 || strings.Contains(line, `"msg":"* OK`) {
				t.Errorf("sidecar: %v: %.300q", err, line)
			}
		}
		theirs, err := w.dovecot.Log()
		if err != nil {
			t.Fatal(err)
		}
		entry := regexp.MustCompile(`^[A-Z][a-z]{2} [ 0-9]{2} [0-9:]{8} [a-z0-9-]+(\([^)]*\))?(<[^>]*>)*: `)
		for line := range strings.Lines(theirs) {
			if !entry.MatchString(line) || strings.ContainsAny(strings.TrimSuffix(line, "\n"), "\r\x00\x07\x1b") {
				t.Errorf("Dovecot: %.300q", line)
			}
		}
		for name, log := range map[string]string{"sidecar": ours, "Dovecot": theirs} {
			if strings.Contains(log, right) || strings.Contains(log, dovecot.MasterPassword) {
				t.Errorf("%s logged a password", name)
			}
		}
	})
	t.Run("and life goes on", func(t *testing.T) {
		if got := attempt(t, w.dovecot.LoginIMAP, from(inside, alice, right)); !got.OK {
			t.Error(got.Text)
		}
	})
}

// tryName logs in as user, from everywhere at once.
func tryName(t *testing.T, w *world, user string) {
	t.Helper()
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for protocol, login := range protocols(w.dovecot) {
		if protocol == "pop3" && strings.ContainsAny(user, "\r\n") {
			continue // would be two commands
		}
		for _, address := range []string{inside, outside} {
			attempts.Go(func() {
				got, err := login(t.Context(), from(address, user, passwordOf(user)))
				if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s from %s: %v", protocol, address, err) // a hang
				}
				if got.OK {
					t.Errorf("%s from %s: logged in: %s", protocol, address, got.Text)
				}
				if strings.Contains(got.Text, "forged") || len(got.Text) > 300 {
					t.Errorf("%s from %s: the name came back: %.300q", protocol, address, got.Text)
				}
			})
		}
	}
}

// TestDenialText shows the operator's choices: none makes a denial look like a wrong password; control characters, which
// Dovecot would put raw into the protocol, do not get as far as that.
func TestDenialText(t *testing.T) {
	w := newWorld(t, settings{sidecarArgs: []string{"--denial-text", ""}})
	for protocol, login := range protocols(w.dovecot) {
		for _, password := range []string{right, wrong} {
			if got := attempt(t, login, from(outside, alice, password)); got.OK || got.Text != wrongPassword(protocol) {
				t.Errorf("%s with the %s: %q", protocol, password, got.Text)
			}
		}
	}
	for name, text := range map[string]string{"CR LF": "no\r\na OK forged", "NUL": "no\x01", "C1": "no\u0085"} {
		code, output := runToEnd(t, w.Bin("allowednets-sidecar"), "--policy-address", w.policy.Address, "--insecure-plaintext", "--denial-text", text)
		if code != 2 || !strings.Contains(output, "--denial-text") {
			t.Errorf("%s: exit code %d: %s", name, code, output)
		}
	}
}

// TestForgottenStage shows what happens to people who do not add stage=after to their passdb blocks: aliases are refused all
// the same, but with a text that tells whether the password was right.
func TestForgottenStage(t *testing.T) {
	w := newWorld(t, settings{})
	d := startDovecot(t, w.Stack, "dovecot-nostage", people(), dovecot.Config{Door: "http://" + w.sidecar.HTTP + "/dovecot", NoStage: true})
	if got := attempt(t, d.LoginIMAP, from(outside, sales, right)); got.OK || got.Text != denial("imap", notAllowed(outside)) {
		t.Errorf("the right password: %s", got.Text)
	}
	if got := attempt(t, d.LoginIMAP, from(outside, sales, wrong)); got.OK || got.Text != wrongPasswordIMAP {
		t.Errorf("a wrong password: %s", got.Text)
	}
}

// infoIsAlice makes info an alias that only the userdb knows.
func infoIsAlice() dovecot.Config {
	return dovecot.Config{UserdbAliases: map[string]string{info: alice}}
}

// TestAliasInUserdb shows why aliases must be resolved in the passdb: Dovecot asks the policy server before it looks into
// the userdb, and never again.
func TestAliasInUserdb(t *testing.T) {
	w := newWorld(t, settings{dovecot: infoIsAlice()})
	if got := attempt(t, w.dovecot.LoginIMAP, from(outside, info, right)); !got.OK {
		t.Errorf("Dovecot asks after the userdb: that is new, and README.md can be shorter: %s", got.Text)
	}
	if got := opened(t, w.dovecot); !slices.Equal(got, []string{alice}) {
		t.Errorf("opened %q", got)
	}
}

// TestPostLogin closes the hole of TestAliasInUserdb with a check between log-in and mailbox, and shows that it fails closed.
func TestPostLogin(t *testing.T) {
	w := newWorld(t, settings{dovecot: infoIsAlice()})
	cfg := infoIsAlice()
	cfg.Door, cfg.PostLogin, cfg.Tool = "http://"+w.sidecar.HTTP+"/dovecot", "unix:"+w.sidecar.Socket, w.Bin("allowednets")
	d := startDovecot(t, w.Stack, "dovecot-postlogin", people(), cfg)
	recovered(t, d)
	try := func(t *testing.T, user, address string, want bool) {
		t.Helper()
		for protocol, open := range map[string]func(context.Context, dovecot.Attempt) (*dovecot.Session, error){"imap": d.OpenIMAP, "pop3": d.OpenPOP3} {
			s, err := open(t.Context(), from(address, user, passwordOf(user)))
			if err == nil {
				s.Close()
			}
			if (err == nil) != want {
				t.Errorf("%s: %s from %s: %v", protocol, user, address, err)
			}
		}
	}
	try(t, info, inside, true)
	try(t, info, outside, false)
	try(t, info, outside6, false)
	try(t, sales, inside, true)
	try(t, sales, outside, false)
	try(t, alice+"*"+dovecot.Master, inside, true)
	try(t, bob, outside, true)
	for name, server := range map[string]*dovecot.Server{"without": w.dovecot, "with": d} {
		began := time.Now()
		const logins = 20
		for range logins {
			attempt(t, server.LoginIMAP, from(inside, alice, right))
		}
		t.Logf("a log-in %s the check takes %v", name, time.Since(began)/logins)
	}
	t.Run("without an answer nobody passes", func(t *testing.T) {
		// The door answers, and only the way to the socket is gone.
		if err := os.Remove(w.sidecar.Socket); err != nil {
			t.Fatal(err)
		}
		try(t, info, inside, false)
		try(t, bob, inside, false)
	})
	if got := opened(t, d); slices.Contains(got, info) {
		t.Errorf("opened %q", got)
	}
}

// TestMasterOfAlias logs a master user in as an alias.
func TestMasterOfAlias(t *testing.T) {
	w := newWorld(t, settings{})
	door := "http://" + w.sidecar.HTTP + "/dovecot"
	login := from(outside, sales+"*"+dovecot.Master, dovecot.MasterPassword)
	t.Run("Dovecot does not resolve it", func(t *testing.T) {
		got := attempt(t, w.dovecot.LoginIMAP, login)
		if names := opened(t, w.dovecot); !got.OK || !slices.Equal(names, []string{sales}) {
			t.Errorf("opened %q: %s", names, got.Text) // a mailbox of its own, which is unrestricted
		}
	})
	t.Run("Dovecot resolves it", func(t *testing.T) {
		d := startDovecot(t, w.Stack, "dovecot-continue", people(), dovecot.Config{Door: door, MasterContinues: true})
		// Dovecot's own words, which tell that the master password was right.
		if got := attempt(t, d.LoginIMAP, login); got.OK || got.Text != "NO [AUTHORIZATIONFAILED] Authorization failed" {
			t.Errorf("outside: %s", got.Text)
		}
		login.Client = netip.MustParseAddr(inside)
		if got := attempt(t, d.LoginIMAP, login); !got.OK {
			t.Errorf("inside: %s", got.Text)
		}
		if got := opened(t, d); !slices.Equal(got, []string{alice}) {
			t.Errorf("opened %q", got)
		}
	})
}

// opened stops Dovecot and returns the mailboxes that were opened by IMAP.
func opened(t *testing.T, d *dovecot.Server) []string {
	t.Helper()
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	log, err := d.Log()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, match := range regexp.MustCompile(` imap\(([^)]+)\)<[^>]*><[^>]*>: Info: Disconnected`).FindAllStringSubmatch(log, -1) {
		names = append(names, match[1])
	}
	return names
}

// TestProxyHeader shows that the listener behind the load balancer takes nobody at their word who does not come through it.
func TestProxyHeader(t *testing.T) {
	w := newWorld(t, settings{})
	t.Run("none", func(t *testing.T) {
		got, err := w.dovecot.LoginIMAP(t.Context(), dovecot.Attempt{Header: []byte{}, User: bob, Password: right})
		if err == nil {
			t.Errorf("an answer without a PROXY header: %s", got.Text)
		}
	})
	t.Run("LOCAL", func(t *testing.T) { // the load balancer itself, for example its health check
		local := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x20, 0, 0, 0)
		got := attempt(t, w.dovecot.LoginIMAP, dovecot.Attempt{Header: local, User: alice, Password: right})
		if got.OK || got.Text != denial("imap", notAllowed("127.0.0.1")) {
			t.Errorf("answer %q", got.Text)
		}
	})
	t.Run("of somebody who is no load balancer", func(t *testing.T) {
		d := startDovecot(t, w.Stack, "dovecot-balancer", people(), dovecot.Config{
			Door: "http://" + w.sidecar.HTTP + "/dovecot", After: "haproxy_trusted_networks = 127.0.0.1/32",
		})
		a := from(inside, alice, right)
		if got := attempt(t, d.LoginIMAP, a); !got.OK {
			t.Errorf("through the load balancer: %s", got.Text)
		}
		a.From = netip.MustParseAddr("127.0.0.2")
		if got, err := d.LoginIMAP(t.Context(), a); err == nil {
			t.Errorf("past the load balancer: %s", got.Text)
		}
	})
}

// TestDoorAddress shows the ways in which people write the sidecar's address, and its token. A mistake lets nobody in.
func TestDoorAddress(t *testing.T) {
	needDovecot(t)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("d00r-t0ken\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, settings{noDovecot: true, sidecarArgs: []string{"--http-token-file", token}})
	for _, tt := range []struct {
		name, path, token string
		works             bool
	}{
		{"as it should be", "/dovecot", "d00r-t0ken", true},
		{"no token", "/dovecot", "", false},
		{"another token", "/dovecot", "token", false},
		{"a slash too many", "//dovecot/", "d00r-t0ken", true},
		{"ending in &", "/dovecot?&", "d00r-t0ken", true},
		{"a query, to which Dovecot appends another", "/dovecot?a=b", "d00r-t0ken", false},
		{"no path", "", "d00r-t0ken", false},
		{"another door", "/v1/check", "d00r-t0ken", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			header := ""
			if tt.token != "" {
				header = "auth_policy_server_api_header = Authorization: Bearer " + tt.token
			}
			d := startDovecot(t, w.Stack, "dovecot-address", people(), dovecot.Config{Door: "http://" + w.sidecar.HTTP + tt.path, After: header})
			if got := attempt(t, d.LoginPOP3, from(inside, alice, right)); got.OK != tt.works {
				t.Errorf("inside: %s", got.Text)
			}
			if got := attempt(t, d.LoginPOP3, from(outside, alice, right)); got.OK {
				t.Errorf("outside: %s", got.Text)
			}
		})
	}
}

// TestSettingsBeside shows what other settings of Dovecot do to the list.
func TestSettingsBeside(t *testing.T) {
	w := newWorld(t, settings{})
	tests := []struct {
		name, setting string
		refused       bool
	}{
		{"a cache of passwords does not matter", "auth_cache_size = 1M", true},
		{"a dry run lets everybody in", "auth_policy_log_only = yes", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := startDovecot(t, w.Stack, "dovecot-beside", people(), dovecot.Config{Door: "http://" + w.sidecar.HTTP + "/dovecot", After: tt.setting})
			for _, a := range []dovecot.Attempt{from(inside, alice, right), from(inside, sales, right)} {
				if got := attempt(t, d.LoginIMAP, a); !got.OK {
					t.Errorf("%s from inside: %s", a.User, got.Text)
				}
			}
			for _, a := range []dovecot.Attempt{from(outside, alice, right), from(outside, sales, right)} {
				if got := attempt(t, d.LoginIMAP, a); got.OK == tt.refused {
					t.Errorf("%s from outside: %s", a.User, got.Text)
				}
			}
			err := stack.Await(within(t, 10*time.Second), func(context.Context) error {
				log, err := d.Log()
				if n := strings.Count(log, "Authentication failure due to policy server refusal"); err == nil && n < 2 {
					err = fmt.Errorf("%d refusals are in Dovecot's log", n)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
