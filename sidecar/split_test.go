package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// TestSplitter: every octet arrives, at the right half, whatever pieces it is sent in; silent clients harm nobody.
func TestSplitter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	lis, err := listenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	s := newSplitter(lis)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	dial := func(pieces ...string) net.Conn {
		conn, err := net.Dial("unix", path) //nolint:noctx // a test
		if err != nil {
			t.Fatal(err)
		}
		for _, piece := range pieces {
			if _, err := io.WriteString(conn, piece); err != nil {
				t.Fatal(err)
			}
		}
		return conn
	}
	silent := dial()
	defer func() { _ = silent.Close() }()
	_ = dial("PR").Close()
	for _, c := range []struct {
		pieces []string
		half   *half
		want   string
	}{
		{[]string{"PRI * HTTP/2.0\r\n"}, s.http2, "PRI * HTTP/2.0\r\n"},
		{[]string{"P", "R", "I"}, s.http2, "PRI"},
		{[]string{"POST / HTTP/1.1\r\n"}, s.http1, "POST / HTTP/1.1\r\n"},
		{[]string{"PR", "OPFIND /"}, s.http1, "PROPFIND /"},
		{[]string{"pri "}, s.http1, "pri "},
	} {
		client := dial(c.pieces...)
		conn, err := c.half.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(c.want))
		if _, err := io.ReadFull(iotest.OneByteReader(conn), got); err != nil || string(got) != c.want {
			t.Errorf("%q: %q, %v", c.pieces, got, err)
		}
		_ = client.Close()
		if _, err := conn.Read(got); !errors.Is(err, io.EOF) {
			t.Errorf("%q: after the end: %v", c.pieces, err)
		}
		_ = conn.Close()
	}

	_ = s.http1.Close()
	_ = s.http1.Close()
	if _, err := s.http1.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed half accepts: %v", err)
	}
	refused := dial("GET /")
	if _, err := refused.Read(make([]byte, 1)); err == nil {
		t.Error("a client of a closed half is served")
	}
	_ = refused.Close()

	began := time.Now()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d >= sniffTimeout {
		t.Errorf("the silent client held up the end for %v", d)
	}
	if _, err := net.Dial("unix", path); err == nil { //nolint:noctx // a test
		t.Error("the listener is still open")
	}
}

// TestSplitterFails with its listener, so that the process ends instead of being deaf.
func TestSplitterFails(t *testing.T) {
	lis, err := listenUnix(t.Context(), filepath.Join(t.TempDir(), "s.sock"))
	if err != nil {
		t.Fatal(err)
	}
	_ = lis.Close()
	if err := newSplitter(lis).run(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// exhausted is a listener in a process that has no file descriptors left, for a while.
type exhausted struct {
	net.Listener
	times int
}

func (e *exhausted) Accept() (net.Conn, error) {
	if e.times--; e.times >= 0 {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return e.Listener.Accept()
}

func TestSplitterOutlivesExhaustion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	lis, err := listenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	s := newSplitter(&exhausted{lis, 2})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	client, err := net.Dial("unix", path) //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	if _, err := io.WriteString(client, "PRI"); err != nil {
		t.Fatal(err)
	}
	conn, err := s.http2.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestSplitterTimeout ends with the first octets: later a connection may be idle for as long as its server likes.
func TestSplitterTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSplitter(bufconn.Listen(1))
		client, server := net.Pipe()
		go s.divide(t.Context(), server)
		go func() { _, _ = io.WriteString(client, "PRI") }()
		conn, err := s.http2.Accept()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		go func() { _, _ = io.WriteString(client, " *") }()
		if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
			t.Error(err)
		}
		_ = conn.Close()

		client, server = net.Pipe()
		began := time.Now()
		go s.divide(t.Context(), server)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) || time.Since(began) != sniffTimeout {
			t.Errorf("a silent client: %v after %v", err, time.Since(began))
		}
	})
}
