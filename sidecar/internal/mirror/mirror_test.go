package mirror_test

import (
	"context"
	"errors"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/revision"
	"github.com/allowednets/allowednets/internal/rpcerr"
	"github.com/allowednets/allowednets/sidecar/internal/mirror"
)

func token(epoch uint64, rev int64) string {
	return revision.Token{Epoch: epoch, Revision: rev}.String()
}

var errCut = status.Error(codes.Unavailable, "cut")

func three() content {
	return content{mailbox(1): nets(8, 1), mailbox(2): nets(9, 2), mailbox(3): nets(8, 1)}
}

func TestFirstState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.accept()
		if h := c.hello; h.GetId() != "sidecar-1" || h.GetVersion() != "v1.2.3" || h.GetCluster() != 0 || h.GetEpoch() != 0 || h.GetRevision() != 0 {
			t.Errorf("hello %v", h)
		}
		want := three()
		entries := want.entries()
		c.send(welcome(cluster, epoch, true), changes(nil, entries[:2]...))
		synctest.Wait()
		if f.m.State() != nil {
			t.Error("a state before the commit")
		}
		select {
		case <-f.m.Synced():
			t.Error("synced before the commit")
		default:
		}
		f.wantMetric("synced", "", 0)
		f.wantMetric("connected", "", 1)
		f.wantMetric("data_age_seconds", "", math.Inf(1))
		c.send(changes(want.commit(10), entries[2]))
		c.acked(10)
		<-f.m.Synced()
		f.wantState(10, want)
		f.wantMetric("synced", "", 1)
		f.wantMetric("applied_revision", "", 10)
		f.wantMetric("restricted_mailboxes", "", 3)
		f.wantMetric("feed_commits_total", "", 1)
		f.wantMetric("feed_entries_total", "", 3)
		f.stop()
		f.wantMetric("connected", "", 0)
	})
}

// TestAnEmptyStore is legitimate where the store says so: first, or later in its own history.
func TestAnEmptyStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.accept()
		c.send(welcome(cluster, epoch, true), changes(content{}.commit(1)))
		c.acked(1)
		f.wantState(1, content{})
		c.send(changes(three().commit(2), three().entries()...))
		c.acked(2)
		c.end <- errCut
		c = f.accept()
		c.send(welcome(cluster, epoch, true), changes(content{}.commit(9)))
		c.acked(9)
		f.wantState(9, content{})
	})
}

func TestChangesAreAppliedOnlyWithTheirCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		was := three()
		c := f.synced(10, was)
		now := was.with(mailbox(1), "").with(mailbox(4), nets(7, 3)).with(mailbox(2), nets(6, 1))
		c.send(changes(nil, entry(mailbox(1), "")), changes(nil, entry(mailbox(4), nets(7, 9))), changes(nil, entry(mailbox(4), nets(7, 3))))
		synctest.Wait()
		f.wantState(10, was)
		old := f.m.State()
		c.send(changes(now.commit(15), entry(mailbox(2), nets(6, 1))))
		c.acked(15)
		f.wantState(15, now)
		wantRoot(t, old, token(epoch, 10), was) // whoever holds the old state sees it unchanged
	})
}

// TestResume cuts a stream in the middle of a batch: what was staged is forgotten, and the next Hello says where we stand.
func TestResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		was := three()
		c := f.synced(10, was)
		c.send(changes(nil, entry(mailbox(1), ""), entry(mailbox(9), nets(1, 1))))
		synctest.Wait()
		c.end <- errCut
		c = f.accept()
		if h := c.hello; h.GetCluster() != cluster || h.GetEpoch() != epoch || h.GetRevision() != 10 {
			t.Errorf("hello %v", h)
		}
		c.send(welcome(cluster, epoch, false), changes(was.commit(10)))
		c.acked(10)
		now := was.with(mailbox(3), "")
		c.send(changes(now.commit(11), entry(mailbox(3), "")))
		c.acked(11)
		f.wantState(11, now)
		f.wantMetric("resyncs_total", "lost", 1)
	})
}

