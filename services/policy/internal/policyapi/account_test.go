package policyapi_test

import (
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

func TestHistoryOfAnAccount(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.set(&policyv1.SetAllowedNetsRequest{
		Mailbox: "alice@example.org", Input: text("8.8.8.8"), Actor: &policyv1.Actor{Id: "carol", Address: "9.9.9.9"},
	})
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "Alice@Example.org", Input: text("1.1.1.0/24, 8.8.8.8")})
	renamed, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: "alice@example.org", NewMailbox: "alicia@example.org"})
	if err != nil || !renamed.GetChanged() || shown(renamed.GetAllowedNets()) != shown(w.get("alicia@example.org")) {
		t.Fatalf("renamed: %v, %v", renamed, err)
	}
	deleted, err := w.client.DeleteMailbox(w.ctx(), &policyv1.DeleteMailboxRequest{Mailbox: "alicia@example.org"})
	if err != nil || !deleted.GetChanged() || len(deleted.GetAllowedNets().GetNets()) != 0 {
		t.Fatalf("deleted: %v, %v", deleted, err)
	}
	var got []string
	for name, want := range map[string][]string{
		"alice@example.org": {
			"CHANGE_KIND_RENAME_FROM 2>0  alicia@example.org", "CHANGE_KIND_SET 1>2  ", "CHANGE_KIND_SET 0>1 carol ",
		},
		"alicia@example.org": {"CHANGE_KIND_DELETE 2>0  ", "CHANGE_KIND_RENAME_TO 0>2  alice@example.org"},
		"nobody@example.org": nil,
	} {
		got = nil
		for token := ""; ; {
			resp, err := w.client.ListChanges(w.ctx(), &policyv1.ListChangesRequest{Mailbox: name, PageSize: 1, PageToken: token})
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range resp.GetChanges() {
				got = append(got, fmt.Sprintf("%v %d>%d %s %s", c.GetKind(), len(c.GetBefore()), len(c.GetAfter()), c.GetActor().GetId(), c.GetOtherMailbox()))
				if c.GetCaller() == "" || c.GetRevision() == "" || c.GetRequestId() == "" || !c.GetTime().IsValid() || c.GetMailbox() != name {
					t.Errorf("a change lacks something: %v", c)
				}
			}
			if token = resp.GetNextPageToken(); token == "" {
				break
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("history of %s:\n%q\nwant\n%q", name, got, want)
		}
	}
}

func TestSuperseded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const id = "6f0e8a62-4c3b-4b0a-9d5f-0a4a0a2b6f11"
	first := &policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.org", Input: text("8.8.8.8"), RequestId: id}
	w.set(first)
	if resp := w.set(first); resp.GetChanged() || resp.GetSuperseded() {
		t.Errorf("repeated at once: %v", resp)
	}
	if _, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.org"}); err != nil {
		t.Fatal(err)
	}
	if resp := w.set(first); resp.GetChanged() || !resp.GetSuperseded() {
		t.Errorf("repeated after a clear: %v: the caller must learn that this is not in force", resp)
	}
	if got := w.get("alice@example.org"); len(got.GetNets()) != 0 {
		t.Errorf("the repetition saved %v", got)
	}
}

