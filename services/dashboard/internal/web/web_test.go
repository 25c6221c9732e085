package web

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/net/html"
	"google.golang.org/protobuf/types/known/timestamppb"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

const (
	alice = "alice@example.org"
	bob   = "bob@example.org"
)

// TestEveryRouteForEveryRole is the proof that nobody sees or changes a domain that is not theirs: what is not a person's looks
// like what does not exist.
func TestEveryRouteForEveryRole(t *testing.T) {
	w := newWorld(t)
	w.policy.put(bob, "carol", "8.8.8.8")
	panel, save := panelOf(bob), url.Values{"action": {"save"}, "text": {"9.9.9.9"}, "etag": {"1-1"}, "request_id": {"6f1c0f0e-0000-4000-8000-000000000001"}}
	check := url.Values{"action": {"check"}, "client": {"8.8.8.8"}, "service": {"SERVICE_IMAP"}}
	lift := url.Values{"action": {"lift"}, "text": {""}, "etag": {"1-2"}, "request_id": {"6f1c0f0e-0000-4000-8000-000000000002"}}
	people := []string{nobody, owner, auditor, stranger, operator, newcomer}
	tests := []struct {
		pattern, path string
		form          url.Values
		want          [6]int // in the order of people; 1 stands for the login
	}{
		{"GET /{$}", "/", nil, [6]int{1, 200, 200, 200, 200, 200}},
		{"GET /login", "/login", nil, [6]int{200, 200, 200, 200, 200, 200}},
		{"POST /login", "/login", url.Values{"user": {"x"}, "password": {"y"}}, [6]int{401, 401, 401, 401, 401, 401}},
		{"GET /login/oidc", "/login/oidc", nil, [6]int{404, 404, 404, 404, 404, 404}},
		{"GET /login/oidc/callback", "/login/oidc/callback", nil, [6]int{404, 404, 404, 404, 404, 404}},
		{"POST /language", "/language", url.Values{"language": {"en"}, "next": {"/domains"}}, [6]int{1, 200, 200, 200, 200, 200}},
		{"GET /domains", "/domains", nil, [6]int{1, 200, 200, 200, 200, 200}},
		{"GET /domains/{domain}", "/domains/example.org", nil, [6]int{1, 200, 200, 404, 200, 404}},
		{"GET /domains/{domain}", "/domains/EXAMPLE.org.", nil, [6]int{1, 200, 200, 404, 200, 404}},
		{"GET /domains/{domain}", "/domains/nowhere.example", nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"GET /domains/{domain}", "/domains/*", nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}", panel, nil, [6]int{1, 200, 200, 404, 200, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}", "/domains/example.net/mailboxes/bob@example.org", nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}", "/domains/example.org/mailboxes/zoe@example.net", nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}", panelOf("ghost@example.org"), nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}", panel, url.Values{"action": {"validate"}, "text": {"9.9.9.9"}}, [6]int{401, 200, 403, 404, 200, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}", "/domains/example.net/mailboxes/bob@example.org", save, [6]int{401, 404, 404, 404, 404, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}", panelOf("ghost@example.org"), save, [6]int{401, 404, 403, 404, 404, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}/check", panel + "/check", check, [6]int{1, 200, 200, 404, 200, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}/history", panel + "/history", nil, [6]int{1, 200, 200, 404, 200, 404}},
		{"GET /domains/{domain}/mailboxes/{mailbox}/progress", panel + "/progress?revision=1-1", nil, [6]int{1, 200, 200, 404, 200, 404}},
		{"/", "/nothing", nil, [6]int{1, 404, 404, 404, 404, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}", panel, save, [6]int{401, 200, 403, 404, 200, 404}},
		{"POST /domains/{domain}/mailboxes/{mailbox}", panel, lift, [6]int{401, 200, 403, 404, 200, 404}},
		{"POST /logout", "/logout", url.Values{}, [6]int{1, 1, 1, 1, 1, 1}},
	}
	var patterns []string
	(&site{}).routes(func(pattern string, _ http.Handler) { patterns = append(patterns, pattern) })
	for _, pattern := range patterns {
		if !slices.ContainsFunc(tests, func(tt struct {
			pattern, path string
			form          url.Values
			want          [6]int
		}) bool {
			return tt.pattern == pattern
		}) {
			t.Errorf("no test of %s", pattern)
		}
	}
	browsers := make([]*browser, len(people))
	for i, person := range people {
		browsers[i] = w.browser(person)
	}
	for _, tt := range tests {
		for i, b := range browsers {
			before := w.policy.saves
			method := http.MethodGet
			if tt.form != nil {
				method = http.MethodPost
			}
			b.send(method, tt.path, tt.form)
			got := b.seen.status
			if strings.HasPrefix(b.seen.path, "/login") && got == 200 && tt.pattern != "GET /login" {
				got = 1
			}
			if got != tt.want[i] {
				t.Errorf("%s %s of %q: %d, want %d\n%.300s", tt.pattern, tt.path, people[i], got, tt.want[i], b.seen.text())
			}
			if got != 200 && w.policy.saves != before {
				t.Errorf("%s %s of %q was answered %d, and changed something", tt.pattern, tt.path, people[i], got)
			}
		}
	}
	if w.policy.saves != 3 { // at the beginning, by the owner, and the owner's lift; the operator found nothing left to do
		t.Errorf("%d saves", w.policy.saves)
	}
}

func TestDomains(t *testing.T) {
	w := newWorld(t)
	w.policy.put(bob, "carol", "8.8.8.8")
	w.policy.put("gone@example.org", "carol", "8.8.8.8")
	b := w.browser(owner)
	b.seen.wants(200, "example.org 2 restricted 3 unrestricted", "empty.example no mailboxes yet")
	b.seen.lacks("example.net")
	b.get(b.seen.link("")) // nothing
	b.get("/domains/example.org")
	b.seen.wants(200, "All 5", "Restricted 2", "Unrestricted 3", "gone@example.org not in the directory 1 network", "alice@example.org Every address")
	b.get("/domains/example.org?show=restricted").wants(200, "bob@example.org 1 network", "gone@example.org not in the directory 1 network")
	b.get("/domains/empty.example").wants(200, "No mailboxes yet")
	w.browser(newcomer).seen.wants(200, "No domains yet", "Ask your provider")
	b.language = "de"
	b.get("/domains/example.org").wants(200, "Alle 5", "Jeder Adresse")
	b.get("/domains/example.org?show=restricted&q=BO").wants(200, "1 Netz")
	if diff := cmp.Diff([]string{bob}, b.seen.mailboxes()); diff != "" {
		t.Error(diff)
	}
	b.get("/domains/example.org?q=nobody").wants(200, "Nichts gefunden")
}

