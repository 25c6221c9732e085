package session_test

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
	"github.com/allowednets/allowednets/sidecar/internal/session"
)

const (
	alice = "alice@example.org"
	bob   = "bob@example.org"
	home  = "8.8.8.8" // on alice's list
	away  = "9.9.9.9"
)

func aliceAtHome() map[string]string { return map[string]string{alice: "8.8.8.0/24"} }

// sweeping runs test in a bubble in which the sweeper runs.
func sweeping(t *testing.T, test func(t *testing.T, f *fixture), configure ...func(*check.DeciderConfig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, configure...)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := f.sweeper.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		test(t, f)
		cancel()
		running.Wait()
		if got := f.metric("decisions_total", ""); got != 0 {
			t.Errorf("%v decisions were counted, and nobody asked for any", got)
		}
		if strings.Contains(f.log.String(), "access denied") {
			t.Errorf("an attempt was logged, and there was none:\n%s", f.log.String())
		}
		if strings.Contains(f.log.String(), key) {
			t.Errorf("the key was logged:\n%s", f.log.String())
		}
	})
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestWhoIsEnded(t *testing.T) {
	tests := []struct {
		name  string
		open  session.Connection
		ended bool
	}{
		{"outside", connection(alice, "imap", away), true},
		{"inside", connection(alice, "imap", home), false},
		{"POP3", connection(alice, "pop3", away), true},
		{"ManageSieve", connection(alice, "sieve", away), true},
		{"submission is exempt", connection(alice, "submission", away), false},
		{"delivery is exempt", connection(alice, "lmtp", away), false},
		{"a service nobody knows gets no answer", connection(alice, "gopher", away), false},
		{"another spelling", connection("ALICE@Example.org", "imap", away), true},
		{"mapped, inside", connection(alice, "imap", "::ffff:"+home), false},
		{"mapped, outside", connection(alice, "imap", "::ffff:"+away), true},
		{"IPv6", connection(alice, "imap", "2a00:1450::1"), true},
		{"private", connection(alice, "imap", "192.168.0.1"), true},
		{"no address: a program of the machine", connection(alice, "imap", ""), false},
		{"an address with a zone gets no answer", connection(alice, "imap", "fe80::1%eth0"), false},
		{"a trusted proxy, perhaps for calendars", connection(alice, "imap", "10.9.1.1"), false},
		{"a trusted proxy, mapped", connection(alice, "imap", "::ffff:10.9.1.1"), false},
		{"no list", connection(bob, "imap", away), false},
		{"no domain", connection("alice", "imap", away), false},
		{"a name like a mask for everybody", connection("*", "imap", away), false},
		{"a name like a mask for alice", connection("a*@example.org", "imap", away), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sweeping(t, func(t *testing.T, f *fixture) {
				f.dovecot.set(tt.open)
				f.save(aliceAtHome())
				after(3 * time.Second)
				if got := len(f.dovecot.left()) == 0; got != tt.ended {
					t.Errorf("ended is %v", got)
				}
				want := 0.0
				if tt.ended {
					want = 1
				}
				if got := f.metric("sessions_ended_total", ""); got != want {
					t.Errorf("%v sessions were counted", got)
				}
				if _, kicks := f.dovecot.asked(); !tt.ended && kicks > 0 {
					t.Errorf("%d kicks", kicks)
				}
			})
		})
	}
}

// TestMasks shows that a name with a ? ends only itself.
func TestMasks(t *testing.T) {
	const odd, neighbour = "al?ce@example.org", "alXce@example.org"
	lists := map[string]string{odd: "8.8.8.8", alice: "9.9.9.0/24"}
	for _, tt := range []struct {
		name       string
		open, want []session.Connection
	}{
		{"alone", []session.Connection{connection(odd, "imap", away), connection(bob, "imap", away)}, []session.Connection{connection(bob, "imap", away)}},
		{"with a neighbour elsewhere", []session.Connection{connection(odd, "imap", away), connection(alice, "imap", "9.9.9.8")}, []session.Connection{connection(alice, "imap", "9.9.9.8")}},
		{"with a neighbour that stays", []session.Connection{connection(odd, "imap", away), connection(alice, "imap", away)}, []session.Connection{connection(odd, "imap", away), connection(alice, "imap", away)}},
		{"with a neighbour in other letters", []session.Connection{connection(odd, "imap", away), connection(neighbour, "imap", away)}, []session.Connection{connection(odd, "imap", away), connection(neighbour, "imap", away)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sweeping(t, func(t *testing.T, f *fixture) {
				f.dovecot.set(tt.open...)
				f.save(lists)
				after(500 * time.Millisecond)
				f.dovecot.mu.Lock()
				defer f.dovecot.mu.Unlock()
				if diff := cmp.Diff(tt.want, f.dovecot.open); diff != "" {
					t.Errorf("(-want +open)\n%s", diff)
				}
				if left, stayed := f.metric("sessions_left_total", ""), len(tt.want) == len(tt.open); (left > 0) != stayed {
					t.Errorf("%v sessions were counted as left", left)
				}
			})
		})
	}
}

