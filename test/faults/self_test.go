package faults

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

// This file shows that each oracle can fail: it feeds them what a broken product would say.

const someone = "user00@example0.org"

func token(n int64) revision.Token { return revision.Token{Epoch: 1, Revision: n} }

// someoneSaved is a model in which someone's list was saved at revision 10 and changed at 20, both some time ago.
func someoneSaved(t *testing.T) *model {
	t.Helper()
	m := newModel()
	for _, s := range []save{
		{token: token(10), mailbox: someone, nets: "9.0.0.0/16", parsed: []netip.Prefix{netip.MustParsePrefix("9.0.0.0/16")}},
		{token: token(20), mailbox: someone, nets: "9.1.0.0/16", parsed: []netip.Prefix{netip.MustParsePrefix("9.1.0.0/16")}},
	} {
		m.begin(1)
		must(t, m.saved(1, s))
	}
	m.acked[0].at, m.acked[1].at = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	return m
}

func quiet(string, ...any) {}

// TestCheckerSees gives the checker one answer, or a lack of one.
func TestCheckerSees(t *testing.T) {
	inNet := slices.IndexFunc(queries(), func(q query) bool { return q.mailbox == someone && q.address == "9.1.0.1" })
	response := func(change func(*checkv1.CheckResponse)) func(*checker) {
		return func(c *checker) {
			r := &checkv1.CheckResponse{DataAge: durationpb.New(time.Second), Decision: &decisionv1.Decision{
				Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, MatchedNet: "9.1.0.0/16", Revision: "1-20",
			}}
			change(r)
			c.answered(inNet, r, time.Now(), c.model.before(time.Now()))
		}
	}
	refusal := func(code codes.Code) func(*checker) {
		return func(c *checker) { c.refused(time.Now().Add(-time.Millisecond), status.Error(code, "no")) }
	}
	right := response(func(*checkv1.CheckResponse) {})
	for _, c := range []struct {
		name string
		do   []func(*checker)
		want string // empty: nothing is wrong
	}{
		{name: "right answer", do: []func(*checker){right}},
		{
			name: "right answer about an old state of known age",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) {
				r.Decision = &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS, Revision: "1-10"}
				r.DataAge = durationpb.New(2 * time.Minute)
			})},
		},
		{
			name: "wrong verdict", want: "the answer is",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.Verdict = decisionv1.Verdict_VERDICT_DENY })},
		},
		{
			name: "wrong reason", want: "the answer is",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.Reason = decisionv1.Reason_REASON_UNRESTRICTED })},
		},
		{
			name: "wrong net", want: "the answer is",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.MatchedNet = "9.0.0.0/8" })},
		},
		{
			name: "right answer of another state", want: "the answer is",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.Revision, r.DataAge = "1-10", nil })},
		},
		{
			name: "too young", want: "claims an age of 1s",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) {
				r.Decision = &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS, Revision: "1-10"}
			})},
		},
		{
			name: "backwards", want: "went back from 1-20 to 1-10",
			do: []func(*checker){right, response(func(r *checkv1.CheckResponse) {
				r.Decision = &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS, Revision: "1-10"}
				r.DataAge = nil
			})},
		},
		{
			name: "no revision", want: "not a revision token",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.Revision = "" })},
		},
		{
			name: "right answer of a state that no save made", want: "which no save made",
			do: []func(*checker){response(func(r *checkv1.CheckResponse) { r.Decision.Revision = "1-21" })},
		},
		{name: "refused", do: []func(*checker){refusal(codes.Unavailable)}, want: "no excuse"},
		{name: "refused after the excuse", want: "no excuse", do: []func(*checker){func(c *checker) {
			c.excuses.begin(notRunning)
			c.excuses.end(notRunning)
			w := c.excuses.windows[notRunning]
			w[0].from, w[0].to = w[0].from.Add(-time.Minute), w[0].to.Add(-time.Minute)
		}, refusal(codes.Unavailable)}},
		{name: "refused with an excuse", do: []func(*checker){func(c *checker) { c.excuses.begin(notRunning) }, refusal(codes.Unavailable)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			checker := newChecker("side", "", someoneSaved(t), newReport(quiet), new(excuses))
			for _, do := range c.do {
				do(checker)
			}
			checker.model.close()
			checker.settle()
			wantOne(t, checker.report.broken(), c.want)
		})
	}
}