// TestManyDomains: the list of domains has pages and a search, and counts no more than it shows.
func TestManyDomains(t *testing.T) {
	listing, names := "domains:\n  bücher.example: [eva]\n", []string{"xn--bcher-kva.example"}
	for i := range 250 {
		names = append(names, fmt.Sprintf("d%03d.example", i))
		listing += "  " + names[i+1] + ": [info]\n"
	}
	slices.Sort(names)
	w := newWorldWith(t, listing)
	b := w.browser(operator)
	for search, parts := range map[string]string{"": "", "D01": "d01", " BÜcher.Example": "xn--bcher-kva.example", "xn--": "xn--", "none": "none"} {
		want := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !strings.Contains(name, parts) })
		var got []string
		for next := "/domains?q=" + url.QueryEscape(search); next != ""; next = b.seen.link("Next page") {
			before := w.policy.listed
			b.get(next).wants(200)
			shown := b.seen.domains()
			if asked := w.policy.listed - before; asked != len(shown) || asked > domainsPerPage {
				t.Errorf("%s: the policy service was asked %d times about %d domains", next, asked, len(shown))
			}
			if got = append(got, shown...); len(got) > len(names) {
				t.Fatalf("%q has no end", search)
			}
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%q (-want +got):\n%s", search, diff)
		}
	}
	b.get(b.get("/domains?after=d150.example").link("First page")).wants(200, "d000.example to d099.example")
	b.submit(b.seen.form("/domains"), "", url.Values{"q": {"<b>"}}).wants(200, "Nothing found", "None of your domains matches")
	b.get(b.seen.link("Show all domains")).wants(200, "d000.example")
	if b := newWorld(t).browser(operator); b.seen.form("/domains") != nil || b.seen.link("Next page") != "" {
		t.Error("a few domains need no search and no pages")
	}
	stranger := w.browser(nobody)
	stranger.get("/domains?q=D01")
	stranger.submit(stranger.seen.form("/login"), "", url.Values{"user": {operator}, "password": {password}}).wants(200, "d010.example")
	if stranger.seen.path != "/domains?q=D01" {
		t.Errorf("the login leads to %s", stranger.seen.path)
	}
}

