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
		"location = /.well-known/caldav ", "location ~ \\.php$ { proxy_pass http://"+up.address+"; }\nlocation = /.well-known/caldav ",
		"/etc/nginx/sogo.htpasswd", passwords, "unix:/run/nginx-sogo.sock", "unix:"+filepath.Join(dir, "s")) + "}\n"
	server := startNginx(t, w.Stack, "nginx-sogo", conf, address)
	xff := func(address string) string { return "X-Forwarded-For: " + address }

	exempt := []raw{
		{path: "/SOGo/dav/alice@example.org/Calendar"},
		{path: "/SOGo/dav/alice@example.org/Calendar/"},
		{path: "/SOGo/dav/alice%40example.org/Calendar/personal/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/personal/5E-6A%20x.ics"},
		{path: "/SOGo/dav/alice@example.org/Calendar/personal/.hidden.ics"},
		{path: "/SOGo/dav/bob@example.org/Calendar/shared/"},
		{method: "MOVE", path: "/SOGo/dav/alice@example.org/Calendar/personal/x.ics", headers: []string{"Destination: https://mail.example.org/SOGo/dav/alice@example.org/Calendar/work/x.ics"}},
		{path: "/SOGo/dav/alice@example.org/Contacts/personal/J%C3%BCrgen.vcf"},
		{path: "/SOGo/dav/alice@example.org/Contacts/personal/j%c3%bcrgen.vcf"},
		{method: "PUT", path: "/SOGo/dav/alice@example.org/Calendar/personal/new.ics", body: "BEGIN:VCALENDAR", headers: []string{"Content-Type: text/calendar; format=flowed"}},
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

		// Where SOGo could look in the folders above, or go on from the path.
		{path: "/SOGo/so/alice@example.org/Mail/x.php"}, // a regex location
		{path: "/SOGo/dav/alice@example.org/Calendar/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/Mail/0/folderINBOX/1/asHTML"},
		{path: "/SOGo/dav/alice@example.org/Calendar/personal/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/mAIL"},
		{path: "/SOGo/dav/alice@example.org/Calendar/%4dail/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/M%61il/"},
		{path: "/SOGo/dav/alice@example.org/Calendar/a/b/c/"},
		{path: "/SOGo/dav/alice@example.org/Contacts/Mail/0/folderINBOX/1.eml"},
		{path: "/SOGo/dav/alice@example.org/Contacts/_range_x/Mail/"},
		{path: "/SOGo/dav/alice@example.org/Contacts/Preferences/"},
		{path: "/SOGo/dav/alice@example.org/Contacts/Microsoft-Server-ActiveSync"},
		{path: "/SOGo/dav/Mail/Calendar/"},
		{method: "PROPFIND", path: "/SOGo/dav/Mail/", headers: []string{"Depth: 0"}},
		{path: "/SOGo/dav/alice@example.org/Calendar/?sync=1"},
		{path: "/SOGo/dav/alice@example.org/Calendar/?"},
		{method: "COPY", path: "/SOGo/dav/alice@example.org/Calendar/personal/x.ics", headers: []string{"Destination: /SOGo/dav/alice@example.org/Mail/x"}},
		{method: "COPY", path: "/SOGo/dav/alice@example.org/Calendar/personal/x.ics", headers: []string{"Destination: http://x/SOGo/dav/alice@example.org/Calendar/../Mail/x"}},
		{method: "POST", path: "/SOGo/dav/alice@example.org/Calendar/personal/", body: ":method=Mail", headers: []string{"Content-Type: application/x-www-form-urlencoded"}},

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
		v.user, v.headers = user, append([]string{
			xff(from), "x-webobjects-remote-user: " + bob, "X-WebObjects-Remote-User: root", "x-webobjects-auth-type: none",
			"X-Original-URL: /SOGo/so/", "X-Rewrite-URL: /SOGo/so/", "X-HTTP-Method-Override: REPORT", "SOAPAction: x",
		}, v.headers...)
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
		for _, name := range []string{"X-Original-Url", "X-Rewrite-Url", "X-Http-Method-Override", "Soapaction"} {
			if value := r.Header.Get(name); value != "" {
				t.Errorf("%s %s: SOGo gets %s: %s", v.method, v.path, name, value)
			}
		}
		return r
	}
	t.Run("exempt", func(t *testing.T) {
		for _, v := range exempt {
			answer := as(v, alice, outside).to(t, address)
			r := got(t, v, alice)
			if answer.code != 200 || r == nil || r.RequestURI != v.path {
				t.Errorf("%s %s: %d", v.method, v.path, answer.code)
			} else if r.Header.Get("Translate") != "f" {
				t.Errorf("%s %s: SOGo may look in the folders above", v.method, v.path)
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
		for _, path := range []string{"/SOGo/connect", "/SOGo/so/connect", "//SOGo/%63onnect", "/SOGo/connect/", "/SOGo/x/../connect",
			"/SOGo.woa/connect", "/SOGo.woa/so/connect", "/SOGoX/connect", "/SOGo/SO/connect", "/SOGo/x/connect", "/SOGo/wa/connect", "/SOGo/so//connect",
			"/SOGo/so/bob@example.org/connect", "/SOGo/dav/bob@example.org/Calendar/connect", "/SOGo/_range/connect", "/SOGo/so/conn%65ct/x",
			"/SOGo/?Cmd=connect", "/SOGo/Microsoft-Server-ActiveSync?Cmd=Sync", "/SOGo?Cmd=connect", "/SOGo/?x=1&%43md=connect", "/SOGo/?:method=connect", "/SOGo/so/?connect:method=x", "/SOGo/so/?connect%3Amethod",
			"/SOGo/so/?a=b&connect%3amet%68od=", "/SOGo/dav/bob@example.org/Calendar/?Cmd=connect",
			"/Microsoft-Server-ActiveSync?Cmd=connect", "/Microsoft-Server-ActiveSync?Cmd=conn%65ct", "/Microsoft-Server-ActiveSync?Cmd=Sync&connect:method=",
		} {
			v := raw{method: "POST", path: path, body: `{"userName":"` + alice + `","password":"` + right + `"}`}
			if answer := as(v, bob, inside).to(t, address); answer.code != 403 || got(t, v, bob) != nil {
				t.Errorf("%s: %d", path, answer.code)
			}
		}
	})
	t.Run("nothing else of SOGo's", func(t *testing.T) {
		for _, path := range []string{"/SOGo.woa/so/", "/SOGoX/", "/sogo/", "/Microsoft-Server-ActiveSync/x"} {
			v := raw{path: path}
			if answer := as(v, bob, inside).to(t, address); answer.code != 404 || got(t, v, bob) != nil {
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
