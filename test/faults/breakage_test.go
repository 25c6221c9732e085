package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/allowednets/allowednets/test/stack"
)

// fault is something that can happen to the world.
type fault struct {
	name     string
	targets  int                       // how many there are to choose from
	claims   func(target int) []string // what it needs for itself
	shortest time.Duration             // it lasts from here to twice as long, or mostLonger
	alone    bool
	// begin lets it happen; the function it returns ends it, and must leave everything as it was.
	begin func(ctx context.Context, w *world, target int) (end func(context.Context) error, err error)
}

const (
	short = 2 * time.Second
	// long is more than it may take until a sidecar knows that it is cut off, and until gRPC takes a connection for silent.
	long = 31 * time.Second
	// leaderGap is how long nobody may be able to save when etcd's leader dies.
	leaderGap = 3 * time.Second
	// allEtcd is claimed by what etcd's majority must survive.
	allEtcd = "etcd"
)

func one(prefix string) func(int) []string {
	return func(target int) []string { return []string{fmt.Sprintf("%s%d", prefix, target)} }
}

func all(names ...string) func(int) []string { return func(int) []string { return names } }

// policyNode and sideNode are what a partition can be between.
func policyNode(i int) string { return []string{"policy0", "policy1"}[i] }
func sideNode(i int) string   { return []string{"side0", "side1", "side3"}[i] }

// faults are all there are, or those that ALLOWEDNETS_FAULTS_ONLY matches, a regular expression. clocks: there is a sidecar whose
// wall clock can be moved.
func faults(clocks bool) []*fault {
	everything := []*fault{
		{name: "sidecar killed", targets: 4, claims: one("side"), shortest: short, begin: killSide},
		{name: "sidecar frozen", targets: 4, claims: one("side"), shortest: short, begin: freezeSide},
		{name: "sidecar killed, cut off from one policy service", targets: 3, claims: func(i int) []string { return []string{sideNode(i)} }, shortest: short, begin: killCutOff},
		{name: "policy service killed", targets: 3, claims: one("policy"), shortest: short, begin: killPolicy},
		{name: "policy service frozen", targets: 3, claims: one("policy"), shortest: short, begin: freezePolicy},
		{name: "etcd member killed", targets: 3, claims: all(allEtcd), shortest: short, begin: killMember},
		{name: "etcd member frozen", targets: 3, claims: all(allEtcd), shortest: short, begin: freezeMember},
		{name: "etcd leader killed", targets: 1, claims: all(allEtcd), shortest: 2 * short, alone: true, begin: killLeader},
		{name: "etcd leader frozen", targets: 1, claims: all(allEtcd), shortest: 2 * short, begin: freezeLeader},
		{name: "sidecar and policy service apart", targets: 6, claims: func(i int) []string { return []string{sideNode(i % 3)} }, shortest: 2 * short, begin: sideApart},
		{name: "sidecar cut off", targets: 3, claims: func(i int) []string { return []string{sideNode(i)} }, shortest: long, begin: sideCutOff},
		{name: "policy service deaf for one etcd member", targets: 6, claims: func(i int) []string { return []string{policyNode(i % 2)} }, shortest: 2 * short, begin: policyDeaf},
		{name: "policy service cut off from etcd", targets: 2, claims: func(i int) []string { return []string{policyNode(i)} }, shortest: 3 * short, begin: policyCutOff},
		{name: "etcd member away", targets: 3, claims: all(allEtcd), shortest: 2 * short, begin: memberAway},
		{name: "etcd member deaf", targets: 3, claims: all(allEtcd), shortest: 2 * short, begin: memberDeaf},
		{name: "etcd leader away", targets: 1, claims: all(allEtcd), shortest: 2 * short, begin: leaderAway},
		{name: "network of a sidecar cut", targets: 1, claims: all("side2"), shortest: short, begin: cutSide},
		{name: "network of a sidecar slow", targets: 1, claims: all("side2"), shortest: short, begin: slowSide},
		{name: "replies to a sidecar lost", targets: 1, claims: all("side2"), shortest: short, begin: lossySide},
		{name: "network of a policy service to etcd cut", targets: 1, claims: all("policy2"), shortest: short, begin: cutPolicy},
		{name: "network of a policy service to etcd slow", targets: 1, claims: all("policy2"), shortest: short, begin: slowPolicy},
		{name: "replies of etcd to a policy service lost", targets: 1, claims: all("policy2"), shortest: short, begin: lossyPolicy},
		{name: "replies of a policy service to the writers lost", targets: 1, claims: all("policy2"), shortest: short, begin: lossyWriters},
		{name: "leader moved", targets: 1, claims: all(allEtcd), shortest: short / 2, begin: moveLeader},
		{name: "compaction", targets: 1, claims: all("compaction"), shortest: short / 2, begin: compact},
		{name: "defragmentation", targets: 3, claims: all("defragmentation"), shortest: short / 2, begin: defragment},
		{name: "etcd majority killed", targets: 3, claims: all(allEtcd), shortest: 2 * short, begin: killMajority},
		{name: "etcd majority apart", targets: 1, claims: all(allEtcd), shortest: 2 * short, begin: allApart},
		{name: "disk of a sidecar full", targets: 1, claims: all("side2"), shortest: 2 * short, begin: fullSide},
		{name: "disk of an etcd member full", targets: 1, claims: all(allEtcd), shortest: 2 * short, begin: fullMember},
		{name: "whole control plane down", targets: 1, claims: all("everything"), shortest: 3 * short, alone: true, begin: blackout},
	}
	if clocks {
		everything = append(everything,
			&fault{name: "wall clock jumps", targets: 4, claims: all("side3"), shortest: 2 * short, begin: jump},
			&fault{name: "wall clock set back", targets: 1, claims: all("side3"), shortest: long, begin: func(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
				return jump(ctx, w, 1)
			}},
		)
	}
	only, err := regexp.Compile(os.Getenv("ALLOWEDNETS_FAULTS_ONLY"))
	return slices.DeleteFunc(everything, func(f *fault) bool { return err != nil || !only.MatchString(f.name) })
}

