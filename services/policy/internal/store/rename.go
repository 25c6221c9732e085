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
// If To has another list, that is [ErrTargetRestricted].
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
		if from.record.List.Len() == 0 || from.has(r.RequestID) {
			return to.record, changed, nil
		}
		give := r.save(r.To, from.record.List, to.record.Etag())
		give.Kind, give.Other = policyv1.ChangeKind_CHANGE_KIND_RENAME_TO, r.From
		switch begun := to.has(r.RequestID); {
		case begun:
			give.RequestID = uuid.NewString() // From's list changed after To got it
		case to.record.List.Len() > 0 && !to.record.List.Equal(from.record.List):
			return to.record, false, ErrTargetRestricted
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

// has reports whether one of the newest changes was made by the request.
func (snap snapshot) has(requestID string) bool {
	return slices.ContainsFunc(snap.changes, func(c change) bool { return c.requestID == requestID })
}

// conflict tells the error of a save that met another one, after which the rename starts over, from the others.
func conflict(err error) (again bool, other error) {
	if _, etag := errors.AsType[*EtagError](err); etag {
		return true, nil
	}
	return false, err
}
