{{/* Names, labels, images. */}}

{{/* Short enough for what KubeRay makes of it: a RayService's name may have 47 characters. */}}
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

{{/* Labels of an object. Pods do not get the chart's version: a new one would replace every cluster. */}}
{{- define "captioner.labels" -}}
{{ include "captioner.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The image of the service. */}}
{{- define "captioner.image" -}}
{{- $image := .Values.image -}}
{{- $registry := default $image.registry (get (default dict .Values.global) "imageRegistry") -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion $image.variant) $image.tag -}}
{{- $name := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne (toString $registry) "") -}}
{{- if $image.digest }}{{ $name }}@{{ $image.digest }}{{ else }}{{ $name }}:{{ $tag }}{{ end -}}
{{- end -}}

{{- define "captioner.pullSecrets" -}}
{{- with concat .Values.image.pullSecrets (default list (get (default dict .Values.global) "imagePullSecrets")) }}
imagePullSecrets:
{{- range . }}
  - name: {{ ternary . (get (ternary dict . (kindIs "string" .)) "name") (kindIs "string" .) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The Secret with what this release must not lose; made by the chart unless one is named. */}}
{{- define "captioner.secretName" -}}
{{- default (include "captioner.fullname" .) .Values.secrets.existingSecret -}}
{{- end -}}

{{/* Whether KubeRay moves the traffic in steps, through a Gateway. Empty: no. */}}
{{- define "captioner.incremental" -}}
{{- if and (eq .Values.workload "rayservice") (eq .Values.ray.upgrade.type "NewClusterWithIncrementalUpgrade") -}}yes{{- end -}}
{{- end -}}

{{/* What callers reach. KubeRay makes the first and moves it to the new cluster once that serves. */}}
{{- define "captioner.serviceName" -}}
{{- ternary (printf "%s-serve-svc" (include "captioner.fullname" .)) (include "captioner.fullname" .) (eq .Values.workload "rayservice") -}}
{{- end -}}

{{/* Where the test asks. Empty: KubeRay makes no Service for callers, and the Gateway's address is not known here. */}}
{{- define "captioner.url" -}}
{{- if .Values.test.url -}}{{ .Values.test.url }}
{{- else if not (include "captioner.incremental" .) -}}http://{{ include "captioner.serviceName" . }}.{{ .Release.Namespace }}.svc:8000{{ end -}}
{{- end -}}

{{/* Host and port of Redis and PostgreSQL: our own, or those given. Empty: none. */}}
{{- define "captioner.redisAddress" -}}
{{- if eq .Values.redis.mode "bundled" }}{{ include "captioner.fullname" . }}-redis:6379
{{- else if eq .Values.redis.mode "external" }}{{ required "redis.host: where is it?" .Values.redis.host }}:{{ .Values.redis.port }}{{ end -}}
{{- end -}}

{{- define "captioner.databaseAddress" -}}
{{- if eq .Values.postgresql.mode "bundled" }}{{ include "captioner.fullname" . }}-postgresql:5432
{{- else if eq .Values.postgresql.mode "external" }}{{ required "postgresql.host: where is it?" .Values.postgresql.host }}:{{ .Values.postgresql.port }}{{ end -}}
{{- end -}}
