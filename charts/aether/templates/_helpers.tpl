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

{{- /* Several nodes have nothing in common but the bucket. */ -}}
{{- define "aether.store.replicas" -}}
{{- $store := .Values.store -}}
{{- if gt (int $store.replicas) 1 -}}
{{- if not $store.durable.s3.bucket }}{{ fail "store.replicas: several store nodes need a bucket that they share (store.durable.s3.bucket)" }}{{ end -}}
{{- if $store.persistence.hostPath }}{{ fail "store.replicas: several store nodes cannot share one directory (store.persistence.hostPath)" }}{{ end -}}
{{- end -}}
{{ $store.replicas }}
{{- end }}

{{- /* All nodes of the store, for those who place each content on one of them. Any node has everything, so that a fixed address
stands for all as well. */ -}}
{{- define "aether.store.nodes" -}}
{{- if or .Values.store.clusterIP (le (int .Values.store.replicas) 1) -}}
{{ include "aether.store" . }}
{{- else -}}
{{- $root := . -}}
{{- $nodes := list -}}
{{- range $n := until (int .Values.store.replicas) -}}
{{- $nodes = append $nodes (printf "https://aether-store-%d.aether-store-nodes.%s.svc:%v" $n $root.Release.Namespace $root.Values.store.port) -}}
{{- end -}}
{{ join "," $nodes }}
{{- end -}}
{{- end }}

{{- /* Drivers use the host's network, where the cluster's DNS does not answer: a fixed address wins over the name. */ -}}
{{- define "aether.store" -}}
{{- if .Values.store.clusterIP -}}
https://{{ .Values.store.clusterIP }}:{{ .Values.store.port }}
{{- else -}}
https://aether-store.{{ .Release.Namespace }}.svc:{{ .Values.store.port }}
{{- end -}}
{{- end }}

{{- /* What the store's certificate is made out to: its Service, the one for all its nodes, each node by name, and its address. */ -}}
{{- define "aether.store.names" -}}
{{- $nodes := printf "aether-store-nodes.%s.svc" .Release.Namespace -}}
{{- $names := list -}}
{{- range $name := list (printf "aether-store.%s.svc" .Release.Namespace) $nodes (printf "*.%s" $nodes) -}}
{{- $names = append (append $names $name) (printf "%s.cluster.local" $name) -}}
{{- end -}}
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
- --store={{ include "aether.store.nodes" . }}
- --store-ca=/var/run/aether/store/ca.crt
- --store-token=/var/run/aether/store/token
{{- end }}

{{- define "aether.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