func killSide(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	s := w.sides[i]
	return func(ctx context.Context) error { return s.start(ctx, w) }, s.kill(w)
}

func freezeSide(ctx context.Context, w *world, i int) (func(context.Context) error, error) {
	return w.sides[i].Thaw, w.sides[i].Freeze(ctx)
}

// killCutOff starts a sidecar again where it hears nothing of a policy service that its resolver may choose.
func killCutOff(ctx context.Context, w *world, i int) (func(context.Context) error, error) {
	s := w.side(sideNode(i))
	if err := errors.Join(w.network.apart("policy0", s.node), s.kill(w), s.start(ctx, w)); err != nil {
		return nil, err
	}
	return func(context.Context) error { return w.network.together("policy0", s.node) }, nil
}

func killPolicy(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	p := w.policies[i]
	w.guard(p.Process, false)
	return func(context.Context) error {
		defer w.guard(p.Process, true)
		return p.Start()
	}, p.Kill()
}

func freezePolicy(ctx context.Context, w *world, i int) (func(context.Context) error, error) {
	return w.policies[i].Thaw, w.policies[i].Freeze(ctx)
}

func killMember(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	return func(context.Context) error { return w.etcd[i].Start() }, w.etcd[i].Kill()
}

func freezeMember(ctx context.Context, w *world, i int) (func(context.Context) error, error) {
	return w.etcd[i].Thaw, w.etcd[i].Freeze(ctx)
}

// killLeader also measures how long nobody could save.
func killLeader(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	leader, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	if err := w.etcd[leader].Kill(); err != nil {
		return nil, err
	}
	return func(context.Context) error {
		gap := w.writer.gap(begun, time.Now())
		w.report.atMost("no save acknowledged after the death of etcd's leader", gap)
		w.report.say("etcd's leader was killed: nobody could save for %v", gap)
		if gap > leaderGap && os.Getenv("ALLOWEDNETS_FAULTS_DURATION") != "" { // not on a machine that does other work besides
			w.report.violated("nobody could save for %v after etcd's leader was killed", gap)
		}
		return w.etcd[leader].Start()
	}, nil
}

func freezeLeader(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	leader, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	return freezeMember(ctx, w, leader)
}

func sideApart(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	s, p := sideNode(i%3), policyNode(i/3)
	return func(context.Context) error { return w.network.together(s, p) }, w.network.apart(s, p)
}

