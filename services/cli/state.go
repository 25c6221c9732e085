package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"
)

// state is how far an import got, as the --resume file has it.
type state struct {
	Line    int64  `json:"line"`    // every line up to this one is finished
	Sum     string `json:"crc64"`   // of the input up to there; empty: not known
	Refused int64  `json:"refused"` // lines among them
}

func sumText(sum uint64) string { return strconv.FormatUint(sum, 16) }

// readState reads a --resume file; none means the beginning.
func readState(path string) (state, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, nil
	}
	if err != nil {
		return state{}, usageError{fmt.Sprintf("--resume: %v", err)}
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil || st.Line < 0 || st.Refused < 0 {
		return state{}, usageError{fmt.Sprintf("--resume: %q is not the state of an import; remove it to begin at the first line", path)}
	}
	return st, nil
}

// saveState writes the --resume file, unless that was done within the time every.
func (im *importer) saveState(every time.Duration) {
	if im.c.Resume == "" || time.Since(im.written) < every {
		return
	}
	im.written = time.Now()
	data, err := json.Marshal(im.done)
	if err == nil {
		err = replaceFile(im.c.Resume, func(f *os.File) error {
			_, err := f.Write(append(data, '\n'))
			return err
		})
	}
	if err != nil && im.stopped == nil {
		im.stopped = fmt.Errorf("writing the state of the import: %w", err)
	}
}

func (im *importer) removeState() {
	if im.c.Resume == "" {
		return
	}
	if err := os.Remove(im.c.Resume); err != nil && !errors.Is(err, fs.ErrNotExist) {
		im.stopped = fmt.Errorf("removing the state of the complete import: %w", err)
	}
}
