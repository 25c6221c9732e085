package roundcube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/test/stack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needRoundcube is the one place where a test is skipped.
func needRoundcube(t *testing.T) {
	t.Helper()
	if err := Missing(); err != nil {
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED with PHP and Roundcube: %v", err)
	}
}

func integration(t *testing.T) string {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "integrations", "roundcube")
}

// php runs a script to its end.
func php(t *testing.T, env []string, args ...string) (output string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "php", args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

const (
	allowed = `{"decision":{"verdict":"VERDICT_ALLOW","reason":"REASON_MATCHED","matchedNet":"192.0.2.0/24","revision":"1-1"},"dataAge":"1.5s"}`
	denied  = `{"decision":{"verdict":"VERDICT_DENY","reason":"REASON_NOT_IN_ALLOWED_NETS","revision":"1-1"},"dataAge":"1.5s"}`
)

// says is a server that always answers the same.
func says(status int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func saysJSON(body string) http.HandlerFunc { return says(http.StatusOK, "application/json", body) }

// decides answers with a decision.
func decides(verdict, reason string) http.HandlerFunc {
	return saysJSON(fmt.Sprintf(`{"decision":{"verdict":%q,"reason":%q,"revision":"1-1"}}`, verdict, reason))
}

// writes answers with octets that are HTTP only if they say so, and then keeps the connection until the client has gone.
func writes(text string, end bool) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, text)
		if !end {
			_, _ = io.Copy(io.Discard, conn)
		}
	}
}

// drips answers one octet at a time.
func drips(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for i := range text {
			_, _ = io.WriteString(w, text[i:i+1])
			if http.NewResponseController(w).Flush() != nil {
				return
			}
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
		}
	}
}

