//! Whether a pod is the import that the operator asked for. Pure.
//!
//! An import's last words become a tree that sessions mount, so it matters who said them. Labels, owner references and
//! even the Job can be written by whoever may create objects in the source's namespace. So pods are compared with the
//! template that the operator makes itself, in all that decides which program runs, on what, and who else can speak in
//! its place; a pod that is equal in this says what the operator's own would have said, whoever made it. What the API
//! server and admission add beside that (defaults, resources, tolerations, labels) may differ.

use k8s_openapi::api::core::v1::{Container, PodSpec, PodTemplateSpec, VolumeMount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Where the service account admission mounts the API server's token.
const ACCOUNT_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// What the API server fills in where nothing is said.
const DEFAULT_ACCOUNT: &str = "default";
const DEFAULT_DNS: &str = "ClusterFirst";
const DEFAULT_WORDS: &str = "/dev/termination-log";

/// What of a pod, or of a Job's template, is not as `wanted` says; nothing when it is genuine.
pub(crate) fn difference(
    wanted: &PodTemplateSpec,
    metadata: Option<&ObjectMeta>,
    spec: Option<&PodSpec>,
) -> Option<&'static str> {
    let (Some(wanted_spec), Some(spec)) = (&wanted.spec, spec) else { return Some("spec") };
    let annotations = |metadata: Option<&ObjectMeta>| metadata?.annotations.clone();
    let given = annotations(metadata).unwrap_or_default();
    let annotated = annotations(wanted.metadata.as_ref())
        .unwrap_or_default()
        .iter()
        .all(|(name, value)| given.get(name) == Some(value));
    let same = [
        ("annotations", annotated),
        ("serviceAccountName", account(wanted_spec) == account(spec)),
        ("initContainers", is_empty(&spec.init_containers)),
        ("ephemeralContainers", is_empty(&spec.ephemeral_containers)),
        ("restartPolicy", wanted_spec.restart_policy == spec.restart_policy),
        (
            "a namespace of the node, or one that its containers share",
            [spec.host_network, spec.host_pid, spec.host_ipc, spec.share_process_namespace]
                .iter()
                .all(|shared| *shared != Some(true)),
        ),
        // Another answer to the name of the repository or of the store is another repository or store.
        ("hostAliases", is_empty(&spec.host_aliases)),
        ("dnsPolicy", spec.dns_policy.as_deref().is_none_or(|policy| policy == DEFAULT_DNS)),
        ("dnsConfig", spec.dns_config.is_none()),
        ("enableServiceLinks", wanted_spec.enable_service_links == spec.enable_service_links),
        (
            "volumes",
            wanted_spec.volumes.iter().flatten().all(|volume| spec.volumes.iter().flatten().any(|v| v == volume)),
        ),
    ];
    if let Some((what, _)) = same.into_iter().find(|(_, same)| !same) {
        return Some(what);
    }
    match (&wanted_spec.containers[..], &spec.containers[..]) {
        ([wanted], [container]) => container_difference(wanted, container),
        _ => Some("containers"),
    }
}

fn container_difference(wanted: &Container, container: &Container) -> Option<&'static str> {
    let words = container.termination_message_path.as_deref();
    let same = [
        ("name", wanted.name == container.name),
        ("image", wanted.image == container.image),
        ("command", list(&wanted.command) == list(&container.command)),
        ("args", list(&wanted.args) == list(&container.args)),
        ("env", list(&wanted.env) == list(&container.env)),
        ("envFrom", is_empty(&container.env_from)),
        ("workingDir", container.working_dir.is_none()),
        ("volumeMounts", mounts(wanted).eq(mounts(container))),
        ("volumeDevices", is_empty(&container.volume_devices)),
        ("stdin", container.stdin != Some(true) && container.tty != Some(true)),
        // Each of these can run another program in the container.
        ("lifecycle", container.lifecycle.is_none()),
        (
            "a probe",
            container.liveness_probe.is_none()
                && container.readiness_probe.is_none()
                && container.startup_probe.is_none(),
        ),
        ("terminationMessagePath", words.is_none_or(|path| path == DEFAULT_WORDS)),
        ("terminationMessagePolicy", wanted.termination_message_policy == container.termination_message_policy),
    ];
    same.into_iter().find(|(_, same)| !same).map(|(what, _)| what)
}

fn account(spec: &PodSpec) -> &str {
    spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or(DEFAULT_ACCOUNT)
}

fn mounts(container: &Container) -> impl Iterator<Item = &VolumeMount> {
    list(&container.volume_mounts).iter().filter(|mount| mount.mount_path != ACCOUNT_MOUNT)
}

fn list<T>(list: &Option<Vec<T>>) -> &[T] {
    list.as_deref().unwrap_or_default()
}

