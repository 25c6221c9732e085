package check_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/check"
)

const (
	imap       = decisionv1.Service_SERVICE_IMAP
	submission = decisionv1.Service_SERVICE_SMTP_SUBMISSION

	unrestricted = decisionv1.Reason_REASON_UNRESTRICTED
	matched      = decisionv1.Reason_REASON_MATCHED
	exempt       = decisionv1.Reason_REASON_SERVICE_EXEMPT
	notInNets    = decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS
	unknown      = decisionv1.Reason_REASON_CLIENT_ADDRESS_UNKNOWN
	notPublic    = decisionv1.Reason_REASON_CLIENT_ADDRESS_NOT_PUBLIC
	stale        = decisionv1.Reason_REASON_STALE
)

func restrictedServices() []decisionv1.Service {
	return []decisionv1.Service{
		imap, decisionv1.Service_SERVICE_POP3, decisionv1.Service_SERVICE_MANAGESIEVE, decisionv1.Service_SERVICE_WEBMAIL,
	}
}

func exemptServices() []decisionv1.Service {
	return []decisionv1.Service{
		submission, decisionv1.Service_SERVICE_LOCAL_DELIVERY, decisionv1.Service_SERVICE_CALDAV,
		decisionv1.Service_SERVICE_CARDDAV, decisionv1.Service_SERVICE_WEBDAV,
	}
}

// verdict is the only one a reason goes with.
func verdict(r decisionv1.Reason) decisionv1.Verdict {
	if r == unrestricted || r == matched || r == exempt {
		return decisionv1.Verdict_VERDICT_ALLOW
	}
	return decisionv1.Verdict_VERDICT_DENY
}

func TestDecide(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	for _, c := range []struct {
		mailbox, client string
		reason          decisionv1.Reason
		net             string
	}{
		{"alice@example.org", "8.8.8.8", matched, "8.8.8.0/24"},
		{"alice@example.org", "8.8.8.65", matched, "8.8.8.64/26"},
		{"alice@example.org", "::ffff:8.8.8.8", matched, "8.8.8.0/24"},
		{"alice@example.org", "2a00:1450::1", matched, "2a00:1450::/32"},
		{"ALICE@Example.ORG.", "8.8.8.8", matched, "8.8.8.0/24"},
		{"alice@example.org", "8.8.9.8", notInNets, ""},
		{"ALICE@Example.ORG.", "8.8.9.8", notInNets, ""},
		{"alice@example.org", "2a00:1451::1", notInNets, ""},
		{"alice@example.org", "2002:808:808::1", notPublic, ""},
		{"alice@example.org", "64:ff9b::808:808", notPublic, ""},
		{"alice@example.org", "10.0.0.1", notPublic, ""},
		{"alice@example.org", "::1", notPublic, ""},
		{"alice@example.org", "", unknown, ""},
		{"bob@example.org", "9.9.9.9", matched, "9.9.9.9/32"},
		{"alice+tag@example.org", "1.2.3.4", unrestricted, ""},
		{"carol@example.org", "1.2.3.4", unrestricted, ""},
		{"carol@example.org", "10.0.0.1", unrestricted, ""},
		{"carol@example.org", "", unrestricted, ""},
	} {
		for _, svc := range restrictedServices() {
			dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: c.mailbox, Client: c.client, Service: svc})
			net := ""
			if dec.Net.IsValid() {
				net = dec.Net.String()
			}
			if err != nil || dec.Reason != c.reason || dec.Verdict != verdict(c.reason) || net != c.net || dec.State != f.state.Load() {
				t.Errorf("%s from %q to %v: %v %v %v, %v", c.mailbox, c.client, svc, dec.Verdict, dec.Reason, net, err)
			}
		}
		for _, svc := range exemptServices() {
			dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: c.mailbox, Client: c.client, Service: svc})
			if err != nil || dec.Reason != exempt || dec.Verdict != verdict(exempt) || dec.Net.IsValid() {
				t.Errorf("%s from %q to %v: %v, %v", c.mailbox, c.client, svc, dec.Outcome, err)
			}
		}
	}
}

