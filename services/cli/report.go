package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	policyv1 "github.com/allowednets/allowednets/gen/allowednets/policy/v1"
	"github.com/allowednets/allowednets/internal/rpcerr"
)

// The exit codes.
const (
	exitOK          = 0
	exitDenied      = 1
	exitUsage       = 2
	exitUnavailable = 3
)

// exitError ends the program with this exit code; what there is to say has been said.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// errInterrupted: somebody pressed Ctrl-C, or the process was asked to end.
var errInterrupted = errors.New("interrupted")

// statusError is the error of an RPC.
type statusError interface {
	error
	GRPCStatus() *status.Status
}

// report writes what went wrong and what to do about it, and returns the exit code.
func report(w io.Writer, flags *commandLine, err error) int {
	if err == nil {
		return exitOK
	}
	if code, ok := errors.AsType[exitError](err); ok {
		return int(code)
	}
	if usage, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintln(w, "allowednets: "+printable(usage.text))
		return exitUsage
	}
	rpc, isStatus := errors.AsType[statusError](err)
	if !isStatus {
		fmt.Fprintln(w, "allowednets: "+printable(err.Error()))
		return exitUnavailable
	}
	st := rpc.GRPCStatus()
	if flags.Output == "json" {
		if err := writeJSON(w, st.Proto()); err != nil {
			fmt.Fprintln(w, "allowednets: "+printable(err.Error()))
		}
		return exitCode(st.Code())
	}
	fmt.Fprint(w, explain(flags, rpc)) // without kong's wrapping, which would repeat itself in the text
	if stopped, ok := errors.AsType[*stoppedError](err); ok {
		fmt.Fprintln(w, "allowednets: "+printable(stopped.advice))
	}
	if write, ok := errors.AsType[*unansweredError](err); ok {
		fmt.Fprintf(w, "The change may or may not have been made. To find out, repeat the command with --request-id=%s\n", printable(write.requestID))
	}
	return exitCode(st.Code())
}

// problem is the text of an error for people, inside another one.
func problem(err error) string {
	if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
		return errInterrupted.Error()
	}
	if st, ok := errors.AsType[statusError](err); ok {
		return st.GRPCStatus().Message()
	}
	return err.Error()
}

func exitCode(code codes.Code) int {
	switch code {
	case codes.InvalidArgument, codes.AlreadyExists, codes.OutOfRange:
		return exitUsage
	case codes.PermissionDenied, codes.Unauthenticated, codes.NotFound, codes.Aborted, codes.FailedPrecondition, codes.DataLoss:
		return exitDenied
	default:
		return exitUnavailable
	}
}

// explain turns the error of an RPC into text for a person.
func explain(flags *commandLine, err error) string {
	var b strings.Builder
	st := status.Convert(err)
	say := func(format string, args ...any) { fmt.Fprintf(&b, "allowednets: "+format+"\n", args...) }
	message := printable(st.Message())
	why := rpcerr.Reason(err)
	switch {
	case why == decisionv1.ErrorReason_ERROR_REASON_NETS_INVALID && rpcerr.Detail[*policyv1.InvalidNets](err) != nil:
		bad := rpcerr.Detail[*policyv1.InvalidNets](err).GetInvalidNets()
		say("%s cannot be used. Nothing was saved.", count(len(bad), "entry", "entries"))
		writeInvalidNets(&b, bad)
	case why == decisionv1.ErrorReason_ERROR_REASON_NETS_EMPTY:
		say("the list has no entries. Nothing was saved. To lift the restriction: allowednets clear MAILBOX")
	case why == decisionv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH:
		meta := rpcerr.Detail[*errdetails.ErrorInfo](err).GetMetadata()
		say("the list was changed in the meantime by %s at %s. Nothing was saved.",
			printable(meta["updated_by"]), printable(meta["update_time"]))
		fmt.Fprintf(&b, "Look at it with allowednets get, then repeat with --etag=%s\n", printable(meta["etag"]))
	case why != decisionv1.ErrorReason_ERROR_REASON_UNSPECIFIED:
		say("%s", message)
	case st.Code() == codes.DeadlineExceeded:
		say("no answer within %s (--timeout)", flags.Timeout)
	case st.Code() == codes.Canceled:
		say("%v", errInterrupted)
	case st.Code() == codes.Unavailable:
		say("no answer: %s", message)
		fmt.Fprintf(&b, "Is the service running, and is this the right place? --policy-address is %s, --sidecar is %s.\n",
			printable(flags.PolicyAddress), printable(flags.Sidecar))
	default:
		say("%s: %s", st.Code(), message)
	}
	return b.String()
}

// writeInvalidNets shows each bad entry, and what could be pasted in its place.
func writeInvalidNets(w io.Writer, bad []*policyv1.InvalidNet) {
	for _, n := range bad {
		fmt.Fprintf(w, "  entry %d: %s\n", n.GetIndex()+1, printable(n.GetMessage())) // the message quotes the entry
		if len(n.GetSuggestions()) == 0 {
			continue
		}
		between := "  or  "
		if n.GetRefusal() == decisionv1.NetRefusal_NET_REFUSAL_RANGE {
			between = ", " // the prefixes are the range only together
		}
		fmt.Fprintf(w, "    instead: %s\n", printable(strings.Join(n.GetSuggestions(), between)))
	}
}
