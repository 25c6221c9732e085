package directory

import (
	"cmp"
	"slices"
	"strings"

	"golang.org/x/text/unicode/norm"

	"github.com/allowednets/allowednets/internal/allow"
)

// listing is the mailboxes of one domain, ordered by name, each once. It is immutable.
type listing []allow.Mailbox

func compare(a, b allow.Mailbox) int { return cmp.Compare(a.String(), b.String()) }

// page answers q.
func (l listing) page(q Query) Page {
	search := strings.ToLower(norm.NFC.String(strings.TrimSpace(q.Search)))
	whole := strings.Contains(search, "@")
	first, exact := slices.BinarySearchFunc(l, q.After, compare)
	if exact {
		first++
	}
	var p Page
	if search == "" { // no need to look at each
		rest := l[first:]
		n := len(rest)
		if q.Limit > 0 {
			n = min(n, q.Limit)
		}
		return Page{Mailboxes: slices.Clone(rest[:n]), More: n < len(rest), Total: len(l)}
	}
	for i, m := range l {
		name := m.String()
		if !whole {
			name = name[:strings.LastIndexByte(name, '@')]
		}
		if !strings.Contains(name, search) {
			continue
		}
		p.Total++
		switch {
		case i < first:
		case q.Limit > 0 && len(p.Mailboxes) == q.Limit:
			p.More = true
		default:
			p.Mailboxes = append(p.Mailboxes, m)
		}
	}
	return p
}

func (l listing) has(m allow.Mailbox) bool {
	_, found := slices.BinarySearchFunc(l, m, compare)
	return found
}
