//! Limits on btrfs, by its simple quotas (Linux 6.7): every extent is charged to the subvolume that wrote it, for as long
//! as anything refers to it.
//!
//! So a session is also charged for what it has overwritten or deleted while a snapshot, a fork, or a content that was
//! cloned out of it by a digest still refers to it. That is given back by raising the kernel's bound over the user's limit by just that
//! much. What would be *pinned* that way if the session overwrote it now is given in advance, so that no writer is ever
//! refused for what others keep; [`Quotas::keep`] takes back what was not needed. Without snapshots the kernel's bound is
//! the limit itself, to the byte; with them a session can pass its limit by what was pinned, until the next `keep`.
//!
//! The alternative, digesting by copy, was measured: 200 MB take 1.6 s instead of 0.02 s and twice the space, and forks
//! would pin extents all the same.
//!
//! btrfs has no limit of inodes. They are counted by [`Quotas::keep`]; while there are too many, nothing may be written at
//! all, which refuses new inodes too; removing what is only in the session lowers the count and lifts that.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::limits::{Limits, Usage};
use crate::error::{Context, Error, Result};
use crate::sys::{self, Key};

// Trees and kinds of items (include/uapi/linux/btrfs_tree.h).
const ROOT_TREE: u64 = 1;
const EXTENT_TREE: u64 = 2;
const OWN_TREE: u64 = 0;
const INODE_ITEM: u8 = 1;
const EXTENT_DATA: u8 = 108;
const ROOT_ITEM: u8 = 132;
const EXTENT_ITEM: u8 = 168;
const EXTENT_OWNER_REF: u8 = 172;
/// The subvolume's root, `upper` and `work`.
const FIXED_INODES: u64 = 3;
/// A bound under which nothing new is written at all.
const CLOSED: u64 = 1;
/// An item takes this much of a leaf beside its data (`struct btrfs_item`).
const ITEM_HEAD: u64 = 25;

/// The simple quotas of one btrfs.
#[derive(Debug)]
pub(super) struct Quotas {
    root: PathBuf,
    /// `/sys/fs/btrfs/<uuid>/qgroups`.
    groups: PathBuf,
    /// By session directory.
    counted: Mutex<HashMap<String, Counted>>,
}

/// What a session was found to hold when `charged` was what it was charged for.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    /// For which limits the bound was set; `None` when it must be set anew.
    limits: Option<Limits>,
    charged: u64,
    inodes: u64,
    /// Charged, but only kept by others.
    garbage: u64,
}

impl Counted {
    fn usage(&self) -> Usage {
        let counts = self.limits.is_some_and(|limits| limits.inodes.is_some());
        Usage { bytes: self.charged.saturating_sub(self.garbage), inodes: counts.then_some(self.inodes) }
    }
}

/// What a scan of a subvolume finds.
#[derive(Default)]
struct Scan {
    inodes: u64,
    item_bytes: u64,
    /// Address of each extent, to its length and the transaction that wrote it.
    extents: HashMap<u64, (u64, u64)>,
}

impl Quotas {
    /// Switches simple quotas on, unless they are, and finds where the kernel shows them.
    pub(super) fn enable(root: &Path) -> Result<Self> {
        let directory = File::open(root).at("open", root)?;
        let uuid = sys::btrfs_uuid(directory.as_fd()).at("ask for the identifier of", root)?;
        let groups = Path::new("/sys/fs/btrfs").join(uuid.to_string()).join("qgroups");
        let mode = || fs::read_to_string(groups.join("mode")).unwrap_or_default();
        match mode().trim() {
            "squota" => {}
            "qgroup" => {
                return Err(Error::Unsupported {
                    what: "limits by simple quotas".into(),
                    remedy: format!("{} has full quotas on; `btrfs quota disable` it", root.display()),
                });
            }
            _ => {
                sys::quota_enable_simple(directory.as_fd()).at("enable simple quotas (Linux 6.7) on", root)?;
                if mode().trim() != "squota" {
                    return Err(Error::Unsupported {
                        what: "limits by simple quotas".into(),
                        remedy: format!("{} does not show them; mount /sys", groups.display()),
                    });
                }
            }
        }
        Ok(Self { root: root.to_owned(), groups, counted: Mutex::default() })
    }

