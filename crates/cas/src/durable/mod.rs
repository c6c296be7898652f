//! The durable tier: a bucket in which every blob survives the loss of all nodes.
//!
//! Blobs lie in immutable packs with unique names ([`format`]), so that many small ones cost one request. Nothing
//! in the bucket is ever overwritten; a blob may lie in several packs, and removing one of them never hurts
//! another. Which blob is where is kept in an index on the node's disk, which is made from the bucket alone.
//!
//! It promises: [`Durable::put`] returns when the blobs are in the bucket; what is handed out is verified; what
//! any node has stored is found after [`Durable::refresh`]; what [`Durable::find_missing`] does not call missing stays for the
//! time of a lease ([`terms`]), however many nodes collect ([`collect`]). Methods that are not `async` block the thread.
//!
//! Names sort by time, so that what is new is listed in one request: from [`MARGIN`] before the newest known
//! name on, which covers the clocks of nodes and the time that an upload may take. Memory is bounded: by
//! what [`writer`] and [`reader`] say, some 200 MiB when both are busy with a slow bucket.

mod bucket;
pub mod collect;
pub mod format;
mod index;
mod name;
mod reader;
pub mod roots;
pub mod scrub;
pub mod terms;
mod turns;
mod writer;

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures::{TryStreamExt, stream};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder};

pub use index::Place;
pub use name::{PackName, ParseNameError};
pub use reader::{Span, spans};
pub use terms::Terms;

use bucket::Bucket;
use format::{Entry, Tail, decode_tail};
use index::Index;
use reader::Reader;
use terms::{Agreed, Moment, REMEMBERED, now, whole_millis};
use writer::{Writer, repeat};

use crate::{Blob, StoreError, store::Result, transfer::blocking};

const FOLDER: &str = "packs";
/// When all packs were last listed, in milliseconds since 1970.
const LISTED: &str = "listed";
/// Whether everything that the disk has and the bucket has not is nothing that was acknowledged.
const COMPLETE: &str = "complete";
/// A pack may appear in the bucket so much later than its name says, or than a newer one did.
const MARGIN: Duration = Duration::from_secs(writer::UPLOAD_DEADLINE.as_secs() + 300);
/// Between the begins of two listings: what many readers miss at one time is looked for once.
const PAUSE: Duration = Duration::from_millis(250);
/// Footers that are read at one time.
const FOOTERS: usize = 32;
/// The end of a pack that is read first; most footers fit.
const TAIL_BYTES: u64 = 64 << 10;

/// Where the bucket is. Credentials come from the environment, as the AWS tools take them: `AWS_ACCESS_KEY_ID` and
/// `AWS_SECRET_ACCESS_KEY`, or the web identity of `AWS_WEB_IDENTITY_TOKEN_FILE` and `AWS_ROLE_ARN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Config {
    /// The bucket, which must exist.
    pub bucket: String,
    /// A folder in it; may be empty.
    pub prefix: String,
    /// The service, where it is not AWS: `http://host:port` or `https://…`.
    pub endpoint: Option<String>,
    /// The region; `AWS_REGION`, or `us-east-1`, where it is not given.
    pub region: Option<String>,
}

/// What is known of the bucket, and what was asked of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packs.
    pub packs: u64,
    /// Bytes of blobs in them, as they are stored.
    pub stored_bytes: u64,
    /// Packs that this version cannot read.
    pub unreadable_packs: u64,
    /// Requests made.
    pub requests: u64,
    /// Requests that failed in the end, after all repetitions.
    pub failed_requests: u64,
}

/// A durable tier. Clones share it.
#[derive(Clone)]
pub struct Durable(Arc<Inner>);

struct Inner {
    bucket: Bucket,
    index: Arc<Index>,
    writer: Writer,
    reader: Reader,
    /// Held while a listing is under way.
    listed: tokio::sync::Mutex<Listed>,
    /// When the last listing of all packs began that succeeded.
    listed_all: Mutex<Option<Moment>>,
    unreadable: Mutex<HashSet<PackName>>,
    terms: Terms,
    agreed: Agreed,
}

/// A pack that is not in the bucket any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Which.
    pub pack: PackName,
    /// Why, as far as that is known.
    pub why: Why,
}

/// Why a pack is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A collection deleted it.
    Collected,
    /// No collection did.
    Lost,
    /// This node was away for too long to know.
    Unknown,
}

