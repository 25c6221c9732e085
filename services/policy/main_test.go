package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/serve"
)

// asProgram makes the test binary the program itself, for tests that need a process of its own.
const asProgram = "ALLOWEDNETS_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

const (
	soon        = 20 * time.Second // what must happen
	stopsWithin = 10 * time.Second // on a busy machine; nothing here waits for its bound of 5 s
)

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	t.Cleanup(cancel)
	return ctx
}

// service is a policy service that was started.
type service struct {
	t              *testing.T
	address, admin string // known once it serves
	log            chan map[string]any
	interrupt      func() // asks it to stop
	ended          chan int
}

// start starts the process within the test's own.
func start(t *testing.T, args ...string) *service {
	t.Helper()
	out, in := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	s := &service{t: t, interrupt: cancel, ended: make(chan int, 1)}
	s.read(out)
	go func() {
		code := run(ctx, args, io.Discard, in)
		_ = in.Close()
		s.ended <- code
	}()
	t.Cleanup(func() { s.stop() })
	return s
}

// program is a service in a process of its own.
type program struct {
	*service
	*exec.Cmd
}

func startProgram(t *testing.T, args ...string) *program {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...) //nolint:noctx // ended below
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	s := &service{t: t, interrupt: func() { _ = cmd.Process.Signal(syscall.SIGTERM) }, ended: make(chan int, 1)}
	s.read(out)
	go func() {
		_ = cmd.Wait()
		s.ended <- cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		s.wait(nil)
	})
	return &program{s, cmd}
}

// read takes the log apart, line by line, until it ends. What is no JSON (the sentence of a usage error) is put under "msg".
func (s *service) read(log io.ReadCloser) {
	s.log = make(chan map[string]any, 1000)
	go func() {
		defer func() { _ = log.Close() }()
		defer close(s.log)
		for lines := bufio.NewScanner(log); lines.Scan(); {
			line := make(map[string]any)
			if json.Unmarshal(lines.Bytes(), &line) != nil {
				line["msg"] = lines.Text()
			}
			s.log <- line
		}
	}()
}

// heard waits for a line of the log.
func (s *service) heard(msg string) map[string]any {
	s.t.Helper()
	ctx := within(s.t)
	var before []string
	for {
		select {
		case line, more := <-s.log:
			if !more {
				s.t.Fatalf("the log ended without %q:\n%s", msg, strings.Join(before, "\n"))
			}
			if line["msg"] == msg {
				return line
			}
			before = append(before, fmt.Sprint(line))
		case <-ctx.Done():
			s.t.Fatalf("the log has no %q:\n%s", msg, strings.Join(before, "\n"))
		}
	}
}

// started waits until the process listens.
func (s *service) started() *service {
	s.t.Helper()
	line := s.heard("the policy service starts")
	s.address, s.admin = fmt.Sprint(line["address"]), fmt.Sprint(line["admin_address"])
	return s
}

// serving waits until the process serves.
func (s *service) serving() *service {
	s.t.Helper()
	s.started().heard("serving")
	return s
}

// stop asks the process to end and checks that it does, soon and well.
func (s *service) stop() {
	s.t.Helper()
	s.interrupt()
	s.wait(func(code int) {
		if code != 0 {
			s.t.Errorf("it stopped with code %d: %v", code, s.rest())
		}
	})
}

// wait waits for the process to end; the second time it returns at once.
func (s *service) wait(how func(code int)) {
	s.t.Helper()
	select {
	case code, first := <-s.ended:
		if first {
			close(s.ended)
			if how != nil {
				how(code)
			}
		}
	case <-time.After(stopsWithin):
		s.t.Errorf("it does not stop within %v: %v", stopsWithin, s.rest())
	}
}

// fails waits for the process to end with an error and returns what it logged.
func (s *service) fails() string {
	s.t.Helper()
	s.wait(func(code int) {
		if code != serve.ExitFailed {
			s.t.Errorf("it ended with code %d", code)
		}
	})
	return s.rest()
}

// rest returns what is left of the log.
func (s *service) rest() string {
	var lines []string
	for {
		select {
		case line, more := <-s.log:
			if !more {
				return strings.Join(lines, "\n")
			}
			lines = append(lines, fmt.Sprint(line))
		case <-time.After(time.Second): // it still runs
			return strings.Join(lines, "\n")
		}
	}
}

// dial returns a connection. Without credentials it is one in plain text.
func (s *service) dial(creds credentials.TransportCredentials) *grpc.ClientConn {
	s.t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(creds), grpc.WithAuthority("localhost"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *service) policies() policyv1.PolicyServiceClient {
	s.t.Helper()
	return policyv1.NewPolicyServiceClient(s.dial(nil))
}

func (s *service) save(mailbox, nets string) {
	s.t.Helper()
	if _, err := s.policies().SetAllowedNets(within(s.t), saveOf(mailbox, nets)); err != nil {
		s.t.Fatal(err)
	}
}

func saveOf(mailbox, nets string) *policyv1.SetAllowedNetsRequest {
	return &policyv1.SetAllowedNetsRequest{Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: nets}}
}

