{{/* Parts that pods share. `root` is the chart's root context, `role` a section of the values. */}}

{{- define "captioner.podSecurity" -}}
{{- toYaml .Values.podSecurityContext }}
{{- end -}}

{{- define "captioner.containerSecurity" -}}
{{- toYaml .Values.securityContext }}
{{- end -}}

{{/* Placement of a pod. dict: root, role, component. */}}
{{- define "captioner.scheduling" -}}
{{- $role := .role -}}
{{- with default .root.Values.priorityClass.name $role.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- else }}
{{- if .root.Values.priorityClass.create }}
priorityClassName: {{ include "captioner.fullname" .root | quote }}
{{- end }}
{{- end }}
{{- with $role.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with $role.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- if $role.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml $role.topologySpreadConstraints | nindent 2 }}
{{- else if $role.spread }}
topologySpreadConstraints:
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "captioner.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Labels and annotations of a pod. dict: root, role, component. */}}
{{- define "captioner.podMetadata" -}}
labels:
  {{- include "captioner.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .role.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  {{- if eq .root.Values.workload "rayservice" }}
  ray.io/overwrite-container-cmd: "true"
  {{- end }}
  # A change of these checksums replaces the pods, which read both only when they start.
  checksum/config: {{ include "captioner.rayEnv" .root | sha256sum | trunc 16 | quote }}
  checksum/secrets: {{ list .root.Values.secrets.revision (include "captioner.secretName" .root) .root.Values.secrets.values | toJson | sha256sum | trunc 16 | quote }}
  {{- with .role.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Ray's environment from a copy of deploy/serve/ray.env, as YAML of a ConfigMap's data. */}}
{{- define "captioner.rayEnv" -}}
{{- $times := include "captioner.times" . | fromJson -}}
{{- $env := dict -}}
{{- range .Files.Lines "files/ray.env" -}}
{{- if and . (not (hasPrefix "#" .)) -}}
{{- $pair := splitn "=" 2 . -}}
{{- $_ := set $env $pair._0 ($pair._1 | trimAll "\"") -}}
{{- end -}}
{{- end -}}
{{- $_ := set $env "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S" (toString $times.grace) -}}
{{- /* Wrapper that renders HAProxy's own errors in the caller's dialect, at its path in the images of deploy/docker. */ -}}
{{- $_ := set $env "RAY_SERVE_HAPROXY_BINARY_PATH" "/opt/captioner/app/serving/cluster/haproxy_wrapper.py" -}}
{{- /* Ray compares all of Python's version; images of other bases differ in its last part. */ -}}
{{- if .Values.image.frontendTag -}}{{- $_ := set $env "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL" "minor" -}}{{- end -}}
{{- range $name, $value := .Values.ray.env -}}{{- $_ := set $env $name (toString $value) -}}{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{/* Environment variables of every container of the service. All files are written below /tmp. */}}
{{- define "captioner.baseEnv" -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: HF_HOME
  value: /tmp/huggingface
- name: CAPTIONER_UPLOAD_SECRET
  valueFrom:
    secretKeyRef: {name: {{ include "captioner.secretName" . | quote }}, key: upload-secret}
{{- end -}}

{{/* Address of the database, with its password. */}}
{{- define "captioner.databaseEnv" -}}
{{- $database := .Values.postgresql -}}
{{- if and $database.urlSecret.name (ne $database.mode "none") }}
- name: CAPTIONER_DATABASE_URL
  valueFrom:
    secretKeyRef: {name: {{ $database.urlSecret.name | quote }}, key: {{ $database.urlSecret.key | quote }}}
{{- else }}
{{- with include "captioner.databaseAddress" . }}
- name: DATABASE_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ default (include "captioner.secretName" $) $database.passwordSecret.name | quote }}, key: {{ $database.passwordSecret.key | quote }}}
- name: CAPTIONER_DATABASE_URL
  value: postgresql+psycopg://{{ $database.user }}:$(DATABASE_PASSWORD)@{{ . }}/{{ $database.database }}{{ with $database.parameters }}?{{ . }}{{ end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Environment variables of containers that know the callers: frontends, administration, tenants Job. */}}
{{- define "captioner.callersEnv" -}}
- name: CAPTIONER_API_KEYS
  valueFrom:
    secretKeyRef: {name: {{ include "captioner.secretName" . | quote }}, key: api-keys, optional: true}
- name: CAPTIONER_KEY_PEPPER
  valueFrom:
    secretKeyRef: {name: {{ include "captioner.secretName" . | quote }}, key: key-pepper}
{{- with include "captioner.databaseEnv" . | trim }}
{{ . }}
{{- end }}
{{- with include "captioner.redisAddress" . }}
{{- $redis := $.Values.redis }}
- name: REDIS_SECRET
  valueFrom:
    secretKeyRef: {name: {{ default (include "captioner.secretName" $) $redis.passwordSecret.name | quote }}, key: {{ $redis.passwordSecret.key | quote }}}
- name: CAPTIONER_REDIS_URL
  value: {{ ternary "rediss" "redis" $redis.tls }}://:$(REDIS_SECRET)@{{ . }}/{{ $redis.index }}
{{- end }}
{{- end -}}

{{/* Environment variables of containers that receive and read uploaded files. */}}
{{- define "captioner.objectStoreEnv" -}}
{{- if and .Values.objectStore.url .Values.objectStore.secret -}}
- name: CAPTIONER_OBJECT_STORE_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ .Values.objectStore.secret | quote }}, key: access-key-id, optional: true}
- name: CAPTIONER_OBJECT_STORE_SECRET_KEY
  valueFrom:
    secretKeyRef: {name: {{ .Values.objectStore.secret | quote }}, key: secret-key}
{{- end }}
{{- end -}}

