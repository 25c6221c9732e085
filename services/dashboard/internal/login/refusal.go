package login

import "time"

// Refusal says why somebody was not logged in.
//
//nolint:errname // what a page shows, more than a failure
type Refusal struct {
	Reason Reason
	Wait   time.Duration // with [TooManyAttempts] and [Busy]: how long to wait, for Retry-After
	Detail string        // for the log; not for the person
}

func (e *Refusal) Error() string {
	if e.Detail == "" {
		return "not logged in: " + string(e.Reason)
	}
	return "not logged in: " + string(e.Reason) + ": " + e.Detail
}

// Reason is one of few, and a label of metrics.
type Reason string

// The reasons, each with what the page should say.
const (
	WrongCredentials    Reason = "wrong_credentials"    //nolint:gosec // user name or password is wrong; no credential
	TooManyAttempts     Reason = "too_many_attempts"    // wait, see Refusal.Wait
	Busy                Reason = "busy"                 // too many logins at this moment
	NoAccess            Reason = "no_access"            // the provider knows them, but they have no rights here: ask the operator
	ProviderUnavailable Reason = "provider_unavailable" // the OpenID provider does not answer
	ProviderRefused     Reason = "provider_refused"     // the provider did not log them in, or they cancelled
	LoginExpired        Reason = "login_expired"        // took too long, or did not begin in this browser: start again
)
