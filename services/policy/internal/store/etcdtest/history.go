package etcdtest

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// History is what was saved, oldest first. It comes from the audit records, which nothing but a save's own checks reads, so
// it is an oracle for all that is served.
type History []Change

// Change is one save.
type Change struct {
	Revision int64
	Mailbox  allow.Mailbox
	List     allow.List
}

// History reads the audit records.
func (e *Etcd) History() History {
	e.tb.Helper()
	// A test's cleanup reads it too, and must end also if etcd did not start again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.tb.Context()), time.Minute)
	defer cancel()
	resp, err := e.Client().Get(ctx, "/allowednets/v1/changes/", clientv3.WithPrefix())
	if err != nil {
		e.tb.Fatal(err)
	}
	var h History
	for _, kv := range resp.Kvs {
		var c storev1.Change
		if err := proto.Unmarshal(kv.Value, &c); err != nil {
			e.tb.Fatal(err)
		}
		mailbox, err := allow.ParseMailbox(c.GetMailbox())
		if err != nil {
			e.tb.Fatal(err)
		}
		list, err := allow.RestoreList(c.GetAfter().GetNets())
		if err != nil {
			e.tb.Fatal(err)
		}
		h = append(h, Change{kv.ModRevision, mailbox, list})
	}
	slices.SortFunc(h, func(a, b Change) int { return cmp.Compare(a.Revision, b.Revision) })
	return h
}

// At returns the lists of all restricted mailboxes at a revision, and how many saves there had been.
func (h History) At(revision int64) (lists map[allow.Mailbox]allow.List, saves int64) {
	lists = make(map[allow.Mailbox]allow.List)
	for _, c := range h {
		if c.Revision > revision {
			break
		}
		lists[c.Mailbox] = c.List
		saves++
	}
	maps.DeleteFunc(lists, func(_ allow.Mailbox, l allow.List) bool { return l.Len() == 0 })
	return lists, saves
}