// TestWhen shows when it looks.
func TestWhen(t *testing.T) {
	t.Run("a list is tightened", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.save(nil)
			after(30 * time.Second)
			f.dovecot.set(connection(alice, "imap", away), connection(alice, "imap", home))
			f.save(aliceAtHome())
			after(0)
			if diff := cmp.Diff([]string{alice + " imap " + home}, f.dovecot.left()); diff != "" {
				t.Errorf("at once (-want +open)\n%s", diff)
			}
			// Let in by the lists of before, visible only now.
			f.dovecot.set(connection(alice, "imap", away))
			after(time.Second)
			if got := f.dovecot.left(); len(got) != 0 {
				t.Errorf("a second later %q are open", got)
			}
		})
	})
	t.Run("a list is loosened", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.save(aliceAtHome())
			f.dovecot.set(connection(alice, "imap", home))
			after(10 * time.Second)
			f.save(map[string]string{alice: "8.8.8.0/24, 9.9.9.9"})
			after(10 * time.Second)
			f.save(nil)
			after(10 * time.Second)
			if _, kicks := f.dovecot.asked(); kicks > 0 {
				t.Errorf("%d kicks", kicks)
			}
		})
	})
	t.Run("only the age of the lists changes", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.save(aliceAtHome())
			after(5 * time.Second)
			before, _ := f.dovecot.asked()
			for range 8 {
				st := *f.state.Load()
				st.Proven = time.Now()
				f.publish(&st)
				after(5 * time.Second)
			}
			if now, _ := f.dovecot.asked(); len(now) != len(before) {
				t.Errorf("%d sweeps for nothing", len(now)-len(before))
			}
		})
	})
	t.Run("a hundred saves a second", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			for range 1000 {
				f.save(aliceAtHome())
				after(10 * time.Millisecond)
			}
			if whos, _ := f.dovecot.asked(); len(whos) < 9 || len(whos) > 11 {
				t.Errorf("%d sweeps in 10 s", len(whos))
			}
		})
	})
	t.Run("every minute", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.save(aliceAtHome())
			after(30 * time.Second)
			f.dovecot.set(connection(alice, "imap", away)) // an alias of the userdb
			after(time.Minute)
			if got := f.dovecot.left(); len(got) != 0 {
				t.Errorf("%q are open", got)
			}
			if got := f.metric("session_sweep_age_seconds", ""); got > 60 {
				t.Errorf("the last sweep was %v s ago", got)
			}
		})
	})
}

// TestNoAnswer shows that nothing ends for lack of an answer.
func TestNoAnswer(t *testing.T) {
	t.Run("no lists", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.dovecot.set(connection(alice, "imap", away))
			after(5 * time.Minute)
			if whos, _ := f.dovecot.asked(); len(whos) != 0 || len(f.dovecot.left()) == 0 {
				t.Errorf("%d sweeps; open: %q", len(whos), f.dovecot.left())
			}
			if got := f.metric("session_sweep_age_seconds", ""); !math.IsInf(got, 1) {
				t.Errorf("the last sweep was %v s ago", got)
			}
			f.save(aliceAtHome())
			after(0)
			if got := f.dovecot.left(); len(got) != 0 {
				t.Errorf("with lists, %q are open", got)
			}
		})
	})
	t.Run("old lists", func(t *testing.T) {
		sweeping(t, func(t *testing.T, f *fixture) {
			f.save(nil)
			after(5 * time.Minute)
			f.dovecot.set(connection(alice, "imap", away))
			f.publish(&mirror.State{Index: f.state.Load().Index, Revision: "1-7"}) // of unknown age
			after(5 * time.Minute)
			if got := f.dovecot.left(); len(got) == 0 {
				t.Error("a session ended because the data is old")
			}
		}, func(cfg *check.DeciderConfig) { cfg.DenyAfter = time.Minute })
	})
}

