package rpcerr_test

import (
	"errors"
	"fmt"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

func TestRoundTrip(t *testing.T) {
	err := rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID, "no", rpcerr.Field("page_size", "negative"))
	for _, err := range []error{err, fmt.Errorf("wrapped: %w", err)} {
		if got := rpcerr.Reason(err); got != decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID {
			t.Errorf("Reason = %v", got)
		}
		if got := rpcerr.Detail[*errdetails.BadRequest](err).GetFieldViolations()[0].GetField(); got != "page_size" {
			t.Errorf("field = %q", got)
		}
	}
	if got := status.Code(err); got != codes.InvalidArgument {
		t.Errorf("code = %v", got)
	}
}

func TestForeignErrorsHaveNoReason(t *testing.T) {
	foreign, _ := status.New(codes.Aborted, "x").WithDetails(&errdetails.ErrorInfo{Reason: "ETAG_MISMATCH", Domain: "other"})
	unknown, _ := status.New(codes.Aborted, "x").WithDetails(&errdetails.ErrorInfo{Reason: "FROM_THE_FUTURE", Domain: rpcerr.Domain})
	for _, err := range []error{nil, errors.New("plain"), status.Error(codes.Internal, "x"), foreign.Err(), unknown.Err()} {
		if got := rpcerr.Reason(err); got != decisionv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
			t.Errorf("Reason(%v) = %v", err, got)
		}
	}
}
