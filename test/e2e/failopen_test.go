package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
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

// TestFailOpenSidecar takes the sidecar itself away, in every way, from Dovecot as people copy it and from one with Dovecot's
// default of auth_policy_reject_on_fail. With ours nobody outside ever gets in; with the default everybody does who has the
// password, as soon as there is no answer.
func TestFailOpenSidecar(t *testing.T) {
	w := newWorld(t, settings{})
	door := "http://" + w.sidecar.HTTP + "/dovecot"
	trap := startDovecot(t, w.Stack, "dovecot-trap", people(), dovecot.Config{Door: door, After: "auth_policy_reject_on_fail = no"})
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Each says whether it is as expected that a user got in, or not.
	type expectation func(user, address string, in bool) bool
	permitted := func(user, address string) bool { return user == bob || address == inside }
	nobody := func(_, _ string, in bool) bool { return !in }
	everybody := func(_, _ string, in bool) bool { return in }
	byList := func(user, address string, in bool) bool { return in == permitted(user, address) }
	nobodyElse := func(user, address string, in bool) bool { return !in || permitted(user, address) }
	try := func(t *testing.T, ours, byTrap expectation) {
		t.Helper()
		var attempts errgroup.Group
		attempts.SetLimit(8)
		for _, of := range []struct {
			name   string
			server *dovecot.Server
			want   expectation
		}{{"ours", w.dovecot, ours}, {"trap", trap, byTrap}} {
			for protocol, login := range protocols(of.server) {
				for _, user := range []string{alice, bob, sales, alice + "*" + dovecot.Master} {
					for _, address := range []string{inside, outside} {
						attempts.Go(func() error {
							got, err := login(t.Context(), from(address, user, passwordOf(user)))
							if err != nil || !of.want(user, address, got.OK) {
								t.Errorf("%s, %s: %s from %s: logged in is %v (%q), error %v", of.name, protocol, user, address, got.OK, got.Text, err)
							}
							return nil
						})
					}
				}
				attempts.Go(func() error {
					if got, err := login(t.Context(), from(outside, bob, wrong)); err != nil || got.OK {
						t.Errorf("%s, %s: with a wrong password: %q, error %v", of.name, protocol, got.Text, err)
					}
					return nil
				})
			}
		}
		_ = attempts.Wait() // they report for themselves
	}
	// Both forget what they know of the sidecar.
	fresh := func(t *testing.T) {
		t.Helper()
		ctx := within(t, startWithin)
		must(t, errors.Join(w.dovecot.Reload(ctx), trap.Reload(ctx)))
		recovered(t, w.dovecot)
		recovered(t, trap)
	}

	fresh(t)
	t.Run("it answers", func(t *testing.T) { try(t, byList, byList) })
	t.Run("frozen", func(t *testing.T) {
		must(t, w.sidecar.Freeze(within(t, startWithin)))
		try(t, nobody, everybody)
		must(t, w.sidecar.Thaw(within(t, startWithin)))
		fresh(t)
	})
	t.Run("overloaded", func(t *testing.T) {
		release := exhaust(t, w)
		ctx := within(t, startWithin)
		must(t, errors.Join(w.dovecot.Reload(ctx), trap.Reload(ctx))) // which ends their connections to the sidecar
		var wrongly atomic.Int64
		try(t, nobodyElse, func(user, address string, in bool) bool { // now and then one gets an answer
			if in && !permitted(user, address) {
				wrongly.Add(1)
			}
			return true
		})
		release()
		if wrongly.Load() == 0 {
			t.Error("everybody got an answer: was the sidecar overloaded at all?")
		}
		fresh(t)
		try(t, byList, byList)
	})
	t.Run("killed", func(t *testing.T) {
		must(t, w.sidecar.Kill())
		try(t, nobody, everybody)
	})
	t.Run("started without data", func(t *testing.T) {
		must(t, errors.Join(w.policy.Stop(), w.sidecar.Start()))
		ctx := within(t, startWithin)
		must(t, errors.Join(w.dovecot.Reload(ctx), trap.Reload(ctx)))
		err := stack.Await(ctx, func(ctx context.Context) error {
			answer, err := trap.LoginIMAP(ctx, from(inside, alice, right))
			if err == nil && answer.OK {
				err = errors.New("there is no answer yet")
			}
			return err
		})
		must(t, err)
		try(t, nobody, nobody)
	})
}

// exhaust takes all descriptors of the sidecar with connections that say nothing, until release.
func exhaust(t *testing.T, w *world) (release func()) {
	t.Helper()
	limit := exec.CommandContext(t.Context(), "prlimit", "--pid", strconv.Itoa(w.sidecar.Pid()), "--nofile=40")
	if out, err := limit.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var holders sync.WaitGroup
	full := make(chan struct{}, 200)
	for range cap(full) {
		holders.Go(func() {
			for ctx.Err() == nil {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", w.sidecar.HTTP)
				if err != nil {
					return
				}
				select {
				case full <- struct{}{}:
				default:
				}
				stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
				_, _ = io.Copy(io.Discard, conn) // until the sidecar loses its patience
				stop()
				_ = conn.Close()
			}
		})
	}
	for range cap(full) {
		<-full
	}
	return func() {
		cancel()
		holders.Wait()
	}
}
