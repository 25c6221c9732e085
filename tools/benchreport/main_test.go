package main

import (
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// TestReport compares what a sample of `make bench` becomes with testdata/golden.
func TestReport(t *testing.T) {
	dir := t.TempDir()
	var out, notes strings.Builder
	if err := run("testdata/bench.txt", dir, &out, &notes); err != nil {
		t.Fatal(err)
	}
	if want := "no figure shows Unknown\n"; notes.String() != want {
		t.Errorf("notes %q, want %q", notes.String(), want)
	}
	if err := os.WriteFile(filepath.Join(dir, "tables.md"), []byte(out.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	written, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(written) != 3 {
		t.Errorf("wrote %q", written)
	}
	for _, path := range written {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", "golden", filepath.Base(path))
		if *update {
			if err := os.WriteFile(golden, got, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-want +got; -update writes it):\n%s", golden, diff)
		}
		if strings.HasSuffix(path, ".svg") {
			wellFormed(t, path, string(got))
		}
	}
}

func wellFormed(t *testing.T, path, text string) {
	t.Helper()
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Errorf("%s: %v", path, err)
			return
		}
	}
}

func TestGrowth(t *testing.T) {
	for _, tt := range []struct {
		name   string
		points []point
		want   string
	}{
		{"one point", []point{{1000, 5}}, "–"},
		{"less than a decade", []point{{1, 5}, {4, 20}}, "–"},
		{"flat", []point{{1000, 5}, {10_000, 5.1}, {100_000, 4.9}}, "constant (n^-0.00)"},
		{"in step", []point{{1000, 5}, {10_000, 50}, {100_000, 500}}, "linear (n^1.00)"},
		{"root", []point{{100, 10}, {10_000, 100}}, "n^0.50"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := growth(tt.points); got != tt.want {
				t.Errorf("growth %q, want %q", got, tt.want)
			}
		})
	}
}

func TestFormats(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{nanoseconds(64), "64 ns"},
		{nanoseconds(999_700), "1 ms"},
		{nanoseconds(1_600_000_000), "1.6 s"},
		{milliseconds(0.25), "250 µs"},
		{octets(1763), "1.76 kB"},
		{plain(100_000), "100,000"},
		{plain(1046), "1,046"},
		{plain(0.0417), "0.0417"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
}
