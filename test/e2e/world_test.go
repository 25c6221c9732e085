package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

// The people of the tests.
const (
	alice = "alice@example.org" // may be reached from aliceNets only
	bob   = "bob@example.org"   // unrestricted
	sales = "sales@example.org" // an alias of alice
	info  = "info@example.org"  // unrestricted, or an alias of alice that only the userdb knows

	aliceNets = "192.0.2.0/24, 2001:db8:a::/48"
)

// Addresses inside and outside of aliceNets.
const (
	inside, inside6   = "192.0.2.77", "2001:db8:a::77"
	outside, outside6 = "198.51.100.9", "2001:db8:b::9"
)

// notAllowed is what a person outside reads.
func notAllowed(address string) string {
	return "Access from " + address + " is not allowed for this mailbox. Ask your administrator."
}

// noAnswerText is what a person reads while a sidecar has no data.
const noAnswerText = "Access to this mailbox cannot be checked right now. Try again in a minute."

// doveadmKey lets the sidecar end sessions.
const doveadmKey = "doveadm-s3cret"

func people() []dovecot.User {
	return []dovecot.User{
		{Name: alice, Password: dovecot.Password},
		{Name: bob, Password: dovecot.Password},
		{Name: sales, Password: dovecot.Password, Canonical: alice},
		{Name: info, Password: dovecot.Password},
	}
}

// world is everything, running: etcd in the policy service or beside it, a sidecar, Dovecot.
type world struct {
	*stack.Stack
	etcd    *stack.Etcd // nil if embedded
	policy  *stack.Policy
	sidecar *stack.Sidecar
	dovecot *dovecot.Server
	doveadm *stack.Proxy // the way from the sidecar to doveadm; nil without sessions
	lists   policyv1.PolicyServiceClient
	checks  checkv1.CheckServiceClient
}

// settings vary a world.
type settings struct {
	separateEtcd bool
	sidecarArgs  []string
	noDovecot    bool
	// sessions makes the sidecar end open sessions.
	sessions bool
	// passed makes the test hold the socket of the sidecar's HTTP port, as systemd does.
	passed bool
	// dovecot is its configuration, less the door and doveadm.
	dovecot dovecot.Config
}

// newWorld starts everything and saves alice's list.
func newWorld(t *testing.T, cfg settings) *world {
	t.Helper()
	if !cfg.noDovecot {
		needDovecot(t)
	}
	ctx := within(t, startWithin)
	w := &world{Stack: newStack(t)}
	policyConfig := stack.PolicyConfig{PermitNets: stack.DocumentationNets}
	var err error
	if cfg.separateEtcd {
		if w.etcd, err = w.StartEtcd(ctx, "etcd", ""); err != nil {
			t.Fatal(err)
		}
		policyConfig.Etcd = w.etcd.Endpoint
	}
	if w.policy, err = w.StartPolicy(policyConfig); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"--trusted-proxies", "127.0.0.1/32"}, cfg.sidecarArgs...)
	dovecotConfig := cfg.dovecot
	if cfg.sessions {
		if dovecotConfig.Doveadm, err = w.FreeAddress(); err != nil {
			t.Fatal(err)
		}
		dovecotConfig.DoveadmKeyFile = w.Path("doveadm.key")
		if err := os.WriteFile(dovecotConfig.DoveadmKeyFile, []byte(doveadmKey), 0o600); err != nil {
			t.Fatal(err)
		}
		if w.doveadm, err = w.StartProxy(ctx, dovecotConfig.Doveadm); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.doveadm.Close(); err != nil {
				t.Error(err)
			}
		})
		args = append(args, "--doveadm-url", "http://"+w.doveadm.Address, "--doveadm-key-file", dovecotConfig.DoveadmKeyFile)
	}
	sidecarConfig := stack.SidecarConfig{Policy: w.policy.Address, AdditionalArgs: args}
	if cfg.passed {
		sidecarConfig.HTTP, sidecarConfig.Passed = heldSocket(t, w.Stack)
	}
	if w.sidecar, err = w.StartSidecar(sidecarConfig); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.policy.AwaitReady(ctx), w.sidecar.AwaitReady(ctx)); err != nil {
		t.Fatal(err)
	}
	w.lists = policyClient(t, w.Stack, w.policy.Address)
	w.checks = checkClient(t, w.sidecar)
	if !cfg.noDovecot {
		dovecotConfig.Door = "http://" + w.sidecar.HTTP + "/dovecot"
		w.dovecot = startDovecot(t, w.Stack, "dovecot", people(), dovecotConfig)
	}
	w.enforce(t, alice, aliceNets)
	return w
}