// TestMismatch keeps the last good state and asks for everything again.
func TestMismatch(t *testing.T) {
	good := three()
	now := good.with(mailbox(1), "")
	for name, commit := range map[string]*feedv1.Commit{
		"digest": {Revision: 11, Count: 2, Digest: good.commit(0).GetDigest()},
		"count":  {Revision: 11, Count: 3, Digest: now.commit(0).GetDigest()},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				c := f.synced(10, good)
				c.send(changes(commit, entry(mailbox(1), "")))
				c = f.accept()
				f.wantState(10, good)
				f.wantMetric("mismatches_total", "", 1)
				f.wantMetric("resyncs_total", "mismatch", 1)
				if h := c.hello; h.GetCluster() != cluster || h.GetEpoch() != epoch || h.GetRevision() != 0 {
					t.Errorf("hello %v; want one that asks for everything", h)
				}
				c.send(welcome(cluster, epoch, false)) // is not what was asked for
				c = f.accept()
				f.wantMetric("resyncs_total", "bad_welcome", 1)
				// As long as the state is not complete, every stream asks for everything.
				c.send(welcome(cluster, epoch, true), changes(nil, now.entries()...))
				c.end <- errCut
				c = f.accept()
				if r := c.hello.GetRevision(); r != 0 {
					t.Errorf("hello with revision %d; want 0", r)
				}
				c.send(welcome(cluster, epoch, true), changes(now.commit(11), now.entries()...))
				c.acked(11)
				f.wantState(11, now)
				c.end <- errCut
				if r := f.accept().hello.GetRevision(); r != 11 {
					t.Errorf("hello with revision %d; want 11", r)
				}
			})
		})
	}
}

// TestMismatchOfTheFirstState: a mirror without a state stays without one.
func TestMismatchOfTheFirstState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.accept()
		c.send(welcome(cluster, epoch, true), changes(three().commit(10), three().entries()[1:]...))
		f.accept()
		if f.m.State() != nil {
			t.Error("an incomplete state was published")
		}
		f.wantMetric("mismatches_total", "", 1)
	})
}

// TestResyncAtTheSameRevision: a replica whose own copy was wrong has repaired it. What is verified last counts.
func TestResyncAtTheSameRevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.synced(10, three())
		c.end <- errCut
		right := three().with(mailbox(5), nets(5, 1))
		c = f.accept()
		c.send(welcome(cluster, epoch, false), changes(right.commit(10)))
		c = f.accept()
		f.wantState(10, three())
		c.send(welcome(cluster, epoch, true), changes(right.commit(10), right.entries()...))
		c.acked(10)
		f.wantState(10, right)
	})
}

