package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/internal/serve/servetest"
)

// flagsThatWork is a command line that works, flag by flag.
func flagsThatWork(t *testing.T) map[string]string {
	t.Helper()
	a := servetest.NewAuthority(t)
	files := a.Flags(a.Named("policy"))
	return map[string]string{
		"--listen": "127.0.0.1:0", "--admin-listen": "127.0.0.1:0", "--data-dir": t.TempDir(),
		"--tls-cert-file": files.TLSCertFile, "--tls-key-file": files.TLSKeyFile, "--tls-ca-file": files.TLSCAFile,
		"--callers": file(t, "callers:\n  - name: admin\n    rpcs: [allowednets.policy.v1.PolicyService/*]\n"),
	}
}

// file writes a file and returns its path.
func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// changed returns base with flags changed, added or, where the value is "-", taken away.
func changed(base map[string]string, changes ...string) []string {
	args := make([]string, 0, len(base)+len(changes)/2)
	for flag, value := range base {
		if !slices.Contains(changes, flag) {
			args = append(args, flag+"="+value)
		}
	}
	for i := 0; i < len(changes); i += 2 {
		if changes[i+1] != "-" {
			args = append(args, changes[i]+"="+changes[i+1])
		}
	}
	return args
}

// parse parses and resolves a command line as run does.
func parse(t *testing.T, args []string) (config, error) {
	t.Helper()
	var f flags
	parser, err := kong.New(&f, kong.Vars{"version": "v1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(args); err != nil {
		return config{}, err
	}
	return f.resolve()
}

func TestCommandLinesThatWork(t *testing.T) {
	work := flagsThatWork(t)
	plain := changed(work, "--tls-cert-file", "-", "--tls-key-file", "-", "--tls-ca-file", "-", "--callers", "-")
	cluster := func(more ...string) []string { return changed(work, append(more, "--data-dir", "-")...) }
	for name, args := range map[string][]string{
		"all":                   changed(work),
		"plain text":            append(plain, "--insecure-plaintext"),
		"a cluster":             cluster("--etcd-endpoints", "https://a.example:2379,https://[2001:db8::1]:2379/"),
		"a cluster with files":  cluster("--etcd-endpoints", "https://a:2379", "--etcd-cert-file", work["--tls-cert-file"], "--etcd-key-file", work["--tls-key-file"], "--etcd-ca-file", work["--tls-ca-file"]),
		"a cluster with a user": cluster("--etcd-endpoints", "https://a:2379", "--etcd-user", "policy", "--etcd-password-file", file(t, "secret\n")),
		"etcd beside us":        cluster("--etcd-endpoints", "http://127.0.0.1:2379,http://localhost:2379,http://[::1]:2379"),
		"permitted nets":        changed(work, "--permit-nets", "10.0.0.0/8, fd00::/8"),
		"limits":                changed(work, "--max-nets", "4096", "--max-nets-text", "524288"),
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := parse(t, args)
			if err != nil || cfg.credentials == nil || cfg.callers.rpcs == nil || cfg.rules.MaxNets == 0 {
				t.Errorf("%+v, %v", cfg, err)
			}
			for _, endpoint := range cfg.store.Endpoints {
				if tls := cfg.store.TLS != nil; tls != strings.HasPrefix(endpoint, "https:") {
					t.Errorf("TLS for %s is %v", endpoint, tls)
				}
			}
		})
	}
	cfg, err := parse(t, cluster("--etcd-endpoints", "https://a:2379", "--etcd-user", "policy", "--etcd-password-file", file(t, " secret \r\n")))
	if err != nil || cfg.store.User != "policy" || cfg.store.Password != " secret " {
		t.Errorf("user %q, password %q, %v", cfg.store.User, cfg.store.Password, err)
	}
	if cfg, err = parse(t, changed(work, "--permit-nets", "10.0.0.0/8, fd00::/8")); err != nil || len(cfg.rules.Permit) != 2 {
		t.Errorf("permitted %v, %v", cfg.rules.Permit, err)
	}
}

