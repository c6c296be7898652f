//! Sources that want their contents on every node before the first session asks for them.

use std::sync::Arc;

use aether_api::source::Hydration;
use aether_api::{AetherSource, names};
use aether_cas::tree::Owner;

use crate::driver::{Driver, parse_root};
use crate::failure::Result;
use crate::hydration::Wanted;
use crate::moments::full_name;

/// Fetches the newest revision of an eager source, as its usual owner sees it.
pub(super) async fn reconcile(source: Arc<AetherSource>, driver: Arc<Driver>) -> Result<()> {
    if source.spec.hydration != Hydration::Eager || source.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let Some(status) = &source.status else { return Ok(()) };
    let latest = status.revisions.iter().find(|revision| Some(&revision.name) == status.latest.as_ref());
    let Some(revision) = latest else { return Ok(()) };
    let root = parse_root(&revision.root, &format!("source {}", full_name(&*source)))?;
    let owner = Owner { uid: names::DEFAULT_OWNER.0, gid: names::DEFAULT_OWNER.1 };
    let _permit = driver.workers.acquire().await.map_err(|_| crate::failure::Failure::Lost("worker pool"))?;
    driver.image(root, owner, &Wanted::of(&source)).await?;
    Ok(())
}
