package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

// TestDevstack does what the README says: start, three lines in another shell, Ctrl-C; and then once more.
func TestDevstack(t *testing.T) {
	s := newStack(t)
	program := s.Path("devstack")
	build := exec.CommandContext(within(t, 2*time.Minute), "go", "build", "-o", program, "../cmd/devstack")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var addresses []string
	args := []string{"-dir", s.Path("dev")}
	for _, flag := range []string{"-dashboard", "-dashboard-admin", "-policy", "-policy-admin", "-sidecar", "-sidecar-admin"} {
		address, err := s.FreeAddress()
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, address)
		args = append(args, flag, address)
	}
	devstack, err := s.Start("devstack", program, args, nil)
	if err != nil {
		t.Fatal(err)
	}
	running := func(t *testing.T) {
		t.Helper()
		err := devstack.AwaitReady(within(t, startWithin), func(context.Context) error {
			if log, err := devstack.Log(); err != nil || !strings.HasSuffix(log, "Ctrl-C stops everything.\n") {
				return errors.New("no banner")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	gone := func(t *testing.T) {
		t.Helper()
		err := stack.Await(within(t, 30*time.Second), func(context.Context) error {
			var errs []error
			for _, address := range addresses {
				errs = append(errs, stack.Taken(address))
			}
			return errors.Join(errs...)
		})
		if err != nil {
			t.Errorf("something still runs: %v", err)
		}
	}
	shell := func(t *testing.T, line string) string {
		t.Helper()
		cmd := exec.CommandContext(within(t, 30*time.Second), "sh", "-c", ". "+s.Path("dev/env")+"\n"+line)
		out, err := cmd.CombinedOutput()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		return string(out)
	}
	var lines []string
	t.Run("the three lines work", func(t *testing.T) {
		running(t)
		log, err := devstack.Log()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(log) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "allowednets ") {
				lines = append(lines, line)
			}
		}
		if len(lines) != 2 || !strings.Contains(log, "  . ") {
			t.Fatalf("the banner has no three lines:\n%s", log)
		}
		if out := shell(t, lines[0]); !strings.Contains(out, "Saved.") {
			t.Errorf("%s\n%s", lines[0], out)
		}
		if out := shell(t, lines[1]); !strings.Contains(out, "Allowed   no, the address lies in none") {
			t.Errorf("%s\n%s", lines[1], out)
		}
	})
	t.Run("a second one says what is wrong", func(t *testing.T) {
		code, out := runToEnd(t, program, args...)
		if code != 1 || !strings.Contains(out, addresses[0]) || !strings.Contains(out, "ss -ltnp") {
			t.Errorf("exit code %d: %s", code, out)
		}
	})
	t.Run("it stops cleanly", func(t *testing.T) {
		if err := devstack.Stop(); err != nil {
			t.Error(err)
		}
		gone(t)
	})
	t.Run("it keeps its data", func(t *testing.T) {
		if err := os.Truncate(s.Path("devstack.log"), 0); err != nil {
			t.Fatal(err)
		}
		if err := devstack.Start(); err != nil {
			t.Fatal(err)
		}
		running(t)
		if out := shell(t, lines[0]); !strings.Contains(out, "has this list already") {
			t.Errorf("%s", out)
		}
	})
	t.Run("killed, it leaves nothing behind", func(t *testing.T) {
		if err := devstack.Kill(); err != nil {
			t.Fatal(err)
		}
		gone(t)
	})
	t.Run("without binaries it says what to do", func(t *testing.T) {
		code, out := runToEnd(t, program, append(args, "-bin", filepath.Join(t.TempDir(), "bin"))...)
		if code != 1 || !strings.Contains(out, "make build") {
			t.Errorf("exit code %d: %s", code, out)
		}
	})
	t.Run("it does not start over when its data is lost", func(t *testing.T) {
		if err := os.RemoveAll(s.Path("dev/policy")); err != nil {
			t.Fatal(err)
		}
		code, out := runToEnd(t, program, args...)
		if code != 1 || !strings.Contains(out, "--create-store") {
			t.Errorf("exit code %d: %s", code, out)
		}
		gone(t)
	})
}
