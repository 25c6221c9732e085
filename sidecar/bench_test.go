package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/allow"
	"github.com/allowednets/allowednets/sidecar/internal/benchtest"
)

// childArgs makes TestChild another process: "sidecar" with its flags, or "floor" with where it listens, one a line.
const childArgs = "ALLOWEDNETS_BENCH_CHILD"

// childProfiles is a directory for profiles of the other processes.
const childProfiles = "ALLOWEDNETS_BENCH_PROFILES"

// TestChild is the other process of the benchmarks: a server and its clients do not share a scheduler and a garbage collector.
func TestChild(t *testing.T) {
	args := strings.Split(os.Getenv(childArgs), "\n")
	if args[0] == "" {
		t.Skip("this is the other process of BenchmarkDoor")
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the process that started this one
		cancel()
	}()
	if args[0] == "sidecar" {
		if code := run(ctx, args[1:], os.Stdout, os.Stderr); code != 0 {
			t.Fatal(code)
		}
		return
	}
	serveFloor(ctx, t, args[1], args[2], args[3])
}

// startChild starts a process that ends with the benchmark, and returns its id.
func startChild(b *testing.B, args ...string) (pid int) {
	b.Helper()
	// It ends when its input does, later than the context.
	cmd := exec.CommandContext(context.WithoutCancel(b.Context()), os.Args[0], "-test.run=^TestChild$")
	if profiles := os.Getenv(childProfiles); profiles != "" {
		cmd.Args = append(cmd.Args, "-test.cpuprofile="+filepath.Join(profiles, args[0]+".cpu"), "-test.memprofile="+filepath.Join(profiles, args[0]+".mem"))
	}
	cmd.Env = append(os.Environ(), childArgs+"="+strings.Join(args, "\n"))
	out := new(output)
	cmd.Stdout, cmd.Stderr = out, out
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil || b.Failed() {
			b.Errorf("%s: %v\n%s", args[0], err, out)
		}
	})
	return cmd.Process.Pid
}

// serveFloor does what a server of the same kind cannot do without: gRPC and net/http as they come, and answers like the
// sidecar's that were made before. Those on the second socket are empty.
func serveFloor(ctx context.Context, t *testing.T, socket, emptySocket, address string) {
	var servers []interface{ Stop() }
	for _, s := range []struct {
		path string
		resp *checkv1.CheckResponse
	}{{socket, likeOurs()}, {emptySocket, new(checkv1.CheckResponse)}} {
		server := grpc.NewServer(grpc.NumStreamWorkers(uint32(4 * runtime.GOMAXPROCS(0))))
		checkv1.RegisterCheckServiceServer(server, &floor{resp: s.resp})
		lis, err := net.Listen("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = server.Serve(lis) }()
		servers = append(servers, server)
	}
	lis, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/dovecot" {
			_, _ = io.WriteString(w, `{"status":0,"msg":""}`)
			return
		}
		_, _ = io.WriteString(w, `{"decision":{"verdict":"VERDICT_ALLOW", "reason":"REASON_MATCHED", "matchedNet":"20.1.134.0/24", "revision":"1-7"}, "dataAge":"2.123456789s"}`)
	})}
	go func() { _ = server.Serve(lis) }()
	<-ctx.Done()
	for _, s := range servers {
		s.Stop()
	}
	_ = server.Close()
}

func likeOurs() *checkv1.CheckResponse {
	return &checkv1.CheckResponse{
		Decision: &decisionv1.Decision{
			Verdict: decisionv1.Verdict_VERDICT_ALLOW, Reason: decisionv1.Reason_REASON_MATCHED, MatchedNet: "20.1.134.0/24", Revision: "1-7",
		},
		DataAge: &durationpb.Duration{Seconds: 2, Nanos: 123456789},
	}
}

// floor answers like the gRPC door, without looking.
type floor struct {
	checkv1.UnimplementedCheckServiceServer
	resp *checkv1.CheckResponse
}

func (f *floor) Check(context.Context, *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return f.resp, nil
}

func (f *floor) CheckStream(stream grpc.BidiStreamingServer[checkv1.CheckStreamRequest, checkv1.CheckStreamResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil //nolint:nilerr // the client went
		}
		if err := stream.Send(&checkv1.CheckStreamResponse{Check: f.resp}); err != nil {
			return err
		}
	}
}

// A million restricted mailboxes with three nets each, of which twenty share a list.
const (
	mailboxes = 1_000_000
	share     = 20
)

func mailboxOf(i int) string { return fmt.Sprintf("user%08d@customer%05d.example.org", i, i/500) }

func clientOf(i int) string {
	list := i / share
	return netip.AddrFrom4([4]byte{20 + byte(list>>16), byte(list >> 8), byte(list), 1}).String()
}

