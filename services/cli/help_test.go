package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/allowednets/allowednets/internal/serve"
)

func TestVersion(t *testing.T) {
	code, stdout, stderr := execute(t, &services{}, "", "--version")
	if code != exitOK || stderr != "" || stdout != serve.Version()+"\n" {
		t.Errorf("exit code %d, stderr %q, stdout %q", code, stderr, stdout)
	}
}

func TestHelp(t *testing.T) {
	code, stdout, stderr := execute(t, &services{}, "", "--help")
	if code != exitOK || stderr != "" || !strings.Contains(stdout, "ALLOWEDNETS_POLICY_ADDRESS") || !strings.Contains(stdout, "Ask a sidecar") {
		t.Errorf("exit code %d, stderr %q, stdout:\n%s", code, stderr, stdout)
	}
}

// Every command's help has two examples that this program understands, and its exit codes.
func TestHelpTeaches(t *testing.T) {
	var flags commandLine
	parser, err := newParser(&flags, terminal{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	example := regexp.MustCompile(`(?m)^    .*?(allowednets (?:'[^'\n]*'|[^|<>()'\n])+)`)
	word := regexp.MustCompile(`(?:'[^']*'|[^ '])+`)
	for _, command := range parser.Model.Children {
		t.Run(command.Name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if code := run(t.Context(), []string{command.Name, "--help"}, terminal{out: &out, err: &errs}, nil); code != exitOK {
				t.Fatalf("exit code %d: %s", code, &errs)
			}
			examples := example.FindAllStringSubmatch(out.String(), -1)
			if len(examples) < 2 || !strings.Contains(out.String(), "Exit codes: 0 ") {
				t.Errorf("the help has %d examples:\n%s", len(examples), &out)
			}
			for _, e := range examples {
				words := word.FindAllString(strings.ReplaceAll(strings.TrimSpace(e[1]), `"`, ""), -1)
				for i := range words {
					words[i] = strings.ReplaceAll(words[i], "'", "")
				}
				parser, err := newParser(new(commandLine), terminal{}, func(int) { t.Errorf("%q asks for help", words) })
				if err != nil {
					t.Fatal(err)
				}
				parsed, err := parser.Parse(words[1:])
				if err != nil || parsed.Selected().Name != command.Name {
					t.Errorf("example %q: %v", words, err)
				}
			}
		})
	}
}
