// Package allow holds what Allowed Nets means: how a mailbox and a list of nets are read, and what a check of a client
// address answers. docs/semantics.md describes the same for readers outside.
//
// It is pure: no I/O, no clock, no logger. All its types are safe for concurrent use once made.
package allow

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxShown is how many characters of a bad value are repeated in an error.
const maxShown = 100

// shown returns s as an error may carry it: valid UTF-8 of at most [maxShown] characters.
func shown(s string) string {
	if len(s) > maxShown*utf8.UTFMax {
		s = s[:maxShown*utf8.UTFMax]
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	n := 0
	for i := range s {
		if n == maxShown {
			return s[:i]
		}
		n++
	}
	return s
}

// quoted returns s as a message names it: cut as by [shown], with everything escaped that does not print.
func quoted(s string) string { return strconv.Quote(shown(s)) }
