// Package stack starts the real binaries of the product, and etcd, on this machine: for the black-box tests and for
// development.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/serve"
)

// Certificate names of the parts.
const (
	SidecarName   = "sidecar.allowednets.internal"
	AdminName     = "admin.allowednets.internal"
	DashboardName = "dashboard.allowednets.internal"
	// PolicyName is a name that every policy service has beside localhost; a test that uses it says where it is.
	PolicyName = "policy.allowednets.internal"
)

// DocumentationNets are the blocks of RFC 5737 and RFC 3849, which tests and development use as client addresses.
const DocumentationNets = "192.0.2.0/24,198.51.100.0/24,203.0.113.0/24,2001:db8::/32"

const callers = `callers:
  - name: ` + SidecarName + `
    rpcs: ["allowednets.feed.v1.FeedService/*"]
  - name: ` + AdminName + `
    rpcs: ["allowednets.policy.v1.PolicyService/*"]
  - name: ` + DashboardName + `
    rpcs:
      - allowednets.policy.v1.PolicyService/SetAllowedNets
      - allowednets.policy.v1.PolicyService/ClearAllowedNets
      - allowednets.policy.v1.PolicyService/GetAllowedNets
      - allowednets.policy.v1.PolicyService/ListAllowedNets
      - allowednets.policy.v1.PolicyService/ListChanges
      - allowednets.policy.v1.PolicyService/ExplainAccess
      - allowednets.policy.v1.PolicyService/GetPropagation
`

// Root returns the folder of the repository that holds the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.work")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not inside the repository: no go.work above the working directory")
		}
	}
}

// Stack is a set of processes with one authority. Close ends them all.
type Stack struct {
	dir, bin string

	// Authority issued all certificates, and may issue others.
	Authority *Authority
	// Admin are the files of the administrator's certificate.
	Admin serve.TLSFlags
	// Sidecar are those of the sidecars.
	Sidecar           serve.TLSFlags
	policy, dashboard serve.TLSFlags
	callers           string

	started []*Process
	chosen  map[string]bool // addresses handed out
}

// New prepares a stack that writes into dir (its path must be short: it holds unix sockets) and takes the binaries from
// bin. It makes certificates and starts nothing.
func New(dir, bin string) (*Stack, error) {
	for _, name := range []string{"allowednets-policy", "allowednets-sidecar", "allowednets-dashboard", "allowednets"} {
		if _, err := os.Stat(filepath.Join(bin, name)); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s is missing: run make build first", filepath.Join(bin, name))
		} else if err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Stack{dir: dir, bin: bin, callers: filepath.Join(dir, "callers.yaml"), chosen: make(map[string]bool)}
	if err := os.WriteFile(s.callers, []byte(callers), 0o600); err != nil {
		return nil, err
	}
	var err error
	if s.Authority, err = NewAuthority(filepath.Join(dir, "tls")); err != nil {
		return nil, err
	}
	var errPolicy, errSidecar, errAdmin, errDashboard error
	s.policy, errPolicy = s.Authority.Issue("localhost", "127.0.0.1", PolicyName)
	s.Sidecar, errSidecar = s.Authority.Issue(SidecarName)
	s.Admin, errAdmin = s.Authority.Issue(AdminName)
	s.dashboard, errDashboard = s.Authority.Issue(DashboardName)
	return s, errors.Join(errPolicy, errSidecar, errAdmin, errDashboard)
}

// Bin returns the path of one of the product's binaries.
func (s *Stack) Bin(name string) string { return filepath.Join(s.bin, name) }

// Path returns the path of a file in the stack's folder.
func (s *Stack) Path(name string) string { return filepath.Join(s.dir, name) }

// Close stops everything, newest first. It reports what did not stop cleanly.
func (s *Stack) Close() error {
	var errs []error
	for _, p := range slices.Backward(s.started) {
		errs = append(errs, p.close())
	}
	s.started = nil
	return errors.Join(errs...)
}

// Start starts another program that Close is to stop. Its log is NAME.log.
func (s *Stack) Start(name, path string, args, env []string) (*Process, error) {
	return s.start(NewProcess(name, path, args, env, s.Path(name+".log")))
}

func (s *Stack) start(p *Process) (*Process, error) {
	if err := p.Start(); err != nil {
		return nil, err
	}
	s.started = append(s.started, p)
	return p, nil
}

// Launch says how to run a binary otherwise than from the stack's folder, as a child like any other.
type Launch struct {
	Binary string   // empty: the one in the stack's folder
	Prefix []string // program and arguments that run it, such as ip netns exec NAME
	Env    []string
	files  []*os.File // from descriptor 3 on
}

func (s *Stack) launch(name, binary string, l Launch, args []string) (*Process, error) {
	if l.Binary == "" {
		l.Binary = s.Bin(binary)
	}
	command := slices.Concat(l.Prefix, []string{l.Binary}, args)
	p := NewProcess(name, command[0], command[1:], l.Env, s.Path(name+".log"))
	p.files = l.files
	return s.start(p)
}

