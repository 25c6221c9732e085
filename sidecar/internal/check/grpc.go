package check

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
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
		return nil, g.refuse(ctx, err)
	}
	return dec.message(), nil
}

// CheckStream implements CheckService.
func (g *GRPC) CheckStream(stream grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]) error {
	// Nothing but the end of its handler ends a stream that waits in Recv. So the handler waits for the stop, and another
	// goroutine for requests; it ends with the stream.
	ended := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				ended <- g.refuse(stream.Context(), panicked(p))
			}
		}()
		ended <- g.answer(stream)
	}()
	select {
	case err := <-ended:
		return err
	case <-g.stop:
		return statusError(errStopping)
	}
}

func (g *GRPC) answer(stream grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]) error {
	ctx := stream.Context()
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		dec, err := g.decider.Decide(ctx, requestOf(req.GetCheck()))
		if err != nil {
			return g.refuse(ctx, err)
		}
		if err := stream.Send(dec.streamed()); err != nil {
			return err
		}
	}
}

// GetStatus implements CheckService.
func (g *GRPC) GetStatus(context.Context, *checkv1.GetStatusRequest) (*checkv1.GetStatusResponse, error) {
	return g.status(), nil
}

func (g *GRPC) refuse(ctx context.Context, err error) error {
	g.faults.count(ctx, doorGRPC, err)
	return statusError(err)
}
