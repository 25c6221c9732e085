package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
)

// TestRollingRestart restarts the sidecar again and again while people log in: alone, and with its socket held open as systemd
// holds it. Nobody outside gets in, and what is refused for lack of an answer is bounded. The figures are in
// integrations/dovecot/README.md.
func TestRollingRestart(t *testing.T) {
	const (
		restarts = 5
		most     = 3 // refused in one restart, of the eight who log in without pause
	)
	for _, tt := range []struct {
		name   string
		passed bool
	}{{"alone", false}, {"with its socket held open", true}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, settings{passed: tt.passed, sidecarArgs: []string{"--state-dir", t.TempDir()}})
			t.Run("who comes while it is away", func(t *testing.T) {
				if err := w.sidecar.Stop(); err != nil {
					t.Fatal(err)
				}
				type result struct {
					answer dovecot.Answer
					err    error
				}
				results := make(chan result, 1)
				go func() {
					answer, err := w.dovecot.LoginIMAP(t.Context(), from(inside, alice, right))
					results <- result{answer, err}
				}()
				if !tt.passed { // otherwise the log-in waits for the start
					if r := <-results; r.answer.OK || r.err != nil {
						t.Errorf("logged in without the sidecar: %v, %v", r.answer, r.err)
					}
				}
				if err := w.sidecar.Restart(within(t, startWithin)); err != nil {
					t.Fatal(err)
				}
				if tt.passed {
					if r := <-results; !r.answer.OK || r.err != nil {
						t.Errorf("refused: %v, %v", r.answer, r.err)
					}
				}
				recovered(t, w.dovecot)
			})
			l := startLoad(t, w.dovecot)
			l.more(t, 40)
			if n := l.report(t, "before"); n != 0 {
				t.Errorf("%d refusals for lack of an answer while nothing was amiss", n)
			}
			var away time.Duration
			for range restarts {
				began := time.Now()
				if err := w.sidecar.Stop(); err != nil {
					t.Fatal(err)
				}
				if err := w.sidecar.Restart(within(t, startWithin)); err != nil {
					t.Fatal(err)
				}
				away += time.Since(began)
				recovered(t, w.dovecot)
				l.more(t, 24)
			}
			refused := l.report(t, "restarts")
			t.Logf("%d restarts of %v: %d log-ins refused", restarts, away/restarts, refused)
			if refused > restarts*most {
				t.Errorf("%d log-ins were refused for lack of an answer in %d restarts", refused, restarts)
			}
			if log, err := w.dovecot.Log(); err != nil || strings.Contains(log, "Connection refused") == tt.passed {
				t.Errorf("connections to the sidecar were refused: %v; error %v", !tt.passed, err)
			}
		})
	}
}
