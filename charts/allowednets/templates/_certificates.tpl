{{/*
The authorities of certificates.generated.authorities, as JSON: data (of their Secret), bundle (PEM of all), signer (number), crt and
key (PEM of the one that signs). Takes (list root secret title). What the Secret has is kept.
*/}}
{{- define "allowednets.authority" -}}
{{- $root := index . 0 -}}
{{- $kept := default dict (get (lookup "v1" "Secret" $root.Release.Namespace (index . 1)) "data") -}}
{{- $data := dict -}}
{{- $bundle := list -}}
{{- range $number := $root.Values.certificates.generated.authorities -}}
{{- $crt := printf "ca-%v.crt" $number -}}
{{- $key := printf "ca-%v.key" $number -}}
{{- if and (hasKey $kept $crt) (hasKey $kept $key) -}}
{{- $_ := set $data $crt (get $kept $crt | b64dec) -}}
{{- $_ := set $data $key (get $kept $key | b64dec) -}}
{{- else -}}
{{- $made := genCAWithKey (printf "%s %v" (index $ 2) $number) 3650 (genPrivateKey "ecdsa") -}}
{{- $_ := set $data $crt $made.Cert -}}
{{- $_ := set $data $key $made.Key -}}
{{- end -}}
{{- $bundle = append $bundle (get $data $crt) -}}
{{- end -}}
{{- $signer := first $root.Values.certificates.generated.authorities -}}
{{- dict "data" $data "bundle" (join "" $bundle) "signer" $signer "crt" (get $data (printf "ca-%v.crt" $signer)) "key" (get $data (printf "ca-%v.key" $signer)) | toJson -}}
{{- end -}}

{{/* Takes (list root secret authority). */}}
{{- define "allowednets.authoritySecret" -}}
{{- $root := index . 0 }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ index . 1 }}
  namespace: {{ $root.Release.Namespace }}
  labels: {{- include "allowednets.labels" (list $root "authority") | nindent 4 }}
type: Opaque
data:
  {{- range $key, $value := (index . 2).data }}
  {{ $key }}: {{ $value | b64enc }}
  {{- end }}
{{- end -}}

{{/*
The Secret of one certificate. Takes (list root authority component namespace names); the first name is the common name. The one that is
there is kept until it is old, or was issued by another authority, for other names or in another generation.
*/}}
{{- define "allowednets.leaf" -}}
{{- $root := index . 0 -}}
{{- $authority := index . 1 -}}
{{- $component := index . 2 -}}
{{- $namespace := index . 3 -}}
{{- $names := index . 4 -}}
{{- $generated := $root.Values.certificates.generated -}}
{{- $secret := include "allowednets.secret" (list $root $component) -}}
{{- $issuedFor := list $authority.crt $names $generated.generation $generated.days | toJson | sha256sum -}}
{{- $old := lookup "v1" "Secret" $namespace $secret -}}
{{- $annotations := default dict (get (default dict (get $old "metadata")) "annotations") -}}
{{- $crt := "" -}}
{{- $key := "" -}}
{{- $issued := get $annotations "allowednets/issued" -}}
{{- $age := sub (now | unixEpoch | int64) (default "0" $issued | int64) -}}
{{- if and (eq (default "" (get $annotations "allowednets/issued-for")) $issuedFor) (lt $age (mul 86400 (int64 $generated.renewAfterDays))) -}}
{{- $crt = index $old.data "tls.crt" -}}
{{- $key = index $old.data "tls.key" -}}
{{- else -}}
{{- $issued = now | unixEpoch -}}
{{- $ca := buildCustomCert ($authority.crt | b64enc) ($authority.key | b64enc) -}}
{{- $cn := ternary (printf "%s-%s" (include "allowednets.fullname" $root) (kebabcase $component)) (first $names) (empty $names) -}}
{{- $made := genSignedCertWithKey $cn nil $names (int $generated.days) $ca (genPrivateKey "ecdsa") -}}
{{- $crt = b64enc $made.Cert -}}
{{- $key = b64enc $made.Key -}}
{{- end }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ $secret }}
  namespace: {{ $namespace }}
  labels: {{- include "allowednets.labels" (list $root (kebabcase $component)) | nindent 4 }}
  annotations:
    allowednets/issued: {{ $issued | quote }}
    allowednets/issued-for: {{ $issuedFor }}
type: kubernetes.io/tls
data:
  tls.crt: {{ $crt }}
  tls.key: {{ $key }}
  ca.crt: {{ b64enc $authority.bundle }}
{{- end -}}
