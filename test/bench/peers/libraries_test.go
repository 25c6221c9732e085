package peers

import (
	"net"
	"net/netip"
	"testing"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/ext"
	"github.com/casbin/casbin/v3"
	"github.com/casbin/casbin/v3/model"
	"github.com/yl2chen/cidranger"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// inProcess is what libraries have in common.
type inProcess struct{}

func (inProcess) Pid() int     { return 0 }
func (inProcess) Close() error { return nil }

// loaded gives a new peer all lists.
func loaded[R running](tb testing.TB, r R, lists lists) R {
	tb.Helper()
	for mailbox, nets := range lists {
		if err := r.Change(mailbox, nets); err != nil {
			tb.Fatal(err)
		}
	}
	return r
}

// ours is internal/allow with a Go map; the sidecar's own index, which is smaller, cannot be imported from here.
type ours struct {
	inProcess

	sets   map[allow.ID]*allow.Set
	shared map[string]*allow.Set // as in the sidecar, equal lists are one
}

func startAllow(tb testing.TB, lists lists) running {
	return loaded(tb, &ours{sets: make(map[allow.ID]*allow.Set), shared: make(map[string]*allow.Set)}, lists)
}

func (o *ours) Allowed(mailbox, client string) (bool, error) {
	m, err := allow.ParseMailbox(mailbox)
	if err != nil {
		return false, err
	}
	addr, err := allow.ParseClient(client)
	if err != nil {
		return false, err
	}
	return allow.Decide(o.sets[m.ID()], addr).Verdict == decisionv1.Verdict_VERDICT_ALLOW, nil
}

func (o *ours) Change(mailbox string, nets []string) error {
	m, err := allow.ParseMailbox(mailbox)
	if err != nil {
		return err
	}
	l, err := allow.Rules{}.ParseEntries(nets)
	if err != nil {
		return err
	}
	e := l.Encode()
	set := o.shared[string(e)]
	if set == nil {
		if set, err = allow.DecodeSet(e); err != nil {
			return err
		}
		o.shared[string(e)] = set
	}
	o.sets[m.ID()] = set
	return nil
}

// scan is what one writes first. It does not canonicalise names, and takes an IPv4 address in IPv6 form for an IPv6 address.
type scan struct {
	inProcess

	nets map[string][]netip.Prefix
}

func startScan(tb testing.TB, lists lists) running {
	return loaded(tb, &scan{nets: make(map[string][]netip.Prefix)}, lists)
}

func (s *scan) Allowed(mailbox, client string) (bool, error) {
	nets, restricted := s.nets[mailbox]
	addr, err := netip.ParseAddr(client)
	if err != nil || !restricted {
		return !restricted, err
	}
	for _, p := range nets {
		if p.Contains(addr) {
			return true, nil
		}
	}
	return false, nil
}

func (s *scan) Change(mailbox string, nets []string) error {
	list := make([]netip.Prefix, len(nets))
	for i, n := range nets {
		var err error
		if list[i], err = netip.ParsePrefix(n); err != nil {
			return err
		}
	}
	s.nets[mailbox] = list
	return nil
}

// ranger is a trie of cidranger for each mailbox.
type ranger struct {
	inProcess

	tries map[string]cidranger.Ranger
}

func startCidranger(tb testing.TB, lists lists) running {
	return loaded(tb, &ranger{tries: make(map[string]cidranger.Ranger)}, lists)
}

func (r *ranger) Allowed(mailbox, client string) (bool, error) {
	trie, restricted := r.tries[mailbox]
	if !restricted {
		return true, nil
	}
	return trie.Contains(net.ParseIP(client))
}

func (r *ranger) Change(mailbox string, nets []string) error {
	trie := cidranger.NewPCTrieRanger()
	for _, n := range nets {
		_, p, err := net.ParseCIDR(n)
		if err != nil {
			return err
		}
		if err := trie.Insert(cidranger.NewBasicRangerEntry(*p)); err != nil {
			return err
		}
	}
	r.tries[mailbox] = trie
	return nil
}

// conditions is cel-go, which OpenFGA evaluates its conditions with: one compiled condition, and parsed nets for each mailbox. An IPv4
// address in IPv6 form is an error to it, which is a denial here.
type conditions struct {
	inProcess

	nets      map[string][]netip.Prefix
	condition cel.Program
}

func startCEL(tb testing.TB, lists lists) running {
	env, err := cel.NewEnv(ext.Network(), cel.Variable("client", cel.StringType), cel.Variable("nets", cel.ListType(ext.CIDRType)))
	if err != nil {
		tb.Fatal(err)
	}
	ast, issues := env.Compile(`isIP(client) && nets.exists(net, net.containsIP(client))`)
	if issues.Err() != nil {
		tb.Fatal(issues.Err())
	}
	condition, err := env.Program(ast, cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		tb.Fatal(err)
	}
	return loaded(tb, &conditions{nets: make(map[string][]netip.Prefix), condition: condition}, lists)
}

func (c *conditions) Allowed(mailbox, client string) (bool, error) {
	nets, restricted := c.nets[mailbox]
	if !restricted {
		return true, nil
	}
	got, _, err := c.condition.Eval(map[string]any{"client": client, "nets": nets})
	if err != nil {
		return false, err
	}
	return got.Value() == true, nil
}

func (c *conditions) Change(mailbox string, nets []string) error {
	s := scan{nets: c.nets}
	return s.Change(mailbox, nets)
}

// casbinModel is the one of Casbin's documentation with an address as the object. Casbin goes through all rules at each question, and
// cannot say that somebody without a rule may do everything: a map in front of it does.
const casbinModel = `
[request_definition]
r = mailbox, client
[policy_definition]
p = mailbox, net
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = r.mailbox == p.mailbox && ipMatch(r.client, p.net)
`

type enforcer struct {
	inProcess

	*casbin.Enforcer

	restricted map[string]bool
}

func startCasbin(tb testing.TB, lists lists) running {
	m, err := model.NewModelFromString(casbinModel)
	if err != nil {
		tb.Fatal(err)
	}
	e, err := casbin.NewEnforcer(m)
	if err != nil {
		tb.Fatal(err)
	}
	c := &enforcer{Enforcer: e, restricted: make(map[string]bool)}
	var rules [][]string
	for mailbox, nets := range lists {
		c.restricted[mailbox] = true
		for _, n := range nets {
			rules = append(rules, []string{mailbox, n})
		}
	}
	if _, err := e.AddPolicies(rules); err != nil {
		tb.Fatal(err)
	}
	return c
}

func (c *enforcer) Allowed(mailbox, client string) (bool, error) {
	if !c.restricted[mailbox] {
		return true, nil
	}
	return c.Enforce(mailbox, client)
}

func (c *enforcer) Change(mailbox string, nets []string) error {
	c.restricted[mailbox] = true
	if _, err := c.RemoveFilteredPolicy(0, mailbox); err != nil {
		return err
	}
	var rules [][]string
	for _, n := range nets {
		rules = append(rules, []string{mailbox, n})
	}
	_, err := c.AddPolicies(rules)
	return err
}
