package login

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

// TestExpiry: a session ends when it is not used, and after its lifetime whether it is used or not.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hash, err := HashPassword("secret")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "users")
		if err := os.WriteFile(path, fmt.Appendf(nil, "users:\n- {name: anna, password: %q, auditor: ['*']}\n", hash), 0o600); err != nil {
			t.Fatal(err)
		}
		files, err := livefile.NewWatcher(slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		l, err := New(Config{Files: files, UsersFile: path, Idle: 30 * time.Minute, Lifetime: 12 * time.Hour, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		in := false
		handler := l.Sessions(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				if _, err := l.Password(r, "anna", "secret"); err != nil {
					t.Fatal(err)
				}
				return
			}
			_, in = UserOf(r.Context())
		}))
		var cookie string
		do := func(method string) {
			r := httptest.NewRequestWithContext(t.Context(), method, "/", strings.NewReader(url.Values{}.Encode()))
			r.Header.Set("Cookie", cookie)
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if got := w.Result().Cookies(); len(got) == 1 {
				cookie = got[0].Name + "=" + got[0].Value
			}
		}
		for name, c := range map[string]struct {
			every, total time.Duration
			in           bool
		}{
			"used":          {29 * time.Minute, 11 * time.Hour, true},
			"idle":          {31 * time.Minute, 31 * time.Minute, false},
			"used too long": {29 * time.Minute, 12*time.Hour + 30*time.Minute, false},
		} {
			cookie = ""
			do(http.MethodPost)
			for begun := time.Now(); time.Since(begun) < c.total; {
				time.Sleep(c.every)
				do(http.MethodGet)
			}
			if in != c.in {
				t.Errorf("%s: logged in %v", name, in)
			}
		}
	})
}

func TestStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		evicted := prometheus.NewCounter(prometheus.CounterOpts{Name: "evicted_total", Help: "Evicted."})
		s := newStore(evicted)
		commit := func(token string, after time.Duration) {
			t.Helper()
			if err := s.Commit(token, []byte(token), time.Now().Add(after)); err != nil {
				t.Fatal(err)
			}
		}
		want := func(token string, there bool) {
			t.Helper()
			data, found, err := s.Find(token)
			if err != nil || found != there || found && string(data) != token {
				t.Errorf("%s: %q, %v, %v", token, data, found, err)
			}
		}
		commit("a", time.Minute)
		commit("b", time.Hour)
		want("a", true)
		want("c", false)
		time.Sleep(time.Minute)
		want("a", false)
		commit("a", time.Hour) // of a request that was slower than the session's end
		want("a", false)
		if err := s.Delete("b"); err != nil {
			t.Fatal(err)
		}
		commit("b", time.Hour)
		want("b", false)
		if n := s.open(); n != 0 {
			t.Errorf("%v are open", n)
		}

		// What has ended is forgotten, in time.
		time.Sleep(time.Hour)
		for i := range 2000 {
			commit(fmt.Sprint("session", i), time.Hour)
		}
		if len(s.sessions) != 2000 || s.open() != 2000 {
			t.Errorf("%d are kept", len(s.sessions))
		}

		// Too many.
		for i := range maxSessions + 1 {
			commit(fmt.Sprint("more", i), 2*time.Hour)
		}
		if n := len(s.sessions); n > maxSessions || n < maxSessions/2 || testutil.ToFloat64(evicted) < 2000 {
			t.Errorf("%d are kept, %v were evicted", n, testutil.ToFloat64(evicted))
		}
		want("session0", false)
		want(fmt.Sprint("more", maxSessions), true)
	})
}