// TestPages walks through all pages of a domain for each filter and search, and compares with a model.
func TestPages(t *testing.T) {
	var listing strings.Builder
	type box struct{ listed, restricted bool }
	model := make(map[string]box)
	listing.WriteString("domains:\n  example.org:\n")
	var restricted []string
	for i := range 1350 {
		name := fmt.Sprintf("u%04d.%c", i, 'a'+i%7)
		state := box{listed: i%11 != 0, restricted: i%11 == 0 || i%3 == 0 || i > 300 && i < 900}
		if state.listed {
			listing.WriteString("    - " + name + "\n")
		}
		if state.restricted {
			restricted = append(restricted, name+"@example.org")
		}
		model[name+"@example.org"] = state
	}
	w := newWorldWith(t, listing.String())
	for _, name := range restricted {
		w.policy.put(name, "carol", "8.8.8.8")
	}
	b := w.browser(owner)
	for _, query := range []string{"", "show=restricted", "show=unrestricted", "q=.C", "q=u01&show=restricted", "q=5.D@EXAMPLE.org&show=unrestricted", "q=5.d%40example.org&show=restricted", "q=5.d%40example.net", "q=%3Cb%3E"} {
		q, _ := url.ParseQuery(query)
		search := strings.ToLower(q.Get("q"))
		var want, got []string
		for name, state := range model {
			local, _, _ := strings.Cut(name, "@")
			if strings.Contains(search, "@") {
				local = name
			}
			if strings.Contains(local, search) && (q.Get("show") == "" || state.restricted == (q.Get("show") == "restricted")) {
				want = append(want, name)
			}
		}
		slices.Sort(want)
		pages := 0
		for next := "/domains/example.org?" + query; next != ""; next = b.seen.link("Next page") {
			b.get(next).wants(200)
			got = append(got, b.seen.mailboxes()...)
			if pages++; pages > 20 {
				t.Fatalf("%q has no end", query)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", query, diff)
		}
	}
}

// TestSave is the main path without script: the list of mailboxes, the panel, save, active; and the way back.
func TestSave(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(b.seen.link("example.org 0 restricted 4 unrestricted"))
	b.get("/domains/example.org?show=unrestricted&q=a")
	b.get(b.seen.link("Edit " + alice))
	b.seen.wants(200, alice, "Can be reached from every address.", "Your address now:")
	if got := b.seen.focused(); got != "nets" {
		t.Errorf("the focus is in %q", got)
	}
	form := b.seen.id("edit")
	b.submit(form, "save", url.Values{"text": {"8.8.8.0/24,\r\n 2A00:1450::1"}})
	b.seen.wants(200, "Saved", "Active on 2 of 2 servers.", "Can be reached from 2 networks only. Saved by anna,")
	if got := b.seen.field(); got != "8.8.8.0/24,\n2a00:1450::1" {
		t.Errorf("the field holds %q", got)
	}
	if c := w.policy.changes[alice][0]; c.GetActor().GetId() != owner || c.GetActor().GetAddress() != "127.0.0.1" {
		t.Errorf("the audit trail says %v", c.GetActor())
	}
	if back := b.seen.link("Cancel"); !strings.HasPrefix(back, "/domains/example.org?q=a&show=unrestricted#m") || back != b.seen.link("Close the panel") {
		t.Errorf("the way back is %s", back)
	}
	b.submit(form, "save", url.Values{"text": {"8.8.8.0/24, 2a00:1450::1"}}).wants(200, "Nothing to change", "Active on 2 of 2 servers.")
	if w.policy.saves != 1 {
		t.Errorf("pressed twice, it was saved %d times", w.policy.saves)
	}
	b.get("/domains/example.org").wants(200, "alice@example.org 2 networks")
	if b.seen.id(anchor(mailbox(t, alice))) == nil {
		t.Error("the row has no id to come back to")
	}
	// A link to "saved" does not make it true.
	w.policy.put(alice, "carol", "1.1.1.1")
	b.get(panelOf(alice)+"?saved=1-1").wants(200, "Saved, and changed again since")
}

func TestProblems(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice))
	const text = "8.8.8.7/24, 1.1.1.1,\n10.0.0.1 mail.example.com; 8.8.4.1 - 8.8.4.3"
	b.edit(text, "save").wants(422, "4 entries cannot be used. Nothing was saved.", "Entry 1", "Entry 3", "Entry 4", "Entry 5",
		`"10.0.0.1" lies in 10.0.0.0/8 (private use)`, "Use 8.8.8.0/24", "Use 8.8.4.1, 8.8.4.2/31")
	if b.seen.field() != text || b.seen.focused() != "errors" || attr(b.seen.id("nets"), "aria-invalid") != "true" {
		t.Errorf("text %q, focus in %s", b.seen.field(), b.seen.focused())
	}
	b.language = "de"
	b.edit("=", "validate").wants(200, "4 Einträge sind nicht verwendbar.", "„8.8.8.7/24“ ist eine Adresse innerhalb eines Netzes; schreiben Sie",
		"„10.0.0.1“ reicht in ein privates Netz, aus dem kein Client kommt; tragen Sie die öffentliche Adresse ein", "Im Weg ist der Block 10.0.0.0/8.",
		"„mail.example.com“ ist ein Name", "Stattdessen 8.8.8.0/24")
	b.language = "en"
	fixes, older := b.seen.fixes(), b.seen.id("edit")
	if len(fixes) != 3 {
		t.Fatalf("%q", fixes)
	}
	b.edit("=", fixes[1]).wants(200, "3 entries cannot be used.")
	b.edit("=", b.seen.fixes()[0])
	if got, want := b.seen.field(), "8.8.8.0/24, 1.1.1.1,\n10.0.0.1 mail.example.com; 8.8.4.1, 8.8.4.2/31"; got != want {
		t.Errorf("the field holds %q, want %q", got, want)
	}
	// A button of an older page still finds its entry, or does nothing.
	b.submit(older, fixes[0], url.Values{"text": {"1.1.1.1, 8.8.8.7/24"}})
	if got := b.seen.field(); got != "1.1.1.1, 8.8.8.7" {
		t.Errorf("the field holds %q", got)
	}
	b.submit(older, fixes[0], url.Values{"text": {"1.1.1.1"}})
	if got := b.seen.field(); got != "1.1.1.1" {
		t.Errorf("the field holds %q", got)
	}
	if w.policy.saves != 0 {
		t.Error("something was saved")
	}
	b.edit("=", "save").wants(200, "Saved")
}

// TestReplace: for entries as the rules report them, replacing each with its suggestion leaves nothing to report.
func TestReplace(t *testing.T) {
	f := newFakePolicy()
	v := viewIn(t, "en")
	for _, text := range []string{
		"8.8.8.7/24", " ,8.8.8.7/24 8.8.8.7/24", "\u200b8.8.8.8:443\ufeff;8.8.8.*", "8.8.8.1 – 8.8.8.9,8.8.8.0 255.255.255.0,[2a00:1450::1]", "8.8.8.0 /24",
		"8.8.8.8:1 8.8.8.8:1 8.8.8.8:1\t\n;;8.8.8.8/",
	} {
		for range 10 {
			_, err := f.list(text)
			problems := v.problems(err)
			if len(problems) == 0 {
				break
			}
			last := problems[len(problems)-1]
			if len(last.Fixes) == 0 {
				t.Fatalf("%q: %v", text, last)
			}
			_, query, _ := strings.Cut(last.Fixes[0].Action, "?")
			text = applyFix(text, query)
		}
		if _, err := f.list(text); err != nil {
			t.Errorf("what is left is %q: %v", text, err)
		}
	}
}

func TestLift(t *testing.T) {
	w := newWorld(t)
	w.policy.put(alice, "carol", "8.8.8.8")
	b := w.browser(owner)
	b.get(panelOf(alice))
	b.edit(" \n,", "save").wants(200, "Lift the restriction of alice@example.org?", "Nothing was saved yet")
	if w.policy.nets(alice) == "" {
		t.Fatal("the restriction was lifted without a question")
	}
	asked := b.seen.id("edit")
	b.submit(asked, "theirs", nil).wants(200, "Can be reached from 1 network only.")
	if b.seen.field() != "8.8.8.8" {
		t.Errorf("the field holds %q", b.seen.field())
	}
	b.submit(asked, "lift", url.Values{"text": {"9.9.9.9"}}).wants(200, "Saved") // typed since: that is no lifting
	b.edit("", "save")
	b.edit("=", "lift").wants(200, "Restriction lifted", "Active on 2 of 2 servers.", "Can be reached from every address.")
	if c := w.policy.changes[alice]; c[len(c)-1].GetKind() != policyv1.ChangeKind_CHANGE_KIND_CLEAR || c[len(c)-1].GetActor().GetId() != owner {
		t.Errorf("%v", c[len(c)-1])
	}
	b.edit("", "save").wants(200, "Nothing to change", "The mailbox has no list.")
}

