// Command allowednets-dashboard is where the administrators of domains say from which networks their mailboxes may be
// reached. It is a client of the policy service like any other.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var code int
	if len(os.Args) > 1 && os.Args[1] == "hash-password" {
		code = hashPassword(os.Args[2:], os.Stdin, os.Stdout, os.Stderr)
	} else {
		code = run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	stop()
	os.Exit(code)
}

// run is the process. It returns the exit code: 0 after ctx ended, 1 if something broke, 2 if the command line cannot work.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := serve.Command{
		Name: "allowednets-dashboard", Admin: ":7492", Vars: kong.Vars{"callback": login.CallbackPath}, Stdout: stdout, Stderr: stderr,
		Description: "Shows the administrators of domains their mailboxes and lets them edit the allowed nets. 'allowednets-dashboard hash-password' makes a hash for the file of users.",
	}
	var f flags
	var cfg config
	if code, done := command.Parse(ctx, args, &f, func() (err error) { cfg, err = f.resolve(); return err }); done {
		return code
	}
	log := cfg.Logger(stderr)
	p, err := build(ctx, cfg, log)
	if err != nil {
		fmt.Fprintf(stderr, "allowednets-dashboard: %v\n", err)
		return 1
	}
	defer p.close()
	if err := p.run(ctx); err != nil {
		log.Error("the dashboard stops", "error", err)
		return 1
	}
	log.Info("the dashboard stopped")
	return 0
}

// domains is a directory in one of its forms.
type domains interface {
	Domains(ctx context.Context, may func(domain string) bool) ([]directory.Domain, error)
	Mailboxes(ctx context.Context, domain string, q directory.Query) (directory.Page, error)
	Has(ctx context.Context, m allow.Mailbox) (bool, error)
}

// process is a dashboard that is built but does not run.
type process struct {
	cfg       config
	log       *slog.Logger
	registry  *prometheus.Registry
	login     *login.Login
	directory domains
	conn      *grpc.ClientConn // to the policy service
	handler   http.Handler
	files     *livefile.Watcher
	closers   []func()

	listener, admin net.Listener // admin is nil if switched off
}

// build opens the listeners, then builds the rest. If it fails, what was opened is closed.
func build(ctx context.Context, cfg config, log *slog.Logger) (_ *process, err error) {
	p := &process{cfg: cfg, log: log, registry: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), cfg.TLSCollector())
	if p.listener, err = listen(ctx, "--listen", cfg.Listen); err != nil {
		return nil, err
	}
	if cfg.AdminListen != "" {
		if p.admin, err = listen(ctx, "--admin-listen", cfg.AdminListen); err != nil {
			return nil, err
		}
	}
	if p.files, err = livefile.NewWatcher(log, p.registry); err != nil {
		return nil, err
	}
	if p.directory, err = p.openDirectory(ctx); err != nil {
		return nil, err
	}
	p.login, err = login.New(login.Config{
		Files: p.files, UsersFile: cfg.Users, OIDC: cfg.oidc, Idle: cfg.SessionIdle, Lifetime: cfg.SessionLifetime, Secure: !cfg.InsecureHTTP,
		TrustedProxies: cfg.trustedProxies, Log: log, Metrics: p.registry,
	})
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.login.Close)
	p.conn, err = grpc.NewClient(cfg.PolicyAddress, grpc.WithTransportCredentials(cfg.credentials), grpc.WithUserAgent("allowednets-dashboard"),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`), grpc.WithDisableServiceConfig(), grpc.WithNoProxy(),
		grpc.WithConnectParams(reconnect()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("--policy-address: %w", err)
	}
	p.handler, err = p.pages()
	return p, err
}

// reconnect is quicker than the default of up to two minutes, so that a person who tries again finds a service that came back.
func reconnect() grpc.ConnectParams {
	return grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
		MinConnectTimeout: 5 * time.Second,
	}
}

// maxMessage bounds an answer of the policy service: a page of 1000 lists with the most entries is below it.
const maxMessage = 256 << 20

// openDirectory opens the directory in the form that was chosen.
func (p *process) openDirectory(ctx context.Context) (domains, error) {
	if p.cfg.Directory != "" {
		d, err := directory.OpenFile(p.files, p.cfg.Directory)
		if err != nil {
			return nil, fmt.Errorf("--directory: %w", err)
		}
		return d, nil
	}
	d, err := directory.OpenSQL(ctx, p.cfg.DirectorySQL, p.log, p.registry)
	if err != nil {
		return nil, fmt.Errorf("--directory-sql: %w", err)
	}
	p.closers = append(p.closers, d.Close)
	return d, nil
}

// close closes what build opened. It may be called again.
func (p *process) close() {
	for _, lis := range []net.Listener{p.listener, p.admin} {
		if lis != nil {
			_ = lis.Close()
		}
	}
	for _, closer := range p.closers {
		closer()
	}
	if p.conn != nil {
		_ = p.conn.Close()
	}
}

// run serves until ctx ends.
func (p *process) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.files.Run(ctx) })
	group.Go(func() error { return serve.HTTP(ctx, p.listener, p.handler, p.log) })
	if p.admin != nil {
		group.Go(func() error { return serve.HTTP(ctx, p.admin, serve.Admin(p.registry, ctx.Err), p.log) })
	}
	admin := ""
	if p.admin != nil {
		admin = p.admin.Addr().String()
	}
	p.log.Info("the dashboard started", "version", serve.Version(), "address", p.listener.Addr().String(), "admin_address", admin, "policy_address", p.cfg.PolicyAddress)
	return group.Wait()
}

// listen opens a TCP listener and names the flag if it cannot.
func listen(ctx context.Context, flag, address string) (net.Listener, error) {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return lis, nil
}
