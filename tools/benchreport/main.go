// Command benchreport turns what `make bench` measured into what docs/performance.md shows: a table for each figure, with the slope of
// its growth, on standard output, and a plot in a folder. It is a module of its own, outside of go.work.
//
//	benchreport bin/bench.txt docs/images/bench
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/perf/benchfmt"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: benchreport BENCHMARKS FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "benchreport:", err)
		os.Exit(1)
	}
}

// run says on notes which benchmarks no figure shows.
func run(input, folder string, out, notes io.Writer) error {
	f, err := os.Open(input) //nolint:gosec // our own argument
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	results, err := read(f, input)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // a folder of the repository
		return err
	}
	shown := make(map[string]bool)
	for _, fig := range figures() {
		lines := fig.lines(results)
		if len(lines) == 0 {
			continue
		}
		shown[fig.bench] = true
		if err := os.WriteFile(filepath.Join(folder, fig.file+".svg"), fig.plot(lines), 0o644); err != nil { //nolint:gosec // a file of the repository
			return err
		}
		fmt.Fprintf(out, "## %s\n\n%s\n", fig.title, fig.table(lines))
	}
	var rest []string
	for _, r := range results {
		if !shown[r.bench] && !slices.Contains(rest, r.bench) {
			rest = append(rest, r.bench)
		}
	}
	if len(rest) > 0 {
		fmt.Fprintf(notes, "no figure shows %s\n", strings.Join(rest, ", "))
	}
	return nil
}

// result is one line of a benchmark: its name, its key=value parts in order, and its metrics.
type result struct {
	bench  string
	keys   [][2]string
	values []benchfmt.Value
}

func read(r io.Reader, name string) ([]result, error) {
	var results []result
	reader := benchfmt.NewReader(r, name)
	for reader.Scan() {
		switch rec := reader.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, rec
		case *benchfmt.Result:
			base, parts := rec.Name.Parts()
			res := result{bench: string(base), values: slices.Clone(rec.Values)}
			for _, p := range parts {
				if key, value, ok := strings.Cut(strings.TrimPrefix(string(p), "/"), "="); ok {
					res.keys = append(res.keys, [2]string{key, value})
				}
			}
			results = append(results, res)
		}
	}
	return results, reader.Err()
}
