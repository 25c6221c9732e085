package check_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// serveGRPC serves the gRPC door until the test ends or stop is called, which waits for the server's end.
func serveGRPC(t *testing.T, f *fixture) (client checkv1.CheckServiceClient, stop func()) {
	door := check.NewGRPC(f.decider, f.faults, func() *checkv1.GetStatusResponse {
		return &checkv1.GetStatusResponse{Id: "sidecar-1", Synced: true}
	})
	server, err := serve.NewGRPC(serve.GRPCConfig{
		Credentials: insecure.NewCredentials(), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	}, func(r grpc.ServiceRegistrar) { checkv1.RegisterCheckServiceServer(r, door) })
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 20)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Run(ctx, door.Drain, lis); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	conn, err := grpc.NewClient("passthrough:check", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(func() {
		_ = conn.Close()
		stop()
	})
	return checkv1.NewCheckServiceClient(conn), stop
}

func request(mailbox, client string, svc decisionv1.Service) *checkv1.CheckRequest {
	return &checkv1.CheckRequest{Mailbox: mailbox, ClientAddress: client, Service: svc}
}

func TestCheck(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client, _ := serveGRPC(t, f)
	for _, c := range []struct {
		req  *checkv1.CheckRequest
		want *decisionv1.Decision
	}{
		{
			request("alice@example.org", "8.8.8.8", imap),
			&decisionv1.Decision{Verdict: verdict(matched), Reason: matched, MatchedNet: "8.8.8.0/24", Revision: "1-7"},
		},
		{
			request("bob@example.org", "9.9.9.9", imap),
			&decisionv1.Decision{Verdict: verdict(matched), Reason: matched, MatchedNet: "9.9.9.9", Revision: "1-7"},
		},
		{
			request("alice@example.org", "1.1.1.1", imap),
			&decisionv1.Decision{Verdict: verdict(notInNets), Reason: notInNets, Revision: "1-7"},
		},
		{
			request("alice@example.org", "", submission),
			&decisionv1.Decision{Verdict: verdict(exempt), Reason: exempt, Revision: "1-7"},
		},
	} {
		resp, err := client.Check(t.Context(), c.req)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, resp.GetDecision(), protocmp.Transform()); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.req, diff)
		}
		if age := resp.GetDataAge(); age == nil || age.AsDuration() < 0 || age.AsDuration() > time.Minute {
			t.Errorf("age %v", age)
		}
	}
	never := stateOf(t, lists())
	never.Proven = time.Time{}
	f.state.Store(never)
	if resp, err := client.Check(t.Context(), request("carol@example.org", "1.1.1.1", imap)); err != nil || resp.GetDataAge() != nil {
		t.Errorf("of unknown age: %v, %v", resp, err)
	}
}

// faulty are requests without an answer, with the error that they get.
func faulty() map[*checkv1.CheckRequest]struct {
	code   codes.Code
	reason decisionv1.ErrorReason
	field  string
	cause  string
} {
	type want = struct {
		code   codes.Code
		reason decisionv1.ErrorReason
		field  string
		cause  string
	}
	return map[*checkv1.CheckRequest]want{
		nil: {codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "service", "service_unknown"},
		request("alice@example.org", "8.8.8.8", 77): {
			codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "service", "service_unknown",
		},
		request("alice", "8.8.8.8", imap): {
			codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, "mailbox", "mailbox_invalid",
		},
		request("alice@example.org", "8.8.8.8/32", imap): {
			codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_CLIENT_ADDRESS_INVALID, "client_address", "client_address_invalid",
		},
	}
}

func TestCheckErrors(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client, _ := serveGRPC(t, f)
	for req, want := range faulty() {
		before := f.metric("unanswered_total", want.cause, "grpc")
		_, err := client.Check(t.Context(), req)
		violations := rpcerr.Detail[*errdetails.BadRequest](err).GetFieldViolations()
		if status.Code(err) != want.code || rpcerr.Reason(err) != want.reason || len(violations) != 1 || violations[0].GetField() != want.field {
			t.Errorf("%v: %v %v", req, err, violations)
		}
		if after := f.metric("unanswered_total", want.cause, "grpc"); after != before+1 {
			t.Errorf("%v: counted %v times", req, after-before)
		}
	}
	f.state.Store(nil)
	_, err := client.Check(t.Context(), request("alice@example.org", "8.8.8.8", imap))
	if status.Code(err) != codes.Unavailable || rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED {
		t.Errorf("not synced: %v", err)
	}
	if n := f.metric("unanswered_total", "not_synced", "grpc"); n != 1 {
		t.Errorf("not synced was counted %v times", n)
	}
}

func TestPanicIsNoAnswer(t *testing.T) {
	f := newFixture(t, nil, func(cfg *check.DeciderConfig) {
		cfg.State = func() *mirror.State { panic("secret cause") }
	})
	client, _ := serveGRPC(t, f)
	req := request("alice@example.org", "8.8.8.8", imap)
	if _, err := client.Check(t.Context(), req); status.Code(err) != codes.Internal || status.Convert(err).Message() != "internal error" {
		t.Errorf("Check: %v", err)
	}
	stream, err := client.CheckStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&checkv1.CheckStreamRequest{Check: req}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Internal || status.Convert(err).Message() != "internal error" {
		t.Errorf("CheckStream: %v", err)
	}
	f.wantLog("level=ERROR", "secret cause")
}

// TestCheckStream sends many requests before it reads the answers, which come in order.
func TestCheckStream(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client, _ := serveGRPC(t, f)
	stream, err := client.CheckStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const n = 200
	for i := range n {
		if err := stream.Send(&checkv1.CheckStreamRequest{Check: request("alice@example.org", fmt.Sprintf("8.8.%d.8", 7+i%3), imap)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		resp, err := stream.Recv()
		want := notInNets
		if i%3 == 1 {
			want = matched
		}
		if err != nil || resp.GetCheck().GetDecision().GetReason() != want {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// TestCheckStreamErrors: a request without an answer ends the stream with the error that Check returns.
func TestCheckStreamErrors(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client, _ := serveGRPC(t, f)
	for req := range faulty() {
		_, want := client.Check(t.Context(), req)
		stream, err := client.CheckStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, req := range []*checkv1.CheckRequest{request("alice@example.org", "8.8.8.8", imap), req} {
			if err := stream.Send(&checkv1.CheckStreamRequest{Check: req}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := stream.Recv(); err != nil {
			t.Errorf("%v: the request before: %v", req, err)
		}
		_, err = stream.Recv()
		if diff := cmp.Diff(status.Convert(want).Proto(), status.Convert(err).Proto(), protocmp.Transform()); diff != "" {
			t.Errorf("%v (-Check +CheckStream):\n%s", req, diff)
		}
	}
}

// TestStopEndsStreams: a stream that waits for requests does not hold up the end.
func TestStopEndsStreams(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client, stop := serveGRPC(t, f)
	stream, err := client.CheckStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&checkv1.CheckStreamRequest{Check: request("alice@example.org", "8.8.8.8", imap)}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	stop()
	if d := time.Since(began); d >= serve.StopTimeout {
		t.Errorf("it took %v", d)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable || rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_OVERLOADED {
		t.Errorf("the stream ended with %v", err)
	}
}

func TestGetStatus(t *testing.T) {
	client, _ := serveGRPC(t, newFixture(t, nil))
	got, err := client.GetStatus(t.Context(), &checkv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&checkv1.GetStatusResponse{Id: "sidecar-1", Synced: true}, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
