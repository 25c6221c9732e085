package prometheus

import (
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/test/stack"
)

// forger stands between sidecars and a policy service and falsifies the digest of every commit.
type forger struct {
	feedv1.UnimplementedFeedServiceServer
	policy feedv1.FeedServiceClient
}

// startForger returns the address of a forger in front of the policy service at an address.
func startForger(t *testing.T, s *stack.Stack, policy string) string {
	t.Helper()
	files := func(name string) credentials.TransportCredentials {
		creds, err := serve.TLSFlags{
			TLSCertFile: s.Path("tls/" + name + ".pem"), TLSKeyFile: s.Path("tls/" + name + "-key.pem"), TLSCAFile: s.Path("tls/ca.pem"),
		}.Credentials()
		if err != nil {
			t.Fatal(err)
		}
		return creds
	}
	conn, err := grpc.NewClient(policy, grpc.WithTransportCredentials(files(stack.SidecarName)))
	if err != nil {
		t.Fatal(err)
	}
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(files("localhost")))
	feedv1.RegisterFeedServiceServer(server, &forger{policy: feedv1.NewFeedServiceClient(conn)})
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(lis) })
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
		_ = conn.Close()
	})
	return lis.Addr().String()
}

// Sync implements feedv1.FeedServiceServer.
func (f *forger) Sync(near grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse]) error {
	far, err := f.policy.Sync(near.Context())
	if err != nil {
		return err
	}
	go func() { // ends with near's context
		for {
			msg, err := near.Recv()
			if err != nil || far.Send(msg) != nil {
				_ = far.CloseSend()
				return
			}
		}
	}()
	for {
		msg, err := far.Recv()
		if err != nil {
			return err
		}
		if digest := msg.GetChanges().GetCommit().GetDigest(); len(digest) > 0 {
			digest[0] ^= 1
		}
		if err := near.Send(msg); err != nil {
			return err
		}
	}
}
