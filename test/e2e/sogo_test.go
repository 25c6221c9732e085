package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSOGo runs the real nginx with the recipe that people copy in front of a stand-in for SOGo.
func TestSOGo(t *testing.T) {
	needNginx(t)
	w := newWorld(t, settings{noDovecot: true})
	up := startUpstream(t)
	dir, err := os.MkdirTemp("", "sogo-") // nginx's workers must get in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	passwords := filepath.Join(dir, "htpasswd")
	for _, err := range []error{
		os.Chmod(dir, 0o755), os.WriteFile(passwords, []byte(alice+":{PLAIN}"+right+"\n"+bob+":{PLAIN}"+right+"\n"), 0o600), os.Chmod(passwords, 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	address := freeAddress(t, w.Stack)
	conf := "http {\naccess_log /dev/stderr;\n" + published(t, "allowednets-http.conf", "/var/log/nginx/error.log", "stderr") + published(t, "sogo.conf",
		"listen       80;", "listen "+address+";", "127.0.0.1:7480", w.sidecar.HTTP, "127.0.0.1:20000", up.address,
		"/etc/nginx/sogo.htpasswd", passwords, "unix:/run/nginx-sogo.sock", "unix:"+filepath.Join(dir, "s")) + "}\n"
	server := startNginx(t, w.Stack, "nginx-sogo", conf, address)
	xff := func(address string) string { return "X-Forwarded-For: " + address }

	exempt := []raw{
		{path: "/SOGo/dav/alice@example.org/Calendar"},
		{path: "/SOGo/dav/alice@example.org/Calendar/"},
		{path: "/SOGo/dav/alice%40example.org/Calendar/personal/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/personal/5E-6A%20x.ics"},
		{path: "/SOGo/dav/alice@example.org/Calendar/personal/.hidden.ics"},
		{path: "/SOGo/dav/bob@example.org/Calendar/shared/?sync=1"},
		{path: "/SOGo/dav/alice@example.org/Contacts/personal/J%C3%BCrgen.vcf"},
		{path: "/SOGo/dav/alice@example.org/Contacts/personal/j%c3%bcrgen.vcf"},
		{method: "PUT", path: "/SOGo/dav/alice@example.org/Calendar/personal/new.ics", body: "BEGIN:VCALENDAR"},
		{method: "REPORT", path: "/SOGo/dav/alice@example.org/Calendar/personal/", body: "<x/>", headers: []string{"Depth: 1"}},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/Calendar/", headers: []string{"Depth: infinity"}},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/", headers: []string{"Depth: 0"}},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org", headers: []string{"Depth: 1"}},
		{method: "PROPFIND", path: "/SOGo/dav/", headers: []string{"Depth: 0"}},
		{method: "OPTIONS", path: "/SOGo/dav/alice@example.org/"},
	}
	restricted := []raw{
		{path: "/SOGo/"},
		{path: "/SOGo/so/alice@example.org/Mail/view"},
		{path: "/SOGo/so/alice@example.org/Calendar/view"}, // the web interface
		{method: "POST", path: "/SOGo/so/alice@example.org/Mail/0/folderINBOX/view", body: "{}"},
		{path: "/SOGo/dav/alice@example.org/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Mail/0/folderINBOX/"},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/Mail/", headers: []string{"Depth: 1"}},
		{method: "REPORT", path: "/SOGo/dav/alice@example.org/Mail/", body: "<mail-query/>"},
		{path: "/SOGo/Microsoft-Server-ActiveSync"},
		{method: "POST", path: "/Microsoft-Server-ActiveSync?Cmd=Sync&User=bob", body: "x"},
		{path: "/SOGo/dav/alice@example.org/"},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/"},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/", headers: []string{"Depth: infinity"}},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/", headers: []string{"Depth: infinity", "Depth: 0"}},
		{method: "PROPFIND", path: "/SOGo/dav/alice@example.org/Mail", headers: []string{"Depth: 0 /SOGo/dav/alice@example.org/Calendar"}},

		{path: "//SOGo//dav//alice@example.org//Mail/"},
		{path: "/SOGo/dav/alice@example.org/%4dail/"},
		{path: "/SOGo/dav/alice@example.org/%4Dail/"},
		{path: "/SOGo/dav/alice@example.org/mail/"},
		{path: "/SOGo/dav/alice@example.org/calendar/"},
		{path: "/SOGo/dav/alice@example.org/./Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/../Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/%2e%2e/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/%2E./Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/.%2e/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar%2f..%2fMail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar%2F%2E%2E%2FMail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/%252e%252e/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/..%252fMail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/x/..%2f..%2fMail/"},
		{path: `/SOGo/dav/alice@example.org/Calendar/..\Mail/`},
		{path: "/SOGo/dav/alice@example.org/Calendar/..%5cMail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/..;/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar//../Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/.."},
		{path: "/SOGo/dav/../dav/alice@example.org/Mail/"},
		{path: "/SOGo/dav/bob@example.org/Calendar/../../alice@example.org/Mail/"},
		{path: "/SOGo/dav/%2e%2e/Calendar/"},
		{path: "/SOGo/dav/alice%2fMail/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/Mail/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/Mail%3f/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/Mail?/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/Mail#/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/Calendar#/../Mail/"},
		{path: "/SOGo/dav//Calendar/"},
		{path: "/SOGo/dav/Calendar/"},
		{path: "/SOGo/dav/alice@example.org/CalendarMail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar\x7f/"},
		{path: "/%53OGo/dav/alice@example.org/Mail/"},
		{path: "/SOGo/%64av/alice@example.org/Calendar/"},
		{path: "http://sogo.example.org/SOGo/dav/alice@example.org/Calendar/../Mail/"},
		{path: "/x/../SOGo/dav/alice@example.org/Mail/"},
	}
	as := func(v raw, user, from string) raw {
		v.user, v.headers = user, append([]string{xff(from), "x-webobjects-remote-user: " + bob, "X-WebObjects-Remote-User: root", "x-webobjects-auth-type: none"}, v.headers...)
		return v
	}
	// got is the one request that reached SOGo, which must say who it is from, once.
	got := func(t *testing.T, v raw, user string) *http.Request {
		t.Helper()
		seen := up.take()
		if len(seen) == 0 {
			return nil
		}
		r := seen[0]
		if names := r.Header["X-Webobjects-Remote-User"]; len(seen) != 1 || len(names) != 1 || names[0] != user || r.Header.Get("X-Webobjects-Auth-Type") != "Basic" {
			t.Errorf("%s %s: SOGo believes it is %q", v.method, v.path, names)
		}
		return r
	}
	t.Run("exempt", func(t *testing.T) {
		for _, v := range exempt {
			answer := as(v, alice, outside).to(t, address)
			if r := got(t, v, alice); answer.code != 200 || r == nil || r.RequestURI != v.path {
				t.Errorf("%s %s: %d", v.method, v.path, answer.code)
			}
			if answer := as(v, "", outside).to(t, address); answer.code != 401 || got(t, v, "") != nil || !strings.HasPrefix(answer.header.Get("WWW-Authenticate"), "Basic ") {
				t.Errorf("%s %s without a name: %d", v.method, v.path, answer.code)
			}
		}
	})
	t.Run("restricted", func(t *testing.T) {
		for _, v := range restricted {
			answer := as(v, alice, outside).to(t, address)
			if r := got(t, v, alice); r != nil || answer.code == 200 {
				t.Errorf("%s %s got through from outside: %d", v.method, v.path, answer.code)
			}
			if answer.code != 403 && answer.code != 400 {
				t.Errorf("%s %s from outside: %d", v.method, v.path, answer.code)
			}
			answer = as(v, alice, inside).to(t, address)
			if r := got(t, v, alice); (r != nil) != (answer.code == 200) || answer.code != 200 && answer.code != 400 {
				t.Errorf("%s %s from inside: %d", v.method, v.path, answer.code)
			}
			answer = as(v, bob, outside).to(t, address)
			if r := got(t, v, bob); (r != nil) != (answer.code == 200) || answer.code != 200 && answer.code != 400 {
				t.Errorf("%s %s, unrestricted: %d", v.method, v.path, answer.code)
			}
			if answer := as(v, "", inside).to(t, address); answer.code != 401 && answer.code != 400 || got(t, v, "") != nil {
				t.Errorf("%s %s without a name: %d", v.method, v.path, answer.code)
			}
		}
	})
	t.Run("SOGo's own form is closed", func(t *testing.T) {
		for _, path := range []string{"/SOGo/connect", "/SOGo/so/connect", "//SOGo/%63onnect", "/SOGo/connect/", "/SOGo/x/../connect"} {
			v := raw{method: "POST", path: path, body: `{"userName":"` + alice + `","password":"` + right + `"}`}
			if answer := as(v, bob, inside).to(t, address); answer.code != 403 || got(t, v, bob) != nil {
				t.Errorf("%s: %d", path, answer.code)
			}
		}
	})
	t.Run("two names", func(t *testing.T) {
		v := raw{path: "/SOGo/dav/alice@example.org/Mail/", user: bob, headers: []string{
			xff(outside), "Authorization: Basic YWxpY2VAZXhhbXBsZS5vcmc6cmlnaHQtcGFzc3dvcmQ=",
		}}
		if answer := v.to(t, address); answer.code != 400 || len(up.take()) != 0 {
			t.Errorf("%d", answer.code)
		}
	})
	t.Run("no answer tells whether the password is right", func(t *testing.T) {
		v := raw{path: "/SOGo/so/", headers: []string{xff(outside)}, user: alice}
		rightAnswer := v.to(t, address)
		v.user, v.headers = "", append(v.headers, "Authorization: Basic YWxpY2VAZXhhbXBsZS5vcmc6d3Jvbmc=")
		if wrongAnswer := v.to(t, address); wrongAnswer.code != 403 || wrongAnswer.body != rightAnswer.body {
			t.Errorf("%d %q and %d %q", rightAnswer.code, rightAnswer.body, wrongAnswer.code, wrongAnswer.body)
		}
		v.headers[0] = xff(inside)
		if answer := v.to(t, address); answer.code != 401 || len(up.take()) != 0 {
			t.Errorf("a wrong password inside: %d", answer.code)
		}
	})
	t.Run("the sidecar's states", func(t *testing.T) {
		sidecarStates(t, w, func(state string, answers bool) {
			for _, v := range exempt[:2] {
				if answer := as(v, alice, outside).to(t, address); answer.code != 200 || got(t, v, alice) == nil {
					t.Errorf("%s, %s: %d", state, v.path, answer.code)
				}
			}
			want := 503
			if answers {
				want = 200
			}
			for _, v := range []raw{restricted[0], restricted[4], restricted[8]} {
				if answer := as(v, bob, outside).to(t, address); answer.code != want || (got(t, v, bob) != nil) != answers {
					t.Errorf("%s, %s: %d", state, v.path, answer.code)
				}
			}
		})
	})
	checkLogs(t, map[string]interface{ Log() (string, error) }{"nginx": server, "sidecar": w.sidecar})
}