// TestSidecar asks servers of every kind. Only what says yes in so many words is a yes, and nothing takes long.
func TestSidecar(t *testing.T) {
	needRoundcube(t)
	var redirected atomic.Int64
	yes := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		redirected.Add(1)
		saysJSON(allowed)(w, r)
	}))
	defer yes.Close()
	var asked atomic.Int64
	for _, c := range []struct {
		name   string
		server http.HandlerFunc
		want   string
	}{
		{"allowed", saysJSON(allowed), "Allow"},
		{"allowed, without a list", decides("VERDICT_ALLOW", "REASON_UNRESTRICTED"), "Allow"},
		{"allowed, spelt otherwise", says(http.StatusOK, "Application/JSON; charset=utf-8", " "+strings.ReplaceAll(allowed, ":", " : ")+"\n"), "Allow"},
		{"denied", saysJSON(denied), "Deny"},
		{"denied, no address", decides("VERDICT_DENY", "REASON_CLIENT_ADDRESS_UNKNOWN"), "Deny"},
		{"denied, private address", decides("VERDICT_DENY", "REASON_CLIENT_ADDRESS_NOT_PUBLIC"), "Deny"},
		{"stale", decides("VERDICT_DENY", "REASON_STALE"), "None"},
		{"no mailbox", says(http.StatusBadRequest, "application/json", `{"code":3,"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"MAILBOX_INVALID","domain":"allowednets"}]}`), "NoMailbox"},
		{"no address that can be one", says(http.StatusBadRequest, "application/json", `{"code":3,"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CLIENT_ADDRESS_INVALID","domain":"allowednets"}]}`), "None"},
		{"an error without details", says(http.StatusBadRequest, "application/json", `{"code":3}`), "None"},
		{"an error with odd details", says(http.StatusBadRequest, "application/json", `{"details":["MAILBOX_INVALID",{"reason":"MAILBOX_INVALID"}]}`), "None"},

		{"not synced, then synced", func(w http.ResponseWriter, r *http.Request) {
			if asked.Add(1) < 3 {
				says(http.StatusServiceUnavailable, "application/json", `{"code":14}`)(w, r)
				return
			}
			saysJSON(allowed)(w, r)
		}, "Allow"},
		{"not synced", says(http.StatusServiceUnavailable, "application/json", `{"code":14}`), "None"},

		{"201 with a yes", says(http.StatusCreated, "application/json", allowed), "None"},
		{"204", says(http.StatusNoContent, "application/json", ""), "None"},
		{"206 with a yes", says(http.StatusPartialContent, "application/json", allowed), "None"},
		{"302 to a yes", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			http.Redirect(w, r, yes.URL, http.StatusTemporaryRedirect)
		}, "None"},
		{"401", says(http.StatusUnauthorized, "application/json", allowed), "None"},
		{"403", says(http.StatusForbidden, "application/json", allowed), "None"},
		{"404", says(http.StatusNotFound, "text/plain", "not found"), "None"},
		{"500 with a yes", says(http.StatusInternalServerError, "application/json", allowed), "None"},

		{"HTML", says(http.StatusOK, "text/html", allowed), "None"},
		{"JSON sequence", says(http.StatusOK, "application/json-seq", allowed), "None"},
		{"no type", func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = nil
			_, _ = io.WriteString(w, allowed)
		}, "None"},
		{"compressed", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			saysJSON("\x1f\x8b\x08")(w, r)
		}, "None"},
		{"nothing", saysJSON(""), "None"},
		{"two yeses", saysJSON(allowed + allowed), "None"},
		{"a yes and more", saysJSON(allowed + "x"), "None"},
		{"half a yes", saysJSON(allowed[:40]), "None"},
		{"a byte order mark", saysJSON("\ufeff" + allowed), "None"},
		{"not UTF-8", saysJSON(strings.Replace(allowed, "1-1", "\xff", 1)), "None"},
		{"null", saysJSON("null"), "None"},
		{"true", saysJSON("true"), "None"},
		{"a number", saysJSON("1"), "None"},
		{"a string", saysJSON(`"VERDICT_ALLOW"`), "None"},
		{"a list", saysJSON("[" + allowed + "]"), "None"},
		{"nothing decided", saysJSON("{}"), "None"},
		{"a decision that is a string", saysJSON(`{"decision":"VERDICT_ALLOW"}`), "None"},
		{"a decision that is a list", saysJSON(`{"decision":["VERDICT_ALLOW","REASON_MATCHED","1-1"]}`), "None"},
		{"a decision outside", saysJSON(`{"verdict":"VERDICT_ALLOW","reason":"REASON_MATCHED","revision":"1-1"}`), "None"},
		{"a verdict that is a number", saysJSON(`{"decision":{"verdict":1,"reason":1,"revision":"1-1"}}`), "None"},
		{"a verdict that is true", saysJSON(`{"decision":{"verdict":true,"reason":true,"revision":"1-1"}}`), "None"},
		{"a verdict that is a list", saysJSON(`{"decision":{"verdict":["VERDICT_ALLOW"],"reason":"REASON_MATCHED","revision":"1-1"}}`), "None"},
		{"no reason", saysJSON(`{"decision":{"verdict":"VERDICT_ALLOW","revision":"1-1"}}`), "None"},
		{"no revision", saysJSON(`{"decision":{"verdict":"VERDICT_ALLOW","reason":"REASON_MATCHED"}}`), "None"},
		{"unspecified", decides("VERDICT_UNSPECIFIED", "REASON_MATCHED"), "None"},
		{"another verdict", decides("VERDICT_ALLOWED", "REASON_MATCHED"), "None"},
		{"lower case", decides("verdict_allow", "REASON_MATCHED"), "None"},
		{"a yes for a reason to deny", decides("VERDICT_ALLOW", "REASON_NOT_IN_ALLOWED_NETS"), "None"},
		{"a yes for another service", decides("VERDICT_ALLOW", "REASON_SERVICE_EXEMPT"), "None"},
		{"deep", saysJSON(strings.Repeat(`{"a":`, 100) + allowed + strings.Repeat("}", 100)), "None"},
		{"too much", saysJSON(allowed + strings.Repeat(" ", 1<<20)), "None"},

		{"silent", writes("", false), "None"},
		{"gone", writes("", true), "None"},
		{"not HTTP", writes("+OK ready\r\n"+allowed, true), "None"},
		{"HTTP/0.9", writes(allowed, true), "None"},
		{"only a head", writes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n", false), "None"},
		{"cut short", writes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n"+allowed, true), "None"},
		{"a chunk too few", writes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", true), "None"},
		{"endless head", writes("HTTP/1.1 200 OK\r\n"+strings.Repeat("X: y\r\n", 1<<16), false), "None"},
		{"slow", drips(allowed), "None"},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := httptest.NewServer(c.server)
			defer server.Close()
			defer server.CloseClientConnections()
			ask(t, c.want, nil, server.URL, "", "alice@example.org", "192.0.2.77")
		})
	}
	if redirected.Load() != 0 {
		t.Error("a redirection was followed")
	}
	t.Run("an environment with a proxy", func(t *testing.T) {
		var env []string
		for _, name := range []string{"http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"} {
			env = append(env, name+"="+yes.URL)
		}
		ask(t, "None", env, closedPort(t), "", "alice@example.org", "192.0.2.77")
	})
	for name, where := range map[string]string{
		"empty": "", "elsewhere": "http://192.0.2.1:7480", "a name": "http://localhost:7480", "TLS": "https://127.0.0.1:7480", "a file": "file:///etc/hostname",
		"a path": yes.URL + "/x", "credentials": "http://127.0.0.1:1@192.0.2.1:80", "no such socket": "unix:/nonexistent", "a closed port": closedPort(t),
	} {
		t.Run("configured with "+name, func(t *testing.T) { ask(t, "None", nil, where, "", "alice@example.org", "192.0.2.77") })
	}
	for name, typed := range map[string]string{"long": strings.Repeat("a", 1025), "not UTF-8": "\xff@example.org"} {
		t.Run("a name that is "+name, func(t *testing.T) { ask(t, "NoMailbox", nil, yes.URL, "", typed, "192.0.2.77") })
	}
}

