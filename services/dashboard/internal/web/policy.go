package web

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

const (
	// callWithin bounds one attempt, allWithin everything that a page asks for: a person waits.
	callWithin  = 3 * time.Second
	allWithin   = 8 * time.Second
	maxAttempts = 3
	backoff     = 100 * time.Millisecond
	// listPage is the most lists that the policy service gives at once.
	listPage = 1000
)

// policy is the policy service, as a page asks it.
type policy struct{ policyv1.PolicyServiceClient }

// call asks, and asks again if there was no answer. Only what may be repeated is called: reads, and writes with a request id.
func call[Req, Resp any](ctx context.Context, rpc func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	for attempt := 1; ; attempt++ {
		resp, err := callOnce(ctx, rpc, req)
		if err == nil || attempt == maxAttempts || ctx.Err() != nil || status.Code(err) != codes.Unavailable && status.Code(err) != codes.DeadlineExceeded {
			return resp, err
		}
		wait := time.NewTimer(rand.N(backoff << attempt)) //nolint:gosec // jitter
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return resp, err
		}
	}
}

func callOnce[Req, Resp any](ctx context.Context, rpc func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	return rpc(ctx, req)
}

// get returns the list of a mailbox.
func (p policy) get(ctx context.Context, mailbox string) (*policyv1.AllowedNets, error) {
	resp, err := call(ctx, p.GetAllowedNets, &policyv1.GetAllowedNetsRequest{Mailbox: mailbox})
	return resp.GetAllowedNets(), err
}

// lists reads the restricted mailboxes of a domain in order, from behind one of them, page by page as they are needed.
type lists struct {
	policy policy
	req    *policyv1.ListAllowedNetsRequest
	page   []*policyv1.AllowedNets
	more   bool
	total  int
}

// lists reads the first page, of size lists.
func (p policy) lists(ctx context.Context, domain, after string, size int) (*lists, error) {
	l := &lists{policy: p, req: &policyv1.ListAllowedNetsRequest{Domain: domain, AfterMailbox: after, PageSize: int32(size)}, more: true}
	return l, l.fill(ctx)
}

func (l *lists) fill(ctx context.Context) error {
	resp, err := call(ctx, l.policy.ListAllowedNets, l.req)
	if err != nil {
		return err
	}
	l.page, l.total = resp.GetAllowedNets(), int(resp.GetTotalSize())
	l.more = resp.GetNextPageToken() != ""
	l.req.AfterMailbox, l.req.PageToken, l.req.PageSize = "", resp.GetNextPageToken(), listPage
	return nil
}

// peek returns the next one; nil behind the last.
func (l *lists) peek(ctx context.Context) (*policyv1.AllowedNets, error) {
	for len(l.page) == 0 && l.more {
		if err := l.fill(ctx); err != nil {
			return nil, err
		}
	}
	if len(l.page) == 0 {
		return nil, nil
	}
	return l.page[0], nil
}

func (l *lists) next() { l.page = l.page[1:] }
