package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

const (
	// exportPage is how many lists are read at once, the most that the policy service gives.
	exportPage = 1000
	// exportTries is how often the lists are read before an export gives up because they keep changing.
	exportTries = 3
	// progressEvery is the time between two updates of a line that counts.
	progressEvery = 200 * time.Millisecond
)

// entry is one line of an export: the list of one mailbox. Mailbox and Nets are what an import restores; the rest says where
// the list came from.
type entry struct {
	Mailbox    string   `json:"mailbox"`
	Nets       []string `json:"nets"`
	UpdateTime string   `json:"update_time,omitempty"` // RFC 3339
	UpdatedBy  string   `json:"updated_by,omitempty"`
}

type exportCommand struct {
	File   string `arg:"" optional:"" default:"-" complete:"file" help:"File to write, which appears when it is complete; - is standard output."`
	Domain string `env:"ALLOWEDNETS_DOMAIN" help:"Only the mailboxes of this domain. Default: all."`
}

// Help is shown below the help line.
func (*exportCommand) Help() string {
	return `
Writes one JSON object per restricted mailbox and line, ordered by domain and mailbox:

	{"mailbox":"alice@example.com","nets":["198.51.100.0/24"],"update_time":"2026-11-23T16:05:09Z","updated_by":"carol"}

The number of lines is compared with what the policy service says before and after. If lists came or went meanwhile, a file is
read again, up to three times, and is not written if that does not help.

	allowednets export lists.jsonl
	allowednets export --domain=example.com | gzip > example.com.jsonl.gz

Exit codes: 0 complete; 1 not permitted, such as for all domains; 2 wrong usage; 3 no answer, or not complete.
`
}

// errUnsteady: lists came or went while they were read, so that it cannot be told whether the export is complete.
var errUnsteady = errors.New("lists were added or lifted while they were read")

func (c *exportCommand) Run(s *session) error {
	return s.policy(func(client policyv1.PolicyServiceClient) error {
		x := &export{s: s, client: client, domain: c.Domain}
		if c.File == "-" {
			if err := x.write(s.term.out); err != nil {
				return incomplete("what was written", err)
			}
			return nil
		}
		err := replaceFile(c.File, func(f *os.File) error {
			for try := 1; ; try++ {
				err := x.write(f)
				if !errors.Is(err, errUnsteady) || try == exportTries {
					return err
				}
				fmt.Fprintf(s.term.err, "allowednets: %v. Reading again.\n", err)
				if err := rewind(f); err != nil {
					return err
				}
			}
		})
		if err != nil {
			return incomplete(c.File+" was not written: the export", err)
		}
		if s.flags.Output == "json" {
			_, err = fmt.Fprintf(s.term.out, `{"lists":%d}`+"\n", x.written)
		} else {
			_, err = fmt.Fprintf(s.term.out, "Exported %s to %s\n", count(int(x.written), "list", "lists"), printable(c.File))
		}
		return err
	})
}

// incomplete keeps errors that have an exit code and a text of their own.
func incomplete(what string, err error) error {
	if _, ok := errors.AsType[statusError](err); ok {
		return err
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return err
	}
	return fmt.Errorf("%s is not complete: %s", what, problem(err))
}

func rewind(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f.Truncate(0)
}

// export reads all lists.
type export struct {
	s       *session
	client  policyv1.PolicyServiceClient
	domain  string
	written int64
}

// write writes all lists to w. An error other than nil means that they are not all there.
func (x *export) write(w io.Writer) error {
	live := liveLine{}
	if x.s.term.errLive {
		live.w = x.s.term.err
	}
	defer live.clear()
	out := bufio.NewWriterSize(w, 1<<16)
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	total, shown := int64(-1), time.Now()
	x.written = 0
	for token := ""; ; {
		page, err := x.page(token)
		if err != nil {
			return err
		}
		if total >= 0 && page.GetTotalSize() != total {
			return fmt.Errorf("%w (%d before, %d now)", errUnsteady, total, page.GetTotalSize())
		}
		total = page.GetTotalSize()
		for _, a := range page.GetAllowedNets() {
			if err := encoder.Encode(exported(a)); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			x.written++
		}
		if time.Since(shown) >= progressEvery {
			shown = time.Now()
			live.show(fmt.Sprintf("exported %d of %d", x.written, total))
		}
		next := page.GetNextPageToken()
		switch {
		case next == "" && x.written != total:
			return fmt.Errorf("the policy service counts %d lists and gave %d", total, x.written)
		case next == "":
			if err := out.Flush(); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			return nil
		case next == token:
			return errors.New("the policy service answered the same page twice")
		}
		token = next
	}
}

// page reads one page within --timeout, however often it takes.
func (x *export) page(token string) (*policyv1.ListAllowedNetsResponse, error) {
	ctx, cancel := context.WithTimeout(x.s.ctx, x.s.flags.Timeout)
	defer cancel()
	resp, _, err := again(ctx, patient, func(error) {}, func() (*policyv1.ListAllowedNetsResponse, error) {
		return x.client.ListAllowedNets(ctx, &policyv1.ListAllowedNetsRequest{Domain: x.domain, PageSize: exportPage, PageToken: token})
	})
	return resp, err
}

func exported(a *policyv1.AllowedNets) entry {
	e := entry{Mailbox: a.GetMailbox(), Nets: netTexts(a.GetNets()), UpdatedBy: a.GetUpdatedBy()}
	if a.GetUpdateTime() != nil {
		e.UpdateTime = a.GetUpdateTime().AsTime().UTC().Format(time.RFC3339Nano)
	}
	return e
}

// replaceFile has f write a file beside path and puts it in the place of path once it is complete and on disk. If f fails,
// path stays what it was.
func replaceFile(path string, f func(*os.File) error) (err error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return usageError{fmt.Sprintf("%q is not a regular file; - writes to standard output", path)}
	}
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.partial") // mode 0600: lists name people
	if err != nil {
		return usageError{fmt.Sprintf("cannot write beside %q: %v", path, err)}
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
		}
	}()
	if err := f(file); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.Rename(file.Name(), path)
}
