package check_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/internal/serve"
	"github.com/allowednets/allowednets/sidecar/internal/check"
	"github.com/allowednets/allowednets/sidecar/internal/index"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

const million = 1_000_000

// world is a million restricted mailboxes with three nets each, of which twenty share a list, and a question that is allowed
// for each of them, in random order.
type world struct {
	writer    *index.Writer
	questions []check.Request
	ids       []allow.ID // of the questions' mailboxes
	encodings [][]byte   // and their nets
}

// bigWorld is made once: it takes a second and a half.
var bigWorld = sync.OnceValue(func() *world {
	w := &world{
		writer: index.NewWriter(), questions: make([]check.Request, million),
		ids: make([]allow.ID, million), encodings: make([][]byte, million),
	}
	b := w.writer.Rebuild()
	for at, i := range rand.New(rand.NewPCG(1, 1)).Perm(million) {
		name := fmt.Sprintf("user%07d@customer%04d.example.org", i, i/500)
		mailbox, err := allow.ParseMailbox(name)
		if err != nil {
			panic(err)
		}
		first := netip.AddrFrom4([4]byte{8, byte(i / 20 >> 8), byte(i / 20), 0})
		list := fmt.Sprintf("%v/24 9.%d.%d.9 2a00:1450:%x::/48", first, byte(i/20>>8), byte(i/20), i/20)
		l, err := allow.Rules{}.ParseText(list)
		if err != nil {
			panic(err)
		}
		w.ids[at], w.encodings[at] = mailbox.ID(), l.Encode()
		w.questions[at] = check.Request{Mailbox: name, Client: first.Next().String(), Service: decisionv1.Service_SERVICE_IMAP}
		if err := b.Put(w.ids[at], w.encodings[at]); err != nil {
			panic(err)
		}
	}
	b.Build()
	return w
})

// decider returns a decider on the world as it is.
func (w *world) decider(b *testing.B) (*check.Decider, *atomic.Pointer[mirror.State]) {
	b.Helper()
	state := new(atomic.Pointer[mirror.State])
	state.Store(&mirror.State{Index: w.writer.Edit().Build(), Revision: "1-1", Proven: time.Now()})
	d, err := check.NewDecider(check.DeciderConfig{State: state.Load, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		b.Fatal(err)
	}
	return d, state
}

// update saves lists again, a thousand times a second, until stop is called.
func (w *world) update(state *atomic.Pointer[mirror.State]) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			b := w.writer.Edit()
			n := i * 7919 % million
			if err := b.Put(w.ids[n], nil); err != nil {
				panic(err)
			}
			if err := b.Put(w.ids[n], w.encodings[n]); err != nil {
				panic(err)
			}
			state.Store(&mirror.State{Index: b.Build(), Revision: "1-1", Proven: time.Now()})
		}
	})
	return func() {
		cancel()
		running.Wait()
	}
}

// compare runs batches of two things by turns, so that both see the same machine, and reports what one of each takes and the
// median of the batches' ratios.
func compare(b *testing.B, batch int, floor, thing func()) {
	b.Helper()
	took := func(f func()) float64 {
		began := time.Now()
		for range batch {
			f()
		}
		return float64(time.Since(began)) / float64(batch)
	}
	var floors, things, ratios []float64
	for b.Loop() {
		f, t := took(floor), took(thing)
		floors, things, ratios = append(floors, f), append(things, t), append(ratios, t/f)
	}
	b.ReportMetric(0, "ns/op")
	for unit, values := range map[string][]float64{"floor-ns": floors, "ns": things, "ratio": ratios} {
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], unit)
	}
}

