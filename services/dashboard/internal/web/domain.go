package web

import (
	"context"
	"net/http"
	"strings"

	"golang.org/x/text/unicode/norm"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
)

const (
	rowsPerPage = 100
	// chunk is how many mailboxes of the directory are read at once.
	chunk = 1000
)

// row is a mailbox in the list of a domain.
type row struct {
	Mailbox     string
	Anchor, URL string
	Nets        int  // 0: unrestricted
	Gone        bool // it has a list but is not in the directory
	Current     bool // the panel shows it
	name        allow.Mailbox
}

// filter is one of the choices of what to show.
type filter struct {
	Label, URL, Count string
	Current           bool
}

// domainPage is a domain with its mailboxes, and at the right the panel of one of them.
type domainPage struct {
	Domain, URL, Search, Show string
	Changes                   bool
	Filters                   []filter
	Rows                      []row
	Range, First, Next        string
	EmptyTitle, EmptyText     string
	All                       string
	Panel                     *panel
}

func (s *site) showDomain(w http.ResponseWriter, r *http.Request, at place) error {
	return s.renderDomain(w, r, http.StatusOK, at, nil)
}

// renderDomain shows a domain. With a panel it shows that in any case, so that nothing typed in it is lost.
func (s *site) renderDomain(w http.ResponseWriter, r *http.Request, status int, at place, p *panel) error {
	v := s.view(r)
	state := readListState(r.URL.Query(), at.domain)
	data := domainPage{
		Domain: at.domain, URL: domainURL(at.domain, listState{}), Search: state.search, Show: state.show, Changes: at.changes(), Panel: p,
	}
	var err error
	if p != nil && p.silent != nil {
		err = p.silent
	} else {
		err = s.fillDomain(r, &data, at, state)
	}
	if err != nil {
		if p == nil {
			return err
		}
		why := problemOf(err)
		data.EmptyTitle, data.EmptyText = v.text(why.key+".title"), v.text(why.key+".text")
	}
	title := at.domain
	if p != nil {
		title = p.Mailbox
	}
	return s.render(w, r, status, "domain", page{Title: title, Wide: p != nil, View: data})
}

func (s *site) fillDomain(r *http.Request, data *domainPage, at place, state listState) error {
	v := s.view(r)
	domains, err := s.cfg.Directory.Domains(r.Context(), func(domain string) bool { return domain == at.domain })
	if err != nil {
		return err
	}
	mailboxes := 0
	if len(domains) > 0 {
		mailboxes = domains[0].Mailboxes
	}
	count, err := s.census(r.Context(), at.domain, mailboxes)
	if err != nil {
		return err
	}
	if len(domains) == 0 && count.Restricted == 0 {
		return errNotFound
	}
	rows, more, err := s.rows(r.Context(), at.domain, state)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		show, key string
		count     int
	}{
		{showAll, "domain.all", count.Mailboxes}, {showRestricted, "domain.restricted", count.Restricted},
		{showUnrestricted, "domain.unrestricted", count.Unrestricted},
	} {
		data.Filters = append(data.Filters, filter{
			Label: v.text(f.key), Count: v.number(f.count), Current: f.show == state.show,
			URL: domainURL(at.domain, listState{search: state.search, show: f.show}),
		})
	}
	for i := range rows {
		m := rows[i].name
		rows[i].Mailbox, rows[i].Anchor, rows[i].Current = m.String(), anchor(m), m == at.mailbox
		rows[i].URL = mailboxURL(m, "", state)
	}
	data.Rows = rows
	if len(rows) == 0 {
		data.empty(v, count, state)
		return nil
	}
	data.Range = v.text("domain.range", rows[0].Mailbox, rows[len(rows)-1].Mailbox)
	if more {
		data.Next = domainURL(at.domain, listState{search: state.search, show: state.show, after: rows[len(rows)-1].name})
	}
	if state.after != (allow.Mailbox{}) {
		data.First = domainURL(at.domain, listState{search: state.search, show: state.show})
	}
	return nil
}

