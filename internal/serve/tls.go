package serve

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// TLSFlags name the files of mutual TLS: our certificate and key, and the authorities that peers' certificates must come from.
type TLSFlags struct {
	TLSCertFile       string `name:"tls-cert-file" env:"ALLOWEDNETS_TLS_CERT_FILE" help:"Our certificate with its chain, PEM."`
	TLSKeyFile        string `name:"tls-key-file" env:"ALLOWEDNETS_TLS_KEY_FILE" help:"Our private key, PEM."`
	TLSCAFile         string `name:"tls-ca-file" env:"ALLOWEDNETS_TLS_CA_FILE" help:"Authorities that issue our peers' certificates, PEM."`
	InsecurePlaintext bool   `name:"insecure-plaintext" env:"ALLOWEDNETS_INSECURE_PLAINTEXT" help:"Run RPCs without TLS. Only between processes of one machine."`
}

// Credentials returns mutual TLS 1.3 from the files, or plain text if that was asked for. Anything in between is an error.
//
// The files are read again at every handshake, so that a rotated certificate is used without a restart, and parsed again if they
// changed; while they do not fit together, in the middle of a rotation, the last ones that did stay in use.
func (f TLSFlags) Credentials() (credentials.TransportCredentials, error) {
	files := f.TLSCertFile != "" || f.TLSKeyFile != "" || f.TLSCAFile != ""
	switch {
	case f.InsecurePlaintext && files:
		return nil, errors.New("--insecure-plaintext and --tls-*-file contradict each other: give one or the other")
	case f.InsecurePlaintext:
		return insecure.NewCredentials(), nil
	case f.TLSCertFile == "" || f.TLSKeyFile == "" || f.TLSCAFile == "":
		return nil, errors.New("--tls-cert-file, --tls-key-file and --tls-ca-file are all needed (or --insecure-plaintext, on loopback only)")
	}
	c := &fileCredentials{flags: f, last: new(atomic.Pointer[loaded])}
	if _, err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

// TLSCollector shows the state of the files, which it reads at each scrape. Without files it shows nothing.
func (f TLSFlags) TLSCollector() prometheus.Collector {
	return filesCollector{
		flags:  f,
		usable: prometheus.NewDesc("allowednets_tls_files_usable", "1 if the certificate, key and authorities can be read and fit together.", nil, nil),
		expiry: prometheus.NewDesc("allowednets_tls_certificate_expiry_timestamp_seconds", "When our certificate expires.", nil, nil),
	}
}

type filesCollector struct {
	flags          TLSFlags
	usable, expiry *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (c filesCollector) Describe(descs chan<- *prometheus.Desc) { descs <- c.usable; descs <- c.expiry }

// Collect implements prometheus.Collector.
func (c filesCollector) Collect(metrics chan<- prometheus.Metric) {
	if c.flags.TLSCertFile == "" {
		return
	}
	files, err := c.flags.read()
	var cfg *tls.Config
	if err == nil {
		cfg, err = c.flags.parse(files)
	}
	if err != nil {
		metrics <- prometheus.MustNewConstMetric(c.usable, prometheus.GaugeValue, 0)
		return
	}
	metrics <- prometheus.MustNewConstMetric(c.usable, prometheus.GaugeValue, 1)
	metrics <- prometheus.MustNewConstMetric(c.expiry, prometheus.GaugeValue, float64(cfg.Certificates[0].Leaf.NotAfter.Unix()))
}

// fileCredentials is mutual TLS with files that may be rotated.
type fileCredentials struct {
	flags TLSFlags
	last  *atomic.Pointer[loaded] // shared by clones
}

// loaded is what files mean. All connections share it until the files change: what each parsed for itself it would keep.
type loaded struct {
	files       tlsFiles
	credentials credentials.TransportCredentials
}

// load returns the credentials of the files as they are now.
func (c *fileCredentials) load() (credentials.TransportCredentials, error) {
	files, err := c.flags.read()
	if err != nil {
		return nil, err
	}
	if last := c.last.Load(); last != nil && last.files == files {
		return last.credentials, nil
	}
	cfg, err := c.flags.parse(files)
	if err != nil {
		return nil, err
	}
	now := &loaded{files, credentials.NewTLS(cfg)}
	c.last.Store(now)
	return now.credentials, nil
}

// tlsFiles is the text of the files.
type tlsFiles struct{ cert, key, authorities string }

func (f TLSFlags) read() (tlsFiles, error) {
	var files tlsFiles
	for _, file := range []struct {
		path, what string
		to         *string
	}{
		{f.TLSCertFile, "certificate", &files.cert}, {f.TLSKeyFile, "key", &files.key}, {f.TLSCAFile, "authorities", &files.authorities},
	} {
		pem, err := os.ReadFile(file.path)
		if err != nil {
			return tlsFiles{}, fmt.Errorf("reading %s: %w", file.what, err)
		}
		*file.to = string(pem)
	}
	return files, nil
}

func (f TLSFlags) parse(files tlsFiles) (*tls.Config, error) {
	cert, err := tls.X509KeyPair([]byte(files.cert), []byte(files.key))
	if err != nil {
		return nil, fmt.Errorf("reading certificate and key: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(files.authorities)) {
		return nil, fmt.Errorf("reading authorities: %s holds no certificate", f.TLSCAFile)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		RootCAs:                pool,
		ClientCAs:              pool,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		SessionTicketsDisabled: true, // a resumed session would skip a withdrawn authority
	}, nil
}

func (c *fileCredentials) current() credentials.TransportCredentials {
	current, err := c.load()
	if err != nil {
		current = c.last.Load().credentials
	}
	return current
}

func (c *fileCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.current().ClientHandshake(ctx, authority, conn)
}

func (c *fileCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.current().ServerHandshake(conn)
}

func (c *fileCredentials) Info() credentials.ProtocolInfo {
	return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13}).Info()
}

func (c *fileCredentials) Clone() credentials.TransportCredentials {
	clone := *c
	return &clone
}

func (c *fileCredentials) OverrideServerName(string) error {
	return errors.New("overriding the server name is not supported; use grpc.WithAuthority")
}
