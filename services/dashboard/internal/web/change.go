package web

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
)

// What the buttons of the panel ask for. A fix asks for [actionFix] with what to put where in the query behind it.
const (
	actionSave     = "save"
	actionLift     = "lift"
	actionTheirs   = "theirs"
	actionValidate = "validate"
	actionAdd      = "add"
	actionFix      = "use"
	actionResume   = "resume"
	actionCheck    = "check"
)

// newFix is the button that puts by in the place of an entry.
func newFix(n *policyv1.InvalidNet, by string) fix {
	return fix{Label: by, Action: actionFix + "?" + url.Values{
		"index": {strconv.Itoa(int(n.GetIndex()))}, "entry": {n.GetText()}, "by": {by},
	}.Encode()}
}

func applyFix(text, query string) string {
	q, err := url.ParseQuery(query)
	index, err2 := strconv.Atoi(q.Get("index"))
	if errors.Join(err, err2) != nil {
		return text
	}
	text, _ = replace(text, index, q.Get("entry"), q.Get("by"))
	return text
}

// changeMailbox is every button of the panel that may change something.
func (s *site) changeMailbox(w http.ResponseWriter, r *http.Request, at place) error {
	if err := parseForm(r); err != nil {
		return err
	}
	action, query, _ := strings.Cut(r.PostForm.Get("action"), "?")
	p, err := s.panel(r, at)
	if errors.Is(err, errNotFound) {
		return err
	}
	complete := s.takeForm(p, r.PostForm)
	v := s.view(r)
	if err != nil { // neither saved nor checked, but what was typed is shown again
		return s.renderFailure(w, r, at, p, err, false)
	}
	switch action {
	case actionSave, actionLift:
		if !complete {
			s.choose(r, p, v.text("incomplete.title"), v.text("reused.text"))
			return s.renderPanel(w, r, http.StatusBadRequest, at, p)
		}
		return s.save(w, r, at, p, action)
	case actionTheirs:
		redirect(w, r, http.StatusSeeOther, p.URL)
		return nil
	case actionResume:
		p.Focus, p.Notice = "notice", &notice{Kind: "info", Title: v.text("resumed.title"), Text: v.text("resumed.text")}
		return s.renderPanel(w, r, http.StatusOK, at, p)
	case actionAdd:
		if addr := s.cfg.Login.ClientAddr(r); addr.IsValid() {
			p.Text = appendEntry(p.Text, addr.Unmap().String())
		}
	case actionFix:
		p.Text = applyFix(p.Text, query)
	case actionValidate, "": // a form that was sent without a button
	default:
		return &formError{errors.New("the form asks for nothing known")}
	}
	// Validated as it would be saved now, whatever was saved since the page was opened.
	if !empty(p.Text) {
		_, err = callOnce(r.Context(), s.policy.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: p.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: p.Text}, ValidateOnly: true,
		})
	}
	if p.Problems = v.problems(err); err != nil && p.Problems == nil {
		return s.renderFailure(w, r, at, p, err, false)
	}
	return s.renderPanel(w, r, http.StatusOK, at, p)
}

// takeForm puts what the browser sent in the place of what is saved. Only a complete form may change something: without an etag
// a save would overwrite, and without the text it would lift, what nobody has seen.
func (s *site) takeForm(p *panel, form url.Values) (complete bool) {
	p.Text, p.Etag = strings.ReplaceAll(form.Get("text"), "\r\n", "\n"), form.Get("etag")
	id, err := uuid.Parse(form.Get("request_id"))
	if err == nil {
		p.RequestID = id.String()
	}
	p.Check = checkView{Services: p.Check.Services, Client: clip(form.Get("client"), 64)}
	return form.Has("text") && p.Etag != "" && err == nil
}

// save saves the text, or lifts the restriction once the emptied field was confirmed.
func (s *site) save(w http.ResponseWriter, r *http.Request, at place, p *panel, action string) error {
	v := s.view(r)
	var saved *policyv1.AllowedNets
	var changed bool
	var err error
	switch {
	case !empty(p.Text):
		var resp *policyv1.SetAllowedNetsResponse
		resp, err = call(r.Context(), s.policy.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: p.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: p.Text}, Etag: p.Etag, RequestId: p.RequestID, Actor: s.cfg.Login.Actor(r),
		})
		saved, changed = resp.GetAllowedNets(), resp.GetChanged()
	case action == actionLift:
		var resp *policyv1.ClearAllowedNetsResponse
		resp, err = call(r.Context(), s.policy.ClearAllowedNets, &policyv1.ClearAllowedNetsRequest{
			Mailbox: p.Mailbox, Etag: p.Etag, RequestId: p.RequestID, Actor: s.cfg.Login.Actor(r),
		})
		saved, changed = resp.GetAllowedNets(), resp.GetChanged()
	case len(p.current.GetNets()) == 0:
		p.Focus, p.Notice = "notice", &notice{Kind: "info", Title: v.text("saved.same.title"), Text: v.text("saved.none")}
		return s.renderPanel(w, r, http.StatusOK, at, p)
	default:
		p.Focus, p.Notice = "notice", &notice{Kind: "lift", Title: v.text("lift.title", p.Mailbox), Text: v.text("lift.text")}
		return s.renderPanel(w, r, http.StatusOK, at, p)
	}
	if err != nil {
		return s.renderRefusal(w, r, at, p, err)
	}
	more := []string{"saved", saved.GetRevision()}
	if !changed {
		more = append(more, "same", "1")
	}
	redirect(w, r, http.StatusSeeOther, mailboxURL(at.mailbox, "", readListState(r.URL.Query(), at.domain), more...))
	return nil
}

