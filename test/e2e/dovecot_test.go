package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/test/dovecot"
)

// from is an attempt of a client behind the load balancer.
func from(address, user, password string) dovecot.Attempt {
	return dovecot.Attempt{Client: netip.MustParseAddr(address), User: user, Password: password}
}

// passwordOf returns the right password of a user, or of the master user in the name.
func passwordOf(user string) string {
	if strings.Contains(user, "*") {
		return dovecot.MasterPassword
	}
	return right
}

// webmail is an attempt of a webmail server, at the loopback address host, for a browser.
func webmail(host, user string, forward ...[2]string) dovecot.Attempt {
	return dovecot.Attempt{From: netip.MustParseAddr(host), User: user, Password: dovecot.Password, Forward: forward}
}

func attempt(t *testing.T, login func(context.Context, dovecot.Attempt) (dovecot.Answer, error), a dovecot.Attempt) dovecot.Answer {
	t.Helper()
	answer, err := login(t.Context(), a)
	if err != nil {
		t.Fatalf("%s from %s: %v", a.User, a.Client, err)
	}
	return answer
}

const (
	right = dovecot.Password
	wrong = "wrong-password"

	// wrongPassword is what Dovecot says of any failure it does not explain.
	wrongPasswordIMAP = "NO [AUTHENTICATIONFAILED] Authentication failed."
	wrongPasswordPOP3 = "-ERR [AUTH] Authentication failed."
)

func wrongPassword(protocol string) string {
	if protocol == "pop3" {
		return wrongPasswordPOP3
	}
	return wrongPasswordIMAP
}

// denial is how a protocol shows a text.
func denial(protocol, text string) string {
	if protocol == "pop3" {
		return "-ERR [AUTH] " + text
	}
	return "NO [ALERT] " + text
}

// TestDovecot is the main job: a list is saved, and real logins through Dovecot obey it.
func TestDovecot(t *testing.T) {
	w := newWorld(t, settings{})
	for protocol, login := range protocols(w.dovecot) {
		t.Run(protocol, func(t *testing.T) {
			t.Run("allowed addresses log in", func(t *testing.T) {
				for _, address := range []string{inside, inside6, "::ffff:" + inside} {
					for _, v2 := range []bool{false, true} {
						a := from(address, alice, right)
						a.ProxyV2 = v2
						if got := attempt(t, login, a); !got.OK {
							t.Errorf("%s, PROXY v2 %v: %s", address, v2, got.Text)
						}
					}
				}
				if got := w.lookups(t); !slices.Contains(got, alice) {
					t.Errorf("the counting passdb saw %q: it does not count", got)
				}
			})
			t.Run("a wrong password inside is a wrong password", func(t *testing.T) {
				if got := attempt(t, login, from(inside, alice, wrong)); got.OK || got.Text != wrongPassword(protocol) {
					t.Errorf("answer %q", got.Text)
				}
			})
			t.Run("others are refused before the password is looked at", func(t *testing.T) {
				w.lookups(t)
				for _, address := range []string{outside, outside6, "8.8.8.8", "2a00:1450::1", "10.0.0.1", "::ffff:" + outside} {
					want := denial(protocol, notAllowed(strings.TrimPrefix(address, "::ffff:")))
					for _, password := range []string{right, wrong} {
						if got := attempt(t, login, from(address, alice, password)); got.OK || got.Text != want {
							t.Errorf("%s with the %s: %q, want %q", address, password, got.Text, want)
						}
					}
				}
				if got := w.lookups(t); len(got) != 0 {
					t.Errorf("the passdb was asked for %q", got)
				}
			})
			t.Run("spelling does not matter", func(t *testing.T) {
				for _, name := range []string{"ALICE@Example.ORG", "alice@example.org."} {
					if got := attempt(t, login, from(outside, name, right)); got.OK {
						t.Errorf("%s logged in from outside", name)
					}
				}
				if got := attempt(t, login, from(inside, "ALICE@Example.ORG", right)); !got.OK {
					t.Errorf("inside: %s", got.Text)
				}
			})
			t.Run("an unrestricted mailbox is untouched", func(t *testing.T) {
				for _, address := range []string{inside, outside, outside6, "10.0.0.1"} {
					if got := attempt(t, login, from(address, bob, right)); !got.OK {
						t.Errorf("%s: %s", address, got.Text)
					}
					if got := attempt(t, login, from(address, bob, wrong)); got.OK || got.Text != wrongPassword(protocol) {
						t.Errorf("%s with a wrong password: %s", address, got.Text)
					}
				}
			})
			t.Run("an alias does not get around the list", func(t *testing.T) {
				if got := attempt(t, login, from(inside, sales, right)); !got.OK {
					t.Errorf("inside: %s", got.Text)
				}
				// The name as typed is unrestricted, so that the password is looked at; the answer must not tell that it is right.
				for _, password := range []string{right, wrong} {
					if got := attempt(t, login, from(outside, sales, password)); got.OK || got.Text != wrongPassword(protocol) {
						t.Errorf("outside with the %s: %s", password, got.Text)
					}
				}
			})
			t.Run("a master user does not get around the list", func(t *testing.T) {
				byName := from(outside, alice+"*"+dovecot.Master, dovecot.MasterPassword)
				bySASL := from(outside, dovecot.Master, dovecot.MasterPassword)
				bySASL.Authorize = alice
				w.lookups(t)
				for name, a := range map[string]dovecot.Attempt{"alice*admin": byName, "SASL PLAIN": bySASL} {
					if got := attempt(t, login, a); got.OK || got.Text != denial(protocol, notAllowed(outside)) {
						t.Errorf("%s from outside: %s", name, got.Text)
					}
				}
				if got := w.lookups(t); len(got) != 0 {
					t.Errorf("the passdb was asked for %q", got)
				}
				for name, a := range map[string]dovecot.Attempt{"alice*admin": byName, "SASL PLAIN": bySASL} {
					a.Client = netip.MustParseAddr(inside)
					if got := attempt(t, login, a); !got.OK {
						t.Errorf("%s from inside: %s", name, got.Text)
					}
				}
			})
			t.Run("refusals are no penalty for the neighbours", func(t *testing.T) {
				for i := range 5 { // Dovecot counts each password once
					attempt(t, login, from("203.0.113.5", alice, fmt.Sprint(right, i)))
				}
				if got := attempt(t, login, from("203.0.113.5", bob, right)); !got.OK { // within dovecot's time limit, which the penalty exceeds
					t.Error(got.Text)
				}
			})
		})
	}
	t.Run("no password is logged", func(t *testing.T) {
		for name, log := range map[string]func() (string, error){"sidecar": w.sidecar.Log, "policy": w.policy.Log, "dovecot": w.dovecot.Log} {
			text, err := log()
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(text, right) || strings.Contains(text, wrong) || strings.Contains(text, dovecot.MasterPassword) {
				t.Errorf("%s logged a password", name)
			}
			if name == "dovecot" && !strings.Contains(text, "policy") { // auth_verbose
				t.Errorf("Dovecot logged no refusal:\n%s", text)
			}
		}
	})
}

