package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	loginRounds = 35
	// loginRound is how long each Dovecot is logged in to in a round: short, so that what else the machine does meets all alike.
	loginRound = 250 * time.Millisecond
	loginUsers = 100
	// loginNets is the list of every user. The clients come from loginInside.
	loginNets                 = "8.8.8.0/24, 2a00:1450:1::/48, " + loginInside
	loginInside, loginOutside = "127.0.0.1", "127.0.0.2"
)

// loginConf is a Dovecot that keeps its processes from login to login, as large hosts run it: a new process for each login takes
// longer than any check.
const loginConf = `
base_dir = {{.Dir}}/run
state_dir = {{.Dir}}/state
log_path = /dev/stderr
protocols = imap
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
mail_location = maildir:{{.Dir}}/mail/%%u
mail_max_userip_connections = 1000
first_valid_uid = 1
service imap-login {
  inet_listener imap {
    port = %s
  }
  inet_listener imaps {
    port = 0
  }
  service_count = 0
  process_min_avail = 2
}
service imap {
  service_count = 0
  process_min_avail = 8
}
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
passdb {
  driver = passwd-file
  args = {{.Dir}}/users
  %s
}
userdb {
  driver = static
  args = uid=mail gid=mail home={{.Dir}}/mail/%%u
}
`

// BenchmarkLogins is what a second of logins over IMAP holds: without a check, with Dovecot's own allow_nets, and with an auth policy
// server that lets everybody in or is the sidecar, both configured as integrations/dovecot is published. In each round all are
// logged in to, in an order of its own. x-trivial is the median of the rounds' ratios to the server that lets everybody in,
// between their quartiles.
func BenchmarkLogins(b *testing.B) {
	if err := dovecot.Missing(); err != nil {
		b.Skipf("NOT MEASURED: %v", err)
	}
	at := startDovecots(b)
	for check, address := range at {
		refuses := check == "allow_nets" || check == "ours"
		if err := logIn(b.Context(), loginOutside, address, loginUser(0)); refuses != errors.Is(err, errRefused) || !refuses && err != nil {
			b.Fatalf("%s, from outside of the list: %v", check, err)
		}
	}
	checks := []string{"none", "allow_nets", "trivial", "ours"}
	for _, callers := range []int{1, 4} {
		rates := make(map[string][]float64)
		order := slices.Clone(checks)
		random := rand.New(rand.NewPCG(1, 1))
		for round := range loginRounds + 1 {
			random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			for _, check := range order {
				rate, err := loginRate(b.Context(), at[check], callers)
				if err != nil {
					b.Fatalf("%s: %v", check, err)
				}
				if round > 0 { // the first warms up
					rates[check] = append(rates[check], rate)
				}
			}
		}
		for _, check := range checks {
			b.Run(fmt.Sprintf("check=%s/callers=%d", check, callers), func(b *testing.B) {
				ratios := make([]float64, loginRounds)
				for i, r := range rates[check] {
					ratios[i] = r / rates["trivial"][i]
				}
				slices.Sort(ratios)
				b.ReportMetric(0, "ns/op") // measured before
				b.ReportMetric(median(slices.Clone(rates[check])), "logins/s")
				b.ReportMetric(atShare(ratios, 0.5), "x-trivial")
				b.ReportMetric(atShare(ratios, 0.25), "x-trivial-q1")
				b.ReportMetric(atShare(ratios, 0.75), "x-trivial-q3")
			})
		}
	}
}

