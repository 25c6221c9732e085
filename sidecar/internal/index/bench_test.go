package index_test

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

// load builds a root of n mailboxes with three nets each. So many share a list.
func load(b *testing.B, w *index.Writer, n, share int) *index.Root {
	b.Helper()
	bld := w.Rebuild()
	for i := range n {
		if err := bld.Put(hashed(i), []byte(nets(uint32(i/share), 3))); err != nil {
			b.Fatal(err)
		}
	}
	return bld.Build()
}

// heap returns the live heap in octets.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// sizes are numbers of mailboxes. Ten million take gigabytes and a minute: BENCH_LARGE=1.
func sizes() []int {
	s := []int{100_000, 1_000_000}
	if os.Getenv("BENCH_LARGE") != "" {
		s = append(s, 10_000_000)
	}
	return s
}

// BenchmarkMemory loads mailboxes with three nets each and reports what they take, the writer's share included.
func BenchmarkMemory(b *testing.B) {
	for _, share := range []int{20, 1} {
		for _, n := range sizes() {
			b.Run(fmt.Sprintf("share=%d/mailboxes=%d", share, n), func(b *testing.B) {
				for b.Loop() {
					before := heap()
					w := index.NewWriter()
					root := load(b, w, n, share)
					b.ReportMetric(float64(heap()-before)/float64(n), "B/mailbox")
					runtime.KeepAlive(root)
					runtime.KeepAlive(w)
				}
			})
		}
	}
}

// BenchmarkLookup compares with a Go map, both over ids in no order.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1_000, 1_000_000} {
		ids := make([]allow.ID, 1<<20)
		for i := range ids {
			ids[i] = hashed(i * 7919 % n)
		}
		b.Run(fmt.Sprintf("index/%d", n), func(b *testing.B) {
			root := load(b, index.NewWriter(), n, 20)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if root.Lookup(ids[i&(1<<20-1)]) == nil {
					b.Fatal("not found")
				}
				i++
			}
		})
		b.Run(fmt.Sprintf("map/%d", n), func(b *testing.B) {
			root := load(b, index.NewWriter(), n, 20)
			m := make(map[allow.ID]*allow.Set, n)
			for i := range n {
				m[hashed(i)] = root.Lookup(hashed(i))
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if m[ids[i&(1<<20-1)]] == nil {
					b.Fatal("not found")
				}
				i++
			}
		})
	}
}

// BenchmarkCommit is one save. The mailbox gets a list of its own.
func BenchmarkCommit(b *testing.B) {
	for _, share := range []int{20, 1} {
		for _, n := range sizes() {
			b.Run(fmt.Sprintf("share=%d/mailboxes=%d", share, n), func(b *testing.B) {
				w := index.NewWriter()
				load(b, w, n, share)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					e := w.Edit()
					if err := e.Put(hashed(i%n), []byte(nets(uint32(n+i%n), 3))); err != nil {
						b.Fatal(err)
					}
					e.Build()
				}
			})
		}
	}
}

// BenchmarkRebuild is a whole snapshot, per mailbox.
func BenchmarkRebuild(b *testing.B) {
	const n = 1_000_000
	b.ReportAllocs()
	for b.Loop() {
		load(b, index.NewWriter(), n, 20)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/mailbox")
}

// BenchmarkBulk is BenchmarkRebuild with sets and mailboxes in order, as they are kept on disk.
func BenchmarkBulk(b *testing.B) {
	const n = 1_000_000
	for _, per := range []int{20, 1} {
		b.Run(fmt.Sprintf("lists_shared_by_%d", per), func(b *testing.B) {
			bld := index.NewWriter().Rebuild()
			for i := range n {
				if err := bld.Put(hashed(i), []byte(nets(uint32(i/per), 3))); err != nil {
					b.Fatal(err)
				}
			}
			root := bld.Build()
			b.ReportAllocs()
			for b.Loop() {
				bld := index.NewWriter().Rebuild()
				numbers := make([]uint32, root.MaxNumber()+1)
				var encoding []byte
				for id, number := range root.All() {
					if numbers[number] == 0 {
						encoding = root.Set(number).AppendEncoding(encoding[:0])
						var err error
						if numbers[number], err = bld.AddSet(encoding); err != nil {
							b.Fatal(err)
						}
					}
					if err := bld.Append(id, numbers[number]); err != nil {
						b.Fatal(err)
					}
				}
				if got := bld.Build(); got.Digest() != root.Digest() {
					b.Fatal("another root")
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/mailbox")
		})
	}
}
