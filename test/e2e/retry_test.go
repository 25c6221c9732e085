package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/stack"
)

// writing is an RPC that changes something. It returns what the RPC answers.
type writing struct {
	name string
	call func(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, requestID string) (*policyv1.AllowedNets, error)
	// What one call adds to the history of the mailbox, and to that of the name it gets.
	kinds, renamed []policyv1.ChangeKind
}

func renamed(mailbox string) string { return "new-" + mailbox }

func writings() []writing {
	return []writing{
		{
			"Set", func(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, id string) (*policyv1.AllowedNets, error) {
				resp, err := lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
					Mailbox: mailbox, RequestId: id, Input: &policyv1.SetAllowedNetsRequest_Text{Text: otherNets},
				})
				return resp.GetAllowedNets(), err
			},
			[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_SET}, nil,
		},
		{
			"Clear", func(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, id string) (*policyv1.AllowedNets, error) {
				resp, err := lists.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: mailbox, RequestId: id})
				return resp.GetAllowedNets(), err
			},
			[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_CLEAR}, nil,
		},
		{
			"Delete", func(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, id string) (*policyv1.AllowedNets, error) {
				resp, err := lists.DeleteMailbox(ctx, &policyv1.DeleteMailboxRequest{Mailbox: mailbox, RequestId: id})
				return resp.GetAllowedNets(), err
			},
			[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_DELETE}, nil,
		},
		{
			"Rename", func(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, id string) (*policyv1.AllowedNets, error) {
				resp, err := lists.RenameMailbox(ctx, &policyv1.RenameMailboxRequest{Mailbox: mailbox, NewMailbox: renamed(mailbox), RequestId: id})
				return resp.GetAllowedNets(), err
			},
			[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM}, []policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_RENAME_TO},
		},
	}
}

// TestRetryHasTheEffectOfOneCall breaks the connection of the client, or that of the policy service to etcd, after every few
// octets of the reply, and then makes the same call again, with the same request id.
func TestRetryHasTheEffectOfOneCall(t *testing.T) {
	ctx := within(t, 8*time.Minute)
	s := newStack(t)
	etcd, err := s.StartEtcd(ctx, "etcd", "")
	must(t, err)
	toEtcd := startProxy(t, s, etcd.Address)
	policy, err := s.StartPolicy(stack.PolicyConfig{Etcd: "http://" + toEtcd.Address, PermitNets: stack.DocumentationNets})
	must(t, err)
	must(t, policy.AwaitReady(ctx))
	toPolicy := startProxy(t, s, policy.Address)
	direct, distant := policyClient(t, s, policy.Address), policyClient(t, s, toPolicy.Address)

	tries := 0
	for _, network := range []struct {
		name        string
		proxy       *stack.Proxy
		last, every int64
	}{
		{"client", toPolicy, 320, 16},
		{"etcd", toEtcd, 900, 30},
	} {
		for _, w := range writings() {
			t.Run(w.name+" "+network.name, func(t *testing.T) {
				failed, done, survived := 0, 0, 0
				for n := int64(0); n <= network.last; n += network.every {
					tries++
					mailbox, id := fmt.Sprintf("retry%d@example.org", tries), fmt.Sprintf("00000000-0000-4000-8000-%012d", tries)
					persist(t, ctx, func(ctx context.Context) error { // first of all, and it opens the connection
						_, err := distant.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
							Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: aliceNets},
						})
						return err
					})
					broke := network.proxy.BreakAfter(n)
					first, cancel := context.WithTimeout(ctx, 10*time.Second)
					answer, err := w.call(first, distant, mailbox, id)
					cancel()
					network.proxy.Forgive()
					select {
					case <-broke:
						if err == nil {
							survived++
						}
					default:
					}
					if err != nil {
						answer = nil
						failed++
						if slices.Equal(changes(t, ctx, direct, mailbox, id), w.kinds) {
							done++
						}
					}
					for range 2 { // the retry, and one too many
						persist(t, ctx, func(ctx context.Context) error {
							again, err := w.call(ctx, distant, mailbox, id)
							if err == nil && answer != nil && !proto.Equal(again, answer) {
								t.Errorf("after %d octets: %v, then %v", n, answer, again)
							}
							if err == nil {
								answer = again
							}
							return err
						})
					}
					if got := changes(t, ctx, direct, mailbox, id); !slices.Equal(got, w.kinds) {
						t.Errorf("after %d octets: changes of the request: %v, want %v", n, got, w.kinds)
					}
					if got := changes(t, ctx, direct, mailbox, ""); len(got) != len(w.kinds)+1 {
						t.Errorf("after %d octets: all changes: %v", n, got)
					}
					if got := changes(t, ctx, direct, renamed(mailbox), ""); !slices.Equal(got, w.renamed) {
						t.Errorf("after %d octets: changes of the new name: %v, want %v", n, got, w.renamed)
					}
				}
				t.Logf("%d calls failed, %d of them had done their work; %d survived a broken connection", failed, done, survived)
				// The policy service looks for itself what became of a save whose reply it lost.
				if network.proxy == toPolicy && done < 3 || network.proxy == toEtcd && survived < 3 {
					t.Error("hardly a reply was lost: the test proves nothing")
				}
			})
		}
	}
}

// persist calls until it works.
func persist(t *testing.T, ctx context.Context, call func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	must(t, stack.Await(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		return call(ctx)
	}))
}

// changes returns the kinds of a mailbox's changes, newest first, of one request or, without an id, all.
func changes(t *testing.T, ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, requestID string) []policyv1.ChangeKind {
	t.Helper()
	var kinds []policyv1.ChangeKind
	persist(t, ctx, func(ctx context.Context) error {
		kinds = nil
		resp, err := lists.ListChanges(ctx, &policyv1.ListChangesRequest{Mailbox: mailbox})
		for _, c := range resp.GetChanges() {
			if requestID == "" || c.GetRequestId() == requestID {
				kinds = append(kinds, c.GetKind())
			}
		}
		return err
	})
	return kinds
}
