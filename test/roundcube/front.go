package roundcube

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
)

// From returns the URL of a site for a browser at an address: that of a load balancer which names the address in a PROXY
// header. All URLs have the same host, so that a browser takes its cookies along from one to the other, as a notebook does
// that is carried somewhere else.
func (r *Server) From(ctx context.Context, site string, client netip.Addr) (string, error) {
	key := site + " " + client.String()
	if r.fronts[key] == nil {
		address, err := r.stack.FreeAddress()
		if err != nil {
			return "", err
		}
		lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err != nil {
			return "", err
		}
		f := &front{lis: lis, target: r.sites[site].proxied, header: proxyHeader(client), conns: make(map[net.Conn]struct{})}
		f.running.Go(f.accept)
		r.fronts[key] = f
	}
	return "http://" + r.fronts[key].lis.Addr().String() + "/", nil
}

// proxyHeader is a header of the PROXY protocol, version 1.
func proxyHeader(client netip.Addr) string {
	if client.Is4() {
		return fmt.Sprintf("PROXY TCP4 %s 192.0.2.1 40000 80\r\n", client)
	}
	return fmt.Sprintf("PROXY TCP6 %s 2001:db8::1 40000 80\r\n", client)
}

// front is a load balancer all of whose clients are at one address.
type front struct {
	lis            net.Listener
	target, header string
	running        sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func (f *front) accept() {
	for {
		client, err := f.lis.Accept()
		if err != nil {
			return
		}
		f.running.Go(func() { f.forward(client) })
	}
}

func (f *front) forward(client net.Conn) {
	defer f.drop(client)
	server, err := net.Dial("tcp", f.target) //nolint:noctx // loopback
	if err != nil {
		return
	}
	defer f.drop(server)
	if !f.hold(client, server) {
		return
	}
	if _, err := io.WriteString(server, f.header); err != nil {
		return
	}
	var up sync.WaitGroup
	defer up.Wait()
	up.Go(func() {
		_, _ = io.Copy(server, client)
		_, _ = server.Close(), client.Close()
	})
	_, _ = io.Copy(client, server)
	_, _ = server.Close(), client.Close()
}

func (f *front) hold(conns ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range conns {
		f.conns[c] = struct{}{}
	}
	return !f.closed
}

func (f *front) drop(c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_ = c.Close()
	delete(f.conns, c)
}

func (f *front) close() error {
	err := f.lis.Close()
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		_ = c.Close()
	}
	f.mu.Unlock()
	f.running.Wait()
	return err
}
