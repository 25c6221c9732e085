// Command allowednets-sidecar decides, beside a mail server, which client may reach which mailbox.
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
	"runtime"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/lastgood"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
	"github.com/allowednets/allowednets/sidecar/internal/session"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the process. It returns the exit code: 0 after ctx ended, 1 if something broke, 2 if the command line cannot work.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := serve.Command{
		Name: "allowednets-sidecar", Admin: ":7491", Vars: kong.Vars{"denial_text": check.DefaultDenialText}, Stdout: stdout, Stderr: stderr,
		Description: "Decides, beside a mail server, which client may reach which mailbox.",
	}
	var f flags
	var cfg config
	if code, done := command.Parse(ctx, args, &f, func() (err error) { cfg, err = f.resolve(); return err }); done {
		return code
	}
	log := cfg.Logger(stderr)
	p, err := build(ctx, cfg, log)
	if err != nil {
		fmt.Fprintf(stderr, "allowednets-sidecar: %v\n", err)
		return 1
	}
	if err := p.run(ctx); err != nil {
		log.Error("the sidecar stops", "error", err)
		return 1
	}
	log.Info("the sidecar stopped")
	return 0
}

// process is a sidecar that is built but does not run.
type process struct {
	cfg      config
	log      *slog.Logger
	registry *prometheus.Registry
	state    *lastgood.Dir // nil without --state-dir
	mirror   *mirror.Mirror
	grpc     *serve.GRPC
	checks   *check.GRPC
	sessions *session.Sweeper // nil without --doveadm-url
	web      *check.HTTP      // for everybody on this machine
	local    *check.HTTP      // for those who may open the socket

	// Nil if switched off.
	socket, loopback, http, admin net.Listener
}

// build opens the listeners, then builds the rest. If it fails, what was opened is closed.
func build(ctx context.Context, cfg config, log *slog.Logger) (_ *process, err error) {
	p := &process{cfg: cfg, log: log, registry: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := p.listen(ctx); err != nil {
		return nil, err
	}
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), cfg.TLSCollector())
	feed := mirror.Config{
		ID: cfg.ID, Version: serve.Version(), AcceptCluster: cfg.acceptCluster,
		Dial: mirror.Dialer(cfg.PolicyAddress, cfg.credentials), Log: log, Metrics: p.registry,
	}
	if cfg.StateDir != "" {
		if p.state, err = lastgood.Open(lastgood.Config{Path: cfg.StateDir, Log: log, Metrics: p.registry}); err != nil {
			return nil, fmt.Errorf("--state-dir: %w", err)
		}
		feed.Keeper = p.state
		feed.Loaded, feed.Writer = p.state.Loaded()
	}
	if p.mirror, err = mirror.New(feed); err != nil {
		return nil, err
	}
	decider, err := check.NewDecider(check.DeciderConfig{
		State: p.mirror.State, Changed: p.mirror.Changed, Scope: cfg.scope, DefaultDomain: cfg.defaultDomain, DenyAfter: cfg.DenyAfter, Log: log, Metrics: p.registry,
	})
	if err != nil {
		return nil, err
	}
	faults, err := check.NewFaults(log, p.registry)
	if err != nil {
		return nil, err
	}
	if cfg.doveadm != nil {
		p.sessions, err = session.New(session.Config{
			Doveadm: cfg.doveadm, Decider: decider, State: p.mirror.State, Changed: p.mirror.Changed, Spared: cfg.trustedProxies, Log: log, Metrics: p.registry,
		})
		if err != nil {
			return nil, err
		}
	}
	p.checks = check.NewGRPC(decider, faults, p.status)
	p.grpc, err = serve.NewGRPC(serve.GRPCConfig{
		Credentials: insecure.NewCredentials(), // the listeners are a unix socket and loopback
		Local:       true,
		Log:         log, Metrics: p.registry,
		Workers: uint32(4 * runtime.GOMAXPROCS(0)),
	}, func(r grpc.ServiceRegistrar) {
		checkv1.RegisterCheckServiceServer(r, p.checks)
		authv3.RegisterAuthorizationServer(r, check.NewEnvoy(check.EnvoyConfig{
			Decider: decider, Faults: faults, MailboxFrom: cfg.mailboxFrom, DenialText: cfg.DenialText, TrustedProxies: cfg.trustedProxies,
		}))
	})
	if err != nil {
		return nil, err
	}
	web := check.HTTPConfig{
		Decider: decider, Faults: faults, DenialText: cfg.DenialText, TrustedProxies: cfg.trustedProxies,
		NginxBackends: cfg.nginxBackends,
	}
	p.local = check.NewHTTP(web)
	web.Token = cfg.token
	p.web = check.NewHTTP(web)
	return p, nil
}

