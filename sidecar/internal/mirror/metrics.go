package mirror

import (
	"fmt"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are described in docs/metrics.md.
type metrics struct {
	resyncs    *prometheus.CounterVec
	mismatches prometheus.Counter
	commits    prometheus.Counter
	entries    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, m *Mirror) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string, read func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
	}
	x := &metrics{
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_sidecar_resyncs_total", Help: "Feed streams that ended, by cause.",
		}, []string{"cause"}),
		mismatches: counter("allowednets_sidecar_mismatches_total", "Commits whose count or digest did not match."),
		commits:    counter("allowednets_sidecar_feed_commits_total", "Commits verified and applied."),
		entries:    counter("allowednets_sidecar_feed_entries_total", "Entries received."),
	}
	for _, c := range causes() {
		x.resyncs.WithLabelValues(string(c))
	}
	for _, c := range []prometheus.Collector{
		x.resyncs, x.mismatches, x.commits, x.entries,
		gauge("allowednets_sidecar_data_age_seconds", "Time since the data was last proven current; +Inf if never.", func() float64 {
			age, ok := m.State().Age(time.Now())
			if !ok {
				return math.Inf(1) // an alert on a high age must fire
			}
			return age.Seconds()
		}),
		gauge("allowednets_sidecar_applied_revision", "Revision of the data; 0 without any.", func() float64 {
			if st := m.State(); st != nil {
				return float64(st.token.Revision)
			}
			return 0
		}),
		gauge("allowednets_sidecar_restricted_mailboxes", "Mailboxes with a list.", func() float64 {
			if st := m.State(); st != nil {
				return float64(st.Index.Count())
			}
			return 0
		}),
		gauge("allowednets_sidecar_synced", "1 if a verified state is enforced.", func() float64 { return number(m.State() != nil) }),
		gauge("allowednets_sidecar_connected", "1 if a feed stream is open.", func() float64 { return number(m.Connected()) }),
		gauge("allowednets_sidecar_foreign_store", "1 if the policy service that answered last serves another store.", func() float64 { return number(m.ForeignStore()) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return x, nil
}

func (x *metrics) ended(c cause) { x.resyncs.WithLabelValues(string(c)).Inc() }

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