func TestConflict(t *testing.T) {
	for _, choice := range []struct{ button, want string }{{"save", "8.8.8.0/24, 1.1.1.1"}, {"theirs", "8.8.8.0/24, 9.9.9.9"}} {
		w := newWorld(t)
		w.policy.put(alice, "carol", "8.8.8.0/24")
		b := w.browser(owner)
		b.get(panelOf(alice))
		w.policy.put(alice, "dave", "8.8.8.0/24, 9.9.9.9")
		b.edit("8.8.8.0/24, 1.1.1.1", "save").wants(409, "dave saved another list on 3 Nov 2026, 12:02 UTC , while you were editing",
			"In force now 8.8.8.0/24 removed: 9.9.9.9", "Yours 8.8.8.0/24 added: 1.1.1.1")
		if b.seen.field() != "8.8.8.0/24, 1.1.1.1" || b.seen.focused() != "notice warn" {
			t.Errorf("text %q, focus in %q", b.seen.field(), b.seen.focused())
		}
		b.edit("=", choice.button).wants(200)
		if got := strings.ReplaceAll(b.seen.field(), "\n", " "); got != choice.want || w.policy.nets(alice) != choice.want {
			t.Errorf("%s: the field holds %q, saved is %q", choice.button, got, w.policy.nets(alice))
		}
	}
}

// TestLiftConflict: a confirmation is for the list that was seen.
func TestLiftConflict(t *testing.T) {
	w := newWorld(t)
	w.policy.put(alice, "carol", "8.8.8.0/24")
	b := w.browser(owner)
	b.language = "de"
	b.get(panelOf(alice))
	b.edit("", "save").wants(200, "Beschränkung von alice@example.org aufheben?")
	w.policy.put(alice, "dave", "9.9.9.9")
	b.edit("=", "lift").wants(409, "dave hat am 03.11.2026, 12:02 UTC eine andere Liste gespeichert", "Ihre Fassung Keine Liste: jede Adresse")
	b.edit("=", "save").wants(200, "aufheben?")
	b.edit("=", "lift").wants(200, "Beschränkung aufgehoben")
}

// TestUnanswered: when it is not known whether a save was carried out, repeating it is safe, and nothing typed is lost.
func TestUnanswered(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice))
	w.policy.set(func() { w.policy.deaf = true })
	b.edit("8.8.8.8", "save")
	// The repetition inside the request found it saved.
	b.seen.wants(200, "Active on 2 of 2 servers.")
	w.policy.set(func() { w.policy.deaf, w.policy.frozen = false, true })
	b.edit("9.9.9.9", "save").wants(503, "Not known whether it was saved", "it is safe to repeat", "The policy service does not answer")
	w.policy.set(func() { w.policy.frozen, w.policy.down, w.policy.asked = false, true, 0 })
	b.edit("=", "save").wants(503, "Not saved", "What you typed is still here", "The policy service does not answer")
	b.seen.lacks("Not known whether it was saved") // nothing was sent
	if w.policy.asked > maxAttempts {
		t.Errorf("after it did not answer, the policy service was asked again: %d times", w.policy.asked)
	}
	if b.seen.field() != "9.9.9.9" {
		t.Errorf("the field holds %q", b.seen.field())
	}
	b.seen.lacks("Can be reached from")
	b.edit("=", "validate").wants(503, "The list was not checked")
	b.submit(b.seen.id("edit"), "check", url.Values{"client": {"1.1.1.1"}}).wants(503, "does not answer")
	b.get(panelOf(alice)).wants(503, "The policy service does not answer", "They are still enforced as they were")
	b.get("/domains").wants(503, "The policy service does not answer")
	if b.seen.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	w.policy.set(func() { w.policy.down = false })
	b.get(panelOf(alice))
	b.edit("9.9.9.9", "save").wants(200, "Saved")
}

// TestDirectoryAway: a database that is down may take seconds to say nothing, so that a page asks it once; and nothing typed is lost.
func TestDirectoryAway(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice))
	form := b.seen.id("edit")
	w.lost.away.Store(true)
	once := func(what string) {
		t.Helper()
		if asked := w.lost.asked.Swap(0); asked != 1 {
			t.Errorf("%s: the directory was asked %d times", what, asked)
		}
	}
	const text = "9.9.9.9,\nhalf a li"
	for button, title := range map[string]string{actionSave: "Not saved", actionAdd: "The list was not checked"} {
		b.submit(form, "", url.Values{"action": {button}, "text": {text}}).wants(503, title, "Domains and mailboxes cannot be looked up at the moment")
		once(button)
		if b.seen.field() != text {
			t.Errorf("%s: the field holds %q", button, b.seen.field())
		}
	}
	b.submit(form, "check", url.Values{"client": {"8.8.8.8"}, "text": {text}}).wants(503)
	once("check")
	for _, path := range []string{"/domains", "/domains/example.org", panelOf(alice), panelOf(alice) + "/history"} {
		b.get(path).wants(503, "The directory does not answer")
		once(path)
	}
	w.lost.away.Store(false)
	b.submit(form, "save", url.Values{"text": {"9.9.9.9"}}).wants(200, "Saved")
	if w.policy.saves != 1 {
		t.Errorf("%d saves", w.policy.saves)
	}
}

func TestRequestIDReused(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice))
	form := b.seen.id("edit")
	b.submit(form, "save", url.Values{"text": {"8.8.8.8"}})
	b.submit(form, "save", url.Values{"text": {"9.9.9.9"}}).wants(409, "An earlier attempt was saved after all", "In force now removed: 8.8.8.8")
	b.edit("=", "save").wants(200, "Saved")
	if got := w.policy.nets(alice); got != "9.9.9.9" {
		t.Errorf("saved is %q", got)
	}
}

func TestAddress(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice)).wants(200, "Your address now: 127.0.0.1", "not a public address")
	b.seen.lacks("cannot be reached from where you are now")
	w.policy.rules.Permit = prefixes(t, "127.0.0.1/32")
	b.get(panelOf(alice)).wants(200, "Your address now: 127.0.0.1 Add")
	b.edit("8.8.8.8;\n", "validate").wants(200, "Your address is not in this list")
	older := b.seen.id("edit")
	b.edit("=", "add").wants(200, "in the list")
	b.seen.lacks("Your address is not in this list")
	if got := b.seen.field(); got != "8.8.8.8,\n127.0.0.1" {
		t.Errorf("the field holds %q", got)
	}
	b.submit(older, "add", url.Values{"text": {""}})
	if got := b.seen.field(); got != "127.0.0.1" {
		t.Errorf("the field holds %q", got)
	}
}