{{/* Environment variables of containers that expose metrics: frontends and engines. */}}
{{- define "captioner.metricsEnv" -}}
{{- if .Values.monitoring.token -}}
- name: CAPTIONER_METRICS_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "captioner.secretName" . | quote }}, key: metrics-token}
{{- end }}
{{- end -}}

{{/* HTTP probe that fails after `seconds`. dict: path, port, seconds. */}}
{{- define "captioner.probe" -}}
httpGet: {path: {{ .path }}, port: {{ .port }}}
periodSeconds: 10
timeoutSeconds: 5
failureThreshold: {{ max 1 (div (add (int .seconds) 9) 10) }}
{{- end -}}

{{/*
Init container that checks the machine before anything is loaded (`doctor.mode`). dict: root, part (`engine` or
`frontend`), role, gpus. Its resources and volumes are those of the container that follows, so that it sees the same GPUs
and limits. A frontend's never fails the pod: the service starts without its database, and goes on when that comes.
*/}}
{{- define "captioner.doctorInit" -}}
{{- $root := .root -}}
{{- if ne $root.Values.doctor.mode "off" }}
- name: doctor-{{ .part }}
  image: {{ include (ternary "captioner.frontendImage" "captioner.image" (eq .part "frontend")) $root | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
  command:
    - captioner
    - doctor
    - --part={{ .part }}
    - --config=/etc/captioner-settings/captioner.toml
    {{- if or (eq .part "frontend") (eq $root.Values.doctor.mode "report") }}
    - --exit-zero
    {{- end }}
  env:
    {{- include "captioner.baseEnv" $root | nindent 4 }}
    {{- if eq .part "frontend" }}
    {{- include "captioner.callersEnv" $root | nindent 4 }}
    {{- end }}
    {{- if and (eq .part "engine") (ne $root.Values.model.source "embedded") }}
    - {name: HF_HUB_OFFLINE, value: "1"}
    {{- end }}
    {{- with .role.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .role.envFrom }}
  envFrom: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "captioner.containerSecurity" $root | nindent 4 }}
  resources: {{- include "captioner.resources" . | nindent 4 }}
  volumeMounts:
    - {name: scratch, mountPath: /tmp}
    - {name: settings, mountPath: /etc/captioner-settings, readOnly: true}
    {{- if eq .part "engine" }}
    {{- include "captioner.engineMounts" $root | nindent 4 }}
    {{- else }}
    {{- include "captioner.frontendMounts" $root | nindent 4 }}
    {{- end }}
    {{- with .role.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* Resources of a container with its GPUs. dict: root, role, gpus. */}}
{{- define "captioner.resources" -}}
{{- $resources := deepCopy .role.resources -}}
{{- if gt (int .gpus) 0 -}}
{{- $gpus := dict .root.Values.engine.gpuResource (int .gpus) -}}
{{- $resources = dict "requests" (merge (default dict $resources.requests) $gpus) "limits" (merge (default dict $resources.limits) $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Volume with the settings as a file. */}}
{{- define "captioner.settingsVolume" -}}
- name: settings
  configMap: {name: {{ include "captioner.fullname" . }}-settings}
{{- end -}}

{{/* Not empty if compiled kernels are in a claim. */}}
{{- define "captioner.cacheIsKept" -}}
{{- $cache := .Values.engine.compileCache -}}
{{- if or (eq $cache.storage "pvc") (and (eq $cache.storage "auto") (or $cache.existingClaim (eq .Values.model.source "pvc"))) -}}
true
{{- end -}}
{{- end -}}

{{- define "captioner.engineVolumes" -}}
{{- $cache := .Values.engine.compileCache -}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.engine.shmSize | quote }}}
- name: compile-cache
  {{- if include "captioner.cacheIsKept" . }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-compile-cache" (include "captioner.fullname" .)) $cache.existingClaim | quote }}
  {{- else }}
  emptyDir: {sizeLimit: {{ $cache.size | quote }}}
  {{- end }}
{{- if ne .Values.model.source "embedded" }}
- name: model
  {{- include "captioner.modelVolume" . | nindent 2 }}
- name: model-files
  configMap: {name: {{ include "captioner.fullname" . }}-model}
{{- end }}
{{- end -}}

{{/* Everything that vLLM, PyTorch, Triton, FlashInfer and the driver compile is below this directory. */}}
{{- define "captioner.cacheEnv" -}}
- {name: VLLM_CACHE_ROOT, value: /var/cache/captioner/vllm}
{{- end -}}

{{- define "captioner.engineMounts" -}}
- {name: shm, mountPath: /dev/shm}
- {name: compile-cache, mountPath: /var/cache/captioner}
{{- if ne .Values.model.source "embedded" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{/* Uploads, shared by all frontends unless they are in a bucket, and the ledger's journal of this pod. */}}
{{- define "captioner.frontendVolumes" -}}
- name: uploads
  {{- if and (eq .Values.uploads.storage "pvc") (not .Values.objectStore.url) }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-uploads" (include "captioner.fullname" .)) .Values.uploads.existingClaim | quote }}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.uploads.size | quote }}}
  {{- end }}
- name: data
  emptyDir: {sizeLimit: {{ .Values.frontend.dataSize | quote }}}
{{- end -}}

{{- define "captioner.frontendMounts" -}}
- {name: uploads, mountPath: /var/lib/captioner/uploads}
- {name: data, mountPath: /var/lib/captioner/data}
{{- end -}}

{{/* Security context of the bundled databases: their images use user 999. */}}
{{- define "captioner.storeSecurity" -}}
{{- toYaml (merge (dict "runAsUser" 999 "runAsGroup" 999 "fsGroup" 999) (deepCopy .Values.podSecurityContext)) }}
{{- end -}}

{{/*
Small pod of the service's image. dict: root, role, component, command, and optionally callers (whether it gets the
callers' variables), env, ports, probes, script (name of a ConfigMap mounted at /etc/captioner).
*/}}
{{- define "captioner.smallPod" -}}
{{- $root := .root -}}
serviceAccountName: {{ include "captioner.fullname" $root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "captioner.podSecurity" $root | nindent 2 }}
{{- with include "captioner.pullSecrets" $root | trim }}
{{ . }}
{{- end }}
{{- with include "captioner.scheduling" . | trim }}
{{ . }}
{{- end }}
containers:
  - name: {{ .component | quote }}
    image: {{ include "captioner.frontendImage" $root | quote }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
    command: {{- toYaml .command | nindent 6 }}
    env:
      {{- include "captioner.baseEnv" $root | nindent 6 }}
      {{- if .callers }}
      - name: CAPTIONER_DATA_DIR
        value: /var/lib/captioner/data
      {{- include "captioner.callersEnv" $root | nindent 6 }}
      {{- end }}
      {{- with .env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with .ports }}
    ports: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .probes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    securityContext: {{- include "captioner.containerSecurity" $root | nindent 6 }}
    resources: {{- toYaml .role.resources | nindent 6 }}
    volumeMounts:
      - {name: scratch, mountPath: /tmp}
      - {name: scratch, mountPath: /var/lib/captioner/data, subPath: data}
      {{- with .script }}
      - {name: scripts, mountPath: /etc/captioner, readOnly: true}
      {{- end }}
volumes:
  - name: scratch
    emptyDir: {sizeLimit: 1Gi}
  {{- with .script }}
  - name: scripts
    configMap: {name: {{ . | quote }}}
  {{- end }}
{{- end -}}
