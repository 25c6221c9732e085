package check_test

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/hops"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

func (f *fixture) http(configure ...func(*check.HTTPConfig)) http.Handler {
	cfg := check.HTTPConfig{
		Decider: f.decider, Faults: f.faults, DenialText: check.DefaultDenialText,
		TrustedProxies: hops.Trusted{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")},
	}
	for _, c := range configure {
		c(&cfg)
	}
	return check.NewHTTP(cfg)
}

func withToken(cfg *check.HTTPConfig) { cfg.Token = "s3cret" }

// reply is an HTTP response that was read.
type reply struct {
	code   int
	header http.Header
	body   string
}

// do sends a request to a handler. A header is "Name: value".
func do(t *testing.T, h http.Handler, method, url, body string, headers ...string) reply {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		req.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return reply{w.Code, w.Header(), w.Body.String()}
}

const question = `{"mailbox":"alice@example.org","clientAddress":"8.8.8.8","service":"SERVICE_IMAP"}`

func TestJSON(t *testing.T) {
	h := newFixture(t, stateOf(t, lists())).http()
	for _, c := range []struct {
		name, body string
		want       *decisionv1.Decision
	}{
		{"allowed", question, &decisionv1.Decision{Verdict: verdict(matched), Reason: matched, MatchedNet: "8.8.8.0/24", Revision: "1-7"}},
		{
			"denied, proto names and numbers", `{"mailbox":"alice@example.org","client_address":"1.1.1.1","service":1}`,
			&decisionv1.Decision{Verdict: verdict(notInNets), Reason: notInNets, Revision: "1-7"},
		},
		{
			"exempt", `{"mailbox":"alice@example.org","service":"SERVICE_CALDAV"}`,
			&decisionv1.Decision{Verdict: verdict(exempt), Reason: exempt, Revision: "1-7"},
		},
	} {
		resp := do(t, h, http.MethodPost, "/v1/check", c.body)
		got := new(checkv1.CheckResponse)
		if err := protojson.Unmarshal([]byte(resp.body), got); err != nil || resp.code != http.StatusOK || resp.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v: %v", c.name, resp, err)
		}
		if diff := cmp.Diff(c.want, got.GetDecision(), protocmp.Transform()); diff != "" || got.GetDataAge() == nil {
			t.Errorf("%s: %s (-want +got):\n%s", c.name, resp.body, diff)
		}
	}
}

func TestJSONErrors(t *testing.T) {
	const (
		fieldInvalid   = decisionv1.ErrorReason_ERROR_REASON_FIELD_INVALID
		mailboxInvalid = decisionv1.ErrorReason_ERROR_REASON_MAILBOX_INVALID
		addressInvalid = decisionv1.ErrorReason_ERROR_REASON_CLIENT_ADDRESS_INVALID
	)
	for _, c := range []struct {
		name, method, body, header string
		http                       int
		code                       codes.Code
		reason                     decisionv1.ErrorReason
		cause                      string
	}{
		{"GET", http.MethodGet, "", "", 405, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"PUT", http.MethodPut, question, "", 405, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"a form", http.MethodPost, "mailbox=a", "Content-Type: application/x-www-form-urlencoded", 415, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"no type", http.MethodPost, question, "Content-Type: ", 415, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"too large", http.MethodPost, strings.Repeat(" ", 10<<20) + question, "", 413, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"no body", http.MethodPost, "", "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"no JSON", http.MethodPost, "hello", "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"array", http.MethodPost, "[]", "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"more behind it", http.MethodPost, question + question, "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"unknown field", http.MethodPost, `{"mailbox":"alice@example.org","password":"x"}`, "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"field twice", http.MethodPost, `{"mailbox":"a@example.org","mailbox":"b@example.org"}`, "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"unknown service", http.MethodPost, `{"mailbox":"alice@example.org","service":"SERVICE_TELNET"}`, "", 400, codes.InvalidArgument, fieldInvalid, "bad_request"},
		{"no service", http.MethodPost, `{"mailbox":"alice@example.org"}`, "", 400, codes.InvalidArgument, fieldInvalid, "service_unknown"},
		{"no mailbox", http.MethodPost, `{"service":"SERVICE_IMAP"}`, "", 400, codes.InvalidArgument, mailboxInvalid, "mailbox_invalid"},
		{"NUL", http.MethodPost, `{"mailbox":"alice\u0000@example.org","service":"SERVICE_IMAP"}`, "", 400, codes.InvalidArgument, mailboxInvalid, "mailbox_invalid"},
		{
			"line break", http.MethodPost, `{"mailbox":"alice@example.org","service":"SERVICE_IMAP","clientAddress":"8.8.8.8\r\n"}`, "",
			400, codes.InvalidArgument, addressInvalid, "client_address_invalid",
		},
	} {
		f := newFixture(t, stateOf(t, lists()))
		var headers []string
		if c.header != "" {
			headers = append(headers, c.header)
		}
		resp := do(t, f.http(), c.method, "/v1/check", c.body, headers...)
		wantStatus(t, c.name, resp, c.http, c.code, c.reason)
		if n := f.metric("unanswered_total", c.cause, "json"); n != 1 {
			t.Errorf("%s was counted %v times", c.name, n)
		}
	}
	f := newFixture(t, nil)
	wantStatus(t, "not synced", do(t, f.http(), http.MethodPost, "/v1/check", question), 503, codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED)
	f = newFixture(t, nil, func(cfg *check.DeciderConfig) { cfg.State = func() *mirror.State { panic("secret cause") } })
	resp := do(t, f.http(), http.MethodPost, "/v1/check", question)
	wantStatus(t, "panic", resp, 500, codes.Internal, decisionv1.ErrorReason_ERROR_REASON_INTERNAL)
	f.wantLog("level=ERROR", "secret cause")
}

