//! When the contents of a session come to this node: before it is mounted, or, where the lazy layer is served, as they are
//! read and in the background.
//!
//! Who would need the lazy layer while it does not answer waits for his contents instead: nothing fails because of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aether_api::source::Hydration;
use aether_api::{AetherSession, AetherSource};
use aether_cas::transfer::Progress;
use aether_cas::tree::Owner;
use aether_cas::{Blob, Store, StoreError};
use aether_engine::{Error, Image};
use aether_runtime::CancellationToken;
use async_trait::async_trait;
use bytes::Bytes;
use kube::ResourceExt as _;
use kube::runtime::events::EventType;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::driver::Driver;
use crate::failure::{Result, chain};
use crate::metrics::Metrics;
use crate::moments::full_name;

/// How often to see whether the lazy layer answers, and what is incomplete, beside the changes that are told.
const PERIOD: Duration = Duration::from_secs(5);
/// Between two attempts at one tree; doubled with each that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What the background is told.
#[derive(Debug, Default)]
pub(crate) struct Background {
    /// A tree has become incomplete.
    begun: Notify,
    /// How many wait until an incomplete tree is whole. They fetch it themselves, as fast as they can.
    waiting: watch::Sender<usize>,
    /// Whether the lazy layer answers, as far as is known.
    layer: watch::Sender<bool>,
}

impl Background {
    /// Makes the background leave network and trees to the caller until dropped.
    fn step_aside(&self) -> Aside<'_> {
        self.waiting.send_modify(|waiting| *waiting += 1);
        Aside(self)
    }
}

struct Aside<'a>(&'a Background);

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_modify(|waiting| *waiting -= 1);
    }
}

/// Whose contents are wanted, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// `NAMESPACE/NAME` of the source.
    source: Option<String>,
    /// All of them before the first mount.
    whole: bool,
}

impl Wanted {
    /// As a source says.
    pub(crate) fn of(source: &AetherSource) -> Self {
        Self { source: Some(full_name(source)), whole: source.spec.hydration == Hydration::Eager }
    }
}

impl Driver {
    /// What the source of a session, or of the ancestor that began with one, says of its contents.
    pub(crate) fn wanted(&self, session: &AetherSession) -> Wanted {
        let base = session.status.as_ref().and_then(|status| status.base.as_ref());
        let Some(name) = base.and_then(|base| base.source_name.as_ref()) else { return Wanted::default() };
        let namespace = base.and_then(|base| base.source_namespace.clone()).or_else(|| session.namespace());
        let namespace = namespace.unwrap_or_default();
        match self.cluster.sources.get(&namespace, name) {
            Some(source) => Wanted::of(&source),
            None => Wanted { source: Some(format!("{namespace}/{name}")), whole: false },
        }
    }

    /// Brings a tree to this node as far as it must be here for a mount, and makes its image.
    pub(crate) async fn image(&self, root: Blob, owner: Owner, wanted: &Wanted) -> Result<Image> {
        let source = wanted.source.as_deref();
        if self.config.lazy && !wanted.whole {
            if self.engine.lazy_layer_answers().await? {
                let count = count(&self.metrics);
                let image = self.engine.ensure_image_lazily(root, owner, source, &*self.remote, &count).await?;
                self.background.begun.notify_one();
                return Ok(image);
            }
            tracing::warn!(%root, source, "{ABSENT}: all contents are fetched before the mount");
        }
        let _aside = self.is_incomplete(root).await?.then(|| self.background.step_aside());
        Ok(self.engine.ensure_image(root, owner, &*self.remote, &count(&self.metrics)).await?)
    }

    async fn is_incomplete(&self, root: Blob) -> Result<bool> {
        Ok(self.engine.incomplete().await?.iter().any(|incomplete| incomplete.root == root))
    }

    /// Mounts a session of the engine.
    pub(crate) async fn mount_session(&self, id: &str, session: &AetherSession) -> Result<PathBuf> {
        match self.engine.mount_session(id).await {
            Err(error @ Error::Busy { .. }) => {
                let root = self.engine.session(id).await?.image.root;
                self.complete(root, session, error).await?;
                Ok(self.engine.mount_session(id).await?)
            }
            other => Ok(other?),
        }
    }

    /// Shows an image at a target.
    pub(crate) async fn show_image(&self, image: &Image, target: &Path, session: &AetherSession) -> Result<()> {
        match self.engine.publish_image(image, target).await {
            Err(error @ Error::Busy { .. }) => {
                self.complete(image.root, session, error).await?;
                Ok(self.engine.publish_image(image, target).await?)
            }
            other => Ok(other?),
        }
    }

