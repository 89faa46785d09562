{{/* Settings of the service, and the durations that depend on each other. */}}

{{/*
Durations in seconds as JSON, all derived from `drain.longestRequestSeconds` (L). Order of a pod's shutdown:
  1. It leaves the Service's endpoints, and its replicas are replaced on other nodes: 60 s for a frontend, `replace` for an
     engine, which is the time for a new pod to copy the model, if it does, and to load it.
  2. Its replicas accept no new request and finish the running ones: `grace` = L + margin.
  3. Its proxy finishes the last streams that pass through it: `proxy` = 30 + margin.
  4. The engine stops: `engineStop`. The container is stopped at the latest after `termination`.
*/}}
{{- define "captioner.times" -}}
{{- $longest := int .Values.drain.longestRequestSeconds -}}
{{- $margin := int .Values.drain.marginSeconds -}}
{{- $load := include "captioner.loadSeconds" . | int -}}
{{- $replace := mul $load (ternary 2 1 (or (eq .Values.model.source "objectStore") (ne (include "captioner.podDownloads" .) ""))) -}}
{{- $grace := add $longest $margin -}}
{{- $proxy := add 30 $margin -}}
{{- $engineStop := 30 -}}
{{- $frontend := add 60 $grace $proxy -}}
{{- $engine := add $replace $grace $proxy -}}
{{- dict
  "longest" $longest
  "response" (min $longest 280)
  "grace" $grace
  "load" $load
  "replace" $replace
  "frontendPreStop" $frontend
  "frontendTermination" (add $frontend $engineStop $margin)
  "enginePreStop" $engine
  "engineTermination" (add $engine $engineStop $margin)
  "clusterDeletion" (add $grace $proxy)
  "soloPreStop" 10
  "soloTermination" (add 10 $grace $engineStop $margin)
| toJson -}}
{{- end -}}

{{/* Seconds allowed for loading the model: 1.5 times its size at the slowest expected read rate, plus two minutes. */}}
{{- define "captioner.loadSeconds" -}}
{{- add 120 (div (mul 3 1024 (int .Values.model.sizeGiB)) (mul 2 (int .Values.model.readMiBPerSecond))) -}}
{{- end -}}

{{/* Path of the checkpoint in the engine's container. Empty: the embedded stand-in. */}}
{{- define "captioner.modelPath" -}}
{{- if ne .Values.model.source "embedded" }}/models/{{ .Values.model.directory }}{{ end -}}
{{- end -}}

{{/* Every setting passed to the service, as YAML: `settings`, and settings derived from other values. */}}
{{- define "captioner.settings" -}}
{{- $times := include "captioner.times" . | fromJson -}}
{{- $ray := eq .Values.workload "rayservice" -}}
{{- $given := dict
  "shutdown_grace_s" $times.grace
  "stream_timeout_s" $times.longest
  "response_timeout_s" $times.response
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
{{- with .Values.objectStore.url -}}
{{- $store := $.Values.objectStore -}}
{{- $_ := set $given "object_store_url" . -}}
{{- with $store.endpoint -}}{{- $_ := set $given "object_store_endpoint" . -}}{{- end -}}
{{- with $store.region -}}{{- $_ := set $given "object_store_region" . -}}{{- end -}}
{{- if $store.virtualHost -}}{{- $_ := set $given "object_store_virtual_host" true -}}{{- end -}}
{{- end -}}
{{- with include "captioner.modelPath" . -}}{{- $_ := set $given "model" . -}}{{- end -}}
{{- with include "captioner.publicUrl" . -}}{{- $_ := set $given "public_url" . -}}{{- end -}}
{{- $all := dict -}}
{{- range $name, $value := merge (deepCopy .Values.settings) $given -}}
{{- /* Helm reads 10485759 as a float and would write 1.0485759e+07. */ -}}
{{- if and (kindIs "float64" $value) (eq (float64 (int64 $value)) (float64 $value)) -}}{{- $value = int64 $value -}}{{- end -}}
{{- /* As JSON, for the same reason: a table may have numbers at any depth. */ -}}
{{- if kindIs "map" $value -}}{{- $value = toJson $value -}}{{- end -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $all $name $value -}}{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Origin that clients reach. Empty if the chart does not know it. */}}
{{- define "captioner.publicUrl" -}}
{{- $host := ternary .Values.ingress.host (first (append .Values.httpRoute.hostnames "")) .Values.ingress.enabled -}}
{{- if and (or .Values.ingress.enabled .Values.httpRoute.enabled) $host -}}
{{- $tls := ternary (ne .Values.ingress.tlsSecret "") .Values.httpRoute.https .Values.ingress.enabled -}}
{{- ternary "https" "http" $tls }}://{{ $host }}
{{- end -}}
{{- end -}}

{{/* Maximum size of a request in bytes: of a JSON body, or of a form with a file. */}}
{{- define "captioner.maxBody" -}}
{{- $file := max (int64 (default 10485759 .Values.settings.max_upload_bytes)) (int64 (default 26214400 .Values.settings.max_transcription_bytes)) (int64 (default 209715200 .Values.settings.max_file_bytes)) -}}
{{- max (int64 (default 16777216 .Values.settings.max_body_bytes)) (add 327680 $file) -}}
{{- end -}}

{{/* Ray Serve's configuration, in the format of `serve deploy`. */}}
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
