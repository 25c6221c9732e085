package login

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// clock drives a limiter.
type clock struct {
	*limiter
	now time.Time
}

func newClock() *clock {
	return &clock{newLimiter(prometheus.NewCounter(prometheus.CounterOpts{Name: "dropped_total", Help: "Dropped."})), time.Now()}
}

func (c *clock) try(account, from string) time.Duration {
	return c.attempt(account, netip.MustParseAddr(from), c.now)
}

func TestPairWaits(t *testing.T) {
	c := newClock()
	for range freeFailures {
		if wait := c.try("anna", "192.0.2.1"); wait != 0 {
			t.Fatalf("waits %v at once", wait)
		}
	}
	want := time.Second
	for range 15 {
		if wait := c.try("anna", "192.0.2.1"); wait != 0 {
			t.Fatalf("waits %v after %v", wait, want)
		}
		if wait := c.try("anna", "192.0.2.1"); wait != want {
			t.Fatalf("waits %v, want %v", wait, want)
		}
		if wait := c.try("anna", "192.0.2.2"); want == time.Second && wait != 0 {
			t.Errorf("another address waits %v", wait)
		}
		c.now = c.now.Add(want)
		want = min(2*want, longestWait)
	}
	c.now = c.now.Add(forgetAfter + time.Second)
	for range freeFailures {
		if wait := c.try("anna", "192.0.2.1"); wait != 0 {
			t.Errorf("waits %v after an hour", wait)
		}
	}
	c.succeeded("anna", netip.MustParseAddr("192.0.2.1"), c.now)
	for range freeFailures {
		if wait := c.try("anna", "192.0.2.1"); wait != 0 {
			t.Errorf("waits %v after a success", wait)
		}
	}
}

// TestAddressBudget: one address, many accounts.
func TestAddressBudget(t *testing.T) {
	c := newClock()
	for i := range addressBurst {
		if wait := c.try(fmt.Sprint("user", i), "192.0.2.1"); wait != 0 {
			t.Fatalf("waits %v after %d", wait, i)
		}
	}
	if wait := c.try("other", "192.0.2.1"); wait != addressRefill {
		t.Errorf("waits %v", wait)
	}
	if wait := c.try("", "192.0.2.1"); wait != addressRefill {
		t.Errorf("without an account waits %v", wait)
	}
	if wait := c.try("other", "192.0.2.2"); wait != 0 {
		t.Errorf("another address waits %v", wait)
	}
	c.now = c.now.Add(addressRefill)
	if wait := c.try("other", "192.0.2.1"); wait != 0 {
		t.Errorf("waits %v after a refill", wait)
	}
	if wait := c.try("other", "192.0.2.1"); wait != addressRefill {
		t.Errorf("one refill is good for more than one: %v", wait)
	}
}

// TestLockOut: who guesses from everywhere slows each other down, but not who was here before.
func TestLockOut(t *testing.T) {
	c := newClock()
	home := netip.MustParseAddr("198.51.100.7")
	if wait := c.attempt("anna", home, c.now); wait != 0 {
		t.Fatal(wait)
	}
	c.succeeded("anna", home, c.now)
	guesses := 0
	attack := func(for_ time.Duration) {
		for end := c.now.Add(for_); c.now.Before(end); c.now = c.now.Add(time.Second) {
			for range 20 {
				if c.attempt("anna", netip.AddrFrom4([4]byte{10, byte(guesses >> 16), byte(guesses >> 8), byte(guesses)}), c.now) == 0 {
					guesses++
				}
			}
		}
	}
	attack(time.Hour)
	if most := accountBurst + int(time.Hour/accountRefill) + 1; guesses > most {
		t.Errorf("%d guesses in an hour; want at most %d", guesses, most)
	}
	if wait := c.attempt("anna", home, c.now); wait != 0 {
		t.Errorf("at home one waits %v", wait)
	}
	// From a new address the wait is that for one refill, not for the end of the attack.
	wait := c.attempt("anna", netip.MustParseAddr("203.0.113.9"), c.now)
	if wait > accountRefill {
		t.Errorf("on the road one waits %v", wait)
	}
	c.now = c.now.Add(accountRefill)
	if wait := c.attempt("anna", netip.MustParseAddr("203.0.113.9"), c.now); wait != 0 {
		t.Errorf("when the attack pauses one waits %v", wait)
	}
	c.now = c.now.Add(knownFor)
	attack(10*time.Minute - accountRefill/2)
	if wait := c.attempt("anna", home, c.now); wait == 0 {
		t.Error("an address is known for ever")
	}
}

// TestOneCustomer: who has a /48, and so many /64, cannot use up what an account has.
func TestOneCustomer(t *testing.T) {
	c := newClock()
	for i := range 3600 {
		for j := range 20 {
			address := [16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 7, byte(i), byte(i*20 + j)}
			c.attempt("anna", netip.AddrFrom16(address), c.now)
		}
		if i%600 == 599 {
			if wait := c.try("anna", fmt.Sprintf("203.0.113.%d", i/600)); wait != 0 {
				t.Errorf("after %d seconds one waits elsewhere for %v", i, wait)
			}
		}
		c.now = c.now.Add(time.Second)
	}
	waits := 0
	for i := range 2 * siteBurst {
		if c.attempt(fmt.Sprint("user", i), netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 9, byte(i)}), c.now) != 0 {
			waits++
		}
	}
	if waits != siteBurst {
		t.Errorf("of %d accounts %d were held", 2*siteBurst, waits)
	}
}

// TestUntried: an attempt that was not made leaves nothing behind.
func TestUntried(t *testing.T) {
	for _, from := range []string{"192.0.2.1", "2001:db8::1"} {
		c := newClock()
		for range freeFailures {
			c.try("anna", from)
		}
		for range 10 * accountBurst {
			if wait := c.try("anna", from); wait != 0 {
				t.Fatalf("from %s one waits %v", from, wait)
			}
			c.untried("anna", netip.MustParseAddr(from), c.now)
		}
		c.try("anna", from)
		if c.try("anna", from) == 0 {
			t.Errorf("from %s the failures before are forgotten", from)
		}
	}
}

func TestSuccessCostsNothing(t *testing.T) {
	c := newClock()
	from := netip.MustParseAddr("2001:db8::1")
	for i := range 10 * siteBurst {
		for _, account := range []string{fmt.Sprint("user", i), "shared", ""} {
			if wait := c.attempt(account, from, c.now); wait != 0 {
				t.Fatalf("%s waits %v", account, wait)
			}
			c.succeeded(account, from, c.now)
		}
	}
}

func TestBoundedMemory(t *testing.T) {
	dropped := prometheus.NewCounter(prometheus.CounterOpts{Name: "dropped_total", Help: "Dropped."})
	r := newRecent[int, int](3, dropped)
	for i := range 10 {
		r.put(i, i)
		r.put(0, 100) // used all the time
	}
	if len(r.entries) != 3 || r.order.Len() != 3 || r.get(0) != 100 || r.get(9) != 9 || r.get(8) != 8 || r.get(7) != 0 {
		t.Errorf("%v", r.entries)
	}
	r.get(8)
	r.put(10, 10)
	if r.get(8) != 8 || testutil.ToFloat64(dropped) != 8 {
		t.Errorf("dropped %v", testutil.ToFloat64(dropped))
	}
}