// wantStatus fails unless the body is a google.rpc.Status that says the same as the HTTP status.
func wantStatus(t *testing.T, name string, resp reply, httpCode int, code codes.Code, reason decisionv1.ErrorReason) {
	t.Helper()
	st := new(statuspb.Status)
	if err := protojson.Unmarshal([]byte(resp.body), st); err != nil {
		t.Fatalf("%s: %v: %v", name, resp, err)
	}
	if err := status.ErrorProto(st); resp.code != httpCode || status.Code(err) != code || rpcerr.Reason(err) != reason || st.GetMessage() == "" {
		t.Errorf("%s: %v", name, resp)
	}
}

func TestToken(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	h := f.http(withToken)
	for header, want := range map[string]bool{
		"Authorization: Bearer s3cret": true, "Authorization: bearer s3cret": true,
		"X-Token: s3cret": false, "Authorization: s3cret": false, "Authorization: Bearer ": false, "Authorization: Bearer": false,
		"Authorization: Bearer s3cre": false, "Authorization: Bearer s3crets": false, "Authorization: Basic s3cret": false,
		"Authorization: Bearer  s3cret": false,
	} {
		resp := do(t, h, http.MethodPost, "/v1/check", question, header)
		if want != (resp.code == http.StatusOK) {
			t.Errorf("%s: /v1/check says %v", header, resp)
		}
		if !want {
			if resp.header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s: no WWW-Authenticate", header)
			}
			wantStatus(t, header, resp, 401, codes.Unauthenticated, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED)
		}
		for _, command := range []string{"allow", "report"} {
			wantAnswer := answer{Status: 0}
			if !want {
				wantAnswer.Status = -1
			}
			body := `{"login":"alice@example.org","remote":"8.8.8.8","protocol":"imap","stage":"before"}`
			if got := dovecotAnswer(t, do(t, h, http.MethodPost, "/dovecot?command="+command, body, header)); got != wantAnswer {
				t.Errorf("%s: /dovecot?command=%s says %v", header, command, got)
			}
		}
	}
	if n := f.metric("unanswered_total", "unauthorized", "json"); n != 8 {
		t.Errorf("%v refusals were counted", n)
	}
	f.wantLog("level=WARN", "cause=unauthorized", "door=dovecot")
	if strings.Contains(f.log.String(), "s3cre") {
		t.Errorf("a token was logged:\n%s", f.log.String())
	}
}

func TestOtherPaths(t *testing.T) {
	h := newFixture(t, stateOf(t, lists())).http()
	for _, path := range []string{"/", "/v1", "/v1/check/more", "/dovecot/more", "/metrics"} {
		if resp := do(t, h, http.MethodPost, path, question); resp.code != http.StatusNotFound {
			t.Errorf("%s: %v", path, resp)
		}
	}
}

// TestBodiesStayOutOfTheLog: whatever somebody posts here by mistake may hold a password.
func TestBodiesStayOutOfTheLog(t *testing.T) {
	f := newFixture(t, stateOf(t, lists()))
	h := f.http()
	for _, body := range []string{"hunter2", `{"hunter2":1}`, `{"mailbox":"hunter2"`, `{"login":7,"password":"hunter2"}`, "user=x&password=hunter2"} {
		do(t, h, http.MethodPost, "/v1/check", body)
		do(t, h, http.MethodPost, "/dovecot?command=allow", body)
	}
	if log := f.log.String(); strings.Contains(log, "hunter2") || !strings.Contains(log, "bad_request") {
		t.Errorf("log:\n%s", log)
	}
}
