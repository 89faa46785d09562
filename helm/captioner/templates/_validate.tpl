{{/* Checks that a schema cannot express: combinations of values. Each error names the values and the remedy. */}}
{{- define "captioner.validate" -}}
{{- $v := .Values -}}
{{- $ray := eq $v.workload "rayservice" -}}
{{- $errors := list -}}
{{- range $role := list "frontend" "engine" -}}
{{- $replicas := get (get $v $role) "replicas" -}}
{{- if gt (int $replicas.min) (int $replicas.max) -}}
{{- $errors = append $errors (printf "%s.replicas.min (%v) must not exceed %s.replicas.max (%v)" $role $replicas.min $role $replicas.max) -}}
{{- end -}}
{{- $stay := int (get $v $role).minAvailable -}}
{{- if and $stay (ge $stay (int $replicas.min)) -}}
{{- $errors = append $errors (printf "%s.minAvailable (%d) must be below %s.replicas.min (%v), or no node can be drained" $role $stay $role $replicas.min) -}}
{{- end -}}
{{- end -}}
{{- $named := printf "%s%s%s" (default $v.image.registry (get (default dict $v.global) "imageRegistry")) "|" $v.image.repository -}}
{{- if and (hasPrefix "|" $named) (not (contains "/" $named)) (ne $v.image.pullPolicy "Never") -}}
{{- $errors = append $errors "image.registry is required: the registry of the image that you have built and pushed (deploy/docker); for an image that is on the nodes already set image.pullPolicy to Never" -}}
{{- end -}}
{{- $frontends := ternary (int $v.frontend.replicas.max) (int $v.engine.replicas.max) $ray -}}
{{- if and (gt $frontends 1) (eq $v.uploads.storage "emptyDir") (not $v.objectStore.url) -}}
{{- $errors = append $errors "objectStore.url is required with several pods that accept requests, because pods do not see each other's uploads: set it to a bucket (s3://, gs://, az://), or uploads.storage to pvc where a storage class has ReadWriteMany" -}}
{{- end -}}
{{- if not $v.objectStore.url -}}
{{- range $name := list "endpoint" "region" "secret" "networks" "virtualHost" -}}
{{- if get $v.objectStore $name -}}
{{- $errors = append $errors (printf "objectStore.%s has no effect without objectStore.url; set both" $name) -}}
{{- end -}}
{{- end -}}
{{- else if and $v.networkPolicy.enabled (not $v.networkPolicy.fetch.enabled) (not $v.objectStore.networks) -}}
{{- $errors = append $errors "objectStore.networks is required with objectStore.url while networkPolicy.fetch.enabled is false, or no pod reaches the bucket" -}}
{{- end -}}
{{- if and (gt $frontends 1) (eq $v.postgresql.mode "none") -}}
{{- $errors = append $errors "postgresql.mode: none requires a single pod that accepts requests, because each pod would have separate keys and bills; use bundled or external" -}}
{{- end -}}
{{- range $store := list "postgresql" "redis" -}}
{{- $values := get $v $store -}}
{{- if and (eq $values.mode "external") $v.networkPolicy.enabled (not $values.networks) -}}
{{- $errors = append $errors (printf "%s.networks is required with %s.mode: external, or set networkPolicy.enabled to false" $store $store) -}}
{{- end -}}
{{- end -}}
{{- if and $ray $v.keda.enabled -}}
{{- $errors = append $errors "keda.enabled requires workload: deployment; Ray scales a RayService" -}}
{{- end -}}
{{- $zero := "^0+%?$" -}}
{{- with $v.deployment.rollingUpdate -}}
{{- if and (not $ray) (regexMatch $zero (toString .maxSurge)) (regexMatch $zero (toString .maxUnavailable)) -}}
{{- $errors = append $errors "deployment.rollingUpdate: maxSurge and maxUnavailable must not both be 0, or no pod can be replaced; set maxUnavailable to 1" -}}
{{- end -}}
{{- end -}}
{{- if eq $v.ray.upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $v.ray.autoscaler.enabled -}}
{{- $errors = append $errors "ray.autoscaler.enabled is required with NewClusterWithIncrementalUpgrade" -}}
{{- end -}}
{{- if not $v.ray.upgrade.incremental.gatewayClassName -}}
{{- $errors = append $errors "ray.upgrade.incremental.gatewayClassName is required with NewClusterWithIncrementalUpgrade" -}}
{{- end -}}
{{- if gt (int $v.ray.upgrade.incremental.stepSizePercent) (int $v.ray.upgrade.incremental.maxSurgePercent) -}}
{{- $errors = append $errors (printf "ray.upgrade.incremental.stepSizePercent (%v) must not exceed ray.upgrade.incremental.maxSurgePercent (%v)" $v.ray.upgrade.incremental.stepSizePercent $v.ray.upgrade.incremental.maxSurgePercent) -}}
{{- end -}}
{{- if or $v.ingress.enabled $v.httpRoute.enabled -}}
{{- $errors = append $errors "ray.upgrade.type: NewClusterWithIncrementalUpgrade creates a Gateway and a route, and no Service for an Ingress or HTTPRoute; set ingress.enabled and httpRoute.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- if and $v.settings.otlp_endpoint $v.networkPolicy.enabled (not $v.networkPolicy.traces.to) -}}
{{- $errors = append $errors "networkPolicy.traces.to is required with settings.otlp_endpoint, or set networkPolicy.enabled to false" -}}
{{- end -}}
{{- if and $v.monitoring.podMonitor.enabled (not $v.monitoring.token) (eq $v.workload "deployment") -}}
{{- $errors = append $errors "monitoring.token is required with monitoring.podMonitor.enabled and workload deployment: port 8000 answers no scrape without it" -}}
{{- end -}}
{{- if and (get $v.secrets.values "metrics-token") (not $v.monitoring.token) -}}
{{- $errors = append $errors "secrets.values.metrics-token has no effect unless monitoring.token is true" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $errors = append $errors "httpRoute.parentRefs is required with httpRoute.enabled" -}}
{{- end -}}
{{- with int64 $v.model.pvc.sizeGiB -}}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.existingClaim) (lt . (int64 $v.model.sizeGiB)) -}}
{{- $errors = append $errors (printf "model.pvc.sizeGiB (%d) must be at least model.sizeGiB (%d), or the model does not fit" . (int64 $v.model.sizeGiB)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.model.hub "modelscope") (eq $v.image.variant "cpu") (not $v.image.tag) (not $v.image.digest) (or (include "captioner.podDownloads" .) (and (eq $v.model.source "pvc") $v.model.download.enabled)) -}}
{{- $errors = append $errors "model.hub: modelscope requires the cuda image, which has its package; set image.variant to cuda, or take the model from another source" -}}
{{- end -}}
{{- if and (eq $v.backup.storage "objectStore") (not (and $v.backup.objectStore.path $v.backup.objectStore.secret)) -}}
{{- $errors = append $errors "backup.objectStore.path and backup.objectStore.secret are required with backup.storage: objectStore" -}}
{{- end -}}
{{- if and (not (has $v.backup.storage (list "auto" "none"))) (eq $v.postgresql.mode "none") -}}
{{- $errors = append $errors "backup.storage requires PostgreSQL: with postgresql.mode: none the database is in a pod; set backup.storage to auto" -}}
{{- end -}}
{{- if and (eq $v.model.source "objectStore") (not $v.model.objectStore.path) -}}
{{- $errors = append $errors "model.objectStore.path is required with model.source: objectStore, as bucket/prefix" -}}
{{- end -}}
{{- if and (eq $v.model.source "embedded") (gt (int $v.engine.gpus) 1) -}}
{{- $errors = append $errors "engine.gpus must be 0 or 1 with model.source: embedded" -}}
{{- end -}}
{{- if and (gt (int $v.engine.gpus) 0) (eq $v.image.variant "cpu") (not $v.image.tag) (not $v.image.digest) -}}
{{- $errors = append $errors "image.variant: the cpu image does not use GPUs; set engine.gpus to 0 or image.variant to cuda" -}}
{{- end -}}
{{- with (int $v.settings.max_input_tokens) -}}
{{- if ge . (int (default 65536 $v.settings.max_model_len)) -}}
{{- $errors = append $errors "settings.max_input_tokens must be below settings.max_model_len, or there is no room for a caption" -}}
{{- end -}}
{{- end -}}
{{- if and (eq (toString $v.settings.quantization) "fp8_per_block") (gt (int $v.engine.gpus) 2) -}}
{{- $errors = append $errors "settings.quantization: fp8_per_block cannot divide the experts over more than 2 GPUs; use fp8_per_channel" -}}
{{- end -}}
{{- if lt (int $v.drain.longestRequestSeconds) (int (default 15 $v.settings.heartbeat_s)) -}}
{{- $errors = append $errors "drain.longestRequestSeconds must be at least settings.heartbeat_s" -}}
{{- end -}}
{{- if and $ray (regexMatch "^[^a-z]" (include "captioner.fullname" .)) -}}
{{- $errors = append $errors "the release's name must begin with a letter, because KubeRay derives names of Services from it" -}}
{{- end -}}
{{- if $errors -}}
{{- fail (printf "\n- %s" (join "\n- " $errors)) -}}
{{- end -}}
{{- end -}}
