//! The figures that need many runs: medians of binding and of pod starts, bytes per session, writes per session.

use std::time::{Duration, Instant};

use aether_api::{AetherCheckpoint, AetherSession, session::Durability};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;

use super::{Story, limit, say};

/// From apply to a bound claim, and what that costs the API server.
pub(super) async fn bind(story: &Story) -> Result<String> {
    story.source().await?;
    let mut times = Vec::new();
    for i in 0..20 {
        let name = format!("bind-{i}");
        times.push(story.bound_after(&name).await?);
    }
    let median = median(&mut times);
    story.figure("session_bound_ms", median);
    let writes = story.writes_per_session("bind-", 20).await?;
    say(&format!("writes: {writes:?}"));
    story.figure("api_writes_per_session", writes.ours);
    story.figure("api_writes_binder", writes.binder);
    ensure!(writes.ours <= 4.0, "{} writes of ours per session to a bound claim, 4 at most", writes.ours);
    Ok(format!(
        "claim bound {median:.0} ms after apply (median of 20); writes per session: ours {}, the binder's {}",
        writes.ours, writes.binder
    ))
}

/// The same pod with a session and with an emptyDir, in turn.
pub(super) async fn pod_start(story: &Story) -> Result<String> {
    story.source().await?;
    let (mut with_session, mut with_empty) = (Vec::new(), Vec::new());
    // The first of each brings images and page cache in.
    for i in 0..=10 {
        let name = format!("start-{i}");
        story.session(&name).await?;
        let session = story
            .timed_pod(&format!("s{i}"), &serde_json::json!({"persistentVolumeClaim": {"claimName": name}}))
            .await?;
        let empty = story.timed_pod(&format!("e{i}"), &serde_json::json!({"emptyDir": {}})).await?;
        if i > 0 {
            with_session.push(session);
            with_empty.push(empty);
        }
    }
    let (session, empty) = (median(&mut with_session), median(&mut with_empty));
    story.figure("pod_ready_ms", session);
    story.figure("pod_ready_emptydir_ms", empty);
    Ok(format!(
        "pod ready after {session:.0} ms with a session, {empty:.0} ms with an emptyDir: {:+.0} ms (medians of 10, in turn)",
        session - empty
    ))
}

/// What a session with twenty edited files stores.
pub(super) async fn storage(story: &Story) -> Result<String> {
    story.agent("twenty", "editor").await?;
    story.exec("editor", "git ls-files '*.go' | head -20 | while read f; do echo '// edited' >>$f; done").await?;
    story.aether(&["checkpoint", "twenty", "--name", "twenty-1", "--wait", "durable"]).await?;
    story
        .until("twenty-1", "is durable", limit(60), |checkpoint: &AetherCheckpoint| {
            checkpoint.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable))
        })
        .await?;
    let session: AetherSession = story
        .until("twenty", "reports its sizes", limit(30), |session: &AetherSession| {
            session.status.as_ref().is_some_and(|status| status.own_bytes.is_some() && status.shared_bytes.is_some())
        })
        .await?;
    let status = session.status.context("a status")?;
    let (own, shared) = (status.own_bytes.context("ownBytes")?, status.shared_bytes.context("sharedBytes")?);
    ensure!(status.changed_files == Some(20), "{:?} changed files reported, 20 were edited", status.changed_files);
    story.figure("own_bytes", own);
    story.figure("shared_bytes", shared);
    Ok(format!(
        "20 edited files: {own} bytes own, {:.0} MB shared ({:.3} %)",
        shared as f64 / 1e6,
        own as f64 * 100.0 / shared as f64
    ))
}

/// Writes to the API server for one session, from apply to a bound claim.
#[derive(Debug)]
pub(super) struct Writes {
    /// The operator's and the drivers'.
    pub ours: f64,
    /// The controller-manager's binder's.
    pub binder: f64,
}

impl Story {
    /// Applies a session and waits for its claim; milliseconds.
    async fn bound_after(&self, name: &str) -> Result<f64> {
        let manifest = self.session_manifest(name);
        let begun = Instant::now();
        self.apply(&manifest).await?;
        self.until(name, "is bound", limit(60), |claim: &PersistentVolumeClaim| {
            claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
        })
        .await?;
        Ok(milliseconds(begun.elapsed()))
    }

    /// Makes a pod with this volume, waits until it is ready, removes it; milliseconds from create to ready.
    async fn timed_pod(&self, name: &str, volume: &serde_json::Value) -> Result<f64> {
        let mut volume = volume.clone();
        volume["name"] = "workspace".into();
        let manifest = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "nodeName": "node-1", "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "agent", "image": super::TOOLS_IMAGE, "command": ["sleep", "infinity"], "volumeMounts": [{"name": "workspace", "mountPath": "/workspace"}]}],
                "volumes": [volume],
            }
        });
        let begun = Instant::now();
        self.apply(&manifest.to_string()).await?;
        self.until_pod_ready(name, limit(60)).await?;
        let took = milliseconds(begun.elapsed());
        self.delete_pod(name).await?;
        Ok(took)
    }

    /// Counts the writes that concern sessions of this prefix, their claims and volumes, in the API server's audit log.
    async fn writes_per_session(&self, prefix: &str, sessions: u32) -> Result<Writes> {
        let mut uids = Vec::new();
        for name in self.sessions().await? {
            if name.starts_with(prefix) {
                let session: AetherSession = self.get(&name).await?;
                uids.push(session.metadata.uid.context("an object has a uid")?);
            }
        }
        ensure!(uids.len() == sessions as usize, "{} sessions of {sessions}", uids.len());
        let (mut ours, mut binder) = (0u32, 0u32);
        for line in std::fs::read_to_string(self.cluster.paths.audit_log())?.lines() {
            let event: serde_json::Value = serde_json::from_str(line).context("a line of the audit log")?;
            let object = &event["objectRef"];
            let name = object["name"].as_str().unwrap_or_default();
            let concerns = object["namespace"] == self.namespace.as_str() && name.starts_with(prefix)
                || uids.iter().any(|uid| name.contains(uid));
            let wrote = matches!(event["verb"].as_str(), Some("create" | "update" | "patch" | "delete"));
            if !concerns || !wrote || event["stage"] != "ResponseComplete" || object["resource"] == "events" {
                continue;
            }
            match event["user"]["username"].as_str().unwrap_or_default() {
                user if user.contains(":aether-operator") || user.contains(":aether-driver") => ours += 1,
                user if user.contains("persistent-volume-binder") || user.contains("kube-controller-manager") => {
                    binder += 1
                }
                _ => {}
            }
        }
        Ok(Writes { ours: f64::from(ours) / f64::from(sessions), binder: f64::from(binder) / f64::from(sessions) })
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
