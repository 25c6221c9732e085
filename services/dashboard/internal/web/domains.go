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

// countsAtOnce is how many domains are counted at the same time.
const countsAtOnce = 8

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

func (s *site) showDomains(w http.ResponseWriter, r *http.Request) error {
	user, _ := login.UserOf(r.Context())
	names, all := user.Domains()
	if all {
		names = nil
	} else if names == nil {
		names = []string{}
	}
	domains, err := s.cfg.Directory.Domains(r.Context(), names)
	if err != nil {
		return err
	}
	domains = slices.DeleteFunc(domains, func(d directory.Domain) bool { return !user.May(login.View, d.Name) })
	items := make([]domainItem, len(domains))
	group, ctx := errgroup.WithContext(r.Context())
	group.SetLimit(countsAtOnce)
	for i, d := range domains {
		group.Go(func() error {
			count, err := s.census(ctx, d.Name, d.Mailboxes)
			items[i] = domainItem{Name: d.Name, URL: domainURL(d.Name, listState{}), census: count}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	v := s.view(r)
	return s.render(w, r, http.StatusOK, "domains", page{Title: v.text("domains.title"), View: struct{ Domains []domainItem }{items}})
}
