package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/allowednets/allowednets/internal/allow"
)

// maxLine is the longest line of an import, in octets. The longest list that a policy service can be told to take fits.
const maxLine = 1 << 20

// errLineTooLong: a line is longer than maxLine.
var errLineTooLong = fmt.Errorf("the line is longer than %d octets", maxLine)

// lineReader reads lines of any number in bounded memory.
type lineReader struct {
	r      *bufio.Reader
	number int64  // of the line that was read last
	sum    uint64 // CRC-64 of all lines up to it: tells a file from another one, by mistake
	table  *crc64.Table
}

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, 1<<16), table: crc64.MakeTable(crc64.ECMA)}
}

// next returns the next line, without its end and, on the first one, a byte order mark. After errLineTooLong it goes on with
// the line behind. io.EOF is the end.
func (l *lineReader) next() ([]byte, error) {
	var line []byte
	tooLong := false
	for {
		part, err := l.r.ReadSlice('\n')
		if len(part) == 0 && len(line) == 0 && !tooLong && err != nil {
			return nil, err // a last line without an end was read before
		}
		l.sum = crc64.Update(l.sum, l.table, part)
		if tooLong = tooLong || len(line)+len(part) > maxLine+2; !tooLong {
			line = append(line, part...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		l.number++
		line = bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))
		if tooLong || len(line) > maxLine {
			return nil, errLineTooLong
		}
		if l.number == 1 {
			line = bytes.TrimPrefix(line, []byte("\uFEFF"))
		}
		return line, nil
	}
}

// parsed is what a line says.
type parsed struct {
	mailbox allow.Mailbox // the zero value: the line has no list
	nets    []string
	note    string // something that a person should know
	blank   bool   // the line says nothing at all
}

// parser reads lines of one format, in order. An error says why a line cannot be used; it never quotes what may be secret.
type parser func(line []byte, number int64) (parsed, error)

func parseText(line []byte) error {
	if !utf8.Valid(line) {
		return errors.New("the line is not UTF-8 text")
	}
	return nil
}

// parseJSON reads a line of an export.
func parseJSON(line []byte, _ int64) (parsed, error) {
	if len(bytes.TrimSpace(line)) == 0 {
		return parsed{blank: true}, nil
	}
	if err := parseText(line); err != nil {
		return parsed{}, err
	}
	var e entry
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&e); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends in the middle")
		}
		return parsed{}, fmt.Errorf("not a JSON object as export writes it: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return parsed{}, errors.New("there is more than one JSON object on the line")
	}
	mailbox, err := allow.ParseMailbox(e.Mailbox)
	if err != nil {
		return parsed{}, err
	}
	return parsed{mailbox: mailbox, nets: e.Nets}, nil
}

// allowNets begins the extra field of a Dovecot passwd-file that restricts a user.
const allowNets = "allow_nets="

// passwdFile returns a parser of Dovecot's passwd-file, which completes bare names with defaultDomain.
//
// It reads what Dovecot reads (src/auth/db-passwd-file.c of 2.3.19 and 2.4): user:password:uid:gid:gecos:home:shell:extra, where
// everything behind the seventh colon, IPv6 addresses with their colons included, is a list of fields separated by blanks.
// There are no quotes and no escapes; values are expanded at "%". A name that stands there twice counts with its first line.
func passwdFile(defaultDomain string) parser {
	first := make(map[allow.Mailbox]int64)
	return func(line []byte, number int64) (parsed, error) {
		if len(line) == 0 || line[0] == ':' || line[0] == '#' {
			return parsed{blank: true}, nil
		}
		if err := parseText(line); err != nil {
			return parsed{}, err
		}
		fields := strings.SplitN(string(line), ":", 8)
		mailbox, err := allow.CompleteMailbox(fields[0], defaultDomain)
		if err == nil {
			if earlier, twice := first[mailbox]; twice {
				return parsed{mailbox: mailbox}, fmt.Errorf("the mailbox stands on line %d already, and that is the line which Dovecot uses", earlier)
			}
			first[mailbox] = number
		}
		if len(fields) < 8 {
			return parsed{}, nil
		}
		p, err2 := parseExtra(fields[7])
		if err2 == nil && p.nets == nil {
			return parsed{}, nil // not restricted; so the name does not matter
		}
		p.mailbox = mailbox
		if err != nil && defaultDomain == "" && !strings.Contains(fields[0], "@") {
			err = fmt.Errorf("the user %.100q has no domain; --default-domain completes such names", fields[0])
		}
		if err != nil {
			return parsed{}, err
		}
		return p, err2
	}
}

// parseExtra reads the extra fields of a passwd-file; nets is nil if they do not restrict.
func parseExtra(extra string) (parsed, error) {
	var nets []string
	alias := false
	for field := range strings.SplitSeq(extra, " ") {
		switch {
		case strings.HasPrefix(field, allowNets):
			if nets != nil {
				return parsed{}, errors.New("allow_nets stands there twice; Dovecot demands both, which one list cannot say")
			}
			nets = strings.FieldsFunc(field[len(allowNets):], func(r rune) bool { return r == ',' })
			if nets == nil {
				nets = []string{}
			}
		case strings.HasPrefix(field, ":") && strings.Contains(field, allowNets):
			return parsed{}, errors.New("allow_nets stands behind an eighth colon, where Dovecot does not look for it")
		case strings.HasPrefix(field, "user="):
			alias = true
		}
	}
	switch {
	case nets == nil:
		return parsed{}, nil
	case alias:
		return parsed{}, errors.New("the extra field user= makes this another name of a mailbox; set the list of that mailbox")
	case slices.ContainsFunc(nets, func(n string) bool { return strings.Contains(n, "%") }):
		return parsed{}, errors.New("allow_nets has a variable in it, whose value differs from login to login")
	}
	had := len(nets)
	p := parsed{nets: slices.DeleteFunc(nets, func(n string) bool { return n == "local" })}
	switch {
	case len(p.nets) == 0 && had > 0:
		return parsed{}, errors.New(`allow_nets=local lets nobody log in over the network, which no list can say; disable the account instead`)
	case len(p.nets) == 0:
		return parsed{}, errors.New("allow_nets is empty, so that nobody may log in, which no list can say; disable the account instead")
	case len(p.nets) < had:
		p.note = `"local", for logins without a network address, is left out`
	}
	return p, nil
}
