// Package servetest issues certificates for tests of servers and their callers.
package servetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/allowednets/allowednets/internal/serve"
)

// Authority issues certificates.
type Authority struct {
	tb   testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	// PEM is the authority's own certificate.
	PEM []byte
}

// NewAuthority makes an authority that trusts nobody else.
func NewAuthority(tb testing.TB) *Authority {
	tb.Helper()
	a := &Authority{tb: tb}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	cert, key := a.sign(template)
	a.cert, a.key, a.PEM = template, key, cert
	return a
}

// Pair is a certificate and its key, PEM.
type Pair struct{ Cert, Key []byte }

// Issue makes a certificate for a server and for its callers with the names of the template. Of what else a certificate
// has, the template may set the extended key usages and the validity.
func (a *Authority) Issue(template x509.Certificate) Pair {
	a.tb.Helper()
	template.KeyUsage = x509.KeyUsageDigitalSignature
	if template.ExtKeyUsage == nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	cert, key := a.sign(&template)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.tb.Fatal(err)
	}
	return Pair{Cert: cert, Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}
}

// Named makes a certificate whose first DNS name, after which a caller is called, is name. It is good for localhost too.
func (a *Authority) Named(name string) Pair {
	a.tb.Helper()
	return a.Issue(x509.Certificate{DNSNames: []string{name, "localhost"}})
}

func (a *Authority) sign(template *x509.Certificate) ([]byte, *ecdsa.PrivateKey) {
	a.tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.tb.Fatal(err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		a.tb.Fatal(err)
	}
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Unix(0, 0), time.Unix(1<<33, 0) // also in a synctest bubble
	}
	issuer, issuerKey := a.cert, a.key
	if issuer == nil {
		issuer, issuerKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, &key.PublicKey, issuerKey)
	if err != nil {
		a.tb.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key
}

// Flags writes a pair, and a's own certificate as the authority of peers, into a new folder.
func (a *Authority) Flags(pair Pair) serve.TLSFlags {
	a.tb.Helper()
	dir := a.tb.TempDir()
	f := serve.TLSFlags{
		TLSCertFile: filepath.Join(dir, "cert.pem"), TLSKeyFile: filepath.Join(dir, "key.pem"), TLSCAFile: filepath.Join(dir, "ca.pem"),
	}
	for path, content := range map[string][]byte{f.TLSCertFile: pair.Cert, f.TLSKeyFile: pair.Key, f.TLSCAFile: a.PEM} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			a.tb.Fatal(err)
		}
	}
	return f
}