func TestNoAnswer(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	for _, c := range []struct {
		name string
		req  check.Request
		want any
	}{
		{"no service", check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8"}, new(*check.ServiceError)},
		{"service from the future", check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: 10}, new(*check.ServiceError)},
		{"negative service", check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: -1}, new(*check.ServiceError)},
		{"no mailbox", check.Request{Client: "8.8.8.8", Service: imap}, new(*allow.NameError)},
		{"no domain", check.Request{Mailbox: "alice", Client: "8.8.8.8", Service: imap}, new(*allow.NameError)},
		{"control character", check.Request{Mailbox: "al\x00ice@example.org", Client: "8.8.8.8", Service: imap}, new(*allow.NameError)},
		{"line break", check.Request{Mailbox: "alice@example.org\r\n", Client: "8.8.8.8", Service: imap}, new(*allow.NameError)},
		{"master user", check.Request{Mailbox: "alice*admin@example.org", Client: "8.8.8.8", Service: imap}, new(*allow.NameError)},
		{"no mailbox, exempt", check.Request{Client: "8.8.8.8", Service: submission}, new(*allow.NameError)},
		{"no address", check.Request{Mailbox: "alice@example.org", Client: "here", Service: imap}, new(*allow.AddressError)},
		{"zone", check.Request{Mailbox: "alice@example.org", Client: "fe80::1%eth0", Service: imap}, new(*allow.AddressError)},
		{"two addresses", check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8, 10.0.0.1", Service: imap}, new(*allow.AddressError)},
		{"port", check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8:143", Service: imap}, new(*allow.AddressError)},
		{"no address, exempt", check.Request{Mailbox: "alice@example.org", Client: "here", Service: submission}, new(*allow.AddressError)},
	} {
		if dec, err := f.decider.Decide(t.Context(), c.req); !errors.As(err, c.want) || dec.Verdict == decisionv1.Verdict_VERDICT_ALLOW {
			t.Errorf("%s: %v, %v", c.name, dec.Outcome, err)
		}
	}
}

func TestNotSynced(t *testing.T) {
	f := newFixture(t, nil)
	for _, svc := range restrictedServices() {
		if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "carol@example.org", Client: "8.8.8.8", Service: svc}); !errors.Is(err, check.ErrNotSynced) {
			t.Errorf("%v: %v, %v", svc, dec.Outcome, err)
		}
	}
	for _, svc := range exemptServices() {
		if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: svc}); err != nil || dec.Reason != exempt {
			t.Errorf("%v: %v, %v", svc, dec.Outcome, err)
		}
	}
	f.state.Store(stateOf(t, lists()))
	if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "carol@example.org", Client: "8.8.8.8", Service: imap}); err != nil || dec.Reason != unrestricted {
		t.Errorf("after the first state: %v, %v", dec.Outcome, err)
	}
}

func TestDefaultDomain(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DefaultDomain = "example.org" })
	for mailbox, want := range map[string]decisionv1.Reason{"alice": notInNets, "alice@example.com": unrestricted, "carol": unrestricted} {
		if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: mailbox, Client: "1.1.1.1", Service: imap}); err != nil || dec.Reason != want {
			t.Errorf("%s: %v, %v; want %v", mailbox, dec.Reason, err, want)
		}
	}
}

func TestRestrictSubmission(t *testing.T) {
	scope, err := allow.NewScope(submission)
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.Scope = scope })
	if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "1.1.1.1", Service: submission}); err != nil || dec.Reason != notInNets {
		t.Errorf("%v, %v", dec.Outcome, err)
	}
}

// TestDenyAfter: too old is too old for every mailbox, because one that had no list may have one by now.
func TestDenyAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Minute })
		want := func(mailbox string, svc decisionv1.Service, reason decisionv1.Reason) {
			t.Helper()
			if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: mailbox, Client: "8.8.8.8", Service: svc}); err != nil || dec.Reason != reason || dec.Verdict != verdict(reason) {
				t.Errorf("%s: %v, %v; want %v", mailbox, dec.Outcome, err, reason)
			}
		}
		time.Sleep(time.Minute)
		want("alice@example.org", imap, matched)
		want("carol@example.org", imap, unrestricted)
		time.Sleep(time.Nanosecond)
		want("alice@example.org", imap, stale)
		want("carol@example.org", imap, stale)
		want("alice@example.org", submission, exempt)
		f.state.Store(stateOf(t, lists())) // and now it is fresh
		want("alice@example.org", imap, matched)
		never := stateOf(t, lists())
		never.Proven = time.Time{}
		f.state.Store(never) // of unknown age
		want("alice@example.org", imap, stale)
		want("alice@example.org", submission, exempt)
	})
}

