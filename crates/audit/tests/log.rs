//! The log in a store: what is appended is there, once, in segments; what is done to it is found.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aether_audit::{Anchor, Entry, Error, Head, Held, Log, Memory, Object, Refusal, Verb};
use aether_cas::tree::{Directory, Node};
use aether_cas::{Blob, MemoryStore, Store, StoreError};
use bytes::Bytes;
use jiff::Timestamp;
use proptest::prelude::*;

/// An anchor in memory, which may refuse, and lets others run between any two steps.
struct Pin {
    held: Mutex<Held>,
    refuses: Mutex<bool>,
}

impl Default for Pin {
    fn default() -> Self {
        Self { held: Mutex::new(Held::NOTHING), refuses: Mutex::default() }
    }
}

impl Pin {
    fn root(&self) -> Blob {
        self.held.lock().unwrap().root.unwrap()
    }

    fn set_root(&self, root: Blob) {
        self.held.lock().unwrap().root = Some(root);
    }
}

#[async_trait::async_trait]
impl Anchor for Pin {
    async fn newest(&self) -> Result<Held, String> {
        tokio::task::yield_now().await;
        Ok(self.held.lock().unwrap().clone())
    }

    async fn hold(&self, before: &Held, head: Head, root: Blob) -> Result<(), Refusal> {
        tokio::task::yield_now().await;
        if *self.refuses.lock().unwrap() {
            return Err(Refusal::Failed("the cluster does not answer".into()));
        }
        let mut held = self.held.lock().unwrap();
        if held.version != before.version {
            return Err(Refusal::Conflict);
        }
        let version = held.version.as_ref().map_or(1, |version| version.parse::<u64>().unwrap() + 1);
        *held = Held { head, root: Some(root), version: Some(version.to_string()) };
        Ok(())
    }
}

const THEN: Timestamp = Timestamp::UNIX_EPOCH;

fn entry(number: usize, filling: usize) -> Entry {
    let object = Object {
        kind: "AetherApproval".into(),
        namespace: "demo".into(),
        name: "x".repeat(filling),
        uid: number.to_string(),
    };
    Entry { time: THEN, actor: "ada".into(), verb: Verb::Approved, object, root: Some("r/1".into()), occasion: 0 }
}

async fn read(log: &Log<'_>, heads: &[Head]) -> Result<(Head, Vec<Entry>), Error> {
    let mut entries = Vec::new();
    let head = log.verify(heads.iter().copied(), |entry| entries.push(entry)).await?;
    Ok((head, entries))
}

async fn segments(store: &MemoryStore, pin: &Pin) -> Directory {
    Directory::decode(&store.read(pin.root()).await.unwrap()).unwrap()
}

#[tokio::test]
async fn what_is_appended_is_there_in_order_and_full_segments_stay_as_they_are() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    assert_eq!(read(&log, &[]).await.unwrap(), (Head::EMPTY, vec![]));
    let entries: Vec<Entry> = (0..60).map(|number| entry(number, 20_000)).collect();
    let mut heads = Vec::new();
    let mut first = None;
    for some in entries.chunks(7) {
        heads.push(log.append(some, THEN, &Memory::default()).await.unwrap());
        let tree = segments(&store, &pin).await;
        if tree.entries.len() > 1 {
            let node = tree.entries.values().next().unwrap().clone();
            assert_eq!(first.get_or_insert(node.clone()), &node);
        }
    }
    let (head, all) = read(&log, &heads).await.unwrap();
    assert_eq!((head, all), (*heads.last().unwrap(), entries));
    let tree = segments(&store, &pin).await;
    let names: Vec<String> = tree.entries.keys().map(ToString::to_string).collect();
    assert_eq!(names[..2], ["0000000001.jsonl", "0000000002.jsonl"]);
    assert!((4..=6).contains(&names.len()), "{names:?}");
}

