package web

import (
	"encoding/hex"
	"net/url"
	"strings"

	"github.com/allowednets/allowednets/internal/allow"
)

// Which mailboxes a list shows.
const (
	showAll          = ""
	showRestricted   = "restricted"
	showUnrestricted = "unrestricted"
)

// listState is which part of a domain's mailboxes is shown. It travels in every URL of a mailbox, so that closing the panel
// leads back to it.
type listState struct {
	search, show string
	after        allow.Mailbox // the last one of the page before
}

// readListState reads what a URL says. What cannot be is left out.
func readListState(q url.Values, domain string) listState {
	state := listState{search: readSearch(q)}
	if show := q.Get("show"); show == showRestricted || show == showUnrestricted {
		state.show = show
	}
	if after, err := allow.ParseMailbox(q.Get("after")); err == nil && after.Domain() == domain {
		state.after = after
	}
	return state
}

func readSearch(q url.Values) string { return clip(strings.ToValidUTF8(q.Get("q"), "\uFFFD"), 64) }

func (s listState) values() url.Values {
	return query(map[string]string{"q": s.search, "show": s.show, "after": s.after.String()})
}

// query leaves out what is empty.
func query(values map[string]string) url.Values {
	v := make(url.Values)
	for name, value := range values {
		if value != "" {
			v.Set(name, value)
		}
	}
	return v
}

func clip(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most])
	}
	return s
}

// domainsURL is the list of domains behind one of them.
func domainsURL(search, after string) string {
	return withQuery("/domains", query(map[string]string{"q": search, "after": after}))
}

// domainURL is the page of a domain.
func domainURL(domain string, state listState) string {
	return withQuery("/domains/"+url.PathEscape(domain), state.values())
}

// mailboxURL is a page of a mailbox: below is "", "/check", "/history" or "/progress".
func mailboxURL(m allow.Mailbox, below string, state listState, more ...string) string {
	v := state.values()
	for i := 0; i+1 < len(more); i += 2 {
		v.Set(more[i], more[i+1])
	}
	return withQuery("/domains/"+url.PathEscape(m.Domain())+"/mailboxes/"+url.PathEscape(m.String())+below, v)
}

func withQuery(path string, v url.Values) string {
	if len(v) == 0 {
		return path
	}
	return path + "?" + v.Encode()
}

// anchor is the id of a mailbox's row.
func anchor(m allow.Mailbox) string {
	id := m.ID()
	return "m" + hex.EncodeToString(id[:6])
}

// trim takes away white space and what is invisible around a text.
func trim(s string) string { return strings.TrimFunc(s, ignorable) }
