package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc/credentials"

	"github.com/allowednets/allowednets/internal/hops"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

// flags are the command line. Each has a twin in the environment.
type flags struct {
	serve.LogFlags
	serve.TLSFlags `group:"TLS to the policy service"`

	Listen         string   `env:"ALLOWEDNETS_LISTEN" default:":8080" placeholder:"ADDRESS" help:"Address of the pages, plain HTTP: a proxy in front of them speaks TLS (${default})."`
	AdminListen    string   `env:"ALLOWEDNETS_ADMIN_LISTEN" default:":7492" placeholder:"ADDRESS" help:"Address of health and metrics (${default}). Empty: none."`
	PublicURL      string   `name:"public-url" env:"ALLOWEDNETS_PUBLIC_URL" placeholder:"URL" help:"Where browsers find the dashboard, such as https://lists.example.net."`
	InsecureHTTP   bool     `name:"insecure-http" env:"ALLOWEDNETS_INSECURE_HTTP" help:"Let browsers log in over plain HTTP: passwords and cookies can be read on the way. Only on this machine."`
	TrustedProxies []string `env:"ALLOWEDNETS_TRUSTED_PROXIES" placeholder:"NET,…" help:"Proxies in front of the dashboard whose X-Forwarded-For is believed."`

	PolicyAddress string `env:"ALLOWEDNETS_POLICY_ADDRESS" required:"" placeholder:"HOST:PORT" help:"The policy service."`

	Directory    string `env:"ALLOWEDNETS_DIRECTORY" placeholder:"FILE" help:"YAML file of domains and their mailboxes; read again when it changes."`
	DirectorySQL string `name:"directory-sql" env:"ALLOWEDNETS_DIRECTORY_SQL" placeholder:"FILE" help:"YAML file with the address of a database (PostgreSQL or SQLite) and the queries for domains and mailboxes."`

	Users           string        `env:"ALLOWEDNETS_USERS" placeholder:"FILE" help:"YAML file of local users; read again when it changes. 'allowednets-dashboard hash-password' makes its hashes."`
	SessionIdle     time.Duration `env:"ALLOWEDNETS_SESSION_IDLE" default:"30m" placeholder:"DURATION" help:"A session ends when it was not used for so long (${default})."`
	SessionLifetime time.Duration `env:"ALLOWEDNETS_SESSION_LIFETIME" default:"12h" placeholder:"DURATION" help:"A session ends after so long, used or not (${default})."`

	OIDCIssuer           string   `name:"oidc-issuer" env:"ALLOWEDNETS_OIDC_ISSUER" placeholder:"URL" help:"OpenID provider to log in with, as it calls itself. Its redirect URI is <public-url>${callback}."`
	OIDCClientID         string   `name:"oidc-client-id" env:"ALLOWEDNETS_OIDC_CLIENT_ID" placeholder:"ID" help:"What the provider calls the dashboard."`
	OIDCClientSecretFile string   `name:"oidc-client-secret-file" env:"ALLOWEDNETS_OIDC_CLIENT_SECRET_FILE" placeholder:"FILE" help:"Holds the secret of the client. Default: a public client, protected by PKCE alone."`
	OIDCScopes           []string `name:"oidc-scopes" env:"ALLOWEDNETS_OIDC_SCOPES" default:"profile,email" placeholder:"SCOPE,…" help:"Scopes to ask for beside openid (${default}). Some providers want groups too."`
	OIDCNameClaim        string   `name:"oidc-name-claim" env:"ALLOWEDNETS_OIDC_NAME_CLAIM" default:"email" placeholder:"CLAIM" help:"Claim that names a person in the history of a mailbox (${default}). If it is email, email_verified must be true."`
	OIDCGroupsClaim      string   `name:"oidc-groups-claim" env:"ALLOWEDNETS_OIDC_GROUPS_CLAIM" default:"groups" placeholder:"CLAIM" help:"Claim with a person's groups (${default}); dots lead into objects, as in realm_access.roles."`
	OIDCRoles            string   `name:"oidc-roles" env:"ALLOWEDNETS_OIDC_ROLES" placeholder:"FILE" help:"YAML file: which group has which role in which domains; read again when it changes."`

	Version kong.VersionFlag `help:"Print the version and exit."`
}

// config is what the flags mean.
type config struct {
	flags
	credentials    credentials.TransportCredentials
	trustedProxies hops.Trusted
	publicURL      string        // without a slash at the end; "" if unknown
	oidc           *login.Client // nil without
}

// resolve checks what can be checked before anything is opened. Its errors are of usage.
func (f flags) resolve() (config, error) {
	c := config{flags: f}
	var err error
	if err := f.validateAddresses(); err != nil {
		return config{}, err
	}
	if c.publicURL, err = f.parsePublicURL(); err != nil {
		return config{}, err
	}
	if c.credentials, err = f.Credentials(); err != nil {
		return config{}, err
	}
	if c.trustedProxies, err = hops.Parse(f.TrustedProxies); err != nil {
		return config{}, fmt.Errorf("--trusted-proxies: %w", err)
	}
	switch {
	case (f.Directory == "") == (f.DirectorySQL == ""):
		return config{}, errors.New("give either --directory or --directory-sql: where the domains and mailboxes stand")
	case f.Users == "" && f.OIDCIssuer == "":
		return config{}, errors.New("give --users or --oidc-issuer, or both: otherwise nobody can log in")
	case f.SessionIdle < time.Minute || f.SessionIdle > f.SessionLifetime:
		return config{}, fmt.Errorf("--session-idle=%v must be from 1m to --session-lifetime=%v", f.SessionIdle, f.SessionLifetime)
	case f.SessionLifetime > maxLifetime:
		return config{}, fmt.Errorf("--session-lifetime=%v must be at most %v", f.SessionLifetime, maxLifetime)
	}
	if c.oidc, err = f.client(c.publicURL); err != nil {
		return config{}, err
	}
	return c, nil
}

