//! Sessions that this node has: dropped when their object is deleted, recovered when another node took them over, let go
//! when their last writer is gone.

use std::sync::Arc;

use aether_api::AetherSession;
use kube::ResourceExt as _;

use crate::driver::Driver;
use crate::failure::Result;
use crate::moments::uid;
use crate::records::{SessionRecord, Upper};

/// Deletion, loss, and the return of what was lost.
pub(crate) async fn reconcile(session: Arc<AetherSession>, driver: Arc<Driver>) -> Result<()> {
    let uid = uid(&*session);
    let held = session.holder() == Some(driver.node());
    let Some(record) = driver.sessions.get(&uid) else {
        // Taken by a driver that was killed before it wrote so down, or by a node that lost its disk: nothing is here.
        if held && (session.metadata.deletion_timestamp.is_some() || !attaching(&driver, &session)) {
            driver.disclaim(&session).await?;
        }
        return Ok(());
    };
    if session.metadata.deletion_timestamp.is_some() {
        if driver.discard(&uid).await? && held {
            driver.disclaim(&session).await?;
        }
        return Ok(());
    }
    match record.upper {
        Upper::Dirty if driver.lost(&session, &record) => recover(&driver, &session).await,
        Upper::Fenced { .. } => recover(&driver, &session).await,
        Upper::Dirty => driver.apply_limits(&session).await,
        Upper::Clean { .. } if held => driver.disclaim(&session).await,
        // The session has moved on elsewhere: the copy here is of no use any more.
        Upper::Clean { ref root } if outdated(&session, &record, root) => forget_copy(&driver, &session, &record).await,
        _ => Ok(()),
    }
}

/// Lets go of a session without writers.
pub(crate) async fn release(session: Arc<AetherSession>, driver: Arc<Driver>) -> Result<()> {
    let uid = uid(&*session);
    let Some(record) = driver.sessions.get(&uid) else { return Ok(()) };
    // Sessions of inline volumes end with their volume.
    let inline = driver.publishes.any(|publish| publish.inline && publish.uid.as_deref() == Some(&uid));
    let to_do = record.upper == Upper::Dirty
        && !driver.lost(&session, &record)
        && !driver.published_for_writing(&uid)
        && session.metadata.deletion_timestamp.is_none()
        && !inline;
    if to_do { driver.release(&session).await } else { Ok(()) }
}

/// A publish of the session is under way and will write the record.
fn attaching(driver: &Driver, session: &AetherSession) -> bool {
    let name = session.name_any();
    let namespace = session.namespace();
    driver.publishes.any(|publish| {
        // One that is read-only takes no lease.
        publish.session == name
            && Some(&publish.namespace) == namespace.as_ref()
            && !publish.unpublished
            && !publish.read_only
    })
}

async fn recover(driver: &Arc<Driver>, session: &Arc<AetherSession>) -> Result<()> {
    let uid = uid(&**session);
    let _lock = driver.session_locks.lock(&uid).await;
    // A pod here may have taken it anew since the cache was looked at.
    let Some(record) = driver.sessions.get(&uid) else { return Ok(()) };
    let newest = driver.cluster.sessions.read(&record.namespace, &record.name).await?;
    let Some(session) = newest.filter(|session| session.uid().as_ref() == Some(&uid)) else { return Ok(()) };
    match record.upper {
        Upper::Dirty if driver.lost(&session, &record) => driver.recover(&session, &record).await,
        Upper::Fenced { .. } => driver.recover(&session, &record).await,
        _ => Ok(()),
    }
}

fn outdated(session: &AetherSession, record: &SessionRecord, root: &str) -> bool {
    let epoch =
        session.status.as_ref().and_then(|status| status.attachment.as_ref()).map_or(0, |attachment| attachment.epoch);
    epoch > record.epoch && session.head_root() != Some(root)
}

async fn forget_copy(driver: &Arc<Driver>, session: &AetherSession, seen: &SessionRecord) -> Result<()> {
    let _lock = driver.session_locks.lock(&seen.uid).await;
    match driver.sessions.get(&seen.uid) {
        Some(record) if record == *seen => {
            tracing::info!(session = session.name_any(), "moved on elsewhere; the copy here goes");
            driver.recover(&Arc::new(session.clone()), &record).await
        }
        _ => Ok(()),
    }
}
