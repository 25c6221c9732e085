package main

import (
	"bytes"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// contents is what somebody who runs an image sees of how it was made.
type contents struct {
	Labels                   map[string]string
	User, Path               string
	Programs                 map[string]string // packages, by the path of what is built from them
	Entrypoint, HealthChecks []string
}

// TestDockerfiles: Docker's own parser accepts them, and they make what `make images` makes, which is what the tests run.
func TestDockerfiles(t *testing.T) {
	script, err := os.ReadFile("../images.sh")
	if err != nil {
		t.Fatal(err)
	}
	images := regexp.MustCompile(`(?m)\bimage ([a-z]+) '([^']+)' (.+)$`).FindAllStringSubmatch(string(script), -1)
	files, err := filepath.Glob("../../images/*.Dockerfile")
	if err != nil || len(files) != len(images) {
		t.Errorf("%d images, but %q, %v", len(images), files, err)
	}
	for _, image := range images {
		t.Run(image[1], func(t *testing.T) {
			want := contents{
				Labels: map[string]string{
					"org.opencontainers.image.title":    image[2],
					"org.opencontainers.image.source":   "https://github.com/allowednets/allowednets",
					"org.opencontainers.image.licenses": "Apache-2.0",
				},
				User: "65532:65532", Path: "/bin", Programs: make(map[string]string),
			}
			for _, program := range strings.Fields(image[3]) {
				from, to, _ := strings.Cut(program, "=")
				want.Programs[to] = "./" + from
				if _, err := os.Stat(filepath.Join("../..", from, "main.go")); err != nil {
					t.Error(err)
				}
				if want.Entrypoint == nil {
					want.Entrypoint, want.HealthChecks = []string{to}, []string{"CMD", to, "healthcheck"}
				}
			}
			for key, value := range want.Labels {
				if key != "org.opencontainers.image.title" && !strings.Contains(string(script), key+"="+value) {
					t.Errorf("images.sh labels no %s=%s", key, value)
				}
			}
			if diff := cmp.Diff(want, dockerfile(t, "../../images/"+image[1]+".Dockerfile")); diff != "" {
				t.Errorf("-images.sh +Dockerfile:\n%s", diff)
			}
		})
	}
}

// dockerfile reads one of ours: a stage that builds into /out for the target platform, and one from scratch.
func dockerfile(t *testing.T, name string) contents {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	stages, _, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(stages) != 2 || stages[0].Name != "build" || stages[0].Platform != "$BUILDPLATFORM" || stages[1].BaseName != "scratch" || stages[1].Platform != "" {
		t.Fatalf("%d stages: %+v", len(stages), stages)
	}
	c := contents{Labels: make(map[string]string), Programs: make(map[string]string)}
	arguments := make(map[string]bool)
	built := make(map[string]string)
	for _, command := range stages[0].Commands {
		switch command := command.(type) {
		case *instructions.ArgCommand:
			for _, arg := range command.Args {
				arguments[arg.Key] = true
			}
		case *instructions.RunCommand:
			for one := range strings.SplitSeq(strings.Join(command.CmdLine, " "), "&&") {
				build := regexp.MustCompile(`^CGO_ENABLED=0 GOOS=\$TARGETOS GOARCH=\$TARGETARCH go build -trimpath -ldflags="-s -w" -o (/out/\S+) (\./\S+)$`).FindStringSubmatch(strings.TrimSpace(one))
				if build == nil {
					t.Fatalf("%q builds otherwise than images.sh", one)
				}
				built[build[1]] = build[2]
			}
		}
	}
	if !arguments["TARGETOS"] || !arguments["TARGETARCH"] {
		t.Errorf("the platform stays unknown: %v", arguments)
	}
	for _, command := range stages[1].Commands {
		switch command := command.(type) {
		case *instructions.LabelCommand:
			for _, label := range command.Labels {
				c.Labels[label.Key] = strings.Trim(label.Value, `"`)
			}
		case *instructions.EnvCommand:
			for _, env := range command.Env {
				if env.Key != "PATH" {
					t.Errorf("%s is set", env.Key)
				}
				c.Path = env.Value
			}
		case *instructions.CopyCommand:
			if command.From != "build" || !cmp.Equal(command.SourcePaths, []string{"/out/"}) {
				t.Errorf("%v is copied from %q", command.SourcePaths, command.From)
			}
			for at, from := range built {
				c.Programs[path.Join(command.DestPath, path.Base(at))] = from
			}
		case *instructions.UserCommand:
			c.User = command.User
		case *instructions.HealthCheckCommand:
			c.HealthChecks = command.Health.Test
		case *instructions.EntrypointCommand:
			c.Entrypoint = command.CmdLine
			if command.PrependShell {
				t.Error("the entrypoint needs a shell")
			}
		default:
			t.Errorf("%s: the image has more than images.sh gives it", command.Name())
		}
	}
	return c
}
