package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/hops"
)

const doorEnvoy = "envoy"

// EnvoyConfig configures [Envoy].
type EnvoyConfig struct {
	Decider *Decider
	Faults  *Faults
	// MailboxFrom says where a request names the mailbox. The zero value: nowhere, and all requests are refused.
	MailboxFrom MailboxFrom
	// DenialText is as in [HTTPConfig]; empty: a denial does not say why.
	DenialText string
	// TrustedProxies may say on whose behalf they ask.
	TrustedProxies hops.Trusted
}

// MailboxFrom is the place where a request through Envoy names the mailbox: a header, or a context extension of the route.
type MailboxFrom struct{ header, extension string }

// ParseMailboxFrom reads header:NAME or extension:KEY.
func ParseMailboxFrom(text string) (MailboxFrom, error) {
	kind, name, _ := strings.Cut(text, ":")
	switch {
	case name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' || r == ',' }):
	case kind == "header":
		return MailboxFrom{header: strings.ToLower(name)}, nil
	case kind == "extension":
		return MailboxFrom{extension: name}, nil
	}
	return MailboxFrom{}, fmt.Errorf("%.60q is not of the form header:NAME or extension:KEY", text)
}

// Envoy is the door for Envoy's ext_authz filter over gRPC: envoy.service.auth.v3.Authorization
// (https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/auth/v3/external_auth.proto).
//
// It never answers with a gRPC error: with failure_mode_allow Envoy would let the request pass.
type Envoy struct {
	authv3.UnimplementedAuthorizationServer
	cfg EnvoyConfig
}

// NewEnvoy returns the service.
func NewEnvoy(cfg EnvoyConfig) *Envoy { return &Envoy{cfg: cfg} }

// Check implements Authorization.
func (e *Envoy) Check(ctx context.Context, req *authv3.CheckRequest) (resp *authv3.CheckResponse, _ error) {
	defer func() {
		if p := recover(); p != nil {
			resp = e.refuse(ctx, req, panicked(p))
		}
	}()
	resp, err := e.check(ctx, req)
	if err != nil {
		return e.refuse(ctx, req, err), nil
	}
	return resp, nil
}

func (e *Envoy) check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	attributes := req.GetAttributes()
	word := attributes.GetContextExtensions()["service"]
	svc := forwardedService(word)
	if svc == decisionv1.Service_SERVICE_UNSPECIFIED {
		return nil, &requestError{problem: fmt.Sprintf("the route's context extension service is %.20q, which is unknown", word)}
	}
	headers, err := headersOf(attributes.GetRequest().GetHttp())
	if err != nil {
		return nil, err
	}
	mailbox, err := e.mailbox(attributes, headers)
	if err != nil {
		return nil, err
	}
	if mailbox == "" && e.cfg.Decider.Exempts(svc) {
		return allowed(), nil
	}
	peer, err := peerOf(attributes.GetSource().GetAddress())
	if err != nil {
		return nil, err
	}
	client, err := e.cfg.TrustedProxies.Client(peer, headers.values("x-forwarded-for"))
	if err != nil {
		return nil, err
	}
	dec, err := e.cfg.Decider.Decide(ctx, Request{Mailbox: mailbox, Client: addressText(client), Service: svc})
	if err != nil {
		return nil, err
	}
	if dec.Verdict == decisionv1.Verdict_VERDICT_ALLOW {
		return allowed(), nil
	}
	code := http.StatusForbidden
	if dec.Reason == decisionv1.Reason_REASON_STALE {
		code = http.StatusServiceUnavailable
	}
	return e.denied(headers, code, reasonLabel(dec.Reason), denialText(e.cfg.DenialText, dec)), nil
}

func (e *Envoy) mailbox(attributes *authv3.AttributeContext, headers envoyHeaders) (string, error) {
	switch from := e.cfg.MailboxFrom; {
	case from.header != "":
		return single("the header of --envoy-mailbox-from", headers.values(from.header))
	case from.extension != "":
		return attributes.GetContextExtensions()[from.extension], nil
	}
	return "", &requestError{problem: "--envoy-mailbox-from is not given"}
}

