package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
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

// plain is a command line that works, with everything on loopback and without TLS.
func plain(t *testing.T, more ...string) []string {
	t.Helper()
	return append([]string{
		"--policy-address=127.0.0.1:1", "--insecure-plaintext", "--socket=" + filepath.Join(t.TempDir(), "s.sock"),
		"--http-listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0",
	}, more...)
}

func TestUsage(t *testing.T) {
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct{ flag, want string }{
		{"--no-such-flag", "unknown flag --no-such-flag"},
		{"word", "unexpected argument word"},
		{"--policy-address=", "--policy-address"},
		{"--policy-address=policy.example", "HOST:PORT"},
		{"--policy-address=:7443", "HOST:PORT"},
		{"--policy-address=policy.example:7443", "only with a --policy-address on loopback"},
		{"--tls-cert-file=x", "contradict each other"},
		{"--log-level=loud", "log-level"},
		{"--log-format=xml", "log-format"},
		{"--id=a\nb", "printable"},
		{"--id=" + strings.Repeat("x", 256), "printable"},
		{"--accept-cluster=xyz", `--accept-cluster="xyz"`},
		{"--accept-cluster=0", `--accept-cluster="0"`},
		{"--accept-cluster=11112222333344445", "--accept-cluster="},
		{"--grpc-listen=:7443", "not on loopback"},
		{"--grpc-listen=0.0.0.0:7443", "not on loopback"},
		{"--http-listen=192.0.2.1:7480", "not on loopback"},
		{"--http-listen=7480", "not on loopback"},
		{"--admin-listen=7491", "[HOST]:PORT"},
		{"--default-domain=a..b", "--default-domain"},
		{"--restrict-services=caldav", "only smtp-submission"},
		{"--restrict-services=imap", "only smtp-submission"},
		{"--restrict-services=smtp-submission,telnet", "only smtp-submission"},
		{"--restrict-services=unspecified", "only smtp-submission"},
		{"--trusted-proxies=10.0.0.1/8", "write 10.0.0.1 for the address alone"},
		{"--trusted-proxies=0.0.0.0/0", "everybody"},
		{"--trusted-proxies=fe80::1%eth0", "trusted-proxies"},
		{"--trusted-proxies=10.0.0.0/8,x", "trusted-proxies"},
		{"--trusted-proxies=::ffff:10.0.0.0/104", "trusted-proxies"},
		{"--nginx-backend=imap", "--nginx-backend: \"imap\" has no IP address and port"},
		{"--nginx-backend=imap=mail.example.org:143", "no IP address and port"},
		{"--nginx-backend=imap=192.0.2.10", "no IP address and port"},
		{"--nginx-backend=imap=192.0.2.10:0", "no IP address and port"},
		{"--nginx-backend=imap=[fe80::1%eth0]:143", "no IP address and port"},
		{"--nginx-backend=imaps=192.0.2.10:993", "does not begin with imap="},
		{"--nginx-backend=192.0.2.10:143", "does not begin with imap="},
		{"--nginx-backend=imap=192.0.2.10:143,imap=192.0.2.11:143", "imap is there twice"},
		{"--envoy-mailbox-from=x-user", "--envoy-mailbox-from: \"x-user\" is not of the form"},
		{"--envoy-mailbox-from=header:", "header:NAME or extension:KEY"},
		{"--deny-after=5", "deny-after"},
		{"--deny-after=-1m", "at least 15s"},
		{"--deny-after=10s", "at least 15s"},
		{"--denial-text=a\r\nb", "control characters"},
		{"--http-token-file=" + file(""), "one token"},
		{"--http-token-file=" + file("two tokens"), "one token"},
		{"--http-token-file=" + file("tökén"), "one token"},
		{"--http-token-file=" + filepath.Join(t.TempDir(), "missing"), "no such file"},
		{"--doveadm-url=http://127.0.0.1:7482", "--doveadm-key-file need each other"},
		{"--doveadm-key-file=" + file("key"), "--doveadm-key-file need each other"},
	} {
		var stdout, stderr output
		code := run(t.Context(), plain(t, c.flag), &stdout, &stderr)
		if got := stderr.String(); code != 2 || !strings.Contains(got, c.want) || strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "allowednets-sidecar: ") || stdout.String() != "" {
			t.Errorf("%s: exit code %d\n%s%s", c.flag, code, stdout.String(), got)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "--policy-address"},
		{[]string{"--policy-address=127.0.0.1:7443"}, "--tls-cert-file, --tls-key-file and --tls-ca-file are all needed"},
		{[]string{"--policy-address=127.0.0.1:7443", "--tls-cert-file=x", "--tls-key-file=x", "--tls-ca-file=x"}, "no such file"},
		{[]string{"--policy-address=127.0.0.1:7443", "--insecure-plaintext", "--socket=", "--http-listen="}, "all empty"},
	} {
		var stdout, stderr output
		if code := run(t.Context(), c.args, &stdout, &stderr); code != 2 || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%q: exit code %d\n%s", c.args, code, stderr.String())
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
	parser, err := kong.New(&f, kong.Vars{"denial_text": "x"})
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
	parse := func(args ...string) config {
		t.Helper()
		var f flags
		parser, err := kong.New(&f, kong.Vars{"denial_text": check.DefaultDenialText})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parser.Parse(append([]string{"--policy-address=localhost:7443", "--insecure-plaintext"}, args...)); err != nil {
			t.Fatal(err)
		}
		c, err := f.resolve()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if c := parse(); c.ID != host || c.Socket != "/run/allowednets/sidecar.sock" || c.HTTPListen != "127.0.0.1:7480" || c.AdminListen != ":7491" ||
		c.GRPCListen != "" || c.DenyAfter != 0 || c.DenialText != check.DefaultDenialText || c.token != "" || c.acceptCluster != 0 {
		t.Errorf("defaults: %+v", c)
	}
	if c := parse("--denial-text=", "--http-listen=", "--admin-listen="); c.DenialText != "" || c.HTTPListen != "" || c.AdminListen != "" {
		t.Errorf("emptied: %+v", c)
	}
	if c := parse("--nginx-backend=imap=[::ffff:192.0.2.10]:143, pop3=[2001:db8::10]:110", "--envoy-mailbox-from=header:X-User"); len(c.nginxBackends) != 2 ||
		c.nginxBackends["imap"] != netip.MustParseAddrPort("192.0.2.10:143") || c.nginxBackends["pop3"] != netip.MustParseAddrPort("[2001:db8::10]:110") ||
		c.mailboxFrom == (check.MailboxFrom{}) {
		t.Errorf("nginx and Envoy: %+v", c)
	}
	t.Setenv("ALLOWEDNETS_DENIAL_TEXT", "")
	t.Setenv("ALLOWEDNETS_RESTRICT_SERVICES", "smtp-submission")
	t.Setenv("ALLOWEDNETS_TRUSTED_PROXIES", "10.1.0.0/16, fd00::/8,10.9.9.9")
	t.Setenv("ALLOWEDNETS_ACCEPT_CLUSTER", "CDF818194e3a8c32")
	t.Setenv("ALLOWEDNETS_DEFAULT_DOMAIN", "Bücher.example.")
	t.Setenv("ALLOWEDNETS_DENY_AFTER", "1h")
	c := parse("--http-listen=[::1]:7480")
	restricted, _ := c.scope.Restricts(decisionv1.Service_SERVICE_SMTP_SUBMISSION)
	if c.DenialText != "" || !restricted || fmt.Sprint(c.trustedProxies) != "[10.1.0.0/16 fd00::/8 10.9.9.9/32]" || c.acceptCluster != 0xcdf818194e3a8c32 ||
		c.defaultDomain != "xn--bcher-kva.example" || c.DenyAfter != time.Hour {
		t.Errorf("from the environment: %+v", c)
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	lis, err := listenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := listenUnix(t.Context(), path); err == nil || err.Error() != "another process serves on "+path {
		t.Errorf("a live socket: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil { //nolint:noctx // a test
		t.Errorf("the live socket was harmed: %v", err)
	} else {
		_ = conn.Close()
	}
	if u, ok := lis.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // as a process dies
	}
	_ = lis.Close()
	if lis, err = listenUnix(t.Context(), path); err != nil {
		t.Fatalf("a dead socket: %v", err)
	}
	_ = lis.Close()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after closing: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, dir, filepath.Join(dir, "missing", "s.sock"), filepath.Join(file, "s.sock")} {
		if _, err := listenUnix(t.Context(), path); err == nil {
			t.Errorf("%s can be listened on", path)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestHalfBuilt: what was opened before something failed is closed again.
func TestHalfBuilt(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	path := filepath.Join(t.TempDir(), "s.sock")
	var stdout, stderr output
	code := run(t.Context(), plain(t, "--socket="+path, "--admin-listen="+taken.Addr().String()), &stdout, &stderr)
	if code != 1 || !strings.Contains(stderr.String(), "--admin-listen: listen tcp") {
		t.Errorf("exit code %d\n%s", code, stderr.String())
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// policy is a policy service with one state.
type policy struct {
	feedv1.UnimplementedFeedServiceServer
	release chan struct{} // sends the state
	saw     chan string   // the Hellos' ids
}

func (p *policy) Sync(stream feedv1.FeedService_SyncServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	p.saw <- first.GetHello().GetId()
	select {
	case <-p.release:
	case <-stream.Context().Done():
		return nil
	}
	mailbox, err := allow.ParseMailbox("alice@example.org")
	if err != nil {
		return err
	}
	list, err := allow.Rules{}.ParseText("8.8.8.0/24")
	if err != nil {
		return err
	}
	id, nets := mailbox.ID(), list.Encode()
	digest := allow.EntryDigest(id, nets)
	for _, msg := range []*feedv1.SyncResponse{
		{Message: &feedv1.SyncResponse_Welcome{Welcome: &feedv1.Welcome{Cluster: 1, Epoch: 1, Restart: true}}},
		{Message: &feedv1.SyncResponse_Changes{Changes: &feedv1.Changes{
			Entries: []*feedv1.Entry{{Id: id[:], Nets: nets}},
			Commit:  &feedv1.Commit{Revision: 7, Count: 1, Digest: digest[:]},
		}}},
	} {
		if err := stream.Send(msg); err != nil {
			return err
		}
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the sidecar went
		}
		if ping := msg.GetPing(); ping != nil {
			pong := &feedv1.SyncResponse{Message: &feedv1.SyncResponse_Pong{Pong: &feedv1.Pong{Nonce: ping.GetNonce(), Revision: 7}}}
			if err := stream.Send(pong); err != nil {
				return err
			}
		}
	}
}

// certificates writes an authority and a certificate of it for each name, and returns the server's side and the flags of a
// client's.
func certificates(t *testing.T) (server credentials.TransportCredentials, clientFlags []string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var parent *x509.Certificate
	var parentKey *ecdsa.PrivateKey
	issue := func(name string, template *x509.Certificate) (certFile, keyFile string) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template.Subject = pkix.Name{CommonName: name}
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		if parent == nil {
			parent, parentKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return write(name+".crt", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", keyDER)
	}
	caFile, _ := issue("ca", &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	serverCert, serverKey := issue("policy", &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{"localhost"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	clientCert, clientKey := issue("sidecar", &x509.Certificate{
		SerialNumber: big.NewInt(3), DNSNames: []string{"sidecar.example"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	cert, err := tls.LoadX509KeyPair(serverCert, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		}),
		[]string{"--tls-cert-file=" + clientCert, "--tls-key-file=" + clientKey, "--tls-ca-file=" + caFile}
}

// TestProcess runs the whole process over mutual TLS: before and after the first state, all doors, and a clean stop.
func TestProcess(t *testing.T) {
	creds, tlsFlags := certificates(t)
	p := &policy{release: make(chan struct{}), saw: make(chan string, 10)}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(creds))
	feedv1.RegisterFeedServiceServer(server, p)
	go func() { _ = server.Serve(lis) }()
	defer server.Stop()

	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s.sock")
	_, port, _ := net.SplitHostPort(lis.Addr().String())
	httpAddress, adminAddress, grpcAddress := freeAddress(t), freeAddress(t), freeAddress(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stdout, stderr output
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, append([]string{
			"--policy-address=localhost:" + port, "--id=sidecar-1", "--socket=" + socket, "--http-listen=" + httpAddress,
			"--admin-listen=" + adminAddress, "--grpc-listen=" + grpcAddress, "--http-token-file=" + token, "--state-dir=" + filepath.Join(dir, "state"),
			"--doveadm-url=http://" + freeAddress(t), "--doveadm-key-file=" + token,
		}, tlsFlags...), &stdout, &stderr)
	}()
	if id := <-p.saw; id != "sidecar-1" {
		t.Errorf("the policy service saw %q", id)
	}

	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	health := healthv1.NewHealthClient(conn)
	question := &checkv1.CheckRequest{Mailbox: "alice@example.org", ClientAddress: "8.8.8.8", Service: decisionv1.Service_SERVICE_IMAP}

	if code, body := get(t, client, "http://"+adminAddress+"/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "not yet received the lists") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if resp, err := health.Check(ctx, &healthv1.HealthCheckRequest{}); err != nil || resp.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health: %v, %v", resp, err)
	}
	if resp, err := checkv1.NewCheckServiceClient(conn).GetStatus(ctx, &checkv1.GetStatusRequest{}); err != nil || resp.GetSynced() || resp.GetRevision() != "" || resp.GetDataAge() != nil {
		t.Errorf("status: %v, %v", resp, err)
	}
	watch, err := health.Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	close(p.release)
	for {
		resp, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetStatus() == healthv1.HealthCheckResponse_SERVING {
			break
		}
	}
	var healthy, unhealthy bytes.Buffer
	if code := run(t.Context(), []string{"healthcheck", "--admin-listen=" + adminAddress}, &healthy, &unhealthy); code != 0 || healthy.String() != "ok\n" {
		t.Errorf("healthcheck: %d, %s%s", code, healthy.String(), unhealthy.String())
	}
	if code, body := get(t, client, "http://"+adminAddress+"/readyz"); code != http.StatusOK {
		t.Errorf("/readyz: %d %s", code, body)
	}
	loopback, err := grpc.NewClient(grpcAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = loopback.Close() }()
	for _, conn := range []*grpc.ClientConn{conn, loopback} {
		resp, err := checkv1.NewCheckServiceClient(conn).Check(ctx, question)
		if err != nil || resp.GetDecision().GetMatchedNet() != "8.8.8.0/24" || resp.GetDecision().GetRevision() != "1-7" {
			t.Errorf("Check: %v, %v", resp, err)
		}
	}
	if resp, err := checkv1.NewCheckServiceClient(conn).GetStatus(ctx, &checkv1.GetStatusRequest{}); err != nil || !resp.GetSynced() || !resp.GetConnected() ||
		resp.GetForeignStore() || resp.GetRevision() != "1-7" || resp.GetRestrictedMailboxes() != 1 || resp.GetId() != "sidecar-1" || resp.GetVersion() == "" {
		t.Errorf("status: %v, %v", resp, err)
	}
	if code, body := post(t, client, "http://"+httpAddress+"/v1/check", "s3cret", `{"mailbox":"alice@example.org","clientAddress":"1.1.1.1","service":"SERVICE_IMAP"}`); code != http.StatusOK || !strings.Contains(body, "REASON_NOT_IN_ALLOWED_NETS") {
		t.Errorf("/v1/check: %d %s", code, body)
	}
	if code, body := post(t, client, "http://"+httpAddress+"/dovecot?command=allow", "s3cret", `{"login":"alice@example.org","remote":"1.1.1.1","protocol":"imap","stage":"before"}`); code != http.StatusOK ||
		body != `{"status":-1,"msg":"Access from 1.1.1.1 is not allowed for this mailbox. Ask your administrator."}` {
		t.Errorf("/dovecot: %d %s", code, body)
	}
	// The socket's mode says who may ask there, so it needs no token.
	local := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer local.CloseIdleConnections()
	if code, body := post(t, &http.Client{Transport: local, Timeout: 10 * time.Second}, "http://sidecar/v1/check", "", `{"mailbox":"alice@example.org","clientAddress":"8.8.8.8","service":"SERVICE_IMAP"}`); code != http.StatusOK || !strings.Contains(body, "REASON_MATCHED") {
		t.Errorf("/v1/check over the socket: %d %s", code, body)
	}
	if code, body := post(t, client, "http://"+httpAddress+"/v1/check", "", "{}"); code != http.StatusUnauthorized {
		t.Errorf("/v1/check without the token: %d %s", code, body)
	}
	metricsAreDescribed(t, client, "http://"+adminAddress+"/metrics")

	stop()
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d\n%s", code, stderr.String())
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	for _, secret := range []string{"s3cret", "PRIVATE"} {
		if strings.Contains(stderr.String(), secret) {
			t.Errorf("%q was logged", secret)
		}
	}
	if stdout.String() != "" || strings.Contains(stderr.String(), `"level":"ERROR"`) {
		t.Errorf("output:\n%s%s", stdout.String(), stderr.String())
	}
}

// metricsAreDescribed compares what a process shows with docs/metrics.md, in both directions.
func metricsAreDescribed(t *testing.T, client *http.Client, url string) {
	t.Helper()
	doc, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	type metric struct{ name, kind, labels string }
	described := map[metric]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(allowednets_sidecar_[a-z_]+)` \\| ([a-z]+) \\| ([a-z`, ]*) ?\\|").FindAllStringSubmatch(string(doc), -1) {
		described[metric{m[1], m[2], sorted(regexp.MustCompile("[a-z]+").FindAllString(m[3], -1))}] = true
	}
	_, body := get(t, client, url)
	kinds, shown := map[string]string{}, map[metric]bool{}
	lines := bufio.NewScanner(strings.NewReader(body))
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) == 4 && fields[1] == "TYPE" {
			kinds[fields[2]] = fields[3]
		}
		if m := regexp.MustCompile(`^(allowednets_sidecar_[a-z_]+)(\{.*\})? `).FindStringSubmatch(lines.Text()); m != nil {
			var labels []string
			for _, l := range regexp.MustCompile(`([a-z]+)="`).FindAllStringSubmatch(m[2], -1) {
				labels = append(labels, l[1])
			}
			shown[metric{m[1], kinds[m[1]], sorted(labels)}] = true
		}
	}
	for m := range shown {
		if !described[m] {
			t.Errorf("docs/metrics.md does not describe %v", m)
		}
	}
	for m := range described {
		if !shown[m] {
			t.Errorf("docs/metrics.md describes %v, which is not shown", m)
		}
	}
	if len(shown) == 0 {
		t.Error("no metrics")
	}
}

func sorted(labels []string) string {
	slices.Sort(labels)
	return strings.Join(labels, ",")
}

// freeAddress returns a loopback address that nobody listened on a moment ago.
func freeAddress(t testing.TB) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	return lis.Addr().String()
}

func get(t *testing.T, client *http.Client, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return send(t, client, req)
}

func post(t *testing.T, client *http.Client, url, token, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return send(t, client, req)
}

func send(t *testing.T, client *http.Client, req *http.Request) (int, string) {
	t.Helper()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}
