package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protojson"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

// Frame types of HTTP/2, RFC 9113 section 6.
const (
	frameData    = 0
	frameHeaders = 1
)

// cut says when a proxy drops its first connection.
type cut struct {
	name string
	// It drops in front of the data and header frame number so of this direction, counted from 1 over all streams.
	toServer bool
	frame    int
	after    bool   // and passes that frame on
	then     func() // is called before it drops the connection, if not nil
}

// proxy is a TCP proxy in front of the policy service. It breaks one connection and then behaves.
type proxy struct {
	lis    net.Listener
	target string
	cut    cut

	mu     sync.Mutex
	broken int // connections
	group  sync.WaitGroup
}

func startProxy(t *testing.T, target string, c cut) *proxy {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{lis: lis, target: target, cut: c}
	p.group.Go(func() {
		for {
			client, err := lis.Accept()
			if err != nil {
				return
			}
			p.group.Go(func() { p.serve(t.Context(), client) })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		p.group.Wait()
	})
	return p
}

func (p *proxy) serve(ctx context.Context, client net.Conn) {
	server, err := new(net.Dialer).DialContext(ctx, "tcp", p.target)
	if err != nil {
		_ = client.Close()
		return
	}
	var both sync.WaitGroup
	hangUp := func() {
		_ = client.Close()
		_ = server.Close()
	}
	both.Go(func() {
		defer hangUp()
		preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		if _, err := io.ReadFull(client, preface); err != nil {
			return
		}
		if _, err := server.Write(preface); err == nil {
			p.frames(server, client, true)
		}
	})
	both.Go(func() {
		defer hangUp()
		p.frames(client, server, false)
	})
	both.Wait()
}

// frames passes frames on, until the connection ends or is to be broken.
func (p *proxy) frames(to io.Writer, from io.Reader, toServer bool) {
	seen := 0
	for {
		var head [9]byte
		if _, err := io.ReadFull(from, head[:]); err != nil {
			return
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(from, payload); err != nil {
			return
		}
		stream, kind := binary.BigEndian.Uint32(head[5:9]), head[3]
		breaks := false
		if stream != 0 && (kind == frameData || kind == frameHeaders) {
			seen++
			breaks = p.breaks(toServer, seen)
		}
		if breaks && !p.cut.after {
			return
		}
		if _, err := to.Write(slices.Concat(head[:], payload)); err != nil || breaks {
			return
		}
	}
}

func (p *proxy) breaks(toServer bool, seen int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if toServer != p.cut.toServer || seen != p.cut.frame || p.broken > 0 {
		return false
	}
	p.broken++
	if p.cut.then != nil {
		p.cut.then()
	}
	return true
}

// A write whose reply is dropped, at whatever point, has the effect of one call.
func TestRepeatedWritesAreOne(t *testing.T) {
	policy := startPolicy(t)
	history := func(t *testing.T, mailbox string) []*policyv1.Change {
		t.Helper()
		var resp policyv1.ListChangesResponse
		if err := protojson.Unmarshal([]byte(must(t, policy.address, "history", mailbox, "--output=json")), &resp); err != nil {
			t.Fatal(err)
		}
		return resp.GetChanges()
	}
	for i, c := range []cut{
		{name: "request headers do not arrive", toServer: true, frame: 1},
		{name: "request does not arrive whole", toServer: true, frame: 2},
		{name: "connection breaks behind the request", toServer: true, frame: 2, after: true},
		{name: "reply headers dropped", frame: 1},
		{name: "reply message dropped", frame: 2},
		{name: "reply status dropped", frame: 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			old, renamed := fmt.Sprintf("old%d@example.com", i), fmt.Sprintf("new%d@example.com", i)
			steps := []struct {
				args    []string
				says    string
				mailbox string
				kinds   []policyv1.ChangeKind // of its changes afterwards, the newest first
			}{
				{[]string{"set", old, "8.8.8.8"}, "Saved. ", old, []policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_SET}},
				{
					[]string{"rename", old, renamed}, "Renamed. ", old,
					[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, policyv1.ChangeKind_CHANGE_KIND_SET},
				},
				{
					[]string{"clear", renamed}, "Cleared. ", renamed,
					[]policyv1.ChangeKind{policyv1.ChangeKind_CHANGE_KIND_CLEAR, policyv1.ChangeKind_CHANGE_KIND_RENAME_TO},
				},
				{[]string{"set", old, "9.9.9.9"}, "Saved. ", old, []policyv1.ChangeKind{
					policyv1.ChangeKind_CHANGE_KIND_SET, policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, policyv1.ChangeKind_CHANGE_KIND_SET,
				}},
				{[]string{"delete", old}, "Deleted. ", old, []policyv1.ChangeKind{
					policyv1.ChangeKind_CHANGE_KIND_DELETE, policyv1.ChangeKind_CHANGE_KIND_SET, policyv1.ChangeKind_CHANGE_KIND_RENAME_FROM, policyv1.ChangeKind_CHANGE_KIND_SET,
				}},
			}
			for _, step := range steps {
				p := startProxy(t, policy.address, c)
				id := uuid.NewString()
				var out, errs bytes.Buffer
				code := run(t.Context(), append([]string{
					"--insecure-plaintext", "--timeout=60s", "--policy-address=" + p.lis.Addr().String(),
				}, append(step.args, "--request-id="+id)...), terminal{out: &out, err: &errs}, dial)
				if code != exitOK || !strings.HasPrefix(out.String(), step.says) || strings.Count(errs.String(), "Asking again with the same request id.") != 1 || p.broken != 1 {
					t.Errorf("%q: exit code %d, %d connections broken\n%s%s", step.args, code, p.broken, &out, &errs)
				}
				changes := history(t, step.mailbox)
				var kinds []policyv1.ChangeKind
				for _, change := range changes {
					kinds = append(kinds, change.GetKind())
				}
				if fmt.Sprint(kinds) != fmt.Sprint(step.kinds) || changes[0].GetRequestId() != id {
					t.Errorf("%q with request id %s made %v", step.args, id, changes)
				}
			}
			if to := history(t, renamed); len(to) != 2 {
				t.Errorf("the new name has the changes %v", to)
			}
		})
	}
}

// What somebody else saves between the two attempts stays: the first attempt was the call.
func TestARepetitionUndoesNothing(t *testing.T) {
	policy := startPolicy(t)
	p := startProxy(t, policy.address, cut{frame: 1, then: func() {
		if code, stdout, stderr := runCommand(t, policy.address, "set", "alice@example.com", "9.9.9.9", "--actor=dave"); code != exitOK {
			t.Errorf("exit code %d: %s%s", code, stdout, stderr)
		}
	}})
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{
		"--insecure-plaintext", "--timeout=60s", "--policy-address=" + p.lis.Addr().String(), "set", "alice@example.com", "8.8.8.8",
	}, terminal{out: &out, err: &errs}, dial)
	if want := "Saved, but alice@example.com was changed again since; see `allowednets get`. It left this list:\n"; code != exitOK || p.broken != 1 || !strings.HasPrefix(out.String(), want) {
		t.Errorf("exit code %d\n%s%s", code, &out, &errs)
	}
	if got := must(t, policy.address, "get", "alice@example.com"); !strings.Contains(got, "9.9.9.9") || !strings.Contains(got, "by dave") {
		t.Errorf("the list is now\n%s", got)
	}
}
