//! Sessions whose contents are not all here yet: they are mounted at once over the lazy layer, and the contents come in
//! the background, most wanted first.
//!
//! A tree is *incomplete* from the moment in which its image is made until all of its contents are here; the record of
//! that is written before the first session can be mounted, and removed after the last content is durable. A session
//! on an incomplete tree has the [lazy layer](aether_cas::lazy) below the objects. When the tree is complete, its
//! sessions are told to look for their contents anew, so that none depends on the lazy layer any more.
//!
//! What is most wanted is what earlier sessions of the same source opened first, by path, so that it holds for the next
//! revision too.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use aether_cas::lazy::{Catalog, Places, append_to_catalog, begin_catalog, read_opened};
use aether_cas::transfer::{self, OnProgress, Transferred};
use aether_cas::tree::{self, Owner};
use aether_cas::{Blob, Digest, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::engine::{Engine, Inner, Lock};
use crate::error::{Context, Error, Result};
use crate::hydrate;
use crate::mount;
use crate::state::{Image, ImageId};

/// How long the lazy layer may take to say that it is there.
const ANSWER: Duration = Duration::from_secs(2);
/// A name that it does not have; that it says so shows that it lives.
const QUESTION: &str = "is-anybody-here";
/// Paths remembered for each source.
const MOST_WANTED: usize = 10_000;
/// A fetch, and another for what was lost meanwhile.
const ATTEMPTS: usize = 3;

/// A tree whose contents are not all on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Incomplete {
    /// The tree.
    pub root: Blob,
    /// Whose sessions want it: what they open first is fetched first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Since when, in seconds since 1970.
    pub since: i64,
}

/// The lazy layer as the engine sees it.
pub(crate) struct Lazy {
    places: Places,
    /// Held by who asks whether the layer answers: one question at a time, and who comes meanwhile waits for his turn.
    turn: Mutex<()>,
    /// A question that was never answered.
    asking: Arc<AtomicBool>,
    /// Held while trees become incomplete or complete and the layer is told.
    telling: Mutex<()>,
}

impl Lazy {
    /// Makes the places of the layer, and forgets what was fetched before this machine started.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let places = Places::new(root);
        let fetched = places.fetched();
        for folder in [places.folder(), &places.folder().join("orders"), &fetched] {
            fs::create_dir_all(folder).at("create", folder)?;
        }
        let now = places.fetched_now().at("learn which boot this is", &fetched)?;
        for entry in fs::read_dir(&fetched).at("list", &fetched)? {
            let path = entry.at("list", &fetched)?.path();
            if path != now {
                fs::remove_dir_all(&path).at("remove", &path)?;
            }
        }
        Ok(Self { places, turn: Mutex::default(), asking: Arc::default(), telling: Mutex::default() })
    }

    /// Whether the layer is mounted and answers in time.
    fn answers(&self) -> bool {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.asking.swap(true, Ordering::SeqCst) {
            return false;
        }
        let (mountpoint, asking) = (self.places.mountpoint(), self.asking.clone());
        let (sender, receiver) = mpsc::channel();
        // On a thread of its own: nothing bounds the time of a system call on a file system that hangs.
        let asked = std::thread::Builder::new().name("lazy-layer".into()).spawn(move || {
            let absent = |error: std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
            let lives = mount::is_mountpoint(&mountpoint).unwrap_or(false)
                && fs::symlink_metadata(mountpoint.join(QUESTION)).is_err_and(absent);
            asking.store(false, Ordering::SeqCst);
            let _ = sender.send(lives);
        });
        asked.is_ok() && receiver.recv_timeout(ANSWER).unwrap_or(false)
    }

    fn order(&self, source: &str) -> PathBuf {
        self.places.folder().join("orders").join(Digest::of(source.as_bytes()).to_string())
    }

    /// Paths that sessions of a source opened, first opened first.
    fn wanted(&self, source: Option<&str>) -> Vec<PathBuf> {
        let read = source.and_then(|source| fs::read(self.order(source)).ok()).unwrap_or_default();
        let names = read.split(|byte| *byte == 0).filter(|name| !name.is_empty());
        names.map(|name| PathBuf::from(std::ffi::OsStr::from_bytes(name))).collect()
    }
}

