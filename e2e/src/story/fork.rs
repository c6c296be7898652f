//! Forks of a live session: one moment, also under a writer whose order of writes would betray a torn copy.

use std::time::Instant;

use aether_api::AetherSession;
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;

use super::Story;

/// Creates a file, closes it, then makes its marker; without a pause, for ever.
const ORDERED_WRITER: &str = r#"
import itertools, os
os.makedirs('order', exist_ok=True)
for i in itertools.count():
    with open(f'order/file-{i}', 'w') as file:
        file.write(f'{i}\n' * 50)
    os.mkdir(f'order/marker-{i}')
    if i >= 200:
        os.rmdir(f'order/marker-{i-200}')
        os.unlink(f'order/file-{i-200}')
    if i == 100:
        open('/tmp/writes', 'w').close()
    if os.path.exists('stop-order'):
        break
"#;

/// Prints how many markers there are, and fails when one has no whole file.
pub(super) const ORDER_CHECK: &str = r#"
import os, sys
markers = [name[7:] for name in os.listdir('order') if name.startswith('marker-')]
torn = [i for i in markers if not os.path.exists(f'order/file-{i}') or open(f'order/file-{i}').read() != f'{i}\n' * 50]
print(f'markers={len(markers)}')
sys.exit(f'torn: {torn}' if torn else 0)
"#;

/// Starts the ordered writer in the background of a pod and waits until it has written.
pub(super) async fn start_ordered_writer(story: &Story, pod: &str) -> Result<()> {
    story.exec_with_input(pod, "cat >/tmp/ordered-writer.py", ORDERED_WRITER).await?;
    story.exec_with_input(pod, "cat >/tmp/order-check.py", ORDER_CHECK).await?;
    story
        .exec(pod, "rm -f stop-order; nohup python3 /tmp/ordered-writer.py >/tmp/writer.log 2>&1 & while [ ! -e /tmp/writes ]; do sleep 0.05; done")
        .await?;
    Ok(())
}

/// A fork of a busy session is one moment of it, and each goes its own way afterwards.
pub(super) async fn fork_a_live_session(story: &Story) -> Result<String> {
    story.agent("parent", "busy").await?;
    start_ordered_writer(story, "busy").await?;
    story.exec("busy", "echo 'unsaved before the fork' >note").await?;

    let begun = Instant::now();
    story.aether(&["fork", "parent", "child"]).await?;
    let forked = begun.elapsed();
    story.exec("busy", "echo 'after the fork' >note; touch parent-only").await?;
    story.pod("twin", "child", Some(story.first_node())).await?;
    story.exec_with_input("twin", "cat >/tmp/order-check.py", ORDER_CHECK).await?;
    let order = story
        .exec("twin", "python3 /tmp/order-check.py && cat note && touch child-only && ls -d parent-only 2>&1 || true")
        .await?;
    ensure!(super::value::<i64>(&order, "markers")? > 0, "the fork has nothing of the writer's: {order}");
    ensure!(order.contains("unsaved before the fork"), "the fork lacks unsaved changes: {order}");
    ensure!(order.contains("No such file"), "the fork sees what came later: {order}");
    let parent = story.exec("busy", "ls -d child-only 2>&1 || true; touch stop-order").await?;
    ensure!(parent.contains("No such file"), "the parent sees the fork's changes");

    let child: AetherSession = story.get("child").await?;
    let moment = child.status.and_then(|status| status.forked_from).context("status.forkedFrom")?;
    let frozen = moment.frozen_microseconds.unwrap_or_default() as f64 / 1000.0;
    story.figure("fork_live_ms", forked.as_secs_f64() * 1000.0);
    story.figure("fork_frozen_ms", frozen);
    Ok(format!(
        "bound {:.0} ms after the command, pods frozen {frozen:.1} ms, no marker without its file",
        forked.as_secs_f64() * 1000.0
    ))
}

/// Fifty forks at once.
pub(super) async fn fifty_forks(story: &Story) -> Result<String> {
    story.agent("many", "origin").await?;
    story.exec("origin", "echo 'in all of them' >everywhere").await?;
    let begun = Instant::now();
    story.aether(&["fork", "many", "many", "--count", "50"]).await?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    story.figure("forks_50_ms", took);
    let qps = match story.site().cluster() {
        Ok(cluster) => {
            let qps = cluster.options.controller_manager_qps;
            story.figure("kube_controller_manager_qps", qps);
            format!("controller-manager at {qps} requests/s")
        }
        Err(_) => {
            let why = "how many requests the controller-manager allows itself is not told by this cluster";
            story.leave_out("kube_controller_manager_qps", why.into());
            "which the controller-manager's --kube-api-qps bounds".into()
        }
    };
    let probes = ["many-1", "many-25", "many-50"];
    try_join_all(probes.iter().enumerate().map(async |(i, name)| {
        let pod = format!("probe-{i}");
        story.pod(&pod, name, Some(story.first_node())).await?;
        let seen = story.exec(&pod, "cat everywhere").await?;
        ensure!(seen.trim() == "in all of them", "{name} has {seen:?}");
        Ok(())
    }))
    .await?;
    for pod in 0..probes.len() {
        story.delete_pod(&format!("probe-{pod}")).await?;
    }
    Ok(format!("50 forked claims bound in {took:.0} ms ({qps})"))
}

/// Forks and checkpoints a busy session `rounds` times and looks at every copy.
pub(super) async fn no_copy_is_torn(story: &Story, rounds: usize) -> Result<String> {
    story.agent("ordered", "writer").await?;
    start_ordered_writer(story, "writer").await?;
    let mut looked_at = 0;
    for round in 0..rounds {
        // Forks and checkpoints in turn; a checkpoint is looked at through a session made from it.
        let copy = format!("copy-{round}");
        if round % 2 == 0 {
            story.aether(&["fork", "ordered", &copy]).await?;
        } else {
            let checkpoint = format!("stop-{round}");
            story.aether(&["checkpoint", "ordered", "--name", &checkpoint, "--wait", "durable"]).await?;
            story.aether(&["create", &copy, "--checkpoint", &checkpoint]).await?;
        }
        if (round + 1) % 20 == 0 {
            let copies: Vec<String> = (round + 1 - 20..=round).map(|i| format!("copy-{i}")).collect();
            looked_at += look_at(story, &format!("look-{round}"), &copies).await?;
            for copy in &copies {
                story.aether(&["delete", "session", copy, "--yes"]).await?;
            }
        }
    }
    ensure!(looked_at == rounds, "only {looked_at} of {rounds} copies were looked at");
    story.exec("writer", "touch stop-order").await?;
    Ok(format!("{rounds} copies of a busy session, none torn"))
}

/// One pod that mounts many sessions and checks each.
async fn look_at(story: &Story, pod: &str, sessions: &[String]) -> Result<usize> {
    story.pod_of_many(pod, sessions).await?;
    story.exec_with_input(pod, "cat >/tmp/order-check.py", ORDER_CHECK).await?;
    let seen =
        story.exec(pod, "set -e; for copy in /sessions/*; do cd $copy; python3 /tmp/order-check.py; done").await?;
    story.delete_pod(pod).await?;
    let whole = seen.lines().filter(|line| line.starts_with("markers=") && *line != "markers=0").count();
    ensure!(whole == sessions.len(), "{} of {} copies have the writer's files: {seen}", whole, sessions.len());
    Ok(whole)
}