    /// What a session takes up. Two small files of sysfs, however much it holds.
    pub(super) fn usage(&self, name: &str, path: &Path) -> Result<Usage> {
        let directory = File::open(path).at("open", path)?;
        let charged = self.charged(id(directory.as_fd(), path)?)?;
        let counted = self.counted().get(name).copied().unwrap_or_default();
        Ok(Counted { charged, ..counted }.usage())
    }

    /// Gives room for what a snapshot that is about to be taken will pin: everything that the session holds.
    pub(super) fn before_snapshot(&self, name: &str, path: &Path, limits: Limits) -> Result<()> {
        let Some(limit) = limits.bytes else { return Ok(()) };
        let directory = File::open(path).at("open", path)?;
        let id = id(directory.as_fd(), path)?;
        let bound = limit.saturating_add(self.charged(id)?);
        if let Some(counted) = self.counted().get_mut(name) {
            counted.limits = None;
        }
        if self.bound(id)?.is_some_and(|now| now < bound) { self.set(id, Some(bound)) } else { Ok(()) }
    }

    /// Brings the kernel's bound in line with what is charged to the session and with what of that is its own. Reads
    /// the session's part of the file system's trees only where that matters: when it was ever snapshotted and is
    /// charged for more than its limit, or when its inodes are limited and what it is charged for changed.
    pub(super) fn keep(&self, name: &str, path: &Path, limits: Limits) -> Result<Usage> {
        let directory = File::open(path).at("open", path)?;
        let id = id(directory.as_fd(), path)?;
        let charged = self.charged(id)?;
        let known = self.counted().get(name).copied();
        if let Some(known) = known
            && known.charged == charged
            && known.limits == Some(limits)
            // A new inode is charged only when the file system next commits.
            && limits.inodes.is_none()
        {
            return Ok(known.usage());
        }
        let pinned_at = last_snapshot(directory.as_fd(), id).at("look up the subvolume of", path)?;
        let over = limits.bytes.is_some_and(|limit| charged > limit) && pinned_at.is_some();

        // What is charged lags behind what the trees show until the next commit; the two are compared below.
        let charged = if over {
            sys::btrfs_sync(directory.as_fd()).at("commit", path)?;
            self.charged(id)?
        } else {
            charged
        };
        let mut counted = Counted { charged, limits: Some(limits), ..known.unwrap_or_default() };
        let mut bound = limits.bytes;
        if over || limits.inodes.is_some() {
            let scan = scan(directory.as_fd()).at("count the inodes of", path)?;
            counted.inodes = scan.inodes.saturating_sub(FIXED_INODES);
            if let (Some(limit), Some(pinned_at)) = (limits.bytes, pinned_at)
                && over
            {
                let (own, pinned) = scan.own(directory.as_fd(), id, pinned_at).at("look up the extents of", path)?;
                counted.garbage = charged.saturating_sub(own);
                let advance = if own > limit { 0 } else { pinned };
                bound = Some(limit.saturating_add(counted.garbage).saturating_add(advance));
            }
        }
        if !over {
            counted.garbage = 0;
            if let (Some(limit), Some(_)) = (limits.bytes, pinned_at) {
                bound = Some(limit.saturating_add(charged));
            }
        }
        if limits.inodes.is_some_and(|limit| counted.inodes >= limit) {
            bound = Some(CLOSED);
        }
        if self.bound(id)? != bound {
            self.set(id, bound)?;
        }
        if limits.is_none() {
            self.forget(name);
        } else {
            self.counted().insert(name.to_owned(), counted);
        }
        Ok(counted.usage())
    }

    /// Forgets what was counted of a session directory.
    pub(super) fn forget(&self, name: &str) {
        self.counted().remove(name);
    }

