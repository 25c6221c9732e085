package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

func TestPropagation(t *testing.T) {
	at := timestamppb.New(time.Date(2026, 11, 23, 16, 5, 9, 0, time.UTC))
	state := func(applied, sidecars int64, laggards ...*policyv1.Laggard) *policyv1.GetPropagationResponse {
		return &policyv1.GetPropagationResponse{Revision: "1-17", AppliedCount: applied, SidecarCount: sidecars, Laggards: laggards}
	}
	slow := &policyv1.Laggard{Id: "mx1", Caller: "mx1", Revision: "1-15"}
	lost := &policyv1.Laggard{Id: "mx2", Caller: "sidecar.internal", Lost: true, LostTime: at}
	everywhere := state(3, 3)
	gone := status.Error(codes.Unavailable, "connection reset")
	const entry = "Saved. alice@example.com can now be reached from these networks only.\n\n" +
		"Mailbox   alice@example.com\nAllowed   8.8.8.0/24\n          2a00:1450::/32\nSaved     2026-11-23 16:05:09 UTC by carol\nRevision  1-17\nEtag      3-aa\n"
	const laggards = "  mx2 (sidecar.internal): lost since 2026-11-23 16:05:09 UTC, has acknowledged nothing yet\n  mx1: connected, enforces revision 1-15\n"
	runTable(t, []golden{
		{
			name: "everywhere", fake: services{propagation: []any{everywhere}}, args: []string{"propagation", "1-17"},
			request: &policyv1.GetPropagationRequest{Revision: "1-17"},
			stdout:  "active on 3 of 3\n",
		},
		{
			name: "not everywhere", fake: services{propagation: []any{state(1, 3, lost, slow)}}, args: []string{"propagation"},
			request: &policyv1.GetPropagationRequest{}, code: exitUnavailable,
			stdout: "active on 1 of 3\n" + laggards,
		},
		{
			name: "more laggards than are named", fake: services{propagation: []any{state(1, 8, lost, slow)}}, args: []string{"propagation"},
			code:   exitUnavailable,
			stdout: "active on 1 of 8\n" + laggards + "  and 5 more\n",
		},
		{
			name: "nobody there is not everywhere", fake: services{propagation: []any{state(0, 0)}}, args: []string{"propagation"},
			code:   exitUnavailable,
			stdout: "active on 0 of 0\nNo sidecar is connected, so nothing enforces any list.\n",
		},
		{
			name:    "waiting, one line for each change, and for the save it began with",
			fake:    services{propagation: []any{state(1, 3, lost, slow), state(1, 3, lost, slow), gone, state(2, 3, lost), everywhere}},
			args:    []string{"propagation", "--wait"},
			request: &policyv1.GetPropagationRequest{Revision: "1-17"},
			stdout: `active on 1 of 3; waiting for mx2 (lost since 2026-11-23 16:05:09 UTC), mx1
active on 1 of 3; waiting for mx2 (lost since 2026-11-23 16:05:09 UTC), mx1; the policy service does not answer
active on 2 of 3; waiting for mx2 (lost since 2026-11-23 16:05:09 UTC)
active on 3 of 3
`,
		},
		{
			name: "waiting on a terminal, one line that is rewritten", term: terminal{outLive: true},
			fake: services{propagation: []any{state(1, 6, lost, slow), state(5, 6, slow), everywhere}}, args: []string{"propagation", "--wait=2m"},
			stdout: "\r0s  active on 1 of 6; waiting for mx2 (lost since 2026-11-23 16:05:09 UTC), mx…\x1b[K" +
				"\r0s  active on 5 of 6; waiting for mx1\x1b[K\r\x1b[Kactive on 3 of 3\n",
		},
		{
			name: "waiting too long", fake: services{propagation: []any{state(2, 3, slow)}}, args: []string{"propagation", "1-17", "--wait=2s"},
			code:   exitUnavailable,
			stdout: "active on 2 of 3; waiting for mx1\nactive on 2 of 3\n  mx1: connected, enforces revision 1-15\n",
			stderr: "allowednets: not active everywhere within 2s (--wait)\n",
		},
		{
			name: "waiting for nobody", fake: services{propagation: []any{state(0, 0)}}, args: []string{"propagation", "--wait=1s"},
			code:   exitUnavailable,
			stdout: "active on 0 of 0; waiting for a sidecar\nactive on 0 of 0\nNo sidecar is connected, so nothing enforces any list.\n",
			stderr: "allowednets: not active everywhere within 1s (--wait)\n",
		},
		{
			name: "waiting without any answer", fake: services{propagation: []any{gone}}, args: []string{"propagation", "--wait=1s"},
			code:   exitUnavailable,
			stdout: "waiting: the policy service does not answer\n",
			stderr: "allowednets: no answer within 1s (--wait)\n",
		},
		{
			name: "waiting for a server that hangs", fake: services{hang: true}, args: []string{"propagation", "--wait=15s"},
			code:   exitUnavailable,
			stdout: "waiting: the policy service does not answer\n",
			stderr: "allowednets: no answer within 15s (--wait)\n",
		},
		{
			name: "no such save", args: []string{"propagation", "9-9", "--wait"}, code: exitUsage,
			fake:   services{err: rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "revision: names no save of this store")},
			stderr: "allowednets: revision: names no save of this store\n",
		},
		{
			name: "JSON shows the end only", fake: services{propagation: []any{state(0, 1, slow), everywhere}}, args: []string{"propagation", "--wait", "--output=json"},
			stdout: `{
  "revision": "1-17",
  "sidecarCount": "3",
  "appliedCount": "3",
  "laggards": [],
  "replicaCount": "0"
}
`,
		},
		{
			name: "set and wait", fake: services{allowed: sample(), changed: true, propagation: []any{state(2, 3, slow), everywhere}},
			args:    []string{"set", "alice@example.com", "8.8.8.0/24", "--wait"},
			request: &policyv1.GetPropagationRequest{Revision: "1-17"},
			stdout:  entry + "active on 2 of 3; waiting for mx1\nactive on 3 of 3\n",
		},
		{
			name: "set and wait in vain", fake: services{allowed: sample(), changed: true, propagation: []any{state(2, 3, slow)}},
			args: []string{"set", "alice@example.com", "8.8.8.0/24", "--wait=1s"}, code: exitUnavailable,
			stdout: entry + "active on 2 of 3; waiting for mx1\nactive on 2 of 3\n  mx1: connected, enforces revision 1-15\n",
			stderr: "allowednets: saved, but not active everywhere within 1s (--wait). Look again with allowednets propagation 1-17\n",
		},
		{
			name: "set and wait for what may not be seen", args: []string{"set", "alice@example.com", "8.8.8.0/24", "--wait"}, code: exitUnavailable,
			fake:   services{allowed: sample(), changed: true, propagation: []any{status.Error(codes.PermissionDenied, "caller may not")}},
			stdout: entry,
			stderr: "allowednets: saved, but whether it is active everywhere is not known: caller may not\n",
		},
		{
			name: "clear and wait where there never was a save", fake: services{allowed: &policyv1.AllowedNets{Mailbox: "alice@example.com"}},
			args:   []string{"clear", "alice@example.com", "--wait"},
			stdout: "Nothing to change: alice@example.com had no list.\n",
		},
		{
			name: "no time to wait", args: []string{"propagation", "--wait=-1s"}, code: exitUsage,
			stderr: "allowednets: --wait: \"-1s\" is not how long to wait, such as 30s or 2m; allowednets --help shows what there is\n",
		},
	})
}

func TestWaitFromTheEnvironment(t *testing.T) {
	t.Setenv("ALLOWEDNETS_WAIT", "3s")
	fake := services{allowed: sample(), propagation: []any{&policyv1.GetPropagationResponse{}}}
	code, _, stderr := execute(t, &fake, "", "set", "alice@example.com", "8.8.8.8")
	if code != exitUnavailable || !strings.Contains(stderr, "within 3s") {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}
