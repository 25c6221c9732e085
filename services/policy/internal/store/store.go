// Package store keeps the lists of allowed nets in etcd and proves that what it reads is complete.
//
// A mailbox without a record is unrestricted, so a record that a read or a watch misses would silently lift a restriction.
// Nothing is therefore served unless it was counted: every save puts the key "log" once, so etcd's own version of that key
// numbers all saves without gaps, and records are never deleted, so their versions add up to the same number.
package store

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

const (
	prefix        = "/allowednets/v1/"
	metaKey       = prefix + "meta"
	logKey        = prefix + "log"
	mailboxPrefix = prefix + "mailboxes/"
	changePrefix  = prefix + "changes/"

	format = 1

	// opTimeout bounds one request to etcd.
	opTimeout = 5 * time.Second
	// tellEvery is how often the log is told of something that lasts.
	tellEvery = 30 * time.Second
)

// Errors of this package. Callers tell them apart with errors.Is.
var (
	// ErrUnavailable: etcd did not answer, or not in time. A write may or may not have taken effect.
	ErrUnavailable = errors.New("the store is unavailable")
	// ErrNotCreated: etcd holds no store of ours. A lost volume or a wrong endpoint looks like this.
	ErrNotCreated = errors.New("etcd holds no Allowed Nets store")
	// ErrDamaged: what etcd holds contradicts itself; somebody wrote to it by hand, or records are missing.
	ErrDamaged = errors.New("the store is damaged")
	// ErrForeign: another etcd cluster, or another store, answers at the endpoints than when this process started.
	ErrForeign = errors.New("another store answers at the endpoints than at the start")
	// ErrRequestIDReused: the request id belongs to a change with other content.
	ErrRequestIDReused = errors.New("the request id was used for a change with other content")
)

// EtagError says that the mailbox is not at the etag that the caller asked for.
type EtagError struct {
	Current Record
}

func (e *EtagError) Error() string { return "the list was changed by " + e.Current.UpdatedBy }

// Config says how to reach etcd.
type Config struct {
	Endpoints []string
	TLS       *tls.Config // nil: plain text
	User      string
	Password  string
	// DialOptions are added to every connection; tests put faults there.
	DialOptions []grpc.DialOption
	// Log is told while etcd does not answer [Open]; nil: nobody is.
	Log *slog.Logger
}

// Store reads and writes lists. It is safe for concurrent use.
type Store struct {
	cfg     Config
	client  *clientv3.Client
	cluster uint64             // etcd's cluster id; 0 until it is known
	id      uint64             // the store's; 0 until it is known
	locks   [256]chan struct{} // one writer per mailbox and process, so that writers do not fail each other's compare
}

// Open connects to the store. It waits for etcd until ctx ends. With create, an etcd without a store gets one, with epoch
// 1; without, that is [ErrNotCreated].
func Open(ctx context.Context, cfg Config, create bool) (*Store, error) {
	client, err := cfg.dial()
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, client: client}
	for i := range s.locks {
		s.locks[i] = make(chan struct{}, 1)
	}
	if err := s.identify(ctx, create); err != nil {
		_ = client.Close()
		return nil, err
	}
	return s, nil
}

// Close ends the connections.
func (s *Store) Close() error { return s.client.Close() }

func (c Config) dial(more ...grpc.DialOption) (*clientv3.Client, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            c.Endpoints,
		TLS:                  c.TLS,
		Username:             c.User,
		Password:             c.Password,
		DialOptions:          slices.Concat(c.DialOptions, more),
		DialTimeout:          opTimeout, // of logging in, if there is a user
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		MaxCallRecvMsgSize:   64 << 20,
		Logger:               zap.NewNop(), // every failure reaches us as an error, and is logged once, by whoever handles it
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %v: %w", c.Endpoints, err)
	}
	return client, nil
}

