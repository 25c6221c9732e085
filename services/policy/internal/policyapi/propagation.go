package policyapi

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
)

// maxLaggards is how many sidecars are named in an answer.
const maxLaggards = 100

// GetPropagation implements policy.v1.PolicyServiceServer.
func (s *Service) GetPropagation(ctx context.Context, req *policyv1.GetPropagationRequest) (*policyv1.GetPropagationResponse, error) {
	state, err := s.cfg.Barrier(ctx)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	save := state.Token()
	if req.GetRevision() != "" {
		if save, err = revision.Parse(req.GetRevision()); err != nil {
			return nil, s.status(ctx, &fieldError{"revision", "is not the revision of a save; take AllowedNets.revision"})
		}
		if save.Epoch != state.Epoch || save.Revision > state.Revision || save.Revision == 0 {
			return nil, s.status(ctx, &fieldError{"revision", "names no save of this store"})
		}
	}
	published, err := s.cfg.Store.Replicas(ctx)
	if err != nil {
		return nil, s.status(ctx, err)
	}
	sum := s.cfg.Tracker.Summarize(published, s.cfg.Replica, save)
	resp := &policyv1.GetPropagationResponse{
		Revision: save.String(), SidecarCount: int64(sum.Sidecars), AppliedCount: int64(sum.Applied), ReplicaCount: int64(sum.Replicas),
	}
	for _, l := range sum.Laggards[:min(len(sum.Laggards), maxLaggards)] {
		resp.Laggards = append(resp.Laggards, laggardMessage(l))
	}
	return resp, nil
}

func laggardMessage(l propagation.Laggard) *policyv1.Laggard {
	m := &policyv1.Laggard{Id: l.ID, Caller: l.Caller, Lost: !l.Lost.IsZero()}
	if m.GetLost() {
		m.LostTime = timestamppb.New(l.Lost)
	}
	if l.Applied != (revision.Token{}) {
		m.Revision = l.Applied.String()
	}
	return m
}
