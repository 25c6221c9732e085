package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
)

// Keys of the store; docs/architecture.md has the rest.
const (
	prefix = "/allowednets/v1/"
	logKey = prefix + "log"
)

// mailbox is the n-th of a large host: ten thousand to a domain.
func mailbox(n int) string { return fmt.Sprintf("user%07d@d%03d.example.com", n, n/10_000) }

// nets is the list of the n-th mailbox: three nets, shared by 20 mailboxes.
func nets(n int) []string {
	n /= 20
	return []string{fmt.Sprintf("8.%d.%d.0/24", n>>8&255, n&255), fmt.Sprintf("9.%d.%d.%d", n>>16&255, n>>8&255, n&255), "2a00:1450::/32"}
}

// fill makes the data of an etcd that has seen one save of each of n mailboxes and a compaction, in the folder data. It goes
// through etcd's own storage, one transaction per save as the policy service writes them, but past its network and log: over RPCs
// a million saves take half an hour.
func fill(tb testing.TB, data string, n int) {
	tb.Helper()
	db := filepath.Join(tb.TempDir(), "db")
	cfg := backend.DefaultBackendConfig(zap.NewNop())
	cfg.Path, cfg.UnsafeNoFsync = db, true
	b := backend.New(cfg)
	s := mvcc.NewStore(zap.NewNop(), b, &lease.FakeLessor{}, mvcc.StoreConfig{CompactionBatchLimit: 100_000, CompactionSleepInterval: time.Millisecond})
	trace := traceutil.TODO()
	meta, err := proto.Marshal(&storev1.Meta{Format: 1, Epoch: 1, Id: 7})
	must(tb, err)
	txn := s.Write(trace)
	txn.Put([]byte(prefix+"meta"), meta, lease.NoLease)
	txn.End()
	now := timestamppb.Now()
	for i := range n {
		after := &storev1.Mailbox{Nets: nets(i), Version: 1, UpdateTime: now, UpdatedBy: "admin@example.com"}
		record, err1 := proto.Marshal(after)
		change, err2 := proto.Marshal(&storev1.Change{
			Mailbox: mailbox(i), After: after, ActorId: "admin@example.com", ActorAddress: "192.0.2.1",
			Caller: "admin.allowednets.internal", RequestId: fmt.Sprintf("00000000-0000-4000-8000-%012d", i),
		})
		must(tb, err1, err2)
		txn := s.Write(trace)
		txn.Put([]byte(prefix+"mailboxes/"+mailbox(i)), record, lease.NoLease)
		txn.Put([]byte(fmt.Sprintf("%schanges/%s/%020d", prefix, mailbox(i), 1)), change, lease.NoLease)
		txn.Put([]byte(logKey), change, lease.NoLease)
		txn.End()
	}
	compacted, err := s.Compact(trace, s.Rev())
	must(tb, err)
	<-compacted
	s.Commit()
	must(tb, s.Close(), b.Close())
	must(tb, snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath: db, SkipHashCheck: true, OutputDataDir: data,
		Name: "etcd", PeerURLs: []string{"http://127.0.0.1:2380"}, InitialCluster: "etcd=http://127.0.0.1:2380", InitialClusterToken: "etcd",
	}))
	must(tb, os.Remove(db))
}
