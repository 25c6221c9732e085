package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// contents returns everything in etcd by key.
func contents(t testing.TB, e *etcdtest.Etcd) map[string]*mvccpb.KeyValue {
	t.Helper()
	resp, err := e.Client().Get(t.Context(), "", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]*mvccpb.KeyValue)
	for _, kv := range resp.Kvs {
		all[string(kv.Key)] = kv
	}
	return all
}

// unchanged fails the test if etcd does not hold what it held before.
func unchanged(t testing.TB, e *etcdtest.Etcd, before map[string]*mvccpb.KeyValue) {
	t.Helper()
	for key, kv := range contents(t, e) {
		if was := before[key]; was == nil || was.ModRevision != kv.ModRevision {
			t.Errorf("%s was written", key)
		}
		delete(before, key)
	}
	for key := range before {
		t.Errorf("%s was deleted", key)
	}
}

func nets(r Record) string { return strings.Join(r.List.Strings(), " ") }

func TestSaveIsOneTransaction(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	s := open(t, e, &etcdtest.Wire{})
	saves := []Save{
		{Mailbox: mailbox(t, "alice@example.com"), List: list(t, "8.8.8.8, 1.1.1.0/24"), Author: Author{Actor: "admin", ActorAddress: "9.9.9.9", Caller: "dashboard", RequestID: "first"}},
		{Mailbox: mailbox(t, "bob@example.com"), List: list(t, "2a00:1450::/32"), Author: Author{Caller: "tool"}},
		{Mailbox: mailbox(t, "alice@example.com"), Author: Author{Caller: "tool", Actor: "admin"}},
	}
	versions := make(map[string]int64)
	before := make(map[string][]string)
	for i, save := range saves {
		name := save.Mailbox.String()
		versions[name]++
		begin := time.Now().Add(-time.Millisecond)
		rec, changed, err := s.Save(t.Context(), save)
		if err != nil || !changed {
			t.Fatalf("save %d: changed %v, %v", i, changed, err)
		}
		all := contents(t, e)
		record, log := all["/allowednets/v1/mailboxes/"+name], all["/allowednets/v1/log"]
		change := all[fmt.Sprintf("/allowednets/v1/changes/%s/%020d", name, versions[name])]
		if record == nil || change == nil || log == nil {
			t.Fatalf("save %d: a key is missing among %v", i, all)
		}
		if record.ModRevision != rec.Revision || change.ModRevision != rec.Revision || log.ModRevision != rec.Revision {
			t.Errorf("save %d: revisions of record %d, change %d and log %d; the save says %d", i, record.ModRevision, change.ModRevision, log.ModRevision, rec.Revision)
		}
		if log.Version != int64(i+1) || record.Version != versions[name] || change.Version != 1 {
			t.Errorf("save %d: versions of log %d, record %d, change %d", i, log.Version, record.Version, change.Version)
		}
		by := save.Actor
		if by == "" {
			by = save.Caller
		}
		if rec.Version != versions[name] || rec.Epoch != 1 || rec.UpdatedBy != by || rec.UpdatedAt.Before(begin) || rec.UpdatedAt.After(time.Now()) || !rec.List.Equal(save.List) {
			t.Errorf("save %d returned %+v", i, rec)
		}
		after := &storev1.Mailbox{Nets: save.List.Strings(), Version: rec.Version, UpdateTime: timestamppb.New(rec.UpdatedAt), UpdatedBy: by}
		var gotRecord storev1.Mailbox
		var gotChange storev1.Change
		if err := errors.Join(proto.Unmarshal(record.Value, &gotRecord), proto.Unmarshal(change.Value, &gotChange)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(after, &gotRecord, protocmp.Transform()); diff != "" {
			t.Errorf("save %d: record (-want +got):\n%s", i, diff)
		}
		id := save.RequestID
		if id == "" {
			id = gotChange.GetRequestId() // invented
		}
		want := &storev1.Change{
			Mailbox: name, Before: before[name], After: after, ActorId: save.Actor, ActorAddress: save.ActorAddress, Caller: save.Caller, RequestId: id,
		}
		if diff := cmp.Diff(want, &gotChange, protocmp.Transform()); diff != "" {
			t.Errorf("save %d: change (-want +got):\n%s", i, diff)
		}
		if string(log.Value) != string(change.Value) {
			t.Errorf("save %d: the log is not the newest change", i)
		}
		before[name] = save.List.Strings()
		if got, err := s.Get(t.Context(), save.Mailbox); err != nil || !cmp.Equal(got, rec, cmp.Comparer(func(a, b Record) bool {
			return nets(a) == nets(b) && a.Etag() == b.Etag() && a.UpdatedAt.Equal(b.UpdatedAt) && a.UpdatedBy == b.UpdatedBy && a.Version == b.Version && a.Mailbox == b.Mailbox
		})) {
			t.Errorf("save %d: Get = %+v, %v, want %+v", i, got, err, rec)
		}
	}
}

// TestDecide goes through what a save does besides writing: in which order it looks at what.
func TestDecide(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	s := open(t, e, &etcdtest.Wire{})
	alice := mailbox(t, "alice@example.com")
	one, two := list(t, "8.8.8.8"), list(t, "8.8.4.4")
	absent, err := s.Get(t.Context(), alice)
	if err != nil || absent.Version != 0 || absent.List.Len() != 0 || absent.Etag() == "" {
		t.Fatalf("Get of a mailbox without a list = %+v, %v", absent, err)
	}
	first := mustSave(t, s, Save{Mailbox: alice, List: one, Etag: absent.Etag(), Author: Author{RequestID: "a", Actor: "first"}})
	second := mustSave(t, s, Save{Mailbox: alice, List: two, Etag: first.Etag(), Author: Author{RequestID: "b", Actor: "second"}})

	tests := []struct {
		name    string
		save    Save
		want    Record
		changes bool
		err     error
	}{
		{name: "the same list", save: Save{List: two}, want: second},
		{name: "the same list, whatever the etag", save: Save{List: two, Etag: first.Etag()}, want: second},
		{name: "the same list, whatever the request id", save: Save{List: two, Author: Author{RequestID: "new"}}, want: second},
		{name: "a stale etag", save: Save{List: one, Etag: first.Etag()}, err: &EtagError{second}},
		{name: "the etag of absence", save: Save{List: one, Etag: absent.Etag()}, err: &EtagError{second}},
		{name: "an etag that never was", save: Save{List: one, Etag: "1-999999"}, err: &EtagError{second}},
		{name: "an etag of another epoch", save: Save{List: one, Etag: "2" + strings.TrimPrefix(second.Etag(), "1")}, err: &EtagError{second}},
		{name: "no etag at all", save: Save{List: one, Etag: "nonsense"}, err: &EtagError{second}},
		{name: "a stale etag to clear", save: Save{Etag: first.Etag()}, err: &EtagError{second}},
		{name: "a repetition after somebody else's change", save: Save{List: one, Author: Author{RequestID: "a"}}, want: first},
		{name: "a repetition with its old etag", save: Save{List: one, Etag: absent.Etag(), Author: Author{RequestID: "a"}}, want: first},
		{name: "a repetition of the newest", save: Save{List: two, Etag: first.Etag(), Author: Author{RequestID: "b"}}, want: second},
		{name: "a repetition with other content", save: Save{List: two, Author: Author{RequestID: "a"}}, err: ErrRequestIDReused},
		{name: "a repetition that clears", save: Save{Author: Author{RequestID: "a"}}, err: ErrRequestIDReused},
		{name: "other content and a stale etag", save: Save{List: list(t, "9.9.9.9"), Etag: first.Etag(), Author: Author{RequestID: "b"}}, err: ErrRequestIDReused},
		{name: "a draft", save: Save{List: list(t, "9.9.9.9"), ValidateOnly: true}, want: Record{Mailbox: alice, List: list(t, "9.9.9.9")}},
		{name: "a draft with the etag", save: Save{List: list(t, "9.9.9.9"), ValidateOnly: true, Etag: second.Etag()}, want: Record{Mailbox: alice, List: list(t, "9.9.9.9")}},
		{name: "a draft with a stale etag", save: Save{List: list(t, "9.9.9.9"), ValidateOnly: true, Etag: first.Etag()}, err: &EtagError{second}},
		{name: "a draft with a used request id", save: Save{List: list(t, "9.9.9.9"), ValidateOnly: true, Author: Author{RequestID: "a"}}, err: ErrRequestIDReused},
		{name: "a draft to clear", save: Save{ValidateOnly: true}, want: Record{Mailbox: alice}},
		{name: "the same nets in another order are another list", save: Save{List: list(t, "8.8.4.4, 8.8.8.8"), Etag: second.Etag()}, changes: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := contents(t, e)
			tt.save.Mailbox = alice
			rec, changed, err := s.Save(t.Context(), tt.save)
			if tt.changes {
				if err != nil || !changed || rec.Version != 3 {
					t.Fatalf("Save = %+v, %v, %v; want a change", rec, changed, err)
				}
				return
			}
			unchanged(t, e, before)
			if changed {
				t.Error("it says that it changed something")
			}
			var etag *EtagError
			if wantEtag := (*EtagError)(nil); errors.As(tt.err, &wantEtag) {
				if !errors.As(err, &etag) || etag.Current.Etag() != wantEtag.Current.Etag() || etag.Current.UpdatedBy != "second" ||
					!etag.Current.UpdatedAt.Equal(second.UpdatedAt) || nets(etag.Current) != "8.8.4.4" {
					t.Errorf("error = %#v, want %#v", err, tt.err)
				}
				return
			}
			if !errors.Is(err, tt.err) {
				t.Fatalf("error = %v, want %v", err, tt.err)
			}
			if err == nil && (nets(rec) != nets(tt.want) || rec.Revision != tt.want.Revision || rec.UpdatedBy != tt.want.UpdatedBy || rec.Version != tt.want.Version || rec.Mailbox != alice) {
				t.Errorf("Save = %+v, want %+v", rec, tt.want)
			}
		})
	}
}