// listen takes the listeners that were passed, and opens the others.
func (p *process) listen(ctx context.Context) error {
	passed, err := adopt(activation.Files(true))
	if err != nil {
		return err
	}
	p.socket, p.loopback, p.http, p.admin = passed[nameSocket], passed[nameGRPC], passed[nameHTTP], passed[nameAdmin]
	if p.socket == nil && p.cfg.Socket != "" {
		if p.socket, err = listenUnix(ctx, p.cfg.Socket); err != nil {
			return fmt.Errorf("--socket: %w", err)
		}
	}
	for _, l := range []struct {
		flag, address string
		to            *net.Listener
	}{
		{"--grpc-listen", p.cfg.GRPCListen, &p.loopback},
		{"--http-listen", p.cfg.HTTPListen, &p.http},
		{"--admin-listen", p.cfg.AdminListen, &p.admin},
	} {
		if *l.to != nil || l.address == "" {
			continue
		}
		if *l.to, err = new(net.ListenConfig).Listen(ctx, "tcp", l.address); err != nil {
			return fmt.Errorf("%s: %w", l.flag, err)
		}
	}
	return nil
}

func (p *process) close() {
	for _, lis := range []net.Listener{p.socket, p.loopback, p.http, p.admin} {
		if lis != nil {
			_ = lis.Close()
		}
	}
	if p.state != nil {
		p.state.Close()
	}
}

// run serves until ctx ends.
func (p *process) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.mirror.Run(ctx) })
	if p.state != nil {
		group.Go(func() error { return p.state.Run(ctx) })
	}
	if p.sessions != nil {
		group.Go(func() error { return p.sessions.Run(ctx) })
	}
	group.Go(func() error {
		select {
		case <-p.mirror.Synced():
			p.grpc.SetReady(true)
		case <-ctx.Done():
		}
		return nil
	})
	var listeners []net.Listener
	if p.socket != nil {
		s := newSplitter(p.socket)
		listeners = append(listeners, s.http2)
		group.Go(func() error { return s.run(ctx) })
		group.Go(func() error { return serve.HTTP(ctx, s.http1, p.local, p.log) })
	}
	if p.loopback != nil {
		listeners = append(listeners, p.loopback)
	}
	group.Go(func() error { return p.grpc.Run(ctx, p.checks.Drain, listeners...) })
	if p.http != nil {
		group.Go(func() error { return serve.HTTP(ctx, p.http, p.web, p.log) })
	}
	if p.admin != nil {
		group.Go(func() error {
			return serve.HTTP(ctx, p.admin, serve.Admin(p.registry, func() error { return p.ready(ctx) }), p.log)
		})
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		p.log.Warn("the service manager cannot be told that the sidecar started", "error", err)
	}
	p.log.Info("the sidecar started", "version", serve.Version(), "id", p.cfg.ID, "policy_address", p.cfg.PolicyAddress)
	return group.Wait()
}

// ready returns why no mail server should rely on this sidecar. The age of the data is no such reason: a control plane that
// is down must not take mail down.
func (p *process) ready(ctx context.Context) error {
	if ctx.Err() != nil {
		return errors.New("the sidecar stops")
	}
	if p.mirror.State() == nil {
		return check.ErrNotSynced
	}
	return nil
}

// status answers GetStatus.
func (p *process) status() *checkv1.GetStatusResponse {
	st := p.mirror.State()
	resp := &checkv1.GetStatusResponse{
		Id: p.cfg.ID, Version: serve.Version(), Synced: st != nil, Connected: p.mirror.Connected(), ForeignStore: p.mirror.ForeignStore(),
	}
	if st != nil {
		resp.Revision, resp.RestrictedMailboxes = st.Revision, st.Index.Count()
	}
	if age, ok := st.Age(time.Now()); ok {
		resp.DataAge = durationpb.New(age)
	}
	return resp
}