// renderRefusal shows a save that was refused for a reason that the reader can do something about.
func (s *site) renderRefusal(w http.ResponseWriter, r *http.Request, at place, p *panel, err error) error {
	v := s.view(r)
	if p.Problems = v.problems(err); p.Problems != nil {
		p.Focus = "problems"
		return s.renderPanel(w, r, http.StatusUnprocessableEntity, at, p)
	}
	reason := rpcerr.Reason(err)
	mismatch := reason == decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH
	if !mismatch && reason != decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED {
		return s.renderFailure(w, r, at, p, err, true)
	}
	if err := s.refresh(r.Context(), p); err != nil {
		return s.renderFailure(w, r, at, p, err, false)
	}
	s.choose(r, p, v.text("reused.title"), v.text("reused.text"))
	if mismatch {
		p.Notice.Title, p.Notice.Text = v.text("conflict.unknown"), v.text("conflict.text")
		meta := rpcerr.Detail[*errdetails.ErrorInfo](err).GetMetadata()
		if at, timeErr := time.Parse(time.RFC3339, meta["update_time"]); timeErr == nil && meta["updated_by"] != "" {
			p.Notice.Title = v.timed("conflict.title", at, strings.ReplaceAll(meta["updated_by"], "\x1a", ""))
		}
	}
	return s.renderPanel(w, r, http.StatusConflict, at, p)
}

// choose asks whether what is saved or what is typed shall be in force. What is saved was just read.
func (s *site) choose(r *http.Request, p *panel, title, text string) {
	p.Etag, p.RequestID = p.current.GetEtag(), uuid.NewString() // another save than the one that was refused
	p.Focus, p.Notice = "notice", &notice{Kind: "conflict", Title: title, Text: text}
	p.Notice.Theirs, p.Notice.Yours = s.versions(r, p)
}

// versions compares what is saved with what is typed, as it would be saved.
func (s *site) versions(r *http.Request, p *panel) (theirs, yours []netLine) {
	var mine []*policyv1.Net
	if !empty(p.Text) {
		resp, err := callOnce(r.Context(), s.policy.SetAllowedNets, &policyv1.SetAllowedNetsRequest{
			Mailbox: p.Mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: p.Text}, ValidateOnly: true,
		})
		if err != nil { // it stands in the field anyway
			return plainNets(p.current.GetNets()), nil
		}
		mine = resp.GetAllowedNets().GetNets()
	}
	mark := func(nets, others []*policyv1.Net, class string) []netLine {
		lines := plainNets(nets)
		for i := range lines {
			lines[i].Class = "same"
			if !slices.ContainsFunc(others, func(n *policyv1.Net) bool { return n.GetNet() == lines[i].Text }) {
				lines[i].Class = class
			}
		}
		return lines
	}
	return mark(p.current.GetNets(), mine, "minus"), mark(mine, p.current.GetNets(), "plus")
}

// renderFailure shows the panel with what was typed after an error that the reader can do nothing about. attempted is whether a
// save was sent, so that it may have been carried out.
func (s *site) renderFailure(w http.ResponseWriter, r *http.Request, at place, p *panel, err error, attempted bool) error {
	v := s.view(r)
	why := problemOf(err)
	title, text := v.text("down.title"), v.text(why.key+".text")
	if action, _, _ := strings.Cut(r.PostForm.Get("action"), "?"); action == actionSave || action == actionLift {
		title = v.text("refused.title")
	}
	if !unanswered(err) {
		s.cfg.Log.WarnContext(r.Context(), "a form was not carried out", "error", err)
	}
	switch {
	case errors.Is(err, directory.ErrUnavailable):
		p.silent = err
	case unanswered(err) && attempted:
		p.silent, title, text = err, v.text("unanswered.title"), v.text("unanswered.text")
	case unanswered(err):
		p.silent, text = err, v.text("down.text")
	}
	p.Focus, p.Notice = "notice", &notice{Kind: "bad", Title: title, Text: text}
	return s.renderPanel(w, r, why.status, at, p)
}
