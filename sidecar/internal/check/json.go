package check

import (
	"errors"
	"io"
	"mime"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
)

const doorJSON = "json"

// jsonDoor is the plain HTTP door: POST /v1/check with the protojson form of CheckRequest, answered with that of CheckResponse,
// or of google.rpc.Status and a matching HTTP status.
type jsonDoor struct {
	decider *Decider
	faults  *Faults
}

// serve answers a request, which is refused if it is not authorized.
func (j *jsonDoor) serve(w http.ResponseWriter, r *http.Request, authorized bool) {
	defer func() {
		if p := recover(); p != nil {
			j.refuse(w, r, 0, panicked(p))
		}
	}()
	if !authorized {
		j.refuse(w, r, 0, errUnauthorized)
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		j.refuse(w, r, http.StatusMethodNotAllowed, &requestError{problem: "the method must be POST"})
		return
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		j.refuse(w, r, http.StatusUnsupportedMediaType, &requestError{problem: "the Content-Type must be application/json"})
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		code := http.StatusBadRequest
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			code = http.StatusRequestEntityTooLarge
		}
		j.refuse(w, r, code, &requestError{"the body cannot be read", err})
		return
	}
	req := new(checkv1.CheckRequest)
	if err := protojson.Unmarshal(body, req); err != nil {
		j.refuse(w, r, http.StatusBadRequest, &requestError{"the body is no CheckRequest", err})
		return
	}
	dec, err := j.decider.Decide(r.Context(), requestOf(req))
	if err != nil {
		j.refuse(w, r, 0, err)
		return
	}
	writeJSON(w, http.StatusOK, dec.message())
}

// refuse answers with an error, and with the HTTP status that fits it unless code is given.
func (j *jsonDoor) refuse(w http.ResponseWriter, r *http.Request, code int, err error) {
	j.faults.count(r.Context(), doorJSON, err)
	st := status.Convert(statusError(err))
	if code == 0 {
		switch st.Code() {
		case codes.InvalidArgument:
			code = http.StatusBadRequest
		case codes.Unauthenticated:
			code = http.StatusUnauthorized
		case codes.Unavailable:
			code = http.StatusServiceUnavailable
		default:
			code = http.StatusInternalServerError
		}
	}
	if code == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	writeJSON(w, code, st.Proto())
}

func writeJSON(w http.ResponseWriter, code int, msg proto.Message) {
	body, err := protojson.Marshal(msg)
	if err != nil {
		code, body = http.StatusInternalServerError, []byte(`{"code":13,"message":"internal error"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(body)
}
