package faults

import (
	"fmt"
	"net/netip"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// query is one access that is asked about.
type query struct {
	mailbox string // canonical
	spelled string // as it is sent
	address string
	service decisionv1.Service
}

// answer is what a sidecar says, without the state it is about.
type answer struct {
	verdict decisionv1.Verdict
	reason  decisionv1.Reason
	matched string
}

// decide is the naive model of a decision: every net, one after the other. It shares no code with the product.
func decide(nets []netip.Prefix, q query) answer {
	allowed := func(r decisionv1.Reason) answer { return answer{verdict: decisionv1.Verdict_VERDICT_ALLOW, reason: r} }
	denied := func(r decisionv1.Reason) answer { return answer{verdict: decisionv1.Verdict_VERDICT_DENY, reason: r} }
	if q.service == decisionv1.Service_SERVICE_CALDAV {
		return allowed(decisionv1.Reason_REASON_SERVICE_EXEMPT)
	}
	if len(nets) == 0 {
		return allowed(decisionv1.Reason_REASON_UNRESTRICTED)
	}
	if q.address == "" {
		return denied(decisionv1.Reason_REASON_CLIENT_ADDRESS_UNKNOWN)
	}
	address := netip.MustParseAddr(q.address).Unmap()
	longest := -1
	a := denied(decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS)
	if address.IsPrivate() {
		a.reason = decisionv1.Reason_REASON_CLIENT_ADDRESS_NOT_PUBLIC
	}
	for _, n := range nets {
		if n.Contains(address) && n.Bits() > longest {
			longest = n.Bits()
			a = allowed(decisionv1.Reason_REASON_MATCHED)
			a.matched = text(n)
		}
	}
	return a
}

// text is the canonical text of a net: a single address stands without its length.
func text(n netip.Prefix) string {
	if n.IsSingleIP() {
		return n.Addr().String()
	}
	return n.String()
}

// world's people: few enough that all of them change often.
func mailboxes() []string {
	var all []string
	for i := range 48 {
		all = append(all, fmt.Sprintf("user%02d@example%d.org", i, i%3))
	}
	return all
}

// pool are the nets that lists consist of: they overlap, so that a decision depends on more than one.
func pool() []netip.Prefix {
	var all []netip.Prefix
	for a := range 3 {
		all = append(all, netip.MustParsePrefix(fmt.Sprintf("9.%d.0.0/16", a)), netip.MustParsePrefix(fmt.Sprintf("2a00:%d::/32", a+1)))
		for b := range 2 {
			all = append(all, netip.MustParsePrefix(fmt.Sprintf("9.%d.%d.0/24", a, b)), netip.MustParsePrefix(fmt.Sprintf("2a00:%d:%d::/48", a+1, b+1)),
				netip.MustParsePrefix(fmt.Sprintf("9.%d.%d.1/32", a, b)))
		}
	}
	return all
}

// queries are all accesses that the checkers ask about.
func queries() []query {
	var clients []string
	for a := range 3 {
		for b := range 2 {
			clients = append(clients, fmt.Sprintf("9.%d.%d.1", a, b), fmt.Sprintf("::ffff:9.%d.%d.2", a, b), fmt.Sprintf("2a00:%d:%d::1", a+1, b+1))
		}
	}
	clients = append(clients, "8.8.8.8", "10.0.0.1", "2a00:9::1", "")
	var all []query
	for i, m := range mailboxes() {
		for _, c := range clients {
			all = append(all, query{mailbox: m, spelled: m, address: c, service: decisionv1.Service_SERVICE_IMAP})
		}
		all = append(all, query{mailbox: m, spelled: fmt.Sprintf("User%02d@EXAMPLE%d.org", i, i%3), address: clients[i%len(clients)], service: decisionv1.Service_SERVICE_WEBMAIL},
			query{mailbox: m, spelled: m, address: "8.8.8.8", service: decisionv1.Service_SERVICE_CALDAV})
	}
	return all
}
