package e2e

import "testing"

// TestDashboard uses the dashboard in a real browser. What disturbs the others comes last.
func TestDashboard(t *testing.T) {
	s := newSite(t, settings{})
	s.needBrowser(t)
	t.Run("path", func(t *testing.T) { walkPath(t, s) })
	t.Run("tour", func(t *testing.T) { tour(t, s) })
	t.Run("mail", func(t *testing.T) { obeyed(t, s) })
	t.Run("outages", func(t *testing.T) { outages(t, s) })
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
