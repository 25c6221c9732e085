// Package peers measures what else could answer whether an address may reach a mailbox: general policy engines, CIDR libraries and
// Dovecot's own allow_nets, on the same lists, in the same run, by turns with ours. It is a module of its own, because what it needs
// would lift the product's dependencies. docs/performance.md ("Next to peers") says what is compared with what.
package peers

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/allowednets/allowednets/test/dovecot"
)

// A peer is a library in this process, or a server that is asked over a unix socket.
type peer struct {
	name, kind string
	// most is the largest number of mailboxes at which it answers often enough to be measured without BENCH_LARGE.
	most int
	// mapped says what it makes of ::ffff:192.0.2.1: the IPv4 address, as we do, or something that is in no list.
	mapped bool
	start  func(tb testing.TB, lists lists) running
}

// The kinds of peers. The first of each kind is ours.
const (
	library = "library"
	server  = "server"
)

// running is a peer that knows its lists.
type running interface { //nolint:interfacebloat // the one face of eleven peers
	// Allowed takes mailbox and address as text, as they arrive from outside.
	Allowed(mailbox, client string) (bool, error)
	// Change replaces the list of a mailbox. It may return before the change takes effect.
	Change(mailbox string, nets []string) error
	// Pid is the process whose memory holds the lists; 0 is this one.
	Pid() int
	Close() error
}

// missing says what this machine lacks to run the peer; nil if nothing.
func (p peer) missing() error {
	if p.name == dovecotName {
		return dovecot.Missing()
	}
	return nil
}

const dovecotName = "dovecot-allow_nets"

// slow is a peer that holds back refusals.
type slow interface {
	AllowedAll(mailboxes, clients []string) ([]bool, error)
	// Await returns when the client is let in.
	Await(mailbox, client string) error
}

func peers() []peer {
	const all = 1 << 30
	grown := new(grown)
	return []peer{
		{"allowednets", library, all, true, startAllow},
		{"scan", library, all, false, startScan},
		{"cidranger", library, all, true, startCidranger},
		{"cel", library, all, false, startCEL},
		{"opa", library, all, true, startOPA},
		{"casbin", library, 10_000, true, startCasbin},
		{"allowednets-json", server, all, true, grown.starter(overJSON)},
		{"allowednets-grpc", server, all, true, grown.starter(overGRPC)},
		{"allowednets-stream", server, all, true, grown.starter(overStream)},
		{"opa-http", server, all, true, startOPAServer},
		{dovecotName, server, all, true, startDovecot},
	}
}

// lists are mailboxes with their nets, made anew each time they are read, so that memory that a peer keeps is seen as its own.
type lists = iter.Seq2[string, []string]

func mailbox(i int) string { return fmt.Sprintf("user%07d@customer%04d.example.org", i, i/500) }

// nets are the three of a mailbox, which it shares with nineteen others; client is an address in the first of them.
func nets(i int) []string {
	office := i / 20
	return []string{
		fmt.Sprintf("8.%d.%d.0/24", byte(office>>8), byte(office)),
		fmt.Sprintf("9.%d.%d.9/32", byte(office>>8), byte(office)),
		fmt.Sprintf("2a00:1450:%x::/48", office),
	}
}

func client(i int) string {
	office := i / 20
	return fmt.Sprintf("8.%d.%d.1", byte(office>>8), byte(office))
}

func offices(n int) lists {
	return func(yield func(string, []string) bool) {
		for i := range n {
			if !yield(mailbox(i), nets(i)) {
				return
			}
		}
	}
}

type question struct {
	mailbox, client string
	mapped, want    bool
}

func askAll(t *testing.T, r running, asked []question) []bool {
	t.Helper()
	var answers []bool
	if r, ok := r.(slow); ok {
		for part := range slices.Chunk(asked, 400) { // fit into the buffers of the socket
			var mailboxes, clients []string
			for _, q := range part {
				mailboxes, clients = append(mailboxes, q.mailbox), append(clients, q.client)
			}
			got, err := r.AllowedAll(mailboxes, clients)
			if err != nil {
				t.Fatal(err)
			}
			answers = append(answers, got...)
		}
		return answers
	}
	for _, q := range asked {
		got, err := r.Allowed(q.mailbox, q.client)
		if err != nil {
			t.Fatalf("%s from %s: %v", q.mailbox, q.client, err)
		}
		answers = append(answers, got)
	}
	return answers
}

// Mailboxes without a list.
const firstUnlisted, unlisted = 500_000, 20

