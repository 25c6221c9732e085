package serve_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve"
)

// allowed is an answer that nobody may get from a handler that did not return it.
func allowed() *checkv1.CheckResponse {
	return &checkv1.CheckResponse{Decision: &decisionv1.Decision{Verdict: decisionv1.Verdict_VERDICT_ALLOW}}
}

func TestPanicIsNeverAnAnswer(t *testing.T) {
	s := start(t, serve.GRPCConfig{}, checks{
		check: func(context.Context) (resp *checkv1.CheckResponse, _ error) {
			resp = allowed()
			_ = resp
			panic("secret cause")
		},
		stream: func(stream checkStream) error {
			if err := stream.Send(&checkv1.CheckStreamResponse{}); err != nil {
				return err
			}
			var none *checkv1.CheckResponse
			none.Decision = nil // a nil pointer is a panic as well
			return nil
		},
	}, nil)
	client := checkv1.NewCheckServiceClient(s.dial(nil))
	internal := func(err error) {
		t.Helper()
		if status.Code(err) != codes.Internal || rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_INTERNAL ||
			status.Convert(err).Message() != "internal error" {
			t.Errorf("got %v", err)
		}
	}
	resp, err := client.Check(within(t), &checkv1.CheckRequest{})
	internal(err)
	if resp.GetDecision() != nil {
		t.Errorf("answer %v", resp)
	}
	stream, err := client.CheckStream(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	internal(err)
	// The server lives on, has counted both and has told the log, and nobody else, the cause.
	if _, err := client.GetStatus(within(t), &checkv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
	for _, method := range []string{checkMethod, streamMethod} {
		if n := s.calls(method, "Internal"); n != 1 {
			t.Errorf("%s: %v internal errors counted", method, n)
		}
	}
	if log := s.log.String(); !strings.Contains(log, "secret cause") || !strings.Contains(log, "grpc_test.go") {
		t.Errorf("the log has no cause or no place:\n%s", log)
	}
}

func TestCallsAreCounted(t *testing.T) {
	s := start(t, serve.GRPCConfig{}, checks{
		check:  func(context.Context) (*checkv1.CheckResponse, error) { return nil, status.Error(codes.Aborted, "no") },
		stream: func(checkStream) error { return nil },
	}, nil)
	conn := s.dial(nil)
	client := checkv1.NewCheckServiceClient(conn)
	for range 3 {
		_, _ = client.Check(within(t), &checkv1.CheckRequest{})
	}
	stream, err := client.CheckStream(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	// What a caller invents must not become a label.
	for _, method := range []string{"/allowednets.check.v1.CheckService/Invented", "/invented.Service/Check", "invented"} {
		err := conn.Invoke(within(t), method, &checkv1.CheckRequest{}, &checkv1.CheckResponse{})
		if c := status.Code(err); c != codes.Unimplemented && c != codes.Internal {
			t.Errorf("%s: %v", method, err)
		}
	}
	if n := s.calls(checkMethod, "Aborted"); n != 3 {
		t.Errorf("%v aborted calls counted", n)
	}
	if n := s.calls(streamMethod, "OK"); n != 1 {
		t.Errorf("%v streams counted", n)
	}
	families, err := s.metrics.Gather()
	if err != nil || len(families) != 1 || len(families[0].GetMetric()) != 2 {
		t.Errorf("there is more than was called: %v, %v", families, err)
	}
}

func TestMetricsThatAreThereAlready(t *testing.T) {
	s := build(t, serve.GRPCConfig{}, checks{})
	cfg := serve.GRPCConfig{Credentials: insecure.NewCredentials(), Metrics: s.metrics}
	if _, err := serve.NewGRPC(cfg, func(grpc.ServiceRegistrar) {}); !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		t.Errorf("a second server on one registry: %v", err)
	}
	if err := s.lis.Close(); err != nil {
		t.Error(err)
	}
}

func TestRequestSize(t *testing.T) {
	for name, test := range map[string]struct{ limit, size int }{"by default": {0, 1 << 20}, "as set": {1000, 1000}} {
		t.Run(name, func(t *testing.T) {
			s := start(t, serve.GRPCConfig{MaxRequest: test.limit}, checks{check: answer}, nil)
			client := checkv1.NewCheckServiceClient(s.dial(nil))
			send := func(size int) error {
				_, err := client.Check(within(t), &checkv1.CheckRequest{Mailbox: strings.Repeat("a", size)})
				return err
			}
			const overhead = 16
			if err := send(test.size - overhead); err != nil {
				t.Error(err)
			}
			for _, size := range []int{test.size + 1, 10 << 20} {
				if err := send(size); status.Code(err) != codes.ResourceExhausted {
					t.Errorf("%d octets: %v", size, err)
				}
			}
		})
	}
}

func TestHealthAndReflection(t *testing.T) {
	drained := make(chan error, 1)
	var watch grpc.ServerStreamingClient[healthv1.HealthCheckResponse]
	s := start(t, serve.GRPCConfig{}, checks{}, func() {
		// Who watches is told first, so that it goes elsewhere before its calls are refused.
		resp, err := watch.Recv()
		if err == nil && resp.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
			err = errors.New("health says " + resp.GetStatus().String())
		}
		drained <- err
	})
	conn := s.dial(nil)
	health := healthv1.NewHealthClient(conn)
	is := func(want healthv1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		resp, err := health.Check(within(t), &healthv1.HealthCheckRequest{})
		if err != nil || resp.GetStatus() != want {
			t.Errorf("health: %v, %v", resp, err)
		}
	}
	is(healthv1.HealthCheckResponse_NOT_SERVING)
	s.SetReady(true)
	is(healthv1.HealthCheckResponse_SERVING)
	s.SetReady(false)
	is(healthv1.HealthCheckResponse_NOT_SERVING)
	s.SetReady(true)

	reflection, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(within(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}
	if err := reflection.Send(ask); err != nil {
		t.Fatal(err)
	}
	listed, err := reflection.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range listed.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	if !slices.Contains(names, "allowednets.check.v1.CheckService") {
		t.Errorf("reflection lists %q", names)
	}
	if err := reflection.CloseSend(); err != nil {
		t.Error(err)
	}

	if watch, err = health.Watch(within(t), &healthv1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	if resp, err := watch.Recv(); err != nil || resp.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("watch: %v, %v", resp, err)
	}
	s.cancel()
	if err := <-drained; err != nil {
		t.Errorf("before it drains, the server says: %v", err)
	}
	_ = conn.Close() // a watch of health does not end by itself
}

// stopTakes returns how long the server takes to stop, and what it returned.
func (s *server) stopTakes() (time.Duration, error) {
	begin := time.Now()
	err := s.stop()
	return time.Since(begin), err
}

func TestStop(t *testing.T) {
	endless := func(stream checkStream) error {
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	openStream := func(t *testing.T, s *server) (grpc.BidiStreamingClient[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse], error) {
		t.Helper()
		stream, err := checkv1.NewCheckServiceClient(s.dial(nil)).CheckStream(t.Context())
		if err == nil {
			err = stream.Send(&checkv1.CheckStreamRequest{})
		}
		synctest.Wait()
		return stream, err
	}

	t.Run("idle", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, serve.GRPCConfig{}, checks{check: answer}, nil)
			if err := s.check(nil); err != nil {
				t.Fatal(err)
			}
			_ = s.dial(nil).Invoke(t.Context(), checkMethod, &checkv1.CheckRequest{}, &checkv1.CheckResponse{}) // stays open
			if took, err := s.stopTakes(); took != 0 || err != nil {
				t.Errorf("took %v, %v", took, err)
			}
		})
	})
	t.Run("a stream that never ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, serve.GRPCConfig{}, checks{stream: endless}, nil)
			stream, err := openStream(t, s)
			if err != nil {
				t.Fatal(err)
			}
			if took, err := s.stopTakes(); took != serve.StopTimeout || err != nil {
				t.Errorf("took %v, %v", took, err)
			}
			if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
				t.Errorf("the stream ended with %v", err)
			}
		})
	})
	t.Run("a stream that drain ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			draining := make(chan struct{})
			s := start(t, serve.GRPCConfig{}, checks{stream: func(stream checkStream) error {
				<-draining
				return stream.Send(&checkv1.CheckStreamResponse{})
			}}, func() { close(draining) })
			stream, err := openStream(t, s)
			if err != nil {
				t.Fatal(err)
			}
			if took, err := s.stopTakes(); took != 0 || err != nil {
				t.Errorf("took %v, %v", took, err)
			}
			if _, err := stream.Recv(); err != nil { // the last word arrives
				t.Errorf("the stream ended with %v", err)
			}
		})
	})
	t.Run("a running call", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const work = serve.StopTimeout - time.Second
			s := start(t, serve.GRPCConfig{}, checks{check: func(ctx context.Context) (*checkv1.CheckResponse, error) {
				time.Sleep(work)
				return &checkv1.CheckResponse{}, ctx.Err()
			}}, nil)
			called := make(chan error)
			go func() { called <- s.check(nil) }()
			synctest.Wait()
			took := make(chan time.Duration)
			go func() {
				d, err := s.stopTakes()
				if err != nil {
					t.Error(err)
				}
				took <- d
			}()
			if err := <-called; err != nil {
				t.Errorf("the running call: %v", err)
			}
			if d := <-took; d != work {
				t.Errorf("took %v", d)
			}
		})
	})
	// Such as a load balancer that looks whether the port is open.
	t.Run("a connection that says nothing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, serve.GRPCConfig{}, checks{}, nil)
			conn, err := s.lis.Dial()
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if took, err := s.stopTakes(); took > serve.StopTimeout || err != nil {
				t.Errorf("took %v, %v", took, err)
			}
			if _, err := io.ReadAll(conn); err != nil { // what was read is the server's greeting
				t.Errorf("the connection was not closed: %v", err)
			}
		})
	})
	t.Run("before it has begun", func(t *testing.T) {
		for range 100 { // serving and stopping race
			s := build(t, serve.GRPCConfig{}, checks{})
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			drained := false
			if err := s.Run(ctx, func() { drained = true }, s.lis); err != nil || !drained {
				t.Errorf("drained %v, %v", drained, err)
			}
			if _, err := s.lis.Dial(); err == nil {
				t.Error("the listener is still open")
			}
		}
	})
}

