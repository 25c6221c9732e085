package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/allowednets/allowednets/internal/allow"
)

// Timing says how often a [Replica] looks after itself. A zero field means its default.
type Timing struct {
	Tail  time.Duration // between reads of the newest save; 1 s
	Stall time.Duration // how long the watch may stay behind such a read; 2 s
	Scrub time.Duration // between comparisons of all revisions; 10 min
	Retry time.Duration // after a failure; 1 s, more after loads that find damage again and again
}

func (t Timing) withDefaults() Timing {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&t.Tail, time.Second)
	def(&t.Stall, 2*time.Second)
	def(&t.Scrub, 10*time.Minute)
	def(&t.Retry, time.Second)
	return t
}

// Reasons to leave the watch. They never reach a caller of this package.
var (
	errGap     = errors.New("the watch skipped, repeated or reordered saves")
	errStalled = errors.New("the watch stays behind")
	errBroken  = errors.New("the watch's stream broke")
	errBack    = errors.New("etcd's history went back, or meta changed")
	errScrub   = errors.New("the mirror differs from etcd")
)

// Replica keeps a [Mirror] equal to the store, and trusts neither the load nor the watch nor itself:
// a load is used only if the records' versions add up to the number of saves; the watch must deliver save after save
// without a gap; a linearizable read every second shows a watch that hangs; and a comparison of all revisions every ten
// minutes shows a mirror that went wrong.
type Replica struct {
	store  *Store
	mirror *Mirror
	timing Timing
	log    *slog.Logger

	loads   *prometheus.CounterVec
	damaged prometheus.Gauge

	flights flights
	anchors anchors
	looking [64]chan struct{} // one search per anchor, so that many who ask for the same cost one
	newest  allow.Mailbox     // of the mirror's newest save; of Run alone
}

// NewReplica returns a replica that fills mirror once it runs.
func NewReplica(s *Store, mirror *Mirror, timing Timing, log *slog.Logger, reg prometheus.Registerer) (*Replica, error) {
	r := &Replica{
		store: s, mirror: mirror, timing: timing.withDefaults(), log: log,
		flights: flights{read: s.head, wake: make(chan struct{}, 1)},
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_policy_store_loads_total", Help: "Loads of all records from etcd by what caused them.",
		}, []string{"cause"}),
		damaged: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_policy_store_damaged", Help: "1 while etcd's records contradict themselves; the last good state stays in force.",
		}),
	}
	for i := range r.looking {
		r.looking[i] = make(chan struct{}, 1)
	}
	gauge := func(name, help string, value func(State) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			state, _ := mirror.State()
			return value(state)
		})
	}
	for _, c := range []prometheus.Collector{
		r.loads, r.damaged,
		gauge("allowednets_policy_revision", "Revision of the mirror.", func(s State) float64 { return float64(s.Revision) }),
		gauge("allowednets_policy_restricted_mailboxes", "Mailboxes that have a list.", func(s State) float64 { return float64(s.Count) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return r, nil
}

// Run follows the store until ctx ends. It returns ctx's error: every other failure is retried.
func (r *Replica) Run(ctx context.Context) error {
	var flights sync.WaitGroup
	defer flights.Wait()
	flights.Go(func() { r.flights.run(ctx) })
	cause, wait := "start", r.timing.Retry
	for {
		if cause != "" {
			r.loads.WithLabelValues(cause).Inc()
			if err := r.load(ctx); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				r.noteLoad(ctx, err)
				if !pause(ctx, wait) {
					return ctx.Err()
				}
				if !errors.Is(err, ErrUnavailable) { // a load is not cheap, and damage stays until somebody mends it
					wait = min(2*wait, maxWaits*r.timing.Retry)
				}
				if _, filled := r.mirror.State(); !filled {
					continue
				}
				// The mirror is a true copy of some earlier state: go on from there if the watch allows it.
			}
		}
		began := time.Now()
		err := r.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) > maxWaits*r.timing.Retry {
			wait = r.timing.Retry
		}
		cause = causeOf(err)
		r.log.WarnContext(ctx, "following etcd was interrupted", "error", err, "load", cause)
		if cause == "" && time.Since(began) < r.timing.Retry && !pause(ctx, r.timing.Retry) {
			return ctx.Err()
		}
	}
}

// maxWaits is to how many times [Timing.Retry] the wait after loads that find damage grows. Following for that long starts
// it anew.
const maxWaits = 32

