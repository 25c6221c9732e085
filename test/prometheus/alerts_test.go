package prometheus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	mailbox = "alice@example.org"
	nets    = "192.0.2.0/24"
	inside  = "192.0.2.77"
	outside = "198.51.100.9"
)

// TestAlerts causes the condition of every alert, and has every metric and every panel of the dashboard show something.
func TestAlerts(t *testing.T) {
	needPrometheus(t)
	t.Parallel()
	seen := &sightings{fired: make(map[string]bool), metrics: make(map[string]bool), shown: make(map[string]bool)}
	var worlds sync.WaitGroup // not t.Parallel, which runs as many as there are processors: they mostly wait
	for name, run := range map[string]func(*testing.T, *world){"outage": outage, "store": store, "doors": doors, "feed": feed} {
		worlds.Go(func() {
			t.Run(name, func(t *testing.T) {
				w := newWorld(t, seen)
				run(t, w)
				w.look(t)
			})
		})
	}
	worlds.Wait()
	if t.Failed() {
		return // what is missing below would only follow from that
	}
	for _, r := range seen.rules {
		if !seen.fired[r.Name] {
			t.Errorf("%s: nothing here makes it fire", r.Name)
		}
		for _, m := range metricNames(r.Query) {
			if !seen.metrics[m] {
				t.Errorf("%s: no program has the metric %s", r.Name, m)
			}
		}
	}
	for _, q := range dashboardQueries(t) {
		if !seen.shown[q] {
			t.Errorf("dashboard: never a result of %s", q)
		}
		for _, m := range metricNames(q) {
			if !seen.metrics[m] {
				t.Errorf("dashboard: no program has the metric %s", m)
			}
		}
	}
}

// metricNames returns the metrics in an expression, by the prefixes of those there are.
func metricNames(expr string) []string {
	expr = regexp.MustCompile(`"[^"]*"`).ReplaceAllString(expr, `""`)
	return regexp.MustCompile(`\b(allowednets_\w+|process_\w+|go_\w+|ALERTS|up)\b`).FindAllString(expr, -1)
}

// sightings are what was seen in all worlds.
type sightings struct {
	mu                    sync.Mutex
	rules                 []rule
	fired, metrics, shown map[string]bool
}

// world is an installation that Prometheus watches.
type world struct {
	*stack.Stack
	*server
	seen    *sightings
	targets map[string][]string
}

