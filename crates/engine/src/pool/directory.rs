//! The directory pool: any file system. A snapshot walks the upper and clones each file.
//!
//! Plain directories have no limits of their own: what a session takes up is counted and reported, and nothing stops
//! its writers. Project quotas of ext4 and XFS could.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::{Kind, Limits, Medium, Pool, Usage, dotted, make_layout, no_memory, walk_usage};
use crate::crash::crash_point;
use crate::error::{Context, Error, Result};
use crate::mount::{entry_path, xattrs};

/// A pool of plain directories.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// The pool in `root`.
    pub fn open(root: &Path) -> Result<Self> {
        make_layout(root)?;
        Ok(Self { root: root.to_owned() })
    }

    fn parent(&self, kind: &str) -> PathBuf {
        self.root.join(kind)
    }

    /// Fills a new directory under a dotted name.
    fn begin(&self, kind: &str, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.parent(kind).join(name);
        if path.exists() {
            let detail = "taken".into();
            return Err(Error::AlreadyExists { kind: "directory", name: path.display().to_string(), detail });
        }
        let unfinished = self.unfinished(kind, name);
        remove(&unfinished)?;
        fs::create_dir(&unfinished).at("create", &unfinished)?;
        fill(&unfinished)?;
        crash_point!("pool.directory.filled");
        Ok(())
    }

    /// Syncs it and gives it its name.
    fn finish(&self, kind: &str, name: &str) -> Result<()> {
        let (parent, unfinished) = (self.parent(kind), self.unfinished(kind, name));
        let directory = File::open(&parent).at("open", &parent)?;
        rustix::fs::syncfs(&directory).at("sync", &parent)?;
        fs::rename(&unfinished, parent.join(name)).at("rename", &unfinished)?;
        directory.sync_all().at("sync", &parent)
    }

    fn unfinished(&self, kind: &str, name: &str) -> PathBuf {
        self.parent(kind).join(format!(".new-{name}"))
    }

    fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let path = self.parent(kind).join(name);
        let dead = self.parent(kind).join(format!(".dead-{name}"));
        remove(&dead)?;
        match fs::rename(&path, &dead) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("rename", &path, error)),
        }
        crash_point!("pool.directory.dead");
        remove(&dead)
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, error)),
        _ => Ok(()),
    }
}

impl Pool for Directory {
    fn kind(&self) -> Kind {
        Kind::Directory
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn create(&self, session: &str, medium: Medium) -> Result<()> {
        if medium == Medium::Memory {
            return Err(no_memory());
        }
        self.begin("sessions", session, |path| {
            for name in ["upper", "work"] {
                fs::create_dir(path.join(name)).at("create", path.join(name))?;
            }
            Ok(())
        })?;
        self.finish("sessions", session)
    }

    /// Cloning writes back what it clones; doing it before the writers are frozen keeps the freeze short.
    fn flush(&self, session: &str, _: Limits) -> Result<()> {
        let path = self.session_dir(session);
        rustix::fs::syncfs(File::open(&path).at("open", &path)?).at("sync", &path)
    }

    fn snapshot(&self, session: &str, snapshot: &str) -> Result<()> {
        let upper = self.upper(session);
        self.begin("snapshots", snapshot, |path| copy_tree(&upper, &path.join("upper")))
    }

    fn finish_snapshot(&self, snapshot: &str) -> Result<()> {
        self.finish("snapshots", snapshot)
    }

    fn fork(&self, snapshot: &str, session: &str) -> Result<()> {
        let upper = self.snapshot_upper(snapshot);
        self.begin("sessions", session, |path| {
            fs::create_dir(path.join("work")).at("create", path.join("work"))?;
            copy_tree(&upper, &path.join("upper"))
        })?;
        self.finish("sessions", session)
    }

    fn delete_session(&self, session: &str) -> Result<()> {
        self.delete("sessions", session)
    }

    fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.delete("snapshots", snapshot)
    }

    fn enforcement(&self) -> Result<String> {
        Err(Error::Unsupported {
            what: "enforcing limits of sessions".into(),
            remedy: "the pool is a plain directory, so they are only counted; use a btrfs pool".into(),
        })
    }