func TestCheck(t *testing.T) {
	w := newWorld(t)
	w.policy.put(alice, "carol", "8.8.8.0/24")
	b, watcher := w.browser(owner), w.browser(auditor)
	for _, tt := range []struct {
		client, service, list, text, language, want string
	}{
		{"8.8.8.8", "SERVICE_IMAP", "saved", "", "en", "Allowed The address lies in 8.8.8.0/24."},
		{" 9.9.9.9 ", "SERVICE_WEBMAIL", "saved", "9.9.9.9", "en", "Not allowed The address lies in none of the networks"},
		{"9.9.9.9", "SERVICE_WEBMAIL", "draft", "9.9.9.9", "de", "Erlaubt Die Adresse liegt in 9.9.9.9."},
		{"9.9.9.9", "SERVICE_IMAP", "draft", "", "en", "Allowed The mailbox has no list"},
		{"9.9.9.9", "SERVICE_CALDAV", "saved", "", "de", "Erlaubt Dieser Dienst wird nie beschränkt"},
		{"10.0.0.1", "SERVICE_IMAP", "saved", "", "de", "Nicht erlaubt Die Adresse ist keine öffentliche"},
		{"", "SERVICE_IMAP", "saved", "", "en", "Enter the address to check."},
		{"<b>", "SERVICE_IMAP", "saved", "", "en", "<b> is not an IP address."},
		{"8.8.8.8", "SERVICE_IMAP", "draft", "8.8.8.8/33", "en", "The text in the field has entries that cannot be used"},
	} {
		b.language = tt.language
		b.get(panelOf(alice))
		b.submit(b.seen.id("edit"), "check", url.Values{"client": {tt.client}, "service": {tt.service}, "list": {tt.list}, "text": {tt.text}})
		b.seen.wants(200, tt.want)
		if b.seen.field() != tt.text {
			t.Errorf("the field holds %q, not %q", b.seen.field(), tt.text)
		}
	}
	b.post(panelOf(alice)+"/check", url.Values{"client": {"8.8.8.8"}, "service": {"SERVICE_UNSPECIFIED"}}).wants(400)
	watcher.get(panelOf(alice)).wants(200, "You may look at this mailbox", "8.8.8.0/24")
	watcher.seen.lacks("Cancel", "Your address now")
	watcher.submit(watcher.seen.id("edit"), "check", url.Values{"client": {"9.9.9.9"}, "list": {"draft"}, "text": {"9.9.9.9"}}).wants(200, "Not allowed")
}

func TestHistory(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice)+"/history").wants(200, "Never changed")
	w.policy.put(alice, "carol", "8.8.8.0/24")
	w.policy.put(alice, "dave", "8.8.8.0/24, 9.9.9.9")
	w.policy.put(alice, "carol", "9.9.9.9, 8.8.8.0/24")
	w.policy.put(alice, "dave", "")
	b.get(panelOf(alice)+"/history").wants(200,
		"Restriction lifted 3 Nov 2026, 12:04 UTC By dave from 9.9.9.9 through "+fakeCaller+" in force removed: 9.9.9.9 removed: 8.8.8.0/24 added: every address",
		"The same networks in another order", "added: 9.9.9.9 1 network as before", "removed: every address added: 8.8.8.0/24")
	restore := b.seen.link("Restore the list of 3 Nov 2026, 12:02 UTC")
	b.get(restore).wants(200, "An earlier list, not saved yet")
	if b.seen.field() != "8.8.8.0/24,\n9.9.9.9" || w.policy.nets(alice) != "" {
		t.Errorf("the field holds %q, saved is %q", b.seen.field(), w.policy.nets(alice))
	}
	b.edit("=", "save").wants(200, "Saved")
	b.get(panelOf(alice) + "/history")
	b.get(b.seen.link("Restore the list of 3 Nov 2026, 12:04 UTC")).wants(200, "At that time there was no list")
	b.edit("=", "save").wants(200, "Lift the restriction")
	b.get(panelOf(alice)+"?restore=9-9").wants(200, "That version was not found")
	b.get(panelOf(alice) + "?restore=9-9&page=garbage").wants(404)
	b.get(panelOf(alice) + "/history?page=garbage").wants(404)
	watcher := w.browser(auditor)
	watcher.get(panelOf(alice)+"/history").wants(200, "Restriction lifted")
	watcher.seen.lacks("Restore")
	watcher.get(restore).wants(200, "You may look at this mailbox")
	for i := range 25 {
		w.policy.put(alice, "carol", fmt.Sprintf("8.8.8.%d", i))
	}
	b.get(panelOf(alice) + "/history")
	b.get(b.seen.link("Older changes")).wants(200, "Restriction lifted")
	b.get(b.seen.link("Restore the list of 3 Nov 2026, 12:02 UTC")).wants(200, "An earlier list, not saved yet")
}

// TestExpiredSession: a session ends in mid-edit; after the login one goes on with what was typed.
func TestExpiredSession(t *testing.T) {
	w := newWorld(t)
	w.policy.put(alice, "carol", "8.8.8.8")
	for _, button := range []string{"save", "check"} {
		b, text := w.browser(owner), "9.9.9.9,\nhalf a li"
		b.get(panelOf(alice) + "?q=al")
		form := b.seen.id("edit")
		b.client.Jar.SetCookies(must(url.Parse(b.url)), []*http.Cookie{{Name: "allowednets", Value: "", Path: "/", MaxAge: -1}})
		b.submit(form, button, url.Values{"text": {text}}).wants(401, "Your session has ended", "What you typed for alice@example.org:", "half a li")
		b.submit(b.seen.form("/login"), "", url.Values{"user": {owner}, "password": {"wrong"}}).wants(401, "User name or password is wrong.", "What you typed for alice@example.org:", "half a li")
		b.submit(b.seen.form("/login"), "", url.Values{"user": {" " + owner + " "}, "password": {password}}).wants(200, "You are logged in again", "It was not saved yet")
		if got := b.seen.field(); got != text || b.seen.path != panelOf(alice)+"?q=al" {
			t.Errorf("at %s the field holds %q", b.seen.path, got)
		}
		w.policy.put(alice, "dave", "1.1.1.1") // the etag went along
		b.edit("9.9.9.9", "save").wants(409, "dave saved another list")
		b.header.Set("Panel-Only", "1")
		b.post("/logout", url.Values{})
		b.post(panelOf(alice), url.Values{"action": {"validate"}, "text": {"x"}}).wants(401)
		w.policy.put(alice, "carol", "8.8.8.8")
	}
}

