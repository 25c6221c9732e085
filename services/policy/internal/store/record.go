package store

import (
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// Record is the list of one mailbox as some save left it.
type Record struct {
	Mailbox allow.Mailbox
	List    allow.List // empty: unrestricted
	// Version counts the mailbox's saves; 0: there never was one.
	Version int64
	// Revision of the save; 0: there never was one.
	Revision int64
	// Epoch of the store.
	Epoch     uint64
	UpdatedAt time.Time
	UpdatedBy string
	// Superseded says that this is what a repeated request once left, and the mailbox was changed since.
	Superseded bool
}

// decodeRecord reads a value below mailboxes/. Its own count must agree with etcd's, or somebody else wrote it.
func decodeRecord(kv *mvccpb.KeyValue, epoch uint64) (Record, error) {
	mailbox, err := canonicalMailbox(strings.TrimPrefix(string(kv.Key), mailboxPrefix))
	if err != nil {
		return Record{}, err
	}
	var m storev1.Mailbox
	if err := proto.Unmarshal(kv.Value, &m); err != nil {
		return Record{}, fmt.Errorf("%w: %s: %w", ErrDamaged, kv.Key, err)
	}
	if m.GetVersion() != kv.Version {
		return Record{}, fmt.Errorf("%w: %s says version %d, etcd %d: it was edited by hand", ErrDamaged, kv.Key, m.GetVersion(), kv.Version)
	}
	return newRecord(mailbox, &m, kv.ModRevision, epoch)
}

func newRecord(mailbox allow.Mailbox, m *storev1.Mailbox, revision int64, epoch uint64) (Record, error) {
	list, err := allow.RestoreList(m.GetNets())
	if err != nil {
		return Record{}, fmt.Errorf("%w: the record of %s: %w", ErrDamaged, mailbox, err)
	}
	return Record{
		Mailbox: mailbox, List: list, Version: m.GetVersion(), Revision: revision, Epoch: epoch,
		UpdatedAt: m.GetUpdateTime().AsTime(), UpdatedBy: m.GetUpdatedBy(),
	}, nil
}

func canonicalMailbox(name string) (allow.Mailbox, error) {
	mailbox, err := allow.ParseMailbox(name)
	if err != nil || mailbox.String() != name {
		return allow.Mailbox{}, fmt.Errorf("%w: the key of %q is not canonical", ErrDamaged, name)
	}
	return mailbox, nil
}

// decodeChange reads a value of log or below changes/: the audit record and the record it left.
func decodeChange(kv *mvccpb.KeyValue, epoch uint64) (*storev1.Change, Record, error) {
	var c storev1.Change
	if err := proto.Unmarshal(kv.Value, &c); err != nil {
		return nil, Record{}, fmt.Errorf("%w: %s: %w", ErrDamaged, kv.Key, err)
	}
	mailbox, err := canonicalMailbox(c.GetMailbox())
	if err != nil {
		return nil, Record{}, err
	}
	rec, err := newRecord(mailbox, c.GetAfter(), kv.ModRevision, epoch)
	return &c, rec, err
}

func encodeRecord(rec Record) *storev1.Mailbox {
	return &storev1.Mailbox{
		Nets: rec.List.Strings(), Version: rec.Version, UpdateTime: timestamppb.New(rec.UpdatedAt), UpdatedBy: rec.UpdatedBy,
	}
}
