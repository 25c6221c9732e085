package e2e

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/allowednets/allowednets/test/dovecot"
)

// TestFailOpenMatrix shows what Dovecot makes of every kind of answer, with the configuration that people copy and with
// Dovecot's default of auth_policy_reject_on_fail, which lets everybody in. It documents Dovecot, not the sidecar: the
// table is in integrations/dovecot/README.md.
func TestFailOpenMatrix(t *testing.T) {
	needDovecot(t)
	write := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		}
	}
	release := make(chan struct{}) // Dovecot keeps the connection of a request that it gave up
	tests := []struct {
		name         string
		handler      http.HandlerFunc
		ours, byTrap bool // whether the right password logs in: with our configuration; with reject_on_fail = no
	}{
		{"go on", write(200, `{"status":0,"msg":""}`), true, true},
		{"deny", write(200, `{"status":-1,"msg":"no"}`), false, false},
		{"deny without text", write(200, `{"status":-1,"msg":""}`), false, false},
		{"204", write(204, ""), false, true},
		{"empty body", write(200, ""), false, true},
		{"500", write(500, ""), false, true},
		{"403 with a denial", write(403, `{"status":-1,"msg":"no"}`), false, true},
		{"not JSON", write(200, "no"), false, true},
		{"empty object", write(200, "{}"), false, true},
		{"status is a string", write(200, `{"status":"0","msg":""}`), false, true},
		{"status is a negative string", write(200, `{"status":"-1","msg":""}`), false, true},
		{"status is not an integer", write(200, `{"status":-1.0,"msg":""}`), false, true},
		{"msg is null", write(200, `{"status":-1,"msg":null}`), false, true},
		{"no answer in time", func(http.ResponseWriter, *http.Request) { <-release }, false, true},
		{"connection cut", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, false, true},
	}
	var handler atomic.Pointer[http.HandlerFunc]
	door := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		(*handler.Load())(w, r)
	}))
	defer door.Close()
	s := newStack(t)
	users := []dovecot.User{{Name: "alice@example.org", Password: dovecot.Password}}
	ours := startDovecot(t, s, "dovecot", users, dovecot.Config{Door: door.URL + "/dovecot"})
	trap := startDovecot(t, s, "dovecot-trap", users, dovecot.Config{Door: door.URL + "/dovecot", After: "auth_policy_reject_on_fail = no"})

	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			handler.Store(&tt.handler)
			for _, of := range []struct {
				name   string
				server *dovecot.Server
				want   bool
			}{{"ours", ours, tt.ours}, {"trap", trap, tt.byTrap}} {
				for protocol, login := range protocols(of.server) {
					got, err := login(t.Context(), dovecot.Attempt{User: "alice@example.org", Password: dovecot.Password})
					if err != nil {
						t.Fatalf("%s, %s: %v", of.name, protocol, err)
					}
					if got.OK != of.want {
						t.Errorf("%s, %s: logged in is %v, want %v: %s", of.name, protocol, got.OK, of.want, got.Text)
					}
				}
			}
		})
	}
	close(release)
	t.Run("nobody there", func(t *testing.T) {
		door.Close()
		for name, d := range map[string]*dovecot.Server{"ours": ours, "trap": trap} {
			got, err := d.LoginIMAP(t.Context(), dovecot.Attempt{User: "alice@example.org", Password: dovecot.Password})
			if err != nil {
				t.Fatal(err)
			}
			if got.OK != (name == "trap") {
				t.Errorf("%s: logged in is %v: %s", name, got.OK, got.Text)
			}
			if name == "ours" && !strings.Contains(got.Text, "[AUTHENTICATIONFAILED]") {
				t.Errorf("refused with %q", got.Text)
			}
		}
	})
}
