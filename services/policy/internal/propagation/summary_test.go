package propagation

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/allowednets/allowednets/gen/allowednets/store/v1"
	"github.com/allowednets/allowednets/internal/revision"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func at(ago time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-ago)) }

func sidecar(id string, rev int64) *storev1.Sidecar {
	return &storev1.Sidecar{Id: id, Caller: "c", Revision: rev}
}

func gone(id string, rev int64, ago time.Duration) *storev1.Sidecar {
	return &storev1.Sidecar{Id: id, Caller: "c", Revision: rev, LostTime: at(ago), ConnectTime: at(ago + time.Minute)}
}

// bye is a replica that heard a goodbye.
func bye(id string, ago time.Duration) *storev1.Replica {
	return &storev1.Replica{Time: at(0), Epoch: 2, Left: sidecars{{Id: id, Caller: "c", LostTime: at(ago)}}}
}

func replica(age time.Duration, connected, lost []*storev1.Sidecar) *storev1.Replica {
	return &storev1.Replica{Time: at(age), Epoch: 2, Connected: connected, Lost: lost}
}

type sidecars = []*storev1.Sidecar

func TestSummarize(t *testing.T) {
	save := revision.Token{Epoch: 2, Revision: 50}
	for name, test := range map[string]struct {
		records map[string]*storev1.Replica
		want    Summary
	}{
		"nobody": {},
		"all have it, over two replicas": {
			map[string]*storev1.Replica{
				"a": replica(0, sidecars{sidecar("1", 50), sidecar("2", 60)}, nil),
				"b": replica(time.Second, sidecars{sidecar("3", 50)}, nil),
			},
			Summary{Sidecars: 3, Applied: 3, Replicas: 2},
		},
		"one lags": {
			map[string]*storev1.Replica{"a": replica(0, sidecars{sidecar("1", 50), sidecar("2", 49)}, nil)},
			Summary{Sidecars: 2, Applied: 1, Replicas: 1, Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 49}}}},
		},
		"one has nothing yet": {
			map[string]*storev1.Replica{"a": replica(0, sidecars{sidecar("1", 0)}, nil)},
			Summary{Sidecars: 1, Replicas: 1, Laggards: []Laggard{{ID: "1", Caller: "c"}}},
		},
		"a lost one counts": {
			map[string]*storev1.Replica{"a": replica(0, sidecars{sidecar("1", 50)}, sidecars{gone("2", 40, 9*time.Minute)})},
			Summary{
				Sidecars: 2, Applied: 1, Replicas: 1,
				Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}, Lost: now.Add(-9 * time.Minute)}},
			},
		},
		"a lost one enforces what it acknowledged": {
			map[string]*storev1.Replica{"a": replica(0, nil, sidecars{gone("2", 50, time.Minute)})},
			Summary{Sidecars: 1, Applied: 1, Replicas: 1},
		},
		"after ten minutes it is forgotten": {
			map[string]*storev1.Replica{"a": replica(0, nil, sidecars{gone("2", 40, 11*time.Minute)})},
			Summary{Replicas: 1},
		},
		"lost here, connected there": {
			map[string]*storev1.Replica{
				"a": replica(0, nil, sidecars{gone("2", 40, time.Minute)}),
				"b": replica(0, sidecars{sidecar("2", 50)}, nil),
			},
			Summary{Sidecars: 1, Applied: 1, Replicas: 2},
		},
		"lost here, then a goodbye there": {
			map[string]*storev1.Replica{"a": replica(0, nil, sidecars{gone("2", 40, 3*time.Minute)}), "b": bye("2", time.Minute)},
			Summary{Replicas: 2},
		},
		"a goodbye there, whose old stream here broke later": {
			map[string]*storev1.Replica{"a": replica(0, nil, sidecars{gone("2", 40, time.Minute)}), "b": bye("2", 90*time.Second)},
			Summary{Replicas: 2},
		},
		"a goodbye of the sidecar of a dead replica": {
			map[string]*storev1.Replica{
				"a": replica(2*time.Minute, sidecars{{Id: "2", Caller: "c", Revision: 40, ConnectTime: at(time.Hour)}}, nil), "b": bye("2", time.Minute),
			},
			Summary{Replicas: 1},
		},
		"a goodbye, then lost again": {
			map[string]*storev1.Replica{"a": replica(0, nil, sidecars{gone("2", 40, time.Minute)}), "b": bye("2", 3*time.Minute)},
			Summary{
				Sidecars: 1, Replicas: 2,
				Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}, Lost: now.Add(-time.Minute)}},
			},
		},
		"a goodbye says nothing of one that is connected": {
			map[string]*storev1.Replica{"a": replica(0, sidecars{sidecar("2", 40)}, nil), "b": bye("2", time.Second)},
			Summary{Sidecars: 1, Replicas: 2, Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}}}},
		},
		"connected twice counts with the lower revision": {
			map[string]*storev1.Replica{
				"a": replica(0, sidecars{sidecar("2", 50)}, nil),
				"b": replica(0, sidecars{sidecar("2", 40)}, nil),
			},
			Summary{Sidecars: 1, Replicas: 2, Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}}}},
		},
		"a dead replica's sidecars are lost": {
			map[string]*storev1.Replica{
				"a": replica(time.Minute, sidecars{sidecar("1", 40), sidecar("2", 40)}, nil),
				"b": replica(0, sidecars{sidecar("1", 50)}, nil),
			},
			Summary{
				Sidecars: 2, Applied: 1, Replicas: 1,
				Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}, Lost: now.Add(-time.Minute)}},
			},
		},
		"the same name under another certificate is another sidecar": {
			map[string]*storev1.Replica{"a": replica(0, sidecars{sidecar("1", 50), {Id: "1", Caller: "thief", Revision: 0}}, nil)},
			Summary{Sidecars: 2, Applied: 1, Replicas: 1, Laggards: []Laggard{{ID: "1", Caller: "thief"}}},
		},
		"what was acknowledged in another epoch says nothing": {
			map[string]*storev1.Replica{"a": {Time: at(0), Epoch: 1, Connected: sidecars{sidecar("1", 99)}}},
			Summary{Sidecars: 1, Replicas: 1, Laggards: []Laggard{{ID: "1", Caller: "c", Applied: revision.Token{Epoch: 1, Revision: 99}}}},
		},
		"the replica that lost it last knows best": {
			map[string]*storev1.Replica{
				"a": replica(0, nil, sidecars{gone("2", 50, 5*time.Minute)}),
				"b": replica(0, nil, sidecars{gone("2", 40, time.Minute)}),
			},
			Summary{Sidecars: 1, Replicas: 2, Laggards: []Laggard{{ID: "2", Caller: "c", Applied: revision.Token{Epoch: 2, Revision: 40}, Lost: now.Add(-time.Minute)}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 20 { // the order of a map must not matter
				if diff := cmp.Diff(test.want, summarize(test.records, save, now)); diff != "" {
					t.Fatalf("-want +got:\n%s", diff)
				}
			}
		})
	}
}
