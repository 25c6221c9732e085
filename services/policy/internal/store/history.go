package store

import (
	"context"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// Change is the audit record of one save, and the record it left.
type Change struct {
	*storev1.Change
	Record Record
}

// History returns up to limit changes of a mailbox with a version below before, newest first; before 0 means from the
// newest on. It reads linearizably, and by number: for the last of a range, etcd would read and sort all of it.
func (s *Store) History(ctx context.Context, mailbox allow.Mailbox, before int64, limit int) ([]Change, error) {
	rec, err := s.Get(ctx, mailbox)
	if err != nil {
		return nil, err
	}
	if before == 0 || before > rec.Version+1 {
		before = rec.Version + 1
	}
	first := max(1, before-int64(limit))
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, changeKey(mailbox, first), clientv3.WithRange(changeKey(mailbox, before)))
	if err != nil {
		return nil, wrap("reading the history", err)
	}
	if int64(len(resp.Kvs)) != before-first {
		return nil, fmt.Errorf("%w: of the changes %d to %d of %s there are %d", ErrDamaged, first, before-1, mailbox, len(resp.Kvs))
	}
	changes := make([]Change, 0, len(resp.Kvs))
	for _, kv := range slices.Backward(resp.Kvs) {
		c, after, err := decodeChange(kv, rec.Epoch)
		if err != nil {
			return nil, err
		}
		if after.Mailbox != mailbox || string(kv.Key) != changeKey(mailbox, after.Version) {
			return nil, fmt.Errorf("%w: %s holds a change of another mailbox or version", ErrDamaged, kv.Key)
		}
		changes = append(changes, Change{c, after})
	}
	return changes, nil
}
