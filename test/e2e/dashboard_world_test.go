package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
	"github.com/allowednets/allowednets/test/stack"
)

// Who uses the dashboard, all with the same password.
const (
	anna    = "anna@example.org"    // administrator of example.org, empty.example and crowd.example
	bert    = "bert@example.org"    // the same
	otto    = "otto@example.org"    // auditor of example.org
	nina    = "nina@example.net"    // administrator of example.net alone
	nobody  = "auditor@example.net" // auditor of example.net alone
	hundred = "hundred@example.org" // administrator of no domain that exists
	marie   = "marie@example.com"   // administrator of example.com
	hugo    = "hugo@example.org"    // administrator of everything

	dashboardPassword = "correct horse battery"
	crowd             = 50_000 // mailboxes of crowd.example
	hosted            = 3_000  // domains of nobody but hugo
)

// site is everything running, with a dashboard.
type site struct {
	*world
	dashboard *stack.Dashboard
	browser   *browser.Browser // nil without
	axe       dashboard.Axe
}

// newSite starts everything.
func newSite(t *testing.T, cfg settings) *site {
	t.Helper()
	s := &site{world: newWorld(t, cfg)}
	directory, users := writePeople(t, s.Stack)
	var err error
	s.dashboard, err = s.StartDashboard(stack.DashboardConfig{
		Policy: s.policy.Address, Directory: directory, Users: users, AdditionalArgs: []string{"--trusted-proxies", "127.0.0.1/32"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.dashboard.AwaitReady(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	return s
}

// needBrowser starts Chromium, or skips the test.
func (s *site) needBrowser(t *testing.T) {
	t.Helper()
	axe, err := dashboard.LoadAxe()
	if err = errors.Join(browser.Missing(), err); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED in a real browser: %v", err)
	}
	s.axe = axe
	if s.browser, err = browser.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.browser.Close(); err != nil {
			t.Error(err)
		}
	})
}

// writePeople writes the dashboard's files.
func writePeople(t *testing.T, s *stack.Stack) (directory, users string) {
	t.Helper()
	var b strings.Builder
	b.WriteString("domains:\n  empty.example: []\n  example.org: [alice, bob, sales, carol, dave, erin, office, jürgen, typing, zone, accounts.payable.international")
	for i := range 6 {
		fmt.Fprintf(&b, ", path%[1]d, dave%[1]d, erin%[1]d, jürgen%[1]d", i)
	}
	b.WriteString("]\n  example.com: [accounting, alice, ben, carla, info, jobs, office, reception, support, warehouse]\n  example.net: [nora]\n  crowd.example:\n")
	for i := range crowd {
		fmt.Fprintf(&b, "    - person.%05d\n", i)
	}
	for i := range hosted {
		fmt.Fprintf(&b, "  hosted%04d.example: [info, office]\n", i)
	}
	hash := exec.CommandContext(within(t, startWithin), s.Bin("allowednets-dashboard"), "hash-password")
	hash.Stdin = strings.NewReader(dashboardPassword + "\n")
	out, err := hash.Output()
	if err != nil {
		t.Fatal(err)
	}
	var u strings.Builder
	u.WriteString("users:\n")
	for _, user := range []struct{ name, rights string }{
		{anna, "administrator: [example.org, empty.example, crowd.example]"}, {bert, "administrator: [example.org, empty.example, crowd.example]"},
		{otto, "auditor: [example.org]"}, {nina, "administrator: [example.net]"}, {nobody, "auditor: [example.net]"},
		{hundred, "administrator: [none.example]"}, {marie, "administrator: [example.com]"},
		{hugo, "administrator: ['*']"},
	} {
		fmt.Fprintf(&u, "  - name: %s\n    password: %s\n    %s\n", user.name, strings.TrimSpace(string(out)), user.rights)
	}
	directory, users = s.Path("directory.yaml"), s.Path("users.yaml")
	if err := errors.Join(os.WriteFile(directory, []byte(b.String()), 0o600), os.WriteFile(users, []byte(u.String()), 0o600)); err != nil {
		t.Fatal(err)
	}
	return filepath.Clean(directory), filepath.Clean(users)
}

// saveAs saves a list in somebody's name; no nets lift the restriction.
func (s *site) saveAs(t *testing.T, person, mailbox, nets string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	actor := &policyv1.Actor{Id: person, Address: inside}
	var err error
	if nets == "" {
		_, err = s.lists.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: mailbox, Actor: actor})
	} else {
		_, err = s.lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
			Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: nets}, Actor: actor,
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// saved returns what the policy service has for a mailbox, in one line, and who saved it.
func (s *site) saved(t *testing.T, mailbox string) (nets, by string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := s.lists.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: mailbox})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, n := range resp.GetAllowedNets().GetNets() {
		all = append(all, n.GetNet())
	}
	return strings.Join(all, ", "), resp.GetAllowedNets().GetUpdatedBy()
}

// visitor is somebody at the dashboard for whom whatever goes wrong fails the test.
type visitor struct {
	*dashboard.Person

	t    *testing.T
	site *site
	name string // of the screenshots
}

// visit opens a browser for somebody. It is closed when the test ends.
func (s *site) visit(t *testing.T, w walker) *visitor {
	t.Helper()
	traits := w.traits
	if traits.Address == "" {
		traits.Address = inside
	}
	p, leave, err := dashboard.Visit(s.browser, s.dashboard.URL, traits)
	if err != nil {
		t.Fatal(err)
	}
	v := &visitor{Person: p, t: t, site: s, name: w.name}
	t.Cleanup(func() {
		if t.Failed() {
			v.must(p.Screenshot("failed-" + w.name))
		}
		leave()
	})
	return v
}

func (v *visitor) must(errs ...error) {
	v.t.Helper()
	for _, err := range errs {
		if err != nil {
			v.t.Fatal(err)
		}
	}
}

// say returns the text in the visitor's language.
func (v *visitor) say(en, de string) string {
	if strings.HasPrefix(v.Language, "de") {
		return de
	}
	return en
}

// look keeps a screenshot of a screen and fails the test if something is wrong with it.
func (v *visitor) look(screen string) {
	v.t.Helper()
	v.must(v.Screenshot(screen + "-" + v.name))
	wrong, err := v.Look(v.site.axe)
	v.must(err)
	for _, w := range wrong {
		v.t.Errorf("%s, %s: %s", screen, v.name, w)
	}
}

// logIn logs in from wherever the login is shown.
func (v *visitor) logIn(user string) {
	v.t.Helper()
	v.must(
		v.Type(v.say("User name", "Benutzername"), user),
		v.Type(v.say("Password", "Passwort"), dashboardPassword),
		v.Follow("button", v.say("Log in", "Anmelden")),
	)
}

// save presses Save and waits for the next page.
func (v *visitor) save() {
	v.t.Helper()
	v.must(v.Follow("button", v.say("Save", "Speichern")))
}

// field is the name of the field of the list.
func (v *visitor) field() string { return v.say("Allowed Nets", "Erlaubte Netze") }
