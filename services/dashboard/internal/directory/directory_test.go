package directory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/directory"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// domains is a directory.
type domains interface {
	Domains(ctx context.Context, may func(domain string) bool) ([]directory.Domain, error)
	Mailboxes(ctx context.Context, domain string, q directory.Query) (directory.Page, error)
	Has(ctx context.Context, m allow.Mailbox) (bool, error)
}

// sample is what every implementation is filled with, as an operator spelled it.
func sample() map[string][]string {
	return map[string][]string{
		"Example.ORG":     {"Alice", "alice-b", "bob", "zoë", "zoe", "carol.smith", "007", "yes"},
		"bücher.example":  {"eva"},
		"example.net":     {},
		"big_one.example": numbered(1200),
	}
}

func numbered(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("user%05d", i)
	}
	return names
}

func mailbox(t *testing.T, name string) allow.Mailbox {
	t.Helper()
	if name == "" {
		return allow.Mailbox{}
	}
	m, err := allow.ParseMailbox(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func names(p directory.Page) []string {
	all := []string{}
	for _, m := range p.Mailboxes {
		all = append(all, m.String())
	}
	return all
}

func everything(string) bool { return true }

// conform checks a directory that holds the sample.
func conform(t *testing.T, d domains, hasEmpty bool) {
	ctx := t.Context()
	all := []directory.Domain{{"big_one.example", 1200}, {"example.net", 0}, {"example.org", 8}, {"xn--bcher-kva.example", 1}}
	if !hasEmpty {
		all = slices.Delete(all, 1, 2)
	}
	for name, c := range map[string]struct {
		may  func(string) bool
		want []directory.Domain
	}{
		"all":  {everything, all},
		"none": {func(string) bool { return false }, []directory.Domain{}},
		"some": {
			func(domain string) bool { return domain == "xn--bcher-kva.example" || domain == "big_one.example" },
			[]directory.Domain{{"big_one.example", 1200}, {"xn--bcher-kva.example", 1}},
		},
	} {
		got, err := d.Domains(ctx, c.may)
		if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
	for name, c := range map[string]struct {
		domain string
		query  directory.Query
		after  string
		want   []string
		more   bool
		total  int
	}{
		"all": {domain: "example.org", total: 8, want: []string{
			"007@example.org", "alice-b@example.org", "alice@example.org", "bob@example.org", "carol.smith@example.org", "yes@example.org", "zoe@example.org", "zoë@example.org",
		}},
		"first page":                         {domain: "example.org", query: directory.Query{Limit: 2}, want: []string{"007@example.org", "alice-b@example.org"}, more: true, total: 8},
		"next page":                          {domain: "example.org", query: directory.Query{Limit: 2}, after: "alice-b@example.org", want: []string{"alice@example.org", "bob@example.org"}, more: true, total: 8},
		"after one that left":                {domain: "example.org", query: directory.Query{Limit: 1}, after: "alice-c@example.org", want: []string{"alice@example.org"}, more: true, total: 8},
		"last page":                          {domain: "example.org", query: directory.Query{Limit: 2}, after: "yes@example.org", want: []string{"zoe@example.org", "zoë@example.org"}, total: 8},
		"behind the end":                     {domain: "example.org", query: directory.Query{Limit: 2}, after: "zoë@example.org", want: []string{}, total: 8},
		"search":                             {domain: "example.org", query: directory.Query{Search: " LIC", Limit: 5}, want: []string{"alice-b@example.org", "alice@example.org"}, total: 2},
		"search, paged":                      {domain: "example.org", query: directory.Query{Search: "alice", Limit: 1}, want: []string{"alice-b@example.org"}, more: true, total: 2},
		"search, next page":                  {domain: "example.org", query: directory.Query{Search: "alice", Limit: 1}, after: "alice-b@example.org", want: []string{"alice@example.org"}, total: 2},
		"search, decomposed":                 {domain: "example.org", query: directory.Query{Search: "ZOE\u0308"}, want: []string{"zoë@example.org"}, total: 1},
		"search, the domain is not searched": {domain: "example.org", query: directory.Query{Search: "example"}, want: []string{}},
		"search, whole name":                 {domain: "example.org", query: directory.Query{Search: "bob@exam"}, want: []string{"bob@example.org"}, total: 1},
		"search, no wildcard":                {domain: "example.org", query: directory.Query{Search: "%"}, want: []string{}},
		"search, no SQL":                     {domain: "example.org", query: directory.Query{Search: "' OR 1=1 --"}, want: []string{}},
		"another spelling":                   {domain: "xn--bcher-kva.example", want: []string{"eva@xn--bcher-kva.example"}, total: 1},
		"nobody":                             {domain: "example.net", want: []string{}},
		"no domain":                          {domain: "unknown.example", want: []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			c.query.After = mailbox(t, c.after)
			p, err := d.Mailboxes(ctx, c.domain, c.query)
			if diff := cmp.Diff(c.want, names(p)); err != nil || diff != "" || p.More != c.more || p.Total != c.total {
				t.Errorf("%v, more %v, total %d\n%s", err, p.More, p.Total, diff)
			}
		})
	}
	t.Run("page by page", func(t *testing.T) {
		var got []string
		q := directory.Query{Limit: 7}
		for range 1000 {
			p, err := d.Mailboxes(ctx, "big_one.example", q)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, names(p)...)
			if !p.More {
				break
			}
			q.After = p.Mailboxes[len(p.Mailboxes)-1]
		}
		want := numbered(1200)
		for i := range want {
			want[i] += "@big_one.example"
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
	for name, want := range map[string]bool{
		"alice@example.org": true, "ALICE@Example.org": true, "zoë@example.org": true, "eva@bücher.example": true,
		"dave@example.org": false, "alice@example.net": false, "alice@unknown.example": false, "eva@example.org": false,
	} {
		if got, err := d.Has(ctx, mailbox(t, name)); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// openFile opens a directory file.
func openFile(t *testing.T, content string) (f *directory.File, path string, err error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "directory.yaml")
	write(t, path, content)
	w, err := livefile.NewWatcher(slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	f, err = directory.OpenFile(w, path)
	return f, path, err
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFile(t *testing.T) {
	var b strings.Builder
	b.WriteString("domains:\n")
	for domain, mailboxes := range sample() {
		fmt.Fprintf(&b, "  %s: [%s]\n", domain, strings.Join(mailboxes, ", "))
	}
	f, _, err := openFile(t, b.String())
	if err != nil {
		t.Fatal(err)
	}
	conform(t, f, true)
}

func TestFileRefuses(t *testing.T) {
	for content, want := range map[string]string{
		"":                                  "it has no domains",
		"domains:":                          "it has no domains",
		"domains: [example.org]":            "it has no domains",
		"domians: {example.org: [a]}":       "line 1: field domians not found",
		"domains:\n  example..org: [a]":     `line 2: "example..org" has an empty part in its domain; remove the extra dot`,
		"domains:\n  a.org: [x]\n  A.ORG.:": "line 3: the domain a.org stands on line 2 already",
		"domains:\n  a.org:\n  - x\n  - y\n  - X@A.org": "line 5: the mailbox x@a.org stands on line 3 already",
		"domains:\n  a.org:\n  - x y":                   `line 3: "x y" has a character before the @`,
		"domains:\n  a.org:\n  - x@b.org":               "line 3: the mailbox x@b.org is not in the domain a.org, below which it stands",
		"domains:\n  a.org:\n  - {x: y}":                "line 3: a mailbox of a.org must be a name",
		"domains:\n  a.org:\n  -":                       "line 3: a mailbox of a.org must be a name",
		"domains:\n  a.org: alice":                      "line 2: the mailboxes of a.org must be a list",
		"domains: {a.org: [x]}\n---\n":                  "more than one YAML document",
	} {
		_, path, err := openFile(t, content)
		if err == nil || !strings.HasPrefix(err.Error(), path+": "+want) && !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// TestBigFile: 50,000 mailboxes, as in docs/performance.md.
func TestBigFile(t *testing.T) {
	total := 0
	for _, name := range numbered(50_000) {
		if strings.Contains(name, "99") {
			total++
		}
	}
	start := time.Now()
	f, _, err := openFile(t, "domains:\n  big.example:\n  - "+strings.Join(numbered(50_000), "\n  - "))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("read in %v", time.Since(start))
	start = time.Now()
	p, err := f.Mailboxes(t.Context(), "big.example", directory.Query{Search: "99", Limit: 50})
	if err != nil || p.Total != total || len(p.Mailboxes) != 50 || !p.More {
		t.Errorf("%d of %d, %v", len(p.Mailboxes), p.Total, err)
	}
	t.Logf("searched in %v", time.Since(start))
}

func openSQL(t *testing.T, content string) (*directory.SQL, *prometheus.Registry, *bytes.Buffer, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sql.yaml")
	write(t, path, content)
	var log bytes.Buffer
	metrics := prometheus.NewRegistry()
	s, err := directory.OpenSQL(t.Context(), path, slog.New(slog.NewTextHandler(&log, nil)), metrics)
	if err == nil {
		t.Cleanup(s.Close)
	}
	return s, metrics, &log, err
}

func TestSQLRefuses(t *testing.T) {
	const queries = "\ndomains: SELECT d, 1 FROM t\nmailboxes: SELECT m FROM t WHERE d = @domain\n"
	for content, want := range map[string]string{
		"":                                 "domains is missing",
		"dsn: sqlite:x\ndomains: SELECT 1": "mailboxes is missing",
		"dsn: sqlite:x\ndomains: SELECT @domain, 1\nmailboxes: SELECT @domain":             "domains: argument domain",
		"dsn: sqlite:x\ndomains: SELECT d, 1 FROM t\nmailboxes: SELECT m FROM t":           "mailboxes: argument domain of StrictNamedArgs not found",
		"dsn: sqlite:x\ndomains: SELECT d, 1 FROM t\nmailboxes: SELECT @domain WHERE @u=1": "its only placeholder is @domain",
		queries:                                  "the dsn must begin with postgres: or sqlite:",
		"dsn: mysql://secret@h/d" + queries:      "the dsn must begin with postgres: or sqlite:",
		"dsn: 'sqlite:'" + queries:               "lacks the path",
		"dsn: postgres://u:secret@h:x" + queries: "the dsn is not of the form",
		"dsn: sqlite:x\ntimeout: 0s" + queries:   "timeout must be",
		"dsn: sqlite:x\ntimeout: 2h" + queries:   "timeout must be",
		"dsn: sqlite:x\nfoo: 1" + queries:        "field foo not found",
	} {
		_, _, _, err := openSQL(t, content)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// fill makes and fills the table, and adds what must be skipped.
func fill(t *testing.T, exec func(query string, args ...any)) (skipped int) {
	t.Helper()
	exec("CREATE TABLE users (local TEXT, domain TEXT, home TEXT)")
	for domain, locals := range sample() {
		for i, local := range locals {
			spelled := domain
			if domain == "Example.ORG" && i%2 == 1 {
				spelled = "example.org" // two spellings of one domain
			}
			exec("INSERT INTO users VALUES ($1, $2, '/home')", local, spelled)
		}
	}
	exec("INSERT INTO users VALUES ('bad local', 'example.org', ''), ('x@evil.example', 'example.org', ''), ('', 'example.org', '')")
	exec("INSERT INTO users VALUES ('x', 'bad..domain', '')")
	exec("INSERT INTO users VALUES ('x', NULL, '')")
	return 3 + 2
}

// queries ask the table; the mailboxes that are to be skipped do not count.
const queries = `
domains: |
  SELECT domain, count(*) FROM users -- it's @nothing
  WHERE local NOT IN ('', 'bad local', 'x@evil.example', '@domain') GROUP BY domain
mailboxes: |
  SELECT CASE WHEN local LIKE '%@%' THEN local ELSE local || '@' || domain END /* @a */ FROM users WHERE domain = @domain AND home LIKE '%'
timeout: 20s
`

// checkSQL is for a filled database.
func checkSQL(t *testing.T, dsn string, skipped int, exec func(query string, args ...any)) {
	s, metrics, log, err := openSQL(t, "dsn: "+dsn+queries)
	if err != nil {
		t.Fatal(err)
	}
	conform(t, s, false)
	if n := counted(t, metrics, "allowednets_dashboard_directory_skipped_total"); n < float64(skipped) {
		t.Errorf("%v names were counted as skipped, of %d", n, skipped)
	}
	if got := log.String(); !strings.Contains(got, `query=mailboxes domain=example.org count=3`) || !strings.Contains(got, `query=domains domain="" count=2`) {
		t.Errorf("log:\n%s", got)
	}

	// A new mailbox is there after at most a second, though pages are remembered.
	exec("INSERT INTO users VALUES ('new', 'example.org', '')")
	made := time.Now()
	await(t, func() bool {
		has, err := s.Has(t.Context(), mailbox(t, "new@example.org"))
		if err != nil {
			t.Fatal(err)
		}
		return has
	})
	if took := time.Since(made); took > 10*time.Second {
		t.Errorf("a new mailbox was seen after %v", took)
	}

	// Nothing can be written, whatever the queries say.
	writer, _, _, err := openSQL(t, "dsn: "+dsn+"\ndomains: DELETE FROM users WHERE local = 'bob' RETURNING domain, 1\nmailboxes: SELECT @domain\n")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := writer.Domains(t.Context(), everything); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("a query that writes: %v", err)
	}
	again, _, _, err := openSQL(t, "dsn: "+dsn+queries)
	if err != nil {
		t.Fatal(err)
	}
	if has, err := again.Has(t.Context(), mailbox(t, "bob@example.org")); !has || err != nil {
		t.Errorf("bob was deleted: %v", err)
	}
}

// counted is the sum of a counter.
func counted(t *testing.T, metrics *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			for _, m := range family.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// await waits until done returns true.
func await(t *testing.T, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for !done() {
		select {
		case <-deadline.C:
			t.Fatal("it did not happen")
		case <-time.After(20 * time.Millisecond):
		}
	}
}
