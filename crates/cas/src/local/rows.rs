//! The decoders of the index's rows, for fuzzing.

use super::{aliases, index::Entry, roots, tenure};

/// Reads `row` as every kind of row.
///
/// # Panics
/// When a decoder breaks a promise: what it reads, written again, reads the same.
pub fn decode(row: &[u8]) {
    if let Some(entry) = Entry::decode(row) {
        assert_eq!(Entry::decode(&entry.encode()), Some(entry));
    }
    if let Some(blob) = aliases::decode(row) {
        assert_eq!(aliases::encode(&blob), row);
    }
    if let Some((until, size)) = tenure::decode_lease(row) {
        assert_eq!(tenure::encode_lease(until, size), row);
    }
    let (key, value) = row.split_at(row.len() / 2);
    if let Some(root) = roots::parse(key, value) {
        let written = roots::key(&root.owner_uid, &root.kind, &root.name);
        assert!(written.is_err() || written.is_ok_and(|written| written == key));
    }
}
