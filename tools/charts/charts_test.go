package main

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/yaml"
)

func TestREADME(t *testing.T) {
	for _, dir := range []string{control, charts + "/allowednets-sidecar", dovecot, roundcube} {
		want, err := readme(dir)
		if err != nil {
			t.Errorf("%s: %v", dir, err)
			continue
		}
		got, err := os.ReadFile(dir + "/README.md")
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s: run `make charts` (-want +got):\n%s", dir, diff)
		}
	}
}

func TestLint(t *testing.T) {
	for name, r := range scenarios(t) {
		var values map[string]any
		if err := yaml.Unmarshal([]byte(r.values), &values); err != nil {
			t.Fatal(err)
		}
		for _, message := range lint.RunAll(r.chart, values, "mailnets").Messages {
			if message.Severity > support.InfoSev {
				t.Errorf("%s: %v", name, message)
			}
		}
	}
}

// TestScenarios renders every values-*.yaml, and asks Kubernetes' own rules about what comes out.
func TestScenarios(t *testing.T) {
	valid := strictly(t)
	restricted, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range scenarios(t) {
		t.Run(name, func(t *testing.T) {
			seen := make(map[string]bool)
			pods := 0
			for _, o := range r.must(t) {
				if seen[id(o)] {
					t.Errorf("%s is there twice", id(o))
				}
				seen[id(o)] = true
				if err := valid(o); err != nil {
					t.Errorf("%s: %v", id(o), err)
				}
				template, ok := templateOf(t, o)
				if !ok {
					continue
				}
				pods++
				level := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
				if result := policy.AggregateCheckResults(restricted.EvaluatePod(level, &template.ObjectMeta, &template.Spec)); !result.Allowed {
					t.Errorf("%s is not restricted: %s", id(o), result.ForbiddenDetail())
				}
				wellKept(t, id(o), template.Spec)
			}
			if pods == 0 {
				t.Error("it runs nothing")
			}
		})
	}
}

func templateOf(t *testing.T, o *unstructured.Unstructured) (corev1.PodTemplateSpec, bool) {
	t.Helper()
	template, ok, _ := unstructured.NestedMap(o.Object, "spec", "template")
	if !ok {
		return corev1.PodTemplateSpec{}, false
	}
	return into[corev1.PodTemplateSpec](t, template), true
}

// wellKept checks what Pod Security does not ask for.
func wellKept(t *testing.T, name string, spec corev1.PodSpec) {
	t.Helper()
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Errorf("%s can talk to the API server", name)
	}
	if spec.ServiceAccountName == "" {
		t.Errorf("%s has no service account of its own", name)
	}
	volumes := make(map[string]bool)
	for _, v := range spec.Volumes {
		volumes[v.Name] = true
	}
	for _, c := range append(spec.InitContainers, spec.Containers...) {
		if c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
			t.Errorf("%s: %s can write to its image", name, c.Name)
		}
		if c.ReadinessProbe == nil || c.LivenessProbe == nil {
			t.Errorf("%s: %s has no probes", name, c.Name)
		}
		if len(c.Resources.Requests) == 0 || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s: %s has no resources", name, c.Name)
		}
	}
}

