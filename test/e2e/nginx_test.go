package e2e

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/nginx"
	"github.com/allowednets/allowednets/test/stack"
)

// needNginx skips, or fails, where this machine cannot run nginx.
func needNginx(t *testing.T) {
	t.Helper()
	if err := nginx.Missing(); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED against a real nginx: %v", err)
	}
}

// published returns a file of integrations/nginx as people copy it, with what it includes, after changes that README.md
// tells people to make: each pair is a text, which must be there, and its replacement.
func published(t *testing.T, name string, changes ...string) string {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	text := "include " + name + ";"
	for include := regexp.MustCompile(`include +([a-z.-]+\.conf);`); include.MatchString(text); {
		text = include.ReplaceAllStringFunc(text, func(line string) string {
			content, err := os.ReadFile(filepath.Join(root, "integrations", "nginx", include.FindStringSubmatch(line)[1]))
			if err != nil {
				t.Fatal(err)
			}
			// What a comment tells to include is no include.
			return regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(string(content), "")
		})
	}
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(text, changes[i]) {
			t.Fatalf("%s has no %q", name, changes[i])
		}
		text = strings.ReplaceAll(text, changes[i], changes[i+1])
	}
	return text
}

// startNginx starts nginx and waits until it listens at address.
func startNginx(t *testing.T, s *stack.Stack, name, conf, address string) *nginx.Server {
	t.Helper()
	n, err := nginx.Start(within(t, startWithin), s, name, conf, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("nginx's log:\n%s", n.LogTail())
		}
		if err := n.Remove(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func freeAddress(t *testing.T, s *stack.Stack) string {
	t.Helper()
	address, err := s.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// upstream is a stand-in for a web server behind nginx: it records what got through to it.
type upstream struct {
	address string
	mu      sync.Mutex
	seen    []*http.Request
}

func startUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		u.mu.Lock()
		u.seen = append(u.seen, r)
		u.mu.Unlock()
		fmt.Fprintf(w, "%s %s %d", r.Method, r.RequestURI, len(body))
	}))
	t.Cleanup(server.Close)
	u.address = strings.TrimPrefix(server.URL, "http://")
	return u
}

// take returns what got through since the last call.
func (u *upstream) take() []*http.Request {
	u.mu.Lock()
	defer u.mu.Unlock()
	seen := u.seen
	u.seen = nil
	return seen
}

// page is an answer to a browser.
type page struct {
	code   int
	body   string
	header http.Header
}

// raw is a request as it goes over the wire, so that nothing tidies it up.
type raw struct {
	method, path string
	user         string   // of Basic authentication, with the right password; empty: none
	headers      []string // "Name: value"
	body         string
}

// to sends the request to address and reads the answer.
func (r raw) to(t *testing.T, address string) page {
	t.Helper()
	method := r.method
	if method == "" {
		method = http.MethodGet
	}
	var request strings.Builder
	fmt.Fprintf(&request, "%s %s HTTP/1.1\r\nHost: mail.example.org\r\nConnection: close\r\n", method, r.path)
	if r.user != "" {
		fmt.Fprintf(&request, "Authorization: Basic %s\r\n", base64.StdEncoding.EncodeToString([]byte(r.user+":"+right)))
	}
	for _, h := range r.headers {
		request.WriteString(h + "\r\n")
	}
	if r.body != "" {
		fmt.Fprintf(&request, "Content-Length: %d\r\n", len(r.body))
	}
	request.WriteString("\r\n" + r.body)
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.WriteString(conn, request.String()) // the answer may come before the end of it
	}()
	resp, err := readResponse(conn, method)
	if err != nil {
		t.Fatalf("%s %s: %v", method, r.path, err)
	}
	_ = conn.Close()
	<-sent
	return resp
}

// anonymous are the names that nobody can have: nginx asks for another one.
func anonymous() map[string]string {
	return map[string]string{
		"CR LF and headers":         bob + "\r\nX-Allowednets-Client: " + inside,
		"CR LF and a whole request": bob + "\r\nX-Allowednets-Client: " + inside + "\r\nX-Allowednets-Service: webmail\r\n\r\nGET /nginx/auth HTTP/1.1\r\nX:",
		"alice and a header":        alice + "\r\nX-Forwarded-For: " + inside,
		"LF at the end":             alice + "\n",
		"CR LF at the end":          bob + "\r\n",
		"NUL":                       alice + "\x00" + bob,
		"control character":         "bob\x07@example.org",
		"DEL":                       "bob\x7f@example.org",
		"blank":                     "bob @example.org",
		"comma":                     bob + "," + alice,
	}
}

