//! What the services work on: the node's disk, and behind it the durable tier where there is one.
//!
//! Without a durable tier this is the [`LocalStore`] and nothing else. With one the disk is a cache. By
//! [`Durability::Through`] a blob is acknowledged, and counts as present, when it is in the bucket; by
//! [`Durability::Behind`] when it is on the disk, and it is on its way to the bucket then: [`Statistics::durable`] says
//! how much still is. What the disk has lost, or holds damaged, is read from the bucket and kept again.
//! Pins and leases are in the bucket only. What a collection has deleted there goes from the disk too: what only a disk has
//! and nobody waits for is never brought to the bucket, because what is below it may be gone.
//!
//! As in [`LocalStore`], methods that are not `async` block the thread; they must be called on a thread of a
//! runtime that may block.

mod collect;
mod drain;
mod evict;
mod fetch;
pub mod options;
mod scrub;

use std::{
    collections::HashSet,
    fs::File,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, ContentName, LocalStore, Sha256Blob, Store, StoreError,
    durable::{self, Durable, Why, format::MAX_SHARED_BLOB},
    local::{self, FsckReport, IncompleteRoot, Ingest, Root},
    store::Result,
    tree::{Directories, Directory, walk::bottom_up},
};
use aether_runtime::CancellationToken;
use bytes::Bytes;
use tokio::{runtime::Handle, sync::RwLock, task::JoinHandle};

use drain::Drain;
use fetch::Stripes;

/// An answer "missing" to a client that uploads may be so old: another node may have got the blob meanwhile, and
/// then it is stored twice.
const FRESH: Duration = Duration::from_secs(5);
/// How often the whole bucket is listed.
const REBUILD: Duration = Duration::from_secs(3600);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// When a blob is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it is in the bucket.
    Through,
    /// When it is on the node's disk; the bucket follows.
    Behind,
}

/// How a disk and a bucket work together.
#[derive(Clone, Copy, Debug)]
pub struct TierConfig {
    /// When a blob is acknowledged.
    pub durability: Durability,
    /// Bytes that the disk may keep of what the bucket has.
    pub cache_limit: Option<u64>,
    /// How much of a pack may be waste, in percent: see [`durable::collect`].
    pub waste: u64,
}

/// What a node holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// On its disk.
    pub disk: local::Statistics,
    /// In the bucket, where there is one.
    pub durable: Option<DurableStatistics>,
}

/// What the bucket holds, and what of the disk it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurableStatistics {
    /// What is known of the bucket.
    pub bucket: durable::Statistics,
    /// Blobs on the disk that are on their way to the bucket.
    pub pending_blobs: u64,
    /// Their bytes.
    pub pending_bytes: u64,
    /// Whether all that the disk held when the node started, or found packs gone, was compared with the bucket, so that
    /// nothing else is pending.
    pub compared: bool,
}

/// The store behind the services of a node. Clones share it.
#[derive(Clone, Debug)]
pub struct TieredStore {
    disk: LocalStore,
    tier: Option<Arc<Tier>>,
}

#[derive(Debug)]
struct Tier {
    durable: Durable,
    config: TierConfig,
    drain: Drain,
    /// Of packs that are read, and of small blobs that are brought to the bucket.
    stripes: Stripes,
    /// Of large blobs.
    large: Stripes,
    /// Held for reading from the look whether the bucket has a blob until it is known that the disk is to bring it there; for
    /// writing while what was collected is removed from the disk. Only with [`Durability::Behind`].
    arriving: Arc<RwLock<()>>,
    /// Held by the one collection of this node.
    collecting: std::sync::Mutex<()>,
}

impl From<LocalStore> for TieredStore {
    fn from(disk: LocalStore) -> Self {
        Self { disk, tier: None }
    }
}

impl TieredStore {
    /// A disk over a bucket. [`TieredStore::learn`] comes before the first call of a service, and
    /// [`TieredStore::work`] runs beside them.
    pub fn over(durable: Durable, disk: LocalStore, config: TierConfig) -> Self {
        let tier = Tier {
            durable,
            config,
            drain: Drain::default(),
            stripes: Stripes::default(),
            large: Stripes::default(),
            arriving: Arc::default(),
            collecting: std::sync::Mutex::default(),
        };
        Self { disk, tier: Some(Arc::new(tier)) }
    }

    /// The node's disk alone: what is here need not be all there is.
    pub fn disk(&self) -> &LocalStore {
        &self.disk
    }

