package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// shelf is a policy service that keeps lists in memory. "bad" is a bad entry, and example.net is not ours.
type shelf struct {
	mu      sync.Mutex
	lists   map[string]string
	order   []string // of the mailboxes, as their requests arrived
	actors  []string
	drafts  int
	failing int                             // so many calls get no answer
	hold    func(mailbox string, calls int) // called before a call is answered
	calls   int
}

func (f *shelf) set(req *policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) {
	f.mu.Lock()
	f.calls++
	calls := f.calls
	f.mu.Unlock()
	if f.hold != nil {
		f.hold(req.GetMailbox(), calls)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.actors = append(f.actors, req.GetActor().GetId())
	nets := netTexts(req.GetList().GetNets())
	switch {
	case f.failing > 0:
		f.failing--
		return nil, status.Error(codes.Unavailable, "connection refused")
	case strings.HasSuffix(req.GetMailbox(), "@example.net"):
		return nil, rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED, "the caller may not act in example.net")
	case strings.HasSuffix(req.GetMailbox(), "@denied.example"):
		return nil, rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED, "the caller may not call SetAllowedNets")
	case len(nets) == 0:
		return nil, rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY, "the list is empty")
	case slices.Contains(nets, "bad"):
		i := slices.Index(nets, "bad")
		return nil, rpcerr.New(codes.InvalidArgument, decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID, "1 entry",
			&policyv1.InvalidNets{InvalidNets: []*policyv1.InvalidNet{{Index: int32(i), Text: "bad", Message: `"bad" is no network.`, Suggestions: []string{"8.8.8.8"}}}})
	case req.GetValidateOnly():
		f.drafts++
		return &policyv1.SetAllowedNetsResponse{}, nil
	}
	if f.lists == nil {
		f.lists = make(map[string]string)
	}
	list := strings.Join(nets, " ")
	changed := f.lists[req.GetMailbox()] != list
	f.lists[req.GetMailbox()] = list
	f.order = append(f.order, req.GetMailbox())
	return &policyv1.SetAllowedNetsResponse{Changed: changed}, nil
}

func line(mailbox string, nets ...string) string {
	return fmt.Sprintf(`{"mailbox":%q,"nets":["%s"]}`+"\n", mailbox, strings.Join(nets, `","`))
}