// sideCutOff takes a sidecar away from all policy services, for so long that it must know. Before the end its data must be as
// old as the partition.
func sideCutOff(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	s := w.side(sideNode(i))
	end, err := w.network.isolate(s.node, "policy0", "policy1", hub)
	begun := time.Now()
	return func(ctx context.Context) error {
		lasted := time.Since(begun)
		if status, err := s.status(ctx); err == nil && status.GetDataAge() != nil {
			age := status.GetDataAge().AsDuration()
			w.report.say("%s was cut off for %v: it says that its data is %v old", s.name, lasted, age)
			w.report.atLeast("age of the data less the duration of a partition of 30 s", age-lasted)
			if age < lasted {
				w.report.violated("%s was cut off for %v, but says that its data is %v old", s.name, lasted, age)
			}
		}
		return end(ctx)
	}, err
}

// policyDeaf loses in one direction only.
func policyDeaf(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	p, member := policyNode(i%2), fmt.Sprintf("etcd%d", i/2)
	return func(context.Context) error { return w.network.restore(member, p) }, w.network.deafen(member, p)
}

func policyCutOff(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	return w.network.isolate(policyNode(i), "etcd0", "etcd1", "etcd2")
}

func memberAway(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	return w.network.isolate(fmt.Sprintf("etcd%d", i), peers(i)...)
}

// peers are all nodes that talk to a member of etcd, but for the test itself and what shares its node.
func peers(member int) []string {
	var all []string
	for i := range members {
		if i != member {
			all = append(all, fmt.Sprintf("etcd%d", i))
		}
	}
	return append(all, policyNode(0), policyNode(1))
}

