// Package directory knows which domains and mailboxes an operator has.
package directory

import (
	"errors"

	"github.com/allowednets/allowednets/internal/allow"
)

// ErrUnavailable is the error when a database does not answer.
var ErrUnavailable = errors.New("the directory does not answer")

// Domain is a domain that the operator has.
type Domain struct {
	Name      string // canonical
	Mailboxes int    // how many it has
}

// Query chooses mailboxes of a domain.
type Query struct {
	Search string        // part of the local part, or, if it has an @, of the whole name; any case; "" for all
	After  allow.Mailbox // the last mailbox of the page before; the zero value for the first page
	Limit  int           // most mailboxes on the page; 0 for all
}

// Page is a part of a domain's mailboxes.
type Page struct {
	Mailboxes []allow.Mailbox // ordered by name
	More      bool            // whether there are mailboxes after these
	Total     int             // that match the search, on all pages
}