impl Engine {
    /// Whether sessions can be mounted before their contents are here: the lazy layer is configured, mounted and answers.
    pub async fn lazy_layer_answers(&self) -> Result<bool> {
        self.run(|inner| Ok(inner.config.lazy && inner.lazy.as_ref().is_some_and(Lazy::answers))).await
    }

    /// As [`ensure_image`](Self::ensure_image), but the contents may come later: they are fetched when they are first read,
    /// and by [`hydrate`](Self::hydrate), which is to be called for what [`incomplete`](Self::incomplete) lists. `source`
    /// names whose sessions want the tree.
    ///
    /// Where the lazy layer is not configured or does not answer, the contents are fetched before this returns.
    ///
    /// # Errors
    /// As [`ensure_image`](Self::ensure_image).
    pub async fn ensure_image_lazily(
        &self,
        root: Blob,
        owner: Owner,
        source: Option<&str>,
        remote: &dyn Store,
        on_progress: OnProgress<'_>,
    ) -> Result<Image> {
        let id = ImageId::new(root, owner);
        let there = |inner: &Inner| Ok::<_, Error>(inner.state.image(id)?.is_some());
        let whole = there(&self.inner)? && self.inner.state.incomplete(root)?.is_none();
        if whole || !self.lazy_layer_answers().await? {
            return self.ensure_image(root, owner, remote, on_progress).await;
        }
        let guard = self.inner.lock(Lock::Image(root)).await;
        let _hold = self.inner.cache.hold(root);
        if !there(&self.inner)? {
            hydrate::fetch_directories(root, remote, &self.inner.objects).await?;
        }
        let source = source.map(str::to_owned);
        self.with(guard, move |inner| {
            if inner.state.image(id)?.is_none() {
                inner.begin(root, source)?;
            }
            inner.finish_image(id)
        })
        .await
    }

    /// Trees of this node whose contents are not all here, those that wait longest first.
    pub async fn incomplete(&self) -> Result<Vec<Incomplete>> {
        self.run(|inner| {
            let images: HashSet<Blob> = inner.state.images()?.iter().map(|image| image.root).collect();
            let mut wanted: Vec<_> = inner.state.incompletes()?;
            wanted.retain(|incomplete| images.contains(&incomplete.root));
            wanted.sort_by_key(|incomplete| incomplete.since);
            Ok(wanted)
        })
        .await
    }

    /// Fetches what is missing of an incomplete tree, most wanted first, and makes its sessions independent of the lazy
    /// layer. Nothing to do is success.
    ///
    /// # Errors
    /// `Store`; what arrived stays, and the next attempt goes on from there.
    pub async fn hydrate(&self, root: Blob, remote: &dyn Store, on_progress: OnProgress<'_>) -> Result<Transferred> {
        let _guard = self.inner.lock(Lock::Hydration(root)).await;
        let _hold = self.inner.cache.hold(root);
        let mut moved = Transferred::default();
        for _ in 0..ATTEMPTS {
            let Some(missing) = self.run(move |inner| inner.still_missing(root)).await? else { return Ok(moved) };
            if missing.is_empty() {
                self.run(move |inner| inner.complete(root)).await?;
                return Ok(moved);
            }
            self.make_room(missing.iter().map(|blob| blob.size).sum(), remote).await?;
            let fetched = transfer::fetch_listed(missing, remote, self.objects(), on_progress)
                .await
                .map_err(|error| Error::store(format!("fetch the contents of tree {root}"), error))?;
            moved.files += fetched.files;
            moved.bytes += fetched.bytes;
        }
        Err(Error::Damaged {
            what: format!("tree {root}"),
            detail: "its contents go as fast as they come; see what removes them".into(),
        })
    }
}

