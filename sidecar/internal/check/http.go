package check

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"

	"github.com/allowednets/allowednets/internal/hops"
)

// maxBody bounds the body of a request in octets.
const maxBody = 64 << 10

// HTTPConfig configures [HTTP].
type HTTPConfig struct {
	Decider *Decider
	Faults  *Faults
	// Token is the bearer token that every request must carry; empty: none.
	Token string
	// DenialText is what a person reads; {address} stands for the client's address. Empty: nothing is said, and a denial
	// looks like a wrong password. It must be valid ([ValidateDenialText]).
	DenialText string
	// TrustedProxies may say on whose behalf they ask, or log in to Dovecot.
	TrustedProxies hops.Trusted
	// NginxBackends are the mail servers behind nginx's mail proxy, by its word for the protocol.
	NginxBackends map[string]netip.AddrPort
}

// HTTP is the handler of an HTTP listener: the doors that speak HTTP, by path.
type HTTP struct {
	token     string
	json      *jsonDoor
	dovecot   *dovecotDoor
	nginxAuth *nginxAuthDoor
	nginxMail *nginxMailDoor
}

// NewHTTP returns the handler.
func NewHTTP(cfg HTTPConfig) *HTTP {
	return &HTTP{
		token: cfg.Token, json: &jsonDoor{cfg.Decider, cfg.Faults}, dovecot: &dovecotDoor{cfg},
		nginxAuth: &nginxAuthDoor{cfg}, nginxMail: &nginxMailDoor{cfg},
	}
}

// ServeHTTP implements http.Handler. (It is not a ServeMux: that redirects a path with two slashes, and a Dovecot that is
// configured carelessly takes every answer it does not understand for consent.)
func (h *HTTP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	authorized := authorized(r, h.token)
	switch path := "/" + strings.Trim(r.URL.Path, "/"); {
	case path == "/v1/check":
		h.json.serve(w, r, authorized)
	case path == "/dovecot":
		h.dovecot.serve(w, r, authorized)
	case path == "/nginx/auth":
		h.nginxAuth.serve(w, r, authorized)
	case path == "/nginx/mail":
		h.nginxMail.serve(w, r, authorized)
	case strings.Contains(r.URL.RawQuery, "command="): // a Dovecot whose URL is wrong
		h.dovecot.serve(w, r, false)
	default:
		http.NotFound(w, r)
	}
}

// authorized compares the bearer token of a request with the one it needs, in constant time.
func authorized(r *http.Request, token string) bool {
	if token == "" {
		return true
	}
	scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	want, have := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(given))
	return strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(want[:], have[:]) == 1
}

// errTooLarge means that a body has more than [maxBody] octets.
var errTooLarge = errors.New("the body is too long")

// readBody reads a body. If the error is [errTooLarge], the connection may have some of it left.
func readBody(r *http.Request) ([]byte, error) {
	if 0 <= r.ContentLength && r.ContentLength <= maxBody {
		body := make([]byte, r.ContentLength)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err == nil && len(body) > maxBody {
		err = errTooLarge
	}
	return body, err
}

// Values of headers that all answers share, to save what Header.Set allocates. Nobody changes them.
//
//nolint:gochecknoglobals // constants in all but syntax
var (
	typeJSON  = []string{"application/json"}
	notStored = []string{"no-store"}
)
