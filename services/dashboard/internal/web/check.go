package web

import (
	"net/http"
	"slices"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// services are those that a person would ask about, in the order of the menu.
func services() []decisionv1.Service {
	return []decisionv1.Service{
		decisionv1.Service_SERVICE_IMAP, decisionv1.Service_SERVICE_WEBMAIL, decisionv1.Service_SERVICE_POP3, decisionv1.Service_SERVICE_MANAGESIEVE,
		decisionv1.Service_SERVICE_SMTP_SUBMISSION, decisionv1.Service_SERVICE_CALDAV, decisionv1.Service_SERVICE_CARDDAV, decisionv1.Service_SERVICE_WEBDAV,
	}
}

// checkForm is what somebody wants to know: whether a client could use a service of the mailbox.
type checkForm struct {
	client, service string
	ofSaved         bool // with the saved list, not with the text in the field
}

// checkView is the form with its answer.
type checkView struct {
	Client, Problem, Answer string
	OfSaved, Allowed        bool
	Services                []serviceOption
}

type serviceOption struct {
	Name, Label string
	Selected    bool
}

func (v *view) check(f checkForm) checkView {
	c := checkView{Client: clip(f.client, 64), OfSaved: f.ofSaved}
	for _, service := range services() {
		name := service.String()
		c.Services = append(c.Services, serviceOption{name, v.text(name), name == f.service})
	}
	return c
}

// checkAddress answers without saving anything.
func (s *site) checkAddress(w http.ResponseWriter, r *http.Request, at place) error {
	if err := parseForm(r); err != nil {
		return err
	}
	p, err := s.panel(r, at)
	if err != nil && (!p.Changes || problemOf(err).status == http.StatusNotFound) {
		return err
	}
	f := checkForm{client: r.PostForm.Get("client"), service: r.PostForm.Get("service"), ofSaved: !p.Changes || r.PostForm.Get("list") == "saved"}
	v := s.view(r)
	if p.Changes {
		s.takeForm(p, r.PostForm)
	}
	p.Check, p.Focus = v.check(f), ""
	if err != nil {
		p.Check.Problem, p.silent = v.text("check.down"), err
		return s.renderPanel(w, r, problemOf(err).status, at, p)
	}
	client, err := allow.ParseClient(trim(f.client))
	switch {
	case trim(f.client) == "":
		p.Check.Problem = v.text("check.empty")
	case err != nil:
		p.Check.Problem = v.text("check.bad", clip(f.client, 64))
	case !slices.ContainsFunc(services(), func(service decisionv1.Service) bool { return service.String() == f.service }):
		return &formError{errUnknownService}
	default:
		s.explain(r, p, client.String(), f)
	}
	return s.renderPanel(w, r, http.StatusOK, at, p)
}

func (s *site) explain(r *http.Request, p *panel, client string, f checkForm) {
	v := s.view(r)
	req := &policyv1.ExplainAccessRequest{
		Mailbox: p.Mailbox, ClientAddress: client, Service: decisionv1.Service(decisionv1.Service_value[f.service]),
	}
	if !f.ofSaved {
		req.Draft = &policyv1.ExplainAccessRequest_Text{Text: p.Text}
	}
	resp, err := call(r.Context(), s.policy.ExplainAccess, req)
	if p.Problems = v.problems(err); p.Problems != nil {
		p.Check.Problem = v.text("check.nets")
		return
	}
	switch {
	case err == nil:
		d := resp.GetDecision()
		p.Check.Allowed = d.GetVerdict() == decisionv1.Verdict_VERDICT_ALLOW
		p.Check.Answer = v.reason(d)
	case unanswered(err):
		p.Check.Problem, p.silent = v.text("check.down"), err
	default:
		s.cfg.Log.WarnContext(r.Context(), "an address could not be checked", "error", err)
		p.Check.Problem = v.text("check.failed")
	}
}

// reason says in words why a decision was made.
func (v *view) reason(d *decisionv1.Decision) string {
	if d.GetReason() == decisionv1.Reason_REASON_MATCHED {
		return v.text(d.GetReason().String(), d.GetMatchedNet())
	}
	return v.text(d.GetReason().String())
}