// TestTypedGoesToAMailbox: after a login the form with what was typed is sent on, password and all, only to the page of a mailbox.
func TestTypedGoesToAMailbox(t *testing.T) {
	b := newWorld(t).browser(nobody)
	b.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for next, want := range map[string]int{panelOf(alice): 307, "/": 303, "/domains": 303, "/login": 303, "/logout": 303, "/language": 303} {
		b.post("/login", url.Values{"user": {owner}, "password": {password}, "text": {"x"}, "next": {next}})
		if got := b.seen.header.Get("Location"); b.seen.status != want || got != next {
			t.Errorf("%s: %d to %s, want %d", next, b.seen.status, got, want)
		}
	}
}

func TestMailboxNotInTheDirectory(t *testing.T) {
	w := newWorld(t)
	w.policy.put("gone@example.org", "carol", "8.8.8.8")
	b := w.browser(owner)
	b.get(panelOf("gone@example.org")).wants(200, "This mailbox is not in the directory", "empty the field and save")
	b.edit("", "save")
	b.edit("=", "lift").wants(200, "Restriction lifted")
	b.get("/domains/example.org").lacks("gone@example.org")
}

// TestHostileNames: whatever a mailbox is called, it is shown as text, and its links lead to it.
func TestHostileNames(t *testing.T) {
	names := []string{"<script>alert(1)</script>", "a'onclick=alert(1)", "../../login", "..", "a//b", "100%25", "q?x=1&y=2#z", "{{.}}", "a;b", "`$(id)`", "ünï", "a+b"}
	listing := "domains:\n  example.org:\n"
	for _, name := range names {
		listing += fmt.Sprintf("    - %q\n", name)
	}
	w := newWorldWith(t, listing)
	b := w.browser(owner)
	b.get("/domains/example.org").wants(200)
	rows := b.seen
	if got := len(rows.mailboxes()); got != len(names) {
		t.Fatalf("%d of %d are shown: %q", got, len(names), rows.mailboxes())
	}
	for _, name := range names {
		mailbox := name + "@example.org"
		b.get(rows.link("Edit " + mailbox))
		if b.seen.status != 200 || strings.TrimSpace(strings.ReplaceAll(content(b.seen.id("panel-title")), " ", "")) != mailbox {
			t.Errorf("%s leads to %d %s", rows.link("Edit "+mailbox), b.seen.status, content(b.seen.id("panel-title")))
			continue
		}
		b.edit("8.8.8.8", "save").wants(200, "Saved")
		if w.policy.nets(mailbox) != "8.8.8.8" {
			t.Errorf("%s: saved is %q", mailbox, w.policy.nets(mailbox))
		}
		b.edit(`"><script>alert(1)</script>, </textarea><img src=x onerror=alert(1)>`, "save").wants(422, "cannot be used")
		b.get(b.seen.link("History")).wants(200, "Saved")
		b.get("/domains/example.org?q=" + url.QueryEscape(`"><script>alert(1)</script>`) + "&show=%3Cscript%3E").wants(200)
	}
}

// TestNothingInline: every page that the tests saw is without what the policy of its header forbids. It looks at the templates.
func TestNothingInline(t *testing.T) {
	forbidden := regexp.MustCompile(`(?i)\sstyle=|\son[a-z]+=|<script(?:>| type="module">)|<style|javascript:|<base`)
	entries, err := templates.ReadDir("templates")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text, err := templates.ReadFile("templates/" + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if found := forbidden.Find(text); found != nil {
			t.Errorf("%s has %q", e.Name(), found)
		}
	}
}

func TestBodies(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	large := url.Values{"action": {"save"}, "text": {strings.Repeat("8.8.8.8 ", 10<<17)}, "user": {"x"}}
	b.get(panelOf(alice))
	b.post(panelOf(alice), large).wants(413, "Too much text")
	w.browser(nobody).post(panelOf(alice), large).wants(413)
	b.post("/login", large).wants(413)
	b.post("/language", large).wants(413)
	b.get(panelOf(alice))
	b.edit(strings.Repeat("8.8.8.8\n", 60_000), "save").wants(422, "cannot be used")
	b.post(panelOf(alice), url.Values{"action": {"explode"}, "text": {"x"}}).wants(400, "could not be read")
	b.sendBody(http.MethodPost, panelOf(alice), "%zz").wants(400, "could not be read")
	if w.policy.saves != 0 {
		t.Errorf("%d saves", w.policy.saves)
	}
}

