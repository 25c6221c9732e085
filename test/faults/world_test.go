package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	members  = 3
	replicas = 3
	// startWithin bounds the start of anything on a busy machine, and healWithin how long everything may take to be in step
	// again: sidecars and policy services try again with growing patience, up to half a minute.
	startWithin = time.Minute
	healWithin  = 2 * time.Minute
	etcdDisk    = 400 << 20 // tmpfs of etcd's last member: some write-ahead logs of 64 MB
	sidecarDisk = 4 << 20
)

// world is everything, running, with the model of what it holds and the checkers of what it says.
type world struct {
	*stack.Stack
	t      *testing.T
	report *report
	model  *model

	network   partitions
	etcdFiles serve.TLSFlags
	etcd      []*stack.Process
	etcdDirs  []string
	members   []*clientv3.Client // one for each
	toEtcd    []*stack.Proxy     // of the last policy service, one per member
	toPolicy  *stack.Proxy       // of the writers to the last policy service
	policies  []*stack.Policy
	lists     []policyv1.PolicyServiceClient
	sides     []*side
	writer    *writer

	ctx      context.Context //nolint:containedctx // of all that goes on in the background
	cancel   context.CancelFunc
	watching sync.WaitGroup
	checkers []*checker
	running  map[*stack.Process]bool // programs that must not end by themselves
	runMu    sync.Mutex
}

// side is a sidecar with its surroundings.
type side struct {
	*stack.Sidecar
	name, node string
	durable    bool         // its state survives a restart
	network    *stack.Proxy // nil if it has a node of its own
	disk       string       // small tmpfs of its state, if any
	clock      string       // file with the shift of its wall clock, if it has one
	excuses    excuses
	checks     checkv1.CheckServiceClient
}

// settings vary a world.
type settings struct {
	seed    uint64
	resting time.Duration // of the checkers between batches
	calm    bool          // no checkers and no writer yet
	// launch replaces binaries by the name of the process.
	launch map[string]stack.Launch
}

// forgetDashboard takes the dashboard out of a callers file: none runs here, and an old policy service does not know all its RPCs.
func forgetDashboard(path string) error {
	callers, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	others, _, found := strings.Cut(string(callers), "  - name: "+stack.DashboardName)
	if !found {
		return fmt.Errorf("%s does not name the dashboard", path)
	}
	return os.WriteFile(path, []byte(others), 0o600)
}

// newWorld starts everything.
func newWorld(t *testing.T, cfg settings) *world {
	t.Helper()
	need(t)
	root, err := stack.Root()
	must(t, err)
	dir, err := os.MkdirTemp(os.Getenv(inside), "w")
	must(t, err)
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	must(t, err)
	must(t, forgetDashboard(s.Path("callers.yaml")))
	w := &world{Stack: s, t: t, report: newReport(t.Logf), model: newModel(), running: make(map[*stack.Process]bool)}
	w.ctx, w.cancel = context.WithCancel(t.Context())
	t.Cleanup(func() {
		w.cancel()
		w.watching.Wait()
		for _, s := range w.sides {
			_ = s.Kill() // not all can end cleanly without a network
		}
		if err := s.Close(); err != nil {
			t.Errorf("stopping: %v", err)
		}
	})
	ctx := within(t, 2*startWithin)
	w.startEtcd(ctx)
	w.startPolicies(ctx, cfg)
	w.startSides(ctx, cfg)
	if !cfg.calm {
		w.begin(cfg)
	}
	return w
}

// begin starts the writer, the checkers and the watch over the processes. They end with finish.
func (w *world) begin(cfg settings) {
	w.t.Helper()
	w.writer = startWriter(w.ctx, cfg.seed, w.lists, w.model, w.report)
	w.t.Cleanup(func() { w.cancel(); w.writer.working.Wait() })
	for i, s := range w.sides {
		c := newChecker(s.name, s.Socket, w.model, w.report, &s.excuses)
		c.resting = cfg.resting
		w.checkers = append(w.checkers, c)
		w.watching.Go(func() { c.run(w.ctx, cfg.seed+uint64(i)) })
	}
	w.watching.Go(func() { w.watch(w.ctx) })
}

