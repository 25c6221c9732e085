package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// figure is one table and its plot: how metrics of a benchmark grow with one of its keys.
type figure struct {
	file, title string
	bench       string
	where       string   // key=value that must be in the name; empty for all
	x, xTitle   string   // the key that grows
	units       []string // metrics, as they are called in the benchmark
	yTitle      string
	format      func(float64) string // of values
	ours        string               // the line that is drawn heavier
}

func figures() []figure {
	return []figure{
		{"peers-library", "A decision in a library", "Peers", "kind=library", "mailboxes", "restricted mailboxes", []string{"p50-ns"}, "median time of a decision", nanoseconds, "allowednets"},
		{"peers-server", "A decision of a server", "Peers", "kind=server", "mailboxes", "restricted mailboxes", []string{"p50-ns"}, "median time of a decision", nanoseconds, "allowednets-json"},
		{"peers-memory-library", "Memory of a library", "Peers", "kind=library", "mailboxes", "restricted mailboxes", []string{"B/mailbox"}, "live heap per mailbox", octets, "allowednets"},
		{"peers-change-library", "A change in a library", "Peers", "kind=library", "mailboxes", "restricted mailboxes", []string{"change-ns"}, "time until a decision shows it", nanoseconds, "allowednets"},
		{"peers-change-server", "A change of a server's lists", "Peers", "kind=server", "mailboxes", "restricted mailboxes", []string{"change-ns"}, "time until a decision shows it", nanoseconds, "allowednets-json"},
		{"logins", "Dovecot logins", "Logins", "", "callers", "clients that log in at once", []string{"logins/s"}, "logins per second", plain, "ours"},
		{"decide", "A decision in the sidecar", "Decide", "", "mailboxes", "restricted mailboxes", []string{"p50-ns", "p99-ns", "floor-p50-ns"}, "time of a decision", nanoseconds, ""},
		{"memory", "The sidecar's index", "Memory", "", "mailboxes", "restricted mailboxes", []string{"B/mailbox"}, "live heap per mailbox", octets, ""},
		{"commit", "A change in the sidecar's index", "Commit", "", "mailboxes", "restricted mailboxes", []string{"ns/op"}, "time of a change", nanoseconds, ""},
		{"door", "A check through a door", "Door", "", "callers", "callers at once", []string{"p50-ns"}, "median time of a check", nanoseconds, ""},
		{"door-floor", "A check next to its floor", "Door", "", "callers", "callers at once", []string{"x-floor"}, "ratio of times", plain, ""},
		{"propagation", "From save to enforced, median", "Propagation", "", "sidecars", "sidecars", []string{"p50-ms"}, "time from the save on", milliseconds, ""},
		{"propagation-p99", "From save to enforced, p99", "Propagation", "", "sidecars", "sidecars", []string{"p99-ms"}, "time from the save on", milliseconds, ""},
		{"idle", "Memory of an idle stream", "Idle", "", "streams", "idle streams", []string{"rss-KiB/stream", "live-KiB/stream"}, "KiB per stream", plain, ""},
		{"start", "Start", "Start", "", "mailboxes", "restricted mailboxes", []string{"ready-ms"}, "time until ready", milliseconds, ""},
	}
}

// line is one row of a table. Its points are in order of x, and positive.
type line struct {
	label  string
	points []point
}

type point struct{ x, y float64 }

// lines collects the medians of repeated results, in order of appearance.
func (f figure) lines(results []result) []line {
	var order []string
	values := make(map[string]map[float64][]float64)
	for _, unit := range f.units {
		for _, r := range results {
			label, x, ok := f.place(r)
			if !ok {
				continue
			}
			if len(f.units) > 1 {
				short, _, _ := strings.Cut(unit, "/")
				label = strings.TrimPrefix(label+" "+short[:strings.LastIndexByte(short, '-')], " ")
			}
			for _, v := range r.values {
				// benchfmt turns ns into sec; the original is what the benchmark said.
				y, of := v.Value, v.Unit
				if v.OrigUnit != "" {
					y, of = v.OrigValue, v.OrigUnit
				}
				if of != unit || y <= 0 {
					continue
				}
				if values[label] == nil {
					values[label], order = make(map[float64][]float64), append(order, label)
				}
				values[label][x] = append(values[label][x], y)
			}
		}
	}
	var lines []line
	for _, label := range order {
		l := line{label: label}
		for _, x := range slices.Sorted(maps.Keys(values[label])) {
			ys := slices.Sorted(slices.Values(values[label][x]))
			l.points = append(l.points, point{x, ys[len(ys)/2]})
		}
		lines = append(lines, l)
	}
	return lines
}