func TestImport(t *testing.T) {
	a, b, c := line("a@example.com", "8.8.8.8"), line("b@example.com", "8.8.8.8", "9.9.9.0/24"), line("c@example.com", "7.7.7.7")
	bad := line("bad@example.com", "8.8.8.8", "bad")
	const badText = "bad@example.com: 1 entry cannot be used\n  entry 2: \"bad\" is no network.\n    instead: 8.8.8.8\n"
	all := map[string]string{"a@example.com": "8.8.8.8", "b@example.com": "8.8.8.8 9.9.9.0/24", "c@example.com": "7.7.7.7"}
	tests := []struct {
		name   string
		shelf  shelf
		term   terminal
		stdin  string
		args   []string
		code   int
		stdout string
		stderr string
		lists  map[string]string // nil: is not looked at
	}{
		{name: "three lists", stdin: a + b + c, stdout: "3 saved, 0 unchanged, 0 refused\n", lists: all},
		{
			name: "as other systems write files", stdin: "\uFEFF" + strings.ReplaceAll(a+"\n"+b+"  \n", "\n", "\r\n") + strings.TrimSuffix(c, "\n"),
			stdout: "3 saved, 0 unchanged, 0 refused\n", lists: all,
		},
		{
			name: "again", stdin: a + b + c + a, shelf: shelf{lists: map[string]string{"a@example.com": "8.8.8.8", "b@example.com": "8.8.8.8"}},
			stdout: "2 saved, 2 unchanged, 0 refused\n", lists: all,
		},
		{name: "nothing", stdout: "0 saved, 0 unchanged, 0 refused\n", lists: nil},
		{
			name: "a bad line ends it", stdin: a + bad + b, args: []string{"--workers=1"}, code: exitUsage,
			stdout: "1 saved, 0 unchanged, 1 refused\n",
			stderr: "line 2, " + badText + "allowednets: stopped at line 2. Correct it, or give --continue-on-error. To continue, repeat the command with --from-line=2\n",
		},
		{
			name: "the first line is bad", stdin: bad, code: exitUsage,
			stdout: "0 saved, 0 unchanged, 1 refused\n",
			stderr: "line 1, " + badText + "allowednets: stopped at line 1. Correct it, or give --continue-on-error. To begin again, repeat the command.\n",
		},
		{
			name: "every bad line is named, in order", args: []string{"--continue-on-error"}, code: exitUsage,
			stdin: a + bad + "{}\n" + "nonsense\n" + line("x@example.net", "8.8.8.8") + `{"mailbox":"d@example.com","nets":[]}` + "\n" +
				`{"mailbox":"` + strings.Repeat("d", maxLine) + "\n" + b + "\xff\n" + bad + c,
			stdout: "3 saved, 0 unchanged, 8 refused\n",
			stderr: "line 2, " + badText +
				"line 3: \"\" has no domain; write the mailbox as local@domain\n" +
				"line 4: not a JSON object as export writes it: invalid character 'o' in literal null (expecting 'u')\n" +
				"line 5, x@example.net: the caller may not act in example.net\n" +
				"line 6, d@example.com: the list is empty; leave the line out, and lift a restriction with allowednets clear\n" +
				"line 7: the line is longer than 1048576 octets\n" +
				"line 9: the line is not UTF-8 text\n" +
				"line 10, " + badText,
			lists: all,
		},
		{
			name: "bad lines in JSON", args: []string{"--continue-on-error", "--output=json"}, code: exitUsage,
			stdin:  line("x@example.net", "8.8.8.8") + "{}\n" + a,
			stdout: `{"lines":3,"saved":1,"unchanged":0,"refused":2,"without_list":0,"validate_only":false}` + "\n",
			stderr: `{"line":1,"mailbox":"x@example.net","error":{"code":7,"message":"the caller may not act in example.net",` +
				`"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"DOMAIN_NOT_PERMITTED","domain":"allowednets"}]}}` + "\n" +
				`{"line":2,"mailbox":"","error":{"code":3,"message":"\"\" has no domain; write the mailbox as local@domain"}}` + "\n",
		},
		{
			name: "a bad line that ends it, in JSON", args: []string{"--output=json"}, stdin: "{}\n", code: exitUsage,
			stdout: `{"lines":0,"saved":0,"unchanged":0,"refused":1,"without_list":0,"validate_only":false}` + "\n",
			stderr: `{"line":1,"mailbox":"","error":{"code":3,"message":"\"\" has no domain; write the mailbox as local@domain"}}` + "\n" +
				"allowednets: stopped at line 1. Correct it, or give --continue-on-error. To begin again, repeat the command.\n",
		},
		{
			name: "dry run", args: []string{"--dry-run", "--continue-on-error"}, stdin: a + bad + b, code: exitUsage,
			stdout: "2 could be saved, 1 refused\n", stderr: "line 2, " + badText, lists: map[string]string{},
		},
		{
			name: "from a line", args: []string{"--from-line=3"}, stdin: a + bad + b + c, stdout: "2 saved, 0 unchanged, 0 refused\n",
			lists: map[string]string{"b@example.com": "8.8.8.8 9.9.9.0/24", "c@example.com": "7.7.7.7"},
		},
		{
			name: "from a line that is not there", args: []string{"--from-line=5"}, stdin: a + b, code: exitUsage,
			stdout: "0 saved, 0 unchanged, 0 refused\n",
			stderr: "allowednets: the input ends at line 2, before the line where to begin\n",
		},
		{
			name: "from the line behind the last", args: []string{"--from-line=3"}, stdin: a + b, stdout: "0 saved, 0 unchanged, 0 refused\n",
		},
		{
			name: "an outage that ends", args: []string{"--workers=1"}, shelf: shelf{failing: 3}, stdin: a + b + c,
			stdout: "3 saved, 0 unchanged, 0 refused\n", lists: all,
			stderr: strings.Repeat("allowednets: no answer: connection refused. Asking again, for up to 10s.\n", 3),
		},
		{
			name: "an outage that does not end", args: []string{"--workers=1", "--timeout=2s"}, shelf: shelf{failing: 1 << 30}, stdin: a, code: exitUnavailable,
			stdout: "0 saved, 0 unchanged, 0 refused\n",
			stderr: strings.Repeat("allowednets: no answer: connection refused. Asking again, for up to 2s.\n", 4) +
				"allowednets: no answer: connection refused\nIs the service running, and is this the right place? --policy-address is localhost:7443, " +
				"--sidecar is unix:/run/allowednets/sidecar.sock.\nallowednets: stopped at line 1. To begin again, repeat the command.\n",
		},
		{
			name: "not permitted at all", args: []string{"--workers=1", "--continue-on-error"}, stdin: a + line("x@denied.example", "8.8.8.8") + b, code: exitDenied,
			stdout: "1 saved, 0 unchanged, 0 refused\n",
			stderr: "allowednets: the caller may not call SetAllowedNets\nallowednets: stopped at line 2. To continue, repeat the command with --from-line=2\n",
		},
		{
			name: "a terminal", term: terminal{errLive: true}, args: []string{"--workers=1", "--continue-on-error"}, stdin: a + bad + b,
			shelf: shelf{hold: func(string, int) { time.Sleep(150 * time.Millisecond) }}, code: exitUsage,
			stdout: "2 saved, 0 unchanged, 1 refused\n",
			stderr: "\rline 1: 1 saved, 0 unchanged, 0 refused\x1b[K\r\x1b[Kline 2, " + badText + "\rline 2: 1 saved, 0 unchanged, 1 refused\x1b[K\r\x1b[K",
		},
		{
			name: "a passwd-file", args: []string{"--format=dovecot-passwd-file", "--default-domain=example.com", "--actor=carol"},
			stdin: "# users\nroot:x:0:0:::\na:{PLAIN}secret::::::allow_nets=8.8.8.8\nb@example.com:x::::::nopassword=y allow_nets=8.8.8.8,9.9.9.0/24\n" +
				"c:x::::::allow_nets=local,7.7.7.7\n",
			stdout: "3 saved, 0 unchanged, 0 refused, 1 without allow_nets\n", lists: all,
			stderr: "line 5, c@example.com: \"local\", for logins without a network address, is left out\n",
		},
		{
			name: "a passwd-file with bad lines", args: []string{"--format=dovecot-passwd-file", "--continue-on-error"}, code: exitUsage,
			stdin:  "a:{PLAIN}secret::::::allow_nets=8.8.8.8\nbad@example.com:x::::::allow_nets=8.8.8.8,bad\nbad@example.com:y\n",
			stdout: "0 saved, 0 unchanged, 3 refused, 0 without allow_nets\n",
			stderr: "line 1: the user \"a\" has no domain; --default-domain completes such names\nline 2, " + badText +
				"line 3, bad@example.com: the mailbox stands on line 2 already, and that is the line which Dovecot uses\n",
		},
		{
			name: "no such file", args: []string{"does-not-exist"}, code: exitUsage,
			stderr: "allowednets: open does-not-exist: no such file or directory\n",
		},
		{
			name: "two beginnings", args: []string{"--from-line=3", "--resume=x"}, code: exitUsage,
			stderr: "allowednets: --from-line and --resume contradict each other: give one\n",
		},
		{
			name: "resuming a dry run", args: []string{"--dry-run", "--resume=x"}, code: exitUsage,
			stderr: "allowednets: --dry-run and --resume contradict each other: a dry run does nothing that could be continued\n",
		},
		{
			name: "a domain that is not used", args: []string{"--default-domain=x"}, code: exitUsage,
			stderr: "allowednets: --default-domain is for --format=dovecot-passwd-file only\n",
		},
		{
			name: "too many workers", args: []string{"--workers=257"}, code: exitUsage,
			stderr: "allowednets: --workers must be from 1 to 256, not 257\n",
		},
	}
	for i := range tests {
		tt := &tests[i]
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := executeOn(t, tt.term, &services{set: tt.shelf.set}, tt.stdin, append([]string{"import"}, tt.args...)...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if diff := cmp.Diff(tt.stdout, stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.stderr, stderr); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			if tt.lists != nil && !maps.Equal(tt.lists, tt.shelf.lists) {
				t.Errorf("lists %q, want %q", tt.shelf.lists, tt.lists)
			}
		})
	}
}

