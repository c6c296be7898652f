//! Does what a plan says, through descriptors that cannot lead out of the mount.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use aether_cas::Blob;
use aether_cas::transfer::{Object, Objects};
use aether_cas::tree::{Attributes, Owner};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::{Plan, Restored, Room, Step, TEMPORARY};
use crate::error::{Context, Error, Result};
use crate::walk;

/// What an entry takes beside its content: generous for an inode, its name and its xattrs on any file system.
const ENTRY_BYTES: u64 = 4096;

impl Plan {
    /// Applies the plan to the session whose merged view is mounted at `mount`.
    ///
    /// `owner` is whose files the trees do not mention, `contents` has what [`Plan::contents`] names, and `limit` is
    /// what the session may still write if that is less than what its file system reports.
    ///
    /// # Errors
    /// `Io` of kind `StorageFull` before anything was touched, if there is too little room; afterwards `Io` with the path
    /// that failed, or `Store` if a content cannot be had. Then the session holds a mixture.
    pub fn apply(&self, mount: &Path, owner: Owner, contents: &dyn Objects, limit: Option<Room>) -> Result<Restored> {
        if self.is_empty() {
            return Ok(Restored::default());
        }
        self.check_room(mount, limit)?;
        let root = walk::open_root(mount)?;
        let run = uuid::Uuid::new_v4().simple();
        let mut hands = Hands {
            mount,
            root: Rc::new(root),
            owner,
            contents,
            temporary: OsString::from(format!("{TEMPORARY}{run}-new")),
            aside_name: OsString::from(format!("{TEMPORARY}{run}")),
            aside: None,
            parent: None,
            done: Restored::default(),
        };
        for step in &self.steps {
            hands.step(step)?;
        }
        hands.end_aside()?;
        // Inner ones first, for no deeper reason than that the root is the last sign of completion.
        for (path, attributes) in self.directories.iter().rev() {
            let fd = hands.open(path)?;
            hands.set_attributes(&fd, path, attributes)?;
        }
        Ok(hands.done)
    }

    /// Whether [`Self::apply`] with the same `limit` would have the room that it needs, as far as can be known before.
    ///
    /// # Errors
    /// `Io` of kind `StorageFull` says what is missing.
    pub fn check_room(&self, mount: &Path, limit: Option<Room>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let there = rustix::fs::statvfs(mount).at("read the free space of", mount)?;
        let mut bytes = there.f_bavail.saturating_mul(there.f_frsize);
        // btrfs counts no inodes and reports none at all.
        let mut inodes = if there.f_files == 0 { u64::MAX } else { there.f_favail };
        if let Some(limit) = limit {
            bytes = bytes.min(limit.bytes);
            inodes = inodes.min(limit.inodes);
        }
        let needed = self.room.bytes.saturating_add(self.room.inodes.saturating_mul(ENTRY_BYTES));
        if needed <= bytes && self.room.inodes <= inodes {
            return Ok(());
        }
        let what = format!(
            "it needs {needed} bytes and {} inodes, and the session may write {bytes} bytes and {inodes} inodes more; \
             free some space or raise the session's limit",
            self.room.inodes
        );
        Err(Error::io("restore", mount, io::Error::new(io::ErrorKind::StorageFull, what)))
    }
}

/// Carries out steps.
struct Hands<'a> {
    mount: &'a Path,
    root: Rc<OwnedFd>,
    owner: Owner,
    contents: &'a dyn Objects,
    /// Name for what is not finished, in whichever directory it is.
    temporary: OsString,
    aside_name: OsString,
    /// Where directories wait for their place.
    aside: Option<OwnedFd>,
    /// The directory used last, since steps come directory by directory.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    done: Restored,
}

