package dovecot

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/allowednets/allowednets/test/stack"
)

// Run starts a Dovecot of the caller's configuration, and waits until something listens on a TCP address, or on a unix socket below
// base_dir. In files, which lie side by side and include dovecot.conf, {{.Dir}} becomes their folder; base_dir must be {{.Dir}}/run. The
// caller stops the process and removes the folder, also after an error.
func Run(ctx context.Context, files map[string]string, network, address string) (p *stack.Process, dir string, err error) {
	if dir, err = os.MkdirTemp("", "dovecot-"); err != nil {
		return nil, "", err
	}
	mail := filepath.Join(dir, "mail")
	errs := []error{os.Chmod(dir, 0o755), os.Mkdir(mail, 0o777), os.Chmod(mail, 0o777)}
	for file, text := range files {
		path := filepath.Join(dir, file)
		errs = append(errs, os.WriteFile(path, []byte(strings.ReplaceAll(text, "{{.Dir}}", dir)), 0o644), os.Chmod(path, 0o644))
	}
	path, err := exec.LookPath(program)
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, dir, err
	}
	p = stack.NewProcess(program, path, []string{"-F", "-c", filepath.Join(dir, "dovecot.conf")}, nil, filepath.Join(dir, "log"))
	if err := p.Start(); err != nil {
		return nil, dir, err
	}
	if network == "unix" {
		address = filepath.Join(dir, "run", address)
	}
	return p, dir, p.AwaitReady(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
