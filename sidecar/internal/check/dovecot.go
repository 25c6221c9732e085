package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

const doorDovecot = "dovecot"

// maxDrained is how much of an oversized body is read so that the sender gets to see the answer.
const maxDrained = 64 << 20

// dovecotDoor is the door for Dovecot's auth policy client
// (https://doc.dovecot.org/2.3/configuration_manual/authentication/auth_policy/).
//
// Every answer is HTTP 200 with an integer status and a string msg: with auth_policy_reject_on_fail=no, Dovecot's default,
// it logs the user in on anything else.
type dovecotDoor struct{ cfg HTTPConfig }

// answer is what Dovecot reads. Status 0 lets the log-in go on, a negative one denies.
type answer struct {
	Status int    `json:"status"`
	Msg    string `json:"msg"`
}

// login is what Dovecot's auth_policy_request_attributes in integrations/dovecot/ send.
type login struct {
	login, remote, realRemote, protocol, stage, via string
}

// DovecotService is what Dovecot means by the name of a protocol, by the table in docs/semantics.md; unspecified if the table
// does not have it.
func DovecotService(protocol string) decisionv1.Service {
	switch protocol {
	case "imap":
		return decisionv1.Service_SERVICE_IMAP
	case "pop3":
		return decisionv1.Service_SERVICE_POP3
	case "sieve", "managesieve":
		return decisionv1.Service_SERVICE_MANAGESIEVE
	case "submission", "smtp":
		return decisionv1.Service_SERVICE_SMTP_SUBMISSION
	case "lmtp", "doveadm":
		return decisionv1.Service_SERVICE_LOCAL_DELIVERY
	}
	return decisionv1.Service_SERVICE_UNSPECIFIED
}

// serve answers a request, which is refused if it is not authorized.
func (d *dovecotDoor) serve(w http.ResponseWriter, r *http.Request, authorized bool) {
	a := d.recovered(r, authorized)
	body := []byte(`{"status":0,"msg":""}`)
	if a != (answer{}) {
		a.Msg = printable(a.Msg)
		body, _ = json.Marshal(a) // an int and a string always can be
	}
	w.Header()["Content-Type"] = typeJSON
	_, _ = w.Write(body)
}

// recovered answers, and denies if that panics.
func (d *dovecotDoor) recovered(r *http.Request, authorized bool) (a answer) {
	defer func() {
		if p := recover(); p != nil {
			a = d.refuse(r.Context(), panicked(p))
		}
	}()
	body, err := readBody(r)
	if errors.Is(err, errTooLarge) {
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, maxDrained))
	}
	if err != nil {
		return d.refuse(r.Context(), &requestError{"the body cannot be read", err})
	}
	if !authorized {
		return d.refuse(r.Context(), errUnauthorized)
	}
	if r.Method != http.MethodPost {
		return d.refuse(r.Context(), &requestError{problem: "the method must be POST"})
	}
	command, err := dovecotCommand(r.URL.RawQuery)
	if err != nil {
		return d.refuse(r.Context(), err)
	}
	if command == "report" {
		return answer{} // Dovecot tells how a log-in ended; there is nothing to decide
	}
	l, err := parseLogin(body)
	if err != nil {
		return d.refuse(r.Context(), err)
	}
	return d.allow(r.Context(), l)
}

func (d *dovecotDoor) allow(ctx context.Context, l login) answer {
	svc, err := d.service(l)
	if err != nil {
		return d.quiet(d.refuse(ctx, err), l)
	}
	dec, err := d.cfg.Decider.Decide(ctx, Request{Mailbox: l.login, Client: l.remote, Service: svc})
	if err != nil {
		return d.quiet(d.refuse(ctx, err), l)
	}
	if dec.Verdict == decisionv1.Verdict_VERDICT_ALLOW {
		return answer{}
	}
	return d.quiet(answer{-1, denialText(d.cfg.DenialText, dec)}, l)
}

// quiet empties the message where it would say too much: after authentication it would tell a thief that the password is
// right, so it is shown only to those of whom we know that they have not got so far.
func (d *dovecotDoor) quiet(a answer, l login) answer {
	if l.stage != "before" {
		a.Msg = ""
	}
	return a
}

// refuse is the answer to a request that cannot be answered. Without a text it reads like a wrong password.
func (d *dovecotDoor) refuse(ctx context.Context, err error) answer {
	d.cfg.Faults.count(ctx, doorDovecot, err)
	return answer{-1, faultText(d.cfg.DenialText, err)}
}

