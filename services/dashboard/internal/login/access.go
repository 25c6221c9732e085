package login

import "slices"

// Action is something a person wants to do with the mailboxes of a domain.
type Action int

// The actions. Whoever may [Change] may [View].
const (
	View   Action = iota + 1 // see mailboxes, their lists and history; check an address
	Change                   // save, lift and restore lists
)

// All in the place of a domain stands for every domain.
const All = "*"

// User is who is logged in, with the rights of this moment. The zero value may do nothing.
type User struct {
	Name   string // as the audit trail shows it
	rights Rights
}

// Rights are what a role may do where: lists of canonical domains, or [All].
type Rights struct {
	Administrator []string // may change and view
	Auditor       []string // may view
}

// May reports whether the user may do a in domain, a canonical domain. It is the only place that decides this.
func (u User) May(a Action, domain string) bool {
	if domain == "" || domain == All {
		return false
	}
	in := func(domains []string) bool { return slices.Contains(domains, domain) || slices.Contains(domains, All) }
	switch a {
	case Change:
		return in(u.rights.Administrator)
	case View:
		return in(u.rights.Administrator) || in(u.rights.Auditor)
	}
	return false
}