// TestCheckerWaits judges no answer before its state is known.
func TestCheckerWaits(t *testing.T) {
	m := someoneSaved(t)
	c := newChecker("side", "", m, newReport(quiet), new(excuses))
	c.waiting[observation{state: token(30), answer: answer{matched: "wrong"}}] = 1
	m.begin(2) // its save may become revision 30
	c.settle()
	wantOne(t, c.report.broken(), "")
	must(t, m.saved(2, save{token: token(30), mailbox: someone}))
	c.settle()
	wantOne(t, c.report.broken(), "the answer is")
}

// TestModelSees tells the model what contradicts what it knows.
func TestModelSees(t *testing.T) {
	for name, s := range map[string]save{
		"another list of a known revision":          {token: token(20), mailbox: someone, nets: "9.2.0.0/16"},
		"a save from before it was asked for":       {token: token(15), mailbox: someone},
		"a save of another epoch that is not there": {token: revision.Token{Epoch: 2, Revision: 30}, mailbox: someone},
	} {
		t.Run(name, func(t *testing.T) {
			m := someoneSaved(t)
			m.begin(1)
			if err := m.saved(1, s); err == nil {
				t.Errorf("%v is accepted", s)
			}
		})
	}
}

// TestTrailSees compares an audit trail with two acknowledged saves.
func TestTrailSees(t *testing.T) {
	change := func(id, revision, before, after string) *policyv1.Change {
		c := &policyv1.Change{RequestId: id, Revision: revision, After: []*policyv1.Net{{Net: after}}}
		if before != "" {
			c.Before = []*policyv1.Net{{Net: before}}
		}
		return c
	}
	first, second := change("a", "1-10", "", "9.0.0.0/16"), change("b", "1-20", "9.0.0.0/16", "9.1.0.0/16")
	for _, c := range []struct {
		name  string
		trail []*policyv1.Change
		want  string
	}{
		{name: "right", trail: []*policyv1.Change{first, second}},
		{name: "lost", trail: []*policyv1.Change{first}, want: "first that is lost"},
		{name: "twice", trail: []*policyv1.Change{first, second, change("b", "1-30", "9.1.0.0/16", "9.1.0.0/16")}, want: "carried out twice"},
		{name: "invented", trail: []*policyv1.Change{first, change("c", "1-20", "9.0.0.0/16", "9.1.0.0/16")}, want: "nobody was told"},
		{name: "another list", trail: []*policyv1.Change{first, change("b", "1-20", "9.0.0.0/16", "9.2.0.0/16")}, want: "saved \"9.2.0.0/16\""},
		{name: "another revision", trail: []*policyv1.Change{first, change("b", "1-21", "9.0.0.0/16", "9.1.0.0/16")}, want: "is 1-21"},
		{name: "on another list", trail: []*policyv1.Change{first, change("b", "1-20", "9.3.0.0/16", "9.1.0.0/16")}, want: "found \"9.3.0.0/16\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, err := range compareTrail(c.trail, someoneSaved(t).all(someone), []op{
				{kind: set, id: "a", nets: "9.0.0.0/16"}, {kind: set, id: "b", nets: "9.1.0.0/16"},
			}) {
				got = append(got, err.Error())
			}
			if c.want == "" && len(got) > 0 || c.want != "" && !strings.Contains(strings.Join(got, "\n"), c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestLinearizableSees reads what was overwritten before.
func TestLinearizableSees(t *testing.T) {
	at := func(k kind, nets string, call, returned int) op {
		begun := time.Unix(0, 0)
		return op{
			client: call, kind: k, mailbox: someone, nets: nets,
			call: begun.Add(time.Duration(call) * time.Second), returned: begun.Add(time.Duration(returned) * time.Second),
		}
	}
	if err := linearizable([]op{at(set, "a", 0, 5), at(get, "", 1, 2), at(get, "a", 3, 4), at(wipe, "", 6, 7)}); err != nil {
		t.Error(err)
	}
	if err := linearizable([]op{at(set, "a", 0, 1), at(set, "b", 2, 3), at(get, "a", 4, 5)}); err == nil {
		t.Error("a stale read is linearizable")
	}
	if err := linearizable([]op{at(set, "a", 0, 9), at(get, "a", 1, 2), at(get, "", 3, 4)}); err == nil {
		t.Error("a save that is undone is linearizable")
	}
}

// wantOne wants exactly one violation, or none if text is empty.
func wantOne(t *testing.T, broken []string, text string) {
	t.Helper()
	if text == "" && len(broken) > 0 || text != "" && (len(broken) != 1 || !strings.Contains(broken[0], text)) {
		t.Errorf("violations %q, want one that says %q", broken, text)
	}
}
