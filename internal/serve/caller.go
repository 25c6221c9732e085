package serve

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// PlaintextCaller is the name of every caller of a server without TLS.
const PlaintextCaller = "insecure-plaintext"

// Caller returns the name of the service that makes a call: the first URI of its verified certificate, else the first DNS
// name, else the common name; [PlaintextCaller] without TLS. It is what we know, in contrast to what the caller asserts.
func Caller(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	tlsInfo, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return PlaintextCaller
	}
	if len(tlsInfo.State.VerifiedChains) == 0 {
		return ""
	}
	return certificateName(tlsInfo.State.VerifiedChains[0][0])
}

func certificateName(cert *x509.Certificate) string {
	switch {
	case len(cert.URIs) > 0:
		return cert.URIs[0].String()
	case len(cert.DNSNames) > 0:
		return cert.DNSNames[0]
	}
	return cert.Subject.CommonName
}

// openMethods may be called by every caller whose certificate is valid: they say nothing about a mailbox.
func openMethods() []string {
	return []string{
		"/grpc.health.v1.Health/Check",
		"/grpc.health.v1.Health/List",
		"/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	}
}

// Callers says which caller may call which RPC. What it does not grant is refused. It is immutable.
type Callers struct {
	granted map[string][]string // caller name → full methods
	known   []string
}

// NewCallers builds the table. methods are the full names of the RPCs that can be granted, such as
// "/allowednets.policy.v1.PolicyService/SetAllowedNets". grants maps a caller's name to RPCs, each written
// "allowednets.policy.v1.PolicyService/SetAllowedNets", or "…PolicyService/*" for all of a service. A grant that names no
// RPC is an error: it would silently grant nothing.
func NewCallers(methods []string, grants map[string][]string) (*Callers, error) {
	c := &Callers{granted: make(map[string][]string), known: append(openMethods(), methods...)}
	for name, rpcs := range grants {
		if name == "" {
			return nil, fmt.Errorf("a caller without a name")
		}
		for _, rpc := range rpcs {
			service, all := strings.CutSuffix(rpc, "/*")
			n := len(c.granted[name])
			for _, m := range methods {
				if m == "/"+rpc || all && strings.HasPrefix(m, "/"+service+"/") {
					c.granted[name] = append(c.granted[name], m)
				}
			}
			if len(c.granted[name]) == n {
				return nil, fmt.Errorf("caller %q: there is no RPC %q; the RPCs are %s", name, rpc, strings.Join(methods, ", "))
			}
		}
	}
	return c, nil
}

// Known returns the full names of all RPCs the table knows, the ones open to everybody included.
func (c *Callers) Known() []string { return slices.Clone(c.known) }

// authorize returns nil if the caller of ctx may call method.
func (c *Callers) authorize(ctx context.Context, method string) error {
	name := Caller(ctx)
	if name != "" && (slices.Contains(openMethods(), method) || slices.Contains(c.granted[name], method)) {
		return nil
	}
	return rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED,
		fmt.Sprintf("caller %q may not call %s: the operator grants it in the --callers file", name, strings.TrimPrefix(method, "/")))
}
