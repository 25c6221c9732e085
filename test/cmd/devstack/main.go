// Command devstack is what `make run` starts: a policy service with its own etcd and one sidecar, on loopback, with
// development certificates, until Ctrl-C. Everything it writes is in .dev/, which may be deleted.
package main

import (
	"context"
	"errors"
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

// The ports of the documentation.
const (
	policyListen = "127.0.0.1:7443"
	policyAdmin  = "127.0.0.1:7490"
	sidecarHTTP  = "127.0.0.1:7480"
	sidecarAdmin = "127.0.0.1:7491"
)

// readyWithin bounds the start of each part.
const readyWithin = time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// `go run` ends on SIGTERM without telling us; then nobody would stop what runs.
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0)
	err := run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "devstack:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) (err error) {
	root, err := stack.Root()
	if err != nil {
		return err
	}
	for _, port := range []struct{ address, of string }{
		{policyListen, "policy service, RPCs"}, {policyAdmin, "policy service, health and metrics"},
		{sidecarHTTP, "sidecar, doors"}, {sidecarAdmin, "sidecar, health and metrics"},
	} {
		if err := stack.Taken(port.address); err != nil {
			return fmt.Errorf("%s (%s) cannot be used: %w. Is another `make run` running? `ss -ltnp` shows who listens", port.address, port.of, err)
		}
	}
	dir := filepath.Join(root, ".dev")
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()

	// The store is created once. If it is lost later, the policy service says so, as it would in earnest.
	created := filepath.Join(dir, "store-created")
	_, statErr := os.Stat(created)
	policy, err := s.StartPolicy(stack.PolicyConfig{
		Listen: policyListen, Admin: policyAdmin,
		NoCreate: !errors.Is(statErr, fs.ErrNotExist), PermitNets: stack.DocumentationNets,
	})
	if err != nil {
		return err
	}
	if err := ready(ctx, policy.Server); err != nil {
		return err
	}
	if err := os.WriteFile(created, nil, 0o600); err != nil {
		return err
	}
	sidecar, err := s.StartSidecar(stack.SidecarConfig{Policy: "localhost:7443", HTTP: sidecarHTTP, Admin: sidecarAdmin})
	if err != nil {
		return err
	}
	if err := ready(ctx, sidecar.Server); err != nil {
		return err
	}
	if err := writeEnvironment(s, filepath.Join(dir, "env"), filepath.Join(root, "bin"), sidecar.Socket); err != nil {
		return err
	}
	fmt.Fprint(out, banner)

	select {
	case <-ctx.Done():
		fmt.Fprintln(out, "\nStopping.")
		return nil
	case <-policy.Done():
		return fmt.Errorf("the policy service ended by itself\n%s", policy.LogTail())
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
func writeEnvironment(s *stack.Stack, path, bin, socket string) error {
	var b strings.Builder
	for _, v := range s.Environment("localhost:7443", socket) {
		name, value, _ := strings.Cut(v, "=")
		fmt.Fprintf(&b, "export %s=%s\n", name, quote(value))
	}
	fmt.Fprintf(&b, "export PATH=%s:\"$PATH\"\n", quote(bin))
	return os.WriteFile(path, []byte(b.String()), 0o600)
}

// quote makes a word of a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

const banner = `Allowed Nets is running.

  policy service   localhost:7443          http://127.0.0.1:7490/readyz  /metrics
  sidecar          unix:.dev/sidecar.sock  http://127.0.0.1:7491/readyz  /metrics
                   http://127.0.0.1:7480   (doors: /v1/check and /dovecot)
  logs and data    .dev/

Three lines to try, in another shell:

  . .dev/env
  allowednets set alice@example.org '192.0.2.0/24, 2001:db8::/32'
  allowednets check alice@example.org 9.9.9.9

Ctrl-C stops everything.
`
