//! One operation of a user on a directory hierarchy, and how to pick one at random.
//!
//! Paths are chosen when a scenario is made, so that an operation means the same when others are taken out of the
//! list. One that no longer makes sense fails as it would for a user, and that is ignored.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::fs::{AtFlags, CWD, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};

/// One operation, on paths relative to the root.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Write { path: PathBuf, fill: u8, size: u64 },
    Append { path: PathBuf, fill: u8, size: u64 },
    Overwrite { path: PathBuf, offset: u64, fill: u8, size: u64 },
    Truncate { path: PathBuf, size: u64 },
    OpenForWriting { path: PathBuf },
    WriteAfterRename { from: PathBuf, to: PathBuf, fill: u8 },
    Save { path: PathBuf, fill: u8 },
    TemporaryFile { path: PathBuf, fill: u8 },
    CreateDirectory { path: PathBuf },
    CreateDirectories { path: PathBuf },
    RemoveDirectory { path: PathBuf },
    RemoveAll { path: PathBuf },
    Remake { path: PathBuf },
    Unlink { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
    RenameOver { from: PathBuf, to: PathBuf },
    Exchange { a: PathBuf, b: PathBuf },
    Swap { a: PathBuf, b: PathBuf },
    ThereAndBack { from: PathBuf, to: PathBuf },
    SetMode { path: PathBuf, mode: u32 },
    SetOwner { path: PathBuf, uid: u32, gid: u32 },
    SetTimes { path: PathBuf, seconds: i64, nanos: u32 },
    SetXattr { path: PathBuf, name: u8, size: usize },
    RemoveXattr { path: PathBuf, name: u8 },
    Symlink { path: PathBuf, target: String },
    Link { from: PathBuf, to: PathBuf },
    Fifo { path: PathBuf },
    Socket { path: PathBuf },
}

use Operation::*;

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// What is there to operate on.
#[derive(Default)]
pub(crate) struct Listing {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) directories: Vec<PathBuf>,
    pub(crate) others: Vec<PathBuf>,
}

impl Listing {
    /// Lists a hierarchy; the root is not in it.
    pub(crate) fn of(root: &Path) -> Self {
        let mut listing = Self::default();
        let mut todo = vec![PathBuf::new()];
        while let Some(directory) = todo.pop() {
            let mut entries: Vec<_> =
                fs::read_dir(root.join(&directory)).expect("list").map(|entry| entry.expect("list")).collect();
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                let path = directory.join(entry.file_name());
                let kind = entry.file_type().expect("type");
                if kind.is_dir() {
                    listing.directories.push(path.clone());
                    todo.push(path);
                } else if kind.is_file() {
                    listing.files.push(path);
                } else {
                    listing.others.push(path);
                }
            }
        }
        listing
    }

    fn any(&self, random: &mut StdRng) -> Option<PathBuf> {
        let total = self.files.len() + self.directories.len() + self.others.len();
        let number = random.random_range(0..total.max(1));
        self.files.iter().chain(&self.directories).chain(&self.others).nth(number).cloned()
    }

    fn file(&self, random: &mut StdRng) -> Option<PathBuf> {
        self.files.choose(random).cloned()
    }

    fn directory(&self, random: &mut StdRng) -> Option<PathBuf> {
        self.directories.choose(random).cloned()
    }

    /// A path that may be free: names are few, so that things meet.
    fn place(&self, random: &mut StdRng) -> PathBuf {
        let parent = if random.random_bool(0.3) { None } else { self.directory(random) };
        let name = ["a", "b", "c", "d", "ä\u{1}", "long-name-of-a-file"].choose(random).expect("names");
        parent.unwrap_or_default().join(name)
    }
}