// TestBadValues: each is refused before anything is installed, with a sentence that names the value.
func TestBadValues(t *testing.T) {
	mail := "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1'}\n"
	web := "allowednets-sidecar: {policyAddress: 'a:1'}\n"
	for name, test := range map[string]struct{ chart, values, want string }{
		"an unknown key":                       {control, "polcy: {}", "additional properties 'polcy' not allowed"},
		"an unknown key below":                 {control, "etcd: {cluster: {replica: 5}}", "at '/etcd/cluster': additional properties 'replica' not allowed"},
		"an unknown key of a caller":           {control, "callers: {extra: [{name: a, rpcs: [b], domain: c}]}", "additional properties 'domain' not allowed"},
		"an unknown mode":                      {control, "etcd: {mode: clustered}", "at '/etcd/mode': value must be one of 'embedded', 'cluster', 'external'"},
		"an even cluster":                      {control, "etcd: {mode: cluster, cluster: {replicas: 4}}", "at '/etcd/cluster/replicas': value must be one of 3, 5"},
		"a net without length":                 {control, "policy: {permitNets: [10.0.0.0]}", "at '/policy/permitNets/0': '10.0.0.0' does not match pattern"},
		"a time without zone":                  {control, "store: {createUntil: '2026-12-01T12:00:00'}", "at '/store/createUntil'"},
		"etcd in plain text":                   {control, "etcd: {mode: external, external: {endpoints: ['http://etcd:2379'], tlsSecret: a}}", "'http://etcd:2379' does not match pattern"},
		"two policy services, one etcd":        {control, "policy: {replicas: 2}", "policy.replicas is 2, but an embedded etcd is of one pod alone: set policy.replicas to 1, or etcd.mode to cluster or external"},
		"an external etcd without endpoints":   {control, "etcd: {mode: external}", "etcd.external.endpoints is empty: with etcd.mode external give the client URLs"},
		"an external etcd without certificate": {control, "etcd: {mode: external, external: {endpoints: ['https://etcd:2379']}}", "etcd.external.tlsSecret is empty: name the Secret with the client certificate"},
		"endpoints that nobody uses":           {control, "etcd: {external: {endpoints: ['https://etcd:2379']}}", "etcd.external.endpoints is given, but etcd.mode is embedded"},
		"a missing certificate":                {control, "certificates: {mode: existing}", "certificates.existing.policy is empty: name its Secret (tls.crt, tls.key, ca.crt), or set certificates.mode to generated or cert-manager"},
		"a missing certificate of etcd":        {control, "{etcd: {mode: cluster}, certificates: {mode: existing, existing: {policy: a, etcd: b}}}", "certificates.existing.etcdClient is empty"},
		"a missing certificate of a dashboard": {control, "{certificates: {mode: existing, existing: {policy: a}}, dashboard: {enabled: true, configSecret: a, publicURL: 'https://a'}}", "certificates.existing.dashboard is empty"},
		"an Issuer for other namespaces":       {control, "{certificates: {mode: cert-manager, certManager: {issuerRef: {name: a, kind: Issuer}}}, sidecar: {namespaces: [mail]}}", "sidecar.namespaces names mail, and only a ClusterIssuer can issue there"},
		"one authority for both":               {control, "{etcd: {mode: cluster}, certificates: {mode: cert-manager, certManager: {issuerRef: {name: a, kind: Issuer}, etcdIssuerRef: {name: a, kind: Issuer}}}}", "a sidecar's certificate would open etcd"},
		"Secrets that nobody makes":            {control, "{certificates: {mode: existing, existing: {policy: a}}, sidecar: {namespaces: [mail]}}", "with certificates.mode existing none are issued"},
		"a dashboard without files":            {control, "dashboard: {enabled: true, publicURL: 'https://a'}", "dashboard.configSecret is empty: name the Secret"},
		"a dashboard without address":          {control, "dashboard: {enabled: true, configSecret: a}", "dashboard.publicURL is empty: say where browsers find the dashboard"},
		"two directories":                      {control, "dashboard: {enabled: true, configSecret: a, publicURL: 'https://a', directorySQL: b}", "give either dashboard.directory or dashboard.directorySQL"},
		"a dashboard for nobody":               {control, "dashboard: {enabled: true, configSecret: a, publicURL: 'https://a', users: ''}", "nobody could log in to the dashboard"},
		"two callers of one name":              {control, "callers: {extra: [{name: allowednets-cli, rpcs: [a]}]}", "callers: a name stands there twice"},
		"a sidecar without policy service":     {dovecot, "users: {a@example.org: x}", "allowednets-sidecar.policyAddress is empty: name the policy service, such as allowednets-policy.allowednets.svc:7443"},
		"an unknown key of a sidecar":          {dovecot, mail + "  ", ""},
		"a mistyped key of a sidecar":          {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAdress: 'a:1'}", "additional properties 'policyAdress' not allowed"},
		"a policy address without port":        {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: policy}", "at '/policyAddress': 'policy' does not match pattern"},
		"a door for everybody":                 {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1', httpListen: ':7480'}", "at '/httpListen': ':7480' does not match pattern"},
		"a door that Dovecot does not know":    {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1', httpListen: '127.0.0.1:1'}", "this example's Dovecot asks 127.0.0.1:7480"},
		"doveadm without its key":              {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1', doveadmKeySecret: ''}", "doveadmURL and allowednets-sidecar.doveadmKeySecret need each other"},
		"another doveadm":                      {dovecot, "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1', doveadmURL: 'http://127.0.0.1:1'}", "this example's Dovecot listens on http://127.0.0.1:7482"},
		"good values of webmail":               {roundcube, web, ""},
		"an unknown key of webmail":            {roundcube, web + "proxy: [10.0.0.1]", "additional properties 'proxy' not allowed"},
		"an unknown key of webmail below":      {roundcube, web + "networkPolicy: {peers: []}", "at '/networkPolicy': additional properties 'peers' not allowed"},
		"webmail without policy service":       {roundcube, "", "allowednets-sidecar.policyAddress is empty: name the policy service"},
		"webmail that cannot ask":              {roundcube, "allowednets-sidecar: {policyAddress: 'a:1', socket: ''}", "allowednets-sidecar.socket is empty, but this example's plugin asks there"},
		"a mail server without port":           {roundcube, web + "imap: mail", "at '/imap': 'mail' does not match pattern"},
		"PHP in place of a mail server":        {roundcube, web + `imap: "a'.system('b').':143"`, "at '/imap'"},
		"a plugin that is a path":              {roundcube, web + "plugins: [../a]", "at '/plugins/0': '../a' does not match pattern"},
		"the plugin again":                     {roundcube, web + "plugins: [archive, allowednets]", "at '/plugins/1'"},
		"two pods, two databases":              {roundcube, web + "replicas: 2", "replicas is 2, but each pod's SQLite has sessions of its own"},
		"a volume for no database":             {roundcube, web + "databaseSecret: a\ndataClaim: b", "dataClaim is for SQLite, which databaseSecret replaces"},
		"every pod a proxy":                    {roundcube, web + "proxies: [10.1.2.3, 10.0.0.0/8]", "proxies believes everybody in 10.0.0.0/8: say in networkPolicy.proxies which pods there are proxies"},
		"every IPv6 pod a proxy":               {roundcube, web + "proxies: ['fd00::/32']", "proxies believes everybody in fd00::/32"},
		"a proxy by its name":                  {roundcube, web + "proxies: [ingress]", "at '/proxies/0': 'ingress' does not match pattern"},
		"a Dovecot of webmail without users":   {roundcube, web + "withDovecot: true\ndovecot: {allowednets-sidecar: {policyAddress: 'a:1'}}", "users is empty, so nobody could log in"},
		"a mistyped key of webmail's Dovecot":  {roundcube, web + "withDovecot: true\ndovecot: {user: {a: b}}", "additional properties 'user' not allowed"},
		"a Dovecot without users":              {dovecot, "allowednets-sidecar: {policyAddress: 'a:1'}", "users is empty, so nobody could log in"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := release{chart: test.chart, values: test.values}.render(t)
			switch {
			case test.want == "":
				if err != nil {
					t.Errorf("good values are refused: %v", err)
				}
			case err == nil || !strings.Contains(err.Error(), test.want):
				t.Errorf("%v; want %q", err, test.want)
			}
		})
	}
}

// args are those of a container.
func args(t *testing.T, objects []*unstructured.Unstructured, workload, container string) []string {
	t.Helper()
	template, _ := templateOf(t, find(t, objects, workload))
	for _, c := range append(template.Spec.InitContainers, template.Spec.Containers...) {
		if c.Name == container {
			return c.Args
		}
	}
	t.Fatalf("%s has no container %s", workload, container)
	return nil
}

// TestCreateStore: a store is created by an install for an hour, and otherwise only when it is asked for.
func TestCreateStore(t *testing.T) {
	for name, test := range map[string]struct {
		release
		want bool
	}{
		"install":            {release{cluster: running()}, true},
		"upgrade":            {release{cluster: running(), upgrade: true}, false},
		"helm template":      {release{}, false},
		"a template, asked":  {release{values: "store: {createUntil: '2026-12-01T12:00:00Z'}"}, true},
		"an upgrade, asked":  {release{cluster: running(), upgrade: true, values: "store: {createUntil: '2026-12-01T12:00:00Z'}"}, true},
		"install, a cluster": {release{cluster: running(), values: "etcd: {mode: cluster}"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			test.chart = control
			workload := "StatefulSet//allowednets-policy"
			if strings.Contains(test.values, "cluster") {
				workload = "Deployment//allowednets-policy"
			}
			all := args(t, test.must(t), workload, "policy")
			i := slices.IndexFunc(all, func(a string) bool { return strings.HasPrefix(a, "--create-store") })
			if (i >= 0) != test.want {
				t.Fatalf("%q", all)
			}
			if i < 0 {
				return
			}
			until, err := time.Parse(time.RFC3339, strings.TrimPrefix(all[i], "--create-store-until="))
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(until); test.values == "" && (left < 59*time.Minute || left > time.Hour) {
				t.Errorf("for %v", left)
			}
		})
	}
}

// TestWorkloads is what a policy service is with each kind of etcd.
func TestWorkloads(t *testing.T) {
	embedded := into[appsv1.StatefulSet](t, find(t, release{chart: control}.must(t), "StatefulSet//allowednets-policy").Object)
	if *embedded.Spec.Replicas != 1 || len(embedded.Spec.VolumeClaimTemplates) != 1 {
		t.Errorf("embedded: %d replicas, %d volumes", *embedded.Spec.Replicas, len(embedded.Spec.VolumeClaimTemplates))
	}
	objects := release{chart: control, values: "etcd: {mode: cluster}"}.must(t)
	policies := into[appsv1.Deployment](t, find(t, objects, "Deployment//allowednets-policy").Object)
	if *policies.Spec.Replicas != 2 || policies.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue() != 0 {
		t.Errorf("cluster: %+v", policies.Spec)
	}
	if n := *into[appsv1.StatefulSet](t, find(t, objects, "StatefulSet//allowednets-etcd").Object).Spec.Replicas; n != 3 {
		t.Errorf("%d etcd members", n)
	}
	for _, name := range []string{"policy", "etcd"} {
		find(t, objects, "PodDisruptionBudget//allowednets-"+name)
	}
}

// TestMailPod is the promise of the library chart: no container of a mail pod starts before the sidecar has the lists.
func TestMailPod(t *testing.T) {
	pods := 0
	for name, r := range scenarios(t) {
		if r.chart == control {
			continue
		}
		for _, o := range r.must(t) {
			if o.GetKind() == "Deployment" {
				pods++
				isGuarded(t, name+" "+o.GetName(), o)
			}
		}
	}
	if pods != 7 { // Roundcube's values-whole.yaml has two
		t.Errorf("%d mail pods", pods)
	}
}

func isGuarded(t *testing.T, name string, deployment *unstructured.Unstructured) {
	t.Helper()
	template, _ := templateOf(t, deployment)
	if len(template.Spec.InitContainers) != 1 {
		t.Fatalf("%s: %d init containers", name, len(template.Spec.InitContainers))
	}
	sidecar := template.Spec.InitContainers[0]
	if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Errorf("%s: the sidecar is no native one", name)
	}
	if sidecar.StartupProbe == nil || sidecar.StartupProbe.HTTPGet == nil || sidecar.StartupProbe.HTTPGet.Path != "/readyz" {
		t.Errorf("%s: nothing waits for the sidecar: %+v", name, sidecar.StartupProbe)
	}
	if sidecar.ReadinessProbe == nil || sidecar.ReadinessProbe.HTTPGet.Path != "/readyz" {
		t.Errorf("%s: the pod is ready without the sidecar", name)
	}
	if template.Labels["allowednets/sidecar"] != "true" {
		t.Errorf("%s: the policy service's NetworkPolicy does not know the pod: %v", name, template.Labels)
	}
	if !slices.Contains(sidecar.Args, "--state-dir=/var/lib/allowednets/state") {
		t.Errorf("%s: it keeps no state: %q", name, sidecar.Args)
	}
}

func TestDovecot(t *testing.T) {
	for name, r := range scenarios(t) {
		if r.chart != dovecot {
			continue
		}
		objects := r.must(t)
		original, err := os.ReadFile("../../integrations/dovecot/allowednets-2.3.conf")
		if err != nil {
			t.Fatal(err)
		}
		data := into[corev1.ConfigMap](t, find(t, objects, "ConfigMap//allowednets").Object).Data
		if diff := cmp.Diff(strings.TrimSpace(string(original)), strings.TrimSpace(data["allowednets-2.3.conf"])); diff != "" {
			t.Errorf("%s: Dovecot's configuration is not that of integrations/ (-there +here):\n%s", name, diff)
		}
		if !strings.Contains(data["dovecot.conf"], "default_fields = stage=after") {
			t.Errorf("%s: the passdb does not say which question it asks", name)
		}
	}
}

// TestDoveadmKey: the key is made once, and nowhere that somebody named a Secret of their own or wants no doveadm.
func TestDoveadmKey(t *testing.T) {
	const values = "users: {a@example.org: x}\nallowednets-sidecar: {policyAddress: 'a:1'%s}"
	first := find(t, release{chart: dovecot, cluster: running(), values: fmt.Sprintf(values, "")}.must(t), "Secret//allowednets-doveadm")
	key, _, _ := unstructured.NestedString(first.Object, "data", "doveadm_api_key")
	if decoded, err := base64.StdEncoding.DecodeString(key); err != nil || len(decoded) != 40 {
		t.Errorf("the key is %q: %v", key, err)
	}
	again := find(t, release{chart: dovecot, cluster: running(first), upgrade: true, values: fmt.Sprintf(values, "")}.must(t), "Secret//allowednets-doveadm")
	if diff := cmp.Diff(first.Object["data"], again.Object["data"]); diff != "" {
		t.Errorf("an upgrade makes another key: %s", diff)
	}
	for name, test := range map[string]struct {
		values  string
		listens bool
	}{
		"a Secret of their own": {", doveadmKeySecret: mine", true},
		"no doveadm":            {", doveadmURL: '', doveadmKeySecret: ''", false},
	} {
		objects := release{chart: dovecot, cluster: running(), values: fmt.Sprintf(values, test.values)}.must(t)
		for _, o := range objects {
			if id(o) == "Secret//allowednets-doveadm" {
				t.Errorf("%s: there is a key", name)
			}
		}
		data := into[corev1.ConfigMap](t, find(t, objects, "ConfigMap//allowednets").Object).Data
		if got := strings.Contains(data["dovecot.conf"], "service doveadm"); got != test.listens {
			t.Errorf("%s: doveadm listens: %v", name, got)
		}
	}
}

func TestMonitoring(t *testing.T) {
	objects := release{chart: control, values: "monitoring: {rules: {enabled: true}, grafana: {enabled: true}, podMonitor: {enabled: true, labels: {release: a}}}"}.must(t)
	original, err := os.ReadFile("../../integrations/prometheus/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := yaml.Unmarshal(original, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, find(t, objects, "PrometheusRule//allowednets").Object["spec"]); diff != "" {
		t.Errorf("the alerts are not those of integrations/ (-there +here):\n%s", diff)
	}
	find(t, objects, "ConfigMap//allowednets-grafana")
	// The alerts know the jobs by name.
	for _, job := range []string{"policy", "sidecar"} {
		monitor := find(t, objects, "PodMonitor//allowednets-"+job)
		text, err := yaml.Marshal(monitor.Object)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "replacement: allowednets-"+job+"\n") || monitor.GetLabels()["release"] != "a" {
			t.Errorf("%s", text)
		}
	}
	// Off by default.
	kinds := make(map[string]bool)
	for _, o := range (release{chart: control}).must(t) {
		kinds[o.GetKind()] = true
	}
	if kinds["PrometheusRule"] || kinds["PodMonitor"] {
		t.Errorf("%v", slices.Sorted(maps.Keys(kinds)))
	}
}

