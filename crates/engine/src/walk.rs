//! Reading and opening the entries of a directory as they are: names are bytes, no symbolic link is followed, and no
//! path leaves the directory it starts from.
//!
//! Everything that turns files into a tree, or a tree into files, goes through here, since what it reads was written
//! by somebody else.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use aether_cas::tree::{Attributes, Mtime, Owner};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// Paths longer than this are opened in steps, since the kernel takes at most 4095 bytes at a time.
const LONGEST_STEP: usize = 3072;
/// Room for names that one `getdents64` fills.
const LISTING: usize = 32 * 1024;

/// Opens a directory that the caller trusts, as the root of a walk.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).at("open", path)
}

/// Opens `path` beneath `root`, following no symbolic link on the way and none at the end.
///
/// # Errors
/// What `openat2` says; `ELOOP` where a symbolic link is in the way, `EXDEV` where the path would leave `root`.
pub(crate) fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let open = |directory: BorrowedFd<'_>, path: &Path, flags: OFlags| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)
    };
    if path.as_os_str().len() <= LONGEST_STEP {
        return Ok(open(root, path, flags)?);
    }
    let mut at: Option<OwnedFd> = None;
    let mut step = PathBuf::new();
    for component in path.components() {
        let Component::Normal(name) = component else { return Err(Errno::XDEV.into()) };
        if step.as_os_str().len() + name.len() > LONGEST_STEP {
            at = Some(open(at.as_ref().map_or(root, |fd| fd.as_fd()), &step, OFlags::PATH | OFlags::DIRECTORY)?);
            step = PathBuf::new();
        }
        step.push(name);
    }
    Ok(open(at.as_ref().map_or(root, |fd| fd.as_fd()), &step, flags)?)
}

/// Opens a directory beneath `root` for listing.
pub(crate) fn open_directory(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_beneath(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens a regular file beneath `root` for reading; never waits, even if it has become a fifo meanwhile.
pub(crate) fn open_file(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_beneath(root, path, OFlags::RDONLY | OFlags::NONBLOCK)
}

/// The names in a directory, without `.` and `..`, in no particular order.
pub(crate) fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut room = vec![MaybeUninit::<u8>::uninit(); LISTING];
    let mut listing = RawDir::new(directory, &mut room);
    let mut names = Vec::new();
    while let Some(entry) = listing.next() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Stat data of an entry, of a symbolic link itself.
pub(crate) fn stat(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Stat> {
    Ok(rustix::fs::statat(directory, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The target of a symbolic link, as bytes.
pub(crate) fn read_link(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(directory, OsStr::from_bytes(name), Vec::new())?.into_bytes())
}

/// One extended attribute, `None` if the file has none of that name.
pub(crate) fn xattr(file: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let name = OsStr::from_bytes(name);
    loop {
        let size = match rustix::fs::fgetxattr_query(file, name) {
            Ok(size) => size,
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut value = vec![0; size];
        match rustix::fs::fgetxattr(file, name, &mut value[..]) {
            Ok(read) => {
                value.truncate(read);
                return Ok(Some(value));
            }
            // It grew, or went, between the two calls.
            Err(Errno::RANGE) => {}
            Err(Errno::NODATA) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Every extended attribute of a file, in every namespace that the caller may see.
pub(crate) fn xattrs(file: BorrowedFd<'_>) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let list = loop {
        let size = match rustix::fs::flistxattr_query(file) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
            Ok(size) => size,
            Err(error) => return Err(error.into()),
        };
        let mut list = vec![0_u8; size];
        match rustix::fs::flistxattr(file, &mut list[..]) {
            Ok(read) => {
                list.truncate(read);
                break list;
            }
            Err(Errno::RANGE) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut all = BTreeMap::new();
    for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if let Some(value) = xattr(file, name)? {
            all.insert(name.to_vec(), value);
        }
    }
    Ok(all)
}

/// The attributes of which a tree keeps account.
///
/// `owner` is whose files need no mention; `mtime` replaces what the file says.
pub(crate) fn attributes(
    stat: &Stat,
    mut xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    owner: Owner,
    mtime: Option<Mtime>,
) -> Attributes {
    xattrs.retain(|name, _| name.starts_with(b"user."));
    let its = Owner { uid: stat.st_uid, gid: stat.st_gid };
    Attributes {
        mode: stat.st_mode & 0o7777,
        mtime: mtime.unwrap_or(Mtime { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 }),
        owner: (its != owner).then_some(its),
        xattrs,
    }
}

/// `parent/name`, where the parent of the root's entries is empty.
pub(crate) fn join(parent: &Path, name: &[u8]) -> PathBuf {
    parent.join(OsStr::from_bytes(name))
}