// causeOf names the failures that only a load cures; "" means that the watch may be resumed.
func causeOf(err error) string {
	switch {
	case errors.Is(err, errGap):
		return "gap"
	case errors.Is(err, errBack), errors.Is(err, ErrNotCreated), errors.Is(err, ErrForeign):
		return "history"
	case errors.Is(err, ErrDamaged):
		return "damaged"
	case errors.Is(err, errScrub):
		return "scrub"
	case errors.Is(err, rpctypes.ErrCompacted):
		return "compacted"
	}
	return ""
}

func (r *Replica) noteLoad(ctx context.Context, err error) {
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotCreated) {
		r.damaged.Set(1)
	}
	r.log.ErrorContext(ctx, "loading from etcd failed; the last good state stays in force", "error", err)
}

// pause waits between half of d and all of it. It returns false if ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d/2 + rand.N(d/2+1)) //nolint:gosec // jitter
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// load reads all records at one revision, proves that none is missing, and fills the mirror.
func (r *Replica) load(ctx context.Context) error {
	h, err := r.store.head(ctx)
	if err != nil {
		return err
	}
	if err := r.continues(ctx, h); err != nil {
		return err
	}
	var anchor Anchor
	var newest allow.Mailbox
	if h.newest != nil {
		_, rec, err := decodeChange(h.newest, h.epoch)
		if err != nil {
			return err
		}
		newest, anchor = rec.Mailbox, newAnchor(rec.Mailbox.ID(), rec.Version, h.newest)
	}
	var records []Record
	var versions int64
	err = r.store.scan(ctx, h.at, func(kv *mvccpb.KeyValue) error {
		rec, err := decodeRecord(kv, h.epoch)
		if err != nil {
			return err
		}
		versions += rec.Version
		records = append(records, rec)
		return nil
	})
	if err != nil {
		return err
	}
	if versions != h.version {
		return fmt.Errorf("%w: the records add up to %d saves, but there were %d: records are missing or were edited",
			ErrDamaged, versions, h.version)
	}
	if h.newest != nil { // the records may be those of a backup that was restored since
		held, err := r.store.holds(ctx, newest, h.epoch, anchor)
		if err != nil {
			return err
		}
		if !held {
			return fmt.Errorf("reading all records: %w: the history is another one by now", ErrUnavailable)
		}
	}
	r.damaged.Set(0)
	r.newest = newest
	r.anchors.remember(h.epoch, anchor, true)
	r.mirror.replace(records, State{Store: h.id, Epoch: h.epoch, Revision: h.revision, Version: h.version, Anchor: anchor})
	r.log.InfoContext(ctx, "loaded from etcd", "records", len(records), "revision", h.revision, "saves", h.version,
		"store", fmt.Sprintf("%x", h.id), "epoch", h.epoch)
	return nil
}

// continues makes sure that what etcd holds now is the mirror's history, gone on, or of a higher epoch.
func (r *Replica) continues(ctx context.Context, h head) error {
	old, filled := r.mirror.State()
	if !filled || h.epoch > old.Epoch {
		return nil
	}
	if h.epoch < old.Epoch || h.version < old.Version || h.revision < old.Revision {
		return fmt.Errorf("%w: it went back from save %d at revision %d of epoch %d to save %d at revision %d of epoch %d: after restoring a backup raise the epoch",
			ErrDamaged, old.Version, old.Revision, old.Epoch, h.version, h.revision, h.epoch)
	}
	err := r.unforked(ctx)
	if errors.Is(err, errBack) {
		err = fmt.Errorf("%w: it went on to save %d at revision %d of epoch %d, but does not hold save %d, which was made at revision %d: after restoring a backup raise the epoch",
			ErrDamaged, h.version, h.revision, h.epoch, old.Version, old.Revision)
	}
	return err
}

// unforked makes sure that etcd holds the mirror's newest save; if not, that is [errBack].
func (r *Replica) unforked(ctx context.Context) error {
	state, _ := r.mirror.State()
	if state.Version == 0 {
		return nil
	}
	held, err := r.store.holds(ctx, r.newest, state.Epoch, state.Anchor)
	if err == nil && !held {
		err = errBack
	}
	return err
}

