package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

// enforcedWithin is what issue 2 promises on an idle machine.
const enforcedWithin = 250 * time.Millisecond

// TestSaveIsEnforced saves lists back and forth and watches two sidecars: each must follow, and must never answer with an old
// list once it showed the save's revision. The promise of 250 ms is asserted of the median, which one hiccup of the machine
// does not move; it is two orders of magnitude above what is measured.
func TestSaveIsEnforced(t *testing.T) {
	w := newWorld(t, settings{noDovecot: true})
	ctx := within(t, time.Minute)
	second, err := w.StartSidecar(stack.SidecarConfig{Name: "second", Policy: w.policy.Address})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.AwaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	sidecars := []checkv1.CheckServiceClient{w.checks, checkClient(t, second)}
	var took []time.Duration
	for i := range 21 {
		// The client is inside every other time.
		nets, want := aliceNets, decisionv1.Verdict_VERDICT_ALLOW
		if i%2 == 0 {
			nets, want = "8.8.8.8", decisionv1.Verdict_VERDICT_DENY
		}
		begun := time.Now()
		token, err := w.save(ctx, alice, nets)
		if err != nil {
			t.Fatal(err)
		}
		for _, sidecar := range sidecars {
			err := stack.Await(ctx, func(ctx context.Context) error {
				got, err := verdict(ctx, sidecar, alice, inside)
				if err == nil && got != want {
					err = fmt.Errorf("verdict %v", got)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		took = append(took, time.Since(begun))
		for _, sidecar := range sidecars {
			if err := awaitRevision(ctx, sidecar, token); err != nil {
				t.Fatal(err)
			}
			if got, err := verdict(ctx, sidecar, alice, inside); got != want || err != nil {
				t.Fatalf("save %d is acknowledged and not enforced: %v, %v", i, got, err)
			}
		}
	}
	slices.Sort(took)
	t.Logf("from the call to both sidecars: median %v, slowest %v of %d", took[len(took)/2], took[len(took)-1], len(took))
	if median := took[len(took)/2]; median > enforcedWithin {
		t.Errorf("the median save took %v to be enforced, promised are %v", median, enforcedWithin)
	}
}

// TestSaveReachesLogins follows one mailbox through its life, at Dovecot.
func TestSaveReachesLogins(t *testing.T) {
	w := newWorld(t, settings{})
	steps := []struct {
		nets            string
		inside, outside bool
	}{
		{aliceNets, true, false},
		{"198.51.100.0/24", false, true},
		{"192.0.2.77, 198.51.100.9", true, true},
		{"8.8.8.8", false, false},
		{"", true, true},
		{aliceNets, true, false},
	}
	for i, step := range steps {
		w.enforce(t, alice, step.nets)
		for address, want := range map[string]bool{inside: step.inside, outside: step.outside} {
			if got := attempt(t, w.dovecot.LoginIMAP, from(address, alice, dovecot.Password)); got.OK != want {
				t.Errorf("step %d, %q from %s: %s", i, step.nets, address, got.Text)
			}
		}
	}
}
