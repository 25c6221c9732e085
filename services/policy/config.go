package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// flags are the command line. Each has a twin in the environment.
type flags struct {
	serve.LogFlags
	serve.TLSFlags

	Listen      string `env:"ALLOWEDNETS_LISTEN" default:":7443" help:"Address of the RPCs."`
	AdminListen string `env:"ALLOWEDNETS_ADMIN_LISTEN" default:":7490" help:"Address of /livez, /readyz and /metrics."`
	Callers     string `env:"ALLOWEDNETS_CALLERS" help:"YAML file: which certificate name may call which RPCs. Needed with TLS."`

	DataDir          string    `env:"ALLOWEDNETS_DATA_DIR" help:"Folder of the embedded single-node etcd. Needed without --etcd-endpoints."`
	CreateStore      bool      `env:"ALLOWEDNETS_CREATE_STORE" help:"Create a store in an etcd that has none. Only for the first start: a lost volume must not look like nobody is restricted."`
	CreateStoreUntil time.Time `env:"ALLOWEDNETS_CREATE_STORE_UNTIL" placeholder:"TIME" help:"Like --create-store in a start before this time (RFC 3339), and nothing after it, so that a deployment may keep the flag."`
	RaiseEpochTo     uint64    `env:"ALLOWEDNETS_RAISE_EPOCH_TO" help:"Raise the store's epoch to this number if it is lower. After restoring a backup give one more than before, so that sidecars believe the older history."`
	EtcdEndpoints    []string  `env:"ALLOWEDNETS_ETCD_ENDPOINTS" help:"Client URLs of an etcd cluster, comma-separated."`
	EtcdCertFile     string    `env:"ALLOWEDNETS_ETCD_CERT_FILE" help:"Our client certificate for etcd, PEM."`
	EtcdKeyFile      string    `env:"ALLOWEDNETS_ETCD_KEY_FILE" help:"Its key, PEM."`
	EtcdCAFile       string    `env:"ALLOWEDNETS_ETCD_CA_FILE" help:"Authorities of etcd's certificates, PEM."`
	EtcdUser         string    `env:"ALLOWEDNETS_ETCD_USER" help:"etcd user."`
	EtcdPasswordFile string    `env:"ALLOWEDNETS_ETCD_PASSWORD_FILE" help:"File with the user's password."`

	TraceEndpoint string `env:"ALLOWEDNETS_TRACE_ENDPOINT" help:"Send OpenTelemetry traces to this OTLP gRPC collector, such as https://collector:4317 (http:// on loopback only). Default: no tracing."`

	RestrictServices []string `env:"ALLOWEDNETS_RESTRICT_SERVICES" help:"As given to the sidecars, for ExplainAccess: services restricted beyond those that read mail. Only smtp-submission can be."`

	PermitNets  []string `env:"ALLOWEDNETS_PERMIT_NETS" help:"Private or special networks that lists may hold all the same, comma-separated."`
	MaxNets     int      `env:"ALLOWEDNETS_MAX_NETS" default:"256" help:"Most entries of a list."`
	MaxNetsText int      `env:"ALLOWEDNETS_MAX_NETS_TEXT" default:"65536" help:"Longest text of a list, in octets."`

	Version kong.VersionFlag `help:"Print the version and exit."`
}

// config is what the flags mean.
type config struct {
	flags
	credentials credentials.TransportCredentials
	callers     grants
	rules       allow.Rules
	scope       allow.Scope
	store       store.Config // without endpoints: etcd is embedded
}

// resolve checks what can be checked before anything is opened, and reads the files. Its errors are of usage.
func (f *flags) resolve() (config, error) {
	c := config{flags: *f}
	err := f.validate()
	if err == nil {
		c.rules, err = f.rules()
	}
	if err == nil {
		c.scope, err = f.scope()
	}
	if err == nil {
		c.credentials, err = f.Credentials()
	}
	if err == nil {
		c.callers, err = f.readCallers()
	}
	if err == nil {
		c.store, err = f.readStore()
	}
	return c, err
}