func TestClear(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	s := open(t, e, &etcdtest.Wire{})
	alice := mailbox(t, "alice@example.com")
	if rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice}); changed || err != nil || rec.Version != 0 {
		t.Errorf("clearing what was never set = %+v, %v, %v", rec, changed, err)
	}
	absent, _ := s.Get(t.Context(), alice)
	mustSave(t, s, Save{Mailbox: alice, List: list(t, "8.8.8.8")})
	cleared, changed, err := s.Save(t.Context(), Save{Mailbox: alice})
	if !changed || err != nil || cleared.Version != 2 || cleared.List.Len() != 0 {
		t.Errorf("clearing = %+v, %v, %v", cleared, changed, err)
	}
	if rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice}); changed || err != nil || rec.Revision != cleared.Revision {
		t.Errorf("clearing again = %+v, %v, %v", rec, changed, err)
	}
	// Whoever read "absent" did not see that there was a list in between.
	var etag *EtagError
	if _, _, err := s.Save(t.Context(), Save{Mailbox: alice, List: list(t, "8.8.8.8"), Etag: absent.Etag()}); !errors.As(err, &etag) {
		t.Errorf("a save at the etag of absence after a clear = %v", err)
	}
	if resp, err := e.Client().Get(t.Context(), mailboxKey(alice)); err != nil || len(resp.Kvs) != 1 || resp.Kvs[0].Version != 2 {
		t.Errorf("a cleared record must stay: %v, %v", resp, err)
	}
}

