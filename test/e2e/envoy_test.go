package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	earlyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	upstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/allowednets/allowednets/test/stack"
)

// unpack reads what a configuration holds as Any, and applies Envoy's own rules to it.
func unpack[M interface {
	proto.Message
	ValidateAll() error
}](t *testing.T, packed *anypb.Any, to M) M {
	t.Helper()
	if err := packed.UnmarshalTo(to); err != nil {
		t.Fatal(err)
	}
	if err := to.ValidateAll(); err != nil {
		t.Errorf("%T: %v", to, err)
	}
	return to
}

// envoyConfiguration reads integrations/envoy/envoy.yaml into Envoy's messages, strictly.
func envoyConfiguration(t *testing.T) (*bootstrapv3.Bootstrap, *hcmv3.HttpConnectionManager) {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "integrations", "envoy", "envoy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var document any
	if err := yaml.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	encoded, err := json.Marshal(document)
	if err != nil {
		t.Fatal(err)
	}
	bootstrap := new(bootstrapv3.Bootstrap)
	if err := protojson.Unmarshal(encoded, bootstrap); err != nil {
		t.Fatal(err)
	}
	if err := bootstrap.ValidateAll(); err != nil {
		t.Error(err)
	}
	network := bootstrap.GetStaticResources().GetListeners()[0].GetFilterChains()[0].GetFilters()[0]
	return bootstrap, unpack(t, network.GetTypedConfig(), new(hcmv3.HttpConnectionManager))
}

// TestEnvoyConfiguration reads the configuration that people copy as Envoy would.
func TestEnvoyConfiguration(t *testing.T) {
	bootstrap, manager := envoyConfiguration(t)
	if !manager.GetUseRemoteAddress().GetValue() || !manager.GetNormalizePath().GetValue() || !manager.GetMergeSlashes() ||
		manager.GetPathWithEscapedSlashesAction() != hcmv3.HttpConnectionManager_REJECT_REQUEST {
		t.Error("paths or addresses are taken as they come")
	}
	early := unpack(t, manager.GetEarlyHeaderMutationExtensions()[0].GetTypedConfig(), new(earlyv3.HeaderMutation))
	filters := manager.GetHttpFilters()
	login := unpack(t, filters[0].GetTypedConfig(), new(jwtv3.JwtAuthentication))
	gate := unpack(t, filters[1].GetTypedConfig(), new(extauthzv3.ExtAuthz))
	unpack(t, filters[2].GetTypedConfig(), new(routerv3.Router))
	header := login.GetProviders()["login"].GetClaimToHeaders()[0].GetHeaderName()
	if removed := early.GetMutations()[0].GetRemove(); removed != header || removed != "x-auth-user" {
		t.Errorf("a client's %s survives", header)
	}
	if gate.GetFailureModeAllow() || !gate.GetEncodeRawHeaders() || gate.GetWithRequestBody() != nil || gate.GetTransportApiVersion() != corev3.ApiVersion_V3 ||
		gate.GetGrpcService().GetTimeout().AsDuration() != 500*time.Millisecond || gate.GetStatusOnError().GetCode() != http.StatusServiceUnavailable {
		t.Errorf("ext_authz: %v", gate)
	}
	var allowed []string
	for _, p := range gate.GetAllowedHeaders().GetPatterns() {
		allowed = append(allowed, p.GetExact())
	}
	if got := strings.Join(allowed, " "); got != "x-auth-user x-forwarded-for accept" {
		t.Errorf("headers that the sidecar gets: %s", got)
	}
	for _, c := range bootstrap.GetStaticResources().GetClusters() {
		if c.GetName() != gate.GetGrpcService().GetEnvoyGrpc().GetClusterName() {
			continue
		}
		options := unpack(t, c.GetTypedExtensionProtocolOptions()["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"], new(upstreamv3.HttpProtocolOptions))
		path := c.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints()[0].GetEndpoint().GetAddress().GetPipe().GetPath()
		if options.GetExplicitHttpConfig().GetHttp2ProtocolOptions() == nil || path != "/run/allowednets/sidecar.sock" {
			t.Errorf("cluster: %v", c)
		}
		return
	}
	t.Error("no cluster for the sidecar")
}