// Server is one of the product's servers.
type Server struct {
	*Process
	// Admin is the address of the admin port.
	Admin string
}

// AwaitReady waits until the server says it is ready.
func (s Server) AwaitReady(ctx context.Context) error {
	return s.Process.AwaitReady(ctx, Ready(s.Admin))
}

// Restart starts the server again, with the same ports and files, and waits until it is ready.
func (s Server) Restart(ctx context.Context) error {
	if err := s.Start(); err != nil {
		return err
	}
	return s.AwaitReady(ctx)
}

// PolicyConfig says how to start a policy service. Addresses that are empty are chosen.
type PolicyConfig struct {
	Name           string // of the log and the data; "policy" if empty
	Listen, Admin  string
	Etcd           string // endpoints; empty for the embedded one
	NoCreate       bool   // the store must exist
	PermitNets     string
	AdditionalArgs []string
	Launch         Launch
}

// Policy is a policy service.
type Policy struct {
	Server
	Address string
}

// StartPolicy starts a policy service. It does not wait until it is ready.
func (s *Stack) StartPolicy(cfg PolicyConfig) (*Policy, error) {
	if cfg.Name == "" {
		cfg.Name = "policy"
	}
	if err := s.chooseAddresses(&cfg.Listen, &cfg.Admin); err != nil {
		return nil, err
	}
	args := append([]string{"--listen", cfg.Listen, "--admin-listen", cfg.Admin, "--callers", s.callers}, tlsArgs(s.policy)...)
	if cfg.Etcd == "" {
		args = append(args, "--data-dir", s.Path(cfg.Name))
	} else {
		args = append(args, "--etcd-endpoints", cfg.Etcd)
	}
	if !cfg.NoCreate {
		args = append(args, "--create-store")
	}
	if cfg.PermitNets != "" {
		args = append(args, "--permit-nets", cfg.PermitNets)
	}
	p, err := s.launch(cfg.Name, "allowednets-policy", cfg.Launch, append(args, cfg.AdditionalArgs...))
	if err != nil {
		return nil, err
	}
	return &Policy{Server: Server{Process: p, Admin: cfg.Admin}, Address: cfg.Listen}, nil
}

// PolicyClient returns a client with the administrator's certificate. The caller closes the connection.
func (s *Stack) PolicyClient(address string) (policyv1.PolicyServiceClient, *grpc.ClientConn, error) {
	creds, err := s.Admin.Credentials()
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		return nil, nil, err
	}
	return policyv1.NewPolicyServiceClient(conn), conn, nil
}

// SidecarConfig says how to start a sidecar. Addresses that are empty are chosen.
type SidecarConfig struct {
	Name           string // of the log, the socket and the id; "sidecar" if empty
	Policy         string // address of the policy service
	HTTP, Admin    string
	AdditionalArgs []string
	// Passed is a listening socket on HTTP that is passed to the sidecar, as systemd does.
	Passed *os.File
	Launch Launch
}

// Sidecar is a sidecar.
type Sidecar struct {
	Server
	HTTP   string
	Socket string
}