    /// Fetches what a mount of a tree would ask the lazy layer for, if that is why it was refused.
    async fn complete(&self, root: Blob, session: &AetherSession, refused: Error) -> Result<()> {
        if !self.is_incomplete(root).await? {
            return Err(refused.into());
        }
        let note = format!(
            "{ABSENT} on node {}, so this waits until all contents are there; its pod aether-lazy may say why",
            self.node()
        );
        tracing::warn!(session = full_name(session), %root, "{note}");
        self.events.on(session, EventType::Warning, "LazyLayerAbsent", note).await;
        let _aside = self.background.step_aside();
        self.engine.hydrate(root, &*self.remote, &count(&self.metrics)).await?;
        Ok(())
    }
}

const ABSENT: &str = "the lazy layer does not answer";

/// Counts what a transfer moves.
fn count(metrics: &Metrics) -> impl Fn(Progress) + Send + Sync {
    let (objects, bytes) = (metrics.hydrated_objects.clone(), metrics.hydrated_bytes.clone());
    let before = Mutex::new(Progress::default());
    move |now: Progress| {
        let mut before = before.lock().unwrap_or_else(PoisonError::into_inner);
        // It begins anew with each attempt.
        objects.inc_by(now.files.saturating_sub(before.files));
        bytes.inc_by(now.bytes.saturating_sub(before.bytes));
        *before = now;
    }
}

/// Completes what is incomplete, those first that wait longest, until `stop`. The bandwidth has its limit as long as the lazy layer
/// answers: without it, readers fail until their contents have come.
pub(crate) async fn run(driver: Arc<Driver>, stop: CancellationToken) {
    let paced = Paced::new(driver.remote.clone(), driver.config.hydration_bandwidth);
    let mut waiting = driver.background.waiting.subscribe();
    let mut layer = driver.background.layer.subscribe();
    let mut attempts = Attempts::default();
    loop {
        let due = match driver.engine.incomplete().await {
            Ok(incomplete) => {
                driver.metrics.incomplete.set(i64::try_from(incomplete.len()).unwrap_or(i64::MAX));
                let roots: Vec<Blob> = incomplete.iter().map(|incomplete| incomplete.root).collect();
                attempts.due(&roots, Instant::now())
            }
            Err(error) => {
                tracing::warn!(%error, "what is incomplete cannot be read");
                None
            }
        };
        let Some(root) = due else {
            tokio::select! {
                () = stop.cancelled() => return,
                () = driver.background.begun.notified() => {}
                () = tokio::time::sleep(PERIOD) => {}
            }
            continue;
        };
        let begun = Instant::now();
        let counted = count(&driver.metrics);
        let answers = *layer.borrow();
        let store: &dyn Store = if answers { &paced } else { &*driver.remote };
        let hydrated = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            // What has arrived stays; the rest goes on when nobody waits any more.
            _ = waiting.wait_for(|waiting| *waiting > 0) => None,
            _ = layer.wait_for(|now| *now != answers) => None,
            hydrated = driver.engine.hydrate(root, store, &counted) => Some(hydrated),
        };
        let Some(hydrated) = hydrated else {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = waiting.wait_for(|waiting| *waiting == 0) => continue,
            }
        };
        match hydrated {
            Ok(moved) => {
                let seconds = begun.elapsed().as_secs_f64();
                tracing::info!(%root, objects = moved.files, bytes = moved.bytes, seconds, "all contents are here");
                attempts.succeeded(&root);
            }
            Err(error) => {
                driver.metrics.hydration_failures.inc();
                let pause = attempts.failed(root, Instant::now());
                tracing::warn!(%root, error = chain(&error), ?pause, "contents are still missing; tried again");
            }
        }
    }
}

/// When which tree is tried again.
#[derive(Debug, Default)]
struct Attempts(HashMap<Blob, (Instant, Duration)>);

impl Attempts {
    /// The first tree whose turn has come. Those that are not named are forgotten.
    fn due(&mut self, roots: &[Blob], now: Instant) -> Option<Blob> {
        self.0.retain(|root, _| roots.contains(root));
        roots.iter().copied().find(|root| self.0.get(root).is_none_or(|(next, _)| *next <= now))
    }

    fn succeeded(&mut self, root: &Blob) {
        self.0.remove(root);
    }

