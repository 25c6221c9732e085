package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

const (
	// batch is how many checks are on their way at once.
	batch = 64
	// settleEvery is how often what was answered is held against the model.
	settleEvery = time.Second
	// askAgain is the pause after a refusal.
	askAgain = 5 * time.Millisecond
	// redial is how long a checker's connection may go on failing when the sidecar is there again.
	redial = 200 * time.Millisecond
)

// excuse says why a sidecar may lack an answer.
type excuse int

const (
	notRunning excuse = iota // it was killed
	noState                  // it was killed and has no state on disk, and waits for a policy service
)

// excuses are the windows of time in which a sidecar may lack an answer. Its methods may be called concurrently.
type excuses struct {
	mu      sync.Mutex
	windows map[excuse][]window
	lives   int // how often it forgot its state, or may have
}

type window struct{ from, to time.Time } // no end: still open

func (e *excuses) begin(why excuse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.windows == nil {
		e.windows = make(map[excuse][]window)
	}
	if why == noState {
		e.lives++
	}
	if w := e.windows[why]; len(w) == 0 || !w[len(w)-1].to.IsZero() {
		e.windows[why] = append(w, window{from: time.Now()})
	}
}

func (e *excuses) end(why excuse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if w := e.windows[why]; len(w) > 0 && w[len(w)-1].to.IsZero() {
		w[len(w)-1].to = time.Now().Add(redial)
	}
}

// covers reports whether there was an excuse at some moment between asking and the refusal.
func (e *excuses) covers(why excuse, asked, refused time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, w := range e.windows[why] {
		if w.from.Before(refused) && (w.to.IsZero() || w.to.After(asked)) {
			return true
		}
	}
	return false
}

func (e *excuses) forgot() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lives
}

// observation is an answer about a state, with the query's number.
type observation struct {
	state revision.Token
	query int
	answer
}

// checker asks one sidecar without pause and judges every answer.
type checker struct {
	name    string
	socket  string
	model   *model
	report  *report
	excuses *excuses
	queries []query

	requests []*checkv1.CheckStreamRequest
	waiting  map[observation]int64 // how often it was seen, until the state is settled
	last     revision.Token
	lives    int
	answers  atomic.Int64
	resting  time.Duration // between batches
}

func newChecker(name, socket string, m *model, r *report, e *excuses) *checker {
	c := &checker{name: name, socket: socket, model: m, report: r, excuses: e, queries: queries(), waiting: make(map[observation]int64)}
	for _, q := range c.queries {
		c.requests = append(c.requests, &checkv1.CheckStreamRequest{
			Check: &checkv1.CheckRequest{Mailbox: q.spelled, ClientAddress: q.address, Service: q.service},
		})
	}
	return c
}

// dial connects to a sidecar's socket, and tries again at once when it is not there: it shall be noticed when it is.
func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: askAgain, Multiplier: 1, MaxDelay: askAgain}, MinConnectTimeout: time.Second,
	}))
}

// run asks until ctx ends.
func (c *checker) run(ctx context.Context, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	conn, err := dial(c.socket)
	if err != nil {
		c.report.violated("%s: %v", c.name, err)
		return
	}
	defer func() { _ = conn.Close() }()
	for ctx.Err() == nil {
		asked := time.Now()
		err := c.stream(ctx, checkv1.NewCheckServiceClient(conn), random, &asked)
		if ctx.Err() != nil {
			break
		}
		c.refused(asked, err)
		select {
		case <-ctx.Done():
		case <-time.After(askAgain):
		}
	}
	c.report.count("answers", c.answers.Load())
	c.report.count("answers of "+c.name, c.answers.Load())
}

