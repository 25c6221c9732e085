package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// cause says why a stream ended; it is a metric's label.
type cause string

const (
	causeUnreachable cause = "unreachable"       // no connection, or no Welcome
	causeLost        cause = "lost"              // the stream broke
	causeSilent      cause = "silent"            // the server sent, or read, nothing for too long
	causeDrain       cause = "drain"             // the server asked us to go elsewhere
	causeOverloaded  cause = "overloaded"        // the server asked us to come back later
	causeRefused     cause = "refused"           // our certificate is not in the caller table
	causeHistory     cause = "history_went_back" // the server's store is older than our state
	causeForeign     cause = "foreign_store"     // another store than that of our state
	causeEpoch       cause = "epoch_lower"       // the same store before its epoch was raised
	causeMismatch    cause = "mismatch"          // count or digest differ
	causeRevision    cause = "revision_lower"    // a commit behind one that was applied
	causeWelcome     cause = "bad_welcome"
	causeEntry       cause = "bad_entry"
	causeCommit      cause = "bad_commit"
	causePong        cause = "bad_pong"
	causeMessage     cause = "unexpected_message"
)

func causes() []cause {
	return []cause{
		causeUnreachable, causeLost, causeSilent, causeDrain, causeOverloaded, causeRefused, causeHistory, causeForeign,
		causeEpoch, causeMismatch, causeRevision, causeWelcome, causeEntry, causeCommit, causePong, causeMessage,
	}
}

// ended is how a stream ended.
type ended struct {
	cause      cause
	err        error
	retryAfter time.Duration
}

func endedf(c cause, format string, args ...any) *ended {
	return &ended{cause: c, err: fmt.Errorf(format, args...)}
}

var (
	errSilent = errors.New("no sign of life from the policy service")
	errClosed = errors.New("the policy service ended the stream")
	errDrain  = errors.New("the policy service asked the sidecar to go elsewhere")
)

// endOf says what an error of a stream's RPC means. welcomed tells whether the server had introduced itself.
func endOf(ctx context.Context, err error, welcomed bool) *ended {
	if errors.Is(context.Cause(ctx), errSilent) {
		return &ended{cause: causeSilent, err: errSilent}
	}
	if errors.Is(err, io.EOF) {
		err = errClosed
	}
	switch rpcerr.Reason(err) {
	case decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK:
		return &ended{cause: causeHistory, err: err}
	case decisionv1.ErrorReason_ERROR_REASON_OVERLOADED:
		return &ended{cause: causeOverloaded, err: err}
	case decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED:
		return &ended{cause: causeRefused, err: err}
	}
	if !welcomed {
		return &ended{cause: causeUnreachable, err: err}
	}
	return &ended{cause: causeLost, err: err}
}