// scan calls use for every record at the revision, ordered by key; opts may ask for keys only.
func (s *Store) scan(ctx context.Context, rev int64, use func(*mvccpb.KeyValue) error, opts ...clientv3.OpOption) error {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := s.client.GetStream(ctx, mailboxPrefix, append(opts, clientv3.WithPrefix(), clientv3.WithRev(rev))...)
	if err != nil {
		cancel()
		return wrap("reading all records", err)
	}
	defer func() {
		cancel()
		for range stream { // the client's goroutine ends only when its channel is drained
		}
	}()
	var n, count int64
	var last []byte
	for {
		chunk, more, err := receive(ctx, stream)
		if err != nil {
			return wrap("reading all records", err)
		}
		if !more {
			break
		}
		for _, kv := range chunk.Kvs {
			if bytes.Compare(kv.Key, last) <= 0 { // one in place of another would not show in the sum
				return fmt.Errorf("reading all records: %w: %s came after %s", ErrUnavailable, kv.Key, last)
			}
			last = kv.Key
			if err := use(kv); err != nil {
				return err
			}
		}
		n, count = n+int64(len(chunk.Kvs)), max(count, chunk.Count)
	}
	if n != count {
		return fmt.Errorf("reading all records: %w: %d of %d arrived", ErrUnavailable, n, count)
	}
	return nil
}

// scanTimeout bounds the wait for one chunk of a scan.
const scanTimeout = 30 * time.Second

func receive(ctx context.Context, stream clientv3.GetStreamChan) (clientv3.RangeStreamResponse, bool, error) {
	timer := time.NewTimer(scanTimeout)
	defer timer.Stop()
	select {
	case chunk, more := <-stream:
		return chunk, more, chunk.Err()
	case <-timer.C:
		return clientv3.RangeStreamResponse{}, false, context.DeadlineExceeded
	case <-ctx.Done():
		return clientv3.RangeStreamResponse{}, false, ctx.Err()
	}
}

// follow applies one save after the other until something is wrong.
func (r *Replica) follow(ctx context.Context) error {
	state, _ := r.mirror.State()
	from, err := r.watchFrom(ctx, state)
	if err != nil {
		return err
	}
	client, err := r.store.cfg.dial(oneStream()) // a watch shares no connection with big reads: they starve it
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()

	ctx, cancel := context.WithCancel(ctx)
	tails, wrong := make(chan tail), make(chan error)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	background.Go(func() { r.readTails(ctx, tails) })
	background.Go(func() { r.scrubAlways(ctx, wrong) })
	// Watch returns only once etcd has confirmed it, which a watch that hangs from its beginning never does. Only then is etcd
	// asked whether its history is the mirror's: it may have been away, and have come back with a backup.
	begun := make(chan clientv3.WatchChan, 1)
	background.Go(func() {
		watch := client.Watch(clientv3.WithRequireLeader(ctx), logKey, clientv3.WithRev(from))
		if err := r.unforked(ctx); err != nil {
			report(ctx, wrong, err)
			return
		}
		begun <- watch
	})

	var watch clientv3.WatchChan
	var told time.Time   // when the log last heard that etcd does not answer
	var behind time.Time // since when the watch is known to be behind
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case watch = <-begun:
		case resp, ok := <-watch:
			if !ok {
				return fmt.Errorf("watching: %w: the watch ended", ErrUnavailable)
			}
			if err := resp.Err(); err != nil {
				return r.watchEnded(ctx, err)
			}
			if id := resp.Header.ClusterId; id != r.store.cluster {
				return fmt.Errorf("watching: %w: cluster %x, not %x", ErrForeign, id, r.store.cluster)
			}
			for _, event := range resp.Events {
				if err := r.applyNext(event); err != nil {
					return err
				}
			}
		case t := <-tails:
			if err := t.check(); err != nil {
				return err
			}
			switch state, _ := r.mirror.State(); {
			case t.err != nil: // tells nothing about the watch
				if time.Since(told) > tellEvery {
					told = time.Now()
					r.log.WarnContext(ctx, "etcd does not answer; sidecars report the age of their data", "error", t.err)
				}
			case t.head.version <= state.Version:
				behind = time.Time{}
			case behind.IsZero():
				behind = time.Now()
			case time.Since(behind) >= r.timing.Stall:
				return errStalled
			}
		case err := <-wrong:
			return err
		}
	}
}

