//! The figures that need many runs: medians of binding and of pod starts, bytes per session, writes per session.

use std::time::Instant;

use aether_api::{AetherCheckpoint, AetherSession, session::Durability};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::PostParams;
use serde_json::{Value, json};

use super::{Story, limit, milliseconds};
use crate::audit::Mark;

/// From apply to a bound claim, and what that costs the API server.
pub(super) async fn bind(story: &Story) -> Result<String> {
    const SESSIONS: u32 = 20;
    story.source().await?;
    let mark = story.site().cluster().ok().map(|cluster| Mark::now(&cluster.paths)).transpose()?;
    let mut times = Vec::new();
    for i in 0..SESSIONS {
        times.push(story.session(&format!("bind-{i}")).await?);
    }
    let median = median(&mut times);
    story.figure("session_bound_ms", median);
    let bound = format!("claim bound {median:.0} ms after apply (median of {SESSIONS})");
    let Some(mark) = mark else {
        let why = "they are counted in the API server's audit log, which only the demo's own cluster shows";
        story.leave_out("api_writes_per_session, api_writes_binder", why.into());
        return Ok(bound);
    };
    let writes = story.writes_per_session(&mark, "bind-", SESSIONS).await?;
    story.figure("api_writes_per_session", writes.ours);
    story.figure("api_writes_binder", writes.binder);
    ensure!(writes.ours <= 4.0, "{} writes of ours per session to a bound claim, 4 at most", writes.ours);
    Ok(format!("{bound}; writes per session: ours {}, the binder's {}", writes.ours, writes.binder))
}

/// The same pod with a session and with an emptyDir, in turn: each begins when the one before is gone, and each is first in
/// half of the rounds.
pub(super) async fn pod_start(story: &Story) -> Result<String> {
    const ROUNDS: usize = 10;
    story.source().await?;
    // Claims are bound before: a pod's start alone is timed. The first round brings images and page cache in.
    for round in 0..=ROUNDS {
        story.session(&format!("start-{round}")).await?;
    }
    let (mut with_session, mut with_empty) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let claim = json!({"name": "workspace", "persistentVolumeClaim": {"claimName": format!("start-{round}")}});
        let empty = json!({"name": "workspace", "emptyDir": {}});
        let mut turn = [("session", claim, &mut with_session), ("empty", empty, &mut with_empty)];
        if round % 2 == 1 {
            turn.reverse();
        }
        for (name, volume, times) in turn {
            let took = story.timed_pod(&format!("{name}-{round}"), &volume).await?;
            if round > 0 {
                times.push(took);
            }
        }
    }
    let (session, empty) = (median(&mut with_session), median(&mut with_empty));
    story.figure("pod_ready_ms", session);
    story.figure("pod_ready_emptydir_ms", empty);
    Ok(format!(
        "pod ready after {session:.0} ms with a session, {empty:.0} ms with an emptyDir: {:+.0} ms (medians of {ROUNDS}, in alternating order)",
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
    /// Makes a pod with this volume, waits until it is ready, removes it; milliseconds from create to ready.
    async fn timed_pod(&self, name: &str, volume: &Value) -> Result<f64> {
        let mounts = json!([{"name": "workspace", "mountPath": "/workspace"}]);
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {
                // Past the scheduler.
                "nodeName": self.first_node(), "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "agent", "image": self.site().tools_image, "command": ["sleep", "infinity"], "volumeMounts": mounts}],
                "volumes": [volume],
            }
        }))?;
        let begun = Instant::now();
        let uid = self.api::<Pod>().create(&PostParams::default(), &pod).await?.uid();
        self.until_pod_ready(name, limit(60)).await?;
        let took = milliseconds(begun.elapsed());
        self.delete_pod(name).await?;
        self.until_kubelet_forgot(&uid.context("an object has a uid")?).await?;
        Ok(took)
    }

    /// Waits until the kubelet of the first node has unmounted a pod's volumes and removed its folder. The API server forgets a
    /// pod without grace before that, and one with grace up to ten seconds after.
    async fn until_kubelet_forgot(&self, uid: &str) -> Result<()> {
        let driver = self.driver_on(self.first_node()).await?;
        let container = driver.spec.as_ref().and_then(|spec| spec.containers.first()).context("a container")?;
        let kubelet = container.args.iter().flatten().find_map(|argument| argument.strip_prefix("--kubelet-dir="));
        let folder = format!("{}/pods/{uid}", kubelet.unwrap_or("/var/lib/kubelet"));
        let script = format!("timeout 60 sh -c 'while [ -e {folder} ]; do sleep 0.05; done'");
        self.system_kubectl(&["exec", &driver.name_any(), "-c", &container.name, "--", "sh", "-c", &script])
            .await
            .map(drop)
    }

    /// Counts the writes that concern sessions of this prefix, their claims and volumes.
    async fn writes_per_session(&self, mark: &Mark, prefix: &str, sessions: u32) -> Result<Writes> {
        let mut uids = Vec::new();
        for name in self.sessions().await? {
            if name.starts_with(prefix) {
                let session: AetherSession = self.get(&name).await?;
                uids.push(session.metadata.uid.context("an object has a uid")?);
            }
        }
        ensure!(uids.len() == sessions as usize, "{} sessions of {sessions}", uids.len());
        let (mut ours, mut binder) = (0u32, 0u32);
        for write in mark.writes()? {
            let concerns = write.namespace == self.namespace && write.name.starts_with(prefix)
                || uids.iter().any(|uid| write.name.contains(uid));
            if !concerns || write.resource == "events" {
                continue;
            }
            match write.user.as_str() {
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

pub(super) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
