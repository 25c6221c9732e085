package serve_test

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/internal/serve/servetest"
)

// naming is a check that reports its caller's name.
func naming(names chan<- string) func(context.Context) (*checkv1.CheckResponse, error) {
	return func(ctx context.Context) (*checkv1.CheckResponse, error) {
		names <- serve.Caller(ctx)
		return &checkv1.CheckResponse{}, nil
	}
}

func TestCaller(t *testing.T) {
	if got := serve.Caller(t.Context()); got != "" {
		t.Errorf("outside of a call there is the caller %q", got)
	}
	names := make(chan string, 1)
	plain := start(t, serve.GRPCConfig{}, checks{check: naming(names)}, nil)
	if err := plain.check(nil); err != nil {
		t.Fatal(err)
	}
	if got := <-names; got != serve.PlaintextCaller {
		t.Errorf("in plain text the caller is %q", got)
	}

	a := servetest.NewAuthority(t)
	s := start(t, serve.GRPCConfig{Credentials: credentialsOf(t, a.Flags(a.Named("server")))}, checks{check: naming(names)}, nil)
	uri := func(text string) *url.URL { return &url.URL{Scheme: "spiffe", Host: "example.org", Path: text} }
	for want, template := range map[string]x509.Certificate{
		"spiffe://example.org/first": {
			URIs: []*url.URL{uri("/first"), uri("/second")}, DNSNames: []string{"dns"}, Subject: pkix.Name{CommonName: "cn"},
		},
		"first.example": {DNSNames: []string{"first.example", "second.example"}, Subject: pkix.Name{CommonName: "cn"}},
		"cn":            {Subject: pkix.Name{CommonName: "cn"}, EmailAddresses: []string{"a@example.org"}},
		"":              {},
	} {
		if err := s.check(credentialsOf(t, a.Flags(a.Issue(template)))); err != nil {
			t.Fatal(err)
		}
		if got := <-names; got != want {
			t.Errorf("the caller is %q, want %q", got, want)
		}
	}
}

func TestNewCallersRefuses(t *testing.T) {
	methods := []string{checkMethod, streamMethod, statusMethod}
	for _, rpc := range []string{
		"", "*", "/*", "Check", "CheckService/Check", "allowednets.check.v1.CheckService", "allowednets.check.v1.CheckService/",
		"allowednets.check.v1.CheckService/Chec", "allowednets.check.v1.CheckService/check", checkMethod, "allowednets.check.v1.Check/*",
		"allowednets.check.v1.CheckService/Check/*", "allowednets.check.v1.CheckService/Get*", "grpc.health.v1.Health/Check",
		"allowednets.check.v1.CheckService/* ",
	} {
		_, err := serve.NewCallers(methods, map[string][]string{"caller": {"allowednets.check.v1.CheckService/Check", rpc}})
		if err == nil || !strings.Contains(err.Error(), `"caller"`) || !strings.Contains(err.Error(), checkMethod) {
			t.Errorf("granting %q: %v", rpc, err)
		}
	}
	if _, err := serve.NewCallers(methods, map[string][]string{"": {"allowednets.check.v1.CheckService/*"}}); err == nil {
		t.Error("a caller without a name was accepted")
	}
}

// TestCallerTable calls every RPC as every caller, over TLS.
func TestCallerTable(t *testing.T) {
	const granted = 2 // GetStatus is registered, but nobody can be granted it
	methods := []string{checkMethod, streamMethod, statusMethod}
	table, err := serve.NewCallers(methods[:granted], map[string][]string{
		"all":     {"allowednets.check.v1.CheckService/*"},
		"check":   {"allowednets.check.v1.CheckService/Check"},
		"both":    {"allowednets.check.v1.CheckService/Check", "allowednets.check.v1.CheckService/CheckStream"},
		"nothing": nil,
	})
	if err != nil {
		t.Fatal(err)
	}
	served := false
	a := servetest.NewAuthority(t)
	s := start(t, serve.GRPCConfig{Credentials: credentialsOf(t, a.Flags(a.Named("server"))), Callers: table}, checks{
		check: func(context.Context) (*checkv1.CheckResponse, error) {
			served = true
			return &checkv1.CheckResponse{}, nil
		},
		stream: func(stream checkStream) error { served = true; return stream.Send(&checkv1.CheckStreamResponse{}) },
	}, nil)
	s.SetReady(true)
	for caller, want := range map[string][]string{
		"all": methods[:granted], "check": {checkMethod}, "both": methods[:granted],
		"nothing": nil, "stranger": nil, "": nil, "ALL": nil, serve.PlaintextCaller: nil,
	} {
		template := x509.Certificate{Subject: pkix.Name{CommonName: caller}}
		conn := s.dial(credentialsOf(t, a.Flags(a.Issue(template))))
		client := checkv1.NewCheckServiceClient(conn)
		for _, method := range methods {
			served = false
			var err error
			switch method {
			case checkMethod:
				_, err = client.Check(within(t), &checkv1.CheckRequest{})
			case statusMethod:
				_, err = client.GetStatus(within(t), &checkv1.GetStatusRequest{})
			case streamMethod:
				stream, openErr := client.CheckStream(within(t))
				if openErr != nil {
					t.Fatal(openErr)
				}
				_, err = stream.Recv()
			}
			switch {
			case slices.Contains(want, method):
				if err != nil || !served {
					t.Errorf("%q calls %s: %v", caller, method, err)
				}
			case status.Code(err) != codes.PermissionDenied || served ||
				rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED:
				t.Errorf("%q calls %s: served %v, %v", caller, method, served, err)
			case !strings.Contains(err.Error(), `"`+caller+`"`) || !strings.Contains(err.Error(), method[1:]):
				t.Errorf("the refusal names not who may not call what: %v", err)
			}
		}
		// Health says nothing about a mailbox: it is open to whoever has a name.
		_, err := healthv1.NewHealthClient(conn).Check(within(t), &healthv1.HealthCheckRequest{})
		if (err == nil) != (caller != "") {
			t.Errorf("%q asks for health: %v", caller, err)
		}
	}
	if n := s.calls(statusMethod, "PermissionDenied"); n != 8 {
		t.Errorf("%v refusals of %s were counted", n, statusMethod)
	}
	if got := strings.Count(s.log.String(), "caller refused"); got < 1 || got > 15 {
		t.Errorf("%d refusals were logged, of 20 that came at once; the limit is 10, and 1 each second", got)
	}
}

// TestPlaintextCallerTable shows that a table holds without TLS as well, where all callers have one name.
func TestPlaintextCallerTable(t *testing.T) {
	table, err := serve.NewCallers([]string{checkMethod, statusMethod}, map[string][]string{
		serve.PlaintextCaller: {"allowednets.check.v1.CheckService/GetStatus"},
	})
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, serve.GRPCConfig{Callers: table}, checks{check: answer}, nil)
	if err := s.check(nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Check: %v", err)
	}
	if _, err := checkv1.NewCheckServiceClient(s.dial(nil)).GetStatus(within(t), &checkv1.GetStatusRequest{}); err != nil {
		t.Errorf("GetStatus: %v", err)
	}
}

func TestKnown(t *testing.T) {
	table, err := serve.NewCallers([]string{checkMethod}, nil)
	if err != nil {
		t.Fatal(err)
	}
	table.Known()[0] = "changed"
	known := table.Known()
	if slices.Contains(known, "changed") || !slices.Contains(known, checkMethod) || !slices.Contains(known, "/grpc.health.v1.Health/Check") {
		t.Errorf("known: %q", known)
	}
}