func TestOnlyTheNewestRequestsAreRemembered(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s := open(t, e, wire)
	alice := mailbox(t, "alice@example.com")
	// Neighbours in the key space whose changes must not be taken for Alice's.
	for _, name := range []string{"alice@example.co", "alice@example.com.de", "al@example.com", "alice/x@example.com"} {
		mustSave(t, s, Save{Mailbox: mailbox(t, name), List: nthList(t, 77), Author: Author{RequestID: "0"}})
	}
	const saves = 40
	var recs []Record
	for i := range saves {
		recs = append(recs, mustSave(t, s, Save{Mailbox: alice, List: nthList(t, i), Author: Author{RequestID: fmt.Sprint(i)}}))
	}
	for i := saves - 1; i >= saves-rememberedChanges; i-- {
		rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: nthList(t, i), Author: Author{RequestID: fmt.Sprint(i)}})
		if err != nil || changed || rec.Revision != recs[i].Revision || rec.Version != int64(i+1) {
			t.Errorf("repetition of save %d of %d = %+v, %v, %v", i, saves, rec, changed, err)
		}
	}
	read := 0
	wire.OnCall(func(_ context.Context, _, reply any, call func() error) error {
		err := call()
		switch reply := reply.(type) {
		case *pb.RangeResponse:
			read += len(reply.GetKvs())
		case *pb.TxnResponse:
			for _, r := range reply.GetResponses() {
				read += len(r.GetResponseRange().GetKvs())
			}
		}
		return err
	})
	i := saves - rememberedChanges - 1
	if rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: nthList(t, i), Author: Author{RequestID: fmt.Sprint(i)}}); err != nil || !changed || rec.Version != saves+1 {
		t.Errorf("repetition of save %d of %d = %+v, %v, %v; want a new change", i, saves, rec, changed, err)
	}
	if read == 0 || read > rememberedChanges+2 {
		t.Errorf("a save read %d keys", read)
	}
}