// Lines of one mailbox, however it is spelled, are saved in their order while others overtake them.
func TestImportKeepsTheOrderOfAMailbox(t *testing.T) {
	var input strings.Builder
	want := make(map[string]string)
	for i := range 400 {
		mailbox, net := fmt.Sprintf("m%d@example.com", i%7), fmt.Sprintf("8.8.%d.%d", i/256, i%256)
		want[mailbox] = net
		if i%2 == 0 {
			mailbox = strings.ToUpper(mailbox)
		}
		input.WriteString(line(mailbox, net))
	}
	last := make(map[string]string)
	f := &shelf{hold: func(_ string, calls int) { time.Sleep(time.Duration(calls*7919%13) * time.Millisecond) }}
	code, stdout, stderr := execute(t, &services{set: func(req *policyv1.SetAllowedNetsRequest) (*policyv1.SetAllowedNetsResponse, error) {
		resp, err := f.set(req)
		f.mu.Lock()
		defer f.mu.Unlock()
		last[req.GetMailbox()] = req.GetList().GetNets()[0].GetNet()
		return resp, err
	}}, input.String(), "import")
	if code != exitOK || stdout != "400 saved, 0 unchanged, 0 refused\n" || stderr != "" {
		t.Fatalf("exit code %d, %s%s", code, stdout, stderr)
	}
	if diff := cmp.Diff(want, f.lists); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	overtaken := false
	for i, mailbox := range f.order {
		overtaken = overtaken || mailbox != fmt.Sprintf("m%d@example.com", i%7)
	}
	if !overtaken {
		t.Error("nothing went on at the same time")
	}
}

