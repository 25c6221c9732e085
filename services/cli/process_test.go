package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// asProgram, in the environment, makes the test binary the program itself, so that tests can run and kill it.
const asProgram = "ALLOWEDNETS_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	goleak.VerifyTestMain(tests{m})
}

// tests are all tests; what they built is removed behind them.
type tests struct{ m *testing.M }

func (t tests) Run() int {
	code := t.m.Run()
	if binaries.dir != "" {
		_ = os.RemoveAll(binaries.dir)
	}
	return code
}

// binaries are what the tests built.
var binaries struct {
	once sync.Once
	dir  string
	err  error
}

// policyBinary builds the policy service, once for all tests. The command line may not import it.
func policyBinary(t *testing.T) string {
	t.Helper()
	binaries.once.Do(func() {
		if binaries.dir, binaries.err = os.MkdirTemp("", "allowednets-cli-"); binaries.err != nil {
			return
		}
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "go", "build", "-o", filepath.Join(binaries.dir, "allowednets-policy"), "../policy")
		if out, err := cmd.CombinedOutput(); err != nil {
			binaries.err = fmt.Errorf("building the policy service: %w\n%s", err, out)
		}
	})
	if binaries.err != nil {
		t.Fatal(binaries.err)
	}
	return filepath.Join(binaries.dir, "allowednets-policy")
}

// programScript returns the path of an executable called allowednets.
func programScript(t *testing.T, dir string) string {
	t.Helper()
	test, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "bin", "allowednets")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nexec env GORACE=atexit_sleep_ms=0 %s=1 '%s' \"$@\"\n", asProgram, test)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// policyService is a real policy service with its own etcd.
type policyService struct {
	t       *testing.T
	data    string
	address string
	cmd     *exec.Cmd
}

// startPolicy creates a store and serves it.
func startPolicy(t *testing.T) *policyService {
	t.Helper()
	p := &policyService{t: t, data: t.TempDir(), address: "127.0.0.1:0"}
	p.start("--create-store")
	t.Cleanup(p.kill)
	return p
}

// start starts the process and waits until it serves.
func (p *policyService) start(more ...string) {
	p.t.Helper()
	args := append([]string{"--insecure-plaintext", "--listen=" + p.address, "--admin-listen=127.0.0.1:0", "--data-dir=" + p.data}, more...)
	p.cmd = exec.CommandContext(context.WithoutCancel(p.t.Context()), policyBinary(p.t), args...) // kill ends it
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}                                       // Ctrl-C at the tests is not for it
	logs, err := p.cmd.StderrPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	var all bytes.Buffer
	for lines := bufio.NewScanner(logs); lines.Scan(); {
		all.Write(append(lines.Bytes(), '\n'))
		var record struct{ Msg, Address string }
		if json.Unmarshal(lines.Bytes(), &record) == nil && record.Msg == "serving" {
			p.address = record.Address
			go func() { // so that it can go on logging; ends with the process
				for lines.Scan() {
					continue
				}
			}()
			return
		}
	}
	p.kill()
	p.t.Fatalf("the policy service did not start:\n%s", &all)
}

func (p *policyService) kill() {
	_ = p.cmd.Process.Kill()
	_, _ = p.cmd.Process.Wait() // not Cmd.Wait, which would take the pipe from its reader
}

// command returns the program as a process that talks to address.
func command(t *testing.T, address string, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), os.Args[0], append([]string{"--insecure-plaintext", "--policy-address=" + address, "--timeout=60s"}, args...)...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0")
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