func TestSeveralListeners(t *testing.T) {
	s := build(t, serve.GRPCConfig{}, checks{check: answer})
	second := bufconn.Listen(1 << 16)
	s.run(t.Context(), nil, s.lis, second)
	for _, lis := range []*bufconn.Listener{s.lis, second} {
		client := checkv1.NewCheckServiceClient(dial(t, lis.DialContext, nil))
		if _, err := client.Check(within(t), &checkv1.CheckRequest{}); err != nil {
			t.Error(err)
		}
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	for _, lis := range []*bufconn.Listener{s.lis, second} {
		if _, err := lis.Dial(); err == nil {
			t.Error("a listener is still open")
		}
	}
}

// broken is a listener that fails.
type broken struct{ net.Listener }

func (broken) Accept() (net.Conn, error) { return nil, errors.New("the network is gone") }

func TestBrokenListenerStopsTheOthers(t *testing.T) {
	s := build(t, serve.GRPCConfig{}, checks{check: answer})
	lis := broken{bufconn.Listen(1)}
	err := s.Run(t.Context(), nil, s.lis, lis)
	if err == nil || !strings.Contains(err.Error(), "the network is gone") || !strings.Contains(err.Error(), lis.Addr().String()) {
		t.Errorf("got %v", err)
	}
	if _, err := s.lis.Dial(); err == nil {
		t.Error("the good listener is still open")
	}
}

// TestKeepalive shows that the server bears the pings of the product's own clients, and notices a client that has vanished, unless
// it leaves that to the kernel (make faults SEED=7 cut a checker off, half a minute after a sidecar's wall clock was set back).
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, serve.GRPCConfig{}, checks{check: answer}, nil)
		conn := s.dial(nil, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}))
		client := checkv1.NewCheckServiceClient(conn)
		if _, err := client.Check(t.Context(), &checkv1.CheckRequest{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the connection calls itself ready a little later than its first call ends
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if conn.WaitForStateChange(ctx, connectivity.Ready) {
			t.Errorf("the connection became %v", conn.GetState())
		}
	})
	for _, local := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) { keepaliveOfSilent(t, local) })
	}
}

