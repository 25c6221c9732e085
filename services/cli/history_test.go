package main

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

func netList(texts ...string) []*policyv1.Net {
	nets := make([]*policyv1.Net, len(texts))
	for i, text := range texts {
		nets[i] = &policyv1.Net{Net: text}
	}
	return nets
}

func TestHistory(t *testing.T) {
	at := timestamppb.New(time.Date(2026, 11, 23, 16, 5, 9, 0, time.UTC))
	change := func(kind policyv1.ChangeKind, c *policyv1.Change) *policyv1.Change {
		c.Mailbox, c.Kind, c.Time, c.Revision, c.RequestId, c.Caller = "alice@example.com", kind, at, "1-17", givenID, "dashboard.internal"
		return c
	}
	byCarol := &policyv1.Actor{Id: "carol", Address: "192.0.2.7"}
	set := change(policyv1.ChangeKind_CHANGE_KIND_SET, &policyv1.Change{Before: netList("8.8.8.0/24", "9.9.9.9", "1.1.1.1"), After: netList("9.9.9.9", "1.1.1.1", "7.7.7.7"), Actor: byCarol})
	const tail = "  revision 1-17, request " + givenID + "\n"
	const setText = "2026-11-23 16:05:09 UTC  set by carol from 192.0.2.7 through dashboard.internal\n  - 8.8.8.0/24\n  + 7.7.7.7\n    2 networks as before\n" + tail
	runTable(t, []golden{
		{
			name: "every kind",
			fake: services{changes: []*policyv1.ListChangesResponse{{Changes: []*policyv1.Change{
				set,
				change(policyv1.ChangeKind_CHANGE_KIND_SET, &policyv1.Change{Before: netList("8.8.8.8", "9.9.9.9"), After: netList("9.9.9.9", "8.8.8.8"), Actor: byCarol}),
				change(policyv1.ChangeKind_CHANGE_KIND_DELETE, &policyv1.Change{Before: netList("8.8.8.8"), Actor: &policyv1.Actor{Id: "dashboard.internal"}}),
				change(policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, &policyv1.Change{Before: netList("8.8.8.8"), OtherMailbox: "anna@example.com"}),
				change(policyv1.ChangeKind_CHANGE_KIND_RENAME_TO, &policyv1.Change{After: netList("8.8.8.8"), OtherMailbox: "al@example.com"}),
				change(policyv1.ChangeKind_CHANGE_KIND_CLEAR, &policyv1.Change{Before: netList("8.8.8.8"), Actor: &policyv1.Actor{Address: "192.0.2.7\x1b[2J"}}),
				change(99, &policyv1.Change{After: netList("8.8.8.8")}),
			}}}},
			args:    []string{"history", "alice@example.com"},
			request: &policyv1.ListChangesRequest{Mailbox: "alice@example.com", PageSize: 20},
			stdout: setText + `
2026-11-23 16:05:09 UTC  set by carol from 192.0.2.7 through dashboard.internal
    the same networks in another order
` + tail + `
2026-11-23 16:05:09 UTC  mailbox deleted by dashboard.internal
  - 8.8.8.8
  + every address
` + tail + `
2026-11-23 16:05:09 UTC  renamed to anna@example.com by dashboard.internal
  - 8.8.8.8
  + every address
` + tail + `
2026-11-23 16:05:09 UTC  renamed from al@example.com by dashboard.internal
  - every address
  + 8.8.8.8
` + tail + `
2026-11-23 16:05:09 UTC  cleared by dashboard.internal from 192.0.2.7\u001b[2J
  - 8.8.8.8
  + every address
` + tail + `
2026-11-23 16:05:09 UTC  changed by dashboard.internal
  - every address
  + 8.8.8.8
` + tail,
		},
		{
			name: "several pages, and more behind them",
			fake: services{changes: []*policyv1.ListChangesResponse{
				{Changes: []*policyv1.Change{set, set}, NextPageToken: "1"}, {Changes: []*policyv1.Change{set}, NextPageToken: "2"},
			}},
			args:    []string{"history", "alice@example.com", "--limit=3"},
			request: &policyv1.ListChangesRequest{Mailbox: "alice@example.com", PageSize: 1, PageToken: "1"},
			stdout:  setText + "\n" + setText + "\n" + setText + "\nThere are older changes: --limit=30 shows more.\n",
		},
		{
			name: "a page that repeats",
			fake: services{changes: []*policyv1.ListChangesResponse{{NextPageToken: "0"}}},
			args: []string{"history", "alice@example.com"}, code: exitUnavailable,
			stderr: "allowednets: the policy service answered the same page twice; the history is incomplete\n",
		},
		{
			name: "none", fake: services{changes: []*policyv1.ListChangesResponse{{}}},
			args:   []string{"history", "alice@example.com"},
			stdout: "The list of alice@example.com was never changed.\n",
		},
		{
			name: "no changes wanted", args: []string{"history", "alice@example.com", "--limit=0"}, code: exitUsage,
			stderr: "allowednets: --limit must be at least 1, not 0\n",
		},
		{
			name: "JSON", fake: services{changes: []*policyv1.ListChangesResponse{{Changes: []*policyv1.Change{{Mailbox: "a@b", Kind: policyv1.ChangeKind_CHANGE_KIND_SET}}, NextPageToken: "1"}}},
			args: []string{"history", "a@b", "--limit=1", "--output=json"},
			stdout: `{
  "changes": [
    {
      "mailbox": "a@b",
      "kind": "CHANGE_KIND_SET",
      "before": [],
      "after": [],
      "caller": "",
      "requestId": "",
      "revision": "",
      "otherMailbox": ""
    }
  ],
  "nextPageToken": "1"
}
`,
		},
	})
}