// oneStream lets a client open one stream. etcd's client opens another when a watch breaks, and would go on in whatever history
// answers then, without a word to us.
func oneStream() grpc.DialOption {
	var opened atomic.Bool
	return grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string,
		open grpc.Streamer, opts ...grpc.CallOption,
	) (grpc.ClientStream, error) {
		if opened.Load() {
			return nil, errBroken
		}
		stream, err := open(ctx, desc, conn, method, opts...)
		opened.Store(err == nil)
		return stream, err
	})
}

// watchFrom returns the revision from which a watch continues the mirror. If nothing was saved since, that is after now:
// the mirror's own revision may have been compacted long ago.
func (r *Replica) watchFrom(ctx context.Context, state State) (int64, error) {
	t := r.readTail(ctx)
	switch err := t.check(); {
	case err != nil:
		return 0, err
	case t.err != nil:
		return 0, t.err
	case t.head.version == state.Version:
		return t.head.at + 1, nil
	}
	return state.Revision + 1, nil
}

// watchEnded says what an error of the watch means. That etcd forgot the watch's revision is no harm if nothing was saved
// since: the next watch begins after now. If that cannot be read, the next watch finds out.
func (r *Replica) watchEnded(ctx context.Context, err error) error {
	if errors.Is(err, rpctypes.ErrCompacted) {
		if t := r.readTail(ctx); t.err != nil || t.head.version == t.before.Version {
			return fmt.Errorf("watching: %w: the revision was compacted", ErrUnavailable)
		}
	}
	return wrap("watching", err)
}

// applyNext applies one event of log if it is the next save, and of the mailbox the next version.
func (r *Replica) applyNext(event *clientv3.Event) error {
	state, _ := r.mirror.State()
	if event.Type != clientv3.EventTypePut || event.Kv.Version != state.Version+1 || event.Kv.ModRevision <= state.Revision {
		return fmt.Errorf("%w: %s of save %d at revision %d after save %d at revision %d", errGap,
			event.Type, event.Kv.Version, event.Kv.ModRevision, state.Version, state.Revision)
	}
	_, rec, err := decodeChange(event.Kv, state.Epoch)
	if err != nil {
		return err
	}
	var version int64
	if e := r.mirror.get(rec.Mailbox.ID()); e != nil {
		version = e.Version
	}
	if rec.Version != version+1 {
		return fmt.Errorf("%w: version %d of a mailbox after version %d", errGap, rec.Version, version)
	}
	anchor := newAnchor(rec.Mailbox.ID(), rec.Version, event.Kv)
	r.anchors.remember(state.Epoch, anchor, true)
	r.newest = rec.Mailbox
	r.mirror.apply(rec, event.Kv.Version, anchor)
	return nil
}

// tail is a linearizable read of the newest save and the mirror's state when it began.
type tail struct {
	before State
	head   head
	err    error
}

func (r *Replica) readTail(ctx context.Context) tail {
	before, _ := r.mirror.State()
	h, err := r.flights.join(ctx)
	return tail{before: before, head: h, err: err}
}

// check returns what no patience cures. That etcd does not answer is not among it: the watch may well be alive.
func (t tail) check() error {
	switch {
	case errors.Is(t.err, ErrNotCreated), errors.Is(t.err, ErrDamaged), errors.Is(t.err, ErrForeign):
		return t.err
	case t.err == nil && (t.head.id != t.before.Store || t.head.epoch != t.before.Epoch || t.head.version < t.before.Version ||
		cmp.Compare(t.head.version, t.before.Version) != cmp.Compare(t.head.revision, t.before.Revision) ||
		t.head.version == t.before.Version && t.head.newest != nil && !t.before.Anchor.of(t.head.newest)):
		return errBack
	}
	return nil
}

func (r *Replica) readTails(ctx context.Context, out chan<- tail) {
	every(ctx, r.timing.Tail, func() {
		select {
		case out <- r.readTail(ctx):
		case <-ctx.Done():
		}
	})
}

// scrubAlways reports the first difference it finds.
func (r *Replica) scrubAlways(ctx context.Context, out chan<- error) {
	every(ctx, r.timing.Scrub, func() {
		err := r.scrub(ctx)
		if err == nil {
			r.damaged.Set(0) // the load that found damage did not read what is there
		}
		if !errors.Is(err, errScrub) && !errors.Is(err, ErrDamaged) {
			if err != nil && ctx.Err() == nil {
				r.log.WarnContext(ctx, "comparing with etcd failed", "error", err)
			}
			return
		}
		report(ctx, out, err)
	})
}

