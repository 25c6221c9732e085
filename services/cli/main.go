// Command allowednets is the administrator's tool: it reads and changes the lists of allowed nets through the policy
// service, and asks a sidecar what it would answer.
//
// Exit codes: 0 done or allowed; 1 denied or refused because of the present state; 2 wrong usage or refused input;
// 3 no answer in time, so that the outcome is unknown.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/allowednets/allowednets/internal/serve"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends us whatever we do
	code := run(ctx, os.Args[1:], terminal{
		in: os.Stdin, out: os.Stdout, err: os.Stderr, outLive: isTerminal(os.Stdout), errLive: isTerminal(os.Stderr),
	}, dial)
	stop()
	os.Exit(code)
}

// terminal is what a command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
	// Whether a person watches it, so that a line may be rewritten in place.
	outLive, errLive bool
}

// isTerminal takes every character device for a terminal; to rewrite lines of /dev/null does no harm.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

// connection is a client connection that ends.
type connection interface {
	grpc.ClientConnInterface
	io.Closer
}

// dialer opens a connection to a gRPC target.
type dialer func(target string, creds credentials.TransportCredentials) (connection, error)

// maxMessage bounds an answer: a page of 1000 lists of 4096 entries each is below it.
const maxMessage = 256 << 20

// reconnect is quicker than the default, so that a repetition of a call finds a service that came back.
func reconnect() grpc.ConnectParams {
	return grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: firstPause / 2, Multiplier: 1.6, Jitter: 0.2, MaxDelay: longestPause},
		MinConnectTimeout: 5 * time.Second,
	}
}

func dial(target string, creds credentials.TransportCredentials) (connection, error) {
	return grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithUserAgent("allowednets-cli"),
		grpc.WithConnectParams(reconnect()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
}

func newParser(flags *commandLine, term terminal, exit func(int)) (*kong.Kong, error) {
	return kong.New(flags,
		kong.Name("allowednets"),
		kong.Description("Decide from which networks a mailbox may be reached. A mailbox without a list is unrestricted."),
		kong.Vars{"version": serve.Version()},
		kong.Writers(term.out, term.err),
		kong.Exit(exit),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
}

// run is the whole program: it returns the exit code.
func run(ctx context.Context, args []string, term terminal, dial dialer) int {
	var flags commandLine
	helped := false
	parser, err := newParser(&flags, term, func(int) { helped = true })
	if err != nil {
		return report(term.err, &flags, err) // the tags of commandLine are wrong
	}
	if len(args) > 0 && args[0] == completeCommand {
		writeCandidates(term.out, parser.Model.Node, args[1:])
		return exitOK
	}
	for _, arg := range args {
		if !utf8.ValidString(arg) { // no message can carry it
			return report(term.err, &flags, usageError{fmt.Sprintf("%q is not UTF-8 text", arg)})
		}
	}
	command, err := parser.Parse(args)
	if helped {
		return exitOK
	}
	if err == nil {
		return report(term.err, &flags, command.Run(&session{ctx: ctx, flags: &flags, term: term, dial: dial}))
	}
	if usage, ok := errors.AsType[usageError](err); ok {
		return report(term.err, &flags, usage)
	}
	return report(term.err, &flags, usageError{err.Error() + "; allowednets --help shows what there is"})
}
