package main

import (
	"encoding/base64"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
)

const integration = "../../integrations/roundcube/"

// webmail are the objects of the example chart of Roundcube, with more values.
func webmail(t *testing.T, values string) []*unstructured.Unstructured {
	t.Helper()
	return release{chart: roundcube, values: "allowednets-sidecar: {policyAddress: 'a:1'}\n" + values}.must(t)
}

func configMap(t *testing.T, objects []*unstructured.Unstructured, name string) map[string]string {
	t.Helper()
	return into[corev1.ConfigMap](t, find(t, objects, "ConfigMap//"+name).Object).Data
}

// TestPlugin: the pod has the plugin of integrations/ under the names that Roundcube looks for, and it asks where the sidecar listens.
func TestPlugin(t *testing.T) {
	objects := webmail(t, "")
	data := configMap(t, objects, "allowednets-roundcube-plugin")
	template, _ := templateOf(t, find(t, objects, "Deployment//allowednets-roundcube"))
	at := make(map[string]string) // what is mounted, by path
	for _, v := range template.Spec.Volumes {
		if v.Name == "plugin" {
			for _, item := range v.ConfigMap.Items {
				at[item.Path] = data[item.Key]
			}
		}
	}
	for path, original := range map[string]string{
		"allowednets.php": "", "allowednets_sidecar.php": "", "localization/en_US.inc": "", "localization/de_DE.inc": "", "config.inc.php": "config.inc.php.dist",
	} {
		if original == "" {
			original = path
		}
		text, err := os.ReadFile(integration + "allowednets/" + original)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Replace(string(text), "'http://127.0.0.1:7480';", "'unix:/run/allowednets/sidecar.sock';", 1)
		if diff := cmp.Diff(strings.TrimSpace(want), strings.TrimSpace(at[path])); diff != "" {
			t.Errorf("%s is not that of integrations/ (-there +here):\n%s", path, diff)
		}
	}
	languages, err := os.ReadDir(integration + "allowednets/localization")
	if err != nil || len(languages) != 2 {
		t.Errorf("the chart knows two languages, the plugin %v, %v", languages, err)
	}
	for values, want := range map[string]string{"": "['allowednets'];", "plugins: [archive]": "['allowednets', 'archive'];"} {
		if got := configMap(t, webmail(t, values), "allowednets-roundcube")["config.inc.php"]; !strings.Contains(got, "$config['plugins'] = "+want) {
			t.Errorf("the plugin is not the first:\n%s", got)
		}
	}
}

// TestBrowsersAddress: nginx believes those who are named, in the way of integrations/, and otherwise nobody.
func TestBrowsersAddress(t *testing.T) {
	original, err := os.ReadFile(integration + "real-ip.conf")
	if err != nil {
		t.Fatal(err)
	}
	const example = "set_real_ip_from 203.0.113.10;"
	for values, change := range map[string]*strings.Replacer{
		"proxies: [192.0.2.1, '2001:db8::1']":       strings.NewReplacer(example, "set_real_ip_from 192.0.2.1;\nset_real_ip_from 2001:db8::1;"),
		"proxies: [192.0.2.1]\nproxyProtocol: true": strings.NewReplacer(example, "set_real_ip_from 192.0.2.1;", "X-Forwarded-For;", "proxy_protocol;"),
	} {
		data := configMap(t, webmail(t, values), "allowednets-roundcube")
		if diff := cmp.Diff(strings.TrimSpace(change.Replace(string(original))), strings.TrimSpace(data["real-ip.conf"])); diff != "" {
			t.Errorf("%s (-want +got):\n%s", values, diff)
		}
		if !strings.Contains(data["nginx.conf"], "include real-ip.conf;") {
			t.Errorf("%s: nginx does not read it", values)
		}
		if strings.Contains(values, "proxyProtocol") != strings.Contains(data["nginx.conf"], "8080 proxy_protocol;") {
			t.Errorf("%s: nginx speaks another protocol:\n%s", values, data["nginx.conf"])
		}
	}
	if data := configMap(t, webmail(t, ""), "allowednets-roundcube"); strings.Contains(data["nginx.conf"], "real-ip") || data["real-ip.conf"] != "" {
		t.Error("nginx believes somebody, though nobody is named")
	}
}

// TestDesKey: made by an install, kept by upgrades, and in no other object.
func TestDesKey(t *testing.T) {
	key := func(objects []*unstructured.Unstructured) string {
		encoded, _, _ := unstructured.NestedString(find(t, objects, "Secret//allowednets-roundcube").Object, "data", "des_key")
		decoded, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			t.Fatal(err)
		}
		return string(decoded)
	}
	install := func(r release) []*unstructured.Unstructured {
		r.chart, r.values = roundcube, "allowednets-sidecar: {policyAddress: 'a:1'}"
		return r.must(t)
	}
	first := install(release{cluster: running()})
	if len(key(first)) != 24 {
		t.Errorf("%d characters", len(key(first)))
	}
	if kept := key(install(release{cluster: running(first...), upgrade: true})); kept != key(first) {
		t.Error("an upgrade logs everybody out")
	}
	if key(install(release{cluster: running()})) == key(first) {
		t.Error("two installs have the same key")
	}
	for _, o := range webmail(t, "desKeySecret: mine") {
		if o.GetKind() == "Secret" {
			t.Errorf("%s, though there is a Secret", id(o))
		}
	}
}

