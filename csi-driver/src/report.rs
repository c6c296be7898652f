//! Tells the cluster what this node can do: labels to schedule by and the probe table as an annotation, on the Node object.

use std::sync::Arc;
use std::time::Duration;

use aether_api::names::{CSI_DRIVER, DRIVER_MANAGER};
use aether_runtime::CancellationToken;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::driver::Driver;

/// Label: the pool's kind, `btrfs` or `directory`.
const POOL_LABEL: &str = "node.aether.dev/pool";
/// Label: how exact and fast snapshots are here: `ioctl` or `walk`.
const SNAPSHOT_LABEL: &str = "node.aether.dev/snapshot";
/// Annotation: the probe table as JSON.
const PROBES_ANNOTATION: &str = "node.aether.dev/probes";

/// Writes once; tries again until it has succeeded.
pub(crate) async fn publish(driver: Arc<Driver>, stop: CancellationToken) -> anyhow::Result<()> {
    let report = driver.engine.kernel();
    tracing::info!("what this node can do:\n{report}");
    let statistics = driver.engine.statistics().await?;
    let (pool, snapshot) = match statistics.pool {
        aether_engine::pool::Kind::Btrfs => ("btrfs", "ioctl"),
        aether_engine::pool::Kind::Directory => ("directory", "walk"),
    };
    let missing: Vec<_> = report
        .features
        .iter()
        .filter(|feature| !feature.works)
        .map(|feature| json!({"feature": feature.name, "why": feature.detail}))
        .collect();
    let works: Vec<_> = report.features.iter().filter(|feature| feature.works).map(|feature| &feature.name).collect();
    let probes =
        json!({"kernel": report.release, "driver": CSI_DRIVER, "works": works, "missing": missing}).to_string();
    let patch = json!({"metadata": {
        "labels": {POOL_LABEL: pool, SNAPSHOT_LABEL: snapshot},
        "annotations": {PROBES_ANNOTATION: probes},
    }});
    let nodes: Api<Node> = Api::all(driver.cluster.client.clone());
    let parameters = PatchParams { field_manager: Some(DRIVER_MANAGER.into()), ..Default::default() };
    let mut delay = Duration::from_secs(1);
    while let Err(error) = nodes.patch_metadata(driver.node(), &parameters, &Patch::Merge(&patch)).await {
        tracing::warn!(%error, node = driver.node(), "what this node can do could not be published");
        tokio::select! {
            () = tokio::time::sleep(delay) => delay = (delay * 2).min(Duration::from_secs(300)),
            () = stop.cancelled() => return Ok(()),
        }
    }
    Ok(())
}
