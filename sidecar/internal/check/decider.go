// Package check answers whether a client may reach a mailbox: a [Decider], and the doors that translate for it. A door
// speaks one protocol and decides nothing.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

// DeciderConfig configures a [Decider].
type DeciderConfig struct {
	// State returns the state to decide on, nil if there is none yet.
	State func() *mirror.State
	// Changed returns a channel that is closed when there is another state.
	Changed func() <-chan struct{}
	Scope   allow.Scope
	// DefaultDomain completes names without a domain; empty: they are refused.
	DefaultDomain string
	// DenyAfter denies restricted services once the data is older than this; 0: never.
	DenyAfter time.Duration
	Log       *slog.Logger
	Metrics   prometheus.Registerer
}

// Decider is the one place that decides. It is safe for concurrent use.
type Decider struct {
	cfg       DeciderConfig
	decisions [services][reasons]prometheus.Counter
	denials   *denialLog
}

const (
	services = int(decisionv1.Service_SERVICE_WEBDAV) + 1
	reasons  = int(decisionv1.Reason_REASON_STALE) + 1
)

// Request asks about one access, in the words of a peer.
type Request struct {
	Mailbox string
	Client  string // address; empty if unknown
	Service decisionv1.Service
	// MinRevision is the token of a save that the decision must include; empty: decide on what is there.
	MinRevision string
}

// Decision answers a [Request].
type Decision struct {
	allow.Outcome
	// State is what was decided on; nil if there is none yet, which only an exempt service does not mind.
	State  *mirror.State
	Client netip.Addr // as parsed
}

// ErrNotSynced means that there is no verified state yet, and so no answer.
var ErrNotSynced = errors.New("the sidecar has not yet received the lists from a policy service")

// ErrNotFresh means that the state does not include [Request.MinRevision], although the decider waited for it.
var ErrNotFresh = errors.New("the sidecar has not yet received the save that min_revision names")

// maxWait is how long a request waits for its MinRevision.
const maxWait = 50 * time.Millisecond

// ServiceError means that a request named no service, or one that is not known.
type ServiceError struct{ Service decisionv1.Service }

func (e *ServiceError) Error() string {
	if e.Service == decisionv1.Service_SERVICE_UNSPECIFIED {
		return "the service is not given"
	}
	return fmt.Sprintf("service %d is unknown", e.Service)
}

// NewDecider returns a decider.
func NewDecider(cfg DeciderConfig) (*Decider, error) {
	d := &Decider{cfg: cfg}
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "allowednets_sidecar_decisions_total", Help: "Decisions by service and reason.",
	}, []string{"service", "reason"})
	unlogged := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "allowednets_sidecar_denials_unlogged_total", Help: "Denials that were not logged because there were too many.",
	})
	for _, c := range []prometheus.Collector{decisions, unlogged} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	for svc := 1; svc < services; svc++ {
		for reason := 1; reason < reasons; reason++ {
			d.decisions[svc][reason] = decisions.WithLabelValues(serviceLabel(decisionv1.Service(svc)), reasonLabel(decisionv1.Reason(reason)))
		}
	}
	d.denials = &denialLog{log: cfg.Log, unlogged: unlogged}
	return d, nil
}

// Decide answers a request. The error is [ErrNotSynced], [ErrNotFresh], one that wraps [revision.ErrInvalid], a
// *[ServiceError], an *[allow.NameError] or an *[allow.AddressError]; it means "no answer", and so a denial. For a canonical
// mailbox, and without a MinRevision, Decide allocates nothing, unless it denies.
func (d *Decider) Decide(ctx context.Context, r Request) (Decision, error) {
	dec, mailbox, err := d.decide(ctx, r)
	if err != nil {
		return Decision{}, err
	}
	d.decisions[r.Service][dec.Reason].Inc()
	if dec.Verdict != decisionv1.Verdict_VERDICT_ALLOW {
		d.denials.write(ctx, mailbox, r.Service, dec)
	}
	return dec, nil
}

// Review is [Decider.Decide] for an access that was granted earlier and goes on. Nobody asks for anything, so it is neither
// counted nor logged.
func (d *Decider) Review(ctx context.Context, r Request) (Decision, error) {
	dec, _, err := d.decide(ctx, r)
	return dec, err
}

