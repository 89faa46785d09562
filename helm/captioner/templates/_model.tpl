{{/* Checkpoint of the engines: its volume, and the containers that fetch and verify it. */}}

{{/* Volume source of the checkpoint, as YAML. */}}
{{- define "captioner.modelVolume" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "pvc" -}}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-model" (include "captioner.fullname" .)) $model.pvc.existingClaim | quote }}
  readOnly: true
{{- else if eq $model.source "hostPath" -}}
hostPath: {path: {{ $model.hostPath.path }}, type: Directory}
{{- else if has $model.source (list "hub" "objectStore") -}}
{{- $size := printf "%dGi" (add 10 (int $model.sizeGiB)) -}}
{{- with $model.copyStorageClass -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ . | quote }}
      resources:
        requests: {storage: {{ $size }}}
{{- else -}}
emptyDir: {sizeLimit: {{ $size }}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Resources of a container that copies the checkpoint. A copy on the node's disk is requested there, or the pod is evicted. */}}
{{- define "captioner.copyResources" -}}
{{- $model := .Values.model -}}
{{- $resources := deepCopy $model.resources -}}
{{- if and (has $model.source (list "hub" "objectStore")) (not $model.copyStorageClass) -}}
{{- $disk := dict "ephemeral-storage" (printf "%dGi" (add 10 (int $model.sizeGiB))) -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) $disk) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Not empty if an engine's pod downloads the checkpoint from the hub. */}}
{{- define "captioner.podDownloads" -}}
{{- if or (eq .Values.model.source "hub") (and (eq .Values.model.source "hostPath") .Values.model.hostPath.download) -}}yes{{- end -}}
{{- end -}}

{{/* Command of a download from the hub. */}}
{{- define "captioner.downloadCommand" -}}
{{- $model := .Values.model -}}
[python, /etc/captioner/model.py, fetch, {{ include "captioner.modelPath" . | quote }}, {{ $model.name | quote }}, {{ required "model.revision is required: the branch, tag or commit to download" $model.revision | quote }}]
{{- end -}}

{{/* Environment variables of a download from the hub. */}}
{{- define "captioner.downloadEnv" -}}
{{- $model := .Values.model -}}
- {name: HOME, value: /tmp}
{{- if eq $model.hub "modelscope" }}
- {name: VLLM_USE_MODELSCOPE, value: "True"}
- {name: MODELSCOPE_CACHE, value: /tmp/modelscope}
{{- else }}
- {name: HF_HOME, value: /tmp/huggingface}
{{- end }}
{{- with $model.download.tokenSecret }}
{{- if .name }}
- name: {{ ternary "MODELSCOPE_API_TOKEN" "HF_TOKEN" (eq $model.hub "modelscope") }}
  valueFrom:
    secretKeyRef: {name: {{ .name | quote }}, key: {{ .key | quote }}}
{{- end }}
{{- end }}
{{- with $model.download.env }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{/* Init containers of an engine: fetch the checkpoint, or wait for it, and verify its checksums. */}}
{{- define "captioner.modelInit" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "objectStore" }}
- name: fetch-model
  image: {{ $model.objectStore.image | quote }}
  args: [copy, --config=, --transfers=8, "store:{{ $model.objectStore.path }}", {{ include "captioner.modelPath" . | quote }}]
  envFrom:
    - secretRef: {name: {{ required "model.objectStore.secret is required: a Secret with RCLONE_CONFIG_STORE_TYPE and the credentials" $model.objectStore.secret | quote }}}
  env:
    - {name: XDG_CACHE_HOME, value: /tmp/cache}
  securityContext: {{- include "captioner.containerSecurity" . | nindent 4 }}
  resources: {{- include "captioner.copyResources" . | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: scratch, mountPath: /tmp}
{{- end }}
{{- if include "captioner.podDownloads" . }}
- name: fetch-model
  image: {{ include "captioner.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
  command: {{ include "captioner.downloadCommand" . }}
  env:
    {{- include "captioner.downloadEnv" . | nindent 4 }}
  securityContext: {{- include "captioner.containerSecurity" . | nindent 4 }}
  resources: {{- include "captioner.copyResources" . | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: model-files, mountPath: /etc/captioner, readOnly: true}
    - {name: scratch, mountPath: /tmp}
{{- else if ne $model.source "embedded" }}
- name: check-model
  image: {{ include "captioner.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
  command: [python, /etc/captioner/model.py, {{ ternary "wait" "verify" (and (eq $model.source "pvc") $model.download.enabled) }}, {{ include "captioner.modelPath" . | quote }}]
  env:
    - {name: HOME, value: /tmp}
  securityContext: {{- include "captioner.containerSecurity" . | nindent 4 }}
  resources: {{- toYaml $model.resources | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models, readOnly: true}
    - {name: model-files, mountPath: /etc/captioner, readOnly: true}
    - {name: scratch, mountPath: /tmp}
{{- end }}
{{- end -}}