func TestWithoutDenyAfterOldDataIsEnforced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, stateOf(t, lists()))
		time.Sleep(10 * 365 * 24 * time.Hour)
		for mailbox, reason := range map[string]decisionv1.Reason{"alice@example.org": matched, "bob@example.org": notInNets, "carol@example.org": unrestricted} {
			if dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: mailbox, Client: "8.8.8.8", Service: imap}); err != nil || dec.Reason != reason {
				t.Errorf("%s: %v, %v; want %v", mailbox, dec.Outcome, err, reason)
			}
		}
	})
}

func TestDecisionsAreCounted(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	for range 3 {
		_, _ = f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "1.1.1.1", Service: imap})
	}
	_, _ = f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "1.1.1.1", Service: decisionv1.Service_SERVICE_CALDAV})
	_, _ = f.decider.Decide(t.Context(), check.Request{Mailbox: "nobody", Client: "1.1.1.1", Service: imap})
	for _, c := range []struct {
		reason, service string
		want            float64
	}{{"not_in_allowed_nets", "imap", 3}, {"service_exempt", "caldav", 1}, {"unrestricted", "imap", 0}} {
		if got := f.metric("decisions_total", c.reason, c.service); got != c.want {
			t.Errorf("%v: %v", c, got)
		}
	}
}

func TestDenialsAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, stateOf(t, lists()))
		ask := func(mailbox, client string) {
			_, _ = f.decider.Decide(t.Context(), check.Request{Mailbox: mailbox, Client: client, Service: imap})
		}
		ask("carol@example.org", "1.1.1.1")
		ask("alice@example.org", "8.8.8.8")
		if f.log.String() != "" {
			t.Errorf("what is allowed was logged:\n%s", f.log.String())
		}
		ask("Alice@example.org", "::ffff:1.1.1.1")
		f.wantLog("level=WARN", `msg="access denied"`, "mailbox=alice@example.org", "client_address=1.1.1.1", "service=imap", "reason=not_in_allowed_nets")
		ask("alice@example.org", "")
		f.wantLog(`client_address=""`, "reason=client_address_unknown")

		// A flood is cut off, and the next line tells how much is missing.
		for i := range 1000 {
			ask("bob@example.org", fmt.Sprintf("1.1.%d.%d", i/256, i%256))
		}
		if n := strings.Count(f.log.String(), "\n"); n != 100 {
			t.Errorf("%d lines", n)
		}
		if n := f.metric("denials_unlogged_total"); n != 902 {
			t.Errorf("%v denials were not logged", n)
		}
		time.Sleep(time.Second)
		ask("bob@example.org", "1.1.1.1")
		f.wantLog("not_logged_before=902")
	})
}

// TestDecideDoesNotAllocate, for what is allowed and a name that is canonical.
func TestDecideDoesNotAllocate(t *testing.T) {
	for name, deny := range map[string]time.Duration{"": 0, "deny-after": time.Hour} {
		f := newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = deny })
		for _, r := range []check.Request{
			{Mailbox: "alice@example.org", Client: "8.8.8.8", Service: imap},
			{Mailbox: "alice@example.org", Client: "2a00:1450::1", Service: imap},
			{Mailbox: "carol@example.org", Client: "8.8.8.8", Service: imap},
			{Mailbox: "alice@example.org", Client: "1.1.1.1", Service: submission},
		} {
			if n := testing.AllocsPerRun(100, func() { _, _ = f.decider.Decide(t.Context(), r) }); n != 0 {
				t.Errorf("%s %v: %v allocations", name, r, n)
			}
		}
	}
}

func TestDeciderSeesEachState(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	ask := func() string {
		dec, err := f.decider.Decide(t.Context(), check.Request{Mailbox: "alice@example.org", Client: "9.9.9.9", Service: imap})
		if err != nil {
			t.Fatal(err)
		}
		return dec.Reason.String() + " " + dec.State.Revision
	}
	if got := ask(); got != "REASON_NOT_IN_ALLOWED_NETS 1-7" {
		t.Error(got)
	}
	next := stateOf(t, map[string]string{"alice@example.org": "9.9.9.9"})
	next.Revision = "1-8"
	f.state.Store(next)
	if got := ask(); got != "REASON_MATCHED 1-8" {
		t.Error(got)
	}
}