// A mailbox whose save hangs does not let the rest of the file into memory.
func TestImportIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		input := &countingReader{r: io.MultiReader(strings.NewReader(line("slow@example.com", "8.8.8.8")), &endless{})}
		free := make(chan struct{})
		f := &shelf{hold: func(mailbox string, _ int) {
			if mailbox == "slow@example.com" {
				<-free
			}
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan int)
		go func() {
			done <- run(ctx, []string{"--insecure-plaintext", "--timeout=1h", "import", "--workers=4"},
				terminal{in: input, out: io.Discard, err: io.Discard}, start(t, &services{set: f.set}))
		}()
		synctest.Wait()
		f.mu.Lock()
		calls := f.calls
		f.mu.Unlock()
		if most := 4 * linesPerWorker; calls > most || calls < most/2 {
			t.Errorf("%d lines were worked on", calls)
		}
		if most := int64(1<<16 + 5*linesPerWorker*100); input.n > most {
			t.Errorf("%d octets were read", input.n)
		}
		cancel()
		close(free)
		if code := <-done; code != exitUnavailable {
			t.Errorf("exit code %d", code)
		}
	})
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// endless is a file of lists without end.
type endless struct {
	rest []byte
	next int
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.rest) == 0 {
		e.next++
		e.rest = []byte(line(fmt.Sprintf("m%d@example.com", e.next), "8.8.8.8"))
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

// Interrupted at any line and continued, an import ends as if it had not been interrupted.
func TestImportResumes(t *testing.T) {
	const lines = 60
	var input strings.Builder
	want := make(map[string]string)
	for i := range lines {
		if i%10 == 5 {
			input.WriteString("nonsense\n")
			continue
		}
		mailbox := fmt.Sprintf("m%d@example.com", i%17)
		want[mailbox] = fmt.Sprintf("8.8.8.%d", i)
		input.WriteString(line(mailbox, want[mailbox]))
	}
	for stopAt := 1; stopAt < 50; stopAt += 3 {
		t.Run(fmt.Sprint(stopAt), func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			f := &shelf{}
			var first, second bytes.Buffer
			args := []string{"--insecure-plaintext", "import", "--continue-on-error", "--workers=3", "--resume=" + state}
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				f.hold = func(_ string, calls int) {
					if calls == stopAt {
						cancel()
					}
					time.Sleep(time.Duration(calls*7919%13) * time.Millisecond)
				}
				code := run(ctx, args, terminal{in: strings.NewReader(input.String()), out: &first, err: &first}, start(t, &services{set: f.set}))
				if code != exitUnavailable {
					t.Errorf("exit code %d\n%s", code, &first)
				}
			})
			if !strings.Contains(first.String(), "interrupted at line ") || !strings.Contains(first.String(), "--resume="+state) {
				t.Errorf("the first run says\n%s", &first)
			}
			if _, err := os.Stat(state); err != nil {
				t.Error(err)
			}
			synctest.Test(t, func(t *testing.T) {
				f.hold = nil
				code := run(t.Context(), args, terminal{in: strings.NewReader(input.String()), out: &second, err: &second}, start(t, &services{set: f.set}))
				if code != exitUsage {
					t.Errorf("exit code %d\n%s", code, &second)
				}
			})
			if diff := cmp.Diff(want, f.lists); diff != "" {
				t.Errorf("(-want +got):\n%s\n%s%s", diff, &first, &second)
			}
			if n := strings.Count(first.String()+second.String(), "not a JSON object"); n != lines/10 {
				t.Errorf("%d bad lines were named\n%s%s", n, &first, &second)
			}
			if _, err := os.Stat(state); err == nil {
				t.Error("the state is still there")
			}
		})
	}
}