func keepaliveOfSilent(t *testing.T, local bool) {
	s := start(t, serve.GRPCConfig{Local: local}, checks{}, nil)
	conn, err := s.lis.Dial()
	if err != nil {
		t.Fatal(err)
	}
	// A client that greets and is never heard of again: the preface of RFC 9113 §3.4 with empty settings.
	if _, err := io.Copy(conn, bytes.NewReader([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := conn.SetReadDeadline(begin.Add(24 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, conn) // until the server hangs up
	if took := time.Since(begin); local && took != 24*time.Hour || !local && (took < 20*time.Second || took > time.Minute) {
		t.Errorf("local %v: the server hung up after %v", local, took)
	}
	_ = conn.Close()
}

func TestMaxConnectionAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, serve.GRPCConfig{MaxConnectionAge: time.Hour}, checks{check: answer, stream: func(stream checkStream) error {
			<-stream.Context().Done()
			return stream.Context().Err()
		}}, nil)
		client := checkv1.NewCheckServiceClient(s.dial(nil))
		stream, err := client.CheckStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
		// gRPC spreads the ends by ±10 %.
		if took := time.Since(begin); took < 50*time.Minute || took > 70*time.Minute {
			t.Errorf("the connection lasted %v", took)
		}
		if _, err := client.Check(t.Context(), &checkv1.CheckRequest{}); err != nil {
			t.Errorf("the next connection: %v", err)
		}
	})
}
