package directory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/services/dashboard/internal/livefile"
)

const (
	keep      = 15 * time.Second // what was read is used again for so long
	keepNo    = time.Second      // and for so long to say that something is not there
	keepCount = 64               // of how many domains the mailboxes are kept
	maxRows   = 1 << 20          // of one answer
)

// SQL is a directory in a database. It asks with the operator's own queries, which stand in a YAML file:
//
//	dsn: postgres://reader:secret@db.example/mail?sslmode=verify-full
//	domains: SELECT domain, count(*) FROM users GROUP BY domain
//	mailboxes: SELECT username || '@' || domain FROM users WHERE domain = @domain
//	timeout: 5s
//
// The dsn of an SQLite file is sqlite:PATH; a relative path begins at the folder of the YAML file. domains answers with two
// columns, each domain and how many mailboxes it has. mailboxes answers with one, the whole names of a domain's mailboxes,
// in any order; @domain is its only placeholder, and stands for the domain as domains spelled it. Both only read: in
// PostgreSQL they run in a read-only transaction, an SQLite file is opened for reading.
//
// The mailboxes of a domain are read at once, made canonical and sorted here, so that paging and search do not depend on the
// database's collation and spelling, and are used again for 15 s. Names that are no domains or mailboxes, or that are in
// another domain, are skipped, logged and counted. It is safe for concurrent use.
type SQL struct {
	db      *sql.DB
	ask     func(ctx context.Context, query string, args map[string]any, scan func(*sql.Rows) error) error
	queries sqlFile
	log     *slog.Logger

	asked   *prometheus.CounterVec
	skipped prometheus.Counter

	flights  singleflight.Group
	mu       sync.Mutex
	domains  kept[map[string]domainRow]
	listings map[string]kept[listing] // by canonical domain
	warned   map[string]int           // skipped names that were logged, by canonical domain; "" for domains
}

// kept is something that was read from the database.
type kept[T any] struct {
	value T
	read  time.Time // the zero time for never
}

// domainRow is a domain of the database.
type domainRow struct {
	spellings []string
	mailboxes int
}

// sqlFile is what the YAML file holds.
type sqlFile struct {
	DSN       string        `yaml:"dsn"`
	Domains   string        `yaml:"domains"`
	Mailboxes string        `yaml:"mailboxes"`
	Timeout   time.Duration `yaml:"timeout"`
}