// validate refuses what cannot work.
func (f *flags) validate() error {
	embedded := len(f.EtcdEndpoints) == 0
	switch {
	case f.InsecurePlaintext && !serve.IsLoopback(f.Listen):
		return fmt.Errorf("--insecure-plaintext needs a loopback address in --listen, such as 127.0.0.1:7443, not %q", f.Listen)
	case f.InsecurePlaintext && f.Callers != "":
		return errors.New("--callers and --insecure-plaintext contradict each other: without certificates every caller is the same")
	case !f.InsecurePlaintext && f.Callers == "":
		return errors.New("--callers is needed: without it nobody may call anything")
	case embedded && f.DataDir == "":
		return errors.New("give --data-dir for an embedded etcd, or --etcd-endpoints for a cluster")
	case !embedded && f.DataDir != "":
		return errors.New("--data-dir and --etcd-endpoints contradict each other: give one")
	case embedded && (f.EtcdCertFile != "" || f.EtcdKeyFile != "" || f.EtcdCAFile != "" || f.EtcdUser != "" || f.EtcdPasswordFile != ""):
		return errors.New("--etcd-cert-file, --etcd-key-file, --etcd-ca-file, --etcd-user and --etcd-password-file go with --etcd-endpoints")
	case (f.EtcdCertFile == "") != (f.EtcdKeyFile == ""):
		return errors.New("--etcd-cert-file and --etcd-key-file go together")
	case (f.EtcdUser == "") != (f.EtcdPasswordFile == ""):
		return errors.New("--etcd-user and --etcd-password-file go together")
	case f.MaxNets < 1 || f.MaxNets > 4096:
		return fmt.Errorf("--max-nets must be from 1 to 4096, not %d", f.MaxNets)
	case f.MaxNetsText < 64 || f.MaxNetsText > 512<<10:
		return fmt.Errorf("--max-nets-text must be from 64 to 524288, not %d", f.MaxNetsText)
	}
	for flag, address := range map[string]string{"--listen": f.Listen, "--admin-listen": f.AdminListen} {
		if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
			return fmt.Errorf("%s=%q is not of the form [HOST]:PORT", flag, address)
		}
	}
	if f.TraceEndpoint != "" {
		if err := validateTraceEndpoint(f.TraceEndpoint); err != nil {
			return err
		}
	}
	return f.validateEndpoints()
}

// validateEndpoints refuses what etcd's client would take for something else: an endpoint without a scheme is plain text to
// it, and the first endpoint's scheme decides for all of them.
func (f *flags) validateEndpoints() error {
	schemes := make(map[string]bool)
	for _, endpoint := range f.EtcdEndpoints {
		u, err := url.Parse(endpoint)
		switch {
		case err == nil && u.User != nil:
			return errors.New("--etcd-endpoints: user and password belong into --etcd-user and --etcd-password-file")
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || strings.Trim(u.RequestURI(), "/") != "":
			return fmt.Errorf("--etcd-endpoints: %q is not of the form https://HOST:PORT", endpoint)
		case u.Scheme == "http" && !serve.IsLoopback(u.Host) && !f.InsecurePlaintext:
			return fmt.Errorf("--etcd-endpoints: %s is plain text beyond this machine; use https://", endpoint)
		}
		schemes[u.Scheme] = true
	}
	switch {
	case len(schemes) > 1:
		return errors.New("--etcd-endpoints must be all https:// or all http://")
	case schemes["http"] && (f.EtcdCertFile != "" || f.EtcdCAFile != ""):
		return errors.New("--etcd-cert-file, --etcd-key-file and --etcd-ca-file go with https:// in --etcd-endpoints")
	}
	return nil
}

// rules are what lists must obey.
func (f *flags) rules() (allow.Rules, error) {
	rules := allow.Rules{MaxNets: f.MaxNets, MaxText: f.MaxNetsText}
	for _, text := range f.PermitNets {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return rules, fmt.Errorf("--permit-nets: %q is not a network such as 10.1.0.0/16", text)
		}
		rules.Permit = append(rules.Permit, p)
	}
	return rules, nil
}

// scope is which services are restricted.
func (f *flags) scope() (allow.Scope, error) {
	scope, err := allow.ParseScope(f.RestrictServices)
	if err != nil {
		return scope, fmt.Errorf("--restrict-services: %w", err)
	}
	return scope, nil
}

// readStore says how to reach a cluster.
func (f *flags) readStore() (store.Config, error) {
	cfg := store.Config{Endpoints: f.EtcdEndpoints, User: f.EtcdUser}
	if f.EtcdPasswordFile != "" {
		password, err := os.ReadFile(f.EtcdPasswordFile)
		if err != nil {
			return cfg, fmt.Errorf("--etcd-password-file: %w", err)
		}
		if cfg.Password = strings.TrimRight(string(password), "\r\n"); cfg.Password == "" {
			return cfg, fmt.Errorf("--etcd-password-file: %s is empty", f.EtcdPasswordFile)
		}
	}
	if slices.ContainsFunc(f.EtcdEndpoints, func(e string) bool { return strings.HasPrefix(e, "https://") }) {
		info := transport.TLSInfo{CertFile: f.EtcdCertFile, KeyFile: f.EtcdKeyFile, TrustedCAFile: f.EtcdCAFile}
		tlsConfig, err := info.ClientConfig()
		if err != nil {
			return cfg, fmt.Errorf("--etcd-cert-file, --etcd-key-file, --etcd-ca-file: %w", err)
		}
		tlsConfig.MinVersion = tls.VersionTLS12
		cfg.TLS = tlsConfig
	}
	return cfg, nil
}

