package web

import (
	"context"
	"net/http"
	"net/url"
	"time"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

const (
	// activeWithin is how long the page after a save waits for the servers, most often with success, so that those
	// without script see it as well.
	activeWithin = 600 * time.Millisecond
	activePoll   = 60 * time.Millisecond
	// maxNamed is how many servers are named that do not enforce a save yet.
	maxNamed = 10
)

// progressView says on how many servers a save is active.
type progressView struct {
	Text     string
	Laggards []laggard
	More     string
	Waiting  bool
	URL      string // to ask again; empty if it is active everywhere
	Again    string // the same for those without script
}

// laggard is a server that does not enforce a save as far as is known.
type laggard struct {
	Name, State string
	Since       time.Time
}

// savedNotice says what a save did and how far it has got.
func (s *site) savedNotice(r *http.Request, at place, p *panel, q url.Values) *notice {
	v := s.view(r)
	n := &notice{Kind: "saved", Title: v.text("saved.title")}
	switch {
	case q.Get("saved") != p.current.GetRevision():
		return &notice{Kind: "warn", Title: v.text("superseded.title"), Text: v.text("superseded.text")}
	case q.Get("same") != "":
		n.Title, n.Text = v.text("saved.same.title"), v.text("saved.same")
		if len(p.Saved) == 0 {
			n.Text = v.text("saved.none")
		}
	case len(p.Saved) == 0:
		n.Title = v.text("lifted.title")
	}
	deadline := time.Now().Add(activeWithin)
	for {
		n.Progress, _ = s.progress(r, at, p.current.GetRevision()) // the policy service made that revision
		if !n.Progress.Waiting || time.Now().After(deadline) || !pause(r.Context(), activePoll) {
			return n
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// showProgress is what the script asks for until a save is active everywhere.
func (s *site) showProgress(w http.ResponseWriter, r *http.Request, at place) error {
	revision := r.URL.Query().Get("revision")
	if !partly(r) {
		redirect(w, r, http.StatusSeeOther, mailboxURL(at.mailbox, "", readListState(r.URL.Query(), at.domain), "saved", revision))
		return nil
	}
	p, err := s.progress(r, at, revision)
	if err != nil {
		return err
	}
	return s.part(w, r, "progress", p)
}

// progress asks how far a save has got. If nobody is connected, nobody enforces it. The error is about what is no revision.
func (s *site) progress(r *http.Request, at place, revision string) (*progressView, error) {
	v := s.view(r)
	state := readListState(r.URL.Query(), at.domain)
	p := &progressView{
		Waiting: true, URL: mailboxURL(at.mailbox, "/progress", state, "revision", revision),
		Again: mailboxURL(at.mailbox, "", state, "saved", revision),
	}
	resp, err := callOnce(r.Context(), s.policy.GetPropagation, &policyv1.GetPropagationRequest{Revision: revision})
	if rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID {
		return p, errNotFound
	}
	applied, all := int(resp.GetAppliedCount()), int(resp.GetSidecarCount())
	switch {
	case err != nil:
		p.Text = v.text("progress.unknown")
		if !unanswered(err) {
			s.cfg.Log.WarnContext(r.Context(), "the progress of a save is not known", "error", err)
			p.Waiting, p.URL = false, ""
		}
	case all == 0:
		p.Text = v.text("progress.nobody")
	case applied >= all:
		p.Text = v.plural("progress.all", all, applied)
		p.Waiting, p.URL = false, ""
	default:
		p.Text = v.plural("progress.some", all, applied)
		for _, l := range resp.GetLaggards()[:min(len(resp.GetLaggards()), maxNamed)] {
			late := laggard{Name: l.GetId(), State: v.text("progress.connected")}
			if l.GetLost() {
				late.State, late.Since = v.text("progress.lost"), l.GetLostTime().AsTime()
			}
			p.Laggards = append(p.Laggards, late)
		}
		if more := all - applied - len(p.Laggards); more > 0 {
			p.More = v.plural("progress.more", more)
		}
	}
	return p, nil
}
