package e2e

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

// mailProxy is nginx with the mail configuration that people copy, behind a load balancer at 127.0.0.1.
type mailProxy struct {
	*world
	nginx interface{ Log() (string, error) }
	// door is the sidecar that nginx asks, another one than Dovecot's.
	door *stack.Sidecar
	// through logs in by way of nginx.
	through *dovecot.Server
	// through6 is the same on ::1, IMAP only.
	through6 *dovecot.Server
	smtp     string
}

func startMailProxy(t *testing.T, smtpServer string, doorArgs ...string) *mailProxy {
	t.Helper()
	needNginx(t)
	p := &mailProxy{world: newWorld(t, settings{})}
	err := p.dovecot.Stop()
	if err != nil {
		t.Fatal(err)
	}
	people := append(people(), dovecot.User{Name: odd, Password: oddPassword})
	p.dovecot = startDovecot(t, p.Stack, "dovecot-proxied", people, dovecot.Config{Door: "http://" + p.sidecar.HTTP + "/dovecot"})
	args := append([]string{"--nginx-backend", "imap=" + p.dovecot.ProxiedIMAP + ",pop3=" + p.dovecot.ProxiedPOP3 + ",smtp=" + smtpServer}, doorArgs...)
	if p.door, err = p.StartSidecar(stack.SidecarConfig{Name: "door", Policy: p.policy.Address, AdditionalArgs: args}); err != nil {
		t.Fatal(err)
	}
	if err := p.door.AwaitReady(within(t, startWithin)); err != nil {
		t.Fatal(err)
	}
	p.through = &dovecot.Server{}
	for _, address := range []*string{&p.through.ProxiedIMAP, &p.through.ProxiedPOP3, &p.smtp} {
		*address = freeAddress(t, p.Stack)
	}
	p.through6 = &dovecot.Server{ProxiedIMAP: strings.Replace(p.through.ProxiedIMAP, "127.0.0.1", "[::1]", 1)}
	conf := published(t, "mail.conf", "127.0.0.1:7480", p.door.HTTP, "# set_real_ip_from 192.0.2.10;", "set_real_ip_from 127.0.0.1; set_real_ip_from ::1;",
		"listen     143;", "listen "+p.through.ProxiedIMAP+" proxy_protocol; listen "+p.through6.ProxiedIMAP+" proxy_protocol;", "listen     110;", "listen "+p.through.ProxiedPOP3+" proxy_protocol;",
		"listen           587;", "listen "+p.smtp+" proxy_protocol;", "/var/log/nginx/mail.log", "stderr")
	p.nginx = startNginx(t, p.Stack, "nginx-mail", conf, p.through.ProxiedIMAP)
	return p
}

// odd is somebody with an odd password.
const odd = "odd@example.org"