    fn remount(&self, _: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        if !self.space_of(Medium::Disk)?.read_only {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!("mounting {} anew", self.root.display()),
            remedy: "its file system is the node's own; remount it read-write".into(),
        })
    }

    fn usage(&self, session: &str) -> Result<Usage> {
        walk_usage(&self.upper(session)).map(|(bytes, inodes)| Usage { bytes, inodes: Some(inodes) })
    }

    fn keep(&self, session: &str, _: Limits) -> Result<Usage> {
        self.usage(session)
    }

    fn sweep(&self) -> Result<usize> {
        let mut swept = 0;
        for parent in [self.parent("sessions"), self.parent("snapshots")] {
            for name in dotted(&parent)? {
                remove(&parent.join(name))?;
                swept += 1;
            }
        }
        Ok(swept)
    }
}

/// Copies the directory `from` to `to`, which must not exist: names, types, modes, owners, all extended attributes,
/// modification times, hard links, device nodes (whiteouts among them) and holes. Contents are cloned where the file
/// system can.
///
/// The source may change meanwhile if its writers could not be frozen: the walk holds descriptors and follows no
/// link, so what is copied is always from inside `from`.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).at("create", to)?;
    let source = open_directory(CWD, from.as_os_str().into()).at("open", from)?;
    let target = open_directory(CWD, to.as_os_str().into()).at("open", to)?;
    Copier { links: HashMap::new(), root: target.try_clone().at("copy a descriptor of", to)? }
        .directory(source.as_fd(), target.as_fd(), Path::new(""))
        .map_err(|error| match error {
            Error::Io { action, path, source } => Error::Io { action, path: from.join(path), source },
            other => other,
        })
}

struct Copier {
    /// Device and inode of the source, to where in the copy its first name is.
    links: HashMap<(u64, u64), PathBuf>,
    root: OwnedFd,
}

impl Copier {
    fn directory(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path) -> Result<()> {
        let mut names = Vec::new();
        for entry in Dir::read_from(from).at("list", path)? {
            let entry = entry.at("list", path)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(<OsString as std::os::unix::ffi::OsStringExt>::from_vec(name.to_vec()));
            }
        }
        for name in names {
            let path = path.join(&name);
            match self.entry(from, to, &name, &path) {
                // It was removed while we looked; a frozen source never does that.
                Err(error) if error.is_not_found() => {}
                other => other?,
            }
        }
        let stat = rustix::fs::fstat(from).at("look at", path)?;
        copy_xattrs(&entry_path(from, ".".as_ref()), &entry_path(to, ".".as_ref()))?;
        rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
            .at("set owner of", path)?;
        rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode)).at("set mode of", path)?;
        rustix::fs::futimens(to, &times(&stat)).at("set times of", path)
    }

    fn entry(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &OsString, path: &Path) -> Result<()> {
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).at("look at", path)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let source = open_directory(from, name.into()).at("open", path)?;
            rustix::fs::mkdirat(to, name, Mode::RWXU).at("create", path)?;
            let target = open_directory(to, name.into()).at("open", path)?;
            return self.directory(source.as_fd(), target.as_fd(), path);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return self.link(first, to, name).at("link", path);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_owned());
        }
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let source = rustix::fs::openat(from, name, OFlags::RDONLY | flags, Mode::empty()).at("open", path)?;
                let target = rustix::fs::openat(
                    to,
                    name,
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags,
                    Mode::RUSR | Mode::WUSR,
                )
                .at("create", path)?;
                copy_contents(source.as_fd(), target.as_fd(), u64::try_from(stat.st_size).unwrap_or(0))
                    .at("copy", path)?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(from, name, Vec::new()).at("read link", path)?;
                rustix::fs::symlinkat(&link, to, name).at("create link", path)?;
            }
            _ => {
                let mode = Mode::from_raw_mode(stat.st_mode);
                rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev).at("create node", path)?;
            }
        }
        rustix::fs::chownat(
            to,
            name,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .at("set owner of", path)?;
        copy_xattrs(&entry_path(from, name), &entry_path(to, name))?;
        if kind != FileType::Symlink {
            let mode = Mode::from_raw_mode(stat.st_mode);
            rustix::fs::chmodat(to, name, mode, AtFlags::empty()).at("set mode of", path)?;
        }
        rustix::fs::utimensat(to, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW).at("set times of", path)
    }

    /// Links a name to the copy at `first`, below the root of the copy. A path in one call is limited; a tree is not.
    fn link(&self, first: &Path, to: BorrowedFd<'_>, name: &OsString) -> rustix::io::Result<()> {
        if first.as_os_str().len() < libc::PATH_MAX as usize {
            return rustix::fs::linkat(&self.root, first, to, name, AtFlags::empty());
        }
        let mut at = self.root.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        for part in first.parent().into_iter().flatten() {
            at = open_directory(at.as_fd(), part.into())?;
        }
        rustix::fs::linkat(&at, first.file_name().unwrap_or_default(), to, name, AtFlags::empty())
    }
}

