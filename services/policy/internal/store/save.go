package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
)

const (
	// rememberedChanges is how many of a mailbox's newest changes are searched for a request id.
	rememberedChanges = 16
	// saveTimeout bounds a save with all its repetitions and its wait for earlier saves of the mailbox.
	saveTimeout = 6 * opTimeout
)

// Save is one change of one mailbox.
type Save struct {
	Mailbox allow.Mailbox
	// List is the new list; empty lifts the restriction.
	List allow.List
	// Etag, unless empty, must be the mailbox's current one.
	Etag string
	// ValidateOnly runs every check and writes nothing.
	ValidateOnly bool
	// Kind goes into the audit record, and Other for a rename: the mailbox on the other side.
	Kind  policyv1.ChangeKind
	Other allow.Mailbox
	Author
}

// Author says who asks for a change.
type Author struct {
	// Actor and ActorAddress are what the caller asserts; an empty Actor means the caller.
	Actor, ActorAddress string
	// Caller is the name in the calling service's certificate.
	Caller string
	// RequestID, unless empty, makes a repetition of the change the same change.
	RequestID string
}

// Etag returns the opaque version of the record.
func (r Record) Etag() string { return revision.Token{Epoch: r.Epoch, Revision: r.Revision}.String() }

// Get reads a mailbox's record, linearizably. A mailbox that never had one has Version 0.
func (s *Store) Get(ctx context.Context, mailbox allow.Mailbox) (Record, error) {
	snap, err := s.read(ctx, mailbox)
	return snap.record, err
}

// Save writes the record, its audit record and the log in one transaction and returns the record and whether it changed.
//
// In this order: a known request id answers with the change it made; the list the mailbox already has is a success without
// a change; an etag that is not the current one is an [EtagError]. After [ErrUnavailable] the save may or may not have
// taken effect; the same save with the same request id finds out.
func (s *Store) Save(ctx context.Context, save Save) (rec Record, changed bool, err error) {
	if save.RequestID == "" {
		save.RequestID = uuid.NewString() // so that our own repetition after an unknown outcome is safe
	}
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	id := save.Mailbox.ID()
	lock := s.locks[id[0]]
	select {
	case lock <- struct{}{}:
		defer func() { <-lock }()
	case <-ctx.Done():
		return Record{}, false, wrap("waiting for earlier saves", ctx.Err())
	}
	unknown := 0
	for {
		snap, err := s.read(ctx, save.Mailbox)
		if err != nil {
			return Record{}, false, err
		}
		rec, next, err := snap.decide(save)
		if err != nil || next != write {
			return rec, next == repeated && unknown > 0, err // after an unknown outcome, what is repeated is this very call
		}
		rec, won, err := s.write(ctx, save, snap)
		switch {
		case won:
			return rec, true, nil
		case err != nil:
			if unknown++; unknown > 2 || ctx.Err() != nil {
				return Record{}, false, err
			}
		}
	}
}

// snapshot is what is known about a mailbox before a write.
type snapshot struct {
	record  Record
	metaMod int64
	changes []change // newest last
}

type change struct {
	requestID string
	kind      policyv1.ChangeKind
	other     string // mailbox of a rename
	after     Record
}

func (s *Store) read(ctx context.Context, mailbox allow.Mailbox) (snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(clientv3.OpGet(metaKey), clientv3.OpGet(mailboxKey(mailbox))).Commit()
	if err != nil {
		return snapshot{}, wrap("reading the record", err)
	}
	meta, err := s.identity(resp.Header.ClusterId, resp.Responses[0].GetResponseRange().Kvs)
	if err != nil {
		return snapshot{}, err
	}
	snap := snapshot{record: Record{Mailbox: mailbox, Epoch: meta.epoch}, metaMod: meta.mod}
	if kvs := resp.Responses[1].GetResponseRange().Kvs; len(kvs) == 1 {
		if snap.record, err = decodeRecord(kvs[0], meta.epoch); err != nil {
			return snapshot{}, err
		}
	}
	snap.changes, err = s.readChanges(ctx, snap.record, resp.Header.Revision)
	if err != nil {
		return snapshot{}, err
	}
	newest := int64(0)
	if n := len(snap.changes); n > 0 {
		newest = snap.changes[n-1].after.Revision
	}
	if newest != snap.record.Revision {
		return snapshot{}, fmt.Errorf("%w: the record of %s is not what its newest change left", ErrDamaged, mailbox)
	}
	return snap, nil
}

