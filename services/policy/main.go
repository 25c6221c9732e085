// Command allowednets-policy is the central policy service: it keeps the lists of allowed nets in etcd, answers
// PolicyService, and streams every change to the sidecars.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/feed"
	"github.com/allowednets/allowednets/services/policy/internal/policyapi"
	"github.com/allowednets/allowednets/services/policy/internal/propagation"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// maxConnectionAge makes callers look up the service's name now and then, so that they find new replicas.
const maxConnectionAge = 30 * time.Minute

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Buffers of a connection, of which a large host has thousands: idle ones hold the first, those that write the second. A TLS record
// has at most 16 KiB, and package tls holds one that came until it is read.
const (
	readBuffer  = 0
	writeBuffer = 16 << 10
)

// gcPercent is how much garbage there may be next to what is alive. Most of what this process holds, lists and streams, lives long,
// so that half of Go's default saves a quarter of its memory for little of its time.
const gcPercent = 50

// run is the process. It returns the exit code: 0 after ctx ended, 1 if something broke, 2 if the command line cannot work.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := serve.Command{
		Name: "allowednets-policy", Admin: ":7490", Stdout: stdout, Stderr: stderr,
		Description: "Keeps the lists of allowed nets and streams them to the sidecars.",
	}
	var f flags
	var cfg config
	if code, done := command.Parse(ctx, args, &f, func() (err error) { cfg, err = f.resolve(); return err }); done {
		return code
	}
	log := cfg.Logger(stderr)
	err := newProcess(cfg, log).run(ctx)
	if err != nil && !(ctx.Err() != nil && interrupted(err)) {
		log.ErrorContext(ctx, "the policy service stops", "error", err)
		return serve.ExitFailed
	}
	log.InfoContext(ctx, "the policy service stopped")
	return 0
}

// interrupted reports whether an error is how work ends that is told to stop.
func interrupted(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, store.ErrUnavailable)
}

// process is what the parts of a running policy service share.
type process struct {
	config
	log         *slog.Logger
	registry    *prometheus.Registry
	mirror      *store.Mirror
	tracker     *propagation.Tracker
	name        string              // of this replica
	options     []grpc.ServerOption // of tracing
	rpcListener net.Listener
}

func newProcess(cfg config, log *slog.Logger) *process {
	p := &process{
		config: cfg, log: log, registry: prometheus.NewRegistry(),
		mirror: store.NewMirror(), tracker: propagation.NewTracker(), name: replicaName(),
	}
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), cfg.TLSCollector())
	return p
}

// replicaName is unique for this run of the process: what another run knew must not be taken for what this one knows.
func replicaName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return host + "-" + uuid.NewString()[:8]
}

// run opens everything and runs it until ctx ends. What was opened is closed on every way out.
func (p *process) run(ctx context.Context) error {
	var err error
	if p.rpcListener, err = listen(ctx, "--listen", p.Listen); err != nil {
		return err
	}
	defer func() { _ = p.rpcListener.Close() }()
	adminListener, err := listen(ctx, "--admin-listen", p.AdminListen)
	if err != nil {
		return err
	}
	defer func() { _ = adminListener.Close() }()
	p.log.InfoContext(ctx, "the policy service starts", "address", p.rpcListener.Addr().String(), "admin_address", adminListener.Addr().String())

	stopTracing, err := p.trace(ctx)
	if err != nil {
		return err
	}
	defer stopTracing()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serve.HTTP(ctx, adminListener, serve.Admin(p.registry, p.ready), p.log) })
	group.Go(func() error { return p.runWithEtcd(ctx) })
	return group.Wait()
}

func (p *process) ready() error {
	if _, filled := p.mirror.State(); !filled {
		return errors.New("the store was not loaded yet")
	}
	return nil
}

func (p *process) epoch() uint64 {
	state, _ := p.mirror.State()
	return state.Epoch
}

// runWithEtcd starts the embedded etcd, unless a cluster is configured, and runs everything that needs the store.
func (p *process) runWithEtcd(ctx context.Context) error {
	if len(p.store.Endpoints) > 0 {
		return p.runWithStore(ctx)
	}
	etcd, err := startEtcd(ctx, p.DataDir, p.log)
	if err != nil {
		return err
	}
	defer etcd.close()
	p.store.Endpoints = []string{etcd.endpoint}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case err := <-etcd.Err():
			return fmt.Errorf("embedded etcd: %w", err)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { return p.runWithStore(ctx) })
	return group.Wait()
}

func (p *process) runWithStore(ctx context.Context) error {
	p.store.Log = p.log
	lists, err := store.Open(ctx, p.store, p.CreateStore || time.Now().Before(p.CreateStoreUntil))
	if errors.Is(err, store.ErrNotCreated) {
		return fmt.Errorf("%w: if this is the first start, give --create-store; otherwise the volume was lost or the endpoints are wrong", err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = lists.Close() }()
	if err := lists.RaiseEpoch(ctx, p.RaiseEpochTo); err != nil {
		return err
	}
	b, err := p.build(lists)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return b.replica.Run(ctx) })
	group.Go(func() error { return b.rpcs.Run(ctx, b.feeds.Drain, p.rpcListener) })
	group.Go(func() error {
		if _, err := p.mirror.Wait(ctx, func(store.State) bool { return true }); err != nil {
			return err
		}
		b.rpcs.SetReady(true)
		group.Go(func() error { return p.tracker.Run(ctx, lists.Presence(p.name), p.epoch, p.log) })
		p.log.InfoContext(ctx, "serving", "address", p.rpcListener.Addr().String())
		return nil
	})
	return group.Wait()
}

// built is what works on an open store.
type built struct {
	replica *store.Replica
	feeds   *feed.Service
	rpcs    *serve.GRPC
}

func (p *process) build(lists *store.Store) (b built, err error) {
	if b.replica, err = store.NewReplica(lists, p.mirror, store.Timing{}, p.log, p.registry); err != nil {
		return b, err
	}
	b.feeds, err = feed.New(feed.Config{
		Mirror: p.mirror, Barrier: b.replica.Barrier, Holds: b.replica.Holds, Tracker: p.tracker, Log: p.log, Metrics: p.registry,
	})
	if err != nil {
		return b, err
	}
	policies := policyapi.New(policyapi.Config{
		Store: lists, Mirror: p.mirror, Barrier: b.replica.Barrier, Tracker: p.tracker, Replica: p.name,
		Rules: p.rules, Scope: p.scope, Domains: p.callers.limit,
		Fault: func(ctx context.Context, err error) { p.log.WarnContext(ctx, "request failed", "error", err) },
	})
	b.rpcs, err = serve.NewGRPC(serve.GRPCConfig{
		Credentials: p.credentials, Callers: p.callers.rpcs, Log: p.log, Metrics: p.registry,
		MaxConnectionAge: maxConnectionAge,
		Options:          append([]grpc.ServerOption{grpc.ReadBufferSize(readBuffer), grpc.WriteBufferSize(writeBuffer)}, p.options...),
	}, func(r grpc.ServiceRegistrar) {
		policyv1.RegisterPolicyServiceServer(r, policies)
		feedv1.RegisterFeedServiceServer(r, b.feeds)
	})
	return b, err
}
