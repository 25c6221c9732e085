// Package e2e shows the product at work: real binaries, real etcd, Debian's Dovecot, mail clients on raw sockets.
//
// ALLOWEDNETS_E2E=required turns what this machine lacks into a failure, as in CI.
package e2e

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startWithin bounds the start of anything on a busy machine.
const startWithin = time.Minute

// needDovecot is the one place where a test is skipped.
func needDovecot(t *testing.T) {
	t.Helper()
	if err := dovecot.Missing(); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED against a real Dovecot: %v", err)
	}
}

// newStack prepares a stack that ends with the test. If the test fails, the logs stay.
func newStack(t *testing.T) *stack.Stack {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "e2e-") // t.TempDir is too long for unix sockets
	if err != nil {
		t.Fatal(err)
	}
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("stopping: %v", err)
		}
		if t.Failed() {
			t.Logf("logs are in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func startDovecot(t *testing.T, s *stack.Stack, name string, users []dovecot.User, cfg dovecot.Config) *dovecot.Server {
	t.Helper()
	d, err := dovecot.Start(within(t, startWithin), s, name, users, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("Dovecot's log:\n%s", d.LogTail())
		}
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// protocols are the doors a mail client knocks at.
func protocols(d *dovecot.Server) map[string]func(context.Context, dovecot.Attempt) (dovecot.Answer, error) {
	return map[string]func(context.Context, dovecot.Attempt) (dovecot.Answer, error){"imap": d.LoginIMAP, "pop3": d.LoginPOP3}
}