// readChanges returns the newest changes up to the record, as they were at etcd's revision at. They are found by their
// numbers: for the last of a range, etcd would read and sort all of it. Without a record it looks for any change at all.
func (s *Store) readChanges(ctx context.Context, rec Record, at int64) ([]change, error) {
	first, end, limit := changesOf(rec.Mailbox), clientv3.GetPrefixRangeEnd(changesOf(rec.Mailbox)), int64(1)
	if rec.Version > 0 {
		first, end = changeKey(rec.Mailbox, max(1, rec.Version-rememberedChanges+1)), changeKey(rec.Mailbox, rec.Version+1)
		limit = rememberedChanges
	}
	resp, err := s.client.Get(ctx, first, clientv3.WithRange(end), clientv3.WithLimit(limit))
	if err != nil {
		return nil, wrap("reading the changes", err)
	}
	var changes []change
	for _, kv := range resp.Kvs {
		if kv.ModRevision > at {
			break // saved in between
		}
		c, after, err := decodeChange(kv, rec.Epoch)
		if err != nil {
			return nil, err
		}
		changes = append(changes, change{requestID: c.GetRequestId(), kind: c.GetKind(), other: c.GetOtherMailbox(), after: after})
	}
	return changes, nil
}

// step is what a save has to do next.
type step int

const (
	write    step = iota // nothing stands against it
	keep                 // the mailbox has this list already, or nothing may be written
	repeated             // this request id was carried out before
)

// decide says what to do, and what the answer is if nothing is to be written.
func (snap snapshot) decide(save Save) (Record, step, error) {
	for _, c := range snap.changes {
		if c.requestID == save.RequestID {
			if !c.after.List.Equal(save.List) {
				return Record{}, keep, ErrRequestIDReused
			}
			c.after.Superseded = c.after.Version < snap.record.Version
			return c.after, repeated, nil
		}
	}
	switch {
	case snap.record.List.Equal(save.List):
		return snap.record, keep, nil
	case save.Etag != "" && save.Etag != snap.record.Etag():
		return Record{}, keep, &EtagError{Current: snap.record}
	case save.ValidateOnly:
		return Record{Mailbox: save.Mailbox, List: save.List}, keep, nil
	}
	return Record{}, write, nil
}

// write commits the save if nothing changed since snap. won is false, without an error, if something did.
func (s *Store) write(ctx context.Context, save Save, snap snapshot) (rec Record, won bool, err error) {
	rec = Record{
		Mailbox: save.Mailbox, List: save.List, Version: snap.record.Version + 1, Epoch: snap.record.Epoch,
		UpdatedAt: time.Now().UTC().Truncate(time.Microsecond), UpdatedBy: save.Actor,
	}
	if rec.UpdatedBy == "" {
		rec.UpdatedBy = save.Caller
	}
	after := encodeRecord(rec)
	record, err1 := proto.Marshal(after)
	audit, err2 := proto.Marshal(&storev1.Change{
		Mailbox: save.Mailbox.String(), Before: snap.record.List.Strings(), After: after,
		ActorId: save.Actor, ActorAddress: save.ActorAddress, Caller: save.Caller, RequestId: save.RequestID,
		Kind: save.Kind, OtherMailbox: save.Other.String(),
	})
	if err := errors.Join(err1, err2); err != nil {
		return Record{}, false, fmt.Errorf("encoding the record: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).If(
		clientv3.Compare(clientv3.ModRevision(mailboxKey(save.Mailbox)), "=", snap.record.Revision),
		clientv3.Compare(clientv3.ModRevision(metaKey), "=", snap.metaMod),
	).Then(
		clientv3.OpPut(mailboxKey(save.Mailbox), string(record)),
		clientv3.OpPut(changeKey(save.Mailbox, rec.Version), string(audit)),
		clientv3.OpPut(logKey, string(audit)),
	).Commit()
	if err != nil {
		return Record{}, false, wrap("saving", err)
	}
	if resp.Header.ClusterId != s.cluster {
		return Record{}, false, fmt.Errorf("saving: %w: cluster %x, not %x", ErrForeign, resp.Header.ClusterId, s.cluster)
	}
	rec.Revision = resp.Header.Revision
	return rec, resp.Succeeded, nil
}