// TestViolations: each ends the stream, is counted under its cause, and leaves the state alone.
func TestViolations(t *testing.T) {
	good := three()
	id := mailbox(1)
	long := func() []*feedv1.Entry {
		entries := make([]*feedv1.Entry, 4097)
		for i := range entries {
			entries[i] = entry(mailbox(i), nets(1, 1))
		}
		return entries
	}
	resumed := func(msgs ...*feedv1.SyncResponse) []*feedv1.SyncResponse {
		return append([]*feedv1.SyncResponse{welcome(cluster, epoch, false), changes(good.commit(10))}, msgs...)
	}
	for _, c := range []struct {
		name, cause string
		msgs        []*feedv1.SyncResponse
	}{
		{"changes first", "unexpected_message", []*feedv1.SyncResponse{changes(content{}.commit(11))}},
		{"pong first", "unexpected_message", []*feedv1.SyncResponse{pong(1, 10)}},
		{"nothing first", "unexpected_message", []*feedv1.SyncResponse{{}}},
		{"two welcomes", "unexpected_message", []*feedv1.SyncResponse{welcome(cluster, epoch, true), welcome(cluster, epoch, true)}},
		{"nothing later", "unexpected_message", resumed(&feedv1.SyncResponse{})},
		{"no cluster", "bad_welcome", []*feedv1.SyncResponse{welcome(0, epoch, true)}},
		{"no epoch", "bad_welcome", []*feedv1.SyncResponse{welcome(cluster, 0, true)}},
		{"higher epoch without restart", "bad_welcome", []*feedv1.SyncResponse{welcome(cluster, epoch+1, false)}},
		{"lower epoch", "epoch_lower", []*feedv1.SyncResponse{welcome(cluster, epoch-1, true)}},
		{"foreign store", "foreign_store", []*feedv1.SyncResponse{welcome(cluster+1, epoch, true)}},
		{"short id", "bad_entry", resumed(changes(nil, &feedv1.Entry{Id: id[:15], Nets: []byte(nets(1, 1))}))},
		{"long id", "bad_entry", resumed(changes(nil, &feedv1.Entry{Id: append(id[:], 0), Nets: []byte(nets(1, 1))}))},
		{"no id", "bad_entry", resumed(changes(nil, &feedv1.Entry{}))},
		{"no entry", "bad_entry", resumed(changes(nil, nil))},
		{"nets cut off", "bad_entry", resumed(changes(nil, entry(id, nets(1, 2)[:11])))},
		{"nets out of order", "bad_entry", resumed(changes(nil, entry(id, nets(2, 1)+nets(1, 1))))},
		{"nets twice", "bad_entry", resumed(changes(nil, entry(id, nets(2, 1)+nets(2, 1))))},
		{"nets of an unknown family", "bad_entry", resumed(changes(nil, entry(id, "\x05\x01\x02\x03\x04\x20")))},
		{"host bits", "bad_entry", resumed(changes(nil, entry(id, "\x04\x01\x02\x03\x04\x08")))},
		{"too many entries", "bad_entry", resumed(changes(nil, long()...))},
		{"revision 0", "bad_commit", resumed(changes(good.commit(0)))},
		{"negative revision", "bad_commit", resumed(changes(good.commit(-1)))},
		{"the same revision twice", "bad_commit", resumed(changes(good.commit(10)))},
		{"short digest", "bad_commit", resumed(changes(&feedv1.Commit{Revision: 11, Count: 3, Digest: good.commit(0).GetDigest()[:15]}))},
		{"no digest", "bad_commit", resumed(changes(&feedv1.Commit{Revision: 11, Count: 3}))},
		{"lower revision", "revision_lower", resumed(changes(good.commit(9)))},
		{"lower revision at first", "revision_lower", []*feedv1.SyncResponse{welcome(cluster, epoch, false), changes(good.commit(9))}},
		{"lower revision after a restart", "revision_lower", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(good.commit(9), good.entries()...)}},
		{"empty after a restart, earlier", "revision_lower", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(content{}.commit(1))}},
		{"entries of a restart missing", "mismatch", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(good.commit(12), good.entries()[1:]...)}},
		{"unasked pong", "bad_pong", resumed(pong(99, 10))},
		{"pong twice", "bad_pong", resumed(pong(1, 10), pong(1, 10))},
		{"negative pong", "bad_pong", resumed(pong(1, -1))},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				f.synced(10, good).end <- errCut
				conv := f.accept()
				conv.pinged()
				for _, msg := range c.msgs {
					if conv.stream.Send(msg) != nil {
						break // the mirror has ended the stream already
					}
					synctest.Wait()
				}
				next := f.accept()
				f.wantState(10, good)
				f.wantMetric("resyncs_total", c.cause, 1)
				next.send(welcome(cluster, epoch, true), changes(good.commit(20), good.entries()...))
				next.acked(20)
			})
		})
	}
}

// TestViolationsOfTheFirstStream: without a state, a stream must bring all of it.
func TestViolationsOfTheFirstStream(t *testing.T) {
	for name, c := range map[string]struct {
		cause string
		msgs  []*feedv1.SyncResponse
	}{
		"no restart":          {"bad_welcome", []*feedv1.SyncResponse{welcome(cluster, epoch, false), changes(content{}.commit(1))}},
		"commit, no welcome":  {"unexpected_message", []*feedv1.SyncResponse{changes(content{}.commit(1))}},
		"bad entry":           {"bad_entry", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(nil, &feedv1.Entry{})}},
		"revision missing":    {"bad_commit", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(content{}.commit(0))}},
		"commit without data": {"mismatch", []*feedv1.SyncResponse{welcome(cluster, epoch, true), changes(three().commit(1))}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				conv := f.accept()
				for _, msg := range c.msgs {
					if conv.stream.Send(msg) != nil {
						break
					}
					synctest.Wait()
				}
				f.accept()
				if f.m.State() != nil {
					t.Error("a state was published")
				}
				f.wantMetric("resyncs_total", c.cause, 1)
			})
		})
	}
}

func TestForeignStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.synced(10, three()).end <- errCut
		for range 3 {
			c := f.accept()
			c.send(welcome(0xf0, 1, true))
			_ = c.stream.Send(changes(content{}.commit(99))) // the sidecar may have gone already
			<-c.stream.Context().Done()
			synctest.Wait()
			f.wantState(10, three())
			f.wantMetric("foreign_store", "", 1)
			f.wantMetric("connected", "", 0)
			if !f.m.ForeignStore() || f.m.Connected() {
				t.Error("not reported")
			}
		}
		if !strings.Contains(f.log.String(), "--accept-cluster=f0") {
			t.Errorf("the log does not say what to do:\n%s", f.log)
		}
		c := f.accept() // our own store is back
		c.send(welcome(cluster, epoch, false), changes(three().commit(10)))
		c.acked(10)
		f.wantMetric("foreign_store", "", 0)
	})
}

func TestAcceptCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(cfg *mirror.Config) { cfg.AcceptCluster = 0xf0 })
		f.synced(10, three()).end <- errCut
		f.accept().send(welcome(0xf1, 1, true)) // not this one
		c := f.accept()
		f.wantMetric("foreign_store", "", 1)
		c.send(welcome(0xf0, 1, false)) // not without all of it
		c = f.accept()
		f.wantMetric("resyncs_total", "bad_welcome", 1)
		f.wantState(10, three())
		now := content{mailbox(7): nets(7, 7)}
		c.send(welcome(0xf0, 1, true), changes(now.commit(2), now.entries()...))
		c.acked(2)
		wantRoot(t, f.m.State(), token(1, 2), now)
		f.wantMetric("foreign_store", "", 0)
		c.end <- errCut
		c = f.accept()
		if h := c.hello; h.GetCluster() != 0xf0 || h.GetEpoch() != 1 || h.GetRevision() != 2 {
			t.Errorf("hello %v", h)
		}
		c.send(welcome(cluster, epoch, true)) // and there is no way back
		f.accept()
		f.wantMetric("foreign_store", "", 1)
	})
}

// TestEpochRaised: the operator restored a backup and said so, and revisions start again lower.
func TestEpochRaised(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.synced(10, three()).end <- errCut
		c := f.accept()
		restored := three().with(mailbox(2), "")
		c.send(welcome(cluster, epoch+1, true), changes(restored.commit(4), restored.entries()...))
		c.acked(4)
		wantRoot(t, f.m.State(), token(epoch+1, 4), restored)
	})
}

func TestServerErrors(t *testing.T) {
	reason := func(code codes.Code, r decisionv1.ErrorReason) error { return rpcerr.New(code, r, "no") }
	for cause, err := range map[string]error{
		"history_went_back": reason(codes.FailedPrecondition, decisionv1.ErrorReason_ERROR_REASON_HISTORY_WENT_BACK),
		"overloaded":        reason(codes.Unavailable, decisionv1.ErrorReason_ERROR_REASON_OVERLOADED),
		"refused":           reason(codes.PermissionDenied, decisionv1.ErrorReason_ERROR_REASON_CALLER_NOT_PERMITTED),
		"unreachable":       status.Error(codes.Unavailable, "no"),
	} {
		t.Run(cause, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				f.synced(10, three()).end <- errCut
				f.accept().end <- err
				f.accept()
				f.wantState(10, three())
				f.wantMetric("resyncs_total", cause, 1)
			})
		})
	}
}

func TestServerEndsTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.synced(10, three()).end <- nil
		f.accept()
		f.wantMetric("resyncs_total", "lost", 1)
		if !strings.Contains(f.log.String(), "the policy service ended the stream") {
			t.Errorf("log:\n%s", f.log)
		}
	})
}