// service says what the client wants.
func (d *dovecotDoor) service(l login) (decisionv1.Service, error) {
	svc := DovecotService(l.protocol)
	if svc == decisionv1.Service_SERVICE_UNSPECIFIED {
		return 0, &requestError{problem: fmt.Sprintf("the protocol %.20q is unknown", l.protocol)}
	}
	if l.via == "" || !d.trusts(l.realRemote) {
		return svc, nil
	}
	via := forwardedService(l.via)
	switch {
	case via == decisionv1.Service_SERVICE_UNSPECIFIED:
		return 0, &requestError{problem: fmt.Sprintf("a trusted proxy logs in for %.20q, which is unknown", l.via)}
	case svc == decisionv1.Service_SERVICE_IMAP:
		return via, nil // the proxy reads the mailbox through IMAP for somebody else
	case via == decisionv1.Service_SERVICE_WEBMAIL:
		return svc, nil
	}
	return 0, &requestError{problem: fmt.Sprintf("a trusted proxy logs in for %s through %s", l.via, l.protocol)}
}

func (d *dovecotDoor) trusts(realRemote string) bool {
	addr, err := allow.ParseClient(realRemote)
	return err == nil && d.cfg.TrustedProxies.Trust(addr)
}

// dovecotCommand returns the command in a query. Dovecot appends "?command=allow" to the configured URL, or "command=allow"
// if that ends in &, so the query may begin with another ? or &.
func dovecotCommand(query string) (string, error) {
	query = strings.TrimLeft(query, "?&")
	if command, ok := strings.CutPrefix(query, "command="); ok && (command == "allow" || command == "report") {
		return command, nil // as Dovecot asks
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return "", &requestError{problem: "the query cannot be read"}
	}
	if c := values["command"]; len(c) == 1 && (c[0] == "allow" || c[0] == "report") {
		return c[0], nil
	}
	return "", &requestError{problem: "the query must have one command, allow or report"}
}

// field returns what a name stands for, nil if nothing, and a bit of its own.
func (l *login) field(name string) (field *string, bit uint) {
	switch name {
	case "login":
		return &l.login, 1
	case "remote":
		return &l.remote, 2
	case "protocol":
		return &l.protocol, 4
	case "real_remote":
		return &l.realRemote, 8
	case "stage":
		return &l.stage, 16
	case "via":
		return &l.via, 32
	}
	return nil, 0
}

// parseLogin reads the body. Names it does not know are ignored; names it knows must be strings, and must not contradict
// each other.
func parseLogin(body []byte) (login, error) {
	if l, ok := parseFlatLogin(string(body)); ok {
		return l, nil
	}
	return parseAnyLogin(body)
}

// parseFlatLogin is [parseAnyLogin] for what Dovecot sends nearly always. It does not know what is wrong with the others.
func parseFlatLogin(body string) (l login, ok bool) {
	var seen uint
	ok = flatStrings(body, func(name, value string) bool {
		if field, bit := l.field(name); field != nil {
			if seen&bit != 0 {
				return false
			}
			*field, seen = value, seen|bit
		}
		return true
	})
	const needed = 1 | 2 | 4
	return l, ok && seen&needed == needed
}

func parseAnyLogin(body []byte) (login, error) {
	var l login
	dec := json.NewDecoder(bytes.NewReader(body))
	bad := &requestError{problem: "the body is no JSON object of strings, or contradicts itself"}
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return login{}, bad
	}
	var seen uint
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return login{}, bad
		}
		name, _ := t.(string) // the names of an object's members are strings
		field, bit := l.field(name)
		if field == nil {
			var ignored json.RawMessage
			if err := dec.Decode(&ignored); err != nil {
				return login{}, bad
			}
			continue
		}
		var value any
		if err := dec.Decode(&value); err != nil {
			return login{}, bad
		}
		s, ok := value.(string)
		if !ok || seen&bit != 0 && s != *field {
			return login{}, bad
		}
		*field, seen = s, seen|bit
	}
	if _, err := dec.Token(); err != nil {
		return login{}, bad
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return login{}, bad
	}
	for _, name := range []string{"login", "remote", "protocol"} {
		if _, bit := l.field(name); seen&bit == 0 {
			return login{}, &requestError{problem: name + " is missing; see auth_policy_request_attributes in integrations/dovecot"}
		}
	}
	return l, nil
}