// StartSidecar starts a sidecar. It does not wait until it is ready.
func (s *Stack) StartSidecar(cfg SidecarConfig) (*Sidecar, error) {
	if cfg.Name == "" {
		cfg.Name = "sidecar"
	}
	if err := s.chooseAddresses(&cfg.HTTP, &cfg.Admin); err != nil {
		return nil, err
	}
	socket := s.Path(cfg.Name + ".sock")
	args := append([]string{
		"--policy-address", cfg.Policy, "--id", cfg.Name, "--socket", socket,
		"--http-listen", cfg.HTTP, "--admin-listen", cfg.Admin,
	}, tlsArgs(s.Sidecar)...)
	if cfg.Passed != nil {
		// sd_listen_fds(3); only the process itself knows its id.
		cfg.Launch.Prefix = append(cfg.Launch.Prefix, "/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`)
		cfg.Launch.Env = append(cfg.Launch.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES=http")
		cfg.Launch.files = []*os.File{cfg.Passed}
	}
	p, err := s.launch(cfg.Name, "allowednets-sidecar", cfg.Launch, append(args, cfg.AdditionalArgs...))
	if err != nil {
		return nil, err
	}
	return &Sidecar{Server: Server{Process: p, Admin: cfg.Admin}, HTTP: cfg.HTTP, Socket: socket}, nil
}

// Client returns a client of the sidecar's socket. The caller closes the connection.
func (s *Sidecar) Client() (checkv1.CheckServiceClient, *grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return checkv1.NewCheckServiceClient(conn), conn, nil
}

// AwaitRevision waits until the sidecar decides on a state that includes revision, as a write returned it.
func (s *Sidecar) AwaitRevision(ctx context.Context, revision string) (err error) {
	client, conn, err := s.Client()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return Await(ctx, func(ctx context.Context) error {
		_, err := client.Check(ctx, &checkv1.CheckRequest{
			Mailbox: "nobody@example.org", ClientAddress: "8.8.8.8", Service: decisionv1.Service_SERVICE_IMAP, MinRevision: revision,
		})
		return err
	})
}

// DashboardConfig says how to start a dashboard. Addresses that are empty are chosen.
type DashboardConfig struct {
	Name             string // of the log; "dashboard" if empty
	Policy           string // address of the policy service
	Listen, Admin    string
	Directory, Users string // files
	PublicURL        string // empty: browsers come over plain HTTP
	AdditionalArgs   []string
}

// Dashboard is a dashboard. It speaks plain HTTP.
type Dashboard struct {
	Server
	URL string
}

// StartDashboard starts a dashboard. It does not wait until it is ready.
func (s *Stack) StartDashboard(cfg DashboardConfig) (*Dashboard, error) {
	if cfg.Name == "" {
		cfg.Name = "dashboard"
	}
	if err := s.chooseAddresses(&cfg.Listen, &cfg.Admin); err != nil {
		return nil, err
	}
	args := append([]string{"--listen", cfg.Listen, "--admin-listen", cfg.Admin, "--policy-address", cfg.Policy}, tlsArgs(s.dashboard)...)
	if cfg.PublicURL == "" {
		args = append(args, "--insecure-http")
	} else {
		args = append(args, "--public-url", cfg.PublicURL)
	}
	if cfg.Directory != "" {
		args = append(args, "--directory", cfg.Directory)
	}
	if cfg.Users != "" {
		args = append(args, "--users", cfg.Users)
	}
	p, err := s.Start(cfg.Name, s.Bin("allowednets-dashboard"), append(args, cfg.AdditionalArgs...), nil)
	if err != nil {
		return nil, err
	}
	return &Dashboard{Server: Server{Process: p, Admin: cfg.Admin}, URL: "http://" + cfg.Listen}, nil
}

// Etcd is a member of an etcd cluster, often the only one, in a process of its own.
type Etcd struct {
	*Process
	Address, Endpoint string
}

// StartEtcd starts an etcd with an empty store, at an address that is chosen if it is empty. It does not wait until it is
// ready.
func (s *Stack) StartEtcd(ctx context.Context, name, client string) (*Etcd, error) {
	var peer string
	if err := s.chooseAddresses(&client, &peer); err != nil {
		return nil, err
	}
	return s.startMember(ctx, name, client, peer, name, name+"=http://"+peer)
}

// StartEtcdCluster starts an etcd of several members, with an empty store. It does not wait until it is ready.
func (s *Stack) StartEtcdCluster(ctx context.Context, name string, members int) ([]*Etcd, error) {
	clients, peers := make([]string, members), make([]string, members)
	var initial []string
	for i := range members {
		if err := s.chooseAddresses(&clients[i], &peers[i]); err != nil {
			return nil, err
		}
		initial = append(initial, fmt.Sprintf("%s%d=http://%s", name, i, peers[i]))
	}
	var cluster []*Etcd
	for i := range members {
		member, err := s.startMember(ctx, fmt.Sprintf("%s%d", name, i), clients[i], peers[i], name, strings.Join(initial, ","))
		if err != nil {
			return nil, err
		}
		cluster = append(cluster, member)
	}
	return cluster, nil
}

// BuildEtcd builds etcd from the version the tests are pinned to.
func BuildEtcd(ctx context.Context, path string) error {
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", path, "go.etcd.io/etcd/server/v3")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building etcd: %w\n%s", err, out)
	}
	return nil
}

// startMember builds etcd from the version the tests are pinned to and starts a member of a cluster, whose id comes from its
// name and its peers' URLs.
func (s *Stack) startMember(ctx context.Context, name, client, peer, cluster, initial string) (*Etcd, error) {
	bin := s.Path("etcd.bin")
	if _, err := os.Stat(bin); errors.Is(err, fs.ErrNotExist) {
		if err := BuildEtcd(ctx, bin); err != nil {
			return nil, err
		}
	}
	clientURL, peerURL := "http://"+client, "http://"+peer
	p, err := s.Start(name, bin, []string{
		"--name", name, "--data-dir", s.Path(name),
		"--listen-client-urls", clientURL, "--advertise-client-urls", clientURL,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", initial,
		"--initial-cluster-token", cluster,
		"--log-level", "warn",
	}, nil)
	if err != nil {
		return nil, err
	}
	return &Etcd{Process: p, Address: client, Endpoint: clientURL}, nil
}

// Environment returns the variables with which the command line tool reaches a policy service and a sidecar.
func (s *Stack) Environment(policy, socket string) []string {
	return []string{
		"ALLOWEDNETS_POLICY_ADDRESS=" + policy,
		"ALLOWEDNETS_SIDECAR=unix:" + socket,
		"ALLOWEDNETS_TLS_CERT_FILE=" + s.Admin.TLSCertFile,
		"ALLOWEDNETS_TLS_KEY_FILE=" + s.Admin.TLSKeyFile,
		"ALLOWEDNETS_TLS_CA_FILE=" + s.Admin.TLSCAFile,
	}
}
