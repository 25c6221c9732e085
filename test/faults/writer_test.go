package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

const (
	writers = 4
	// pace is the pause of a writer between two requests: together they save about a hundred times a second at best.
	pace = 20 * time.Millisecond
	// tryFor is how long a writer waits for a replica before it asks another.
	tryFor = 3 * time.Second
	// hot mailboxes get half of the requests, so that a retry often meets a list that somebody else changed in the meantime.
	hot = 3
	// mostLater keeps a retry within the 16 changes of a mailbox whose request ids are remembered.
	mostLater = 8
)

// kind is what a writer asks for.
type kind int

const (
	get kind = iota
	set
	wipe
)

// op is one request of a writer as it saw it: when it began, when it was answered, and what the list was then.
type op struct {
	client   int
	kind     kind
	mailbox  string
	id       string // of the request
	nets     string // what was read or saved
	call     time.Time
	returned time.Time
}

// writer saves, clears and reads lists through all replicas, each request until it is answered, and keeps what it was told.
type writer struct {
	replicas []policyv1.PolicyServiceClient
	model    *model
	report   *report
	people   []string

	working sync.WaitGroup
	stop    chan struct{}

	mu      sync.Mutex
	busy    map[string]map[int]int // by mailbox and client: requests that began later
	history []op
	serial  int
	paused  sync.RWMutex
}

// startWriter starts the clients; they end with finish.
func startWriter(ctx context.Context, seed uint64, replicas []policyv1.PolicyServiceClient, m *model, r *report) *writer {
	w := &writer{replicas: replicas, model: m, report: r, people: mailboxes(), stop: make(chan struct{}), busy: make(map[string]map[int]int)}
	for client := range writers {
		w.working.Go(func() { w.work(ctx, client, rand.New(rand.NewPCG(seed, uint64(client)))) })
	}
	return w
}

// finish lets every request end. ctx of startWriter bounds it.
func (w *writer) finish() {
	close(w.stop)
	w.working.Wait()
}

// pause lets every request end, and returns when none is on its way; the result lets them go on.
func (w *writer) pause() (resume func()) {
	w.paused.Lock()
	return w.paused.Unlock
}

func (w *writer) work(ctx context.Context, client int, random *rand.Rand) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.stop:
			return
		case <-tick.C:
		}
		w.paused.RLock()
		w.one(ctx, client, random)
		w.paused.RUnlock()
	}
}

// one makes one request and repeats it until it is answered.
func (w *writer) one(ctx context.Context, client int, random *rand.Rand) {
	o, nets := w.next(client, random)
	defer w.done(o)
	if o.kind != get {
		w.model.begin(client)
	}
	replica := random.IntN(len(w.replicas))
	for ; ctx.Err() == nil; replica++ {
		tried, cancel := context.WithTimeout(ctx, tryFor)
		got, changed, err := call(tried, w.replicas[replica%len(w.replicas)], o, nets)
		cancel()
		if err == nil {
			w.answered(o, got, changed)
			return
		}
		w.report.count("requests to the policy service that were not answered: "+status.Code(err).String(), 1)
		if c := status.Code(err); c != codes.Unavailable && c != codes.DeadlineExceeded && ctx.Err() == nil {
			w.report.violated("%s of %s, request %s: %v", o.kind, o.mailbox, o.id, err)
		}
		if o.kind == get {
			return // no effect, so nobody needs to know
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(random.IntN(100)) * time.Millisecond):
		}
	}
	w.report.violated("%s of %s, request %s, begun %v ago, was never answered", o.kind, o.mailbox, o.id, time.Since(o.call))
}

// next decides what to ask for.
func (w *writer) next(client int, random *rand.Rand) (op, []netip.Prefix) {
	w.mu.Lock()
	defer w.mu.Unlock()
	o := op{client: client, kind: set, id: requestID(random)}
	for o.mailbox == "" {
		among := len(w.people)
		if random.IntN(2) == 0 {
			among = hot
		}
		o.mailbox = w.people[random.IntN(among)]
		for _, later := range w.busy[o.mailbox] {
			if later >= mostLater {
				o.mailbox = ""
				break
			}
		}
	}
	for other := range w.busy[o.mailbox] {
		w.busy[o.mailbox][other]++
	}
	if w.busy[o.mailbox] == nil {
		w.busy[o.mailbox] = make(map[int]int)
	}
	w.busy[o.mailbox][client] = 0
	var nets []netip.Prefix
	switch chance := random.IntN(100); {
	case chance < 20:
		o.kind = get
	case chance < 30:
		o.kind = wipe
	case chance < 35: // once more what is there
		if known := w.model.all(o.mailbox); len(known) > 0 && known[len(known)-1].nets != "" {
			nets = known[len(known)-1].parsed
			break
		}
		fallthrough
	default:
		nets = w.draw(random)
	}
	o.nets = joinPrefixes(nets)
	o.call = time.Now()
	return o, nets
}

