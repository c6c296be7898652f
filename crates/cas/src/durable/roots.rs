//! Pins in the bucket, so that they survive the loss of all disks.
//!
//! A pin is one small record under a name that nobody else gives; records are never changed. Pinning again writes
//! a new record and then deletes the older ones, so whatever breaks off when, the newest counts. A node keeps
//! the texts of records it has read, and asks the bucket each time which there are.

use std::{
    collections::{BTreeMap, HashSet},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use super::{Durable, format::FormatError, name::PackName};
use crate::{Blob, StoreError, local::Root, store::Result};

const FOLDER: &str = "roots";
const VERSION: u32 = 1;
/// The longest record.
pub const MAX_RECORD_BYTES: u64 = 64 << 10;
/// Records that are read at one time.
const READS: usize = 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    owner_uid: String,
    kind: String,
    name: String,
    tree: Blob,
    pinned_at: i64,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The pin that a record in the bucket holds.
///
/// # Errors
/// [`FormatError`] for anything that this version does not write.
pub fn decode_record(bytes: &[u8]) -> Result<Root, FormatError> {
    const NOT_ONE: FormatError = FormatError::Malformed("it is not the record of a pin");
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(NOT_ONE);
    }
    let Version { version } = serde_json::from_slice(bytes).map_err(|_| NOT_ONE)?;
    if version != VERSION {
        return Err(FormatError::UnknownVersion(version));
    }
    let record: Record = serde_json::from_slice(bytes).map_err(|_| NOT_ONE)?;
    check(&record.owner_uid, &record.kind, &record.name).map_err(|_| NOT_ONE)?;
    Ok(Root {
        owner_uid: record.owner_uid,
        kind: record.kind,
        name: record.name,
        tree: record.tree,
        pinned_at: record.pinned_at,
    })
}

fn check(owner_uid: &str, kind: &str, name: &str) -> Result<()> {
    for (what, text, may_be_empty) in [("owner UID", owner_uid, false), ("kind", kind, false), ("name", name, true)] {
        if text.contains('\0') || text.len() > 4096 || (text.is_empty() && !may_be_empty) {
            return Err(StoreError::Invalid(format!("a root needs an {what} without NUL bytes, not {text:?}")));
        }
    }
    Ok(())
}

/// The folder of one pin's records.
fn folder(owner_uid: &str, kind: &str, name: &str) -> String {
    hex::encode(&blake3::hash(format!("{owner_uid}\0{kind}\0{name}").as_bytes()).as_bytes()[..16])
}

impl Durable {
    /// Pins `tree`; replaces what the same owner, kind and name had pinned. The caller knows that the tree is there.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for an empty owner or kind, a text with a NUL or one that is too long, and those of the bucket.
    pub async fn pin(&self, owner_uid: &str, kind: &str, name: &str, tree: Blob) -> Result<()> {
        check(owner_uid, kind, name)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.put_root(&Root {
            owner_uid: owner_uid.to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
            tree,
            pinned_at: i64::try_from(now).unwrap_or(i64::MAX),
        })
        .await
    }

    /// Writes the record of a pin, as it is.
    ///
    /// # Errors
    /// Those of the bucket.
    pub async fn put_root(&self, root: &Root) -> Result<()> {
        let folder = folder(&root.owner_uid, &root.kind, &root.name);
        let older = self.0.bucket.list(&format!("{FOLDER}/{folder}"), None).await?;
        let record = Record {
            version: VERSION,
            owner_uid: root.owner_uid.clone(),
            kind: root.kind.clone(),
            name: root.name.clone(),
            tree: root.tree,
            pinned_at: root.pinned_at,
        };
        let text = serde_json::to_vec(&record).map_err(|e| StoreError::Invalid(e.to_string()))?;
        let mut new = self.0.writer.name();
        // A clock that was set back, or another node's that is ahead, must not make this the older one.
        if let Some(newest) = older.iter().filter_map(|(name, _)| name.parse::<PackName>().ok()).max() {
            new = new.max(newest.next(&new));
        }
        self.0.bucket.put(&format!("{FOLDER}/{folder}/{new}"), vec![Bytes::from(text)]).await?;
        for (record, _) in older {
            self.0.bucket.delete(&format!("{FOLDER}/{folder}/{record}")).await?;
        }
        Ok(())
    }

