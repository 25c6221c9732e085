package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/internal/serve/servetest"
	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// output is what a process writes, readable while it runs.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	usersYAML = `users:
- name: anna
  password: $argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
  auditor: ["*"]
`
	directoryYAML = "domains: {example.org: [alice]}"
	rolesYAML     = `groups: [{name: g, auditor: ["*"]}]`
)

// plain is a command line that works, on loopback and without TLS.
func plain(t *testing.T, more ...string) []string {
	t.Helper()
	return append([]string{
		"--policy-address=127.0.0.1:1", "--insecure-plaintext", "--insecure-http", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0",
		"--directory=" + file(t, directoryYAML), "--users=" + file(t, usersYAML),
	}, more...)
}

// provider is flags of an OpenID provider.
func provider(t *testing.T, more ...string) []string {
	t.Helper()
	return append([]string{
		"--public-url=http://localhost:8080", "--oidc-issuer=https://login.example/realm", "--oidc-client-id=dashboard", "--oidc-roles=" + file(t, rolesYAML),
	}, more...)
}

func TestUsage(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	for _, c := range []struct {
		flags []string
		want  string
	}{
		{[]string{"--no-such-flag"}, "unknown flag --no-such-flag"},
		{[]string{"word"}, "unexpected argument word"},
		{[]string{"--listen="}, "[HOST]:PORT"},
		{[]string{"--listen=8080"}, "[HOST]:PORT"},
		{[]string{"--listen=:8080"}, "--insecure-http works only with a --listen on loopback"},
		{[]string{"--listen=192.0.2.1:8080"}, "--insecure-http works only with a --listen on loopback"},
		{[]string{"--admin-listen=7492"}, "[HOST]:PORT"},
		{[]string{"--policy-address=policy.example"}, "HOST:PORT"},
		{[]string{"--policy-address=policy.example:7443"}, "only with a --policy-address on loopback"},
		{[]string{"--tls-cert-file=x"}, "contradict each other"},
		{[]string{"--log-level=loud"}, "log-level"},
		{[]string{"--public-url=https://lists.example.net"}, "contradict each other"},
		{[]string{"--public-url=lists.example.net"}, "https://HOST"},
		{[]string{"--public-url=http://lists.example.net/path"}, "https://HOST"},
		{[]string{"--public-url=http://u:p@lists.example.net"}, "https://HOST"},
		{[]string{"--public-url=ftp://lists.example.net"}, "https://HOST"},
		{[]string{"--trusted-proxies=0.0.0.0/0"}, "--trusted-proxies: "},
		{[]string{"--directory-sql=x"}, "either --directory or --directory-sql"},
		{[]string{"--directory="}, "either --directory or --directory-sql"},
		{[]string{"--users="}, "otherwise nobody can log in"},
		{[]string{"--session-idle=1s"}, "--session-idle=1s"},
		{[]string{"--session-idle=13h"}, "--session-idle=13h"},
		{[]string{"--session-lifetime=720h"}, "--session-lifetime=720h"},
		{[]string{"--oidc-client-id=x"}, "go with --oidc-issuer"},
		{provider(t, "--oidc-issuer=http://login.example"), "is plain HTTP"},
		{provider(t, "--oidc-issuer=login.example"), "https://HOST/PATH"},
		{provider(t, "--oidc-issuer=https://login.example?x"), "https://HOST/PATH"},
		{provider(t, "--oidc-client-id="), "--oidc-client-id is needed"},
		{provider(t, "--oidc-roles="), "--oidc-roles is needed"},
		{provider(t, "--public-url="), "--public-url is needed with --oidc-issuer"},
		{provider(t, "--oidc-name-claim="), "must not be empty"},
		{provider(t, "--oidc-client-secret-file="+missing), "no such file"},
		{provider(t, "--oidc-client-secret-file="+file(t, "\n")), "is empty"},
	} {
		var stdout, stderr output
		code := run(t.Context(), plain(t, c.flags...), &stdout, &stderr)
		if got := stderr.String(); code != 2 || !strings.Contains(got, c.want) || strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "allowednets-dashboard: ") || stdout.String() != "" {
			t.Errorf("%q: exit code %d\n%s%s", c.flags, code, stdout.String(), got)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "--policy-address"},
		{[]string{"--policy-address=localhost:7443"}, "--public-url is needed"},
		{[]string{"--policy-address=localhost:7443", "--public-url=http://lists.example.net"}, "is plain HTTP"},
		{[]string{"--policy-address=localhost:7443", "--public-url=https://lists.example.net"}, "--tls-cert-file, --tls-key-file and --tls-ca-file are all needed"},
	} {
		var stdout, stderr output
		if code := run(t.Context(), c.args, &stdout, &stderr); code != 2 || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%q: exit code %d\n%s", c.args, code, stderr.String())
		}
	}
}

// TestBroken: what stops the start after the flags were read, and names the flag or the file.
func TestBroken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for flag, want := range map[string]string{
		"--listen=" + taken.Addr().String():                      "--listen: listen tcp",
		"--admin-listen=" + taken.Addr().String():                "--admin-listen: listen tcp",
		"--directory=" + file(t, "domains: {a..b: []}"):          "--directory: ",
		"--users=" + file(t, "users:\n- {name: x, auditor: []}"): "line 2",
		"--users=" + file(t, usersYAML) + ".missing":             "no such file",
	} {
		var stdout, stderr output
		if code := run(t.Context(), plain(t, flag), &stdout, &stderr); code != 1 || !strings.Contains(stderr.String(), want) || strings.Count(stderr.String(), "\n") != 1 {
			t.Errorf("%s: exit code %d\n%s", flag, code, stderr.String())
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	for flag, want := range map[string]string{"--help": "--policy-address=HOST:PORT", "--version": serve.Version()} {
		var stdout, stderr output
		if code := run(t.Context(), []string{flag}, &stdout, &stderr); code != 0 || !strings.Contains(stdout.String(), want) || stderr.String() != "" {
			t.Errorf("%s: exit code %d\n%s%s", flag, code, stdout.String(), stderr.String())
		}
	}
}

// TestTwins: every flag can be given in the environment, under the name that one expects.
func TestTwins(t *testing.T) {
	var f flags
	parser, err := kong.New(&f, kong.Vars{"callback": login.CallbackPath})
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range parser.Model.Flags {
		want := "ALLOWEDNETS_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		if flag.Name != "help" && flag.Name != "version" && !slices.Equal(flag.Envs, []string{want}) {
			t.Errorf("--%s has the twins %q; want %q", flag.Name, flag.Envs, want)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Setenv("ALLOWEDNETS_OIDC_SCOPES", "email,groups")
	t.Setenv("ALLOWEDNETS_TRUSTED_PROXIES", "10.1.0.0/16, 10.9.9.9")
	t.Setenv("ALLOWEDNETS_OIDC_CLIENT_SECRET_FILE", file(t, " s3cret \n"))
	var f flags
	parser, err := kong.New(&f, kong.Vars{"callback": login.CallbackPath})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(append(plain(t), provider(t, "--public-url=http://localhost:8080/")...)); err != nil {
		t.Fatal(err)
	}
	c, err := f.resolve()
	if err != nil {
		t.Fatal(err)
	}
	if c.publicURL != "http://localhost:8080" || fmt.Sprint(c.trustedProxies) != "[10.1.0.0/16 10.9.9.9/32]" || c.SessionIdle != 30*time.Minute || c.SessionLifetime != 12*time.Hour ||
		c.oidc.Secret != " s3cret " || c.oidc.RedirectURL != "http://localhost:8080/login/oidc/callback" || fmt.Sprint(c.oidc.Scopes) != "[email groups]" ||
		c.oidc.NameClaim != "email" || c.oidc.GroupsClaim != "groups" {
		t.Errorf("%+v\n%+v", c, c.oidc)
	}
}

// TestProcess: a dashboard starts without its policy service, answers, and stops.
func TestProcess(t *testing.T) {
	for name, change := range map[string][]string{
		"file": nil,
		"sql":  {"--directory=", "--directory-sql=" + file(t, "dsn: sqlite:none.db\ndomains: SELECT 'a.example', 1\nmailboxes: SELECT @domain")},
		"oidc": provider(t, "--users="),
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var stdout, stderr output
			ended := make(chan int)
			go func() { ended <- run(ctx, plain(t, append(change, "--log-format=text")...), &stdout, &stderr) }()
			address := func(key string) string {
				pattern := regexp.MustCompile(`msg="the dashboard started".* ` + key + `=(\S+)`)
				deadline := time.NewTimer(20 * time.Second)
				defer deadline.Stop()
				for {
					if m := pattern.FindStringSubmatch(stderr.String()); m != nil {
						return m[1]
					}
					select {
					case <-deadline.C:
						t.Fatalf("it does not start:\n%s", stderr.String())
					case <-time.After(10 * time.Millisecond):
					}
				}
			}
			get := func(url string) (int, string) {
				transport := &http.Transport{DisableKeepAlives: true}
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := transport.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = resp.Body.Close() }()
				body, _ := io.ReadAll(resp.Body)
				return resp.StatusCode, string(body)
			}
			if code, _ := get("http://" + address("address") + "/"); code >= 500 {
				t.Errorf("the first page: %d", code)
			}
			admin := "http://" + address("admin_address")
			var healthy, unhealthy output
			if code := run(t.Context(), []string{"healthcheck", "--admin-listen=" + address("admin_address")}, &healthy, &unhealthy); code != 0 || healthy.String() != "ok\n" {
				t.Errorf("healthcheck: %d, %s%s", code, healthy.String(), unhealthy.String())
			}
			if code, body := get(admin + "/readyz"); code != 200 {
				t.Errorf("readiness: %d %s", code, body)
			}
			if _, body := get(admin + "/metrics"); !strings.Contains(body, "\nallowednets_dashboard_sessions 0\n") {
				t.Errorf("metrics:\n%s", body)
			}
			cancel()
			if code := <-ended; code != 0 || !strings.Contains(stderr.String(), "the dashboard stopped") {
				t.Errorf("exit code %d\n%s", code, stderr.String())
			}
		})
	}
}

func TestHashPassword(t *testing.T) {
	for input, want := range map[string]int{"secret\n": 0, "secret": 0, "sécret words\r\n": 0, "": 2, "\n": 2, "a\x00b\n": 2} {
		var stdout, stderr output
		code := hashPassword(nil, strings.NewReader(input), &stdout, &stderr)
		if code != want || strings.HasPrefix(stdout.String(), "$argon2id$") != (want == 0) || strings.Contains(stdout.String()+stderr.String(), "cret") {
			t.Errorf("%q: %d\n%s%s", input, code, stdout.String(), stderr.String())
		}
	}
	for arg, want := range map[string]int{"--help": 0, "secret": 2} {
		var stdout, stderr output
		if code := hashPassword([]string{arg}, strings.NewReader(""), &stdout, &stderr); code != want || !strings.Contains(stderr.String(), "Usage") {
			t.Errorf("%s: %d\n%s", arg, code, stderr.String())
		}
	}
}

// TestCertificateMetrics: whoever looks after the dashboard sees when its certificate expires.
func TestCertificateMetrics(t *testing.T) {
	authority := servetest.NewAuthority(t)
	files := authority.Flags(authority.Named("dashboard"))
	var f flags
	parser, err := kong.New(&f, kong.Vars{"callback": login.CallbackPath})
	if err != nil {
		t.Fatal(err)
	}
	args := append(plain(t), "--insecure-plaintext=false", "--tls-cert-file="+files.TLSCertFile, "--tls-key-file="+files.TLSKeyFile, "--tls-ca-file="+files.TLSCAFile)
	if _, err := parser.Parse(args); err != nil {
		t.Fatal(err)
	}
	cfg, err := f.resolve()
	if err != nil {
		t.Fatal(err)
	}
	p, err := build(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if n, err := testutil.GatherAndCount(p.registry, "allowednets_tls_files_usable", "allowednets_tls_certificate_expiry_timestamp_seconds"); n != 2 || err != nil {
		t.Errorf("%d metrics, %v", n, err)
	}
}