func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		wantAge := func(want time.Duration) {
			t.Helper()
			synctest.Wait()
			got, ok := f.m.State().Age(time.Now())
			if want < 0 && ok || want >= 0 && (!ok || got != want) {
				t.Fatalf("age %v, %v; want %v", got, ok, want)
			}
		}
		began := time.Now()
		c := f.accept()
		first := c.pinged()
		if time.Since(began) != 0 {
			t.Fatal("the first question is not sent at once")
		}
		wantAge(-1)
		c.send(welcome(cluster, epoch, true))
		time.Sleep(2 * time.Second)
		// The answer comes before the commit that it names: it counts with that, from when the question was sent.
		c.send(pong(first, 11))
		wantAge(-1)
		c.send(changes(three().commit(10), three().entries()...))
		c.acked(10)
		wantAge(-1)
		c.send(changes(three().commit(11)))
		c.acked(11)
		wantAge(2 * time.Second)

		second := c.pinged()
		if d := time.Since(began); d != 5*time.Second {
			t.Fatalf("the second question after %v", d)
		}
		wantAge(5 * time.Second)
		time.Sleep(time.Second)
		c.send(pong(second, 11))
		wantAge(time.Second)
		f.wantMetric("data_age_seconds", "", 1)

		// Answers out of order: the newer one counts, the older one does no harm.
		third, fourth := c.pinged(), c.pinged() // at 10 s and 15 s
		c.send(pong(fourth, 3))
		wantAge(0)
		c.send(pong(third, 3))
		wantAge(0)

		// A cut does not change what is known.
		c.end <- errCut
		c = f.accept()
		resumed := time.Since(began) - 15*time.Second
		wantAge(resumed)
		n := c.pinged()
		c.send(welcome(cluster, epoch, false), pong(n, 11)) // nothing new in the store
		wantAge(0)
		c.send(changes(three().commit(11)))
		c.acked(11)

		// After a restart the answer waits for the commit.
		c.end <- errCut
		c = f.accept()
		n = c.pinged()
		known, _ := f.m.State().Age(time.Now())
		c.send(welcome(cluster, epoch, true), pong(n, 0))
		wantAge(known)
		c.send(changes(three().commit(12), three().entries()...))
		c.acked(12)
		wantAge(0)

		// What was known of one epoch says nothing about the next.
		c.end <- errCut
		c = f.accept()
		c.send(welcome(cluster, epoch+1, true), changes(three().commit(1), three().entries()...))
		c.acked(1)
		wantAge(-1)
		c.send(pong(c.pinged(), 1))
		wantAge(0)
	})
}

// TestUnansweredQuestions: a server that answers far too late or not at all takes no memory.
func TestUnansweredQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.synced(10, three())
		for i := range int64(100) {
			n := c.pinged()
			if n != uint64(i+1) {
				t.Fatalf("nonce %d", n)
			}
			c.send(changes(three().commit(11 + i))) // a sign of life
			c.acked(11 + i)
		}
		c.send(pong(100, 10), pong(60, 10)) // still remembered
		synctest.Wait()
		c.send(pong(3, 10)) // long forgotten
		f.accept()
		f.wantMetric("resyncs_total", "bad_pong", 1)
	})
}

func TestSilence(t *testing.T) {
	for name, open := range map[string]func(*fixture) *conversation{
		"before the welcome": func(f *fixture) *conversation { return f.accept() },
		"after a commit":     func(f *fixture) *conversation { return f.synced(10, three()) },
		"in a batch": func(f *fixture) *conversation {
			c := f.synced(10, three())
			c.send(changes(nil, entry(mailbox(1), "")))
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				c := open(f)
				began := time.Now()
				<-c.stream.Context().Done()
				if d := time.Since(began); d != 15*time.Second {
					t.Errorf("the stream ended after %v", d)
				}
				f.accept()
				f.wantMetric("resyncs_total", "silent", 1)
			})
		})
	}
}

// TestServerThatDoesNotRead: the server sends, but takes nothing, so that in the end our own messages cannot leave.
func TestServerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.deaf.Store(true)
		c := f.accept()
		c.send(welcome(cluster, epoch, true))
		revision := int64(0)
		for c.stream.Context().Err() == nil { // each commit is acknowledged
			revision++
			if c.stream.Send(changes(content{}.commit(revision))) != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		f.deaf.Store(false)
		f.accept()
		f.wantMetric("resyncs_total", "silent", 1)
	})
}

// TestSignsOfLife: any message will do.
func TestSignsOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.synced(10, three())
		for i := range int64(10) {
			time.Sleep(14 * time.Second)
			if i%2 == 0 {
				c.send(pong(uint64(i+1), 10))
			} else {
				c.send(changes(nil))
			}
		}
		if c.stream.Context().Err() != nil {
			t.Error("the stream was ended")
		}
	})
}