// ask asks as the plugin does, and bounds how long that takes.
func ask(t *testing.T, want string, env []string, args ...string) {
	t.Helper()
	begun := time.Now()
	got, err := php(t, env, append([]string{filepath.Join(integration(t), "tests", "ask.php")}, args...)...)
	took := time.Since(begun)
	answer, why, _ := strings.Cut(got, ": ")
	if err != nil || answer != want || (why != "") != (want == "None") {
		t.Errorf("%q, %v; want %s", got, err, want)
	}
	if took > 2*time.Second { // 500 ms and the start of PHP on a busy machine
		t.Errorf("it took %v", took)
	}
	if strings.Contains(why, "alice") || strings.Contains(why, "192.0.2.77") {
		t.Errorf("the log would say who: %s", why)
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := lis.Close(); err != nil {
		t.Fatal(err)
	}
	return "http://" + lis.Addr().String()
}

// TestQuestion holds the request against the API.
func TestQuestion(t *testing.T) {
	needRoundcube(t)
	requests := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests <- fmt.Sprintf("%s %s, %s, %q: %s", r.Method, r.URL, r.Header.Get("Content-Type"), r.Header.Get("Authorization"), body)
		saysJSON(allowed)(w, r)
	}))
	defer server.Close()
	for _, c := range []struct{ token, name, address, want string }{
		{"", "alice@example.org", "192.0.2.77", `"": {"mailbox":"alice@example.org","clientAddress":"192.0.2.77","service":"SERVICE_WEBMAIL"}`},
		{"a-token", "Jürgen\"@Bücher.example", "", `"Bearer a-token": {"mailbox":"Jürgen\"@Bücher.example","clientAddress":"","service":"SERVICE_WEBMAIL"}`},
	} {
		ask(t, "Allow", nil, server.URL, c.token, c.name, c.address)
		if diff := cmp.Diff("POST /v1/check, application/json, "+c.want, <-requests); diff != "" {
			t.Error(diff)
		}
	}
}

