package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// program is a file with another time and mode each time, which an image must not show.
func program(t *testing.T, content string, mode os.FileMode, age time.Duration) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(name, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, time.Time{}, time.Now().Add(-age)); err != nil {
		t.Fatal(err)
	}
	return name
}

func build(t *testing.T, args ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "image.tar")
	var c config
	if err := c.parse(append([]string{"-o", out, "-name", "localhost/program:dev"}, args...)); err != nil {
		t.Fatal(err)
	}
	if err := c.write(); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSameInputSameOctets(t *testing.T) {
	args := []string{"-created=1700000000", "-label=a=b", "-label=c=d", "-env=PATH=/bin"}
	first := build(t, append(args, program(t, "hello", 0o755, time.Hour)+"=/bin/program")...)
	second := build(t, append(args, program(t, "hello", 0o700, 2*time.Hour)+"=/bin/program")...)
	other := build(t, append(args, program(t, "hullo", 0o755, time.Hour)+"=/bin/program")...)
	if !bytes.Equal(read(t, first), read(t, second)) {
		t.Error("two images of the same program differ")
	}
	if bytes.Equal(read(t, first), read(t, other)) {
		t.Error("images of two programs are the same")
	}
}

func TestImage(t *testing.T) {
	out := build(t, "-created=1700000000", "-label=org.opencontainers.image.title=Program", "-env=PATH=/bin", program(t, "hello", 0o755, 0)+"=/bin/program")
	dir := t.TempDir()
	if said, err := exec.CommandContext(t.Context(), "tar", "-xf", out, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 {
		t.Fatalf("%v, %v", manifest, err)
	}
	if got := manifest.Manifests[0].Annotations["io.containerd.image.name"]; got != "localhost/program:dev" {
		t.Errorf("it is named %q", got)
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c := config.Config
	if c.User != "65532:65532" || c.Entrypoint[0] != "/bin/program" || c.Labels["org.opencontainers.image.title"] != "Program" || !config.Created.Equal(time.Unix(1700000000, 0)) {
		t.Errorf("%+v", config)
	}
}

func TestPlatforms(t *testing.T) {
	dir := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		if err := os.WriteFile(filepath.Join(dir, "linux-"+arch), []byte(arch), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := build(t, "-platform=linux/amd64,linux/arm64", dir+"/{os}-{arch}=/program")
	if said, err := exec.CommandContext(t.Context(), "tar", "-xf", out, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	several, err := index.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := several.IndexManifest(); err != nil || len(m.Manifests) != 2 || m.Manifests[1].Platform.Architecture != "arm64" {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestWrongUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"-name=localhost/program"}, "has no tag"},
		{[]string{"-name=localhost/program:dev", "program"}, "SOURCE=/PATH"},
		{[]string{"-name=localhost/program:dev", "program=bin/program"}, "SOURCE=/PATH"},
	} {
		if err := new(config).parse(test.args); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v", test.args, err)
		}
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}
