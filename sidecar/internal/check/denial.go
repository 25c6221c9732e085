package check

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	decisionv1 "github.com/allowednets/allowednets/gen/allowednets/decision/v1"
	"github.com/allowednets/allowednets/internal/allow"
)

// maxDenials is how many denials are logged in one second. Somebody who tries passwords from a thousand addresses must not
// be able to fill the disk or to slow down the answers to others; the decisions counter still counts every one.
const maxDenials = 100

// denialLog is the log of denied attempts: the one place where a sidecar writes down mailboxes and addresses.
type denialLog struct {
	log      *slog.Logger
	unlogged prometheus.Counter

	mu      sync.Mutex
	second  time.Time
	lines   int
	skipped int
}

func (l *denialLog) write(ctx context.Context, mailbox allow.Mailbox, svc decisionv1.Service, d Decision) {
	ok, skipped := l.take(time.Now())
	if !ok {
		l.unlogged.Inc()
		return
	}
	client := ""
	if d.Client.IsValid() {
		client = d.Client.String()
	}
	attrs := []slog.Attr{
		slog.String("mailbox", mailbox.String()), slog.String("client_address", client),
		slog.String("service", serviceLabel(svc)), slog.String("reason", reasonLabel(d.Reason)),
	}
	if skipped > 0 {
		attrs = append(attrs, slog.Int("denials_not_logged_before", skipped))
	}
	l.log.LogAttrs(ctx, slog.LevelWarn, "access denied", attrs...)
}

// take reports whether a line may be written, and how many were not since the last one.
func (l *denialLog) take(now time.Time) (ok bool, skipped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.second) >= time.Second {
		l.second, l.lines = now, 0
	}
	if l.lines == maxDenials {
		l.skipped++
		return false, 0
	}
	l.lines++
	skipped, l.skipped = l.skipped, 0
	return true, skipped
}
