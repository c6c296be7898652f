//! YAML that tests and the demo apply: placeholders, pods, and custom resource definitions fit for an old API server.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::images::TOOLS;

/// Puts values in the place of `${NAME}`; a placeholder without a value, or a value without a placeholder, is an error.
pub fn substitute(text: &str, values: &[(&str, &str)]) -> Result<String> {
    let mut text = text.to_owned();
    for (name, value) in values {
        let placeholder = format!("${{{name}}}");
        if !text.contains(&placeholder) {
            bail!("there is no {placeholder} in\n{text}");
        }
        text = text.replace(&placeholder, value);
    }
    if let Some(at) = text.find("${") {
        bail!("no value for {}", text[at..].split_inclusive('}').next().unwrap_or_default());
    }
    Ok(text)
}

/// A pod of an agent (uid 1000) on a node, that runs a script.
pub fn pod(name: &str, node: &str, script: &str) -> Result<String> {
    pod_with_volumes(name, node, script, &json!([]))
}

/// As [`pod`], with volumes; each is mounted at `/<its name>`.
pub fn pod_with_volumes(name: &str, node: &str, script: &str, volumes: &Value) -> Result<String> {
    let names = volumes.as_array().context("volumes are a list")?.iter().map(|volume| volume["name"].as_str());
    let mounts: Vec<Value> = names
        .map(|name| name.map(|name| json!({"name": name, "mountPath": format!("/{name}")})))
        .collect::<Option<_>>()
        .context("a volume has a name")?;
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            // By label, not by name: the scheduler must see the pod.
            "nodeSelector": {"kubernetes.io/hostname": node},
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 2,
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
            "containers": [{
                "name": "main",
                "image": TOOLS,
                "imagePullPolicy": "Never",
                // As process 1 a shell ignores the signal that asks it to end.
                "command": ["bash", "-c", format!("trap 'exit 0' TERM; {{ {script}\n}} & wait $!")],
                "volumeMounts": mounts,
            }],
            "volumes": volumes,
        },
    });
    Ok(serde_yaml::to_string(&pod)?)
}

/// The custom resource definitions of a folder as one YAML stream, without CEL rules: Kubernetes 1.20 drops them on create
/// and refuses them in server-side apply.
pub fn definitions_without_rules(folder: &Path) -> Result<String> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let mut out = String::new();
    for file in files {
        for document in serde_yaml::Deserializer::from_str(&fs::read_to_string(&file)?) {
            let mut value: Value =
                serde::Deserialize::deserialize(document).with_context(|| format!("cannot read {}", file.display()))?;
            remove_rules(&mut value);
            out += "---\n";
            out += &serde_yaml::to_string(&value)?;
        }
    }
    Ok(out)
}

fn remove_rules(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("x-kubernetes-validations");
            map.values_mut().for_each(remove_rules);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_rules),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_and_values_match() {
        assert_eq!(substitute("a: ${A}, b: ${A}", &[("A", "1")]).unwrap(), "a: 1, b: 1");
        assert!(substitute("${A} ${B}", &[("A", "1")]).unwrap_err().to_string().contains("${B}"));
        assert!(substitute("a", &[("A", "1")]).is_err());
    }

    #[test]
    fn rules_are_removed_at_every_depth() {
        let folder = tempfile::tempdir().unwrap();
        let text = "spec:\n  x-kubernetes-validations: [{rule: self}]\n  list:\n  - keep: 1\n    x-kubernetes-validations: []\n";
        fs::write(folder.path().join("a.yaml"), text).unwrap();
        let out = definitions_without_rules(folder.path()).unwrap();
        assert_eq!(
            serde_yaml::from_str::<Value>(out.trim_start_matches("---\n")).unwrap(),
            json!({"spec": {"list": [{"keep": 1}]}})
        );
    }
}
