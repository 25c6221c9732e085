package faults

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// step is one fault of a schedule.
type step struct {
	fault  *fault
	target int
	after  time.Duration // since the beginning of its group
	length time.Duration
	claims []string
}

func (s step) String() string {
	return fmt.Sprintf("%s[%d] +%v for %v", s.fault.name, s.target, s.after.Round(time.Millisecond), s.length.Round(time.Millisecond))
}

// group are faults that happen together: alone, or mixed. The next group waits until everything is healed.
type group []step

func (g group) String() string {
	var all []string
	for _, s := range g {
		all = append(all, s.String())
	}
	return strings.Join(all, " with ")
}

// mostLonger bounds how much longer than its shortest time a fault lasts.
const mostLonger = 6 * time.Second

// round makes the next part of a schedule: every fault once, in a random order, up to three of them at a time if they do not
// need the same program. The same random numbers make the same round.
func round(random *rand.Rand, faults []*fault) []group {
	var left []step
	for _, f := range faults {
		target := random.IntN(f.targets)
		left = append(left, step{
			fault: f, target: target, length: f.shortest + time.Duration(random.Int64N(int64(min(f.shortest, mostLonger)))),
			after: time.Duration(random.IntN(1000)) * time.Millisecond, claims: f.claims(target),
		})
	}
	random.Shuffle(len(left), func(i, j int) { left[i], left[j] = left[j], left[i] })
	var all []group
	for len(left) > 0 {
		g := group{left[0]}
		left = left[1:]
		size := 1 + random.IntN(3)
		for i := 0; i < len(left) && len(g) < size && !g[0].fault.alone; {
			if left[i].fault.alone || slices.ContainsFunc(g, func(s step) bool { return clash(s, left[i]) }) {
				i++
				continue
			}
			g = append(g, left[i])
			left = slices.Delete(left, i, i+1)
		}
		all = append(all, g)
	}
	return all
}

// clash reports whether two faults need the same program or network.
func clash(a, b step) bool {
	return slices.ContainsFunc(a.claims, func(c string) bool { return slices.Contains(b.claims, c) })
}