    fn failed(&mut self, root: Blob, now: Instant) -> Duration {
        let pause = self.0.get(&root).map_or(FIRST_PAUSE, |(_, pause)| (*pause * 2).min(LONGEST_PAUSE));
        self.0.insert(root, (now + pause, pause));
        pause
    }
}

/// Tells whether the lazy layer answers, until `stop`.
pub(crate) async fn watch_layer(driver: Arc<Driver>, stop: CancellationToken) {
    // It may begin after the driver, in its own time.
    let mut answered = None;
    loop {
        let answers = driver.engine.lazy_layer_answers().await.unwrap_or(false);
        driver.metrics.lazy_answers.set(answers.into());
        driver.background.layer.send_replace(answers);
        match (answered.replace(answers), answers) {
            (Some(true), true) | (Some(false), false) => {}
            (_, true) => tracing::info!("the lazy layer answers: sessions are mounted before their contents are here"),
            (_, false) => tracing::warn!("{ABSENT}: sessions wait for their contents until it does"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

/// A store whose contents are read at a bounded rate: the background leaves the network to those who wait.
struct Paced {
    store: Arc<dyn Store>,
    bytes_per_second: Option<u64>,
    /// When what was read so far is paid for. Time in which nothing was read is not saved up.
    paid: Mutex<Instant>,
}

impl Paced {
    fn new(store: Arc<dyn Store>, bytes_per_second: Option<u64>) -> Self {
        Self { store, bytes_per_second, paid: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may be read.
    async fn pay(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let turn = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*paid).max(Instant::now());
            *paid = turn + Duration::from_secs_f64(bytes as f64 / rate as f64);
            turn
        };
        tokio::time::sleep_until(turn).await;
    }
}

#[async_trait]
impl Store for Paced {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>, StoreError> {
        self.store.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes, StoreError> {
        self.pay(blob.size).await;
        self.store.read(blob).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>, StoreError> {
        self.pay(blobs.iter().map(|blob| blob.size).sum()).await;
        self.store.read_batch(blobs).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.pay(blob.size).await;
        self.store.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<(), StoreError> {
        self.store.write_batch(blobs).await
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.store.write_file(blob, path).await
    }

    async fn read_tree(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>, StoreError> {
        self.store.read_tree(root).await
    }
}

#[cfg(test)]
mod tests {
    use aether_api::AetherSourceSpec;
    use aether_cas::MemoryStore;

    use super::*;

    #[test]
    fn a_tree_that_fails_waits_longer_each_time_and_keeps_no_other_waiting() {
        let (bad, good) = (Blob::of(b"bad"), Blob::of(b"good"));
        let mut attempts = Attempts::default();
        let now = Instant::now();
        assert_eq!(attempts.due(&[bad, good], now), Some(bad));
        assert_eq!(attempts.failed(bad, now), FIRST_PAUSE);
        assert_eq!(attempts.due(&[bad, good], now), Some(good));
        attempts.succeeded(&good);
        assert_eq!(attempts.due(&[bad], now), None);
        assert_eq!(attempts.due(&[bad], now + FIRST_PAUSE), Some(bad));
        assert_eq!(attempts.failed(bad, now), FIRST_PAUSE * 2);
        for _ in 0..20 {
            attempts.failed(bad, now);
        }
        assert_eq!(attempts.failed(bad, now), LONGEST_PAUSE);
        // It is no longer wanted, and begins anew when it is wanted again.
        assert_eq!(attempts.due(&[], now), None);
        assert_eq!(attempts.due(&[bad], now), Some(bad));
    }

    #[tokio::test]
    async fn the_background_keeps_to_its_bandwidth() {
        let store = MemoryStore::new();
        let data = Bytes::from(vec![7; 50_000]);
        let blob = Blob::of(&data);
        store.write(blob, data).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let paced = Paced::new(Arc::new(store), Some(1_000_000));
        let begun = Instant::now();
        for n in 0..2 {
            paced.read(blob).await.unwrap();
            paced.read_batch(&[blob]).await.unwrap();
            paced.fetch_to(blob, &folder.path().join(n.to_string())).await.unwrap();
        }
        // The last one is not paid for yet.
        assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_source_says_when_its_contents_are_wanted() {
        let source = |hydration| {
            let mut source = AetherSource::new("repo", AetherSourceSpec { hydration, ..AetherSourceSpec::default() });
            source.metadata.namespace = Some("platform".into());
            Wanted::of(&source)
        };
        assert_eq!(source(Hydration::OnDemand), Wanted { source: Some("platform/repo".into()), whole: false });
        assert!(source(Hydration::Eager).whole);
    }
}
