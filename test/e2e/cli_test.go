package e2e

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/stack"
)

// TestCommandLine uses the tool as an administrator does, over mutual TLS.
func TestCommandLine(t *testing.T) {
	w := newWorld(t, settings{noDovecot: true})
	steps := []struct {
		name   string
		stdin  string
		args   []string
		code   int
		stdout []string // each must be in the output
		stderr []string
	}{
		{
			name: "check inside", args: []string{"check", alice, inside},
			stdout: []string{"Allowed   yes, the address lies in 192.0.2.0/24"},
		},
		{
			name: "check outside", args: []string{"check", alice, outside}, code: 1,
			stdout: []string{"Allowed   no,"},
		},
		{
			name: "check an exempt service", args: []string{"check", "--service=caldav", alice, outside},
			stdout: []string{"Allowed   yes, caldav is not restricted"},
		},
		{
			name: "check nonsense", args: []string{"check", alice, "nonsense"}, code: 2,
			stderr: []string{"nonsense"},
		},
		{
			name: "get unrestricted", args: []string{"get", bob},
			stdout: []string{"unrestricted"},
		},
		{
			name: "set", args: []string{"set", "Bob@Example.ORG", "8.8.8.0/24, 2a00:1450::/32"},
			stdout: []string{"Saved. bob@example.org", "8.8.8.0/24", "2a00:1450::/32", "by admin.allowednets.internal"},
		},
		{
			name: "set from standard input", stdin: "8.8.8.0/24\n2a00:1450::/32\n", args: []string{"set", bob, "-", "--actor=carol"},
			stdout: []string{"has this list already"},
		},
		{
			name: "set what cannot be", args: []string{"set", bob, "10.0.0.1; 8.8.8.8/24\nhost.example 9.9.9.0-9.9.9.191"}, code: 2,
			stderr: []string{
				"4 entries cannot be used", "entry 1:", `"10.0.0.1"`, "entry 2:", "instead: 8.8.8.8  or  8.8.8.0/24", "entry 3:", "entry 4:",
				"instead: 9.9.9.0/25, 9.9.9.128/26",
			},
		},
		{
			name: "set for a name that cannot be", args: []string{"set", "b\r\nob@example.org", "8.8.8.8"}, code: 2,
			stderr: []string{"allowednets: "},
		},
		{
			name: "set with an old etag", args: []string{"set", bob, "9.9.9.9", "--etag=1-1"}, code: 1,
			stderr: []string{"changed in the meantime by admin.allowednets.internal"},
		},
		{
			name: "list", args: []string{"list", "example.ORG"},
			stdout: []string{"alice@example.org ", "bob@example.org ", "2 mailboxes are restricted"},
		},
		{
			name: "clear", args: []string{"clear", bob, "--actor=carol"},
			stdout: []string{"Cleared. bob@example.org"},
		},
		{
			name: "clear again", args: []string{"clear", bob},
			stdout: []string{"had no list"},
		},
		{
			name: "list one", args: []string{"list", "example.org"},
			stdout: []string{"1 mailbox is restricted"},
		},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			code, stdout, stderr := w.cli(t, step.stdin, step.args...)
			if code != step.code {
				t.Errorf("exit code %d, want %d", code, step.code)
			}
			for _, want := range step.stdout {
				if !strings.Contains(stdout, want) {
					t.Errorf("%q is missing in the output", want)
				}
			}
			for _, want := range step.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("%q is missing in the error", want)
				}
			}
			if strings.Contains(stdout+stderr, "\r") {
				t.Error("a carriage return came back")
			}
			if t.Failed() {
				t.Logf("output:\n%serror:\n%s", stdout, stderr)
			}
		})
	}
	t.Run("JSON", func(t *testing.T) {
		code, stdout, stderr := w.cli(t, "", "--output=json", "get", alice)
		var resp policyv1.GetAllowedNetsResponse
		if err := protojson.Unmarshal([]byte(stdout), &resp); code != 0 || err != nil || len(resp.GetAllowedNets().GetNets()) != 2 {
			t.Errorf("exit code %d, %v: %s%s", code, err, stdout, stderr)
		}
	})
	t.Run("another certificate may not", func(t *testing.T) {
		env := w.Environment(w.policy.Address, w.sidecar.Socket)
		for i := range env {
			env[i] = strings.ReplaceAll(env[i], stack.AdminName, stack.SidecarName)
		}
		if code, stdout, stderr := w.cliWith(t, env, "", "get", alice); code != 1 || !strings.Contains(stderr, stack.SidecarName) {
			t.Errorf("exit code %d: %s%s", code, stdout, stderr)
		}
	})
	t.Run("another authority may not", func(t *testing.T) {
		stranger, err := stack.NewAuthority(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		files, err := stranger.Issue(stack.AdminName)
		if err != nil {
			t.Fatal(err)
		}
		files.TLSCAFile = w.Admin.TLSCAFile // it trusts the service, which does not trust it
		env := append(w.Environment(w.policy.Address, w.sidecar.Socket),
			"ALLOWEDNETS_TLS_CERT_FILE="+files.TLSCertFile, "ALLOWEDNETS_TLS_KEY_FILE="+files.TLSKeyFile)
		if code, stdout, stderr := w.cliWith(t, env, "", "get", alice); code != 3 {
			t.Errorf("exit code %d: %s%s", code, stdout, stderr)
		}
	})
	t.Run("plain text may not", func(t *testing.T) {
		env := []string{"ALLOWEDNETS_POLICY_ADDRESS=" + w.policy.Address, "ALLOWEDNETS_INSECURE_PLAINTEXT=true"}
		if code, stdout, stderr := w.cliWith(t, env, "", "get", alice); code != 3 {
			t.Errorf("exit code %d: %s%s", code, stdout, stderr)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		if err := w.policy.Stop(); err != nil {
			t.Fatal(err)
		}
		if code, stdout, stderr := w.cli(t, "", "get", alice); code != 3 || !strings.Contains(stderr, w.policy.Address) {
			t.Errorf("get: exit code %d: %s%s", code, stdout, stderr)
		}
		if code, stdout, stderr := w.cli(t, "", "check", alice, outside); code != 1 { // the sidecar does not need it
			t.Errorf("check: exit code %d: %s%s", code, stdout, stderr)
		}
		if err := w.sidecar.Stop(); err != nil {
			t.Fatal(err)
		}
		if code, stdout, stderr := w.cli(t, "", "check", alice, inside); code != 3 {
			t.Errorf("check without a sidecar: exit code %d: %s%s", code, stdout, stderr)
		}
	})
}
