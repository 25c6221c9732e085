package serve_test

import (
	"bytes"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/allowednets/allowednets/internal/serve"
)

func TestHealthcheck(t *testing.T) {
	var notReady error
	server := httptest.NewServer(serve.Admin(prometheus.NewRegistry(), func() error { return notReady }))
	t.Cleanup(server.Close)
	address := strings.TrimPrefix(server.URL, "http://")
	_, port, _ := strings.Cut(address, ":")
	gone := httptest.NewServer(nil)
	gone.Close()

	for _, test := range []struct {
		name     string
		notReady error
		listen   string
		env      string
		args     []string
		code     int
		out, err string
	}{
		{name: "ready", listen: address, code: 0, out: "ok\n"},
		{name: "not ready", listen: address, notReady: errors.New("the store was not loaded yet"), code: 1, err: "healthcheck: 503 Service Unavailable: the store was not loaded yet\n"},
		{name: "alive though not ready", listen: address, notReady: errors.New("not yet"), args: []string{"--live"}, code: 0, out: "ok\n"},
		{name: "a listen address without host", listen: ":" + port, code: 0, out: "ok\n"},
		{name: "a listen address for all", listen: "0.0.0.0:" + port, code: 0, out: "ok\n"},
		{name: "the environment", listen: strings.TrimPrefix(gone.URL, "http://"), env: address, code: 0, out: "ok\n"},
		{name: "the flag before the environment", listen: ":1", env: ":1", args: []string{"--admin-listen=" + address}, code: 0, out: "ok\n"},
		{name: "nobody there", listen: strings.TrimPrefix(gone.URL, "http://"), code: 1, err: "connection refused"},
		{name: "no port", listen: "localhost", code: 2, err: `not ["localhost"]`},
		{name: "an argument", listen: address, args: []string{"readyz"}, code: 2, err: `"readyz"`},
		{name: "an unknown flag", listen: address, args: []string{"--liv"}, code: 2, err: "-liv"},
	} {
		t.Run(test.name, func(t *testing.T) {
			notReady = test.notReady
			if test.env != "" {
				t.Setenv("ALLOWEDNETS_ADMIN_LISTEN", test.env)
			}
			var out, errOut bytes.Buffer
			code := serve.Healthcheck(t.Context(), test.listen, test.args, &out, &errOut)
			if code != test.code || out.String() != test.out || !strings.Contains(errOut.String(), test.err) {
				t.Errorf("exit %d, %q, %q; want %d, %q, %q", code, &out, &errOut, test.code, test.out, test.err)
			}
			if code == 0 && errOut.Len() > 0 {
				t.Errorf("it complains: %s", &errOut)
			}
		})
	}
}
