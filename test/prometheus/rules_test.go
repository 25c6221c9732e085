package prometheus

import (
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestRules runs Prometheus's own checks, and the tests of the rules' timing.
func TestRules(t *testing.T) {
	needPrometheus(t)
	t.Parallel()
	for _, args := range [][]string{
		{"check", "rules", "--lint=all", "--lint-fatal", shipped(t, "rules.yaml")},
		{"check", "config", "--syntax-only", shipped(t, "prometheus.yml")},
		{"test", "rules", "testdata/timing.yaml", "testdata/day.yaml"},
	} {
		out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput()
		if err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestRunbook shows that every alert says how urgent it is and leads to its section of the README, and that there is no other
// section.
func TestRunbook(t *testing.T) {
	rules := read(t, shipped(t, "rules.yaml"))
	sections := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^### (AllowedNets\w+)$`).FindAllStringSubmatch(read(t, shipped(t, "README.md")), -1) {
		sections[m[1]] = true
	}
	for _, text := range strings.Split(rules, "- alert: ")[1:] {
		name, body, _ := strings.Cut(text, "\n")
		if !sections[name] {
			t.Errorf("%s: no section in the README", name)
		}
		delete(sections, name)
		if !regexp.MustCompile(`\{ severity: (critical|warning) \}`).MatchString(body) {
			t.Errorf("%s: no severity", name)
		}
		for _, want := range []string{"summary: ", "description: ", "runbook_url: ", "/integrations/prometheus/README.md#" + strings.ToLower(name) + "\n"} {
			if !strings.Contains(body, want) {
				t.Errorf("%s: no %q", name, want)
			}
		}
	}
	for name := range sections {
		t.Errorf("README: there is no alert %s", name)
	}
}
