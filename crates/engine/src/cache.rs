//! The limit of the object cache: which contents may go when there are too many, and when.
//!
//! Promises: a content goes only when the durable store says, at that time, that it has it, and when nothing on this
//! node needs it: no session, snapshot or digest, no read-only view, no work under way. An image and what only it
//! shows go together, the one that was mounted longest ago first; contents of no image go before all. What is removed is
//! fetched again when it is next wanted. Nothing is remembered for this but the time of an image's file, so nothing
//! can be out of date after a crash.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use aether_cas::{Blob, Store, StoreError};
use serde::Serialize;

use crate::engine::{Engine, Inner};
use crate::error::{Context, Error, Result};
use crate::state::{Image, ImageId};
use crate::{image, mount, sys};

/// Who uses the cache while it may be trimmed.
#[derive(Default)]
pub(crate) struct Cache {
    /// Trees that are being fetched, sent or mounted, by how many.
    held: Mutex<HashMap<Blob, usize>>,
    /// Read while contents become part of something that has a record, written while contents are removed.
    pub(crate) changing: RwLock<()>,
}

/// Keeps the contents of a tree until dropped.
pub(crate) struct Hold<'a> {
    cache: &'a Cache,
    root: Blob,
}

impl Cache {
    pub(crate) fn hold(&self, root: Blob) -> Hold<'_> {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner).entry(root).or_default() += 1;
        Hold { cache: self, root }
    }

    fn held(&self) -> Vec<Blob> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut held = self.cache.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.root) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.root);
            }
        }
    }
}

/// What was removed to make room.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trimmed {
    /// Images, by name.
    pub images: Vec<String>,
    /// Contents.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What could go.
struct Plan {
    /// Nothing shows them any more.
    images: Vec<Image>,
    /// Contents that only they have, or nothing at all.
    contents: Vec<Blob>,
}

impl Engine {
    /// Removes contents until `more` bytes fit below the limit of the object cache; nothing where there is no limit.
    ///
    /// # Errors
    /// `Full` when what may be removed does not suffice: what there was is removed nevertheless. `Store` when the store
    /// cannot be asked: nothing is removed.
    pub async fn make_room(&self, more: u64, remote: &dyn Store) -> Result<Trimmed> {
        let Some(limit) = self.inner.config.object_limit else { return Ok(Trimmed::default()) };
        let excess = move |inner: &Inner| (inner.objects.statistics().file_bytes + more).saturating_sub(limit);
        if excess(&self.inner) == 0 {
            return Ok(Trimmed::default());
        }
        let candidates = self
            .run(move |inner| {
                let _unchanged = inner.cache.changing.write().unwrap_or_else(PoisonError::into_inner);
                inner.plan(excess(inner))
            })
            .await?
            .contents;
        let asked = remote.find_missing(&candidates).await;
        let only_here: HashSet<Blob> = asked
            .map_err(|error| Error::store("ask which contents may leave the object cache", error))?
            .into_iter()
            .collect();
        if !only_here.is_empty() {
            tracing::warn!(
                contents = only_here.len(),
                "the store does not have them, so they stay in the object cache"
            );
        }
        let durable: HashSet<Blob> = candidates.into_iter().filter(|blob| !only_here.contains(blob)).collect();
        let (trimmed, left) = self
            .run(move |inner| {
                let _unchanged = inner.cache.changing.write().unwrap_or_else(PoisonError::into_inner);
                // Somebody may have begun to use some of it while the store was asked.
                let plan = inner.plan(excess(inner))?;
                let trimmed = inner.remove(plan, &durable)?;
                Ok((trimmed, excess(inner)))
            })
            .await?;
        if trimmed.objects > 0 {
            let (objects, bytes) = (trimmed.objects, trimmed.bytes);
            tracing::info!(images = ?trimmed.images, objects, bytes, "made room in the object cache");
        }
        if left == 0 {
            return Ok(trimmed);
        }
        Err(Error::Full {
            what: format!("the object cache of {}", self.inner.config.root.display()),
            remedy: format!(
                "{left} bytes more than its limit of {limit} are used by sessions and snapshots of this node or are not \
                 in the store yet; raise the limit, or end sessions here"
            ),
        })
    }
}