// TestVerdicts asks every peer and the model the same random questions. The one difference is what is said of each peer: whether an
// IPv4 address in IPv6 form is the IPv4 address to it.
func TestVerdicts(t *testing.T) {
	const restricted, questions = 300, 4000
	random := rand.New(rand.NewPCG(1, 1))
	known := make(map[string][]netip.Prefix)
	var text [][]string
	for i := range restricted {
		var list []string
		for range 1 + random.IntN(5) {
			p := randomNet(random)
			if !slices.Contains(known[mailbox(i)], p) {
				known[mailbox(i)], list = append(known[mailbox(i)], p), append(list, p.String())
			}
		}
		text = append(text, list)
	}
	given := func(yield func(string, []string) bool) {
		for i, list := range text {
			if !yield(mailbox(i), slices.Clone(list)) {
				return
			}
		}
	}
	var asked []question
	for range questions {
		i := random.IntN(restricted + unlisted)
		if i >= restricted {
			i += firstUnlisted - restricted
		}
		addr := randomAddr(random, known[mailbox(i)])
		q := question{mailbox(i), addr.String(), false, known[mailbox(i)] == nil}
		for _, p := range known[q.mailbox] {
			q.want = q.want || p.Contains(addr)
		}
		if q.mapped = addr.Is4() && random.IntN(8) == 0; q.mapped {
			q.client = "::ffff:" + q.client
		}
		asked = append(asked, q)
	}
	for _, p := range peers() {
		t.Run(p.name, func(t *testing.T) {
			if err := p.missing(); err != nil {
				if os.Getenv("ALLOWEDNETS_E2E") == "required" {
					t.Fatalf("ALLOWEDNETS_E2E=required, but: %v", err)
				}
				t.Skipf("NOT TESTED: %v", err)
			}
			r := p.start(t, given)
			defer closeRunning(t, r)
			answers := askAll(t, r, asked)
			var allowed, denied int
			for i, q := range asked {
				want := q.want
				if q.mapped && !p.mapped {
					want = known[q.mailbox] == nil
				}
				got := answers[i]
				if got != want {
					t.Errorf("%s from %s: allowed %v, want %v; its nets are %v", q.mailbox, q.client, got, want, known[q.mailbox])
				}
				if got {
					allowed++
				} else {
					denied++
				}
			}
			if allowed < questions/10 || denied < questions/10 {
				t.Errorf("%d allowed, %d denied: one-sided questions", allowed, denied)
			}
			change(t, r, 0)
		})
	}
}

// randomNet is a public net that a list may hold.
func randomNet(random *rand.Rand) netip.Prefix {
	if random.IntN(3) > 0 {
		addr := netip.AddrFrom4([4]byte{byte(80 + random.IntN(3)), byte(random.IntN(3)), byte(random.IntN(3)), byte(random.Uint32())})
		return netip.PrefixFrom(addr, 8+random.IntN(25)).Masked()
	}
	addr := [16]byte{0: 0x2a, 3: byte(random.IntN(3)), 5: byte(random.IntN(3)), 15: byte(random.Uint32())}
	return netip.PrefixFrom(netip.AddrFrom16(addr), 16+random.IntN(113)).Masked()
}

// randomAddr is one at the edge of a list's net, in it, or anywhere.
func randomAddr(random *rand.Rand, list []netip.Prefix) netip.Addr {
	p := randomNet(random)
	if len(list) > 0 && random.IntN(4) > 0 {
		p = list[random.IntN(len(list))]
	}
	first := p.Addr()
	last := first.AsSlice()
	for bit := p.Bits(); bit < 8*len(last); bit++ {
		last[bit/8] |= 1 << (7 - bit%8)
	}
	end, _ := netip.AddrFromSlice(last)
	return []netip.Addr{first, first.Prev(), end, end.Next()}[random.IntN(4)]
}

func closeRunning(tb testing.TB, r running) {
	tb.Helper()
	if err := r.Close(); err != nil {
		tb.Error(err)
	}
}

// change gives a mailbox that nobody else asks for a list that does not hold a client and then one that does, and returns how long it took
// from the beginning of the second change until the client is let in.
func change(tb testing.TB, r running, i int) time.Duration {
	tb.Helper()
	name, addr := mailbox(1_000_000+i), fmt.Sprintf("11.0.%d.1", i%256)
	var took time.Duration
	for _, step := range []struct {
		nets []string
		want bool
	}{{[]string{"12.1.2.0/24"}, false}, {[]string{addr + "/32", "12.1.2.0/24"}, true}} {
		began := time.Now()
		if err := r.Change(name, step.nets); err != nil {
			tb.Fatal(err)
		}
		for {
			if r, ok := r.(slow); ok && step.want {
				if err := r.Await(name, addr); err != nil {
					tb.Fatal(err)
				}
			}
			got, err := r.Allowed(name, addr)
			if took = time.Since(began); err != nil || took > time.Minute {
				tb.Fatalf("not yet in force after %v: %v", took, err)
			}
			if got == step.want {
				break
			}
		}
	}
	return took
}

