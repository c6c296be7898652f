//! Copies that leave for the places of the source: what is in a claim and in a bucket then is the session, file by file, and goes
//! where the platform team has said.

use aether_api::approval::Decision::Approve;
use aether_api::commit::CommitPhase;
use aether_api::conditions::{self, reason};
use aether_api::{AetherCommit, AetherCommitStatus, AetherSource};
use aether_e2e::story::Story;
use aether_e2e::team::{Team, with_team};
use aether_e2e::testing::{LIMIT, Test};
use aether_e2e::tools::Tools;
use aether_testkit::bucket::{BUCKET, Bucket, KEY, SECRET};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{EDIT, root_of};
use crate::store_nodes::gate::Gate;
use crate::with_namespace;

/// Beside what git knows: modes, a pipe, directories that nobody may write or look into, and empty ones.
const MORE: &str = r"
    chmod 600 README.md; chmod 444 src/main.rs; chmod 2775 src; mkdir -p void/inner private closed; mkfifo pipe; ln run.sh same.sh
    echo mine >private/file; chmod 700 private; echo 'not to be written' >closed/file; chmod 555 closed";
/// Everything in the current directory, and what of it reviewers are shown.
const ALL: &str = "find . -mindepth 1";
const SHOWN: &str = "find . -mindepth 1 -name .git -prune -o";

/// Names, kinds, modes, links and contents of what is found.
fn list(find: &str) -> String {
    format!(
        r"{find} -printf '%P %y %m %l\n' | LC_ALL=C sort
        {find} -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum"
    )
}

/// What of that a bucket keeps.
fn contents(find: &str) -> String {
    format!(r"{find} -type f ! -name '.aether-export*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reviewed_tree_is_exported_to_the_places_of_its_source() -> Result<()> {
    with_namespace("review-export", async |test| {
        with_team(test, async |team| {
            let folder = tempfile::tempdir()?;
            let place = folder.path().to_owned();
            let bucket = tokio::task::spawn_blocking(move || Bucket::start(&place)).await?;
            let gate = Gate::before(&bucket.endpoint()).await?;
            let volume = Volume::create(team).await?;
            let played = play(team, &volume, &gate.endpoint()).await;
            let removed = volume.remove().await;
            played?;
            removed
        })
        .await
    })
    .await
}

async fn play(team: &Team<'_>, volume: &Volume, endpoint: &str) -> Result<()> {
    team.work(EDIT).await?;
    team.work(MORE).await?;
    let listing = team.work(&list(SHOWN)).await?;
    let files = team.work(&contents(SHOWN)).await?;
    ensure!(!team.work("find . -name .git").await?.is_empty(), "the session has no repository");
    let root = team.checkpoint("edited").await?;

    // Before the platform team has said where to, nothing goes anywhere.
    let failed = asked(team, "early", "results", None).await?;
    let said = conditions::get(&failed.conditions, conditions::FAILED).context("it failed")?.message.clone();
    ensure!(said.contains("spec.review.exports"), "it does not say what to write: {said}");
    places(team, volume, endpoint).await?;

    let done = asked(team, "fix", "results", Some("one/two")).await?;
    ensure!(done.warnings.iter().any(|warning| warning.contains("(.git)")), "{:?}", done.warnings);
    let place = done.place.context("a place")?;
    ensure!(place == format!("{}/of/agents/one/two", volume.name), "it is at {place}");
    let exported = volume.run(&format!("cd /data/of/agents/one/two; {}", list(ALL))).await?;
    ensure!(exported == listing, "the copy is\n{exported}\nand the session was\n{listing}");
    let partial = volume.run("find /data -name '*.partial'").await?;
    ensure!(partial.is_empty(), "there is {partial}");
    // The same tree is found there, another one gets no place that is taken.
    let again = asked(team, "again", "results", Some("one/two")).await?;
    ensure!(again.phase == Some(CommitPhase::Succeeded), "{:?}", again.conditions);
    let complete = conditions::get(&again.conditions, conditions::COMPLETE).context("it is complete")?;
    ensure!(complete.message.contains("earlier run"), "{}", complete.message);

    let done = asked(team, "to-bucket", "bucket", None).await?;
    ensure!(done.place == Some(format!("s3://{BUCKET}/agents/to-bucket/")), "it is at {:?}", done.place);
    ensure!(done.warnings.iter().any(|warning| warning.contains("named pipes")), "{:?}", done.warnings);
    let in_bucket = read_back(team.test, endpoint).await?;
    ensure!(in_bucket == files, "the bucket has\n{in_bucket}\nand the session had\n{files}");

    team.work("echo more >>README.md").await?;
    let other = team.checkpoint("other").await?;
    ensure!(other != root, "the tree is the same");
    for (name, to, path) in [("taken", "results", "one/two"), ("taken-there", "bucket", "to-bucket")] {
        let failed = asked_of(team, name, "other", to, Some(path)).await?;
        let failed = conditions::get(&failed.conditions, conditions::FAILED).context("it failed")?;
        ensure!(failed.reason == reason::TARGET_EXISTS, "{}: {}", failed.reason, failed.message);
    }
    let exported = volume.run(&format!("cd /data/of/agents/one/two; {}", list(ALL))).await?;
    ensure!(exported == listing, "the copy has changed");
    eprintln!(
        "review-export: {} paths and modes in a claim, {} files in a bucket are the session's",
        listing.lines().count() - files.lines().count(),
        files.lines().count()
    );
    Ok(())
}

/// The platform team adds the places to its source.
async fn places(team: &Team<'_>, volume: &Volume, endpoint: &str) -> Result<()> {
    let paula = team.of("paula")?.in_namespace(team.platform());
    paula.apply(&team.labelled(keys(&bucket_key(team))).to_string()).await?;
    let s3 =
        json!({"bucket": BUCKET, "prefix": "agents", "endpoint": endpoint, "secretRef": {"name": bucket_key(team)}});
    let exports = json!([
        {"name": "results", "claim": {"name": volume.name, "path": "of/agents"}},
        {"name": "bucket", "s3": s3},
    ]);
    let patch = json!({"spec": {"review": {"exports": exports}}}).to_string();
    let source = ["patch", "aethersource", team.source(), "--type=merge", "--patch", &patch];
    paula.kubectl(&source).await.map(drop)
}

fn bucket_key(team: &Team<'_>) -> String {
    format!("{}-bucket", team.source())
}

fn keys(name: &str) -> Value {
    let keys = json!({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET});
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys})
}