// TestMain keeps helm's remarks about links out of the tests' output.
func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) //nolint:forbidigo // helm takes no logger
	m.Run()
}

// TestSchemasAreClosed: no part of a chart's values accepts a key it does not know, and none knows a key that has no default.
func TestSchemasAreClosed(t *testing.T) {
	for _, dir := range []string{control, charts + "/allowednets-sidecar", dovecot, roundcube} {
		var whole, values map[string]any
		for name, to := range map[string]*map[string]any{"values.schema.json": &whole, "values.yaml": &values} {
			text, err := os.ReadFile(dir + "/" + name)
			if err != nil {
				t.Fatal(err)
			}
			if err := yaml.Unmarshal(text, to); err != nil {
				t.Fatal(err)
			}
		}
		closed(t, dir, whole, values)
		definitions, _ := whole["definitions"].(map[string]any)
		for name, part := range definitions {
			closed(t, dir+" "+name, part.(map[string]any), nil)
		}
	}
}

func closed(t *testing.T, path string, part map[string]any, value any) {
	t.Helper()
	if items, ok := part["items"].(map[string]any); ok {
		closed(t, path+"[]", items, nil)
	}
	properties, ok := part["properties"].(map[string]any)
	if !ok {
		return
	}
	if part["additionalProperties"] != false {
		t.Errorf("%s accepts unknown keys", path)
	}
	defaults, described := value.(map[string]any)
	described = described && len(defaults) > 0
	for key, below := range properties {
		if _, ok := defaults[key]; described && !ok && key != "global" && key != "claims" { // helm's; Kubernetes'
			t.Errorf("%s.%s has no default in values.yaml", path, key)
		}
		if below, ok := below.(map[string]any); ok {
			closed(t, path+"."+key, below, defaults[key])
		}
	}
}
