package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/stack"
)

// TestIntegration runs the example of docs/integrate-your-dashboard.md with the certificate of a dashboard.
func TestIntegration(t *testing.T) {
	w := newWorld(t, settings{noDovecot: true})
	program := w.Path("setnets")
	if out, err := exec.CommandContext(within(t, 2*time.Minute), "go", "build", "-o", program, "../example/setnets").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tls := func(name string) string { return w.Path("tls/" + name) }
	for _, c := range []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"saved", []string{bob, inside}, 0, []string{"Saved.\n", "Active on 1 of 1 servers.\n"}},
		{"saved again", []string{bob, inside + ", " + outside}, 0, []string{"Saved.\n", "Active on 1 of 1 servers.\n"}},
		{"bad entries", []string{bob, "203.0.113.7/24, 10.0.0.1"}, 1, []string{
			"NETS_INVALID", "entry 1, NET_REFUSAL_HOST_BITS_SET", "[use 203.0.113.7]", "[use 203.0.113.0/24]", "entry 2, NET_REFUSAL_PRIVATE",
		}},
		{"saved by somebody else", []string{"-etag", "1-1", bob, "192.0.2.1"}, 1, []string{"ETAG_MISMATCH", "Somebody else", "anna@example.org"}},
		{"empty", []string{bob, ""}, 1, []string{"NETS_EMPTY"}},
		{"no mailbox", []string{"bob", inside}, 1, []string{"MAILBOX_INVALID"}},
		{"another server", []string{"-policy", "localhost:1", bob, inside}, 1, []string{"cannot be reached"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{
				"-policy", w.policy.Address, "-cert", tls(stack.DashboardName + ".pem"), "-key", tls(stack.DashboardName + "-key.pem"),
				"-ca", tls("ca.pem"), "-person", "anna@example.org", "-from", inside,
			}, c.args...)
			out, err := exec.CommandContext(within(t, 30*time.Second), program, args...).CombinedOutput()
			if code := exitCode(err); code != c.code {
				t.Errorf("exit code %d (%v): %s", code, err, out)
			}
			for _, want := range c.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in %s", want, out)
				}
			}
		})
	}
	s := site{world: w}
	s.mustHave(t, bob, inside+", "+outside, "anna@example.org")
}

func exitCode(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return 0
}