func entryOf(i int) (allow.ID, []byte, error) {
	mailbox, err := allow.ParseMailbox(mailboxOf(i))
	list := uint32(i / share)
	e := append(binary.BigEndian.AppendUint32([]byte{4}, 20<<24+list<<8), 24)
	e = append(binary.BigEndian.AppendUint32(append(e, 4), 120<<24+list), 32)
	e = append(binary.BigEndian.AppendUint32(append(e, 4), 130<<24+list), 32)
	return mailbox.ID(), e, err
}

// largePolicy is a policy service with the million.
type largePolicy struct {
	feedv1.UnimplementedFeedServiceServer
}

func (*largePolicy) Sync(stream feedv1.FeedService_SyncServer) error {
	send := func(msg *feedv1.SyncResponse) error { return stream.Send(msg) }
	if err := send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Welcome{Welcome: &feedv1.Welcome{Cluster: 1, Epoch: 1, Restart: true}}}); err != nil {
		return err
	}
	var digest allow.Digest
	c := new(feedv1.Changes)
	for i := range mailboxes {
		id, nets, err := entryOf(i)
		if err != nil {
			return err
		}
		digest = digest.Add(allow.EntryDigest(id, nets))
		c.Entries = append(c.Entries, &feedv1.Entry{Id: id[:], Nets: nets})
		if i == mailboxes-1 {
			c.Commit = &feedv1.Commit{Revision: 7, Count: mailboxes, Digest: digest[:]}
		} else if len(c.Entries) < 4096 {
			continue
		}
		if err := send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Changes{Changes: c}}); err != nil {
			return err
		}
		c = new(feedv1.Changes)
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the sidecar went
		}
		if ping := msg.GetPing(); ping != nil {
			if err := send(&feedv1.SyncResponse{Message: &feedv1.SyncResponse_Pong{Pong: &feedv1.Pong{Nonce: ping.GetNonce(), Revision: 7}}}); err != nil {
				return err
			}
		}
	}
}

// caller asks the next question and returns whether it was answered as it must be.
type caller func() error

// BenchmarkDoor asks a sidecar of a million mailboxes through its doors, next to a process that has nothing to do but to read
// the same request and to write the same answer (floor), or over gRPC an empty answer to an empty request (empty).
func BenchmarkDoor(b *testing.B) {
	server := grpc.NewServer()
	feedv1.RegisterFeedServiceServer(server, new(largePolicy))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = server.Serve(lis) }()
	b.Cleanup(server.Stop)
	dir := b.TempDir()
	socket, floorSocket, emptySocket := filepath.Join(dir, "s"), filepath.Join(dir, "f"), filepath.Join(dir, "e")
	address, floorAddress := freeAddress(b), freeAddress(b)
	floorPID := startChild(b, "floor", floorSocket, emptySocket, floorAddress)
	pid := startChild(b, "sidecar", "--policy-address="+lis.Addr().String(), "--insecure-plaintext", "--socket="+socket, "--http-listen="+address, "--admin-listen=")

	requests := make([]*checkv1.CheckStreamRequest, 1<<14)
	jsons, dovecots := make([][]byte, len(requests)), make([][]byte, len(requests))
	rnd := rand.New(rand.NewPCG(1, 1))
	for at := range requests {
		i := rnd.IntN(mailboxes)
		requests[at] = &checkv1.CheckStreamRequest{Check: &checkv1.CheckRequest{
			Mailbox: mailboxOf(i), ClientAddress: clientOf(i), Service: decisionv1.Service_SERVICE_IMAP,
		}}
		jsons[at] = httpRequest("/v1/check", fmt.Sprintf(`{"mailbox":%q,"clientAddress":%q,"service":"SERVICE_IMAP"}`, mailboxOf(i), clientOf(i)))
		dovecots[at] = httpRequest("/dovecot?command=allow", fmt.Sprintf(
			`{"auth_user":%q,"login":%[1]q,"protocol":"imap","real_remote":%q,"remote":%[2]q,"session_id":"P1nQvUZAqJzLAHEF","stage":"before","via":""}`,
			mailboxOf(i), clientOf(i)))
	}
	empty := []*checkv1.CheckStreamRequest{{Check: new(checkv1.CheckRequest)}}

	dial := func(path string) checkv1.CheckServiceClient {
		conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		return checkv1.NewCheckServiceClient(conn)
	}
	ours, floor, nothing := dial(socket), dial(floorSocket), dial(emptySocket)
	for _, c := range []checkv1.CheckServiceClient{ours, floor, nothing} {
		awaitAnswer(b, c, requests[0].GetCheck())
	}
	const matched, unspecified = decisionv1.Reason_REASON_MATCHED, decisionv1.Reason_REASON_UNSPECIFIED
	type opener func(b *testing.B, from int) caller
	for _, call := range []struct {
		name  string
		sides map[string]opener
	}{
		{"Check", map[string]opener{"": unary(ours, requests, matched), "floor": unary(floor, requests, matched), "empty": unary(nothing, empty, unspecified)}},
		{"CheckStream", map[string]opener{"": streamed(ours, requests, matched), "floor": streamed(floor, requests, matched), "empty": streamed(nothing, empty, unspecified)}},
		{"JSON", map[string]opener{"": overHTTP(address, jsons, `"REASON_MATCHED"`), "floor": overHTTP(floorAddress, jsons, `"REASON_MATCHED"`)}},
		{"Dovecot", map[string]opener{"": overHTTP(address, dovecots, `"status":0`), "floor": overHTTP(floorAddress, dovecots, `"status":0`)}},
	} {
		for _, callers := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("call=%s/callers=%d", call.name, callers), func(b *testing.B) {
				var sides []benchtest.Side
				for _, name := range []string{"", "floor", "empty"} {
					if open := call.sides[name]; open != nil {
						opened := make([]caller, callers)
						for i := range opened {
							opened[i] = open(b, i*len(requests)/callers)
						}
						side := benchtest.Side{Name: name, Round: concurrently(b, opened), PID: floorPID}
						if name == "" {
							side.PID = pid
						}
						sides = append(sides, side)
					}
				}
				benchtest.Compare(b, benchtest.Rounds{Timed: true, PerSecond: "calls/s"}, sides...)
			})
		}
	}
}