fn is_empty<T>(of: &Option<Vec<T>>) -> bool {
    list(of).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn template() -> Value {
        json!({"metadata": {"annotations": {"aether.dev/store-ca": "pem"}}, "spec": {
            "restartPolicy": "Never", "serviceAccountName": "aether-importer", "enableServiceLinks": false,
            "volumes": [{"name": "work", "emptyDir": {}}],
            "containers": [{"name": "importer", "image": "i:1", "args": ["git"], "env": [{"name": "HOME", "value": "/tmp"}],
                "volumeMounts": [{"name": "work", "mountPath": "/tmp"}], "terminationMessagePolicy": "FallbackToLogsOnError"}]}})
    }

    fn compare(given: &Value) -> Option<&'static str> {
        let wanted = serde_json::from_value(template()).unwrap();
        let given: PodTemplateSpec = serde_json::from_value(given.clone()).unwrap();
        difference(&wanted, given.metadata.as_ref(), given.spec.as_ref())
    }

    #[test]
    fn what_a_cluster_adds_to_every_pod_is_no_difference() {
        let mut given = template();
        given["metadata"]["annotations"]["cni"] = json!("10.0.0.7");
        given["metadata"]["labels"] = json!({"job-name": "j"});
        let spec = &mut given["spec"];
        spec["serviceAccount"] = json!("aether-importer");
        spec["dnsPolicy"] = json!("ClusterFirst");
        spec["nodeName"] = json!("n");
        spec["schedulerName"] = json!("default-scheduler");
        spec["tolerations"] = json!([{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]);
        spec["initContainers"] = json!([]);
        spec["volumes"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "kube-api-access-x", "projected": {"sources": []}}));
        let container = &mut spec["containers"][0];
        container["imagePullPolicy"] = json!("Always");
        container["resources"] = json!({"limits": {"memory": "1Gi"}});
        container["terminationMessagePath"] = json!("/dev/termination-log");
        container["volumeMounts"].as_array_mut().unwrap().push(
            json!({"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}),
        );
        assert_eq!(compare(&given), None);
    }

    #[test]
    fn whatever_could_speak_for_the_importer_is_one() {
        let cases = [
            ("/metadata/annotations/aether.dev~1store-ca", json!("another"), "annotations"),
            ("/spec/serviceAccountName", json!("default"), "serviceAccountName"),
            ("/spec/initContainers", json!([{"name": "x"}]), "initContainers"),
            ("/spec/ephemeralContainers", json!([{"name": "x"}]), "ephemeralContainers"),
            ("/spec/restartPolicy", json!("Always"), "restartPolicy"),
            ("/spec/hostAliases", json!([{"ip": "10.0.0.1"}]), "hostAliases"),
            ("/spec/dnsPolicy", json!("None"), "dnsPolicy"),
            ("/spec/dnsConfig", json!({"nameservers": ["10.0.0.1"]}), "dnsConfig"),
            ("/spec/enableServiceLinks", json!(true), "enableServiceLinks"),
            ("/spec/volumes/0", json!({"name": "work", "hostPath": {"path": "/x"}}), "volumes"),
            ("/spec/containers/1", json!({"name": "x"}), "containers"),
            ("/spec/containers/0/image", json!("i:2"), "image"),
            ("/spec/containers/0/command", json!(["sh"]), "command"),
            ("/spec/containers/0/args", json!(["git", "--more"]), "args"),
            ("/spec/containers/0/env/1", json!({"name": "LD_PRELOAD", "value": "/x"}), "env"),
            ("/spec/containers/0/envFrom", json!([{"prefix": "GIT_"}]), "envFrom"),
            ("/spec/containers/0/workingDir", json!("/x"), "workingDir"),
            ("/spec/containers/0/volumeMounts/1", json!({"name": "work", "mountPath": "/bin"}), "volumeMounts"),
            ("/spec/containers/0/stdin", json!(true), "stdin"),
            ("/spec/containers/0/lifecycle", json!({"postStart": {"exec": {"command": ["sh"]}}}), "lifecycle"),
            ("/spec/containers/0/startupProbe", json!({"exec": {"command": ["sh"]}}), "a probe"),
            ("/spec/containers/0/terminationMessagePath", json!("/source/words"), "terminationMessagePath"),
        ];
        for (pointer, value, expected) in cases {
            let mut given = template();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            match given.pointer_mut(parent).unwrap() {
                Value::Array(list) if key.parse() == Ok(list.len()) => list.push(value),
                Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
                parent => parent[key.replace("~1", "/")] = value,
            }
            assert_eq!(compare(&given), Some(expected), "{pointer}");
        }
        for shared in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"] {
            let mut given = template();
            given["spec"][shared] = json!(true);
            assert!(compare(&given).is_some(), "{shared}");
        }
    }
}
