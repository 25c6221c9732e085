package check

import (
	"errors"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// DefaultDenialText is what a person reads in the mail client when access is denied.
const DefaultDenialText = "Access from {address} is not allowed for this mailbox. Ask your administrator."

// unavailableText is what a person reads when there is no answer.
const unavailableText = "Access to this mailbox cannot be checked right now. Try again in a minute."

// ValidateDenialText reports why a denial text cannot be used.
func ValidateDenialText(text string) error {
	if !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
		return errors.New("control characters are not allowed: they would forge lines of the IMAP protocol")
	}
	return nil
}

// denialText is what a person reads of a denial; text is that of the operator.
func denialText(text string, d Decision) string {
	if text == "" {
		return "" // the operator wants nothing to be said, whatever the reason
	}
	if d.Reason == decisionv1.Reason_REASON_STALE {
		return unavailableText
	}
	address := "an unknown address"
	if d.Client.IsValid() {
		address = d.Client.String()
	}
	return strings.ReplaceAll(text, "{address}", address)
}

// faultText is what a person reads where there was no answer. Of a fault that waiting does not mend it says nothing: a
// person could not do anything about it.
func faultText(text string, err error) string {
	if text == "" || !errors.Is(err, ErrNotSynced) {
		return ""
	}
	return unavailableText
}

// printable is s without control characters, which would forge lines of a protocol.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return -1
		}
		return c
	}, s)
}

// addressText is how a [Request] names an address.
func addressText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
}