    /// The durable tier, where there is one.
    pub fn durable(&self) -> Option<&Durable> {
        self.tier.as_ref().map(|tier| &tier.durable)
    }

    /// Learns what the bucket holds, however long it takes to answer, and moves the pins of the disk there.
    ///
    /// # Errors
    /// Those that do not pass by waiting.
    pub async fn learn(&self) -> Result<()> {
        let Some(tier) = &self.tier else { return Ok(()) };
        let mut pause = FIRST_PAUSE;
        loop {
            let learned = async {
                self.rebuild().await?;
                self.move_pins(&tier.durable).await
            };
            match learned.await {
                Ok(()) => {
                    let held = tier.durable.statistics();
                    tracing::info!(bucket = %tier.durable.name(), packs = held.packs, bytes = held.stored_bytes, "the bucket is known");
                    return Ok(());
                }
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, "waiting for the bucket");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A disk that was alone before has pins of its own.
    async fn move_pins(&self, durable: &Durable) -> Result<()> {
        let of_disk = self.blocking(|store| store.disk.roots(None, None)).await?;
        if of_disk.is_empty() {
            return Ok(());
        }
        let name = |root: &Root| (root.owner_uid.clone(), root.kind.clone(), root.name.clone());
        let there: HashSet<_> = durable.roots(None, None).await?.iter().map(name).collect();
        for root in &of_disk {
            if !there.contains(&name(root)) {
                durable.put_root(root).await?;
            }
        }
        self.blocking(move |store| {
            for root in &of_disk {
                store.disk.unpin(&root.owner_uid, Some(&root.kind), Some(&root.name))?;
            }
            Ok(())
        })
        .await
    }

    /// Brings to the bucket what only the disk has, keeps the disk within its limit, and lists the bucket from time to time.
    ///
    /// # Errors
    /// None: what fails is tried again.
    pub async fn work(self, token: CancellationToken) -> anyhow::Result<()> {
        let Some(tier) = self.tier.clone() else {
            token.cancelled().await;
            return Ok(());
        };
        let rebuild = async {
            loop {
                tokio::time::sleep(REBUILD).await;
                let done = async {
                    self.rebuild().await?;
                    self.prune_names().await
                };
                if let Err(error) = done.await {
                    tracing::warn!(%error, "the bucket was not listed; trying again later");
                }
            }
        };
        tokio::select! {
            () = token.cancelled() => {}
            () = self.drain(&tier) => {}
            () = self.evict(&tier) => {}
            () = rebuild => {}
        }
        Ok(())
    }

    /// Lists the whole bucket. Of packs that are gone, what a collection has deleted goes from the disk; what was lost is brought
    /// there again, if the disk has it.
    ///
    /// # Errors
    /// Those of the bucket and of its index.
    pub async fn rebuild(&self) -> Result<()> {
        let Some(tier) = &self.tier else { return Ok(()) };
        let mut lost = false;
        for gone in tier.durable.rebuild().await? {
            tracing::info!(pack = %gone.pack, why = ?gone.why, bucket = %tier.durable.name(), "a pack is gone");
            match gone.why {
                Why::Collected => self.remove_collected(tier, gone.pack).await?,
                Why::Lost => lost = true,
                // Can still be read here, and is not brought anywhere.
                Why::Unknown => {}
            }
            let durable = tier.durable.clone();
            self.blocking(move |_| {
                if gone.why == Why::Lost {
                    durable.set_complete(false)?;
                }
                durable.forget(gone.pack)
            })
            .await?;
        }
        if lost {
            tier.drain.compare_again();
        }
        Ok(())
    }

    /// Forgets the SHA-256 names of what is gone.
    async fn prune_names(&self) -> Result<()> {
        let Some(tier) = self.tier.clone() else { return Ok(()) };
        self.blocking(move |store| {
            store.disk.prune_sha256(|blobs| tier.durable.missing(&tier.not_waiting(blobs)))?;
            Ok(())
        })
        .await
    }

    /// Removes from the disk what only a pack had that a collection has deleted.
    async fn remove_collected(&self, tier: &Arc<Tier>, pack: durable::PackName) -> Result<()> {
        let _nothing_arrives = match tier.config.durability {
            Durability::Through => None,
            Durability::Behind => Some(tier.arriving.write().await),
        };
        let tier = tier.clone();
        self.blocking(move |store| {
            let mut blobs = tier.durable.lost_with(pack)?;
            tier.drain.retain_idle(&mut blobs);
            store.disk.remove(&blobs)?;
            tier.durable.forget_used(&blobs)
        })
        .await
    }

    /// Which of `blobs` are not as durable as this store promises, each once, in the order asked. On the others, and all below
    /// them, the asker can count for the time of a lease.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let fresh = Instant::now().checked_sub(FRESH).unwrap_or_else(Instant::now);
        let Some(tier) = &self.tier else { return self.disk.find_missing(blobs).await };
        let asked = tier.not_waiting(blobs);
        let mut missing = asked.clone();
        match tier.find_missing(&asked, fresh, &mut missing).await {
            // Uploads need no bucket here: at worst it has the blob, and it is stored twice.
            Err(error) if tier.config.durability == Durability::Behind && error.is_transient() => {
                tracing::warn!(%error, blobs = missing.len(), "what the bucket has is not known, and counts as missing");
            }
            result => result?,
        }
        Ok(missing)
    }

    /// As [`TieredStore::find_missing`]; what any node had stored at `since` does not count as missing.
    async fn find_missing_since(&self, blobs: &[Blob], since: Instant) -> Result<Vec<Blob>> {
        let Some(tier) = &self.tier else { return self.disk.find_missing(blobs).await };
        let asked = tier.not_waiting(blobs);
        let mut missing = Vec::new();
        tier.find_missing(&asked, since, &mut missing).await?;
        Ok(missing)
    }

    /// Whether the blob is as durable as this store promises.
    ///
    /// # Errors
    /// Those of the store.
    pub fn contains(&self, blob: &Blob) -> Result<bool> {
        match &self.tier {
            None => self.disk.contains(blob),
            Some(_) => Ok(Handle::current().block_on(self.find_missing(&[*blob]))?.is_empty()),
        }
    }

    /// The blobs that names stand for, in their order; `None` for names that nobody has said anything of to this node.
    ///
    /// # Errors
    /// Those of the index.
    pub fn resolve(&self, names: &[ContentName]) -> Result<Vec<Option<Blob>>> {
        let foreign = |name: &ContentName| if let ContentName::Sha256(name) = name { Some(*name) } else { None };
        let asked: Vec<_> = names.iter().filter_map(foreign).collect();
        let mut found = self.disk.resolve_sha256(&asked)?.into_iter();
        let blob = |name: &ContentName| match name {
            ContentName::Blake3(blob) => Some(*blob),
            ContentName::Sha256(_) => found.next().flatten(),
        };
        Ok(names.iter().map(blob).collect())
    }

    /// Says for which blobs SHA-256 names stand: of the same bytes. Store the blobs first.
    ///
    /// # Errors
    /// Those of the index.
    pub fn name(&self, names: &[(Sha256Blob, Blob)]) -> Result<()> {
        self.disk.name_sha256(names)
    }

    /// Brings to the disk what of `blobs` only the durable tier has, in few requests. Call it before many reads.
    /// What is nowhere is left out: the read says so.
    ///
    /// # Errors
    /// Those of the durable tier.
    pub async fn bring(&self, blobs: &[Blob]) -> Result<()> {
        match &self.tier {
            None => Ok(()),
            Some(tier) => self.bring_from(tier, blobs).await,
        }
    }

    /// As [`TieredStore::bring`], on a thread that may block.
    ///
    /// # Errors
    /// As [`TieredStore::bring`].
    pub fn bring_now(&self, blobs: &[Blob]) -> Result<()> {
        if self.tier.is_none() {
            return Ok(());
        }
        Handle::current().block_on(self.bring(blobs))
    }

    /// The contents of a blob, verified.
    ///
    /// # Errors
    /// As [`LocalStore::read_blob`], and those of the durable tier.
    pub fn read_blob(&self, blob: &Blob) -> Result<Bytes> {
        match (self.disk.read_blob(blob), &self.tier) {
            (Err(error), Some(tier)) if error.is_missing() => Handle::current().block_on(self.read_from(tier, *blob)),
            (result, _) => result,
        }
    }

    /// Opens a blob's file without verifying it; `None` for a blob that is kept inline, or is not there.
    ///
    /// # Errors
    /// Those of opening the file, and of the durable tier.
    pub fn open_object(&self, blob: &Blob) -> Result<Option<File>> {
        let file = self.disk.open_object(blob)?;
        // What is small is read whole; what is large must not be.
        if file.is_none() && blob.size > MAX_SHARED_BLOB && self.tier.is_some() {
            self.bring_now(&[*blob])?;
            return self.disk.open_object(blob);
        }
        Ok(file)
    }

    /// Reads the copy on the disk to its end and drops it if it is damaged.
    ///
    /// # Errors
    /// As [`LocalStore::verify`].
    pub fn verify(&self, blob: &Blob) -> Result<()> {
        self.disk.verify(blob)
    }

    /// Stores many blobs, durable together when this returns.
    ///
    /// # Errors
    /// As [`Store::write_batch`].
    pub async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let Some(tier) = &self.tier else { return self.disk.write_batch(blobs).await };
        let names: Vec<Blob> = blobs.iter().map(|(blob, _)| *blob).collect();
        match tier.config.durability {
            Durability::Through => {
                let absent: HashSet<Blob> = tier.durable.find_missing(&names).await?.into_iter().collect();
                let small: Vec<_> = blobs
                    .iter()
                    .filter(|(blob, _)| blob.size <= MAX_SHARED_BLOB && absent.contains(blob))
                    .cloned()
                    .collect();
                tokio::try_join!(self.disk.write_batch(blobs), tier.durable.put(small))?;
                for blob in absent.into_iter().filter(|blob| blob.size > MAX_SHARED_BLOB) {
                    self.store(tier, blob).await?;
                }
            }
            Durability::Behind => {
                // Waits when too much is on its way already.
                tier.drain.room().await;
                let (store, tier, names) = (self.clone(), tier.clone(), names.clone());
                self.to_its_end(async move {
                    let _arriving = tier.arriving.clone().read_owned().await;
                    let absent = match tier.durable.find_missing(&tier.not_waiting(&names)).await {
                        Err(error) if error.is_transient() => tier.not_waiting(&names),
                        result => result?,
                    };
                    let written = store.disk.write_batch(blobs).await;
                    store.written(&tier, absent, written).await
                })
                .await?;
            }
        }
        self.touch(tier, names).await
    }