    /// Forgets the roots of an owner for which `kind` and `name`, where given, agree. Returns how many there were.
    ///
    /// # Errors
    /// Those of the bucket.
    pub async fn unpin(&self, owner_uid: &str, kind: Option<&str>, name: Option<&str>) -> Result<usize> {
        let mut removed = HashSet::new();
        for (record, root) in self.records().await? {
            if root.owner_uid == owner_uid
                && kind.is_none_or(|kind| kind == root.kind)
                && name.is_none_or(|name| name == root.name)
            {
                self.0.bucket.delete(&format!("{FOLDER}/{record}")).await?;
                removed.insert((root.kind, root.name));
            }
        }
        Ok(removed.len())
    }

    /// The roots of an owner and kind, where given, in order of owner, kind and name: those that the bucket has now.
    ///
    /// # Errors
    /// Those of the bucket; [`StoreError::Invalid`] for a record that cannot be read, because whoever collects must
    /// not take it for none.
    pub async fn roots(&self, owner_uid: Option<&str>, kind: Option<&str>) -> Result<Vec<Root>> {
        // Records come in the order of their names, so that of several for one pin the newest is the last.
        let mut roots = BTreeMap::new();
        for (_, root) in self.records().await? {
            if owner_uid.is_none_or(|uid| uid == root.owner_uid) && kind.is_none_or(|kind| kind == root.kind) {
                roots.insert((root.owner_uid.clone(), root.kind.clone(), root.name.clone()), root);
            }
        }
        Ok(roots.into_values().collect())
    }

    async fn records(&self) -> Result<Vec<(String, Root)>> {
        let listed = self.0.bucket.list(FOLDER, None).await?;
        let names: HashSet<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
        self.0.index.keep_roots(&names)?;
        let records: Vec<Option<(String, Root)>> = stream::iter(listed)
            .map(|(name, _)| async move { self.record(&name).await })
            .buffered(READS)
            .try_collect()
            .await?;
        Ok(records.into_iter().flatten().collect())
    }

    /// One record; `None` when it has gone since it was listed.
    async fn record(&self, name: &str) -> Result<Option<(String, Root)>> {
        let known = self.0.index.root(name)?;
        let key = format!("{FOLDER}/{name}");
        let text = match &known {
            Some(text) => Bytes::copy_from_slice(text),
            None => match self.0.bucket.get_small(&key, MAX_RECORD_BYTES + 1).await? {
                Some(text) => text,
                None => return Ok(None),
            },
        };
        let root = decode_record(&text).map_err(|error| {
            StoreError::Invalid(format!("{key} in {} cannot be read: {error}", self.0.bucket.name()))
        })?;
        if known.is_none() {
            self.0.index.put_root(name, &text)?;
        }
        Ok(Some((name.to_owned(), root)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_other_versions_and_forms_are_refused() {
        let good = br#"{"version":1,"owner_uid":"u","kind":"k","name":"","tree":"af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262/0","pinned_at":5}"#;
        assert_eq!(decode_record(good).unwrap().tree, Blob::EMPTY);
        let text = String::from_utf8(good.to_vec()).unwrap();
        let newer = text.replace("\"version\":1", "\"version\":2");
        assert_eq!(decode_record(newer.as_bytes()), Err(FormatError::UnknownVersion(2)));
        for bad in [
            "",
            "{}",
            "[]",
            &text[..80],
            &text.replace("\"u\"", "\"\""),
            &text.replace("\"k\"", "\"\\u0000\""),
            &text.replace("\"pinned_at\"", "\"more\":1,\"pinned_at\""),
            &text.replace("af13", "AF13"),
        ] {
            assert!(matches!(decode_record(bad.as_bytes()), Err(FormatError::Malformed(_))), "{bad}");
        }
    }
}
