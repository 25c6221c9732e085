package peers

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/test/dovecot"
	"github.com/allowednets/allowednets/test/stack"
)

const startWithin = 2 * time.Minute

// grown is a policy service that is given further lists as sizes grow. Each start is a sidecar of its own, which reads them anew.
type grown struct {
	*stack.Stack

	policy   *stack.Policy
	lists    policyv1.PolicyServiceClient
	saved    map[string]bool
	revision string
	sidecars int
}

// A way is how the sidecar is asked over its socket.
type way func(tb testing.TB, s *sidecar) func(mailbox, client string) (decisionv1.Verdict, error)

func (g *grown) starter(how way) func(testing.TB, lists) running {
	return func(tb testing.TB, lists lists) running {
		tb.Helper()
		ctx, cancel := context.WithTimeout(tb.Context(), startWithin)
		defer cancel()
		g.begin(ctx, tb)
		g.save(ctx, tb, lists)
		g.sidecars++
		s := &sidecar{grown: g}
		var err error
		if s.Sidecar, err = g.StartSidecar(stack.SidecarConfig{Name: fmt.Sprint("sidecar", g.sidecars), Policy: g.policy.Address}); err != nil {
			tb.Fatal(err)
		}
		if err := errors.Join(s.AwaitReady(ctx), s.AwaitRevision(ctx, g.revision)); err != nil {
			tb.Fatal(err)
		}
		s.ask = how(tb, s)
		return s
	}
}

// begin starts the policy service, once in a test.
func (g *grown) begin(ctx context.Context, tb testing.TB) {
	tb.Helper()
	if g.Stack != nil {
		return
	}
	root, err := stack.Root()
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "peers-") // tb.TempDir is too long for unix sockets
	if err != nil {
		tb.Fatal(err)
	}
	s, err := stack.New(dir, filepath.Join(root, "bin"))
	if err != nil {
		tb.Fatal(err)
	}
	g.Stack, g.saved = s, make(map[string]bool)
	if g.policy, err = s.StartPolicy(stack.PolicyConfig{}); err != nil {
		tb.Fatal(err)
	}
	if err := g.policy.AwaitReady(ctx); err != nil {
		tb.Fatal(err)
	}
	lists, conn, err := s.PolicyClient(g.policy.Address)
	if err != nil {
		tb.Fatal(err)
	}
	g.lists = lists
	tb.Cleanup(func() {
		if err := errors.Join(conn.Close(), s.Close(), os.RemoveAll(dir)); err != nil {
			tb.Error(err)
		}
		*g = grown{}
	})
}

// save saves the lists that are not saved yet.
func (g *grown) save(ctx context.Context, tb testing.TB, lists lists) {
	tb.Helper()
	saves, saving := errgroup.WithContext(ctx)
	saves.SetLimit(32)
	for mailbox, nets := range lists {
		if !g.saved[mailbox] {
			g.saved[mailbox] = true
			saves.Go(func() error {
				_, err := g.set(saving, mailbox, nets)
				return err
			})
		}
	}
	if err := saves.Wait(); err != nil {
		tb.Fatal(err)
	}
	revision, err := g.set(ctx, "newest@example.org", []string{fmt.Sprintf("8.8.%d.8", len(g.saved)%256)})
	if err != nil {
		tb.Fatal(err)
	}
	g.revision = revision
}

func (g *grown) set(ctx context.Context, mailbox string, nets []string) (revision string, err error) {
	resp, err := g.lists.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
		Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: strings.Join(nets, ",")},
	})
	return resp.GetAllowedNets().GetRevision(), err
}

// sidecar is ours, the binary as it is installed. A change is a save at the policy service, which is on another connection, in another
// process, and on disk before it returns.
type sidecar struct {
	*stack.Sidecar

	grown *grown
	ask   func(mailbox, client string) (decisionv1.Verdict, error)
	conn  *grpc.ClientConn
}

func (s *sidecar) Allowed(mailbox, client string) (bool, error) {
	verdict, err := s.ask(mailbox, client)
	return verdict == decisionv1.Verdict_VERDICT_ALLOW, err
}

func (s *sidecar) Change(mailbox string, nets []string) error {
	_, err := s.grown.set(context.Background(), mailbox, nets)
	return err
}

