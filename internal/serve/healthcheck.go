package serve

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// HealthcheckCommand is the first argument that makes a server's program a [Healthcheck].
const HealthcheckCommand = "healthcheck"

// Exit codes of [Healthcheck].
const (
	healthOK     = 0
	healthFailed = 1
	healthUsage  = 2
)

// Healthcheck asks the admin port of a running server on this machine whether it is ready, or only whether it lives, for
// where there is no curl to ask it, as in a container made from scratch. The port is that of listen, which is a listen
// address such as ":7490"; a --admin-listen in args comes first, then ALLOWEDNETS_ADMIN_LISTEN in the environment, as for the
// server itself. It returns the exit code: 0 if the answer is yes, 1 if it is no or there is none, 2 for wrong usage.
func Healthcheck(ctx context.Context, listen string, args []string, stdout, stderr io.Writer) int {
	if env, ok := os.LookupEnv("ALLOWEDNETS_ADMIN_LISTEN"); ok {
		listen = env
	}
	flags := flag.NewFlagSet(HealthcheckCommand, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&listen, "admin-listen", listen, "the server's --admin-listen")
	live := flags.Bool("live", false, "ask whether it lives, not whether it is ready")
	timeout := flags.Duration("timeout", 3*time.Second, "how long to wait for the answer")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return healthOK
	} else if err != nil {
		return healthUsage
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil || flags.NArg() > 0 {
		fmt.Fprintf(stderr, "healthcheck: want --admin-listen=[HOST]:PORT and nothing else, not %q\n", append([]string{listen}, flags.Args()...))
		return healthUsage
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	path := "/readyz"
	if *live {
		path = "/livez"
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	answer, err := ask(ctx, "http://"+net.JoinHostPort(host, port)+path)
	if err != nil {
		fmt.Fprintf(stderr, "healthcheck: %v\n", err)
		return healthFailed
	}
	fmt.Fprintln(stdout, answer)
	return healthOK
}

// ask returns the text of a 200; any other answer is an error.
func ask(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	// A transport of its own, because the shared one would go through the proxy of the environment.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(body))
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, text)
	}
	return text, nil
}