/// Picks an operation; `None` if what it needs is not there.
pub(crate) fn pick(random: &mut StdRng, listing: &Listing) -> Option<Operation> {
    let fill = random.random();
    let size = *[0, 1, 7, 100, 5000].choose(random).expect("sizes");
    Some(match random.random_range(0..44) {
        0..3 => Write { path: listing.place(random), fill, size },
        3 => Write { path: listing.file(random)?, fill, size },
        4 | 5 => Append { path: listing.file(random)?, fill, size },
        6 => Overwrite { path: listing.file(random)?, offset: random.random_range(0..200), fill, size },
        7 => Truncate { path: listing.file(random)?, size },
        8 => OpenForWriting { path: listing.file(random)? },
        9 => WriteAfterRename { from: listing.file(random)?, to: listing.place(random), fill },
        10 => Save { path: listing.file(random)?, fill },
        11 => TemporaryFile { path: listing.place(random), fill },
        12 | 13 => CreateDirectory { path: listing.place(random) },
        14 => CreateDirectories { path: listing.place(random).join("x/y") },
        15 => RemoveDirectory { path: listing.directory(random)? },
        16 | 17 => RemoveAll { path: listing.any(random)? },
        18 => Remake { path: listing.directory(random)? },
        19 | 20 => Unlink { path: listing.file(random)? },
        21 => Unlink { path: listing.any(random)? },
        22..25 => Rename { from: listing.directory(random)?, to: listing.place(random) },
        25 | 26 => Rename { from: listing.any(random)?, to: listing.place(random) },
        27 => RenameOver { from: listing.any(random)?, to: listing.any(random)? },
        28 => Exchange { a: listing.any(random)?, b: listing.any(random)? },
        29 => Exchange { a: listing.directory(random)?, b: listing.directory(random)? },
        30 => Swap { a: listing.directory(random)?, b: listing.directory(random)? },
        31 => ThereAndBack { from: listing.any(random)?, to: listing.place(random) },
        32 => SetMode {
            path: listing.any(random)?,
            mode: *[0o644, 0o755, 0o600, 0o000, 0o4755, 0o1777].choose(random).expect("modes"),
        },
        33 => SetOwner { path: listing.any(random)?, uid: random.random_range(0..3), gid: random.random_range(0..3) },
        34 | 35 => SetTimes {
            path: listing.any(random)?,
            seconds: random.random_range(0..2_000_000_000),
            nanos: random.random_range(0..1_000_000_000),
        },
        36 | 37 => {
            SetXattr { path: listing.any(random)?, name: random.random_range(0..3), size: size.min(300) as usize }
        }
        38 => RemoveXattr { path: listing.any(random)?, name: random.random_range(0..3) },
        39 => Symlink { path: listing.place(random), target: format!("../t{}", random.random_range(0..9)) },
        40 | 41 => Link { from: listing.file(random)?, to: listing.place(random) },
        42 => Link { from: listing.any(random)?, to: listing.place(random) },
        43 if random.random_bool(0.8) => Fifo { path: listing.place(random) },
        _ => Socket { path: listing.place(random) },
    })
}

impl Operation {
    /// Does it. A refusal by the file system is as good an outcome as any.
    pub(crate) fn run(&self, root: &Path) {
        let _refused = self.attempt(root);
    }

