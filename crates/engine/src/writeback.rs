//! Bounds what a pool's file system may hold in memory that is not on disk yet.
//!
//! A snapshot writes a session's part of that back while its writers are held still, so the bound is a bound of the
//! freeze. Without it a writer may get ahead of the disk by a fifth of the machine's memory.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// What a pool may hold back: half a second of writing for a disk that takes a gigabyte a second, and enough for a
/// working copy to be unpacked at the speed of memory. The kernel keeps it as a share of what all disks may hold back
/// together, so it shows up rounded.
const MOST_BYTES: u64 = 512 << 20;

/// Bounds the btrfs on the block device `device`, which must be mounted.
///
/// # Errors
/// `Unsupported` before Linux 6.2, and where `/sys` is read-only.
pub(crate) fn bound(device: &Path) -> Result<()> {
    let device = fs::canonicalize(device).at("resolve", device)?;
    let information = backing(&device, Path::new("/sys/fs/btrfs"))?;
    // Otherwise the bound holds only while the whole machine has much to write.
    for (file, value) in [("strict_limit", 1), ("max_bytes", MOST_BYTES)] {
        let path = information.join(file);
        fs::write(&path, value.to_string()).map_err(|error| Error::Unsupported {
            what: format!("bounding what {} holds back from disk", device.display()),
            remedy: format!(
                "{} cannot be written ({error}); freezes may be long beside a heavy writer",
                path.display()
            ),
        })?;
    }
    Ok(())
}

/// The kernel's name for whatever writes back for the btrfs on a device.
fn backing(device: &Path, mounted: &Path) -> Result<PathBuf> {
    let name = device.file_name().unwrap_or_default();
    for entry in fs::read_dir(mounted).at("list", mounted)?.flatten() {
        if entry.path().join("devices").join(name).exists() {
            return Ok(entry.path().join("bdi"));
        }
    }
    Err(Error::NotFound { kind: "mounted btrfs on", name: device.display().to_string() })
}