// TestNginxMail logs in to the real Dovecot through the real nginx.
func TestNginxMail(t *testing.T) {
	p := startMailProxy(t, "127.0.0.1:1")
	for protocol, login := range protocols(p.through) {
		t.Run(protocol, func(t *testing.T) {
			for _, c := range []struct {
				name, user, address, password, want string // want is empty: logged in
			}{
				{"inside", alice, inside, right, ""},
				{"inside, upper case", "ALICE@Example.ORG", inside, right, ""},
				{"inside, wrong password", alice, inside, wrong, wrongPassword(protocol)},
				{"outside", alice, outside, right, denial(protocol, notAllowed(outside))},
				{"outside, wrong password", alice, outside, wrong, denial(protocol, notAllowed(outside))},
				{"outside, upper case", "ALICE@Example.ORG", outside, right, denial(protocol, notAllowed(outside))},
				{"outside, with a dot", alice + ".", outside, right, denial(protocol, notAllowed(outside))},
				{"private", alice, "10.0.0.1", right, denial(protocol, notAllowed("10.0.0.1"))},
				{"unrestricted", bob, outside, right, ""},
				{"unrestricted, wrong password", bob, outside, wrong, wrongPassword(protocol)},
				{"alias inside", sales, inside, right, ""},
				// The name as typed is unrestricted; Dovecot behind knows whose alias it is.
				{"alias outside", sales, outside, right, wrongPassword(protocol)},
				{"odd password", odd, outside, oddPassword, ""},
				{"a master user", alice + "*" + dovecot.Master, inside, dovecot.MasterPassword, wrongPassword(protocol)},
				{"percent-encoded by the client", "alice%40example.org", outside, right, wrongPassword(protocol)},
				{"percent in the name", "al%69ce@example.org", outside, right, wrongPassword(protocol)},
				{"no domain", "alice", inside, right, wrongPassword(protocol)},
			} {
				p.lookups(t)
				got, err := login(t.Context(), from(c.address, c.user, c.password))
				if err != nil || got.OK != (c.want == "") || !got.OK && got.Text != c.want {
					t.Errorf("%s: %q, %v; want %q", c.name, got.Text, err, c.want)
				}
				if names := p.lookups(t); len(names) != 0 && strings.Contains(c.want, "not allowed") {
					t.Errorf("%s: the passdb was asked for %q", c.name, names)
				}
			}
			t.Run("AUTH PLAIN", func(t *testing.T) {
				a := from(outside, alice, right)
				a.Authorize = alice
				if got := attempt(t, login, a); got.OK {
					t.Errorf("outside: %s", got.Text)
				}
			})
			// A client whose address family is not that of nginx's own listener: what nginx 1.22 sends on, Dovecot rejects.
			t.Run("IPv6 through an IPv4 listener", func(t *testing.T) {
				for _, address := range []string{inside6, "::ffff:" + inside} {
					if got, err := login(t.Context(), from(address, alice, right)); err == nil && got.OK {
						t.Errorf("%s: nginx has learnt it, and README.md can be shorter", got.Text)
					}
				}
				if got := attempt(t, login, from(outside6, alice, right)); got.OK || got.Text != denial(protocol, notAllowed(outside6)) {
					t.Errorf("outside: %s", got.Text)
				}
			})
		})
	}
	t.Run("a listener for each address family", func(t *testing.T) {
		if got := attempt(t, p.through6.LoginIMAP, from(inside6, alice, right)); !got.OK {
			t.Error(got.Text)
		}
		if got := attempt(t, p.through6.LoginIMAP, from(outside6, alice, right)); got.OK || got.Text != denial("imap", notAllowed(outside6)) {
			t.Errorf("outside: %s", got.Text)
		}
	})
	t.Run("hostile names", func(t *testing.T) {
		long := strings.Repeat("a", 3000)
		for name, user := range map[string]string{
			"CR LF": alice + "\r\nAuth-Status: OK", "LF": bob + "\nAuth-Server: 127.0.0.1", "NUL": alice + "\x00", "control": "bob\x07@example.org",
			"blank": bob + " ", "quote": `b"ob@example.org`, "backslash": `b\ob@example.org`, "not UTF-8": "bob\xff@example.org",
			"3 kB": long + "@example.org", "10 kB": long + long + long + long + "@example.org", "empty": "", "a header": "Auth-User: " + bob,
		} {
			got, err := p.through.LoginIMAP(t.Context(), from(inside, user, right))
			if got.OK || len(got.Text) > 300 || strings.Contains(got.Text, "forged") || strings.Contains(got.Text, "Auth-") {
				t.Errorf("%s: %.300q, %v", name, got.Text, err)
			}
		}
	})
	t.Run("one guess for each connection", func(t *testing.T) {
		got := guess(t, p.through.ProxiedIMAP, "a LOGIN "+alice+" x", "b LOGIN "+alice+" "+right)
		if len(got) != 1 || got[0] != "a NO [ALERT] "+notAllowed(outside) {
			t.Errorf("%q", got)
		}
	})
	t.Run("the sidecar's states", func(t *testing.T) {
		w := &world{Stack: p.Stack, policy: p.policy, sidecar: p.door}
		sidecarStates(t, w, func(state string, answers bool) {
			for protocol, login := range protocols(p.through) {
				for _, user := range []string{alice, bob} {
					began := time.Now()
					got, err := login(t.Context(), from(inside, user, right))
					if got.OK != answers {
						t.Errorf("%s, %s, %s: %q, %v", state, protocol, user, got.Text, err)
					}
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("%s, %s: took %v", state, protocol, took)
					}
				}
				if got, err := login(t.Context(), from(outside, alice, right)); got.OK {
					t.Errorf("%s, %s: outside: %q, %v", state, protocol, got.Text, err)
				}
			}
		})
	})
	t.Run("logs", func(t *testing.T) {
		checkLogs(t, map[string]interface{ Log() (string, error) }{"nginx": p.nginx, "sidecar": p.door, "dovecot": p.dovecot})
	})
}

