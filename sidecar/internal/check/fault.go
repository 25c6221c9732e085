package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// Why a request got no answer; labels of a metric.
const (
	causeNotSynced    = "not_synced"
	causeMailbox      = "mailbox_invalid"
	causeAddress      = "client_address_invalid"
	causeService      = "service_unknown"
	causeRevision     = "min_revision_invalid"
	causeNotFresh     = "not_fresh"
	causeRequest      = "bad_request"
	causeUnauthorized = "unauthorized"
	causeStopping     = "stopping"
	causeInternal     = "internal"
)

func causes() []string {
	return []string{
		causeNotSynced, causeMailbox, causeAddress, causeService, causeRevision, causeNotFresh, causeRequest, causeUnauthorized,
		causeStopping, causeInternal,
	}
}

var (
	// errUnauthorized is a request without the token of --http-token-file.
	errUnauthorized = errors.New("the bearer token is missing or wrong")
	// errStopping ends a stream whose server stops.
	errStopping = errors.New("the sidecar stops; try again")
)

// requestError is a request that a door cannot read.
type requestError struct {
	problem string // fit for a log
	detail  error  // may quote the request; nil if there is no more to say
}

func (e *requestError) Error() string {
	if e.detail == nil {
		return e.problem
	}
	return e.problem + ": " + e.detail.Error()
}

// panicked turns what recover returned into an error.
func panicked(p any) error { return fmt.Errorf("panic: %v\n%s", p, debug.Stack()) }

// Faults counts and logs requests that got no answer. It is safe for concurrent use.
type Faults struct {
	log        *slog.Logger
	lines      limiter
	unanswered *prometheus.CounterVec
}

// NewFaults returns the counter of all doors.
func NewFaults(log *slog.Logger, reg prometheus.Registerer) (*Faults, error) {
	f := &Faults{log: log, unanswered: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "allowednets_sidecar_unanswered_total", Help: "Requests without an answer, by door and cause.",
	}, []string{"door", "cause"})}
	if err := reg.Register(f.unanswered); err != nil {
		return nil, fmt.Errorf("registering metrics: %w", err)
	}
	for _, door := range []string{doorGRPC, doorJSON, doorDovecot, doorNginxAuth, doorNginxMail, doorEnvoy} {
		for _, cause := range causes() {
			f.unanswered.WithLabelValues(door, cause) // shown from the start
		}
	}
	return f, nil
}

// count notes that a door could not answer. What a client sent goes to the debug log only: it is personal data.
func (f *Faults) count(ctx context.Context, door string, err error) {
	cause := causeOf(err)
	f.unanswered.WithLabelValues(door, cause).Inc()
	level, problem := slog.LevelDebug, err.Error()
	switch cause {
	case causeInternal:
		level = slog.LevelError
	case causeRequest, causeUnauthorized: // somebody has configured a peer wrongly, and nobody can log in
		level = slog.LevelWarn
		if bad := new(requestError); errors.As(err, &bad) {
			problem = bad.problem
		}
	}
	if !f.log.Enabled(ctx, level) {
		return
	}
	if ok, skipped := f.lines.take(time.Now()); ok {
		f.log.LogAttrs(ctx, level, "request not answered", slog.String("door", door), slog.String("cause", cause),
			slog.String("problem", problem), slog.Int("not_logged_before", skipped))
	}
}

func causeOf(err error) string {
	var (
		name    *allow.NameError
		address *allow.AddressError
		service *ServiceError
		request *requestError
	)
	switch {
	case errors.Is(err, ErrNotSynced):
		return causeNotSynced
	case errors.Is(err, ErrNotFresh):
		return causeNotFresh
	case errors.Is(err, revision.ErrInvalid):
		return causeRevision
	case errors.Is(err, errUnauthorized):
		return causeUnauthorized
	case errors.Is(err, errStopping):
		return causeStopping
	case errors.As(err, &name):
		return causeMailbox
	case errors.As(err, &address):
		return causeAddress
	case errors.As(err, &service):
		return causeService
	case errors.As(err, &request):
		return causeRequest
	}
	return causeInternal
}

// statusError is what a caller of CheckService gets for an error, over gRPC or as JSON.
func statusError(err error) error {
	switch causeOf(err) {
	case causeNotSynced:
		return rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED, err.Error())
	case causeNotFresh:
		return rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_FRESH, err.Error())
	case causeStopping:
		return rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED, err.Error())
	case causeUnauthorized:
		return rpcerr.New(codes.Unauthenticated, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED, err.Error())
	case causeMailbox:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, "mailbox", err)
	case causeAddress:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_CLIENT_ADDRESS_INVALID, "client_address", err)
	case causeService:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "service", err)
	case causeRevision:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "min_revision", err)
	case causeRequest:
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, err.Error())
	}
	return rpcerr.New(codes.Internal, decisionv1.ErrorReason_ERROR_REASON_INTERNAL, "internal error")
}

func invalid(reason decisionv1.ErrorReason, field string, err error) error {
	return rpcerr.New(codes.InvalidArgument, reason, field+": "+err.Error(), rpcerr.Field(field, err.Error()))
}
