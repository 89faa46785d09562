{{/* Labels of one component's pods. dict: root, component. */}}
{{- define "captioner.component" -}}
{{ include "captioner.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* NetworkPolicy peer: this release's pods of some components. dict: root, components. */}}
{{- define "captioner.peers" -}}
podSelector:
  matchLabels: {{- include "captioner.selector" .root | nindent 4 }}
  matchExpressions:
    - {key: app.kubernetes.io/component, operator: In, values: {{ .components | toJson }}}
{{- end -}}

{{/* NetworkPolicy. dict: root, name, and optionally components (default: all pods), ingress and egress rules, types. */}}
{{- define "captioner.policy" -}}
{{- /* An empty list of peers would allow everybody; in the values it means nobody, so such rules are dropped. */}}
{{- $ingress := list }}{{ range .ingress }}{{ if .from }}{{ $ingress = append $ingress . }}{{ end }}{{ end }}
{{- $egress := list }}{{ range .egress }}{{ if .to }}{{ $egress = append $egress . }}{{ end }}{{ end -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "captioner.fullname" .root }}-{{ .name }}
  labels: {{- include "captioner.labels" .root | nindent 4 }}
spec:
  {{- if .components }}
  {{- include "captioner.peers" . | nindent 2 }}
  {{- else }}
  podSelector:
    matchLabels: {{- include "captioner.selector" .root | nindent 6 }}
  {{- end }}
  policyTypes:
    {{- if or (hasKey . "ingress") (has "Ingress" (default list .types)) }}
    - Ingress
    {{- end }}
    {{- if or .egress (has "Egress" (default list .types)) }}
    - Egress
    {{- end }}
  {{- with $ingress }}
  ingress: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $egress }}
  egress: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
