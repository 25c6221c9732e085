package e2e

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/test/stack"
)

// newDistantWorld is a world whose sidecar reaches the policy service over a network that can fail.
func newDistantWorld(t *testing.T) (*world, *stack.Proxy) {
	t.Helper()
	w := newWorld(t, settings{separateEtcd: true, noDovecot: true})
	network := startProxy(t, w.Stack, w.policy.Address)
	must(t, w.sidecar.Stop())
	var err error
	w.sidecar, err = w.StartSidecar(stack.SidecarConfig{Name: "distant", Policy: network.Address})
	must(t, err)
	must(t, w.sidecar.AwaitReady(within(t, startWithin)))
	w.checks = checkClient(t, w.sidecar)
	return w, network
}

// TestDataAge freezes and cuts what vouches for the data, right after it did. From then on the age must be the time since,
// to within a second: in answers, in the status and in the metric.
func TestDataAge(t *testing.T) {
	w, network := newDistantWorld(t)
	const (
		young   = 200 * time.Millisecond
		exact   = time.Second
		observe = 20 * time.Second // longer than it takes to give a silent stream up, and try another
	)
	ages := map[string]func(context.Context) (time.Duration, error){
		"Check": func(ctx context.Context) (time.Duration, error) {
			resp, err := w.checks.Check(ctx, &checkv1.CheckRequest{Mailbox: alice, ClientAddress: inside, Service: decisionv1.Service_SERVICE_IMAP})
			return resp.GetDataAge().AsDuration(), err
		},
		"GetStatus": func(ctx context.Context) (time.Duration, error) {
			resp, err := w.checks.GetStatus(ctx, &checkv1.GetStatusRequest{})
			return resp.GetDataAge().AsDuration(), err
		},
		"the metric": func(context.Context) (time.Duration, error) {
			seconds := metric(t, w.sidecar.Admin, "allowednets_sidecar_data_age_seconds")
			if math.IsInf(seconds, 0) {
				return 0, fmt.Errorf("the age is %v", seconds)
			}
			return time.Duration(seconds * float64(time.Second)), nil
		},
	}
	for _, fault := range []struct {
		name        string
		begin, over func(context.Context) error
	}{
		{"policy service frozen", w.policy.Freeze, w.policy.Thaw},
		{"etcd frozen", w.etcd.Freeze, w.etcd.Thaw},
		{"network cut", func(context.Context) error { network.Cut(); return nil }, func(context.Context) error { network.Heal(); return nil }},
	} {
		t.Run(fault.name, func(t *testing.T) {
			ctx := within(t, 2*time.Minute)
			must(t, stack.Await(ctx, func(ctx context.Context) error {
				age, err := ages["GetStatus"](ctx)
				if err == nil && age > young {
					err = fmt.Errorf("the data is %v old", age)
				}
				return err
			}))
			before := time.Now()
			must(t, fault.begin(ctx))
			since := time.Now()
			samples := 0
			must(t, stack.Await(ctx, func(ctx context.Context) error {
				for name, read := range ages {
					asked := time.Now()
					age, err := read(ctx)
					if err != nil {
						return err
					}
					if least, most := asked.Sub(since), time.Since(before)+young; age < least || age > most+exact {
						t.Errorf("%s says %v, %v after the fault", name, age, asked.Sub(since))
					}
					samples++
				}
				if left := observe - time.Since(since); left > 0 {
					return fmt.Errorf("%v left", left)
				}
				return nil
			}))
			must(t, fault.over(ctx))
			must(t, stack.Await(ctx, func(ctx context.Context) error {
				age, err := ages["GetStatus"](ctx)
				if err == nil && age > young {
					err = fmt.Errorf("the data is %v old", age)
				}
				return err
			}))
			t.Logf("%d samples", samples)
		})
	}
}

// TestReadYourWrites asks with the revision of a save right after it, before it can be there everywhere.
func TestReadYourWrites(t *testing.T) {
	w, network := newDistantWorld(t)
	ctx := within(t, 3*time.Minute)
	const distant = "192.0.2.200"
	check := func(token string) (decisionv1.Verdict, error) {
		resp, err := w.checks.Check(ctx, &checkv1.CheckRequest{
			Mailbox: alice, ClientAddress: distant, Service: decisionv1.Service_SERVICE_IMAP, MinRevision: token,
		})
		return resp.GetDecision().GetVerdict(), err
	}
	notFresh := func(err error) bool {
		return status.Code(err) == codes.Unavailable && rpcerr.Reason(err) == decisionv1.ErrorReason_ERROR_REASON_NOT_FRESH
	}
	fresh, late := 0, 0
	for i := range 200 {
		nets, want := aliceNets, decisionv1.Verdict_VERDICT_ALLOW
		if i%2 == 0 {
			nets, want = otherNets, decisionv1.Verdict_VERDICT_DENY
		}
		cut := i%70 == 69 // now and then it cannot arrive; each time the sidecar waits longer before it tries again
		if cut {
			network.Cut()
		}
		token, err := w.save(ctx, alice, nets)
		must(t, err)
		switch got, err := check(token.String()); {
		case err == nil && got == want && !cut:
			fresh++
		case notFresh(err):
			late++
		default:
			t.Errorf("save %d, cut %v: %v, %v; want %v or NOT_FRESH", i, cut, got, err, want)
		}
		if cut {
			network.Heal()
			must(t, stack.Await(ctx, func(context.Context) error {
				got, err := check(token.String())
				if err == nil && got != want {
					t.Errorf("save %d: %v, want %v", i, got, want)
				}
				return err
			}))
		}
	}
	t.Logf("%d answers, %d times NOT_FRESH", fresh, late)
	if fresh == 0 || late < 2 {
		t.Errorf("%d answers, %d times NOT_FRESH; 198 and 2 are expected on an idle machine", fresh, late)
	}
}
