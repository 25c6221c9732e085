package main

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"

	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/prototext"
)

// collector is an OpenTelemetry collector that keeps what it is sent.
type collector struct {
	collectorv1.UnimplementedTraceServiceServer
	mu    sync.Mutex
	names map[string]bool
	text  strings.Builder
}

func (c *collector) Export(_ context.Context, req *collectorv1.ExportTraceServiceRequest) (*collectorv1.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range req.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				c.names[span.GetName()] = true
			}
		}
	}
	c.text.WriteString(prototext.Format(req))
	return &collectorv1.ExportTraceServiceResponse{}, nil
}

// TestTracing: spans of an RPC and of its requests to etcd reach the collector, and say nothing about a mailbox.
func TestTracing(t *testing.T) {
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{names: make(map[string]bool)}
	server := grpc.NewServer()
	collectorv1.RegisterTraceServiceServer(server, c)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(lis) })
	defer serving.Wait()
	defer server.Stop()

	s := start(t, plain(dataDir(t), "--create-store", "--trace-endpoint", "http://"+lis.Addr().String())...).serving()
	s.save("secret-name@example.org", "8.8.8.8")
	s.stop() // sends the last spans

	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range []string{"allowednets.policy.v1.PolicyService/SetAllowedNets", "etcdserverpb.KV/Txn"} {
		if !c.names[name] {
			t.Errorf("no span %s among %v", name, c.names)
		}
	}
	for _, personal := range []string{"secret-name", "8.8.8.8"} {
		if strings.Contains(c.text.String(), personal) {
			t.Errorf("the spans tell %q", personal)
		}
	}
}
