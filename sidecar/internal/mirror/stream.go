package mirror

import (
	"context"
	"strconv"
	"sync"
	"time"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/lastgood"
)

const (
	pingEvery  = 5 * time.Second
	maxSilence = 3 * pingEvery
	maxEntries = 4096 // of one Changes
	maxPings   = 64   // that wait for their Pong, or whose Pong waits for its commit
)

// stream is one run of the feed. Everything in it belongs to the goroutine of follow.
type stream struct {
	m     *Mirror
	call  feedv1.FeedService_SyncClient
	hello *feedv1.Hello

	welcome *feedv1.Welcome   // nil until it came
	staged  *index.Builder    // entries since the last commit; nil if there are none
	changes *lastgood.Changes // the same for the keeper; nil if staged starts from nothing, or nobody keeps it
	applied int64             // what this stream's store and our state have in common; 0 if nothing
	commits int
	inStep  time.Time // when the first commit was applied

	nonce uint64
	pings []ping // sent, oldest first
	pongs []pong // that are ahead of applied

	unacked []unacked       // commits that are enforced but not yet kept, oldest first
	kept    <-chan struct{} // closed when more is kept; nil if unacked is empty
}

type unacked struct {
	number   uint64 // of the keeper
	revision int64
}

type ping struct {
	nonce uint64
	sent  time.Time
}

type pong struct {
	sent     time.Time // the ping
	revision int64
}

// follow opens a stream and applies what comes until it ends. inStep is for how long it was in step.
func (m *Mirror) follow(parent context.Context) (inStep time.Duration, end *ended) {
	conn, err := m.cfg.Dial()
	if err != nil {
		return 0, &ended{cause: causeUnreachable, err: err}
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(parent)) // a stream that is open ends with a goodbye
	watchdog := time.AfterFunc(maxSilence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel(nil)

	stopOpening := context.AfterFunc(parent, func() { cancel(nil) })
	call, err := feedv1.NewFeedServiceClient(conn).Sync(ctx)
	stopOpening()
	if err != nil {
		return 0, endOf(ctx, err, false)
	}
	running.Go(func() { // a Send that blocks must not hold up the goodbye
		select {
		case <-parent.Done():
		case <-ctx.Done():
			return
		}
		timer := time.NewTimer(maxGoodbye)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel(nil)
		case <-ctx.Done():
		}
	})
	received, failed := make(chan *feedv1.SyncResponse), make(chan error, 1)
	running.Go(func() {
		for {
			msg, err := call.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case received <- msg: // not while a Send blocks, so a server that does not read is found out as well
				watchdog.Reset(maxSilence)
			case <-ctx.Done():
				return
			}
		}
	})
	s := &stream{m: m, call: call, hello: m.hello()}
	end = s.run(ctx, parent.Done(), received, failed)
	m.connected.Store(false)
	if !s.inStep.IsZero() {
		inStep = time.Since(s.inStep)
	}
	return inStep, end
}

func (m *Mirror) hello() *feedv1.Hello {
	h := &feedv1.Hello{Id: m.cfg.ID, Version: m.cfg.Version}
	if st := m.State(); st != nil {
		h.Cluster, h.Epoch, h.Anchor = st.cluster, st.token.Epoch, []byte(st.anchor)
		if !m.fromZero {
			h.Revision = st.token.Revision
		}
	}
	return h
}

func (s *stream) run(ctx context.Context, stop <-chan struct{}, received <-chan *feedv1.SyncResponse, failed <-chan error) *ended {
	var wrong <-chan struct{}
	if s.m.cfg.Keeper != nil {
		wrong = s.m.cfg.Keeper.Wrong()
	}
	s.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Hello{Hello: s.hello}})
	// The first question goes out before the state comes in, so that the first commit is already of a known age.
	s.ping()
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case msg := <-received:
			if end := s.handle(ctx, msg); end != nil {
				return end
			}
		case err := <-failed:
			return endOf(ctx, err, s.welcome != nil)
		case <-ctx.Done():
			return endOf(ctx, ctx.Err(), s.welcome != nil)
		case <-ticker.C:
			s.ping()
		case <-s.kept:
			s.acknowledge()
		case <-wrong:
			s.m.fromZero = true
			return endedf(causeMismatch, "the state in memory is damaged, as writing it to disk showed")
		case <-stop:
			return s.leave(ctx, received, failed)
		}
	}
}

// leave says goodbye, so that the policy service does not take this sidecar for a lost one, and waits for the answer.
func (s *stream) leave(ctx context.Context, received <-chan *feedv1.SyncResponse, failed <-chan error) *ended {
	_ = s.call.CloseSend()
	for {
		select {
		case <-received:
		case err := <-failed:
			return endOf(ctx, err, s.welcome != nil)
		case <-ctx.Done():
			return endOf(ctx, ctx.Err(), s.welcome != nil)
		}
	}
}

