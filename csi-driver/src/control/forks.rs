//! Forks of sessions that this node holds: the moment is taken as soon as the fork is seen and stamped at once, so that a
//! pod on this node can mount it; the tree follows.

use std::sync::Arc;

use aether_api::conditions::{self, FAILED, Wanted, reason};
use aether_api::session::{Base, ForkedFrom, Owner};
use aether_api::{AetherSession, AetherSessionStatus, names};
use aether_engine::Snapshot;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::runtime::events::EventType;
use serde_json::json;

use crate::attach::absent;
use crate::cluster::update_status;
use crate::driver::Driver;
use crate::failure::Result;
use crate::moments::{consistency, frozen_microseconds, full_name, taken_at, uid};

/// Stamps a fork with its moment, then with the moment's tree.
pub(crate) async fn reconcile(fork: Arc<AetherSession>, driver: Arc<Driver>) -> Result<()> {
    let Some(parent) = &fork.spec.session else { return Ok(()) };
    if fork.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let status = fork.status.clone().unwrap_or_default();
    let fork = match &status.forked_from {
        Some(_) => fork,
        // The parent was held by nobody, and the operator took its head.
        None if status.base.is_some() => return Ok(()),
        None => {
            let namespace = fork.namespace().unwrap_or_default();
            let Some(parent) = driver.cluster.sessions.get(&namespace, parent) else { return Ok(()) };
            if !driver.holds(&uid(&*parent)) {
                return Ok(());
            }
            // It asks again whether this node holds the parent, under the lock.
            let moment = driver.next_moment(&uid(&*parent)).await?;
            stamp_moment(&fork, &parent, &moment, &driver).await?
        }
    };
    bring_to_store(&fork, &driver).await
}

async fn stamp_moment(
    fork: &Arc<AetherSession>,
    parent: &AetherSession,
    moment: &Snapshot,
    driver: &Driver,
) -> Result<Arc<AetherSession>> {
    let forked = ForkedFrom {
        session: parent.name_any(),
        uid: uid(parent),
        node: Some(driver.node().to_owned()),
        snapshot: Some(moment.id.clone()),
        time: Time(taken_at(moment)),
        consistency: consistency(moment),
        frozen_microseconds: Some(frozen_microseconds(moment)),
        durable: false,
    };
    let inherited = parent.status.as_ref().and_then(|status| status.base.clone());
    let parents_owner = Owner { uid: moment.image.uid, gid: moment.image.gid };
    let base = Base {
        root: None,
        owner: fork.spec.owner.unwrap_or(parents_owner),
        source_namespace: inherited.as_ref().and_then(|base| base.source_namespace.clone()),
        source_name: inherited.as_ref().and_then(|base| base.source_name.clone()),
        revision: inherited.as_ref().and_then(|base| base.revision.clone()),
        revision_root: inherited.as_ref().and_then(|base| base.revision_root.clone()),
        commit: inherited.as_ref().and_then(|base| base.commit.clone()),
    };
    let api = driver.cluster.sessions.api(&fork.namespace().unwrap_or_default());
    update_status(&api, fork.clone(), names::DRIVER_MANAGER, |fork| {
        let stamped = fork.status.as_ref().is_some_and(|status| status.forked_from.is_some() || status.base.is_some());
        (!stamped).then(|| json!({"forkedFrom": forked, "base": base}))
    })
    .await
}

/// Makes the moment of a fork durable, so that any node can mount it. Forks of one moment share the work.
async fn bring_to_store(fork: &Arc<AetherSession>, driver: &Arc<Driver>) -> Result<()> {
    let Some(forked) = fork.status.as_ref().and_then(|status| status.forked_from.clone()) else { return Ok(()) };
    let (Some(node), Some(snapshot), false) = (&forked.node, &forked.snapshot, forked.durable) else { return Ok(()) };
    if node != driver.node() {
        return Ok(());
    }
    let lost = |status: &AetherSessionStatus| conditions::is_true(&status.conditions, FAILED);
    if fork.status.as_ref().is_some_and(lost) {
        return Ok(());
    }
    if driver.engine.snapshot_record(snapshot).await.map(Some).or_else(absent)?.is_none() {
        return give_up(fork, snapshot, driver).await;
    }
    let digested = driver.make_durable(snapshot).await?;
    let account = driver.account(None, digested.root).await?;
    let api = driver.cluster.sessions.api(&fork.namespace().unwrap_or_default());
    let stamped = update_status(&api, fork.clone(), names::DRIVER_MANAGER, |fork| {
        let status = fork.status.as_ref()?;
        let pending = status.forked_from.as_ref().is_some_and(|forked| !forked.durable);
        pending.then(|| {
            let mut change = json!({
                "base": {"root": digested.root.to_string()},
                "forkedFrom": {"durable": true},
            });
            // Unless it was mounted, changed and counted since.
            if status.changed_files.is_none() {
                change["changedFiles"] = json!(0);
                change["ownBytes"] = json!(0);
                change["sharedBytes"] = json!(account.shared_bytes);
            }
            change
        })
    })
    .await;
    match stamped {
        Ok(_) => Ok(()),
        Err(failure) if failure.is_gone() => {
            tracing::info!(fork = full_name(&**fork), "was deleted before its moment was in the store");
            Ok(())
        }
        Err(failure) => Err(failure),
    }
}

/// Says that a fork's moment is lost, unless it is in the store: the object at hand may be older than our own last write, which
/// the end of the snapshot follows.
async fn give_up(fork: &Arc<AetherSession>, snapshot: &str, driver: &Driver) -> Result<()> {
    let api = driver.cluster.sessions.api(&fork.namespace().unwrap_or_default());
    let message = format!(
        "snapshot {snapshot} of the fork's moment is not on node {} any more, which lost it before it was in the store: fork again",
        driver.node()
    );
    let newest = update_status(&api, fork.clone(), names::DRIVER_MANAGER, |fork| {
        let status = fork.status.as_ref()?;
        status.forked_from.as_ref().is_some_and(|forked| !forked.durable).then(|| {
            let mut all = status.conditions.clone();
            let failed = Wanted::yes(FAILED, reason::NODE_FAILED, message.clone());
            conditions::set(&mut all, failed, fork.metadata.generation);
            json!({"conditions": all})
        })
    })
    .await?;
    let durable =
        newest.status.as_ref().and_then(|status| status.forked_from.as_ref()).is_some_and(|from| from.durable);
    if !durable {
        tracing::error!(fork = full_name(&**fork), message, "the moment of a fork is lost");
        driver.events.on(&**fork, EventType::Warning, "MomentLost", message).await;
    }
    Ok(())
}
