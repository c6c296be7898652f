//! The cluster itself: what the other tests take for granted.

use aether_e2e::{
    audit::Mark,
    git_server::{Credentials, GitServer},
    manifests::{pod, pod_with_volumes},
    network::HOST,
    testing::LIMIT,
    wait,
};
use anyhow::Result;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::{Api, api::DeleteParams};
use serde_json::json;

use crate::{alone_with_namespace, with_namespace};

/// Connects to an address and port from bash, and says whether it got through.
fn dial(address: &str, port: u16) -> String {
    format!("timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/{port}' && echo through || echo refused")
}

#[tokio::test]
async fn pods_on_both_nodes_reach_each_other_and_services_and_nothing_else() -> Result<()> {
    with_namespace("network", async |test| {
        let serve = "cd /tmp && echo served >index.html && exec python3 -m http.server 8080";
        test.tools.apply(&pod("server", "node-1", serve)?).await?;
        test.tools.apply(&pod("near", "node-1", "sleep infinity")?).await?;
        test.tools.apply(&pod("far", "node-2", "sleep infinity")?).await?;
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"},
            "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        test.tools.apply(&service.to_string()).await?;
        let server = test.until_ready("server").await?;
        let pod_address = server.status.and_then(|status| status.pod_ip).expect("a ready pod has an address");
        let service = test.api::<Service>().get("server").await?;
        let service_address = service.spec.and_then(|spec| spec.cluster_ip).expect("the service has an address");

        for client in ["near", "far"] {
            test.until_ready(client).await?;
            for (address, port) in
                [(pod_address.as_str(), 8080), (service_address.as_str(), 80), ("10.96.0.1", 443), (HOST, 6443)]
            {
                // kube-proxy may need a moment for a new service.
                wait::until(&format!("{client} reaches {address}:{port}"), LIMIT, async || {
                    Ok((test.tools.exec(client, &dial(address, port)).await?.trim() == "through").then_some(()))
                })
                .await?;
            }
            // A service that does not exist, a name server, a metadata server: none has a way out.
            for (address, port) in
                [("10.96.255.254", 80), ("10.255.255.53", 53), ("169.254.169.254", 80), ("192.0.2.1", 53)]
            {
                assert_eq!(
                    test.tools.exec(client, &dial(address, port)).await?.trim(),
                    "refused",
                    "{client} to {address}:{port}"
                );
            }
        }
        for node in test.cluster()?.nodes() {
            let through = node.run(&["bash", "-c", &dial(&service_address, 80)]).await?;
            assert_eq!(through.trim(), "through", "{} to a service", node.name());
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn logs_and_exec_and_exit_codes_come_through() -> Result<()> {
    with_namespace("logs", async |test| {
        test.tools.apply(&pod("talks", "node-2", "echo said; sleep infinity")?).await?;
        test.tools.apply(&pod("fails", "node-1", "exit 3")?).await?;
        test.until_ready("talks").await?;
        assert_eq!(test.tools.kubectl(&["logs", "talks"]).await?, "said\n");
        assert_eq!(test.tools.exec("talks", "id -u; id -un").await?, "1000\nagent\n");
        assert_eq!(test.tools.exec_output("talks", "echo wrong >&2; exit 7").await?.code, 7);
        assert!(!test.until_ended("fails").await?);
        let failed = test.api::<Pod>().get("fails").await?;
        let code = failed
            .status
            .and_then(|s| s.container_statuses)
            .and_then(|c| c[0].state.clone())
            .and_then(|s| s.terminated)
            .map(|t| t.exit_code);
        assert_eq!(code, Some(3));
        Ok(())
    })
    .await
}

#[tokio::test]
async fn nodes_have_file_systems_of_their_own_and_mounts_pass_both_ways_inside() -> Result<()> {
    with_namespace("mounts", async |test| {
        let [one, two] = &test.cluster()?.nodes()[..] else { panic!("two nodes") };
        let folder = format!("/var/lib/aether/{}", test.namespace);
        one.run(&["mkdir", "-p", &folder]).await?;
        assert_ne!(two.output(&["test", "-e", &folder]).await?.code, 0, "the folder of one node is seen on the other");
        // A privileged pod mounts; the node and a second pod see it.
        let both_ways = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mounter"},
            "spec": {
                "nodeName": "node-1", "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main", "image": aether_e2e::images::TOOLS, "imagePullPolicy": "Never",
                    "command": ["bash", "-c", "mkdir -p /shared/inner && mount -t tmpfs none /shared/inner && touch /shared/inner/seen && exec sleep infinity"],
                    "securityContext": {"privileged": true},
                    "volumeMounts": [{"name": "shared", "mountPath": "/shared", "mountPropagation": "Bidirectional"}],
                }],
                "volumes": [{"name": "shared", "hostPath": {"path": folder}}],
            },
        });
        test.tools.apply(&both_ways.to_string()).await?;
        test.until_ready("mounter").await?;
        let seen = format!("{folder}/inner/seen");
        wait::until("the node sees the pod's mount", LIMIT, async || Ok((one.output(&["test", "-e", &seen]).await?.code == 0).then_some(()))).await?;
        let outside = one.disk().join("aether").join(&test.namespace).join("inner/seen");
        assert!(!outside.exists(), "a mount of a node is seen on the machine");
        let volumes = json!([{"name": "shared", "hostPath": {"path": folder}}]);
        test.tools.apply(&pod_with_volumes("reader", "node-1", "test -e /shared/inner/seen", &volumes)?).await?;
        assert!(test.until_ended("reader").await?, "a second pod does not see the mount");
        one.run(&["umount", &format!("{folder}/inner")]).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_user_has_only_the_rights_that_are_given() -> Result<()> {
    with_namespace("users", async |test| {
        let client = test.cluster()?.client_for("alice", Some("reviewers")).await?;
        let pods = Api::<Pod>::namespaced(client, &test.namespace);
        let refused = pods.list(&Default::default()).await.expect_err("alice has no rights yet").to_string();
        assert!(refused.contains("alice"), "{refused}");
        test.tools.kubectl(&["create", "rolebinding", "reviewers", "--clusterrole=view", "--group=reviewers"]).await?;
        wait::until("the group's rights hold", LIMIT, async || Ok(Some(pods.list(&Default::default()).await?))).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_audit_log_tells_who_wrote() -> Result<()> {
    with_namespace("audit", async |test| {
        let mark = Mark::now(&test.cluster()?.paths)?;
        test.tools.kubectl(&["create", "configmap", "one"]).await?;
        test.tools.kubectl(&["get", "configmap", "one"]).await?;
        let ours = wait::until("the write is logged", LIMIT, async || {
            let writes: Vec<_> = mark
                .writes()?
                .into_iter()
                .filter(|write| write.namespace == test.namespace && write.resource == "configmaps")
                .collect();
            Ok((!writes.is_empty()).then_some(writes))
        })
        .await?;
        let [write] = &ours[..] else { panic!("one write, and no read: {ours:?}") };
        assert_eq!((write.verb.as_str(), write.user.as_str(), write.succeeded()), ("create", "kubernetes-admin", true));
        assert!(write.agent.starts_with("kubectl/"), "{}", write.agent);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn pods_clone_from_and_push_to_the_git_server_with_a_password() -> Result<()> {
    with_namespace("git", async |test| {
        let root = tempfile::tempdir()?;
        aether_e2e::command::run("git", ["init", "--quiet", "--bare", "--initial-branch=main", &root.path().join("repo.git").display().to_string()]).await?;
        let credentials = Credentials { user: "agent".into(), password: "secret".into() };
        let server = GitServer::start(root.path().to_owned(), Some(credentials)).await?;
        let url = server.url("repo.git");
        let with_password = url.replace("http://", "http://agent:secret@");
        test.tools.apply(&pod("agent", "node-1", "sleep infinity")?).await?;
        test.until_ready("agent").await?;
        let refused = test.tools.exec_output("agent", &format!("GIT_TERMINAL_PROMPT=0 git ls-remote {url}")).await?;
        assert_ne!(refused.code, 0, "the repository is served without a password");
        let script = format!(
            "export HOME=/tmp; git config --global user.email a@example.invalid; git config --global user.name a
             git init -q -b main /tmp/work; cd /tmp/work; head -c 3000000 /dev/urandom >blob; git add blob; git commit -qm one
             git push -q {with_password} main; git clone -q {with_password} /tmp/copy; cmp blob /tmp/copy/blob"
        );
        test.tools.exec("agent", &script).await?;
        Ok(())
    })
    .await
}

fn ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|conditions| conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

#[tokio::test]
async fn a_node_is_cut_off_and_comes_back_and_is_killed_and_starts_again_with_its_disk() -> Result<()> {
    alone_with_namespace("nodes", async |test| {
        let nodes = Api::<Node>::all(test.client.clone());
        let node = test.cluster()?.node("node-2")?;

        node.network().cut().await?;
        wait::object(&nodes, "node-2", "is not Ready", LIMIT, |node| !ready(node)).await?;
        assert!(node.process().is_some(), "a node that is cut off runs on");
        node.network().heal().await?;
        wait::object(&nodes, "node-2", "is Ready", LIMIT, ready).await?;

        node.run(&["touch", "/var/lib/aether/kept"]).await?;
        test.tools.apply(&pod("doomed", "node-2", "sleep infinity")?).await?;
        test.until_ready("doomed").await?;
        node.kill().await?;
        assert!(node.process().is_none());
        wait::object(&nodes, "node-2", "is not Ready", LIMIT, |node| !ready(node)).await?;
        test.cluster()?.start_node("node-2").await?;
        node.run(&["rm", "/var/lib/aether/kept"]).await?;
        // Again, at once: the API server has not yet noticed that it was gone.
        node.kill().await?;
        test.cluster()?.start_node("node-2").await?;
        test.api::<Pod>().delete("doomed", &DeleteParams::default().grace_period(0)).await?;
        test.tools.apply(&pod("after", "node-2", "sleep infinity")?).await?;
        test.until_ready("after").await?;
        Ok(())
    })
    .await
}
