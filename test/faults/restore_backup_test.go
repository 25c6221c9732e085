package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/test/stack"
)

// TestRestoredBackup loses the whole store, restores a backup on all members as docs/operations.md says, and raises the epoch.
// Until then the newer state is enforced, also when saves have made the restored store's revision the higher one before any
// sidecar comes back; afterwards the restored one, and new saves.
func TestRestoredBackup(t *testing.T) {
	w := newWorld(t, settings{seed: 7, resting: 5 * time.Millisecond})
	defer w.report.tell(t)
	ctx := within(t, 5*time.Minute)
	w.pass(ctx, 50)
	resume := w.writer.pause()
	held := w.model.Newest() // the backup has this
	backup := w.Path("backup.db")
	must(t, w.backup(ctx, backup))
	kept := len(w.writer.ops())
	resume()
	w.pass(ctx, 50)
	resume = w.writer.pause()
	lost := w.model.Newest()
	gone := len(w.writer.ops())
	must(t, w.caughtUp(ctx, lost))

	for i, p := range w.policies {
		w.guard(p.Process, false)
		must(t, p.Kill(), w.etcd[i].Kill())
	}
	w.restoreMembers(ctx, backup)
	// Without a higher epoch nobody believes the older store, whatever is saved there.
	for round, saves := range []int{0, 1, 20} {
		newest := w.saveApart(ctx, fmt.Sprintf("policy.apart%d", round), saves)
		answered, refused := w.answers(), w.refusals(ctx)
		for i := range w.policies {
			w.startPolicy(i, fmt.Sprintf("policy%d.again%d", i, round), stack.Launch{})
			must(t, w.policies[i].AwaitReady(ctx))
		}
		if round > 0 { // one that has its state from disk
			must(t, w.sides[0].kill(w), w.sides[0].start(ctx, w))
			refused[0] = 0
		}
		must(t, stack.Await(ctx, func(ctx context.Context) error {
			if n := w.answers() - answered; n < 1000 {
				return fmt.Errorf("%d answers", n)
			}
			for i, n := range w.refusals(ctx) {
				if at, err := w.sides[i].enforces(ctx); err == nil && at == lost && n == refused[i] {
					return fmt.Errorf("%s has not asked", w.sides[i].name)
				}
			}
			return nil
		}))
		w.report.say("%d saves in the restored store, newest %s; all sidecars asked", saves, newest)
		w.unmoved(ctx, lost)
		for _, p := range w.policies {
			w.guard(p.Process, false)
			must(t, p.Kill())
		}
	}

	w.model.fork(held)
	for i := range w.policies {
		w.startPolicy(i, fmt.Sprintf("policy%d.raised", i), stack.Launch{}, "--raise-epoch-to", "2")
		must(t, w.policies[i].AwaitReady(ctx))
	}
	must(t, w.caughtUp(ctx, revision.Token{Epoch: 2}))
	restored, err := w.sides[0].enforces(ctx)
	must(t, err)
	w.model.raised(restored)
	w.unmoved(ctx, restored)
	w.report.say("%d saves after the backup are lost, as they must be; the epoch is 2", lost.Revision-held.Revision)
	resume()
	w.pass(ctx, 50)
	w.writer.forget(kept, gone)
	w.finish()
}

// saveApart makes saves through a policy service that no sidecar can reach, and returns the revision of the last one.
func (w *world) saveApart(ctx context.Context, name string, saves int) (newest string) {
	w.t.Helper()
	if saves == 0 {
		return "none"
	}
	p, err := w.StartPolicy(stack.PolicyConfig{
		Name: name, Listen: address(hub) + ":17443", Admin: address(hub) + ":17490", Etcd: w.endpoint(0), NoCreate: true,
		AdditionalArgs: []string{
			"--etcd-cert-file", w.etcdFiles.TLSCertFile, "--etcd-key-file", w.etcdFiles.TLSKeyFile, "--etcd-ca-file", w.etcdFiles.TLSCAFile,
		},
	})
	must(w.t, err)
	must(w.t, p.AwaitReady(ctx))
	creds, err := w.Admin.Credentials()
	must(w.t, err)
	conn, err := grpc.NewClient(p.Address, grpc.WithTransportCredentials(creds), grpc.WithAuthority(stack.PolicyName))
	must(w.t, err)
	for i := range saves {
		resp, err := policyv1.NewPolicyServiceClient(conn).SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
			Mailbox: "apart@example.org", Input: &policyv1.SetAllowedNetsRequest_Text{Text: fmt.Sprintf("9.9.%d.0/24", i)},
		}, grpc.WaitForReady(true))
		must(w.t, err)
		newest = resp.GetAllowedNets().GetRevision()
	}
	must(w.t, conn.Close(), p.Kill())
	return newest
}

// refusals are how often each sidecar, since it runs, was told that the history went back.
func (w *world) refusals(ctx context.Context) []float64 {
	w.t.Helper()
	const metric = `allowednets_sidecar_resyncs_total{cause="history_went_back"} `
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	counts := make([]float64, len(w.sides))
	for i, s := range w.sides {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Admin+"/metrics", nil)
		must(w.t, err)
		resp, err := client.Do(req)
		must(w.t, err)
		body, err := io.ReadAll(resp.Body)
		must(w.t, err, resp.Body.Close())
		_, rest, found := strings.Cut(string(body), metric)
		if _, err := fmt.Sscan(rest, &counts[i]); err != nil || !found {
			w.t.Fatalf("%s has no %s: %v", s.name, metric, err)
		}
	}
	return counts
}

// pass waits for some more saves.
func (w *world) pass(ctx context.Context, saves int) {
	w.t.Helper()
	enough := w.model.count() + saves
	must(w.t, stack.Await(ctx, func(context.Context) error {
		if n := w.model.count(); n < enough {
			return fmt.Errorf("%d of %d saves", n, enough)
		}
		return nil
	}))
}

// unmoved wants the sidecars to enforce a state for some seconds.
func (w *world) unmoved(ctx context.Context, state revision.Token) {
	w.t.Helper()
	for until := time.Now().Add(8 * time.Second); time.Now().Before(until); <-time.After(100 * time.Millisecond) {
		for _, s := range w.sides {
			if at, err := s.enforces(ctx); err != nil || at != state {
				w.report.violated("%s enforces %s, not %s: %v", s.name, at, state, err)
				return
			}
		}
	}
}

// backup writes a snapshot of etcd.
func (w *world) backup(ctx context.Context, path string) (err error) {
	from, err := w.members[0].Snapshot(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	to, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// restoreMembers makes new members from a backup and starts them.
func (w *world) restoreMembers(ctx context.Context, backup string) {
	w.t.Helper()
	var initial []string
	for i := range members {
		initial = append(initial, fmt.Sprintf("etcd%d=http://%s:2380", i, address(fmt.Sprintf("etcd%d", i))))
	}
	for i := range members {
		name := fmt.Sprintf("etcd%d", i)
		dir := filepath.Join(w.etcdDirs[i], "restored")
		out, err := exec.CommandContext(ctx, tool("etcdutl"), "snapshot", "restore", backup, "--name", name, "--data-dir", dir,
			"--initial-cluster", strings.Join(initial, ","), "--initial-advertise-peer-urls", "http://"+address(name)+":2380",
			"--initial-cluster-token", "restored", "--bump-revision", "1000000000", "--mark-compacted").CombinedOutput()
		if err != nil {
			w.t.Fatalf("etcdutl: %v\n%s", err, out)
		}
		w.etcd[i] = w.startMember(i, dir, strings.Join(initial, ","))
	}
}
