package main

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	checkv1 "github.com/allowednets/allowednets/gen/allowednets/check/v1"
	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	feedv1 "github.com/allowednets/allowednets/gen/allowednets/feed/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// sidecar is a process that runs in this one.
type sidecar struct {
	t      *testing.T
	admin  string
	client checkv1.CheckServiceClient
	stderr *output
	stop   func() (code int)
}

func startSidecar(t *testing.T, flags ...string) *sidecar {
	t.Helper()
	s := &sidecar{t: t, admin: freeAddress(t), stderr: new(output)}
	socket := filepath.Join(t.TempDir(), "s.sock")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, append([]string{
			"--insecure-plaintext", "--socket=" + socket, "--http-listen=", "--admin-listen=" + s.admin,
		}, flags...), new(output), s.stderr)
	}()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	s.client = checkv1.NewCheckServiceClient(conn)
	code := -1
	s.stop = func() int {
		if code < 0 {
			cancel()
			code = <-ended
			_ = conn.Close()
		}
		return code
	}
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *sidecar) check(address string) (*checkv1.CheckResponse, error) {
	return s.client.Check(s.t.Context(), &checkv1.CheckRequest{
		Mailbox: "alice@example.org", ClientAddress: address, Service: decisionv1.Service_SERVICE_IMAP,
	})
}

// waitMatched asks until the sidecar is in step: until then it gives no answer, or one that its state is too old for more.
func (s *sidecar) waitMatched() {
	s.t.Helper()
	for until := time.Now().Add(time.Minute); ; {
		resp, err := s.check("8.8.8.8")
		switch {
		case err == nil && resp.GetDecision().GetReason() == matched:
			return
		case err == nil && resp.GetDecision().GetReason() != decisionv1.Reason_REASON_STALE,
			err != nil && rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED,
			time.Now().After(until):
			s.t.Fatalf("%v, %v\n%s", resp, err, s.stderr.String())
		}
	}
}

func (s *sidecar) wantReason(want decisionv1.Reason) {
	s.t.Helper()
	resp, err := s.check("8.8.8.8")
	if err != nil || resp.GetDecision().GetReason() != want {
		s.t.Errorf("Check: %v, %v; want %v\n%s", resp, err, want, s.stderr.String())
	}
}

// wantMetric fails unless there is a line of a metric.
func (s *sidecar) wantMetric(line string) {
	s.t.Helper()
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	_, body := get(s.t, &http.Client{Transport: transport, Timeout: 10 * time.Second}, "http://"+s.admin+"/metrics")
	if !strings.Contains(body, "\n"+line+"\n") {
		s.t.Errorf("the metrics lack %q", line)
	}
}

func (s *sidecar) ready() int {
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	code, _ := get(s.t, &http.Client{Transport: transport, Timeout: 10 * time.Second}, "http://"+s.admin+"/readyz")
	return code
}

// TestLastKnownGood starts without a policy service, after there was one.
func TestLastKnownGood(t *testing.T) {
	p := &policy{release: make(chan struct{}), saw: make(chan string, 10)}
	close(p.release)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	feedv1.RegisterFeedServiceServer(server, p)
	go func() { _ = server.Serve(lis) }()
	defer server.Stop()
	dir := filepath.Join(t.TempDir(), "state")
	here, nobody, stateDir := "--policy-address="+lis.Addr().String(), "--policy-address="+freeAddress(t), "--state-dir="+dir

	s := startSidecar(t, here, stateDir)
	s.waitMatched()
	s.wantMetric(`allowednets_sidecar_state_load{result="absent"} 1`)

	var stdout, stderr output
	if code := run(t.Context(), plain(t, stateDir), &stdout, &stderr); code != 1 || !strings.Contains(stderr.String(), "--state-dir: "+dir+" is in use by another process") {
		t.Errorf("another process: exit code %d\n%s", code, stderr.String())
	}
	if code := s.stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, s.stderr.String())
	}

	s = startSidecar(t, nobody, stateDir)
	resp, err := s.check("8.8.8.8")
	if err != nil || resp.GetDecision().GetMatchedNet() != "8.8.8.0/24" || resp.GetDecision().GetRevision() != "1-7" || resp.GetDataAge() != nil {
		t.Errorf("Check: %v, %v", resp, err)
	}
	if st, err := s.client.GetStatus(t.Context(), &checkv1.GetStatusRequest{}); err != nil || !st.GetSynced() || st.GetConnected() || st.GetDataAge() != nil || st.GetRevision() != "1-7" {
		t.Errorf("status: %v, %v", st, err)
	}
	if code := s.ready(); code != http.StatusOK {
		t.Errorf("/readyz: %d", code)
	}
	s.wantMetric(`allowednets_sidecar_state_load{result="loaded"} 1`)
	s.wantMetric(`allowednets_sidecar_data_age_seconds +Inf`)
	s.stop()

	// Nobody knows how old the state is, so a limit of its age forbids its use, until a policy service confirms it.
	s = startSidecar(t, nobody, stateDir, "--deny-after=1h")
	s.wantReason(decisionv1.Reason_REASON_STALE)
	if code := s.ready(); code != http.StatusOK {
		t.Errorf("/readyz: %d", code)
	}
	s.stop()
	s = startSidecar(t, here, stateDir, "--deny-after=1h")
	s.waitMatched()
	s.stop()

	// Damaged: no answers, and the reason where one looks for it. A policy service heals it.
	state := filepath.Join(dir, "state")
	b, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	b[600] ^= 4
	if err := os.WriteFile(state, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = startSidecar(t, nobody, stateDir)
	if _, err := s.check("8.8.8.8"); status.Code(err) != codes.Unavailable || rpcerr.Reason(err) != decisionv1.ErrorReason_ERROR_REASON_NOT_SYNCED {
		t.Errorf("Check: %v", err)
	}
	if code := s.ready(); code != http.StatusServiceUnavailable {
		t.Errorf("/readyz: %d", code)
	}
	s.wantMetric(`allowednets_sidecar_state_load{result="damaged"} 1`)
	if !strings.Contains(s.stderr.String(), "checksum of the frame") {
		t.Errorf("the log does not say why:\n%s", s.stderr.String())
	}
	s.stop()
	s = startSidecar(t, here, stateDir)
	s.waitMatched()
	s.stop()
	s = startSidecar(t, nobody, stateDir)
	s.wantReason(matched)
	s.stop()
}

const matched = decisionv1.Reason_REASON_MATCHED
