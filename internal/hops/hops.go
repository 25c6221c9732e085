// Package hops says who the client behind proxies is.
package hops

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/allowednets/allowednets/internal/allow"
)

// Trusted are the networks of peers whose word about the client is believed (--trusted-proxies).
type Trusted []netip.Prefix

// Parse reads addresses and networks. What could be wider than it was meant is refused.
func Parse(texts []string) (Trusted, error) {
	var t Trusted
	for _, text := range texts {
		p, err := parse(strings.TrimSpace(text))
		if err != nil {
			return nil, err
		}
		t = append(t, p)
	}
	return t, nil
}

func parse(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%.60q is not an address or a network such as 192.0.2.0/28", text)
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%v is an address inside the network %v: write %v for the address alone", p, p.Masked(), p.Addr())
	case p.Bits() == 0:
		return netip.Prefix{}, fmt.Errorf("%v would let everybody claim any address", p)
	}
	return p, nil
}

// maxHops bounds how many addresses of X-Forwarded-For are read.
const maxHops = 100

// Trust reports whether the word of addr is believed. That of nobody is not.
func (t Trusted) Trust(addr netip.Addr) bool {
	return slices.ContainsFunc(t, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// Client says who the client is, by the rules in docs/semantics.md ("Forwarded addresses"): the one place that reads
// X-Forwarded-For. peer is the other end of the connection as the program that asks saw it, empty if it
// does not know; forwarded are the values of the header, in the order of arrival. The zero Addr is a client that is not
// known. The error is an *[allow.AddressError], and means a denial.
func (t Trusted) Client(peer string, forwarded []string) (netip.Addr, error) {
	client, err := allow.ParseClient(peer)
	if err != nil {
		return netip.Addr{}, err
	}
	read := 0
	for _, line := range slices.Backward(forwarded) {
		for more := true; more && t.Trust(client); read++ {
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