// empty says why there is nothing to see.
func (d *domainPage) empty(v *view, count census, state listState) {
	key := "domain.empty"
	switch {
	case count.Mailboxes == 0:
	case state.search != "" || state.after != (allow.Mailbox{}):
		key = "domain.nothing"
	case state.show == showRestricted:
		key = "domain.unlisted"
	case state.show == showUnrestricted:
		key = "domain.everything"
	}
	d.EmptyTitle, d.EmptyText = v.text(key+".title"), v.text(key+".text")
	if count.Mailboxes > 0 {
		d.All = d.URL
	}
}

// rows returns a page of mailboxes: those of the directory and those that have a list, in one order.
func (s *site) rows(ctx context.Context, domain string, state listState) (rows []row, more bool, err error) {
	search := strings.ToLower(norm.NFC.String(strings.TrimSpace(state.search)))
	size := listPage
	if state.show == showAll && search == "" {
		size = rowsPerPage + 1
	}
	restricted, err := s.policy.lists(ctx, domain, state.after.String(), size)
	if err != nil {
		return nil, false, err
	}
	known := &names{directory: s.cfg.Directory, domain: domain, query: directory.Query{Search: search, After: state.after, Limit: chunk}, more: true}
	if state.show == showAll {
		known.query.Limit = rowsPerPage + 1
	}
	for {
		next, err := s.nextRow(ctx, state.show, restricted, known, search)
		if err != nil || next == nil {
			return rows, false, err
		}
		if len(rows) == rowsPerPage {
			return rows, true, nil
		}
		rows = append(rows, *next)
	}
}

// nextRow merges both orders. It returns nil at the end.
func (s *site) nextRow(ctx context.Context, show string, restricted *lists, known *names, search string) (*row, error) {
	for {
		list, err := restricted.peek(ctx)
		if err != nil {
			return nil, err
		}
		if show == showRestricted {
			if list == nil {
				return nil, nil
			}
			restricted.next()
			if !matches(list, search) {
				continue
			}
			name, err := allow.ParseMailbox(list.GetMailbox())
			if err != nil {
				return nil, err
			}
			has, err := s.cfg.Directory.Has(ctx, name)
			return &row{name: name, Nets: len(list.GetNets()), Gone: !has}, err
		}
		name, err := known.peek(ctx)
		if err != nil {
			return nil, err
		}
		if list == nil && name == (allow.Mailbox{}) {
			return nil, nil
		}
		order := -1 // which comes first: the name of the directory, or the list
		switch {
		case name == (allow.Mailbox{}):
			order = 1
		case list != nil:
			order = strings.Compare(name.String(), list.GetMailbox())
		}
		next := &row{name: name}
		if order >= 0 {
			restricted.next()
			if next.Nets = len(list.GetNets()); order > 0 {
				next.Gone = true
				if next.name, err = allow.ParseMailbox(list.GetMailbox()); err != nil {
					return nil, err
				}
			}
		}
		if order <= 0 {
			known.next()
		}
		if next.Gone && !matches(list, search) || show == showUnrestricted && next.Nets > 0 {
			continue
		}
		return next, nil
	}
}

// matches is the search of [directory.Query], for mailboxes that are not in the directory.
func matches(list *policyv1.AllowedNets, search string) bool {
	name := list.GetMailbox()
	if !strings.Contains(search, "@") {
		name = name[:strings.LastIndexByte(name, '@')+1]
	}
	return strings.Contains(name, search)
}

// names reads the mailboxes of the directory in order, chunk by chunk as they are needed.
type names struct {
	directory Directory
	domain    string
	query     directory.Query
	page      []allow.Mailbox
	more      bool
}

// peek returns the next one; the zero value behind the last.
func (n *names) peek(ctx context.Context) (allow.Mailbox, error) {
	if len(n.page) == 0 && n.more {
		page, err := n.directory.Mailboxes(ctx, n.domain, n.query)
		if err != nil {
			return allow.Mailbox{}, err
		}
		n.page, n.more = page.Mailboxes, page.More && len(page.Mailboxes) > 0
		if n.more {
			n.query.After = page.Mailboxes[len(page.Mailboxes)-1]
		}
		n.query.Limit = chunk
	}
	if len(n.page) == 0 {
		return allow.Mailbox{}, nil
	}
	return n.page[0], nil
}

func (n *names) next() { n.page = n.page[1:] }
