//! Several store nodes over a bucket, as the chart installs them: on the way there from one volume, and while nodes are killed in
//! the middle of uploads and all volumes are lost, nothing that was called durable is.

pub(crate) mod gate;
mod release;

use std::path::Path;
use std::time::Instant;

use aether_api::AetherCheckpoint;
use aether_api::session::Durability;
use aether_e2e::command::run;
use aether_e2e::git_server::GitServer;
use aether_e2e::site::SYSTEM_NAMESPACE;
use aether_e2e::story::Story;
use aether_e2e::testing::{LIMIT, Test};
use aether_e2e::wait;
use aether_testkit::bucket::Bucket;
use anyhow::{Result, ensure};
use kube::ResourceExt;
use serde_json::json;

use self::gate::Gate;
use self::release::{NODES, Release};
use crate::alone_with_namespace;
use crate::store_access;

/// Reads everything, and compares it with what was written.
const COMPARE: &str = "cd /workspace && sha256sum --check --quiet SUMS && git fsck --no-progress 2>&1 && git status --porcelain | grep -v '^??' || true";

/// What is done to the store's nodes while a checkpoint is on its way to the bucket.
enum Harm {
    /// `kill -9` of all at once.
    KillAll,
    /// All pods are deleted, as a drain does it.
    DeleteAll,
    /// All pods of one of the cluster's nodes are gone without notice.
    LoseOne,
}

#[tokio::test(flavor = "multi_thread")]
async fn three_store_nodes_over_a_bucket_lose_nothing_that_was_durable() -> Result<()> {
    alone_with_namespace("store-nodes", async |test| {
        let folder = tempfile::tempdir()?;
        for name in ["first", "second", "third"] {
            repository(folder.path(), name).await?;
        }
        let git = GitServer::start(folder.path().to_owned(), None).await?;
        let place = folder.path().to_owned();
        let bucket = tokio::task::spawn_blocking(move || Bucket::start(&place)).await?;
        let gate = Gate::before(&bucket.endpoint()).await?;

        let release = Release::find(test).await?;
        let played = play(test, &release, &gate, &git).await;
        if played.is_err() {
            // The store's logs go with its pods.
            eprintln!("{}", test.dump().await);
        }
        gate.open();
        let back = release.give_back().await;
        played?;
        back
    })
    .await
}

async fn play(test: &Test, release: &Release<'_>, gate: &Gate, git: &GitServer) -> Result<()> {
    let story = Story::new(test);
    release.move_to_claims().await?;
    source(&story, git, "first").await?;
    story.until_source_ready("first").await?;
    story.session_of("work", "first").await?;
    story.pod("agent", "work", Some(story.first_node())).await?;
    write(&story, "agent", "one-volume").await?;
    story.aether(&["checkpoint", "work", "--name", "one-volume", "--wait", "durable"]).await?;

    // From one volume to a bucket, and from one node to three, as docs/store-durable.md has it.
    let durable = release.bucket(&gate.endpoint()).await?;
    release.upgrade_from_an_older_chart(json!({"durable": durable})).await?;
    wait::until("all of the volume is in the bucket", 2 * LIMIT, async || {
        let compared = release.metric("aether-store-0", "aether_store_compared").await?;
        let pending = release.metric("aether-store-0", "aether_store_pending_blobs").await?;
        ensure!(compared == 1 && pending == 0, "{pending} blobs are pending, compared: {compared}");
        Ok(Some(()))
    })
    .await?;
    release.upgrade(json!({"durable": durable, "replicas": NODES})).await?;
    release.until_ready(NODES).await?;
    let mut nodes: Vec<_> = release.pods().await?.into_iter().filter_map(|pod| pod.spec?.node_name).collect();
    nodes.dedup();
    ensure!(nodes.len() > 1, "all nodes of the store are on {nodes:?}");
    by_one_name(test, release, git).await?;

    for (name, harm) in [("kill", Harm::KillAll), ("delete", Harm::DeleteAll), ("lose", Harm::LoseOne)] {
        checkpoint_under(&story, release, gate, name, &harm).await?;
    }
    import_under_kills(&story, release, gate, git).await?;

    release.lose_all_volumes().await?;
    story.delete_pod("agent").await?;
    let again = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": {"name": "again"},
        "spec": {"checkpoint": "lose", "owner": {"uid": 1000, "gid": 1000}},
    });
    story.apply(&again.to_string()).await?;
    story.pod("reader", "again", Some(story.second_node()?)).await?;
    let wrong = story.exec("reader", COMPARE).await?;
    ensure!(wrong.trim().is_empty(), "what the bucket gives is wrong: {wrong}");
    let files = story.exec("reader", "wc -l <SUMS").await?;
    for checkpoint in ["one-volume", "kill", "delete", "lose"] {
        let diff = story.aether(&["diff", "--checkpoint", checkpoint, "--name-only", "--color=never"]).await?;
        ensure!(diff.stdout.contains(&format!("{checkpoint}/large")), "the diff of {checkpoint}: {}", diff.stdout);
    }
    // They still take what is new.
    write(&story, "reader", "afterwards").await?;
    story.aether(&["checkpoint", "again", "--name", "afterwards", "--wait", "durable"]).await?;
    eprintln!(
        "store-nodes: {} files read right on the other node, from a bucket whose caches were all lost",
        files.trim()
    );
    for pod in ["reader", "by-name"] {
        story.delete_pod(pod).await?;
    }
    story.kubectl(&["delete", "aethersession,aethercheckpoint,aethersource", "--all", "--timeout=120s"]).await.map(drop)
}

