package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// embedded is a single-node etcd in this process. The server ends the process if the disk is full.
type embedded struct {
	*embed.Etcd
	endpoint string // for clients
	lock     *fileutil.LockedFile
	closing  *atomic.Bool
}

// startEtcd starts an etcd with its data in dir and its sockets there too, out of reach of other users.
func startEtcd(ctx context.Context, dir string, log *slog.Logger) (*embedded, error) {
	dir, err := filepath.Abs(dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	client, peer := filepath.Join(dir, "etcd.sock"), filepath.Join(dir, "peer.sock")
	if len(client) > 100 {
		return nil, fmt.Errorf("--data-dir: %s is too long a path: the sockets in it must stay below 108 octets", dir)
	}
	// A second etcd would first take away the sockets of the one that runs, and then wait for its database without end.
	lock, err := fileutil.TryLockFile(filepath.Join(dir, "lock"), os.O_WRONLY|os.O_CREATE, 0o600)
	if errors.Is(err, fileutil.ErrLocked) {
		return nil, fmt.Errorf("--data-dir: another policy service works in %s", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	cfg := embed.NewConfig()
	cfg.Name = "allowednets"
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: client}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: peer}} // etcd listens on Host here
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "localhost:2380"}}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 10, 100 // nobody to elect but ourselves
	cfg.QuotaBackendBytes = 8 << 30
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "periodic", "1h"
	closing := new(atomic.Bool)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(etcdLog{log, closing}))
	server, err := startWithin(ctx, time.Minute, cfg)
	if err != nil {
		return nil, fmt.Errorf("starting etcd in %s: %w", dir, err) // the lock stays: etcd may still be about to start
	}
	return &embedded{Etcd: server, endpoint: "unix://" + client, lock: lock, closing: closing}, nil
}

// startWithin returns a server that answers. The start knows no context: if it takes too long it is left behind, and ends
// with the process.
func startWithin(ctx context.Context, limit time.Duration, cfg *embed.Config) (*embed.Etcd, error) {
	type outcome struct {
		server *embed.Etcd
		err    error
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not ready after %v; another program may have its database open", limit))
	defer cancel()
	started := make(chan outcome, 1)
	go func() {
		server, err := embed.StartEtcd(cfg)
		started <- outcome{server, err}
	}()
	var o outcome
	select {
	case o = <-started:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if o.err != nil {
		return nil, o.err
	}
	select {
	case <-o.server.Server.ReadyNotify():
		return o.server, nil
	case o.err = <-o.server.Err():
	case <-ctx.Done():
		o.err = context.Cause(ctx)
	}
	o.server.Close()
	return nil, o.err
}

// close ends the server and lets another have the folder.
func (e *embedded) close() {
	e.closing.Store(true)
	e.Close()
	_ = e.lock.Close()
}
