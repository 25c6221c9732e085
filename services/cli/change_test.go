package main

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

func TestDeleteAndRename(t *testing.T) {
	renamed := sample()
	renamed.Mailbox = "anna@example.com"
	runTable(t, []golden{
		{
			name:    "delete",
			fake:    services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}, changed: true},
			args:    []string{"delete", "alice@example.com", "--etag=3-aa", "--actor=carol"},
			request: &policyv1.DeleteMailboxRequest{Mailbox: "alice@example.com", Etag: "3-aa", Actor: &policyv1.Actor{Id: "carol"}},
			stdout:  "Deleted. alice@example.com has no list any more; its history stays.\n",
		},
		{
			name:    "delete, dry run",
			fake:    services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}},
			args:    []string{"delete", "alice@example.com", "--dry-run"},
			request: &policyv1.DeleteMailboxRequest{Mailbox: "alice@example.com", ValidateOnly: true},
			stdout:  "alice@example.com can be deleted. Nothing was changed.\n",
		},
		{
			name:   "delete, nothing there",
			fake:   services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}},
			args:   []string{"delete", "alice@example.com"},
			stdout: "Nothing to change: alice@example.com had no list.\n",
		},
		{
			name:    "rename",
			fake:    services{allowed: renamed, changed: true},
			args:    []string{"rename", "alice@example.com", "anna@example.com", "--request-id=" + givenID},
			request: &policyv1.RenameMailboxRequest{Mailbox: "alice@example.com", NewMailbox: "anna@example.com", RequestId: givenID},
			stdout: `Renamed. alice@example.com has no list any more; it is that of anna@example.com now:

Mailbox   anna@example.com
Allowed   8.8.8.0/24
          2a00:1450::/32
Saved     2026-11-23 16:05:09 UTC by carol
Revision  1-17
Etag      3-aa
`,
		},
		{
			name:   "rename, nothing there",
			fake:   services{allowed: &policyv1.AllowedNets{Mailbox: "anna@example.com"}},
			args:   []string{"rename", "alice@example.com", "anna@example.com"},
			stdout: "Nothing to change: alice@example.com has no list.\n",
		},
		{
			name: "rename, the new name is taken",
			fake: services{err: rpcerr.New(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_TARGET_RESTRICTED, "anna@example.com has another list already")},
			args: []string{"rename", "alice@example.com", "anna@example.com"}, code: exitDenied,
			stderr: "allowednets: anna@example.com has another list already\n",
		},
		{
			name: "a request id that is used up", fake: services{allowed: sample(), superseded: true}, code: exitDenied,
			args: []string{"set", "alice@example.com", "8.8.8.0/24", "--wait", "--request-id=" + givenID},
			stdout: "NOTHING WAS DONE: this request id was carried out before, and alice@example.com was changed since; see `allowednets get`. It left this list:\n\n" +
				"Mailbox   alice@example.com\nAllowed   8.8.8.0/24\n          2a00:1450::/32\nSaved     2026-11-23 16:05:09 UTC by carol\nRevision  1-17\nEtag      3-aa\n",
		},
		{
			name: "a request id that is used up, clear", fake: services{allowed: sample(), superseded: true}, code: exitDenied,
			args:   []string{"clear", "alice@example.com", "--request-id=" + givenID},
			stdout: "NOTHING WAS DONE: this request id was carried out before, and alice@example.com was changed since; see `allowednets get`.\n",
		},
		{
			name: "somebody was quicker than our repetition", fake: services{allowed: sample(), superseded: true, firstErrs: []error{status.Error(codes.Unavailable, "connection reset")}},
			args:   []string{"delete", "alice@example.com"},
			stdout: "Deleted, but alice@example.com was changed again since; see `allowednets get`.\n",
			stderr: "allowednets: no answer: connection reset. Asking again with the same request id.\n",
		},
		{
			name: "waiting for what is not saved", args: []string{"set", "alice@example.com", "8.8.8.8", "--dry-run", "--wait"}, code: exitUsage,
			stderr: "allowednets: --wait and --validate-only contradict each other: nothing is saved that one could wait for\n",
		},
	})
}