impl Hands<'_> {
    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Aside { from, number } => self.put_aside(from, *number),
            Step::Place { number, to } => self.place(*number, to),
            Step::Remove { path } => {
                self.parent = None;
                self.done.removed += 1;
                remove(self.root.as_fd(), path).at("remove", self.mount.join(path))
            }
            Step::MakeDirectory { path } => self.make_directory(path),
            Step::File { path, content, attributes } => {
                self.done.bytes += content.size;
                self.replace(path, attributes, |hands, directory, name| hands.write(directory, name, content))
            }
            Step::Symlink { path, target, attributes } => self.replace(path, attributes, |_, directory, name| {
                Ok(rustix::fs::symlinkat(OsStr::from_bytes(target), directory, name)?)
            }),
            Step::Fifo { path, attributes } => self.replace(path, attributes, |_, directory, name| {
                Ok(rustix::fs::mkfifoat(directory, name, Mode::from_raw_mode(0o600))?)
            }),
            Step::Link { first, path } => self.link(first, path),
            Step::Attributes { path, attributes } => {
                self.done.changed += 1;
                let fd = self.open(path)?;
                self.set_attributes(&fd, path, attributes)
            }
        }
    }

    /// The directory that an entry is in, and the entry's name there.
    fn at<'p>(&mut self, path: &'p Path) -> Result<(Rc<OwnedFd>, &'p OsStr)> {
        let name = path.file_name().ok_or_else(|| Error::Invalid {
            what: path.display().to_string(),
            reason: "it names no entry of a directory".into(),
        })?;
        let parent = path.parent().unwrap_or(Path::new(""));
        if let Some((known, fd)) = &self.parent
            && known == parent
        {
            return Ok((fd.clone(), name));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let opened = walk::open_beneath(self.root.as_fd(), parent, flags).at("open", self.mount.join(parent))?;
        let fd = Rc::new(opened);
        self.parent = Some((parent.to_owned(), fd.clone()));
        Ok((fd, name))
    }

    /// An entry itself, whatever it is.
    fn open(&self, path: &Path) -> Result<OwnedFd> {
        // `NO_SYMLINKS` refuses a symbolic link even as the last component, so the entry is opened from its directory.
        let (parent, name) = (path.parent().unwrap_or(Path::new("")), path.file_name());
        let open = || {
            let parent = walk::open_beneath(self.root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY)?;
            match name {
                None => Ok(parent),
                Some(name) => {
                    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
                }
            }
        };
        io::Result::at(open(), "open", self.mount.join(path))
    }

    fn put_aside(&mut self, from: &Path, number: usize) -> Result<()> {
        let (directory, name) = self.at(from)?;
        if self.aside.is_none() {
            let at = self.mount.join(&self.aside_name);
            rustix::fs::mkdirat(&*self.root, &self.aside_name, Mode::RWXU).at("create", &at)?;
            self.aside = Some(walk::open_directory(self.root.as_fd(), Path::new(&self.aside_name)).at("open", &at)?);
        }
        let aside = self.aside.as_ref().expect("it was opened above");
        self.parent = None;
        rustix::fs::renameat(&*directory, name, aside, number.to_string()).at("put aside", self.mount.join(from))
    }

    fn place(&mut self, number: usize, to: &Path) -> Result<()> {
        let (directory, name) = self.at(to)?;
        let aside = self.aside.as_ref().expect("what is placed was put aside before");
        let rename = || rustix::fs::renameat_with(aside, number.to_string(), &*directory, name, RenameFlags::NOREPLACE);
        self.parent = None;
        self.done.moved += 1;
        unless_in_the_way(&directory, name, rename).at("move back", self.mount.join(to))
    }

    fn end_aside(&mut self) -> Result<()> {
        self.parent = None;
        if self.aside.take().is_none() {
            return Ok(());
        }
        rustix::fs::unlinkat(&*self.root, &self.aside_name, AtFlags::REMOVEDIR)
            .at("remove", self.mount.join(&self.aside_name))
    }

    fn make_directory(&mut self, path: &Path) -> Result<()> {
        let (directory, name) = self.at(path)?;
        self.done.changed += 1;
        unless_in_the_way(&directory, name, || rustix::fs::mkdirat(&*directory, name, Mode::RWXU))
            .at("create the directory", self.mount.join(path))
    }

    /// Makes an entry under a temporary name, completes it, and renames it over what is there.
    fn replace(
        &mut self,
        path: &Path,
        attributes: &Attributes,
        make: impl FnOnce(&Self, &OwnedFd, &OsStr) -> Result<(), Failure>,
    ) -> Result<()> {
        let (directory, name) = self.at(path)?;
        let whole = self.mount.join(path);
        self.done.changed += 1;
        let made = make(self, &directory, &self.temporary).map_err(|failure| failure.at(&whole)).and_then(|()| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&*directory, &self.temporary, flags, Mode::empty()).at("open", &whole)?;
            self.set_attributes(&fd, path, attributes)?;
            rustix::fs::renameat(&*directory, &self.temporary, &*directory, name).at("replace", &whole)
        });
        if made.is_err() {
            // The first error is the one to report.
            let _ = rustix::fs::unlinkat(&*directory, &self.temporary, AtFlags::empty());
        }
        made
    }

    fn write(&self, directory: &OwnedFd, name: &OsStr, content: &Blob) -> Result<(), Failure> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
        if content.size == 0 {
            return Ok(());
        }
        let object = self.contents.object(content).map_err(|error| Failure::Content(*content, Box::new(error)))?;
        let written = match object {
            Object::Bytes(bytes) => file.write_all(&bytes).map(|()| bytes.len() as u64)?,
            Object::File(path) => io::copy(&mut File::open(path)?, &mut file)?,
        };
        if written != content.size {
            let short = format!("its local copy has {written} bytes");
            return Err(Failure::Content(*content, short.into()));
        }
        Ok(())
    }

    fn link(&mut self, first: &Path, path: &Path) -> Result<()> {
        let (from, first_name) = self.at(first)?;
        let (directory, name) = self.at(path)?;
        let whole = self.mount.join(path);
        self.done.changed += 1;
        rustix::fs::linkat(&*from, first_name, &*directory, &self.temporary, AtFlags::empty()).at("link", &whole)?;
        let renamed = rustix::fs::renameat(&*directory, &self.temporary, &*directory, name).at("replace", &whole);
        // Renaming one name of an inode over another does nothing and leaves both.
        match rustix::fs::unlinkat(&*directory, &self.temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => renamed,
            Err(error) => renamed.and(Err(Error::io("remove the temporary name of", whole, error))),
        }
    }

    /// Gives an entry the attributes that it does not have yet.
    fn set_attributes(&self, fd: &OwnedFd, path: &Path, to: &Attributes) -> Result<()> {
        io::Result::at(self.try_attributes(fd, to), "set the attributes of", self.mount.join(path))
    }

    fn try_attributes(&self, fd: &OwnedFd, to: &Attributes) -> io::Result<()> {
        let is = rustix::fs::fstat(fd)?;
        let kind = FileType::from_raw_mode(is.st_mode);
        // A descriptor opened with `O_PATH` has no other handle for modes and xattrs.
        let through = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let owner = to.owner.unwrap_or(self.owner);
        let mut mode = is.st_mode & 0o7777;
        if (is.st_uid, is.st_gid) != (owner.uid, owner.gid) {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            rustix::fs::chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            // Giving a file away clears its set-id bits.
            mode = rustix::fs::fstat(fd)?.st_mode & 0o7777;
        }
        if kind != FileType::Symlink && mode != to.mode {
            rustix::fs::chmod(&through, Mode::from_raw_mode(to.mode))?;
        }
        if matches!(kind, FileType::RegularFile | FileType::Directory) {
            try_xattrs(&through, to)?;
        }
        if (is.st_mtime, is.st_mtime_nsec as u32) != (to.mtime.seconds, to.mtime.nanos) {
            let mtime = Timespec { tv_sec: to.mtime.seconds, tv_nsec: i64::from(to.mtime.nanos) };
            let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
            let times = Timestamps { last_access: omit, last_modification: mtime };
            rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }
}

