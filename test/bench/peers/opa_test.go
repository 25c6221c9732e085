package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"github.com/allowednets/allowednets/test/stack"
)

// regoPolicy is the product's rule in OPA's language, with the lists as data.
const regoPolicy = `package mail

default allow := false

allow if not data.lists[input.mailbox]

allow if {
	some cidr in data.lists[input.mailbox]
	net.cidr_contains(cidr, input.client)
}
`

func opaData(lists lists) map[string]any {
	all := make(map[string]any)
	for mailbox, nets := range lists {
		all[mailbox] = opaList(nets)
	}
	return map[string]any{"lists": all}
}

func opaList(nets []string) []any {
	list := make([]any, len(nets))
	for i, n := range nets {
		list[i] = n
	}
	return list
}

// opa is OPA as a library: a prepared query over a store that keeps the lists in the form in which they are evaluated.
type opa struct {
	inProcess

	store storage.Store
	query rego.PreparedEvalQuery
}

func startOPA(tb testing.TB, lists lists) running {
	store := inmem.NewFromObjectWithOpts(opaData(lists), inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))
	query, err := rego.New(rego.Query("data.mail.allow"), rego.Module("mail.rego", regoPolicy), rego.Store(store)).PrepareForEval(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return &opa{store: store, query: query}
}

func (o *opa) Allowed(mailbox, client string) (bool, error) {
	results, err := o.query.Eval(context.Background(), rego.EvalInput(map[string]any{"mailbox": mailbox, "client": client}))
	return results.Allowed(), err
}

func (o *opa) Change(mailbox string, nets []string) error {
	return storage.WriteOne(context.Background(), o.store, storage.AddOp, storage.Path{"lists", mailbox}, opaList(nets))
}

// opaServer is OPA's own server over a unix socket.
type opaServer struct {
	*stack.Process

	http *http.Client
	dir  string
}

func startOPAServer(tb testing.TB, lists lists) running {
	tb.Helper()
	dir, err := os.MkdirTemp("", "opa-") // tb.TempDir is too long for unix sockets
	if err != nil {
		tb.Fatal(err)
	}
	data, err := json.Marshal(opaData(lists))
	if err != nil {
		tb.Fatal(err)
	}
	binary := filepath.Join(os.TempDir(), fmt.Sprintf("allowednets-peers-%d-opa", os.Getpid()))
	out, err := exec.CommandContext(tb.Context(), "go", "build", "-o", binary, "github.com/open-policy-agent/opa").CombinedOutput()
	if err != nil {
		tb.Fatalf("building OPA: %v\n%s", err, out)
	}
	tb.Cleanup(func() { _ = os.Remove(binary) }) // the first of several
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.WriteFile(path("mail.rego"), []byte(regoPolicy), 0o600), os.WriteFile(path("data.json"), data, 0o600)); err != nil {
		tb.Fatal(err)
	}
	o := &opaServer{dir: dir, http: overUnix(path("s.sock"))}
	o.Process = stack.NewProcess("opa", binary, []string{
		"run", "--server", "--addr", "unix://" + path("s.sock"), "--log-level", "error", "--skip-version-check", path("mail.rego"), path("data.json"),
	}, nil, path("log"))
	if err := o.Start(); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	if err := o.AwaitReady(ctx, func(context.Context) error {
		_, err := o.Allowed(mailbox(0), client(0))
		return err
	}); err != nil {
		tb.Fatal(errors.Join(err, o.Close()))
	}
	return o
}

func (o *opaServer) Allowed(mailbox, client string) (bool, error) {
	var answer struct {
		Result *bool `json:"result"`
	}
	err := post(o.http, "/v1/data/mail/allow", map[string]any{"input": map[string]string{"mailbox": mailbox, "client": client}}, &answer)
	if err == nil && answer.Result == nil {
		err = errors.New("OPA has no result")
	}
	return err == nil && *answer.Result, err
}

func (o *opaServer) Change(mailbox string, nets []string) error {
	body, err := json.Marshal(nets)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPut, "http://opa/v1/data/lists/"+url.PathEscape(mailbox), bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := o.http.Do(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusNoContent {
		err = fmt.Errorf("PUT: %s", resp.Status)
	}
	return errors.Join(err, resp.Body.Close())
}

func (o *opaServer) Close() error {
	o.http.CloseIdleConnections()
	return errors.Join(o.Kill(), os.RemoveAll(o.dir))
}

// overUnix is an HTTP client of what listens on a unix socket.
func overUnix(socket string) *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
}

// post sends a question in JSON and reads the answer.
func post(client *http.Client, path string, question, answer any) (err error) {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://peer"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", path, resp.Status, text)
	}
	return json.Unmarshal(text, answer)
}