func newWorld(t *testing.T, seen *sightings) *world {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "prom-") // t.TempDir is too long for unix sockets
	if err != nil {
		t.Fatal(err)
	}
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("stopping: %v", err)
		}
		if t.Failed() {
			t.Logf("logs are in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return &world{Stack: s, server: startPrometheus(t, s), seen: seen, targets: make(map[string][]string)}
}

func (w *world) policy(t *testing.T, cfg stack.PolicyConfig) *stack.Policy {
	t.Helper()
	cfg.PermitNets = stack.DocumentationNets
	p, err := w.StartPolicy(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *world) readyPolicy(t *testing.T, cfg stack.PolicyConfig) *stack.Policy {
	t.Helper()
	p := w.policy(t, cfg)
	if err := p.AwaitReady(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *world) sidecar(t *testing.T, name, policy string, args ...string) *stack.Sidecar {
	t.Helper()
	s, err := w.StartSidecar(stack.SidecarConfig{Name: name, Policy: policy, AdditionalArgs: args})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w *world) readySidecar(t *testing.T, name, policy string, args ...string) *stack.Sidecar {
	t.Helper()
	s := w.sidecar(t, name, policy, args...)
	if err := s.AwaitReady(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	return s
}

// cable returns a proxy to a policy service or to etcd that ends with the test.
func (w *world) cable(t *testing.T, targets ...string) *stack.Proxy {
	t.Helper()
	p, err := w.StartProxy(within(t, patience), targets...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// watch adds a policy service and sidecars to the targets, and waits until each was scraped. It takes Prometheus 5 s to notice.
func (w *world) watch(t *testing.T, policy []*stack.Policy, sidecar ...*stack.Sidecar) {
	t.Helper()
	for _, p := range policy {
		w.targets[policies] = append(w.targets[policies], p.Admin)
	}
	for _, s := range sidecar {
		w.targets[sidecars] = append(w.targets[sidecars], s.Admin)
	}
	w.scrape(t, w.targets)
	for _, p := range policy {
		w.holds(t, fmt.Sprintf("up{job=%q, instance=%q} == 1", policies, p.Admin))
	}
	for _, s := range sidecar {
		w.holds(t, fmt.Sprintf("up{job=%q, instance=%q} == 1", sidecars, s.Admin))
	}
}

// well shows that no alert fires while nothing is wrong.
func (w *world) well(t *testing.T) {
	t.Helper()
	begun := time.Now()
	var found string
	err := await(within(t, patience), func(ctx context.Context) error {
		if time.Since(begun) < 3*time.Second {
			return errors.New("watching")
		}
		var data struct{ Alerts []alert }
		if err := w.get(ctx, "alerts", nil, &data); err != nil {
			return err
		}
		for _, a := range data.Alerts {
			if a.State == "firing" {
				found += fmt.Sprintf("\n%v", a.Labels)
			}
		}
		return nil
	})
	if err != nil || found != "" {
		t.Fatalf("nothing is wrong, but: %v%s", err, found)
	}
}

// fires waits until an alert fires for an instance; empty: for whatever.
func (w *world) fires(t *testing.T, name, instance string) {
	t.Helper()
	w.firesWhile(t, name, instance, func(context.Context) error { return nil })
}

// firesWhile does something again and again until an alert fires.
func (w *world) firesWhile(t *testing.T, name, instance string, do func(context.Context) error) {
	t.Helper()
	labels := make(map[string]string)
	if instance != "" {
		labels["instance"] = instance
	}
	begun := time.Now()
	err := await(within(t, patience), func(ctx context.Context) error {
		if err := do(ctx); err != nil {
			return err
		}
		a, err := w.firing(ctx, name, labels)
		if err != nil {
			return err
		}
		if a == nil {
			return fmt.Errorf("%s does not fire", name)
		}
		return a.complete()
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s after %v", name, time.Since(begun).Round(time.Millisecond))
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	w.seen.fired[name] = true
}

// look notes which metrics there are and which queries of the dashboard have a result, and that all rules could be evaluated.
func (w *world) look(t *testing.T) {
	t.Helper()
	ctx := within(t, patience)
	rules, err := w.rules(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if r.Health != "ok" {
			t.Errorf("%s: %s, %s", r.Name, r.Health, r.LastError)
		}
	}
	var metrics []string
	if err := w.get(ctx, "label/__name__/values", nil, &metrics); err != nil {
		t.Fatal(err)
	}
	shown := make(map[string]bool)
	for _, q := range dashboardQueries(t) {
		n, err := w.query(ctx, filledIn(q))
		if err != nil {
			t.Error(err)
		}
		shown[q] = n > 0
	}
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	w.seen.rules = rules
	for _, m := range metrics {
		w.seen.metrics[m] = true
	}
	maps.DeleteFunc(shown, func(_ string, has bool) bool { return !has })
	maps.Copy(w.seen.shown, shown)
}

func (w *world) lists(t *testing.T, address string) policyv1.PolicyServiceClient {
	t.Helper()
	client, conn, err := w.PolicyClient(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return client
}

func save(t *testing.T, lists policyv1.PolicyServiceClient, mailbox, nets string) {
	t.Helper()
	_, err := lists.SetAllowedNets(within(t, patience), &policyv1.SetAllowedNetsRequest{
		Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: nets},
	})
	if err != nil {
		t.Fatal(err)
	}
}

func checks(t *testing.T, s *stack.Sidecar) checkv1.CheckServiceClient {
	t.Helper()
	client, conn, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return client
}

func check(ctx context.Context, client checkv1.CheckServiceClient, address string) error {
	_, err := client.Check(ctx, &checkv1.CheckRequest{
		Mailbox: mailbox, ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP,
	})
	return err
}

// enforced waits until a sidecar has the revision that its policy service has.
func (w *world) enforced(t *testing.T, sidecar *stack.Sidecar, policy *stack.Policy) {
	t.Helper()
	w.holds(t, fmt.Sprintf(`allowednets_sidecar_applied_revision{instance=%q} == on () allowednets_policy_revision{instance=%q}`, sidecar.Admin, policy.Admin))
}

// outage takes the central services away, and at last a sidecar.
func outage(t *testing.T, w *world) {
	policy := w.readyPolicy(t, stack.PolicyConfig{})
	sidecar := w.readySidecar(t, "sidecar", policy.Address, "--deny-after=15s")
	save(t, w.lists(t, policy.Address), mailbox, nets)
	w.watch(t, []*stack.Policy{policy}, sidecar)
	w.well(t)

	if err := policy.Kill(); err != nil {
		t.Fatal(err)
	}
	fresh := w.sidecar(t, "fresh", policy.Address)
	waiting := w.policy(t, stack.PolicyConfig{Name: "waiting", Etcd: "http://127.0.0.1:1"}) // where nobody listens
	w.watch(t, []*stack.Policy{waiting}, fresh)
	w.fires(t, "AllowedNetsNoPolicyService", "")
	w.fires(t, "AllowedNetsPolicyDown", policy.Admin)
	w.fires(t, "AllowedNetsPolicyNotServing", waiting.Admin)
	w.fires(t, "AllowedNetsSidecarDisconnected", sidecar.Admin)
	w.fires(t, "AllowedNetsSidecarNotSynced", fresh.Admin)
	w.fires(t, "AllowedNetsSidecarDataOld", sidecar.Admin)
	client := checks(t, sidecar)
	w.firesWhile(t, "AllowedNetsDeniedAsStale", sidecar.Admin, func(ctx context.Context) error { return check(ctx, client, inside) })
	if err := sidecar.Kill(); err != nil {
		t.Fatal(err)
	}
	w.fires(t, "AllowedNetsSidecarDown", sidecar.Admin)
}

// store cuts one of two replicas off from etcd, and then damages the store.
func store(t *testing.T, w *world) {
	etcd, err := w.StartEtcd(within(t, patience), "etcd", "")
	if err != nil {
		t.Fatal(err)
	}
	cable := w.cable(t, etcd.Address)
	first := w.readyPolicy(t, stack.PolicyConfig{Name: "first", Etcd: etcd.Endpoint})
	second := w.readyPolicy(t, stack.PolicyConfig{Name: "second", Etcd: "http://" + cable.Address, NoCreate: true})
	sidecar := w.readySidecar(t, "sidecar", second.Address)
	lists, cutOff := w.lists(t, first.Address), w.lists(t, second.Address)
	save(t, lists, mailbox, nets)
	w.watch(t, []*stack.Policy{first, second}, sidecar)
	w.enforced(t, sidecar, second)
	w.well(t)

	cable.Cut()
	save(t, lists, mailbox, "198.51.100.0/24")
	get := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		if _, err := cutOff.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: mailbox}); err == nil {
			return errors.New("a policy service without etcd answers")
		}
		return nil
	}
	w.firesWhile(t, "AllowedNetsPolicyCallsFailing", second.Admin, get)
	w.fires(t, "AllowedNetsPolicyBehind", second.Admin)
	w.fires(t, "AllowedNetsSidecarStale", sidecar.Admin)

	cable.Heal()
	w.enforced(t, sidecar, first)
	damage(t, etcd.Endpoint)
	w.fires(t, "AllowedNetsStoreDamaged", first.Admin)
	w.fires(t, "AllowedNetsStoreDamaged", second.Admin)
	w.fires(t, "AllowedNetsStoreReloading", first.Admin)
}

// damage does what somebody with etcdctl would: it deletes a record, and touches the log.
func damage(t *testing.T, endpoint string) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	ctx := within(t, patience)
	log, err := client.Get(ctx, "/allowednets/v1/log")
	if err != nil || len(log.Kvs) != 1 {
		t.Fatalf("reading the log: %v, %v", log, err)
	}
	deleted, err := client.Delete(ctx, "/allowednets/v1/mailboxes/"+mailbox)
	if err != nil || deleted.Deleted != 1 {
		t.Fatalf("deleting a record: %v, %v", deleted, err)
	}
	if _, err := client.Put(ctx, "/allowednets/v1/log", string(log.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
}

// doors misconfigures and attacks what asks a sidecar, and strains its process.
func doors(t *testing.T, w *world) {
	policy := w.readyPolicy(t, stack.PolicyConfig{})
	token := w.Path("token")
	if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	sidecar := w.readySidecar(t, "sidecar", policy.Address, "--http-token-file="+token)
	lists, client := w.lists(t, policy.Address), checks(t, sidecar)
	save(t, lists, mailbox, nets)
	for i := range 25 {
		save(t, lists, fmt.Sprintf("user%d@example.org", i), nets)
	}
	w.watch(t, []*stack.Policy{policy}, sidecar)
	w.enforced(t, sidecar, policy)
	for _, address := range []string{inside, outside} {
		if err := check(t.Context(), client, address); err != nil {
			t.Fatal(err)
		}
	}
	w.well(t)

	dovecot := func(token, body string) func(context.Context) error {
		return func(ctx context.Context) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+sidecar.HTTP+"/dovecot?command=allow", strings.NewReader(body))
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+token)
			resp, err := w.client.Do(req)
			if err != nil {
				return err
			}
			return resp.Body.Close()
		}
	}
	// A load balancer that does not speak the PROXY protocol.
	w.firesWhile(t, "AllowedNetsClientAddressHidden", sidecar.Admin,
		dovecot("secret", `{"login":"`+mailbox+`","remote":"10.0.0.7","protocol":"imap","stage":"before"}`))
	// A Dovecot without the token.
	w.firesWhile(t, "AllowedNetsChecksUnanswered", sidecar.Admin,
		dovecot("guessed", `{"login":"`+mailbox+`","remote":"`+inside+`","protocol":"imap","stage":"before"}`))
	// Somebody who tries passwords.
	attack := func(ctx context.Context) error {
		var attempts sync.WaitGroup
		errs := make([]error, 200)
		for i := range errs {
			attempts.Go(func() { errs[i] = check(ctx, client, outside) })
		}
		attempts.Wait()
		return errors.Join(errs...)
	}
	w.firesWhile(t, "AllowedNetsDenialsUnlogged", sidecar.Admin, attack)
	w.firesWhile(t, "AllowedNetsDenialsJump", "", attack)
	// The certificate of a sidecar, stolen.
	stolen := w.stolen(t, policy.Address)
	w.firesWhile(t, "AllowedNetsCallerRefused", policy.Admin, func(ctx context.Context) error {
		if _, err := stolen.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: mailbox}); err == nil {
			return errors.New("a sidecar may clear lists")
		}
		return nil
	})
	// A script that runs wild.
	for i := range 20 {
		if _, err := lists.ClearAllowedNets(t.Context(), &policyv1.ClearAllowedNetsRequest{Mailbox: fmt.Sprintf("user%d@example.org", i)}); err != nil {
			t.Fatal(err)
		}
	}
	w.fires(t, "AllowedNetsRestrictionsDropped", "")
	// A machine that swaps.
	if err := sidecar.Freeze(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	save(t, lists, mailbox, "198.51.100.0/24")
	saved := time.Now()
	w.holdsWhile(t, "vector(1)", func(context.Context) error {
		if time.Since(saved) < 3*time.Second {
			return errors.New("swapping")
		}
		return nil
	})
	if err := sidecar.Thaw(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	w.fires(t, "AllowedNetsPropagationSlow", "")

	for restarts := range 3 {
		if err := errors.Join(sidecar.Kill(), sidecar.Restart(within(t, patience))); err != nil {
			t.Fatal(err)
		}
		w.holds(t, fmt.Sprintf("changes(process_start_time_seconds{instance=%q}[5m]) > %d", sidecar.Admin, restarts))
	}
	w.fires(t, "AllowedNetsRestarting", sidecar.Admin)
	w.useFiles(t, sidecar)
	w.fires(t, "AllowedNetsFileDescriptors", sidecar.Admin)
	// A rotation that forgets the key, and one that comes late.
	if err := os.Remove(w.Path("tls/" + stack.SidecarName + "-key.pem")); err != nil {
		t.Fatal(err)
	}
	w.fires(t, "AllowedNetsTLSFilesUnusable", sidecar.Admin)
	if _, err := w.Authority.IssueUntil(time.Now().Add(6*24*time.Hour), stack.SidecarName); err != nil {
		t.Fatal(err)
	}
	w.fires(t, "AllowedNetsCertificateExpires", sidecar.Admin)
}

// stolen returns a client of the policy service with a sidecar's certificate.
func (w *world) stolen(t *testing.T, address string) policyv1.PolicyServiceClient {
	t.Helper()
	creds, err := serve.TLSFlags{
		TLSCertFile: w.Path("tls/" + stack.SidecarName + ".pem"), TLSKeyFile: w.Path("tls/" + stack.SidecarName + "-key.pem"), TLSCAFile: w.Path("tls/ca.pem"),
	}.Credentials()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return policyv1.NewPolicyServiceClient(conn)
}

// useFiles opens connections to a sidecar, and lowers its limit of open files to little more than it then has.
func (w *world) useFiles(t *testing.T, sidecar *stack.Sidecar) {
	t.Helper()
	const connections = 100
	for range connections {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", sidecar.Socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
	}
	w.holds(t, fmt.Sprintf("process_open_fds{instance=%q} > %d", sidecar.Admin, connections))
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", sidecar.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	limit := syscall.Rlimit{Cur: uint64(len(open)) * 8 / 7, Max: 4096}
	// Package syscall has no prlimit(2) of another process.
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(sidecar.Pid()), syscall.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
}

// feed gives sidecars a bad line, falsified data, a bad disk, a restored backup and another store.
func feed(t *testing.T, w *world) {
	policy := w.readyPolicy(t, stack.PolicyConfig{})
	save(t, w.lists(t, policy.Address), mailbox, nets)
	if err := policy.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(w.Path("restored/etcd"), os.DirFS(w.Path("policy/etcd"))); err != nil { // the backup
		t.Fatal(err)
	}
	if err := policy.Restart(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	restoredAt, otherAt := w.later(t), w.later(t)
	cable := w.cable(t, policy.Address)
	shaken := w.readySidecar(t, "shaken", cable.Address)
	betrayed := w.readySidecar(t, "betrayed", w.cable(t, policy.Address, restoredAt).Address)
	misled := w.readySidecar(t, "misled", w.cable(t, policy.Address, otherAt).Address)
	onDisk := w.readySidecar(t, "on-disk", policy.Address, "--state-dir="+w.Path("state"))
	w.watch(t, []*stack.Policy{policy}, shaken, betrayed, misled, onDisk)
	save(t, w.lists(t, policy.Address), mailbox, "198.51.100.0/24")
	w.enforced(t, betrayed, policy)
	w.holds(t, "allowednets_sidecar_state_current == 1")
	w.well(t)

	// From now on the disk is not what it was.
	if err := errors.Join(onDisk.Stop(), flip(w.Path("state/state")), onDisk.Restart(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(w.Path("full/state.new/in-the-way"), 0o700); err != nil {
		t.Fatal(err)
	}
	full := w.readySidecar(t, "full", policy.Address, "--state-dir="+w.Path("full"))
	deceived := w.sidecar(t, "deceived", startForger(t, w.Stack, policy.Address))
	key := w.Path("doveadm.key")
	if err := os.WriteFile(key, []byte("key"), 0o600); err != nil {
		t.Fatal(err)
	}
	unswept := w.readySidecar(t, "unswept", policy.Address, "--doveadm-url=http://"+w.later(t), "--doveadm-key-file="+key)
	w.watch(t, nil, full, deceived, unswept)
	w.fires(t, "AllowedNetsStateRefused", onDisk.Admin)
	w.fires(t, "AllowedNetsStateNotOnDisk", full.Admin)
	w.fires(t, "AllowedNetsDigestMismatch", deceived.Admin)
	w.fires(t, "AllowedNetsSessionsNotSwept", unswept.Admin)

	client := checks(t, shaken)
	w.firesWhile(t, "AllowedNetsFeedUnstable", shaken.Admin, func(ctx context.Context) error {
		status, err := client.GetStatus(ctx, &checkv1.GetStatusRequest{})
		if err == nil && status.GetConnected() {
			cable.Cut()
			cable.Heal()
		}
		return err
	})

	w.readyPolicy(t, stack.PolicyConfig{Name: "restored", Listen: restoredAt, NoCreate: true})
	w.readyPolicy(t, stack.PolicyConfig{Name: "other", Listen: otherAt})
	if err := policy.Kill(); err != nil {
		t.Fatal(err)
	}
	w.fires(t, "AllowedNetsHistoryWentBack", betrayed.Admin)
	w.fires(t, "AllowedNetsForeignStore", misled.Admin)
}

// later returns an address for something that starts later, out of reach of the other worlds, which choose ports on 127.0.0.1.
func (w *world) later(t *testing.T) string {
	t.Helper()
	address, err := w.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(address, "127.0.0.1", "127.0.0.2", 1)
}

// flip changes a bit in the middle of a file.
func flip(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text[len(text)/2] ^= 1
	return os.WriteFile(path, text, 0o600)
}
