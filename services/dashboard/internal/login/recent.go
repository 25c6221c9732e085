package login

import (
	"container/list"

	"github.com/prometheus/client_golang/prometheus"
)

// recent is a map that drops what was not used for longest when it becomes too large, and counts that.
type recent[K comparable, V any] struct {
	limit   int
	entries map[K]*list.Element
	order   *list.List // of entry[K, V], the latest first
	dropped prometheus.Counter
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

func newRecent[K comparable, V any](limit int, dropped prometheus.Counter) recent[K, V] {
	return recent[K, V]{limit: limit, entries: make(map[K]*list.Element), order: list.New(), dropped: dropped}
}

// get returns the zero value for what is not there.
func (r recent[K, V]) get(key K) V {
	element, ok := r.entries[key]
	if !ok {
		var zero V
		return zero
	}
	r.order.MoveToFront(element)
	return element.Value.(*entry[K, V]).value //nolint:errcheck // there is nothing else in it
}

func (r recent[K, V]) put(key K, value V) {
	r.drop(key)
	r.entries[key] = r.order.PushFront(&entry[K, V]{key, value})
	if len(r.entries) <= r.limit {
		return
	}
	last := r.order.Back()
	r.order.Remove(last)
	delete(r.entries, last.Value.(*entry[K, V]).key) //nolint:errcheck // there is nothing else in it
	r.dropped.Inc()
}

func (r recent[K, V]) drop(key K) {
	if element, ok := r.entries[key]; ok {
		r.order.Remove(element)
		delete(r.entries, key)
	}
}