func (w *world) startEtcd(ctx context.Context) {
	w.t.Helper()
	ips := []string{"127.0.0.1"}
	var initial []string
	for i := range members {
		ip := address(fmt.Sprintf("etcd%d", i))
		ips = append(ips, ip)
		initial = append(initial, fmt.Sprintf("etcd%d=http://%s:2380", i, ip))
	}
	var err error
	w.etcdFiles, err = w.Authority.Issue("etcd.allowednets.internal", ips...)
	must(w.t, err)
	for i := range members {
		dir := w.Path(fmt.Sprintf("etcd%d", i))
		if i == members-1 {
			dir = w.tmpfs(fmt.Sprintf("etcd%d", i), etcdDisk)
		}
		w.etcdDirs = append(w.etcdDirs, dir)
		w.members = append(w.members, w.etcdClient(i))
		w.etcd = append(w.etcd, w.startMember(i, filepath.Join(dir, "data"), strings.Join(initial, ",")))
	}
	client := w.etcdClient()
	must(w.t, stack.Await(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := client.Get(ctx, "any")
		return err
	}))
}

// startMember starts a member of etcd in its node.
func (w *world) startMember(i int, dir, initial string) *stack.Process {
	w.t.Helper()
	name := fmt.Sprintf("etcd%d", i)
	client, peer := "https://"+address(name)+":2379", "http://"+address(name)+":2380"
	args := append(in(name), tool("etcd"), "--name", name, "--data-dir", dir,
		"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--initial-cluster", initial, "--initial-cluster-token", w.Path(""), "--snapshot-count", "1000", "--max-wals", "2", "--log-level", "warn",
		"--cert-file", w.etcdFiles.TLSCertFile, "--key-file", w.etcdFiles.TLSKeyFile, "--trusted-ca-file", w.etcdFiles.TLSCAFile, "--client-cert-auth")
	p, err := w.Start(name, args[0], args[1:], nil)
	must(w.t, err)
	return p
}

// etcdClient returns a client of some members; none: all.
func (w *world) etcdClient(only ...int) *clientv3.Client {
	w.t.Helper()
	tlsConfig, err := transport.TLSInfo{
		CertFile: w.etcdFiles.TLSCertFile, KeyFile: w.etcdFiles.TLSKeyFile, TrustedCAFile: w.etcdFiles.TLSCAFile,
	}.ClientConfig()
	must(w.t, err)
	var endpoints []string
	for i := range members {
		if len(only) == 0 || only[0] == i {
			endpoints = append(endpoints, w.endpoint(i))
		}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, TLS: tlsConfig, DialTimeout: 2 * time.Second, Logger: zap.NewNop()})
	must(w.t, err)
	w.t.Cleanup(func() { _ = client.Close() })
	return client
}

func (w *world) startPolicies(ctx context.Context, cfg settings) {
	w.t.Helper()
	for i := range members {
		p, err := w.StartProxy(ctx, address(fmt.Sprintf("etcd%d", i))+":2379")
		must(w.t, err)
		w.t.Cleanup(func() { _ = p.Close() })
		w.toEtcd = append(w.toEtcd, p)
	}
	creds, err := w.Admin.Credentials()
	must(w.t, err)
	w.policies = make([]*stack.Policy, replicas)
	for i := range replicas {
		name := fmt.Sprintf("policy%d", i)
		w.startPolicy(i, name, cfg.launch[name])
		must(w.t, w.policies[i].AwaitReady(ctx))
		address := w.policies[i].Address
		if i == replicas-1 {
			w.toPolicy, err = w.StartProxy(ctx, address)
			must(w.t, err)
			w.t.Cleanup(func() { _ = w.toPolicy.Close() })
			address = w.toPolicy.Address
		}
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds), grpc.WithAuthority(stack.PolicyName))
		must(w.t, err)
		w.t.Cleanup(func() { _ = conn.Close() })
		w.lists = append(w.lists, policyv1.NewPolicyServiceClient(conn))
	}
}

