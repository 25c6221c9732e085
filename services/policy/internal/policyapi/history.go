package policyapi

import (
	"context"
	"encoding/base64"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

const (
	defaultChanges = 50
	maxChanges     = 200
)

// ListChanges implements policy.v1.PolicyServiceServer.
func (s *Service) ListChanges(ctx context.Context, req *policyv1.ListChangesRequest) (*policyv1.ListChangesResponse, error) {
	mailbox, err := s.parseMailbox(ctx, req.GetMailbox())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	size, err := pageSize(req.GetPageSize(), defaultChanges, maxChanges)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	before, err := parseChangesToken(req.GetPageToken(), mailbox)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	changes, err := s.cfg.Store.History(ctx, mailbox, before, size+1)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	resp := &policyv1.ListChangesResponse{}
	bytes := 0
	for i, c := range changes {
		if i == size || bytes > maxPageBytes {
			resp.NextPageToken = changesToken(mailbox, changes[i-1].Record.Version)
			break
		}
		m := changeMessage(c)
		bytes += proto.Size(m)
		resp.Changes = append(resp.Changes, m)
	}
	return resp, nil
}

func changeMessage(c store.Change) *policyv1.Change {
	return &policyv1.Change{
		Mailbox: c.GetMailbox(), Kind: c.GetKind(), Before: netMessages(c.GetBefore()), After: netMessages(c.GetAfter().GetNets()),
		Actor: &policyv1.Actor{Id: c.GetActorId(), Address: c.GetActorAddress()}, Caller: c.GetCaller(),
		Time: c.GetAfter().GetUpdateTime(), RequestId: c.GetRequestId(), Revision: c.Record.Etag(), OtherMailbox: c.GetOtherMailbox(),
	}
}

// changesToken continues behind a version. It names the mailbox, so that it cannot be used for another one.
func changesToken(mailbox allow.Mailbox, version int64) string {
	return base64.RawURLEncoding.EncodeToString([]byte(mailbox.String() + "/" + strconv.FormatInt(version, 10)))
}

func parseChangesToken(token string, mailbox allow.Mailbox) (before int64, err error) {
	if token == "" {
		return 0, nil
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	version, ok := strings.CutPrefix(string(text), mailbox.String()+"/")
	before, err2 := strconv.ParseInt(version, 10, 64)
	if err != nil || err2 != nil || !ok || before < 1 {
		return 0, &fieldError{"page_token", "is not a token of this history; take next_page_token of the page before, for the same mailbox"}
	}
	return before, nil
}

func pageSize(asked int32, byDefault, most int) (int, error) {
	switch {
	case asked < 0:
		return 0, &fieldError{"page_size", "must not be negative"}
	case asked == 0:
		return byDefault, nil
	}
	return min(int(asked), most), nil
}