// TestDoveadmFails shows that it tries again, ever less often, and that an answer that is not understood ends nothing.
func TestDoveadmFails(t *testing.T) {
	const who = `{"username":"` + alice + `","service":"imap","pid":"1","ip":"` + away + `"}`
	for name, answer := range map[string]func([]byte) *http.Response{
		"down":             func([]byte) *http.Response { return nil },
		"wrong key":        func([]byte) *http.Response { return response(401, "") },
		"elsewhere":        func([]byte) *http.Response { return response(302, "") },
		"broken":           func([]byte) *http.Response { return response(500, "") },
		"not JSON":         func([]byte) *http.Response { return response(200, "JSON parse error") },
		"cut":              func([]byte) *http.Response { return response(200, `[["doveadmResponse",[`+who) },
		"nothing":          func([]byte) *http.Response { return response(200, "[]") },
		"another's answer": func([]byte) *http.Response { return response(200, `[["doveadmResponse",[`+who+`],"x"]]`) },
		"not allowed": func([]byte) *http.Response {
			return response(200, `[["error",{"type":"unAuthorized","exitCode":0},"0"]]`)
		},
		"another kind": func([]byte) *http.Response { return response(200, `[["who",[`+who+`],"0"]]`) },
		"kick fails": func(body []byte) *http.Response {
			if strings.Contains(string(body), `"who"`) {
				return response(200, `[["doveadmResponse",[`+who+`],"0"]]`)
			}
			return response(200, `[["error",{"type":"exitCode","exitCode":75},"0"]]`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			sweeping(t, func(t *testing.T, f *fixture) {
				f.dovecot.set(connection(alice, "imap", away))
				f.dovecot.fail(answer)
				f.save(aliceAtHome())
				after(4 * time.Minute)
				if failed := f.metric("session_sweeps_total", "failed"); failed < 20 || failed > 60 {
					t.Errorf("%v attempts", failed)
				}
				if got := f.metric("session_sweep_age_seconds", ""); !math.IsInf(got, 1) {
					t.Errorf("the last sweep was %v s ago", got)
				}
				if got := len(f.dovecot.left()) + int(f.metric("sessions_ended_total", "")); got != 1 {
					t.Errorf("%d sessions", got)
				}
				f.dovecot.fail(nil)
				after(10 * time.Second)
				if got := f.dovecot.left(); len(got) != 0 {
					t.Errorf("after it is back, %q are open", got)
				}
			})
		})
	}
}

// TestGone shows that a connection that ends by itself between the two questions is no failure, and not our doing.
func TestGone(t *testing.T) {
	sweeping(t, func(t *testing.T, f *fixture) {
		f.dovecot.fail(func(body []byte) *http.Response {
			if strings.Contains(string(body), `"who"`) {
				return response(200, `[["doveadmResponse",[{"username":"`+alice+`","service":"imap","ip":"`+away+`"}],"0"]]`)
			}
			return response(200, `[["error",{"type":"exitCode","exitCode":68},"0"]]`)
		})
		f.save(aliceAtHome())
		after(5 * time.Second)
		if failed, ended := f.metric("session_sweeps_total", "failed"), f.metric("sessions_ended_total", ""); failed != 0 || ended != 0 {
			t.Errorf("%v failures; %v sessions were counted", failed, ended)
		}
	})
}

// TestManyKicks shows that a batch that is partly gone is no error.
func TestManyKicks(t *testing.T) {
	sweeping(t, func(t *testing.T, f *fixture) {
		lists := make(map[string]string)
		var open []session.Connection
		for i := range 120 {
			name := fmt.Sprintf("user%d@example.org", i)
			lists[name] = "8.8.8.8"
			open = append(open, connection(name, "imap", away), connection(name, "pop3", away))
		}
		f.dovecot.set(open...)
		f.save(lists)
		after(time.Second)
		if got := f.dovecot.left(); len(got) != 0 {
			t.Errorf("%d are open", len(got))
		}
		if got := f.metric("sessions_ended_total", ""); got != 240 {
			t.Errorf("%v were counted", got)
		}
		if n := strings.Count(f.log.String(), "session ended"); n != 100 {
			t.Errorf("%d lines in the log", n)
		}
	})
}

func TestLongAnswer(t *testing.T) {
	d, err := session.NewDoveadm("http://127.0.0.1:7482", key)
	if err != nil {
		t.Fatal(err)
	}
	fake := new(dovecot)
	fake.fail(func([]byte) *http.Response {
		return response(200, strings.Repeat(" ", 65<<20)+`[["doveadmResponse",[],"0"]]`)
	})
	session.Over(d, fake)
	if _, err := d.Who(t.Context()); err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("error %v", err)
	}
}

func TestNewDoveadm(t *testing.T) {
	for _, tt := range []struct{ url, problem string }{
		{"http://127.0.0.1:7482", ""},
		{"http://127.0.0.1:7482/", ""},
		{"http://127.0.0.1:7482/doveadm/v1", ""},
		{"http://[::1]:7482", ""},
		{"http://localhost", ""},
		{"https://mail.example.org:7482", ""},
		{"http://192.0.2.1:7482", "not on loopback"},
		{"http://mail.example.org", "not on loopback"},
		{"http://127.0.0.1.example.org:7482", "not on loopback"},
		{"http://0.0.0.0:7482", "not on loopback"},
		{"127.0.0.1:7482", "not a URL"},
		{"unix:/run/dovecot/doveadm", "not a URL"},
		{"http://doveadm:s3cret@127.0.0.1:7482", "not a URL"},
		{"http://127.0.0.1:7482?x=y", "not a URL"},
		{"http://", "not a URL"},
		{"http://127.0.0.1:s3cret", "not a URL"},
		{"http://127.0.0.1:7482/other", "path"},
	} {
		_, err := session.NewDoveadm(tt.url, key)
		if (err == nil) != (tt.problem == "") || err != nil && (!strings.Contains(err.Error(), tt.problem) || strings.Contains(err.Error(), key)) {
			t.Errorf("%s: %v", tt.url, err)
		}
	}
}
