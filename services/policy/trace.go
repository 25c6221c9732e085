package main

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/allowednets/allowednets/internal/serve"
)

// traceStopTimeout bounds how long the process waits for the collector to take the last spans.
const traceStopTimeout = 2 * time.Second

func validateTraceEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.Path != "":
		return fmt.Errorf("--trace-endpoint must be a URL such as https://collector:4317, not %q", endpoint)
	case u.Scheme == "http" && !serve.IsLoopback(u.Host):
		return fmt.Errorf("--trace-endpoint: %s is plain text beyond this machine; use https://", endpoint)
	}
	return nil
}

// trace makes the RPCs and the requests to etcd send spans to --trace-endpoint, if there is one, and returns what sends
// the last ones. Spans carry methods, codes and times, and nothing that a message contains. The parent is the caller's.
func (p *process) trace(ctx context.Context) (stop func(), err error) {
	if p.TraceEndpoint == "" {
		return func() {}, nil
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(p.TraceEndpoint))
	if err != nil {
		return nil, fmt.Errorf("--trace-endpoint: %w", err)
	}
	provider := trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(
		resource.NewSchemaless(attribute.String("service.name", "allowednets-policy"))))
	options := []otelgrpc.Option{
		otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(propagation.TraceContext{}),
	}
	p.options = append(p.options, grpc.StatsHandler(otelgrpc.NewServerHandler(options...)))
	p.store.DialOptions = append(p.store.DialOptions, grpc.WithStatsHandler(otelgrpc.NewClientHandler(options...)))
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), traceStopTimeout)
		defer cancel()
		_ = provider.Shutdown(ctx) // what the collector did not take is lost, as any span may be
	}, nil
}
