package main

import (
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// pod is one end of a connection.
type pod struct {
	namespace string
	labels    labels.Set
}

// network is what NetworkPolicies permit, by the rules of the API's documentation. (No cluster of the tests enforces them.)
type network []networkingv1.NetworkPolicy

func selects(t *testing.T, selector *metav1.LabelSelector, set labels.Set) bool {
	t.Helper()
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		t.Fatal(err)
	}
	return s.Matches(set)
}

func (n network) permits(t *testing.T, from, to pod, port string) bool {
	t.Helper()
	in, out := true, true
	var inRules, outRules bool
	for _, p := range n {
		if to.namespace == p.Namespace && selects(t, &p.Spec.PodSelector, to.labels) && slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
			in = false
			for _, rule := range p.Spec.Ingress {
				inRules = inRules || ports(rule.Ports, port) && peers(t, rule.From, p.Namespace, from)
			}
		}
		if from.namespace == p.Namespace && selects(t, &p.Spec.PodSelector, from.labels) && slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) {
			out = false
			for _, rule := range p.Spec.Egress {
				outRules = outRules || ports(rule.Ports, port) && peers(t, rule.To, p.Namespace, to)
			}
		}
	}
	return (in || inRules) && (out || outRules)
}

func ports(permitted []networkingv1.NetworkPolicyPort, port string) bool {
	return len(permitted) == 0 || slices.ContainsFunc(permitted, func(p networkingv1.NetworkPolicyPort) bool {
		return p.Port == nil || *p.Port == intstr.Parse(port)
	})
}

func peers(t *testing.T, permitted []networkingv1.NetworkPolicyPeer, home string, who pod) bool {
	t.Helper()
	if len(permitted) == 0 {
		return true
	}
	return slices.ContainsFunc(permitted, func(p networkingv1.NetworkPolicyPeer) bool {
		switch {
		case p.IPBlock != nil:
			return false
		case p.NamespaceSelector == nil && who.namespace != home,
			p.NamespaceSelector != nil && !selects(t, p.NamespaceSelector, labels.Set{"kubernetes.io/metadata.name": who.namespace}),
			p.PodSelector != nil && !selects(t, p.PodSelector, who.labels):
			return false
		}
		return true
	})
}

func TestNetworkPolicies(t *testing.T) {
	objects := release{chart: control, values: `
etcd: {mode: cluster}
dashboard: {enabled: true, configSecret: a, publicURL: "https://a"}
networkPolicy:
  monitoring: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
  browsers: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress}}}]
`}.must(t)
	var n network
	who := map[string]pod{
		"a sidecar":           {"mail", labels.Set{"allowednets/sidecar": "true"}},
		"a stranger":          {"mail", labels.Set{"app": "x"}},
		"a stranger at home":  {"mailnets", labels.Set{"app": "x"}},
		"Prometheus":          {"monitoring", labels.Set{"app": "prometheus"}},
		"the ingress":         {"ingress", labels.Set{"app": "nginx"}},
		"the cluster's DNS":   {"kube-system", labels.Set{"k8s-app": "kube-dns"}},
		"a policy abroad":     {"mail", nil}, // the labels of a policy pod, in another namespace
		"the policy service":  {},
		"the dashboard":       {},
		"an etcd":             {},
		"the chart elsewhere": {},
	}
	for _, o := range objects {
		if o.GetKind() == "NetworkPolicy" {
			p := into[networkingv1.NetworkPolicy](t, o.Object)
			p.Namespace = "mailnets"
			n = append(n, p)
		}
		if template, ok := templateOf(t, o); ok {
			name := map[string]string{"policy": "the policy service", "dashboard": "the dashboard", "etcd": "an etcd"}[template.Labels["app.kubernetes.io/component"]]
			who[name] = pod{"mailnets", template.Labels}
		}
	}
	who["a policy abroad"] = pod{"mail", who["the policy service"].labels}
	delete(who, "the chart elsewhere")

	for _, test := range []struct {
		from, to, port string
		want           bool
	}{
		{"a sidecar", "the policy service", "grpc", true},
		{"the dashboard", "the policy service", "grpc", true},
		{"a stranger", "the policy service", "grpc", false},
		{"a stranger at home", "the policy service", "grpc", false},
		{"a sidecar", "the policy service", "an-admin", false},
		{"Prometheus", "the policy service", "an-admin", true},
		{"Prometheus", "the policy service", "grpc", false},
		{"Prometheus", "the dashboard", "an-admin", true},
		{"Prometheus", "an etcd", "metrics", true},
		{"the policy service", "an etcd", "client", true},
		{"a policy abroad", "an etcd", "client", false},
		{"the policy service", "an etcd", "peer", false},
		{"an etcd", "an etcd", "peer", true},
		{"an etcd", "an etcd", "client", false},
		{"a sidecar", "an etcd", "client", false},
		{"the dashboard", "an etcd", "client", false},
		{"a stranger at home", "an etcd", "client", false},
		{"Prometheus", "an etcd", "client", false},
		{"the ingress", "the dashboard", "http", true},
		{"a stranger", "the dashboard", "http", false},
		{"the policy service", "the cluster's DNS", "53", true},
		{"an etcd", "the cluster's DNS", "53", true},
		{"the policy service", "a stranger", "443", false},
		{"the dashboard", "a stranger", "443", false},
		{"an etcd", "the policy service", "grpc", false},
	} {
		if got := n.permits(t, who[test.from], who[test.to], test.port); got != test.want {
			t.Errorf("%s → %s:%s: %v", test.from, test.to, test.port, got)
		}
	}

	for _, o := range (release{chart: control, values: "networkPolicy: {enabled: false}"}).must(t) {
		if o.GetKind() == "NetworkPolicy" {
			t.Errorf("%s, though switched off", id(o))
		}
	}
}
