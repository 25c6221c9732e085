package e2e

import (
	"testing"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
)

// TestDashboard uses the dashboard in a real browser. What disturbs the others comes last.
func TestDashboard(t *testing.T) {
	s := newSite(t, settings{})
	s.needBrowser(t)
	t.Run("path", func(t *testing.T) { walkPath(t, s) })
	t.Run("tour", func(t *testing.T) { tour(t, s) })
	t.Run("script", func(t *testing.T) { scripted(t, s) })
	t.Run("openid", func(t *testing.T) { logInElsewhere(t, s) })
	t.Run("pictures", func(t *testing.T) { pictures(t, s) })
	t.Run("mail", func(t *testing.T) { obeyed(t, s) })
	t.Run("outages", func(t *testing.T) { outages(t, s) })
}

// pictures takes those of the README. `cp bin/screenshots/dashboard-*.png docs/images/` when the pages have changed.
func pictures(t *testing.T, s *site) {
	for mailbox, nets := range map[string]string{
		"accounting@example.com": "203.0.113.0/24", "carla@example.com": "203.0.113.0/24, 198.51.100.64/26, 2001:db8:40::/48", "office@example.com": "203.0.113.40/29",
		"warehouse@example.com": "198.51.100.7, 198.51.100.8",
	} {
		s.saveAs(t, marie, mailbox, nets)
	}
	v := s.visit(t, walker{"readme", dashboard.Traits{Person: browser.Person{Width: 1280, Height: 760}, Address: "203.0.113.20"}})
	v.must(v.Go("/domains/example.com"))
	v.logIn(marie)
	v.must(v.Await("heading", "example.com"), v.Picture("dashboard-domain"))
	v.must(v.Follow("link", "Edit alice@example.com"), v.Type("Allowed Nets", "203.0.113.7/24, 10.0.0.1, 2001:db8:40::/48"))
	v.save()
	v.must(v.AwaitFocus("group", "2 entries cannot be used…"), v.Picture("dashboard-errors"))
	v.must(v.Type("Allowed Nets", "203.0.113.0/24, 2001:db8:40::/48"))
	v.save()
	v.must(v.Read("Active on 1 of 1 server."), v.Picture("dashboard-saved"))
}

// obeyed is what it is all for: a list is saved in the browser, and as soon as it is said to be active, a real IMAP login from
// outside is refused and one from inside succeeds.
func obeyed(t *testing.T, s *site) {
	login := s.dovecot.LoginIMAP
	if got := attempt(t, login, from(outside, bob, right)); !got.OK {
		t.Fatalf("before: %s", got.Text)
	}
	v := s.visit(t, walker{name: "mail"})
	v.must(v.Go("/"))
	v.logIn(anna)
	v.must(v.Follow("link", "example.org…"), v.Follow("link", "Edit "+bob), v.Type("Allowed Nets", aliceNets))
	v.save()
	v.must(v.Read("Active on 1 of 1 server."))
	if got := attempt(t, login, from(outside, bob, right)); got.OK || got.Text != denial("imap", notAllowed(outside)) {
		t.Errorf("outside: %s", got.Text)
	}
	if got := attempt(t, login, from(inside, bob, right)); !got.OK {
		t.Errorf("inside: %s", got.Text)
	}
}
