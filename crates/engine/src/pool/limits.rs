//! What a session may take up, what it does take up, and how exact either is.
//!
//! A limit bounds what a session has *written*: bytes and inodes of its upper. Nothing of its base counts, nothing that a
//! fork inherited from its parent counts for the fork, and nothing counts that only snapshots, forks or the contents
//! made by a digest still keep after the session itself has let go of it.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The most that a session may take up. `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Bytes on disk, metadata of the file system included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Inodes: files, directories, symbolic links, fifos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inodes: Option<u64>,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The limit that a usage has reached: writers see EDQUOT where limits are enforced.
    pub fn reached(&self, usage: &Usage) -> Option<Reached> {
        // The kernel refuses the write that would pass the limit, and reserves generously before it writes.
        let bytes = self.bytes.is_some_and(|limit| usage.bytes.saturating_add(NEARLY.min(limit / 32)) > limit);
        let inodes = self.inodes.zip(usage.inodes).is_some_and(|(limit, used)| used >= limit);
        if inodes {
            Some(Reached::Inodes)
        } else if bytes {
            Some(Reached::Bytes)
        } else {
            None
        }
    }
}

/// How near to a limit of bytes is as good as there: a large write's worth.
const NEARLY: u64 = 1 << 20;

/// Which limit a session has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reached {
    /// The one of bytes.
    Bytes,
    /// The one of inodes.
    Inodes,
}

/// What a session takes up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Inodes, where they are counted: always on a directory pool; on btrfs for sessions that have a limit of them.
    pub inodes: Option<u64>,
}

/// Bytes on disk and number of inodes below a directory, by walking it. What vanishes meanwhile counts as nothing.
pub(crate) fn walk_usage(directory: &Path) -> Result<(u64, u64)> {
    let (mut bytes, mut inodes) = (0, 0);
    let mut linked = HashSet::new();
    for entry in walkdir::WalkDir::new(directory).min_depth(1).follow_links(false) {
        let metadata = match entry.and_then(|entry| entry.metadata()) {
            Ok(metadata) => metadata,
            Err(error) if error.io_error().is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound) => {
                continue;
            }
            Err(error) => return Err(Error::io("measure", directory, error)),
        };
        if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()) {
            continue;
        }
        bytes += metadata.blocks() * 512;
        inodes += 1;
    }
    Ok((bytes, inodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_stops_a_writer_is_named() {
        let limits = Limits { bytes: Some(50 << 20), inodes: Some(100) };
        let usage = |bytes, inodes| Usage { bytes, inodes: Some(inodes) };
        assert_eq!(limits.reached(&usage(40 << 20, 99)), None);
        assert_eq!(limits.reached(&usage((50 << 20) - 4096, 99)), Some(Reached::Bytes));
        assert_eq!(limits.reached(&usage(0, 100)), Some(Reached::Inodes));
        assert_eq!(Limits::default().reached(&usage(u64::MAX, u64::MAX)), None);
    }
}
