package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/allowednets/allowednets/internal/serve"
)

// Names of listeners, as a service manager's FileDescriptorName= has them.
const (
	nameSocket = "socket"
	nameGRPC   = "grpc"
	nameHTTP   = "http"
	nameAdmin  = "admin"
)

// adopt makes listeners of the files that a service manager passed (sd_listen_fds(3)), by their names. It closes the files.
// The sockets obey the same rules as those we open. Who passed them keeps them open when we stop: meanwhile peers wait
// instead of being refused.
func adopt(files []*os.File) (_ map[string]net.Listener, err error) {
	listeners := make(map[string]net.Listener)
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
		if err != nil {
			for _, lis := range listeners {
				_ = lis.Close()
			}
		}
	}()
	for i, f := range files {
		name := f.Name()
		if !slices.Contains([]string{nameSocket, nameGRPC, nameHTTP, nameAdmin}, name) {
			return nil, fmt.Errorf("the socket passed as descriptor %d has the name %q: set FileDescriptorName= to %s, %s, %s or %s", 3+i, name, nameSocket, nameGRPC, nameHTTP, nameAdmin)
		}
		if listeners[name] != nil {
			return nil, fmt.Errorf("two sockets were passed with the name %q: give each a unit of its own", name)
		}
		lis, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("the passed socket %q cannot be used: %w", name, err)
		}
		listeners[name] = lis
		if err := suits(name, lis.Addr()); err != nil {
			return nil, fmt.Errorf("the passed socket %q, %s, cannot be used: %w", name, lis.Addr(), err)
		}
	}
	return listeners, nil
}

// suits reports why a listener must not be used under a name.
func suits(name string, address net.Addr) error {
	if name == nameSocket {
		if address.Network() != "unix" {
			return errors.New("it must be a unix socket")
		}
		info, err := os.Stat(address.String())
		if err != nil {
			return err
		}
		if info.Mode()&0o007 != 0 {
			return errors.New("its file is open to everybody; set SocketMode=0660")
		}
		return nil
	}
	switch {
	case address.Network() != "tcp":
		return errors.New("it must be a TCP socket")
	case name != nameAdmin && !serve.IsLoopback(address.String()):
		return errors.New("it is not on loopback: whoever reaches it learns who is restricted")
	}
	return nil
}
