package lastgood

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are described in docs/metrics.md.
type metrics struct {
	load          *prometheus.GaugeVec
	loadSeconds   prometheus.Gauge
	current       prometheus.Gauge
	snapshotBytes prometheus.Gauge
	journalBytes  prometheus.Gauge
	appends       prometheus.Counter
	appendSeconds prometheus.Counter
	snapshots     prometheus.Counter
	errors        *prometheus.CounterVec
	wrong         prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		load: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "allowednets_sidecar_state_load", Help: "1 for what came of loading the state from disk at the start.",
		}, []string{"result"}),
		loadSeconds: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_sidecar_state_load_seconds", Help: "Time that loading the state from disk took at the start.",
		}),
		current: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_sidecar_state_current", Help: "1 if the newest state is on disk.",
		}),
		snapshotBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_sidecar_state_snapshot_bytes", Help: "Size of the snapshot on disk.",
		}),
		journalBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "allowednets_sidecar_state_journal_bytes", Help: "Size of the journal on disk.",
		}),
		appends: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_state_appends_total", Help: "Times that commits were appended to the journal on disk.",
		}),
		appendSeconds: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_state_append_seconds_total", Help: "Time that appending commits to the journal took, with both syncs.",
		}),
		snapshots: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_state_snapshots_total", Help: "Snapshots written to disk.",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "allowednets_sidecar_state_errors_total", Help: "Failed attempts to write the state to disk, by operation.",
		}, []string{"operation"}),
		wrong: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "allowednets_sidecar_state_wrong_total", Help: "States in memory that did not contain what they were verified to contain.",
		}),
	}
	for _, r := range []result{resultLoaded, resultAbsent, resultBehind, resultDamaged, resultUnreadable} {
		m.load.WithLabelValues(string(r))
	}
	for _, operation := range []string{"append", "snapshot", "spoil"} {
		m.errors.WithLabelValues(operation)
	}
	for _, c := range []prometheus.Collector{
		m.load, m.loadSeconds, m.current, m.snapshotBytes, m.journalBytes, m.appends, m.appendSeconds, m.snapshots, m.errors, m.wrong,
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}
