package web

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

const fakeCaller = "dashboard.example.org"

// fakePolicy is the policy service in memory, with the real rules.
type fakePolicy struct {
	policyv1.UnimplementedPolicyServiceServer
	rules allow.Rules

	mu          sync.Mutex
	changes     map[string][]*policyv1.Change // oldest first
	last        int
	down, deaf  bool // it answers nothing; it acts and then answers nothing
	propagation *policyv1.GetPropagationResponse
	saves       int
	listed      int  // pages of lists that were asked for
	asked       int  // while it is down
	frozen      bool // it answers no save
}

func newFakePolicy() *fakePolicy {
	return &fakePolicy{
		changes:     make(map[string][]*policyv1.Change),
		propagation: &policyv1.GetPropagationResponse{SidecarCount: 2, AppliedCount: 2, ReplicaCount: 1},
	}
}

func (f *fakePolicy) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

var errDown = rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE, "the store did not answer in time")

func (f *fakePolicy) mailbox(name string) (string, error) {
	if f.down {
		f.asked++
		return "", errDown
	}
	m, err := allow.ParseMailbox(name)
	if err != nil {
		return "", rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, err.Error(), rpcerr.Field("mailbox", err.Error()))
	}
	return m.String(), nil
}

func (f *fakePolicy) current(name string) *policyv1.AllowedNets {
	a := &policyv1.AllowedNets{Mailbox: name, Etag: "0-0"}
	if all := f.changes[name]; len(all) > 0 {
		c := all[len(all)-1]
		a.Nets, a.Etag, a.Revision, a.UpdateTime, a.UpdatedBy = c.GetAfter(), c.GetRevision(), c.GetRevision(), c.GetTime(), c.GetActor().GetId()
	}
	return a
}

func invalidNets(invalid *allow.InvalidError) error {
	details := &policyv1.InvalidNets{}
	for _, p := range invalid.Problems {
		block := ""
		if p.Block.IsValid() {
			block = p.Block.String()
		}
		details.InvalidNets = append(details.InvalidNets, &policyv1.InvalidNet{
			Index: int32(p.Index), Text: p.Text, Refusal: p.Refusal, Message: p.Message, Suggestions: p.Suggestions, Block: block,
		})
	}
	return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID, "nothing was saved", details)
}

func fieldInvalid(field string) error {
	return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, field, rpcerr.Field(field, "it is none"))
}

func (f *fakePolicy) list(text string) ([]*policyv1.Net, error) {
	list, err := f.rules.ParseText(text)
	if invalid, ok := errors.AsType[*allow.InvalidError](err); ok {
		return nil, invalidNets(invalid)
	}
	if err != nil {
		return nil, rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY, err.Error())
	}
	var nets []*policyv1.Net
	for _, text := range list.Strings() {
		nets = append(nets, &policyv1.Net{Net: text})
	}
	return nets, nil
}

// save is the part that a set and a clear share.
func (f *fakePolicy) save(name, etag, id string, actor *policyv1.Actor, kind policyv1.ChangeKind, nets []*policyv1.Net) (a *policyv1.AllowedNets, changed, superseded bool, err error) {
	for i, c := range f.changes[name] {
		if id == "" || c.GetRequestId() != id {
			continue
		}
		if !sameNets(c.GetAfter(), nets) {
			return nil, false, false, rpcerr.New(codes.AlreadyExists, decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED, "used before")
		}
		done := f.current(name)
		done.Nets, done.Revision = c.GetAfter(), c.GetRevision()
		return done, false, i < len(f.changes[name])-1, nil
	}
	current := f.current(name)
	if sameNets(current.GetNets(), nets) {
		return current, false, false, nil
	}
	if etag != "" && etag != current.GetEtag() {
		return nil, false, false, rpcerr.WithMetadata(codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH, "changed", map[string]string{
			"etag": current.GetEtag(), "updated_by": current.GetUpdatedBy(), "update_time": current.GetUpdateTime().AsTime().Format(time.RFC3339),
		})
	}
	f.last++
	f.saves++
	f.changes[name] = append(f.changes[name], &policyv1.Change{
		Mailbox: name, Kind: kind, Before: current.GetNets(), After: nets, Actor: actor, Caller: fakeCaller,
		Time: timestamppb.New(time.Date(2026, 11, 3, 12, f.last%60, 0, 0, time.UTC)), RequestId: id, Revision: "1-" + strconv.Itoa(f.last),
	})
	if f.deaf {
		return nil, false, false, errDown
	}
	return f.current(name), true, false, nil
}

func (f *fakePolicy) SetAllowedNets(_ context.Context, req *policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, err := f.mailbox(req.GetMailbox())
	if err != nil {
		return nil, err
	}
	nets, err := f.list(req.GetText())
	if err != nil {
		return nil, err
	}
	if req.GetValidateOnly() {
		return &policyv1.SetAllowedNetsResponse{AllowedNets: &policyv1.AllowedNets{Mailbox: name, Nets: nets}}, nil
	}
	if f.frozen {
		f.down = true // from now on
		return nil, errDown
	}
	a, changed, superseded, err := f.save(name, req.GetEtag(), req.GetRequestId(), req.GetActor(), policyv1.ChangeKind_CHANGE_KIND_SET, nets)
	if err != nil {
		return nil, err
	}
	return &policyv1.SetAllowedNetsResponse{AllowedNets: a, Changed: changed, Superseded: superseded}, nil
}

