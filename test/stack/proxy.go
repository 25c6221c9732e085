package stack

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Proxy is a network that can fail: it forwards TCP connections, round robin, to the first of its targets that accepts.
// Its methods may be called concurrently.
type Proxy struct {
	// Address is where it listens.
	Address string

	lis     net.Listener
	targets []string
	running sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{} // both ends of every connection
	next   int
	open   chan struct{} // closed while bytes may pass
	delay  time.Duration // of every piece, in both directions
	replyN int64         // octets of replies until everything breaks; negative: never
	broke  chan struct{} // closed when replyN was used up
	closed bool
}

// StartProxy starts a proxy to the targets, which need not be there yet.
func (s *Stack) StartProxy(ctx context.Context, targets ...string) (*Proxy, error) {
	address, err := s.FreeAddress()
	if err != nil {
		return nil, err
	}
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	p := &Proxy{Address: address, lis: lis, targets: targets, conns: make(map[net.Conn]struct{}), open: make(chan struct{}), replyN: -1}
	close(p.open)
	p.running.Go(p.accept)
	return p, nil
}

// Cut loses everything from now on, without a word to either side, as a pulled cable does.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = make(chan struct{})
}

// Delay holds up every piece of up to 16 KiB for d from now on, in both directions; 0 ends it.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Heal ends Cut, if there was one. Connections of before are reset, as they are when what was lost is missing.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
	select {
	case <-p.open:
	default:
		close(p.open)
	}
}

// BreakAfter lets n more octets of replies pass. All that follow are lost, and so is their connection; the next one works
// again. The channel is closed when that happened. Another call replaces the order.
func (p *Proxy) BreakAfter(n int64) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.replyN, p.broke = n, make(chan struct{})
	return p.broke
}

// Forgive takes BreakAfter back.
func (p *Proxy) Forgive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.replyN = -1
}

// Close ends it and all connections.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.closed = true
	p.reset()
	select {
	case <-p.open:
	default:
		close(p.open)
	}
	p.mu.Unlock()
	err := p.lis.Close()
	p.running.Wait()
	return err
}

func (p *Proxy) reset() {
	for c := range p.conns {
		_ = c.Close()
	}
}

// pass waits until bytes may pass.
func (p *Proxy) pass() {
	p.mu.Lock()
	open, delay := p.open, p.delay
	p.mu.Unlock()
	if delay > 0 {
		<-time.After(delay)
	}
	<-open
}

func (p *Proxy) accept() {
	for {
		client, err := p.lis.Accept()
		if err != nil {
			return
		}
		p.running.Go(func() { p.forward(client) })
	}
}

func (p *Proxy) forward(client net.Conn) {
	defer func() { _ = client.Close() }()
	if !p.hold(client) {
		return
	}
	defer p.drop(client)
	p.pass()
	server, err := p.dial()
	if err != nil || !p.hold(server) {
		return
	}
	defer p.drop(server)
	var up sync.WaitGroup
	defer up.Wait()
	up.Go(func() {
		p.copy(server, client, false)
		_, _ = server.Close(), client.Close()
	})
	p.copy(client, server, true)
	_, _ = server.Close(), client.Close()
}

// hold notes a connection, unless the proxy was closed.
func (p *Proxy) hold(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = c.Close()
	delete(p.conns, c)
}

func (p *Proxy) dial() (net.Conn, error) {
	p.mu.Lock()
	first := p.next
	p.next++
	p.mu.Unlock()
	var errs []error
	for i := range p.targets {
		server, err := (&net.Dialer{Timeout: time.Second}).Dial("tcp", p.targets[(first+i)%len(p.targets)])
		if err == nil {
			return server, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (p *Proxy) copy(to io.Writer, from io.Reader, replies bool) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		p.pass()
		last := false
		if replies {
			n, last = p.spend(n)
		}
		if _, writeErr := to.Write(buf[:n]); writeErr != nil || err != nil || last {
			return
		}
	}
}

// spend returns how many of n octets of a reply may pass, and whether the connection breaks after them.
func (p *Proxy) spend(n int) (pass int, last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.replyN < 0 {
		return n, false
	}
	if int64(n) <= p.replyN {
		p.replyN -= int64(n)
		return n, false
	}
	pass, p.replyN = int(p.replyN), -1
	close(p.broke)
	return pass, true
}
