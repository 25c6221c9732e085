package directory_test

import (
	"database/sql"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
)

func TestSQLite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mail users?.db")
	db, err := sql.Open("sqlite", path2URI(path))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
			t.Fatal(err)
		}
	}
	skipped := fill(t, exec)
	checkSQL(t, "'sqlite:"+path+"'", skipped, exec)
}

// TestDeadline: a query that does not end is ended.
func TestDeadline(t *testing.T) {
	path := filepath.Join(t.TempDir(), "empty.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	if _, err := db.ExecContext(t.Context(), "CREATE TABLE t (x)"); err != nil {
		t.Fatal(err)
	}
	s, _, _, err := openSQL(t, "dsn: sqlite:"+path+"\ntimeout: 200ms\nmailboxes: SELECT @domain\n"+
		"domains: WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT 'a.example', max(i) FROM n\n")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := s.Domains(t.Context(), everything); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestNoDatabase: the dashboard starts without its database, and makes none.
func TestNoDatabase(t *testing.T) {
	dir := t.TempDir()
	for _, dsn := range []string{"sqlite:" + filepath.Join(dir, "missing.db"), "postgres://nobody:x@127.0.0.1:1/none?connect_timeout=1"} {
		s, _, _, err := openSQL(t, "dsn: "+dsn+queries)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Domains(t.Context(), everything); !errors.Is(err, directory.ErrUnavailable) {
			t.Errorf("%s: %v", dsn, err)
		}
		if _, err := s.Has(t.Context(), mailbox(t, "a@b.example")); !errors.Is(err, directory.ErrUnavailable) {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "*")); len(found) > 0 {
		t.Errorf("it made %q", found)
	}
}
