package check

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// FuzzFlat: what the short way reads, the long one reads too, and alike.
func FuzzFlat(f *testing.F) {
	for _, body := range []string{
		`{}`, ` { } `, `{"a":"b",}`, `{,}`, `{"a"}`, `{"a":"b"}x`, `{"a":"b"} {}`, `{"a":"b"`, "{\"a\":\"\x00\"}", `{"login":"\u0061"}`, `[]`, ``, `{"a":"b" "c":"d"}`,
		"\ufeff{}", "\v{}", "{\"login\":\"é\"}", "{\"login\":\"\xff\"}", `{"login":"a\"}`,
		`{"login":"alice@example.org","remote":"192.0.2.1","protocol":"imap","session_id":"x","stage":"before","via":"","real_remote":"192.0.2.2"}`,
		`{"login":"alice@example.org","login":"bob@example.org","remote":"192.0.2.1","protocol":"imap"}`,
		`{"login":"alice@example.org","login":"alice@example.org","remote":"192.0.2.1","protocol":"imap"}`,
		`{"login":"alice@example.org","remote":"192.0.2.1","protocol":"imap","tls":false}`,
		`{"mailbox":"alice@example.org","clientAddress":"192.0.2.1","service":"SERVICE_IMAP","minRevision":"1-2"}`,
		`{ "mailbox" : "alice@example.org" , "client_address" : "192.0.2.1" , "service" : "SERVICE_IMAP" }`,
		`{"mailbox":"a","mailbox":"b"}`, `{"clientAddress":"a","client_address":"b"}`, `{"service":"imap"}`, `{"service":"1"}`, `{"mailbox":"a","extra":"b"}`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		if short, ok := parseFlatLogin(body); ok {
			if long, err := parseAnyLogin([]byte(body)); err != nil || long != short {
				t.Errorf("login %q: %+v, but the long way %+v, %v", body, short, long, err)
			}
		}
		if short, ok := parseFlatRequest(body); ok {
			msg := new(checkv1.CheckRequest)
			if err := protojson.Unmarshal([]byte(body), msg); err != nil || requestOf(msg) != short {
				t.Errorf("request %q: %+v, but the long way %v, %v", body, short, msg, err)
			}
		}
	})
}

// TestFlatIsUsual: the short way is taken by what peers send.
func TestFlatIsUsual(t *testing.T) {
	if l, ok := parseFlatLogin(`{"login":"a@b.example","remote":"192.0.2.1","protocol":"imap","stage":"after"}`); !ok || l != (login{login: "a@b.example", remote: "192.0.2.1", protocol: "imap", stage: "after"}) {
		t.Errorf("login: %+v, %v", l, ok)
	}
	want := Request{Mailbox: "a@b.example", Client: "192.0.2.1", Service: decisionv1.Service_SERVICE_WEBMAIL, MinRevision: "1-2"}
	if r, ok := parseFlatRequest(`{"mailbox":"a@b.example","clientAddress":"192.0.2.1","service":"SERVICE_WEBMAIL","minRevision":"1-2"}`); !ok || r != want {
		t.Errorf("request: %+v, %v", r, ok)
	}
}

// TestAppendJSON: what is written is what package protojson reads as the message, with every field of it.
func TestAppendJSON(t *testing.T) {
	aged := func(age time.Duration) *mirror.State {
		return &mirror.State{Revision: "12-345", Proven: time.Now().Add(-age)}
	}
	for name, d := range map[string]Decision{
		"zero":   {},
		"no age": {Outcome: allow.Outcome{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_NOT_IN_ALLOWED_NETS}, State: &mirror.State{Revision: "1-1"}},
		"all": {Outcome: allow.Outcome{
			Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, Net: netip.MustParsePrefix("2a00:1450::/32"),
		}, State: aged(3 * time.Second)},
		"one address": {Outcome: allow.Outcome{
			Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, Net: netip.MustParsePrefix("192.0.2.1/32"),
		}, State: aged(0)},
		"old":    {State: aged(1000 * time.Hour)},
		"future": {State: aged(-time.Hour)},
	} {
		t.Run(name, func(t *testing.T) {
			text := d.appendJSON(nil)
			got, want := new(checkv1.CheckResponse), d.message()
			if err := protojson.Unmarshal(text, got); err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			if now, then := want.GetDataAge().AsDuration(), got.GetDataAge().AsDuration(); now < then || now-then > time.Minute {
				t.Errorf("an age of %v after %v", now, then)
			}
			if (want.GetDataAge() == nil) != (got.GetDataAge() == nil) {
				t.Errorf("%s: an age of %v", text, want.GetDataAge())
			}
			if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&checkv1.CheckResponse{}, "data_age")); diff != "" {
				t.Errorf("%s (-want +got)\n%s", text, diff)
			}
			if name != "all" {
				return
			}
			for _, m := range []proto.Message{got, got.GetDecision()} {
				for fields, i := m.ProtoReflect().Descriptor().Fields(), 0; i < fields.Len(); i++ {
					if f := fields.Get(i); !m.ProtoReflect().Has(f) {
						t.Errorf("%s lacks %v", text, f.FullName())
					}
				}
			}
		})
	}
	for _, ns := range []time.Duration{0, 1, 1e9 - 1, 1e9, 123456789, 1e18} {
		text := string(appendSeconds(nil, ns))
		if got, err := time.ParseDuration(text); err != nil || got != ns {
			t.Errorf("%s for %d: %v, %v", text, ns, got, err)
		}
	}
}
