package login

import "testing"

func TestMay(t *testing.T) {
	one, all := []string{"a.example"}, []string{All}
	for name, c := range map[string]struct {
		rights Rights
		action Action
		domain string
		may    bool
	}{
		"nobody views":                      {action: View, domain: "a.example"},
		"nobody changes":                    {action: Change, domain: "a.example"},
		"administrator views":               {rights: Rights{Administrator: one}, action: View, domain: "a.example", may: true},
		"administrator changes":             {rights: Rights{Administrator: one}, action: Change, domain: "a.example", may: true},
		"administrator of another views":    {rights: Rights{Administrator: one}, action: View, domain: "b.example"},
		"administrator of another changes":  {rights: Rights{Administrator: one}, action: Change, domain: "b.example"},
		"administrator of the domain above": {rights: Rights{Administrator: one}, action: View, domain: "sub.a.example"},
		"administrator of all changes":      {rights: Rights{Administrator: all}, action: Change, domain: "b.example", may: true},
		"auditor views":                     {rights: Rights{Auditor: one}, action: View, domain: "a.example", may: true},
		"auditor changes":                   {rights: Rights{Auditor: one}, action: Change, domain: "a.example"},
		"auditor of all views":              {rights: Rights{Auditor: all}, action: View, domain: "b.example", may: true},
		"auditor of all changes":            {rights: Rights{Auditor: all}, action: Change, domain: "b.example"},
		"both, changes what is his":         {rights: Rights{Administrator: one, Auditor: all}, action: Change, domain: "a.example", may: true},
		"both, changes what he may view":    {rights: Rights{Administrator: one, Auditor: all}, action: Change, domain: "b.example"},
		"both, named":                       {rights: Rights{Administrator: []string{"b.example"}, Auditor: []string{"b.example", "a.example"}}, action: View, domain: "a.example", may: true},
		"no action":                         {rights: Rights{Administrator: all}, domain: "a.example"},
		"unknown action":                    {rights: Rights{Administrator: all}, action: 99, domain: "a.example"},
		"no domain":                         {rights: Rights{Administrator: all}, action: View},
		"the star is no domain":             {rights: Rights{Administrator: all}, action: View, domain: All},
	} {
		t.Run(name, func(t *testing.T) {
			u := User{Name: "x", rights: c.rights}
			if got := u.May(c.action, c.domain); got != c.may {
				t.Errorf("may: %v", got)
			}
		})
	}
}
