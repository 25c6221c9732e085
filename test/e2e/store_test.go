package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/test/stack"
)

// TestAnotherStore puts an empty etcd, and then another product's life, behind the address the sidecar knows: a lost volume
// or a wrong endpoint must not look like "nobody is restricted".
func TestAnotherStore(t *testing.T) {
	w := newWorld(t, settings{separateEtcd: true})
	ctx := within(t, 3*time.Minute)
	enforced := func(t *testing.T) {
		t.Helper()
		if got := attempt(t, w.dovecot.LoginIMAP, from(inside, alice, right)); !got.OK {
			t.Errorf("inside: %s", got.Text)
		}
		if got := attempt(t, w.dovecot.LoginIMAP, from(outside, alice, right)); got.OK || got.Text != denial("imap", notAllowed(outside)) {
			t.Errorf("outside: %s", got.Text)
		}
	}

	t.Run("empty, while the policy service runs", func(t *testing.T) {
		if err := w.etcd.Stop(); err != nil {
			t.Fatal(err)
		}
		empty, err := w.StartEtcd(ctx, "empty", w.etcd.Address)
		if err != nil {
			t.Fatal(err)
		}
		err = stack.Await(ctx, func(ctx context.Context) error {
			_, err := w.save(ctx, alice, "198.51.100.0/24")
			if err == nil || status.Code(err) != codes.Unavailable {
				return nil // it has talked to the empty one
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.save(ctx, alice, "198.51.100.0/24")
		t.Logf("a save says: %v", err)
		if err == nil {
			t.Error("saved into the empty store")
		}
		enforced(t)
		if err := errors.Join(empty.Stop(), w.etcd.Start()); err != nil {
			t.Fatal(err)
		}
		if err := w.policy.AwaitReady(ctx); err != nil {
			t.Fatal(err)
		}
	})

	if err := w.policy.Stop(); err != nil {
		t.Fatal(err)
	}
	other, err := w.StartEtcd(ctx, "other", "")
	if err != nil {
		t.Fatal(err)
	}
	behindSameAddress := stack.PolicyConfig{
		Listen: w.policy.Address, Admin: w.policy.Admin, Etcd: other.Endpoint, PermitNets: stack.DocumentationNets,
	}

	t.Run("empty", func(t *testing.T) {
		cfg := behindSameAddress
		cfg.Name, cfg.NoCreate = "policy-empty", true
		policy, err := w.StartPolicy(cfg)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-policy.Done():
		case <-ctx.Done():
			t.Fatal("the policy service runs on an empty store")
		}
		if err := policy.Stop(); err == nil {
			t.Error("the policy service ended without an error")
		}
		if log, err := policy.Log(); err != nil || !strings.Contains(log, "--create-store") {
			t.Errorf("the log does not say what to do: %v\n%s", err, log)
		}
		enforced(t)
	})

	t.Run("foreign", func(t *testing.T) {
		cfg := behindSameAddress
		cfg.Name = "policy-foreign"
		policy, err := w.StartPolicy(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := policy.AwaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		err = stack.Await(ctx, func(ctx context.Context) error {
			status, err := w.checks.GetStatus(ctx, &checkv1.GetStatusRequest{})
			if err == nil && !status.GetForeignStore() {
				err = errors.New("the sidecar has not seen it")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		// Not even what is saved there counts.
		if _, err := w.save(ctx, alice, "198.51.100.0/24"); err != nil {
			t.Fatal(err)
		}
		enforced(t)
		if err := policy.Stop(); err != nil {
			t.Error(err)
		}
	})

	t.Run("the right one again", func(t *testing.T) {
		if err := w.policy.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		enforced(t)
		w.enforceWithin(t, time.Minute, alice, "198.51.100.0/24") // the sidecar's retries have become slow
		if got, err := verdict(ctx, w.checks, alice, inside); got != decisionv1.Verdict_VERDICT_DENY || err != nil {
			t.Errorf("inside: %v, %v", got, err)
		}
		if status, err := w.checks.GetStatus(ctx, &checkv1.GetStatusRequest{}); err != nil || status.GetForeignStore() {
			t.Errorf("status %v, %v", status, err)
		}
	})
}

// TestLostVolume empties the folder of the embedded etcd: the policy service must not start over.
func TestLostVolume(t *testing.T) {
	s := newStack(t)
	policy, err := s.StartPolicy(stack.PolicyConfig{NoCreate: true})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-policy.Done():
	case <-time.After(startWithin):
		t.Fatal("the policy service runs without a store")
	}
	if err := policy.Stop(); err == nil || !strings.Contains(fmt.Sprint(err), "--create-store") {
		t.Errorf("it ended with: %v", err)
	}
}