// runCommand runs the program to its end.
func runCommand(t *testing.T, address string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd, out, errs := command(t, address, args...)
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// must runs the program, which must succeed, and returns what it writes.
func must(t *testing.T, address string, args ...string) string {
	t.Helper()
	code, stdout, stderr := runCommand(t, address, args...)
	if code != exitOK || stderr != "" {
		t.Fatalf("%q: exit code %d\n%s%s", args, code, stdout, stderr)
	}
	return stdout
}

// await calls probe until it is true.
func await(t *testing.T, what string, probe func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for !probe() {
		if !pause(ctx, 5*time.Millisecond) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// writeLists writes n lists, of which every one is different.
func writeLists(t *testing.T, path string, n int) {
	t.Helper()
	var b bytes.Buffer
	for i := range n {
		nets := fmt.Sprintf(`"%d.%d.%d.0/24"`, 20+i%79, i/256%256, i%256)
		for j := range i % 5 {
			nets += fmt.Sprintf(`,"2a00:%x:%x::/48"`, j, i&0xffff)
		}
		fmt.Fprintf(&b, `{"mailbox":"user%d@%c.example.com","nets":[%s]}`+"\n", i, 'a'+i%7, nets)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// restored is what an import restores of an export: everything but when and by whom a list was saved.
func restored(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(regexp.MustCompile(`,"update_time":"[^"]*","updated_by":"[^"]*"}`).ReplaceAllString(string(text), "}"), "\n")
}

func compareExports(t *testing.T, want, got string, n int) {
	t.Helper()
	a, b := restored(t, want), restored(t, got)
	if len(a) != n+1 || len(b) != n+1 { // and what is behind the last end of line
		t.Errorf("%d and %d lines of %d", len(a)-1, len(b)-1, n)
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			t.Fatalf("line %d differs:\n%s\n%s", i+1, a[i], b[i])
		}
	}
}

// stateLine is how far the import got that writes the file.
func stateLine(path string) int64 {
	st, err := readState(path)
	if err != nil {
		return -1
	}
	return st.Line
}

// From one store to another, in an import that is killed and interrupted in the middle.
func TestExportImportExport(t *testing.T) {
	n := 10_000
	if os.Getenv("ALLOWEDNETS_LONG") != "" {
		n = 100_000
	}
	if testing.Short() {
		t.Skip("takes a minute")
	}
	dir := t.TempDir()
	lists, first, second, stateFile := filepath.Join(dir, "lists"), filepath.Join(dir, "first"), filepath.Join(dir, "second"), filepath.Join(dir, "state")
	writeLists(t, lists, n)
	began := time.Now()
	lap := func(what string) {
		t.Logf("%s: %s", what, time.Since(began).Round(10*time.Millisecond))
		began = time.Now()
	}
	old := startPolicy(t)
	if got, want := must(t, old.address, "import", lists), fmt.Sprintf("%d saved, 0 unchanged, 0 refused\n", n); got != want {
		t.Errorf("import: %s", got)
	}
	lap("import")
	if got, want := must(t, old.address, "export", first), fmt.Sprintf("Exported %d lists to %s\n", n, first); got != want {
		t.Errorf("export: %s", got)
	}
	lap("export")
	if text := must(t, old.address, "export"); text == "" {
		t.Error("nothing on standard output")
	} else if file, err := os.ReadFile(first); err != nil || !bytes.Equal(file, []byte(text)) {
		t.Errorf("standard output and the file differ: %v", err)
	}
	old.kill()

	began = time.Now()
	fresh := startPolicy(t)
	killed, _, _ := command(t, fresh.address, "import", first, "--resume="+stateFile)
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "an import to kill", func() bool { return stateLine(stateFile) > int64(n/10) })
	_ = killed.Process.Kill()
	_ = killed.Wait()
	from := stateLine(stateFile)
	interrupted, stdout, stderr := command(t, fresh.address, "import", first, "--resume="+stateFile)
	if err := interrupted.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "an import to interrupt", func() bool { return stateLine(stateFile) > from+int64(n/10) })
	_ = interrupted.Process.Signal(os.Interrupt)
	_ = interrupted.Wait()
	if code := interrupted.ProcessState.ExitCode(); code != exitUnavailable || !strings.Contains(stderr.String(), "allowednets: interrupted at line ") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	t.Logf("killed behind line %d, interrupted behind line %d", from, stateLine(stateFile))
	if out := must(t, fresh.address, "import", first, "--resume="+stateFile); !strings.Contains(out, " 0 refused\n") {
		t.Errorf("import: %s", out)
	}
	lap("import in three parts")
	must(t, fresh.address, "export", second)
	compareExports(t, first, second, n)
}

// The policy service is killed in the middle and comes back: the import does not notice much.
func TestImportOutlivesTheServer(t *testing.T) {
	const n = 2000
	dir := t.TempDir()
	lists, exported := filepath.Join(dir, "lists"), filepath.Join(dir, "exported")
	writeLists(t, lists, n)
	p := startPolicy(t)
	cmd, stdout, stderr := command(t, p.address, "import", lists, "--workers=2")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the first saves", func() bool { return strings.Count(must(t, p.address, "list", "a.example.com"), "\n") > 10 })
	p.kill()
	p.start()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s%s", err, stdout, stderr)
	}
	if !strings.Contains(stderr.String(), "Asking again, for up to 1m0s.") {
		t.Errorf("the outage was not noticed, or not told:\n%s", stderr)
	}
	must(t, p.address, "export", exported)
	want := make(map[string]bool)
	for _, l := range restored(t, lists) {
		want[l] = true
	}
	for _, l := range restored(t, exported) {
		if !want[l] {
			t.Errorf("not in the file: %s", l)
		}
		delete(want, l)
	}
	if len(want) > 0 {
		t.Errorf("%d lists are missing", len(want))
	}
}

// What the real policy service says about bad lines.
func TestImportOfBadLines(t *testing.T) {
	p := startPolicy(t)
	file := filepath.Join(t.TempDir(), "users")
	users := "alice:{PLAIN}secret::::::allow_nets=8.8.8.8,2a00:1450::/32\n" +
		"bob:{PLAIN}secret::::::allow_nets=8.8.8.8/24,mail.example.org,9.9.9.9\n" +
		"carol:{PLAIN}secret::::::allow_nets=10.0.0.0/8\n" +
		"dave:{PLAIN}secret::::::\n"
	if err := os.WriteFile(file, []byte(users), 0o600); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := runCommand(t, p.address, "import", file, "--format=dovecot-passwd-file", "--default-domain=example.com", "--continue-on-error")
	if want := "1 saved, 0 unchanged, 2 refused, 1 without allow_nets\n"; code != exitUsage || stdout != want {
		t.Errorf("exit code %d, %s", code, stdout)
	}
	want := `line 2, bob@example.com: 2 entries cannot be used
  entry 1: "8.8.8.8/24" is an address inside the network 8.8.8.0/24; write 8.8.8.8 for the address alone or 8.8.8.0/24 for the whole network.
    instead: 8.8.8.8  or  8.8.8.0/24
  entry 2: "mail.example.org" is a name, and only IP addresses and networks can be listed; write the addresses behind the name.
line 3, carol@example.com: 1 entry cannot be used
  entry 1: "10.0.0.0/8" lies in 10.0.0.0/8 (private use), where no client comes from; list the public address that the Internet sees.
`
	if diff := cmp.Diff(want, stderr); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := must(t, p.address, "list", "example.com"); !strings.Contains(got, "8.8.8.8, 2a00:1450::/32") || strings.Contains(got, "bob") {
		t.Error(got)
	}
}
