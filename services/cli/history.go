package main

import (
	"errors"
	"fmt"
	"io"
	"slices"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

// maxChanges is how many changes the policy service gives at once.
const maxChanges = 200

type historyCommand struct {
	Mailbox string `arg:"" help:"local@domain."`
	Limit   int    `default:"20" env:"ALLOWEDNETS_LIMIT" help:"How many changes to show, the newest first."`
}

// Help is shown below the help line.
func (*historyCommand) Help() string {
	return `
Shows when each change was made, by whom, from which address and through which service, and what it added and removed. The
history outlives the list and the mailbox.

	allowednets history alice@example.com
	allowednets history alice@example.com --limit=1000 --output=json

Exit codes: 0 shown, also if there is none; 1 not permitted; 2 wrong usage; 3 no answer.
`
}

// Run reads as many pages as are needed. The JSON form is one response with the changes of all of them.
func (c *historyCommand) Run(s *session) error {
	if c.Limit < 1 {
		return usageError{fmt.Sprintf("--limit must be at least 1, not %d", c.Limit)}
	}
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		all := new(policyv1.ListChangesResponse)
		for missing := c.Limit; missing > 0; missing = c.Limit - len(all.GetChanges()) {
			token := all.GetNextPageToken()
			page, err := call(s, client.ListChanges, &policyv1.ListChangesRequest{
				Mailbox: c.Mailbox, PageSize: int32(min(missing, maxChanges)), PageToken: token,
			})
			if err != nil {
				return err
			}
			all.Changes = append(all.Changes, page.GetChanges()...)
			if all.NextPageToken = page.GetNextPageToken(); all.GetNextPageToken() == "" {
				break
			}
			if all.GetNextPageToken() == token {
				return errors.New("the policy service answered the same page twice; the history is incomplete")
			}
		}
		return s.show(all, func(w io.Writer) { writeHistory(w, c.Mailbox, all) })
	})
}

func writeHistory(w io.Writer, mailbox string, resp *policyv1.ListChangesResponse) {
	if len(resp.GetChanges()) == 0 {
		fmt.Fprintf(w, "The list of %s was never changed.\n", printable(mailbox))
		return
	}
	for i, c := range resp.GetChanges() {
		if i > 0 {
			fmt.Fprintln(w)
		}
		writeChange(w, c)
	}
	if resp.GetNextPageToken() != "" {
		fmt.Fprintf(w, "\nThere are older changes: --limit=%d shows more.\n", 10*len(resp.GetChanges()))
	}
}

func writeChange(w io.Writer, c *policyv1.Change) {
	fmt.Fprintf(w, "%s  %s%s\n", clock(c.GetTime()), printable(deed(c)), printable(author(c)))
	before, after := netTexts(c.GetBefore()), netTexts(c.GetAfter())
	kept := 0
	for _, n := range before {
		if slices.Contains(after, n) {
			kept++
		} else {
			fmt.Fprintln(w, "  - "+printable(n))
		}
	}
	if len(before) == 0 && len(after) > 0 {
		fmt.Fprintln(w, "  - every address")
	}
	for _, n := range after {
		if !slices.Contains(before, n) {
			fmt.Fprintln(w, "  + "+printable(n))
		}
	}
	switch {
	case len(before) > 0 && len(after) == 0:
		fmt.Fprintln(w, "  + every address")
	case kept > 0 && kept == len(before) && kept == len(after):
		fmt.Fprintln(w, "    the same networks in another order")
	case kept > 0:
		fmt.Fprintf(w, "    %s as before\n", count(kept, "network", "networks"))
	}
	fmt.Fprintf(w, "  revision %s, request %s\n", printable(c.GetRevision()), printable(c.GetRequestId()))
}

// deed says what was done.
func deed(c *policyv1.Change) string {
	switch c.GetKind() {
	case policyv1.ChangeKind_CHANGE_KIND_SET:
		return "set"
	case policyv1.ChangeKind_CHANGE_KIND_CLEAR:
		return "cleared"
	case policyv1.ChangeKind_CHANGE_KIND_DELETE:
		return "mailbox deleted"
	case policyv1.ChangeKind_CHANGE_KIND_RENAME_TO:
		return "renamed from " + c.GetOtherMailbox()
	case policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM:
		return "renamed to " + c.GetOtherMailbox()
	case policyv1.ChangeKind_CHANGE_KIND_UNSPECIFIED:
	}
	return "changed" // before kinds were recorded, or a kind that is newer than this program
}

// author says who did it: the person as the calling service asserts it, and the service as its certificate names it.
func author(c *policyv1.Change) string {
	text := " by " + c.GetCaller()
	if id := c.GetActor().GetId(); id != "" && id != c.GetCaller() {
		text = " by " + id
	}
	if c.GetActor().GetAddress() != "" {
		text += " from " + c.GetActor().GetAddress()
	}
	if id := c.GetActor().GetId(); id != "" && id != c.GetCaller() {
		text += " through " + c.GetCaller()
	}
	return text
}

func netTexts(nets []*policyv1.Net) []string {
	texts := make([]string, len(nets))
	for i, n := range nets {
		texts[i] = n.GetNet()
	}
	return texts
}