#[tokio::test]
async fn what_was_written_by_a_killed_writer_is_not_written_again() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let head = log.append(&[entry(1, 1), entry(2, 1)], THEN, &Memory::default()).await.unwrap();
    let later = Entry { time: "2026-01-01T00:00:00Z".parse().unwrap(), ..entry(2, 1) };
    assert_eq!(log.append(&[later.clone(), later], THEN, &Memory::default()).await.unwrap(), head);
    let withdrawn = Entry { verb: Verb::Withdrawn, ..entry(2, 1) };
    assert_eq!(log.append(&[withdrawn], THEN, &Memory::default()).await.unwrap().count, 3);
    // The same again on another occasion is another thing.
    let again = Entry { occasion: 1, ..entry(2, 1) };
    assert_eq!(log.append(&[again], THEN, &Memory::default()).await.unwrap().count, 4);
}

#[tokio::test]
async fn what_no_line_can_hold_is_refused_and_the_log_goes_on() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let refused = log.append(&[entry(1, 1), entry(2, 70_000)], THEN, &Memory::default()).await.unwrap_err();
    assert!(matches!(&refused, Error::TooLong(why) if why.bytes > 70_000), "{refused}");
    assert_eq!(log.append(&[entry(1, 1)], THEN, &Memory::default()).await.unwrap().count, 1);
}

#[tokio::test]
async fn a_root_that_cannot_be_held_leaves_the_log_as_it_was() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let head = log.append(&[entry(1, 1)], THEN, &Memory::default()).await.unwrap();
    *pin.refuses.lock().unwrap() = true;
    assert!(matches!(log.append(&[entry(2, 1)], THEN, &Memory::default()).await, Err(Error::Anchor(_))));
    assert_eq!(read(&log, &[head]).await.unwrap().0, head);
    *pin.refuses.lock().unwrap() = false;
    assert_eq!(log.append(&[entry(2, 1)], THEN, &Memory::default()).await.unwrap().count, 2);
}

#[tokio::test]
async fn a_log_that_somebody_has_changed_is_no_log() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let entries: Vec<Entry> = (0..45).map(|number| entry(number, 20_000)).collect();
    log.append(&entries[..1], THEN, &Memory::default()).await.unwrap();
    let early = pin.held.lock().unwrap().clone();
    let head = log.append(&entries[1..], THEN, &Memory::default()).await.unwrap();
    let whole = segments(&store, &pin).await;

    // An older tree: the end is missing, and nothing is written where it was.
    let late = pin.held.lock().unwrap().clone();
    pin.set_root(early.root.unwrap());
    let found = read(&log, &[]).await.unwrap_err().to_string();
    assert!(found.contains("line 2: it is missing"), "{found}");
    assert!(matches!(log.append(&[entry(99, 1)], THEN, &Memory::default()).await, Err(Error::Broken(_))));
    // The anchor was put back as a whole: only a head that was written down elsewhere tells.
    *pin.held.lock().unwrap() = early.clone();
    assert_eq!(read(&log, &[]).await.unwrap().0, early.head);
    assert!(matches!(read(&log, &[head]).await, Err(Error::Broken(_))));
    // Only the end in the anchor was put back, or is another.
    *pin.held.lock().unwrap() = Held { head: early.head, ..late.clone() };
    let found = read(&log, &[]).await.unwrap_err().to_string();
    assert!(found.contains("line 2: it is behind the end"), "{found}");
    *pin.held.lock().unwrap() = Held { head: Head { hash: early.head.hash, ..head }, ..late.clone() };
    assert!(matches!(read(&log, &[]).await, Err(Error::Broken(_))));
    assert!(matches!(log.append(&[entry(99, 1)], THEN, &Memory::default()).await, Err(Error::Broken(_))));
    *pin.held.lock().unwrap() = late;
    // A segment in the middle is missing, or is called by another's name.
    let mut gap = whole.clone();
    let second = gap.entries.keys().nth(1).unwrap().clone();
    let node = gap.entries.remove(&second).unwrap();
    pin.set_root(store.put_directory(&gap));
    assert!(matches!(read(&log, &[]).await, Err(Error::Foreign(_))));
    let mut twice = whole.clone();
    let third = twice.entries.keys().nth(2).unwrap().clone();
    twice.entries.insert(third, node);
    pin.set_root(store.put_directory(&twice));
    assert!(matches!(read(&log, &[]).await, Err(Error::Broken(_))));
    // A line of the newest segment was changed: nothing is written behind it.
    let mut forged = whole.clone();
    let (name, node) = forged.entries.pop_last().unwrap();
    let text = store.read(node.content().unwrap()).await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap().replacen("ada", "eve", 1);
    let attributes = node.attributes().unwrap().clone();
    forged.entries.insert(name, Node::File { content: store.put(text), attributes, link_group: None });
    pin.set_root(store.put_directory(&forged));
    assert!(matches!(read(&log, &[head]).await, Err(Error::Broken(_))));
    assert!(matches!(log.append(&[entry(99, 1)], THEN, &Memory::default()).await, Err(Error::Broken(_))));

    pin.set_root(store.put_directory(&whole));
    assert_eq!(read(&log, &[head]).await.unwrap().0, head);
}

