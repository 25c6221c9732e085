package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/test/stack"
)

// longList is what makes narrow columns burst.
func longList() string {
	nets := []string{"2001:db8:85a3:8d3:1319:8a2e:370:7348", "2001:db8:1234:5678:9abc:def0:1234:0/112"}
	for i := range 60 {
		nets = append(nets, fmt.Sprintf("198.51.100.%d", 2*i))
	}
	return strings.Join(nets, ", ")
}

// tour is every screen beside the path.
func tour(t *testing.T, s *site) {
	s.saveAs(t, bert, "carol@example.org", longList())
	for i, w := range tourists() {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			v := s.visit(t, w)
			v.seeLogin()
			v.seeLists()
			v.seeLongList()
			v.addAddress(fmt.Sprintf("dave%d@example.org", i))
			v.checkAddress()
			v.meetConflict(fmt.Sprintf("erin%d@example.org", i), i%2 == 0)
			v.loseSession(fmt.Sprintf("jürgen%d@example.org", i))
			v.must(v.EndSession())
			v.audit()
		})
	}
}

func (v *visitor) seeLogin() {
	v.t.Helper()
	v.must(
		v.Go("/domains/example.org?show=restricted"), // to where the login leads
		v.Type(v.say("User name", "Benutzername"), anna), v.Type(v.say("Password", "Passwort"), "wrong"),
		v.Follow("button", v.say("Log in", "Anmelden")), v.Read(v.say("User name or password is wrong.", "Benutzername oder Passwort ist falsch.")),
	)
	v.look("11-login-refused")
	v.logIn(anna)
	v.must(v.Await("heading", "example.org"))
	if path, err := v.Path(); err != nil || path != "/domains/example.org?show=restricted" {
		v.t.Errorf("the login leads to %s, %v", path, err)
	}
	v.look("12-domain-restricted")
}

func (v *visitor) seeLists() {
	v.t.Helper()
	v.must(v.Go("/domains/empty.example"), v.Await("heading", v.say("No mailboxes yet", "Noch keine Postfächer")))
	v.look("13-domain-empty")
	v.must(v.Go("/domains/crowd.example"), v.Read(v.say("50,000", "50.000"), "person.00099"))
	v.must(v.Follow("link", v.say("Next page", "Nächste Seite")), v.Read("person.00100"))
	v.look("14-domain-crowd")
	v.must(v.Type(v.say("Search mailboxes", "Postfächer suchen"), "49999@crowd.example"), v.Follow("button", v.say("Search", "Suchen")))
	v.must(v.Await("link", v.say("Edit person.49999@crowd.example", "person.49999@crowd.example bearbeiten")))
	v.must(v.Type(v.say("Search mailboxes", "Postfächer suchen"), "zzz"), v.Follow("button", v.say("Search", "Suchen")))
	v.must(v.Await("heading", v.say("Nothing found", "Nichts gefunden")))
	v.look("15-domain-nothing")
	v.must(v.Go("/domains/example.net"), v.Await("heading", v.say("Not found", "Nicht gefunden")))
	v.look("16-missing")
}

func (v *visitor) seeLongList() {
	v.t.Helper()
	v.must(v.Go("/domains/example.org/mailboxes/carol@example.org"), v.AwaitFocus("textbox", v.field()))
	v.look("17-panel-long")
	v.must(v.Follow("link", v.say("History", "Verlauf")), v.Read("2001:db8:1234:5678:9abc:def0:1234:0/112"))
	v.look("18-history-long")
	v.must(v.Go("/domains/example.org/mailboxes/office@example.org/history"), v.Await("heading", v.say("Never changed", "Nie geändert")))
	v.look("19-history-empty")
	v.must(v.Go("/domains/example.org/mailboxes/accounts.payable.international@example.org"), v.AwaitFocus("textbox", v.field()))
	v.look("20-panel-long-name")
}

func (v *visitor) addAddress(mailbox string) {
	v.t.Helper()
	const listed = "203.0.113.9"
	v.must(v.Go("/domains/example.org/mailboxes/"+mailbox), v.Type(v.field(), listed))
	add := v.say("Add "+inside+" to the list", inside+" zur Liste hinzufügen")
	v.must(v.Press("button", add), v.AwaitValue(v.field(), listed+",\n"+inside), v.Read(v.say("in the list", "in der Liste")))
	if v.Has("button", add) {
		v.t.Error("an address that is in the list can be added once more")
	}
	v.look("21-address-added")
}

func (v *visitor) checkAddress() {
	v.t.Helper()
	address, check := v.say("Address", "Adresse"), v.say("Check", "Prüfen")
	v.must(v.Type(address, outside), v.Press("button", check), v.Await("heading", v.say("Not allowed", "Nicht erlaubt")))
	v.look("22-check-denied")
	v.must(v.Type(address, inside), v.Press("button", check), v.Await("heading", v.say("Allowed", "Erlaubt")), v.Read(inside+"."))
	v.look("23-check-allowed")
	v.must(v.Press("radio", v.say("with the saved list", "mit der gespeicherten Liste")), v.Type(address, outside), v.Press("button", check))
	v.must(v.Read(v.say("The mailbox has no list", "Das Postfach hat keine Liste")))
	v.must(v.Type(address, "home"), v.Press("button", check), v.Read(v.say("home is not an IP address.", "home ist keine IP-Adresse.")))
	v.look("24-check-bad")
}

