package lastgood

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/allowednets/allowednets/sidecar/internal/index"
)

// Files of the directory.
const (
	fileLock    = "lock"
	fileState   = "state"
	fileNew     = "state.new"     // being written
	fileDamaged = "state.damaged" // refused at a start, until the next one
	fileBehind  = "state.behind"  // taken out of use, because a later state was acknowledged and could not be written
)

// result is what came of loading at the start; a metric's label.
type result string

const (
	resultLoaded     result = "loaded"
	resultAbsent     result = "absent"     // there is none
	resultBehind     result = "behind"     // the disk had failed
	resultDamaged    result = "damaged"    // it is not what was written
	resultUnreadable result = "unreadable" // the disk fails
)

// onDisk is what a restart would find.
type onDisk int

const (
	nothing onDisk = iota // nothing that it would load
	older                 // a state, but not the newest one
	newest
)

// Config configures a [Dir].
type Config struct {
	// Path is the directory; it is made if it does not exist. Nobody but the owner may have any permission in it.
	Path string
	// FoldAt is from which size in octets on a journal of a quarter of the snapshot is folded; 0 means 1 MiB.
	FoldAt  int64
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Dir is a directory with a state, which no other process can open. Its methods are safe for concurrent use.
type Dir struct {
	cfg     Config
	metrics *metrics
	lock    *os.File
	loaded  content
	wake    chan struct{}
	wrong   chan struct{}

	mu      sync.Mutex
	newest  State         // handed over last
	number  uint64        // of newest
	journal []byte        // frames that Run has not taken
	whole   bool          // the journal does not lead to newest
	kept    uint64        // all numbers up to this one are
	changed chan struct{} // closed when kept changes

	// Of Run alone.
	file             *os.File // the state file, to be continued if onDisk is newest
	snapshot, length int64    // of the file
	onDisk           onDisk
	refused          bool // the state file is one that was refused
	old              bool // the state file is of version 1, and must be replaced before it can be continued
	taken            State
	takenNumber      uint64
	writing          *rewrite      // nil if no snapshot is being written
	written          chan *rewrite // the one that ended
	failing          bool          // the last attempt to have the newest state on disk failed
	resting          bool          // until retry
	retry            *time.Timer
	delay            time.Duration
}

// Open opens a directory and loads its state. A state that cannot be used is no error but for the log and the metrics: the
// sidecar then starts without one, and what was refused stays until it can be replaced.
func Open(cfg Config) (_ *Dir, err error) {
	if cfg.FoldAt == 0 {
		cfg.FoldAt = 1 << 20
	}
	d := &Dir{
		cfg: cfg, wake: make(chan struct{}, 1), wrong: make(chan struct{}, 1), changed: make(chan struct{}), written: make(chan *rewrite, 1),
		retry: time.NewTimer(0),
	}
	d.retry.Stop()
	if d.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, err
	}
	if err := makeDir(cfg.Path); err != nil {
		return nil, err
	}
	if d.lock, err = lock(d.path(fileLock)); err != nil {
		return nil, err
	}
	_ = os.Remove(d.path(fileNew)) // if that fails, so will writing it, and that is reported
	d.load()
	return d, nil
}

func (d *Dir) path(name string) string { return filepath.Join(d.cfg.Path, name) }

// makeDir makes sure that there is a directory that only its owner can use. (Kubernetes widens the permissions of whole
// volumes whenever it mounts them, so they are narrowed again rather than complained about.)
func makeDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if err := os.Chmod(path, 0o700); err != nil { //nolint:gosec // a directory needs x
		return fmt.Errorf("%s can be used by others, who could lift restrictions there; let this process own it, or name a directory in it that does not exist yet: %w", path, err)
	}
	return nil
}

// lock takes the lock of the directory, for as long as the file is open.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) {
		f, err = os.Open(path) // what there is can still be loaded
	}
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another process; every sidecar needs a directory of its own", filepath.Dir(path))
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}

