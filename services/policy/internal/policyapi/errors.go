package policyapi

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/policy/internal/store"
)

// fieldError is a field whose value cannot work.
type fieldError struct{ field, problem string }

func (e *fieldError) Error() string { return e.field + ": " + e.problem }

// domainError is a domain that cannot be canonicalised.
type domainError struct{ error }

func (e *domainError) Unwrap() error { return e.error }

// domainDeniedError is a domain that the caller may not act in.
type domainDeniedError struct{ domain string }

func (e *domainDeniedError) Error() string {
	if e.domain == "" {
		return "the caller may act in some domains only; name one"
	}
	return "the caller may not act in " + e.domain + ": the operator grants it in the --callers file"
}

// targetError is a rename to a mailbox that has another list.
type targetError struct{ current store.Record }

func (e *targetError) Error() string {
	return fmt.Sprintf("%s has another list already; clear it first, or save there the list it should have", e.current.Mailbox)
}

// status turns every error of this service into the one its caller sees. It is the only place that does.
func (s *Service) status(ctx context.Context, err error) error {
	var (
		name    *allow.NameError
		domain  *domainError
		field   *fieldError
		invalid *allow.InvalidError
		etag    *store.EtagError
		denied  *domainDeniedError
		target  *targetError
	)
	invalidArgument := func(reason decisionv1.ErrorReason, field string) error {
		return rpcerr.New(codes.InvalidArgument, reason, err.Error(), rpcerr.Field(field, err.Error()))
	}
	switch {
	case errors.As(err, &domain):
		return invalidArgument(decisionv1.ErrorReason_ERROR_REASON_DOMAIN_INVALID, "domain")
	case errors.As(err, &name):
		return invalidArgument(decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, "mailbox")
	case errors.As(err, &field):
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, err.Error(), rpcerr.Field(field.field, field.problem))
	case errors.As(err, &invalid):
		return invalidNets(invalid)
	case errors.Is(err, allow.ErrEmpty):
		return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY,
			"the list is empty; to lift the restriction call ClearAllowedNets", rpcerr.Field("nets", "at least one entry"))
	case errors.As(err, &etag):
		return etagMismatch(etag.Current)
	case errors.As(err, &denied):
		return rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED, err.Error())
	case errors.As(err, &target):
		return rpcerr.WithMetadata(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_TARGET_RESTRICTED, err.Error(),
			map[string]string{"etag": target.current.Etag()})
	case errors.Is(err, store.ErrRequestIDReused):
		return rpcerr.New(codes.AlreadyExists, decisionv1.ErrorReason_ERROR_REASON_REQUEST_ID_REUSED,
			"request_id was used for a change with other content; use a new one", rpcerr.Field("request_id", "used before with other content"))
	}
	s.cfg.Fault(ctx, err)
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller went away")
	case ctx.Err() != nil:
		return status.Error(codes.DeadlineExceeded, "the caller's deadline passed; a write may or may not have taken effect")
	case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotCreated), errors.Is(err, store.ErrForeign):
		return rpcerr.New(codes.DataLoss, decisionv1.ErrorReason_ERROR_REASON_STORE_DAMAGED,
			"the store contradicts itself; nothing was changed. The operator finds the cause in the log of the policy service")
	case errors.Is(err, store.ErrUnavailable):
		return rpcerr.New(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
			"the store did not answer in time; a write may or may not have taken effect. Try again with the same request_id")
	}
	return rpcerr.New(codes.Internal, decisionv1.ErrorReason_ERROR_REASON_INTERNAL, "internal error")
}

func invalidNets(invalid *allow.InvalidError) error {
	details := &policyv1.InvalidNets{}
	bad := &errdetails.BadRequest{}
	for _, p := range invalid.Problems {
		block := ""
		if p.Block.IsValid() {
			block = p.Block.String()
		}
		details.InvalidNets = append(details.InvalidNets, &policyv1.InvalidNet{
			Index: int32(p.Index), Text: p.Text, Refusal: p.Refusal, Message: p.Message, Suggestions: p.Suggestions, Block: block,
		})
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: "nets[" + strconv.Itoa(p.Index) + "]", Description: p.Message, Reason: p.Refusal.String(),
		})
	}
	return rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID,
		fmt.Sprintf("nothing was saved: %d of the entries cannot be used", len(invalid.Problems)), bad, details)
}

func etagMismatch(current store.Record) error {
	metadata := map[string]string{"etag": current.Etag()}
	message := "the list is not the one that the etag was read from: there was none"
	if current.Version > 0 {
		at := current.UpdatedAt.Format(time.RFC3339)
		metadata["updated_by"], metadata["update_time"] = current.UpdatedBy, at
		message = fmt.Sprintf("%s changed the list at %s; read it again", current.UpdatedBy, at)
	}
	return rpcerr.WithMetadata(codes.Aborted, decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH, message, metadata)
}
