// Command save is an administrator at the dashboard, in Debian's Chromium: it logs in, goes to a mailbox, saves a list and waits until
// it reads that the list is active on all servers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/allowednets/allowednets/test/browser"
	"github.com/allowednets/allowednets/test/dashboard"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "save:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("save", flag.ContinueOnError)
	site := flags.String("url", "", "the dashboard, on localhost: Chromium takes secure cookies without TLS from nobody else")
	user := flags.String("user", "anna", "who saves")
	password := flags.String("password", "", "their password")
	mailbox := flags.String("mailbox", "alice@example.org", "the mailbox")
	nets := flags.String("nets", "", "its new list")
	servers := flags.Int("servers", 2, "on how many servers it must become active")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b, err := browser.Start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	p, leave, err := dashboard.Visit(b, *site, dashboard.Traits{})
	if err != nil {
		return err
	}
	defer leave()
	_, domain, _ := strings.Cut(*mailbox, "@")
	active := fmt.Sprintf("Active on %[1]d of %[1]d server", *servers)
	var pressed time.Time
	for _, step := range []func() error{
		func() error { return p.Go("/") },
		func() error { return p.Type("User name", *user) },
		func() error { return p.Type("Password", *password) },
		func() error { return p.Follow("button", "Log in") },
		func() error { return p.Follow("link", domain+"…") },
		func() error { return p.Follow("link", "Edit "+*mailbox) },
		func() error { return p.Type("Allowed Nets", *nets) },
		func() error { pressed = time.Now(); return p.Follow("button", "Save") },
		func() error { return p.Read(active) },
	} {
		if err := step(); err != nil {
			return errors.Join(err, p.Screenshot("failed-kube-save"))
		}
	}
	_, err = fmt.Fprintf(stdout, "%ss %.1f s after Save\n", active, time.Since(pressed).Seconds())
	return err
}
