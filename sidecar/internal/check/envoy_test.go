package check_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/allowednets/allowednets/internal/hops"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// serveEnvoy serves the Envoy door over a real gRPC connection until the test ends.
func serveEnvoy(t *testing.T, f *fixture, configure ...func(*check.EnvoyConfig)) authv3.AuthorizationClient {
	t.Helper()
	from, err := check.ParseMailboxFrom("header:X-Auth-User")
	if err != nil {
		t.Fatal(err)
	}
	cfg := check.EnvoyConfig{
		Decider: f.decider, Faults: f.faults, MailboxFrom: from, DenialText: check.DefaultDenialText,
		TrustedProxies: hops.Trusted{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")},
	}
	for _, c := range configure {
		c(&cfg)
	}
	server, err := serve.NewGRPC(serve.GRPCConfig{
		Credentials: insecure.NewCredentials(), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	}, func(r grpc.ServiceRegistrar) { authv3.RegisterAuthorizationServer(r, check.NewEnvoy(cfg)) })
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 20)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx, nil, lis) }()
	conn, err := grpc.NewClient("passthrough:envoy", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return authv3.NewAuthorizationClient(conn)
}

// throughEnvoy is a request as Envoy's ext_authz filter sends it with everything switched on, of alice at a wrong address.
func throughEnvoy(changes ...func(*authv3.AttributeContext)) *authv3.CheckRequest {
	socket := func(address string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}
	}
	metadata, _ := structpb.NewStruct(map[string]any{"payload": map[string]any{"email": "carol@example.org"}})
	a := &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: socket("1.1.1.1", 51234), Principal: "spiffe://example.org/browser", Certificate: "-----BEGIN%20CERTIFICATE-----"},
		Destination: &authv3.AttributeContext_Peer{Address: socket("192.0.2.1", 443), Service: "webmail", Labels: map[string]string{"a": "b"}},
		Request: &authv3.AttributeContext_Request{Time: timestamppb.Now(), Http: &authv3.AttributeContext_HttpRequest{
			Id: "12345678901234567890", Method: "GET", Path: "/mail/?_task=mail", Host: "webmail.example.org", Scheme: "https", Size: -1, Protocol: "HTTP/2",
			Headers: map[string]string{
				":authority": "webmail.example.org", ":method": "GET", ":path": "/mail/?_task=mail", ":scheme": "https",
				"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "cookie": "session=hunter2", "authorization": "Bearer hunter2",
				"x-auth-user": "alice@example.org", "x-forwarded-for": "1.1.1.1", "x-forwarded-proto": "https",
				"x-request-id": "0b8d6c1e-6c8c-9f3b-8a8e-1f5a2b3c4d5e", "x-envoy-internal": "false",
			},
		}},
		ContextExtensions:    map[string]string{"service": "webmail"},
		MetadataContext:      &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": metadata}},
		RouteMetadataContext: &corev3.Metadata{},
		TlsSession:           &authv3.AttributeContext_TLSSession{Sni: "webmail.example.org"},
	}
	for _, change := range changes {
		change(a)
	}
	return &authv3.CheckRequest{Attributes: a}
}

func withHeader(name, value string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { a.GetRequest().GetHttp().GetHeaders()[name] = value }
}

func withoutHeader(name string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { delete(a.GetRequest().GetHttp().GetHeaders(), name) }
}

func withExtension(name, value string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { a.GetContextExtensions()[name] = value }
}

func withSource(address string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { a.GetSource().GetAddress().GetSocketAddress().Address = address }
}

// raw sends the headers as with encode_raw_headers, and more behind them.
func raw(more ...*corev3.HeaderValue) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) {
		http := a.GetRequest().GetHttp()
		http.HeaderMap = &corev3.HeaderMap{}
		for name, value := range http.GetHeaders() {
			http.HeaderMap.Headers = append(http.HeaderMap.Headers, rawHeader(name, value))
		}
		http.HeaderMap.Headers = append(http.HeaderMap.Headers, more...)
		http.Headers = nil
	}
}

func rawHeader(name, value string) *corev3.HeaderValue {
	return &corev3.HeaderValue{Key: name, RawValue: []byte(value)}
}

