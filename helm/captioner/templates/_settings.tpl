{{/* What the service is told, and the times that hang together. */}}

{{/*
The times, all from `drain.longestRequestSeconds` (L): JSON, in seconds. In the order of a pod's end:
  1. it leaves the Service's endpoints, and its replicas get replacements elsewhere: `replacement`
  2. its replicas take nothing new and end what they have: `grace` = L + margin
  3. its proxy ends the last streams that came through it: `proxy`
  4. the engine ends: `engineStop`; then the container is stopped, at the latest by `termination`
*/}}
{{- define "captioner.times" -}}
{{- $longest := int .Values.drain.longestRequestSeconds -}}
{{- $margin := int .Values.drain.marginSeconds -}}
{{- $load := include "captioner.loadSeconds" . | int -}}
{{- $grace := add $longest $margin -}}
{{- $proxy := add 30 $margin -}}
{{- $engineStop := 30 -}}
{{- $frontend := add 60 $grace $proxy -}}
{{- $engine := add $load $grace $proxy -}}
{{- dict
  "longest" $longest
  "whole" (min $longest 280)
  "grace" $grace
  "load" $load
  "frontPreStop" $frontend
  "frontTermination" (add $frontend $engineStop $margin)
  "enginePreStop" $engine
  "engineTermination" (add $engine $engineStop $margin)
  "clusterDeletion" (add $grace $proxy)
  "soloPreStop" 10
  "soloTermination" (add 10 $grace $engineStop $margin)
| toJson -}}
{{- end -}}

{{/* How long a model may take to load: its size at the slowest expected reading, half as much again, and two minutes. */}}
{{- define "captioner.loadSeconds" -}}
{{- add 120 (div (mul 3 1024 (int .Values.model.sizeGiB)) (mul 2 (int .Values.model.readMiBPerSecond))) -}}
{{- end -}}

{{/* Where the checkpoint is for the engine; empty: the embedded stand-in. */}}
{{- define "captioner.modelPath" -}}
{{- if ne .Values.model.source "embedded" }}/models/{{ .Values.model.directory }}{{ end -}}
{{- end -}}

{{/* Every setting that the service is given by name, as YAML: `settings`, and what follows from other values. */}}
{{- define "captioner.settings" -}}
{{- $times := include "captioner.times" . | fromJson -}}
{{- $ray := eq .Values.workload "rayservice" -}}
{{- $given := dict
  "shutdown_grace_s" $times.grace
  "stream_timeout_s" $times.longest
  "response_timeout_s" $times.whole
  "audio_workers" (int .Values.frontend.cpus)
  "tensor_parallel" (max 1 (int .Values.engine.gpus))
  "uploads_dir" "/var/lib/captioner/uploads"
  "download_dir" "/tmp"
  "data_dir" "/var/lib/captioner/data"
  "log_format" "json"
-}}
{{- if $ray -}}
{{- $given = merge $given (dict
  "min_frontends" .Values.frontend.replicas.min
  "max_frontends" .Values.frontend.replicas.max
  "frontend_cpus" .Values.frontend.cpus
  "min_engine_replicas" .Values.engine.replicas.min
  "max_engine_replicas" .Values.engine.replicas.max
  "engine_cpus" .Values.engine.cpus
  "engine_on_gpu" (gt (int .Values.engine.gpus) 0)
  "pin_roles_to_nodes" true
  "metrics_port" 9464) -}}
{{- else -}}
{{- $_ := set $given "host" "0.0.0.0" -}}
{{- $_ := set $given "port" 8000 -}}
{{- end -}}
{{- with include "captioner.modelPath" . -}}{{- $_ := set $given "model" . -}}{{- end -}}
{{- with include "captioner.publicUrl" . -}}{{- $_ := set $given "public_url" . -}}{{- end -}}
{{- $all := dict -}}
{{- range $name, $value := merge (deepCopy .Values.settings) $given -}}
{{- /* Helm reads 10485759 as a float and would write 1.0485759e+07. */ -}}
{{- if and (kindIs "float64" $value) (eq (float64 (int64 $value)) (float64 $value)) -}}{{- $value = int64 $value -}}{{- end -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $all $name $value -}}{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* The origin that clients reach, when the chart knows it. */}}
{{- define "captioner.publicUrl" -}}
{{- $host := ternary .Values.ingress.host (first (append .Values.httpRoute.hostnames "")) .Values.ingress.enabled -}}
{{- if and (or .Values.ingress.enabled .Values.httpRoute.enabled) $host -}}
{{- $tls := ternary (ne .Values.ingress.tlsSecret "") .Values.httpRoute.https .Values.ingress.enabled -}}
{{- ternary "https" "http" $tls }}://{{ $host }}
{{- end -}}
{{- end -}}

{{/* Bytes that a request may have: a JSON body, or a form with a file. */}}
{{- define "captioner.maxBody" -}}
{{- max (int64 (default 16777216 .Values.settings.max_body_bytes)) (add 65536 (int64 (default 10485759 .Values.settings.max_upload_bytes))) -}}
{{- end -}}

{{/* Serve's configuration, as `serve deploy` takes it. */}}
{{- define "captioner.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: captioner
    route_prefix: /
    import_path: serving.cluster.deployments:build
    args:
{{ include "captioner.settings" . | indent 6 }}
{{- end -}}
