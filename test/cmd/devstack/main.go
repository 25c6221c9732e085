// Command devstack is what `make run` starts: a policy service with its own etcd, one sidecar and the dashboard with two sample
// domains, on loopback, with development certificates, until Ctrl-C. Everything it writes is in .dev/, which may be deleted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

// permitted are the networks of the samples, and where a browser on this machine comes from.
const permitted = stack.DocumentationNets + ",127.0.0.1/32"

// readyWithin bounds the start of each part.
const readyWithin = time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// `go run` ends on SIGTERM without telling us; then nobody would stop what runs.
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "devstack:", err)
		os.Exit(1)
	}
}

// config is the command line.
type config struct {
	dir, bin string
	// The addresses of the documentation, unless others are asked for.
	policyListen, policyAdmin, sidecarHTTP, sidecarAdmin, dashboardListen, dashboardAdmin string
}

func parse(args []string, root string) (config, error) {
	var cfg config
	flags := flag.NewFlagSet("devstack", flag.ContinueOnError)
	flags.StringVar(&cfg.dir, "dir", filepath.Join(root, ".dev"), "folder of everything that is written")
	flags.StringVar(&cfg.bin, "bin", filepath.Join(root, "bin"), "folder of the binaries")
	flags.StringVar(&cfg.policyListen, "policy", "127.0.0.1:7443", "address of the policy service, RPCs")
	flags.StringVar(&cfg.policyAdmin, "policy-admin", "127.0.0.1:7490", "address of the policy service, health and metrics")
	flags.StringVar(&cfg.sidecarHTTP, "sidecar", "127.0.0.1:7480", "address of the sidecar, doors")
	flags.StringVar(&cfg.sidecarAdmin, "sidecar-admin", "127.0.0.1:7491", "address of the sidecar, health and metrics")
	flags.StringVar(&cfg.dashboardListen, "dashboard", "127.0.0.1:8080", "address of the dashboard, pages")
	flags.StringVar(&cfg.dashboardAdmin, "dashboard-admin", "127.0.0.1:7492", "address of the dashboard, health and metrics")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	var err error
	flags.VisitAll(func(f *flag.Flag) {
		address := f.Value.String()
		if !strings.HasPrefix(f.Usage, "address ") || err != nil {
			return
		}
		if taken := stack.Taken(address); taken != nil {
			err = fmt.Errorf("%s (%s) cannot be used: %w. Is another `make run` running? `ss -ltnp` shows who listens; -%s takes another", address, f.Usage, taken, f.Name)
		}
	})
	return cfg, err
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	root, err := stack.Root()
	if err != nil {
		return err
	}
	cfg, err := parse(args, root)
	if err != nil {
		return err
	}
	s, err := stack.New(cfg.dir, cfg.bin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()

	// The store is created once. If it is lost later, the policy service says so, as it would in earnest.
	created := s.Path("store-created")
	_, statErr := os.Stat(created)
	policy, err := s.StartPolicy(stack.PolicyConfig{
		Listen: cfg.policyListen, Admin: cfg.policyAdmin,
		NoCreate: !errors.Is(statErr, fs.ErrNotExist), PermitNets: permitted,
	})
	if err != nil {
		return err
	}
	if err := ready(ctx, policy.Server); err != nil {
		return err
	}
	if errors.Is(statErr, fs.ErrNotExist) {
		if err := saveSamples(ctx, s, policy.Address); err != nil {
			return err
		}
		if err := os.WriteFile(created, nil, 0o600); err != nil {
			return err
		}
	}
	sidecar, err := s.StartSidecar(stack.SidecarConfig{Policy: cfg.policyListen, HTTP: cfg.sidecarHTTP, Admin: cfg.sidecarAdmin})
	if err != nil {
		return err
	}
	if err := ready(ctx, sidecar.Server); err != nil {
		return err
	}
	directory, users, err := writeSamples(s)
	if err != nil {
		return err
	}
	dashboard, err := s.StartDashboard(stack.DashboardConfig{
		Policy: cfg.policyListen, Listen: cfg.dashboardListen, Admin: cfg.dashboardAdmin, Directory: directory, Users: users,
	})
	if err != nil {
		return err
	}
	if err := ready(ctx, dashboard.Server); err != nil {
		return err
	}
	if err := writeEnvironment(s.Path("env"), cfg.bin, s.Environment(cfg.policyListen, sidecar.Socket)); err != nil {
		return err
	}
	dir := cfg.dir
	if wd, err := os.Getwd(); err == nil {
		if short, err := filepath.Rel(wd, dir); err == nil && !strings.HasPrefix(short, "..") {
			dir = short
		}
	}
	fmt.Fprintf(out, banner, cfg.policyListen, cfg.policyAdmin, "http://"+cfg.sidecarHTTP, cfg.sidecarAdmin, dir,
		"unix:"+filepath.Join(dir, filepath.Base(sidecar.Socket)), dashboard.URL, cfg.dashboardAdmin, sampleUser, samplePassword, sampleAuditor)

	select {
	case <-ctx.Done():
		fmt.Fprintln(out, "\nStopping.")
		return nil
	case <-policy.Done():
		return fmt.Errorf("the policy service ended by itself\n%s", policy.LogTail())
	case <-dashboard.Done():
		return fmt.Errorf("the dashboard ended by itself\n%s", dashboard.LogTail())
	case <-sidecar.Done():
		return fmt.Errorf("the sidecar ended by itself\n%s", sidecar.LogTail())
	}
}

func ready(ctx context.Context, server stack.Server) error {
	within, cancel := context.WithTimeoutCause(ctx, readyWithin, fmt.Errorf("not ready within %s", readyWithin))
	defer cancel()
	if err := server.AwaitReady(within); err != nil && ctx.Err() == nil {
		return err
	}
	return nil // or asked to stop, which is seen next
}

// writeEnvironment writes what a shell reads with `. .dev/env`.
func writeEnvironment(path, bin string, variables []string) error {
	var b strings.Builder
	for _, v := range variables {
		name, value, _ := strings.Cut(v, "=")
		fmt.Fprintf(&b, "export %s=%s\n", name, quote(value))
	}
	fmt.Fprintf(&b, "export PATH=%s:\"$PATH\"\n", quote(bin))
	return os.WriteFile(path, []byte(b.String()), 0o600)
}

// quote makes a word of a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

const banner = `Allowed Nets is running.

  dashboard        %-22[7]s  log in as %[9]s with the password %[10]s,
                                            or as %[11]s, who may only look, with the same

  policy service   %-22[1]s  http://%[2]s/readyz  /metrics
  sidecar          %-22[6]s  http://%[4]s/readyz  /metrics
                   %-22[3]s  (doors: /v1/check and /dovecot)
  dashboard, admin                         http://%[8]s/readyz  /metrics
  logs and data    %[5]s/

Three lines to try, in another shell:

  . %[5]s/env
  allowednets set alice@example.org '192.0.2.0/24, 2001:db8::/32'
  allowednets check alice@example.org 9.9.9.9

Ctrl-C stops everything.
`