// verdictOf reads an answer as strictly as it must be written: "ok", or status, reason and body.
func verdictOf(t testing.TB, resp *authv3.CheckResponse) string {
	t.Helper()
	ok := &authv3.CheckResponse{
		Status:       &statuspb.Status{},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}},
	}
	if cmp.Equal(ok, resp, protocmp.Transform()) {
		return "ok"
	}
	denied := resp.GetDeniedResponse()
	code, grpcCode := int(denied.GetStatus().GetCode()), codes.Code(resp.GetStatus().GetCode())
	if denied == nil || !(code == 403 && grpcCode == codes.PermissionDenied || code == 503 && grpcCode == codes.Unavailable) || resp.GetDynamicMetadata() != nil {
		t.Fatalf("%v", resp)
	}
	headers := map[string]string{}
	for _, h := range denied.GetHeaders() {
		if h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD || strings.ContainsFunc(h.GetHeader().GetValue(), unicode.IsControl) {
			t.Fatalf("%v", resp)
		}
		headers[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	body := denied.GetBody()
	if headers["cache-control"] != "no-store" || len(headers) != len(denied.GetHeaders()) || body == "" || strings.ContainsFunc(body, unicode.IsControl) {
		t.Fatalf("%v", resp)
	}
	if headers["content-type"] == "application/json" {
		var said map[string]string
		if err := json.Unmarshal([]byte(body), &said); err != nil || said["reason"] != headers["x-allowednets-reason"] {
			t.Fatalf("%s: %v", body, err)
		}
		body = "JSON: " + said["error"]
	} else if headers["content-type"] != "text/plain; charset=utf-8" {
		t.Fatalf("%v", resp)
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s %s", code, headers["x-allowednets-reason"], body))
}

func TestEnvoy(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	client := serveEnvoy(t, f)
	const (
		no    = "403 not_in_allowed_nets " + denied
		plain = "Access to this mailbox is not allowed."
		bad   = "403 bad_request " + plain
		name  = "403 mailbox_invalid " + plain
		addr  = "403 client_address_invalid " + plain
	)
	carol := withHeader("x-auth-user", "carol@example.org")
	for _, c := range []struct {
		name    string
		changes []func(*authv3.AttributeContext)
		want    string
	}{
		{"allowed", []func(*authv3.AttributeContext){withSource("8.8.8.8")}, "ok"},
		{"allowed, raw headers", []func(*authv3.AttributeContext){withSource("8.8.8.8"), raw()}, "ok"},
		{"allowed, IPv6", []func(*authv3.AttributeContext){withSource("2a00:1450::25")}, "ok"},
		{"allowed, mapped", []func(*authv3.AttributeContext){withSource("::ffff:8.8.8.8")}, "ok"},
		{"denied", nil, no},
		{"denied, raw headers", []func(*authv3.AttributeContext){raw()}, no},
		{"denied, upper case", []func(*authv3.AttributeContext){withHeader("x-auth-user", "ALICE@EXAMPLE.org.")}, no},
		{"unrestricted", []func(*authv3.AttributeContext){carol}, "ok"},
		{"upper-case header", []func(*authv3.AttributeContext){withoutHeader("x-auth-user"), withHeader("X-Auth-User", "alice@example.org")}, no},
		{"value in place of raw value", []func(*authv3.AttributeContext){
			withoutHeader("x-auth-user"), raw(&corev3.HeaderValue{Key: "x-auth-user", Value: "alice@example.org"}),
		}, no},

		{"caldav", []func(*authv3.AttributeContext){withExtension("service", "caldav")}, "ok"},
		{"carddav", []func(*authv3.AttributeContext){withExtension("service", "carddav"), raw()}, "ok"},
		{"webdav", []func(*authv3.AttributeContext){withExtension("service", "webdav")}, "ok"},
		{"caldav, nobody yet", []func(*authv3.AttributeContext){withExtension("service", "caldav"), withoutHeader("x-auth-user")}, "ok"},
		{"caldav, nobody yet, nowhere", []func(*authv3.AttributeContext){
			withExtension("service", "caldav"), withoutHeader("x-auth-user"), func(a *authv3.AttributeContext) { a.Source = nil },
		}, "ok"},
		{"webmail, nobody yet", []func(*authv3.AttributeContext){withoutHeader("x-auth-user")}, name},
		{"no service", []func(*authv3.AttributeContext){func(a *authv3.AttributeContext) { a.ContextExtensions = nil }, carol}, bad},
		{"unknown service", []func(*authv3.AttributeContext){withExtension("service", "gopher"), carol}, bad},
		{"imap", []func(*authv3.AttributeContext){withExtension("service", "imap"), carol}, bad},
		{"a header names the service", []func(*authv3.AttributeContext){withHeader("service", "caldav")}, no},

		{"load balancer", []func(*authv3.AttributeContext){withSource("10.1.2.3"), withHeader("x-forwarded-for", "8.8.8.8,10.1.2.3")}, "ok"},
		{"load balancer, raw headers", []func(*authv3.AttributeContext){
			withSource("10.1.2.3"), withHeader("x-forwarded-for", "1.1.1.1"), raw(rawHeader("x-forwarded-for", "8.8.8.8, 10.1.2.3")),
		}, "ok"},
		{"load balancer, spoofed in raw headers", []func(*authv3.AttributeContext){
			withSource("10.1.2.3"), withHeader("x-forwarded-for", "8.8.8.8"), raw(rawHeader("x-forwarded-for", "1.1.1.1")),
		}, no},
		{"load balancer, denied", []func(*authv3.AttributeContext){withSource("10.1.2.3"), withHeader("x-forwarded-for", "8.8.8.8, 1.1.1.1, 10.1.2.3")}, no},
		{"load balancer, allowed_headers without X-Forwarded-For", []func(*authv3.AttributeContext){
			withSource("10.1.2.3"), withoutHeader("x-forwarded-for"),
		}, "403 client_address_not_public " + strings.ReplaceAll(denied, "1.1.1.1", "10.1.2.3")},
		{"load balancer, junk", []func(*authv3.AttributeContext){withSource("10.1.2.3"), withHeader("x-forwarded-for", "unknown")}, addr},
		{"spoofed", []func(*authv3.AttributeContext){withHeader("x-forwarded-for", "8.8.8.8")}, no},
		{"spoofed in other headers", []func(*authv3.AttributeContext){
			withHeader("x-real-ip", "8.8.8.8"), withHeader("forwarded", "for=8.8.8.8"), withHeader("x-envoy-external-address", "8.8.8.8"),
		}, no},
		{"a header twice", []func(*authv3.AttributeContext){withHeader("X-Forwarded-For", "8.8.8.8")}, bad},

		{"no source", []func(*authv3.AttributeContext){func(a *authv3.AttributeContext) { a.Source = nil }}, "403 client_address_unknown " + strings.ReplaceAll(denied, "1.1.1.1", "an unknown address")},
		{"a pipe", []func(*authv3.AttributeContext){carol, func(a *authv3.AttributeContext) {
			a.Source.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/run/x"}}}
		}}, bad},
		{"an internal listener", []func(*authv3.AttributeContext){carol, func(a *authv3.AttributeContext) {
			a.Source.Address = &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{}}
		}}, bad},
		{"source with zone", []func(*authv3.AttributeContext){carol, withSource("fe80::1%eth0")}, addr},
		{"source with port", []func(*authv3.AttributeContext){carol, withSource("8.8.8.8:443")}, addr},
		{"UDP", []func(*authv3.AttributeContext){func(a *authv3.AttributeContext) {
			a.GetSource().GetAddress().GetSocketAddress().Protocol = corev3.SocketAddress_UDP
		}}, no},

		{"two mailboxes", []func(*authv3.AttributeContext){raw(rawHeader("x-auth-user", "carol@example.org"))}, bad},
		{"two mailboxes, letter case", []func(*authv3.AttributeContext){raw(rawHeader("X-Auth-User", "carol@example.org"))}, bad},
		{"the same twice", []func(*authv3.AttributeContext){carol, raw(rawHeader("x-auth-user", "carol@example.org"))}, bad},
		{"two mailboxes in one", []func(*authv3.AttributeContext){withHeader("x-auth-user", "alice@example.org,carol@example.org")}, bad},
		{"half a mailbox each", []func(*authv3.AttributeContext){withHeader("x-auth-user", "carol,alice@example.org")}, bad},
		{"value and raw value", []func(*authv3.AttributeContext){
			withoutHeader("x-auth-user"), raw(&corev3.HeaderValue{Key: "x-auth-user", Value: "carol@example.org", RawValue: []byte("alice@example.org")}),
		}, bad},
		{"headers in both forms", []func(*authv3.AttributeContext){carol, func(a *authv3.AttributeContext) {
			a.GetRequest().GetHttp().HeaderMap = &corev3.HeaderMap{Headers: []*corev3.HeaderValue{rawHeader("x-other", "")}}
		}}, bad},
		{"no domain", []func(*authv3.AttributeContext){withHeader("x-auth-user", "carol")}, name},
		{"NUL", []func(*authv3.AttributeContext){withHeader("x-auth-user", "carol@example.org\x00")}, name},
		{"CR LF", []func(*authv3.AttributeContext){withHeader("x-auth-user", "carol@example.org\r\nx: y")}, name},
		{"not UTF-8", []func(*authv3.AttributeContext){withoutHeader("x-auth-user"), raw(rawHeader("x-auth-user", "carol\xff@example.org"))}, name},
		{"10 kB", []func(*authv3.AttributeContext){withHeader("x-auth-user", strings.Repeat("x", 10_000)+"@example.org")}, name},
		{"dynamic metadata does not count", []func(*authv3.AttributeContext){withoutHeader("x-auth-user"), withSource("8.8.8.8")}, name},

		{"JSON", []func(*authv3.AttributeContext){withHeader("accept", "application/json, */*;q=0.1")}, "403 not_in_allowed_nets JSON: " + denied},
		{"JSON or a page", []func(*authv3.AttributeContext){withHeader("accept", "text/html, application/json")}, no},
		{"no accept", []func(*authv3.AttributeContext){withoutHeader("accept")}, no},
		{"no attributes", []func(*authv3.AttributeContext){func(a *authv3.AttributeContext) { proto.Reset(a) }}, bad},
	} {
		resp, err := client.Check(t.Context(), throughEnvoy(c.changes...))
		if err != nil {
			t.Errorf("%s: %v: with failure_mode_allow the request would pass", c.name, err)
			continue
		}
		if got := verdictOf(t, resp); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
	if resp, err := client.Check(t.Context(), &authv3.CheckRequest{}); err != nil || verdictOf(t, resp) != bad {
		t.Errorf("empty: %v, %v", resp, err)
	}
	if log := f.log.String(); strings.Contains(log, "hunter2") || !strings.Contains(log, "door=envoy") {
		t.Errorf("log:\n%s", log)
	}
	for line := range strings.Lines(f.log.String()) {
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("forged: %s", line)
		}
	}
}

func TestEnvoyMailboxFrom(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	from := func(text string) func(*check.EnvoyConfig) {
		return func(cfg *check.EnvoyConfig) {
			var err error
			if cfg.MailboxFrom, err = check.ParseMailboxFrom(text); err != nil {
				t.Error(err)
			}
		}
	}
	byRoute := serveEnvoy(t, f, from("extension:mailbox"))
	for mailbox, want := range map[string]string{"alice@example.org": "403 not_in_allowed_nets " + denied, "carol@example.org": "ok", "": "403 mailbox_invalid Access to this mailbox is not allowed."} {
		resp, err := byRoute.Check(t.Context(), throughEnvoy(withExtension("mailbox", mailbox), withHeader("mailbox", "carol@example.org")))
		if err != nil || verdictOf(t, resp) != want {
			t.Errorf("%q: %v, %v", mailbox, resp, err)
		}
	}
	nowhere := serveEnvoy(t, f, func(cfg *check.EnvoyConfig) { cfg.MailboxFrom = check.MailboxFrom{} })
	for _, svc := range []string{"webmail", "caldav"} {
		resp, err := nowhere.Check(t.Context(), throughEnvoy(withExtension("service", svc), withSource("8.8.8.8")))
		if err != nil || !strings.HasPrefix(verdictOf(t, resp), "403 bad_request ") {
			t.Errorf("%s: %v, %v", svc, resp, err)
		}
	}
	f.wantLog("level=WARN", "--envoy-mailbox-from is not given")
	for _, text := range []string{"", "x-auth-user", "header", "header:", "header: x", "header:a:b", "header:a,b", "header:ü", "jwt:email", "Header:x", "extension:"} {
		if _, err := check.ParseMailboxFrom(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

func TestEnvoyWithoutAnswer(t *testing.T) {
	const plain = "Access to this mailbox is not allowed."
	never := newFixture(t, nil)
	for name, c := range map[string]struct {
		f         *fixture
		configure []func(*check.EnvoyConfig)
		changes   []func(*authv3.AttributeContext)
		want      string
	}{
		"not synced":         {never, nil, nil, "503 not_synced " + unavailable},
		"CalDAV, not synced": {never, nil, []func(*authv3.AttributeContext){withExtension("service", "caldav")}, "ok"},
		"stale": {
			newFixture(t, stateOf(t, lists()), func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Nanosecond }), nil, nil, "503 stale " + unavailable,
		},
		"panic": {
			newFixture(t, nil, func(cfg *check.DeciderConfig) { cfg.State = func() *mirror.State { panic("secret cause") } }), nil, nil, "503 internal " + plain,
		},
		"no text": {
			newFixture(t, stateOf(t, lists())), []func(*check.EnvoyConfig){func(cfg *check.EnvoyConfig) { cfg.DenialText = "" }}, nil, "403  " + plain,
		},
		"a text with control characters": {
			newFixture(t, stateOf(t, lists())), []func(*check.EnvoyConfig){func(cfg *check.EnvoyConfig) { cfg.DenialText = "a\r\nb" }}, nil, "403 not_in_allowed_nets ab",
		},
	} {
		resp, err := serveEnvoy(t, c.f, c.configure...).Check(t.Context(), throughEnvoy(c.changes...))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := verdictOf(t, resp); got != c.want {
			t.Errorf("%s: %q; want %q", name, got, c.want)
		}
		if name == "panic" {
			c.f.wantLog("level=ERROR", "secret cause")
		}
	}
	if n := never.metric("unanswered_total", "not_synced", "envoy"); n != 1 {
		t.Errorf("counted %v times", n)
	}
}
