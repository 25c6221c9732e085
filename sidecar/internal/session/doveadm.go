package session

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/allowednets/allowednets/internal/serve"
)

const (
	maxRequest = 10 * time.Second // for one request to doveadm, answer included
	maxWho     = 64 << 20         // octets; some 600,000 connections
	maxKicked  = 1 << 20          // octets
	// batch is how many kicks are in one request. Doveadm reads the whole list of connections for each: measured 0.17 s with 50,000.
	batch = 10

	apiPath = "/doveadm/v1"
	// nobody is the exit code of a kick that found no connection (EX_NOUSER).
	nobody = 68
)

// Doveadm is Dovecot's HTTP API (https://doc.dovecot.org/2.3/admin_manual/doveadm_http_api/). It is safe for concurrent use.
type Doveadm struct {
	url, authorization string
	http               *http.Client
}

// Pair is what doveadm can end: all connections of a user from an address, whatever their service.
type Pair struct {
	User    string `json:"username"` // as the userdb has it
	Address string `json:"ip"`       // of the client, as far as Dovecot knows it; may be empty
}

// Connection is an open session, as doveadm's who shows it.
type Connection struct {
	Pair
	Service string `json:"service"`
}

// NewDoveadm returns a client of the API at an URL such as http://127.0.0.1:7482. Without TLS only loopback is accepted. The
// key is doveadm_api_key.
func NewDoveadm(address, key string) (*Doveadm, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, errors.New("it is not a URL such as http://127.0.0.1:7482")
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.User != nil, u.RawQuery != "", u.Fragment != "", u.Opaque != "":
		return nil, errors.New("it is not a URL such as http://127.0.0.1:7482")
	case u.Path != "" && u.Path != "/" && u.Path != apiPath:
		return nil, fmt.Errorf("the path %q is not doveadm's; leave it away", u.Path)
	case u.Scheme == "http" && !serve.IsLoopback(net.JoinHostPort(u.Hostname(), port)):
		return nil, fmt.Errorf("%s is not on loopback, and the key would cross the network in clear text; use https", u.Host)
	}
	return &Doveadm{
		url:           u.Scheme + "://" + u.Host + apiPath,
		authorization: "X-Dovecot-API " + base64.StdEncoding.EncodeToString([]byte(key)),
		http: &http.Client{
			Timeout: maxRequest,
			// No proxy of the environment; doveadm closes each connection itself.
			Transport:     &http.Transport{DisableKeepAlives: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Who returns all connections.
func (d *Doveadm) Who(ctx context.Context) ([]Connection, error) {
	replies, err := d.call(ctx, maxWho, []any{[]any{"who", map[string]bool{"separateConnections": true}, "0"}})
	if err != nil {
		return nil, fmt.Errorf("doveadm who: %w", err)
	}
	var connections []Connection
	if err := replies[0].into(&connections); err != nil {
		return nil, fmt.Errorf("doveadm who: %w", err)
	}
	return connections, nil
}

// Kick ends all connections of each pair, and returns the pairs that had any. It goes on after an error. The user is a mask for
// doveadm, in which * and ? stand for others and case does not matter.
func (d *Doveadm) Kick(ctx context.Context, pairs []Pair) (kicked []Pair, err error) {
	var errs []error
	for some := range slices.Chunk(pairs, batch) {
		commands := make([]any, len(some))
		for i, p := range some {
			commands[i] = []any{"kick", map[string][]string{"mask": {p.User, p.Address}}, strconv.Itoa(i)}
		}
		replies, err := d.call(ctx, maxKicked, commands)
		if err != nil {
			return kicked, errors.Join(append(errs, fmt.Errorf("doveadm kick: %w", err))...)
		}
		for i, r := range replies {
			err := r.into(nil)
			if failure, ok := errors.AsType[*replyError](err); ok && failure.ExitCode == nobody {
				continue // gone by itself
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("doveadm kick: %w", err))
				continue
			}
			kicked = append(kicked, some[i])
		}
	}
	return kicked, errors.Join(errs...)
}

// reply is [kind, body, tag].
type reply []json.RawMessage

// replyError is what doveadm says of a command that failed.
type replyError struct {
	Type     string `json:"type"`
	ExitCode int    `json:"exitCode"`
}

func (e *replyError) Error() string { return fmt.Sprintf("%.60q, exit code %d", e.Type, e.ExitCode) }

// into reads the body of a command that worked into value, unless that is nil.
func (r reply) into(value any) error {
	var kind string
	if err := json.Unmarshal(r[0], &kind); err != nil {
		return err
	}
	switch kind {
	case "doveadmResponse":
		if value == nil {
			return nil
		}
		return json.Unmarshal(r[1], value)
	case "error":
		failure := new(replyError)
		if err := json.Unmarshal(r[1], failure); err != nil {
			return err
		}
		return failure
	}
	return fmt.Errorf("an answer of the unknown kind %.60q", kind)
}

// call executes commands, tagged by their numbers, and returns their replies in order. Whatever is not exactly one reply to
// each is an error.
func (d *Doveadm) call(ctx context.Context, most int64, commands []any) ([]reply, error) {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(commands); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url, &body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", d.authorization)
	resp, err := d.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(answer)) > most {
		return nil, fmt.Errorf("the answer is longer than %d octets", most)
	}
	var replies []reply
	if err := json.Unmarshal(answer, &replies); err != nil {
		return nil, fmt.Errorf("the answer cannot be read: %w", err)
	}
	if len(replies) != len(commands) {
		return nil, fmt.Errorf("%d commands, but %d answers", len(commands), len(replies))
	}
	for i, r := range replies {
		if len(r) != 3 || string(r[2]) != strconv.Quote(strconv.Itoa(i)) {
			return nil, fmt.Errorf("answer %d does not belong to its command", i)
		}
	}
	return replies, nil
}