func (s *sidecar) Close() error {
	var err error
	if s.conn != nil {
		err = s.conn.Close()
	}
	return errors.Join(err, s.Stop())
}

func overJSON(tb testing.TB, s *sidecar) func(mailbox, client string) (decisionv1.Verdict, error) {
	client := overUnix(s.Socket)
	tb.Cleanup(client.CloseIdleConnections)
	return func(mailbox, address string) (decisionv1.Verdict, error) {
		var answer struct {
			Decision struct {
				Verdict string `json:"verdict"`
			} `json:"decision"`
		}
		err := post(client, "/v1/check", map[string]string{"mailbox": mailbox, "clientAddress": address, "service": "SERVICE_IMAP"}, &answer)
		verdict, ok := decisionv1.Verdict_value[answer.Decision.Verdict]
		if err == nil && !ok {
			err = fmt.Errorf("the sidecar has no verdict %q", answer.Decision.Verdict)
		}
		return decisionv1.Verdict(verdict), err
	}
}

func overGRPC(tb testing.TB, s *sidecar) func(mailbox, client string) (decisionv1.Verdict, error) {
	tb.Helper()
	client := s.dial(tb)
	return func(mailbox, address string) (decisionv1.Verdict, error) {
		resp, err := client.Check(tb.Context(), &checkv1.CheckRequest{Mailbox: mailbox, ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP})
		return resp.GetDecision().GetVerdict(), err
	}
}

func overStream(tb testing.TB, s *sidecar) func(mailbox, client string) (decisionv1.Verdict, error) {
	tb.Helper()
	stream, err := s.dial(tb).CheckStream(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return func(mailbox, address string) (decisionv1.Verdict, error) {
		if err := stream.Send(&checkv1.CheckStreamRequest{Check: &checkv1.CheckRequest{
			Mailbox: mailbox, ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP,
		}}); err != nil {
			return 0, err
		}
		resp, err := stream.Recv()
		return resp.GetCheck().GetDecision().GetVerdict(), err
	}
}

func (s *sidecar) dial(tb testing.TB) checkv1.CheckServiceClient {
	tb.Helper()
	client, conn, err := s.Client()
	if err != nil {
		tb.Fatal(err)
	}
	s.conn = conn
	return client
}

// dovecotConf is a Dovecot that does nothing but authenticate.
const dovecotConf = `
base_dir = {{.Dir}}/run
state_dir = {{.Dir}}/state
log_path = /dev/stderr
protocols =
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
auth_failure_delay = 0
first_valid_uid = 1
service auth {
  unix_listener auth-peers {
    mode = 0666
  }
}
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
passdb {
  driver = passwd-file
  args = {{.Dir}}/users
}
userdb {
  driver = static
  args = uid=mail gid=mail home={{.Dir}}
}
`

// allowNets is Dovecot's auth process with the lists as allow_nets in a password file, asked over its socket as its login processes ask
// it (https://doc.dovecot.org/2.3/developer_manual/design/auth_protocol/). It looks at the password as well, which is in plain text.
type allowNets struct {
	*stack.Process

	conn  net.Conn
	read  *bufio.Reader
	part  string // of a line
	asked int

	dir   string
	users map[string]string // lines of the password file
}

func startDovecot(tb testing.TB, lists lists) running {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), startWithin)
	defer cancel()
	d := &allowNets{users: make(map[string]string)}
	for mailbox, nets := range lists {
		d.users[mailbox] = userLine(mailbox, nets)
	}
	var err error
	d.Process, d.dir, err = dovecot.Run(ctx, map[string]string{"dovecot.conf": dovecotConf, "users": d.file()}, "unix", "auth-peers")
	if err != nil {
		tb.Fatal(err)
	}
	if err := d.connect(ctx); err != nil {
		tb.Fatal(err)
	}
	return d
}

func userLine(mailbox string, nets []string) string {
	return fmt.Sprintf("%s:{PLAIN}%s::::::allow_nets=%s\n", mailbox, dovecot.Password, strings.Join(nets, ","))
}

