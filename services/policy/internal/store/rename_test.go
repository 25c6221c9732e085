package store

import (
	"context"
	"errors"
	"fmt"
	"testing"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/policy/internal/store/etcdtest"
)

// renaming is a store with alice, whose list is to move to alicia.
type renaming struct {
	t             *testing.T
	e             *etcdtest.Etcd
	wire          *etcdtest.Wire
	s, other      *Store
	alice, alicia allow.Mailbox
}

func newRenaming(t *testing.T) *renaming {
	t.Parallel()
	r := &renaming{t: t, e: etcdtest.Start(t), wire: &etcdtest.Wire{}}
	r.s, r.other = open(t, r.e, r.wire), open(t, r.e, &etcdtest.Wire{})
	r.alice, r.alicia = mailbox(t, "alice@example.com"), mailbox(t, "alicia@example.com")
	mustSave(t, r.other, Save{Mailbox: r.alice, List: list(t, "8.8.8.8"), Kind: policyv1.ChangeKind_CHANGE_KIND_SET})
	return r
}

func (r *renaming) rename() (Record, bool, error) {
	return r.s.Rename(r.t.Context(), Rename{From: r.alice, To: r.alicia, Author: Author{Actor: "admin", RequestID: "rename"}})
}

// lists expects the two names' lists.
func (r *renaming) lists(alice, alicia string) {
	r.t.Helper()
	for m, want := range map[allow.Mailbox]string{r.alice: alice, r.alicia: alicia} {
		if rec, err := r.s.Get(r.t.Context(), m); err != nil || nets(rec) != want {
			r.t.Errorf("%s has %q, %v; want %q", m, nets(rec), err, want)
		}
	}
}

func TestRename(t *testing.T) {
	r := newRenaming(t)
	rec, changed, err := r.rename()
	if err != nil || !changed || rec.Mailbox != r.alicia || nets(rec) != "8.8.8.8" || rec.UpdatedBy != "admin" {
		t.Fatalf("Rename = %+v, %v, %v", rec, changed, err)
	}
	r.lists("", "8.8.8.8")
	from, err1 := r.s.History(t.Context(), r.alice, 0, 10)
	to, err2 := r.s.History(t.Context(), r.alicia, 0, 10)
	if err := errors.Join(err1, err2); err != nil || len(from) != 2 || len(to) != 1 {
		t.Fatalf("histories %v, %v, %v", from, to, err)
	}
	if to[0].Record.Revision >= from[0].Record.Revision {
		t.Error("the old name was free before the new one had the list")
	}
	if to[0].GetKind() != policyv1.ChangeKind_CHANGE_KIND_RENAME_TO || to[0].GetOtherMailbox() != r.alice.String() ||
		from[0].GetKind() != policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM || from[0].GetOtherMailbox() != r.alicia.String() ||
		from[1].GetKind() != policyv1.ChangeKind_CHANGE_KIND_SET {
		t.Errorf("kinds %v, %v", from, to)
	}

	// The same request again, and also after somebody opened a new account under the old name.
	before := contents(t, r.e)
	if rec, changed, err := r.rename(); err != nil || changed || nets(rec) != "8.8.8.8" {
		t.Errorf("repeated: %+v, %v, %v", rec, changed, err)
	}
	unchanged(t, r.e, before)
	mustSave(t, r.other, Save{Mailbox: r.alice, List: list(t, "9.9.9.9")})
	if _, changed, err := r.rename(); err != nil || changed {
		t.Errorf("repeated after the name was used again: %v, %v", changed, err)
	}
	r.lists("9.9.9.9", "8.8.8.8")
}

func TestRenameOfUnrestricted(t *testing.T) {
	r := newRenaming(t)
	mustSave(t, r.other, Save{Mailbox: r.alice})
	before := contents(t, r.e)
	if rec, changed, err := r.rename(); err != nil || changed || rec.List.Len() != 0 {
		t.Errorf("Rename = %+v, %v, %v", rec, changed, err)
	}
	unchanged(t, r.e, before)
}

func TestRenameToRestricted(t *testing.T) {
	r := newRenaming(t)
	mustSave(t, r.other, Save{Mailbox: r.alicia, List: list(t, "9.9.9.9")})
	before := contents(t, r.e)
	if rec, changed, err := r.rename(); !errors.Is(err, ErrTargetRestricted) || changed || rec.Mailbox != r.alicia || rec.Revision == 0 {
		t.Errorf("Rename = %+v, %v, %v", rec, changed, err)
	}
	unchanged(t, r.e, before)
	mustSave(t, r.other, Save{Mailbox: r.alicia, List: list(t, "8.8.8.8")})
	if _, changed, err := r.rename(); err != nil || !changed {
		t.Errorf("to a name that has the same list: %v, %v", changed, err)
	}
	r.lists("", "8.8.8.8")
}