func TestExplainAccess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	saved := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.org", Input: text("8.8.0.0/16, 8.8.8.0/24")})
	imap, caldav := decisionv1.Service_SERVICE_IMAP, decisionv1.Service_SERVICE_CALDAV
	draft := func(s string) *policyv1.ExplainAccessRequest_Text {
		return &policyv1.ExplainAccessRequest_Text{Text: s}
	}
	for name, tt := range map[string]struct {
		req  *policyv1.ExplainAccessRequest
		want string
	}{
		"inside":              {&policyv1.ExplainAccessRequest{ClientAddress: "8.8.8.9", Service: imap}, "MATCHED 8.8.8.0/24"},
		"outside":             {&policyv1.ExplainAccessRequest{ClientAddress: "9.9.9.9", Service: imap}, "NOT_IN_ALLOWED_NETS "},
		"unknown":             {&policyv1.ExplainAccessRequest{Service: imap}, "CLIENT_ADDRESS_UNKNOWN "},
		"exempt":              {&policyv1.ExplainAccessRequest{ClientAddress: "9.9.9.9", Service: caldav}, "SERVICE_EXEMPT "},
		"draft":               {&policyv1.ExplainAccessRequest{ClientAddress: "9.9.9.9", Service: imap, Draft: draft("9.9.9.9")}, "MATCHED 9.9.9.9"},
		"draft of nothing":    {&policyv1.ExplainAccessRequest{ClientAddress: "9.9.9.9", Service: imap, Draft: draft(" ,")}, "UNRESTRICTED "},
		"draft without it":    {&policyv1.ExplainAccessRequest{ClientAddress: "8.8.8.9", Service: imap, Draft: draft("9.9.9.9")}, "NOT_IN_ALLOWED_NETS "},
		"draft, already cut":  {&policyv1.ExplainAccessRequest{ClientAddress: "9.9.9.9", Service: imap, Draft: &policyv1.ExplainAccessRequest_List{List: nets("9.9.9.0/24").List}}, "MATCHED 9.9.9.0/24"},
		"mapped is IPv4 here": {&policyv1.ExplainAccessRequest{ClientAddress: "::ffff:8.8.8.9", Service: imap}, "MATCHED 8.8.8.0/24"},
	} {
		tt.req.Mailbox = "ALICE@example.org"
		resp, err := w.client.ExplainAccess(w.ctx(), tt.req)
		d := resp.GetDecision()
		if got := fmt.Sprintf("REASON_%s", tt.want); err != nil || fmt.Sprintf("%v %s", d.GetReason(), d.GetMatchedNet()) != got {
			t.Errorf("%s: %v, %v; want %s", name, d, err, got)
		}
		if allowed := d.GetVerdict() == decisionv1.Verdict_VERDICT_ALLOW; allowed != (d.GetReason() <= decisionv1.Reason_REASON_SERVICE_EXEMPT) {
			t.Errorf("%s: %v", name, d)
		}
		if of := tt.req.GetDraft() == nil; of != (d.GetRevision() == saved.GetAllowedNets().GetRevision()) {
			t.Errorf("%s: revision %q", name, d.GetRevision())
		}
	}
}

func TestPropagationOfASave(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	saved := w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.org", Input: text("8.8.8.8")})
	for _, rev := range []string{"", saved.GetAllowedNets().GetRevision()} {
		resp, err := w.client.GetPropagation(w.ctx(), &policyv1.GetPropagationRequest{Revision: rev})
		if err != nil || resp.GetSidecarCount() != 0 || resp.GetReplicaCount() != 1 || resp.GetRevision() != saved.GetAllowedNets().GetRevision() {
			t.Errorf("propagation of %q: %v, %v", rev, resp, err)
		}
	}
}

