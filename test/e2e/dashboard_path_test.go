package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/chromedp/chromedp/kb"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
)

// walker is somebody who uses the dashboard, with a name for tests and screenshots.
type walker struct {
	name   string
	traits dashboard.Traits
}

// walkers go the whole path, each with a mailbox of their own: mouse and keyboard, with and without script, both languages, both
// widths, both themes.
func walkers() []walker {
	all := tourists()
	all[1].traits.Keyboard, all[3].traits.Keyboard = true, true
	return append(all,
		walker{"narrow-light-de-plain", dashboard.Traits{Person: browser.Person{Width: 360, Height: 740, Language: "de-DE", NoScript: true}}},
		walker{"wide-dark-en-plain", dashboard.Traits{Person: browser.Person{Width: 1440, Height: 900, Dark: true, NoScript: true}, Keyboard: true}},
	)
}

// tourists have the mouse and script: all that axe-core must see.
func tourists() []walker {
	return []walker{
		{"wide-light-en", dashboard.Traits{Person: browser.Person{Width: 1440, Height: 900}}},
		{"wide-dark-de", dashboard.Traits{Person: browser.Person{Width: 1440, Height: 900, Dark: true, Language: "de-DE"}}},
		{"narrow-light-de", dashboard.Traits{Person: browser.Person{Width: 360, Height: 740, Language: "de-DE"}}},
		{"narrow-dark-en", dashboard.Traits{Person: browser.Person{Width: 360, Height: 740, Dark: true}}},
	}
}

// walkPath is what an administrator does: log in, domain, edit, list with mistakes, corrections, save, history, restore, lift.
func walkPath(t *testing.T, s *site) {
	for i, w := range walkers() {
		mailbox := fmt.Sprintf("path%d@example.org", i)
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			v := s.visit(t, w)
			v.must(v.Go("/"), v.Await("heading", v.say("Log in", "Anmelden")))
			v.look("01-login")
			v.logIn(anna)
			v.must(v.Await("heading", "Domains"))
			v.look("02-domains")
			v.must(v.Follow("link", "example.org…"), v.Await("heading", "example.org"))
			v.look("03-domain")
			edit := v.say("Edit "+mailbox, mailbox+" bearbeiten")
			v.must(v.Follow("link", edit), v.Await("heading", mailbox), v.AwaitFocus("textbox", v.field()))
			v.look("04-panel")

			const typed = "203.0.113.7/24, mail.example.com, 198.51.100.0-198.51.100.3; 2001:db8:a::/48"
			v.must(v.Type(v.field(), typed))
			v.save()
			problems := v.say("3 entries cannot be used. Nothing was saved.", "3 Einträge sind nicht verwendbar. Es wurde nichts gespeichert.")
			v.must(v.AwaitFocus("group", problems), v.AwaitValue(v.field(), typed))
			v.look("05-errors")
			use := v.say("Use ", "Stattdessen ")
			v.press("button", use+"203.0.113.0/24")
			v.must(v.AwaitValue(v.field(), strings.Replace(typed, "203.0.113.7/24", "203.0.113.0/24", 1)))
			v.press("button", use+"198.51.100.0/30")
			v.must(v.AwaitValue(v.field(), "203.0.113.0/24, mail.example.com, 198.51.100.0/30; 2001:db8:a::/48"))
			v.must(v.Await("group", v.say("1 entry cannot be used…", "1 Eintrag ist nicht verwendbar…")))
			v.must(v.Type(v.field(), "203.0.113.0/24, 198.51.100.0/30; 2001:db8:a::/48"))
			v.save()
			const first = "203.0.113.0/24, 198.51.100.0/30, 2001:db8:a::/48"
			active := v.say("Active on 1 of 1 server.", "Aktiv auf 1 von 1 Server.")
			v.must(v.Await("heading", v.say("Saved", "Gespeichert")), v.Read(active))
			v.look("06-saved")
			s.mustHave(t, mailbox, first, anna)

			const second = "198.51.100.77"
			v.must(v.Type(v.field(), second))
			v.save()
			v.must(v.Read(active))
			s.mustHave(t, mailbox, second, anna)
			v.must(v.Follow("link", v.say("History", "Verlauf")), v.Read("203.0.113.0/24", second, anna))
			v.look("07-history")
			v.must(v.Follow("link", v.say("Restore the list of …", "Die Liste vom …")), v.AwaitValue(v.field(), strings.ReplaceAll(first, ", ", ",\n")))
			v.look("08-restored")
			s.mustHave(t, mailbox, second, anna) // not yet
			v.save()
			v.must(v.Read(active))
			s.mustHave(t, mailbox, first, anna)

			v.must(v.Type(v.field(), ""))
			v.save()
			v.must(v.AwaitFocus("group", v.say("Lift the restriction of "+mailbox+"?", "Beschränkung von "+mailbox+" aufheben?")))
			v.look("09-lift")
			s.mustHave(t, mailbox, first, anna)
			v.must(v.Follow("button", v.say("Lift the restriction", "Beschränkung aufheben")))
			v.must(v.Await("heading", v.say("Restriction lifted", "Beschränkung aufgehoben")), v.Read(active))
			v.look("10-lifted")
			s.mustHave(t, mailbox, "", anna)

			if v.Keyboard && !v.NoScript {
				v.must(v.FollowKey(kb.Escape))
			} else {
				v.must(v.Follow("link", v.say("Close the panel", "Bereich schließen")))
			}
			v.must(v.AwaitFocus("link", edit))
			v.must(v.Follow("button", v.say("Log out", "Abmelden")), v.Await("heading", v.say("Log in", "Anmelden")))
		})
	}
}

// press presses a button that answers in place, or without script with another page.
func (v *visitor) press(role, name string) {
	v.t.Helper()
	if v.NoScript {
		v.must(v.Follow(role, name))
		return
	}
	v.must(v.Press(role, name))
}

// mustHave checks what is saved and who saved it.
func (s *site) mustHave(t *testing.T, mailbox, nets, by string) {
	t.Helper()
	if got, author := s.saved(t, mailbox); got != nets || author != by {
		t.Errorf("%s has %q by %s, want %q by %s", mailbox, got, author, nets, by)
	}
}