    /// Has brought to the bucket what was written to the disk: after an error, that may be any part of it.
    async fn written(&self, tier: &Tier, mut blobs: Vec<Blob>, written: Result<()>) -> Result<()> {
        if written.is_err() {
            let lacking: HashSet<Blob> = self.disk.find_missing(&blobs).await.unwrap_or_default().into_iter().collect();
            blobs.retain(|blob| !lacking.contains(blob));
        }
        tier.drain.add(blobs);
        written
    }

    /// Begins to store a blob in pieces; end it with [`TieredStore::finish`].
    ///
    /// # Errors
    /// Those of creating a file.
    pub fn begin(&self, blob: Blob) -> Result<Ingest> {
        self.disk.begin(blob)
    }

    /// As [`TieredStore::begin`], for a blob of which only the size is known: see [`LocalStore::begin_unnamed`].
    ///
    /// # Errors
    /// Those of creating a file.
    pub fn begin_unnamed(&self, size: u64) -> Result<Ingest> {
        self.disk.begin_unnamed(size)
    }

    /// Verifies a blob that came in pieces and makes it durable; returns when it is.
    ///
    /// # Errors
    /// As [`Ingest::finish`], and those of the durable tier.
    pub async fn finish(&self, ingest: Ingest) -> Result<()> {
        let blob = ingest.blob();
        let Some(tier) = &self.tier else { return ingest.finish().await };
        if tier.config.durability == Durability::Behind {
            tier.drain.room().await;
        }
        let (store, storing) = (self.clone(), tier.clone());
        self.to_its_end(async move {
            let _arriving = storing.arriving.clone().read_owned().await;
            let written = ingest.finish().await;
            match storing.config.durability {
                Durability::Through => {
                    written?;
                    store.store(&storing, blob).await
                }
                Durability::Behind => store.written(&storing, vec![blob], written).await,
            }
        })
        .await?;
        self.touch(tier, vec![blob]).await
    }