func (v *visitor) meetConflict(mailbox string, insist bool) {
	v.t.Helper()
	const theirs, mine = "198.51.100.1", "203.0.113.100"
	v.must(v.Go("/domains/example.org/mailboxes/"+mailbox), v.Type(v.field(), mine+", 203.0.113.99"))
	v.site.saveAs(v.t, bert, mailbox, theirs+", 203.0.113.99")
	v.save()
	v.must(v.AwaitFocus("group", v.say(bert+" saved another list on …", bert+" hat am …")), v.AwaitValue(v.field(), mine+", 203.0.113.99"))
	v.must(v.Read(theirs, mine))
	v.look("25-conflict")
	v.site.mustHave(v.t, mailbox, theirs+", 203.0.113.99", bert)
	if insist {
		v.must(v.Follow("button", v.say("Save mine instead", "Meine speichern")), v.Await("heading", v.say("Saved", "Gespeichert")))
		v.site.mustHave(v.t, mailbox, mine+", 203.0.113.99", anna)
		return
	}
	v.must(v.Follow("button", v.say("Take theirs", "Die andere übernehmen")), v.AwaitValue(v.field(), theirs+",\n203.0.113.99"))
	v.site.mustHave(v.t, mailbox, theirs+", 203.0.113.99", bert)
}

func (v *visitor) loseSession(mailbox string) {
	v.t.Helper()
	const net = "203.0.113.200"
	v.must(v.Go("/domains/example.org/mailboxes/"+mailbox), v.Type(v.field(), net), v.EndSession())
	v.save()
	v.must(v.Await("heading", v.say("Your session has ended", "Ihre Sitzung ist beendet")), v.Read(net, mailbox))
	v.look("26-expired")
	v.logIn(anna)
	v.must(v.AwaitValue(v.field(), net), v.Await("heading", v.say("You are logged in again", "Sie sind wieder angemeldet")))
	v.look("27-resumed")
	if nets, _ := v.site.saved(v.t, mailbox); nets == net {
		v.t.Error("a login saved a list")
	}
	v.save()
	v.must(v.Await("heading", v.say("Saved", "Gespeichert")))
	v.site.mustHave(v.t, mailbox, net, anna)
}

func (v *visitor) audit() {
	v.t.Helper()
	const mailbox = "carol@example.org"
	v.must(v.Go("/"))
	v.logIn(otto)
	v.must(v.Follow("link", "example.org…"))
	v.must(v.Follow("link", v.say("View "+mailbox, mailbox+" ansehen")), v.Read("198.51.100.118"))
	v.look("28-auditor")
	if v.Has("textbox", v.field()) || v.Has("button", v.say("Save", "Speichern")) {
		v.t.Error("an auditor is offered to save")
	}
	v.must(v.Type(v.say("Address", "Adresse"), outside), v.Press("button", v.say("Check", "Prüfen")), v.Await("heading", v.say("Not allowed", "Nicht erlaubt")))
	v.must(v.EndSession(), v.Go("/"))
	v.logIn(hundred)
	v.must(v.Await("heading", v.say("No domains yet", "Noch keine Domains")))
	v.look("29-domains-empty")
	v.must(v.EndSession(), v.Go("/"))
	v.logIn(hugo)
	v.must(v.Follow("link", v.say("Next page", "Nächste Seite")), v.Await("link", v.say("First page", "Erste Seite")))
	v.look("35-domains-many")
	v.must(v.Type(v.say("Search domains", "Domains suchen"), "2999"), v.Follow("button", v.say("Search", "Suchen")))
	v.must(v.Follow("link", "hosted2999.example…"), v.Await("heading", "hosted2999.example"))
}

// outages is what the screens show when a server stands still or the policy service is away.
func outages(t *testing.T, s *site) {
	var all []*visitor
	for _, w := range tourists() {
		v := s.visit(t, w)
		v.must(v.Go("/domains/example.org/mailboxes/office@example.org"))
		v.logIn(anna)
		v.must(v.AwaitFocus("textbox", v.field()))
		all = append(all, v)
	}
	if err := s.sidecar.Freeze(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	for i, v := range all {
		v.must(v.Go("/domains/example.org/mailboxes/office@example.org"), v.Type(v.field(), fmt.Sprintf("192.0.2.%d", i)))
		v.save()
		v.must(v.Read(v.say("Active on 0 of 1 server. Waiting for:", "Aktiv auf 0 von 1 Server. Es fehlt noch:"), "sidecar"))
		v.look("30-waiting")
	}
	if err := s.sidecar.Thaw(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	last := all[len(all)-1]
	last.must(last.Read(last.say("Active on 1 of 1 server.", "Aktiv auf 1 von 1 Server."))) // by itself
	if err := s.policy.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		v.must(v.Type(v.field(), "192.0.2.200"))
		v.save()
		v.must(v.AwaitValue(v.field(), "192.0.2.200"), v.Await("heading", v.say("Not saved", "Nicht gespeichert")))
		v.look("31-unanswered")
		v.must(v.Go("/domains/example.org"), v.Await("heading", v.say("The policy service does not answer", "Der Policy-Dienst antwortet nicht")))
		v.look("32-down")
	}
	if err := s.policy.Restart(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	v := all[0] // the dashboard connects again within a second or two
	again := v.say("Try again", "Noch einmal versuchen")
	v.must(stack.Await(within(t, startWithin), func(context.Context) error {
		if v.Has("link", again) {
			return errors.Join(v.Follow("link", again), errors.New("still away"))
		}
		return v.Await("heading", "example.org")
	}))
}
