package web

import (
	"context"
	"errors"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
)

// problem is a page that says what is wrong and what to do. Its texts are KEY.title and KEY.text.
type problem struct {
	key    string
	status int
	again  bool // trying again may help
}

// problemPage is what the template shows.
type problemPage struct{ Title, Text, Again string }

// problemOf is the one place that turns errors into pages.
func problemOf(err error) problem {
	reason := rpcerr.Reason(err)
	var form *formError
	var large *http.MaxBytesError
	switch {
	case errors.Is(err, errNotFound),
		reason == decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID, reason == decisionv1.ErrorReason_ERROR_REASON_DOMAIN_INVALID:
		return problem{key: "missing", status: http.StatusNotFound}
	case errors.Is(err, errForbidden):
		return problem{key: "forbidden", status: http.StatusForbidden}
	case errors.Is(err, errCross):
		return problem{key: "cross", status: http.StatusForbidden}
	case errors.Is(err, errCrowded):
		return problem{key: "crowded", status: http.StatusServiceUnavailable}
	case errors.Is(err, directory.ErrUnavailable):
		return problem{key: "directory", status: http.StatusServiceUnavailable, again: true}
	case errors.As(err, &large):
		return problem{key: "large", status: http.StatusRequestEntityTooLarge}
	case errors.As(err, &form):
		return problem{key: "bad", status: http.StatusBadRequest}
	case reason == decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED, reason == decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED:
		return problem{key: "grant", status: http.StatusBadGateway}
	case unanswered(err), status.Code(err) == codes.DataLoss:
		return problem{key: "unavailable", status: http.StatusServiceUnavailable, again: true}
	}
	return problem{key: "fault", status: http.StatusInternalServerError, again: true}
}

// unanswered reports whether the policy service gave no answer.
func unanswered(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.Canceled ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// fail answers with the page for err.
func (s *site) fail(w http.ResponseWriter, r *http.Request, err error) {
	p := problemOf(err)
	if p.status >= http.StatusInternalServerError && !errors.Is(r.Context().Err(), context.Canceled) {
		s.cfg.Log.WarnContext(r.Context(), "a page could not be shown", "route", r.Pattern, "status", p.status, "error", err)
	}
	s.answer(w, r, p)
}

func (s *site) answer(w http.ResponseWriter, r *http.Request, p problem) {
	v := s.view(r)
	data := problemPage{Title: v.text(p.key + ".title"), Text: v.text(p.key + ".text")}
	if p.again && r.Method == http.MethodGet {
		data.Again = r.URL.RequestURI()
	}
	if p.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "10")
	}
	if err := s.render(w, r, p.status, "problem", page{Title: data.Title, View: data}); err != nil {
		s.cfg.Log.ErrorContext(r.Context(), "a page could not be written", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
	}
}
