//! What is mounted at one place, and where one session is shown, at a cost that does not grow with the mounts of the node.
//!
//! A mount table of 10,000 sessions is megabytes of text. Linux answers for one mount by itself since 6.8 (statmount(2),
//! with a file system's options since 6.11 and its source since 6.13); where it does not, the table is read. Where a
//! session is shown is remembered, and each place is looked at again before it is believed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::error::Result;
use crate::mount::{self, MountEntry};
use crate::sys;

/// `STATX_MNT_ID_UNIQUE` (include/uapi/linux/stat.h): an id that is never used again.
const UNIQUE_ID: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What is mounted at `target`, the topmost if several mounts lie there.
pub(crate) fn at(target: &Path) -> Result<Option<MountEntry>> {
    match mount::is_mountpoint(target) {
        Ok(false) => Ok(None),
        // What cannot be looked at may be a mount all the same: the table knows.
        Ok(true) | Err(_) => match ask(target) {
            Some(entry) => Ok(Some(entry)),
            None => mount::find_mount(target),
        },
    }
}

/// The mount at `target` as statmount(2) tells it; none where this kernel does not tell enough.
fn ask(target: &Path) -> Option<MountEntry> {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(CWD, target, flags, UNIQUE_ID).ok()?;
    if stat.stx_mask & UNIQUE_ID.bits() == 0 {
        return None;
    }
    let entry = parse(&sys::statmount(stat.stx_mnt_id, WANTED).ok()?)?;
    (entry.target == target).then_some(entry)
}

// include/uapi/linux/mount.h
const SB_BASIC: u64 = 0x1;
const MNT_BASIC: u64 = 0x2;
const MNT_ROOT: u64 = 0x8;
const MNT_POINT: u64 = 0x10;
const FS_TYPE: u64 = 0x20;
const MNT_OPTS: u64 = 0x80;
const SB_SOURCE: u64 = 0x200;
const WANTED: u64 = SB_BASIC | MNT_BASIC | MNT_ROOT | MNT_POINT | FS_TYPE | MNT_OPTS | SB_SOURCE;
/// `MOUNT_ATTR_*` by their names in a mount table.
const ATTRIBUTES: [(u64, &str); 3] = [(0x2, "nosuid"), (0x4, "nodev"), (0x8, "noexec")];
/// Bytes of `struct statmount` before its strings.
const FIXED: usize = 512;

/// Reads a `struct statmount`. The numbers are the offsets of its fields.
fn parse(answer: &[u8]) -> Option<MountEntry> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(answer.get(at..at + 8)?.try_into().ok()?));
    let text_at = |at: usize| {
        let from = FIXED + usize::try_from(u32_at(at)?).ok()?;
        answer.get(from..)?.split(|byte| *byte == 0).next()
    };
    // A file system without options leaves theirs out; a kernel that tells the source would tell them.
    let told = u64_at(8)?;
    if (told | MNT_OPTS) & WANTED != WANTED {
        return None;
    }
    let path = |text: &[u8]| PathBuf::from(OsStr::from_bytes(text));
    let attributes = u64_at(64)?;
    let mut options = if attributes & 1 == 0 { "rw".to_owned() } else { "ro".to_owned() };
    for (_, name) in ATTRIBUTES.iter().filter(|(bit, _)| attributes & bit != 0) {
        options.push(',');
        options.push_str(name);
    }
    Some(MountEntry {
        id: u32_at(56)?.into(),
        parent: u32_at(60)?.into(),
        device: format!("{}:{}", u32_at(16)?, u32_at(20)?),
        root: path(text_at(104)?),
        target: path(text_at(108)?),
        options,
        fs_type: String::from_utf8_lossy(text_at(36)?).into_owned(),
        source: path(text_at(124)?),
        super_options: if told & MNT_OPTS == 0 { Vec::new() } else { mount::unescape_octal(text_at(4)?) },
    })
}

/// Where sessions are shown, by the name that their mounts carry.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// None until the mount table was read, once.
    places: Mutex<Option<HashMap<PathBuf, Vec<PathBuf>>>>,
}

impl Shown {
    /// Remembers that `session` was mounted at `target`.
    pub(crate) fn add(&self, session: &str, target: &Path) {
        // Before the table was read there is nothing to add to: it will be in there.
        if let Some(places) = &mut *self.places.lock().unwrap_or_else(PoisonError::into_inner) {
            remember(places, session.into(), target.to_owned());
        }
    }

    /// Forgets a session that is shown nowhere.
    pub(crate) fn forget(&self, session: &str) {
        if let Some(places) = &mut *self.places.lock().unwrap_or_else(PoisonError::into_inner) {
            places.remove(Path::new(session));
        }
    }

    /// Mounts that carry the session's name, as they are now. One that somebody else made since the table was read is
    /// not among them; [`mount::upper_in_use`] tells of such a one.
    pub(crate) fn mounts(&self, session: &str) -> Result<Vec<MountEntry>> {
        let known = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            let places = match &mut *places {
                Some(places) => places,
                unread => unread.insert(read()?),
            };
            places.get(Path::new(session)).cloned().unwrap_or_default()
        };
        let mut mounts = Vec::new();
        for target in known {
            mounts.extend(at(&target)?.filter(|entry| entry.source == Path::new(session)));
        }
        Ok(mounts)
    }
}

fn read() -> Result<HashMap<PathBuf, Vec<PathBuf>>> {
    let mut places: HashMap<PathBuf, Vec<PathBuf>> = HashMap::new();
    for entry in mount::table()?.into_iter().filter(|entry| entry.fs_type == "overlay") {
        remember(&mut places, entry.source, entry.target);
    }
    Ok(places)
}

/// In the order in which they were made.
fn remember(places: &mut HashMap<PathBuf, Vec<PathBuf>>, session: PathBuf, target: PathBuf) {
    let known = places.entry(session).or_default();
    known.retain(|known| *known != target);
    known.push(target);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mount_is_told_as_the_table_tells_it() {
        let table = mount::table().unwrap();
        let proc = table.iter().rfind(|entry| entry.target == Path::new("/proc")).unwrap();
        let alone = at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!((&alone.fs_type, &alone.root, &alone.source), (&proc.fs_type, &proc.root, &proc.source));
        assert_eq!((alone.id, alone.parent, alone.is_read_only()), (proc.id, proc.parent, proc.is_read_only()));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = kernel.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        assert_eq!(ask(Path::new("/proc")).is_some(), version >= (6, 13), "statmount(2) on Linux {kernel}");
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(at(directory.path()).unwrap(), None);
        assert_eq!(at(&directory.path().join("absent")).unwrap(), None);
    }

    #[test]
    fn an_answer_that_tells_too_little_is_none() {
        let mut answer = vec![0; FIXED + 64];
        answer[8..16].copy_from_slice(&(WANTED & !SB_SOURCE).to_ne_bytes());
        assert_eq!(parse(&answer), None);
        answer[8..16].copy_from_slice(&WANTED.to_ne_bytes());
        assert!(parse(&answer).is_some());
        assert_eq!(parse(&answer[..100]), None);
    }
}