// stream asks over one stream until it fails; asked is when the requests without an answer were sent.
func (c *checker) stream(ctx context.Context, sidecar checkv1.CheckServiceClient, random *rand.Rand, asked *time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := sidecar.CheckStream(ctx)
	if err != nil {
		return err
	}
	numbers := make([]int, batch)
	settled := time.Now()
	for {
		*asked = time.Now()
		floor := c.model.before(*asked)
		for i := range numbers {
			numbers[i] = random.IntN(len(c.queries))
			if err := s.Send(c.requests[numbers[i]]); err != nil {
				for err = nil; err == nil; _, err = s.Recv() { // behind the answers that are there it says why
				}
				return err
			}
		}
		for _, q := range numbers {
			resp, err := s.Recv()
			if err != nil {
				return err
			}
			c.answered(q, resp.GetCheck(), *asked, floor)
		}
		if time.Since(settled) > settleEvery {
			c.settle()
			settled = time.Now()
		}
		if c.resting > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(c.resting):
			}
		}
	}
}

// answered notes an answer to a request that was sent at a moment; floor is the newest save that was acknowledged before.
func (c *checker) answered(number int, resp *checkv1.CheckResponse, asked time.Time, floor revision.Token) {
	c.answers.Add(1)
	d := resp.GetDecision()
	o := observation{query: number, answer: answer{d.GetVerdict(), d.GetReason(), d.GetMatchedNet()}}
	if d.GetRevision() == "" && d.GetReason() == decisionv1.Reason_REASON_SERVICE_EXEMPT {
		return // the only answer that needs no state
	}
	var err error
	if o.state, err = revision.Parse(d.GetRevision()); err != nil {
		c.report.violated("%s: %v", c.name, err)
		return
	}
	if o.state != c.last {
		if lives := c.excuses.forgot(); lives != c.lives {
			c.lives, c.last = lives, revision.Token{}
		}
		if compare(o.state, c.last) < 0 {
			c.report.violated("%s went back from %s to %s", c.name, c.last, o.state)
		}
		c.last = o.state
	}
	// What the age claims: every save that was acknowledged before then is in the state.
	if age := resp.GetDataAge(); age != nil && compare(o.state, floor) < 0 {
		claimed := asked.Add(-age.AsDuration())
		if missing := c.model.before(claimed); compare(o.state, missing) < 0 {
			c.report.violated("%s: a state of %s claims an age of %v, but %s was acknowledged before", c.name, o.state, age.AsDuration(), missing)
		}
		c.report.atMost("age of the data in an answer", age.AsDuration())
	}
	c.waiting[o]++
}

// settle judges the answers about states that are known by now.
func (c *checker) settle() {
	settled := c.model.settled()
	for o, times := range c.waiting {
		if compare(o.state, settled) > 0 {
			continue
		}
		c.report.count("answers compared with the model", times)
		if !c.model.made(o.state) {
			c.report.violated("%d times: %s answers about %s, which no save made", times, c.name, o.state)
		}
		if err := c.judge(o); err != nil {
			c.report.violated("%d times: %v", times, err)
		}
		delete(c.waiting, o)
	}
}

// judge compares an answer with the model.
func (c *checker) judge(o observation) error {
	q := c.queries[o.query]
	nets := c.model.at(q.mailbox, o.state)
	if want := decide(nets, q); o.answer != want {
		return fmt.Errorf("%s at %s: %+v: the answer is %+v, the model's is %+v (list %v)", c.name, o.state, q, o.answer, want, nets)
	}
	return nil
}

// refused judges the lack of an answer.
func (c *checker) refused(asked time.Time, err error) {
	now := time.Now()
	c.report.count(fmt.Sprintf("refusals of %s for lack of an answer: %s", c.name, reason(err)), 1)
	why := notRunning
	if rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED {
		why = noState
	}
	if !c.excuses.covers(why, asked, now) {
		c.report.count("refusals without an excuse", 1)
		c.report.violated("%s has no answer, and no excuse: asked %v ago: %v", c.name, now.Sub(asked), err)
	}
}

func reason(err error) string {
	if r := rpcerr.Reason(err); r != decisionv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		return r.String()
	}
	if c := status.Code(err); c != codes.Unavailable {
		return c.String()
	}
	return "not running"
}
