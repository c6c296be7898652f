//! The log in a store: what is appended is there, once, in segments; what is done to it is found.

use std::sync::Mutex;

use aether_audit::{Anchor, Entry, Error, Head, Log, Object, Verb};
use aether_cas::tree::{Directory, Node};
use aether_cas::{Blob, MemoryStore, Store};

/// A pin in memory, which may refuse.
#[derive(Default)]
struct Pin {
    root: Mutex<Option<Blob>>,
    refuses: Mutex<bool>,
}

#[async_trait::async_trait]
impl Anchor for Pin {
    async fn newest(&self) -> Result<Option<Blob>, String> {
        Ok(*self.root.lock().unwrap())
    }

    async fn hold(&self, root: Blob) -> Result<(), String> {
        if *self.refuses.lock().unwrap() {
            return Err("the store does not answer".into());
        }
        *self.root.lock().unwrap() = Some(root);
        Ok(())
    }
}

fn entry(number: usize, filling: usize) -> Entry {
    let object = Object {
        kind: "AetherApproval".into(),
        namespace: "demo".into(),
        name: "x".repeat(filling),
        uid: number.to_string(),
    };
    let time = jiff::Timestamp::UNIX_EPOCH;
    Entry { time, actor: "ada".into(), verb: Verb::Approved, object, root: Some("r/1".into()) }
}

async fn read(log: &Log<'_>, heads: &[Head]) -> Result<(Head, Vec<Entry>), Error> {
    let mut entries = Vec::new();
    let head = log.verify(heads.iter().copied(), |entry| entries.push(entry)).await?;
    Ok((head, entries))
}

async fn segments(store: &MemoryStore, pin: &Pin) -> Directory {
    let root = pin.newest().await.unwrap().unwrap();
    Directory::decode(&store.read(root).await.unwrap()).unwrap()
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
        heads.push(log.append(some).await.unwrap());
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
    let head = log.append(&[entry(1, 1), entry(2, 1)]).await.unwrap();
    let later = Entry { time: "2026-01-01T00:00:00Z".parse().unwrap(), ..entry(2, 1) };
    assert_eq!(log.append(&[later.clone(), later]).await.unwrap(), head);
    let withdrawn = Entry { verb: Verb::Withdrawn, ..entry(2, 1) };
    assert_eq!(log.append(&[withdrawn]).await.unwrap().count, 3);
}

#[tokio::test]
async fn a_root_that_cannot_be_held_leaves_the_log_as_it_was() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let head = log.append(&[entry(1, 1)]).await.unwrap();
    *pin.refuses.lock().unwrap() = true;
    assert!(matches!(log.append(&[entry(2, 1)]).await, Err(Error::Anchor(_))));
    assert_eq!(read(&log, &[head]).await.unwrap().0, head);
    *pin.refuses.lock().unwrap() = false;
    assert_eq!(log.append(&[entry(2, 1)]).await.unwrap().count, 2);
}

#[tokio::test]
async fn a_log_that_somebody_has_changed_is_no_log() {
    let (store, pin) = (MemoryStore::new(), Pin::default());
    let log = Log { store: &store, anchor: &pin };
    let entries: Vec<Entry> = (0..45).map(|number| entry(number, 20_000)).collect();
    log.append(&entries[..1]).await.unwrap();
    let early = pin.newest().await.unwrap().unwrap();
    let head = log.append(&entries[1..]).await.unwrap();
    let whole = segments(&store, &pin).await;

    // An older root: the end is missing.
    *pin.root.lock().unwrap() = Some(early);
    assert!(matches!(read(&log, &[head]).await, Err(Error::Broken(_))));
    // A segment in the middle is missing, or is called by another's name.
    let mut gap = whole.clone();
    let second = gap.entries.keys().nth(1).unwrap().clone();
    let node = gap.entries.remove(&second).unwrap();
    *pin.root.lock().unwrap() = Some(store.put_directory(&gap));
    assert!(matches!(read(&log, &[]).await, Err(Error::Foreign(_))));
    let mut twice = whole.clone();
    let third = twice.entries.keys().nth(2).unwrap().clone();
    twice.entries.insert(third, node);
    *pin.root.lock().unwrap() = Some(store.put_directory(&twice));
    assert!(matches!(read(&log, &[]).await, Err(Error::Broken(_))));
    // A line of the newest segment was changed: nothing is written behind it.
    let mut forged = whole.clone();
    let (name, node) = forged.entries.pop_last().unwrap();
    let text = store.read(node.content().unwrap()).await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap().replacen("ada", "eve", 1);
    let attributes = node.attributes().unwrap().clone();
    forged.entries.insert(name, Node::File { content: store.put(text), attributes, link_group: None });
    *pin.root.lock().unwrap() = Some(store.put_directory(&forged));
    assert!(matches!(read(&log, &[head]).await, Err(Error::Broken(_))));
    assert!(matches!(log.append(&[entry(99, 1)]).await, Err(Error::Broken(_))));

    *pin.root.lock().unwrap() = Some(store.put_directory(&whole));
    assert_eq!(read(&log, &[head]).await.unwrap().0, head);
}
