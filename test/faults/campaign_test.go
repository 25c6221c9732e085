package faults

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

// TestCampaign lets faults happen by a schedule, round after round until ALLOWEDNETS_FAULTS_DURATION is over, while lists are saved
// and checked without pause. ALLOWEDNETS_FAULTS_SEED makes the same schedule again.
func TestCampaign(t *testing.T) {
	duration, err := time.ParseDuration(cmp.Or(os.Getenv("ALLOWEDNETS_FAULTS_DURATION"), "1s"))
	must(t, err)
	seed := seed(t)
	w := newWorld(t, settings{seed: seed, resting: 3 * time.Millisecond})
	defer w.report.tell(t)
	random := rand.New(rand.NewPCG(seed, 1))
	for begun, n := time.Now(), 1; time.Since(begun) < duration; n++ {
		groups := round(random, faults(w.side("side3").clock != ""))
		w.report.say("seed %d, round %d", seed, n)
		for _, g := range groups {
			w.report.say("%s", g)
			w.run(g)
			if t.Failed() || len(w.report.broken()) >= mostWrong {
				return
			}
		}
		w.report.count("rounds of all faults", 1)
	}
	w.finish()
}

// run lets the faults of a group happen, each at its time, and waits until the world has got over them.
func (w *world) run(g group) {
	w.t.Helper()
	ctx := within(w.t, 5*time.Minute)
	var running sync.WaitGroup
	for _, s := range g {
		running.Go(func() {
			if err := s.run(ctx, w); err != nil {
				w.t.Errorf("%s: %v", s, err)
			}
			w.report.count("faults", 1)
		})
	}
	running.Wait()
	healed, cancel := context.WithTimeout(ctx, healWithin)
	defer cancel()
	begun := time.Now()
	for _, p := range w.policies {
		if err := p.AwaitReady(healed); err != nil {
			w.report.violated("%v after %s: %v", time.Since(begun), g, err)
		}
	}
	if err := stack.Await(healed, func(context.Context) error {
		if newest := w.writer.acknowledged(); newest.Before(begun) {
			return errors.New("no save was acknowledged")
		}
		return nil
	}); err != nil {
		w.report.violated("after %s: %v", g, err)
	}
	if err := w.caughtUp(healed, w.model.Newest()); err != nil {
		w.report.violated("after %s: %v", g, err)
	}
}

// run lets one fault happen.
func (s step) run(ctx context.Context, w *world) error {
	wait := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	wait(s.after)
	end, err := s.fault.begin(ctx, w, s.target)
	if err != nil {
		return err
	}
	wait(s.length)
	return end(ctx)
}
