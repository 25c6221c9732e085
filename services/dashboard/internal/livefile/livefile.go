// Package livefile keeps values that are read from YAML files current while an operator edits the files.
package livefile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"
)

// interval is how often the files are looked at. Polling, because a watch would have to know how editors, configuration
// management and Kubernetes (which exchanges a link to a folder) replace a file.
const interval = time.Second

// racy is how long after a change of a file another one may leave its time of modification as it is.
const racy = 2 * time.Second

// maxSize bounds a file, in octets.
const maxSize = 256 << 20

// Watcher looks after files. It is safe for concurrent use.
type Watcher struct {
	log     *slog.Logger
	reloads *prometheus.CounterVec
	current *prometheus.GaugeVec

	mu    sync.Mutex
	files []interface{ look() }
}

// NewWatcher returns a watcher without files.
func NewWatcher(log *slog.Logger, metrics prometheus.Registerer) (*Watcher, error) {
	w := &Watcher{
		log: log,
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_dashboard_file_reloads_total", Help: "Changed files that were read again, by what came of it.",
		}, []string{"file", "result"}),
		current: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "allowednets_dashboard_file_current", Help: "1 if what the file holds is in force; 0 if it is broken and what it held before is.",
		}, []string{"file"}),
	}
	for _, c := range []prometheus.Collector{w.reloads, w.current} {
		if err := metrics.Register(c); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// Run looks at the files every second until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		w.mu.Lock()
		files := w.files
		w.mu.Unlock()
		for _, f := range files {
			f.look()
		}
	}
}

// File is the value of a file. A file that cannot be read or parsed any more leaves the last good value in force, which is
// logged and counted. It is safe for concurrent use.
type File[T any] struct {
	watcher *Watcher
	name    string
	path    string
	parse   func([]byte) (T, error)
	value   atomic.Pointer[T]

	mu      sync.Mutex // guards what follows
	info    os.FileInfo
	read    time.Time
	sum     [sha256.Size]byte // of the content that was parsed last
	wrong   error             // with that content
	problem error             // now: with the content, or with reading it
}

// Open reads the file at path and looks after it. name is the label of its metrics.
func Open[T any](w *Watcher, name, path string, parse func([]byte) (T, error)) (*File[T], error) {
	f := &File[T]{watcher: w, name: name, path: path, parse: parse}
	if f.load(); f.problem != nil {
		return nil, f.problem
	}
	w.current.WithLabelValues(name).Set(1)
	for _, result := range []string{"ok", "failed"} {
		w.reloads.WithLabelValues(name, result)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.files = append(slices.Clip(w.files), f)
	return f, nil
}

// Get returns the value that is in force.
func (f *File[T]) Get() T { return *f.value.Load() }

// Latest is Get after a look at the file, for what must not be a second late.
func (f *File[T]) Latest() T {
	f.look()
	return f.Get()
}

// look reads the file again if it changed, and tells.
func (f *File[T]) look() {
	f.mu.Lock()
	before := f.problem
	parsed := f.load()
	problem := f.problem
	f.mu.Unlock()
	switch {
	case !parsed && text(before) == text(problem):
	case problem != nil:
		f.watcher.current.WithLabelValues(f.name).Set(0)
		f.watcher.reloads.WithLabelValues(f.name, "failed").Inc()
		f.watcher.log.Error("a file is broken: what it held before stays in force", "file", f.path, "error", problem)
	default:
		f.watcher.current.WithLabelValues(f.name).Set(1)
		f.watcher.reloads.WithLabelValues(f.name, "ok").Inc()
		f.watcher.log.Info("a changed file is in force", "file", f.path)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// load reads the file unless it is what it was, and sets problem. It reports whether there was other content to parse.
func (f *File[T]) load() (parsed bool) {
	info, err := os.Stat(f.path)
	if err != nil {
		f.info, f.problem = nil, err
		return false
	}
	if f.info != nil && os.SameFile(info, f.info) && info.ModTime().Equal(f.info.ModTime()) && info.Size() == f.info.Size() &&
		info.ModTime().Before(f.read.Add(-racy)) {
		return false
	}
	now := time.Now()
	data, err := read(f.path)
	if err != nil {
		f.info, f.problem = nil, err
		return false
	}
	sum, first := sha256.Sum256(data), f.read.IsZero()
	f.info, f.read = info, now
	if !first && sum == f.sum {
		f.problem = f.wrong
		return false
	}
	f.sum, f.wrong = sum, nil
	if value, err := f.parse(data); err != nil {
		f.wrong = fmt.Errorf("%s: %w", f.path, err)
	} else {
		f.value.Store(&value)
	}
	f.problem = f.wrong
	return true
}

func read(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(file, maxSize+1))
	if err == nil && len(data) > maxSize {
		err = fmt.Errorf("%s is larger than %d octets", path, maxSize)
	}
	return data, err
}

// Decode reads the only YAML document of data into v. Unknown fields are errors, and errors of YAML name their lines. An
// empty file leaves v as it is.
func Decode(data []byte, v any) error {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	err := decoder.Decode(v)
	if wrong := new(yaml.TypeError); errors.As(err, &wrong) {
		err = errors.New(strings.Join(wrong.Errors, "; "))
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := decoder.Decode(new(any)); !errors.Is(err, io.EOF) {
		return errors.New("it holds more than one YAML document")
	}
	return nil
}
