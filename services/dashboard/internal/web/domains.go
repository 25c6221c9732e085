package web

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

const (
	domainsPerPage = 100
	// countsAtOnce is how many domains are counted at the same time.
	countsAtOnce = 8
)

// census is how many mailboxes of a domain have a list and how many have none.
type census struct{ Mailboxes, Restricted, Unrestricted int }

// census counts. Lists of mailboxes that are not in the directory count as restricted. Beyond a thousand lists they are not
// told apart from the others any more, so that unrestricted may be too low by their number.
func (s *site) census(ctx context.Context, domain string, mailboxes int) (census, error) {
	restricted, err := s.policy.lists(ctx, domain, "", listPage)
	if err != nil {
		return census{}, err
	}
	listed := restricted.total
	if !restricted.more && listed > 0 {
		all, err := s.cfg.Directory.Mailboxes(ctx, domain, directory.Query{})
		if err != nil {
			return census{}, err
		}
		listed = 0
		for _, list := range restricted.page {
			if _, known := slices.BinarySearchFunc(all.Mailboxes, list.GetMailbox(), func(m allow.Mailbox, name string) int {
				return strings.Compare(m.String(), name)
			}); known {
				listed++
			}
		}
	}
	c := census{Restricted: restricted.total, Unrestricted: max(0, mailboxes-listed)}
	c.Mailboxes = c.Restricted + c.Unrestricted
	return c, nil
}

// domainItem is a domain in the list of domains.
type domainItem struct {
	Name, URL string
	census
}

// domainsPage is a page of the domains that somebody may see.
type domainsPage struct {
	Domains            []domainItem
	Search             string
	Many               bool // more than a page of them
	Range, First, Next string
}

// showDomains counts only what it shows: each count is a call of the policy service.
func (s *site) showDomains(w http.ResponseWriter, r *http.Request) error {
	user, _ := login.UserOf(r.Context())
	domains, err := s.cfg.Directory.Domains(r.Context(), func(domain string) bool { return user.May(login.View, domain) })
	if err != nil {
		return err
	}
	data := domainsPage{Search: readSearch(r.URL.Query()), Many: len(domains) > domainsPerPage}
	search, after := domainSearch(data.Search), r.URL.Query().Get("after")
	domains = slices.DeleteFunc(domains, func(d directory.Domain) bool { return d.Name <= after || !strings.Contains(d.Name, search) })
	if len(domains) > domainsPerPage {
		domains = domains[:domainsPerPage]
		data.Next = domainsURL(data.Search, domains[domainsPerPage-1].Name)
	}
	if after != "" {
		data.First = domainsURL(data.Search, "")
	}
	if len(domains) > 0 {
		data.Range = s.view(r).text("domain.range", domains[0].Name, domains[len(domains)-1].Name)
	}
	data.Domains = make([]domainItem, len(domains))
	group, ctx := errgroup.WithContext(r.Context())
	group.SetLimit(countsAtOnce)
	for i, d := range domains {
		group.Go(func() error {
			count, err := s.census(ctx, d.Name, d.Mailboxes)
			data.Domains[i] = domainItem{Name: d.Name, URL: domainURL(d.Name, listState{}), census: count}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return s.render(w, r, http.StatusOK, "domains", page{Title: s.view(r).text("domains.title"), View: data})
}

// domainSearch is what to look for in canonical names. A whole label may be spelled as people do.
func domainSearch(typed string) string {
	typed = strings.ToLower(strings.TrimSpace(typed))
	if canonical, err := allow.ParseDomain(typed); err == nil {
		return canonical
	}
	return typed
}
