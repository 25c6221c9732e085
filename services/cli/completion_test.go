package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCandidates(t *testing.T) {
	tests := []struct {
		name  string
		words []string
		want  string
	}{
		{"commands", []string{"s"}, "set"},
		{"all commands", []string{""}, "set get clear list history explain check propagation delete rename export import completion"},
		{"flags of the program come first", []string{"--timeout", "5s", "pro"}, "propagation"},
		{"the value of a flag is not a command", []string{"--timeout", "s"}, ""},
		{"flags", []string{"history", "--l"}, "--limit"},
		{"flags of the program below a command", []string{"history", "a@b", "--insec"}, "--insecure-plaintext"},
		{"values of a flag", []string{"check", "a@b", "1.2.3.4", "--service", "web"}, "webdav webmail"},
		{"values behind =", []string{"get", "--output=j"}, "--output=json"},
		{"values behind =, as bash cuts it", []string{"get", "--output", "=", "j"}, "json"},
		{"no value yet, as bash cuts it", []string{"get", "--output", "="}, "json text"},
		{"after a value, as bash cuts it", []string{"--output", "=", "json", "ge"}, "get"},
		{"after a flag without a value", []string{"set", "--wait", "a@b", "--et"}, "--etag"},
		{"values of an argument", []string{"completion", ""}, "bash fish zsh"},
		{"files", []string{"import", "li"}, ":files"},
		{"files for a flag", []string{"import", "--resume", ""}, ":files"},
		{"files for TLS", []string{"--tls-ca-file", ""}, ":files"},
		{"one file only", []string{"import", "lists", ""}, ""},
		{"no flags behind --", []string{"get", "--", "--o"}, ""},
		{"nothing known", []string{"get", ""}, ""},
		{"an unknown command", []string{"frob", "--out"}, "--output"},
		{"no words at all", nil, "set get clear list history explain check propagation delete rename export import completion"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			code := run(t.Context(), append([]string{completeCommand}, tt.words...), terminal{out: &out, err: &errs}, nil)
			var words []string
			for line := range strings.Lines(out.String()) {
				word, _, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
				words = append(words, word)
			}
			if code != exitOK || errs.Len() > 0 || strings.Join(words, " ") != tt.want {
				t.Errorf("exit code %d, %q, stderr %q", code, words, &errs)
			}
		})
	}
}

// A shell with the script loaded is asked as it asks itself when somebody presses the tabulator key.
func TestCompletionInShells(t *testing.T) {
	dir := t.TempDir()
	program := programScript(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "some lists.jsonl"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bash := func(words ...string) string {
		quoted := "'" + strings.Join(words, "' '") + "'"
		return `COMP_WORDS=(allowednets ` + quoted + `); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _allowednets; printf '%s\n' "${COMPREPLY[@]}"`
	}
	tests := []struct {
		shell, ask, want string
	}{
		{"bash", bash("pro"), "propagation\n"},
		{"bash", bash("get", "--output", "=", ""), "json\ntext\n"},
		{"bash", bash("import", "some"), "some lists.jsonl\n"},
		{"bash", `complete -p allowednets`, "complete -F _allowednets allowednets\n"},
		{"fish", `complete -C 'allowednets comp'`, "completion\tWrite a completion script for a shell.\n"},
		{"fish", `complete -C 'allowednets get --output=' | sort`, "--output=json\n--output=text\n"},
		{"fish", `complete -C 'allowednets import some'`, "some lists.jsonl\n"},
		{"zsh", zshAsk("pro"), "propagation:Show which sidecars enforce a save.\n"},
		{"zsh", zshAsk("get", "--output=j"), "--output=json\n"},
	}
	for _, tt := range tests {
		t.Run(tt.shell+" "+tt.want, func(t *testing.T) {
			shell, err := exec.LookPath(tt.shell)
			if err != nil {
				if os.Getenv("ALLOWEDNETS_E2E") == "required" {
					t.Fatal(err)
				}
				t.Skipf("NOT TESTED in a real %s: %v", tt.shell, err)
			}
			code, script, stderr := execute(t, &services{}, "", "completion", tt.shell)
			if code != exitOK || stderr != "" {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			cmd := exec.CommandContext(t.Context(), shell, "-c", prelude(tt.shell)+script+"\n"+tt.ask)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"), "HOME="+dir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v", err)
			}
			if diff := cmp.Diff(tt.want, string(out)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// prelude makes zsh's completion functions print what they are given: they work in its line editor only.
func prelude(shell string) string {
	if shell != "zsh" {
		return ""
	}
	return "compdef() { : }; _describe() { print -rl -- \"${(@P)2}\" }; _files() { print -r -- files }\n"
}

func zshAsk(words ...string) string {
	return "words=(allowednets '" + strings.Join(words, "' '") + "'); CURRENT=${#words}; _allowednets"
}

func TestCompletionForNoShell(t *testing.T) {
	code, stdout, stderr := execute(t, &services{}, "", "completion", "tcsh")
	if code != exitUsage || stdout != "" || !strings.Contains(stderr, `must be one of "bash","zsh","fish"`) {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}
