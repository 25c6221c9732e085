// Command setnets saves the allowed nets of a mailbox as a dashboard does, and waits until they are active.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
)

func main() {
	policy := flag.String("policy", "localhost:7443", "address of the policy service")
	cert := flag.String("cert", "", "certificate of this program, PEM")
	key := flag.String("key", "", "its key, PEM")
	ca := flag.String("ca", "", "authority of the policy service's certificate, PEM")
	person := flag.String("person", "", "who is logged in, for the history")
	from := flag.String("from", "", "IP address of their browser, for the history")
	etag := flag.String("etag", "", "version of the list that the form was opened with; empty: the present one")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: setnets [flags] MAILBOX 'NET, NET'")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := dial(*policy, *cert, *key, *ca)
	if err == nil {
		defer func() { _ = conn.Close() }()
		actor := &policyv1.Actor{Id: *person, Address: *from}
		err = save(ctx, policyv1.NewPolicyServiceClient(conn), flag.Arg(0), flag.Arg(1), *etag, actor)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1) //nolint:gocritic // everything is closed when the process ends
	}
}

// dial prepares a connection on which both sides show certificates.
func dial(address, certFile, keyFile, caFile string) (*grpc.ClientConn, error) {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", caFile)
	}
	return grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13,
	})))
}

// save is what happens between the button and "Active on 2 of 2 servers".
func save(ctx context.Context, lists policyv1.PolicyServiceClient, mailbox, text, etag string, actor *policyv1.Actor) error {
	if etag == "" { // a form keeps the etag of the moment in which it was opened, in a hidden field
		opened, err := lists.GetAllowedNets(ctx, &policyv1.GetAllowedNetsRequest{Mailbox: mailbox})
		if err != nil {
			return explain(err)
		}
		etag = opened.GetAllowedNets().GetEtag()
	}
	req := &policyv1.SetAllowedNetsRequest{
		Mailbox: mailbox, Input: &policyv1.SetAllowedNetsRequest_Text{Text: text}, Etag: etag,
		RequestId: uuid.NewString(), // one per form, so that a repetition saves nothing twice
		Actor:     actor,
	}
	saved, err := lists.SetAllowedNets(ctx, req)
	for attempt := 1; retryable(err) && attempt < 4; attempt++ { // nobody knows whether it was saved: the same request again
		select {
		case <-time.After(time.Duration(attempt) * 200 * time.Millisecond):
		case <-ctx.Done():
		}
		saved, err = lists.SetAllowedNets(ctx, req)
	}
	if err != nil {
		return explain(err)
	}
	fmt.Fprintln(os.Stdout, "Saved.")
	return awaitActive(ctx, lists, saved.GetAllowedNets().GetRevision())
}

func retryable(err error) bool {
	return status.Code(err) == codes.Unavailable || status.Code(err) == codes.DeadlineExceeded
}

// awaitActive asks until every server enforces a save.
func awaitActive(ctx context.Context, lists policyv1.PolicyServiceClient, revision string) error {
	for {
		p, err := lists.GetPropagation(ctx, &policyv1.GetPropagationRequest{Revision: revision})
		switch {
		case err != nil && !retryable(err):
			return explain(err)
		case err == nil && p.GetSidecarCount() > 0 && p.GetAppliedCount() == p.GetSidecarCount():
			fmt.Fprintf(os.Stdout, "Active on %d of %d servers.\n", p.GetAppliedCount(), p.GetSidecarCount())
			return nil
		}
		for _, late := range p.GetLaggards() {
			fmt.Fprintln(os.Stdout, "Waiting for", late.GetId())
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return errors.New("saved, but not active everywhere yet")
		}
	}
}

// explain turns an error into what belongs beside the form.
func explain(err error) error {
	s := status.Convert(err)
	reason, text := "", s.Message()
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo: // what a program branches on
			reason = d.GetReason()
			if reason == "ETAG_MISMATCH" {
				text = "Somebody else saved another list: " + d.GetMetadata()["updated_by"] + ", " + d.GetMetadata()["update_time"]
			}
		case *policyv1.InvalidNets: // one line for each bad entry, with buttons for what would be accepted
			text = "Nothing was saved:"
			for _, n := range d.GetInvalidNets() {
				text += fmt.Sprintf("\n  entry %d, %s: %s", n.GetIndex()+1, n.GetRefusal(), n.GetMessage())
				for _, suggestion := range n.GetSuggestions() {
					text += fmt.Sprintf("\n    [use %s]", suggestion)
				}
			}
		}
	}
	if reason == "" { // not from the policy service: the network, TLS
		return fmt.Errorf("the policy service cannot be reached: %w", err)
	}
	return fmt.Errorf("%s: %s", reason, text)
}
