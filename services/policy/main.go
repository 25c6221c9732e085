// Command allowednets-policy is the central policy service: it keeps the lists of allowed nets in etcd, answers
// PolicyService, and streams every change to the sidecars.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/feed"
	"github.com/allowednets/allowednets/services/policy/internal/policyapi"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// Exit codes: 1 it failed while running, 2 it was called wrongly.
const (
	exitFailed = 1
	exitUsage  = 2
)

// maxConnectionAge makes callers look up the service's name now and then, so that they find new replicas.
const maxConnectionAge = 30 * time.Minute

func main() {
	var cfg config
	parser := kong.Must(&cfg, kong.Name("allowednets-policy"),
		kong.Description("Keeps the lists of allowed nets and streams them to the sidecars."))
	if _, err := parser.Parse(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "allowednets-policy: %v\n", err)
		os.Exit(exitUsage)
	}
	if err := cfg.validate(); err != nil {
		fmt.Fprintf(os.Stderr, "allowednets-policy: %v\n", err)
		os.Exit(exitUsage)
	}
	log := cfg.Logger(os.Stderr)
	slog.SetDefault(log)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, cfg, log)
	stop()
	if err != nil {
		log.Error("stopped", "error", err)
		os.Exit(exitFailed)
	}
}

// run builds the process and runs it until ctx ends. What was opened is closed on every way out.
func run(ctx context.Context, cfg config, log *slog.Logger) error {
	p := process{cfg: cfg, log: log, registry: prometheus.NewRegistry(), mirror: store.NewMirror()}
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	var err error
	if p.rules, err = cfg.rules(); err != nil {
		return err
	}
	if p.credentials, err = cfg.Credentials(); err != nil {
		return err
	}
	if p.callers, err = cfg.callers(); err != nil {
		return err
	}
	if p.etcd, err = cfg.etcd(); err != nil {
		return err
	}
	if p.rpcListener, err = listen(ctx, "--listen", cfg.Listen); err != nil {
		return err
	}
	defer func() { _ = p.rpcListener.Close() }()
	adminListener, err := listen(ctx, "--admin-listen", cfg.AdminListen)
	if err != nil {
		return err
	}
	defer func() { _ = adminListener.Close() }()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serve.HTTP(ctx, adminListener, serve.Admin(p.registry, p.ready), log) })
	group.Go(func() error { return p.runWithEtcd(ctx) })
	if err := group.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// process is what the parts of a running policy service share.
type process struct {
	cfg         config
	log         *slog.Logger
	registry    *prometheus.Registry
	rules       allow.Rules
	credentials credentials.TransportCredentials
	callers     *serve.Callers
	etcd        store.Config
	rpcListener net.Listener
	mirror      *store.Mirror
}

func (p *process) ready() error {
	if _, filled := p.mirror.State(); !filled {
		return errors.New("the store was not loaded yet")
	}
	return nil
}

// runWithEtcd starts the embedded etcd, unless a cluster is configured, and runs everything that needs the store.
func (p *process) runWithEtcd(ctx context.Context) error {
	if len(p.etcd.Endpoints) > 0 {
		return p.runWithStore(ctx)
	}
	server, endpoint, err := startEtcd(ctx, p.cfg.DataDir)
	if err != nil {
		return err
	}
	defer server.Close()
	p.etcd.Endpoints = []string{endpoint}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case err := <-server.Err():
			return fmt.Errorf("embedded etcd: %w", err)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { return p.runWithStore(ctx) })
	return group.Wait()
}

func (p *process) runWithStore(ctx context.Context) error {
	lists, err := store.Open(ctx, p.etcd, p.cfg.CreateStore)
	if errors.Is(err, store.ErrNotCreated) {
		return fmt.Errorf("%w: if this is the first start, give --create-store; otherwise the volume was lost or the endpoints are wrong", err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = lists.Close() }()
	replica, err := store.NewReplica(lists, p.mirror, store.Timing{}, p.log, p.registry)
	if err != nil {
		return err
	}
	feeds, err := feed.New(feed.Config{Mirror: p.mirror, Barrier: replica.Barrier, Log: p.log, Metrics: p.registry})
	if err != nil {
		return err
	}
	policies := policyapi.New(policyapi.Config{
		Store: lists, Mirror: p.mirror, Barrier: replica.Barrier, Rules: p.rules,
		Fault: func(ctx context.Context, err error) { p.log.WarnContext(ctx, "request failed", "error", err) },
	})
	rpcs, err := serve.NewGRPC(serve.GRPCConfig{
		Credentials: p.credentials, Callers: p.callers, Log: p.log, Metrics: p.registry, MaxConnectionAge: maxConnectionAge,
	}, func(r grpc.ServiceRegistrar) {
		policyv1.RegisterPolicyServiceServer(r, policies)
		feedv1.RegisterFeedServiceServer(r, feeds)
	})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return replica.Run(ctx) })
	group.Go(func() error { return rpcs.Run(ctx, feeds.Drain, p.rpcListener) })
	group.Go(func() error {
		if _, err := p.mirror.Wait(ctx, func(store.State) bool { return true }); err != nil {
			return err
		}
		rpcs.SetReady(true)
		p.log.InfoContext(ctx, "serving", "address", p.rpcListener.Addr().String())
		return nil
	})
	return group.Wait()
}
