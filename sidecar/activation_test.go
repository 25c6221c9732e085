package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// passedFile returns the listener as a service manager passes it under a name.
func passedFile(t *testing.T, network, address, name string) *os.File {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	filer, ok := lis.(interface{ File() (*os.File, error) })
	if !ok {
		t.Fatalf("%T has no file", lis)
	}
	f, err := filer.File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	dup, err := dupFile(f, name)
	if err != nil {
		t.Fatal(err)
	}
	return dup
}

// dupFile returns a file of its own under another name.
func dupFile(f *os.File, name string) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	return os.NewFile(uintptr(fd), name), err
}

func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	loopback := func(name string) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File { return passedFile(t, "tcp", "127.0.0.1:0", name) }
	}
	socket := func(name string, mode os.FileMode) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			path := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-"))
			f := passedFile(t, "unix", path, name)
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	for _, tt := range []struct {
		name    string
		files   []func(*testing.T) *os.File
		problem string
	}{
		{"none", nil, ""},
		{"all", []func(*testing.T) *os.File{loopback("http"), socket("socket", 0o660), loopback("admin"), loopback("grpc")}, ""},
		{"admin for others", []func(*testing.T) *os.File{func(t *testing.T) *os.File { return passedFile(t, "tcp", ":0", "admin") }}, ""},
		{"systemd's default name", []func(*testing.T) *os.File{loopback("allowednets-sidecar.socket")}, `descriptor 3 has the name "allowednets-sidecar.socket": set FileDescriptorName=`},
		{"no name", []func(*testing.T) *os.File{loopback("http"), loopback("LISTEN_FD_4")}, "descriptor 4"},
		{"twice", []func(*testing.T) *os.File{loopback("http"), loopback("http")}, "two sockets"},
		{"not on loopback", []func(*testing.T) *os.File{func(t *testing.T) *os.File { return passedFile(t, "tcp", ":0", "http") }}, "not on loopback"},
		{"a unix socket for HTTP", []func(*testing.T) *os.File{socket("http", 0o660)}, "must be a TCP socket"},
		{"TCP for the socket", []func(*testing.T) *os.File{loopback("socket")}, "must be a unix socket"},
		{"a socket for everybody", []func(*testing.T) *os.File{socket("socket", 0o666)}, "SocketMode=0660"},
		{"no socket at all", []func(*testing.T) *os.File{func(t *testing.T) *os.File {
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			dup, err := dupFile(f, "http")
			if err != nil {
				t.Fatal(err)
			}
			return dup
		}}, "cannot be used"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var files []*os.File
			for _, f := range tt.files {
				files = append(files, f(t))
			}
			listeners, err := adopt(files)
			for name, lis := range listeners {
				if lis.Close() != nil {
					t.Errorf("%s was closed", name)
				}
			}
			if (err == nil) != (tt.problem == "") || err != nil && !strings.Contains(err.Error(), tt.problem) {
				t.Errorf("error %v, want %q", err, tt.problem)
			}
			if err == nil && len(listeners) != len(files) {
				t.Errorf("%d listeners of %d", len(listeners), len(files))
			}
			for _, f := range files {
				if f.Close() == nil {
					t.Errorf("%s was left open", f.Name())
				}
			}
		})
	}
}
