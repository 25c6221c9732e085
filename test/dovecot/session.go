package dovecot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"
)

// Session is a client that stays logged in. An IMAP client waits for mail (IDLE).
type Session struct {
	c    *conn
	imap bool
}

// OpenIMAP logs in and waits for mail.
func (d *Server) OpenIMAP(ctx context.Context, a Attempt) (*Session, error) {
	return opened(d.imap(ctx, a))(true)
}

// OpenPOP3 logs in.
func (d *Server) OpenPOP3(ctx context.Context, a Attempt) (*Session, error) {
	return opened(d.pop3(ctx, a))(false)
}

func opened(c *conn, answer Answer, err error) func(imap bool) (*Session, error) {
	return func(imap bool) (*Session, error) {
		s := &Session{c, imap}
		if err == nil && !answer.OK {
			err = fmt.Errorf("refused: %s", answer.Text)
		}
		if err == nil && imap {
			err = s.idle()
		}
		if err != nil && c != nil {
			c.close()
		}
		return s, err
	}
}

func (s *Session) idle() error {
	if _, err := s.c.Write([]byte("w IDLE\r\n")); err != nil {
		return err
	}
	l, err := s.c.line()
	if err == nil && !strings.HasPrefix(l, "+") {
		err = fmt.Errorf("IDLE is answered %q", l)
	}
	return err
}

// Ended returns what the server said last, when it ends the session. That it does not within d is an error.
func (s *Session) Ended(d time.Duration) (last string, err error) {
	if err := s.c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return "", err
	}
	for {
		l, err := s.c.line()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, net.ErrClosed):
			return last, nil
		case err != nil:
			return last, err
		}
		last = l
	}
}

// Alive uses the session.
func (s *Session) Alive() error {
	if err := s.c.SetDeadline(time.Now().Add(replyWithin)); err != nil {
		return err
	}
	if !s.imap {
		answer, err := s.c.popCommand("NOOP")
		if err == nil && !answer.OK {
			err = errors.New(answer.Text)
		}
		return err
	}
	if _, err := s.c.Write([]byte("DONE\r\n")); err != nil {
		return err
	}
	if answer, err := s.c.command("n", "NOOP"); err != nil || !answer.OK {
		return fmt.Errorf("NOOP is answered %q: %w", answer.Text, err)
	}
	return s.idle()
}

// Close ends the session from the client's side.
func (s *Session) Close() { s.c.close() }