/// What became of the last listings.
#[derive(Default)]
struct Listed {
    /// When the last one began that succeeded.
    begin: Option<Instant>,
    /// When the last one ended, if it failed, and why.
    failed: Option<(Instant, StoreError)>,
}

impl Listed {
    /// Notes how a listing ended that began at `begin`.
    fn note<T>(&mut self, begin: Instant, result: &Result<T>) {
        match result {
            Ok(_) => *self = Self { begin: Some(begin), failed: None },
            Err(error) => self.failed = Some((Instant::now(), repeat(error))),
        }
    }
}

fn pack_key(name: PackName) -> String {
    format!("{FOLDER}/{name}")
}

impl Durable {
    /// Opens the durable tier in an S3 service, with its index in the folder `index`. Asks the service nothing:
    /// call [`Durable::rebuild`] before the first read.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for settings that cannot be used, and those of the index.
    pub async fn open_s3(config: &S3Config, index: &Path, terms: Terms) -> Result<Self> {
        // What is installed already, if anything, serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let insecure = config.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let client = ClientOptions::new()
            .with_allow_http(insecure)
            .with_connect_timeout(Duration::from_secs(3))
            .with_read_timeout(Duration::from_secs(20))
            // A large blob may take its time, as long as something comes.
            .with_timeout_disabled();
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(3),
                base: 2.,
            },
            max_retries: 8,
            retry_timeout: Duration::from_secs(20),
        };
        let mut builder =
            AmazonS3Builder::from_env().with_bucket_name(&config.bucket).with_client_options(client).with_retry(retry);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &config.region {
            builder = builder.with_region(region);
        }
        let name = format!("s3://{}", config.bucket);
        let store = builder.build().map_err(|e| StoreError::Invalid(format!("{name} cannot be used: {e}")))?;
        Self::open(Arc::new(store), name, &config.prefix, index, terms).await
    }

    /// Opens the durable tier in any store of objects, which errors name `name`.
    ///
    /// # Errors
    /// Those of the index.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        name: String,
        prefix: &str,
        index: &Path,
        terms: Terms,
    ) -> Result<Self> {
        let bucket = Bucket::new(store, name, prefix);
        let (path, identity) = (index.to_owned(), bucket.name());
        let index = Arc::new(blocking(move || Index::open(&path, &identity)).await?);
        Ok(Self(Arc::new(Inner {
            writer: Writer::start(bucket.clone(), index.clone()),
            reader: Reader::new(bucket.clone(), index.clone()),
            bucket,
            index,
            listed: tokio::sync::Mutex::default(),
            listed_all: Mutex::default(),
            unreadable: Mutex::default(),
            terms,
            agreed: Agreed::default(),
        })))
    }

    /// How errors name the place.
    pub fn name(&self) -> String {
        self.0.bucket.name()
    }

    /// Which of `blobs` are in no known pack that counts, each once, in the order asked. Nobody can build on that: see
    /// [`Durable::find_missing`].
    ///
    /// # Errors
    /// Those of the index.
    pub fn missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let view = self.0.agreed.view();
        self.0.index.missing(blobs, |place| view.as_ref().is_none_or(|view| !view.is_condemned(place.pack)))
    }

    /// Where the copies of a blob are: those that do not count any more first, then the others, the newest last.
    ///
    /// # Errors
    /// Those of the index.
    pub fn places(&self, blob: &Blob) -> Result<Vec<Place>> {
        let mut places = self.0.index.places(blob)?;
        if let Some(view) = self.0.agreed.view() {
            places.sort_by_key(|place| !view.is_condemned(place.pack));
        }
        Ok(places)
    }

    /// The known packs, the oldest first.
    ///
    /// # Errors
    /// Those of the index.
    pub fn packs(&self) -> Result<Vec<PackName>> {
        self.0.index.packs_there()
    }

    /// What a known pack holds; nothing when it is not known.
    ///
    /// # Errors
    /// Those of the index.
    pub fn pack_entries(&self, pack: PackName) -> Result<Vec<Entry>> {
        self.0.index.entries(pack)
    }

    /// Stores blobs of up to [`format::MAX_SHARED_BLOB`] bytes each; returns when they are in the bucket.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`], and those of the bucket. After an error any part of them may be stored.
    pub async fn put(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        self.0.writer.put(blobs).await
    }

    /// Stores the blob that the file at `path` holds, whatever its size; returns when it is in the bucket.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`], and those of the file and of the bucket.
    pub async fn put_file(&self, blob: Blob, path: &Path) -> Result<()> {
        self.0.writer.put_file(blob, path).await
    }

    /// Deletes a pack that is condemned.
    async fn delete_pack(&self, pack: PackName) -> Result<()> {
        self.0.bucket.delete(&pack_key(pack)).await?;
        self.0.index.hide(pack);
        Ok(())
    }

    /// What a pack that is gone held and no other does.
    ///
    /// # Errors
    /// Those of the index.
    pub fn lost_with(&self, pack: PackName) -> Result<Vec<Blob>> {
        let mut blobs = Vec::new();
        for entry in self.0.index.entries(pack)? {
            if self.0.index.places(&entry.blob)?.is_empty() {
                blobs.push(entry.blob);
            }
        }
        Ok(blobs)
    }

    /// Forgets a pack that is gone: [`Durable::rebuild`] does not tell of it any more.
    ///
    /// # Errors
    /// Those of the index.
    pub fn forget(&self, pack: PackName) -> Result<()> {
        self.0.index.remove_pack(pack)
    }

    /// Whether all that the disk has and the bucket has not was acknowledged to nobody, as far as somebody has said so.
    ///
    /// # Errors
    /// Those of the index.
    pub fn is_complete(&self) -> Result<bool> {
        Ok(self.0.index.number(COMPLETE)?.is_some())
    }

    /// Says so, over restarts, or takes it back.
    ///
    /// # Errors
    /// Those of the index.
    pub fn set_complete(&self, complete: bool) -> Result<()> {
        self.0.index.set_number(COMPLETE, complete.then_some(1))
    }

    /// Learns of the packs that any node had stored when this was called, unless a listing that began after
    /// `since` did so already. Callers at one time share one listing, and its failure: one that ended after `since`
    /// failed for this caller too.
    ///
    /// # Errors
    /// Those of the bucket and of the index.
    pub async fn refresh(&self, since: Instant) -> Result<()> {
        let mut listed = self.0.listed.lock().await;
        if listed.begin.is_some_and(|begin| begin >= since) {
            return Ok(());
        }
        if let Some((ended, error)) = &listed.failed
            && *ended >= since
        {
            return Err(repeat(error));
        }
        if let Some(begin) = listed.begin {
            tokio::time::sleep_until((begin + PAUSE).into()).await;
        }
        let begin = Instant::now();
        let result = self.learn_new().await;
        listed.note(begin, &result);
        result
    }

    async fn learn_new(&self) -> Result<()> {
        let durable = self.clone();
        let newest = blocking(move || durable.0.index.newest()).await?;
        // A name from the future, by a clock that is wrong, must not hide those of today.
        let after = newest.map(|newest| PackName::lowest(newest.time().min(SystemTime::now()), MARGIN));
        let listed = self.list(after).await?;
        self.learn_all(listed).await
    }

    /// Lists the whole bucket: learns of every pack, and says which are gone and not forgotten. What was damaged gets another
    /// chance.
    ///
    /// # Errors
    /// As [`Durable::refresh`].
    pub async fn rebuild(&self) -> Result<Vec<Gone>> {
        let mut listed = self.0.listed.lock().await;
        let begin = Instant::now();
        let result = self.learn_anew().await;
        listed.note(begin, &result);
        result
    }

    async fn learn_anew(&self) -> Result<Vec<Gone>> {
        let (began, when) = (Moment::now(), now());
        let durable = self.clone();
        // Known before the listing: a pack that is stored while it is made may be missing there.
        let (known, before) = blocking(move || Ok((durable.0.index.packs()?, durable.0.index.number(LISTED)?))).await?;
        let listed = self.list(None).await?;
        // After the listing: what was deleted before it was condemned before that.
        let view = self.view_now().await?;
        let names: HashSet<PackName> = listed.iter().map(|(name, _)| *name).collect();
        let away = before.is_none_or(|before| before.saturating_add(whole_millis(REMEMBERED) / 2) < when);
        let gone: Vec<Gone> = known
            .into_iter()
            .filter(|pack| !names.contains(pack))
            .map(|pack| {
                let why = match view.is_condemned(pack) {
                    true => Why::Collected,
                    false if away => Why::Unknown,
                    false => Why::Lost,
                };
                Gone { pack, why }
            })
            .collect();
        self.0.index.trust_all(gone.iter().map(|gone| gone.pack).collect());
        self.unreadable().clear();
        self.learn_all(listed).await?;
        // Copies that are known to be damaged do not get another chance unless they are good.
        self.damages().await?;
        let durable = self.clone();
        blocking(move || {
            durable.0.index.drop_leases(when)?;
            durable.0.index.set_number(LISTED, Some(when))
        })
        .await?;
        *self.0.listed_all.lock().unwrap_or_else(|e| e.into_inner()) = Some(began);
        Ok(gone)
    }

    fn listed_all(&self) -> Option<Moment> {
        *self.0.listed_all.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The packs in the bucket, with their lengths.
    async fn list(&self, after: Option<PackName>) -> Result<Vec<(PackName, u64)>> {
        let after = after.map(|name| name.to_string());
        let listed = self.0.bucket.list(FOLDER, after.as_deref()).await?;
        Ok(listed.into_iter().filter_map(|(name, length)| Some((name.parse().ok()?, length))).collect())
    }

    async fn learn_all(&self, listed: Vec<(PackName, u64)>) -> Result<()> {
        let durable = self.clone();
        let unknown = blocking(move || {
            let mut unknown = Vec::new();
            for (name, length) in listed {
                if !durable.0.index.has_pack(name)? && !durable.unreadable().contains(&name) {
                    unknown.push((name, length));
                }
            }
            Ok(unknown)
        })
        .await?;
        stream::iter(unknown.into_iter().map(Ok))
            .try_for_each_concurrent(FOOTERS, |(name, length)| self.learn(name, length))
            .await
    }

    /// Reads the index of one pack.
    async fn learn(&self, pack: PackName, length: u64) -> Result<()> {
        let key = pack_key(pack);
        let mut wanted = TAIL_BYTES.min(length);
        loop {
            let Some(tail) = self.0.bucket.get(&key, length - wanted..length).await? else {
                return Ok(());
            };
            match decode_tail(&tail, length) {
                Ok(Tail::Longer(needed)) if needed as u64 > wanted => wanted = needed as u64,
                Ok(Tail::Entries(entries)) => {
                    let index = self.0.index.clone();
                    return blocking(move || index.add_pack(pack, &entries)).await;
                }
                failed => {
                    let reason = failed.err().map_or_else(String::new, |error| error.to_string());
                    tracing::error!(%key, bucket = %self.name(), %reason, "a pack cannot be read; what it holds counts as missing");
                    self.unreadable().insert(pack);
                    return Ok(());
                }
            }
        }
    }

    /// When the last listing began that succeeded.
    pub async fn listed(&self) -> Option<Instant> {
        self.0.listed.lock().await.begin
    }

    /// Notes that copies on the node's disk were wanted at `when`, in any unit that grows.
    ///
    /// # Errors
    /// Those of the index.
    pub fn set_used(&self, blobs: &[Blob], when: u32) -> Result<()> {
        let known = self.0.index.used(blobs)?;
        let changed: Vec<Blob> =
            blobs.iter().zip(known).filter(|(_, known)| *known != when).map(|(blob, _)| *blob).collect();
        if changed.is_empty() { Ok(()) } else { self.0.index.set_used(&changed, Some(when)) }
    }

    /// When copies were last wanted; 0 for those of which nothing was noted.
    ///
    /// # Errors
    /// Those of the index.
    pub fn used(&self, blobs: &[Blob]) -> Result<Vec<u32>> {
        self.0.index.used(blobs)
    }

    /// Forgets when copies were wanted, because they are gone from the disk.
    ///
    /// # Errors
    /// Those of the index.
    pub fn forget_used(&self, blobs: &[Blob]) -> Result<()> {
        self.0.index.set_used(blobs, None)
    }

    /// What is known of the bucket, and what was asked of it.
    pub fn statistics(&self) -> Statistics {
        let (packs, stored_bytes) = self.0.index.counts();
        let (requests, failed_requests) = self.0.bucket.requests();
        let unreadable_packs = self.unreadable().len() as u64;
        Statistics { packs, stored_bytes, unreadable_packs, requests, failed_requests }
    }

    fn unreadable(&self) -> MutexGuard<'_, HashSet<PackName>> {
        self.0.unreadable.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl std::fmt::Debug for Durable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Durable({})", self.name())
    }
}
