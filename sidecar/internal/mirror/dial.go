package mirror

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// maxMessage bounds a received message in octets: 4,096 entries, each with more nets than the default limit of a list.
const maxMessage = 64 << 20

// Dialer returns a [Config].Dial that connects to a policy service at address: host and port, or any gRPC target.
func Dialer(address string, creds credentials.TransportCredentials) func() (*grpc.ClientConn, error) {
	return func() (*grpc.ClientConn, error) {
		return grpc.NewClient(address,
			grpc.WithTransportCredentials(creds),
			// One connection per sidecar, to a replica chosen by chance: round_robin would keep one to every replica.
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}`),
			grpc.WithDisableServiceConfig(),
			grpc.WithNoProxy(),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		)
	}
}
