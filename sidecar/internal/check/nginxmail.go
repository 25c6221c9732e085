package check

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

const doorNginxMail = "nginx_mail"

// maxStatus bounds Auth-Status in octets: nginx gives up on an answer whose headers are longer than 1 KiB.
const maxStatus = 500

// nginxMailDoor is the door for the auth_http of nginx's mail proxy
// (https://nginx.org/en/docs/mail/ngx_mail_auth_http_module.html).
//
// Every answer is HTTP 200. Without Auth-Server nginx lets nobody through, whatever else stands there; without Auth-Wait it
// ends the connection, so that whoever guesses names needs a new one for each. What it lets through still has to log in to
// Dovecot, which asks again.
type nginxMailDoor struct{ cfg HTTPConfig }

// route is what nginx reads: a server to go on with, or what to tell the client after its protocol's word for no.
type route struct {
	backend netip.AddrPort // zero: nowhere
	status  string
}

// nginxService is what nginx's words mean, by the table in docs/semantics.md.
func nginxService(protocol string) decisionv1.Service {
	switch protocol {
	case "imap":
		return decisionv1.Service_SERVICE_IMAP
	case "pop3":
		return decisionv1.Service_SERVICE_POP3
	case "smtp":
		return decisionv1.Service_SERVICE_SMTP_SUBMISSION
	}
	return decisionv1.Service_SERVICE_UNSPECIFIED
}

// serve answers a request, which is refused if it is not authorized.
func (n *nginxMailDoor) serve(w http.ResponseWriter, r *http.Request, authorized bool) {
	r.Header.Del("Auth-Pass") // in clear text; nobody here needs it
	a := n.recovered(r, authorized)
	w.Header().Set("Auth-Status", a.status)
	if a.backend.IsValid() {
		w.Header().Set("Auth-Server", a.backend.Addr().String())
		w.Header().Set("Auth-Port", strconv.Itoa(int(a.backend.Port())))
	}
	w.WriteHeader(http.StatusOK)
}

// recovered answers, and denies if that panics.
func (n *nginxMailDoor) recovered(r *http.Request, authorized bool) (a route) {
	protocol := r.Header.Get("Auth-Protocol") // for the form of an answer; read strictly below
	defer func() {
		if v := recover(); v != nil {
			a = n.refuse(r.Context(), protocol, panicked(v))
		}
	}()
	if !authorized {
		return n.refuse(r.Context(), protocol, errUnauthorized)
	}
	a, err := n.allow(r)
	if err != nil {
		return n.refuse(r.Context(), protocol, err)
	}
	return a
}

func (n *nginxMailDoor) allow(r *http.Request) (route, error) {
	if r.Method != http.MethodGet {
		return route{}, &requestError{problem: "the method must be GET"}
	}
	var user, protocol, method, peer string
	for _, h := range []struct {
		name string
		to   *string
	}{{"Auth-User", &user}, {"Auth-Protocol", &protocol}, {"Auth-Method", &method}, {"Client-IP", &peer}} {
		values := r.Header.Values(h.name)
		if len(values) != 1 {
			return route{}, &requestError{problem: h.name + " must be there once; see integrations/nginx"}
		}
		*h.to = values[0]
	}
	svc := nginxService(protocol)
	if svc == decisionv1.Service_SERVICE_UNSPECIFIED {
		return route{}, &requestError{problem: fmt.Sprintf("the protocol %.20q is unknown", protocol)}
	}
	if method != "plain" { // CRAM-MD5 and APOP would need the password from us; without any nobody has logged in
		return route{}, &requestError{problem: "the method of authentication must be plain: see imap_auth, pop3_auth and smtp_auth in integrations/nginx"}
	}
	mailbox, err := url.PathUnescape(user)
	if err != nil {
		return route{}, &requestError{problem: "Auth-User is not percent-encoded"}
	}
	// A load balancer that nginx was not told about (set_real_ip_from) may be trusted here.
	client, err := n.cfg.TrustedProxies.Client(peer, r.Header.Values("Proxy-Protocol-Addr"))
	if err != nil {
		return route{}, err
	}
	dec, err := n.cfg.Decider.Decide(r.Context(), Request{Mailbox: mailbox, Client: addressText(client), Service: svc})
	if err != nil {
		return route{}, err
	}
	if dec.Verdict != decisionv1.Verdict_VERDICT_ALLOW {
		return route{status: refusal(protocol, denialText(n.cfg.DenialText, dec))}, nil
	}
	backend := n.cfg.NginxBackends[protocol]
	if !backend.IsValid() {
		return route{}, &requestError{problem: "no server to go on with: --nginx-backend names none for " + protocol}
	}
	return route{backend, "OK"}, nil
}

// refuse is the answer to a request that cannot be answered.
func (n *nginxMailDoor) refuse(ctx context.Context, protocol string, err error) route {
	n.cfg.Faults.count(ctx, doorNginxMail, err)
	return route{status: refusal(protocol, faultText(n.cfg.DenialText, err))}
}

// refusal is what a client reads after NO, -ERR or 535: what Dovecot would say, so that one cannot tell the two apart.
// Without a text that is what it says of a wrong password.
func refusal(protocol, text string) string {
	text = printable(text)
	if len(text) > maxStatus {
		cut := maxStatus
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut]
	}
	said := strings.TrimSpace(text) != ""
	if !said {
		text = "Authentication failed."
	}
	switch {
	case protocol == "imap" && said:
		return "[ALERT] " + text
	case protocol == "imap":
		return "[AUTHENTICATIONFAILED] " + text
	case protocol == "pop3":
		return "[AUTH] " + text
	}
	return text
}
