package main

import (
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap/zapcore"
)

// etcdLog writes the embedded etcd's warnings and errors into our log. It is a [zapcore.Core].
type etcdLog struct {
	log *slog.Logger
	// closing silences it: etcd reports each listener that its own end closes as an error.
	closing *atomic.Bool
}

// Enabled implements [zapcore.LevelEnabler].
func (c etcdLog) Enabled(level zapcore.Level) bool {
	return level >= zapcore.WarnLevel && !c.closing.Load()
}

// With implements [zapcore.Core].
func (c etcdLog) With(fields []zapcore.Field) zapcore.Core {
	return etcdLog{c.log.With(attrs(fields)...), c.closing}
}

// Check implements [zapcore.Core].
func (c etcdLog) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return checked.AddCore(entry, c)
	}
	return checked
}

// Write implements [zapcore.Core].
func (c etcdLog) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	log := c.log.With("message", entry.Message).With(attrs(fields)...)
	if entry.Level >= zapcore.ErrorLevel {
		log.Error("embedded etcd")
	} else {
		log.Warn("embedded etcd")
	}
	return nil
}

// Sync implements [zapcore.Core].
func (c etcdLog) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	encoder := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(encoder)
	}
	all := make([]any, 0, len(encoder.Fields))
	for key, value := range encoder.Fields {
		all = append(all, slog.Any(key, value))
	}
	return all
}
