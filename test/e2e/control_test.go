package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/stack"
)

// metric returns the value of one metric, with its labels as /metrics writes them; 0 if it is not there.
func metric(t *testing.T, admin, name string) float64 {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(metrics(t, admin)))
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			v, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatalf("%s: %v", lines.Text(), err)
			}
			return v
		}
	}
	return 0
}

// awaitMetric waits until a metric is at least v.
func awaitMetric(t *testing.T, admin, name string, v float64) {
	t.Helper()
	err := stack.Await(within(t, startWithin), func(context.Context) error {
		if got := metric(t, admin, name); got < v {
			return fmt.Errorf("%s is %v at %s, not yet %v", name, got, admin, v)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

const (
	streamsResumed   = `allowednets_policy_feed_streams_total{start="resume"}`
	streamsFromZero  = `allowednets_policy_feed_streams_total{start="snapshot"}`
	entriesSent      = "allowednets_policy_feed_entries_total"
	entriesReceived  = "allowednets_sidecar_feed_entries_total"
	foreignStore     = "allowednets_sidecar_foreign_store"
	historyWentBack  = `allowednets_sidecar_resyncs_total{cause="history_went_back"}`
	stateLoaded      = `allowednets_sidecar_state_load{result="loaded"}`
	sidecarConnected = "allowednets_sidecar_connected"
)

// decisions asks everything there is to ask, on a new connection.
func decisions(t *testing.T, sidecar *stack.Sidecar) map[string]*decisionv1.Decision {
	t.Helper()
	client, conn, err := sidecar.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	all := make(map[string]*decisionv1.Decision)
	for _, mailbox := range []string{alice, bob} {
		for _, address := range []string{inside, inside6, outside, outside6, ""} {
			resp, err := client.Check(within(t, 5*time.Second), &checkv1.CheckRequest{
				Mailbox: mailbox, ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP,
			})
			if err != nil {
				t.Fatalf("%s from %q: %v", mailbox, address, err)
			}
			all[mailbox+" from "+address] = resp.GetDecision()
		}
	}
	return all
}

// same says what is decided otherwise than before.
func same(t *testing.T, when string, before, now map[string]*decisionv1.Decision) {
	t.Helper()
	for question, want := range before {
		if !proto.Equal(now[question], want) {
			t.Errorf("%s: %s: %v, before it was %v", when, question, now[question], want)
		}
	}
}

// otherNets swaps who is inside.
const otherNets = "198.51.100.0/24, 2001:db8:b::/48"

// enforces checks that alice's list is what it should be.
func enforces(t *testing.T, when string, sidecar *stack.Sidecar, nets string) {
	t.Helper()
	now := decisions(t, sidecar)
	for _, address := range []string{inside, inside6, outside, outside6} {
		want := decisionv1.Verdict_VERDICT_DENY
		if (nets == aliceNets) == (address == inside || address == inside6) {
			want = decisionv1.Verdict_VERDICT_ALLOW
		}
		if got := now[alice+" from "+address]; got.GetVerdict() != want {
			t.Errorf("%s: alice from %s: %v, want %v", when, address, got, want)
		}
	}
}

func newWorldOnDisk(t *testing.T) (w *world, stateDir string) {
	t.Helper()
	stateDir = t.TempDir()
	return newWorld(t, settings{separateEtcd: true, noDovecot: true, sidecarArgs: []string{"--state-dir", stateDir}}), stateDir
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// killAndRestart is what a power failure does to the sidecar.
func (w *world) killAndRestart(t *testing.T) {
	t.Helper()
	must(t, w.sidecar.Kill())
	must(t, w.sidecar.Restart(within(t, startWithin)))
	w.checks = checkClient(t, w.sidecar)
}

// TestLastKnownGood takes the policy service and etcd away, and kills the sidecar in that state.
func TestLastKnownGood(t *testing.T) {
	w, _ := newWorldOnDisk(t)
	before := decisions(t, w.sidecar)
	enforces(t, "before", w.sidecar, aliceNets)

	must(t, w.policy.Kill(), w.etcd.Kill())
	same(t, "policy service and etcd gone", before, decisions(t, w.sidecar))
	for range 2 {
		w.killAndRestart(t)
		same(t, "restarted from disk", before, decisions(t, w.sidecar))
		if metric(t, w.sidecar.Admin, stateLoaded) != 1 {
			t.Error("the metric does not say that the state was loaded")
		}
		if st, err := w.checks.GetStatus(t.Context(), &checkv1.GetStatusRequest{}); err != nil || !st.GetSynced() || st.GetConnected() || st.DataAge != nil {
			t.Errorf("status %v, %v; nobody knows how old the data is", st, err)
		}
	}

	must(t, w.etcd.Start(), w.policy.Restart(within(t, startWithin)))
	awaitMetric(t, w.sidecar.Admin, sidecarConnected, 1)
	same(t, "all back", before, decisions(t, w.sidecar))
	w.enforceWithin(t, startWithin, alice, otherNets)
	enforces(t, "healed", w.sidecar, otherNets)
	if resumed, fromZero := metric(t, w.policy.Admin, streamsResumed), metric(t, w.policy.Admin, streamsFromZero); resumed < 1 || fromZero != 0 {
		t.Errorf("%v streams resumed, %v began from zero; the state on disk was not used", resumed, fromZero)
	}
	// A batch without entries or with what was just saved; not the 2 mailboxes that were there.
	if n := metric(t, w.sidecar.Admin, entriesReceived); n != 1 {
		t.Errorf("%v records came after the restart, want the one that was saved", n)
	}
}

// TestChangeWhileSidecarIsDown shows that only the missing record is sent.
func TestChangeWhileSidecarIsDown(t *testing.T) {
	w, _ := newWorldOnDisk(t)
	for i := range 20 {
		w.enforce(t, fmt.Sprintf("user%d@example.org", i), "192.0.2.0/24")
	}
	must(t, w.sidecar.Kill())
	sent, resumed, fromZero := metric(t, w.policy.Admin, entriesSent), metric(t, w.policy.Admin, streamsResumed), metric(t, w.policy.Admin, streamsFromZero)
	if fromZero != 1 {
		t.Errorf("%v streams began from zero, want the sidecar's first", fromZero)
	}
	token, err := w.save(t.Context(), alice, otherNets)
	must(t, err)
	must(t, w.sidecar.Restart(within(t, startWithin)))
	w.checks = checkClient(t, w.sidecar)
	must(t, awaitRevision(within(t, startWithin), w.checks, token))
	enforces(t, "after the restart", w.sidecar, otherNets)
	if n := metric(t, w.policy.Admin, entriesSent) - sent; n != 1 {
		t.Errorf("%v records were sent, want 1", n)
	}
	if n := metric(t, w.policy.Admin, streamsResumed) - resumed; n != 1 {
		t.Errorf("%v streams resumed, want 1", n)
	}
	if n := metric(t, w.policy.Admin, streamsFromZero) - fromZero; n != 0 {
		t.Errorf("%v streams began from zero", n)
	}
}

// TestAnotherStoreAndADisk is TestAnotherStore for a sidecar that has its state on disk, and moves on.
func TestAnotherStoreAndADisk(t *testing.T) {
	w, stateDir := newWorldOnDisk(t)
	ctx := within(t, 3*time.Minute)
	before := decisions(t, w.sidecar)
	must(t, w.policy.Stop())
	other, err := w.StartEtcd(ctx, "other", "")
	must(t, err)
	foreign, err := w.StartPolicy(stack.PolicyConfig{
		Name: "foreign", Listen: w.policy.Address, Admin: w.policy.Admin, Etcd: other.Endpoint, PermitNets: stack.DocumentationNets,
	})
	must(t, err)
	must(t, foreign.AwaitReady(ctx))
	_, err = w.save(ctx, alice, otherNets)
	must(t, err)

	awaitMetric(t, w.sidecar.Admin, foreignStore, 1)
	same(t, "another store", before, decisions(t, w.sidecar))
	w.killAndRestart(t)
	awaitMetric(t, w.sidecar.Admin, foreignStore, 1)
	same(t, "another store, from disk", before, decisions(t, w.sidecar))
	if n := metric(t, w.sidecar.Admin, entriesReceived); n != 0 {
		t.Errorf("%v records of the other store were taken", n)
	}

	log, err := w.sidecar.Log()
	must(t, err)
	hint := regexp.MustCompile(`--accept-cluster=[0-9a-f]+`).FindString(log)
	if hint == "" {
		t.Fatalf("the log does not say what to do:\n%s", log)
	}
	must(t, w.sidecar.Stop())
	restart := stack.SidecarConfig{Name: "accepting", Policy: w.policy.Address, AdditionalArgs: []string{"--state-dir", stateDir, hint}}
	w.sidecar, err = w.StartSidecar(restart)
	must(t, err)
	must(t, w.sidecar.AwaitReady(ctx))
	w.checks = checkClient(t, w.sidecar)
	w.enforceWithin(t, startWithin, bob, "192.0.2.0/24")
	enforces(t, "accepted", w.sidecar, otherNets)
	if v := metric(t, w.sidecar.Admin, foreignStore); v != 0 {
		t.Errorf("foreign_store is %v", v)
	}
	moved := decisions(t, w.sidecar)

	// The flag was needed once.
	must(t, w.sidecar.Stop(), foreign.Stop())
	restart.Name, restart.AdditionalArgs = "moved", restart.AdditionalArgs[:2]
	w.sidecar, err = w.StartSidecar(restart)
	must(t, err)
	must(t, w.sidecar.AwaitReady(ctx))
	same(t, "moved on, from disk", moved, decisions(t, w.sidecar))
	must(t, foreign.Restart(ctx))
	awaitMetric(t, w.sidecar.Admin, sidecarConnected, 1)
	if v := metric(t, w.sidecar.Admin, foreignStore); v != 0 {
		t.Errorf("foreign_store is %v", v)
	}
}

// TestRestoredBackup restores a cold backup of etcd that lacks a save the sidecar enforces.
func TestRestoredBackup(t *testing.T) {
	w, _ := newWorldOnDisk(t)
	ctx := within(t, 3*time.Minute)
	backup := t.TempDir()
	must(t, w.etcd.Stop())
	must(t, os.CopyFS(backup, os.DirFS(w.Path("etcd"))))
	must(t, w.etcd.Start())
	w.enforceEventually(t, alice, otherNets)
	w.enforceWithin(t, startWithin, bob, "192.0.2.0/24")
	newest := decisions(t, w.sidecar)

	must(t, w.policy.Stop(), w.etcd.Stop())
	must(t, os.RemoveAll(w.Path("etcd")))
	must(t, os.CopyFS(w.Path("etcd"), os.DirFS(backup)))
	must(t, os.Chmod(w.Path("etcd"), 0o700))
	must(t, w.etcd.Start(), w.policy.Restart(ctx))
	if nets := w.listOf(t, alice); nets != aliceNets {
		t.Fatalf("the backup says %q; the restore did not work", nets)
	}
	received := metric(t, w.sidecar.Admin, entriesReceived)
	awaitMetric(t, w.sidecar.Admin, historyWentBack, 1)
	same(t, "restored without a raised epoch", newest, decisions(t, w.sidecar))
	if log, err := w.sidecar.Log(); err != nil || !strings.Contains(log, "history_went_back") {
		t.Errorf("the log does not say so: %v\n%s", err, log)
	}
	if n := metric(t, w.sidecar.Admin, entriesReceived); n != received {
		t.Errorf("%v records came", n-received)
	}
	w.killAndRestart(t)
	awaitMetric(t, w.sidecar.Admin, historyWentBack, 1)
	same(t, "restored without a raised epoch, from disk", newest, decisions(t, w.sidecar))
	if n := metric(t, w.sidecar.Admin, entriesReceived); n != 0 {
		t.Errorf("%v records came", n)
	}

	must(t, w.policy.Stop())
	raised, err := w.StartPolicy(stack.PolicyConfig{
		Name: "raised", Listen: w.policy.Address, Admin: w.policy.Admin, Etcd: w.etcd.Endpoint, NoCreate: true,
		PermitNets: stack.DocumentationNets, AdditionalArgs: []string{"--raise-epoch-to", "2"},
	})
	must(t, err)
	must(t, raised.AwaitReady(ctx))
	awaitMetric(t, w.sidecar.Admin, sidecarConnected, 1)
	err = stack.Await(ctx, func(ctx context.Context) error {
		got, err := verdict(ctx, w.checks, alice, inside)
		if err == nil && got != decisionv1.Verdict_VERDICT_ALLOW {
			err = fmt.Errorf("inside: %v", got)
		}
		return err
	})
	must(t, err)
	enforces(t, "raised", w.sidecar, aliceNets)
	accepted := decisions(t, w.sidecar)
	if got := accepted[bob+" from "+outside]; got.GetReason() != decisionv1.Reason_REASON_UNRESTRICTED {
		t.Errorf("bob, who has no list in the backup: %v", got)
	}
	must(t, raised.Stop())
	w.killAndRestart(t)
	same(t, "raised, from disk", accepted, decisions(t, w.sidecar))
}

// enforceEventually saves until that works.
func (w *world) enforceEventually(t *testing.T, mailbox, nets string) {
	t.Helper()
	err := stack.Await(within(t, startWithin), func(ctx context.Context) error {
		token, err := w.save(ctx, mailbox, nets)
		if err != nil {
			return err
		}
		return awaitRevision(ctx, w.checks, token)
	})
	must(t, err)
}

// listOf returns what the store says, as aliceNets is written.
func (w *world) listOf(t *testing.T, mailbox string) string {
	t.Helper()
	resp, err := w.lists.GetAllowedNets(within(t, 10*time.Second), &policyv1.GetAllowedNetsRequest{Mailbox: mailbox})
	must(t, err)
	var nets []string
	for _, n := range resp.GetAllowedNets().GetNets() {
		nets = append(nets, n.GetNet())
	}
	return strings.Join(nets, ", ")
}