// TestRestart: a sidecar that is back within the time was never away.
func TestRestart(t *testing.T) {
	needRoundcube(t)
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var refused atomic.Int64
	server := &httptest.Server{Listener: lis, Config: &http.Server{Handler: saysJSON(allowed), ReadHeaderTimeout: time.Minute, ConnState: func(c net.Conn, state http.ConnState) {
		if state == http.StateNew && refused.Add(1) <= 4 {
			_ = c.Close()
		}
	}}}
	server.Start()
	defer server.Close()
	ask(t, "Allow", nil, server.URL, "", "alice@example.org", "192.0.2.77")
	if n := refused.Load(); n != 5 {
		t.Errorf("%d connections", n)
	}
}

// TestHooks runs the plugin's own tests inside Roundcube.
func TestHooks(t *testing.T) {
	needRoundcube(t)
	server := httptest.NewServer(saysJSON(denied))
	defer server.Close()
	dir, err := os.MkdirTemp("", "roundcube-")
	if err != nil {
		t.Fatal(err)
	}
	r := &Server{dir: dir}
	defer func() {
		if err := r.Remove(); err != nil {
			t.Error(err)
		}
	}()
	config, configErr := "", r.install(integration(t))
	if configErr == nil {
		config, configErr = r.configure(Site{Name: "hooks", IMAP: "127.0.0.1:1", Sidecar: server.URL})
	}
	if configErr != nil {
		t.Fatal(configErr)
	}
	out, err := php(t, []string{"ROUNDCUBE_CONFIG_DIR=" + config}, filepath.Join(integration(t), "tests", "hooks.php"), dir)
	if err != nil || !strings.HasSuffix(out, "\nok\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestFiles holds the plugin's files against what Roundcube and Composer want of them.
func TestFiles(t *testing.T) {
	needRoundcube(t)
	plugin := filepath.Join(integration(t), "allowednets")
	var files []string
	for _, pattern := range []string{"*.php", "*.dist", "localization/*.inc", "../tests/*.php"} {
		found, err := filepath.Glob(filepath.Join(plugin, pattern))
		if err != nil || len(found) == 0 {
			t.Errorf("%s: nothing, %v", pattern, err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		if out, err := php(t, nil, "-d", "error_reporting=-1", "-l", file); err != nil || !strings.HasPrefix(out, "No syntax errors") {
			t.Errorf("%v: %s", err, out)
		}
	}
	texts := func(language string) map[string]string {
		out, err := php(t, nil, "-r", "include $argv[1]; echo json_encode($messages);", filepath.Join(plugin, "localization", language+".inc"))
		if err != nil {
			t.Fatal(err, out)
		}
		var messages map[string]string
		if err := json.Unmarshal([]byte(out), &messages); err != nil {
			t.Fatal(err)
		}
		for name, text := range messages { // what is replaced, in place of the text
			messages[name] = strings.Join(regexp.MustCompile(`\$\w+`).FindAllString(text, -1), " ")
		}
		return messages
	}
	if diff := cmp.Diff(texts("en_US"), texts("de_DE")); diff != "" {
		t.Errorf("the languages differ: %s", diff)
	}
	var composer struct {
		Name, Type, License string
		Require             map[string]string
	}
	text, err := os.ReadFile(filepath.Join(plugin, "composer.json"))
	if err = errors.Join(err, json.Unmarshal(text, &composer)); err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^[a-z0-9]+/allowednets$`).MatchString(composer.Name) || composer.Type != "roundcube-plugin" || composer.License == "" ||
		composer.Require["php"] == "" || composer.Require["ext-curl"] == "" || composer.Require["roundcube/plugin-installer"] == "" {
		t.Errorf("composer.json: %+v", composer)
	}
}
