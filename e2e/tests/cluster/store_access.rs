//! Who the store answers, on a cluster with real tokens.

use aether_e2e::images::{REGISTRY, TAG};
use aether_e2e::site::SYSTEM_NAMESPACE;
use aether_e2e::testing::Test;
use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::with_namespace;

/// Starts a pod under `account` that has the importer's programs, a token for the store, and the store's authority, and
/// knows these `hosts`.
pub(crate) async fn pod(test: &Test, name: &str, account: &str, hosts: &Value) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "serviceAccountName": account, "terminationGracePeriodSeconds": 1, "hostAliases": hosts,
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
            "containers": [{
                "name": "main", "image": format!("{REGISTRY}/importer:{TAG}"), "imagePullPolicy": "Never",
                "command": ["sleep", "infinity"],
                "volumeMounts": [{"name": "store", "mountPath": "/store"}],
            }],
            "volumes": [{"name": "store", "projected": {"sources": [
                {"serviceAccountToken": {"audience": "aether-store", "expirationSeconds": 600, "path": "token"}},
                {"configMap": {"name": "store-ca"}},
            ]}}],
        },
    });
    test.tools.apply(&pod.to_string()).await?;
    test.until_ready(name).await.map(drop)
}

#[tokio::test]
async fn an_agents_pod_is_refused_by_the_store_whatever_token_it_shows() -> Result<()> {
    with_namespace("store-access", async |test| {
        let system = test.tools.in_namespace(SYSTEM_NAMESPACE);
        let authority =
            system.kubectl(&["get", "configmap", "aether-store-ca", "--output=jsonpath={.data.ca\\.crt}"]).await?;
        // An authority is no secret.
        let literal = format!("--from-literal=ca.crt={authority}");
        test.tools.kubectl(&["create", "configmap", "store-ca", &literal]).await?;
        let address = "--output=jsonpath={.spec.clusterIP}:{.spec.ports[0].port}";
        let address = system.kubectl(&["get", "service", "aether-store", address]).await?;
        let import = async |pod: &str, options: &str| {
            let script = format!("cd /tmp && aether-importer empty --result /tmp/result --store {options}");
            test.tools.exec_output(pod, &script).await
        };
        let refused = async |pod: &str, options: &str, words: &[&str]| {
            let output = import(pod, options).await?;
            ensure!(output.code != 0, "{options} was let in: {}", output.stdout);
            for word in words {
                ensure!(output.stdout.contains(word), "{options}: no {word:?} in {}", output.stdout);
            }
            Ok(())
        };
        let tls = format!("https://{address} --store-ca /store/ca.crt");
        let own = "/var/run/secrets/kubernetes.io/serviceaccount/token";

        pod(test, "agent", "default", &json!([])).await?;
        refused("agent", &tls, &["Unauthenticated", "shows no token"]).await?;
        // For the API server: with its audience where tokens have any, without an end before Kubernetes 1.21.
        refused("agent", &format!("{tls} --store-token {own}"), &["Unauthenticated", "aether-store"]).await?;
        let account = format!("system:serviceaccount:{}:default", test.namespace);
        refused("agent", &format!("{tls} --store-token /store/token"), &["PermissionDenied", &account, "write"])
            .await?;
        refused("agent", &format!("http://{address}"), &["Unavailable"]).await?;

        // Under the account of imports, contents may be brought; that is all.
        test.tools.kubectl(&["create", "serviceaccount", "aether-importer"]).await?;
        pod(test, "import", "aether-importer", &json!([])).await?;
        let output = import("import", &format!("{tls} --store-token /store/token")).await?;
        ensure!(output.code == 0, "an import is refused: {}", output.stdout);
        Ok(())
    })
    .await
}
