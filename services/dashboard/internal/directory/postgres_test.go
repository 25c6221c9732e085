package directory_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
)

// binaries of Debian's postgresql-15.
const binaries = "/usr/lib/postgresql/15/bin"

// postgres is a server of this test alone.
type postgres struct {
	t    *testing.T
	dir  string
	port int
	who  *syscall.Credential // nil if it may run as we do
	cmd  *exec.Cmd
	log  bytes.Buffer
}

// startPostgres starts a PostgreSQL, or skips the test where there is none.
func startPostgres(t *testing.T) *postgres {
	t.Helper()
	missing := func(why any) {
		t.Helper()
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("PostgreSQL 15 cannot run: %v", why)
		}
		t.Skipf("SKIPPED: PostgreSQL 15 cannot run: %v", why)
	}
	if _, err := os.Stat(filepath.Join(binaries, "initdb")); err != nil {
		missing(err)
	}
	p := &postgres{t: t}
	var err error
	if p.dir, err = os.MkdirTemp("", "pg"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(p.dir) })
	if os.Getuid() == 0 { // PostgreSQL refuses root
		u, err := user.Lookup("postgres")
		if err != nil {
			missing(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		p.who = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(p.dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(p.dir, "secret")
	if err := os.WriteFile(secret, []byte("s3cret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Not the collation in which names are sorted here.
	init := p.command("initdb", "-D", filepath.Join(p.dir, "data"), "-U", "owner", "--pwfile", secret, "-A", "scram-sha-256", "-E", "UTF8", "--locale-provider=icu", "--icu-locale=en", "--locale=C.UTF-8", "--no-sync")
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if addr, ok := lis.Addr().(*net.TCPAddr); ok {
		p.port = addr.Port
	}
	_ = lis.Close()
	p.start()
	t.Cleanup(p.stop)
	return p
}

func (p *postgres) command(program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(context.Background(), filepath.Join(binaries, program), args...)
	cmd.Dir = p.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.who, Pdeathsig: syscall.SIGQUIT}
	return cmd
}

func (p *postgres) start() {
	p.t.Helper()
	p.cmd = p.command("postgres", "-D", filepath.Join(p.dir, "data"), "-h", "127.0.0.1", "-p", strconv.Itoa(p.port), "-k", p.dir, "-F")
	p.cmd.Stderr = &p.log
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *postgres) stop() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGINT) // "fast"
	_ = p.cmd.Wait()
	p.cmd = nil
}

func (p *postgres) dsn(password string) string {
	return fmt.Sprintf("postgres://owner:%s@127.0.0.1:%d/postgres?sslmode=disable", password, p.port)
}

func TestPostgres(t *testing.T) {
	p := startPostgres(t)
	db, err := sql.Open("pgx", p.dsn("s3cret"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	await(t, func() bool { return db.PingContext(t.Context()) == nil })
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
			t.Fatal(err)
		}
	}
	skipped := fill(t, exec)
	checkSQL(t, p.dsn("s3cret"), skipped, exec)

	wrong, _, _, err := openSQL(t, "dsn: "+p.dsn("wrong")+queries)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wrong.Domains(t.Context(), everything); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("a wrong password: %v", err)
	}

	slow, _, _, err := openSQL(t, "dsn: "+p.dsn("s3cret")+"\ntimeout: 300ms\ndomains: SELECT 'a.example', 1 FROM pg_sleep(60)\nmailboxes: SELECT @domain\n")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := slow.Domains(t.Context(), everything); !errors.Is(err, directory.ErrUnavailable) || time.Since(start) > 20*time.Second {
		t.Errorf("a slow query: %v after %v", err, time.Since(start))
	}

	// Down and up again.
	s, _, _, err := openSQL(t, "dsn: "+p.dsn("s3cret")+queries)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Domains(t.Context(), everything); err != nil {
		t.Fatal(err)
	}
	p.stop()
	if _, err := s.Has(t.Context(), mailbox(t, "bob@example.org")); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("while it is down: %v", err)
	}
	p.start()
	await(t, func() bool {
		has, err := s.Has(t.Context(), mailbox(t, "bob@example.org"))
		return err == nil && has
	})
}

// path2URI is how SQLite takes a path with a question mark.
func path2URI(path string) string { return "file:" + filepath.Dir(path) + "/mail%20users%3F.db" }
