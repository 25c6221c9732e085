package check

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

const doorGRPC = "grpc"

// GRPC is the gRPC door: CheckService.
type GRPC struct {
	checkv1.UnimplementedCheckServiceServer
	decider *Decider
	faults  *Faults
	status  func() *checkv1.GetStatusResponse
	stop    chan struct{}
}

// NewGRPC returns the service. status answers GetStatus.
func NewGRPC(decider *Decider, faults *Faults, status func() *checkv1.GetStatusResponse) *GRPC {
	return &GRPC{decider: decider, faults: faults, status: status, stop: make(chan struct{})}
}

// Drain ends all streams, now and from now on. It may be called once.
func (g *GRPC) Drain() { close(g.stop) }

// Check implements CheckService.
func (g *GRPC) Check(ctx context.Context, req *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	dec, err := g.decider.Decide(ctx, requestOf(req))
	if err != nil {
		g.faults.count(ctx, doorGRPC, err)
		return nil, statusError(err)
	}
	return responseOf(dec), nil
}

// CheckStream implements CheckService.
func (g *GRPC) CheckStream(stream grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		resp, err := g.Check(stream.Context(), req.GetCheck())
		if err != nil {
			return err
		}
		if err := stream.Send(&checkv1.CheckStreamResponse{Check: resp}); err != nil {
			return err
		}
	}
}

// GetStatus implements CheckService.
func (g *GRPC) GetStatus(context.Context, *checkv1.GetStatusRequest) (*checkv1.GetStatusResponse, error) {
	return g.status(), nil
}

func requestOf(req *checkv1.CheckRequest) Request {
	return Request{Mailbox: req.GetMailbox(), Client: req.GetClientAddress(), Service: req.GetService()}
}

func responseOf(dec Decision) *checkv1.CheckResponse {
	resp := &checkv1.CheckResponse{Decision: &decisionv1.Decision{Verdict: dec.Verdict, Reason: dec.Reason}}
	if dec.Net.IsValid() {
		resp.Decision.MatchedNet = allow.FormatNet(dec.Net)
	}
	if dec.State != nil {
		resp.Decision.Revision = dec.State.Revision
		if age, ok := dec.State.Age(time.Now()); ok {
			resp.DataAge = durationpb.New(age)
		}
	}
	return resp
}