// startDovecots starts a Dovecot for each kind of check and returns their addresses.
func startDovecots(b *testing.B) map[string]string {
	b.Helper()
	ctx := within(b, startWithin)
	root, err := stack.Root()
	must(b, err)
	s := newStack(b)
	policy, err := s.StartPolicy(stack.PolicyConfig{PermitNets: "127.0.0.0/8"})
	must(b, err)
	sidecar, err := s.StartSidecar(stack.SidecarConfig{Policy: policy.Address})
	must(b, err)
	must(b, policy.AwaitReady(ctx), sidecar.AwaitReady(ctx))
	saveLoginUsers(ctx, b, s, policy, sidecar)
	trivial, err := s.FreeAddress()
	must(b, err)
	out, err := exec.CommandContext(ctx, "go", "build", "-o", s.Path("allowall"), "github.com/allowednets/allowednets/test/cmd/allowall").CombinedOutput()
	if err != nil {
		b.Fatalf("building allowall: %v\n%s", err, out)
	}
	_, err = s.Start("allowall", s.Path("allowall"), []string{trivial}, nil)
	must(b, err)
	published, err := os.ReadFile(filepath.Join(root, "integrations", "dovecot", "allowednets-2.3.conf"))
	must(b, err)
	const door = "http://127.0.0.1:7480/dovecot"
	if strings.Count(string(published), door+"\n") != 1 {
		b.Fatalf("allowednets-2.3.conf does not name %s once", door)
	}
	at := make(map[string]string)
	for _, kind := range []struct{ name, door, extra string }{
		{name: "none"},
		{name: "allow_nets", extra: "allow_nets=" + strings.ReplaceAll(loginNets, ", ", ",")},
		{name: "trivial", door: "http://" + trivial + "/dovecot"},
		{name: "ours", door: "http://" + sidecar.HTTP + "/dovecot"},
	} {
		address, err := s.FreeAddress()
		must(b, err)
		_, port, err := net.SplitHostPort(address)
		must(b, err)
		conf := fmt.Sprintf(loginConf, port, "")
		if kind.door != "" {
			conf = fmt.Sprintf(loginConf, port, "default_fields = stage=after") + strings.Replace(string(published), door, kind.door, 1)
		}
		var users strings.Builder
		for i := range loginUsers {
			fmt.Fprintf(&users, "%s:{PLAIN}%s::::::%s\n", loginUser(i), dovecot.Password, kind.extra)
		}
		files := map[string]string{"dovecot.conf": conf, "users": users.String()}
		p, dir, err := dovecot.Run(ctx, files, "tcp", address)
		b.Cleanup(func() {
			if p != nil {
				if err := p.Stop(); err != nil {
					b.Error(err)
				}
				if b.Failed() {
					b.Log(p.LogTail())
				}
			}
			if err := os.RemoveAll(dir); err != nil {
				b.Error(err)
			}
		})
		must(b, err)
		at[kind.name] = address
	}
	return at
}

func loginUser(i int) string { return fmt.Sprintf("user%03d@example.org", i%loginUsers) }

// saveLoginUsers restricts the users and waits until the sidecar knows.
func saveLoginUsers(ctx context.Context, b *testing.B, s *stack.Stack, policy *stack.Policy, sidecar *stack.Sidecar) {
	b.Helper()
	lists, conn, err := s.PolicyClient(policy.Address)
	must(b, err)
	defer func() { _ = conn.Close() }()
	revision := ""
	for i := range loginUsers {
		resp, err := lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
			Mailbox: loginUser(i), Input: &policyv1.SetAllowedNetsRequest_Text{Text: loginNets},
		})
		must(b, err)
		revision = resp.GetAllowedNets().GetRevision()
	}
	must(b, sidecar.AwaitRevision(ctx, revision))
}

// loginRate logs in for loginRound with a number of callers and returns how often that was in a second. Every login must succeed.
func loginRate(ctx context.Context, address string, callers int) (perSecond float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, loginRound+30*time.Second)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	done := make([]int, callers)
	for c := range callers {
		group.Go(func() error {
			for i := c; time.Since(began) < loginRound; i += callers {
				if err := logIn(ctx, loginInside, address, loginUser(i)); err != nil {
					return err
				}
				done[c]++
			}
			return nil
		})
	}
	err = group.Wait()
	total := 0
	for _, n := range done {
		total += n
	}
	return float64(total) / time.Since(began).Seconds(), err
}

var errRefused = errors.New("refused")

// logIn is one login over a connection of its own, from a loopback address.
func logIn(ctx context.Context, from, address, user string) (err error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	lines := bufio.NewScanner(conn)
	for _, step := range []struct{ say, hear string }{
		{"", "* OK"},
		{"a LOGIN " + user + " " + dovecot.Password, "a OK"},
		{"b LOGOUT", "b OK"},
	} {
		if step.say != "" {
			if _, err := fmt.Fprintf(conn, "%s\r\n", step.say); err != nil {
				return err
			}
		}
		for heard := ""; !strings.HasPrefix(heard, step.hear); heard = lines.Text() {
			if strings.HasPrefix(heard, "a NO") {
				return fmt.Errorf("%s: %w: %s", user, errRefused, heard)
			}
			if !lines.Scan() {
				return fmt.Errorf("%s: the connection ended before %q: %w", user, step.hear, lines.Err())
			}
		}
	}
	return nil
}
