package livefile_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) count(s string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.buf.String(), s)
}

// fixture is a file that holds a word; "broken" is none.
type fixture struct {
	t       *testing.T
	path    string
	log     buffer
	metrics *prometheus.Registry
	watcher *livefile.Watcher
	file    *livefile.File[string]
}

func parse(data []byte) (string, error) {
	if word := string(data); !strings.HasPrefix(word, "broken") {
		return word, nil
	}
	return "", errors.New("it is broken")
}

func open(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, path: filepath.Join(t.TempDir(), "file"), metrics: prometheus.NewRegistry()}
	f.write("one")
	var err error
	if f.watcher, err = livefile.NewWatcher(slog.New(slog.NewTextHandler(&f.log, nil)), f.metrics); err != nil {
		t.Fatal(err)
	}
	if f.file, err = livefile.Open(f.watcher, "words", f.path, parse); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) write(content string) {
	f.t.Helper()
	if err := os.WriteFile(f.path, []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) want(word, metrics string) {
	f.t.Helper()
	if got := f.file.Latest(); got != word {
		f.t.Errorf("it holds %q, want %q", got, word)
	}
	if err := testutil.GatherAndCompare(f.metrics, strings.NewReader(metrics+"\n"), "allowednets_dashboard_file_reloads_total", "allowednets_dashboard_file_current"); err != nil {
		f.t.Error(err)
	}
}

func metrics(current, ok, failed string) string {
	return `# HELP allowednets_dashboard_file_current 1 if what the file holds is in force; 0 if it is broken and what it held before is.
# TYPE allowednets_dashboard_file_current gauge
allowednets_dashboard_file_current{file="words"} ` + current + `
# HELP allowednets_dashboard_file_reloads_total Changed files that were read again, by what came of it.
# TYPE allowednets_dashboard_file_reloads_total counter
allowednets_dashboard_file_reloads_total{file="words",result="failed"} ` + failed + `
allowednets_dashboard_file_reloads_total{file="words",result="ok"} ` + ok
}

func TestChanges(t *testing.T) {
	f := open(t)
	f.want("one", metrics("1", "0", "0"))
	f.write("two")
	f.want("two", metrics("1", "1", "0"))
	f.write("six") // as long, and at once
	f.want("six", metrics("1", "2", "0"))
	f.write("broken")
	f.want("six", metrics("0", "2", "1"))
	f.want("six", metrics("0", "2", "1")) // told once
	f.write("broken differently")
	f.want("six", metrics("0", "2", "2"))
	f.write("six")
	f.want("six", metrics("1", "3", "2"))
	if err := os.Remove(f.path); err != nil {
		t.Fatal(err)
	}
	f.want("six", metrics("0", "3", "3"))
	f.want("six", metrics("0", "3", "3"))
	f.write("six")
	f.want("six", metrics("1", "4", "3"))
	if n := f.log.count("a file is broken"); n != 3 {
		t.Errorf("%d lines about a broken file", n)
	}
	// A change long after the last look, with the old time of modification, is one of another size or another file.
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(f.path, long, long); err != nil {
		t.Fatal(err)
	}
	f.want("six", metrics("1", "4", "3"))
	other := f.path + ".new"
	if err := os.WriteFile(other, []byte("ten"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(other, long, long); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, f.path); err != nil {
		t.Fatal(err)
	}
	f.want("ten", metrics("1", "5", "3"))
}

// TestLinkedFolder: Kubernetes exchanges the link to the folder in which the files of a ConfigMap or Secret are.
func TestLinkedFolder(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"v1", "v2"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, version, "file"), []byte(version), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("v1", filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	w, err := livefile.NewWatcher(slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	f, err := livefile.Open(w, "words", filepath.Join(dir, "data", "file"), parse)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("v2", filepath.Join(dir, "new")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	if got := f.Latest(); got != "v2" {
		t.Errorf("it holds %q", got)
	}
}

// TestRun: nobody has to ask.
func TestRun(t *testing.T) {
	f := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- f.watcher.Run(ctx) }()
	f.write("two")
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	for f.file.Get() != "two" {
		select {
		case <-deadline.C:
			t.Fatal("the change was not seen")
		case <-time.After(10 * time.Millisecond):
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	f := open(t)
	f.write("broken")
	if _, err := livefile.Open(f.watcher, "other", f.path, parse); err == nil || err.Error() != f.path+": it is broken" {
		t.Errorf("a broken file: %v", err)
	}
	if _, err := livefile.Open(f.watcher, "other", f.path+".missing", parse); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := livefile.Open(f.watcher, "other", t.TempDir(), parse); err == nil {
		t.Error("a folder was read")
	}
}

func TestDecode(t *testing.T) {
	type doc struct {
		Name string   `yaml:"name"`
		List []string `yaml:"list"`
	}
	for text, want := range map[string]string{
		"":                     "",
		"name: a\nlist: [b]":   "",
		"name: a\nother: b":    "line 2: field other not found",
		"name: [a]":            "line 1",
		"name: a\n---\nlist: ": "more than one YAML document",
		"name: 'a":             "yaml: ",
	} {
		err := livefile.Decode([]byte(text), new(doc))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