// TestHistoryIsNotReadWhole: etcd reads and sorts everything that a descending range covers, whatever its limit.
func TestHistoryIsNotReadWhole(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s := open(t, e, wire)
	alice := mailbox(t, "alice@example.com")
	mustSave(t, s, Save{Mailbox: alice, List: nthList(t, 0)})
	var ranges []*pb.RangeRequest
	wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if r, ok := req.(*pb.RangeRequest); ok {
			ranges = append(ranges, r)
		}
		if txn, ok := req.(*pb.TxnRequest); ok {
			for _, op := range txn.GetSuccess() {
				if r := op.GetRequestRange(); r != nil {
					ranges = append(ranges, r)
				}
			}
		}
		return call()
	})
	mustSave(t, s, Save{Mailbox: alice, List: nthList(t, 1)})
	if len(ranges) == 0 {
		t.Error("no reads were seen")
	}
	for _, r := range ranges {
		if r.GetSortOrder() == pb.RangeRequest_DESCEND {
			t.Errorf("a descending range from %s", r.GetKey())
		}
	}
}

func TestConcurrentSavesOfOneMailbox(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	stores := []*Store{open(t, e, &etcdtest.Wire{}), open(t, e, &etcdtest.Wire{})} // two replicas of the service
	alice := mailbox(t, "alice@example.com")
	absent, err := stores[0].Get(t.Context(), alice)
	if err != nil {
		t.Fatal(err)
	}
	race := func(t *testing.T, writers, firstList int, etag string) (won []Record, lost int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var mu sync.Mutex
		var group sync.WaitGroup
		for i := range writers {
			group.Go(func() {
				rec, changed, err := stores[i%2].Save(ctx, Save{Mailbox: alice, List: nthList(t, firstList+i), Etag: etag})
				mu.Lock()
				defer mu.Unlock()
				switch stale := (*EtagError)(nil); {
				case errors.As(err, &stale):
					lost++
				case err == nil && changed:
					won = append(won, rec)
				default:
					t.Errorf("Save = %+v, %v, %v", rec, changed, err)
				}
			})
		}
		group.Wait()
		return won, lost
	}
	won, lost := race(t, 1000, 0, absent.Etag())
	if len(won) != 1 || lost != 999 {
		t.Fatalf("of 1000 saves at one etag %d won and %d lost", len(won), lost)
	}
	if got, err := stores[0].Get(t.Context(), alice); err != nil || nets(got) != nets(won[0]) || got.Version != 1 {
		t.Errorf("Get = %+v, %v, want %+v", got, err, won[0])
	}

	const writers = 150
	won, lost = race(t, writers, 1000, "")
	if len(won) != writers || lost != 0 {
		t.Fatalf("of %d unconditional saves %d won and %d lost", writers, len(won), lost)
	}
	slices.SortFunc(won, func(a, b Record) int { return int(a.Version - b.Version) })
	for i, rec := range won {
		if rec.Version != int64(i+2) || i > 0 && rec.Revision <= won[i-1].Revision {
			t.Fatalf("save %d has version %d and revision %d", i, rec.Version, rec.Revision)
		}
	}
	all := contents(t, e)
	if log := all[logKey]; log.Version != writers+1 || log.ModRevision != won[writers-1].Revision {
		t.Errorf("log has version %d at revision %d", log.Version, log.ModRevision)
	}
	for i, rec := range won {
		var c storev1.Change
		if err := proto.Unmarshal(all[changeKey(alice, rec.Version)].Value, &c); err != nil {
			t.Fatal(err)
		}
		if i > 0 && !slices.Equal(c.GetBefore(), won[i-1].List.Strings()) {
			t.Fatalf("change %d says that %v was before, not %v", rec.Version, c.GetBefore(), won[i-1].List.Strings())
		}
	}
}

