//! Puts right what a crash left half made, finds what is wrong, and removes what nobody uses.
//!
//! The order in which every operation writes makes what is left easy to tell: a directory of the pool without a record
//! was never acknowledged and goes; a record that says `deleting` was acknowledged as gone and goes; a temporary
//! snapshot belongs to an operation that has ended. Each [crash point](crate::crash::POINTS) leaves one of these.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::engine::Inner;
use crate::error::{Context, Error, Result};
use crate::pool::Medium;
use crate::state::{ImageId, Session};
use crate::{image, mount};

/// Repairs. Called once, before anybody else uses the engine.
///
/// # Errors
/// `Damaged` where the pool holds sessions or snapshots and the records are those of a new node: nothing is removed.
pub(crate) fn repair(inner: &Inner) -> Result<()> {
    require_records(inner)?;
    let swept = inner.pool.sweep()?;
    if swept > 0 {
        tracing::info!(swept, "removed what a crash left half made in the pool");
    }
    for entry in fs::read_dir(inner.images()).at("list", inner.images())? {
        let path = entry.at("list", inner.images())?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".new-")) {
            fs::remove_file(&path).at("remove", &path)?;
        }
    }
    for image in inner.state.images()? {
        if !image::path(&inner.images(), image.id()).exists() {
            // It is built anew from its directories when it is next wanted.
            tracing::warn!(image = %image.id(), "the file of an image is gone");
            inner.state.remove_image(image.id())?;
        }
    }
    forget_lost_memory(inner)?;
    let images: HashSet<_> = inner.state.images()?.iter().map(|image| image.root).collect();
    for incomplete in inner.state.incompletes()? {
        if !images.contains(&incomplete.root) {
            inner.state.remove_incomplete(incomplete.root)?;
        }
    }
    inner.begin_catalog()?;
    inner.tell_whether_needed()?;
    let sessions = inner.state.sessions()?;
    let named: HashSet<&str> = sessions.iter().map(|session| session.directory.as_str()).collect();
    for directory in inner.pool.listing()?.sessions {
        if !named.contains(directory.as_str()) {
            tracing::info!(directory, "removing a session directory that was never acknowledged");
            unless_busy(inner.require_unused(&directory).and_then(|()| inner.pool.delete_session(&directory)))?;
        }
    }
    for session in sessions.iter().filter(|session| session.deleting) {
        tracing::info!(session = session.id, "finishing a deletion");
        unless_busy(inner.finish_deletion(session))?;
    }
    for session in sessions.iter().filter(|session| session.generation == 0 && session.head.is_some()) {
        let directory = &session.directory;
        if holds_anything(&inner.pool.work(directory))? || holds_anything(&inner.pool.upper(directory))? {
            tracing::info!(session = session.id, "forgetting the head of a session that a power cut made look unused");
            inner.state.put_session(&Session { head: None, generation: 1, ..session.clone() })?;
        }
    }
    let snapshots = inner.state.snapshots()?;
    let named: HashSet<&str> = snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
    for name in inner.pool.listing()?.snapshots {
        if !named.contains(name.as_str()) {
            tracing::info!(snapshot = name, "removing a snapshot that was never acknowledged");
            inner.pool.delete_snapshot(&name)?;
        }
    }
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.deleting || snapshot.temporary) {
        inner.finish_snapshot_deletion(snapshot)?;
    }
    for problem in records(inner)? {
        tracing::error!("{problem}");
    }
    Ok(())
}

/// What was in memory went with the machine: it is not damage, and its records go too. Whoever wants such a session begins it again
/// from its last durable tree.
fn forget_lost_memory(inner: &Inner) -> Result<()> {
    let there: HashSet<String> = inner.pool.listing()?.sessions.into_iter().collect();
    let lost = inner.state.sessions()?.into_iter();
    for session in lost.filter(|session| session.medium == Medium::Memory && !there.contains(&session.directory)) {
        tracing::warn!(session = session.id, "was in memory, and went with it");
        for snapshot in inner.state.snapshots()?.into_iter().filter(|snapshot| snapshot.session == session.id) {
            if !inner.pool.snapshot_upper(&snapshot.id).exists() {
                inner.state.remove_snapshot(&snapshot.id)?;
            }
        }
        inner.state.remove_session(&session)?;
    }
    Ok(())
}

/// A session is made on an image whose record is older than its directory. So directories without any record at all
/// were not left by a crash: the records were lost, and what no record names may be somebody's work.
fn require_records(inner: &Inner) -> Result<()> {
    let listing = inner.pool.listing()?;
    let recorded = !inner.state.sessions()?.is_empty()
        || !inner.state.snapshots()?.is_empty()
        || !inner.state.images()?.is_empty();
    if recorded || listing.sessions.is_empty() && listing.snapshots.is_empty() {
        return Ok(());
    }
    let (root, pool) = (inner.config.root.display(), inner.pool.root().display());
    Err(Error::Damaged {
        what: format!("records in {root}/index/state"),
        detail: format!(
            "they are empty, but {pool} holds {} sessions and {} snapshots; bring the index back, or, to begin without \
             it, move what is in {pool}/sessions and {pool}/snapshots elsewhere and keep it until nobody misses it",
            listing.sessions.len(),
            listing.snapshots.len()
        ),
    })
}

