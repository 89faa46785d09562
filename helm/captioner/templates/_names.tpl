{{/* Names, labels, images. */}}

{{/* At most 40 characters: KubeRay appends to the name, and a RayService's name may have 47. */}}
{{- define "captioner.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "captioner.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of an object. Pods lack the chart's version: a new version would replace every cluster. */}}
{{- define "captioner.labels" -}}
{{ include "captioner.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Name of the service's images, with their registry. */}}
{{- define "captioner.repository" -}}
{{- $registry := default .Values.image.registry (get (default dict .Values.global) "imageRegistry") | toString -}}
{{- ternary (printf "%s/%s" $registry .Values.image.repository) .Values.image.repository (ne $registry "") -}}
{{- end -}}

{{/* The image of the service, with an engine. */}}
{{- define "captioner.image" -}}
{{- $image := .Values.image -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion $image.variant) $image.tag -}}
{{- include "captioner.repository" . }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end -}}

{{/* The image of pods without an engine. With `workload: deployment` it is the engines' image. */}}
{{- define "captioner.frontendImage" -}}
{{- $tag := .Values.image.frontendTag -}}
{{- if and $tag (eq .Values.workload "rayservice") -}}
{{- include "captioner.repository" . }}{{ ternary "@" ":" (hasPrefix "sha256:" $tag) }}{{ $tag }}
{{- else -}}
{{- include "captioner.image" . -}}
{{- end -}}
{{- end -}}

{{- define "captioner.pullSecrets" -}}
{{- with concat .Values.image.pullSecrets (default list (get (default dict .Values.global) "imagePullSecrets")) }}
imagePullSecrets:
{{- range . }}
  - name: {{ ternary . (get (ternary dict . (kindIs "string" .)) "name") (kindIs "string" .) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Name of the Secret with values that this release must not lose. The chart creates it unless an existing one is named. */}}
{{- define "captioner.secretName" -}}
{{- default (include "captioner.fullname" .) .Values.secrets.existingSecret -}}
{{- end -}}

{{/* Non-empty if KubeRay moves the traffic in steps, through a Gateway. */}}
{{- define "captioner.incremental" -}}
{{- if and (eq .Values.workload "rayservice") (eq .Values.ray.upgrade.type "NewClusterWithIncrementalUpgrade") -}}yes{{- end -}}
{{- end -}}

{{/* Service that callers use. KubeRay creates the first one and switches it to the new cluster once that is ready. */}}
{{- define "captioner.serviceName" -}}
{{- ternary (printf "%s-serve-svc" (include "captioner.fullname" .)) (include "captioner.fullname" .) (eq .Values.workload "rayservice") -}}
{{- end -}}

{{/* URL that the test calls. Empty: KubeRay creates no Service for callers, and the Gateway's address is not known here. */}}
{{- define "captioner.url" -}}
{{- if .Values.test.url -}}{{ .Values.test.url }}
{{- else if not (include "captioner.incremental" .) -}}http://{{ include "captioner.serviceName" . }}.{{ .Release.Namespace }}.svc:8000{{ end -}}
{{- end -}}

{{/* Host and port of Redis and PostgreSQL, bundled or external. Empty: none. */}}
{{- define "captioner.redisAddress" -}}
{{- if eq .Values.redis.mode "bundled" }}{{ include "captioner.fullname" . }}-redis:6379
{{- else if eq .Values.redis.mode "external" }}{{ required "redis.host is required with redis.mode: external" .Values.redis.host }}:{{ .Values.redis.port }}{{ end -}}
{{- end -}}

{{- define "captioner.databaseAddress" -}}
{{- if eq .Values.postgresql.mode "bundled" }}{{ include "captioner.fullname" . }}-postgresql:5432
{{- else if eq .Values.postgresql.mode "external" }}{{ required "postgresql.host is required with postgresql.mode: external" .Values.postgresql.host }}:{{ .Values.postgresql.port }}{{ end -}}
{{- end -}}
