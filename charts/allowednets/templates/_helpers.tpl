{{- define "allowednets.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object. Takes (list root component). */}}
{{- define "allowednets.labels" -}}
{{- $root := index . 0 -}}
{{ include "allowednets.selector" . }}
app.kubernetes.io/part-of: allowednets
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What selects the pods of a component; it must never change. */}}
{{- define "allowednets.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "allowednets.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.image.prefix }}/{{ index . 1 }}:{{ default $root.Chart.AppVersion $root.Values.image.tag }}
{{- end -}}

{{/* A pod of Pod Security "restricted". */}}
{{- define "allowednets.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "allowednets.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Spreads the pods of a component over nodes and zones, as far as there are some. Takes (list root component). */}}
{{- define "allowednets.spread" -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "allowednets.selector" $ | nindent 8 }}
  {{- end }}
{{- end -}}

{{- define "allowednets.replicas" -}}
{{- if kindIs "invalid" .Values.policy.replicas -}}
{{ ternary 1 2 (eq .Values.etcd.mode "embedded") }}
{{- else -}}
{{ .Values.policy.replicas }}
{{- end -}}
{{- end -}}

{{/* The Secret of a certificate. Takes (list root "policy"|"sidecar"|"dashboard"|"cli"|"etcd"|"etcdClient"); empty if there is none. */}}
{{- define "allowednets.secret" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.certificates.mode "existing" -}}
{{ get $root.Values.certificates.existing (index . 1) }}
{{- else -}}
{{ include "allowednets.fullname" $root }}-{{ index . 1 | kebabcase }}-tls
{{- end -}}
{{- end -}}

{{/* The names of a Service, one a line. Takes (list root name). */}}
{{- define "allowednets.serviceNames" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{ $name }}
{{ $name }}.{{ $root.Release.Namespace }}
{{ $name }}.{{ $root.Release.Namespace }}.svc
{{ $name }}.{{ $root.Release.Namespace }}.svc.cluster.local
{{- end -}}

{{/* The names of the policy service's certificate, one a line. */}}
{{- define "allowednets.policyNames" -}}
{{ include "allowednets.serviceNames" (list . (printf "%s-policy" (include "allowednets.fullname" .))) }}
localhost
{{- end -}}

{{/* The names of the certificate that all etcd members share. No wildcard: etcd looks each peer's names up and compares. */}}
{{- define "allowednets.etcdNames" -}}
{{- $name := printf "%s-etcd" (include "allowednets.fullname" .) -}}
{{- range $i := until (int .Values.etcd.cluster.replicas) }}
{{ printf "%s-%d.%s.%s.svc" $name $i $name $.Release.Namespace }}
{{- end }}
localhost
{{- end -}}

{{- define "allowednets.etcdEndpoints" -}}
{{- if eq .Values.etcd.mode "external" -}}
{{ join "," .Values.etcd.external.endpoints }}
{{- else -}}
{{- $name := printf "%s-etcd" (include "allowednets.fullname" .) -}}
{{- $all := list -}}
{{- range $i := until (int .Values.etcd.cluster.replicas) -}}
{{- $all = append $all (printf "https://%s-%d.%s.%s.svc:2379" $name $i $name $.Release.Namespace) -}}
{{- end -}}
{{ join "," $all }}
{{- end -}}
{{- end -}}

{{/* Secret of the policy service as a client of etcd; empty if it needs none. */}}
{{- define "allowednets.etcdClientSecret" -}}
{{- if eq .Values.etcd.mode "cluster" -}}
{{ include "allowednets.secret" (list . "etcdClient") }}
{{- else if eq .Values.etcd.mode "external" -}}
{{ .Values.etcd.external.tlsSecret }}
{{- end -}}
{{- end -}}

{{/*
Until when a store may be created. An installed release keeps it in its manifest, where it expires: a rollback to the first
revision creates nothing. Where helm only renders, every rendering looks like an install, so there it is left out; such a
rendering is told by its not seeing the namespace that every cluster has.
*/}}
{{- define "allowednets.createUntil" -}}
{{- if .Values.store.createUntil -}}
{{ .Values.store.createUntil }}
{{- else if and .Release.IsInstall (lookup "v1" "Namespace" "" "default") -}}
{{ dateInZone "2006-01-02T15:04:05Z" (dateModify "1h" now) "UTC" }}
{{- end -}}
{{- end -}}
