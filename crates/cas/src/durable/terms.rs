//! What all nodes of a bucket agree on: for how long an answer is good, and which packs do not count any more.
//!
//! A collection **condemns** packs by a record in the bucket: what is in them can still be read, but does not make a blob
//! present. Records are never changed, and a pack is never acquitted. So that a pack can be deleted although nodes do not know
//! each other, a node answers "present" only by a list of the records that it began to read less than [`Terms::view`] ago, and
//! a collection waits for longer than that after it has condemned: from then on nobody counts on what it deletes.
//!
//! A **lease** keeps a blob, and if it is a directory all below it, until a time. What was stored has one by the name of its
//! pack, which says when that was; for what is older a record is written to the bucket before the answer "present" is given.
//! Whoever gets that answer can count on it for at least half of [`Terms::lease`].

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, RwLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Durable,
    format::FormatError,
    name::{PackName, millis},
};
use crate::{Blob, StoreError, store::Result, transfer::blocking};

const CONDEMNED: &str = "condemned";
const LEASES: &str = "leases";
const VERSION: u32 = 1;
/// The longest record.
pub const MAX_RECORD_BYTES: u64 = 4 << 20;
/// Packs, or blobs, in one record.
pub(super) const RECORD_ENTRIES: usize = 16 * 1024;
/// Records that are read at one time.
const READS: usize = 16;
/// Records of packs that are deleted are kept for so long: nodes that were away learn from them that nothing was lost.
pub(super) const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// A node that has not listed all packs for so long does so before it answers: well within [`REMEMBERED`].
const LISTED: Duration = Duration::from_secs(6 * 3600);
/// How often an answer is tried that takes too long.
const TRIES: usize = 3;

/// Times that must be the same for all nodes of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// For how long a lease is given.
    pub lease: Duration,
    /// By how old a list of the condemned a node answers. A collection takes longer by so much.
    pub view: Duration,
    /// How much the clocks of nodes may differ.
    pub skew: Duration,
}

impl Terms {
    /// The terms of a bucket with leases of this length.
    pub fn new(lease: Duration) -> Self {
        Self { lease, view: Duration::from_secs(120), skew: Duration::from_secs(15 * 60) }
    }

    /// How long after its name was given a pack keeps what is in it, in milliseconds.
    pub(super) fn young(&self) -> u64 {
        whole_millis(self.lease + self.skew)
    }
}

pub(super) fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    millis(SystemTime::now())
}

/// A moment of which the age is told by two clocks, because a machine that stands still stops one of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    monotonic: Instant,
    wall: SystemTime,
}

impl Moment {
    pub(super) fn now() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }

    pub(super) fn age(&self) -> Duration {
        self.monotonic.elapsed().max(self.wall.elapsed().unwrap_or_default())
    }
}

/// What is condemned.
#[derive(Debug)]
pub(super) struct View {
    /// When it began to be read.
    began: Moment,
    /// Records, and the packs that each names.
    records: BTreeMap<PackName, Arc<[PackName]>>,
    /// Packs, and the newest record that names each.
    packs: HashMap<PackName, PackName>,
}

impl View {
    pub(super) fn is_condemned(&self, pack: PackName) -> bool {
        self.packs.contains_key(&pack)
    }