// send sends a message. Why that fails is what Recv returns to the other goroutine.
func (s *stream) send(msg *feedv1.SyncRequest) { _ = s.call.Send(msg) }

func (s *stream) ping() {
	s.nonce++
	s.pings = appendBounded(s.pings, ping{nonce: s.nonce, sent: time.Now()})
	s.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ping{Ping: &feedv1.Ping{Nonce: s.nonce}}})
}

func (s *stream) handle(ctx context.Context, msg *feedv1.SyncResponse) *ended {
	if drain := msg.GetDrain(); drain != nil {
		return &ended{
			cause: causeDrain, err: errDrain,
			retryAfter: time.Duration(drain.GetRetryAfterMs()) * time.Millisecond,
		}
	}
	if w := msg.GetWelcome(); w != nil && s.welcome == nil {
		return s.onWelcome(ctx, w)
	}
	if s.welcome == nil {
		return endedf(causeMessage, "%T before the Welcome", msg.GetMessage())
	}
	switch msg := msg.GetMessage().(type) {
	case *feedv1.SyncResponse_Changes:
		return s.onChanges(ctx, msg.Changes)
	case *feedv1.SyncResponse_Pong:
		return s.onPong(msg.Pong)
	default:
		return endedf(causeMessage, "unexpected %T", msg)
	}
}

func (s *stream) onWelcome(ctx context.Context, w *feedv1.Welcome) *ended {
	m, st := s.m, s.m.State()
	if w.GetCluster() == 0 || w.GetEpoch() == 0 {
		return endedf(causeWelcome, "the policy service does not say which store it serves")
	}
	same := false
	if st != nil {
		if w.GetCluster() != st.cluster && w.GetCluster() != m.cfg.AcceptCluster {
			m.foreign.Store(true)
			return endedf(causeForeign, "the policy service serves the store %x, but the state came from %x: if the store was replaced on purpose, restart with --accept-cluster=%x",
				w.GetCluster(), st.cluster, w.GetCluster())
		}
		if w.GetCluster() == st.cluster && w.GetEpoch() < st.token.Epoch {
			return endedf(causeEpoch, "the policy service serves epoch %d, but the state is of epoch %d", w.GetEpoch(), st.token.Epoch)
		}
		same = w.GetCluster() == st.cluster && w.GetEpoch() == st.token.Epoch
	}
	if !w.GetRestart() && (!same || s.hello.GetRevision() == 0) {
		return endedf(causeWelcome, "the policy service wants to continue a state that the sidecar does not have")
	}
	s.welcome = w
	if w.GetRestart() {
		s.staged = m.writer.Rebuild()
	} else {
		s.applied = s.hello.GetRevision()
	}
	m.foreign.Store(false)
	m.connected.Store(true)
	m.cfg.Log.InfoContext(ctx, "feed stream opened", "cluster", strconv.FormatUint(w.GetCluster(), 16), "epoch", w.GetEpoch(),
		"restart", w.GetRestart(), "from_revision", s.applied)
	return nil
}

func (s *stream) onChanges(ctx context.Context, c *feedv1.Changes) *ended {
	if len(c.GetEntries()) > maxEntries {
		return endedf(causeEntry, "%d entries in one message; at most %d are expected", len(c.GetEntries()), maxEntries)
	}
	if s.staged == nil {
		s.staged = s.m.writer.Edit()
		if s.m.cfg.Keeper != nil {
			s.changes = new(lastgood.Changes)
		}
	}
	for _, e := range c.GetEntries() {
		if len(e.GetId()) != len(allow.ID{}) {
			return endedf(causeEntry, "an id of %d octets", len(e.GetId()))
		}
		id := allow.ID(e.GetId())
		if err := s.staged.Put(id, e.GetNets()); err != nil {
			return endedf(causeEntry, "the nets of %x: %w", id, err)
		}
		if s.changes != nil {
			s.changes.Put(id, e.GetNets())
		}
	}
	s.m.metrics.entries.Add(float64(len(c.GetEntries())))
	if c.GetCommit() == nil {
		return nil
	}
	return s.onCommit(ctx, c.GetCommit())
}