// TestCommandLinesThatCannotWork shows that each ends at once, with code 2 and one sentence that names what is wrong.
func TestCommandLinesThatCannotWork(t *testing.T) {
	work := flagsThatWork(t)
	cluster := []string{"--data-dir", "-", "--etcd-endpoints", "https://a:2379"}
	at := func(endpoints string) []string { return []string{"--data-dir", "-", "--etcd-endpoints", endpoints} }
	plain := []string{
		"--tls-cert-file", "-", "--tls-key-file", "-", "--tls-ca-file", "-", "--callers", "-", "--insecure-plaintext", "true",
	}
	for name, test := range map[string]struct {
		changes []string
		want    string
	}{
		"unknown flag":         {[]string{"--listn", "x"}, "--listn"},
		"no number":            {[]string{"--max-nets", "many"}, "--max-nets"},
		"no collector":         {[]string{"--trace-endpoint", "collector:4317"}, "https://collector:4317"},
		"collector in plain":   {[]string{"--trace-endpoint", "http://collector:4317"}, "plain text"},
		"unknown service":      {[]string{"--restrict-services", "imap"}, "--restrict-services: imap"},
		"no epoch":             {[]string{"--raise-epoch-to", "-1"}, "--raise-epoch-to"},
		"unknown level":        {[]string{"--log-level", "loud"}, "--log-level"},
		"unknown format":       {[]string{"--log-format", "xml"}, "--log-format"},
		"address without port": {[]string{"--listen", "127.0.0.1"}, `--listen="127.0.0.1"`},
		"port alone":           {[]string{"--listen", "7443"}, `--listen="7443"`},
		"empty address":        {[]string{"--listen", ""}, `--listen=""`},
		"empty port":           {[]string{"--admin-listen", "127.0.0.1:"}, `--admin-listen="127.0.0.1:"`},

		"plain text on every address":  {append(plain, "--listen", ":7443"), "loopback"},
		"plain text on another host":   {append(plain, "--listen", "192.0.2.1:7443"), "192.0.2.1:7443"},
		"plain text and callers":       {append(plain, "--callers", work["--callers"]), "--callers and --insecure-plaintext contradict"},
		"plain text and a certificate": {append(plain, "--tls-cert-file", work["--tls-cert-file"]), "--insecure-plaintext and --tls-*-file contradict"},
		"neither TLS nor plain text":   {append(slices.Clone(plain[:6]), "--callers", work["--callers"]), "--insecure-plaintext"},
		"no key":                       {[]string{"--tls-key-file", "-"}, "all needed"},
		"missing certificate":          {[]string{"--tls-cert-file", "/nowhere/cert.pem"}, "/nowhere/cert.pem"},
		"a key that is none":           {[]string{"--tls-key-file", work["--callers"]}, "key"},

		// As from a variable that is set to nothing; not the current folder.
		"empty folder":             {[]string{"--data-dir", ""}, "give --data-dir"},
		"empty certificate":        {[]string{"--tls-cert-file", ""}, "all needed"},
		"empty callers":            {[]string{"--callers", ""}, "--callers is needed"},
		"no store":                 {[]string{"--data-dir", "-"}, "--data-dir"},
		"two stores":               {[]string{"--etcd-endpoints", "https://a:2379"}, "contradict"},
		"etcd user of our own":     {[]string{"--etcd-user", "root"}, "go with --etcd-endpoints"},
		"etcd password of our own": {[]string{"--etcd-password-file", work["--callers"]}, "go with --etcd-endpoints"},
		"etcd CA of our own":       {[]string{"--etcd-ca-file", work["--tls-ca-file"]}, "go with --etcd-endpoints"},
		"etcd user alone":          {append(cluster, "--etcd-user", "root"), "--etcd-user and --etcd-password-file go together"},
		"etcd password alone":      {append(cluster, "--etcd-password-file", work["--callers"]), "go together"},
		"etcd certificate alone":   {append(cluster, "--etcd-cert-file", work["--tls-cert-file"]), "go together"},
		"missing etcd password":    {append(cluster, "--etcd-user", "root", "--etcd-password-file", "/nowhere/password"), "/nowhere/password"},
		"empty etcd password":      {append(cluster, "--etcd-user", "root", "--etcd-password-file", file(t, "\n")), "is empty"},
		"missing etcd CA":          {append(cluster, "--etcd-ca-file", "/nowhere/ca.pem"), "/nowhere/ca.pem"},
		"etcd files unused":        {append(at("http://127.0.0.1:2379"), "--etcd-ca-file", work["--tls-ca-file"]), "go with https://"},
		"etcd in plain text":       {at("http://192.0.2.1:2379"), "plain text"},
		"one in plain text":        {at("https://a:2379,http://b:2379"), "plain text"},
		// The first endpoint's scheme would decide for all.
		"mixed schemes":            {at("http://127.0.0.1:2379,https://b:2379"), "all https://"},
		"etcd without a scheme":    {at("192.0.2.1:2379"), "192.0.2.1:2379"}, // would be plain text
		"etcd without a scheme, 2": {at("etcd.example:2379"), "etcd.example:2379"},
		"etcd without a port":      {at("https://a"), "https://HOST:PORT"},
		"etcd with a path":         {at("https://a:2379/v3"), "https://HOST:PORT"},
		"etcd with a query":        {at("https://a:2379?x=y"), "https://HOST:PORT"},
		"another protocol":         {at("unix:///run/etcd.sock"), "https://HOST:PORT"},
		"yet another":              {at("tcp://192.0.2.1:2379"), "https://HOST:PORT"},
		"an empty endpoint":        {at("https://a:2379,,"), "https://HOST:PORT"},

		"no entries":           {[]string{"--max-nets", "0"}, "--max-nets"},
		"too many entries":     {[]string{"--max-nets", "4097"}, "4097"},
		"no text":              {[]string{"--max-nets-text", "63"}, "--max-nets-text"},
		"too much text":        {[]string{"--max-nets-text", "524289"}, "524289"},
		"permitted address":    {[]string{"--permit-nets", "10.0.0.1"}, `"10.0.0.1"`},
		"permitted host bits":  {[]string{"--permit-nets", "10.0.0.1/8"}, `"10.0.0.1/8"`},
		"permitted mapped net": {[]string{"--permit-nets", "::ffff:10.0.0.0/104"}, "--permit-nets"},

		"no callers": {[]string{"--callers", "-"}, "--callers"},
	} {
		t.Run(name, func(t *testing.T) {
			cannotWork(t, changed(work, test.changes...), test.want)
		})
	}
	t.Run("what is no flag", func(t *testing.T) { cannotWork(t, append(changed(work), "serve"), "serve") })
	t.Run("nothing", func(t *testing.T) { cannotWork(t, nil, "--callers") })
	t.Run("a password in an endpoint", func(t *testing.T) {
		if said := cannotWork(t, changed(work, at("https://root:secret@a:2379")...), "--etcd-password-file"); strings.Contains(said, "secret") {
			t.Errorf("it repeats the password: %s", said)
		}
	})
}