// identify learns the cluster id and makes sure that there is a store of a format we know.
func (s *Store) identify(ctx context.Context, create bool) error {
	var told time.Time
	for {
		h, err := s.head(ctx)
		switch {
		case err == nil:
			s.cluster, s.id = h.cluster, h.id
			return nil
		case create && errors.Is(err, ErrNotCreated):
			switch err = s.create(ctx); {
			case err == nil:
				continue
			case !errors.Is(err, ErrUnavailable):
				return err
			}
		case !errors.Is(err, ErrUnavailable):
			return err
		}
		if s.cfg.Log != nil && ctx.Err() == nil && time.Since(told) > tellEvery {
			told = time.Now()
			s.cfg.Log.WarnContext(ctx, "waiting for etcd", "endpoints", s.cfg.Endpoints, "error", err)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (s *Store) create(ctx context.Context) error {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	value, err := proto.Marshal(&storev1.Meta{Format: format, Epoch: 1, Id: binary.BigEndian.Uint64(id[:]) | 1})
	if err != nil {
		return fmt.Errorf("encoding meta: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	_, err = s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(metaKey), "=", 0), clientv3.Compare(clientv3.CreateRevision(logKey), "=", 0)).
		Then(clientv3.OpPut(metaKey, string(value))).Commit()
	return wrap("creating the store", err)
}

// RaiseEpoch makes sure that the store's epoch is at least epoch. A higher one says that its history is to be believed
// although it is behind what sidecars have seen: an operator restored a backup.
func (s *Store) RaiseEpoch(ctx context.Context, epoch uint64) error {
	for {
		h, err := s.head(ctx)
		if err != nil || h.epoch >= epoch {
			return err
		}
		value, err := proto.Marshal(&storev1.Meta{Format: format, Epoch: epoch, Id: h.id})
		if err != nil {
			return fmt.Errorf("encoding meta: %w", err)
		}
		opCtx, cancel := context.WithTimeout(ctx, opTimeout)
		_, err = s.client.Txn(opCtx).
			If(clientv3.Compare(clientv3.ModRevision(metaKey), "=", h.mod)).
			Then(clientv3.OpPut(metaKey, string(value))).Commit()
		cancel()
		if err != nil {
			return wrap("raising the epoch", err)
		}
	}
}

// head is what one linearizable read tells about the whole store.
type head struct {
	meta
	cluster  uint64
	revision int64            // of the newest save, or of meta if that is newer
	version  int64            // number of saves ever
	newest   *mvccpb.KeyValue // the newest save's audit record; nil if version is 0
	at       int64            // etcd's revision at the read
}

// meta is the store's identity.
type meta struct {
	id    uint64
	epoch uint64
	mod   int64 // revision of its last write
}

// head reads log and meta at one revision.
func (s *Store) head(ctx context.Context) (head, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(clientv3.OpGet(metaKey), clientv3.OpGet(logKey)).Commit()
	if err != nil {
		return head{}, wrap("reading the newest save", err)
	}
	h := head{cluster: resp.Header.ClusterId, at: resp.Header.Revision}
	if kvs := resp.Responses[1].GetResponseRange().Kvs; len(kvs) == 1 {
		h.revision, h.version, h.newest = kvs[0].ModRevision, kvs[0].Version, kvs[0]
	}
	h.meta, err = s.identity(resp.Header.ClusterId, resp.Responses[0].GetResponseRange().Kvs)
	if errors.Is(err, ErrNotCreated) && h.version > 0 {
		return head{}, fmt.Errorf("%w: it has saves but no %s", ErrDamaged, metaKey)
	}
	h.revision = max(h.revision, h.mod)
	return h, err
}

// holds reports whether there is the save of a mailbox that an anchor names, by a linearizable read. Audit records are written
// once and never deleted. If the store is of another epoch by now, that is [ErrUnavailable].
func (s *Store) holds(ctx context.Context, mailbox allow.Mailbox, epoch uint64, anchor Anchor) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(clientv3.OpGet(metaKey), clientv3.OpGet(changeKey(mailbox, anchor.version()))).Commit()
	if err != nil {
		return false, wrap("looking for a save", err)
	}
	meta, err := s.identity(resp.Header.ClusterId, resp.Responses[0].GetResponseRange().Kvs)
	if err != nil {
		return false, err
	}
	if meta.epoch != epoch {
		return false, fmt.Errorf("looking for a save of epoch %d: %w: the epoch is %d by now", epoch, ErrUnavailable, meta.epoch)
	}
	kvs := resp.Responses[1].GetResponseRange().Kvs
	return len(kvs) == 1 && anchor.of(kvs[0]), nil
}

// identity decodes meta and refuses an answer of another etcd cluster, or of another store, than the first one that answered.
func (s *Store) identity(cluster uint64, metaKVs []*mvccpb.KeyValue) (meta, error) {
	if s.cluster != 0 && cluster != s.cluster {
		return meta{}, fmt.Errorf("%w: cluster %x, not %x", ErrForeign, cluster, s.cluster)
	}
	m, err := decodeMeta(metaKVs)
	if err == nil && s.id != 0 && m.id != s.id {
		return meta{}, fmt.Errorf("%w: store %x, not %x", ErrForeign, m.id, s.id)
	}
	return m, err
}

func decodeMeta(kvs []*mvccpb.KeyValue) (meta, error) {
	if len(kvs) == 0 {
		return meta{}, ErrNotCreated
	}
	var m storev1.Meta
	if err := proto.Unmarshal(kvs[0].Value, &m); err != nil {
		return meta{}, fmt.Errorf("%w: %s: %w", ErrDamaged, metaKey, err)
	}
	if m.GetFormat() != format || m.GetEpoch() == 0 || m.GetId() == 0 {
		return meta{}, fmt.Errorf("%w: %s has format %d, epoch %d and id %x; this program knows format %d, epochs from 1 and ids but 0",
			ErrDamaged, metaKey, m.GetFormat(), m.GetEpoch(), m.GetId(), format)
	}
	return meta{id: m.GetId(), epoch: m.GetEpoch(), mod: kvs[0].ModRevision}, nil
}

// wrap makes every error of etcd's client an [ErrUnavailable], except a permission error, which no retry cures.
func wrap(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty):
		return fmt.Errorf("%s: etcd refused our user: %w", doing, err)
	}
	return fmt.Errorf("%s: %w: %w", doing, ErrUnavailable, err)
}

func mailboxKey(m allow.Mailbox) string { return mailboxPrefix + m.String() }

// changeKey sorts by version. A scan of "changes/a@b/" meets no other mailbox: that one would have to begin with "a@b/",
// and a local part has no "@".
func changeKey(m allow.Mailbox, version int64) string {
	return fmt.Sprintf("%s%020d", changesOf(m), version)
}

func changesOf(m allow.Mailbox) string { return changePrefix + m.String() + "/" }
