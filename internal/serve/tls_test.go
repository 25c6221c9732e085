package serve_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/internal/serve/servetest"
)

func TestFlagsThatContradict(t *testing.T) {
	a := servetest.NewAuthority(t)
	good := a.Flags(a.Named("a"))
	with := func(change func(*serve.TLSFlags)) serve.TLSFlags {
		f := good
		change(&f)
		return f
	}
	for name, test := range map[string]struct {
		flags serve.TLSFlags
		want  string // "": they work
	}{
		"all files":               {good, ""},
		"plain text":              {serve.TLSFlags{InsecurePlaintext: true}, ""},
		"nothing":                 {serve.TLSFlags{}, "all needed"},
		"plain text and files":    {with(func(f *serve.TLSFlags) { f.InsecurePlaintext = true }), "contradict"},
		"plain text and one file": {serve.TLSFlags{InsecurePlaintext: true, TLSCAFile: good.TLSCAFile}, "contradict"},
		"no certificate":          {with(func(f *serve.TLSFlags) { f.TLSCertFile = "" }), "all needed"},
		"no key":                  {with(func(f *serve.TLSFlags) { f.TLSKeyFile = "" }), "all needed"},
		"no authorities":          {with(func(f *serve.TLSFlags) { f.TLSCAFile = "" }), "all needed"},
		"missing certificate":     {with(func(f *serve.TLSFlags) { f.TLSCertFile += ".old" }), "cert.pem.old"},
		"missing key":             {with(func(f *serve.TLSFlags) { f.TLSKeyFile += ".old" }), "key.pem.old"},
		"missing authorities":     {with(func(f *serve.TLSFlags) { f.TLSCAFile += ".old" }), "ca.pem.old"},
		"another key":             {with(func(f *serve.TLSFlags) { f.TLSKeyFile = a.Flags(a.Named("b")).TLSKeyFile }), "does not match"},
		"key as authority":        {with(func(f *serve.TLSFlags) { f.TLSCAFile = f.TLSKeyFile }), "holds no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			creds, err := test.flags.Credentials()
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (err == nil || creds != nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

// credentialsOf returns credentials from files.
func credentialsOf(t *testing.T, f serve.TLSFlags) credentials.TransportCredentials {
	t.Helper()
	creds, err := f.Credentials()
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRotation replaces the files of a running server and of a running client, piece by piece. Every new connection uses the
// newest files that fit together.
func TestRotation(t *testing.T) {
	a, successor := servetest.NewAuthority(t), servetest.NewAuthority(t)
	old, next := a.Named("old"), a.Named("next")
	files := a.Flags(old)
	s := start(t, serve.GRPCConfig{Credentials: credentialsOf(t, files)}, checks{check: answer}, nil)
	client := credentialsOf(t, a.Flags(a.Named("client")))
	successorClient := credentialsOf(t, successor.Flags(successor.Named("client")))

	shows := func(want string) {
		t.Helper()
		var p peer.Peer
		if err := s.check(client, grpc.Peer(&p)); err != nil {
			t.Errorf("the old authority's client: %v", err)
			return
		}
		if got := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0].DNSNames[0]; got != want { //nolint:errcheck // TLS
			t.Errorf("the server shows the certificate of %q, want %q", got, want)
		}
	}
	open := checkv1.NewCheckServiceClient(s.dial(client))
	if _, err := open.Check(within(t), &checkv1.CheckRequest{}); err != nil {
		t.Fatal(err)
	}
	shows("old")
	write(t, files.TLSCertFile, next.Cert)
	shows("old") // half-written: the old key is still there
	write(t, files.TLSKeyFile, next.Key[:len(next.Key)/2])
	shows("old")
	write(t, files.TLSKeyFile, next.Key)
	shows("next")
	write(t, files.TLSCertFile, nil)
	shows("next")
	write(t, files.TLSCAFile, a.PEM[:len(a.PEM)/2])
	shows("next")
	if err := os.Remove(files.TLSKeyFile); err != nil {
		t.Fatal(err)
	}
	shows("next")
	write(t, files.TLSCertFile, next.Cert)
	write(t, files.TLSKeyFile, next.Key)
	write(t, files.TLSCAFile, a.PEM)
	if err := s.check(successorClient); err == nil {
		t.Error("a client of another authority was served")
	}
	write(t, files.TLSCAFile, append(append([]byte{}, a.PEM...), successor.PEM...))
	shows("next")
	if err := status.Code(s.check(successorClient)); err != codes.Unavailable { // it does not trust the server's authority
		t.Errorf("the new authority's client: %v", err)
	}
	last := successor.Named("last")
	write(t, files.TLSCertFile, last.Cert)
	write(t, files.TLSKeyFile, last.Key)
	write(t, files.TLSCAFile, successor.PEM)
	if err := s.check(successorClient); err != nil {
		t.Errorf("the new authority's client: %v", err)
	}
	if err := s.check(client); err == nil {
		t.Error("the client of an authority that was withdrawn was served")
	}
	if _, err := open.Check(within(t), &checkv1.CheckRequest{}); err != nil {
		t.Errorf("a connection that was open all the time: %v", err)
	}
}

// TestCallerRotates shows that a caller's files are read again, too.
func TestCallerRotates(t *testing.T) {
	a := servetest.NewAuthority(t)
	names := make(chan string, 1)
	s := start(t, serve.GRPCConfig{Credentials: credentialsOf(t, a.Flags(a.Named("server")))}, checks{check: naming(names)}, nil)
	files := a.Flags(a.Named("old"))
	client := credentialsOf(t, files)
	next := a.Named("next")
	for _, step := range []struct {
		do   func()
		want string
	}{
		{func() {}, "old"},
		{func() { write(t, files.TLSCertFile, next.Cert) }, "old"},
		{func() { write(t, files.TLSKeyFile, next.Key) }, "next"},
	} {
		step.do()
		if err := s.check(client); err != nil {
			t.Fatal(err)
		}
		if got := <-names; got != step.want {
			t.Errorf("the caller is %q, want %q", got, step.want)
		}
	}
}

// TestWhoIsRefused shows which callers do not even get as far as the caller table.
func TestWhoIsRefused(t *testing.T) {
	a, foreign := servetest.NewAuthority(t), servetest.NewAuthority(t)
	s := start(t, serve.GRPCConfig{Credentials: credentialsOf(t, a.Flags(a.Named("server")))}, checks{check: answer}, nil)
	trusting := func(pair *servetest.Pair, change func(*tls.Config)) credentials.TransportCredentials {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(a.PEM)
		cfg := &tls.Config{RootCAs: pool}
		if pair != nil {
			cert, err := tls.X509KeyPair(pair.Cert, pair.Key)
			if err != nil {
				t.Fatal(err)
			}
			// Not Certificates: of these, the client would only send one that the server asks for.
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		}
		if change != nil {
			change(cfg)
		}
		return credentials.NewTLS(cfg)
	}
	known, stranger := a.Named("caller"), foreign.Named("caller")
	expired := a.Issue(x509.Certificate{DNSNames: []string{"caller"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<30, 0)})
	serverOnly := a.Issue(x509.Certificate{DNSNames: []string{"caller"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err := s.check(trusting(&known, nil)); err != nil {
		t.Fatalf("a caller that must be served: %v", err)
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"plain text":              nil,
		"no certificate":          trusting(nil, nil),
		"another authority":       trusting(&stranger, nil),
		"expired":                 trusting(&expired, nil),
		"not for callers":         trusting(&serverOnly, nil),
		"TLS 1.2":                 trusting(&known, func(cfg *tls.Config) { cfg.MaxVersion = tls.VersionTLS12 }),
		"knows another server":    credentialsOf(t, foreign.Flags(stranger)),
		"expects another address": trusting(&known, func(cfg *tls.Config) { cfg.ServerName = "policy.example" }),
	} {
		t.Run(name, func(t *testing.T) {
			if err := s.check(creds); status.Code(err) != codes.Unavailable {
				t.Errorf("got %v", err)
			}
		})
	}
	if n := s.calls(checkMethod, "OK"); n != 1 {
		t.Errorf("%v calls were answered", n)
	}
}

func TestIsLoopback(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true, "localhost:1": true,
		":1": false, "0.0.0.0:1": false, "[::]:1": false, "192.0.2.1:1": false, "example.com:1": false, "127.0.0.1": false, "": false,
		"localhost.example.com:1": false, "127.0.0.1.example.com:1": false, "[::ffff:127.0.0.1]:1": true,
	} {
		if got := serve.IsLoopback(address); got != want {
			t.Errorf("IsLoopback(%q) = %v", address, got)
		}
	}
}

// TestFilesOnShow: the metrics say whether the files that are there now could be used, and until when.
func TestFilesOnShow(t *testing.T) {
	a := servetest.NewAuthority(t)
	flags := a.Flags(a.Issue(x509.Certificate{DNSNames: []string{"a"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(2e9, 0)}))
	show := func() string {
		registry := prometheus.NewRegistry()
		registry.MustRegister(flags.TLSCollector())
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, f := range families {
			fmt.Fprintf(&b, "%s %.0f\n", f.GetName(), f.GetMetric()[0].GetGauge().GetValue())
		}
		return b.String()
	}
	if got, want := show(), "allowednets_tls_certificate_expiry_timestamp_seconds 2000000000\nallowednets_tls_files_usable 1\n"; got != want {
		t.Errorf("good files: %s", got)
	}
	if err := os.Remove(flags.TLSKeyFile); err != nil {
		t.Fatal(err)
	}
	if got, want := show(), "allowednets_tls_files_usable 0\n"; got != want {
		t.Errorf("without the key: %s", got)
	}
	flags = serve.TLSFlags{InsecurePlaintext: true}
	if got := show(); got != "" {
		t.Errorf("plain text: %s", got)
	}
}
