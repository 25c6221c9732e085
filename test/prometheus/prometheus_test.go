// Package prometheus shows that the alerts and the dashboard of integrations/prometheus work: Debian's Prometheus scrapes the
// real programs while each alert's condition is caused for real.
//
// ALLOWEDNETS_E2E=required turns what this machine lacks into a failure, as in CI.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/allowednets/allowednets/test/stack"
)

// Jobs of prometheus.yml.
const (
	policies = "allowednets-policy"
	sidecars = "allowednets-sidecar"
)

const (
	// scrapeEvery replaces the intervals of prometheus.yml.
	scrapeEvery = 250 * time.Millisecond
	// patience bounds every wait on a busy machine.
	patience = time.Minute
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needPrometheus is the one place where a test is skipped.
func needPrometheus(t *testing.T) {
	t.Helper()
	for _, program := range []string{"prometheus", "promtool"} {
		_, err := exec.LookPath(program)
		if err == nil {
			continue
		}
		if os.Getenv("ALLOWEDNETS_E2E") == "required" {
			t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
		}
		t.Skipf("NOT TESTED against a real Prometheus: %v", err)
	}
}

// shipped returns the path of a file of integrations/prometheus.
func shipped(t *testing.T, name string) string {
	t.Helper()
	root, err := stack.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "integrations", "prometheus", name)
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// faster returns the rules with the times that a test cannot wait for replaced.
func faster(t *testing.T, rules string) string {
	t.Helper()
	for _, r := range []struct{ slow, fast string }{
		{`for: [0-9]+m`, `for: 1s`},
		{`offset (2m|1d)`, `offset 2s`},
		{`offset 1h`, `offset 10s`},
		{`allowednets_sidecar_data_age_seconds > 60\b`, `allowednets_sidecar_data_age_seconds > 8`}, // 5 s without a fault
		{`allowednets_sidecar_data_age_seconds > 600\b`, `allowednets_sidecar_data_age_seconds > 10`},
		{`allowednets_sidecar_connected\[2m\]`, `allowednets_sidecar_connected[2s]`},
	} {
		pattern := regexp.MustCompile(r.slow)
		if !pattern.MatchString(rules) {
			t.Fatalf("the rules have no %q any more", r.slow)
		}
		rules = pattern.ReplaceAllString(rules, r.fast)
	}
	return rules
}

// server is a Prometheus with the shipped configuration and rules, sped up.
type server struct {
	*stack.Process
	client http.Client
	url    string
	config string
}

// startPrometheus starts Prometheus on loopback, with nothing to scrape yet.
func startPrometheus(t *testing.T, s *stack.Stack) *server {
	t.Helper()
	address, err := s.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	p := &server{
		client: http.Client{Transport: &http.Transport{DisableKeepAlives: true}},
		url:    "http://" + address, config: s.Path("prometheus.yml"),
	}
	if err := os.WriteFile(s.Path("rules.yaml"), []byte(faster(t, read(t, shipped(t, "rules.yaml")))), 0o600); err != nil {
		t.Fatal(err)
	}
	p.configure(t, nil)
	p.Process, err = s.Start("prometheus", "prometheus", []string{
		"--config.file=" + p.config, "--storage.tsdb.path=" + s.Path("tsdb"), "--web.listen-address=" + address, "--log.level=warn",
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = p.AwaitReady(within(t, patience), func(ctx context.Context) error {
		var status any
		return p.get(ctx, "status/runtimeinfo", nil, &status)
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// configure writes prometheus.yml with the addresses to scrape, by job.
func (p *server) configure(t *testing.T, targets map[string][]string) {
	t.Helper()
	replace := func(text, pattern, by string) string {
		re := regexp.MustCompile(pattern)
		if !re.MatchString(text) {
			t.Fatalf("prometheus.yml has no %q any more", pattern)
		}
		return re.ReplaceAllString(text, by)
	}
	text := replace(read(t, shipped(t, "prometheus.yml")), `_interval: 15s`, `_interval: `+scrapeEvery.String())
	text = replace(text, `allowednets/rules\.yaml`, `rules.yaml`)
	for _, job := range []string{policies, sidecars} {
		list, err := json.Marshal(append([]string{}, targets[job]...))
		if err != nil {
			t.Fatal(err)
		}
		text = replace(text, `(?s)(job_name: `+job+`\b.*?targets: )\[.*?\]`, `${1}`+string(list))
	}
	if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// scrape changes what is scraped.
func (p *server) scrape(t *testing.T, targets map[string][]string) {
	t.Helper()
	p.configure(t, targets)
	if err := syscall.Kill(p.Pid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// get asks Prometheus's HTTP API and decodes the data of its answer.
func (p *server) get(ctx context.Context, path string, query url.Values, data any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/api/v1/"+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("%s: %s: %w", path, resp.Status, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return nil
}

// query evaluates an expression now and returns how many series it has.
func (p *server) query(ctx context.Context, expr string) (int, error) {
	var data struct{ Result []json.RawMessage }
	if err := p.get(ctx, "query", url.Values{"query": {expr}}, &data); err != nil {
		return 0, fmt.Errorf("%s: %w", expr, err)
	}
	return len(data.Result), nil
}

// holds waits until an expression has a result.
func (p *server) holds(t *testing.T, expr string) {
	t.Helper()
	p.holdsWhile(t, expr, func(context.Context) error { return nil })
}

// holdsWhile does something again and again until an expression has a result.
func (p *server) holdsWhile(t *testing.T, expr string, do func(context.Context) error) {
	t.Helper()
	err := await(within(t, patience), func(ctx context.Context) error {
		if err := do(ctx); err != nil {
			return err
		}
		n, err := p.query(ctx, expr)
		if err == nil && n == 0 {
			err = fmt.Errorf("no result of %s", expr)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// await calls probe every so often until it returns nil, and gives up with its last error when ctx ends.
func await(ctx context.Context, probe func(context.Context) error) error {
	tick := time.NewTicker(scrapeEvery / 2)
	defer tick.Stop()
	for last := errors.New("nothing"); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w; last seen: %w", ctx.Err(), last)
		}
		err := probe(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
	}
}

// rule is an alerting rule as Prometheus has it.
type rule struct {
	Name, Query, Health, LastError string
	Labels, Annotations            map[string]string
}

func (p *server) rules(ctx context.Context) ([]rule, error) {
	var data struct{ Groups []struct{ Rules []rule } }
	if err := p.get(ctx, "rules", nil, &data); err != nil {
		return nil, err
	}
	var all []rule
	for _, g := range data.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		return nil, errors.New("Prometheus has no rules")
	}
	return all, nil
}

// alert is an active alert.
type alert struct {
	State               string
	Labels, Annotations map[string]string
}

// firing returns an alert that fires, nil if it does not. labels are those it must have.
func (p *server) firing(ctx context.Context, name string, labels map[string]string) (*alert, error) {
	var data struct{ Alerts []alert }
	if err := p.get(ctx, "alerts", nil, &data); err != nil {
		return nil, err
	}
next:
	for _, a := range data.Alerts {
		if a.Labels["alertname"] != name || a.State != "firing" {
			continue
		}
		for k, v := range labels {
			if a.Labels[k] != v {
				continue next
			}
		}
		return &a, nil
	}
	return nil, nil
}

// complete complains of templates that could not be filled in.
func (a *alert) complete() error {
	for name, text := range a.Annotations {
		if strings.Contains(text, "<no value>") || strings.Contains(text, "error expanding") || strings.Contains(text, "{{") {
			return fmt.Errorf("%s, %s: %s", a.Labels["alertname"], name, text)
		}
	}
	return nil
}
