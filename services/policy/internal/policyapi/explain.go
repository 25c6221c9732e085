package policyapi

import (
	"context"
	"errors"
	"net/netip"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// ExplainAccess implements policy.v1.PolicyServiceServer.
func (s *Service) ExplainAccess(ctx context.Context, req *policyv1.ExplainAccessRequest) (*policyv1.ExplainAccessResponse, error) {
	mailbox, err := s.parseMailbox(ctx, req.GetMailbox())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	client, err := allow.ParseClient(req.GetClientAddress())
	if err != nil {
		return nil, s.status(ctx, &fieldError{"client_address", err.Error()})
	}
	restricted, known := s.cfg.Scope.Restricts(req.GetService())
	if !known {
		return nil, s.status(ctx, &fieldError{"service", "must be one of the services of allowednets.decision.v1.Service"})
	}
	decision := &decisionv1.Decision{}
	var nets []byte
	switch draft := req.GetDraft().(type) {
	case *policyv1.ExplainAccessRequest_List:
		nets, err = encode(s.cfg.Rules.ParseEntries(entries(draft.List)))
	case *policyv1.ExplainAccessRequest_Text:
		nets, err = encode(s.cfg.Rules.ParseText(draft.Text))
	default:
		_, err = s.cfg.Barrier(ctx)
		entry, state := s.cfg.Mirror.Lookup(mailbox)
		nets, decision.Revision = entry.Encoding, state.Token().String()
	}
	if err != nil {
		return nil, s.status(ctx, err)
	}
	outcome := allow.Outcome{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_SERVICE_EXEMPT}
	if restricted {
		if outcome, err = decide(nets, client); err != nil {
			return nil, s.status(ctx, err)
		}
	}
	decision.Verdict, decision.Reason = outcome.Verdict, outcome.Reason
	if outcome.Net.IsValid() {
		decision.MatchedNet = allow.FormatNet(outcome.Net)
	}
	return &policyv1.ExplainAccessResponse{Decision: decision}, nil
}

// encode turns a draft into what the feed would carry. An empty draft stands for an unrestricted mailbox.
func encode(list allow.List, err error) ([]byte, error) {
	if errors.Is(err, allow.ErrEmpty) {
		return nil, nil
	}
	return list.Encode(), err
}

// decide is what a sidecar does with the nets that the feed carries.
func decide(nets []byte, client netip.Addr) (allow.Outcome, error) {
	if len(nets) == 0 {
		return allow.Decide(nil, client), nil
	}
	set, err := allow.DecodeSet(nets)
	return allow.Decide(set, client), err
}