// cannotWork runs the process and returns what it said.
func cannotWork(t *testing.T, args []string, want string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // were it to start, it would stop at once
	code := run(ctx, args, &stdout, &stderr)
	said := stderr.String()
	if code != serve.ExitUsage || stdout.Len() > 0 || !strings.HasPrefix(said, "allowednets-policy: ") || !strings.Contains(said, want) ||
		strings.Count(said, "\n") != 1 {
		t.Errorf("code %d, output %q, want one sentence with %q:\n%s", code, stdout.String(), want, said)
	}
	return said
}

func TestCallersFile(t *testing.T) {
	work := flagsThatWork(t)
	const admin = "callers:\n  - name: admin\n    rpcs: [allowednets.policy.v1.PolicyService/*]\n"
	for name, content := range map[string]string{
		"service": admin,
		"RPC":     "callers: [{name: admin, rpcs: [allowednets.policy.v1.PolicyService/SetAllowedNets]}]",
		"two":     admin + "  - name: sidecar\n    rpcs:\n      - allowednets.feed.v1.FeedService/Sync\n",
		"domains": "callers: [{name: reseller, rpcs: [allowednets.policy.v1.PolicyService/*], domains: [Example.ORG, bücher.example]}]",
		"comment": "# Who may do what.\n---\n" + admin,
		"URI":     "callers: [{name: 'spiffe://example.org/admin', rpcs: [allowednets.policy.v1.PolicyService/*]}]",
	} {
		t.Run(name, func(t *testing.T) {
			if cfg, err := parse(t, changed(work, "--callers", file(t, content))); err != nil || cfg.callers.rpcs == nil {
				t.Error(err)
			}
		})
	}
	for name, test := range map[string]struct{ content, want string }{
		"empty":              {"", "names no caller"},
		"comment only":       {"# nobody yet\n", "names no caller"},
		"no callers":         {"callers: []\n", "names no caller"},
		"no list":            {"callers: admin\n", "line 1"},
		"not YAML":           {"callers: [\n", "line"},
		"binary":             {"\x00\x01\xff", "control characters"},
		"unknown key":        {"callers: []\nrpcs: []\n", "rpcs"},
		"unknown keys":       {"callers:\n  - name: a\n    rpc: []\n    nets: []\n", "line 3"},
		"twice":              {admin + admin[len("callers:\n"):], `"admin" stands there twice`},
		"key twice":          {"callers:\n  - name: a\n    name: b\n", "name"},
		"second document":    {admin + "---\n" + admin, "more than one"},
		"broken second":      {admin + "---\n[", "more than one"},
		"no name":            {"callers:\n  - rpcs: [allowednets.policy.v1.PolicyService/*]\n", "without a name"},
		"no RPCs":            {"callers:\n  - name: admin\n", `"admin" may call no rpcs`},
		"unknown RPC":        {"callers: [{name: admin, rpcs: [allowednets.policy.v1.PolicyService/Set]}]", "PolicyService/SetAllowedNets"},
		"unknown service":    {"callers: [{name: admin, rpcs: [allowednets.policy.v2.PolicyService/*]}]", "v2"},
		"everything":         {"callers: [{name: admin, rpcs: ['*']}]", `"*"`},
		"with leading slash": {"callers: [{name: admin, rpcs: [/allowednets.policy.v1.PolicyService/SetAllowedNets]}]", "there is no RPC"},
		"one good, one bad":  {"callers: [{name: admin, rpcs: [allowednets.policy.v1.PolicyService/*, x]}]", `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			path := file(t, test.content)
			if said := cannotWork(t, changed(work, "--callers", path), test.want); !strings.Contains(said, path) {
				t.Errorf("it does not name the file: %s", said)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		cannotWork(t, changed(work, "--callers", "/nowhere/callers.yaml"), "/nowhere/callers.yaml")
	})
	t.Run("a folder", func(t *testing.T) { cannotWork(t, changed(work, "--callers", t.TempDir()), "--callers") })
}

func TestVersion(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"--version"}, &stdout, &stderr); code != 0 || stdout.String() != serve.Version()+"\n" {
		t.Errorf("code %d, %q, %s", code, &stdout, &stderr)
	}
}

func TestHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"--help"}, &stdout, &stderr); code != 0 || stderr.Len() > 0 {
		t.Errorf("code %d, %s", code, stderr.String())
	}
	for _, flag := range []string{"--create-store", "--callers", "--insecure-plaintext", "ALLOWEDNETS_DATA_DIR"} {
		if !strings.Contains(stdout.String(), flag) {
			t.Errorf("no %s in:\n%s", flag, stdout.String())
		}
	}
}

func TestHealthcheck(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"healthcheck", "--admin-listen=127.0.0.1:1"}, &stdout, &stderr); code != 1 || !strings.Contains(stderr.String(), "refused") {
		t.Errorf("code %d, %s%s", code, stdout.String(), stderr.String())
	}
}

// TestEveryFlagHasItsVariable also shows that the variables are read.
func TestEveryFlagHasItsVariable(t *testing.T) {
	var f flags
	parser, err := kong.New(&f)
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range parser.Model.Flags {
		want := "ALLOWEDNETS_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		if flag.Name != "help" && flag.Name != "version" && !slices.Equal(flag.Envs, []string{want}) {
			t.Errorf("--%s has the variables %q, want %q", flag.Name, flag.Envs, want)
		}
		if flag.Help == "" || !regexp.MustCompile(`[.]$`).MatchString(flag.Help) && flag.Name != "help" {
			t.Errorf("--%s is explained by %q", flag.Name, flag.Help)
		}
	}
	for flag, value := range flagsThatWork(t) {
		t.Setenv("ALLOWEDNETS_"+strings.ToUpper(strings.ReplaceAll(flag[2:], "-", "_")), value)
	}
	t.Setenv("ALLOWEDNETS_MAX_NETS", "17")
	if cfg, err := parse(t, nil); err != nil || cfg.rules.MaxNets != 17 {
		t.Errorf("%+v, %v", cfg, err)
	}
}
