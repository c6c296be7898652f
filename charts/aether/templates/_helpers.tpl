{{- define "aether.image" -}}
{{- $images := .root.Values.images -}}
{{- $tag := default .root.Chart.AppVersion $images.tag -}}
{{- if $images.registry }}{{ $images.registry }}/{{ end }}{{ index $images .name }}:{{ $tag }}
{{- end }}

{{- define "aether.labels" -}}
app.kubernetes.io/name: aether
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "aether.selector" -}}
app.kubernetes.io/name: aether
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* Drivers use the host's network, where the cluster's DNS does not answer: a fixed address wins over the name. */ -}}
{{- define "aether.store" -}}
{{- if .Values.store.clusterIP -}}
http://{{ .Values.store.clusterIP }}:{{ .Values.store.port }}
{{- else -}}
http://aether-store.{{ .Release.Namespace }}.svc:{{ .Values.store.port }}
{{- end -}}
{{- end }}

{{- define "aether.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