// refuse is the answer to a request that cannot be answered. 503 says that the same request may work later.
func (e *Envoy) refuse(ctx context.Context, req *authv3.CheckRequest, err error) *authv3.CheckResponse {
	e.cfg.Faults.count(ctx, doorEnvoy, err)
	headers, _ := headersOf(req.GetAttributes().GetRequest().GetHttp())
	cause, code := causeOf(err), http.StatusForbidden
	if errors.Is(err, ErrNotSynced) || cause == causeInternal {
		code = http.StatusServiceUnavailable
	}
	return e.denied(headers, code, cause, faultText(e.cfg.DenialText, err))
}

// allowed lets a request pass as it is.
func allowed() *authv3.CheckResponse {
	return &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}},
	}
}

// denied is what the client gets in place of what it asked for: JSON if it wants that rather than a page.
func (e *Envoy) denied(headers envoyHeaders, code int, reason, text string) *authv3.CheckResponse {
	grpcCode := codes.PermissionDenied
	if code == http.StatusServiceUnavailable {
		grpcCode = codes.Unavailable
	}
	body, media := printable(text), "text/plain; charset=utf-8"
	if body == "" {
		body = "Access to this mailbox is not allowed."
	}
	if e.cfg.DenialText == "" {
		reason = "" // the operator wants nothing to be said
	}
	if accept := strings.ToLower(strings.Join(headers.values("accept"), ",")); strings.Contains(accept, "application/json") && !strings.Contains(accept, "text/") {
		encoded, _ := json.Marshal(map[string]string{"error": body, "reason": reason}) // strings always can be
		body, media = string(encoded), "application/json"
	}
	set := []*corev3.HeaderValueOption{header("content-type", media), header("cache-control", "no-store")}
	if reason != "" {
		set = append(set, header("x-allowednets-reason", reason))
	}
	return &authv3.CheckResponse{
		Status: &statuspb.Status{Code: int32(grpcCode), Message: reason},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: typev3.StatusCode(code)}, Headers: set, Body: body,
		}},
	}
}

func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// peerOf is the other end of Envoy's connection, which for Envoy need not be an address.
func peerOf(a *corev3.Address) (string, error) {
	if a == nil {
		return "", nil
	}
	socket := a.GetSocketAddress()
	if socket == nil {
		return "", &requestError{problem: "the source of the request is no IP address"}
	}
	return socket.GetAddress(), nil
}

// envoyHeaders are the headers of a request: their names in lower case, their values in order.
type envoyHeaders map[string][]string

func (h envoyHeaders) values(name string) []string { return h[name] }

// headersOf reads the headers in the form that Envoy sends: headers, where it makes one value of several, with commas
// between, or with encode_raw_headers header_map.
func headersOf(req *authv3.AttributeContext_HttpRequest) (envoyHeaders, error) {
	raw := req.GetHeaderMap().GetHeaders()
	if len(raw) > 0 && len(req.GetHeaders()) > 0 {
		return nil, &requestError{problem: "the request has its headers twice"}
	}
	headers := make(envoyHeaders, len(raw)+len(req.GetHeaders()))
	for name, value := range req.GetHeaders() {
		name = strings.ToLower(name)
		if headers[name] != nil { // in which order?
			return nil, &requestError{problem: "the request has a header twice"}
		}
		headers[name] = []string{value}
	}
	for _, h := range raw {
		value := h.GetValue()
		if b := h.GetRawValue(); len(b) > 0 {
			if value != "" {
				return nil, &requestError{problem: "a header of the request has two values"}
			}
			value = string(b)
		}
		name := strings.ToLower(h.GetKey())
		headers[name] = append(headers[name], value)
	}
	return headers, nil
}