/// Of a session that was never mounted both directories are empty. A mount makes a directory in the work directory; after
/// a power cut a change that was synced may be there without it.
fn holds_anything(directory: &Path) -> Result<bool> {
    match fs::read_dir(directory) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("list", directory, error)),
    }
}

/// What is still mounted somewhere is removed at a later start.
fn unless_busy(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::Busy { what, by }) => {
            tracing::warn!("{what} stays for now: {by}");
            Ok(())
        }
        other => other,
    }
}

/// Records and what they name. Cheap.
fn records(inner: &Inner) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let listing = inner.pool.listing()?;
    let (directories, copies): (HashSet<String>, HashSet<String>) =
        (listing.sessions.into_iter().collect(), listing.snapshots.into_iter().collect());
    let (sessions, snapshots) = (inner.state.sessions()?, inner.state.snapshots()?);
    for session in &sessions {
        if !directories.contains(&session.directory) {
            problems.push(format!(
                "session {}: its directory {} is gone; delete it, or restore it from its last durable head",
                session.id, session.directory
            ));
        }
    }
    for snapshot in &snapshots {
        if !copies.contains(&snapshot.id) {
            problems.push(format!("snapshot {}: its directory is gone; delete it", snapshot.id));
        }
    }
    let named: HashSet<&str> = sessions.iter().map(|session| session.directory.as_str()).collect();
    for directory in directories.iter().filter(|directory| !named.contains(directory.as_str())) {
        problems.push(format!("session directory {directory} has no record; it goes at the next start"));
    }
    let named: HashSet<&str> = snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
    for copy in copies.iter().filter(|copy| !named.contains(copy.as_str())) {
        problems.push(format!("snapshot directory {copy} has no record; it goes at the next start"));
    }
    Ok(problems)
}

/// Everything that is wrong, also in what the records do not show.
pub(crate) fn fsck(inner: &Inner) -> Result<Vec<String>> {
    let mut problems = records(inner)?;
    for image in inner.state.images()? {
        let path = image::path(&inner.images(), image.id());
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() == image.image_bytes => {}
            Ok(metadata) => problems.push(format!(
                "image {}: {} bytes instead of {}; remove the file when no session uses it, it is built anew",
                image.id(),
                metadata.len(),
                image.image_bytes
            )),
            Err(error) => problems.push(format!("image {}: {error}; it is built anew at the next use", image.id())),
        }
    }
    let failed = |error| Error::store("check the objects", error);
    let mut roots: HashSet<_> = inner.state.sessions()?.iter().map(|session| session.image.root).collect();
    roots.extend(inner.state.snapshots()?.iter().flat_map(|snapshot| {
        [Some(snapshot.image.root), snapshot.digested.as_ref().map(|digested| digested.root)].into_iter().flatten()
    }));
    roots.extend(inner.state.sessions()?.iter().filter_map(|session| session.head));
    // Of an incomplete tree, and of every tree that was made from it.
    let mut on_their_way = HashSet::new();
    for incomplete in inner.state.incompletes()? {
        on_their_way.extend(inner.missing(incomplete.root, &[])?);
    }
    for root in roots {
        let mut contents = Vec::new();
        let walked = aether_cas::tree::walk(&root, &inner.objects, |_, node| {
            contents.extend(node.content().filter(|content| content.size > 0));
            Ok::<(), aether_cas::StoreError>(())
        });
        if let Err(error) = walked {
            problems.push(format!("tree {root}: {error}; it is fetched again when it is next wanted"));
            continue;
        }
        contents.sort();
        contents.dedup();
        for missing in inner.objects.missing_contents(&contents).map_err(failed)? {
            if on_their_way.contains(&missing) {
                continue;
            }
            problems.push(format!("tree {root}: content {missing} is not here; fetch the tree again"));
        }
    }
    let report = inner.objects.fsck(false).map_err(failed)?;
    for blob in report.damaged {
        problems.push(format!("object {blob}: damaged; it is fetched again once it is removed"));
    }
    Ok(problems)
}

/// Removes images that no session and no snapshot uses. They are built anew when they are wanted again.
pub(crate) fn collect(inner: &Inner) -> Result<Vec<String>> {
    let mut used: HashSet<ImageId> = inner.state.sessions()?.iter().map(|session| session.image.id()).collect();
    used.extend(inner.state.snapshots()?.iter().map(|snapshot| snapshot.image.id()));
    let mut removed = Vec::new();
    for entry in fs::read_dir(inner.images()).at("list", inner.images())? {
        let path = entry.at("list", inner.images())?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".erofs")) else { continue };
        if used.iter().any(|id| id.to_string() == name) {
            continue;
        }
        let mountpoint = inner.config.root.join("mnt/image").join(name);
        // Not lazily: a read-only view may still show it.
        if mount::unmount(&mountpoint).is_err() {
            continue;
        }
        let named = inner.state.images()?.into_iter().find(|image| image.id().to_string() == name);
        match named {
            Some(image) => inner.forget_image(image.id())?,
            // A file without a record.
            None => fs::remove_file(&path).at("remove", &path)?,
        }
        removed.push(format!("image {name}"));
    }
    Ok(removed)
}
