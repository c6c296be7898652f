//! A new directory that holds a tree: complete, or not there by its name.
//!
//! It is written under another name, beneath a directory that nothing leads out of: no symbolic link is followed. Whoever
//! was interrupted goes on with what is there by then; what is there is read again before it is named.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use aether_cas::transfer::read_directories;
use aether_cas::tree::{Directory, MemoryDirectories, Owner};
use aether_cas::{Blob, Store};
use aether_engine::restore;
use aether_engine::scan::{Options, Sink, scan};
use bytes::Bytes;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::contents::Contents;
use super::{PARTIAL, free, tree};
use crate::cli::Folder;
use crate::crash::crash_point;
use crate::failure::{Failure, Kind, Reason};
use crate::losses::Losses;
use crate::report::Exported;

/// Writes the tree, unless it is there. `scratch` is for contents that are on their way.
///
/// # Errors
/// With the reason for the request's status, and whether the same may succeed later.
pub async fn export(asked: &Folder, scratch: &Path, store: Arc<dyn Store>) -> Result<Exported, Failure> {
    let directories = read_directories(&*store, asked.root).await?;
    let (asked, spool, runtime) = (asked.clone(), scratch.join("content"), tokio::runtime::Handle::current());
    let work = move || {
        let _within = runtime.enter();
        write(&asked, spool, directories, store)
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::other("write the directory", error))?
}

fn write(
    asked: &Folder,
    spool: PathBuf,
    directories: MemoryDirectories,
    store: Arc<dyn Store>,
) -> Result<Exported, Failure> {
    let mut losses = Losses::default();
    let mut root = tree::shown(&asked.root, &directories, &mut losses)?;
    if !rustix::process::geteuid().is_root() {
        root = tree::without_owners(&root, &directories, &mut losses)?;
    }
    let mut exported = Exported {
        root: asked.root.to_string(),
        place: place(asked),
        warnings: losses.warnings(),
        ..Exported::default()
    };
    let counts = aether_cas::tree::summary(&root, &directories)?;
    (exported.files, exported.bytes) = (counts.files, counts.bytes);

    let (parent, name) = way(asked)?;
    let called = PathBuf::from(place(asked));
    let refused = |error: Errno| failed("use", &called, error);
    match open(parent.as_fd(), Path::new(&name), OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(there) => {
            if read(&there, &directories)? != tree::comparable(&root, &directories)? {
                let message = format!(
                    "there is a directory {} already, and it does not hold this tree: export to another path, or have it removed",
                    place(asked)
                );
                return Err(Failure::new(Reason::TargetExists, message));
            }
            return Ok(Exported { found: true, ..exported });
        }
        Err(Errno::NOENT) => {}
        Err(Errno::LOOP | Errno::NOTDIR) => {
            let message = format!("there is something called {} already: export to another path", place(asked));
            return Err(Failure::new(Reason::TargetExists, message));
        }
        Err(error) => return Err(refused(error)),
    }

    let partial_name: OsString = [&name, OsStr::new(PARTIAL)].into_iter().collect();
    match rustix::fs::mkdirat(&parent, &partial_name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(refused(error)),
    }
    let partial =
        open(parent.as_fd(), Path::new(&partial_name), OFlags::RDONLY | OFlags::DIRECTORY).map_err(refused)?;
    hold(&parent, &partial_name, &partial)?;
    // By now nobody else gives anything that name; but somebody may have done so since it was looked for.
    if rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
        let _ = rustix::fs::unlinkat(&parent, &partial_name, AtFlags::REMOVEDIR);
        return Err(busy());
    }
    crash_point!("export.folder.made");

    let about = rustix::fs::fstat(&partial).map_err(refused)?;
    let owner = Owner { uid: about.st_uid, gid: about.st_gid };
    let at = through(&partial);
    let found = scanned(&at, owner, &directories)?;
    let plan = restore::plan(&found, &root, &directories).map_err(|error| Failure::other("compare", error))?;
    let contents = Contents::new(store, plan.contents(), spool);
    exported.written = plan.contents().count() as u64;
    plan.apply(&at, owner, &contents, None).map_err(|error| Failure::other("write the directory", error))?;
    if read(&partial, &directories)? != tree::comparable(&root, &directories)? {
        let message = format!("{}{PARTIAL} is not what was written to it", place(asked));
        return Err(Failure::new(Reason::CommitFailed, message));
    }
    rustix::fs::syncfs(&partial).map_err(refused)?;
    crash_point!("export.folder.written");
    rename(&parent, &partial_name, &name).map_err(refused)?;
    rustix::fs::fsync(&parent).map_err(refused)?;
    crash_point!("export.folder.renamed");
    Ok(exported)
}

/// What the new directory is called, for people who do not see where the claim is mounted.
fn place(asked: &Folder) -> String {
    let claim = asked.claim.as_deref().map(Path::new).unwrap_or(Path::new(""));
    claim.join(&asked.path).display().to_string()
}

