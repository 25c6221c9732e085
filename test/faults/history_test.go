package faults

import (
	"context"
	"fmt"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

// linearizable reports whether every mailbox behaved like one register: each request took effect at one moment between its
// call and its answer.
func linearizable(ops []op) error {
	register := porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			byMailbox := make(map[string][]porcupine.Operation)
			for _, o := range history {
				mailbox := o.Input.(op).mailbox //nolint:forcetypeassert,errcheck // all are
				byMailbox[mailbox] = append(byMailbox[mailbox], o)
			}
			var all [][]porcupine.Operation
			for _, part := range byMailbox {
				all = append(all, part)
			}
			return all
		},
		Init: func() any { return "" },
		Step: func(state, input, _ any) (bool, any) {
			o := input.(op) //nolint:forcetypeassert,errcheck // all are
			return o.kind != get || o.nets == state, o.nets
		},
	}
	var history []porcupine.Operation
	for _, o := range ops {
		history = append(history, porcupine.Operation{
			ClientId: o.client, Input: o, Call: o.call.Sub(ops[0].call).Nanoseconds(), Return: o.returned.Sub(ops[0].call).Nanoseconds(),
		})
	}
	if result := porcupine.CheckOperationsTimeout(register, history, 2*time.Minute); result != porcupine.Ok {
		return fmt.Errorf("the history of %d requests is not linearizable: %s", len(ops), result)
	}
	return nil
}

// audit reads the audit trail of a mailbox, oldest change first.
func audit(ctx context.Context, replica policyv1.PolicyServiceClient, mailbox string) ([]*policyv1.Change, error) {
	var all []*policyv1.Change
	for page := ""; ; {
		// The replica may have been restarted a moment ago: its clients connect again only after gRPC's back-off.
		resp, err := replica.ListChanges(ctx, &policyv1.ListChangesRequest{Mailbox: mailbox, PageSize: 200, PageToken: page}, grpc.WaitForReady(true))
		if err != nil {
			return nil, err
		}
		all = append(all, resp.GetChanges()...)
		if page = resp.GetNextPageToken(); page == "" {
			break
		}
	}
	for i, j := 0, len(all)-1; i < j; i, j = i+1, j-1 {
		all[i], all[j] = all[j], all[i]
	}
	return all, nil
}

// compareTrail holds the audit trail of a mailbox against the acknowledged saves and against the requests: nothing lost,
// nothing invented, nothing twice.
func compareTrail(trail []*policyv1.Change, saves []save, ops []op) []error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	asked := make(map[string]op)
	for _, o := range ops {
		if o.kind != get {
			asked[o.id] = o
		}
	}
	seen := make(map[string]bool)
	before := ""
	for i, c := range trail {
		after := join(c.GetAfter())
		o, ours := asked[c.GetRequestId()]
		switch {
		case seen[c.GetRequestId()]:
			wrong("request %s was carried out twice", c.GetRequestId())
		case !ours:
			wrong("request %s was carried out, but nobody was told", c.GetRequestId())
		case o.nets != after:
			wrong("request %s saved %q, not %q", c.GetRequestId(), after, o.nets)
		case join(c.GetBefore()) != before:
			wrong("request %s found %q, but %q was there", c.GetRequestId(), join(c.GetBefore()), before)
		}
		seen[c.GetRequestId()] = true
		before = after
		if i >= len(saves) || saves[i].token.String() != c.GetRevision() || saves[i].nets != after {
			wrong("change %d of the audit trail is %s %q; acknowledged was %v", i, c.GetRevision(), after, saves[min(i, len(saves)):min(i+1, len(saves))])
			break
		}
	}
	if len(saves) > len(trail) {
		wrong("%d saves were acknowledged, %d are in the audit trail; the first that is lost: %v", len(saves), len(trail), saves[len(trail)].token)
	}
	return errs
}
