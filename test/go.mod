module github.com/allowednets/allowednets/test

go 1.26.0

require (
	github.com/allowednets/allowednets/gen v0.0.0
	github.com/allowednets/allowednets/internal v0.0.0
	github.com/google/go-cmp v0.7.0
	go.etcd.io/etcd/client/v3 v3.7.3
	go.etcd.io/etcd/server/v3 v3.7.3
	go.uber.org/goleak v1.3.0
	golang.org/x/sync v0.24.0
	google.golang.org/grpc v1.85.0
	google.golang.org/protobuf v1.36.12
)

// The tests run this etcd as a process of its own.
tool go.etcd.io/etcd/server/v3

replace (
	github.com/allowednets/allowednets/gen => ../gen
	github.com/allowednets/allowednets/internal => ../internal
)
