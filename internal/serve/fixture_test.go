package serve_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	"github.com/allowednets/allowednets/internal/serve"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// within bounds the wait for what must happen.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

const (
	checkMethod  = "/allowednets.check.v1.CheckService/Check"
	streamMethod = "/allowednets.check.v1.CheckService/CheckStream"
	statusMethod = "/allowednets.check.v1.CheckService/GetStatus"
)

type checkStream = grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]

// checks is a service that does what the test says. It stands for every service: the server knows none.
type checks struct {
	checkv1.UnimplementedCheckServiceServer
	check  func(context.Context) (*checkv1.CheckResponse, error)
	stream func(checkStream) error
}

func (c checks) Check(ctx context.Context, _ *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return c.check(ctx)
}

func (c checks) CheckStream(stream checkStream) error { return c.stream(stream) }

func (c checks) GetStatus(context.Context, *checkv1.GetStatusRequest) (*checkv1.GetStatusResponse, error) {
	return &checkv1.GetStatusResponse{}, nil
}

// answer is a check that answers.
func answer(context.Context) (*checkv1.CheckResponse, error) { return &checkv1.CheckResponse{}, nil }

// server is a gRPC server on a listener in memory.
type server struct {
	*serve.GRPC
	t       *testing.T
	lis     *bufconn.Listener
	metrics *prometheus.Registry
	log     logBuffer
	cancel  context.CancelFunc
	ended   chan error
}

// start runs a server with svc until the test ends or stops it. Without credentials it is one in plain text.
func start(t *testing.T, cfg serve.GRPCConfig, svc checks, drain func()) *server {
	t.Helper()
	s := build(t, cfg, svc)
	s.run(t.Context(), drain, s.lis)
	return s
}

func build(t *testing.T, cfg serve.GRPCConfig, svc checks) *server {
	t.Helper()
	s := &server{t: t, lis: bufconn.Listen(1 << 16), metrics: prometheus.NewRegistry()}
	cfg.Log, cfg.Metrics = slog.New(slog.NewTextHandler(&s.log, nil)), s.metrics
	if cfg.Credentials == nil {
		cfg.Credentials = insecure.NewCredentials()
	}
	var err error
	s.GRPC, err = serve.NewGRPC(cfg, func(r grpc.ServiceRegistrar) { checkv1.RegisterCheckServiceServer(r, svc) })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) run(ctx context.Context, drain func(), listeners ...net.Listener) {
	ctx, s.cancel = context.WithCancel(ctx)
	s.ended = make(chan error, 1)
	go func() {
		s.ended <- s.Run(ctx, drain, listeners...)
		close(s.ended)
	}()
	s.t.Cleanup(func() { _ = s.stop() })
}

// stop ends the server and returns what Run returned; the second time nil.
func (s *server) stop() error {
	s.cancel()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(2 * time.Minute): // fake in a bubble
		return errors.New("the server does not stop")
	}
}

// dial returns a connection to the server, closed at the end of the test. Without credentials it is one in plain text.
func (s *server) dial(creds credentials.TransportCredentials, opts ...grpc.DialOption) *grpc.ClientConn {
	s.t.Helper()
	return dial(s.t, s.lis.DialContext, creds, opts...)
}

func dial(t *testing.T, open func(context.Context) (net.Conn, error), creds credentials.TransportCredentials, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	conn, err := grpc.NewClient("passthrough:///localhost", append(opts, grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return open(ctx) }))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// check calls Check once over a connection of its own.
func (s *server) check(creds credentials.TransportCredentials, opts ...grpc.CallOption) error {
	s.t.Helper()
	conn := s.dial(creds)
	defer func() { _ = conn.Close() }()
	_, err := checkv1.NewCheckServiceClient(conn).Check(within(s.t), &checkv1.CheckRequest{}, opts...)
	return err
}

// calls returns the counter of finished RPCs.
func (s *server) calls(method, code string) float64 {
	s.t.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if f.GetName() == "allowednets_grpc_calls_total" && labels["method"] == method && labels["code"] == code {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// logBuffer is a log that several goroutines write.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
