package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// Why a request got no answer; labels of a metric.
const (
	causeNotSynced    = "not_synced"
	causeMailbox      = "mailbox_invalid"
	causeAddress      = "client_address_invalid"
	causeService      = "service_unknown"
	causeRequest      = "bad_request"
	causeUnauthorized = "unauthorized"
	causeInternal     = "internal"
)

// errRequest is wrapped by the errors of requests that a door cannot read.
var errRequest = errors.New("bad request")

// errUnauthorized is a request without the token of --http-token-file.
var errUnauthorized = errors.New("the bearer token is missing or wrong")

// Faults counts and reports requests that got no answer.
type Faults struct {
	log        *slog.Logger
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
	for _, door := range []string{doorGRPC, doorJSON, doorDovecot} {
		f.unanswered.WithLabelValues(door, causeNotSynced)
	}
	return f, nil
}

// count notes that a door could not answer.
func (f *Faults) count(ctx context.Context, door string, err error) {
	cause := causeOf(err)
	f.unanswered.WithLabelValues(door, cause).Inc()
	// The text may quote what a client sent, which is personal data.
	f.log.DebugContext(ctx, "no answer", "door", door, "cause", cause, "error", err)
}

func causeOf(err error) string {
	var (
		name    *allow.NameError
		address *allow.AddressError
		service *ServiceError
	)
	switch {
	case errors.Is(err, ErrNotSynced):
		return causeNotSynced
	case errors.As(err, &name):
		return causeMailbox
	case errors.As(err, &address):
		return causeAddress
	case errors.As(err, &service):
		return causeService
	case errors.Is(err, errRequest):
		return causeRequest
	case errors.Is(err, errUnauthorized):
		return causeUnauthorized
	}
	return causeInternal
}

// statusError is what a gRPC caller, and in JSON an HTTP caller, gets for an error.
func statusError(err error) error {
	switch causeOf(err) {
	case causeNotSynced:
		return rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED, err.Error())
	case causeMailbox:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, "mailbox", err)
	case causeAddress:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_CLIENT_ADDRESS_INVALID, "client_address", err)
	case causeService:
		return invalid(decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "service", err)
	case causeRequest:
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, err.Error())
	case causeUnauthorized:
		return rpcerr.New(codes.Unauthenticated, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED, err.Error())
	}
	return rpcerr.New(codes.Internal, decisionv1.ErrorReason_ERROR_REASON_INTERNAL, "internal error")
}

func invalid(reason decisionv1.ErrorReason, field string, err error) error {
	return rpcerr.New(codes.InvalidArgument, reason, field+": "+err.Error(), rpcerr.Field(field, err.Error()))
}