func TestExplain(t *testing.T) {
	denied := &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS, Revision: "1-17"}
	allowed := &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, MatchedNet: "8.8.8.0/24"}
	ask := func(r *policyv1.ExplainAccessRequest) proto.Message {
		r.Mailbox, r.ClientAddress = "alice@example.com", "8.8.8.8"
		return r
	}
	runTable(t, []golden{
		{
			name: "the saved list", fake: services{explanation: denied}, code: exitDenied,
			args:    []string{"explain", "alice@example.com", "8.8.8.8", "--service=webmail"},
			request: ask(&policyv1.ExplainAccessRequest{Service: decisionv1.Service_SERVICE_WEBMAIL}),
			stdout: `Allowed   no, the address lies in none of the mailbox's networks
Mailbox   alice@example.com
Client    8.8.8.8
Service   webmail
List      the saved one, revision 1-17
`,
		},
		{
			name: "a draft", fake: services{explanation: allowed},
			args:    []string{"explain", "alice@example.com", "8.8.8.8", "--draft=8.8.8.0/24"},
			request: ask(&policyv1.ExplainAccessRequest{Service: decisionv1.Service_SERVICE_IMAP, Draft: &policyv1.ExplainAccessRequest_Text{Text: "8.8.8.0/24"}}),
			stdout: `Allowed   yes, the address lies in 8.8.8.0/24
Mailbox   alice@example.com
Client    8.8.8.8
Service   imap
List      the draft; nothing was saved
`,
		},
		{
			name: "an empty draft is one", fake: services{explanation: allowed}, args: []string{"explain", "alice@example.com", "8.8.8.8", "--draft="},
			request: ask(&policyv1.ExplainAccessRequest{Service: decisionv1.Service_SERVICE_IMAP, Draft: &policyv1.ExplainAccessRequest_Text{}}),
			stdout:  "Allowed   yes, the address lies in 8.8.8.0/24\nMailbox   alice@example.com\nClient    8.8.8.8\nService   imap\nList      the draft; nothing was saved\n",
		},
		{
			name: "a draft from standard input", fake: services{explanation: allowed}, stdin: "9.9.9.9\n", args: []string{"explain", "alice@example.com", "8.8.8.8", "--draft=-", "--output=json"},
			request: ask(&policyv1.ExplainAccessRequest{Service: decisionv1.Service_SERVICE_IMAP, Draft: &policyv1.ExplainAccessRequest_Text{Text: "9.9.9.9\n"}}),
			stdout: `{
  "decision": {
    "verdict": "VERDICT_ALLOW",
    "reason": "REASON_MATCHED",
    "matchedNet": "8.8.8.0/24",
    "revision": ""
  }
}
`,
		},
		{
			name: "no such service", args: []string{"explain", "--service=ftp", "alice@example.com", "8.8.8.8"}, code: exitUsage,
			stderr: "allowednets: --service \"ftp\": there is no such service; there are caldav, carddav, imap, local-delivery, managesieve, pop3, smtp-submission, webdav, webmail\n",
		},
	})
}