// TestBadInputOfAccounts: bad input to the RPCs about accounts, and what a caller may not do that is limited to a domain.
func TestBadInputOfAccounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.domains = []string{"example.org"}
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "alice@example.org", Input: text("8.8.8.8")})
	w.set(&policyv1.SetAllowedNetsRequest{Mailbox: "bob@example.org", Input: text("9.9.9.9")})
	const (
		invalid = decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID
		mailbox = decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID
		denied  = decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED
	)
	const alice, mallory = "alice@example.org", "alice@example.com"
	for name, tt := range map[string]struct {
		call   func() error
		code   codes.Code
		reason decisionv1.ErrorReason
	}{
		"history of no name": {func() error { _, err := w.client.ListChanges(w.ctx(), &policyv1.ListChangesRequest{}); return err }, codes.InvalidArgument, mailbox},
		"history, negative page": {func() error {
			_, err := w.client.ListChanges(w.ctx(), &policyv1.ListChangesRequest{Mailbox: alice, PageSize: -1})
			return err
		}, codes.InvalidArgument, invalid},
		"history, strange token": {func() error {
			_, err := w.client.ListChanges(w.ctx(), &policyv1.ListChangesRequest{Mailbox: alice, PageToken: "YWxpY2U"})
			return err
		}, codes.InvalidArgument, invalid},
		"rename to itself": {func() error {
			_, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: alice, NewMailbox: "Alice@example.org"})
			return err
		}, codes.InvalidArgument, invalid},
		"rename to no name": {func() error {
			_, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: alice})
			return err
		}, codes.InvalidArgument, invalid},
		"rename to a restricted one": {func() error {
			_, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: alice, NewMailbox: "bob@example.org"})
			return err
		}, codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_TARGET_RESTRICTED},
		"explain no service": {func() error {
			_, err := w.client.ExplainAccess(w.ctx(), &policyv1.ExplainAccessRequest{Mailbox: alice})
			return err
		}, codes.InvalidArgument, invalid},
		"explain no address": {func() error {
			_, err := w.client.ExplainAccess(w.ctx(), &policyv1.ExplainAccessRequest{Mailbox: alice, ClientAddress: "x", Service: 1})
			return err
		}, codes.InvalidArgument, invalid},
		"explain a bad draft": {func() error {
			_, err := w.client.ExplainAccess(w.ctx(), &policyv1.ExplainAccessRequest{Mailbox: alice, Service: 1, Draft: &policyv1.ExplainAccessRequest_Text{Text: "10.0.0.1"}})
			return err
		}, codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID},
		"propagation of no token": {func() error {
			_, err := w.client.GetPropagation(w.ctx(), &policyv1.GetPropagationRequest{Revision: "x"})
			return err
		}, codes.InvalidArgument, invalid},
		"propagation of the future": {func() error {
			_, err := w.client.GetPropagation(w.ctx(), &policyv1.GetPropagationRequest{Revision: "1-999999"})
			return err
		}, codes.InvalidArgument, invalid},

		"another domain's get": {func() error {
			_, err := w.client.GetAllowedNets(w.ctx(), &policyv1.GetAllowedNetsRequest{Mailbox: mallory})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's set": {func() error {
			_, err := w.client.SetAllowedNets(w.ctx(), &policyv1.SetAllowedNetsRequest{Mailbox: mallory, Input: text("8.8.8.8")})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's clear": {func() error {
			_, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: mallory})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's delete": {func() error {
			_, err := w.client.DeleteMailbox(w.ctx(), &policyv1.DeleteMailboxRequest{Mailbox: mallory})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's history": {func() error {
			_, err := w.client.ListChanges(w.ctx(), &policyv1.ListChangesRequest{Mailbox: mallory})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's explain": {func() error {
			_, err := w.client.ExplainAccess(w.ctx(), &policyv1.ExplainAccessRequest{Mailbox: mallory, Service: 1})
			return err
		}, codes.PermissionDenied, denied},
		"another domain's list": {func() error {
			_, err := w.client.ListAllowedNets(w.ctx(), &policyv1.ListAllowedNetsRequest{Domain: "example.com"})
			return err
		}, codes.PermissionDenied, denied},
		"all domains": {func() error {
			_, err := w.client.ListAllowedNets(w.ctx(), &policyv1.ListAllowedNetsRequest{})
			return err
		}, codes.PermissionDenied, denied},
		"rename from another domain": {func() error {
			_, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: mallory, NewMailbox: "new@example.org"})
			return err
		}, codes.PermissionDenied, denied},
		"rename to another domain": {func() error {
			_, err := w.client.RenameMailbox(w.ctx(), &policyv1.RenameMailboxRequest{Mailbox: alice, NewMailbox: mallory})
			return err
		}, codes.PermissionDenied, denied},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, tt.call(), tt.code, tt.reason) })
	}
}

func TestListOfAllDomains(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, name := range []string{"b@two.example", "a@two.example", "z@one.example", "a@three.example", "gone@four.example"} {
		w.set(&policyv1.SetAllowedNetsRequest{Mailbox: name, Input: text("8.8.8.8")})
	}
	if _, err := w.client.ClearAllowedNets(w.ctx(), &policyv1.ClearAllowedNetsRequest{Mailbox: "gone@four.example"}); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int32{1, 2, 3, 10} {
		var got []string
		for token := ""; ; {
			resp, err := w.client.ListAllowedNets(w.ctx(), &policyv1.ListAllowedNetsRequest{PageSize: size, PageToken: token})
			if err != nil || resp.GetTotalSize() != 4 {
				t.Fatalf("%v, %v", resp, err)
			}
			for _, a := range resp.GetAllowedNets() {
				got = append(got, a.GetMailbox())
			}
			if token = resp.GetNextPageToken(); token == "" {
				break
			}
		}
		if fmt.Sprint(got) != "[z@one.example a@three.example a@two.example b@two.example]" {
			t.Errorf("in pages of %d: %v", size, got)
		}
	}
}