impl Inner {
    /// The data-only layers of a session on a tree, in the order in which the kernel asks them.
    pub(crate) fn data_layers(&self, root: Blob) -> Result<Vec<PathBuf>> {
        let mut layers = vec![self.pool.root().join("objects")];
        if self.state.incomplete(root)?.is_none() {
            return Ok(layers);
        }
        let lazy = self.lazy.as_ref().filter(|lazy| lazy.answers());
        let Some(lazy) = lazy else {
            return Err(Error::Busy {
                what: format!("tree {root}"),
                by: "its contents are on their way to this node; until they are here it can be mounted only over the \
                     lazy layer, which does not answer"
                    .into(),
            });
        };
        layers.push(lazy.places.mountpoint());
        Ok(layers)
    }

    /// Notes what of a tree the lazy layer may be asked for, and that it is incomplete if that is anything.
    fn begin(&self, root: Blob, source: Option<String>) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        let missing = self.missing(root, &lazy.wanted(source.as_deref()))?;
        if missing.is_empty() {
            return Ok(());
        }
        let catalog = lazy.places.catalog();
        append_to_catalog(&catalog, missing).at("write the catalog", &catalog)?;
        let _telling = lazy.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = lazy.places.needed();
        fs::write(&needed, []).at("write", &needed)?;
        self.state.put_incomplete(&Incomplete { root, source, since: jiff::Timestamp::now().as_second() })
    }

    /// After a boot, tells the lazy layer only what is missing now.
    pub(crate) fn begin_catalog(&self) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        let incompletes = self.state.incompletes()?;
        let missing = || {
            let of_tree = |incomplete: &Incomplete| {
                self.missing(incomplete.root, &lazy.wanted(incomplete.source.as_deref())).unwrap_or_else(|error| {
                    // Whoever hydrates it is told the same, and its sessions get EIO meanwhile.
                    tracing::warn!(root = %incomplete.root, %error, "nothing of an incomplete tree can be read");
                    Vec::new()
                })
            };
            incompletes.iter().flat_map(of_tree).collect()
        };
        let catalog = lazy.places.catalog();
        begin_catalog(&catalog, missing).at("begin the catalog", &catalog)
    }

    /// Tells the lazy layer when nothing here depends on it any more.
    pub(crate) fn tell_whether_needed(&self) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        let _telling = lazy.telling.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.state.incompletes()?.is_empty() {
            return Ok(());
        }
        let needed = lazy.places.needed();
        match fs::remove_file(&needed) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &needed, error)),
            _ => Ok(()),
        }
    }

    /// The contents of a tree that are not here: first those of `first`, then in order of path.
    pub(crate) fn missing(&self, root: Blob, first: &[PathBuf]) -> Result<Vec<Blob>> {
        let contents = self.contents(root)?;
        let by_path: HashMap<&Path, Blob> = contents.iter().map(|(path, blob)| (path.as_path(), *blob)).collect();
        let first = first.iter().filter_map(|path| by_path.get(path.as_path()).copied());
        let ordered: Vec<Blob> = first.chain(contents.iter().map(|(_, blob)| *blob)).collect();
        self.objects.missing_contents(&ordered).map_err(|error| Error::store("look up contents", error))
    }

    fn contents(&self, root: Blob) -> Result<Vec<(PathBuf, Blob)>> {
        let mut contents = Vec::new();
        tree::walk(&root, &self.objects, |path, node| {
            contents
                .extend(node.content().filter(|content| content.size > 0).map(|content| (path.to_owned(), content)));
            Ok::<(), StoreError>(())
        })
        .map_err(|error| Error::store(format!("read tree {root}"), error))?;
        Ok(contents)
    }

    /// What of an incomplete tree is still to be fetched, after what the lazy layer has fetched was taken over; `None` for a
    /// complete tree.
    fn still_missing(&self, root: Blob) -> Result<Option<Vec<Blob>>> {
        let (Some(incomplete), Some(lazy)) = (self.state.incomplete(root)?, &self.lazy) else { return Ok(None) };
        let wanted = lazy.wanted(incomplete.source.as_deref());
        let missing = self.missing(root, &wanted)?;
        let folder = lazy.places.fetched_now().at("learn which boot this is", lazy.places.fetched())?;
        let fetched: Vec<(Blob, PathBuf)> = missing
            .iter()
            .map(|blob| (*blob, folder.join(blob.digest.object_path())))
            .filter(|(blob, path)| fs::metadata(path).is_ok_and(|metadata| metadata.len() == blob.size))
            .collect();
        if fetched.is_empty() {
            return Ok(Some(missing));
        }
        self.objects.adopt_batch(fetched).map_err(|error| Error::store("take over fetched contents", error))?;
        self.missing(root, &wanted).map(Some)
    }

    /// Everything of the tree is here.
    fn complete(&self, root: Blob) -> Result<()> {
        let Some(incomplete) = self.state.incomplete(root)? else { return Ok(()) };
        // Before it is forgotten that this is to be done: who comes after a kill in between does it again.
        self.rebind(root)?;
        self.drop_duplicates(root)?;
        self.state.remove_incomplete(root)?;
        if let Some(lazy) = &self.lazy {
            // A hint, no more.
            if let Err(error) = self.learn(lazy, &incomplete) {
                tracing::warn!(%error, "what sessions opened first is not remembered");
            }
        }
        self.tell_whether_needed()
    }

    /// Removes what a reader and the background have both fetched: it is among the objects.
    fn drop_duplicates(&self, root: Blob) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        let folder = lazy.places.fetched_now().at("learn which boot this is", lazy.places.fetched())?;
        for (_, blob) in self.contents(root)? {
            let path = folder.join(blob.digest.object_path());
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Remembers what sessions of the tree's source opened first.
    fn learn(&self, lazy: &Lazy, incomplete: &Incomplete) -> Result<()> {
        let (catalog, opened) = (lazy.places.catalog(), lazy.places.opened());
        if let Some(source) = &incomplete.source {
            let numbers = read_opened(&opened).at("read", &opened)?;
            let blobs = Catalog::open(&catalog).at("read", &catalog)?;
            let contents = self.contents(incomplete.root)?;
            let paths: HashMap<Blob, &Path> =
                contents.iter().rev().map(|(path, blob)| (*blob, path.as_path())).collect();
            let now =
                numbers.iter().filter_map(|number| paths.get(&blobs.blob(*number)?).map(|path| path.to_path_buf()));
            let mut seen = HashSet::new();
            let order: Vec<PathBuf> =
                lazy.wanted(Some(source)).into_iter().chain(now).filter(|path| seen.insert(path.clone())).collect();
            let bytes: Vec<u8> =
                order.iter().take(MOST_WANTED).flat_map(|path| [path.as_os_str().as_bytes(), b"\0"].concat()).collect();
            let (target, unfinished) = (lazy.order(source), lazy.places.folder().join("orders/.new"));
            fs::write(&unfinished, bytes).at("write", &unfinished)?;
            fs::rename(&unfinished, &target).at("rename", &unfinished)?;
        }
        if self.state.incompletes()?.is_empty() && opened.exists() {
            fs::File::options().write(true).open(&opened).and_then(|file| file.set_len(0)).at("empty", &opened)?;
        }
        Ok(())
    }

    /// Lets every overlay on the tree look for its contents anew, wherever it is mounted.
    fn rebind(&self, root: Blob) -> Result<()> {
        let image = root.digest.to_string();
        let mut done = HashSet::new();
        for entry in mount::table()? {
            let options = String::from_utf8_lossy(&entry.super_options);
            if entry.fs_type == "overlay" && options.contains(&image) && done.insert(entry.device.clone()) {
                match mount::rebind(&entry.target) {
                    // It was unmounted meanwhile.
                    Err(error) if error.is_not_found() => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }
}
