package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// maxWeight bounds what a browser loads for the first paint of a page, in octets of the wire.
	maxWeight = 60 << 10
	// restrictedCrowd is how many of the mailboxes of crowd.example have a list.
	restrictedCrowd = 1500
)

// TestDashboardWeight weighs the page of a domain with 50,000 mailboxes, and prints how long the server takes beside what the
// same server takes for a static file of about the size.
func TestDashboardWeight(t *testing.T) {
	s := newSite(t, settings{noDovecot: true})
	saves, ctx := errgroup.WithContext(within(t, startWithin))
	saves.SetLimit(16)
	for i := range restrictedCrowd {
		saves.Go(func() error {
			_, err := s.save(ctx, fmt.Sprintf("person.%05d@crowd.example", i*(crowd/restrictedCrowd)), fmt.Sprintf("203.0.113.%d, 2001:db8:%x::/48", i%256, i))
			return err
		})
	}
	if err := saves.Wait(); err != nil {
		t.Fatal(err)
	}
	c := s.session(t, inside)
	c.logIn(anna)
	const page = "/domains/crowd.example"
	shown := c.get(page)
	assets := regexp.MustCompile(`(?:href|src)="(/assets/[^"]+)"`).FindAllStringSubmatch(shown.body, -1)
	if len(assets) < 3 {
		t.Fatalf("the page names %q", assets)
	}
	weights := map[string]int{page: c.weigh(page)}
	floor := ""
	for _, a := range assets {
		weights[a[1]] = c.weigh(a[1])
		if floor == "" || weights[a[1]] > weights[floor] {
			floor = a[1]
		}
	}
	total := 0
	for path, weight := range weights {
		t.Logf("%6d octets  %s", weight, path)
		total += weight
	}
	t.Logf("%6d octets in all", total)
	if total > maxWeight {
		t.Errorf("the page weighs %d octets, more than %d", total, maxWeight)
	}
	base := c.median(floor)
	for _, path := range []string{floor, page, page + "?after=person.25000%40crowd.example", page + "?show=restricted", page + "?show=unrestricted", page + "?q=4999", page + "?q=nobody", "/domains"} {
		took := c.median(path)
		t.Logf("%8s  %5.1f times a static file  %s", took.Round(100*time.Microsecond), float64(took)/float64(base), path)
	}
	all := s.session(t, inside)
	all.logIn(hugo)
	for _, path := range []string{"/domains", "/domains?q=99"} {
		took := all.median(path)
		t.Logf("%8s  %5.1f times a static file  %s of %d domains", took.Round(100*time.Microsecond), float64(took)/float64(base), path, hosted)
	}
}

// weigh returns what a path weighs on the wire, headers aside.
func (c *session) weigh(path string) int {
	c.t.Helper()
	got := c.get(path, "Accept-Encoding", "gzip")
	if got.StatusCode != http.StatusOK || got.Header.Get("Content-Encoding") != "gzip" {
		c.t.Errorf("%s: %s, %q", path, got.Status, got.Header.Get("Content-Encoding"))
	}
	z, err := gzip.NewReader(bytes.NewReader([]byte(got.body)))
	if err == nil {
		_, err = io.Copy(io.Discard, z)
	}
	if err != nil {
		c.t.Errorf("%s: %v", path, err)
	}
	return len(got.body)
}

// median is the time to answer, of some.
func (c *session) median(path string) time.Duration {
	c.t.Helper()
	times := make([]time.Duration, 15)
	for i := range times {
		begin := time.Now()
		c.get(path, "Accept-Encoding", "gzip")
		times[i] = time.Since(begin)
	}
	slices.Sort(times)
	return times[len(times)/2]
}