// perRoute is what the configuration says about ext_authz on the route of a path.
func perRoute(t *testing.T, manager *hcmv3.HttpConnectionManager, path string) *extauthzv3.ExtAuthzPerRoute {
	t.Helper()
	for _, r := range manager.GetRouteConfig().GetVirtualHosts()[0].GetRoutes() {
		if strings.HasPrefix(path, r.GetMatch().GetPrefix()) {
			return unpack(t, r.GetTypedPerFilterConfig()["envoy.filters.http.ext_authz"], new(extauthzv3.ExtAuthzPerRoute))
		}
	}
	t.Fatalf("no route for %s", path)
	return nil
}

// TestEnvoy asks the real sidecar over its socket as Envoy with that configuration does.
func TestEnvoy(t *testing.T) {
	w := newWorld(t, settings{noDovecot: true, sidecarArgs: []string{"--envoy-mailbox-from", "header:x-auth-user"}})
	_, manager := envoyConfiguration(t)
	if !perRoute(t, manager, "/dav/x").GetDisabled() {
		t.Error("DAV is asked about")
	}
	extensions := perRoute(t, manager, "/webmail/").GetCheckSettings().GetContextExtensions()
	conn, err := grpc.NewClient("unix:"+w.sidecar.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	closeLater(t, conn)
	envoy := authv3.NewAuthorizationClient(conn)
	ask := func(user, peer, forwarded string, extensions map[string]string) (*authv3.CheckResponse, error) {
		http := &authv3.AttributeContext_HttpRequest{
			Id: "1", Method: "GET", Path: "/webmail/", Host: "mail.example.org", Scheme: "https", Protocol: "HTTP/1.1", Size: -1,
			HeaderMap: &corev3.HeaderMap{},
		}
		for name, value := range map[string]string{"x-auth-user": user, "x-forwarded-for": forwarded, "accept": "text/html"} {
			if value != "" {
				http.HeaderMap.Headers = append(http.HeaderMap.Headers, &corev3.HeaderValue{Key: name, RawValue: []byte(value)})
			}
		}
		return envoy.Check(t.Context(), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
			Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: peer, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 4711},
			}}}},
			Request: &authv3.AttributeContext_Request{Http: http}, ContextExtensions: extensions,
		}})
	}
	dav := map[string]string{"service": "caldav"}
	for _, c := range []struct {
		name, user, peer, forwarded string
		extensions                  map[string]string
		code                        int // 0: allowed
		body                        string
	}{
		{"inside", alice, inside, inside, extensions, 0, ""},
		{"inside, upper case", "ALICE@Example.ORG", inside, inside, extensions, 0, ""},
		{"outside", alice, outside, outside, extensions, 403, notAllowed(outside)},
		{"spoofed", alice, outside, inside + "," + outside, extensions, 403, notAllowed(outside)},
		{"a balancer", alice, "127.0.0.1", inside + ",127.0.0.1", extensions, 0, ""},
		{"a balancer, spoofed", alice, "127.0.0.1", inside + "," + outside + ",127.0.0.1", extensions, 403, notAllowed(outside)},
		{"unrestricted", bob, outside, outside, extensions, 0, ""},
		{"nobody yet", "", inside, inside, extensions, 403, "Access to this mailbox is not allowed."},
		{"a route without a service", bob, inside, inside, nil, 403, "Access to this mailbox is not allowed."},
		{"CalDAV", alice, outside, outside, dav, 0, ""},
		{"CalDAV, nobody yet", "", outside, outside, dav, 0, ""},
	} {
		resp, err := ask(c.user, c.peer, c.forwarded, c.extensions)
		denied := resp.GetDeniedResponse()
		if err != nil || (resp.GetStatus().GetCode() == 0) != (c.code == 0) || int(denied.GetStatus().GetCode()) != c.code || denied.GetBody() != c.body {
			t.Errorf("%s: %v, %v", c.name, resp, err)
		}
	}
	if err := w.sidecar.Kill(); err != nil {
		t.Fatal(err)
	}
	if resp, err := ask(bob, inside, inside, extensions); err == nil { // for Envoy a failure, which denies
		t.Errorf("a dead sidecar: %v", resp)
	}
	if err := w.sidecar.Restart(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
}