// load reads the state file, and says what came of it.
func (d *Dir) load() {
	began := time.Now()
	result := resultLoaded
	err := d.read()
	switch {
	case err == nil:
		d.onDisk = newest
	case errors.Is(err, fs.ErrNotExist):
		result, err = resultAbsent, nil
		if _, statErr := os.Stat(d.path(fileBehind)); statErr == nil {
			result = resultBehind
		}
	case errors.Is(err, errDamaged):
		result, d.refused = resultDamaged, true
	default:
		result, d.refused, d.onDisk = resultUnreadable, true, older // perhaps next time it can be read
	}
	d.metrics.load.WithLabelValues(string(result)).Set(1)
	d.metrics.loadSeconds.Set(time.Since(began).Seconds())
	d.measure()
	log := d.cfg.Log.With("state_dir", d.cfg.Path, "result", string(result))
	switch result {
	case resultLoaded:
		st := d.loaded.state
		log.Info("state loaded from disk", "cluster", strconv.FormatUint(st.Cluster, 16), "revision", st.Token.String(),
			"restricted_mailboxes", st.Index.Count(), "took", time.Since(began))
	case resultAbsent:
		log.Info("no state on disk; there is none until a policy service is reached")
	case resultBehind:
		log.Error("the state on disk was taken out of use, because later ones could not be written; there is none until a policy service is reached")
	default:
		log.Error("the state on disk was refused; there is none until a policy service is reached", "error", err)
	}
}

func (d *Dir) read() error {
	f, err := os.OpenFile(d.path(fileState), os.O_RDWR, 0)
	if errors.Is(err, syscall.EROFS) {
		f, err = os.Open(d.path(fileState))
	}
	if err != nil {
		return err
	}
	c, err := read(f)
	if err != nil {
		_ = f.Close()
		return err
	}
	if c.size > c.length {
		_ = f.Truncate(c.length) // a commit that was not acknowledged; it does no harm either
	}
	_ = f.Chmod(0o600) // see makeDir
	d.loaded, d.file, d.snapshot, d.length, d.old = c, f, c.snapshot, c.length, !c.anchored
	d.newest, d.taken = c.state, c.state
	return nil
}

// Loaded returns the state that Open loaded, with a writer whose newest root is that of the state; nil if there is none. It
// may be called once.
func (d *Dir) Loaded() (State, *index.Writer) {
	c := d.loaded
	d.loaded = content{}
	return c.state, c.writer
}

// Close frees the directory. It must be called if Run is not.
func (d *Dir) Close() {
	if d.file != nil {
		_ = d.file.Close()
	}
	_ = d.lock.Close()
}

// Keep hands over a verified state, to be written. changes lead to it from the one that was handed over, or loaded, before;
// nil if they are not known. Keep returns the number under which [Dir.Kept] reports the state. It does not wait for the disk,
// and a disk that is slow costs memory only up to a bound.
func (d *Dir) Keep(st State, changes *Changes) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	is, was := st.identity(), d.newest.identity()
	if is != was {
		d.number++
		d.whole = d.whole || changes == nil || changes.tooMany || !is.continues(was) || len(d.journal) > maxChanges
		if d.whole {
			d.journal = nil
		} else {
			d.journal = appendCommit(d.journal, was.token.Revision, is, changes)
		}
	}
	d.newest = st
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return d.number
}

// Kept returns the number up to which states may be acknowledged, because no restart can come back with an older one, and a
// channel that is closed when it changes.
func (d *Dir) Kept() (uint64, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kept, d.changed
}

// Wrong yields when the index of the newest state turned out not to contain what it was verified to contain, so that it
// should be made anew.
func (d *Dir) Wrong() <-chan struct{} { return d.wrong }

// Run writes what is handed over until ctx ends. Then it appends what was handed over before, if the journal leads there, and
// returns nil; the directory is free. It may be called once.
func (d *Dir) Run(ctx context.Context) error {
	defer d.Close()
	for {
		d.rewrite(ctx)
		select {
		case <-d.wake:
			d.take()
		case w := <-d.written:
			d.finish(w)
		case <-d.retry.C:
			d.resting = false
		case <-ctx.Done():
			d.take()
			d.settle()
			if d.writing != nil {
				d.writing.cancel()
				(<-d.written).discard()
			}
			return nil
		}
		d.settle()
	}
}

