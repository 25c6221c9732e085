// Package etcdtest starts a real etcd inside a test, and puts faults between it and its clients.
package etcdtest

import (
	"context"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Etcd is a single-node etcd. It ends with its test.
type Etcd struct {
	tb       testing.TB
	dir      string
	endpoint url.URL
	server   *embed.Etcd
	rpc      atomic.Pointer[grpc.Server]
}

// Start starts an empty etcd on loopback.
func Start(tb testing.TB) *Etcd {
	tb.Helper()
	e := &Etcd{tb: tb, dir: tb.TempDir(), endpoint: url.URL{Scheme: "http", Host: freeAddress(tb)}}
	e.Restart()
	tb.Cleanup(e.Stop)
	return e
}

// freeAddress returns an address on loopback whose port stays free while the server is stopped: the kernel gives the ports from
// 32768 on to whoever connects or listens somewhere.
func freeAddress(tb testing.TB) string {
	tb.Helper()
	const first, last = 10_000, 32_767
	for range 100 {
		lis, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(first+rand.IntN(last-first+1)))) //nolint:gosec // no secret
		if err == nil {
			_ = lis.Close()
			return lis.Addr().String()
		}
	}
	tb.Fatalf("no port from %d to %d is free", first, last)
	return ""
}

// Endpoint is where clients dial, also after a restart.
func (e *Etcd) Endpoint() string { return e.endpoint.String() }

// Stop ends the server and keeps its data.
func (e *Etcd) Stop() {
	if e.server != nil {
		if rpc := e.rpc.Swap(nil); rpc != nil {
			rpc.Stop() // Close alone waits for watches to end
		}
		e.server.Close()
		e.server = nil
	}
}

// Restart starts the server, stopping it first if it runs, at the same endpoint with the same data.
func (e *Etcd) Restart() {
	e.tb.Helper()
	e.Stop()
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(e.dir, "data")
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.UnsafeNoFsync = true
	cfg.ListenClientUrls = []url.URL{e.endpoint}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ServiceRegister = func(s *grpc.Server) { e.rpc.Store(s) }
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		e.tb.Fatalf("starting etcd: %v", err)
	}
	e.server = server
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		e.tb.Fatalf("starting etcd: %v", err)
	case <-time.After(time.Minute):
		e.tb.Fatal("etcd is not ready after a minute")
	}
}

// Lose is what the loss of etcd's volume looks like: an empty etcd at the same endpoint, with the same cluster id.
func (e *Etcd) Lose() {
	e.tb.Helper()
	e.Stop()
	if err := os.RemoveAll(filepath.Join(e.dir, "data")); err != nil {
		e.tb.Fatal(err)
	}
	e.Restart()
}

// Backup stops the server and returns a copy of its data for [Etcd.Restore]; then the server goes on.
func (e *Etcd) Backup() string {
	e.tb.Helper()
	e.Stop()
	backup := e.tb.TempDir()
	if err := os.CopyFS(backup, os.DirFS(filepath.Join(e.dir, "data"))); err != nil {
		e.tb.Fatal(err)
	}
	e.Restart()
	return backup
}

// Restore is a restart with the data of the backup: etcd's revisions go back.
func (e *Etcd) Restore(backup string) {
	e.tb.Helper()
	e.Stop()
	data := filepath.Join(e.dir, "data")
	if err := os.RemoveAll(data); err != nil {
		e.tb.Fatal(err)
	}
	if err := os.CopyFS(data, os.DirFS(backup)); err != nil {
		e.tb.Fatal(err)
	}
	e.Restart()
}

// Client returns a client without faults, to look into etcd and to edit it by hand.
func (e *Etcd) Client() *clientv3.Client {
	e.tb.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{e.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		e.tb.Fatal(err)
	}
	e.tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Compact forgets every revision before the current one.
func (e *Etcd) Compact(ctx context.Context) {
	e.tb.Helper()
	client := e.Client()
	resp, err := client.Get(ctx, "any")
	if err == nil {
		_, err = client.Compact(ctx, resp.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err != nil {
		e.tb.Fatalf("compacting: %v", err)
	}
}
