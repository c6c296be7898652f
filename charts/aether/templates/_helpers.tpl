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
https://{{ .Values.store.clusterIP }}:{{ .Values.store.port }}
{{- else -}}
https://aether-store.{{ .Release.Namespace }}.svc:{{ .Values.store.port }}
{{- end -}}
{{- end }}

{{- /* What the store's certificate is made out to: its Service, the pods of it by name, and its address. */ -}}
{{- define "aether.store.names" -}}
{{- $service := printf "aether-store.%s.svc" .Release.Namespace -}}
{{- $names := list $service (printf "%s.cluster.local" $service) (printf "*.%s" $service) (printf "*.%s.cluster.local" $service) -}}
{{- with .Values.store.clusterIP }}{{ $names = append $names . }}{{ end -}}
{{- toJson $names -}}
{{- end }}

{{- /* What a program needs to be let into the store: whom to believe, and a token for the store alone. The operator makes the
ConfigMap; pods wait for it. */ -}}
{{- define "aether.storeAccess.volume" -}}
- name: store-access
  projected:
    sources:
      - serviceAccountToken: {audience: aether-store, expirationSeconds: 3600, path: token}
      - configMap:
          name: aether-store-ca
          items: [{key: ca.crt, path: ca.crt}]
{{- end }}

{{- define "aether.storeAccess.mount" -}}
- {name: store-access, mountPath: /var/run/aether/store, readOnly: true}
{{- end }}

{{- define "aether.storeAccess.args" -}}
- --store={{ include "aether.store" . }}
- --store-ca=/var/run/aether/store/ca.crt
- --store-token=/var/run/aether/store/token
{{- end }}

{{- define "aether.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