// TestForwarders: where a network of pods is believed, only those of them that forward may come; without one nobody is kept away.
func TestForwarders(t *testing.T) {
	sidecar := "allowednets-sidecar: {policyAddress: 'a:1', trustedProxies: "
	for name, test := range map[string]struct {
		release
		want string // the other peer than the rest of the world, or empty: no policy
		cut  []string
	}{
		"Dovecot, pods":           {release{chart: dovecot, values: sidecar + "[10.1.0.0/16, 'fd00::/64', 192.0.2.1]}"}, "webmail", []string{"10.1.0.0/16", "fd00::/64"}},
		"Dovecot, addresses":      {release{chart: dovecot, values: sidecar + "[192.0.2.1, 192.0.2.2/32, '2001:db8::1', '2001:db8::2/128']}"}, "", nil},
		"Dovecot, an IPv6 net":    {release{chart: dovecot, values: sidecar + "['fd00::/32']}"}, "webmail", []string{"fd00::/32"}},
		"Dovecot, switched off":   {release{chart: dovecot, values: sidecar + "[10.1.0.0/16]}\nnetworkPolicy: {enabled: false}"}, "", nil},
		"Roundcube, pods":         {release{chart: roundcube, values: sidecar + "[]}\nproxies: [10.1.0.0/16]\nnetworkPolicy: {proxies: [{podSelector: {matchLabels: {a: ingress}}}]}"}, "ingress", []string{"10.1.0.0/16"}},
		"Roundcube, addresses":    {release{chart: roundcube, values: sidecar + "[]}\nproxies: [10.1.0.1]"}, "", nil},
		"Roundcube, switched off": {release{chart: roundcube, values: sidecar + "[]}\nproxies: [10.1.0.0/16]\nnetworkPolicy: {enabled: false}"}, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if test.chart == dovecot {
				test.values += "\nusers: {a@example.org: x}"
			}
			var n network
			var self pod
			for _, o := range test.must(t) {
				if o.GetKind() == "NetworkPolicy" {
					p := into[networkingv1.NetworkPolicy](t, o.Object)
					p.Namespace = "mailnets"
					n = append(n, p)
				}
				if template, ok := templateOf(t, o); ok {
					self = pod{"mailnets", template.Labels}
				}
			}
			if test.want == "" {
				if len(n) > 0 {
					t.Fatalf("%+v", n)
				}
				return
			}
			if len(n) != 1 {
				t.Fatalf("%d policies", len(n))
			}
			port := map[string]string{dovecot: "imap", roundcube: "http"}[test.chart]
			for who, c := range map[string]struct {
				from pod
				want bool
			}{
				"webmail":           {pod{"mailnets", labels.Set{"allowednets/webmail": "true"}}, test.want == "webmail"},
				"webmail elsewhere": {pod{"other", labels.Set{"allowednets/webmail": "true"}}, false},
				"ingress":           {pod{"mailnets", labels.Set{"a": "ingress"}}, test.want == "ingress"},
				"a stranger":        {pod{"mailnets", labels.Set{"a": "b"}}, false},
			} {
				if got := n.permits(t, c.from, self, port); got != c.want {
					t.Errorf("%s: %v", who, got)
				}
			}
			if !n.permits(t, pod{"monitoring", nil}, self, "7491") {
				t.Error("the sidecar's metrics cannot be read")
			}
			var cut, world []string
			for _, peer := range n[0].Spec.Ingress[0].From {
				if peer.IPBlock != nil {
					world = append(world, peer.IPBlock.CIDR)
					cut = append(cut, peer.IPBlock.Except...)
				}
			}
			if diff := cmp.Diff(test.cut, cut); diff != "" {
				t.Errorf("kept away (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"0.0.0.0/0", "::/0"}, world); diff != "" {
				t.Errorf("let in (-want +got):\n%s", diff)
			}
		})
	}
}

// TestWholeMail: with Dovecot in the same release, webmail finds it, and each says to the other what it must.
func TestWholeMail(t *testing.T) {
	objects := scenarios(t)["examples/roundcube/ci/values-whole.yaml"].must(t)
	find(t, objects, "Service//allowednets")
	if got := configMap(t, objects, "allowednets-roundcube")["config.inc.php"]; !strings.Contains(got, "$config['imap_host'] = 'allowednets:143';") {
		t.Errorf("webmail asks another mail server:\n%s", got)
	}
	if got := configMap(t, objects, "allowednets")["dovecot.conf"]; !strings.Contains(got, "login_trusted_networks = 10.244.0.0/16\n") {
		t.Errorf("Dovecot does not believe webmail:\n%s", got)
	}
	for _, o := range webmail(t, "") {
		if o.GetName() == "allowednets" {
			t.Errorf("%s, though nobody asked for a Dovecot", id(o))
		}
	}
}

// TestNames: no two objects of a release have the same name, whatever the release is called.
func TestNames(t *testing.T) {
	for _, name := range []string{"mail", "roundcube", "my-roundcube"} {
		whole := scenarios(t)["examples/roundcube/ci/values-whole.yaml"]
		whole.name = name
		seen := make(map[string]bool)
		for _, o := range whole.must(t) {
			if seen[id(o)] {
				t.Errorf("release %s: two of %s", name, id(o))
			}
			seen[id(o)] = true
		}
	}
	alone := release{name: "roundcube", chart: roundcube, values: "allowednets-sidecar: {policyAddress: 'a:1'}"}
	find(t, alone.must(t), "Deployment//roundcube") // once is enough
}