// TestNginxAuthRequest runs nginx with the configuration that people copy in front of a webmail and a DAV server.
func TestNginxAuthRequest(t *testing.T) {
	needNginx(t)
	w := newWorld(t, settings{noDovecot: true})
	up := startUpstream(t)
	// Two ways to learn who the client is behind the balancer 127.0.0.1: the sidecar (--trusted-proxies) or nginx (realip.conf).
	untrusting, err := w.StartSidecar(stack.SidecarConfig{Name: "untrusting", Policy: w.policy.Address})
	if err != nil {
		t.Fatal(err)
	}
	if err := untrusting.AwaitReady(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	start := func(name string, sidecar *stack.Sidecar, more string) (string, *nginx.Server) {
		address := freeAddress(t, w.Stack)
		conf := "http {\naccess_log /dev/stderr;\n" + published(t, "allowednets-http.conf", "/var/log/nginx/error.log", "stderr") + more + published(t, "webmail.conf",
			"listen       80;", "listen "+address+";\nlocation ~ \\.php$ { proxy_pass http://"+up.address+"; }",
			"127.0.0.1:7480", sidecar.HTTP, "127.0.0.1:8000", up.address) + "}\n"
		return address, startNginx(t, w.Stack, name, conf, address)
	}
	byNginx, realNginx := start("nginx-realip", untrusting, published(t, "realip.conf", "192.0.2.10", "127.0.0.1/32"))
	bySidecar, sidecarNginx := start("nginx", w.sidecar, "")
	nobody, _ := start("nginx-alone", untrusting, "")
	xff := func(address string) string { return "X-Forwarded-For: " + address }

	for way, address := range map[string]string{"realip.conf": byNginx, "trusted-proxies": bySidecar} {
		t.Run(way, func(t *testing.T) {
			for _, c := range []struct {
				name    string
				request raw
				code    int
				text    string // of a refusal
			}{
				{"inside", raw{path: "/webmail/", user: alice, headers: []string{xff(inside)}}, 200, ""},
				{"inside, IPv6", raw{path: "/webmail/", user: alice, headers: []string{xff(inside6)}}, 200, ""},
				{"inside, upper case", raw{path: "/webmail/", user: "ALICE@Example.org", headers: []string{xff(inside)}}, 200, ""},
				{"outside", raw{path: "/webmail/", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"outside, IPv6", raw{path: "/webmail/", user: alice, headers: []string{xff(outside6)}}, 403, notAllowed(outside6)},
				{"outside, upper case", raw{path: "/webmail/", user: "ALICE@EXAMPLE.ORG.", headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"outside, unrestricted", raw{path: "/webmail/", user: bob, headers: []string{xff(outside)}}, 200, ""},
				{"no balancer", raw{path: "/webmail/", user: alice}, 403, notAllowed("127.0.0.1")},
				{"no mailbox name", raw{path: "/webmail/", user: "alice", headers: []string{xff(inside)}}, 403, "Access to this mailbox is not allowed."},
				{"a master user", raw{path: "/webmail/", user: alice + "*admin", headers: []string{xff(inside)}}, 403, "Access to this mailbox is not allowed."},
				{"nobody yet", raw{path: "/webmail/", headers: []string{xff(inside)}}, 401, ""},
				{"another scheme", raw{path: "/webmail/", headers: []string{xff(inside), "Authorization: Bearer x"}}, 401, ""},
				{"not base64", raw{path: "/webmail/", headers: []string{xff(inside), "Authorization: Basic @@@"}}, 401, ""},

				{"spoofed", raw{path: "/webmail/", user: alice, headers: []string{xff(inside + ", " + outside)}}, 403, notAllowed(outside)},
				{"spoofed, in a line before", raw{path: "/webmail/", user: alice, headers: []string{xff(inside), xff(outside)}}, 403, notAllowed(outside)},
				{"spoofed, as a balancer", raw{path: "/webmail/", user: alice, headers: []string{xff(inside + ", 127.0.0.1, " + outside)}}, 403, notAllowed(outside)},
				{"two balancers", raw{path: "/webmail/", user: alice, headers: []string{xff(inside + ", 127.0.0.1")}}, 200, ""},
				{"spoofed in other headers", raw{path: "/webmail/", user: alice, headers: []string{
					xff(outside), "X-Real-IP: " + inside, "Forwarded: for=" + inside, "X-Allowednets-Client: " + inside, "X-Allowednets-Mailbox: " + bob,
					"X-Allowednets-Service: caldav",
				}}, 403, notAllowed(outside)},
				{"a POST", raw{method: "POST", path: "/webmail/", user: alice, headers: []string{xff(inside)}, body: strings.Repeat("x", 100_000)}, 200, ""},
				{"a POST from outside", raw{method: "POST", path: "/webmail/", user: alice, headers: []string{xff(outside)}, body: strings.Repeat("x", 100_000)}, 403, notAllowed(outside)},
				{"HEAD", raw{method: "HEAD", path: "/webmail/", user: alice, headers: []string{xff(inside)}}, 200, ""},
				{"HEAD from outside", raw{method: "HEAD", path: "/webmail/", user: alice, headers: []string{xff(outside)}}, 403, ""},
				{"a method of DAV", raw{method: "PROPFIND", path: "/webmail/", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"the question itself", raw{path: "/allowednets-check", user: alice, headers: []string{xff(inside)}}, 404, "-"},

				{"DAV inside", raw{path: "/dav/x", user: alice, headers: []string{xff(inside)}}, 200, ""},
				{"DAV outside", raw{path: "/dav/x", user: alice, headers: []string{xff(outside)}}, 200, ""},
				{"DAV, nobody yet", raw{method: "PROPFIND", path: "/dav/", headers: []string{xff(outside)}}, 200, ""},
				{"DAV, no mailbox name", raw{path: "/dav/x", user: "alice", headers: []string{xff(outside)}}, 200, ""},
				{"webmail through DAV", raw{path: "/dav/../webmail/", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"webmail through DAV, encoded", raw{path: "/dav/%2e%2e%2fwebmail/", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"webmail through a regex", raw{path: "/webmail/index.php", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
				{"webmail, encoded", raw{path: "/%77ebmail//x", user: alice, headers: []string{xff(outside)}}, 403, notAllowed(outside)},
			} {
				up.take()
				got := c.request.to(t, address)
				want := c.text + "\n"
				if got.code != c.code || c.code == 403 && c.request.method != "HEAD" && got.body != want || (len(up.take()) == 1) != (c.code == 200) {
					t.Errorf("%s: %d %q", c.name, got.code, got.body)
				}
				if c.request.body != "" && c.code == 200 && !strings.HasSuffix(got.body, " 100000") {
					t.Errorf("%s: the body got lost: %s", c.name, got.body)
				}
				if challenge := got.header.Get("WWW-Authenticate"); (challenge != "") != (c.code == 401) {
					t.Errorf("%s: WWW-Authenticate %q", c.name, challenge)
				}
			}
			for name, user := range anonymous() {
				for _, from := range []string{inside, outside} {
					got := raw{path: "/webmail/", user: user, headers: []string{xff(from)}}.to(t, address)
					if seen := up.take(); got.code != 401 || len(seen) != 0 {
						t.Errorf("%s from %s: %d, %d requests got through", name, from, got.code, len(seen))
					}
				}
			}
			for _, length := range []int{3000, 10_000} { // nginx takes 8 kB for a header
				got := raw{path: "/webmail/", user: strings.Repeat("x", length) + "@example.org", headers: []string{xff(inside)}}.to(t, address)
				if seen := up.take(); got.code < 400 || len(seen) != 0 || len(got.body) > 1000 {
					t.Errorf("%d octets: %d %q", length, got.code, got.body)
				}
			}
		})
	}
	t.Run("odd paths to DAV", func(t *testing.T) {
		for _, path := range []string{
			"/dav/%252e%252e/webmail/", "/dav/..%5cwebmail/", `/dav/..\webmail/`, "/dav/..;/webmail/", "/webmail/../dav/", "/dav/x/%2E./y", "/dav/x/..", "/dav/x/..?y",
		} {
			if got := (raw{path: path, user: alice, headers: []string{xff(outside)}}).to(t, bySidecar); got.code != 400 || len(up.take()) != 0 {
				t.Errorf("%s: %d", path, got.code)
			}
		}
		v := raw{path: "/dav/a..b/%C3%BC.ics?x=..%25;", user: alice, headers: []string{xff(outside), "X-Original-URL: /webmail/", "X-Rewrite-URL: /webmail/"}}
		got, seen := v.to(t, bySidecar), up.take()
		if got.code != 200 || len(seen) != 1 || seen[0].RequestURI != v.path || seen[0].Header.Get("X-Original-Url")+seen[0].Header.Get("X-Rewrite-Url") != "" {
			t.Errorf("%d %v", got.code, seen)
		}
	})
	t.Run("the session of somebody else", func(t *testing.T) {
		v := raw{path: "/webmail/", user: bob, headers: []string{xff(outside), "Cookie: session=alice"}}
		if got, seen := v.to(t, bySidecar), up.take(); got.code != 200 || len(seen) != 1 || seen[0].Header.Get("Cookie") != "" {
			t.Errorf("%d %v", got.code, seen)
		}
	})
	// Why allowednets-gate.conf forbids it. If this fails, nginx has changed its order, and the warning may go.
	t.Run("trap: auth_basic answers first", func(t *testing.T) {
		dir, err := os.MkdirTemp("", "basic-") // nginx's workers must get in
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		file := filepath.Join(dir, "htpasswd")
		for _, err := range []error{os.Chmod(dir, 0o755), os.WriteFile(file, []byte(alice+":{PLAIN}"+right+"\n"), 0o600), os.Chmod(file, 0o644)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		address := freeAddress(t, w.Stack)
		startNginx(t, w.Stack, "nginx-basic", "http {\naccess_log /dev/stderr;\n"+published(t, "allowednets-http.conf", "/var/log/nginx/error.log", "stderr")+
			"server {\nlisten "+address+";\n"+published(t, "allowednets-server.conf", "127.0.0.1:7480", w.sidecar.HTTP)+
			"location / {\nauth_basic Mail;\nauth_basic_user_file "+file+";\n"+published(t, "allowednets-gate.conf")+"proxy_pass http://"+up.address+";\n}\n}\n}\n", address)
		for password, want := range map[string]int{right: 403, wrong: 401} {
			v := raw{path: "/", headers: []string{xff(outside), "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(alice+":"+password))}}
			if got := v.to(t, address); got.code != want || len(up.take()) != 0 {
				t.Errorf("%s: %d, want %d", password, got.code, want)
			}
		}
	})
	t.Run("nobody is trusted by default", func(t *testing.T) {
		if got := (raw{path: "/webmail/", user: alice, headers: []string{xff(inside)}}).to(t, nobody); got.code != 403 || got.body != notAllowed("127.0.0.1")+"\n" {
			t.Errorf("%d %q", got.code, got.body)
		}
	})
	t.Run("the sidecar's states", func(t *testing.T) {
		up.take()
		sidecarStates(t, w, func(state string, answers bool) {
			for _, c := range []struct {
				request raw
				code    int
			}{
				{raw{path: "/webmail/", user: alice, headers: []string{xff(inside)}}, 200},
				{raw{path: "/webmail/", user: alice, headers: []string{xff(outside)}}, 403},
				{raw{path: "/webmail/", user: bob, headers: []string{xff(outside)}}, 200},
				{raw{path: "/dav/x", user: alice, headers: []string{xff(outside)}}, 200},
				{raw{path: "/dav/x", headers: []string{xff(outside)}}, 200},
			} {
				code, text := c.code, ""
				if !answers && strings.HasPrefix(c.request.path, "/webmail/") {
					code, text = 503, noAnswerText+"\n"
				}
				began := time.Now()
				got := c.request.to(t, bySidecar)
				if got.code != code || text != "" && got.body != text || (len(up.take()) == 1) != (code == 200) {
					t.Errorf("%s, %s for %s: %d %q", state, c.request.path, c.request.user, got.code, got.body)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("%s, %s: took %v", state, c.request.path, took)
				}
			}
		})
	})
	t.Run("a sidecar without data", func(t *testing.T) {
		never, err := w.StartSidecar(stack.SidecarConfig{Name: "never", Policy: freeAddress(t, w.Stack)})
		if err != nil {
			t.Fatal(err)
		}
		awaitListens(t, never.HTTP)
		address, _ := start("nginx-never", never, "")
		if got := (raw{path: "/webmail/", user: bob}).to(t, address); got.code != 403 || got.body != noAnswerText+"\n" {
			t.Errorf("%d %q", got.code, got.body)
		}
		if got := (raw{path: "/dav/", user: bob}).to(t, address); got.code != 200 {
			t.Errorf("DAV: %d %q", got.code, got.body)
		}
	})
	t.Run("two names", func(t *testing.T) {
		up.take()
		v := raw{path: "/webmail/", user: bob, headers: []string{
			"Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(alice+":"+right)), xff(outside),
		}}
		if got := v.to(t, bySidecar); got.code != 400 || len(up.take()) != 0 {
			t.Errorf("%d", got.code)
		}
	})
	t.Run("nothing of the client's goes to the sidecar", func(t *testing.T) {
		standIn := startUpstream(t)
		address, _ := start("nginx-recorded", &stack.Sidecar{HTTP: standIn.address}, "")
		raw{method: "POST", path: "/webmail/", user: alice, body: "secret", headers: []string{
			"Cookie: session=1", "X-Api-Key: 2", "X-Allowednets-Service: caldav", xff(inside), xff(outside),
		}}.to(t, address)
		seen := standIn.take()
		if len(seen) != 1 {
			t.Fatalf("%d questions", len(seen))
		}
		names := slices.Sorted(maps.Keys(seen[0].Header))
		want := []string{"Connection", "X-Allowednets-Client", "X-Allowednets-Mailbox", "X-Allowednets-Service", "X-Forwarded-For"}
		if !slices.Equal(names, want) || seen[0].ContentLength != 0 || seen[0].RequestURI != "/nginx/auth" || seen[0].Header.Get("X-Forwarded-For") != inside+", "+outside {
			t.Errorf("%s %s %v", seen[0].Method, seen[0].RequestURI, seen[0].Header)
		}
	})
	t.Run("logs", func(t *testing.T) {
		checkLogs(t, map[string]interface{ Log() (string, error) }{"nginx": sidecarNginx, "nginx with realip": realNginx, "sidecar": w.sidecar})
	})
}

// sidecarStates calls probe while the sidecar answers, is down, was restarted, is frozen, and goes on.
func sidecarStates(t *testing.T, w *world, probe func(state string, answers bool)) {
	t.Helper()
	probe("running", true)
	if err := w.sidecar.Kill(); err != nil {
		t.Fatal(err)
	}
	probe("killed", false)
	if err := w.sidecar.Restart(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	probe("restarted", true)
	if err := w.sidecar.Freeze(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	probe("frozen", false)
	if err := w.sidecar.Thaw(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	probe("thawed", true)
}

// checkLogs fails if a log has a password, or a line that somebody forged.
func checkLogs(t *testing.T, logs map[string]interface{ Log() (string, error) }) {
	t.Helper()
	encoded := base64.StdEncoding.EncodeToString([]byte(alice + ":" + right))
	for name, from := range logs {
		log, err := from.Log()
		if err != nil {
			t.Fatal(err)
		}
		if log == "" {
			t.Errorf("%s logged nothing", name)
		}
		for _, secret := range []string{right, wrong, oddPassword, encoded} {
			if strings.Contains(log, secret) {
				t.Errorf("%s logged a password", name)
			}
		}
		for line := range strings.Lines(log) {
			if strings.HasPrefix(line, "X-") || strings.HasPrefix(line, "GET ") || strings.HasPrefix(line, "Auth-") || strings.Contains(line, "\r") || strings.HasPrefix(line, "* ") {
				t.Errorf("%s: a forged line: %q", name, line)
			}
		}
	}
}

// awaitListens waits until somebody listens at address.
func awaitListens(t *testing.T, address string) {
	t.Helper()
	err := stack.Await(within(t, startWithin), func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// readResponse reads one answer.
func readResponse(conn net.Conn, method string) (page, error) {
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return page{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return page{resp.StatusCode, string(body), resp.Header}, err
}

// oddPassword has what a protocol could stumble over.
const oddPassword = `p%41 "a\ß&+@`
