package check

import (
	"errors"
	"mime"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
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
	if kind := r.Header.Get("Content-Type"); kind != "application/json" && !isJSON(kind) {
		j.refuse(w, r, http.StatusUnsupportedMediaType, &requestError{problem: "the Content-Type must be application/json"})
		return
	}
	body, err := readBody(r)
	if err != nil {
		code := http.StatusBadRequest
		if errors.Is(err, errTooLarge) {
			code = http.StatusRequestEntityTooLarge
		}
		j.refuse(w, r, code, &requestError{"the body cannot be read", err})
		return
	}
	req, ok := parseFlatRequest(string(body))
	if !ok {
		msg := new(checkv1.CheckRequest)
		if err := protojson.Unmarshal(body, msg); err != nil {
			j.refuse(w, r, http.StatusBadRequest, &requestError{"the body is no CheckRequest", err})
			return
		}
		req = requestOf(msg)
	}
	dec, err := j.decider.Decide(r.Context(), req)
	if err != nil {
		j.refuse(w, r, 0, err)
		return
	}
	write(w, http.StatusOK, dec.appendJSON(make([]byte, 0, 256)))
}

func isJSON(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	return err == nil && media == "application/json"
}

// parseFlatRequest reads the protojson form of a CheckRequest if it is as simple as most are. It does not know what is wrong
// with the others.
func parseFlatRequest(body string) (req Request, ok bool) {
	var seen uint
	ok = flatStrings(body, func(name, value string) bool {
		var bit uint
		switch name {
		case "mailbox":
			req.Mailbox, bit = value, 1
		case "clientAddress", "client_address":
			req.Client, bit = value, 2
		case "service":
			number, known := decisionv1.Service_value[value]
			if !known {
				return false
			}
			req.Service, bit = decisionv1.Service(number), 4
		case "minRevision", "min_revision":
			req.MinRevision, bit = value, 8
		}
		fresh := seen&bit == 0
		seen |= bit
		return fresh && bit != 0
	})
	return req, ok
}

// appendJSON appends a protojson form of [Decision.message]. (Package protojson takes longer for it than net/http for the rest of
// the request.)
func (d Decision) appendJSON(b []byte) []byte {
	b = append(b, `{"decision":{"verdict":"`...)
	b = append(b, d.Verdict.String()...)
	b = append(b, `","reason":"`...)
	b = append(b, d.Reason.String()...)
	if d.Net.IsValid() {
		b = append(b, `","matchedNet":"`...)
		b = append(b, allow.FormatNet(d.Net)...)
	}
	if d.State != nil && d.State.Revision != "" {
		b = append(b, `","revision":"`...)
		b = append(b, d.State.Revision...) // a token has nothing to escape
	}
	b = append(b, `"}`...)
	if age, ok := d.State.Age(time.Now()); ok {
		b = append(b, `,"dataAge":"`...)
		b = append(appendSeconds(b, age), '"')
	}
	return append(b, '}')
}

// appendSeconds appends a duration of at least 0, such as 2.000000001s.
func appendSeconds(b []byte, d time.Duration) []byte {
	b = strconv.AppendInt(b, int64(d/time.Second), 10)
	at := len(b)
	b = strconv.AppendInt(b, int64(time.Second+d%time.Second), 10) // ten digits: the first keeps the zeros behind it
	b[at] = '.'
	return append(b, 's')
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
	write(w, code, body)
}

func write(w http.ResponseWriter, code int, body []byte) {
	header := w.Header()
	header["Content-Type"], header["Cache-Control"] = typeJSON, notStored
	w.WriteHeader(code)
	_, _ = w.Write(body)
}