func (s *stream) onCommit(ctx context.Context, c *feedv1.Commit) *ended {
	m, old := s.m, s.m.State()
	token := revision.Token{Epoch: s.welcome.GetEpoch(), Revision: c.GetRevision()}
	continues := old != nil && old.cluster == s.welcome.GetCluster() && old.token.Epoch == token.Epoch
	switch {
	case token.Revision <= 0:
		return endedf(causeCommit, "a commit with revision %d", token.Revision)
	case len(c.GetDigest()) != len(allow.Digest{}):
		return endedf(causeCommit, "a digest of %d octets", len(c.GetDigest()))
	case len(c.GetAnchor()) > lastgood.MaxAnchor:
		return endedf(causeCommit, "an anchor of %d octets", len(c.GetAnchor()))
	case continues && token.Revision < old.token.Revision:
		return endedf(causeRevision, "revision %d, but %d was applied", token.Revision, old.token.Revision)
	case s.commits > 0 && token.Revision == s.applied:
		return endedf(causeCommit, "revision %d twice", token.Revision)
	}
	if digest := allow.Digest(c.GetDigest()); s.staged.Count() != c.GetCount() || s.staged.Digest() != digest {
		m.fromZero = true
		m.metrics.mismatches.Inc()
		return endedf(causeMismatch, "revision %d should have %d mailboxes with digest %x, but what was sent adds up to %d with %x",
			token.Revision, c.GetCount(), digest, s.staged.Count(), s.staged.Digest())
	}
	verified := lastgood.State{Cluster: s.welcome.GetCluster(), Token: token, Anchor: string(c.GetAnchor()), Index: s.staged.Build()}
	s.keep(ctx, verified)
	next := newState(verified)
	if continues {
		next.Proven = old.Proven
	}
	s.staged, s.changes, s.applied = nil, nil, token.Revision
	next.Proven = s.proven(next.Proven)
	m.publish(next)
	m.fromZero = false
	m.metrics.commits.Inc()
	if s.commits++; s.commits == 1 {
		s.inStep = time.Now()
		m.cfg.Log.InfoContext(ctx, "feed in step", "revision", next.Revision, "restricted_mailboxes", next.Index.Count())
	}
	s.acknowledge()
	return nil
}

// keep hands a state to the keeper and waits for it: what was enforced should be there after a restart. But a restriction
// does not wait for a disk that hangs.
func (s *stream) keep(ctx context.Context, st lastgood.State) {
	keeper := s.m.cfg.Keeper
	u := unacked{revision: st.Token.Revision}
	if keeper != nil {
		u.number = keeper.Keep(st, s.changes)
	}
	hangs := len(s.unacked) > 0
	s.unacked = appendBounded(s.unacked, u)
	if keeper == nil || hangs {
		return
	}
	timer := time.NewTimer(maxKeep)
	defer timer.Stop()
	for {
		number, changed := keeper.Kept()
		if number >= u.number {
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// acknowledge acknowledges the newest of the commits that are kept.
func (s *stream) acknowledge() {
	kept := s.unacked
	if keeper := s.m.cfg.Keeper; keeper != nil {
		number, changed := keeper.Kept()
		n := 0
		for n < len(kept) && kept[n].number <= number {
			n++
		}
		kept, s.kept = kept[:n], changed
	}
	if len(kept) > 0 {
		s.send(&feedv1.SyncRequest{Message: &feedv1.SyncRequest_Ack{Ack: &feedv1.Ack{Revision: kept[len(kept)-1].revision}}})
	}
	s.unacked = append(s.unacked[:0], s.unacked[len(kept):]...)
	if len(s.unacked) == 0 {
		s.kept = nil
	}
}

func (s *stream) onPong(p *feedv1.Pong) *ended {
	i := 0
	for i < len(s.pings) && s.pings[i].nonce != p.GetNonce() {
		i++
	}
	if i == len(s.pings) || p.GetRevision() < 0 {
		return endedf(causePong, "an answer to a question that was not asked: nonce %d, revision %d", p.GetNonce(), p.GetRevision())
	}
	s.pongs = appendBounded(s.pongs, pong{sent: s.pings[i].sent, revision: p.GetRevision()})
	s.pings = append(s.pings[:i], s.pings[i+1:]...)
	if s.applied == 0 {
		return nil // nothing to compare with yet
	}
	st := s.m.State()
	if proven := s.proven(st.Proven); proven.After(st.Proven) {
		next := *st
		next.Proven = proven
		s.m.publish(&next)
	}
	return nil
}

// proven returns the newest time at which applied was the newest revision, not before since, and drops the answers it used.
func (s *stream) proven(since time.Time) time.Time {
	ahead := s.pongs[:0]
	for _, p := range s.pongs {
		switch {
		case p.revision > s.applied:
			ahead = append(ahead, p)
		case p.sent.After(since):
			since = p.sent
		}
	}
	s.pongs = ahead
	return since
}

// appendBounded appends to a list that forgets its oldest member rather than grow beyond [maxPings].
func appendBounded[T any](list []T, v T) []T {
	if len(list) == maxPings {
		list = append(list[:0], list[1:]...)
	}
	return append(list, v)
}
