package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// GRPCConfig configures a [GRPC] server.
type GRPCConfig struct {
	Credentials credentials.TransportCredentials
	// Callers says who may call what. Nil grants everything to whoever can reach the listener (a unix socket, or loopback).
	Callers *Callers
	Log     *slog.Logger
	Metrics prometheus.Registerer
	// MaxRequest bounds one message in octets; 0 means 1 MiB.
	MaxRequest int
	// MaxConnectionAge ends a connection gracefully after about this time, so that clients spread over new replicas;
	// 0 means never.
	MaxConnectionAge time.Duration
	// Options are added to the server's own.
	Options []grpc.ServerOption
	// Local means that all peers are on this machine, where the kernel tells when one is gone. There are no keepalive pings then: after
	// the wall clock was set back gRPC takes connections on which it reads for silent ones, and cuts them off.
	Local bool
	// Workers is how many goroutines serve unary calls; 0 means a new one for each call.
	Workers uint32
}

// GRPC is a gRPC server with reflection, health, recovery from panics, a caller table and a bounded stop.
type GRPC struct {
	*grpc.Server
	health *health.Server
}

// NewGRPC builds the server; register adds the services.
func NewGRPC(cfg GRPCConfig, register func(grpc.ServiceRegistrar)) (*GRPC, error) {
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "allowednets_grpc_calls_total", Help: "Finished RPCs by method and status code.",
	}, []string{"method", "code"})
	if err := cfg.Metrics.Register(calls); err != nil {
		return nil, fmt.Errorf("registering metrics: %w", err)
	}
	keepaliveTime := 20 * time.Second
	if cfg.Local {
		keepaliveTime = math.MaxInt64
	}
	g := &guard{callers: cfg.Callers, log: cfg.Log, calls: calls, refusals: rate.NewLimiter(rate.Every(time.Second), 10)}
	opts := []grpc.ServerOption{
		grpc.Creds(cfg.Credentials),
		grpc.UnaryInterceptor(g.unary),
		grpc.StreamInterceptor(g.stream),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: keepaliveTime, Timeout: 10 * time.Second,
			MaxConnectionAge: cfg.MaxConnectionAge, MaxConnectionAgeGrace: StopTimeout,
		}),
		grpc.ConnectionTimeout(StopTimeout), // a stop waits for connections that have not said what they are
		grpc.MaxConcurrentStreams(1000),
		grpc.NumStreamWorkers(cfg.Workers),
	}
	maxRequest := cfg.MaxRequest
	if maxRequest == 0 {
		maxRequest = 1 << 20
	}
	opts = append(append(opts, grpc.MaxRecvMsgSize(maxRequest)), cfg.Options...)
	s := &GRPC{Server: grpc.NewServer(opts...), health: health.NewServer()}
	register(s.Server)
	healthv1.RegisterHealthServer(s.Server, s.health)
	reflection.Register(s.Server)
	g.succeeded = make(map[string]func() prometheus.Counter)
	for service, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			method := "/" + service + "/" + m.Name
			g.succeeded[method] = sync.OnceValue(func() prometheus.Counter { return calls.WithLabelValues(method, codes.OK.String()) })
		}
	}
	s.SetReady(false)
	return s, nil
}

// SetReady sets what the health service answers for the whole server.
func (s *GRPC) SetReady(ready bool) {
	st := healthv1.HealthCheckResponse_NOT_SERVING
	if ready {
		st = healthv1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", st)
}

// Run serves on all listeners until ctx ends. Then it reports not-serving, calls drain (which must make endless streams
// return; may be nil), waits for running calls at most [StopTimeout], and cuts off the rest.
func (s *GRPC) Run(ctx context.Context, drain func(), listeners ...net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, lis := range listeners {
		group.Go(func() error {
			if err := s.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) { // ctx ended before it began
				return fmt.Errorf("serving gRPC on %s: %w", lis.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		s.health.Shutdown()
		if drain != nil {
			drain()
		}
		timer := time.AfterFunc(StopTimeout, s.Stop) // GracefulStop alone waits for ever on a stream that does not end
		defer timer.Stop()
		s.GracefulStop()
		return nil
	})
	return group.Wait()
}

// guard stands around every call: it authorizes, counts, and turns a panic into an error, never into an answer.
type guard struct {
	callers *Callers
	log     *slog.Logger
	calls   *prometheus.CounterVec
	// succeeded returns the counter of each method's successes, which it looks up once, at the first.
	succeeded map[string]func() prometheus.Counter
	// refusals bounds the log of refused callers.
	refusals *rate.Limiter
}

func (g *guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer g.finish(ctx, info.FullMethod, &err)
	if err := g.authorize(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (g *guard) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer g.finish(ss.Context(), info.FullMethod, &err)
	if err := g.authorize(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, ss)
}

func (g *guard) authorize(ctx context.Context, method string) error {
	if g.callers == nil {
		return nil
	}
	return g.callers.authorize(ctx, method)
}

func (g *guard) finish(ctx context.Context, method string, err *error) {
	if p := recover(); p != nil {
		g.log.ErrorContext(ctx, "panic in RPC", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		*err = rpcerr.New(codes.Internal, decisionv1.ErrorReason_ERROR_REASON_INTERNAL, "internal error")
	}
	if *err == nil {
		g.succeeded[method]().Inc()
		return
	}
	code := status.Code(*err)
	g.calls.WithLabelValues(method, code.String()).Inc()
	if code == codes.PermissionDenied && g.refusals.Allow() {
		g.log.WarnContext(ctx, "caller refused", "caller", Caller(ctx), "method", method, "problem", status.Convert(*err).Message())
	}
}
