package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon bounds the wait for what must happen.
const soon = 20 * time.Second

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	t.Cleanup(cancel)
	return ctx
}

// open opens the store, creating it if need be, over the wire.
func open(t testing.TB, e *etcdtest.Etcd, wire *etcdtest.Wire) *Store {
	t.Helper()
	s, err := Open(within(t), Config{Endpoints: []string{e.Endpoint()}, DialOptions: wire.Options()}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func mailbox(t testing.TB, name string) allow.Mailbox {
	t.Helper()
	m, err := allow.ParseMailbox(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func list(t testing.TB, text string) allow.List {
	t.Helper()
	l, err := allow.Rules{}.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// nthList is another list for every n.
func nthList(t testing.TB, n int) allow.List {
	return list(t, fmt.Sprintf("8.%d.%d.0/24, 2a00:%x::/32", n>>8&255, n&255, n&0xffff))
}

func mustSave(t testing.TB, s *Store, save Save) Record {
	t.Helper()
	rec, _, err := s.Save(t.Context(), save)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func put(t testing.TB, e *etcdtest.Etcd, key string, value []byte) {
	t.Helper()
	if _, err := e.Client().Put(t.Context(), key, string(value)); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, e *etcdtest.Etcd, key string) {
	t.Helper()
	if resp, err := e.Client().Delete(t.Context(), key); err != nil || resp.Deleted != 1 {
		t.Fatalf("deleting %s: %v, %v", key, resp, err)
	}
}

func encoded(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// puts returns what a call writes; nil for the reads around a save.
func puts(req any) []*pb.RequestOp {
	txn, ok := req.(*pb.TxnRequest)
	if !ok || len(txn.GetSuccess()) == 0 || txn.GetSuccess()[0].GetRequestPut() == nil {
		return nil
	}
	return txn.GetSuccess()
}

func isWrite(req any) bool { return puts(req) != nil }

func TestOpen(t *testing.T) {
	goodMeta := &storev1.Meta{Format: 1, Epoch: 1, Id: 7}
	tests := []struct {
		name   string
		keys   map[string][]byte
		create bool
		want   error
		says   string
	}{
		{name: "an empty etcd is no store", want: ErrNotCreated},
		{name: "an empty etcd becomes one if asked", create: true},
		{name: "an existing store", keys: map[string][]byte{metaKey: encoded(t, goodMeta)}},
		{name: "an existing store is not created again", keys: map[string][]byte{metaKey: encoded(t, goodMeta)}, create: true},
		{name: "saves without meta", keys: map[string][]byte{logKey: nil}, want: ErrDamaged},
		{name: "saves without meta are not papered over", keys: map[string][]byte{logKey: nil}, create: true, want: ErrDamaged},
		{name: "a later format", keys: map[string][]byte{metaKey: encoded(t, &storev1.Meta{Format: 2, Epoch: 1, Id: 7})}, want: ErrDamaged, says: "format 2"},
		{name: "no format", keys: map[string][]byte{metaKey: {}}, create: true, want: ErrDamaged},
		{name: "no epoch", keys: map[string][]byte{metaKey: encoded(t, &storev1.Meta{Format: 1, Id: 7})}, create: true, want: ErrDamaged},
		{name: "no id", keys: map[string][]byte{metaKey: encoded(t, &storev1.Meta{Format: 1, Epoch: 1})}, create: true, want: ErrDamaged},
		{name: "garbage", keys: map[string][]byte{metaKey: []byte("\xff\xff")}, create: true, want: ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := etcdtest.Start(t)
			for key, value := range tt.keys {
				put(t, e, key, value)
			}
			s, err := Open(within(t), Config{Endpoints: []string{e.Endpoint()}}, tt.create)
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("Open = %v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			defer func() { _ = s.Close() }()
			if len(tt.keys) > 0 && s.id != goodMeta.GetId() {
				t.Errorf("the store's id is %x", s.id)
			}
		})
	}
}

func TestCreateOnce(t *testing.T) {
	e := etcdtest.Start(t)
	var ids [8]uint64
	var opening sync.WaitGroup
	for i := range ids {
		opening.Go(func() {
			s, err := Open(within(t), Config{Endpoints: []string{e.Endpoint()}}, true)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = s.id
			_ = s.Close()
		})
	}
	opening.Wait()
	for _, id := range ids {
		if id == 0 || id != ids[0] {
			t.Fatalf("several stores were created: %x", ids)
		}
	}
}

func TestOpenWaitsForEtcd(t *testing.T) {
	e := etcdtest.Start(t)
	e.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, Config{Endpoints: []string{e.Endpoint()}}, true); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("Open without etcd = %v, want %v", err, ErrUnavailable)
	}
	opened := make(chan error)
	go func() {
		s, err := Open(within(t), Config{Endpoints: []string{e.Endpoint()}}, true)
		if err == nil {
			err = s.Close()
		}
		opened <- err
	}()
	e.Restart()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
}
