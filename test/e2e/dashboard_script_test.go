package e2e

import (
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
)

// scripted is what the script does beside the path.
func scripted(t *testing.T, s *site) {
	t.Run("typing while an answer is on its way", func(t *testing.T) {
		const typed = "198.51.100.5"
		v := s.visit(t, walker{name: "typing"})
		v.must(v.Go("/domains/example.org/mailboxes/typing@example.org"))
		v.logIn(anna)
		v.must(v.Type("Allowed Nets", "203.0.113.9"))
		release, err := v.Hold()
		add := "Add " + inside + " to the list"
		v.must(err, v.Press("button", add), v.Type("Allowed Nets", typed), release())
		if got, err := v.Value("Allowed Nets"); err != nil || got != typed || !v.Has("button", add) {
			t.Errorf("the field holds %q, %v; the address can still be added: %v", got, err, v.Has("button", add))
		}
		v.must(v.Press("button", add), v.AwaitValue("Allowed Nets", typed+",\n"+inside), v.Read("in the list"))
	})
	t.Run("Esc in the search", func(t *testing.T) {
		const search, path = "Search mailboxes", "/domains/example.org/mailboxes/typing@example.org"
		v := s.visit(t, walker{name: "escape"})
		v.must(v.Go(path))
		v.logIn(anna)
		v.must(v.Type(search, "zz"), v.AwaitValue(search, "zz"), v.Key(kb.Escape), v.AwaitValue(search, ""))
		v.must(v.Type("Allowed Nets", "203.0.113.9"), v.AwaitValue("Allowed Nets", "203.0.113.9"))
		if at, err := v.Path(); err != nil || at != path {
			t.Errorf("Esc in the search led to %s, %v", at, err)
		}
		v.must(v.FollowKey(kb.Escape), v.AwaitFocus("link", "Edit typing@example.org"))
	})
	t.Run("times of the reader's zone", func(t *testing.T) {
		const mailbox = "zone@example.org"
		s.saveAs(t, bert, mailbox, "203.0.113.9")
		s.saveAs(t, bert, mailbox, "198.51.100.5")
		changes, err := s.lists.ListChanges(within(t, startWithin), &policyv1.ListChangesRequest{Mailbox: mailbox})
		if err != nil {
			t.Fatal(err)
		}
		at := changes.GetChanges()[1].GetTime().AsTime().In(time.FixedZone("Tokyo", 9*60*60)).Format("02.01.2006, 15:04")
		v := s.visit(t, walker{"zone", dashboard.Traits{Person: browser.Person{Language: "de-DE", Zone: "Asia/Tokyo"}}})
		v.must(v.Go("/domains/example.org/mailboxes/" + mailbox + "/history"))
		v.logIn(anna)
		v.must(v.Read("Gespeichert "+at), v.Follow("link", "Die Liste vom "+at+" wiederherstellen"), v.Read("die am "+at+" gespeichert wurde"))
	})
}
