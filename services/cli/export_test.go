package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

func TestExport(t *testing.T) {
	bob := &policyv1.AllowedNets{Mailbox: "b&<@example.com", Nets: netList("9.9.9.9"), UpdatedBy: "<dave>"}
	pages := []*policyv1.ListAllowedNetsResponse{
		{AllowedNets: []*policyv1.AllowedNets{sample()}, NextPageToken: "1", TotalSize: 2},
		{AllowedNets: []*policyv1.AllowedNets{bob}, TotalSize: 2},
	}
	const text = `{"mailbox":"alice@example.com","nets":["8.8.8.0/24","2a00:1450::/32"],"update_time":"2026-11-23T16:05:09.001Z","updated_by":"carol"}` + "\n" +
		`{"mailbox":"b&<@example.com","nets":["9.9.9.9"],"updated_by":"<dave>"}` + "\n"
	unsteady := []*policyv1.ListAllowedNetsResponse{pages[0], {AllowedNets: []*policyv1.AllowedNets{bob}, TotalSize: 3}}
	gone := status.Error(codes.Unavailable, "connection reset")
	dir := t.TempDir()
	file := filepath.Join(dir, "lists.jsonl")
	runTable(t, []golden{
		{
			name: "all", fake: services{pages: pages}, args: []string{"export"},
			request: &policyv1.ListAllowedNetsRequest{PageSize: 1000, PageToken: "1"}, stdout: text,
		},
		{
			name: "a domain, through an outage", fake: services{pages: pages, firstErrs: []error{gone, gone, gone}}, args: []string{"export", "--domain=example.com", "-"},
			request: &policyv1.ListAllowedNetsRequest{Domain: "example.com", PageSize: 1000, PageToken: "1"}, stdout: text,
		},
		{name: "none", fake: services{pages: []*policyv1.ListAllowedNetsResponse{{}}}, args: []string{"export"}},
		{
			name: "the policy service gives less than it counts", fake: services{pages: []*policyv1.ListAllowedNetsResponse{{AllowedNets: []*policyv1.AllowedNets{sample()}, TotalSize: 2}}},
			args: []string{"export"}, code: exitUnavailable,
			stderr: "allowednets: what was written is not complete: the policy service counts 2 lists and gave 1\n",
		},
		{
			name: "a list is added meanwhile", fake: services{pages: unsteady}, args: []string{"export"}, code: exitUnavailable,
			stderr: "allowednets: what was written is not complete: lists were added or lifted while they were read (2 before, 3 now)\n",
		},
		{
			name: "a page that repeats", fake: services{pages: []*policyv1.ListAllowedNetsResponse{{NextPageToken: "0"}}}, args: []string{"export"}, code: exitUnavailable,
			stderr: "allowednets: what was written is not complete: the policy service answered the same page twice\n",
		},
		{
			name: "not permitted", args: []string{"export"}, code: exitDenied,
			fake:   services{err: rpcerr.New(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_DOMAIN_NOT_PERMITTED, "the caller may act in some domains only; name one")},
			stderr: "allowednets: the caller may act in some domains only; name one\n",
		},
		{
			name: "to a file", fake: services{pages: pages}, args: []string{"export", file}, stdout: "Exported 2 lists to " + file + "\n",
		},
		{
			name: "to a file, JSON", fake: services{pages: pages}, args: []string{"export", file, "--output=json"}, stdout: "{\"lists\":2}\n",
		},
		{
			name: "to a file, lists keep coming", fake: services{pages: unsteady}, args: []string{"export", file}, code: exitUnavailable,
			stderr: strings.Repeat("allowednets: lists were added or lifted while they were read (2 before, 3 now). Reading again.\n", 2) +
				"allowednets: " + file + " was not written: the export is not complete: lists were added or lifted while they were read (2 before, 3 now)\n",
		},
		{
			name: "to a folder", fake: services{pages: pages}, args: []string{"export", dir}, code: exitUsage,
			stderr: "allowednets: \"" + dir + "\" is not a regular file; - writes to standard output\n",
		},
		{
			name: "to nowhere", fake: services{pages: pages}, args: []string{"export", filepath.Join(dir, "no", "where")}, code: exitUsage,
			stderr: "allowednets: cannot write beside \"" + filepath.Join(dir, "no", "where") + "\": open " + filepath.Join(dir, "no", "where.<random>.partial") + ": no such file or directory\n",
		},
	})
	if got, err := os.ReadFile(file); err != nil || string(got) != text { // the failed export left it alone
		t.Errorf("%s: %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 {
		t.Errorf("files left: %q", left)
	}
}

func TestExportShowsProgressOnATerminal(t *testing.T) {
	pages := []*policyv1.ListAllowedNetsResponse{
		{AllowedNets: []*policyv1.AllowedNets{sample()}, NextPageToken: "1", TotalSize: 2},
		{AllowedNets: []*policyv1.AllowedNets{sample()}, TotalSize: 2},
	}
	gone := status.Error(codes.Unavailable, "connection reset")
	fake := &services{pages: pages, firstErrs: []error{gone}} // whose repetition takes longer than a progress line lasts
	code, _, stderr := executeOn(t, terminal{errLive: true}, fake, "", "export")
	if want := "\rexported 1 of 2\x1b[K\r\x1b[K"; code != exitOK || stderr != want {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}

// What one field of an import restores is what an export writes into it.
func TestExportedLinesAreImported(t *testing.T) {
	list := sample()
	list.UpdateTime = timestamppb.New(time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC))
	code, stdout, stderr := execute(t, &services{pages: []*policyv1.ListAllowedNetsResponse{{AllowedNets: []*policyv1.AllowedNets{list}, TotalSize: 1}}}, "", "export")
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if got, want := show(parseJSON([]byte(stdout), 1)), `alice@example.com ["8.8.8.0/24" "2a00:1450::/32"] `; got != want {
		t.Errorf("%s became %s", stdout, got)
	}
}

func TestReplaceFileLeavesTheOldOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write := func(text string, err error) error {
		return replaceFile(path, func(f *os.File) error {
			_, _ = f.WriteString(text)
			return err
		})
	}
	if err := write("old", nil); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("disk full")
	if err := write("new", broken); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "old" {
		t.Errorf("%q, %v", text, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}
