package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// splitter divides the connections of a listener by what their clients speak, so that one socket serves both: HTTP/2
// without TLS begins with "PRI" (RFC 9113 §3.4), which is no method of HTTP/1.
type splitter struct {
	lis          net.Listener
	http1, http2 *half
}

func newSplitter(lis net.Listener) *splitter {
	newHalf := func() *half {
		return &half{addr: lis.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})}
	}
	return &splitter{lis: lis, http1: newHalf(), http2: newHalf()}
}

// sniffTimeout bounds how long a client may keep quiet at first.
const sniffTimeout = 5 * time.Second

// run divides until ctx ends, and then closes the listener.
func (s *splitter) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.lis.Close() })
	defer stop()
	var sniffing sync.WaitGroup
	defer sniffing.Wait()
	for {
		conn, err := s.lis.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		switch {
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ECONNABORTED),
			errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM): // accept(2): these pass
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return fmt.Errorf("accepting on %s: %w", s.lis.Addr(), err)
		}
		sniffing.Go(func() { s.divide(ctx, conn) })
	}
}

func (s *splitter) divide(ctx context.Context, conn net.Conn) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	head := make([]byte, 3)
	_ = conn.SetReadDeadline(time.Now().Add(sniffTimeout))
	_, err := io.ReadFull(conn, head)
	_ = conn.SetReadDeadline(time.Time{})
	if !stop() || err != nil {
		_ = conn.Close()
		return
	}
	to := s.http1
	if string(head) == "PRI" {
		to = s.http2
	}
	select {
	case to.conns <- &sniffed{Conn: conn, head: head}:
	case <-to.closed:
		_ = conn.Close()
	case <-ctx.Done():
		_ = conn.Close()
	}
}

// half is the listener of one of the two servers.
type half struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (h *half) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *half) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *half) Addr() net.Addr { return h.addr }

// sniffed is a connection of which the head was read already.
type sniffed struct {
	net.Conn
	head []byte
}

func (c *sniffed) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
