package allow

import (
	"fmt"
	"net/netip"
	"strings"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// AddressError says why a client address was refused.
type AddressError struct {
	Text    string // what was given, cut to 100 characters
	Problem string // what is wrong with it and what to do, to be read behind Text
}

func (e *AddressError) Error() string { return quoted(e.Text) + " " + e.Problem }

// ParseClient reads the address of a client as a peer reports it. An IPv4 address in IPv6 form becomes the IPv4 address.
// The empty string is the zero Addr: the client is unknown. The error is an *[AddressError].
func ParseClient(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, &AddressError{shown(s), "is not an IP address; pass the client's address alone, without port, brackets or name"}
	case addr.Zone() != "":
		// Unmap would drop the zone, and an address with a zone is not one that a list can mean.
		return netip.Addr{}, &AddressError{shown(s), "has a zone; pass the client's address without it"}
	}
	return addr.Unmap(), nil
}

// Scope says for which services the lists of mailboxes count. The zero value is the default: those that read mail.
type Scope struct{ submission bool }

// NewScope returns the default scope widened by the services an operator restricts as well. Only SMTP_SUBMISSION can be
// added: the others are restricted or exempt for good.
func NewScope(restrictAlso ...decisionv1.Service) (Scope, error) {
	var s Scope
	for _, svc := range restrictAlso {
		if svc != decisionv1.Service_SERVICE_SMTP_SUBMISSION {
			return Scope{}, fmt.Errorf("service %v cannot be added to the restricted ones; only SERVICE_SMTP_SUBMISSION can", svc)
		}
		s.submission = true
	}
	return s, nil
}

// ParseScope is [NewScope] with services named as on a command line, such as smtp-submission.
func ParseScope(names []string) (Scope, error) {
	services := make([]decisionv1.Service, len(names))
	for i, name := range names {
		key := "SERVICE_" + strings.ToUpper(strings.ReplaceAll(strings.TrimSpace(name), "-", "_"))
		services[i] = decisionv1.Service(decisionv1.Service_value[key])
	}
	scope, err := NewScope(services...)
	if err != nil {
		return Scope{}, fmt.Errorf("%s: only smtp-submission can be added to the restricted services", strings.Join(names, ","))
	}
	return scope, nil
}

// Restricts reports whether a mailbox's list counts for a service, and whether the service is known at all.
func (s Scope) Restricts(svc decisionv1.Service) (restricted, known bool) {
	switch svc {
	case decisionv1.Service_SERVICE_IMAP,
		decisionv1.Service_SERVICE_POP3,
		decisionv1.Service_SERVICE_MANAGESIEVE,
		decisionv1.Service_SERVICE_WEBMAIL:
		return true, true
	case decisionv1.Service_SERVICE_SMTP_SUBMISSION:
		return s.submission, true
	case decisionv1.Service_SERVICE_LOCAL_DELIVERY,
		decisionv1.Service_SERVICE_CALDAV,
		decisionv1.Service_SERVICE_CARDDAV,
		decisionv1.Service_SERVICE_WEBDAV:
		return false, true
	}
	return false, false
}

// Outcome is what [Decide] answers. Net is the longest matching net if the reason is MATCHED, else the zero Prefix.
type Outcome struct {
	Verdict decisionv1.Verdict
	Reason  decisionv1.Reason
	Net     netip.Prefix
}

// Decide answers whether a client may use a restricted service of a mailbox. A nil set is the set of a mailbox without a
// list, which is unrestricted; a zero client is one whose address is unknown. It does not allocate.
func Decide(set *Set, client netip.Addr) Outcome {
	if set == nil {
		return Outcome{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_UNRESTRICTED}
	}
	client = client.Unmap()
	if net, ok := set.Match(client); ok {
		return Outcome{decisionv1.Verdict_VERDICT_ALLOW, decisionv1.Reason_REASON_MATCHED, net}
	}
	reason := decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS
	switch {
	case !client.IsValid():
		reason = decisionv1.Reason_REASON_CLIENT_ADDRESS_UNKNOWN
	case !IsPublic(client):
		reason = decisionv1.Reason_REASON_CLIENT_ADDRESS_NOT_PUBLIC
	}
	return Outcome{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: reason}
}
