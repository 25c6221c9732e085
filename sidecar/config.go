package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc/credentials"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/hops"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/session"
)

// flags are the command line. Each has a twin in the environment.
type flags struct {
	serve.LogFlags
	serve.TLSFlags

	PolicyAddress string `env:"ALLOWEDNETS_POLICY_ADDRESS" required:"" placeholder:"HOST:PORT" help:"The policy service."`
	AcceptCluster string `env:"ALLOWEDNETS_ACCEPT_CLUSTER" placeholder:"ID" help:"Id (hexadecimal, as logged) of a store that may replace the one the sidecar's state came from."`
	ID            string `name:"id" env:"ALLOWEDNETS_ID" placeholder:"NAME" help:"The sidecar's name, unique among sidecars. Default: the host name."`

	StateDir string `env:"ALLOWEDNETS_STATE_DIR" placeholder:"DIR" help:"Directory of the last known good state, which the sidecar enforces when it starts and no policy service answers. Made if it does not exist; for this process alone. Default: none is kept."`

	Socket      string `env:"ALLOWEDNETS_SOCKET" default:"/run/allowednets/sidecar.sock" placeholder:"PATH" help:"Unix socket of the gRPC and HTTP APIs (${default}); mode 0660. Empty: none."`
	GRPCListen  string `name:"grpc-listen" env:"ALLOWEDNETS_GRPC_LISTEN" placeholder:"ADDRESS" help:"Loopback address of the gRPC API. Default: none."`
	HTTPListen  string `name:"http-listen" env:"ALLOWEDNETS_HTTP_LISTEN" default:"127.0.0.1:7480" placeholder:"ADDRESS" help:"Loopback address of the HTTP API and of the doors for Dovecot and nginx (${default}). Empty: none. A socket that systemd passes takes the place of each of these four."`
	AdminListen string `env:"ALLOWEDNETS_ADMIN_LISTEN" default:":7491" placeholder:"ADDRESS" help:"Address of health and metrics (${default}). Empty: none."`

	HTTPTokenFile  string   `name:"http-token-file" env:"ALLOWEDNETS_HTTP_TOKEN_FILE" placeholder:"FILE" help:"Holds the bearer token that every request to --http-listen must carry. Default: none is needed."`
	TrustedProxies []string `env:"ALLOWEDNETS_TRUSTED_PROXIES" placeholder:"NET,…" help:"Load balancers and webmail servers whose word is believed: for nginx and Envoy about the client's address (X-Forwarded-For, read from the right to the first that is not one of them), for Dovecot about the service they log in for (x-forward-via). Default: nobody."`

	NginxBackends    []string `name:"nginx-backend" env:"ALLOWEDNETS_NGINX_BACKEND" placeholder:"PROTOCOL=IP:PORT,…" help:"Mail servers behind nginx's mail proxy, such as imap=192.0.2.10:143; PROTOCOL is imap, pop3 or smtp. Default: none, and nobody gets through /nginx/mail."`
	EnvoyMailboxFrom string   `env:"ALLOWEDNETS_ENVOY_MAILBOX_FROM" placeholder:"header:NAME|extension:KEY" help:"Where a request through Envoy names the mailbox: a header that Envoy overwrites, or a context extension of the route. Default: nowhere, and Envoy's requests are refused."`

	DefaultDomain    string        `env:"ALLOWEDNETS_DEFAULT_DOMAIN" placeholder:"DOMAIN" help:"Domain of mailbox names that come without one. Default: they are refused."`
	RestrictServices []string      `env:"ALLOWEDNETS_RESTRICT_SERVICES" placeholder:"SERVICE,…" help:"Services to restrict beyond imap, pop3, managesieve and webmail. Only smtp-submission can be."`
	DenyAfter        time.Duration `env:"ALLOWEDNETS_DENY_AFTER" placeholder:"DURATION" help:"Deny restricted services when the data is older than this, or of unknown age, as what --state-dir holds is until a policy service confirms it. Default: never."`
	DenialText       string        `env:"ALLOWEDNETS_DENIAL_TEXT" default:"${denial_text}" placeholder:"TEXT" help:"What a person reads in the mail client; {address} stands for the client's address. Empty: a denial looks like a wrong password. Default: ${denial_text}"`

	DoveadmURL     string `name:"doveadm-url" env:"ALLOWEDNETS_DOVEADM_URL" placeholder:"URL" help:"Dovecot's HTTP API, on loopback or with https, such as http://127.0.0.1:7482: sessions that a list does not permit any more are ended. Default: they stay open."`
	DoveadmKeyFile string `env:"ALLOWEDNETS_DOVEADM_KEY_FILE" placeholder:"FILE" help:"Holds Dovecot's doveadm_api_key. Needed with --doveadm-url."`

	Version kong.VersionFlag `help:"Print the version and exit."`
}

// config is what the flags mean.
type config struct {
	flags
	acceptCluster  uint64
	trustedProxies hops.Trusted
	nginxBackends  map[string]netip.AddrPort
	mailboxFrom    check.MailboxFrom
	scope          allow.Scope
	defaultDomain  string
	token          string
	doveadm        *session.Doveadm // nil: none
	credentials    credentials.TransportCredentials
}

