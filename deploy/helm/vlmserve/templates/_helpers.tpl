{{- define "vlmserve.name" -}}
{{- if contains "vlmserve" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-vlmserve" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "vlmserve.selector" -}}
app: vlmserve
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vlmserve.labels" -}}
{{ include "vlmserve.selector" . }}
app.kubernetes.io/name: vlmserve
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vlmserve.secret" -}}
{{- .Values.secret.name | default (include "vlmserve.name" .) -}}
{{- end }}

{{- define "vlmserve.claim" -}}
{{- with .Values.cache.existingClaim }}{{ . }}{{ else }}{{ include "vlmserve.name" . }}-cache{{ end -}}
{{- end }}

{{- define "vlmserve.claimSpec" -}}
accessModes: [{{ if .Values.cache.shared }}ReadWriteMany{{ else }}ReadWriteOnce{{ end }}]
{{- with .Values.cache.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .Values.cache.size }}}
{{- end }}

{{- define "vlmserve.target" -}}
{apiVersion: apps/v1, kind: Deployment, name: {{ include "vlmserve.name" . }}}
{{- end }}