fn open_directory(at: BorrowedFd<'_>, name: PathBuf) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn times(stat: &Stat) -> Timestamps {
    let nanos = |value: u64| i64::try_from(value).unwrap_or(0);
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: nanos(stat.st_atime_nsec) },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: nanos(stat.st_mtime_nsec) },
    }
}

fn copy_xattrs(from: &Path, to: &Path) -> Result<()> {
    for (name, value) in xattrs(from)? {
        match rustix::fs::lsetxattr(to, &name, &value, XattrFlags::empty()) {
            // A label that the file system itself or the security module gives.
            Err(Errno::OPNOTSUPP | Errno::PERM) if name.as_encoded_bytes().starts_with(b"security.") => {}
            other => other.at("set an extended attribute of", to)?,
        }
    }
    Ok(())
}

/// Clones the file, or copies its data and leaves its holes.
pub(crate) fn copy_contents(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> rustix::io::Result<()> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => {}
        Err(error) => return Err(error),
    }
    rustix::fs::ftruncate(to, size)?;
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64) -> rustix::io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    let mut buffer = Vec::new();
    while read_at < end {
        let length = usize::try_from(end - read_at).unwrap_or(usize::MAX).min(1 << 30);
        let copied = if buffer.is_empty() {
            match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length) {
                Ok(copied) => copied,
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    buffer = vec![0; 1 << 20];
                    continue;
                }
                Err(error) => return Err(error),
            }
        } else {
            let length = length.min(buffer.len());
            let read = rustix::io::pread(from, &mut buffer[..length], read_at)?;
            let mut written = 0;
            while written < read {
                written += rustix::io::pwrite(to, &buffer[written..read], write_at + written as u64)?;
            }
            read_at += read as u64;
            write_at += read as u64;
            read
        };
        // The file was cut while we read.
        if copied == 0 {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_copy_keeps_links_modes_times_holes_and_attributes() {
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("from");
        fs::create_dir_all(from.join("sub/deep")).unwrap();
        fs::write(from.join("file"), "contents").unwrap();
        fs::hard_link(from.join("file"), from.join("sub/same")).unwrap();
        std::os::unix::fs::symlink("../nowhere", from.join("sub/link")).unwrap();
        fs::set_permissions(from.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
        rustix::fs::mknodat(CWD, from.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
        rustix::fs::lsetxattr(from.join("file"), "user.a", b"\0binary", XattrFlags::empty()).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        std::os::unix::fs::FileExt::write_at(&sparse, b"end", (1 << 30) - 3).unwrap();
        let old = Timespec { tv_sec: -7, tv_nsec: 123_456_789 };
        let stamp = Timestamps { last_access: old, last_modification: old };
        for name in ["sub", "file", "sub/link"] {
            rustix::fs::utimensat(CWD, from.join(name), &stamp, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
        let to = directory.path().join("to");
        copy_tree(&from, &to).unwrap();
        for name in ["", "sub", "sub/deep", "file", "sub/same", "sub/link", "fifo", "sparse"] {
            let (a, b) = (fs::symlink_metadata(from.join(name)).unwrap(), fs::symlink_metadata(to.join(name)).unwrap());
            assert_eq!((a.mode(), a.mtime(), a.mtime_nsec()), (b.mode(), b.mtime(), b.mtime_nsec()), "{name}");
            if !a.is_dir() {
                assert_eq!((a.size(), a.nlink()), (b.size(), b.nlink()), "{name}");
            }
        }
        assert_eq!(fs::metadata(to.join("file")).unwrap().ino(), fs::metadata(to.join("sub/same")).unwrap().ino());
        assert_eq!(fs::read(to.join("file")).unwrap(), b"contents");
        assert_eq!(fs::read_link(to.join("sub/link")).unwrap(), Path::new("../nowhere"));
        assert_eq!(crate::mount::xattr(&to.join("file"), "user.a").unwrap().unwrap(), b"\0binary");
        assert!(fs::metadata(to.join("sparse")).unwrap().blocks() * 512 < 1 << 20, "holes were filled");
        let mut end = [0; 3];
        std::os::unix::fs::FileExt::read_exact_at(&File::open(to.join("sparse")).unwrap(), &mut end, (1 << 30) - 3)
            .unwrap();
        assert_eq!(&end, b"end");
    }
}
