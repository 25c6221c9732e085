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

// denialLog is the log of denied attempts: the one place where a sidecar writes down mailboxes and addresses. It is bounded:
// somebody who tries passwords from a thousand addresses must not be able to fill the disk or to slow down the answers to
// others. The counter of decisions still counts every one.
type denialLog struct {
	log      *slog.Logger
	lines    limiter
	unlogged prometheus.Counter
}

func (l *denialLog) write(ctx context.Context, mailbox allow.Mailbox, svc decisionv1.Service, d Decision) {
	ok, skipped := l.lines.take(time.Now())
	if !ok {
		l.unlogged.Inc()
		return
	}
	client := ""
	if d.Client.IsValid() {
		client = d.Client.String()
	}
	l.log.LogAttrs(ctx, slog.LevelWarn, "access denied",
		slog.String("mailbox", mailbox.String()), slog.String("client_address", client),
		slog.String("service", serviceLabel(svc)), slog.String("reason", reasonLabel(d.Reason)), slog.Int("not_logged_before", skipped))
}

// maxLines is how many lines a limiter lets through in a second.
const maxLines = 100

// limiter bounds a log. The zero value is ready; it is safe for concurrent use.
type limiter struct {
	mu      sync.Mutex
	second  time.Time // when the present second began
	lines   int       // in it
	skipped int       // since the last line
}

// take reports whether a line may be written, and how many could not since the last one.
func (l *limiter) take(now time.Time) (ok bool, skipped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.second) >= time.Second {
		l.second, l.lines = now, 0
	}
	if l.lines == maxLines {
		l.skipped++
		return false, 0
	}
	l.lines++
	skipped, l.skipped = l.skipped, 0
	return true, skipped
}