// has checks what a mailbox's list is.
func (s *service) has(mailbox string, want ...string) {
	s.t.Helper()
	resp, err := s.policies().GetAllowedNets(within(s.t), &policyv1.GetAllowedNetsRequest{Mailbox: mailbox})
	if err != nil {
		s.t.Fatal(err)
	}
	got := make([]string, 0, len(want))
	for _, n := range resp.GetAllowedNets().GetNets() {
		got = append(got, n.GetNet())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		s.t.Errorf("%s has %q, want %q", mailbox, got, want)
	}
}

// get asks the admin port.
func (s *service) get(path string) (int, string) {
	s.t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(within(s.t), http.MethodGet, "http://"+s.admin+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// plain are the flags of a service in plain text with its data in dir.
func plain(dir string, more ...string) []string {
	return append([]string{
		"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--insecure-plaintext", "--data-dir=" + dir,
	}, more...)
}

// dataDir returns a folder that does not exist and whose path is short enough for sockets.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "policy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "data")
}

// TestLife is the life of a store: it is created once, on demand, and never again.
func TestLife(t *testing.T) {
	dir := dataDir(t)
	said := start(t, plain(dir)...).fails()
	if !strings.Contains(said, "if this is the first start, give --create-store; otherwise the volume was lost or the endpoints are wrong") {
		t.Errorf("on an empty folder: %s", said)
	}

	past, soon := time.Now().Add(-time.Second).Format(time.RFC3339), time.Now().Add(time.Hour).Format(time.RFC3339)
	if said := start(t, plain(dir, "--create-store-until="+past)...).fails(); !strings.Contains(said, "give --create-store") {
		t.Errorf("after the time until which a store may be created: %s", said)
	}
	s := start(t, plain(dir, "--create-store-until="+soon, "--permit-nets=10.0.0.0/8", "--max-nets=2", "--max-nets-text=64")...).serving()
	if code, body := s.get("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if code, _ := s.get("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d", code)
	}
	s.save("alice@example.org", "10.1.2.3, 8.8.8.0/24")
	for _, nets := range []string{"192.168.1.1", "8.8.8.8 8.8.4.4 9.9.9.9", strings.Repeat(" ", 64) + "8.8.8.8"} {
		if _, err := s.policies().SetAllowedNets(within(t), saveOf("bob@example.org", nets)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a list that the flags do not permit (%q): %v", nets, err)
		}
	}
	// A list of mailboxes comes from the replica's copy, which has the save from then on.
	if _, err := s.policies().ListAllowedNets(within(t), &policyv1.ListAllowedNetsRequest{Domain: "example.org"}); err != nil {
		t.Error(err)
	}
	for _, metric := range []string{"allowednets_policy_restricted_mailboxes 1", `allowednets_grpc_calls_total{code="OK",method="/allowednets.policy.v1.PolicyService/SetAllowedNets"} 1`, "go_goroutines", "process_open_fds"} {
		if _, metrics := s.get("/metrics"); !strings.Contains(metrics, metric) {
			t.Errorf("/metrics has no %s", metric)
		}
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the data is open to %v, %v", info.Mode(), err)
	}
	s.stop()
	if said := s.rest(); strings.Contains(said, "closed") {
		t.Errorf("a good end has bad words in its log:\n%s", said)
	}
	for _, address := range []string{s.address, s.admin} {
		lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Errorf("after the end: %v", err)
			continue
		}
		_ = lis.Close()
	}

	again := start(t, plain(dir)...).serving()
	again.has("alice@example.org", "10.1.2.3", "8.8.8.0/24")
	again.stop()
	// Creating what exists is no harm.
	start(t, plain(dir, "--create-store")...).serving().has("alice@example.org", "10.1.2.3", "8.8.8.0/24")
}

// TestStopWithCallers stops a service while a sidecar listens.
func TestStopWithCallers(t *testing.T) {
	s := start(t, plain(dataDir(t), "--create-store")...).serving()
	s.save("alice@example.org", "8.8.8.8")
	stream, err := feedv1.NewFeedServiceClient(s.dial(nil)).Sync(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: &feedv1.Hello{Id: "sidecar"}}}); err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if msg.GetChanges().GetCommit() != nil {
			break
		}
	}
	s.stop()
	msg, err := stream.Recv()
	if err != nil || msg.GetDrain() == nil {
		t.Errorf("the sidecar was told %v, %v", msg, err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the sidecar's stream ended with %v", err)
	}
}

// TestStopBeforeItServes stops a service that waits for an etcd that is not there, or that is another program.
func TestStopBeforeItServes(t *testing.T) {
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := grpc.NewServer()
	go func() { _ = other.Serve(lis) }()
	defer other.Stop()
	for _, endpoint := range []string{"127.0.0.1:1", lis.Addr().String()} {
		stopBeforeItServes(t, endpoint)
	}
}

func stopBeforeItServes(t *testing.T, etcd string) {
	t.Helper()
	s := start(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--insecure-plaintext", "--etcd-endpoints=http://"+etcd).started()
	if code, body := s.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "not loaded") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if code, _ := s.get("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d", code)
	}
	s.stop()
}

