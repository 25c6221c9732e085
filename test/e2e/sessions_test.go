package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
)

// endedWithin is the promise: from the save to the end of the connection.
const endedWithin = 2 * time.Second

// stay opens sessions that end with the test.
func stay(t *testing.T, open func(context.Context, dovecot.Attempt) (*dovecot.Session, error), a dovecot.Attempt) *dovecot.Session {
	t.Helper()
	s, err := open(t.Context(), a)
	if err != nil {
		t.Fatalf("%s from %s: %v", a.User, a.Client, err)
	}
	t.Cleanup(s.Close)
	return s
}

func wantEnded(t *testing.T, name string, s *dovecot.Session, within time.Duration) {
	t.Helper()
	if last, err := s.Ended(within); err != nil {
		t.Errorf("%s: not ended: %v (last line %q)", name, err, last)
	}
}

func wantAlive(t *testing.T, name string, s *dovecot.Session) {
	t.Helper()
	if err := s.Alive(); err != nil {
		t.Errorf("%s: ended: %v", name, err)
	}
}

// saved saves a list; it does not wait until it is enforced.
func (w *world) saved(t *testing.T, mailbox, nets string) {
	t.Helper()
	if _, err := w.save(t.Context(), mailbox, nets); err != nil {
		t.Fatal(err)
	}
}

// awaitSweeps waits until n more sweeps were done.
func (w *world) awaitSweeps(t *testing.T, n float64) {
	t.Helper()
	const name = `allowednets_sidecar_session_sweeps_total{outcome="done"}`
	awaitMetric(t, w.sidecar.Admin, name, metric(t, w.sidecar.Admin, name)+n)
}

// TestOpenSessions shows that open sessions end when a list does not permit them any more, and no others.
func TestOpenSessions(t *testing.T) {
	w := newWorld(t, settings{sessions: true, dovecot: infoIsAlice(), sidecarArgs: []string{"--state-dir", t.TempDir()}})
	const carol, both = "198.51.100.77", aliceNets + ", 198.51.100.0/24"
	imap, pop3 := w.dovecot.OpenIMAP, w.dovecot.OpenPOP3
	begin := func(t *testing.T, nets string) { t.Helper(); w.enforce(t, alice, nets) }

	t.Run("a list is tightened", func(t *testing.T) {
		begin(t, both)
		inside4, outside4 := stay(t, imap, from(inside, alice, right)), stay(t, imap, from(outside, alice, right))
		other := stay(t, imap, from(carol, alice, right))
		byAlias := stay(t, imap, from(outside, sales, right))
		pop, popInside := stay(t, pop3, from(outside, alice, right)), stay(t, pop3, from(inside, alice, right))
		neighbour := stay(t, imap, from(outside, bob, right))
		master := stay(t, imap, from(outside, alice+"*"+dovecot.Master, dovecot.MasterPassword))
		web := webmail("127.0.0.1", alice, [2]string{"x-originating-ip", outside}, [2]string{"x-forward-via", "webmail"})
		byWebmail := stay(t, imap, web)
		calendar := stay(t, imap, webmail("127.0.0.1", alice, [2]string{"x-forward-via", "caldav"}))

		began := time.Now()
		w.saved(t, alice, aliceNets+", 198.51.100.64/26")
		if last, err := outside4.Ended(endedWithin); err != nil || !strings.HasPrefix(last, "* BYE") {
			t.Errorf("IMAP from outside: %v, last line %q", err, last)
		}
		t.Logf("ended %v after the save began", time.Since(began))
		wantEnded(t, "POP3 from outside", pop, time.Until(began.Add(endedWithin)))
		wantEnded(t, "an alias from outside", byAlias, time.Until(began.Add(endedWithin)))
		wantEnded(t, "a master user from outside", master, time.Until(began.Add(endedWithin)))
		wantEnded(t, "webmail with a browser outside", byWebmail, time.Until(began.Add(endedWithin)))
		wantAlive(t, "IMAP from inside", inside4)
		wantAlive(t, "POP3 from inside", popInside)
		wantAlive(t, "IMAP from an address of the same network that stays on the list", other)
		wantAlive(t, "another mailbox from the same address", neighbour)
		wantAlive(t, "calendars", calendar)
	})
	t.Run("a list where there was none", func(t *testing.T) {
		insideBob, outsideBob := stay(t, imap, from(inside, bob, right)), stay(t, imap, from(outside6, bob, right))
		w.saved(t, bob, aliceNets)
		wantEnded(t, "IMAP from outside", outsideBob, endedWithin)
		wantAlive(t, "IMAP from inside", insideBob)
		w.enforce(t, bob, "")
	})
	t.Run("a list is loosened, then cleared", func(t *testing.T) {
		begin(t, aliceNets)
		s := stay(t, imap, from(inside, alice, right))
		for _, nets := range []string{both, ""} {
			begin(t, nets)
			w.awaitSweeps(t, 2)
		}
		wantAlive(t, "IMAP from inside", s)
	})
	t.Run("an alias of the userdb", func(t *testing.T) {
		begin(t, aliceNets)
		s := stay(t, imap, from(outside, info, right)) // past the list: see TestAliasInUserdb
		w.saved(t, "somebody@example.org", aliceNets)
		wantEnded(t, "after the next sweep", s, endedWithin)
	})
	t.Run("doveadm was down", func(t *testing.T) {
		begin(t, both)
		s, stays := stay(t, imap, from(outside, alice, right)), stay(t, imap, from(inside, alice, right))
		w.doveadm.Cut()
		w.saved(t, alice, aliceNets)
		if last, err := s.Ended(endedWithin); err == nil {
			t.Errorf("ended without doveadm: %q", last)
		}
		w.doveadm.Heal()
		wantEnded(t, "after doveadm is back", s, 10*time.Second)
		wantAlive(t, "from inside", stays)
	})
	t.Run("the sidecar was down", func(t *testing.T) {
		begin(t, both)
		s, stays := stay(t, imap, from(outside, alice, right)), stay(t, imap, from(inside, alice, right))
		if err := w.sidecar.Stop(); err != nil {
			t.Fatal(err)
		}
		w.saved(t, alice, aliceNets)
		wantAlive(t, "while the sidecar is down", s)
		if err := w.sidecar.Restart(within(t, startWithin)); err != nil {
			t.Fatal(err)
		}
		wantEnded(t, "after the sidecar's start", s, 10*time.Second)
		wantAlive(t, "from inside", stays)
	})
	t.Run("the key is in no log", func(t *testing.T) {
		for name, log := range map[string]func() (string, error){"sidecar": w.sidecar.Log, "dovecot": w.dovecot.Log} {
			text, err := log()
			if err != nil || strings.Contains(text, doveadmKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}
