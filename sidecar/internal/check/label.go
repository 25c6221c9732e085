package check

import (
	"strings"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// serviceLabel is the enum value as metrics and logs write it, such as "imap".
func serviceLabel(s decisionv1.Service) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "SERVICE_"))
}

// reasonLabel is the enum value as metrics and logs write it, such as "not_in_allowed_nets".
func reasonLabel(r decisionv1.Reason) string {
	return strings.ToLower(strings.TrimPrefix(r.String(), "REASON_"))
}