func TestMailboxesDoNotConflict(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	var attempts atomic.Int64
	var stores [2]*Store
	for i := range stores {
		wire := &etcdtest.Wire{}
		wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
			if len(puts(req)) == 3 {
				attempts.Add(1)
			}
			return call()
		})
		stores[i] = open(t, e, wire)
	}
	const writers, each = 32, 5
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for i := range each {
				if _, _, err := stores[w%2].Save(t.Context(), Save{Mailbox: mailbox(t, fmt.Sprintf("user%d@example.com", w)), List: nthList(t, i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if n := attempts.Load(); n != writers*each {
		t.Errorf("%d saves took %d attempts", writers*each, n)
	}
}

var errWire = errors.New("the wire broke")

// TestUnknownOutcome: the answer to a write is lost, before or after it took effect.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	lost := func(after bool) func(func() error) error {
		return func(call func() error) error {
			if after {
				if err := call(); err != nil {
					return err
				}
			}
			return errWire
		}
	}
	tests := []struct {
		name   string
		faults []func(call func() error) error // of the first writes
		err    error
	}{
		{name: "lost after it took effect", faults: []func(func() error) error{lost(true)}},
		{name: "lost before", faults: []func(func() error) error{lost(false)}},
		{name: "lost before, then after", faults: []func(func() error) error{lost(false), lost(true)}},
		{name: "lost for good", faults: []func(func() error) error{lost(false), lost(false), lost(false)}, err: ErrUnavailable},
	}
	for _, tt := range tests {
		for _, requestID := range []string{"", uuid.NewString()} {
			t.Run(tt.name+" "+requestID, func(t *testing.T) {
				e := etcdtest.Start(t)
				wire := &etcdtest.Wire{}
				s := open(t, e, wire)
				alice := mailbox(t, "alice@example.com")
				n := 0
				wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
					if !isWrite(req) {
						return call()
					}
					if n++; n <= len(tt.faults) {
						return tt.faults[n-1](call)
					}
					return call()
				})
				save := Save{Mailbox: alice, List: list(t, "8.8.8.8"), Etag: "1-0", Author: Author{RequestID: requestID, Actor: "admin"}}
				rec, changed, err := s.Save(t.Context(), save)
				if !errors.Is(err, tt.err) {
					t.Fatalf("Save = %v, want %v", err, tt.err)
				}
				if err != nil {
					if requestID == "" {
						return
					}
					if rec, changed, err = s.Save(t.Context(), save); err != nil { // what the caller is told to do
						t.Fatal(err)
					}
				}
				got, err := s.Get(t.Context(), alice)
				if !changed || rec.Version != 1 || nets(rec) != "8.8.8.8" || err != nil || got.Revision != rec.Revision {
					t.Errorf("Save = %+v, changed %v; Get = %+v, %v", rec, changed, got, err)
				}
				if all := contents(t, e); all[logKey].Version != 1 {
					t.Errorf("%d changes were made", all[logKey].Version)
				}
			})
		}
	}
}