    /// Since when a pack has been condemned, if it is, in milliseconds since 1970.
    pub(super) fn since(&self, pack: PackName) -> Option<u64> {
        self.packs.get(&pack).map(|record| millis(record.time()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.packs.is_empty()
    }

    pub(super) fn records(&self) -> impl Iterator<Item = (PackName, &[PackName])> {
        self.records.iter().map(|(name, packs)| (*name, &packs[..]))
    }
}

/// What a node knows of it.
#[derive(Debug, Default)]
pub(super) struct Agreed {
    view: RwLock<Option<Arc<View>>>,
    /// Held while the records are read.
    reading: tokio::sync::Mutex<()>,
}

impl Agreed {
    /// What was known last, however old that is.
    pub(super) fn view(&self) -> Option<Arc<View>> {
        self.view.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CondemnedRecord {
    version: u32,
    packs: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeaseRecord {
    version: u32,
    /// In milliseconds since 1970.
    until: u64,
    blobs: Vec<Blob>,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Blobs, and until when they are leased, in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leases {
    /// The end.
    pub until: u64,
    /// The blobs.
    pub blobs: Vec<Blob>,
}

/// The packs that a record of the bucket condemns.
///
/// # Errors
/// [`FormatError`] for anything that this version does not write.
pub fn decode_condemned(bytes: &[u8]) -> Result<Vec<PackName>, FormatError> {
    const NOT_ONE: FormatError = FormatError::Malformed("it is not a list of condemned packs");
    let record: CondemnedRecord = decode(bytes, NOT_ONE)?;
    let packs: Option<Vec<PackName>> = record.packs.iter().map(|name| name.parse().ok()).collect();
    packs.filter(|packs| packs.len() <= RECORD_ENTRIES).ok_or(NOT_ONE)
}

/// The leases that a record of the bucket grants.
///
/// # Errors
/// [`FormatError`] for anything that this version does not write.
pub fn decode_leases(bytes: &[u8]) -> Result<Leases, FormatError> {
    const NOT_ONE: FormatError = FormatError::Malformed("it is not a list of leases");
    let LeaseRecord { until, blobs, .. } = decode(bytes, NOT_ONE)?;
    if blobs.len() > RECORD_ENTRIES {
        return Err(NOT_ONE);
    }
    Ok(Leases { until, blobs })
}

fn decode<T: DeserializeOwned>(bytes: &[u8], not_one: FormatError) -> Result<T, FormatError> {
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(not_one);
    }
    match serde_json::from_slice(bytes) {
        Ok(Version { version: VERSION }) => serde_json::from_slice(bytes).map_err(|_| not_one),
        Ok(Version { version }) => Err(FormatError::UnknownVersion(version)),
        Err(_) => Err(not_one),
    }
}

impl Durable {
    /// What is condemned, as somebody knew it who began to look less than `age` ago.
    pub(super) async fn view(&self, age: Duration) -> Result<Arc<View>> {
        let agreed = &self.0.agreed;
        let fresh = || agreed.view().filter(|view| view.began.age() < age);
        if let Some(view) = fresh() {
            return Ok(view);
        }
        let _reading = agreed.reading.lock().await;
        match fresh() {
            Some(view) => Ok(view),
            None => self.look().await,
        }
    }

    /// What is condemned now.
    pub(super) async fn view_now(&self) -> Result<Arc<View>> {
        let _reading = self.0.agreed.reading.lock().await;
        self.look().await
    }

    async fn look(&self) -> Result<Arc<View>> {
        let began = Moment::now();
        let before = self.0.agreed.view();
        let known = before.iter().flat_map(|view| &view.records);
        let known: HashMap<PackName, Arc<[PackName]>> = known.map(|(name, packs)| (*name, packs.clone())).collect();
        let listed = self.0.bucket.list(CONDEMNED, None).await?;
        let names: Vec<PackName> =
            listed.into_iter().map(|(name, _)| self.record_name(CONDEMNED, &name)).collect::<Result<_>>()?;
        let (old, new): (Vec<PackName>, Vec<PackName>) = names.into_iter().partition(|name| known.contains_key(name));
        let mut records: BTreeMap<PackName, Arc<[PackName]>> =
            old.into_iter().filter_map(|name| Some((name, known.get(&name)?.clone()))).collect();
        let mut read = stream::iter(new.into_iter().map(|name| async move {
            let packs = self.read_record(CONDEMNED, name, decode_condemned).await?;
            Ok::<_, StoreError>(packs.map(|packs| (name, packs)))
        }))
        .buffered(READS);
        while let Some(record) = read.try_next().await? {
            records.extend(record.map(|(name, packs)| (name, packs.into())));
        }
        let packs = records.iter().flat_map(|(record, packs)| packs.iter().map(|pack| (*pack, *record))).collect();
        let view = Arc::new(View { began, records, packs });
        *self.0.agreed.view.write().unwrap_or_else(|e| e.into_inner()) = Some(view.clone());
        Ok(view)
    }

    /// What a record says; `None` when it has gone. One that cannot be read must not be taken for none.
    async fn read_record<T>(
        &self,
        folder: &str,
        name: PackName,
        decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    ) -> Result<Option<T>> {
        let key = format!("{folder}/{name}");
        let Some(text) = self.0.bucket.get_small(&key, MAX_RECORD_BYTES + 1).await? else { return Ok(None) };
        decode(&text)
            .map(Some)
            .map_err(|error| StoreError::Invalid(format!("{key} in {} cannot be read: {error}", self.0.bucket.name())))
    }

    async fn put_record(&self, folder: &str, record: &impl Serialize) -> Result<PackName> {
        let text = serde_json::to_vec(record).map_err(|e| StoreError::Invalid(e.to_string()))?;
        let name = self.0.writer.name();
        self.0.bucket.put(&format!("{folder}/{name}"), vec![Bytes::from(text)]).await?;
        Ok(name)
    }

    /// From now on these packs, up to [`RECORD_ENTRIES`], make nothing present.
    pub(super) async fn condemn(&self, packs: &[PackName]) -> Result<PackName> {
        let packs = packs.iter().map(ToString::to_string).collect();
        self.put_record(CONDEMNED, &CondemnedRecord { version: VERSION, packs }).await
    }

    /// Replaces a record by a new one.
    pub(super) async fn condemn_again(&self, record: PackName, packs: &[PackName]) -> Result<PackName> {
        let new = self.condemn(packs).await?;
        self.delete_condemned(record).await?;
        Ok(new)
    }

    pub(super) async fn delete_condemned(&self, record: PackName) -> Result<()> {
        self.0.bucket.delete(&format!("{CONDEMNED}/{record}")).await
    }

    /// Which of `blobs` nobody can count on, each once, in the order asked. On the others the asker can, and on all below them:
    /// they are leased.
    ///
    /// # Errors
    /// Those of the bucket and of the index.
    pub async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        for _ in 0..TRIES {
            let view = self.view(self.0.terms.view / 2).await?;
            if self.listed_all().is_none_or(|listed| listed.age() > LISTED) {
                self.rebuild().await?;
            }
            let (durable, asked, seen) = (self.clone(), blobs.to_vec(), view.clone());
            let (missing, stale) = blocking(move || durable.look_up(&asked, &seen)).await?;
            for blobs in stale.chunks(RECORD_ENTRIES) {
                self.grant(blobs).await?;
            }
            // Else a collection may have looked at the leases already.
            if view.began.age() < self.0.terms.view {
                return Ok(missing);
            }
        }
        Err(self.0.bucket.late("answer by", CONDEMNED))
    }

    /// What is missing, and what is not but needs a new lease.
    fn look_up(&self, blobs: &[Blob], view: &View) -> Result<(Vec<Blob>, Vec<Blob>)> {
        let index = &self.0.index;
        let lease = whole_millis(self.0.terms.lease);
        let (mut seen, mut missing) = (HashSet::new(), Vec::new());
        // What is present, and until when it is leased because it is new.
        let (mut present, mut ends) = (Vec::new(), Vec::new());
        for blob in blobs.iter().filter(|blob| !blob.is_empty()) {
            if !seen.insert(blob) {
                continue;
            }
            match index.places(blob)?.into_iter().rfind(|place| !view.is_condemned(place.pack)) {
                None => missing.push(*blob),
                Some(newest) => {
                    present.push(*blob);
                    ends.push(millis(newest.pack.time()).saturating_add(lease));
                }
            }
        }
        let good = now().saturating_add(lease / 2);
        let leases = index.leases(&present)?;
        let untils = leases.into_iter().zip(ends).map(|(granted, new)| granted.max(new));
        let stale = present.into_iter().zip(untils).filter(|(_, until)| *until < good).map(|(blob, _)| blob).collect();
        Ok((missing, stale))
    }

    async fn grant(&self, blobs: &[Blob]) -> Result<()> {
        let until = now().saturating_add(whole_millis(self.0.terms.lease));
        self.put_record(LEASES, &LeaseRecord { version: VERSION, until, blobs: blobs.to_vec() }).await?;
        let (index, blobs) = (self.0.index.clone(), blobs.to_vec());
        blocking(move || index.set_leases(&blobs, until)).await
    }

    /// The names of all records of leases.
    pub(super) async fn lease_records(&self) -> Result<Vec<PackName>> {
        let listed = self.0.bucket.list(LEASES, None).await?;
        listed.into_iter().map(|(name, _)| self.record_name(LEASES, &name)).collect()
    }

    /// What records of leases say that are still there.
    pub(super) async fn read_leases(&self, names: &[PackName]) -> Result<Vec<Leases>> {
        let records = stream::iter(names).map(|name| self.read_record(LEASES, *name, decode_leases)).buffered(READS);
        records.try_filter_map(|record| async { Ok(record) }).try_collect().await
    }

    /// Deletes records of leases that ended before.
    pub(super) async fn delete_leases(&self, before: u64) -> Result<()> {
        // A lease does not end before its record is written.
        let old = self.lease_records().await?.into_iter().filter(|name| millis(name.time()) < before);
        for name in old {
            let ended =
                self.read_record(LEASES, name, decode_leases).await?.is_some_and(|leases| leases.until < before);
            if ended {
                self.0.bucket.delete(&format!("{LEASES}/{name}")).await?;
            }
        }
        Ok(())
    }

    fn record_name(&self, folder: &str, name: &str) -> Result<PackName> {
        let bucket = self.0.bucket.name();
        name.parse().map_err(|_| {
            StoreError::Invalid(format!("{folder}/{name} in {bucket} has no name that this program gives"))
        })
    }
}

/// For errors and the log: when that was.
pub(super) fn time_of(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_other_versions_and_forms_are_refused() {
        let condemned = br#"{"version":1,"packs":["1700000000000-0123456789abcdef-00000001"]}"#;
        assert_eq!(decode_condemned(condemned).unwrap().len(), 1);
        let leases = br#"{"version":1,"until":5,"blobs":["af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262/0"]}"#;
        assert_eq!(decode_leases(leases), Ok(Leases { until: 5, blobs: vec![Blob::EMPTY] }));
        for (good, newer) in [
            (&condemned[..], decode_condemned as fn(&[u8]) -> _),
            (leases, |bytes| decode_leases(bytes).map(|_| Vec::new())),
        ] {
            let text = String::from_utf8(good.to_vec()).unwrap();
            assert_eq!(
                newer(text.replace("\"version\":1", "\"version\":2").as_bytes()),
                Err(FormatError::UnknownVersion(2))
            );
            for bad in [
                "",
                "{}",
                "[]",
                &text[..text.len() - 3],
                &text.replace("\"version\"", "\"more\":1,\"version\""),
                &text.replace("af13", "AF13").replace("17000", "x7000"),
            ] {
                assert!(matches!(newer(bad.as_bytes()), Err(FormatError::Malformed(_))), "{bad}");
            }
        }
    }
}
