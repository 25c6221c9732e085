package web

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/allowednets/allowednets/services/dashboard/internal/login"
)

// redirect sends the browser to a path of this site: one that we made, or that login.LocalPath has looked at.
func redirect(w http.ResponseWriter, r *http.Request, status int, path string) {
	http.Redirect(w, r, path, status) //nolint:gosec // see above
}

// maxBody bounds a form: the longest text an operator can permit (512 KiB) with every character escaped.
const maxBody = 2 << 20

const (
	// maxStrangersBody bounds the form of somebody who is not logged in, which is shown to them again; smallBody is what
	// there may be any number of.
	maxStrangersBody = 96 << 10
	smallBody        = 4 << 10
	// largeWithin bounds the time from the head of a large form to the end of its answer.
	largeWithin = 15 * time.Second
)

// headers adds what every answer has. Nothing is loaded from elsewhere and nothing runs or is styled inline.
func headers(secure bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "+
			"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
		h.Set("Cache-Control", "no-store")
		if secure {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		next.ServeHTTP(w, r)
	})
}

// bounded bounds bodies: those of strangers more, and large ones also in their number, because an answer holds what was typed.
func (s *site) bounded(next http.Handler) http.Handler {
	strangers, users := newCrowd(16, 2), newCrowd(8, 2)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		most, small, who, crowd := int64(maxStrangersBody), int64(smallBody), s.cfg.Login.ClientNet(r), strangers
		if user, ok := login.UserOf(r.Context()); ok {
			most, small, who, crowd = maxBody, maxStrangersBody, user.Name, users
		}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		if r.ContentLength < 0 || r.ContentLength > small { // it is negative if the browser does not say
			if r.ContentLength > most {
				s.fail(w, r, &http.MaxBytesError{Limit: most})
				return
			}
			leave, ok := crowd.enter(who)
			if !ok {
				s.fail(w, r, errCrowded)
				return
			}
			defer leave()
			// Whoever reads slowly does not hold the place for long. Without a server below, as in tests, there is no deadline.
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(largeWithin))
		}
		next.ServeHTTP(w, r)
	})
}

// compressed compresses text for browsers that ask for it.
func compressed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept-Encoding")
		if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			next.ServeHTTP(w, r)
			return
		}
		z := &compressor{ResponseWriter: w}
		defer z.close()
		next.ServeHTTP(z, r)
	})
}

// compressor compresses what has a type that is worth it.
type compressor struct {
	http.ResponseWriter
	gzip    *gzip.Writer
	started bool
}

func (c *compressor) WriteHeader(code int) {
	h := c.Header()
	kind := h.Get("Content-Type")
	if !c.started && (strings.HasPrefix(kind, "text/") || strings.HasPrefix(kind, "image/svg")) && code != http.StatusNoContent && code != http.StatusNotModified {
		h.Set("Content-Encoding", "gzip")
		h.Del("Content-Length")
		c.gzip = gzip.NewWriter(c.ResponseWriter)
	}
	c.started = true
	c.ResponseWriter.WriteHeader(code)
}

func (c *compressor) Write(b []byte) (int, error) {
	if !c.started {
		c.WriteHeader(http.StatusOK)
	}
	if c.gzip == nil {
		return c.ResponseWriter.Write(b)
	}
	return c.gzip.Write(b)
}

// Unwrap is for [http.ResponseController].
func (c *compressor) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *compressor) close() {
	if c.gzip != nil {
		_ = c.gzip.Close() // the browser went away
	}
}

//go:embed static
var static embed.FS

const assetPrefix = "/assets/"

// asset is a file that never changes under its name, which holds a hash of its content.
type asset struct {
	kind    string
	content []byte
}

// assets serves them by their names, and knows the names.
type assets struct {
	files map[string]asset
	names map[string]string // by the plain name
}

func loadAssets() (assets, error) {
	a := assets{files: make(map[string]asset), names: make(map[string]string)}
	entries, err := fs.ReadDir(static, "static")
	if err != nil {
		return a, fmt.Errorf("reading the static files: %w", err)
	}
	for _, e := range entries {
		content, err := static.ReadFile("static/" + e.Name())
		if err != nil {
			return a, fmt.Errorf("reading the static files: %w", err)
		}
		sum := sha256.Sum256(content)
		extension := path.Ext(e.Name())
		name := strings.TrimSuffix(e.Name(), extension) + "." + hex.EncodeToString(sum[:5]) + extension
		a.files[name] = asset{mime.TypeByExtension(extension), content}
		a.names[e.Name()] = assetPrefix + name
	}
	return a, nil
}

// ServeHTTP serves a static file.
func (a assets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	file, ok := a.files[strings.TrimPrefix(r.URL.Path, assetPrefix)]
	if !ok {
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", file.kind)
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file.content))
}

// newMeter registers the metrics and returns what measures a route.
func newMeter(reg prometheus.Registerer) (func(pattern string, next http.Handler) http.Handler, error) {
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "allowednets_dashboard_request_seconds", Help: "Time to answer a request of a browser.",
		Buckets: []float64{.005, .01, .025, .05, .1, .2, .5, 1, 2.5, 10},
	}, []string{"route", "status"})
	if err := reg.Register(seconds); err != nil {
		return nil, fmt.Errorf("registering metrics: %w", err)
	}
	return func(pattern string, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			begin := time.Now()
			seen := &observer{ResponseWriter: w, status: http.StatusOK}
			next.ServeHTTP(seen, r)
			seconds.WithLabelValues(pattern, strconv.Itoa(seen.status)).Observe(time.Since(begin).Seconds())
		})
	}, nil
}

// observer sees the status of an answer.
type observer struct {
	http.ResponseWriter
	status int
	wrote  bool
}

func (o *observer) WriteHeader(code int) {
	if !o.wrote {
		o.status, o.wrote = code, true
	}
	o.ResponseWriter.WriteHeader(code)
}

// Unwrap is for [http.ResponseController].
func (o *observer) Unwrap() http.ResponseWriter { return o.ResponseWriter }