// BenchmarkDecide is a decision for a random mailbox, next to a floor: SHA-256 of the name, one lookup in a Go map, one
// match of an address that is already parsed.
func BenchmarkDecide(b *testing.B) {
	w := bigWorld()
	sets := make(map[allow.ID]*allow.Set, million)
	shared := make(map[string]*allow.Set)
	mailboxes, clients := make([]allow.Mailbox, million), make([]netip.Addr, million)
	for i, q := range w.questions {
		e := string(w.encodings[i])
		if shared[e] == nil {
			set, err := allow.DecodeSet(w.encodings[i])
			if err != nil {
				b.Fatal(err)
			}
			shared[e] = set
		}
		sets[w.ids[i]] = shared[e]
		mailboxes[i], _ = allow.ParseMailbox(q.Mailbox)
		clients[i] = netip.MustParseAddr(q.Client)
	}
	d, state := w.decider(b)
	i, j := 0, 0
	floor := func() {
		if _, ok := sets[mailboxes[i].ID()].Match(clients[i]); !ok {
			b.Fatal("not allowed")
		}
		i = (i + 1) % million
	}
	decide := func() {
		if dec, err := d.Decide(b.Context(), w.questions[j]); err != nil || dec.Reason != matched {
			b.Fatal(dec.Reason, err)
		}
		j = (j + 1) % million
	}
	b.Run("still", func(b *testing.B) {
		b.ReportAllocs()
		compare(b, 10_000, floor, decide)
	})
	b.Run("1000_updates_per_second", func(b *testing.B) {
		defer w.update(state)()
		compare(b, 10_000, floor, decide)
	})
	b.Run("each_with_1000_updates_per_second", func(b *testing.B) {
		defer w.update(state)()
		var took []time.Duration
		for b.Loop() {
			began := time.Now()
			decide()
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
		b.ReportMetric(float64(took[len(took)*99/100]), "p99-ns")
	})
}

// noop answers like the gRPC door, without looking.
type noop struct {
	checkv1.UnimplementedCheckServiceServer
	resp *checkv1.CheckResponse
}

func (n *noop) Check(context.Context, *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return n.resp, nil
}

func (n *noop) CheckStream(stream grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil //nolint:nilerr // the client went
		}
		if err := stream.Send(&checkv1.CheckStreamResponse{Check: n.resp}); err != nil {
			return err
		}
	}
}

// overSocket serves a CheckService on a unix socket as main does.
func overSocket(b *testing.B, service checkv1.CheckServiceServer) checkv1.CheckServiceClient {
	b.Helper()
	server, err := serve.NewGRPC(serve.GRPCConfig{
		Credentials: insecure.NewCredentials(), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
		Workers: uint32(4 * runtime.GOMAXPROCS(0)),
	}, func(r grpc.ServiceRegistrar) { checkv1.RegisterCheckServiceServer(r, service) })
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "s.sock")
	lis, err := new(net.ListenConfig).Listen(b.Context(), "unix", path)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx, nil, lis) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	})
	return checkv1.NewCheckServiceClient(conn)
}

// BenchmarkSocket is Check and CheckStream over a unix socket, next to calls that exchange the same messages and do nothing.
func BenchmarkSocket(b *testing.B) {
	w := bigWorld()
	d, _ := w.decider(b)
	faults, err := check.NewFaults(slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	requests := make([]*checkv1.CheckStreamRequest, 1<<14)
	for i := range requests {
		q := w.questions[i]
		requests[i] = &checkv1.CheckStreamRequest{Check: request(q.Mailbox, q.Client, q.Service)}
	}
	door := check.NewGRPC(d, faults, nil)
	resp, err := door.Check(b.Context(), requests[0].GetCheck())
	if err != nil {
		b.Fatal(err)
	}
	floor, thing := overSocket(b, &noop{resp: resp}), overSocket(b, door)
	unary := func(client checkv1.CheckServiceClient) func() {
		i := 0
		return func() {
			resp, err := client.Check(b.Context(), requests[i].GetCheck())
			if err != nil || resp.GetDecision().GetReason() != matched {
				b.Fatal(resp, err)
			}
			i = (i + 1) % len(requests)
		}
	}
	stream := func(client checkv1.CheckServiceClient) func() {
		stream, err := client.CheckStream(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		i := 0
		return func() {
			if err := stream.Send(requests[i]); err != nil {
				b.Fatal(err)
			}
			resp, err := stream.Recv()
			if err != nil || resp.GetCheck().GetDecision().GetReason() != matched {
				b.Fatal(resp, err)
			}
			i = (i + 1) % len(requests)
		}
	}
	b.Run("unary", func(b *testing.B) { compare(b, 100, unary(floor), unary(thing)) })
	b.Run("stream", func(b *testing.B) { compare(b, 100, stream(floor), stream(thing)) })
}
