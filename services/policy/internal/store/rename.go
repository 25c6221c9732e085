package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// ErrTargetRestricted says that the new name of a rename has another list already.
var ErrTargetRestricted = errors.New("the new name has another list already")

// Rename is a change of a mailbox's name.
type Rename struct {
	From, To allow.Mailbox
	Author
}

// renameTries bounds how often a rename starts over because somebody saves one of the names meanwhile.
const renameTries = 8

// Rename gives the list of From to To and then lifts From's restriction, in this order, so that a name whose account may
// still be open is restricted at every moment. It returns the record of To and whether anything changed. Interrupted, both
// names are restricted, and the same rename completes it. A list that somebody saves for From meanwhile moves along.
// A list that somebody saves for To after it got From's counts, if From's stayed. If To has another list otherwise, that is
// [ErrTargetRestricted]; a request id of any other change is [ErrRequestIDReused].
func (s *Store) Rename(ctx context.Context, r Rename) (rec Record, changed bool, err error) {
	if r.RequestID == "" {
		r.RequestID = uuid.NewString()
	}
	for range renameTries {
		from, err := s.read(ctx, r.From)
		if err != nil {
			return Record{}, false, err
		}
		to, err := s.read(ctx, r.To)
		if err != nil {
			return Record{}, false, err
		}
		taken, err := from.part(r.RequestID, policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, r.To)
		if err != nil {
			return Record{}, changed, err
		}
		given, err := to.part(r.RequestID, policyv1.ChangeKind_CHANGE_KIND_RENAME_TO, r.From)
		if err != nil {
			return Record{}, changed, err
		}
		if from.record.List.Len() == 0 || taken != nil {
			return to.record, changed, nil
		}
		give := r.save(r.To, from.record.List, to.record.Etag())
		give.Kind, give.Other = policyv1.ChangeKind_CHANGE_KIND_RENAME_TO, r.From
		if given != nil {
			give.RequestID = uuid.NewString() // From's list changed after To got it
		}
		switch last := to.handedOver(r.From); {
		case to.record.List.Len() == 0, to.record.List.Equal(from.record.List):
		case given == nil || last == nil:
			return to.record, changed, ErrTargetRestricted
		case last.after.Revision == to.record.Revision: // nobody but this rename has saved To since
		case last.after.List.Equal(from.record.List):
			give.List = to.record.List // somebody has, and From stayed: what they saved counts
		default:
			return to.record, changed, ErrTargetRestricted
		}
		rec, gave, err := s.Save(ctx, give)
		changed = changed || gave
		if again, err := conflict(err); err != nil {
			return Record{}, changed, err
		} else if again {
			continue
		}
		take := r.save(r.From, allow.List{}, from.record.Etag())
		take.Kind, take.Other = policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, r.To
		_, took, err := s.Save(ctx, take)
		changed = changed || took
		if again, err := conflict(err); err != nil {
			return Record{}, changed, err
		} else if !again {
			return rec, changed, nil
		}
	}
	return Record{}, changed, fmt.Errorf("%w: the names are being changed all the time", ErrUnavailable)
}

func (r Rename) save(mailbox allow.Mailbox, list allow.List, etag string) Save {
	return Save{Mailbox: mailbox, List: list, Etag: etag, Author: r.Author}
}

// part returns what a rename with the request id did to this side, or nil. If the request id did anything else, that is
// [ErrRequestIDReused].
func (snap snapshot) part(requestID string, kind policyv1.ChangeKind, other allow.Mailbox) (*change, error) {
	for i, c := range snap.changes {
		if c.requestID != requestID {
			continue
		}
		if c.kind != kind || c.other != other.String() {
			return nil, ErrRequestIDReused
		}
		return &snap.changes[i], nil
	}
	return nil, nil
}

// handedOver returns the newest change by which a rename gave this side the list of from, or nil.
func (snap snapshot) handedOver(from allow.Mailbox) *change {
	for i, c := range slices.Backward(snap.changes) {
		if c.kind == policyv1.ChangeKind_CHANGE_KIND_RENAME_TO && c.other == from.String() {
			return &snap.changes[i]
		}
	}
	return nil
}

// conflict tells the error of a save that met another one, after which the rename starts over, from the others.
func conflict(err error) (again bool, other error) {
	if _, etag := errors.AsType[*EtagError](err); etag {
		return true, nil
	}
	return false, err
}