// place says which line and which x a result belongs to.
func (f figure) place(r result) (label string, x float64, ok bool) {
	found := f.where == ""
	var rest []string
	for _, kv := range r.keys {
		switch {
		case kv[0] == f.x:
			var err error
			x, err = strconv.ParseFloat(kv[1], 64)
			ok = err == nil && x > 0
		case kv[0]+"="+kv[1] == f.where:
			found = true
		default:
			if _, err := strconv.ParseFloat(kv[1], 64); err == nil {
				rest = append(rest, kv[0]+" "+kv[1])
			} else {
				rest = append(rest, kv[1])
			}
		}
	}
	return strings.Join(rest, ", "), x, ok && found && r.bench == f.bench
}

// table is in Markdown.
func (f figure) table(lines []line) string {
	xs := xsOf(lines)
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |", f.xTitle)
	for _, x := range xs {
		fmt.Fprintf(&b, " %s |", plain(x))
	}
	fmt.Fprintf(&b, " growth |\n|%s", strings.Repeat("---|", len(xs)+2))
	for _, l := range lines {
		fmt.Fprintf(&b, "\n| %s |", l.label)
		for _, x := range xs {
			i := slices.IndexFunc(l.points, func(p point) bool { return p.x == x })
			if i < 0 {
				b.WriteString(" – |")
			} else {
				fmt.Fprintf(&b, " %s |", f.format(l.points[i].y))
			}
		}
		fmt.Fprintf(&b, " %s |", growth(l.points))
	}
	return b.String() + "\n"
}

func xsOf(lines []line) []float64 {
	all := make(map[float64]bool)
	for _, l := range lines {
		for _, p := range l.points {
			all[p.x] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// growth names the exponent of the power law that fits best: least squares of the logarithms. Two points say nothing unless they
// are a decade apart.
func growth(points []point) string {
	if len(points) < 3 && points[len(points)-1].x < 10*points[0].x {
		return "–"
	}
	var sx, sy, sxx, sxy float64
	for _, p := range points {
		x, y := math.Log(p.x), math.Log(p.y)
		sx, sy, sxx, sxy = sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	n := float64(len(points))
	e := (n*sxy - sx*sy) / (n*sxx - sx*sx)
	switch {
	case math.Abs(e) < 0.1:
		return fmt.Sprintf("constant (n^%.2f)", e)
	case math.Abs(e-1) < 0.1:
		return fmt.Sprintf("linear (n^%.2f)", e)
	}
	return fmt.Sprintf("n^%.2f", e)
}

// plain writes three digits, or all of a whole number, with commas.
func plain(v float64) string {
	s := strconv.FormatFloat(v, 'g', 3, 64)
	if v >= 100 {
		s = strconv.FormatFloat(v, 'f', 0, 64)
	}
	for i := len(s) - 3; i > 0 && v >= 1000; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func nanoseconds(v float64) string {
	return scaled(v, []string{"ns", "µs", "ms", "s"}, 1000)
}

func milliseconds(v float64) string { return nanoseconds(v * 1e6) }

func octets(v float64) string { return scaled(v, []string{"B", "kB", "MB"}, 1000) }

func scaled(v float64, units []string, step float64) string {
	i := 0
	for ; v >= step*0.9995 && i < len(units)-1; i++ {
		v /= step
	}
	return plain(v) + " " + units[i]
}

// byLast sorts lines by where they end.
func byLast(a, b line) int {
	return cmp.Compare(b.points[len(b.points)-1].y, a.points[len(a.points)-1].y)
}