// heldSocket opens a listening socket that stays open until the end of the test.
func heldSocket(t *testing.T, s *stack.Stack) (address string, file *os.File) {
	t.Helper()
	address, err := s.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	at, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.ListenTCP("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	file, err = lis.File()
	if err := errors.Join(err, lis.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	})
	return address, file
}

func policyClient(t *testing.T, s *stack.Stack, address string) policyv1.PolicyServiceClient {
	t.Helper()
	client, conn, err := s.PolicyClient(address)
	if err != nil {
		t.Fatal(err)
	}
	closeLater(t, conn)
	return client
}

func checkClient(t *testing.T, s *stack.Sidecar) checkv1.CheckServiceClient {
	t.Helper()
	client, conn, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	closeLater(t, conn)
	return client
}

func closeLater(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}

// save saves a list and returns its revision; no nets lift the restriction.
func (w *world) save(ctx context.Context, mailbox, nets string) (revision.Token, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var saved *policyv1.AllowedNets
	if nets == "" {
		resp, err := w.lists.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: mailbox})
		if err != nil {
			return revision.Token{}, err
		}
		saved = resp.GetAllowedNets()
	} else {
		resp, err := w.lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
			Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: nets},
		})
		if err != nil {
			return revision.Token{}, err
		}
		saved = resp.GetAllowedNets()
	}
	return revision.Parse(saved.GetRevision())
}

// enforce saves a list and waits until the sidecar decides on a state that includes it.
func (w *world) enforce(t *testing.T, mailbox, nets string) {
	t.Helper()
	w.enforceWithin(t, 10*time.Second, mailbox, nets)
}

func (w *world) enforceWithin(t *testing.T, d time.Duration, mailbox, nets string) {
	t.Helper()
	token, err := w.save(t.Context(), mailbox, nets)
	if err != nil {
		t.Fatal(err)
	}
	if err := awaitRevision(within(t, d), w.checks, token); err != nil {
		t.Fatal(err)
	}
}

// awaitRevision waits until a sidecar's state includes token.
func awaitRevision(ctx context.Context, sidecar checkv1.CheckServiceClient, token revision.Token) error {
	return stack.Await(ctx, func(ctx context.Context) error {
		resp, err := sidecar.GetStatus(ctx, &checkv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		if !resp.GetSynced() {
			return errors.New("not synced")
		}
		at, err := revision.Parse(resp.GetRevision())
		if err != nil {
			return err
		}
		if at.Epoch != token.Epoch || at.Revision < token.Revision {
			return fmt.Errorf("the sidecar is at %s, not yet at %s", at, token)
		}
		return nil
	})
}

// verdict asks the sidecar directly.
func verdict(ctx context.Context, sidecar checkv1.CheckServiceClient, mailbox, address string) (decisionv1.Verdict, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := sidecar.Check(ctx, &checkv1.CheckRequest{Mailbox: mailbox, ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP})
	return resp.GetDecision().GetVerdict(), err
}

// cli runs the command line tool.
func (w *world) cli(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return w.cliWith(t, w.Environment(w.policy.Address, w.sidecar.Socket), stdin, args...)
}

func (w *world) cliWith(t *testing.T, env []string, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(within(t, 30*time.Second), w.Bin("allowednets"), args...)
	var out, errs strings.Builder
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), out.String(), errs.String()
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, out.String(), errs.String()
}

// lookups returns the names the passdb was asked for since the last call.
func (w *world) lookups(t *testing.T) []string {
	t.Helper()
	names, err := w.dovecot.Lookups()
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// runToEnd runs a program that is expected to end by itself, soon.
func runToEnd(t *testing.T, path string, args ...string) (code int, output string) {
	t.Helper()
	cmd := exec.CommandContext(within(t, 30*time.Second), path, args...)
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		t.Fatalf("%s %q ended with %v: %s", path, args, err, out)
	}
	return exit.ExitCode(), string(out)
}