func report(ctx context.Context, out chan<- error, err error) {
	select {
	case out <- err:
	case <-ctx.Done():
	}
}

func every(ctx context.Context, d time.Duration, do func()) {
	ticker := time.NewTicker(d)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			do()
		}
	}
}

// scrub compares the revision of every record in etcd with the mirror's.
func (r *Replica) scrub(ctx context.Context) error {
	h, err := r.flights.join(ctx)
	if err != nil {
		return err
	}
	if _, err := r.mirror.Wait(ctx, func(s State) bool { return s.Version >= h.version }); err != nil {
		return err
	}
	// The mirror may be ahead of h by now. Records that changed since are left to the next scrub.
	revisions := r.mirror.revisions()
	err = r.store.scan(ctx, h.at, func(kv *mvccpb.KeyValue) error {
		mailbox, err := canonicalMailbox(strings.TrimPrefix(string(kv.Key), mailboxPrefix))
		if err != nil {
			return err
		}
		ours := revisions[mailbox]
		if ours != kv.ModRevision && ours <= h.revision {
			return fmt.Errorf("%w: a record is at revision %d, not %d", errScrub, kv.ModRevision, ours)
		}
		delete(revisions, mailbox)
		return nil
	}, clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	for _, ours := range revisions {
		if ours <= h.revision {
			return fmt.Errorf("%w: the record of revision %d is missing", errScrub, ours)
		}
	}
	return nil
}

// Barrier waits until the mirror has every save that was acknowledged before the call, and returns its state then.
// Errors: [ErrUnavailable], also for a mirror that does not get there in time.
func (r *Replica) Barrier(ctx context.Context) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	t := r.readTail(ctx)
	if err := t.check(); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if t.err != nil {
		return State{}, t.err
	}
	state, err := r.mirror.Wait(ctx, func(s State) bool {
		return s.Store == t.head.id && s.Epoch == t.head.epoch && s.Version >= t.head.version
	})
	return state, wrap("waiting for the newest save", err)
}

// Holds reports whether the history of an epoch holds the save that an anchor names, if that save was acknowledged before the call.
// What it does not know it looks up in etcd, once for all who ask at the same time.
// Errors: [ErrUnavailable], also if the store is of another epoch by now.
func (r *Replica) Holds(ctx context.Context, epoch uint64, anchor Anchor) (bool, error) {
	if held, known := r.anchors.recall(epoch, anchor); known {
		return held, nil
	}
	state, err := r.Barrier(ctx)
	if err != nil {
		return false, err
	}
	if state.Epoch != epoch {
		return false, fmt.Errorf("%w: epoch %d was asked for, and it is %d by now", ErrUnavailable, epoch, state.Epoch)
	}
	looking := r.looking[int(anchor[len(anchor)-1])%len(r.looking)]
	select {
	case looking <- struct{}{}:
		defer func() { <-looking }()
	case <-ctx.Done():
		return false, wrap("waiting for a search", ctx.Err())
	}
	if held, known := r.anchors.recall(epoch, anchor); known {
		return held, nil
	}
	held := false
	// The mirror has every mailbox that was ever saved, and how often it was.
	if e := r.mirror.get(anchor.id()); e != nil && anchor.version() <= e.Version {
		if held, err = r.store.holds(ctx, e.Mailbox, epoch, anchor); err != nil {
			return false, err
		}
	}
	r.anchors.remember(epoch, anchor, held)
	return held, nil
}

// flights shares linearizable reads: whoever joins gets a read that began after it joined, and at most one runs at a time.
type flights struct {
	read func(context.Context) (head, error)
	wake chan struct{}

	mu   sync.Mutex
	next *flight // not begun
}

type flight struct {
	done chan struct{}
	head head
	err  error
}

func (f *flights) join(ctx context.Context) (head, error) {
	f.mu.Lock()
	if f.next == nil {
		f.next = &flight{done: make(chan struct{})}
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
	fl := f.next
	f.mu.Unlock()
	select {
	case <-fl.done:
		return fl.head, fl.err
	case <-ctx.Done():
		return head{}, wrap("reading the newest save", ctx.Err())
	}
}

// run carries out reads until ctx ends.
func (f *flights) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		}
		f.mu.Lock()
		fl := f.next
		f.next = nil
		f.mu.Unlock()
		fl.head, fl.err = f.read(ctx)
		close(fl.done)
	}
}