// concurrently is a round of some calls by all callers at once.
func concurrently(b *testing.B, callers []caller) func(*benchtest.Times) int {
	each := max(8, 512/len(callers))
	took := make([][]time.Duration, len(callers))
	return func(times *benchtest.Times) int {
		var running sync.WaitGroup
		for i, call := range callers {
			running.Go(func() {
				took[i] = took[i][:0]
				for range each {
					began := time.Now()
					if err := call(); err != nil {
						b.Error(err)
						return
					}
					took[i] = append(took[i], time.Since(began))
				}
			})
		}
		running.Wait()
		if times != nil {
			for _, ds := range took {
				for _, d := range ds {
					times.Add(d)
				}
			}
		}
		return each * len(callers)
	}
}

// awaitAnswer waits until there is one.
func awaitAnswer(b *testing.B, client checkv1.CheckServiceClient, req *checkv1.CheckRequest) {
	b.Helper()
	for until := time.Now().Add(time.Minute); ; {
		_, err := client.Check(b.Context(), req, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		if time.Now().After(until) {
			b.Fatal(err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-b.Context().Done():
		}
	}
}

func unary(client checkv1.CheckServiceClient, requests []*checkv1.CheckStreamRequest, want decisionv1.Reason) func(*testing.B, int) caller {
	return func(b *testing.B, from int) caller {
		ctx := b.Context()
		return func() error {
			from++
			resp, err := client.Check(ctx, requests[from%len(requests)].GetCheck())
			if err != nil || resp.GetDecision().GetReason() != want {
				return fmt.Errorf("%v, %w", resp, err)
			}
			return nil
		}
	}
}

func streamed(client checkv1.CheckServiceClient, requests []*checkv1.CheckStreamRequest, want decisionv1.Reason) func(*testing.B, int) caller {
	return func(b *testing.B, from int) caller {
		stream, err := client.CheckStream(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			_ = stream.CloseSend()
			_, _ = stream.Recv()
		})
		return func() error {
			from++
			if err := stream.Send(requests[from%len(requests)]); err != nil {
				return err
			}
			resp, err := stream.Recv()
			if err != nil || resp.GetCheck().GetDecision().GetReason() != want {
				return fmt.Errorf("%v, %w", resp, err)
			}
			return nil
		}
	}
}

func httpRequest(path, body string) []byte {
	return fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

// overHTTP opens callers that write their requests whole and look for nothing but what they need, as Dovecot does: a client of
// package net/http would take longer than the server.
func overHTTP(address string, requests [][]byte, want string) func(*testing.B, int) caller {
	return func(b *testing.B, from int) caller {
		conn, err := new(net.Dialer).DialContext(b.Context(), "tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		read := bufio.NewReader(conn)
		body := make([]byte, 4<<10)
		return func() error {
			from++
			if _, err := conn.Write(requests[from%len(requests)]); err != nil {
				return err
			}
			length, ok := 0, false
			for {
				line, err := read.ReadSlice('\n')
				if err != nil {
					return err
				}
				if len(line) == 2 {
					break
				}
				ok = ok || bytes.HasPrefix(line, []byte("HTTP/1.1 200 "))
				if n, found := bytes.CutPrefix(line, []byte("Content-Length: ")); found {
					if length, err = strconv.Atoi(string(n[:len(n)-2])); err != nil {
						return err
					}
				}
			}
			if length > len(body) {
				return errors.New("a large body")
			}
			if _, err := io.ReadFull(read, body[:length]); err != nil {
				return err
			}
			if !ok || !bytes.Contains(body[:length], []byte(want)) {
				return fmt.Errorf("answered %s", body[:length])
			}
			return nil
		}
	}
}