func (d *allowNets) file() string {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(d.users)) {
		text.WriteString(d.users[name])
	}
	for i := range unlisted {
		fmt.Fprintf(&text, "%s:{PLAIN}%s::::::\n", mailbox(firstUnlisted+i), dovecot.Password)
	}
	return text.String()
}

// connect shakes hands with the auth process.
func (d *allowNets) connect(ctx context.Context) error {
	var err error
	if d.conn, err = (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(d.dir, "run", "auth-peers")); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(d.conn, "VERSION\t1\t2\nCPID\t%d\n", os.Getpid()); err != nil {
		return err
	}
	d.read = bufio.NewReader(d.conn)
	for {
		if line, err := d.read.ReadString('\n'); err != nil || line == "DONE\n" {
			return err
		}
	}
}

func (d *allowNets) Allowed(mailbox, client string) (bool, error) {
	answers, err := d.AllowedAll([]string{mailbox}, []string{client})
	return err == nil && answers[0], err
}

// AllowedAll asks many questions at once: Dovecot holds back refusals for up to half a second, also with auth_failure_delay = 0.
func (d *allowNets) AllowedAll(mailboxes, clients []string) ([]bool, error) {
	if err := d.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	first := d.asked + 1
	for i := range mailboxes {
		if err := d.send(mailboxes[i], clients[i]); err != nil {
			return nil, err
		}
	}
	answers := make([]bool, len(mailboxes))
	for missing := len(answers); missing > 0; {
		id, allowed, err := d.receive()
		if err != nil {
			return nil, err
		}
		if id >= first { // others are what Await did not wait for
			answers[id-first] = allowed
			missing--
		}
	}
	return answers, nil
}

// Await asks anew every millisecond, without waiting for refusals, until the client is let in.
func (d *allowNets) Await(mailbox, client string) error {
	first := d.asked + 1
	for began := time.Now(); time.Since(began) < time.Minute; {
		if err := errors.Join(d.send(mailbox, client), d.conn.SetReadDeadline(time.Now().Add(time.Millisecond))); err != nil {
			return err
		}
		for {
			id, allowed, err := d.receive()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil || id >= first && allowed {
				return err
			}
		}
	}
	return errors.New("not let in within a minute")
}

func (d *allowNets) send(mailbox, client string) error {
	d.asked++
	sasl := base64.StdEncoding.EncodeToString([]byte("\x00" + mailbox + "\x00" + dovecot.Password))
	_, err := fmt.Fprintf(d.conn, "AUTH\t%d\tPLAIN\tservice=imap\tsecured\tno-penalty\trip=%s\tresp=%s\n", d.asked, client, sasl)
	return err
}

// receive reads one answer, which a deadline may have cut before.
func (d *allowNets) receive() (id int, allowed bool, err error) {
	part, err := d.read.ReadString('\n')
	d.part += part
	if err != nil {
		return 0, false, err
	}
	line := strings.Split(strings.TrimSuffix(d.part, "\n"), "\t")
	d.part = ""
	if len(line) < 2 || line[0] != "OK" && line[0] != "FAIL" {
		return 0, false, fmt.Errorf("the auth process answers %q", line)
	}
	id, err = strconv.Atoi(line[1])
	return id, line[0] == "OK", err
}

// Change writes the whole password file beside the old one and puts it in its place, which is the only way that no login sees half.
func (d *allowNets) Change(mailbox string, nets []string) error {
	d.users[mailbox] = userLine(mailbox, nets)
	next := filepath.Join(d.dir, "users.next")
	if err := errors.Join(os.WriteFile(next, []byte(d.file()), 0o644), os.Chmod(next, 0o644)); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(d.dir, "users"))
}

// Pid is that of the auth process, a child of Dovecot's master.
func (d *allowNets) Pid() int {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", d.Process.Pid(), d.Process.Pid()))
	if err != nil {
		return 0
	}
	for child := range strings.FieldsSeq(string(children)) {
		name, err := os.ReadFile("/proc/" + child + "/comm")
		if pid, errPid := strconv.Atoi(child); err == nil && errPid == nil && string(name) == "auth\n" {
			return pid
		}
	}
	return -1
}

func (d *allowNets) Close() error {
	return errors.Join(d.conn.Close(), d.Stop(), os.RemoveAll(d.dir))
}
