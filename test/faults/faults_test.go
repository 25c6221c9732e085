// Package faults breaks what the product runs on, on purpose and at random, and holds every answer against a model.
//
// TestCampaign runs a schedule of faults that is made from a seed and printed. Unset, ALLOWEDNETS_FAULTS_DURATION gives one
// round of every fault, as in CI; `make faults DURATION=1h SEED=7` runs longer. docs/reliability.md says what is promised.
//
// Everything happens inside network and mount namespaces that vanish with the test's process, whatever becomes of it.
package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/test/stack"
)

// inside holds the folder of the run, in the process that lives in the namespaces; tools and logs are there.
const inside = "ALLOWEDNETS_FAULTS_INSIDE"

func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := newNetwork(); err != nil {
			fmt.Fprintln(os.Stderr, "making a network:", err)
			os.Exit(1) //nolint:forbidigo // a TestMain that runs no test must
		}
		goleak.VerifyTestMain(m)
		return
	}
	code, err := runInside()
	if err != nil && os.Getenv("ALLOWEDNETS_E2E") != "required" {
		fmt.Fprintln(os.Stderr, "the tests that need namespaces are SKIPPED:", err)
		goleak.VerifyTestMain(m)
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "ALLOWEDNETS_E2E=required, but:", err)
		code = 1
	}
	os.Exit(code) //nolint:forbidigo // as above
}

// runInside builds what the module cache holds but the namespaces' network does not, and runs this program again in a network
// and a mount namespace of its own; without root also in a user namespace.
func runInside() (code int, err error) {
	if _, err := exec.LookPath("ip"); err != nil {
		return 0, fmt.Errorf("no iproute2: %w", err)
	}
	dir, err := os.MkdirTemp("", "faults-")
	if err != nil {
		return 0, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) //nolint:forbidigo // this is a program's main
	defer stop()
	if err := buildTools(ctx, dir); err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	cmd := exec.CommandContext(ctx, os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	if cmd.ProcessState == nil {
		return 0, errors.Join(fmt.Errorf("namespaces: %w", err), os.RemoveAll(dir))
	}
	if !cmd.ProcessState.Success() {
		fmt.Fprintln(os.Stderr, "what the processes logged is in", dir)
		return max(1, cmd.ProcessState.ExitCode()), nil
	}
	return 0, os.RemoveAll(dir)
}

func buildTools(ctx context.Context, dir string) error {
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", filepath.Join(dir, "etcdutl"), "go.etcd.io/etcd/etcdutl/v3")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building etcdutl: %w\n%s", err, out)
	}
	return errors.Join(stack.BuildEtcd(ctx, filepath.Join(dir, "etcd")), buildShifted(ctx, dir), buildOld(ctx, dir))
}

// need skips a test where there are no namespaces; TestMain has said why.
func need(t *testing.T) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("NOT TESTED: no namespaces")
	}
}

// tool is a program that was built for the tests, or a file beside it.
func tool(name string) string { return filepath.Join(os.Getenv(inside), name) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// number is a parameter of the long form.
func number(t *testing.T, name string, unset int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return unset
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// seed makes the same schedule again.
func seed(t *testing.T) uint64 {
	t.Helper()
	return uint64(number(t, "ALLOWEDNETS_FAULTS_SEED", 7))
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
