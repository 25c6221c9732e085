package main

import (
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/internal/serve/servetest"
)

// startCluster starts an etcd that speaks TLS with its own callers only, knows a user "policy" with the password "secret" who
// may use our keys, and a user "other" with the same password who may not.
func startCluster(t *testing.T, files serve.TLSFlags) (endpoint string) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.UnsafeNoFsync = true
	cfg.BcryptCost = 4
	cfg.ListenClientUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ClientTLSInfo = transport.TLSInfo{
		CertFile: files.TLSCertFile, KeyFile: files.TLSKeyFile, TrustedCAFile: files.TLSCAFile, ClientCertAuth: true,
	}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
	case <-within(t).Done():
		t.Fatal("etcd is not ready")
	}
	endpoint = "https://" + server.Clients[0].Addr().String()

	tlsConfig, err := cfg.ClientTLSInfo.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, TLS: tlsConfig, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	ctx := within(t)
	all := clientv3.GetPrefixRangeEnd("/allowednets/v1/")
	_, err1 := client.RoleAdd(ctx, "policy")
	_, err2 := client.RoleGrantPermission(ctx, "policy", "/allowednets/v1/", all, clientv3.PermissionType(clientv3.PermReadWrite))
	_, err3 := client.RoleAdd(ctx, "root")
	err = errors.Join(err1, err2, err3)
	for user, role := range map[string]string{"root": "root", "policy": "policy", "other": ""} {
		_, err1 := client.UserAdd(ctx, user, "secret")
		err = errors.Join(err, err1)
		if role != "" {
			_, err2 := client.UserGrantRole(ctx, user, role)
			err = errors.Join(err, err2)
		}
	}
	_, err4 := client.AuthEnable(ctx)
	if err := errors.Join(err, err4); err != nil {
		t.Fatal(err)
	}
	return endpoint
}

// TestCluster reaches an etcd that is not embedded, and shows what its refusals look like.
func TestCluster(t *testing.T) {
	a := servetest.NewAuthority(t)
	etcd := a.Flags(a.Issue(x509.Certificate{DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}))
	ours := a.Flags(a.Named("policy"))
	endpoint := startCluster(t, etcd)
	args := func(user, password, ca string) []string {
		all := []string{
			"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--insecure-plaintext", "--create-store", "--etcd-endpoints=" + endpoint,
			"--etcd-cert-file=" + ours.TLSCertFile, "--etcd-key-file=" + ours.TLSKeyFile, "--etcd-ca-file=" + ca,
		}
		if user != "" {
			all = append(all, "--etcd-user="+user, "--etcd-password-file="+file(t, password+"\n"))
		}
		return all
	}
	for name, wrong := range map[string][]string{
		"password": args("policy", "guessed", etcd.TLSCAFile),
		"role":     args("other", "secret", etcd.TLSCAFile),
		"way in":   args("", "", etcd.TLSCAFile),
	} {
		t.Run("wrong "+name, func(t *testing.T) {
			if said := start(t, wrong...).fails(); !strings.Contains(said, "etcd") || strings.Contains(said, "guessed") || strings.Contains(said, "secret") {
				t.Errorf("it says %s", said)
			}
		})
	}
	t.Run("wrong authority", func(t *testing.T) {
		foreign := servetest.NewAuthority(t)
		s := start(t, args("", "", foreign.Flags(foreign.Named("policy")).TLSCAFile)...).started()
		if code, _ := s.get("/readyz"); code != http.StatusServiceUnavailable {
			t.Errorf("/readyz: %d", code)
		}
		s.stop()
	})
	s := start(t, args("policy", "secret", etcd.TLSCAFile)...).serving()
	s.save("alice@example.org", "8.8.8.8")
	s.has("alice@example.org", "8.8.8.8")
}
