package check

import (
	"strings"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
)

// forwardedService is what a program that reads mail for somebody else says it is, by the table in docs/semantics.md.
func forwardedService(via string) decisionv1.Service {
	switch via {
	case "webmail":
		return decisionv1.Service_SERVICE_WEBMAIL
	case "caldav":
		return decisionv1.Service_SERVICE_CALDAV
	case "carddav":
		return decisionv1.Service_SERVICE_CARDDAV
	case "webdav":
		return decisionv1.Service_SERVICE_WEBDAV
	}
	return decisionv1.Service_SERVICE_UNSPECIFIED
}

// single returns the one value of a header that names a mailbox or a service, or "" if there is none. Which of several a
// peer goes by cannot be known, and some peers make one of them with a comma.
func single(name string, values []string) (string, error) {
	switch {
	case len(values) == 0:
		return "", nil
	case len(values) > 1 || strings.Contains(values[0], ","):
		return "", &requestError{problem: name + " has more than one value"}
	}
	return values[0], nil
}