/// A git repository of files that nobody has seen before.
async fn repository(folder: &Path, name: &str) -> Result<()> {
    let script = format!(
        "set -e; git init -q -b main {name}.work; cd {name}.work; mkdir small
        for i in $(seq 300); do head -c 3000 /dev/urandom >small/$i; done; head -c 6000000 /dev/urandom >large
        git add .; git -c user.name=agent -c user.email=agent@example.org commit -qm {name}
        git clone -q --bare . ../{name}.git"
    );
    run("bash", ["-c", &format!("cd {}; {script}", folder.display())]).await.map(drop)
}

async fn source(story: &Story, git: &GitServer, name: &str) -> Result<()> {
    let source = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": name},
        "spec": {"git": {"url": git.url(&format!("{name}.git")), "ref": "main"}},
    });
    story.apply(&source.to_string()).await
}

/// Writes small files and a large one into a folder of the session, and the sums of all there is.
async fn write(story: &Story, pod: &str, folder: &str) -> Result<()> {
    let script = format!(
        "mkdir {folder}; for i in $(seq 50); do head -c 2000 /dev/urandom >{folder}/$i; done
        head -c 9000000 /dev/urandom >{folder}/large
        find . -path ./.git -prune -o -type f ! -name SUMS -print0 | sort -z | xargs -0 sha256sum >SUMS"
    );
    story.exec(pod, &format!("cd /workspace; {script}")).await.map(drop)
}

/// Closes the gate, and opens it when the store was harmed while something was held there.
async fn harm_at(release: &Release<'_>, gate: &Gate, harm: &Harm) -> Result<()> {
    wait::until("an upload to the bucket is under way", LIMIT, async || Ok((gate.held() > 0).then_some(()))).await?;
    let nodes = release.nodes();
    match harm {
        Harm::KillAll => {
            let mut killed = 0;
            for node in nodes {
                killed += release.kill_on(node).await?;
            }
            ensure!(killed == NODES, "{killed} store nodes were killed");
        }
        Harm::DeleteAll => {
            release.delete_pods(&release.pods().await?, &["--wait=false"]).await?;
        }
        Harm::LoseOne => {
            let mut pods = release.pods().await?;
            pods.retain(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == nodes.first());
            release.delete_pods(&pods, &["--force", "--grace-period=0"]).await?;
        }
    }
    Ok(())
}

/// A checkpoint whose upload is under way when the store is harmed becomes durable all the same, and not before it is.
async fn checkpoint_under(story: &Story, release: &Release<'_>, gate: &Gate, name: &str, harm: &Harm) -> Result<()> {
    write(story, "agent", name).await?;
    gate.close();
    story.aether(&["checkpoint", "work", "--name", name, "--wait", "local"]).await?;
    harm_at(release, gate, harm).await?;
    let checkpoint: AetherCheckpoint = story.get(name).await?;
    let durability = checkpoint.status.and_then(|status| status.durability);
    ensure!(durability == Some(Durability::Local), "{name} is {durability:?}, and the bucket has not got it");
    let begun = Instant::now();
    gate.open();
    story
        .until(name, "is durable", 2 * LIMIT, |checkpoint: &AetherCheckpoint| {
            checkpoint.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable))
        })
        .await?;
    eprintln!("store-nodes: checkpoint {name} is durable {:.1} s after its harm", begun.elapsed().as_secs_f64());
    release.until_ready(NODES).await
}

/// An import goes on, or is begun again, when the store's nodes are killed in the middle.
async fn import_under_kills(story: &Story, release: &Release<'_>, gate: &Gate, git: &GitServer) -> Result<()> {
    gate.close();
    source(story, git, "second").await?;
    harm_at(release, gate, &Harm::KillAll).await?;
    gate.open();
    story.until_source_ready("second").await?;
    release.until_ready(NODES).await
}

/// A client that knows the nodes by the one name of their Service finds all of them, and the certificate is right at each. There is no
/// DNS here: a pod that has the name in its hosts stands for it.
async fn by_one_name(test: &Test, release: &Release<'_>, git: &GitServer) -> Result<()> {
    let name = format!("aether-store-nodes.{SYSTEM_NAMESPACE}.svc");
    let pods = release.pods().await?;
    let hosts: Vec<_> = pods
        .iter()
        .filter_map(|pod| Some(json!({"ip": pod.status.as_ref()?.pod_ip.as_ref()?, "hostnames": [name]})))
        .collect();
    let authority =
        release.kubectl(&["get", "configmap", "aether-store-ca", "--output=jsonpath={.data.ca\\.crt}"]).await?;
    let literal = format!("--from-literal=ca.crt={authority}");
    test.tools.kubectl(&["create", "configmap", "store-ca", &literal]).await?;
    // The account of imports: the first source is of this namespace.
    store_access::pod(test, "by-name", "aether-importer", &json!(hosts)).await?;
    let received = async || {
        let mut bytes = Vec::new();
        for pod in &pods {
            bytes.push(release.metric(&pod.name_any(), "aether_store_received_bytes_total").await?);
        }
        anyhow::Ok(bytes)
    };
    let before = received().await?;
    let url = git.url("third.git");
    let script = format!(
        "cd /tmp && HOME=/tmp aether-importer git --url {url} --result /tmp/result --store https://{name}:8980 \
         --store-ca /store/ca.crt --store-token /store/token"
    );
    test.tools.exec("by-name", &script).await?;
    let after = received().await?;
    let shares: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    eprintln!("store-nodes: an import by one name gave its nodes {shares:?} bytes");
    ensure!(shares.iter().all(|share| *share > 0), "one node got nothing: {shares:?}");
    Ok(())
}
