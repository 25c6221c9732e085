package stack

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/allowednets/allowednets/internal/serve"
)

// certificateLife is long enough for a development stack and short enough that nobody keeps one.
const certificateLife = 90 * 24 * time.Hour

// Authority issues development certificates. Its key exists in memory only: each start makes a new one.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes an authority that writes into dir.
func NewAuthority(dir string) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making certificates: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Allowed Nets development"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certificateLife),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	a := &Authority{dir: dir, cert: template}
	key, der, err := a.sign(template)
	if err != nil {
		return nil, err
	}
	a.key = key
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("making certificates: %w", err)
	}
	return a, writePEM(a.caFile(), "CERTIFICATE", der)
}

func (a *Authority) caFile() string { return filepath.Join(a.dir, "ca.pem") }

// Issue makes a certificate for the first name, valid for all of them; IP addresses among them become IP names. It
// returns the files as a client or server of this product takes them.
func (a *Authority) Issue(name string, more ...string) (serve.TLSFlags, error) {
	return a.IssueUntil(time.Now().Add(certificateLife), name, more...)
}

// IssueUntil is Issue with an end of validity.
func (a *Authority) IssueUntil(end time.Time, name string, more ...string) (serve.TLSFlags, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, n := range append([]string{name}, more...) {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	key, der, err := a.sign(template)
	if err != nil {
		return serve.TLSFlags{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return serve.TLSFlags{}, fmt.Errorf("making certificates: %w", err)
	}
	files := serve.TLSFlags{
		TLSCertFile: filepath.Join(a.dir, name+".pem"), TLSKeyFile: filepath.Join(a.dir, name+"-key.pem"), TLSCAFile: a.caFile(),
	}
	if err := writePEM(files.TLSCertFile, "CERTIFICATE", der); err != nil {
		return serve.TLSFlags{}, err
	}
	return files, writePEM(files.TLSKeyFile, "PRIVATE KEY", keyDER)
}

// sign makes a key and its certificate, issued by a's key or, as long as there is none, by itself.
func (a *Authority) sign(template *x509.Certificate) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making certificates: %w", err)
	}
	issuer := a.key
	if issuer == nil {
		issuer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, issuer)
	if err != nil {
		return nil, nil, fmt.Errorf("making certificates: %w", err)
	}
	return key, der, nil
}

func writePEM(path, kind string, der []byte) error {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		return fmt.Errorf("making certificates: %w", err)
	}
	return nil
}

// tlsArgs are the flags that name files.
func tlsArgs(files serve.TLSFlags) []string {
	return []string{"--tls-cert-file", files.TLSCertFile, "--tls-key-file", files.TLSKeyFile, "--tls-ca-file", files.TLSCAFile}
}
