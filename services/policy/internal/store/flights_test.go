package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestFlights: whoever joins gets a read that began after it joined; never do two run at once; many share one.
func TestFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, reads, failed atomic.Int64
		f := flights{wake: make(chan struct{}, 1)}
		var begun [10_000]time.Time // by number of the read
		f.read = func(context.Context) (head, error) {
			if running.Add(1) != 1 {
				t.Error("two reads run at once")
			}
			defer running.Add(-1)
			n := reads.Add(1)
			begun[n] = time.Now()
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
			if n%10 == 0 {
				return head{}, ErrUnavailable
			}
			return head{version: n}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		var service sync.WaitGroup
		service.Go(func() { f.run(ctx) })
		const joiners, each = 50, 40
		var group sync.WaitGroup
		for range joiners {
			group.Go(func() {
				for range each {
					time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
					joined := time.Now()
					h, err := f.join(t.Context())
					switch {
					case errors.Is(err, ErrUnavailable):
						failed.Add(1)
					case err != nil:
						t.Error(err)
					case begun[h.version].Before(joined):
						t.Error("a read that began before it was asked for")
					case time.Since(joined) > 2*time.Millisecond:
						t.Errorf("a wait of %v, longer than two reads", time.Since(joined))
					}
				}
			})
		}
		group.Wait()
		if n := reads.Load(); n > joiners*each/4 || failed.Load() == 0 {
			t.Errorf("%d joins took %d reads, %d got an error", joiners*each, n, failed.Load())
		}
		cancel()
		service.Wait()
		short, cancelShort := context.WithTimeout(t.Context(), time.Second)
		defer cancelShort()
		if _, err := f.join(short); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a join without anybody who reads = %v", err)
		}
	})
}
