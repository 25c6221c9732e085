// Package nginx runs Debian's nginx with a configuration of a test.
package nginx

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/allowednets/allowednets/test/stack"
)

const program = "nginx"

// mailModule is in Debian's package libnginx-mod-mail.
const mailModule = "/usr/lib/nginx/modules/ngx_mail_module.so"

// Missing says what this machine lacks to run nginx, with its mail proxy; nil if nothing.
func Missing() error {
	if os.Geteuid() != 0 {
		return errors.New("starting nginx needs root")
	}
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("looking for nginx (Debian's package of that name): %w", err)
	}
	if _, err := os.Stat(mailModule); err != nil {
		return fmt.Errorf("looking for nginx's mail proxy (Debian's package libnginx-mod-mail): %w", err)
	}
	return nil
}

// Server is a running nginx.
type Server struct {
	*stack.Process
	dir string
}

// main is what every configuration begins with. The logs are those of the process.
const main = `load_module ` + mailModule + `;
daemon off;
worker_processes 2;
user www-data;
pid nginx.pid;
error_log stderr info;
events { worker_connections 512; }
`

// Start starts nginx as a process of s with the blocks http and mail of conf, and waits until it listens at address. Names
// of files in conf are below the server's own folder.
func Start(ctx context.Context, s *stack.Stack, name, conf, address string) (*Server, error) {
	// nginx's workers must get in; the stack's folder is private.
	dir, err := os.MkdirTemp("", "nginx-")
	if err != nil {
		return nil, err
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "nginx.conf")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(file, []byte(main+conf), 0o644)); err != nil {
		return nil, err
	}
	n := &Server{dir: dir}
	if n.Process, err = s.Start(name, path, []string{"-p", dir, "-c", file, "-e", "stderr"}, nil); err != nil {
		return nil, err
	}
	return n, n.AwaitReady(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// Dir is the server's folder.
func (n *Server) Dir() string { return n.dir }

// Remove deletes the server's files.
func (n *Server) Remove() error { return os.RemoveAll(n.dir) }