// TestStrangersForm: somebody who is not logged in cannot make the dashboard hold much.
func TestStrangersForm(t *testing.T) {
	w := newWorld(t)
	handle := func(path string, form url.Values) (status, size int) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		answer := httptest.NewRecorder()
		w.handler.ServeHTTP(answer, r)
		return answer.Code, answer.Body.Len()
	}
	fits := url.Values{"text": {strings.Repeat("a", 30_000) + strings.Repeat("'", 20_000)}, "next": {panelOf(alice)}, "user": {"x"}, "password": {"y"}}
	for _, path := range []string{panelOf(alice), "/login"} {
		if status, size := handle(path, fits); status != 401 || size > 200_000 {
			t.Errorf("%s: %d with %d octets", path, status, size)
		}
		if status, size := handle(path, url.Values{"text": {strings.Repeat("'", 100_000)}}); status != 413 || size > 10_000 {
			t.Errorf("%s: too much is answered %d with %d octets", path, status, size)
		}
	}
	// While two long forms of a network are under way, it gets no third one in.
	var ends []func()
	for range 2 {
		body, typing := io.Pipe()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, panelOf(alice), body)
		r.ContentLength = -1
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.handler.ServeHTTP(httptest.NewRecorder(), r)
		}()
		if _, err := typing.Write([]byte("text=")); err != nil { // it is being read
			t.Fatal(err)
		}
		ends = append(ends, func() { _ = typing.Close(); <-done })
	}
	if status, _ := handle(panelOf(alice), fits); status != 503 {
		t.Errorf("a third one is answered %d", status)
	}
	if status, _ := handle(panelOf(alice), url.Values{"text": {"8.8.8.8"}}); status != 401 {
		t.Errorf("a short one is answered %d", status)
	}
	for _, end := range ends {
		end()
	}
	if status, _ := handle(panelOf(alice), fits); status != 401 {
		t.Errorf("afterwards one is answered %d", status)
	}
}

// TestIncompleteForm: what lacks a part changes nothing, and loses nothing.
func TestIncompleteForm(t *testing.T) {
	w := newWorld(t)
	w.policy.put(alice, "carol", "8.8.8.8")
	b := w.browser(owner)
	const id = "6f1c0f0e-0000-4000-8000-000000000001"
	for name, form := range map[string]url.Values{
		"nothing":           {},
		"no text":           {"etag": {"1-1"}, "request_id": {id}},
		"no etag":           {"text": {"9.9.9.9"}, "request_id": {id}},
		"no etag, to lift":  {"text": {""}, "request_id": {id}},
		"empty etag":        {"text": {"9.9.9.9"}, "etag": {""}, "request_id": {id}},
		"no request id":     {"text": {"9.9.9.9"}, "etag": {"1-1"}},
		"strange requestid": {"text": {"9.9.9.9"}, "etag": {"1-1"}, "request_id": {"not a UUID"}},
	} {
		for _, action := range []string{"save", "lift"} {
			form.Set("action", action)
			b.post(panelOf(alice), form).wants(400, "The form was not complete. Nothing was saved", "In force now")
			if b.seen.field() != form.Get("text") || w.policy.nets(alice) != "8.8.8.8" {
				t.Errorf("%s, %s: the field holds %q, saved is %q", action, name, b.seen.field(), w.policy.nets(alice))
			}
		}
	}
	b.post(panelOf(alice), url.Values{"text": {"9.9.9.9 \xff"}}).wants(200, "1 entry cannot be used.") // no button, and not UTF-8
	if b.seen.field() != "9.9.9.9 \uFFFD" {
		t.Errorf("the field holds %q", b.seen.field())
	}
	b.edit("9.9.9.9", "validate")
	b.edit("=", "save").wants(400, "not complete") // the form above had no etag
	b.edit("=", "save").wants(200, "Saved")
}

func TestCrossOrigin(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	form := url.Values{"action": {"save"}, "text": {"9.9.9.9"}, "etag": {"0-0"}, "request_id": {"6f1c0f0e-0000-4000-8000-000000000001"}}
	for _, header := range []http.Header{{"Sec-Fetch-Site": {"cross-site"}}, {"Sec-Fetch-Site": {"same-site"}}, {"Origin": {"https://evil.example"}}, {"Origin": {"null"}}} {
		b.header = header
		for _, path := range []string{panelOf(alice), "/login", "/logout", "/language"} {
			b.post(path, form).wants(403, "This came from another site")
		}
	}
	b.header = http.Header{"Sec-Fetch-Site": {"same-origin"}}
	if w.policy.saves != 0 {
		t.Error("something was saved")
	}
	b.post(panelOf(alice), form).wants(200, "Saved")
}

func TestHeaders(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	for _, path := range []string{"/login", "/domains", "/nothing", "/assets/none", panelOf(alice)} {
		h := b.get(path).header
		csp := h.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"} {
			if !strings.Contains(csp, want) {
				t.Errorf("%s: the policy %q lacks %q", path, csp, want)
			}
		}
		if strings.Contains(csp, "unsafe") || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Referrer-Policy") != "same-origin" ||
			h.Get("Cross-Origin-Opener-Policy") != "same-origin" || h.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %v", path, h)
		}
	}
	n := b.seen.find(func(n *html.Node) bool { return attr(n, "rel") == "stylesheet" })
	if h := b.get(attr(n, "href")).header; !strings.Contains(h.Get("Cache-Control"), "immutable") || !strings.HasPrefix(h.Get("Content-Type"), "text/css") {
		t.Errorf("%v", h)
	}
}

func TestLanguage(t *testing.T) {
	b := newWorld(t).browser(nobody)
	for accept, want := range map[string]string{"de-AT,de;q=0.9": "de", "fr": "en", "": "en", "fr, de;q=0.5": "de", "\x00;;": "en", "en-GB, de": "en"} {
		b.language = strings.ReplaceAll(accept, "\x00", "!")
		if got := attr(b.get("/login").find(func(n *html.Node) bool { return n.Data == "html" }), "lang"); got != want {
			t.Errorf("%q gets %s", accept, got)
		}
	}
	b.language = "en"
	b.get("/login?next=%2Fdomains%2Fexample.org")
	b.submit(b.seen.form("/language"), "de", nil).wants(200, "Benutzername")
	if next := attr(b.seen.find(func(n *html.Node) bool { return attr(n, "name") == "next" && n.Parent.Parent.Data != "header" }), "value"); next != "/domains/example.org" {
		t.Errorf("next is %q", next)
	}
	b.post("/language", url.Values{"language": {"xx"}}).wants(404)
	b.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for _, next := range []string{"https://evil.example/", "//evil.example", "/\\evil.example", "/domains\r\nSet-Cookie: a=b", "javascript:alert(1)"} {
		if got := b.post("/language", url.Values{"language": {"en"}, "next": {next}}).header; got.Get("Location") != "/" || strings.Contains(fmt.Sprint(got["Set-Cookie"]), "a=b") {
			t.Errorf("%q leads to %q", next, got)
		}
		if got := b.post("/login", url.Values{"user": {owner}, "password": {password}, "text": {"x"}, "next": {next}}).header.Get("Location"); got != "/" {
			t.Errorf("after the login %q leads to %q", next, got)
		}
	}
}

