// Command allowednets is the administrator's tool: it reads and changes the lists of allowed nets through the policy
// service, and asks a sidecar what it would answer.
//
// Exit codes: 0 done or allowed; 1 denied or refused because of the present state; 2 wrong usage or refused input;
// 3 no answer, so that the outcome is unknown.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"unicode/utf8"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], terminal{in: os.Stdin, out: os.Stdout, err: os.Stderr}, dial)
	stop()
	os.Exit(code)
}

// terminal is what a command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
}

// connection is a client connection that ends.
type connection interface {
	grpc.ClientConnInterface
	io.Closer
}

// dialer opens a connection to a gRPC target.
type dialer func(target string, creds credentials.TransportCredentials) (connection, error)

func dial(target string, creds credentials.TransportCredentials) (connection, error) {
	return grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithUserAgent("allowednets-cli"))
}

// run is the whole program: it returns the exit code.
func run(ctx context.Context, args []string, term terminal, dial dialer) int {
	var flags commandLine
	helped := false
	parser, err := kong.New(&flags,
		kong.Name("allowednets"),
		kong.Description("Decide from which networks a mailbox may be reached. A mailbox without a list is unrestricted."),
		kong.Writers(term.out, term.err),
		kong.Exit(func(int) { helped = true }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
	if err != nil {
		return report(term.err, &flags, err) // the tags of commandLine are wrong
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
		err = command.Run(&session{ctx: ctx, flags: &flags, term: term, dial: dial})
	} else {
		err = usageError{err.Error() + "; allowednets --help shows what there is"}
	}
	return report(term.err, &flags, err)
}
