package login

import (
	"crypto/sha256"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	freeFailures = 5               // of an account from an address, before there is a wait
	firstWait    = time.Second     // doubled with each failure
	longestWait  = 5 * time.Minute // so that nobody is kept out for long who has mistyped
	forgetAfter  = time.Hour       // without an attempt
	knownFor     = 30 * 24 * time.Hour

	addressBurst  = 30 // failures from an address, whatever the account
	addressRefill = 5 * time.Second
	accountBurst  = 30 // failures of an account, from wherever
	accountRefill = 10 * time.Second

	siteBurst         = 120 // failures from a /48 of IPv6, whatever the account
	siteRefill        = addressRefill / 4
	siteAccountBurst  = accountBurst / 2 // failures of an account from a /48: half of what the account has,
	siteAccountRefill = 2 * accountRefill

	maxRemembered = 50_000 // of each kind
)

// limiter slows down guessing of passwords:
//
//   - An account from an address: after five failures the wait doubles with each one, to five minutes.
//   - An address, and an account, each have a budget of failures, which refills.
//   - IPv6 addresses count by their /64, which one host has. A /48, which one customer has, also has a budget, and one for each
//     account, which is half of the account's: one customer cannot use up what an account has.
//
// Who has logged in to an account from an address within 30 days is not held by the budgets there: guessing from elsewhere
// cannot keep them out. Who guesses from many networks at once can take each refill of an account, so that its user cannot
// log in from a new address until the guessing ends. What it remembers is bounded; the least recently used is dropped. It is safe for
// concurrent use, and an attempt counts when it begins, so that many at once gain nothing.
type limiter struct {
	mu        sync.Mutex
	pairs     recent[pairKey, pair]
	known     recent[pairKey, time.Time]
	addresses recent[netip.Prefix, budget]
	accounts  recent[accountKey, budget]
	sites     recent[pairKey, budget] // by /48, of all accounts and of each
}

type accountKey [sha256.Size]byte

type pairKey struct {
	account accountKey
	address netip.Prefix
}

// pair is an account from an address.
type pair struct {
	failures    int
	last, until time.Time
}

// budget is when it will be full again, if nothing more is spent: each attempt moves that by the time in which one is refilled.
type budget struct{ full time.Time }

// wait is how long until one more can be spent.
func (b budget) wait(now time.Time, burst int, refill time.Duration) time.Duration {
	if b.full.Before(now) { // long ago, Sub would be the least duration there is, and less than that overflows
		return 0
	}
	return b.full.Sub(now) - time.Duration(burst-1)*refill
}

func (b budget) spend(now time.Time, refill time.Duration) budget {
	if b.full.Before(now) {
		b.full = now
	}
	return budget{b.full.Add(refill)}
}

func (b budget) refund(refill time.Duration) budget { return budget{b.full.Add(-refill)} }

func newLimiter(dropped prometheus.Counter) *limiter {
	return &limiter{
		pairs:     newRecent[pairKey, pair](maxRemembered, dropped),
		known:     newRecent[pairKey, time.Time](maxRemembered, dropped),
		addresses: newRecent[netip.Prefix, budget](maxRemembered, dropped),
		accounts:  newRecent[accountKey, budget](maxRemembered, dropped),
		sites:     newRecent[pairKey, budget](maxRemembered, dropped),
	}
}

func keys(account string, from netip.Addr) pairKey {
	bits := from.BitLen()
	if from.Is6() {
		bits = 64
	}
	address, _ := from.WithZone("").Prefix(bits) // of the zero address, the zero prefix: all who are unknown share it
	return pairKey{sha256.Sum256([]byte(account)), address}
}

// share is a part of the budget of a /48.
type share struct {
	key    pairKey
	burst  int
	refill time.Duration
}

// shares returns what an attempt takes from a /48; nothing if the address is not of IPv6.
func shares(account string, from netip.Addr) []share {
	if !from.Is6() || from.Is4In6() {
		return nil
	}
	site, _ := from.WithZone("").Prefix(48)
	all := []share{{pairKey{sha256.Sum256(nil), site}, siteBurst, siteRefill}}
	if account != "" {
		all = append(all, share{pairKey{sha256.Sum256([]byte(account)), site}, siteAccountBurst, siteAccountRefill})
	}
	return all
}

// attempt counts an attempt that may fail; account is "" where none is named. It returns how long to wait: if that is not
// 0, the attempt must not be made, and did not count.
func (l *limiter) attempt(account string, from netip.Addr, now time.Time) (wait time.Duration) {
	key := keys(account, from)
	l.mu.Lock()
	defer l.mu.Unlock()
	p, address, everywhere := l.pairs.get(key), l.addresses.get(key.address), l.accounts.get(key.account)
	if now.Sub(p.last) > forgetAfter || account == "" {
		p = pair{}
	}
	wait = p.until.Sub(now)
	known := account != "" && now.Sub(l.known.get(key)) < knownFor
	if !known {
		wait = max(wait, address.wait(now, addressBurst, addressRefill))
		if account != "" {
			wait = max(wait, everywhere.wait(now, accountBurst, accountRefill))
		}
		for _, s := range shares(account, from) {
			wait = max(wait, l.sites.get(s.key).wait(now, s.burst, s.refill))
		}
	}
	if wait > 0 {
		return wait
	}
	if !known {
		l.addresses.put(key.address, address.spend(now, addressRefill))
		for _, s := range shares(account, from) {
			l.sites.put(s.key, l.sites.get(s.key).spend(now, s.refill))
		}
	}
	if account == "" {
		return 0
	}
	if !known {
		l.accounts.put(key.account, everywhere.spend(now, accountRefill))
	}
	p.failures, p.last = p.failures+1, now
	if over := p.failures - freeFailures; over > 0 {
		p.until = now.Add(min(firstWait<<min(over-1, 20), longestWait))
	}
	l.pairs.put(key, p)
	return 0
}

// succeeded takes back what attempt counted, and what failed before of the account from the address.
func (l *limiter) succeeded(account string, from netip.Addr, now time.Time) {
	key := keys(account, from)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refund(account, from, now)
	if account != "" {
		l.pairs.drop(key)
		l.known.put(key, now)
	}
}

// untried takes back what attempt counted, because the attempt was not made.
func (l *limiter) untried(account string, from netip.Addr, now time.Time) {
	key := keys(account, from)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refund(account, from, now)
	if p := l.pairs.get(key); account != "" && p.failures > 0 {
		l.pairs.put(key, pair{failures: p.failures - 1, last: p.last}) // there was no wait, or it would not have begun
	}
}

func (l *limiter) refund(account string, from netip.Addr, now time.Time) {
	key := keys(account, from)
	if account != "" && now.Sub(l.known.get(key)) < knownFor {
		return
	}
	l.addresses.put(key.address, l.addresses.get(key.address).refund(addressRefill))
	for _, s := range shares(account, from) {
		l.sites.put(s.key, l.sites.get(s.key).refund(s.refill))
	}
	if account != "" {
		l.accounts.put(key.account, l.accounts.get(key.account).refund(accountRefill))
	}
}
