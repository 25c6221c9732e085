package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// startEtcd runs a single-node etcd in this process, with its data in dir and its sockets there too, out of reach of other
// users. It returns the endpoint to dial. The server ends the process if the disk is full.
func startEtcd(ctx context.Context, dir string) (server *embed.Etcd, endpoint string, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, "", fmt.Errorf("--data-dir: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, "", fmt.Errorf("--data-dir: %w", err)
	}
	client, peer := filepath.Join(dir, "etcd.sock"), filepath.Join(dir, "peer.sock")
	if len(client) > 100 {
		return nil, "", fmt.Errorf("--data-dir: %s is too long a path: the sockets in it must stay below 108 octets", dir)
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
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{"stderr"}
	server, err = embed.StartEtcd(cfg)
	if err != nil {
		return nil, "", fmt.Errorf("starting etcd in %s: %w", dir, err)
	}
	select {
	case <-server.Server.ReadyNotify():
		return server, "unix://" + client, nil
	case err = <-server.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(time.Minute):
		err = errors.New("not ready after a minute")
	}
	server.Close()
	return nil, "", fmt.Errorf("starting etcd in %s: %w", dir, err)
}
