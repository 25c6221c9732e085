// Command charts writes the tables of values into the READMEs of the charts, from the comments in their values.yaml; its tests
// are those of the charts. It is a module of its own, because helm's and Kubernetes' modules would lift the product's.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// What is written stands between these lines of a README.
const (
	valuesBegin = "<!-- values: written by `make charts` from values.yaml -->\n"
	valuesEnd   = "<!-- /values -->\n"
	plainBegin  = "<!-- plain: written by `make charts` -->\n"
	plainEnd    = "<!-- /plain -->\n"
)

func main() {
	for _, dir := range os.Args[1:] {
		name := filepath.Join(dir, "README.md")
		text, err := readme(dir)
		if err == nil {
			err = os.WriteFile(name, text, 0o644) //nolint:gosec // a file of the repository
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "charts: %s: %v\n", name, err)
			os.Exit(1)
		}
	}
}

// readme returns the README of a chart with what it should hold.
func readme(dir string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(dir, "README.md")) //nolint:gosec // the folder is our own argument
	if err != nil {
		return nil, err
	}
	table, err := table(dir)
	if err != nil {
		return nil, err
	}
	if text, err = replace(text, valuesBegin, valuesEnd, table); err != nil || !bytes.Contains(text, []byte(plainBegin)) {
		return text, err
	}
	pod, err := plain(dir)
	if err != nil {
		return nil, err
	}
	return replace(text, plainBegin, plainEnd, "\n"+pod+"\n")
}

// replace puts middle between two lines.
func replace(text []byte, begin, end, middle string) ([]byte, error) {
	before, rest, ok := bytes.Cut(text, []byte(begin))
	_, after, closed := bytes.Cut(rest, []byte(end))
	if !ok || !closed {
		return nil, fmt.Errorf("it has no %q followed by %q", begin, end)
	}
	return []byte(string(before) + begin + middle + end + string(after)), nil
}

// podTemplate uses every partial of the library chart.
const podTemplate = `metadata:
  labels:
    {{- include "allowednets-sidecar.podLabels" . | nindent 4 }}
  annotations:
    {{- include "allowednets-sidecar.podAnnotations" . | nindent 4 }}
spec:
  securityContext: {supplementalGroups: [65532]}
  initContainers:
    {{- include "allowednets-sidecar.container" . | nindent 4 }}
  containers:
    - name: mail-server
      volumeMounts:
        {{- include "allowednets-sidecar.volumeMounts" . | nindent 8 }}
  volumes:
    {{- include "allowednets-sidecar.volumes" . | nindent 4 }}
`

// plain is what the library chart in dir makes of a pod template, for people without helm, as an indented block.
func plain(dir string) (string, error) {
	library, err := loader.Load(dir)
	if err != nil {
		return "", err
	}
	parent := &chart.Chart{
		Metadata:  &chart.Metadata{APIVersion: "v2", Name: "mail", Version: "0.1.0"},
		Templates: []*common.File{{Name: "templates/pod.yaml", Data: []byte(podTemplate)}},
	}
	parent.AddDependency(library)
	values := map[string]any{library.Name(): map[string]any{"policyAddress": "allowednets-policy.allowednets.svc:7443"}}
	all, err := util.ToRenderValues(parent, values, common.ReleaseOptions{Name: "mail", Namespace: "mail"}, nil)
	if err != nil {
		return "", err
	}
	rendered, err := engine.Render(parent, all)
	if err != nil {
		return "", err
	}
	text := strings.TrimSuffix(rendered["mail/templates/pod.yaml"], "\n")
	return "    " + strings.ReplaceAll(text, "\n", "\n    ") + "\n", nil
}

// table describes the values of the chart in dir.
func table(dir string) (string, error) {
	values, err := os.ReadFile(filepath.Join(dir, "values.yaml")) //nolint:gosec // the folder is our own argument
	if err != nil {
		return "", err
	}
	var document yaml.Node
	if err := yaml.Unmarshal(values, &document); err != nil {
		return "", err
	}
	rows, err := rows(document.Content[0], "")
	return "| value | default | meaning |\n|---|---|---|\n" + rows, err
}

// rows has one for each key with a comment. A key without one must hold keys that have.
func rows(mapping *yaml.Node, path string) (string, error) {
	var all strings.Builder
	for i := 0; i < len(mapping.Content); i += 2 {
		key, value := mapping.Content[i], mapping.Content[i+1]
		name := path + key.Value
		comment := strings.TrimSpace(strings.ReplaceAll(key.HeadComment, "\n#", ""))
		switch {
		case comment == "" && value.Kind == yaml.MappingNode:
			below, err := rows(value, name+".")
			if err != nil {
				return "", err
			}
			all.WriteString(below)
			continue
		case comment == "":
			return "", errors.New(name + " has no comment in values.yaml")
		}
		var decoded any
		if err := value.Decode(&decoded); err != nil {
			return "", err
		}
		text, err := json.Marshal(decoded)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&all, "| `%s` | `%s` | %s |\n", name, text, strings.ReplaceAll(strings.TrimPrefix(comment, "# "), "|", `\|`))
	}
	return all.String(), nil
}