// maxLifetime bounds how long somebody stays logged in whom an OpenID provider does not know any more.
const maxLifetime = 7 * 24 * time.Hour

func (f flags) validateAddresses() error {
	for _, l := range []struct{ flag, address string }{{"--listen", f.Listen}, {"--admin-listen", f.AdminListen}} {
		if l.address == "" && l.flag == "--admin-listen" {
			continue
		}
		if _, port, err := net.SplitHostPort(l.address); err != nil || port == "" {
			return fmt.Errorf("%s=%q is not of the form [HOST]:PORT", l.flag, l.address)
		}
	}
	if host, port, err := net.SplitHostPort(f.PolicyAddress); err != nil || host == "" || port == "" {
		return fmt.Errorf("--policy-address=%q is not of the form HOST:PORT", f.PolicyAddress)
	}
	if f.InsecureHTTP && !serve.IsLoopback(f.Listen) {
		return fmt.Errorf("--insecure-http works only with a --listen on loopback, such as 127.0.0.1:8080, not with %q: passwords could be read on the way", f.Listen)
	}
	if f.InsecurePlaintext && !serve.IsLoopback(f.PolicyAddress) {
		return fmt.Errorf("--insecure-plaintext works only with a --policy-address on loopback, not with %q", f.PolicyAddress)
	}
	return nil
}

// parsePublicURL returns the origin that browsers see.
func (f flags) parsePublicURL() (string, error) {
	if f.PublicURL == "" {
		if !f.InsecureHTTP {
			return "", errors.New("--public-url is needed, such as https://lists.example.net (or --insecure-http, to try it on this machine)")
		}
		return "", nil
	}
	u, err := url.Parse(f.PublicURL)
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || strings.Trim(u.RequestURI(), "/") != "" || u.Fragment != "":
		return "", fmt.Errorf("--public-url=%.200q is not of the form https://HOST", f.PublicURL)
	case u.Scheme == "http" && !f.InsecureHTTP:
		return "", fmt.Errorf("--public-url=%q is plain HTTP: use https:// (or --insecure-http, to try it on this machine)", f.PublicURL)
	case u.Scheme == "https" && f.InsecureHTTP:
		return "", fmt.Errorf("--insecure-http and --public-url=%q contradict each other: give one or the other", f.PublicURL)
	}
	return u.Scheme + "://" + u.Host, nil
}

// client is how the dashboard speaks with an OpenID provider; nil without one.
func (f flags) client(publicURL string) (*login.Client, error) {
	if f.OIDCIssuer == "" {
		if f.OIDCClientID != "" || f.OIDCClientSecretFile != "" || f.OIDCRoles != "" {
			return nil, errors.New("--oidc-client-id, --oidc-client-secret-file and --oidc-roles go with --oidc-issuer")
		}
		return nil, nil
	}
	u, err := url.Parse(f.OIDCIssuer)
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("--oidc-issuer=%.200q is not of the form https://HOST/PATH", f.OIDCIssuer)
	case u.Scheme == "http" && !(f.InsecureHTTP && serve.IsLoopback(net.JoinHostPort(u.Hostname(), "0"))):
		return nil, fmt.Errorf("--oidc-issuer=%q is plain HTTP: use https://", f.OIDCIssuer)
	case f.OIDCClientID == "":
		return nil, errors.New("--oidc-client-id is needed with --oidc-issuer")
	case f.OIDCRoles == "":
		return nil, errors.New("--oidc-roles is needed with --oidc-issuer: it says which group may do what")
	case publicURL == "":
		return nil, errors.New("--public-url is needed with --oidc-issuer: the provider sends browsers back there")
	case f.OIDCNameClaim == "" || f.OIDCGroupsClaim == "":
		return nil, errors.New("--oidc-name-claim and --oidc-groups-claim must not be empty")
	}
	c := &login.Client{
		Issuer: f.OIDCIssuer, ID: f.OIDCClientID, RedirectURL: publicURL + login.CallbackPath, Scopes: f.OIDCScopes,
		NameClaim: f.OIDCNameClaim, GroupsClaim: f.OIDCGroupsClaim, RolesFile: f.OIDCRoles,
	}
	if f.OIDCClientSecretFile != "" {
		secret, err := os.ReadFile(f.OIDCClientSecretFile)
		if err != nil {
			return nil, fmt.Errorf("--oidc-client-secret-file: %w", err)
		}
		if c.Secret = strings.TrimRight(string(secret), "\r\n"); c.Secret == "" {
			return nil, fmt.Errorf("--oidc-client-secret-file: %s is empty", f.OIDCClientSecretFile)
		}
	}
	return c, nil
}