func memberDeaf(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	deaf := fmt.Sprintf("etcd%d", i)
	var errs []error
	for _, p := range peers(i) {
		errs = append(errs, w.network.deafen(p, deaf))
	}
	return func(context.Context) error {
		var errs []error
		for _, p := range peers(i) {
			errs = append(errs, w.network.restore(p, deaf))
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

// leaderAway leaves the leader with clients and without the other members: what it accepts now will be lost.
func leaderAway(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	leader, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	return w.network.isolate(fmt.Sprintf("etcd%d", leader), peers(leader)[:members-1]...)
}

func cutSide(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	n := w.side("side2").network
	n.Cut()
	return func(context.Context) error { n.Heal(); return nil }, nil
}

func slowSide(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	return slow(w.side("side2").network)
}

func lossySide(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	return lossy(w, w.side("side2").network)
}

func cutPolicy(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	for _, p := range w.toEtcd {
		p.Cut()
	}
	return func(context.Context) error {
		for _, p := range w.toEtcd {
			p.Heal()
		}
		return nil
	}, nil
}

func slowPolicy(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	return slow(w.toEtcd...)
}

func lossyPolicy(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	return lossy(w, w.toEtcd...)
}

func lossyWriters(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	return lossy(w, w.toPolicy)
}

func slow(networks ...*stack.Proxy) (func(context.Context) error, error) {
	for _, n := range networks {
		n.Delay(150 * time.Millisecond)
	}
	return func(context.Context) error {
		for _, n := range networks {
			n.Delay(0)
		}
		return nil
	}, nil
}

// handshake is how many octets of replies a connection needs before it carries a request, or nearly.
const handshake = 2000

// lossy delivers requests and loses the replies from some octet on, with their connection, again and again.
func lossy(w *world, networks ...*stack.Proxy) (func(context.Context) error, error) {
	stop := make(chan struct{})
	for i, n := range networks {
		w.watching.Go(func() {
			for octets := int64(i * 1000); ; octets += 577 {
				select {
				case <-n.BreakAfter(handshake + octets%5000):
				case <-stop:
					n.Forgive()
					return
				case <-w.ctx.Done():
					return
				}
			}
		})
	}
	return func(context.Context) error { close(stop); return nil }, nil
}

func moveLeader(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	leader, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	next := (leader + 1) % members
	status, err := w.members[next].Status(ctx, w.endpoint(next))
	if err != nil {
		return nil, err
	}
	_, err = w.members[leader].MoveLeader(ctx, status.Header.GetMemberId())
	return nothing, err
}

// compact forgets all but the present, under the feet of those who follow. Another fault may keep it from happening.
func compact(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	client := w.etcdClient()
	now, err := client.Get(ctx, "any")
	if err == nil {
		_, err = client.Compact(ctx, now.Header.GetRevision(), clientv3.WithCompactPhysical())
	}
	return nothing, tolerated(w, err)
}

func defragment(ctx context.Context, w *world, i int) (func(context.Context) error, error) {
	_, err := w.members[i].Defragment(ctx, w.endpoint(i))
	return nothing, tolerated(w, err)
}

func tolerated(w *world, err error) error {
	if err != nil {
		w.report.say("not now: %v", err)
	}
	return nil
}

func nothing(context.Context) error { return nil }

func killMajority(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	a, b := w.etcd[i], w.etcd[(i+1)%members]
	return func(context.Context) error { return errors.Join(a.Start(), b.Start()) }, errors.Join(a.Kill(), b.Kill())
}

func allApart(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	var errs []error
	pairs := [][2]string{{"etcd0", "etcd1"}, {"etcd1", "etcd2"}, {"etcd2", "etcd0"}}
	for _, p := range pairs {
		errs = append(errs, w.network.apart(p[0], p[1]))
	}
	return func(context.Context) error {
		var errs []error
		for _, p := range pairs {
			errs = append(errs, w.network.together(p[0], p[1]))
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

// fullSide restarts the sidecar while its disk is full, which may leave it without a state.
func fullSide(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	s := w.side("side2")
	undo, err := fill(s.disk)
	if err != nil {
		return nil, err
	}
	return func(context.Context) error {
		return errors.Join(s.kill(w), s.start(ctx, w), undo())
	}, nil
}

// fullMember lets etcd die of it, as it does, and starts it again when there is space.
func fullMember(_ context.Context, w *world, _ int) (func(context.Context) error, error) {
	last := w.etcd[members-1]
	undo, err := fill(w.etcdDirs[members-1])
	if err != nil {
		return nil, err
	}
	return func(context.Context) error {
		err := undo()
		select {
		case <-last.Done():
			w.report.count("deaths of an etcd member whose disk was full", 1)
			err = errors.Join(err, last.Kill(), last.Start()) // Kill forgets the one that is dead
		default:
		}
		return err
	}, nil
}

// blackout leaves the sidecars alone, and then restarts those that have a state. They must answer all the time.
func blackout(ctx context.Context, w *world, _ int) (func(context.Context) error, error) {
	var errs []error
	for i, p := range w.policies {
		w.guard(p.Process, false)
		errs = append(errs, p.Kill(), w.etcd[i].Kill())
	}
	before := w.report.total("answers while the whole control plane was down")
	counted := w.answers()
	for _, s := range w.sides {
		if s.durable {
			errs = append(errs, s.kill(w), s.start(ctx, w))
		}
	}
	return func(context.Context) error {
		w.report.count("answers while the whole control plane was down", w.answers()-counted)
		if w.report.total("answers while the whole control plane was down") == before {
			w.report.violated("no answers while the whole control plane was down")
		}
		var errs []error
		for i, p := range w.policies {
			errs = append(errs, w.etcd[i].Start(), p.Start())
			w.guard(p.Process, true)
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

func jump(_ context.Context, w *world, i int) (func(context.Context) error, error) {
	s := w.side("side3")
	by := []time.Duration{30 * 24 * time.Hour, -45 * time.Minute, 3 * time.Second, -3 * time.Second}[i]
	return func(context.Context) error {
		if log, times := s.LogTail(), regexp.MustCompile(`"time":"([^"]+)"`); by.Abs() > time.Minute {
			all := times.FindAllStringSubmatch(log, -1)
			last, err := time.Parse(time.RFC3339Nano, all[len(all)-1][1])
			if off := time.Until(last) - by; err != nil || off.Abs() > time.Minute {
				return fmt.Errorf("the clock of %s did not jump by %v: %v in its log, %w", s.name, by, last, err)
			}
			w.report.count("jumps of a wall clock that the log shows", 1)
		}
		return setShift(s.clock, 0)
	}, setShift(s.clock, by)
}

func (w *world) side(name string) *side {
	return w.sides[slices.IndexFunc(w.sides, func(s *side) bool { return s.name == name })]
}

// answers is how many answers all checkers have had.
func (w *world) answers() int64 {
	var n int64
	for _, c := range w.checkers {
		n += c.answers.Load()
	}
	return n
}

func (w *world) endpoint(member int) string {
	return "https://" + net.JoinHostPort(address(fmt.Sprintf("etcd%d", member)), "2379")
}

// leader finds etcd's leader.
func (w *world) leader(ctx context.Context) (member int, err error) {
	err = stack.Await(ctx, func(ctx context.Context) error {
		for i, client := range w.members {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			status, err := client.Status(ctx, w.endpoint(i))
			cancel()
			if err == nil && status.Leader == status.Header.GetMemberId() {
				member = i
				return nil
			}
		}
		return errors.New("etcd has no leader")
	})
	return member, err
}
