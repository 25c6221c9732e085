package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// config is the command line. Every flag has an environment variable.
type config struct {
	serve.LogFlags
	serve.TLSFlags

	Listen      string `env:"ALLOWEDNETS_LISTEN" default:":7443" help:"Address of the RPCs."`
	AdminListen string `env:"ALLOWEDNETS_ADMIN_LISTEN" default:":7490" help:"Address of /livez, /readyz and /metrics."`
	Callers     string `env:"ALLOWEDNETS_CALLERS" type:"path" help:"YAML file: which certificate name may call which RPCs. Needed with TLS."`

	DataDir          string   `env:"ALLOWEDNETS_DATA_DIR" type:"path" help:"Folder of the embedded single-node etcd. Needed without --etcd-endpoints."`
	CreateStore      bool     `env:"ALLOWEDNETS_CREATE_STORE" help:"Create a store in an etcd that has none. Only for the first start: a lost volume must not look like nobody is restricted."`
	EtcdEndpoints    []string `env:"ALLOWEDNETS_ETCD_ENDPOINTS" help:"Client URLs of an etcd cluster, comma-separated."`
	EtcdCertFile     string   `env:"ALLOWEDNETS_ETCD_CERT_FILE" type:"path" help:"Our client certificate for etcd, PEM."`
	EtcdKeyFile      string   `env:"ALLOWEDNETS_ETCD_KEY_FILE" type:"path" help:"Its key, PEM."`
	EtcdCAFile       string   `env:"ALLOWEDNETS_ETCD_CA_FILE" type:"path" help:"Authorities of etcd's certificates, PEM."`
	EtcdUser         string   `env:"ALLOWEDNETS_ETCD_USER" help:"etcd user."`
	EtcdPasswordFile string   `env:"ALLOWEDNETS_ETCD_PASSWORD_FILE" type:"path" help:"File with the user's password."`

	PermitNets  []string `env:"ALLOWEDNETS_PERMIT_NETS" help:"Private or special networks that lists may hold all the same, comma-separated."`
	MaxNets     int      `env:"ALLOWEDNETS_MAX_NETS" default:"256" help:"Most entries of a list."`
	MaxNetsText int      `env:"ALLOWEDNETS_MAX_NETS_TEXT" default:"65536" help:"Longest text of a list, in octets."`
}

// validate refuses what cannot work, before anything is started.
func (c *config) validate() error {
	embedded := len(c.EtcdEndpoints) == 0
	switch {
	case c.InsecurePlaintext && !serve.IsLoopback(c.Listen):
		return fmt.Errorf("--insecure-plaintext needs a loopback address in --listen, such as 127.0.0.1:7443, not %q", c.Listen)
	case !c.InsecurePlaintext && c.Callers == "":
		return errors.New("--callers is needed: without it nobody may call anything")
	case embedded && c.DataDir == "":
		return errors.New("give --data-dir for an embedded etcd, or --etcd-endpoints for a cluster")
	case !embedded && c.DataDir != "":
		return errors.New("--data-dir and --etcd-endpoints contradict each other: give one")
	case embedded && (c.EtcdCertFile != "" || c.EtcdKeyFile != "" || c.EtcdCAFile != "" || c.EtcdUser != "" || c.EtcdPasswordFile != ""):
		return errors.New("--etcd-cert-file, --etcd-key-file, --etcd-ca-file, --etcd-user and --etcd-password-file go with --etcd-endpoints")
	case (c.EtcdCertFile == "") != (c.EtcdKeyFile == ""):
		return errors.New("--etcd-cert-file and --etcd-key-file go together")
	case (c.EtcdUser == "") != (c.EtcdPasswordFile == ""):
		return errors.New("--etcd-user and --etcd-password-file go together")
	case c.MaxNets < 1 || c.MaxNets > 4096:
		return fmt.Errorf("--max-nets must be from 1 to 4096, not %d", c.MaxNets)
	case c.MaxNetsText < 64 || c.MaxNetsText > 512<<10:
		return fmt.Errorf("--max-nets-text must be from 64 to 524288, not %d", c.MaxNetsText)
	}
	for _, endpoint := range c.EtcdEndpoints {
		plain, ok := strings.CutPrefix(endpoint, "http://")
		if ok && !serve.IsLoopback(plain) && !c.InsecurePlaintext {
			return fmt.Errorf("--etcd-endpoints: %s is plain text beyond this machine; use https://", endpoint)
		}
	}
	return nil
}

// rules are what lists must obey.
func (c *config) rules() (allow.Rules, error) {
	rules := allow.Rules{MaxNets: c.MaxNets, MaxText: c.MaxNetsText}
	for _, text := range c.PermitNets {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return rules, fmt.Errorf("--permit-nets: %q is not a network such as 10.1.0.0/16", text)
		}
		rules.Permit = append(rules.Permit, p)
	}
	return rules, nil
}

// etcd says how to reach a cluster.
func (c *config) etcd() (store.Config, error) {
	cfg := store.Config{Endpoints: c.EtcdEndpoints, User: c.EtcdUser}
	if c.EtcdPasswordFile != "" {
		password, err := os.ReadFile(c.EtcdPasswordFile)
		if err != nil {
			return cfg, fmt.Errorf("--etcd-password-file: %w", err)
		}
		cfg.Password = strings.TrimRight(string(password), "\r\n")
	}
	if c.EtcdCertFile != "" || c.EtcdCAFile != "" || slices.ContainsFunc(c.EtcdEndpoints, func(e string) bool { return strings.HasPrefix(e, "https://") }) {
		info := transport.TLSInfo{CertFile: c.EtcdCertFile, KeyFile: c.EtcdKeyFile, TrustedCAFile: c.EtcdCAFile}
		tlsConfig, err := info.ClientConfig()
		if err != nil {
			return cfg, fmt.Errorf("TLS for etcd: %w", err)
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

// callers reads the table of --callers. In plain text there are no certificates, and whoever reaches the loopback address
// may call everything.
func (c *config) callers() (*serve.Callers, error) {
	if c.InsecurePlaintext {
		return serve.NewCallers(methods(), map[string][]string{
			serve.PlaintextCaller: {policyv1.PolicyService_ServiceDesc.ServiceName + "/*", feedv1.FeedService_ServiceDesc.ServiceName + "/*"},
		})
	}
	data, err := os.ReadFile(c.Callers)
	if err != nil {
		return nil, fmt.Errorf("--callers: %w", err)
	}
	var file struct {
		Callers []struct {
			Name string   `yaml:"name"`
			RPCs []string `yaml:"rpcs"`
		} `yaml:"callers"`
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		return nil, fmt.Errorf("--callers: %s: %w", c.Callers, err)
	}
	grants := make(map[string][]string)
	for _, caller := range file.Callers {
		if _, twice := grants[caller.Name]; twice {
			return nil, fmt.Errorf("--callers: %s: caller %q stands there twice", c.Callers, caller.Name)
		}
		grants[caller.Name] = caller.RPCs
	}
	if len(grants) == 0 {
		return nil, fmt.Errorf("--callers: %s names no caller: nobody could call anything", c.Callers)
	}
	table, err := serve.NewCallers(methods(), grants)
	if err != nil {
		return nil, fmt.Errorf("--callers: %s: %w", c.Callers, err)
	}
	return table, nil
}

// listen opens a TCP listener and names the flag if it cannot.
func listen(ctx context.Context, flag, address string) (net.Listener, error) {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return lis, nil
}
