package serve

import (
	"context"
	"fmt"
	"io"

	"github.com/alecthomas/kong"
)

// Exit codes of a server's program, beside 0.
const (
	ExitFailed = 1 // something broke
	ExitUsage  = 2 // the command line cannot work
)

// Command is the command line of a server's program.
type Command struct {
	Name, Description string
	Admin             string    // the default of --admin-listen, for [Healthcheck]
	Vars              kong.Vars // for struct tags, beside version
	Stdout, Stderr    io.Writer
}

// Parse reads args into flags, a pointer to a struct, and calls resolve, whose error is one of usage. If done, there is nothing
// to run and the process ends with code: it was asked for help, the version or a [Healthcheck], or wrongly called.
func (c Command) Parse(ctx context.Context, args []string, flags any, resolve func() error) (code int, done bool) {
	if len(args) > 0 && args[0] == HealthcheckCommand {
		return Healthcheck(ctx, c.Admin, args[1:], c.Stdout, c.Stderr), true
	}
	parser, err := kong.New(flags,
		kong.Name(c.Name),
		kong.Description(c.Description+" Flags can also be given as ALLOWEDNETS_… in the environment. "+
			"With "+HealthcheckCommand+" as the first argument it asks the one that runs on this machine whether it is ready."),
		kong.Vars{"version": Version()}.CloneWith(c.Vars),
		kong.Writers(c.Stdout, c.Stderr),
		kong.Exit(func(exit int) { code, done = exit, true }),
	)
	if err != nil { // a struct tag is wrong
		return c.fail(err, ExitFailed), true
	}
	if _, err = parser.Parse(args); done { // --help or --version
		return code, true
	}
	if err == nil {
		err = resolve()
	}
	if err != nil {
		return c.fail(err, ExitUsage), true
	}
	return 0, false
}

func (c Command) fail(err error, code int) int {
	fmt.Fprintf(c.Stderr, "%s: %v\n", c.Name, err)
	return code
}
