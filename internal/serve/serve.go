// Package serve holds what every server process of this product needs around its own work: TLS from files, a gRPC server
// that knows its callers and stops in bounded time, health and metrics over HTTP, and a logger.
package serve

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// StopTimeout bounds how long a server waits for running calls when it stops.
const StopTimeout = 5 * time.Second

// linger is how long HTTP goes on when it stops. A connection that is kept alive may have a request under way that nobody has
// read yet, and its client, such as Dovecot, would not send it again.
const linger = 200 * time.Millisecond

// LogFlags choose what is logged and how.
type LogFlags struct {
	LogLevel  slog.Level `name:"log-level" env:"ALLOWEDNETS_LOG_LEVEL" default:"info" help:"Least level that is logged: debug, info, warn or error."`
	LogFormat string     `name:"log-format" env:"ALLOWEDNETS_LOG_FORMAT" enum:"json,text" default:"json" help:"json or text."`
}

// Logger returns a logger that writes to w.
func (f LogFlags) Logger(w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: f.LogLevel}
	if f.LogFormat == "text" {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// HTTP serves handler on lis until ctx ends. Then it goes on for [linger], in which whoever asks is told that the connection
// ends, and lets running requests end within [StopTimeout]. Slow or oversized
// request headers and idle connections are cut off.
func HTTP(ctx context.Context, lis net.Listener, handler http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if ctx.Err() != nil {
				w.Header().Set("Connection", "close")
			}
			handler.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving HTTP on %s: %w", lis.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), StopTimeout)
	defer cancel()
	select {
	case err := <-served:
		return fmt.Errorf("serving HTTP on %s: %w", lis.Addr(), err)
	case <-time.After(linger):
	}
	_ = lis.Close()
	log.DebugContext(ctx, "no new connections", "listener", lis.Addr().String(), "error", <-served) // only now does Shutdown know them all
	if err := srv.Shutdown(stop); err != nil {
		_ = srv.Close()
	}
	return nil
}

// IsLoopback reports whether a TCP listen address such as "127.0.0.1:7443" can only be reached from this machine.
func IsLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