const (
	rounds = 10
	// turn is how long each peer is asked in a round, and at least leastAsked times.
	turn       = 100 * time.Millisecond
	leastAsked = 3
	changes    = 5
)

// BenchmarkPeers is a decision for a random restricted mailbox that is let in, in text as it arrives, by turns: in each round every peer
// is asked for a tenth of a second. x-ours is the ratio of the medians to that of the first of its kind: allowednets as a
// library, allowednets-json as a server. B/mailbox is live heap for a library and resident memory for a server, less what it takes
// without lists. change-ns is the median time from the beginning of a change until a decision shows it; to a library, which has to
// be given the change by somebody, nothing is delivered from elsewhere.
func BenchmarkPeers(b *testing.B) {
	all := peers()
	b.Cleanup(func() { runtime.KeepAlive(all) })
	for _, mailboxes := range []int{1000, 10_000, 100_000} {
		measure(b, all, mailboxes)
	}
}

type measured struct {
	peer

	running running
	took    []time.Duration
	memory  float64 // octets
	changed []time.Duration
}

func measure(b *testing.B, all []peer, mailboxes int) {
	b.Helper()
	var ms []*measured
	for _, p := range all {
		if mailboxes > p.most && os.Getenv("BENCH_LARGE") == "" {
			continue
		}
		if err := p.missing(); err != nil {
			b.Logf("NOT MEASURED: %s: %v", p.name, err)
			continue
		}
		m := &measured{peer: p}
		m.running = p.start(b, offices(1))
		before := memory(b, m)
		closeRunning(b, m.running)
		m.running = p.start(b, offices(mailboxes))
		m.memory = memory(b, m) - before
		ms = append(ms, m)
	}
	random := rand.New(rand.NewPCG(1, uint64(mailboxes)))
	questions := make([]int, 1<<14)
	names, clients := make([]string, len(questions)), make([]string, len(questions))
	for i := range questions {
		n := random.IntN(mailboxes)
		names[i], clients[i] = mailbox(n), client(n)
	}
	for range rounds {
		for _, m := range ms {
			m.ask(b, names, clients)
		}
	}
	for i := range changes {
		for _, m := range ms {
			m.changed = append(m.changed, change(b, m.running, mailboxes/1000+i))
		}
	}
	ours := make(map[string]float64)
	for _, m := range ms {
		closeRunning(b, m.running)
		slices.Sort(m.took)
		slices.Sort(m.changed)
		p50 := float64(m.took[len(m.took)/2])
		if ours[m.kind] == 0 {
			ours[m.kind] = p50
		}
		b.Run(fmt.Sprintf("kind=%s/peer=%s/mailboxes=%d", m.kind, m.name, mailboxes), func(b *testing.B) {
			b.ReportMetric(0, "ns/op") // measured before
			b.ReportMetric(p50, "p50-ns")
			b.ReportMetric(float64(m.took[len(m.took)*99/100]), "p99-ns")
			b.ReportMetric(p50/ours[m.kind], "x-ours")
			if m.kind == library || mailboxes >= 100_000 { // with fewer, what a process takes for itself varies by more
				b.ReportMetric(m.memory/float64(mailboxes), "B/mailbox")
			}
			b.ReportMetric(float64(m.changed[len(m.changed)/2]), "change-ns")
		})
	}
}

func (m *measured) ask(b *testing.B, names, clients []string) {
	b.Helper()
	i := len(m.took)
	for began, asked := time.Now(), 0; asked < leastAsked || time.Since(began) < turn; asked++ {
		i = (i + 1) % len(names)
		at := time.Now()
		allowed, err := m.running.Allowed(names[i], clients[i])
		m.took = append(m.took, time.Since(at))
		if err != nil || !allowed {
			b.Fatalf("%s: %s from %s: allowed %v, %v", m.name, names[i], clients[i], allowed, err)
		}
	}
}

// memory is the live heap of this process, or the resident memory of a server's.
func memory(b *testing.B, m *measured) float64 {
	b.Helper()
	if m.kind == library {
		runtime.GC()
		runtime.GC() // also what finalizers held
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return float64(stats.HeapAlloc)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.running.Pid()))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "\nVmRSS:")
	var kilobytes float64
	if _, err := fmt.Fscan(strings.NewReader(rest), &kilobytes); err != nil {
		b.Fatal(err)
	}
	return kilobytes * 1024
}