func TestPortTaken(t *testing.T) {
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	dir := dataDir(t)
	for _, flag := range []string{"--listen", "--admin-listen"} {
		said := start(t, plain(dir, flag+"="+lis.Addr().String())...).fails()
		if !strings.Contains(said, flag+": ") || !strings.Contains(said, lis.Addr().String()) || !strings.Contains(said, "in use") {
			t.Errorf("%s: %s", flag, said)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it has touched the store: %v", err)
	}
}

// TestFolderTaken starts a second service on the folder of the first one.
func TestFolderTaken(t *testing.T) {
	dir := dataDir(t)
	first := start(t, plain(dir, "--create-store")...).serving()
	first.save("alice@example.org", "8.8.8.8")
	for range 2 {
		if said := start(t, plain(dir, "--create-store")...).fails(); !strings.Contains(said, "another policy service works in "+dir) {
			t.Errorf("the second says %s", said)
		}
	}
	if said := startProgram(t, plain(dir)...).fails(); !strings.Contains(said, "another policy service works in "+dir) {
		t.Errorf("a second process says %s", said)
	}
	// The first one has lost nothing, not even its sockets.
	if _, err := os.Stat(filepath.Join(dir, "etcd.sock")); err != nil {
		t.Error(err)
	}
	first.save("alice@example.org", "9.9.9.9")
	resp, err := first.policies().ListAllowedNets(within(t), &policyv1.ListAllowedNetsRequest{Domain: "example.org"})
	if err != nil || len(resp.GetAllowedNets()) != 1 || resp.GetAllowedNets()[0].GetNets()[0].GetNet() != "9.9.9.9" {
		t.Errorf("%v, %v", resp, err)
	}
}

func TestFoldersThatCannotWork(t *testing.T) {
	for name, test := range map[string]struct{ dir, want string }{
		"a file":   {file(t, ""), "not a directory"},
		"too long": {filepath.Join(dataDir(t), strings.Repeat("a", 100)), "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			if said := start(t, plain(test.dir, "--create-store")...).fails(); !strings.Contains(said, "--data-dir: ") || !strings.Contains(said, test.want) {
				t.Errorf("it says %s", said)
			}
		})
	}
}

// TestProcess shows what only a process of its own can: its signals, its exit codes, its sudden death.
func TestProcess(t *testing.T) {
	dir := dataDir(t)
	t.Run("killed", func(t *testing.T) {
		p := startProgram(t, plain(dir, "--create-store")...)
		p.serving().save("alice@example.org", "8.8.8.8")
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.wait(nil)
	})
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(sig.String(), func(t *testing.T) {
			p := startProgram(t, plain(dir)...)
			p.serving().has("alice@example.org", "8.8.8.8")
			if err := p.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			p.heard("the policy service stopped")
			p.wait(func(code int) {
				if code != 0 {
					t.Errorf("code %d", code)
				}
			})
		})
	}
	t.Run("while another program has the database", func(t *testing.T) {
		db, err := os.Open(filepath.Join(dir, "etcd", "member", "snap", "db"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		if err := syscall.Flock(int(db.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			t.Fatal(err)
		}
		p := startProgram(t, plain(dir)...)
		p.started()
		p.stop()
	})
	t.Run("called wrongly", func(t *testing.T) {
		p := startProgram(t, "--data-dir="+dir)
		p.wait(func(code int) {
			if code != serve.ExitUsage {
				t.Errorf("code %d", code)
			}
		})
		if said := p.rest(); !strings.Contains(said, "--callers is needed") {
			t.Errorf("it says %s", said)
		}
	})
}

// TestLogHoldsNoNames runs a service with everything logged and looks for personal data in its log.
func TestLogHoldsNoNames(t *testing.T) {
	s := start(t, plain(dataDir(t), "--create-store", "--log-level=debug")...).serving()
	policies := s.policies()
	request := saveOf("alice@example.org", "9.9.9.9")
	request.Actor = &policyv1.Actor{Id: "mallory", Address: "8.8.4.4"}
	for _, etag := range []string{"", "stale", ""} {
		request.Etag = etag
		_, _ = policies.SetAllowedNets(within(t), request)
		request.Input = &policyv1.SetAllowedNetsRequest_Text{Text: "9.9.9.9/8, 10.0.0.1"}
	}
	_, _ = policies.GetAllowedNets(within(t), &policyv1.GetAllowedNetsRequest{Mailbox: "alice example.org"})
	_, _ = policies.ListAllowedNets(within(t), &policyv1.ListAllowedNetsRequest{Domain: "example.org", PageToken: "alice"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = policies.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: "alice@example.org"})
	s.stop()
	log := s.rest()
	for _, personal := range []string{"alice", "example.org", "9.9.9.9", "10.0.0.1", "mallory", "8.8.4.4"} {
		if strings.Contains(log, personal) {
			t.Errorf("the log names %s:\n%s", personal, log)
		}
	}
}