// resolve checks what can be checked before anything is opened. Its errors are of usage.
func (f flags) resolve() (config, error) {
	c := config{flags: f}
	var err error
	if c.ID == "" {
		if c.ID, err = os.Hostname(); err != nil {
			return config{}, fmt.Errorf("--id is not given and the host has no name: %w", err)
		}
	}
	if len(c.ID) > 255 || !utf8.ValidString(c.ID) || strings.ContainsFunc(c.ID, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return config{}, fmt.Errorf("--id=%.60q must be 1 to 255 printable characters", c.ID)
	}
	if host, port, err := net.SplitHostPort(f.PolicyAddress); err != nil || host == "" || port == "" {
		return config{}, fmt.Errorf("--policy-address=%q is not of the form HOST:PORT", f.PolicyAddress)
	}
	if f.InsecurePlaintext && !serve.IsLoopback(f.PolicyAddress) {
		return config{}, fmt.Errorf("--insecure-plaintext works only with a --policy-address on loopback, not with %q", f.PolicyAddress)
	}
	if c.credentials, err = f.Credentials(); err != nil {
		return config{}, err
	}
	if f.AcceptCluster != "" {
		if c.acceptCluster, err = strconv.ParseUint(f.AcceptCluster, 16, 64); err != nil || c.acceptCluster == 0 {
			return config{}, fmt.Errorf("--accept-cluster=%q is no store's id: it is the hexadecimal number in the log line that asks for it", f.AcceptCluster)
		}
	}
	if f.Socket == "" && f.GRPCListen == "" && f.HTTPListen == "" {
		return config{}, errors.New("--socket, --grpc-listen and --http-listen are all empty: nobody could ask anything")
	}
	for _, listen := range []struct{ flag, address string }{{"--grpc-listen", f.GRPCListen}, {"--http-listen", f.HTTPListen}} {
		if listen.address != "" && !serve.IsLoopback(listen.address) {
			return config{}, fmt.Errorf("%s=%q is not on loopback, such as 127.0.0.1:7480: whoever reaches it learns who is restricted", listen.flag, listen.address)
		}
	}
	if f.AdminListen != "" {
		if _, _, err := net.SplitHostPort(f.AdminListen); err != nil {
			return config{}, fmt.Errorf("--admin-listen=%q is not of the form [HOST]:PORT", f.AdminListen)
		}
	}
	if f.DefaultDomain != "" {
		if c.defaultDomain, err = allow.ParseDomain(f.DefaultDomain); err != nil {
			return config{}, fmt.Errorf("--default-domain: %w", err)
		}
	}
	if c.scope, err = allow.ParseScope(f.RestrictServices); err != nil {
		return config{}, fmt.Errorf("--restrict-services: %w", err)
	}
	if c.trustedProxies, err = hops.Parse(f.TrustedProxies); err != nil {
		return config{}, fmt.Errorf("--trusted-proxies: %w", err)
	}
	if c.nginxBackends, err = parseBackends(f.NginxBackends); err != nil {
		return config{}, fmt.Errorf("--nginx-backend: %w", err)
	}
	if f.EnvoyMailboxFrom != "" {
		if c.mailboxFrom, err = check.ParseMailboxFrom(f.EnvoyMailboxFrom); err != nil {
			return config{}, fmt.Errorf("--envoy-mailbox-from: %w", err)
		}
	}
	if f.DenyAfter < 0 || f.DenyAfter > 0 && f.DenyAfter < minDenyAfter {
		return config{}, fmt.Errorf("--deny-after=%v must be at least %v: the data's age is measured every 5 s", f.DenyAfter, minDenyAfter)
	}
	if err := check.ValidateDenialText(f.DenialText); err != nil {
		return config{}, fmt.Errorf("--denial-text: %w", err)
	}
	if f.HTTPTokenFile != "" {
		if c.token, err = readToken(f.HTTPTokenFile); err != nil {
			return config{}, fmt.Errorf("--http-token-file: %w", err)
		}
	}
	if (f.DoveadmURL == "") != (f.DoveadmKeyFile == "") {
		return config{}, errors.New("--doveadm-url and --doveadm-key-file need each other")
	}
	if f.DoveadmURL != "" {
		key, err := readToken(f.DoveadmKeyFile)
		if err != nil {
			return config{}, fmt.Errorf("--doveadm-key-file: %w", err)
		}
		if c.doveadm, err = session.NewDoveadm(f.DoveadmURL, key); err != nil {
			return config{}, fmt.Errorf("--doveadm-url: %w", err)
		}
	}
	return c, nil
}

// minDenyAfter leaves room for a few lost answers.
const minDenyAfter = 15 * time.Second

// parseBackends reads the servers behind nginx. nginx takes addresses only, no names.
func parseBackends(texts []string) (map[string]netip.AddrPort, error) {
	backends := make(map[string]netip.AddrPort, len(texts))
	for _, text := range texts {
		protocol, address, _ := strings.Cut(strings.TrimSpace(text), "=")
		backend, err := netip.ParseAddrPort(address)
		switch {
		case protocol != "imap" && protocol != "pop3" && protocol != "smtp":
			return nil, fmt.Errorf("%.60q does not begin with imap=, pop3= or smtp=", text)
		case err != nil || backend.Port() == 0 || backend.Addr().Zone() != "":
			return nil, fmt.Errorf("%.60q has no IP address and port behind the =, as in imap=192.0.2.10:143 or imap=[2001:db8::10]:143", text)
		case backends[protocol].IsValid():
			return nil, fmt.Errorf("%s is there twice", protocol)
		}
		backends[protocol] = netip.AddrPortFrom(backend.Addr().Unmap(), backend.Port())
	}
	return backends, nil
}

// readToken reads a bearer token, which must be what a header can carry.
func readToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s must hold one token of printable ASCII characters without spaces", path)
	}
	return token, nil
}
