package check

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/allowednets/allowednets/internal/allow"
)

// hops are the networks of peers whose word about the client is believed (--trusted-proxies).
type hops []netip.Prefix

// maxHops bounds how many addresses of X-Forwarded-For are read.
const maxHops = 100

// trust reports whether the word of addr is believed. That of nobody is not.
func (h hops) trust(addr netip.Addr) bool {
	return slices.ContainsFunc(h, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// client says who the client is, by the rules in docs/semantics.md ("Forwarded addresses"): the one place that reads
// X-Forwarded-For, for every door. peer is the other end of the connection as the program that asks saw it, empty if it
// does not know; forwarded are the values of the header, in the order of arrival. The zero Addr is a client that is not
// known. The error is an *[allow.AddressError], and means a denial.
func (h hops) client(peer string, forwarded []string) (netip.Addr, error) {
	client, err := allow.ParseClient(peer)
	if err != nil {
		return netip.Addr{}, err
	}
	read := 0
	for _, line := range slices.Backward(forwarded) {
		for more := true; more && h.trust(client); read++ {
			if read == maxHops {
				return netip.Addr{}, &allow.AddressError{Text: "X-Forwarded-For", Problem: fmt.Sprintf("names more than %d trusted hops", maxHops)}
			}
			comma := strings.LastIndexByte(line, ',')
			hop := strings.Trim(line[comma+1:], " \t")
			if hop == "" {
				return netip.Addr{}, &allow.AddressError{Text: "X-Forwarded-For", Problem: "has an empty element"}
			}
			if client, err = allow.ParseClient(hop); err != nil {
				return netip.Addr{}, err
			}
			if more = comma >= 0; more {
				line = line[:comma]
			}
		}
	}
	return client, nil
}

// addressText is how a [Request] names an address.
func addressText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
}
