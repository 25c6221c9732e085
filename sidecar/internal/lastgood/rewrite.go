package lastgood

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// rewrite is a new state file on its way.
type rewrite struct {
	state    State
	journal  []byte // frames that follow on the state
	obsolete bool   // what is wanted on disk does not follow on the state any more
	cancel   context.CancelFunc

	// When it is written.
	path   string
	file   *os.File
	length int64
	err    error
}

// rewrite begins a new state file if one is needed.
func (d *Dir) rewrite(ctx context.Context) {
	if d.writing != nil || d.resting || d.taken.Index == nil {
		return
	}
	if d.onDisk == newest && !d.old && d.length-d.snapshot < max(d.cfg.FoldAt, d.snapshot/4) {
		return
	}
	w := &rewrite{state: d.taken, path: d.path(fileNew)}
	ctx, w.cancel = context.WithCancel(ctx)
	d.writing = w
	go func() {
		w.write(ctx)
		d.written <- w
	}()
}

func (w *rewrite) write(ctx context.Context) {
	if w.file, w.err = os.OpenFile(w.path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); w.err == nil {
		w.length, w.err = writeSnapshot(ctx, w.file, w.state)
	}
}

// add adds what was handed over since. It returns false if the rewrite can as well begin again.
func (w *rewrite) add(frames []byte, whole bool) bool {
	w.obsolete = w.obsolete || whole || len(w.journal)+len(frames) > 2*maxChanges
	if w.obsolete {
		w.journal = nil
	} else {
		w.journal = append(w.journal, frames...)
	}
	return !w.obsolete
}

func (w *rewrite) discard() {
	w.cancel()
	if w.file != nil {
		_ = w.file.Close()
		_ = os.Remove(w.path)
	}
}

// finish puts a new state file in place of the old one.
func (d *Dir) finish(w *rewrite) {
	d.writing = nil
	if w.obsolete {
		w.discard()
		return
	}
	if w.err == nil {
		w.err = d.adopt(w)
	}
	w.discard()
	if errors.Is(w.err, errWrong) {
		d.metrics.wrong.Inc()
		select {
		case d.wrong <- struct{}{}:
		default:
		}
	}
	if w.err != nil {
		d.failed("snapshot", w.err)
		return
	}
	d.failing, d.delay = false, 0
	d.metrics.snapshots.Inc()
}

// adopt makes the written file the state file.
func (d *Dir) adopt(w *rewrite) error {
	length, err := extend(w.file, w.length, w.journal)
	if err != nil {
		return err
	}
	if d.refused {
		if err := os.Rename(d.path(fileState), d.path(fileDamaged)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		d.refused = false
	}
	if err := os.Rename(w.path, d.path(fileState)); err != nil {
		return err
	}
	if d.file != nil {
		_ = d.file.Close()
	}
	d.file, d.snapshot, d.length, d.onDisk, d.old = w.file, w.length, length, older, false
	w.file = nil
	if err := d.syncDir(); err != nil {
		return err
	}
	d.onDisk = newest
	_ = os.Remove(d.path(fileBehind)) // if it stays, the next Open does not look at it
	return nil
}
