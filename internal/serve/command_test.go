package serve_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/allowednets/allowednets/internal/serve"
)

func TestCommand(t *testing.T) {
	type flags struct {
		Port    int              `required:"" help:"Such as ${example}."`
		Version kong.VersionFlag `help:"Print the version."`
	}
	type misspelt struct {
		Kind string `enum:"a,b"`
	}
	for name, c := range map[string]struct {
		args   []string
		flags  any
		err    error // of resolve
		code   int
		done   bool
		stdout string
		stderr string
	}{
		"runs":             {args: []string{"--port=7"}},
		"help":             {args: []string{"--help"}, done: true, stdout: "Such as 7490."},
		"healthcheck":      {args: []string{"healthcheck", "--admin-listen=127.0.0.1:1"}, code: 1, done: true, stderr: "healthcheck: "},
		"version":          {args: []string{"--version"}, done: true, stdout: serve.Version()},
		"unknown flag":     {args: []string{"--prot=7"}, code: serve.ExitUsage, done: true, stderr: "thing: unknown flag --prot"},
		"missing flag":     {code: serve.ExitUsage, done: true, stderr: "thing: missing flags: --port=INT"},
		"cannot work":      {args: []string{"--port=7"}, err: errors.New("no such port"), code: serve.ExitUsage, done: true, stderr: "thing: no such port\n"},
		"wrong struct tag": {flags: &misspelt{}, code: serve.ExitFailed, done: true, stderr: "thing: "},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			var f any = new(flags)
			if c.flags != nil {
				f = c.flags
			}
			command := serve.Command{Name: "thing", Description: "Does.", Admin: ":1", Vars: kong.Vars{"example": "7490"}, Stdout: &stdout, Stderr: &stderr}
			resolved := false
			code, done := command.Parse(t.Context(), c.args, f, func() error { resolved = true; return c.err })
			if code != c.code || done != c.done || !strings.Contains(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) {
				t.Errorf("%d, %v\n%s\n%s", code, done, &stdout, &stderr)
			}
			if want := !c.done || c.err != nil; resolved != want {
				t.Errorf("resolved: %v", resolved)
			}
		})
	}
}
