{{/*
Partials for mail pods. Each takes the context of your chart. Use all of them:

  metadata:
    labels: {{- include "allowednets-sidecar.podLabels" . | nindent 4 }}
    annotations: {{- include "allowednets-sidecar.podAnnotations" . | nindent 4 }}
  spec:
    initContainers: {{- include "allowednets-sidecar.container" . | nindent 6 }}
    volumes: {{- include "allowednets-sidecar.volumes" . | nindent 6 }}
    containers:
      - name: your-mail-server
        volumeMounts: {{- include "allowednets-sidecar.volumeMounts" . | nindent 10 }}
*/}}

{{/* By which the policy service's NetworkPolicy and Prometheus find the pod. */}}
{{- define "allowednets-sidecar.podLabels" -}}
allowednets/sidecar: "true"
{{- end -}}

{{/* The node may be drained: what is in these volumes is a copy. */}}
{{- define "allowednets-sidecar.podAnnotations" -}}
cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes: allowednets-run,allowednets-state
{{- end -}}

{{/*
A native sidecar: Kubernetes starts no container of the pod before the startup probe succeeded, that is before the sidecar has the
lists; stops it after all of them; and restarts it alone if it ends.
*/}}
{{- define "allowednets-sidecar.container" -}}
{{- $v := index .Values "allowednets-sidecar" -}}
{{- $library := index .Subcharts "allowednets-sidecar" -}}
{{- if not $v.policyAddress -}}
{{- fail "allowednets-sidecar.policyAddress is empty: name the policy service, such as allowednets-policy.allowednets.svc:7443" -}}
{{- end -}}
{{- if ne (empty $v.doveadmURL) (empty $v.doveadmKeySecret) -}}
{{- fail "allowednets-sidecar.doveadmURL and allowednets-sidecar.doveadmKeySecret need each other: give both, or neither" -}}
{{- end -}}
- name: allowednets-sidecar
  restartPolicy: Always
  image: {{ $v.image.prefix }}/sidecar:{{ default $library.Chart.AppVersion $v.image.tag }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  args:
    - --policy-address={{ $v.policyAddress }}
    - --tls-cert-file=/etc/allowednets/tls/tls.crt
    - --tls-key-file=/etc/allowednets/tls/tls.key
    - --tls-ca-file=/etc/allowednets/tls/ca.crt
    - --state-dir=/var/lib/allowednets/state
    - --socket={{ $v.socket }}
    - --http-listen={{ $v.httpListen }}
    - --admin-listen=:7491
    - --log-level={{ $v.logLevel }}
    {{- if $v.httpTokenSecret }}
    - --http-token-file=/etc/allowednets/token/token
    {{- end }}
    {{- with $v.trustedProxies }}
    - --trusted-proxies={{ join "," . }}
    {{- end }}
    {{- with $v.doveadmURL }}
    - --doveadm-url={{ . }}
    - --doveadm-key-file=/etc/allowednets/doveadm/doveadm_api_key
    {{- end }}
    {{- with $v.nginxBackends }}
    - --nginx-backend={{ join "," . }}
    {{- end }}
    {{- with $v.envoyMailboxFrom }}
    - --envoy-mailbox-from={{ . }}
    {{- end }}
    {{- with $v.defaultDomain }}
    - --default-domain={{ . }}
    {{- end }}
    {{- with $v.restrictServices }}
    - --restrict-services={{ join "," . }}
    {{- end }}
    {{- with $v.denyAfter }}
    - --deny-after={{ . }}
    {{- end }}
    {{- if not (kindIs "invalid" $v.denialText) }}
    - {{ printf "--denial-text=%s" $v.denialText | quote }}
    {{- end }}
    {{- with $v.acceptCluster }}
    - --accept-cluster={{ . }}
    {{- end }}
  ports:
    - {name: an-admin, containerPort: 7491}
  startupProbe:
    httpGet: {path: /readyz, port: an-admin}
    periodSeconds: 1
    failureThreshold: 3600 # it waits for a policy service; a restart would not help
  readinessProbe:
    httpGet: {path: /readyz, port: an-admin}
    periodSeconds: 2
    timeoutSeconds: 2
  livenessProbe:
    httpGet: {path: /livez, port: an-admin}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: {{ int $v.group }}
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
  resources: {{- toYaml $v.resources | nindent 4 }}
  volumeMounts:
    - {name: allowednets-tls, mountPath: /etc/allowednets/tls, readOnly: true}
    - {name: allowednets-state, mountPath: /var/lib/allowednets}
    {{- with $v.socket }}
    - {name: allowednets-run, mountPath: {{ dir . }}}
    {{- end }}
    {{- if $v.httpTokenSecret }}
    - {name: allowednets-token, mountPath: /etc/allowednets/token, readOnly: true}
    {{- end }}
    {{- if $v.doveadmKeySecret }}
    - {name: allowednets-doveadm, mountPath: /etc/allowednets/doveadm, readOnly: true}
    {{- end }}
{{- end -}}

{{- define "allowednets-sidecar.volumes" -}}
{{- $v := index .Values "allowednets-sidecar" -}}
{{- /* 0444: the pod may have no fsGroup. Only the sidecar mounts it, and a Dovecot its own key. */ -}}
- name: allowednets-tls
  secret: {secretName: {{ $v.tlsSecret }}, defaultMode: 0444}
- name: allowednets-run
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: allowednets-state
  {{- toYaml $v.stateVolume | nindent 2 }}
{{- with $v.httpTokenSecret }}
- name: allowednets-token
  secret: {secretName: {{ . }}, defaultMode: 0444}
{{- end }}
{{- with $v.doveadmKeySecret }}
- name: allowednets-doveadm
  secret: {secretName: {{ tpl . $ }}, defaultMode: 0444}
{{- end }}
{{- end -}}

{{/* Of the containers that use the socket. */}}
{{- define "allowednets-sidecar.volumeMounts" -}}
{{- $v := index .Values "allowednets-sidecar" -}}
- {name: allowednets-run, mountPath: {{ dir $v.socket }}, readOnly: true}
{{- end -}}
