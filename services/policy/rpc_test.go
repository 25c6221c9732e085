package main

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve/servetest"
)

// rpcs returns the full names of all RPCs that a server like the program's has, and which of them are streams.
func rpcs(t *testing.T) (p *process, streams map[string]bool) {
	t.Helper()
	cfg, err := parse(t, changed(flagsThatWork(t)))
	if err != nil {
		t.Fatal(err)
	}
	p = newProcess(cfg, slog.New(slog.DiscardHandler))
	b, err := p.build(nil) // it is not run
	if err != nil {
		t.Fatal(err)
	}
	streams = make(map[string]bool)
	for service, info := range b.rpcs.GetServiceInfo() {
		for _, m := range info.Methods {
			streams["/"+service+"/"+m.Name] = m.IsClientStream || m.IsServerStream
		}
	}
	return p, streams
}

// TestCallerTableKnowsEveryRPC keeps an RPC from being added that nobody can be granted, or that is open without being meant to.
func TestCallerTableKnowsEveryRPC(t *testing.T) {
	p, all := rpcs(t)
	known := p.callers.rpcs.Known()
	slices.Sort(known)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(all)), known); diff != "" {
		t.Errorf("registered (-) and known (+):\n%s", diff)
	}
	for _, m := range methods() {
		if !strings.HasPrefix(m, "/allowednets.") {
			t.Errorf("%s can be granted", m)
		}
	}
}

// TestEveryRPCNeedsItsGrant calls every RPC of a running service over mutual TLS, as callers with different grants.
func TestEveryRPCNeedsItsGrant(t *testing.T) {
	_, all := rpcs(t)
	a := servetest.NewAuthority(t)
	files := a.Flags(a.Named("policy"))
	const sidecar = "spiffe://example.org/sidecar"
	callers := file(t, `
callers:
  - name: admin
    rpcs: [allowednets.policy.v1.PolicyService/*]
  - name: viewer
    rpcs: [allowednets.policy.v1.PolicyService/GetAllowedNets, allowednets.policy.v1.PolicyService/ListAllowedNets]
  - name: `+sidecar+`
    rpcs: [allowednets.feed.v1.FeedService/*]
`)
	s := start(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--data-dir="+dataDir(t), "--create-store", "--callers="+callers,
		"--tls-cert-file="+files.TLSCertFile, "--tls-key-file="+files.TLSKeyFile, "--tls-ca-file="+files.TLSCAFile).serving()

	as := func(template x509.Certificate) *grpc.ClientConn {
		creds, err := a.Flags(a.Issue(template)).Credentials()
		if err != nil {
			t.Fatal(err)
		}
		return s.dial(creds)
	}
	sidecarURI, err := url.Parse(sidecar)
	if err != nil {
		t.Fatal(err)
	}
	for caller, test := range map[string]struct {
		template x509.Certificate
		granted  func(method string) bool
	}{
		"admin": {x509.Certificate{DNSNames: []string{"admin"}}, func(m string) bool { return strings.HasPrefix(m, "/allowednets.policy.v1.") }},
		"viewer": {x509.Certificate{Subject: pkix.Name{CommonName: "viewer"}}, func(m string) bool {
			return strings.HasSuffix(m, "/GetAllowedNets") || strings.HasSuffix(m, "/ListAllowedNets")
		}},
		"sidecar": {
			x509.Certificate{URIs: []*url.URL{sidecarURI}, DNSNames: []string{"admin"}},
			func(m string) bool { return strings.HasPrefix(m, "/allowednets.feed.v1.") },
		},
		"stranger": {x509.Certificate{DNSNames: []string{"stranger", "admin"}}, func(string) bool { return false }},
	} {
		conn := as(test.template)
		for method, isStream := range all {
			err := call(within(t), conn, method, isStream)
			refused := status.Code(err) == codes.PermissionDenied && rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED
			if may := test.granted(method) || strings.HasPrefix(method, "/grpc."); may == refused {
				t.Errorf("%s calls %s: %v", caller, method, err)
			}
		}
	}

	// What we know about a caller who does not say for whom it acts is its certificate's name.
	admin := policyv1.NewPolicyServiceClient(as(x509.Certificate{DNSNames: []string{"admin"}}))
	resp, err := admin.SetAllowedNets(within(t), saveOf("alice@example.org", "8.8.8.8"))
	if err != nil || resp.GetAllowedNets().GetUpdatedBy() != "admin" {
		t.Errorf("%v, %v", resp, err)
	}
	health, err := healthv1.NewHealthClient(as(x509.Certificate{DNSNames: []string{"stranger"}})).Check(within(t), &healthv1.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", health, err)
	}
	// In plain text, or with a certificate of another authority, nobody gets as far as that.
	if err := call(within(t), s.dial(nil), "/allowednets.policy.v1.PolicyService/GetAllowedNets", false); status.Code(err) != codes.Unavailable {
		t.Errorf("in plain text: %v", err)
	}
	foreign := servetest.NewAuthority(t)
	mixed := foreign.Flags(foreign.Named("admin"))
	mixed.TLSCAFile = files.TLSCAFile // it trusts the server, which does not trust it
	creds, err := mixed.Credentials()
	if err != nil {
		t.Fatal(err)
	}
	if err := call(within(t), s.dial(creds), "/allowednets.policy.v1.PolicyService/GetAllowedNets", false); status.Code(err) != codes.Unavailable {
		t.Errorf("with a foreign certificate: %v", err)
	}
}

// call calls an RPC with an empty message and returns what it came to; of a stream, its first answer.
func call(ctx context.Context, conn *grpc.ClientConn, method string, isStream bool) error {
	if !isStream {
		return conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(&emptypb.Empty{}), stream.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
		return err // EOF: it has ended already, and receiving tells how
	}
	return stream.RecvMsg(&emptypb.Empty{})
}

// TestEveryMetricIsDocumented compares what the service registers with its tables in docs/metrics.md.
func TestEveryMetricIsDocumented(t *testing.T) {
	p, _ := rpcs(t)
	descriptions := make(chan *prometheus.Desc)
	go func() {
		p.registry.Describe(descriptions)
		close(descriptions)
	}()
	registered := make(map[string]string)
	parts := regexp.MustCompile(`^Desc{fqName: "([^"]*)".*variableLabels: \{([^}]*)\}}$`)
	for d := range descriptions {
		m := parts.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %s", d)
		}
		if strings.HasPrefix(m[1], "allowednets_") {
			registered[m[1]] = m[2]
		}
	}
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	described := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `(allowednets_(?:policy|grpc|tls)_[a-z0-9_]+)` \\|([^|]*)\\|([^|]*)\\|").FindAllStringSubmatch(string(doc), -1) {
		var labels []string
		for _, l := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(row[3], -1) {
			labels = append(labels, l[1])
		}
		described[row[1]] = strings.Join(labels, ",")
	}
	if diff := cmp.Diff(described, registered); diff != "" {
		t.Errorf("docs/metrics.md (-) and the service (+), each with its labels:\n%s", diff)
	}
}