    /// Pins `tree`; replaces what the same owner, kind and name had pinned.
    ///
    /// # Errors
    /// As [`LocalStore::pin`], and those of the durable tier.
    pub fn pin(&self, owner_uid: &str, kind: &str, name: &str, tree: Blob) -> Result<()> {
        let Some(tier) = &self.tier else { return self.disk.pin(owner_uid, kind, name, tree) };
        Handle::current().block_on(async {
            // Exactly: it may have been uploaded to another node a moment ago.
            if !self.find_missing_since(&[tree], Instant::now()).await?.is_empty() {
                let store = tier.durable.name();
                return Err(match tier.config.durability {
                    Durability::Through => StoreError::NotFound { blob: tree, store },
                    // Another node may have it on its disk.
                    Durability::Behind => StoreError::Busy(format!("the tree {tree} is not in {store} yet")),
                });
            }
            tier.durable.pin(owner_uid, kind, name, tree).await
        })
    }

    /// Forgets roots. Returns how many there were.
    ///
    /// # Errors
    /// As [`LocalStore::unpin`], and those of the durable tier.
    pub fn unpin(&self, owner_uid: &str, kind: Option<&str>, name: Option<&str>) -> Result<usize> {
        match &self.tier {
            None => self.disk.unpin(owner_uid, kind, name),
            Some(tier) => Handle::current().block_on(tier.durable.unpin(owner_uid, kind, name)),
        }
    }