// draw makes a list: some nets of the pool, and one that no other list has.
func (w *writer) draw(random *rand.Rand) []netip.Prefix {
	all := pool()
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	w.serial++
	unique := netip.AddrFrom16([16]byte{0x2a, 0x01, 12: byte(w.serial >> 24), 13: byte(w.serial >> 16), 14: byte(w.serial >> 8), 15: byte(w.serial)})
	return append(all[:random.IntN(6)], netip.PrefixFrom(unique, 128))
}

func (w *writer) done(o op) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.busy[o.mailbox], o.client)
}

// answered keeps an answer.
func (w *writer) answered(o op, got *policyv1.AllowedNets, changed bool) {
	o.returned = time.Now()
	list := join(got.GetNets())
	var errs error
	if o.kind != get {
		var s save
		s, errs = asSave(o.mailbox, got.GetRevision(), list)
		if errs == nil {
			errs = w.model.saved(o.client, s)
		}
		if o.nets != list {
			w.report.violated("%s of %s, request %s, asked for %q, got %q", o.kind, o.mailbox, o.id, o.nets, list)
		}
		if changed {
			w.report.count("acknowledged saves", 1)
		} else {
			w.report.count("acknowledged requests that changed nothing, or had been carried out before", 1)
		}
		w.report.atMost("save, from the first try to the acknowledgement", o.returned.Sub(o.call))
	} else {
		w.report.count("reads of a list", 1)
	}
	o.nets = list
	if errs != nil {
		w.report.violated("%s, request %s: %v", o.kind, o.id, errs)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = append(w.history, o)
}

// ops returns what was answered so far.
func (w *writer) ops() []op {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.history)
}

// forget takes answers out of the history whose saves a restored backup does not hold.
func (w *writer) forget(from, to int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = slices.Delete(w.history, from, to)
}

// acknowledged returns when a request was last answered.
func (w *writer) acknowledged() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.history) == 0 {
		return time.Time{}
	}
	return w.history[len(w.history)-1].returned
}

// gap returns the longest time without an acknowledged save between two moments.
func (w *writer) gap(from, to time.Time) time.Duration {
	last, longest := from, time.Duration(0)
	for _, o := range w.ops() { // in the order in which they were answered, nearly
		if o.kind == get || o.returned.Before(from) || o.returned.After(to) {
			continue
		}
		longest = max(longest, o.returned.Sub(last))
		last = o.returned
	}
	return max(longest, to.Sub(last))
}

// call sends one request once.
func call(ctx context.Context, replica policyv1.PolicyServiceClient, o op, nets []netip.Prefix) (*policyv1.AllowedNets, bool, error) {
	switch o.kind {
	case set:
		list := new(policyv1.NetList)
		for _, n := range nets {
			list.Nets = append(list.Nets, &policyv1.Net{Net: n.String()})
		}
		resp, err := replica.SetAllowedNets(ctx, &policyv1.SetAllowedNetsRequest{
			Mailbox: o.mailbox, Input: &policyv1.SetAllowedNetsRequest_List{List: list}, RequestId: o.id,
		})
		return resp.GetAllowedNets(), resp.GetChanged(), err
	case wipe:
		resp, err := replica.ClearAllowedNets(ctx, &policyv1.ClearAllowedNetsRequest{Mailbox: o.mailbox, RequestId: o.id})
		return resp.GetAllowedNets(), resp.GetChanged(), err
	default:
		resp, err := replica.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: o.mailbox})
		return resp.GetAllowedNets(), false, err
	}
}

func (k kind) String() string { return [...]string{"read", "save", "clear"}[k] }

// requestID makes a UUID of version 4.
func requestID(random *rand.Rand) string {
	a, b := random.Uint64(), random.Uint64()
	return fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", a>>32, a>>16&0xffff, a&0xfff, b>>48&0xfff, b&0xffffffffffff)
}

func join(nets []*policyv1.Net) string {
	var all []string
	for _, n := range nets {
		all = append(all, n.GetNet())
	}
	return strings.Join(all, ", ")
}

func joinPrefixes(nets []netip.Prefix) string {
	var all []string
	for _, n := range nets {
		all = append(all, text(n))
	}
	return strings.Join(all, ", ")
}

// asSave reads what a policy service tells about a save.
func asSave(mailbox, token, nets string) (save, error) {
	s := save{mailbox: mailbox, nets: nets}
	var err error
	if token != "" {
		if s.token, err = revision.Parse(token); err != nil {
			return s, err
		}
	}
	for n := range strings.SplitSeq(nets, ", ") {
		if n == "" {
			continue
		}
		p, err := netip.ParsePrefix(n)
		if err != nil {
			a, err := netip.ParseAddr(n)
			if err != nil {
				return s, err
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		s.parsed = append(s.parsed, p)
	}
	return s, nil
}