impl Inner {
    /// What may go so that `excess` bytes are freed, if the store has it.
    fn plan(&self, excess: u64) -> Result<Plan> {
        let mut images = Vec::new();
        let mut kept: HashSet<Blob> = HashSet::new();
        let mut walked: HashSet<Blob> = HashSet::new();
        let needed = self.needed()?;
        for root in &needed {
            self.visit_contents(root, &mut walked, |content| {
                kept.insert(content);
            })?;
        }
        for image in self.state.images()? {
            if needed.contains(&image.root) {
                continue;
            }
            match self.last_shown(image.id())? {
                Some(time) => images.push((time, image)),
                None => self.visit_contents(&image.root, &mut walked, |content| {
                    kept.insert(content);
                })?,
            }
        }
        // Each content belongs to the image that was shown last.
        images.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
        let mut groups = Vec::new();
        for (_, image) in images {
            let mut own = Vec::new();
            self.visit_contents(&image.root, &mut walked, |content| {
                if kept.insert(content) {
                    own.push(content);
                }
            })?;
            groups.push((image, own));
        }
        let mut contents = Vec::new();
        self.objects
            .for_each(|blob, is_file| {
                if is_file && !kept.contains(&blob) {
                    contents.push(blob);
                }
                Ok(())
            })
            .map_err(|error| Error::store("list the objects", error))?;
        let mut freed: u64 = contents.iter().map(|blob| blob.size).sum();
        let mut plan = Plan { images: Vec::new(), contents };
        while freed < excess
            && let Some((image, own)) = groups.pop()
        {
            // A content may not be here: the image was made before it was removed.
            let here = self.here(own)?;
            freed += here.iter().map(|blob| blob.size).sum::<u64>();
            plan.contents.extend(here);
            plan.images.push(image);
        }
        Ok(plan)
    }

    /// Trees of which no content may go.
    fn needed(&self) -> Result<HashSet<Blob>> {
        let mut roots: HashSet<Blob> = self.cache.held().into_iter().collect();
        for session in self.state.sessions()? {
            roots.insert(session.image.root);
            roots.extend(session.head);
        }
        for snapshot in self.state.snapshots()? {
            roots.insert(snapshot.image.root);
            roots.extend(snapshot.digested.map(|digested| digested.root));
        }
        Ok(roots)
    }

    /// When the image was last mounted; none while anything in any mount namespace shows it.
    fn last_shown(&self, id: ImageId) -> Result<Option<SystemTime>> {
        match mount::unmount(&self.image_mountpoint(id)) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy => return Ok(None),
            other => other?,
        }
        let path = image::path(&self.images(), id);
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Some(SystemTime::UNIX_EPOCH)),
            file => file.at("open", &path)?,
        };
        // A mounted EROFS keeps its file open, also one that only an overlay still holds.
        if sys::is_open_elsewhere(&file).at("look who uses", &path)? {
            return Ok(None);
        }
        let time = file.metadata().and_then(|metadata| metadata.modified()).at("examine", &path)?;
        Ok(Some(time))
    }

    /// The contents of a tree, as far as its directories are here; directories in `walked` are passed over.
    fn visit_contents(&self, root: &Blob, walked: &mut HashSet<Blob>, mut visit: impl FnMut(Blob)) -> Result<()> {
        use aether_cas::tree::Directories;
        let mut stack = vec![*root];
        while let Some(blob) = stack.pop() {
            if !walked.insert(blob) {
                continue;
            }
            let directory = match self.objects.directory(&blob) {
                Err(StoreError::NotFound { .. }) => continue,
                directory => directory.map_err(|error| Error::store(format!("read directory {blob}"), error))?,
            };
            directory.contents().for_each(&mut visit);
            stack.extend(directory.subdirectories().map(|(_, blob)| blob));
        }
        Ok(())
    }

    fn here(&self, contents: Vec<Blob>) -> Result<Vec<Blob>> {
        let missing =
            self.objects.missing_contents(&contents).map_err(|error| Error::store("look up contents", error))?;
        let missing: HashSet<Blob> = missing.into_iter().collect();
        Ok(contents.into_iter().filter(|blob| !missing.contains(blob) && blob.size > 0).collect())
    }

    /// Removes of a plan what is durable. The record of an image goes before the first of its contents, so that after
    /// a crash it is fetched and built anew.
    fn remove(&self, plan: Plan, durable: &HashSet<Blob>) -> Result<Trimmed> {
        let mut trimmed = Trimmed::default();
        for image in plan.images {
            self.forget_image(image.id())?;
            trimmed.images.push(image.id().to_string());
        }
        let gone: Vec<Blob> = plan.contents.into_iter().filter(|blob| durable.contains(blob)).collect();
        self.objects.remove(&gone).map_err(|error| Error::store("remove contents from the object cache", error))?;
        trimmed.objects = gone.len() as u64;
        trimmed.bytes = gone.iter().map(|blob| blob.size).sum();
        Ok(trimmed)
    }

    /// Removes an image that nothing shows: record, file and place.
    pub(crate) fn forget_image(&self, id: ImageId) -> Result<()> {
        self.state.remove_image(id)?;
        let (file, mountpoint) = (image::path(&self.images(), id), self.image_mountpoint(id));
        for (path, removed) in [(&file, fs::remove_file(&file)), (&mountpoint, fs::remove_dir(&mountpoint))] {
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