    /// The roots of an owner and kind, where given, in order of owner, kind and name.
    ///
    /// # Errors
    /// As [`LocalStore::roots`], and those of the durable tier.
    pub fn roots(&self, owner_uid: Option<&str>, kind: Option<&str>) -> Result<Vec<Root>> {
        match &self.tier {
            None => self.disk.roots(owner_uid, kind),
            Some(tier) => Handle::current().block_on(tier.durable.roots(owner_uid, kind)),
        }
    }

    /// What the node holds.
    pub fn statistics(&self) -> Statistics {
        let durable = self.tier.as_ref().map(|tier| {
            let (pending_blobs, pending_bytes, compared) = tier.drain.pending();
            DurableStatistics { bucket: tier.durable.statistics(), pending_blobs, pending_bytes, compared }
        });
        Statistics { disk: self.disk.statistics(), durable }
    }

    /// Checks the disk and the roots.
    ///
    /// # Errors
    /// As [`LocalStore::fsck`], and those of the durable tier.
    pub fn fsck(&self, repair: bool) -> Result<FsckReport> {
        let mut report = self.disk.fsck(repair)?;
        if self.tier.is_some() {
            for root in self.roots(None, None)? {
                if let Some(problem) = self.incomplete(&root)? {
                    report.incomplete_roots.push(IncompleteRoot { root, problem });
                }
            }
        }
        Ok(report)
    }

    /// What a root misses first, if anything.
    fn incomplete(&self, root: &Root) -> Result<Option<String>> {
        let directories = match bottom_up(&root.tree, self, |_| false) {
            Ok(directories) => directories,
            Err(error) if error.is_missing() => return Ok(Some(error.to_string())),
            Err(error @ (StoreError::NotADirectory { .. } | StoreError::Invalid(_))) => {
                return Ok(Some(error.to_string()));
            }
            Err(error) => return Err(error),
        };
        for (_, directory) in &directories {
            let contents: Vec<Blob> = directory.contents().collect();
            let missing = self.find_missing_since(&contents, Instant::now());
            if let Some(missing) = Handle::current().block_on(missing)?.first() {
                return Ok(Some(format!("blob {missing} is missing")));
            }
        }
        Ok(None)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&TieredStore) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        self.ended(tokio::task::spawn_blocking(move || work(&store))).await
    }

    /// Does `work` to its end, also when the client does not wait for it any more: what is on the disk and nobody knows of
    /// would count as present, and never get to the bucket.
    async fn to_its_end<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        self.ended(tokio::spawn(work)).await
    }

    async fn ended<T>(&self, task: JoinHandle<Result<T>>) -> Result<T> {
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(StoreError::Closed(self.disk.objects().display().to_string())),
        }
    }
}

impl Tier {
    /// Those of `blobs` that are not on their way from the disk to the bucket: what is, is as durable as was promised.
    fn not_waiting(&self, blobs: &[Blob]) -> Vec<Blob> {
        let mut blobs = blobs.to_vec();
        self.drain.retain_idle(&mut blobs);
        blobs
    }

    /// What of `blobs` is not in the bucket, as far as it is known when this fails. What any node had stored at `since` is.
    async fn find_missing(&self, blobs: &[Blob], since: Instant, missing: &mut Vec<Blob>) -> Result<()> {
        *missing = self.durable.find_missing(blobs).await?;
        if !missing.is_empty() {
            self.durable.refresh(since).await?;
            *missing = self.durable.find_missing(missing).await?;
        }
        Ok(())
    }
}

impl Directories for TieredStore {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>> {
        match self.disk.directory(blob) {
            Err(error) if error.is_missing() && self.tier.is_some() => {
                let data = self.read_blob(blob)?;
                let directory =
                    Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob: *blob, source })?;
                Ok(Arc::new(directory))
            }
            result => result,
        }
    }
}
