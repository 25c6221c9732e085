// Package rpcerr builds and reads the gRPC errors of this product: a code, a sentence for people, and a reason that
// programs branch on.
package rpcerr

import (
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// Domain is the google.rpc.ErrorInfo.domain of every error of this product.
const Domain = "allowednets"

const prefix = "ERROR_REASON_"

// New returns a status error with the reason in an ErrorInfo, followed by details.
func New(code codes.Code, reason decisionv1.ErrorReason, message string, details ...protoadapt.MessageV1) error {
	return WithMetadata(code, reason, message, nil, details...)
}

// WithMetadata is [New] with metadata in the ErrorInfo. Its keys are documented at the reason's enum value.
func WithMetadata(code codes.Code, reason decisionv1.ErrorReason, message string, metadata map[string]string, details ...protoadapt.MessageV1) error {
	info := &errdetails.ErrorInfo{Reason: Name(reason), Domain: Domain, Metadata: metadata}
	st, err := status.New(code, message).WithDetails(append([]protoadapt.MessageV1{info}, details...)...)
	if err != nil { // only for codes.OK or a detail that cannot be marshalled
		return status.Error(codes.Internal, "internal error")
	}
	return st.Err()
}

// Field returns a BadRequest that names one field, as a detail for [New].
func Field(field, description string) *errdetails.BadRequest {
	return &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}}}
}

// Name returns the text that stands in ErrorInfo.reason.
func Name(reason decisionv1.ErrorReason) string {
	return strings.TrimPrefix(reason.String(), prefix)
}

// Reason returns the reason an error carries, or UNSPECIFIED if it carries none of ours.
func Reason(err error) decisionv1.ErrorReason {
	info := Detail[*errdetails.ErrorInfo](err)
	if info == nil || info.GetDomain() != Domain {
		return decisionv1.ErrorReason_ERROR_REASON_UNSPECIFIED
	}
	return decisionv1.ErrorReason(decisionv1.ErrorReason_value[prefix+info.GetReason()])
}

// Detail returns the first detail of type T that err's status carries, or the zero value.
func Detail[T any](err error) T {
	for _, d := range status.Convert(err).Details() {
		if t, ok := d.(T); ok {
			return t
		}
	}
	var none T
	return none
}
