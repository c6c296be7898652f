//! Brings a tree to the node: its directory messages, and the contents of its files.
//!
//! A session is mounted when everything of its image is here, so that no read of a pod waits for a network; or at once,
//! where the [lazy layer](crate::lazy) is served.

use aether_cas::transfer::{self, OnProgress, Transferred};
use aether_cas::tree::walk;
use aether_cas::{Blob, LocalStore, Store};

use crate::error::{Error, Result};

/// Fetches what of the tree `root` is not in `local`; nothing is asked of `remote` when all of it is.
///
/// # Errors
/// `Store`; what arrived stays, and the next attempt goes on from there.
pub async fn hydrate(
    root: Blob,
    remote: &dyn Store,
    local: &LocalStore,
    on_progress: OnProgress<'_>,
) -> Result<Transferred> {
    let directories = fetch_directories(root, remote, local).await?;
    let contents = transfer::fetch_objects(root, remote, local, on_progress)
        .await
        .map_err(|error| Error::store(format!("fetch the contents of tree {root}"), error))?;
    Ok(Transferred { directories, ..contents })
}

/// Fetches only the directory messages, and returns how many there were.
pub async fn fetch_directories(root: Blob, remote: &dyn Store, local: &LocalStore) -> Result<u64> {
    let fetched = transfer::fetch_directories(root, remote, local)
        .await
        .map_err(|error| Error::store(format!("fetch the directories of tree {root}"), error))?;
    Ok(fetched.directories)
}

/// Bytes of the tree's contents that `local` does not have; its directories must be there.
pub fn missing_bytes(root: Blob, local: &LocalStore) -> Result<u64> {
    let failed = |error| Error::store(format!("look up the contents of tree {root}"), error);
    let mut contents = Vec::new();
    walk(&root, local, |_, node| {
        contents.extend(node.content());
        Ok::<(), aether_cas::StoreError>(())
    })
    .map_err(failed)?;
    Ok(local.missing_contents(&contents).map_err(failed)?.iter().map(|content| content.size).sum())
}