// TestUnknownOutcomeAmongOthers: while the answer is lost, somebody else changes the list.
func TestUnknownOutcomeAmongOthers(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s, other := open(t, e, wire), open(t, e, &etcdtest.Wire{})
	alice := mailbox(t, "alice@example.com")
	once := sync.Once{}
	wire.OnCall(func(_ context.Context, req, _ any, call func() error) (err error) {
		if !isWrite(req) {
			return call()
		}
		once.Do(func() {
			err = errors.Join(call(), errWire)
			mustSave(t, other, Save{Mailbox: alice, List: list(t, "9.9.9.9"), Author: Author{Actor: "other"}})
		})
		return err
	})
	rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: list(t, "8.8.8.8"), Author: Author{Actor: "admin"}})
	if err != nil || !changed || nets(rec) != "8.8.8.8" || rec.Version != 1 || rec.UpdatedBy != "admin" {
		t.Errorf("Save = %+v, %v, %v", rec, changed, err)
	}
	if got, err := s.Get(t.Context(), alice); err != nil || nets(got) != "9.9.9.9" || got.Version != 2 {
		t.Errorf("Get = %+v, %v: the other's later change must stay", got, err)
	}
}

// TestLateWrite: a write that was given up takes effect just before its repetition.
func TestLateWrite(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s := open(t, e, wire)
	alice := mailbox(t, "alice@example.com")
	var late func() error
	wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if !isWrite(req) {
			return call()
		}
		if late == nil {
			var ops []clientv3.Op
			for _, op := range puts(req) {
				ops = append(ops, clientv3.OpPut(string(op.GetRequestPut().GetKey()), string(op.GetRequestPut().GetValue())))
			}
			late = func() error {
				_, err := e.Client().Txn(t.Context()).Then(ops...).Commit()
				return err
			}
			return errWire
		}
		if err := late(); err != nil {
			return err
		}
		late = func() error { return nil }
		return call()
	})
	rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: list(t, "8.8.8.8")})
	if err != nil || !changed || rec.Version != 1 {
		t.Errorf("Save = %+v, %v, %v", rec, changed, err)
	}
	if all := contents(t, e); all[logKey].Version != 1 || all[logKey].ModRevision != rec.Revision {
		t.Errorf("%d changes were made", all[logKey].Version)
	}
}

// TestSaveRefusesDamage: what was edited by hand is neither shown nor overwritten.
func TestSaveRefusesDamage(t *testing.T) {
	t.Parallel()
	alice, bob := mailbox(t, "alice@example.com"), mailbox(t, "bob@example.com")
	tests := []struct {
		name   string
		damage func(t *testing.T, e *etcdtest.Etcd)
		want   error
		all    bool // mailboxes
	}{
		{name: "record edited", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) {
			put(t, e, mailboxKey(alice), encoded(t, &storev1.Mailbox{Nets: []string{"9.9.9.9"}, Version: 2}))
		}},
		{name: "record edited with care", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) {
			put(t, e, mailboxKey(alice), encoded(t, &storev1.Mailbox{Nets: []string{"9.9.9.9"}, Version: 3}))
		}},
		{name: "record of garbage", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) { put(t, e, mailboxKey(alice), []byte("\xff")) }},
		{name: "record deleted", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) { remove(t, e, mailboxKey(alice)) }},
		{name: "record not canonical", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) {
			put(t, e, mailboxKey(alice), encoded(t, &storev1.Mailbox{Nets: []string{"9.9.9.9/32"}, Version: 3}))
		}},
		{name: "newest change deleted", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) { remove(t, e, changeKey(alice, 2)) }},
		{name: "newest change of garbage", want: ErrDamaged, damage: func(t *testing.T, e *etcdtest.Etcd) { put(t, e, changeKey(alice, 2), []byte("\xff")) }},
		{name: "meta deleted", want: ErrNotCreated, all: true, damage: func(t *testing.T, e *etcdtest.Etcd) { remove(t, e, metaKey) }},
		{name: "meta of a later format", want: ErrDamaged, all: true, damage: func(t *testing.T, e *etcdtest.Etcd) {
			put(t, e, metaKey, encoded(t, &storev1.Meta{Format: 2, Epoch: 1, Id: 7}))
		}},
		{name: "another store", want: ErrForeign, all: true, damage: func(t *testing.T, e *etcdtest.Etcd) {
			put(t, e, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 1, Id: 7}))
		}},
		{name: "volume lost", want: ErrNotCreated, all: true, damage: func(_ *testing.T, e *etcdtest.Etcd) { e.Lose() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := etcdtest.Start(t)
			s := open(t, e, &etcdtest.Wire{})
			mustSave(t, s, Save{Mailbox: alice, List: list(t, "8.8.8.8")})
			mustSave(t, s, Save{Mailbox: alice, List: list(t, "8.8.4.4")})
			mustSave(t, s, Save{Mailbox: bob, List: list(t, "8.8.8.8")})
			tt.damage(t, e)
			before := contents(t, e)
			if rec, err := s.Get(within(t), alice); !errors.Is(err, tt.want) {
				t.Errorf("Get = %+v, %v, want %v", rec, err, tt.want)
			}
			for _, save := range []Save{{List: list(t, "1.1.1.1")}, {List: list(t, "8.8.4.4")}, {}} {
				save.Mailbox = alice
				if rec, changed, err := s.Save(within(t), save); !errors.Is(err, tt.want) || changed {
					t.Errorf("Save = %+v, %v, %v, want %v", rec, changed, err, tt.want)
				}
			}
			unchanged(t, e, before)
			if _, err := s.Get(within(t), bob); tt.all && !errors.Is(err, tt.want) || !tt.all && err != nil {
				t.Errorf("Get of another mailbox = %v", err)
			}
		})
	}
}

