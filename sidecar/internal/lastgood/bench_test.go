package lastgood

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
)

const million = 1_000_000

// large is a state of a million mailboxes with three nets each.
func large(b *testing.B, per int) State {
	bld := index.NewWriter().Rebuild()
	for i := range million {
		if err := bld.Put(mailbox(i), []byte(nets(uint32(i/per), 3))); err != nil {
			b.Fatal(err)
		}
	}
	return State{Cluster: 1, Token: revision.Token{Epoch: 1, Revision: 1}, Index: bld.Build()}
}

// largeFile writes a state with a journal of a quarter of its size, which is the most there is.
func largeFile(b *testing.B, st State, journal bool) string {
	path := filepath.Join(b.TempDir(), fileState)
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	length, err := writeSnapshot(b.Context(), f, st)
	if err != nil {
		b.Fatal(err)
	}
	var frames []byte
	if journal {
		w, was := index.NewWriter(), st.identity()
		bld := w.Rebuild()
		for id, number := range st.Index.All() {
			if err := bld.Put(id, st.Index.Set(number).AppendEncoding(nil)); err != nil {
				b.Fatal(err)
			}
		}
		for i := 0; int64(len(frames)) < length/4; i++ {
			var c Changes
			id, n := mailbox(i*7919%million), nets(uint32(i), 3)
			if err := bld.Put(id, []byte(n)); err != nil {
				b.Fatal(err)
			}
			c.Put(id, []byte(n))
			is := was
			is.token.Revision++
			is.count, is.digest = bld.Count(), bld.Digest()
			frames = appendCommit(frames, was.token.Revision, is, &c)
			was = is
		}
	}
	if _, err := extend(f, length, frames); err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkLoad loads a million mailboxes from a file, beside the floor: building the same index from memory.
func BenchmarkLoad(b *testing.B) {
	for _, per := range []int{20, 1} {
		st := large(b, per)
		name := fmt.Sprintf("lists_shared_by_%d", per)
		for _, journal := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/journal=%v", name, journal), func(b *testing.B) {
				path := largeFile(b, st, journal)
				f, err := os.Open(path)
				if err != nil {
					b.Fatal(err)
				}
				defer f.Close()
				for b.Loop() {
					c, err := read(f)
					if err != nil {
						b.Fatal(err)
					}
					if !journal && c.state.Index.Digest() != st.Index.Digest() {
						b.Fatal("another state")
					}
					b.ReportMetric(float64(c.length)/(1<<20), "MiB")
				}
				b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/load")
			})
		}
		b.Run(name+"/floor", func(b *testing.B) {
			path := largeFile(b, st, false)
			for b.Loop() {
				_, err := os.ReadFile(path)
				if err != nil {
					b.Fatal(err)
				}
				bld := index.NewWriter().Rebuild()
				var encoding []byte
				numbers := make([]uint32, st.Index.MaxNumber()+1)
				for id, number := range st.Index.All() {
					if numbers[number] == 0 {
						encoding = st.Index.Set(number).AppendEncoding(encoding[:0])
						if numbers[number], err = bld.AddSet(encoding); err != nil {
							b.Fatal(err)
						}
					}
					if err := bld.Append(id, numbers[number]); err != nil {
						b.Fatal(err)
					}
				}
				bld.Build()
			}
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/load")
		})
	}
}

// BenchmarkSnapshot writes a million mailboxes.
func BenchmarkSnapshot(b *testing.B) {
	for _, per := range []int{20, 1} {
		b.Run(fmt.Sprintf("lists_shared_by_%d", per), func(b *testing.B) {
			st := large(b, per)
			f, err := os.Create(filepath.Join(b.TempDir(), fileNew))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := writeSnapshot(b.Context(), f, st); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
