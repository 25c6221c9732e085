package faults

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

const (
	// oldCommit is the last one before the protos got history, propagation and min_revision.
	oldCommit = "7a33beb"
	// old is where buildOld puts its sidecar and its policy service.
	old = "old"
)

// buildOld builds the product of oldCommit, where the history of the repository reaches back to it.
func buildOld(ctx context.Context, dir string) error {
	root, err := stack.Root()
	if err != nil {
		return err
	}
	if err := exec.CommandContext(ctx, "git", "-C", root, "cat-file", "-e", oldCommit+"^{commit}").Run(); err != nil {
		return nil //nolint:nilerr // TestOldVersion says it
	}
	source := filepath.Join(dir, old, "source")
	if err := os.MkdirAll(source, 0o700); err != nil {
		return err
	}
	unpack := exec.CommandContext(ctx, "bash", "-c", fmt.Sprintf("git -C %q archive %s | tar -x -C %q", root, oldCommit, source))
	if out, err := unpack.CombinedOutput(); err != nil {
		return fmt.Errorf("unpacking %s: %w\n%s", oldCommit, err, out)
	}
	for name, pkg := range map[string]string{"allowednets-sidecar": "./sidecar", "allowednets-policy": "./services/policy"} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, old, name), pkg)
		build.Dir = source
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s of %s: %w\n%s", name, oldCommit, err, out)
		}
	}
	return nil
}

// TestOldVersion upgrades as an operator does: an old policy service and an old sidecar beside new ones, on one store; then the
// old policy service alone with new sidecars, the new ones alone with the old sidecar, and at last everything new.
func TestOldVersion(t *testing.T) {
	need(t)
	if !exists(filepath.Join(tool(old), "allowednets-sidecar")) {
		t.Skipf("NOT TESTED against an old version: the repository's history does not reach back to %s", oldCommit)
	}
	oldSide, oldPolicy := "side1", 1 // the one without a state on disk, which it did not know
	w := newWorld(t, settings{seed: 7, resting: 5 * time.Millisecond, launch: map[string]stack.Launch{
		oldSide:   {Binary: filepath.Join(tool(old), "allowednets-sidecar")},
		"policy1": {Binary: filepath.Join(tool(old), "allowednets-policy")},
	}})
	defer w.report.tell(t)
	ctx := within(t, 5*time.Minute)
	inStep := func(what string) {
		t.Helper()
		w.pass(ctx, 50)
		if err := w.caughtUp(ctx, w.model.Newest()); err != nil {
			w.report.violated("%s: %v", what, err)
		}
		w.report.say("%s: in step", what)
	}
	inStep("old and new side by side")
	for _, i := range []int{0, 2} {
		w.guard(w.policies[i].Process, false)
		must(t, w.policies[i].Kill())
	}
	inStep("an old policy service alone")
	for _, i := range []int{0, 2} {
		must(t, w.policies[i].Restart(ctx))
		w.guard(w.policies[i].Process, true)
	}
	w.guard(w.policies[oldPolicy].Process, false)
	must(t, w.policies[oldPolicy].Kill())
	inStep("an old sidecar with new policy services")
	w.startPolicy(oldPolicy, "policy1.new", stack.Launch{})
	inStep("all policy services new")
	w.finish()
}