func (d *Decider) decide(ctx context.Context, r Request) (Decision, allow.Mailbox, error) {
	restricted, known := d.cfg.Scope.Restricts(r.Service)
	if !known {
		return Decision{}, allow.Mailbox{}, &ServiceError{r.Service}
	}
	mailbox, err := allow.CompleteMailbox(r.Mailbox, d.cfg.DefaultDomain)
	if err != nil {
		return Decision{}, allow.Mailbox{}, err
	}
	client, err := allow.ParseClient(r.Client)
	if err != nil {
		return Decision{}, allow.Mailbox{}, err
	}
	dec := Decision{State: d.cfg.State(), Client: client}
	if r.MinRevision != "" {
		if dec.State, err = d.await(ctx, r.MinRevision, restricted); err != nil {
			return Decision{}, allow.Mailbox{}, err
		}
	}
	switch {
	case !restricted:
		dec.Outcome = allow.Outcome{Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_SERVICE_EXEMPT}
	case dec.State == nil:
		return Decision{}, allow.Mailbox{}, ErrNotSynced
	case d.stale(dec.State):
		// Unrestricted mailboxes too: they may have got a list that did not arrive.
		dec.Outcome = allow.Outcome{Verdict: decisionv1.Verdict_VERDICT_DENY, Reason: decisionv1.Reason_REASON_STALE}
	default:
		dec.Outcome = allow.Decide(dec.State.Index.Lookup(mailbox.ID()), client)
	}
	return dec, mailbox, nil
}

// Exempts reports whether the lists do not apply to a service, so that a request in whose name nobody has logged in yet may
// pass. It counts as a decision if so.
func (d *Decider) Exempts(svc decisionv1.Service) bool {
	restricted, known := d.cfg.Scope.Restricts(svc)
	if restricted || !known {
		return false
	}
	d.decisions[svc][decisionv1.Reason_REASON_SERVICE_EXEMPT].Inc()
	return true
}

// await returns the state once it includes the save that a token names. What is exempt does not depend on any save, so
// nothing is waited for then.
func (d *Decider) await(ctx context.Context, token string, restricted bool) (*mirror.State, error) {
	want, err := revision.Parse(token)
	if err != nil {
		return nil, err
	}
	if !restricted {
		return d.cfg.State(), nil
	}
	timer := time.NewTimer(maxWait)
	defer timer.Stop()
	for {
		changed := d.cfg.Changed()
		st := d.cfg.State()
		if st != nil && includes(st, want) {
			return st, nil
		}
		select {
		case <-changed:
			continue
		case <-timer.C:
		case <-ctx.Done():
		}
		if st == nil {
			return nil, ErrNotSynced
		}
		return nil, ErrNotFresh
	}
}

// includes reports whether a state includes the save that a token names. One of a higher epoch does: who raised the epoch,
// after restoring a backup, said that this is now the history, and a save that got lost by it will never come.
func includes(st *mirror.State, want revision.Token) bool {
	have, err := revision.Parse(st.Revision)
	return err == nil && (have.Epoch > want.Epoch || have.Epoch == want.Epoch && have.Revision >= want.Revision)
}

// stale reports whether the data is too old to decide on, or of unknown age, if the operator set a limit.
func (d *Decider) stale(st *mirror.State) bool {
	if d.cfg.DenyAfter == 0 {
		return false
	}
	age, ok := st.Age(time.Now())
	return !ok || age > d.cfg.DenyAfter
}

// requestOf reads the message of CheckService.
func requestOf(req *checkv1.CheckRequest) Request {
	return Request{Mailbox: req.GetMailbox(), Client: req.GetClientAddress(), Service: req.GetService(), MinRevision: req.GetMinRevision()}
}

// message is the answer of CheckService.
func (d Decision) message() *checkv1.CheckResponse { return d.streamed().GetCheck() }

// streamed is the answer of CheckService in a stream.
func (d Decision) streamed() *checkv1.CheckStreamResponse {
	m := new(struct { // in one allocation
		stream checkv1.CheckStreamResponse
		resp   checkv1.CheckResponse
		dec    decisionv1.Decision
		age    durationpb.Duration
	})
	m.stream.Check = &m.resp
	m.resp.Decision, m.dec.Verdict, m.dec.Reason = &m.dec, d.Verdict, d.Reason
	if d.Net.IsValid() {
		m.dec.MatchedNet = allow.FormatNet(d.Net)
	}
	if d.State != nil {
		m.dec.Revision = d.State.Revision
		if age, ok := d.State.Age(time.Now()); ok {
			m.resp.DataAge, m.age.Seconds, m.age.Nanos = &m.age, int64(age/time.Second), int32(age%time.Second)
		}
	}
	return &m.stream
}