func TestImportDoesNotResumeWhatIsDifferent(t *testing.T) {
	input := line("a@example.com", "8.8.8.8") + line("b@example.com", "8.8.8.8") + "nonsense\n"
	dir := t.TempDir()
	stateFile := filepath.Join(dir, "state")
	code, _, stderr := execute(t, &services{set: new(shelf).set}, input, "import", "--resume="+stateFile)
	if code != exitUsage || !strings.Contains(stderr, "stopped at line 3. Correct it, or give --continue-on-error. To continue, repeat the command with --resume="+stateFile) {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	tests := []struct {
		name, stdin, state, stderr string
	}{
		{"another file", strings.Replace(input, "b@", "c@", 1), "", "allowednets: the input is not the one that " + stateFile + " was written for: its first 2 lines are different\n"},
		{"a shorter file", line("a@example.com", "8.8.8.8"), "", "allowednets: the input ends at line 1, before the line where to begin\n"},
		{"a state that is none", input, "x", fmt.Sprintf("allowednets: --resume: %q is not the state of an import; remove it to begin at the first line\n", stateFile)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.state != "" {
				if err := os.WriteFile(stateFile, []byte(tt.state), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f := new(shelf)
			code, _, stderr := execute(t, &services{set: f.set}, tt.stdin, "import", "--resume="+stateFile)
			if code != exitUsage || stderr != tt.stderr || f.calls > 0 {
				t.Errorf("exit code %d after %d calls: %s", code, f.calls, stderr)
			}
			if text, err := os.ReadFile(stateFile); err != nil || tt.state == "" && !strings.Contains(string(text), `"line":2`) {
				t.Errorf("the state is %q: %v", text, err)
			}
		})
	}
	if code, _, stderr := execute(t, &services{set: new(shelf).set}, input, "import", "--resume="+filepath.Join(dir, "no", "where")); code != exitUsage || !strings.Contains(stderr, "cannot write beside") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}