func (f *fakePolicy) ClearAllowedNets(_ context.Context, req *policyv1.ClearAllowedNetsRequest) (*policyv1.ClearAllowedNetsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, err := f.mailbox(req.GetMailbox())
	if err != nil {
		return nil, err
	}
	a, changed, superseded, err := f.save(name, req.GetEtag(), req.GetRequestId(), req.GetActor(), policyv1.ChangeKind_CHANGE_KIND_CLEAR, nil)
	if err != nil {
		return nil, err
	}
	return &policyv1.ClearAllowedNetsResponse{AllowedNets: a, Changed: changed, Superseded: superseded}, nil
}

func (f *fakePolicy) GetAllowedNets(_ context.Context, req *policyv1.GetAllowedNetsRequest) (*policyv1.GetAllowedNetsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, err := f.mailbox(req.GetMailbox())
	if err != nil {
		return nil, err
	}
	return &policyv1.GetAllowedNetsResponse{AllowedNets: f.current(name)}, nil
}

func (f *fakePolicy) ListAllowedNets(_ context.Context, req *policyv1.ListAllowedNetsRequest) (*policyv1.ListAllowedNetsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return nil, errDown
	}
	f.listed++
	var names []string
	for name := range f.changes {
		if strings.HasSuffix(name, "@"+req.GetDomain()) && len(f.current(name).GetNets()) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	resp := &policyv1.ListAllowedNetsResponse{TotalSize: int64(len(names))}
	after := max(req.GetAfterMailbox(), req.GetPageToken())
	for _, name := range names {
		if name <= after {
			continue
		}
		if len(resp.GetAllowedNets()) == min(int(req.GetPageSize()), listPage) {
			resp.NextPageToken = resp.GetAllowedNets()[len(resp.GetAllowedNets())-1].GetMailbox()
			break
		}
		resp.AllowedNets = append(resp.AllowedNets, f.current(name))
	}
	return resp, nil
}

func (f *fakePolicy) ListChanges(_ context.Context, req *policyv1.ListChangesRequest) (*policyv1.ListChangesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, err := f.mailbox(req.GetMailbox())
	if err != nil {
		return nil, err
	}
	newest := slices.Clone(f.changes[name])
	slices.Reverse(newest)
	skip, err := strconv.Atoi(cmp.Or(req.GetPageToken(), "0"))
	if err != nil {
		return nil, fieldInvalid("page_token")
	}
	resp := &policyv1.ListChangesResponse{Changes: newest[min(skip, len(newest)):]}
	if size := int(req.GetPageSize()); len(resp.GetChanges()) > size {
		resp.Changes, resp.NextPageToken = resp.GetChanges()[:size], strconv.Itoa(skip+size)
	}
	return resp, nil
}

func (f *fakePolicy) ExplainAccess(_ context.Context, req *policyv1.ExplainAccessRequest) (*policyv1.ExplainAccessResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, err := f.mailbox(req.GetMailbox())
	if err != nil {
		return nil, err
	}
	restricted, _ := allow.Scope{}.Restricts(req.GetService())
	if !restricted {
		return &policyv1.ExplainAccessResponse{Decision: &decisionv1.Decision{
			Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_SERVICE_EXEMPT,
		}}, nil
	}
	text := fieldText(f.current(name).GetNets())
	if req.GetDraft() != nil {
		text = req.GetText()
	}
	list, err := f.rules.ParseText(text)
	var set *allow.Set
	switch {
	case err == nil:
		if set, err = allow.DecodeSet(list.Encode()); err != nil {
			return nil, err
		}
	case !errors.Is(err, allow.ErrEmpty):
		_, err = f.list(text)
		return nil, err
	}
	client, err := allow.ParseClient(req.GetClientAddress())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	outcome := allow.Decide(set, client)
	d := &decisionv1.Decision{Verdict: outcome.Verdict, Reason: outcome.Reason}
	if outcome.Net.IsValid() {
		d.MatchedNet = allow.FormatNet(outcome.Net)
	}
	return &policyv1.ExplainAccessResponse{Decision: d}, nil
}

func (f *fakePolicy) GetPropagation(_ context.Context, req *policyv1.GetPropagationRequest) (*policyv1.GetPropagationResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return nil, errDown
	}
	if !strings.Contains(req.GetRevision(), "-") {
		return nil, fieldInvalid("revision")
	}
	resp := f.propagation
	resp.Revision = req.GetRevision()
	return resp, nil
}

// put saves a list as somebody else would. Empty text lifts.
func (f *fakePolicy) put(name, by, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var nets []*policyv1.Net
	kind := policyv1.ChangeKind_CHANGE_KIND_CLEAR
	if text != "" {
		var err error
		if nets, err = f.list(text); err != nil {
			panic(fmt.Sprintf("%s: %v", text, err))
		}
		kind = policyv1.ChangeKind_CHANGE_KIND_SET
	}
	if _, _, _, err := f.save(name, "", "", &policyv1.Actor{Id: by, Address: "9.9.9.9"}, kind, nets); err != nil {
		panic(err)
	}
}

func (f *fakePolicy) nets(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.ReplaceAll(fieldText(f.current(name).GetNets()), "\n", " ")
}
