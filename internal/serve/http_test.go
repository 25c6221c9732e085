package serve_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/test/bufconn"

	"github.com/allowednets/allowednets/internal/serve"
)

// serveHTTP serves until the returned function is called, which returns what HTTP returned.
func serveHTTP(t *testing.T, lis net.Listener, handler http.Handler) (stop func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve.HTTP(ctx, lis, handler, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(cancel)
	return func() error {
		cancel()
		return <-ended
	}
}

// answered is an answer of which nothing is left to read.
type answered struct {
	code int
	kind string
	body string
}

func request(t *testing.T, lis *bufconn.Listener, method, path string) answered {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return lis.DialContext(ctx) },
	}}
	req, err := http.NewRequestWithContext(within(t), method, "http://admin"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return answered{resp.StatusCode, resp.Header.Get("Content-Type"), string(body)}
}

func TestAdmin(t *testing.T) {
	registry := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "allowednets_test_total", Help: "A test."})
	registry.MustRegister(counter)
	counter.Add(7)
	var notReady error
	admin := serve.Admin(registry, func() error { return notReady })
	for _, test := range []struct {
		method, path string
		ready        error
		code         int
		body         string
	}{
		{"GET", "/livez", nil, 200, "ok\n"},
		{"GET", "/livez", errors.New("loading"), 200, "ok\n"},
		{"GET", "/readyz", nil, 200, "ok\n"},
		{"GET", "/readyz", errors.New("the store was not loaded yet"), 503, "the store was not loaded yet\n"},
		{"HEAD", "/readyz", errors.New("loading"), 503, ""},
		{"GET", "/metrics", errors.New("loading"), 200, "allowednets_test_total 7\n"},
		{"POST", "/livez", nil, 405, ""},
		{"DELETE", "/metrics", nil, 405, ""},
		{"GET", "/", nil, 404, ""},
		{"GET", "/readyz/", nil, 404, ""},
		{"GET", "/debug/pprof/", nil, 404, ""},
	} {
		t.Run(fmt.Sprint(test.method, test.path, test.ready), func(t *testing.T) {
			notReady = test.ready
			lis := bufconn.Listen(1 << 16)
			stop := serveHTTP(t, lis, admin)
			got := request(t, lis, test.method, test.path)
			if got.code != test.code || !strings.Contains(got.body, test.body) {
				t.Errorf("got %+v", got)
			}
			if test.code == 200 && !strings.HasPrefix(got.kind, "text/plain") {
				t.Errorf("got %+v", got)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestHTTPLimits(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusRequestTimeout)
		}
	})
	// Each client sends something and waits until the server hangs up.
	for name, test := range map[string]struct {
		send   string
		answer string        // the status line; "" for none
		after  time.Duration // it hangs up, or within the second before
	}{
		"silence":              {"", "", 5 * time.Second},
		"slow header":          {"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: ", "", 5 * time.Second},
		"slow body":            {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345", "HTTP/1.1 408 Request Timeout", 10 * time.Second},
		"idle after an answer": {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK", 2 * time.Minute},
		"oversize header": {
			"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("a", 80<<10) + "\r\n\r\n",
			"HTTP/1.1 431 Request Header Fields Too Large", time.Second,
		},
		"many headers": {
			"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X-Many: abcdefgh\r\n", 8<<10) + "\r\n",
			"HTTP/1.1 431 Request Header Fields Too Large", time.Second,
		},
		"no HTTP": {"\x16\x03\x01 hello\r\n\r\n", "HTTP/1.1 400 Bad Request", time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lis := bufconn.Listen(1 << 20)
				stop := serveHTTP(t, lis, handler)
				conn, err := lis.Dial()
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				go func() { _, _ = io.WriteString(conn, test.send) }() // the server need not read all of it
				answer, _ := bufio.NewReader(conn).ReadString('\n')
				if got := strings.TrimSpace(answer); got != test.answer {
					t.Errorf("the server says %q", got)
				}
				_, _ = io.Copy(io.Discard, conn)
				if took := time.Since(begin); took > test.after || took < test.after-time.Second {
					t.Errorf("it hung up after %v", took)
				}
				if err := errors.Join(conn.Close(), stop()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestHTTPStop(t *testing.T) {
	t.Run("a running request ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			lis := bufconn.Listen(1 << 16)
			stop := serveHTTP(t, lis, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				time.Sleep(serve.StopTimeout - time.Second)
				_, _ = io.WriteString(w, "done")
			}))
			stopped := make(chan error)
			go func() {
				time.Sleep(time.Millisecond) // the request is under way
				stopped <- stop()
			}()
			if got := request(t, lis, http.MethodGet, "/"); got.body != "done" {
				t.Errorf("got %+v", got)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("who asks meanwhile is answered, and told that the connection ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			lis := bufconn.Listen(1 << 16)
			stop := serveHTTP(t, lis, http.NotFoundHandler())
			conn, err := lis.Dial()
			if err != nil {
				t.Fatal(err)
			}
			read := bufio.NewReader(conn)
			ask := func() (status string, last bool) {
				if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(read, nil)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				return resp.Status, resp.Body.Close() == nil && resp.Close
			}
			if _, last := ask(); last {
				t.Error("the connection ends before anybody stops")
			}
			stopped := make(chan error)
			go func() { stopped <- stop() }()
			time.Sleep(time.Millisecond)
			if status, last := ask(); status != "404 Not Found" || !last {
				t.Errorf("answered %s, and that the connection ends is %v", status, last)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("an endless one is cut off", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			lis := bufconn.Listen(1 << 16)
			stop := serveHTTP(t, lis, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
			conn, err := lis.Dial()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			begin := time.Now()
			if err := stop(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took != serve.StopTimeout {
				t.Errorf("took %v", took)
			}
		})
	})
	t.Run("a broken listener is an error", func(t *testing.T) {
		lis := broken{bufconn.Listen(1)}
		err := serve.HTTP(t.Context(), lis, http.NotFoundHandler(), slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "the network is gone") || !strings.Contains(err.Error(), lis.Addr().String()) {
			t.Errorf("got %v", err)
		}
	})
}

func TestLogger(t *testing.T) {
	for format, want := range map[string]string{"json": `"msg":"heard","n":1`, "text": "msg=heard n=1"} {
		var b strings.Builder
		log := serve.LogFlags{LogLevel: slog.LevelWarn, LogFormat: format}.Logger(&b)
		log.Info("missed")
		log.Warn("heard", "n", 1)
		if got := b.String(); !strings.Contains(got, want) || strings.Contains(got, "missed") {
			t.Errorf("%s: %s", format, got)
		}
	}
}