// methods returns the full name of every RPC that can be granted to a caller.
func methods() []string {
	var all []string
	for _, service := range []grpc.ServiceDesc{policyv1.PolicyService_ServiceDesc, feedv1.FeedService_ServiceDesc} {
		for _, m := range service.Methods {
			all = append(all, "/"+service.ServiceName+"/"+m.MethodName)
		}
		for _, m := range service.Streams {
			all = append(all, "/"+service.ServiceName+"/"+m.StreamName)
		}
	}
	return all
}

// grants is what the --callers file says.
type grants struct {
	rpcs    *serve.Callers
	domains map[string][]string // of the callers that are limited to some
}

// limit returns the domains that a caller may act in; limited is false if it may act in all.
func (g grants) limit(caller string) (domains []string, limited bool) {
	domains, limited = g.domains[caller]
	return domains, limited
}

// readCallers reads the table of --callers. In plain text there are no certificates, and whoever reaches the loopback address
// may call everything.
func (f *flags) readCallers() (grants, error) {
	if f.InsecurePlaintext {
		rpcs, err := serve.NewCallers(methods(), map[string][]string{
			serve.PlaintextCaller: {policyv1.PolicyService_ServiceDesc.ServiceName + "/*", feedv1.FeedService_ServiceDesc.ServiceName + "/*"},
		})
		return grants{rpcs: rpcs}, err
	}
	data, err := os.ReadFile(f.Callers)
	if err != nil {
		return grants{}, fmt.Errorf("--callers: %w", err)
	}
	g, err := parseCallers(data)
	if err != nil {
		return grants{}, fmt.Errorf("--callers: %s: %w", f.Callers, err)
	}
	return g, nil
}

// callerEntry is one entry of the --callers file.
type callerEntry struct {
	Name    string    `yaml:"name"`
	RPCs    []string  `yaml:"rpcs"`
	Domains *[]string `yaml:"domains"`
}

func parseCallers(data []byte) (grants, error) {
	var file struct {
		Callers []callerEntry `yaml:"callers"`
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	err := decoder.Decode(&file)
	if wrong := new(yaml.TypeError); errors.As(err, &wrong) {
		err = errors.New(strings.Join(wrong.Errors, "; ")) // it has a line for each
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: there is nothing in it
		return grants{}, err
	}
	if err := decoder.Decode(new(any)); !errors.Is(err, io.EOF) {
		return grants{}, errors.New("it holds more than one YAML document")
	}
	rpcs := make(map[string][]string)
	g := grants{domains: make(map[string][]string)}
	for _, caller := range file.Callers {
		if _, twice := rpcs[caller.Name]; twice {
			return grants{}, fmt.Errorf("caller %q stands there twice", caller.Name)
		}
		if len(caller.RPCs) == 0 {
			return grants{}, fmt.Errorf("caller %q may call no rpcs; leave it out, or grant it some", caller.Name)
		}
		rpcs[caller.Name] = caller.RPCs
		if caller.Domains == nil {
			continue
		}
		if g.domains[caller.Name], err = parseDomains(*caller.Domains); err != nil {
			return grants{}, fmt.Errorf("caller %q: %w", caller.Name, err)
		}
	}
	if len(rpcs) == 0 {
		return grants{}, errors.New("it names no caller: nobody could call anything")
	}
	g.rpcs, err = serve.NewCallers(methods(), rpcs)
	return g, err
}

func parseDomains(texts []string) ([]string, error) {
	if len(texts) == 0 {
		return nil, errors.New("domains is empty; leave it out to permit all domains")
	}
	domains := make([]string, len(texts))
	for i, text := range texts {
		domain, err := allow.ParseDomain(text)
		if err != nil {
			return nil, err
		}
		domains[i] = domain
	}
	return domains, nil
}

// listen opens a TCP listener and names the flag if it cannot.
func listen(ctx context.Context, flag, address string) (net.Listener, error) {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return lis, nil
}
