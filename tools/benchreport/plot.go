package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
)

// A plot in pixels; to the right of it stand the names of the lines.
const (
	width, height            = 800, 400
	left, right, top, bottom = 82, 560, 44, 344
	// between is the least distance of two names.
	between = 16
)

// style follows the reader's choice of light or dark, also where the plot is an image in a page.
const style = `<style>
svg { --paper: #ffffff; --ink: #1f2328; --faint: #d8dee4; --c0: #0550ae; --c1: #953800; --c2: #1a7f37; --c3: #8250df; --c4: #a40e26; --c5: #6e5a00; --c6: #0f6e84; --c7: #57606a; }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; --c0: #79c0ff; --c1: #ffa657; --c2: #7ee787; --c3: #d2a8ff; --c4: #ff7b72; --c5: #e3b341; --c6: #76e3ea; --c7: #9da7b3; } }
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: var(--faint); }
.line { fill: none; stroke-width: 2; }
.ours { stroke-width: 4; font-weight: 700; }
</style>
`

// plot draws lines on logarithmic axes. The same lines give the same octets.
func (f figure) plot(lines []line) []byte {
	xs := xsOf(lines)
	var ys []float64
	for _, l := range lines {
		for _, p := range l.points {
			ys = append(ys, p.y)
		}
	}
	ticks := ticksOf(slices.Min(ys), slices.Max(ys))
	low, high := min(ticks[0], slices.Min(ys)), max(ticks[len(ticks)-1], slices.Max(ys))
	xAt := func(x float64) float64 { return between + place(x, xs[0], xs[len(xs)-1], left, right-2*between) }
	yAt := func(y float64) float64 { return place(y, low, high, bottom, top) }

	var b bytes.Buffer
	title := f.title + ": " + f.yTitle + " by " + f.xTitle
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" role="img" aria-labelledby="title desc">`+"\n", width, height)
	fmt.Fprintf(&b, "<title id=\"title\">%s</title>\n<desc id=\"desc\">", html.EscapeString(title))
	for i, l := range lines {
		if i > 0 {
			b.WriteString("; ")
		}
		first, last := l.points[0], l.points[len(l.points)-1]
		fmt.Fprintf(&b, "%s: %s at %s, %s at %s", html.EscapeString(l.label), f.format(first.y), plain(first.x), f.format(last.y), plain(last.x))
	}
	fmt.Fprintf(&b, ". Both axes are logarithmic.</desc>\n%s<rect width=\"%d\" height=\"%d\" fill=\"var(--paper)\"/>\n", style, width, height)
	fmt.Fprintf(&b, `<text class="title" x="%d" y="24">%s</text>`+"\n", 16, html.EscapeString(f.title))
	for _, y := range ticks {
		fmt.Fprintf(&b, `<path class="grid" d="M%d %.1fH%d"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", left, yAt(y), right, left-8, yAt(y)+4, f.format(y))
	}
	for _, x := range xs {
		fmt.Fprintf(&b, `<path class="grid" d="M%.1f %dV%d"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", xAt(x), top, bottom, xAt(x), bottom+18, plain(x))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s (logarithmic)</text>`+"\n", (left+right)/2, height-14, html.EscapeString(f.xTitle))
	fmt.Fprintf(&b, `<text transform="translate(16 %d) rotate(-90)" text-anchor="middle">%s (logarithmic)</text>`+"\n", (top+bottom)/2, html.EscapeString(f.yTitle))

	sorted := slices.Clone(lines)
	slices.SortStableFunc(sorted, byLast)
	// From the top on, each name stands beside the end of its line, or below the one before; then from the bottom on.
	at := make([]float64, len(sorted))
	for i, l := range sorted {
		at[i] = yAt(l.points[len(l.points)-1].y) + 4
		if i > 0 {
			at[i] = max(at[i], at[i-1]+between)
		}
	}
	for i := len(at) - 1; i >= 0; i-- {
		most := float64(bottom + 4)
		if i < len(at)-1 {
			most = at[i+1] - between
		}
		at[i] = min(at[i], most)
	}
	for i, l := range sorted {
		class, colour := "line", fmt.Sprintf("var(--c%d)", 1+slices.IndexFunc(lines, func(o line) bool { return o.label == l.label })%7)
		if l.label == f.ours {
			class, colour = "line ours", "var(--c0)"
		}
		fmt.Fprintf(&b, `<path class="%s" stroke="%s" d="`, class, colour)
		for j, p := range l.points {
			fmt.Fprintf(&b, "%c%.1f %.1f", "ML"[min(j, 1)], xAt(p.x), yAt(p.y))
		}
		b.WriteString("\"/>\n")
		for _, p := range l.points {
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`, xAt(p.x), yAt(p.y), colour)
		}
		last := l.points[len(l.points)-1]
		fmt.Fprintf(&b, `<path d="M%.1f %.1fL%d %.1f" stroke="%s" stroke-width="0.7" stroke-dasharray="2 3"/>`, xAt(last.x)+5, yAt(last.y), right+8, at[i]-4, colour)
		fmt.Fprintf(&b, `<text class="%s" x="%d" y="%.1f" style="fill: %s">%s %s</text>`+"\n", map[bool]string{true: "ours"}[class != "line"], right+12, at[i], colour, html.EscapeString(l.label), f.format(last.y))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// place maps a value to a coordinate by its logarithm.
func place(v, low, high, from, to float64) float64 {
	if low == high {
		return (from + to) / 2
	}
	return from + (to-from)*math.Log(v/low)/math.Log(high/low)
}

// ticksOf returns powers of ten around the values, with 2 and 5 between them if there would be few, and none that is far off.
func ticksOf(low, high float64) []float64 {
	steps := []float64{1}
	if high/low < 100 {
		steps = []float64{1, 2, 5}
	}
	if high/low < 3 {
		steps = []float64{1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8}
	}
	var all []float64
	for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
		for _, s := range steps {
			all = append(all, s*math.Pow(10, e))
		}
	}
	from := 0
	for from+1 < len(all) && all[from+1] <= low {
		from++
	}
	to := from + 1
	for to < len(all)-1 && all[to] < high {
		to++
	}
	return all[from : to+1]
}