    fn attempt(&self, root: &Path) -> std::io::Result<()> {
        let at = |path: &PathBuf| root.join(path);
        let fill = |byte: &u8, size: &u64| vec![*byte; *size as usize];
        match self {
            Write { path, fill: byte, size } => {
                refuse_special(&at(path))?;
                fs::write(at(path), fill(byte, size))
            }
            Append { path, fill: byte, size } => existing(&at(path), |o| o.append(true))?.write_all(&fill(byte, size)),
            Overwrite { path, offset, fill: byte, size } => {
                let mut file = existing(&at(path), |o| o.write(true))?;
                file.seek(SeekFrom::Start(*offset))?;
                file.write_all(&fill(byte, size))
            }
            Truncate { path, size } => existing(&at(path), |o| o.write(true))?.set_len(*size),
            OpenForWriting { path } => existing(&at(path), |o| o.write(true)).map(drop),
            WriteAfterRename { from, to, fill: byte } => {
                let mut file = existing(&at(from), |o| o.write(true).read(true))?;
                fs::rename(at(from), at(to))?;
                file.write_all(&fill(byte, &3))
            }
            Save { path, fill: byte } => {
                let temporary = at(&path.with_extension("tmp"));
                fs::write(&temporary, fill(byte, &50))?;
                fs::rename(temporary, at(path))
            }
            TemporaryFile { path, fill: byte } => {
                let parent = at(&path.parent().map(Path::to_owned).unwrap_or_default());
                let mut file = OpenOptions::new()
                    .write(true)
                    .mode(0o640)
                    .custom_flags(rustix::fs::OFlags::TMPFILE.bits() as i32)
                    .open(parent)?;
                file.write_all(&fill(byte, &20))?;
                Ok(rustix::fs::linkat(&file, "", CWD, at(path), AtFlags::EMPTY_PATH)?)
            }
            CreateDirectory { path } => fs::create_dir(at(path)),
            CreateDirectories { path } => fs::create_dir_all(at(path)),
            RemoveDirectory { path } => fs::remove_dir(at(path)),
            RemoveAll { path } => remove_all(&at(path)),
            Remake { path } => {
                fs::remove_dir_all(at(path))?;
                fs::create_dir(at(path))
            }
            Unlink { path } => fs::remove_file(at(path)),
            Rename { from, to } => Ok(rustix::fs::renameat_with(CWD, at(from), CWD, at(to), RenameFlags::NOREPLACE)?),
            RenameOver { from, to } => fs::rename(at(from), at(to)),
            Exchange { a, b } => Ok(rustix::fs::renameat_with(CWD, at(a), CWD, at(b), RenameFlags::EXCHANGE)?),
            Swap { a, b } => {
                let aside = root.join("aside");
                fs::rename(at(a), &aside)?;
                fs::rename(at(b), at(a))?;
                fs::rename(aside, at(b))
            }
            ThereAndBack { from, to } => {
                fs::rename(at(from), at(to))?;
                fs::rename(at(to), at(from))
            }
            SetMode { path, mode } => {
                // Never through a symbolic link: its target may lie anywhere.
                if fs::symlink_metadata(at(path))?.is_symlink() {
                    return Ok(());
                }
                Ok(rustix::fs::chmod(at(path), Mode::from_raw_mode(*mode))?)
            }
            SetOwner { path, uid, gid } => std::os::unix::fs::lchown(at(path), Some(*uid), Some(*gid)),
            SetTimes { path, seconds, nanos } => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: i64::from(*nanos) };
                let times = Timestamps { last_access: time, last_modification: time };
                Ok(rustix::fs::utimensat(CWD, at(path), &times, AtFlags::SYMLINK_NOFOLLOW)?)
            }
            SetXattr { path, name, size } => {
                let value = vec![b'v'; *size];
                Ok(rustix::fs::lsetxattr(at(path), format!("user.x{name}"), &value, XattrFlags::empty())?)
            }
            RemoveXattr { path, name } => Ok(rustix::fs::lremovexattr(at(path), format!("user.x{name}"))?),
            Symlink { path, target } => std::os::unix::fs::symlink(target, at(path)),
            Link { from, to } => fs::hard_link(at(from), at(to)),
            Fifo { path } => Ok(rustix::fs::mkfifoat(CWD, at(path), Mode::from_raw_mode(0o620))?),
            Socket { path } => std::os::unix::net::UnixListener::bind(at(path)).map(drop),
        }
    }
}

/// Opens what must exist as a regular file.
fn existing(path: &Path, how: impl FnOnce(&mut OpenOptions) -> &mut OpenOptions) -> std::io::Result<File> {
    refuse_special(path)?;
    how(&mut OpenOptions::new()).open(path)
}

/// Opening a fifo waits for the other end, and a symbolic link may lead anywhere.
fn refuse_special(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.is_symlink() || about.file_type().is_fifo() || about.file_type().is_socket() => {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        _ => Ok(()),
    }
}

fn remove_all(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}
