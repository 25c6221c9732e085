package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/yannh/kubeconform/pkg/validator"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// The OpenAPI document of Kubernetes is in its module and in no other; the rest of the module is not used.
const (
	kubernetes    = "k8s.io/kubernetes@v1.37.2"
	swaggerSHA256 = "465276aedf437726de5a6ed23a41b86d78bb0d347edf251a755ae26a93cdd8a6"
)

// notKubernetes are kinds of cert-manager and of the Prometheus operator.
var notKubernetes = map[string]struct{}{"Certificate": {}, "Issuer": {}, "PodMonitor": {}, "PrometheusRule": {}}

// strictly returns a validator that knows Kubernetes' kinds and accepts no unknown field.
func strictly(t *testing.T) func(*unstructured.Unstructured) error {
	t.Helper()
	dir := t.TempDir()
	writeSchemas(t, swagger(t), dir)
	v, err := validator.New([]string{filepath.Join(dir, "{{ .ResourceKind }}{{ .KindSuffix }}.json")}, validator.Opts{Strict: true, SkipKinds: notKubernetes, KubernetesVersion: "1.37.2"})
	if err != nil {
		t.Fatal(err)
	}
	return func(o *unstructured.Unstructured) error {
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			return err
		}
		for _, result := range v.Validate(id(o), io.NopCloser(bytes.NewReader(text))) {
			if result.Status != validator.Valid && result.Status != validator.Skipped {
				return fmt.Errorf("%w %v", result.Err, result.ValidationErrors)
			}
		}
		return nil
	}
}

func swagger(t *testing.T) []byte {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", kubernetes).Output()
	if err != nil {
		t.Fatalf("go mod download %s: %v\n%s", kubernetes, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "api", "openapi-spec", "swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	if sum := fmt.Sprintf("%x", sha256.Sum256(text)); sum != swaggerSHA256 {
		t.Fatalf("the swagger.json of %s has the sum %s", kubernetes, sum)
	}
	return text
}

// object is a part of a JSON schema.
type object = map[string]any

// writeSchemas turns an OpenAPI 2 document into a JSON schema for each kind, under the names that kubeconform asks for. Objects
// with known properties accept no others; that is what -strict needs, and what OpenAPI does not say.
func writeSchemas(t *testing.T, document []byte, dir string) {
	t.Helper()
	var api struct{ Definitions map[string]object }
	if err := json.Unmarshal(document, &api); err != nil {
		t.Fatal(err)
	}
	for name, s := range api.Definitions {
		_, closed := s["properties"]
		_, said := s["additionalProperties"]
		if closed && !said && s["x-kubernetes-preserve-unknown-fields"] != true {
			s["additionalProperties"] = false
		}
		if s["format"] == "int-or-string" {
			api.Definitions[name] = object{"type": []string{"string", "integer"}}
		}
		if strings.HasSuffix(name, ".resource.Quantity") { // written as a string, read from a number as well
			api.Definitions[name] = object{"type": []string{"string", "number"}}
		}
	}
	for name, kind := range kinds(t, document) {
		used := make(map[string]object)
		refer(api.Definitions, api.Definitions[name], used)
		whole := maps.Clone(api.Definitions[name])
		whole["definitions"] = used
		text, err := json.Marshal(whole)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, kind+".json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// kinds are the definitions that are one kind of object, each under the name by which kubeconform asks for it.
func kinds(t *testing.T, document []byte) map[string]string {
	t.Helper()
	var api struct {
		Definitions map[string]struct {
			Kinds []struct{ Group, Version, Kind string } `json:"x-kubernetes-group-version-kind"`
		}
	}
	if err := json.Unmarshal(document, &api); err != nil {
		t.Fatal(err)
	}
	names := make(map[string]string)
	for name, d := range api.Definitions {
		if len(d.Kinds) != 1 { // DeleteOptions and the like are of many
			continue
		}
		suffix := "-" + d.Kinds[0].Version
		if group, _, _ := strings.Cut(d.Kinds[0].Group, "."); group != "" {
			suffix = "-" + group + suffix
		}
		names[name] = strings.ToLower(d.Kinds[0].Kind + suffix)
	}
	return names
}

// refer collects what a schema refers to.
func refer(all map[string]object, part any, used map[string]object) {
	switch part := part.(type) {
	case object:
		if ref, ok := part["$ref"].(string); ok {
			name := strings.TrimPrefix(ref, "#/definitions/")
			if _, done := used[name]; !done {
				used[name] = all[name]
				refer(all, all[name], used)
			}
		}
		for _, value := range part {
			refer(all, value, used)
		}
	case []any:
		for _, value := range part {
			refer(all, value, used)
		}
	}
}

func TestSchemasAreStrict(t *testing.T) {
	valid := strictly(t)
	for name, test := range map[string]struct {
		object, want string
	}{
		"right":            {"{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1, targetPort: imap}]}}", ""},
		"an unknown field": {"{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {port: 1}}", "additional properties 'port' not allowed"},
		"a wrong type":     {"{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: imap}]}}", "want integer"},
		"a missing field":  {"{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{name: imap}]}}", "missing propert"},
		"an unknown kind":  {"{apiVersion: v2, kind: Service, metadata: {name: a}}", "could not find schema"},
	} {
		var content map[string]any
		if err := yaml.Unmarshal([]byte(test.object), &content); err != nil {
			t.Fatal(err)
		}
		err := valid(&unstructured.Unstructured{Object: content})
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