/// Opens the directory in which the new one is to be, and makes it where it is not there.
fn way(asked: &Folder) -> Result<(OwnedFd, OsString), Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at = rustix::fs::open(&asked.beneath, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed("open", &asked.beneath, error))?;
    let mut names = Vec::new();
    for component in asked.path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::CurDir => {}
            _ => names.clear(),
        }
    }
    let plain = asked.path.is_relative() && asked.path.components().all(|part| !matches!(part, Component::ParentDir));
    let Some((name, parents)) = names.split_last().filter(|_| plain) else {
        let message = format!("--path {} is not a relative path without ..", asked.path.display());
        return Err(Failure::new(Reason::Invalid, message));
    };
    free(&place(asked), names.iter().copied())?;
    for parent in parents {
        let step = Path::new(parent);
        match rustix::fs::mkdirat(&at, step, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("make", step, error)),
        }
        at = open(at.as_fd(), step, flags).map_err(|error| failed("open", step, error))?;
    }
    Ok((at, (*name).to_owned()))
}

fn open(at: BorrowedFd<'_>, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(at, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)
}

/// One process at a time writes a directory; and it is still the one of that name.
fn hold(parent: &OwnedFd, name: &OsStr, directory: &OwnedFd) -> Result<(), Failure> {
    rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive).map_err(|_| busy())?;
    let there = open(parent.as_fd(), Path::new(name), OFlags::PATH).map_err(|_| busy())?;
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|about| (about.st_dev, about.st_ino));
    if inode(&there).ok() == inode(directory).ok() { Ok(()) } else { Err(busy()) }
}

/// Gives a complete directory its name, which nothing else has.
fn rename(parent: &OwnedFd, partial: &OsStr, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(parent, partial, parent, name, RenameFlags::NOREPLACE) {
        // File systems of other machines, such as NFS and CephFS, have only the plain kind.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_plainly(parent, partial, name),
        renamed => renamed,
    }
}

/// What gets the name in between is not lost either: a directory takes the place of nothing but an empty one.
fn rename_plainly(parent: &OwnedFd, partial: &OsStr, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Err(Errno::EXIST),
        Err(Errno::NOENT) => rustix::fs::renameat(parent, partial, parent, name),
        Err(error) => Err(error),
    }
}

fn busy() -> Failure {
    Failure::new(Reason::CommitFailed, "another run writes the same directory")
}

/// A path that leads to an open directory and nowhere else.
fn through(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// Keeps the directories of a scan.
struct Keep<'a>(&'a MemoryDirectories);

impl Sink for Keep<'_> {
    fn content(&self, _: &Blob, _: &Path, _: &File) -> aether_engine::Result<()> {
        Ok(())
    }

    fn directory(&self, blob: &Blob, message: Bytes) -> aether_engine::Result<()> {
        let directory = Directory::decode(&message)
            .map_err(|error| aether_engine::Error::store(format!("keep directory {blob}"), error))?;
        self.0.insert(directory);
        Ok(())
    }
}

/// The tree of a directory.
fn scanned(at: &Path, owner: Owner, directories: &MemoryDirectories) -> Result<Blob, Failure> {
    let options = Options { owner, mtime: None, progress: None };
    let scanned = scan(at, options, &Keep(directories)).map_err(|error| Failure::other("read the directory", error))?;
    Ok(scanned.root)
}

/// What is in a directory, to be compared.
fn read(directory: &OwnedFd, directories: &MemoryDirectories) -> Result<Blob, Failure> {
    let about = rustix::fs::fstat(directory).map_err(|error| Failure::other("read the directory", error))?;
    let owner = Owner { uid: about.st_uid, gid: about.st_gid };
    let root = scanned(&through(directory), owner, directories)?;
    Ok(tree::comparable(&root, directories)?)
}

fn failed(action: &str, path: &Path, error: Errno) -> Failure {
    let failure = Failure::new(Reason::CommitFailed, format!("cannot {action} {}: {error}", path.display()));
    match error {
        // A symbolic link in the way, or something that is no directory.
        Errno::LOOP | Errno::NOTDIR | Errno::XDEV | Errno::EXIST | Errno::NOTEMPTY => {
            Failure { reason: Reason::TargetExists, kind: Kind::Permanent, ..failure }
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For file systems that have no other rename, of which none is at hand.
    #[test]
    fn a_plain_rename_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("new.partial")).unwrap();
        std::fs::write(at("new.partial/file"), "new").unwrap();
        std::fs::write(at("file"), "theirs").unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        let parent = rustix::fs::open(folder.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let rename = |name: &str| rename_plainly(&parent, OsStr::new("new.partial"), OsStr::new(name));
        for taken in ["file", "directory", "link"] {
            assert_eq!(rename(taken), Err(Errno::EXIST), "{taken}");
        }
        assert_eq!(rename("new"), Ok(()));
        assert_eq!(std::fs::read(at("new/file")).unwrap(), b"new");
        assert_eq!(std::fs::read(at("file")).unwrap(), b"theirs");
        assert!(!at("new.partial").exists() && at("directory").is_dir() && at("link").is_symlink());
    }
}