// TestForwardedAddress shows whose word about the client's address and service is believed. The trusted webmail is at
// 127.0.0.1, as in the configuration and in --trusted-proxies; anybody else is not.
func TestForwardedAddress(t *testing.T) {
	w := newWorld(t, settings{})
	ip := func(address string) [2]string { return [2]string{"x-originating-ip", address} }
	via := func(service string) [2]string { return [2]string{"x-forward-via", service} }
	const trusted, other = "127.0.0.1", "127.0.0.2"
	changed := webmail(trusted, alice, ip(outside), via("webmail"))
	changed.ForwardAgain = [][2]string{ip(inside), via("caldav")}
	tests := []struct {
		name    string
		attempt dovecot.Attempt
		refused string // the address in the refusal; empty: logged in; "-": refused like a wrong password
	}{
		{"webmail, browser inside", webmail(trusted, alice, ip(inside), via("webmail")), ""},
		{"webmail, IPv6 browser inside", webmail(trusted, alice, ip(inside6), via("webmail")), ""},
		{"webmail, browser outside", webmail(trusted, alice, ip(outside), via("webmail")), outside},
		{"address without a service", webmail(trusted, alice, ip(inside)), ""},
		{"webmail that forwards nothing", webmail(trusted, alice), trusted},
		{"webmail that forwards no address", webmail(trusted, alice, via("webmail")), trusted},
		{"webmail that forwards junk", webmail(trusted, alice, ip("unknown"), via("webmail")), trusted},
		// Dovecot reads the first address: a webmail must not pass on X-Forwarded-For as it came.
		{"webmail that forwards a list", webmail(trusted, alice, ip(outside+", "+inside), via("webmail")), outside},
		{"webmail that changes its mind", changed, outside},
		{"unrestricted mailbox", webmail(trusted, bob, ip(outside), via("webmail")), ""},
		{"alias, browser outside", webmail(trusted, sales, ip(outside), via("webmail")), "-"},
		{"alias, browser inside", webmail(trusted, sales, ip(inside), via("webmail")), ""},

		{"somebody else says inside", webmail(other, alice, ip(inside), via("webmail")), other},
		{"somebody else says inside, without a service", webmail(other, alice, ip(inside)), other},
		{"the client itself says inside", dovecot.Attempt{
			Client: netip.MustParseAddr(outside), User: alice, Password: right, Forward: [][2]string{ip(inside), via("webmail")},
		}, outside},
		{"the client itself says trusted", dovecot.Attempt{
			Client: netip.MustParseAddr(outside), User: alice, Password: right, Forward: [][2]string{ip(trusted), via("caldav")},
		}, outside},

		{"CalDAV from anywhere", webmail(trusted, alice, ip(outside), via("caldav")), ""},
		{"CardDAV from anywhere", webmail(trusted, alice, ip(outside), via("carddav")), ""},
		{"WebDAV from anywhere", webmail(trusted, alice, ip(outside), via("webdav")), ""},
		{"CalDAV for an alias", webmail(trusted, sales, ip(outside), via("caldav")), ""},
		{"CalDAV without an address", webmail(trusted, alice, via("caldav")), ""},
		{"somebody else says CalDAV", webmail(other, alice, ip(inside), via("caldav")), other},
		{"a service nobody knows", webmail(trusted, alice, ip(inside), via("gopher")), "-"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := attempt(t, w.dovecot.LoginIMAP, tt.attempt)
			want := denial("imap", notAllowed(tt.refused))
			if tt.refused == "-" {
				want = wrongPasswordIMAP
			}
			if tt.refused == "" && !got.OK {
				t.Errorf("refused: %s", got.Text)
			}
			if tt.refused != "" && (got.OK || got.Text != want) {
				t.Errorf("answer %q, want %q", got.Text, want)
			}
		})
	}
	t.Run("POP3", func(t *testing.T) {
		for _, tt := range []struct {
			name, host, forwarded, refused string
		}{
			{"inside", trusted, inside, ""},
			{"outside", trusted, outside, outside},
			{"somebody else", other, inside, other},
		} {
			got := attempt(t, w.dovecot.LoginPOP3, webmail(tt.host, alice, [2]string{"ADDR", tt.forwarded}))
			if got.OK != (tt.refused == "") || !got.OK && got.Text != denial("pop3", notAllowed(tt.refused)) {
				t.Errorf("%s: %q", tt.name, got.Text)
			}
		}
	})
}