// guess sends commands of IMAP over one connection from outside and returns the tagged answers.
func guess(t *testing.T, address string, commands ...string) []string {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PROXY TCP4 %s 192.0.2.1 40000 143\r\n", outside)
	lines := bufio.NewScanner(conn)
	lines.Scan() // greeting
	var answers []string
	for _, c := range commands {
		fmt.Fprintf(conn, "%s\r\n", c)
		tag, _, _ := strings.Cut(c, " ")
		for lines.Scan() {
			if line := lines.Text(); strings.HasPrefix(line, tag+" ") {
				answers = append(answers, line)
				break
			}
		}
	}
	return answers
}

// TestNginxMailSubmission shows that nginx lets the server behind check the password, because the sidecar does not.
func TestNginxMailSubmission(t *testing.T) {
	server := startSMTP(t)
	p := startMailProxy(t, server.address)
	plain := base64.StdEncoding.EncodeToString([]byte("\x00" + alice + "\x00" + right))
	got := p.submit(t, outside, "AUTH PLAIN "+plain)
	if !strings.HasPrefix(got, "235 ") {
		t.Errorf("submission is exempt: %s", got)
	}
	seen := server.take()
	if !slices.Contains(seen, "AUTH PLAIN "+plain) || slices.ContainsFunc(seen, func(l string) bool { return strings.HasPrefix(l, "XCLIENT") }) {
		t.Errorf("the server behind saw %q", seen)
	}
	if i := slices.IndexFunc(seen, func(l string) bool { return strings.HasPrefix(l, "PROXY TCP4 "+outside+" ") }); i != 0 {
		t.Errorf("the server behind saw %q", seen)
	}
	if got := p.submit(t, outside, "AUTH PLAIN "+base64.StdEncoding.EncodeToString([]byte("\x00"+alice+"\x00"+wrong))); strings.HasPrefix(got, "235 ") {
		t.Errorf("a wrong password: %s", got)
	}
	if got := p.submit(t, outside, "MAIL FROM:<"+alice+">"); strings.HasPrefix(got, "250 ") {
		t.Errorf("without authentication: %s", got)
	}
	checkLogs(t, map[string]interface{ Log() (string, error) }{"nginx": p.nginx, "sidecar": p.door})
}

// submit sends one command of SMTP through nginx and returns the answer.
func (p *mailProxy) submit(t *testing.T, address, command string) string {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", p.smtp)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PROXY TCP4 %s 192.0.2.1 40000 587\r\n", address)
	lines := bufio.NewScanner(conn)
	answer := func() string {
		for lines.Scan() {
			if line := lines.Text(); len(line) < 4 || line[3] == ' ' {
				return line
			}
		}
		return "the connection was closed"
	}
	answer() // greeting
	fmt.Fprint(conn, "EHLO client.example.org\r\n")
	answer()
	fmt.Fprintf(conn, "%s\r\n", command)
	return answer()
}

// smtpServer is a stand-in for a submission server that takes one password, and records what it is told.
type smtpServer struct {
	address string
	mu      sync.Mutex
	seen    []string
}

func startSMTP(t *testing.T) *smtpServer {
	t.Helper()
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &smtpServer{address: lis.Addr().String()}
	var serving sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(func() {
		stop()
		_ = lis.Close()
		serving.Wait()
	})
	serving.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				defer func() { _ = conn.Close() }()
				s.serve(conn)
			})
		}
	})
	return s
}

func (s *smtpServer) serve(conn net.Conn) {
	lines := bufio.NewScanner(conn)
	for first := true; lines.Scan(); first = false {
		line := lines.Text()
		s.mu.Lock()
		s.seen = append(s.seen, line)
		s.mu.Unlock()
		answer := "250 ok"
		switch {
		case first:
			answer = "220 smtp.example.org ESMTP"
		case strings.HasPrefix(line, "EHLO"):
			answer = "250-smtp.example.org\r\n250 AUTH PLAIN"
		case line == "AUTH PLAIN "+base64.StdEncoding.EncodeToString([]byte("\x00"+alice+"\x00"+right)):
			answer = "235 2.7.0 authenticated"
		case strings.HasPrefix(line, "AUTH"):
			answer = "535 5.7.8 wrong"
		}
		fmt.Fprintf(conn, "%s\r\n", answer)
	}
}

func (s *smtpServer) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}
