package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/test/stack"
)

// TestUnits has systemd read the units that people copy.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED: the systemd units: %v", err)
	}
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob(filepath.Join(root, "integrations", "systemd", "allowednets-*"))
	if err != nil || len(units) != 4 {
		t.Fatalf("%d units: %v", len(units), err)
	}
	args := []string{"verify", "--man=no", "--recursive-errors=no"}
	dir := t.TempDir()
	for _, unit := range units {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		installed := strings.ReplaceAll(string(text), "/usr/bin/", filepath.Join(root, "bin")+"/")
		path := filepath.Join(dir, filepath.Base(unit))
		if err := os.WriteFile(path, []byte(installed), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, path)
	}
	out, err := exec.CommandContext(t.Context(), analyze, args...).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	} else if ok || strings.Contains(string(out), "allowednets") {
		t.Errorf("%v\n%s", exit, out)
	}
}
