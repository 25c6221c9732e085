package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"strconv"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// pair is what a Secret of a certificate holds.
type pair struct {
	leaf      *x509.Certificate
	believed  *x509.CertPool
	crt, pool []byte
}

func read(t *testing.T, objects []*unstructured.Unstructured, secret string) pair {
	t.Helper()
	data, _, _ := unstructured.NestedStringMap(find(t, objects, "Secret/"+secret).Object, "data")
	decoded := make(map[string][]byte)
	for key, value := range data {
		var err error
		if decoded[key], err = base64.StdEncoding.DecodeString(value); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := tls.X509KeyPair(decoded["tls.crt"], decoded["tls.key"])
	if err != nil {
		t.Fatalf("%s: %v", secret, err)
	}
	p := pair{leaf: keys.Leaf, believed: x509.NewCertPool(), crt: decoded["tls.crt"], pool: decoded["ca.crt"]}
	if !p.believed.AppendCertsFromPEM(p.pool) {
		t.Fatalf("%s believes nobody", secret)
	}
	return p
}

// believes reports whether p accepts q as a server of this name, and as a client.
func (p pair) believes(q pair, name string) error {
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		options := x509.VerifyOptions{Roots: p.believed, KeyUsages: []x509.ExtKeyUsage{usage}}
		if usage == x509.ExtKeyUsageServerAuth {
			options.DNSName = name
		}
		if _, err := q.leaf.Verify(options); err != nil {
			return err
		}
	}
	return nil
}

const (
	policyTLS  = "/allowednets-policy-tls"
	sidecarTLS = "mail/allowednets-sidecar-tls"
	etcdTLS    = "/allowednets-etcd-tls"
)

func TestCertificates(t *testing.T) {
	values := "{etcd: {mode: cluster}, sidecar: {namespaces: [mail]}, certificates: {generated: {authorities: "
	first := release{chart: control, cluster: running(), values: values + "[1]}}}"}.must(t)
	policyPair, sidecar, etcd := read(t, first, policyTLS), read(t, first, sidecarTLS), read(t, first, etcdTLS)

	for _, name := range []string{"allowednets-policy.mailnets.svc", "allowednets-policy.mailnets.svc.cluster.local", "localhost"} {
		if err := sidecar.believes(policyPair, name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"allowednets-etcd-0.allowednets-etcd.mailnets.svc", "allowednets-etcd-2.allowednets-etcd.mailnets.svc", "localhost"} {
		if err := etcd.believes(etcd, name); err != nil {
			t.Error(err)
		}
	}
	if got := sidecar.leaf.DNSNames[0]; got != "allowednets-sidecar" {
		t.Errorf("the sidecar calls as %s", got)
	}
	if client := read(t, first, "/allowednets-etcd-client-tls"); len(client.leaf.DNSNames) > 0 || client.leaf.Subject.CommonName == "" {
		t.Errorf("etcd would compare the client's names: %v", client.leaf.DNSNames)
	}
	if err := etcd.believes(sidecar, "allowednets-sidecar"); err == nil {
		t.Error("etcd believes a sidecar")
	}

	// An upgrade keeps them all, whatever else changes.
	upgrade := func(before []*unstructured.Unstructured, authorities string) []*unstructured.Unstructured {
		return release{chart: control, upgrade: true, cluster: running(before...), values: values + authorities + "}}}"}.must(t)
	}
	for _, secret := range []string{policyTLS, sidecarTLS, etcdTLS} {
		if !bytes.Equal(read(t, first, secret).crt, read(t, upgrade(first, "[1]"), secret).crt) {
			t.Errorf("an upgrade issued %s anew", secret)
		}
	}
	// Another generation issues all anew, by the same authority.
	renewed := upgrade(first, "[1], generation: 2")
	if now := read(t, renewed, policyTLS); bytes.Equal(policyPair.crt, now.crt) || !bytes.Equal(policyPair.pool, now.pool) {
		t.Error("generation 2 changed nothing, or the authority")
	}

	// A new authority comes in by steps, and in each of them those who have the step and those who do not believe each other.
	steps := [][]*unstructured.Unstructured{first}
	for _, authorities := range []string{"[1, 2]", "[2, 1]", "[2]"} {
		steps = append(steps, upgrade(steps[len(steps)-1], authorities))
	}
	for i := 1; i < len(steps); i++ {
		for _, secret := range []string{policyTLS, sidecarTLS} {
			before, after := read(t, steps[i-1], policyTLS), read(t, steps[i], secret)
			name := after.leaf.DNSNames[0]
			if err := before.believes(after, name); err != nil {
				t.Errorf("step %d: who has not taken it: %v", i, err)
			}
			if err := after.believes(before, before.leaf.DNSNames[0]); err != nil {
				t.Errorf("step %d: who has taken it: %v", i, err)
			}
		}
	}
	if err := read(t, steps[3], sidecarTLS).believes(policyPair, "localhost"); err == nil {
		t.Error("the old authority is still believed")
	}

	// An old certificate is issued anew by whatever upgrade comes.
	old := first
	for _, o := range old {
		if annotations := o.GetAnnotations(); annotations["allowednets/issued"] != "" {
			annotations["allowednets/issued"] = strconv.FormatInt(time.Now().Add(-181*24*time.Hour).Unix(), 10)
			o.SetAnnotations(annotations)
		}
	}
	if bytes.Equal(policyPair.crt, read(t, upgrade(old, "[1]"), policyTLS).crt) {
		t.Error("a certificate of 181 days is kept")
	}
}
