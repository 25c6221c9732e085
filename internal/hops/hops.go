// Package hops finds the address of a client behind proxies.
package hops

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxEntries bounds how many entries of a header are looked at; no honest chain of proxies is longer.
const maxEntries = 32

// ParseTrusted reads addresses and networks of proxies whose word is believed. What could be wider than it was meant is
// refused.
func ParseTrusted(texts []string) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, text := range texts {
		p, err := parseTrusted(strings.TrimSpace(text))
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

func parseTrusted(text string) (netip.Prefix, error) {
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

// Client returns the address of the client that a request came from: peer, the other end of the connection ("host:port"),
// if that is not trusted; otherwise the last entry of forwardedFor, the values of X-Forwarded-For in their order, that is
// not trusted itself. Every proxy appends its own peer, so that what stands further left is a client's claim. If all
// are trusted, it is the leftmost. An entry that is no address ends the search: then ok is false, as it is for a peer that is
// no address. Zones are not for addresses from elsewhere and are refused in entries; the result is never a mapped address.
func Client(peer string, forwardedFor []string, trusted []netip.Prefix) (client netip.Addr, ok bool) {
	ap, err := netip.ParseAddrPort(peer)
	if err != nil {
		return netip.Addr{}, false
	}
	client = ap.Addr().WithZone("").Unmap()
	entries := strings.Split(strings.Join(forwardedFor, ","), ",")
	if len(forwardedFor) == 0 {
		entries = nil
	}
	for n := 0; isTrusted(client, trusted) && len(entries) > 0; n++ {
		last := len(entries) - 1
		client, ok = parseEntry(entries[last])
		if !ok || n == maxEntries {
			return netip.Addr{}, false
		}
		entries = entries[:last]
	}
	return client, true
}

func isTrusted(a netip.Addr, trusted []netip.Prefix) bool {
	for _, p := range trusted {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// parseEntry reads an address as proxies write it: bare, in brackets, or with a port.
func parseEntry(text string) (netip.Addr, bool) {
	text = strings.TrimSpace(text)
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"))
	if err != nil {
		ap, apErr := netip.ParseAddrPort(text)
		if apErr != nil {
			return netip.Addr{}, false
		}
		addr = ap.Addr()
	}
	if addr.Zone() != "" {
		return netip.Addr{}, false
	}
	return addr.Unmap(), true
}