// OpenSQL reads the file at path. The database need not answer yet.
func OpenSQL(ctx context.Context, path string, log *slog.Logger, metrics prometheus.Registerer) (*SQL, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := &SQL{
		queries: sqlFile{Timeout: 5 * time.Second}, log: log,
		listings: make(map[string]kept[listing]), warned: make(map[string]int),
		asked: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_dashboard_directory_queries_total", Help: "Queries to the database of domains and mailboxes.",
		}, []string{"query", "result"}),
		skipped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_dashboard_directory_skipped_total", Help: "Names in the database's answers that were skipped because they are no domain or mailbox, or in another domain.",
		}),
	}
	if err := livefile.Decode(data, &s.queries); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := s.queries.validate(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := s.open(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range []prometheus.Collector{s.asked, s.skipped} {
		if err := metrics.Register(c); err != nil {
			_ = s.db.Close()
			return nil, err
		}
	}
	return s, nil
}

// Close ends the connections.
func (s *SQL) Close() { _ = s.db.Close() }

func (f sqlFile) validate(ctx context.Context) error {
	for _, q := range []struct {
		name, query string
		args        pgx.StrictNamedArgs
		usage       string
	}{
		{"domains", f.Domains, pgx.StrictNamedArgs{}, "it has no placeholder"},
		{"mailboxes", f.Mailboxes, pgx.StrictNamedArgs{"domain": ""}, "its only placeholder is @domain"},
	} {
		if strings.TrimSpace(q.query) == "" {
			return fmt.Errorf("%s is missing: it must be a query", q.name)
		}
		if _, _, err := q.args.RewriteQuery(ctx, nil, q.query, nil); err != nil {
			return fmt.Errorf("%s: %w; %s", q.name, err, q.usage)
		}
	}
	if f.Timeout <= 0 || f.Timeout > time.Minute {
		return fmt.Errorf("timeout must be above 0 and at most 1m, not %v", f.Timeout)
	}
	return nil
}

// open chooses the driver by the dsn. Nothing connects yet. Errors do not show the dsn, which may hold a password.
func (s *SQL) open(dir string) error {
	scheme, rest, _ := strings.Cut(s.queries.DSN, ":")
	switch scheme {
	case "postgres", "postgresql":
		cfg, err := pgx.ParseConfig(s.queries.DSN)
		if err != nil {
			return errors.New("the dsn is not of the form postgres://USER:PASSWORD@HOST/DATABASE")
		}
		s.db, s.ask = stdlib.OpenDB(*cfg), s.askPostgres
	case "sqlite":
		if rest == "" {
			return errors.New("the dsn sqlite: lacks the path of the file")
		}
		if !filepath.IsAbs(rest) {
			rest = filepath.Join(dir, rest)
		}
		u := url.URL{Scheme: "file", Path: rest, RawQuery: url.Values{"mode": {"ro"}, "_pragma": {"query_only(1)", "busy_timeout(2000)"}}.Encode()}
		var err error
		if s.db, err = sql.Open("sqlite", u.String()); err != nil {
			return err
		}
		s.ask = s.askSQLite
	default:
		return errors.New("the dsn must begin with postgres: or sqlite: and say where the database is")
	}
	s.db.SetMaxOpenConns(4)
	s.db.SetConnMaxLifetime(5 * time.Minute)
	s.db.SetConnMaxIdleTime(time.Minute)
	return nil
}

func (s *SQL) askPostgres(ctx context.Context, query string, args map[string]any, scan func(*sql.Rows) error) error {
	query, values, err := pgx.NamedArgs(args).RewriteQuery(ctx, nil, query, nil)
	if err != nil {
		return err
	}
	tx, err := s.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	rows, err := tx.QueryContext(ctx, query, values...)
	return each(rows, err, scan)
}

func (s *SQL) askSQLite(ctx context.Context, query string, args map[string]any, scan func(*sql.Rows) error) error {
	var values []any
	for name, value := range args {
		values = append(values, sql.Named(name, value))
	}
	rows, err := s.db.QueryContext(ctx, query, values...)
	return each(rows, err, scan)
}

func each(rows *sql.Rows, err error, scan func(*sql.Rows) error) error {
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for n := 0; rows.Next(); n++ {
		if n == maxRows {
			return fmt.Errorf("the answer has more than %d rows", maxRows)
		}
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Domains returns the domains that somebody may see, ordered by name.
func (s *SQL) Domains(ctx context.Context, may func(domain string) bool) ([]Domain, error) {
	rows, err := s.readDomains(ctx, keep)
	if err != nil {
		return nil, err
	}
	found := []Domain{}
	for name, row := range rows {
		if may(name) {
			found = append(found, Domain{Name: name, Mailboxes: row.mailboxes})
		}
	}
	sortDomains(found)
	return found, nil
}

// Mailboxes returns a page of the mailboxes of domain, a canonical domain. Of a domain that is not there it is empty.
func (s *SQL) Mailboxes(ctx context.Context, domain string, q Query) (Page, error) {
	l, err := s.readListing(ctx, domain, keep)
	return l.page(q), err
}

// Has reports whether there is such a mailbox. One that was made in the last second may be missing.
func (s *SQL) Has(ctx context.Context, m allow.Mailbox) (bool, error) {
	l, err := s.readListing(ctx, m.Domain(), keep)
	if err == nil && !l.has(m) {
		l, err = s.readListing(ctx, m.Domain(), keepNo)
	}
	return l.has(m), err
}

// readDomains returns what is at most maxAge old.
func (s *SQL) readDomains(ctx context.Context, maxAge time.Duration) (map[string]domainRow, error) {
	s.mu.Lock()
	known := s.domains
	s.mu.Unlock()
	if time.Since(known.read) < maxAge {
		return known.value, nil
	}
	return flight(ctx, s, "", func(ctx context.Context) (map[string]domainRow, error) {
		read := time.Now()
		rows, err := s.askDomains(ctx)
		if err == nil {
			s.mu.Lock()
			s.domains = kept[map[string]domainRow]{rows, read}
			s.mu.Unlock()
		}
		return rows, err
	})
}

// readListing returns what is at most maxAge old.
func (s *SQL) readListing(ctx context.Context, domain string, maxAge time.Duration) (listing, error) {
	s.mu.Lock()
	known := s.listings[domain]
	s.mu.Unlock()
	if time.Since(known.read) < maxAge {
		return known.value, nil
	}
	domains, err := s.readDomains(ctx, keep)
	if _, there := domains[domain]; err == nil && !there {
		domains, err = s.readDomains(ctx, keepNo)
	}
	row, there := domains[domain]
	if err != nil || !there {
		return nil, err
	}
	return flight(ctx, s, domain, func(ctx context.Context) (listing, error) {
		read := time.Now()
		l, err := s.askMailboxes(ctx, domain, row.spellings)
		if err == nil {
			s.keepListing(domain, kept[listing]{l, read})
		}
		return l, err
	})
}

// flight runs read once for all who want the same at the same time. It is not theirs to cancel; the timeout ends it.
func flight[T any](ctx context.Context, s *SQL, key string, read func(context.Context) (T, error)) (T, error) {
	value, err, _ := s.flights.Do(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.queries.Timeout)
		defer cancel()
		return read(ctx)
	})
	t, _ := value.(T)
	return t, err
}

func (s *SQL) keepListing(domain string, l kept[listing]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listings[domain] = l
	if len(s.listings) <= keepCount {
		return
	}
	oldest := domain
	for name, other := range s.listings {
		if other.read.Before(s.listings[oldest].read) {
			oldest = name
		}
	}
	delete(s.listings, oldest)
}

func (s *SQL) askDomains(ctx context.Context) (map[string]domainRow, error) {
	rows := make(map[string]domainRow)
	var skipped []error
	err := s.ask(ctx, s.queries.Domains, nil, func(r *sql.Rows) error {
		var spelling sql.NullString
		var count int
		if err := r.Scan(&spelling, &count); err != nil {
			return err
		}
		domain, err := allow.ParseDomain(spelling.String)
		if err != nil {
			skipped = append(skipped, err)
			return nil
		}
		row := rows[domain]
		row.spellings, row.mailboxes = append(row.spellings, spelling.String), row.mailboxes+count
		rows[domain] = row
		return nil
	})
	return rows, s.finish("domains", "", skipped, err)
}

func (s *SQL) askMailboxes(ctx context.Context, domain string, spellings []string) (listing, error) {
	var l listing
	var skipped []error
	for _, spelling := range spellings {
		err := s.ask(ctx, s.queries.Mailboxes, map[string]any{"domain": spelling}, func(r *sql.Rows) error {
			var name sql.NullString
			if err := r.Scan(&name); err != nil {
				return err
			}
			m, err := allow.ParseMailbox(name.String)
			switch {
			case err != nil:
				skipped = append(skipped, err)
			case m.Domain() != domain:
				skipped = append(skipped, &allow.NameError{Text: name.String, Problem: "is in another domain"})
			default:
				l = append(l, m)
			}
			return nil
		})
		if err != nil {
			return nil, s.finish("mailboxes", domain, nil, err)
		}
	}
	slices.SortFunc(l, compare)
	return slices.Compact(l), s.finish("mailboxes", domain, skipped, nil)
}

// finish counts a query and what was skipped, logs news of it, and returns its error for the callers.
func (s *SQL) finish(query, domain string, skipped []error, err error) error {
	if err != nil {
		s.asked.WithLabelValues(query, "failed").Inc()
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, query, err)
	}
	s.asked.WithLabelValues(query, "ok").Inc()
	s.skipped.Add(float64(len(skipped)))
	s.mu.Lock()
	news := s.warned[domain] != len(skipped)
	s.warned[domain] = len(skipped)
	s.mu.Unlock()
	if news && len(skipped) > 0 {
		s.log.Warn("names in the database were skipped", "query", query, "domain", domain, "count", len(skipped), "first", skipped[0])
	}
	return nil
}