#[tokio::test]
async fn writers_at_one_time_lose_no_line() {
    let (store, pin) = (Arc::new(MemoryStore::new()), Arc::new(Pin::default()));
    let writers = (0..5usize).map(|writer| {
        let (store, pin) = (store.clone(), pin.clone());
        tokio::spawn(async move {
            let log = Log { store: store.as_ref(), anchor: pin.as_ref() };
            for number in 0..12 {
                // What two of them see, both write down.
                let shared = entry(1000 + number, 3000);
                log.append(&[entry(writer * 100 + number, 3000), shared], THEN, &Memory::default()).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let log = Log { store: store.as_ref(), anchor: pin.as_ref() };
    let (head, all) = read(&log, &[]).await.unwrap();
    assert_eq!(head.count, 5 * 12 + 12, "each once");
    for uid in (0..5).flat_map(|writer| (0..12).map(move |number| writer * 100 + number)).chain(1000..1012) {
        let times = all.iter().filter(|entry| entry.object.uid == uid.to_string()).count();
        assert_eq!(times, 1, "{uid}");
    }
}

#[tokio::test]
async fn a_line_is_found_again_in_segments_that_are_full() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let at = |second: i64, number| Entry { time: Timestamp::from_second(second).unwrap(), ..entry(number, 20_000) };
    for number in 0..60 {
        log.append(&[at(number as i64, number)], THEN, &Memory::default()).await.unwrap();
    }
    assert!(segments(&store, &pin).await.entries.len() > 3);
    let since = Timestamp::from_second(2).unwrap();
    let later = |number| Entry { time: Timestamp::from_second(99).unwrap(), ..at(0, number) };
    assert_eq!(log.append(&[later(2), later(30), later(59)], since, &Memory::default()).await.unwrap().count, 60);
    assert_eq!(log.append(&[later(2), later(60)], since, &Memory::default()).await.unwrap().count, 61);
    for second in [0, 1, 20, 40, 59, 99, 500] {
        let since = Timestamp::from_second(second).unwrap();
        let mut seen = Vec::new();
        log.since(since, |entry| seen.push(entry)).await.unwrap();
        let (_, all) = read(&log, &[]).await.unwrap();
        assert!(
            all.ends_with(&seen) && all.iter().filter(|entry| entry.time >= since).all(|entry| seen.contains(entry))
        );
        assert!(second < 20 || seen.len() < all.len(), "all of it is read for what is new");
    }
}

/// A store that fails from the nth write on: what was written before stays.
struct Dying {
    store: &'static MemoryStore,
    left: AtomicUsize,
    reads: AtomicUsize,
}

impl Dying {
    fn after(store: &'static MemoryStore, left: usize) -> Self {
        Self { store, left: AtomicUsize::new(left), reads: AtomicUsize::default() }
    }
}

#[async_trait::async_trait]
impl Store for Dying {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>, StoreError> {
        self.store.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes, StoreError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.store.read(blob).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>, StoreError> {
        self.store.read_batch(blobs).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.store.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<(), StoreError> {
        let lives = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if lives { self.store.write_batch(blobs).await } else { Err(StoreError::Closed("memory".into())) }
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.store.write_file(blob, path).await
    }
}

#[tokio::test]
async fn a_line_costs_as_much_in_a_long_log_as_in_a_short_one() {
    let store: &'static MemoryStore = Box::leak(Box::new(MemoryStore::new()));
    let (pin, memory) = (Pin::default(), Memory::default());
    let counting = Dying::after(store, usize::MAX);
    let log = Log { store: &counting, anchor: &pin };
    let reads = || counting.reads.swap(0, Ordering::SeqCst);
    let mut number = 0;
    for segments_then in [3, 9] {
        while pin.newest().await.unwrap().root.is_none() || segments(store, &pin).await.entries.len() < segments_then {
            log.append(&[entry(number, 20_000)], THEN, &memory).await.unwrap();
            number += 1;
        }
        reads();
        let before = log.append(&[entry(0, 20_000), entry(number - 1, 20_000)], THEN, &memory).await.unwrap();
        assert_eq!(before.count as usize, number, "they are there");
        log.append(&[entry(number, 1)], THEN, &memory).await.unwrap();
        number += 1;
        assert!(reads() <= 2 * 2 + 1, "the tree and the newest segment each time, and what has just become full once");
        // Who has not been there yet reads all of it, once, also when what they have to say is not written then.
        let newcomer = Memory::default();
        log.append(&[entry(number, 70_000)], THEN, &newcomer).await.unwrap_err();
        assert_eq!(reads(), segments_then + 1);
        let mut told = Vec::new();
        log.decisions(THEN, &newcomer, |entry| told.push(entry.object.uid.clone())).await.unwrap();
        assert_eq!(reads(), 2);
        assert_eq!(told, (0..number).map(|number| number.to_string()).collect::<Vec<_>>());
        log.append(&[entry(number, 1)], THEN, &newcomer).await.unwrap();
        number += 1;
        assert_eq!(reads(), 2);
    }
}

/// An anchor whose answer is lost, if it is moved at all.
struct Mute<'a>(&'a Pin, bool);

#[async_trait::async_trait]
impl Anchor for Mute<'_> {
    async fn newest(&self) -> Result<Held, String> {
        self.0.newest().await
    }

    async fn hold(&self, before: &Held, head: Head, root: Blob) -> Result<(), Refusal> {
        if self.1 {
            self.0.hold(before, head, root).await?;
        }
        Err(Refusal::Failed("no answer".into()))
    }
}

fn some_entry() -> impl Strategy<Value = Entry> {
    (0..4usize, 0..3u64, 0..3usize, 0..3i64).prop_map(|(number, occasion, verb, second)| Entry {
        occasion,
        verb: [Verb::Noted, Verb::Resolved, Verb::Reopened][verb],
        time: Timestamp::from_second(second).unwrap(),
        ..entry(number, 60_000)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Writers that die after any step, with or without having moved the anchor, and come again with what they had to say.
    #[test]
    fn whatever_is_killed_each_thing_is_told_once_and_in_order(
        work in prop::collection::vec((prop::collection::vec(some_entry(), 1..4), 0..5usize), 1..14),
    ) {
        let store: &'static MemoryStore = Box::leak(Box::new(MemoryStore::new()));
        let pin = Pin::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut model: Vec<Entry> = Vec::new();
            for (entries, death) in work {
                match death {
                    3 | 4 => {
                        let anchor = Mute(&pin, death == 4);
                        let before = pin.newest().await.unwrap();
                        let attempt = Log { store, anchor: &anchor }.append(&entries, THEN, &Memory::default()).await;
                        let fresh = entries.iter().any(|entry| !model.iter().any(|other| other.repeats(entry)));
                        prop_assert_eq!(attempt.is_err(), fresh);
                        prop_assert_eq!(before == pin.newest().await.unwrap(), !fresh || death == 3);
                    }
                    left => {
                        let dying = Dying::after(store, left);
                        let _ = Log { store: &dying, anchor: &pin }.append(&entries, THEN, &Memory::default()).await;
                    }
                }
                let log = Log { store, anchor: &pin };
                let head = log.append(&entries, THEN, &Memory::default()).await.unwrap();
                for entry in entries {
                    if !model.iter().any(|other| other.repeats(&entry)) {
                        model.push(entry);
                    }
                }
                prop_assert_eq!(read(&log, &[head]).await.unwrap(), (head, model.clone()));
            }
            Ok(())
        })?;
    }
}
