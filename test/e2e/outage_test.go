package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

// recoverWithin bounds how long logins may fail after everything is back. Dovecot's HTTP client backs off from a server
// that was away: seconds after a short outage.
const recoverWithin = 90 * time.Second

// load logs in without pause, inside and outside, and holds every answer against the model.
type load struct {
	workers sync.WaitGroup
	cancel  context.CancelFunc

	mu      sync.Mutex
	done    int
	allowed int
	denied  int
	// unanswered are refusals of somebody who is allowed, for lack of an answer, by their text.
	unanswered map[string]int
	// wrong are answers that contradict the model.
	wrong []string
}

// startLoad starts the workers; they end with the test.
func startLoad(t *testing.T, d *dovecot.Server) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{cancel: cancel, unanswered: make(map[string]int)}
	for _, a := range []struct {
		attempt dovecot.Attempt
		allowed bool
	}{
		{from(inside, alice, right), true},
		{from(inside6, alice, right), true},
		{from(outside, bob, right), true},
		{from(inside, sales, right), true},
		{from(outside, alice, right), false},
		{from(outside6, alice, right), false},
		{from(outside, sales, right), false},
		{from(outside, alice+"*"+dovecot.Master, dovecot.MasterPassword), false},
	} {
		l.workers.Go(func() {
			for ctx.Err() == nil {
				answer, err := d.LoginIMAP(ctx, a.attempt)
				if ctx.Err() == nil {
					l.judge(a.attempt, a.allowed, answer, err)
				}
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *load) stop() {
	l.cancel()
	l.workers.Wait()
}

func (l *load) judge(a dovecot.Attempt, allowed bool, answer dovecot.Answer, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done++
	switch {
	case err != nil:
		l.wrong = append(l.wrong, fmt.Sprintf("%s from %s: %v", a.User, a.Client, err))
	case answer.OK != allowed && answer.OK:
		l.wrong = append(l.wrong, fmt.Sprintf("%s from %s logged in", a.User, a.Client))
	case answer.OK:
		l.allowed++
	case !allowed:
		l.denied++
	case strings.Contains(answer.Text, notAllowed(a.Client.String())):
		l.wrong = append(l.wrong, fmt.Sprintf("%s from %s: %s", a.User, a.Client, answer.Text))
	default:
		l.unanswered[answer.Text]++
	}
}

// more waits until the workers have finished n more attempts that began from now on, or in any case ended from now on.
func (l *load) more(t *testing.T, n int) {
	t.Helper()
	finished := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.done
	}
	begun := finished()
	err := stack.Await(within(t, time.Minute), func(context.Context) error {
		if now := finished(); now < begun+n {
			return fmt.Errorf("%d of %d attempts", now-begun, n)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// report logs and forgets what happened since the last report, and returns how many refusals lacked an answer.
func (l *load) report(t *testing.T, during string) int {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, text := range slices.Sorted(maps.Keys(l.unanswered)) {
		t.Logf("%s: %d refused for lack of an answer: %s", during, l.unanswered[text], text)
		n += l.unanswered[text]
	}
	t.Logf("%s: %d allowed, %d denied, %d without an answer", during, l.allowed, l.denied, n)
	for i, w := range l.wrong {
		if i == 10 {
			t.Errorf("… and %d more", len(l.wrong)-i)
			break
		}
		t.Errorf("%s: contradicts the model: %s", during, w)
	}
	if l.allowed+l.denied+n == 0 {
		t.Errorf("%s: nothing happened", during)
	}
	l.allowed, l.denied, l.wrong = 0, 0, nil
	clear(l.unanswered)
	return n
}

// recovered waits until everybody who is allowed gets in again.
func recovered(t *testing.T, d *dovecot.Server) {
	t.Helper()
	begun := time.Now()
	err := stack.Await(within(t, recoverWithin), func(ctx context.Context) error {
		answer, err := d.LoginIMAP(ctx, from(inside, alice, right))
		if err == nil && !answer.OK {
			err = fmt.Errorf("refused: %s", answer.Text)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("logins work again %v after the sidecar was ready", time.Since(begun).Round(time.Millisecond))
}

// TestOutages takes one part away after the other, under login load, with an etcd of its own. No answer may contradict the
// list. Without the sidecar everybody is refused; without the policy service or etcd nobody notices.
func TestOutages(t *testing.T) {
	w := newWorld(t, settings{separateEtcd: true})
	l := startLoad(t, w.dovecot)
	l.more(t, 40)
	if n := l.report(t, "before"); n != 0 {
		t.Errorf("%d refusals for lack of an answer while nothing was amiss", n)
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sidecarOutages := []struct {
		name       string
		away, back func(context.Context) error
	}{
		{"sidecar stopped", func(context.Context) error { return w.sidecar.Stop() }, w.sidecar.Restart},
		{"sidecar killed", func(context.Context) error { return w.sidecar.Kill() }, w.sidecar.Restart},
		{"sidecar frozen", w.sidecar.Freeze, w.sidecar.Thaw},
	}
	for _, o := range sidecarOutages {
		t.Run(o.name, func(t *testing.T) {
			ctx := within(t, 3*time.Minute)
			must(t, o.away(ctx))
			l.more(t, 24)
			must(t, o.back(ctx))
			recovered(t, w.dovecot)
			if l.report(t, o.name) == 0 {
				t.Error("nobody was refused for lack of an answer: was the sidecar away at all?")
			}
			l.more(t, 40)
			l.report(t, "after "+o.name)
		})
	}
	t.Run("sidecar restarted quickly", func(t *testing.T) {
		ctx := within(t, 3*time.Minute)
		for range 3 {
			must(t, w.sidecar.Stop())
			must(t, w.sidecar.Restart(ctx))
			l.more(t, 8)
		}
		recovered(t, w.dovecot)
		l.report(t, "sidecar restarted quickly")
	})
	l.more(t, 40)
	l.report(t, "between")

	centralOutages := []struct {
		name       string
		away, back func(context.Context) error
	}{
		{"policy service stopped", func(context.Context) error { return w.policy.Stop() }, w.policy.Restart},
		{"policy service killed", func(context.Context) error { return w.policy.Kill() }, w.policy.Restart},
		{"policy service frozen", w.policy.Freeze, w.policy.Thaw},
		{"etcd stopped", func(context.Context) error { return w.etcd.Stop() }, func(context.Context) error { return w.etcd.Start() }},
		{"etcd killed", func(context.Context) error { return w.etcd.Kill() }, func(context.Context) error { return w.etcd.Start() }},
		{"etcd frozen", w.etcd.Freeze, w.etcd.Thaw},
	}
	for i, o := range centralOutages {
		t.Run(o.name, func(t *testing.T) {
			ctx := within(t, 3*time.Minute)
			must(t, o.away(ctx))
			l.more(t, 40)
			must(t, o.back(ctx))
			l.more(t, 8)
			// The way from a save to the sidecar heals by itself.
			nets := fmt.Sprintf("%s, 9.9.9.%d", aliceNets, i)
			err := stack.Await(ctx, func(ctx context.Context) error {
				token, err := w.save(ctx, alice, nets)
				if err != nil {
					return err
				}
				within, cancel := context.WithTimeout(ctx, 30*time.Second)
				defer cancel()
				return awaitRevision(within, w.checks, token)
			})
			if err != nil {
				t.Errorf("saves do not come through: %v", err)
			}
			if n := l.report(t, o.name); n != 0 {
				t.Errorf("%d logins were refused for lack of an answer", n)
			}
		})
	}
}

// metrics returns what an admin port shows.
func metrics(t *testing.T, admin string) string {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestNobodyGetsInWithoutSidecar shows the closed door with every protocol, for restricted and unrestricted mailboxes.
func TestNobodyGetsInWithoutSidecar(t *testing.T) {
	w := newWorld(t, settings{})
	states := []struct {
		name    string
		prepare func(context.Context) error
	}{
		{"frozen", w.sidecar.Freeze},
		{"dead", func(context.Context) error { return w.sidecar.Kill() }},
		{"without data", func(ctx context.Context) error {
			return errors.Join(w.policy.Stop(), w.sidecar.Start(), w.dovecot.Reload(ctx))
		}},
	}
	for _, state := range states {
		t.Run(state.name, func(t *testing.T) {
			if err := state.prepare(within(t, startWithin)); err != nil {
				t.Fatal(err)
			}
			var attempts sync.WaitGroup
			defer attempts.Wait()
			for protocol, login := range protocols(w.dovecot) {
				for _, user := range []string{alice, bob, sales, alice + "*" + dovecot.Master} {
					for _, address := range []string{inside, outside} {
						attempts.Go(func() {
							got, err := login(t.Context(), from(address, user, passwordOf(user)))
							if got.OK || err != nil {
								t.Errorf("%s: %s from %s: %q, %v", protocol, user, address, got.Text, err)
							}
						})
					}
				}
			}
		})
	}
	t.Run("the text says so", func(t *testing.T) {
		err := stack.Await(within(t, recoverWithin), func(ctx context.Context) error {
			answer, err := w.dovecot.LoginIMAP(ctx, from(inside, alice, right))
			if err == nil && answer.Text != denial("imap", noAnswerText) {
				err = fmt.Errorf("answer %q", answer.Text)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if err := stack.Ready(w.sidecar.Admin)(t.Context()); err == nil {
			t.Error("the sidecar is ready without data")
		}
		counted := regexp.MustCompile(`(?m)^allowednets_sidecar_unanswered_total\{cause="not_synced",door="dovecot"\} [1-9]`)
		if text := metrics(t, w.sidecar.Admin); !counted.MatchString(text) {
			t.Errorf("the sidecar does not count requests without an answer:\n%s", text)
		}
	})
	t.Run("and all is well when the policy service is back", func(t *testing.T) {
		if err := w.policy.Restart(within(t, startWithin)); err != nil {
			t.Fatal(err)
		}
		if err := w.sidecar.AwaitReady(within(t, startWithin)); err != nil {
			t.Fatal(err)
		}
		recovered(t, w.dovecot)
		if got := attempt(t, w.dovecot.LoginIMAP, from(outside, alice, right)); got.OK {
			t.Error("from outside as well")
		}
	})
}
