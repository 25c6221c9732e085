package web

import (
	"net/http"
	"slices"
	"strings"
	"time"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// changesPerPage is how many changes a page of the history shows.
const changesPerPage = 20

// historyView is the history of a mailbox, newest first.
type historyView struct {
	Items         []change
	Older, Newest string
}

// change is one save.
type change struct {
	Deed, Author string
	At           time.Time
	Diff         []netLine
	Kept         string
	Restore      string // URL; empty if there is nothing to restore, or not for this reader
	Current      bool
}

func (s *site) showHistory(w http.ResponseWriter, r *http.Request, at place) error {
	p, err := s.panel(r, at)
	if err != nil {
		return err
	}
	v := s.view(r)
	token := r.URL.Query().Get("page")
	resp, err := s.changes(r, p, token)
	if err != nil {
		return err
	}
	state := readListState(r.URL.Query(), at.domain)
	p.Focus, p.History = "title", &historyView{}
	for _, c := range resp.GetChanges() {
		item := v.change(c)
		item.Current = c.GetRevision() == p.current.GetRevision()
		if p.Changes && !sameNets(c.GetAfter(), p.current.GetNets()) {
			item.Restore = mailboxURL(at.mailbox, "", state, "restore", c.GetRevision(), "page", token)
		}
		p.History.Items = append(p.History.Items, item)
	}
	if next := resp.GetNextPageToken(); next != "" {
		p.History.Older = mailboxURL(at.mailbox, "/history", state, "page", next)
	}
	if token != "" {
		p.History.Newest = p.HistoryURL
	}
	return s.renderPanel(w, r, http.StatusOK, at, p)
}

// changes returns a page of the history.
func (s *site) changes(r *http.Request, p *panel, token string) (*policyv1.ListChangesResponse, error) {
	resp, err := call(r.Context(), s.policy.ListChanges, &policyv1.ListChangesRequest{Mailbox: p.Mailbox, PageSize: changesPerPage, PageToken: token})
	if rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID {
		return nil, errNotFound // only the token of the page comes from the browser
	}
	return resp, err
}

func (v *view) change(c *policyv1.Change) change {
	item := change{At: c.GetTime().AsTime(), Author: v.author(c)}
	switch c.GetKind() {
	case policyv1.ChangeKind_CHANGE_KIND_RENAME_TO, policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM:
		item.Deed = v.text(c.GetKind().String(), c.GetOtherMailbox())
	case policyv1.ChangeKind_CHANGE_KIND_SET, policyv1.ChangeKind_CHANGE_KIND_CLEAR, policyv1.ChangeKind_CHANGE_KIND_DELETE:
		item.Deed = v.text(c.GetKind().String())
	default: // from before kinds were recorded, or newer than this program
		item.Deed = v.text(policyv1.ChangeKind_CHANGE_KIND_UNSPECIFIED.String())
	}
	before, after := c.GetBefore(), c.GetAfter()
	kept := 0
	if len(before) == 0 && len(after) > 0 {
		item.Diff = append(item.Diff, netLine{v.text("history.everywhere"), "minus"})
	}
	for _, n := range before {
		if contains(after, n) {
			kept++
		} else {
			item.Diff = append(item.Diff, netLine{n.GetNet(), "minus"})
		}
	}
	for _, n := range after {
		if !contains(before, n) {
			item.Diff = append(item.Diff, netLine{n.GetNet(), "plus"})
		}
	}
	switch {
	case len(before) > 0 && len(after) == 0:
		item.Diff = append(item.Diff, netLine{v.text("history.everywhere"), "plus"})
	case kept > 0 && kept == len(before) && kept == len(after):
		item.Kept = v.text("history.same")
	case kept > 0:
		item.Kept = v.plural("history.kept", kept)
	}
	return item
}

// author says who did it: the person as the calling service asserts it, and the service as its certificate names it.
func (v *view) author(c *policyv1.Change) string {
	who, through := c.GetActor().GetId(), c.GetCaller()
	if who == "" {
		who, through = through, ""
	}
	parts := []string{v.text("history.by", who)}
	if address := c.GetActor().GetAddress(); address != "" {
		parts = append(parts, v.text("history.from", address))
	}
	if through != "" && through != who {
		parts = append(parts, v.text("history.through", through))
	}
	return strings.Join(parts, " ")
}

// restore puts an earlier list into the field. It counts when it is saved, like any other.
func (s *site) restore(r *http.Request, p *panel, revision, token string) error {
	v := s.view(r)
	resp, err := s.changes(r, p, token)
	if err != nil {
		return err
	}
	p.Focus = "notice"
	i := slices.IndexFunc(resp.GetChanges(), func(c *policyv1.Change) bool { return c.GetRevision() == revision })
	if i < 0 {
		p.Notice = &notice{Kind: "warn", Title: v.text("restored.missing")}
		return nil
	}
	earlier := resp.GetChanges()[i]
	p.Text = fieldText(earlier.GetAfter())
	p.Notice = &notice{Kind: "info", Title: v.text("restored.title"), Text: v.timed("restored.text", earlier.GetTime().AsTime())}
	if len(earlier.GetAfter()) == 0 {
		p.Notice.Text = v.text("restored.none")
	}
	return nil
}

func contains(nets []*policyv1.Net, n *policyv1.Net) bool {
	return slices.ContainsFunc(nets, func(o *policyv1.Net) bool { return o.GetNet() == n.GetNet() })
}

func sameNets(a, b []*policyv1.Net) bool {
	return slices.EqualFunc(a, b, func(x, y *policyv1.Net) bool { return x.GetNet() == y.GetNet() })
}
