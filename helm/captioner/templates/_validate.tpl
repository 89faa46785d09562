{{/* What a schema cannot say: values that do not fit together. Each error tells what to change. */}}
{{- define "captioner.validate" -}}
{{- $v := .Values -}}
{{- $ray := eq $v.workload "rayservice" -}}
{{- $errors := list -}}
{{- range $role := list "frontend" "engine" -}}
{{- $replicas := get (get $v $role) "replicas" -}}
{{- if gt (int $replicas.min) (int $replicas.max) -}}
{{- $errors = append $errors (printf "%s.replicas: min %v is above max %v" $role $replicas.min $replicas.max) -}}
{{- end -}}
{{- $stay := int (get $v $role).minAvailable -}}
{{- if and $stay (ge $stay (int $replicas.min)) -}}
{{- $errors = append $errors (printf "%s.minAvailable is not below %s.replicas.min: no node could be drained" $role $role) -}}
{{- end -}}
{{- end -}}
{{- $frontends := ternary (int $v.frontend.replicas.max) (int $v.engine.replicas.max) $ray -}}
{{- if and (gt $frontends 1) (eq $v.uploads.storage "emptyDir") -}}
{{- $errors = append $errors "uploads.storage: emptyDir is for one pod that takes requests; what is uploaded to one, another would not find: use pvc" -}}
{{- end -}}
{{- if and (gt $frontends 1) (eq $v.postgresql.mode "none") -}}
{{- $errors = append $errors "postgresql.mode: none gives each pod a database of its own, with other keys and bills: use bundled or external" -}}
{{- end -}}
{{- range $store := list "postgresql" "redis" -}}
{{- $values := get $v $store -}}
{{- if and (eq $values.mode "external") $v.networkPolicy.enabled (not $values.networks) -}}
{{- $errors = append $errors (printf "%s.networks: name where the external one is (or set networkPolicy.enabled to false)" $store) -}}
{{- end -}}
{{- end -}}
{{- if and $ray $v.keda.enabled -}}
{{- $errors = append $errors "keda.enabled: a RayService has no scale that KEDA could set; Ray scales it. KEDA is for workload: deployment" -}}
{{- end -}}
{{- $zero := "^0+%?$" -}}
{{- with $v.deployment.rollingUpdate -}}
{{- if and (not $ray) (regexMatch $zero (toString .maxSurge)) (regexMatch $zero (toString .maxUnavailable)) -}}
{{- $errors = append $errors "deployment.rollingUpdate: with maxSurge 0 and maxUnavailable 0 no pod could be replaced; set maxUnavailable to 1" -}}
{{- end -}}
{{- end -}}
{{- if eq $v.ray.upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $v.ray.autoscaler.enabled -}}
{{- $errors = append $errors "ray.upgrade.type: KubeRay needs ray.autoscaler.enabled for it" -}}
{{- end -}}
{{- if not $v.ray.upgrade.incremental.gatewayClassName -}}
{{- $errors = append $errors "ray.upgrade.incremental.gatewayClassName: which class of Gateway?" -}}
{{- end -}}
{{- if gt (int $v.ray.upgrade.incremental.stepSizePercent) (int $v.ray.upgrade.incremental.maxSurgePercent) -}}
{{- $errors = append $errors "ray.upgrade.incremental: stepSizePercent is above maxSurgePercent" -}}
{{- end -}}
{{- if or $v.ingress.enabled $v.httpRoute.enabled -}}
{{- $errors = append $errors "ray.upgrade.type: with this type KubeRay makes a Gateway and a route of its own, and no Service that an Ingress or HTTPRoute could use: switch those off" -}}
{{- end -}}
{{- end -}}
{{- if and $v.settings.otlp_endpoint $v.networkPolicy.enabled (not $v.networkPolicy.traces.to) -}}
{{- $errors = append $errors "networkPolicy.traces.to: name where settings.otlp_endpoint is (or set networkPolicy.enabled to false)" -}}
{{- end -}}
{{- if and (get $v.secrets.values "metrics-token") (not $v.monitoring.token) -}}
{{- $errors = append $errors "secrets.values.metrics-token: nobody asks for it unless monitoring.token is true" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $errors = append $errors "httpRoute.parentRefs: which Gateway?" -}}
{{- end -}}
{{- with int64 $v.model.pvc.sizeGiB -}}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.existingClaim) (lt . (int64 $v.model.sizeGiB)) -}}
{{- $errors = append $errors "model.pvc.sizeGiB is below model.sizeGiB: the model would not fit" -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.model.source "objectStore") (not $v.model.objectStore.path) -}}
{{- $errors = append $errors "model.objectStore.path: which bucket and prefix?" -}}
{{- end -}}
{{- if and (eq $v.model.source "embedded") (gt (int $v.engine.gpus) 1) -}}
{{- $errors = append $errors "engine.gpus: the embedded stand-in is for one GPU or none" -}}
{{- end -}}
{{- if and (gt (int $v.engine.gpus) 0) (eq $v.image.variant "cpu") (not $v.image.tag) (not $v.image.digest) -}}
{{- $errors = append $errors "image.variant: the cpu image does not use GPUs; set engine.gpus to 0, or the variant to cuda" -}}
{{- end -}}
{{- with (int $v.settings.max_input_tokens) -}}
{{- if ge . (int (default 65536 $v.settings.max_model_len)) -}}
{{- $errors = append $errors "settings: max_input_tokens leaves no room in max_model_len" -}}
{{- end -}}
{{- end -}}
{{- if and (eq (toString $v.settings.quantization) "fp8_per_block") (gt (int $v.engine.gpus) 2) -}}
{{- $errors = append $errors "settings.quantization: fp8_per_block does not divide the experts over more than 2 GPUs; use fp8_per_channel" -}}
{{- end -}}
{{- if lt (int $v.drain.longestRequestSeconds) (int (default 15 $v.settings.heartbeat_s)) -}}
{{- $errors = append $errors "drain.longestRequestSeconds is below one heartbeat" -}}
{{- end -}}
{{- if and $ray (regexMatch "^[^a-z]" (include "captioner.fullname" .)) -}}
{{- $errors = append $errors "the release's name must begin with a letter: KubeRay makes Services of it" -}}
{{- end -}}
{{- if $errors -}}
{{- fail (printf "\n- %s" (join "\n- " $errors)) -}}
{{- end -}}
{{- end -}}