// The same request goes out again, with the same id, and only when nobody answered.
func TestWritesAreRepeated(t *testing.T) {
	gone := status.Error(codes.Unavailable, "connection reset")
	again := "allowednets: no answer: connection reset. Asking again with the same request id.\n"
	unknown := "The change may or may not have been made. To find out, repeat the command with --request-id=<uuid>\n"
	tests := []struct {
		name   string
		errs   []error
		hang   bool
		args   []string
		calls  int
		code   int
		stdout string // how it begins
		stderr string
	}{
		{
			name: "answered the second time", errs: []error{gone}, args: []string{"set", "alice@example.com", "8.8.8.0/24"},
			calls: 2, stdout: "Saved. alice@example.com can now", stderr: again,
		},
		{
			name: "answered the third time", errs: []error{gone, gone}, args: []string{"clear", "alice@example.com"},
			calls: 3, stdout: "Cleared. alice@example.com can now", stderr: again + again,
		},
		{
			name: "never answered", errs: []error{gone, gone, gone}, args: []string{"delete", "alice@example.com"},
			calls: 3, code: exitUnavailable,
			stderr: again + again + "allowednets: no answer: connection reset\nIs the service running, and is this the right place? " +
				"--policy-address is localhost:7443, --sidecar is unix:/run/allowednets/sidecar.sock.\n" + unknown,
		},
		{
			name: "no time for a repetition", errs: []error{gone, gone}, args: []string{"--timeout=300ms", "rename", "alice@example.com", "a@b"},
			calls: 2, code: exitUnavailable,
			stderr: again + again + "allowednets: no answer: connection reset\nIs the service running, and is this the right place? " +
				"--policy-address is localhost:7443, --sidecar is unix:/run/allowednets/sidecar.sock.\n" + unknown,
		},
		{
			name: "a server that hangs", hang: true, args: []string{"set", "alice@example.com", "8.8.8.0/24"},
			calls: 1, code: exitUnavailable, stderr: "allowednets: no answer within 10s (--timeout)\n" + unknown,
		},
		{
			name: "a dry run changes nothing", errs: []error{gone, gone, gone}, args: []string{"set", "alice@example.com", "8.8.8.0/24", "--dry-run"},
			calls: 3, code: exitUnavailable,
			stderr: again + again + "allowednets: no answer: connection reset\nIs the service running, and is this the right place? " +
				"--policy-address is localhost:7443, --sidecar is unix:/run/allowednets/sidecar.sock.\n",
		},
		{
			name: "an answer is an answer", errs: []error{status.Error(codes.Internal, "a fault")}, args: []string{"set", "alice@example.com", "8.8.8.0/24"},
			calls: 1, code: exitUnavailable, stderr: "allowednets: Internal: a fault\n",
		},
		{
			name: "a read is not repeated", errs: []error{gone}, args: []string{"get", "alice@example.com"},
			calls: 1, code: exitUnavailable,
			stderr: "allowednets: no answer: connection reset\nIs the service running, and is this the right place? " +
				"--policy-address is localhost:7443, --sidecar is unix:/run/allowednets/sidecar.sock.\n",
		},
	}
	for i := range tests {
		tt := &tests[i]
		t.Run(tt.name, func(t *testing.T) {
			// Not changed: what was repeated may have been done by the first attempt.
			fake := &services{allowed: sample(), firstErrs: tt.errs, hang: tt.hang}
			code, stdout, stderr := execute(t, fake, "", tt.args...)
			if code != tt.code || !strings.HasPrefix(stdout, tt.stdout) || stderr != tt.stderr || fake.calls != tt.calls {
				t.Errorf("exit code %d, %d calls, stdout %q, stderr:\n%s", code, fake.calls, stdout, stderr)
			}
			for _, id := range fake.ids {
				if id != fake.ids[0] || id == "" {
					t.Errorf("the request ids are %q", fake.ids)
				}
			}
		})
	}
}

func TestWritesAreRepeatedQuietlyInJSON(t *testing.T) {
	fake := &services{err: status.Error(codes.Unavailable, "connection reset")}
	code, _, stderr := execute(t, fake, "", "--output=json", "clear", "alice@example.com")
	if want := "{\n  \"code\": 14,\n  \"message\": \"connection reset\",\n  \"details\": []\n}\n"; code != exitUnavailable || stderr != want || fake.calls != 3 {
		t.Errorf("exit code %d after %d calls, stderr:\n%s", code, fake.calls, stderr)
	}
}

func TestCtrlCWhileStandardInputSaysNothing(t *testing.T) {
	silence, end := io.Pipe()
	defer func() { _ = end.Close() }()
	for _, args := range [][]string{{"set", "alice@example.com", "-"}, {"import"}, {"explain", "alice@example.com", "8.8.8.8", "--draft=-"}} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan int)
		var errs bytes.Buffer
		go func() {
			done <- run(ctx, append([]string{"--insecure-plaintext"}, args...), terminal{in: silence, out: io.Discard, err: &errs}, dial)
		}()
		cancel()
		if code := <-done; code != exitUnavailable || !strings.HasPrefix(errs.String(), "allowednets: interrupted") {
			t.Errorf("%q: exit code %d: %s", args, code, &errs)
		}
	}
}