// startPolicy starts a policy service in its place, also instead of one that was there before. The last one shares the hub and
// reaches etcd through proxies.
func (w *world) startPolicy(i int, name string, launch stack.Launch, args ...string) {
	w.t.Helper()
	node := fmt.Sprintf("policy%d", i)
	if i == replicas-1 {
		node = hub
	}
	var endpoints []string
	for m, p := range w.toEtcd {
		if node == hub {
			endpoints = append(endpoints, "https://"+p.Address)
		} else {
			endpoints = append(endpoints, w.endpoint(m))
		}
	}
	launch.Prefix = in(node)
	p, err := w.StartPolicy(stack.PolicyConfig{
		Name: name, Listen: address(node) + ":7443", Admin: address(node) + ":7490", Etcd: strings.Join(endpoints, ","),
		NoCreate: name != "policy0", PermitNets: stack.DocumentationNets, Launch: launch,
		AdditionalArgs: append([]string{
			"--etcd-cert-file", w.etcdFiles.TLSCertFile, "--etcd-key-file", w.etcdFiles.TLSKeyFile, "--etcd-ca-file", w.etcdFiles.TLSCAFile,
		}, args...),
	})
	must(w.t, err)
	w.runMu.Lock()
	defer w.runMu.Unlock()
	w.policies[i] = p
	w.running[p.Process] = true
}

func (w *world) startSides(ctx context.Context, cfg settings) {
	w.t.Helper()
	w.sides = []*side{
		{name: "side0", node: "side0", durable: true},
		{name: "side1", node: "side1"},
		{name: "side2", node: hub, disk: w.tmpfs("side2", sidecarDisk)}, // durable, but for the times when the disk is full
		{name: "side3", node: "side3", durable: true},
	}
	for _, s := range w.sides {
		launch := cfg.launch[s.name]
		if s.name == "side3" && launch.Binary == "" && exists(tool(shifted)) {
			s.clock = w.Path(s.name + ".shift")
			launch.Binary = filepath.Join(tool(shifted), "allowednets-sidecar")
			launch.Env = []string{shiftFile + "=" + s.clock}
			must(w.t, setShift(s.clock, 0))
		}
		launch.Prefix = in(s.node)
		side := stack.SidecarConfig{
			Name: s.name, Policy: net.JoinHostPort(stack.PolicyName, "7443"), HTTP: "127.0.0.1:7480", Admin: address(s.node) + ":7491", Launch: launch,
		}
		if s.node == hub {
			var targets []string
			for _, p := range w.policies {
				targets = append(targets, p.Address)
			}
			var err error
			s.network, err = w.StartProxy(ctx, targets...)
			must(w.t, err)
			w.t.Cleanup(func() { _ = s.network.Close() })
			side.Policy = s.network.Address
		}
		switch {
		case s.disk != "":
			side.AdditionalArgs = []string{"--state-dir", filepath.Join(s.disk, "state")}
		case s.durable:
			side.AdditionalArgs = []string{"--state-dir", w.Path(s.name + ".state")}
		}
		var err error
		s.Sidecar, err = w.StartSidecar(side)
		must(w.t, err)
		w.connect(s)
	}
	for _, s := range w.sides {
		must(w.t, s.AwaitReady(ctx))
		w.guard(s.Process, true)
	}
}

// connect makes the client of a sidecar.
func (w *world) connect(s *side) {
	w.t.Helper()
	conn, err := dial(s.Socket)
	must(w.t, err)
	w.t.Cleanup(func() { _ = conn.Close() })
	s.checks = checkv1.NewCheckServiceClient(conn)
}

// tmpfs mounts a small file system.
func (w *world) tmpfs(name string, size int) string {
	w.t.Helper()
	path := w.Path(name + ".disk")
	must(w.t, os.Mkdir(path, 0o700), syscall.Mount("tmpfs", path, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)))
	w.t.Cleanup(func() {
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	})
	return path
}

// fill leaves no space on a file system, and returns how to give it back.
func fill(disk string) (undo func() error, err error) {
	path := filepath.Join(disk, "ballast")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	piece := make([]byte, 64<<10)
	for err == nil {
		_, err = f.Write(piece)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return func() error { return os.Remove(path) }, f.Close()
}

// guard says whether the end of a program is a fault of the product.
func (w *world) guard(p *stack.Process, on bool) {
	w.runMu.Lock()
	defer w.runMu.Unlock()
	w.running[p] = on
}

// watch looks after the programs: that none ends by itself, and what memory they take.
func (w *world) watch(ctx context.Context) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.runMu.Lock()
		policies := slices.Clone(w.policies)
		w.runMu.Unlock()
		for i, p := range policies {
			w.lookAfter(fmt.Sprintf("policy%d", i), p.Process)
		}
		for _, s := range w.sides {
			w.lookAfter(s.name, s.Process)
		}
	}
}

