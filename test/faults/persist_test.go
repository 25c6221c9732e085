package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/test/stack"
)

// TestKilledWhilePersisting kills a sidecar under saves again and again, and starts it where no policy service can be reached:
// what it enforced before it must enforce again, from its disk. The checker judges every answer, before and after.
func TestKilledWhilePersisting(t *testing.T) {
	kills := number(t, "ALLOWEDNETS_FAULTS_KILLS", 20)
	seed := seed(t)
	w := newWorld(t, settings{seed: seed, calm: true})
	defer w.report.tell(t)
	var addresses []string
	for _, p := range w.policies {
		addresses = append(addresses, p.Address)
	}
	s := w.addDurable(addresses...)
	w.sides = []*side{s}
	w.begin(settings{seed: seed, resting: 5 * time.Millisecond})
	random := rand.New(rand.NewPCG(seed, 2))
	ctx := within(t, time.Hour)
	var enforced revision.Token
	for n := range kills {
		behind := enforced
		must(t, stack.Await(within(t, healWithin), func(ctx context.Context) error { // it follows the saves
			var err error
			if enforced, err = s.enforces(ctx); err == nil && compare(enforced, behind) <= 0 {
				err = fmt.Errorf("it stays at %s", behind)
			}
			return err
		}))
		<-time.After(time.Duration(random.Int64N(int64(30 * time.Millisecond))))
		var err error
		enforced, err = s.enforces(ctx)
		must(t, err)
		s.network.Cut()
		must(t, s.kill(w), s.start(ctx, w))
		again, err := s.enforces(ctx)
		if err != nil || compare(again, enforced) < 0 {
			w.report.violated("kill %d: it enforced %s, and now %s: %v", n, enforced, again, err)
			break
		}
		if again != enforced {
			w.report.count("commits on disk that nobody had seen", 1)
		}
		w.report.count("kills while persisting", 1)
		s.network.Heal()
	}
	w.finish()
}

// addDurable starts another sidecar, with a state on disk and a network to policy services that can be cut.
func (w *world) addDurable(policies ...string) *side {
	w.t.Helper()
	ctx := within(w.t, startWithin)
	s := &side{name: "durable", node: hub, durable: true}
	var err error
	s.network, err = w.StartProxy(ctx, policies...)
	must(w.t, err)
	w.t.Cleanup(func() { _ = s.network.Close() })
	s.Sidecar, err = w.StartSidecar(stack.SidecarConfig{
		Name: s.name, Policy: s.network.Address, AdditionalArgs: []string{"--state-dir", w.Path(s.name + ".state")},
	})
	must(w.t, err)
	w.t.Cleanup(func() { _ = s.Kill() })
	w.connect(s)
	must(w.t, s.AwaitReady(ctx))
	w.guard(s.Process, true)
	return s
}

// enforces returns the state that a sidecar decides on.
func (s *side) enforces(ctx context.Context) (revision.Token, error) {
	status, err := s.status(ctx)
	if err != nil {
		return revision.Token{}, err
	}
	if !status.GetSynced() {
		return revision.Token{}, errors.New("it has no state")
	}
	return revision.Parse(status.GetRevision())
}
