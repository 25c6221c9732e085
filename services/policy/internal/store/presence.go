package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
)

const replicaPrefix = prefix + "replicas/"

// presenceTTL is how long, in seconds, etcd keeps the record of a replica that went away: as long as its sidecars count as
// lost.
const presenceTTL = 600

// Presence publishes what one replica knows about its sidecars. It is not safe for concurrent use.
type Presence struct {
	store *Store
	name  string
	lease clientv3.LeaseID
}

// Presence returns the presence of the replica with the name, which must be unique.
func (s *Store) Presence(name string) *Presence { return &Presence{store: s, name: name} }

// Publish writes the record. All records of a replica live on one lease, which each call renews.
func (p *Presence) Publish(ctx context.Context, rec *storev1.Replica) error {
	value, err := proto.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encoding the replica's record: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	if p.lease != 0 {
		if _, err := p.store.client.KeepAliveOnce(ctx, p.lease); errors.Is(err, rpctypes.ErrLeaseNotFound) {
			p.lease = 0
		} else if err != nil {
			return wrap("renewing the replica's lease", err)
		}
	}
	if p.lease == 0 {
		grant, err := p.store.client.Grant(ctx, presenceTTL)
		if err != nil {
			return wrap("granting the replica's lease", err)
		}
		p.lease = grant.ID
	}
	_, err = p.store.client.Put(ctx, replicaPrefix+p.name, string(value), clientv3.WithLease(p.lease))
	return wrap("publishing the replica's record", err)
}

// Replicas returns the record of every replica by its name.
func (s *Store) Replicas(ctx context.Context) (map[string]*storev1.Replica, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, replicaPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, wrap("reading the replicas' records", err)
	}
	replicas := make(map[string]*storev1.Replica, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		rec := new(storev1.Replica)
		if err := proto.Unmarshal(kv.Value, rec); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, kv.Key, err)
		}
		replicas[strings.TrimPrefix(string(kv.Key), replicaPrefix)] = rec
	}
	return replicas, nil
}