async fn asked(team: &Team<'_>, name: &str, to: &str, path: Option<&str>) -> Result<AetherCommitStatus> {
    asked_of(team, name, "edited", to, path).await
}

/// The agent asks for an export of a checkpoint, and if it waits for them the reviewers approve; what became of it.
async fn asked_of(
    team: &Team<'_>,
    name: &str,
    checkpoint: &str,
    to: &str,
    path: Option<&str>,
) -> Result<AetherCommitStatus> {
    let to = path.map_or_else(|| to.to_owned(), |path| format!("{to}:{path}"));
    let args = ["commit", "--checkpoint", checkpoint, "--export", &to, "--name", name];
    aether_e2e::command::expect_success(&mut team.of("ada")?.aether_command(&args)).await?;
    let commit = team
        .test
        .until(name, "waits or has ended", |commit: &AetherCommit| {
            let phase = commit.status.as_ref().and_then(|status| status.phase);
            commit.finished() || phase == Some(CommitPhase::AwaitingApproval)
        })
        .await?;
    if !commit.finished() {
        let root = root_of(&commit)?;
        for who in ["grace", "linus"] {
            team.decide(who, name, &root, Approve).await?;
        }
    }
    let ended =
        aether_e2e::wait::object(&team.test.api(), name, "has ended", 2 * LIMIT, AetherCommit::finished).await?;
    ended.status.context("a status")
}

/// What the bucket has, by way of a source of it and a session of that.
async fn read_back(test: &Test, endpoint: &str) -> Result<String> {
    let story = Story::new(test);
    story.apply(&keys("bucket-key").to_string()).await?;
    let s3 = json!({
        "bucket": BUCKET, "prefix": "agents/to-bucket", "endpoint": endpoint, "secretRef": {"name": "bucket-key"},
    });
    let source = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": "exported"}, "spec": {"s3": s3},
    });
    story.apply(&source.to_string()).await?;
    let _: AetherSource = story.until_source_ready("exported").await?;
    story.session_of("exported", "exported").await?;
    story.pod("reader", "exported", None).await?;
    let read = story.exec("reader", &format!("cd /workspace; {}", contents(ALL))).await?;
    story.delete_pod("reader").await?;
    Ok(read)
}

/// A directory of the first node as a volume with a claim in the platform team's namespace, in the place of a cluster's storage, and
/// a pod that has it at `/data` as root.
struct Volume {
    name: String,
    tools: Tools,
}

impl Volume {
    async fn create(team: &Team<'_>) -> Result<Self> {
        let name = format!("{}-results", team.test.namespace);
        let tools = team.test.tools.in_namespace(team.platform());
        let this = Self { name, tools };
        match this.set_up(team).await {
            Ok(()) => Ok(this),
            Err(error) => {
                this.remove().await.ok();
                Err(error)
            }
        }
    }

    async fn set_up(&self, team: &Team<'_>) -> Result<()> {
        let (name, story) = (&self.name, Story::new(team.test));
        let hostname = story.first_node();
        // In memory, so that it never outlives the node.
        let path = format!("/run/{name}");
        let keeper = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "terminationGracePeriodSeconds": 0, "nodeSelector": {"kubernetes.io/hostname": hostname},
                "containers": [{
                    "name": "keeper", "image": story.site().tools_image, "command": ["sleep", "infinity"],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "run", "mountPath": "/host/run"}],
                }],
                "volumes": [
                    {"name": "data", "hostPath": {"path": path, "type": "DirectoryOrCreate"}},
                    // To remove the directory itself at the end.
                    {"name": "run", "hostPath": {"path": "/run", "type": "Directory"}},
                ],
            },
        });
        self.tools.apply(&keeper.to_string()).await?;
        let is_ready = aether_e2e::testing::pod_ready;
        aether_e2e::wait::object(&team.platform_api::<Pod>(), name, "is ready", LIMIT, is_ready).await?;
        let here = json!([{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [hostname]}]}]);
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": team.platform(), "name": name},
                // One that the kubelet gives to the group of the pod.
                "local": {"path": path},
                "nodeAffinity": {"required": {"nodeSelectorTerms": here}},
            },
        });
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "", "volumeName": name,
            },
        });
        for object in [volume, claim] {
            self.tools.apply(&object.to_string()).await?;
        }
        Ok(())
    }

    /// Runs a script as root, beside the volume.
    async fn run(&self, script: &str) -> Result<String> {
        self.tools.exec(&self.name, script).await
    }

    async fn remove(&self) -> Result<()> {
        let name = &self.name;
        let emptied = self.run(&format!("find /data -mindepth 1 -delete && rmdir /host/run/{name}")).await;
        // Jobs that have ended hold the claim for as long as their pods are there.
        for kind in ["pod", "persistentvolumeclaim", "persistentvolume"] {
            self.tools.kubectl(&["delete", kind, name, "--ignore-not-found", "--wait=false"]).await?;
        }
        emptied.map(drop)
    }
}
