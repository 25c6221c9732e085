package faults

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/test/stack"
)

const (
	// oldSource is the product of commit 7a33beb, the last one before the protos got history, propagation and min_revision, without
	// its tests, as `git archive` writes it: a test must not depend on how much history a checkout has.
	oldSource = "testdata/old.tar.gz"
	// old is where buildOld puts its sidecar and its policy service.
	old = "old"
)

// buildOld builds the old product.
func buildOld(ctx context.Context, dir string) error {
	source := filepath.Join(dir, old, "source")
	if err := os.MkdirAll(source, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-xzf", oldSource, "-C", source).CombinedOutput(); err != nil {
		return fmt.Errorf("unpacking %s: %w\n%s", oldSource, err, out)
	}
	for name, folder := range map[string]string{"allowednets-sidecar": "sidecar", "allowednets-policy": "services/policy"} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, old, name), ".")
		build.Dir = filepath.Join(source, folder)
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building the old %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

// TestOldVersion upgrades as an operator does: an old policy service and an old sidecar beside new ones, on one store; then the
// old policy service alone with new sidecars, the new ones alone with the old sidecar, and at last everything new.
func TestOldVersion(t *testing.T) {
	need(t)
	oldSide, oldPolicy := "side1", 1 // the one without a state on disk, which it did not know
	w := newWorld(t, settings{seed: 7, resting: 5 * time.Millisecond, launch: map[string]stack.Launch{
		oldSide:   {Binary: filepath.Join(tool(old), "allowednets-sidecar")},
		"policy1": {Binary: filepath.Join(tool(old), "allowednets-policy")},
	}})
	defer w.report.tell(t)
	ctx := within(t, 5*time.Minute)
	inStep := func(what string) {
		t.Helper()
		w.pass(ctx, 50)
		if err := w.caughtUp(ctx, w.model.Newest()); err != nil {
			w.report.violated("%s: %v", what, err)
		}
		w.report.say("%s: in step", what)
	}
	inStep("old and new side by side")
	for _, i := range []int{0, 2} {
		w.guard(w.policies[i].Process, false)
		must(t, w.policies[i].Kill())
	}
	inStep("an old policy service alone")
	for _, i := range []int{0, 2} {
		must(t, w.policies[i].Restart(ctx))
		w.guard(w.policies[i].Process, true)
	}
	w.guard(w.policies[oldPolicy].Process, false)
	must(t, w.policies[oldPolicy].Kill())
	inStep("an old sidecar with new policy services")
	w.startPolicy(oldPolicy, "policy1.new", stack.Launch{})
	inStep("all policy services new")
	w.finish()
}

// future is a policy service to sidecars and a sidecar to a policy service, of a version to come: every message it passes on has a
// field in it, on every level, that nobody knows yet.
type future struct {
	feedv1.UnimplementedFeedServiceServer
	report   *report
	upstream feedv1.FeedServiceClient
	running  sync.WaitGroup
}

func (f *future) Sync(down grpc.BidiStreamingServer[feedv1.SyncRequest, feedv1.SyncResponse]) error {
	up, err := f.upstream.Sync(down.Context())
	if err != nil {
		return err
	}
	f.running.Go(func() {
		for {
			m, err := down.Recv()
			if err != nil {
				_ = up.CloseSend()
				return
			}
			f.extend(m.ProtoReflect())
			_ = up.Send(m) // Recv says what is wrong
		}
	})
	for {
		m, err := up.Recv()
		if err != nil {
			return err
		}
		f.extend(m.ProtoReflect())
		if err := down.Send(m); err != nil {
			return err
		}
	}
}

// extend adds an unknown field to a message and all messages in it.
func (f *future) extend(m protoreflect.Message) {
	f.report.count("messages with fields that nobody knows", 1)
	m.SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 12345, protowire.VarintType), 1))
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				f.extend(value.List().Get(i).Message())
			}
		default:
			f.extend(value.Message())
		}
		return true
	})
}

// TestFutureVersion puts unknown fields into everything that a sidecar and a policy service say to each other.
func TestFutureVersion(t *testing.T) {
	w := newWorld(t, settings{calm: true})
	defer w.report.tell(t)
	ctx := within(t, 2*time.Minute)
	creds, err := w.Sidecar.Credentials()
	must(t, err)
	conn, err := grpc.NewClient("dns:///"+stack.PolicyName+":7443", grpc.WithTransportCredentials(creds))
	must(t, err)
	files, err := w.Authority.Issue("future.allowednets.internal", "127.0.0.1")
	must(t, err)
	creds, err = files.Credentials()
	must(t, err)
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	must(t, err)
	server := grpc.NewServer(grpc.Creds(creds))
	f := &future{report: w.report, upstream: feedv1.NewFeedServiceClient(conn)}
	feedv1.RegisterFeedServiceServer(server, f)
	f.running.Go(func() { _ = server.Serve(lis) })
	t.Cleanup(func() {
		server.Stop()
		f.running.Wait()
		_ = conn.Close()
	})
	s := w.addDurable(lis.Addr().String())
	w.sides = []*side{s}
	w.begin(settings{})
	for range 3 {
		w.pass(ctx, 20)
		if err := w.caughtUp(ctx, w.model.Newest()); err != nil {
			w.report.violated("%v", err)
		}
		must(t, s.kill(w), s.start(ctx, w))
	}
	w.finish()
	if w.report.total("messages with fields that nobody knows") == 0 {
		t.Error("no message came through")
	}
}
