{{/* Template of a Ray pod. dict: root, role, component, termination (seconds), and optionally preStop (seconds). */}}
{{- define "captioner.rayPod" -}}
{{- $root := .root -}}
{{- $times := include "captioner.times" $root | fromJson -}}
{{- $frontend := eq .component "frontend" -}}
{{- $engine := eq .component "engine" -}}
metadata:
  {{- include "captioner.podMetadata" . | nindent 2 }}
spec:
  {{- if ne .component "head" }}
  serviceAccountName: {{ include "captioner.fullname" $root | quote }}
  {{- end }}
  # Only the head's autoscaler has a token, mounted explicitly.
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .termination }}
  securityContext: {{- include "captioner.podSecurity" $root | nindent 4 }}
  {{- with include "captioner.pullSecrets" $root | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "captioner.scheduling" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- $init := "" }}
  {{- $check := dict "root" $root "role" .role "part" .component "gpus" (default 0 .role.gpus) }}
  {{- if $engine }}
  {{- $init = printf "%s\n%s" (include "captioner.modelInit" $root) (include "captioner.doctorInit" $check) }}
  {{- else if $frontend }}
  {{- $init = include "captioner.doctorInit" $check }}
  {{- end }}
  {{- with $init | trim }}
  initContainers: {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .component }}
      image: {{ include (ternary "captioner.image" "captioner.frontendImage" $engine) $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
      # KubeRay's start command as process 1, so that it receives SIGTERM.
      command: [/bin/bash, -c, --]
      args: ['ulimit -n 65536 || true; eval exec "$KUBERAY_GEN_RAY_START_CMD"']
      env:
        {{- include "captioner.baseEnv" $root | nindent 8 }}
        {{- if $frontend }}
        {{- include "captioner.callersEnv" $root | nindent 8 }}
        {{- with include "captioner.objectStoreEnv" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if ne .component "head" }}
        {{- with include "captioner.metricsEnv" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if $engine }}
        {{- include "captioner.cacheEnv" $root | nindent 8 }}
        {{- end }}
        {{- if and $engine (ne $root.Values.model.source "embedded") }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- with .role.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      envFrom:
        - configMapRef: {name: {{ include "captioner.fullname" $root }}-ray}
        {{- with .role.envFrom }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if eq .component "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
        - {name: haproxy, containerPort: 9101}
        {{- if ne .component "head" }}
        - {name: captions, containerPort: 9464}
        {{- end }}
      # Probes of Ray's processes only. A loading model or a busy engine does not fail them: the service's watchdog and
      # Ray Serve handle engines, and neither restarts a pod for that.
      startupProbe: {{- include "captioner.probe" (dict "path" "/api/healthz" "port" 52365 "seconds" $times.load) | nindent 8 }}
      livenessProbe: {{- include "captioner.probe" (dict "path" "/api/healthz" "port" 52365 "seconds" 120) | nindent 8 }}
      {{- if eq .component "head" }}
      readinessProbe: {{- include "captioner.probe" (dict "path" "/api/healthz" "port" 52365 "seconds" 60) | nindent 8 }}
      {{- else }}
      # Ready while its proxy has frontends. Removed from the endpoints at once when the node leaves the cluster.
      readinessProbe:
        httpGet: {path: /-/healthz, port: 8000}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 1
      {{- end }}
      {{- with .preStop }}
      lifecycle:
        preStop:
          exec:
            command: [/bin/bash, -c, 'captioner leave --instance "$RAY_CLOUD_INSTANCE_ID" --within-s {{ . }}; true']
      {{- end }}
      securityContext: {{- include "captioner.containerSecurity" $root | nindent 8 }}
      resources: {{- include "captioner.resources" $check | nindent 8 }}
      volumeMounts:
        - {name: scratch, mountPath: /tmp}
        {{- if $engine }}
        {{- include "captioner.engineMounts" $root | nindent 8 }}
        {{- else }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $frontend }}
        {{- include "captioner.frontendMounts" $root | nindent 8 }}
        {{- end }}
        {{- with .role.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: scratch
      emptyDir: {sizeLimit: {{ .role.scratchSize | quote }}}
    {{- if $engine }}
    {{- include "captioner.engineVolumes" $root | nindent 4 }}
    {{- else }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .role.shmSize | quote }}}
    {{- end }}
    {{- if $frontend }}
    {{- include "captioner.frontendVolumes" $root | nindent 4 }}
    {{- end }}
    {{- if and (or $engine $frontend) (ne $root.Values.doctor.mode "off") }}
    {{- include "captioner.settingsVolume" $root | nindent 4 }}
    {{- end }}
    {{- if and (eq .component "head") $root.Values.ray.autoscaler.enabled }}
    - name: kubernetes
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3600}
          - configMap:
              name: kube-root-ca.crt
              items: [{key: ca.crt, path: ca.crt}]
          - downwardAPI:
              items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
    {{- end }}
    {{- with .role.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Worker group. dict: root, role, component, preStop, termination (both in seconds). */}}
{{- define "captioner.workerGroup" -}}
{{- $auto := .root.Values.ray.autoscaler.enabled -}}
groupName: {{ .component | quote }}
minReplicas: {{ .role.replicas.min }}
maxReplicas: {{ .role.replicas.max }}
replicas: {{ ternary (max 1 (int .role.replicas.min)) (int .role.replicas.max) $auto }}
{{- if and $auto .role.idleTimeoutSeconds }}
idleTimeoutSeconds: {{ .role.idleTimeoutSeconds }}
{{- end }}
# Resources by which Ray places: one {{ .component }} per pod.
resources:
  CPU: {{ .role.cpus | quote }}
  {{- if .role.gpus }}
  GPU: {{ .role.gpus | quote }}
  {{- end }}
  {{ .component }}: "1"
rayStartParams:
  # Bytes. Requests and tokens do not pass through Ray's object store.
  object-store-memory: "268435456"
template: {{- include "captioner.rayPod" . | nindent 2 }}
{{- end -}}