// TestRenameInterrupted cuts a rename off before each of its writes, and after each; then somebody may save the old name; then
// it is repeated.
func TestRenameInterrupted(t *testing.T) {
	errCut := errors.New("cut")
	for cut := range 2 {
		for _, applied := range []bool{false, true} {
			for _, edited := range []bool{false, true} {
				t.Run(fmt.Sprintf("write %d, applied %v, edited %v", cut, applied, edited), func(t *testing.T) {
					r := newRenaming(t)
					ctx, cancel := context.WithCancel(t.Context())
					n := 0
					r.wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
						if !isWrite(req) {
							return call()
						}
						if n++; n-1 != cut {
							return call()
						}
						if applied {
							_ = call()
						}
						cancel()
						return errCut
					})
					_, _, err := r.s.Rename(ctx, Rename{From: r.alice, To: r.alicia, Author: Author{RequestID: "rename"}})
					if err == nil {
						t.Fatal("it was not cut")
					}
					r.wire.OnCall(nil)
					done := cut == 1 && applied
					if alice, err := r.s.Get(t.Context(), r.alice); err != nil || (alice.List.Len() == 0) != done {
						t.Fatalf("cut off, the old name has %q, %v", nets(alice), err)
					}
					want := "8.8.8.8"
					if edited && !done {
						want = "9.9.9.9"
						mustSave(t, r.other, Save{Mailbox: r.alice, List: list(t, want)})
					}
					if rec, _, err := r.rename(); err != nil || nets(rec) != want {
						t.Fatalf("completed: %q, %v", nets(rec), err)
					}
					r.lists("", want)
				})
			}
		}
	}
}

// TestRenameInterruptedAndTargetEdited: after To got the list and before From lost it, somebody saves To. A repetition must not
// undo that.
func TestRenameInterruptedAndTargetEdited(t *testing.T) {
	for name, tt := range map[string]struct {
		alice, alicia string // saved in between; empty: nothing
		want          string // of alicia; empty: refused
	}{
		"To":   {"", "9.9.9.9", "9.9.9.9"},
		"both": {"1.1.1.1", "9.9.9.9", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRenaming(t)
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			r.wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
				if isWrite(req) {
					if n++; n == 2 {
						cancel()
						return context.Canceled
					}
				}
				return call()
			})
			if _, _, err := r.s.Rename(ctx, Rename{From: r.alice, To: r.alicia, Author: Author{RequestID: "rename"}}); err == nil {
				t.Fatal("it was not cut")
			}
			r.wire.OnCall(nil)
			mustSave(t, r.other, Save{Mailbox: r.alicia, List: list(t, tt.alicia)})
			if tt.alice != "" {
				mustSave(t, r.other, Save{Mailbox: r.alice, List: list(t, tt.alice)})
			}
			_, _, err := r.rename()
			if tt.want == "" {
				if !errors.Is(err, ErrTargetRestricted) {
					t.Errorf("completed: %v", err)
				}
				r.lists(tt.alice, tt.alicia)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			r.lists("", tt.want)
		})
	}
}

// TestRenameWithAUsedRequestID: the id of another change must not be taken for the rename's own.
func TestRenameWithAUsedRequestID(t *testing.T) {
	for _, side := range []string{"alice@example.com", "alicia@example.com"} {
		t.Run(side, func(t *testing.T) {
			r := newRenaming(t)
			mustSave(t, r.other, Save{Mailbox: mailbox(t, side), List: list(t, "9.9.9.9"), Author: Author{RequestID: "rename"}})
			before := contents(t, r.e)
			if _, _, err := r.rename(); !errors.Is(err, ErrRequestIDReused) {
				t.Errorf("Rename = %v", err)
			}
			unchanged(t, r.e, before)
		})
	}
}

// TestRenameAgainstEdits saves the old name in the middle of a rename: what was saved moves along.
func TestRenameAgainstEdits(t *testing.T) {
	r := newRenaming(t)
	n := 0
	r.wire.OnCall(func(_ context.Context, req, _ any, call func() error) error {
		if isWrite(req) {
			if n++; n <= 4 {
				mustSave(t, r.other, Save{Mailbox: r.alice, List: list(t, fmt.Sprintf("9.9.9.%d", n))})
			}
		}
		return call()
	})
	if rec, changed, err := r.rename(); err != nil || !changed || nets(rec) != "9.9.9.4" {
		t.Errorf("Rename = %q, %v, %v", nets(rec), changed, err)
	}
	r.lists("", "9.9.9.4")
}

func TestHistory(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	s := open(t, e, &etcdtest.Wire{})
	alice := mailbox(t, "alice@example.com")
	if changes, err := s.History(t.Context(), alice, 0, 10); err != nil || len(changes) != 0 {
		t.Errorf("without a save: %v, %v", changes, err)
	}
	mustSave(t, s, Save{Mailbox: mailbox(t, "alice@example.co"), List: list(t, "1.1.1.1")})
	for i := range 7 {
		mustSave(t, s, Save{Mailbox: alice, List: nthList(t, i)})
	}
	var got []int64
	for before := int64(0); ; {
		page, err := s.History(t.Context(), alice, before, 3)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		for _, c := range page {
			got = append(got, c.Record.Version)
		}
		if before = page[len(page)-1].Record.Version; before == 1 {
			break
		}
	}
	if fmt.Sprint(got) != "[7 6 5 4 3 2 1]" {
		t.Errorf("versions %v", got)
	}
	if _, err := s.client.Delete(t.Context(), changeKey(alice, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.History(t.Context(), alice, 0, 5); !errors.Is(err, ErrDamaged) {
		t.Errorf("with a change deleted by hand: %v", err)
	}
}