// take takes what was handed over and appends it to the journal, if that leads there.
func (d *Dir) take() {
	d.mu.Lock()
	frames, whole := d.journal, d.whole
	d.taken, d.takenNumber = d.newest, d.number
	d.journal, d.whole = nil, false
	d.mu.Unlock()
	if whole || len(frames) > 0 && d.old && d.onDisk == newest {
		d.resting = false // a fold may wait; this cannot
		if d.onDisk == newest {
			d.onDisk = older
		}
	}
	if d.writing != nil && !d.writing.add(frames, whole) {
		d.writing.cancel()
	}
	if len(frames) == 0 || d.onDisk != newest {
		return
	}
	began := time.Now()
	length, err := extend(d.file, d.length, frames)
	if err != nil {
		d.onDisk = older
		d.failed("append", err)
		return
	}
	d.length = length
	d.metrics.appends.Inc()
	d.metrics.appendSeconds.Add(time.Since(began).Seconds())
}

// extend writes frames at the end of a state and returns the new end. The state is longer once the header says so, which is
// written after the frames are on disk.
func extend(f *os.File, at int64, frames []byte) (int64, error) {
	if len(frames) > 0 {
		if _, err := f.WriteAt(frames, at); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		at += int64(len(frames))
	}
	if _, err := f.WriteAt(header(at), 0); err != nil {
		return 0, err
	}
	return at, f.Sync()
}

// settle reports what may be acknowledged: what is on disk, or, if the disk fails, what a restart cannot take back.
func (d *Dir) settle() {
	d.measure()
	if d.onDisk != newest && !(d.failing && d.onDisk == nothing) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kept != d.takenNumber {
		d.kept = d.takenNumber
		close(d.changed)
		d.changed = make(chan struct{})
	}
}

func (d *Dir) measure() {
	d.metrics.current.Set(0)
	if d.onDisk == newest {
		d.metrics.current.Set(1)
	}
	d.metrics.snapshotBytes.Set(float64(d.snapshot))
	d.metrics.journalBytes.Set(float64(d.length - d.snapshot))
}

// failed notes that writing failed. If the newest state is on disk all the same, it was only a fold. If not, what is there is
// taken out of use.
func (d *Dir) failed(operation string, err error) {
	d.delay = min(max(2*d.delay, firstDelay), maxDelay)
	d.resting = true
	d.retry.Reset(d.delay)
	d.metrics.errors.WithLabelValues(operation).Inc()
	if d.onDisk == newest {
		d.cfg.Log.Error("the journal on disk cannot be folded and grows", "error", err, "retry_in", d.delay)
		return
	}
	d.failing = true
	if d.onDisk == older {
		if spoilErr := d.spoil(); spoilErr != nil {
			d.metrics.errors.WithLabelValues("spoil").Inc()
			err = errors.Join(err, fmt.Errorf("taking it out of use: %w", spoilErr))
		}
	}
	if d.onDisk == older {
		d.cfg.Log.Error("the state on disk is behind; changes are enforced but not acknowledged, because a restart would undo them",
			"operation", operation, "error", err, "retry_in", d.delay)
		return
	}
	d.cfg.Log.Error("the state cannot be written to disk; changes are enforced, but after a restart there will be no state until a policy service is reached",
		"operation", operation, "error", err, "retry_in", d.delay)
}

// spoil makes sure that no restart loads what is on disk.
func (d *Dir) spoil() error {
	if err := os.Rename(d.path(fileState), d.path(fileBehind)); err != nil {
		return err
	}
	if err := d.syncDir(); err != nil {
		return err
	}
	d.onDisk, d.refused = nothing, false
	return nil
}

func (d *Dir) syncDir() error {
	f, err := os.Open(d.cfg.Path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return f.Sync()
}

const (
	firstDelay = time.Second // before writing is tried again; doubled at every failure
	maxDelay   = time.Minute
)