func (w *world) lookAfter(name string, p *stack.Process) {
	w.runMu.Lock()
	defer w.runMu.Unlock()
	if !w.running[p] {
		return
	}
	select {
	case <-p.Done():
		w.running[p] = false
		w.report.violated("%s ended by itself\n%s", name, p.LogTail())
	default:
		w.report.most("resident memory in KiB: "+name, resident(p.Pid()))
	}
}

// resident reads how much memory a process has, in KiB; 0 if it is gone.
func resident(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	var n int64
	_, _ = fmt.Sscan(rest, &n)
	return n
}

// kill ends a sidecar, with the excuses it then has.
func (s *side) kill(w *world) error {
	w.guard(s.Process, false)
	s.excuses.begin(notRunning)
	if !s.durable {
		s.excuses.begin(noState)
	}
	return s.Kill()
}

// start starts a sidecar again. It must answer as soon as it is there; one without a state when it has synced.
func (s *side) start(ctx context.Context, w *world) error {
	if err := s.Start(); err != nil {
		return err
	}
	w.guard(s.Process, true)
	begun := time.Now()
	if err := stack.Await(ctx, func(ctx context.Context) error { _, err := s.status(ctx); return err }); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	s.excuses.end(notRunning)
	w.report.atMost("start of a sidecar until it answers", time.Since(begun))
	if s.durable {
		return nil
	}
	w.watching.Go(func() { // a policy service may be away for long
		_ = stack.Await(w.ctx, func(ctx context.Context) error {
			status, err := s.status(ctx)
			if err == nil && !status.GetSynced() {
				err = errors.New("not synced")
			}
			return err
		})
		s.excuses.end(noState)
	})
	return nil
}

func (s *side) status(ctx context.Context) (*checkv1.GetStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return s.checks.GetStatus(ctx, &checkv1.GetStatusRequest{}, grpc.WaitForReady(true))
}

// caughtUp waits until all sidecars have applied a state, and know that their data is fresh.
func (w *world) caughtUp(ctx context.Context, state revision.Token) error {
	begun := time.Now()
	for _, s := range w.sides {
		err := stack.Await(ctx, func(ctx context.Context) error {
			status, err := s.status(ctx)
			if err != nil {
				return err
			}
			at, err := revision.Parse(status.GetRevision())
			if err == nil && compare(at, state) < 0 {
				err = fmt.Errorf("it is at %s, not at %s", at, state)
			}
			if err == nil && (status.GetDataAge() == nil || status.GetDataAge().AsDuration() > 10*time.Second) {
				err = fmt.Errorf("its data is %v old", status.GetDataAge().AsDuration())
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	w.report.atMost("everything healed until all sidecars were in step", time.Since(begun))
	return nil
}

// finish ends the writer and the checkers, when everything is healed, and judges what only the end can show.
func (w *world) finish() {
	w.t.Helper()
	ctx := within(w.t, healWithin)
	w.writer.finish()
	if err := w.caughtUp(ctx, w.model.Newest()); err != nil {
		w.report.violated("everything is healed, but %v", err)
	}
	w.cancel()
	w.watching.Wait()
	w.model.close()
	for _, c := range w.checkers {
		c.settle()
	}
	w.auditAll(ctx)
	ops := w.writer.ops()
	w.report.count("requests in the history that porcupine judged", int64(len(ops)))
	if err := linearizable(ops); err != nil {
		w.report.violated("%v", err)
	}
}

func (w *world) auditAll(ctx context.Context) {
	byMailbox := make(map[string][]op)
	for _, o := range w.writer.ops() {
		byMailbox[o.mailbox] = append(byMailbox[o.mailbox], o)
	}
	for i, m := range mailboxes() {
		trail, err := audit(ctx, w.lists[i%len(w.lists)], m)
		if err != nil {
			w.report.violated("audit trail of %s: %v", m, err)
			continue
		}
		w.report.count("saves in the audit trail", int64(len(trail)))
		for _, err := range compareTrail(trail, w.model.all(m), byMailbox[m]) {
			w.report.violated("%s: %v", m, err)
		}
	}
}