func TestDrain(t *testing.T) {
	for name, c := range map[string]struct {
		after, min, max time.Duration
	}{
		"at once":          {0, 0, 200 * time.Millisecond},
		"after a while":    {20 * time.Second, 20 * time.Second, 20*time.Second + 200*time.Millisecond},
		"absurdly far off": {1000 * time.Hour, 5 * time.Minute, 5*time.Minute + 200*time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				conv := f.synced(10, three())
				conv.send(drain(c.after))
				began := time.Now()
				conv = f.accept()
				if d := time.Since(began); d < c.min || d > c.max {
					t.Errorf("back after %v", d)
				}
				if conv.hello.GetRevision() != 10 {
					t.Errorf("hello %v", conv.hello)
				}
				f.wantMetric("resyncs_total", "drain", 1)
				conv.send(drain(0)) // also instead of a Welcome
				f.accept()
				f.wantMetric("resyncs_total", "drain", 2)
			})
		})
	}
}

// TestBackoff: delays are drawn from windows that double from 0.2 s to 30 s.
func TestBackoff(t *testing.T) {
	var longest [12]time.Duration
	for range 60 { // enough draws to see each window nearly filled and never left
		synctest.Test(t, func(t *testing.T) {
			f := start(t)
			last := time.Now()
			f.accept().end <- errCut
			for i := range longest {
				c := f.accept()
				longest[i] = max(longest[i], time.Since(last))
				last = time.Now()
				c.end <- errCut
			}
		})
	}
	window := 200 * time.Millisecond
	for i, d := range longest {
		if d > window || d < window/2 {
			t.Errorf("retry %d: at most %v in 60 draws; want a little less than %v", i+1, d, window)
		}
		window = min(30*time.Second, 2*window)
	}
}

// TestBackoffReset: a stream that was in step for a minute begins a new row, a shorter one does not.
func TestBackoffReset(t *testing.T) {
	delay := func(t *testing.T, inStep time.Duration) (d time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			f := start(t)
			for range 10 {
				f.accept().end <- errCut
			}
			c := f.synced(10, three())
			for ; inStep > 5*time.Second; inStep -= 5 * time.Second {
				time.Sleep(5 * time.Second)
				c.send(changes(nil))
			}
			time.Sleep(inStep)
			began := time.Now()
			c.end <- errCut
			f.accept()
			d = time.Since(began)
		})
		return d
	}
	var short time.Duration
	for range 20 {
		if d := delay(t, time.Minute); d > 200*time.Millisecond {
			t.Fatalf("retry after %v", d)
		}
		short = max(short, delay(t, 59*time.Second))
	}
	if short < 5*time.Second {
		t.Errorf("59 s in step made the retries quick: at most %v", short)
	}
}

// TestUnreachable: at first nobody listens. Every attempt is a new connection, and the first one that succeeds is used.
func TestUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var attempts atomic.Int64
		f := start(t, func(cfg *mirror.Config) {
			dial, began := cfg.Dial, time.Now()
			cfg.Dial = func() (*grpc.ClientConn, error) {
				n := attempts.Add(1)
				switch {
				case time.Since(began) > 5*time.Minute:
					return dial()
				case n%2 == 0:
					return nil, errors.New("no such host")
				}
				return grpc.NewClient("passthrough:nobody", grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errors.New("refused") }))
			}
		})
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if f.m.State() != nil || f.m.Connected() {
			t.Error("a state or a connection came from nowhere")
		}
		n := attempts.Load()
		if n < 10 || n > 60 {
			t.Errorf("%d attempts in five minutes", n)
		}
		f.wantMetric("resyncs_total", "unreachable", float64(n))
		f.synced(10, three())
	})
}

// TestStop ends Run wherever it is.
func TestStop(t *testing.T) {
	for name, where := range map[string]func(*fixture){
		"before the welcome": func(f *fixture) { f.accept() },
		"in step":            func(f *fixture) { f.synced(10, three()) },
		"between streams": func(f *fixture) {
			f.accept().send(drain(time.Minute))
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				where(f)
				began := time.Now()
				f.stop()
				if d := time.Since(began); d != 0 {
					t.Errorf("it took %v", d)
				}
			})
		})
	}
}

func TestLogSaysWhatHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		c := f.synced(10, three())
		c.send(changes(three().commit(9)))
		f.accept()
		for _, want := range []string{"feed stream opened", "cluster=c1", "feed in step", "revision=3-10", "feed stream ended", "cause=revision_lower", "retry_in="} {
			if !strings.Contains(f.log.String(), want) {
				t.Errorf("the log lacks %q:\n%s", want, f.log)
			}
		}
	})
}

func TestRegistersOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		if _, err := mirror.New(mirror.Config{Metrics: f.metrics}); err == nil {
			t.Error("metrics were registered twice")
		}
	})
}
