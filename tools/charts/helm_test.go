package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"
	"helm.sh/helm/v4/pkg/engine"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

const charts = "../../charts"

// Where each chart is, with a release as the README installs it.
const (
	control   = charts + "/allowednets"
	dovecot   = charts + "/examples/dovecot"
	roundcube = charts + "/examples/roundcube"
)

// release is how a chart is rendered.
type release struct {
	name          string // allowednets if empty
	chart, values string // values is YAML
	upgrade       bool
	cluster       cluster // nil: helm template
}

// render returns the objects, or the error that stops helm.
func (r release) render(t *testing.T) ([]*unstructured.Unstructured, error) {
	t.Helper()
	loaded, err := loader.Load(r.chart)
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal([]byte(r.values), &values); err != nil {
		t.Fatal(err)
	}
	if err := chartutil.ProcessDependencies(loaded, values); err != nil {
		t.Fatal(err)
	}
	options := common.ReleaseOptions{Name: cmp.Or(r.name, "allowednets"), Namespace: "mailnets", IsInstall: !r.upgrade, IsUpgrade: r.upgrade, Revision: 1}
	all, err := util.ToRenderValues(loaded, values, options, nil)
	if err != nil {
		return nil, err
	}
	var files map[string]string
	if r.cluster == nil {
		files, err = engine.Render(loaded, all)
	} else {
		files, err = engine.RenderWithClientProvider(loaded, all, r.cluster)
	}
	if err != nil {
		return nil, err
	}
	var objects []*unstructured.Unstructured
	for name, text := range files {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		for document := range strings.SplitSeq("\n"+text, "\n---") {
			var content map[string]any
			if err := yaml.UnmarshalStrict([]byte(document), &content); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, document)
			}
			if len(content) > 0 {
				objects = append(objects, &unstructured.Unstructured{Object: content})
			}
		}
	}
	slices.SortFunc(objects, func(a, b *unstructured.Unstructured) int { return strings.Compare(id(a), id(b)) })
	return objects, nil
}

func (r release) must(t *testing.T) []*unstructured.Unstructured {
	t.Helper()
	objects, err := r.render(t)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// id is Kind/namespace/name; the release's own namespace is left out.
func id(o *unstructured.Unstructured) string {
	namespace := o.GetNamespace()
	if namespace == "mailnets" {
		namespace = ""
	}
	return o.GetKind() + "/" + namespace + "/" + o.GetName()
}

func find(t *testing.T, objects []*unstructured.Unstructured, want string) *unstructured.Unstructured {
	t.Helper()
	var all []string
	for _, o := range objects {
		if id(o) == want {
			return o
		}
		all = append(all, id(o))
	}
	t.Fatalf("there is no %s, only %s", want, strings.Join(all, ", "))
	return nil
}

// into decodes an object or a part of it.
func into[T any](t *testing.T, from any) T {
	t.Helper()
	text, err := yaml.Marshal(from)
	if err != nil {
		t.Fatal(err)
	}
	var to T
	if err := yaml.UnmarshalStrict(text, &to); err != nil {
		t.Fatal(err)
	}
	return to
}

// cluster is what helm's lookup finds, by id.
type cluster map[string]*unstructured.Unstructured

// running is a cluster with these objects.
func running(objects ...*unstructured.Unstructured) cluster {
	c := cluster{"Namespace//default": {Object: map[string]any{"kind": "Namespace"}}}
	for _, o := range objects {
		c[id(o)] = o
	}
	return c
}

// GetClientFor is helm's way into a cluster.
func (c cluster) GetClientFor(_, kind string) (dynamic.NamespaceableResourceInterface, bool, error) {
	return reader{cluster: c, kind: kind}, kind != "Namespace", nil
}

// reader gets objects of a kind and can do nothing else.
type reader struct {
	dynamic.NamespaceableResourceInterface

	cluster         cluster
	kind, namespace string
}

func (r reader) Namespace(namespace string) dynamic.ResourceInterface {
	if namespace != "mailnets" {
		r.namespace = namespace
	}
	return r
}

func (r reader) Get(_ context.Context, name string, _ metav1.GetOptions, _ ...string) (*unstructured.Unstructured, error) {
	if o, ok := r.cluster[r.kind+"/"+r.namespace+"/"+name]; ok {
		return o, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: r.kind}, name)
}

// scenarios are the values-*.yaml files of the charts, by name; with the defaults of each chart.
func scenarios(t *testing.T) map[string]release {
	t.Helper()
	all := map[string]release{"allowednets": {chart: control}}
	for _, dir := range []string{control, dovecot, roundcube} {
		files, err := filepath.Glob(dir + "/ci/values-*.yaml")
		if err != nil || len(files) == 0 {
			t.Fatal(dir, errors.Join(err, os.ErrNotExist))
		}
		for _, file := range files {
			values, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			all[strings.TrimPrefix(file, charts+"/")] = release{chart: dir, values: string(values)}
		}
	}
	return all
}
