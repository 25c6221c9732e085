package check

import (
	"context"
	"fmt"
	"net/http"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

const doorNginxAuth = "nginx_auth"

// What integrations/nginx makes nginx send. It sends nothing else: no header of the client's.
const (
	headerMailbox   = "X-Allowednets-Mailbox"
	headerService   = "X-Allowednets-Service"
	headerClient    = "X-Allowednets-Client"
	headerForwarded = "X-Forwarded-For"
)

// nginxAuthDoor is the door for nginx's auth_request (https://nginx.org/en/docs/http/ngx_http_auth_request_module.html).
//
// Every answer is 204 or 403: anything else is an error 500 to nginx, and 401 would ask for another password. Its headers
// say why, for the configuration to show: X-Allowednets-Reason is a word of docs/semantics.md or a cause of
// allowednets_sidecar_unanswered_total, X-Allowednets-Text is for a person and may be absent.
type nginxAuthDoor struct{ cfg HTTPConfig }

// pass is what nginx gets to know.
type pass struct {
	allowed      bool
	reason, text string
}

// serve answers a request, which is refused if it is not authorized.
func (n *nginxAuthDoor) serve(w http.ResponseWriter, r *http.Request, authorized bool) {
	if r.ContentLength != 0 {
		// A location without proxy_pass_request_body off announces a body and sends none: do not wait for it.
		w.Header().Set("Connection", "close")
	}
	p := n.recovered(r, authorized)
	w.Header().Set("X-Allowednets-Reason", p.reason)
	if text := printable(p.text); text != "" {
		w.Header().Set("X-Allowednets-Text", text)
	}
	w.Header().Set("Cache-Control", "no-store")
	code := http.StatusForbidden
	if p.allowed {
		code = http.StatusNoContent
	}
	w.WriteHeader(code)
}

// recovered answers, and denies if that panics.
func (n *nginxAuthDoor) recovered(r *http.Request, authorized bool) (p pass) {
	defer func() {
		if v := recover(); v != nil {
			p = n.refuse(r.Context(), panicked(v))
		}
	}()
	if !authorized {
		return n.refuse(r.Context(), errUnauthorized)
	}
	p, err := n.allow(r)
	if err != nil {
		return n.refuse(r.Context(), err)
	}
	return p
}

func (n *nginxAuthDoor) allow(r *http.Request) (pass, error) {
	switch {
	case r.Method != http.MethodGet:
		return pass{}, &requestError{problem: "the method must be GET"}
	case r.ContentLength != 0:
		return pass{}, &requestError{problem: "a body is announced; the location needs proxy_pass_request_body off"}
	}
	mailbox, err := single(headerMailbox, r.Header.Values(headerMailbox))
	if err != nil {
		return pass{}, err
	}
	word, err := single(headerService, r.Header.Values(headerService))
	if err != nil {
		return pass{}, err
	}
	peer, err := single(headerClient, r.Header.Values(headerClient))
	if err != nil {
		return pass{}, err
	}
	if word == "" || peer == "" {
		return pass{}, &requestError{problem: headerService + " or " + headerClient + " is missing; see integrations/nginx"}
	}
	forwarded := r.Header.Values(headerForwarded)
	if len(forwarded) > 1 { // nginx makes one of several
		return pass{}, &requestError{problem: headerForwarded + " is there twice"}
	}
	svc := forwardedService(word)
	if svc == decisionv1.Service_SERVICE_UNSPECIFIED {
		return pass{}, &requestError{problem: fmt.Sprintf("the service %.20q is unknown", word)}
	}
	if mailbox == "" && n.cfg.Decider.Exempts(svc) {
		return pass{allowed: true, reason: reasonLabel(decisionv1.Reason_REASON_SERVICE_EXEMPT)}, nil
	}
	client, err := n.cfg.TrustedProxies.Client(peer, forwarded)
	if err != nil {
		return pass{}, err
	}
	dec, err := n.cfg.Decider.Decide(r.Context(), Request{Mailbox: mailbox, Client: addressText(client), Service: svc})
	if err != nil {
		return pass{}, err
	}
	if dec.Verdict != decisionv1.Verdict_VERDICT_ALLOW {
		return pass{reason: reasonLabel(dec.Reason), text: denialText(n.cfg.DenialText, dec)}, nil
	}
	return pass{allowed: true, reason: reasonLabel(dec.Reason)}, nil
}

// refuse is the answer to a request that cannot be answered.
func (n *nginxAuthDoor) refuse(ctx context.Context, err error) pass {
	n.cfg.Faults.count(ctx, doorNginxAuth, err)
	return pass{reason: causeOf(err), text: faultText(n.cfg.DenialText, err)}
}