    fn counted(&self) -> std::sync::MutexGuard<'_, HashMap<String, Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn charged(&self, id: u64) -> Result<u64> {
        self.read(id, "referenced")
    }

    /// The kernel's bound; sysfs shows none as 0.
    fn bound(&self, id: u64) -> Result<Option<u64>> {
        self.read(id, "max_referenced").map(|bytes| (bytes > 0).then_some(bytes))
    }

    fn set(&self, id: u64, bound: Option<u64>) -> Result<()> {
        let root = File::open(&self.root).at("open", &self.root)?;
        sys::quota_limit(root.as_fd(), id, bound).at("set a limit on", &self.root)
    }

    fn read(&self, id: u64, what: &str) -> Result<u64> {
        let path = self.groups.join(format!("0_{id}")).join(what);
        let text = fs::read_to_string(&path).at("read", &path)?;
        text.trim().parse().map_err(|_| Error::Damaged {
            what: path.display().to_string(),
            detail: format!("{:?} is no number", text.trim()),
        })
    }
}

fn id(directory: BorrowedFd<'_>, path: &Path) -> Result<u64> {
    sys::subvolume_id(directory).at("ask for the subvolume of", path)
}

fn word(item: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(item.get(at..at + 8)?.try_into().ok()?))
}

/// The transaction of the newest snapshot that was taken of a subvolume; `None` if none ever was. What is older may be
/// referred to by others too.
fn last_snapshot(within: BorrowedFd<'_>, id: u64) -> io::Result<Option<u64>> {
    // Offsets in `struct btrfs_root_item`.
    const LAST_SNAPSHOT: usize = 200;
    const MADE_AT: usize = 303;
    let mut found = None;
    let at = |offset| Key { object: id, kind: ROOT_ITEM, offset };
    sys::tree_search(within, ROOT_TREE, at(0), at(u64::MAX), |_, item| {
        // A subvolume that is itself a snapshot has its own beginning there.
        found = word(item, LAST_SNAPSHOT).zip(word(item, MADE_AT)).filter(|(last, made)| last > made);
        false
    })?;
    Ok(found.map(|(last, _)| last))
}

fn scan(within: BorrowedFd<'_>) -> io::Result<Scan> {
    // Offsets in `struct btrfs_file_extent_item`.
    const GENERATION: usize = 0;
    const KIND: usize = 20;
    const ADDRESS: usize = 21;
    const LENGTH: usize = 29;
    const INLINE: u8 = 0;
    let mut scan = Scan::default();
    let first = Key { object: 0, kind: 0, offset: 0 };
    let last = Key { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };
    sys::tree_search(within, OWN_TREE, first, last, |key, item| {
        scan.item_bytes += ITEM_HEAD + item.len() as u64;
        if key.kind == INODE_ITEM {
            scan.inodes += 1;
        }
        if key.kind == EXTENT_DATA
            && item.get(KIND).is_some_and(|kind| *kind != INLINE)
            && let (Some(address), Some(length), Some(generation)) =
                (word(item, ADDRESS), word(item, LENGTH), word(item, GENERATION))
            // A hole has no address.
            && address > 0
        {
            scan.extents.insert(address, (length, generation));
        }
        true
    })?;
    Ok(scan)
}

impl Scan {
    /// Bytes that the subvolume `id` is charged for and refers to itself, and how many of those are old enough that
    /// others may refer to them as well.
    fn own(&self, within: BorrowedFd<'_>, id: u64, pinned_at: u64) -> io::Result<(u64, u64)> {
        // Leaves are about two thirds full.
        let metadata = self.item_bytes + self.item_bytes / 2;
        let (mut own, mut pinned) = (metadata, metadata);
        for (address, (length, generation)) in &self.extents {
            if owner(within, *address)?.is_none_or(|owner| owner == id) {
                own += length;
                pinned += if *generation <= pinned_at { *length } else { 0 };
            }
        }
        Ok((own, pinned))
    }
}

/// The subvolume that an extent is charged to; `None` while the extent is too new to be in the tree. What was written
/// before quotas were switched on is charged to nobody, here 0.
fn owner(within: BorrowedFd<'_>, address: u64) -> io::Result<Option<u64>> {
    // `struct btrfs_extent_item`, behind which inline references begin, the owner's first.
    const REFERENCES: usize = 24;
    let mut found = None;
    let at = |offset| Key { object: address, kind: EXTENT_ITEM, offset };
    sys::tree_search(within, EXTENT_TREE, at(0), at(u64::MAX), |_, item| {
        found = match item.get(REFERENCES) {
            Some(&EXTENT_OWNER_REF) => word(item, REFERENCES + 1),
            _ => Some(0),
        };
        false
    })?;
    Ok(found)
}