func TestProgress(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	b.get(panelOf(alice))
	lost := timestamppb.New(must(timeOf("2026-11-03T12:00:00Z")))
	w.policy.set(func() {
		w.policy.propagation = &policyv1.GetPropagationResponse{SidecarCount: 3, AppliedCount: 1, Laggards: []*policyv1.Laggard{
			{Id: "web-1", Lost: true, LostTime: lost}, {Id: "<b>web-2</b>", Revision: "1-0"},
		}}
	})
	b.edit("8.8.8.8", "save").wants(200, "Active on 1 of 3 servers. Waiting for: web-1 : lost, and still has an older list if it runs; last seen 3 Nov 2026, 12:00 UTC",
		"<b>web-2</b> : connected, still has an older list")
	poll := attr(b.seen.id("progress"), "data-url")
	w.policy.set(func() { w.policy.propagation = &policyv1.GetPropagationResponse{} })
	b.get(poll).wants(200, "No mail server is connected, so nothing enforces the list yet.") // without script: the page
	b.header.Set("Panel-Only", "1")
	b.get(poll).wants(200, "No mail server is connected")
	b.seen.lacks("Edit")
	w.policy.set(func() { w.policy.down = true })
	b.get(poll).wants(200, "is not known")
	w.policy.set(func() { w.policy.down = false })
	b.get(panelOf(alice) + "/progress?revision=garbage").wants(404)
	w.policy.set(func() { w.policy.down = true })
	w.policy.set(func() {
		w.policy.down = false
		w.policy.propagation = &policyv1.GetPropagationResponse{SidecarCount: 1, AppliedCount: 1}
	})
	b.language = "de"
	b.get(poll).wants(200, "Aktiv auf 1 von 1 Server.")
	if attr(b.seen.id("progress"), "data-url") != "" {
		t.Error("it would ask for ever")
	}
}

// TestWeight: the heaviest page there is, with everything it loads, stays light on the wire.
func TestWeight(t *testing.T) {
	var listing strings.Builder
	listing.WriteString("domains:\n  example.org:\n")
	for i := range 50_000 {
		fmt.Fprintf(&listing, "    - user%05d.%x\n", i, i*i*7919)
	}
	w := newWorldWith(t, listing.String())
	for i := range 100 {
		w.policy.put(fmt.Sprintf("user%05d.%x@example.org", i*3, i*3*i*3*7919), "carol", "8.8.8.0/24, 9.9.9.9")
	}
	b := w.browser(owner)
	total := 0
	paths := []string{"/domains/example.org/mailboxes/user00000.0@example.org"}
	for _, name := range loaded(t).names {
		paths = append(paths, name)
	}
	for _, path := range paths {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		req.Header.Set("Accept-Encoding", "gzip")
		for _, c := range b.client.Jar.Cookies(must(url.Parse(b.url))) {
			req.AddCookie(c)
		}
		rec := httptest.NewRecorder()
		w.handler.ServeHTTP(rec, req)
		size := rec.Body.Len()
		if r, err := gzip.NewReader(bytes.NewReader(rec.Body.Bytes())); err != nil {
			t.Errorf("%s is not compressed: %v", path, err)
		} else if _, err := new(bytes.Buffer).ReadFrom(r); err != nil || rec.Code != 200 {
			t.Errorf("%s: %d, %v", path, rec.Code, err)
		}
		t.Logf("%6d octets %s", size, path)
		total += size
	}
	if total > 60_000 {
		t.Errorf("%d octets", total)
	}
}

// TestMetrics: whatever is asked for, the labels are those of the routes.
func TestMetrics(t *testing.T) {
	w := newWorld(t)
	b := w.browser(owner)
	for i := range 50 {
		b.get(fmt.Sprintf("/x%d", i))
		b.get(fmt.Sprintf("/domains/d%d.example/mailboxes/x%d", i, i))
		b.get(fmt.Sprintf("/assets/%d", i))
	}
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "allowednets_dashboard_request_seconds" {
			if n := len(f.GetMetric()); n < 4 || n > 10 {
				t.Errorf("%d series: %v", n, f.GetMetric())
			}
			return
		}
	}
	t.Error("the metric is missing")
}

// TestLoginAtAProvider: what somebody typed stays on the page during a login in another tab, and goes on from there.
func TestLoginAtAProvider(t *testing.T) {
	show := func(p loginPage) *shownPage {
		var b bytes.Buffer
		if err := viewIn(t, "en").pages["login"].ExecuteTemplate(&b, "layout", page{Title: "x", View: p}); err != nil {
			t.Fatal(err)
		}
		return &shownPage{t: t, status: 200, path: "login", root: must(html.Parse(&b))}
	}
	plain := show(loginPage{OIDC: true, Next: "/domains/example.org?q=a&show=restricted"})
	if got := plain.link("Log in with your organisation"); got != "/login/oidc?next=%2fdomains%2fexample.org%3fq%3da%26show%3drestricted" || plain.id("user") != nil {
		t.Errorf("it leads to %s", got)
	}
	next := panelOf(alice)
	expired := show(loginPage{OIDC: true, Next: next, Mailbox: alice, Text: "half", Kept: kept(url.Values{"text": {"half"}, "etag": {"1-2"}})})
	expired.wants(200, "half", "1. Log in with your organisation (new tab)", "2. Logged in? Go on here")
	form := expired.form(next)
	if form == nil || expired.find(func(n *html.Node) bool { return attr(n, "name") == "etag" && attr(n, "value") == "1-2" }) == nil {
		t.Error("nothing to go on with")
	}
}

func TestSecure(t *testing.T) {
	rec := httptest.NewRecorder()
	headers(true, http.NotFoundHandler()).ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if rec.Header().Get("Strict-Transport-Security") == "" {
		t.Error("no HSTS")
	}
}