// TestSaveDuringEpochChange: an operator raises the epoch between a save's read and its write.
func TestSaveDuringEpochChange(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s := open(t, e, wire)
	once := sync.Once{}
	wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if isWrite(req) {
			once.Do(func() { put(t, e, metaKey, encoded(t, &storev1.Meta{Format: 1, Epoch: 2, Id: s.id})) })
		}
		return call()
	})
	rec, changed, err := s.Save(t.Context(), Save{Mailbox: mailbox(t, "alice@example.com"), List: list(t, "8.8.8.8")})
	if err != nil || !changed || rec.Epoch != 2 {
		t.Errorf("Save = %+v, %v, %v; want epoch 2", rec, changed, err)
	}
}

// TestReadAmongSaves: what others save between the two reads of a Get or a save is not taken for damage.
func TestReadAmongSaves(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s, other := open(t, e, wire), open(t, e, &etcdtest.Wire{})
	alice := mailbox(t, "alice@example.com")
	n := 0
	wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if _, second := req.(*pb.RangeRequest); second && n < 3 {
			mustSave(t, other, Save{Mailbox: alice, List: nthList(t, n)})
			n++
		}
		return call()
	})
	for version := range int64(2) {
		if rec, err := s.Get(t.Context(), alice); err != nil || rec.Version != version {
			t.Errorf("Get = %+v, %v, want version %d", rec, err, version)
		}
	}
	if rec, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: nthList(t, 9)}); err != nil || !changed || rec.Version != 4 {
		t.Errorf("Save = %+v, %v, %v, want version 4", rec, changed, err)
	}
}

// TestSaveIsBounded: with a store that does not answer, a save and those that wait behind it end, by the caller's
// deadline or by our own.
func TestSaveIsBounded(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	wire := &etcdtest.Wire{}
	s := open(t, e, wire)
	alice := mailbox(t, "alice@example.com")
	entered := make(chan struct{}, 100)
	wire.OnCall(func(ctx context.Context, _, _ any, _ func() error) error {
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	first := make(chan error)
	slow, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_, _, err := s.Save(slow, Save{Mailbox: alice, List: list(t, "8.8.8.8")})
		first <- err
	}()
	<-entered
	waiting, cancelWaiting := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancelWaiting()
	if _, _, err := s.Save(waiting, Save{Mailbox: alice, List: list(t, "8.8.8.8")}); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a save behind another = %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) || !errors.Is(err, ErrUnavailable) {
		t.Errorf("a cancelled save = %v", err)
	}
	wire.OnCall(nil)
	if _, changed, err := s.Save(t.Context(), Save{Mailbox: alice, List: list(t, "8.8.8.8")}); err != nil || !changed {
		t.Errorf("a save afterwards = %v, %v", changed, err)
	}
}