/// Why a file could not be written.
enum Failure {
    Io(io::Error),
    Content(Blob, Box<dyn std::error::Error + Send + Sync>),
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Io(error.into())
    }
}

impl Failure {
    fn at(self, path: &Path) -> Error {
        match self {
            Self::Io(error) => Error::io("write", path, error),
            Self::Content(content, error) => {
                Error::store(format!("read content {content} of {}", path.display()), error)
            }
        }
    }
}

/// Does something that needs a free name; if a socket or device node, which no tree mentions, has it, that goes first.
fn unless_in_the_way(
    directory: &OwnedFd,
    name: &OsStr,
    attempt: impl Fn() -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    match attempt() {
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
            attempt()
        }
        result => result,
    }
}

/// Removes an entry and all that is in it, with no more open descriptors than one.
fn remove(root: std::os::fd::BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let parent = walk::open_beneath(root, path.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
    let name = path.file_name().unwrap_or_default();
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        result => return Ok(result?),
    }
    let mut directories = vec![path.to_owned()];
    let mut next = 0;
    while next < directories.len() {
        let directory = walk::open_directory(root, &directories[next])?;
        for name in walk::names(directory.as_fd())? {
            match rustix::fs::unlinkat(&directory, OsStr::from_bytes(&name), AtFlags::empty()) {
                Err(Errno::ISDIR) => directories.push(walk::join(&directories[next], &name)),
                result => result?,
            }
        }
        next += 1;
    }
    for path in directories.iter().rev() {
        let parent =
            walk::open_beneath(root, path.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::unlinkat(&parent, path.file_name().unwrap_or_default(), AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// Gives a file or directory exactly these `user.*` xattrs.
fn try_xattrs(through: &str, to: &Attributes) -> io::Result<()> {
    let read = rustix::fs::openat(
        rustix::fs::CWD,
        through,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut are = walk::xattrs(read.as_fd())?;
    are.retain(|name, _| name.starts_with(b"user."));
    for name in are.keys().filter(|name| !to.xattrs.contains_key(*name)) {
        rustix::fs::removexattr(through, name.as_slice())?;
    }
    for (name, value) in to.xattrs.iter().filter(|(name, value)| are.get(*name) != Some(*value)) {
        rustix::fs::setxattr(through, name.as_slice(), value, XattrFlags::empty())?;
    }
    Ok(())
}
