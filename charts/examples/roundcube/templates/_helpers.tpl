{{/* What everything is named: it may be of one release with the Dovecot, which is named like the release. */}}
{{- define "allowednets-roundcube.fullname" -}}
{{- if and (contains "roundcube" .Release.Name) (not .Values.withDovecot) }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-roundcube{{ end -}}
{{- end -}}

{{/* A string as PHP reads it. */}}
{{- define "allowednets-roundcube.php" -}}
'{{ . | replace `\` `\\` | replace `'` `\'` }}'
{{- end -}}
