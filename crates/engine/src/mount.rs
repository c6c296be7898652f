//! The kernel's mount API: overlays, EROFS images, bind mounts, and what is mounted where.
//!
//! Promises: no option is left to a distribution's default; a mount appears at its place complete or not at all (it is
//! made detached and then moved there); nothing here calls into a file system that could hang to learn what is mounted.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount as sysmount;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::error::{Context, Error, Result};
use crate::mounted;
use crate::sys::{self, MountChange};

/// The kernel copies at most this many bytes of an option's value, its end included (`strndup_user` in fsconfig(2)).
const OPTION_LIMIT: usize = 256;

/// One overlay, described layer by layer.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// Shown as the source in mount tables; the session's name.
    pub name: String,
    /// The lower layer: the tree's metadata.
    pub lower: PathBuf,
    /// Data-only layers, in the order in which the kernel looks a content up in them.
    pub data: Vec<PathBuf>,
    /// `(upper, work)`; none makes a read-only view.
    pub upper: Option<(PathBuf, PathBuf)>,
}

/// Options that differ between distributions; every one is named. `index` and `nfs_export` would tie an upper to its
/// file handles, so that a snapshot of it does not mount (ESTALE); `xino` would change inode numbers with the layers.
const OVERLAY_OPTIONS: [(&str, &str); 5] =
    [("index", "off"), ("nfs_export", "off"), ("xino", "off"), ("metacopy", "on"), ("redirect_dir", "on")];

impl Overlay {
    /// Mounts it at `target`, with `nosuid,nodev`, which every bind mount of it inherits.
    ///
    /// # Errors
    ///
    /// `Io` with the kernel's own explanation; `Invalid` for a path too long for the mount API.
    pub fn mount(&self, target: &Path) -> Result<()> {
        match self.create() {
            Ok(mount) => attach(mount.as_fd(), target),
            Err(error) if is_unknown_option(&error) => self.mount_legacy(target),
            Err(error) => Err(error),
        }
    }

    fn create(&self) -> Result<OwnedFd> {
        let context = FsContext::open("overlay")?;
        context.set("source", self.name.as_bytes())?;
        context.set_path("lowerdir+", &self.lower)?;
        for data in &self.data {
            context.set_path("datadir+", data)?;
        }
        if let Some((upper, work)) = &self.upper {
            context.set_path("upperdir", upper)?;
            context.set_path("workdir", work)?;
        }
        for (key, value) in OVERLAY_OPTIONS {
            context.set(key, value.as_bytes())?;
        }
        let read_only = if self.upper.is_none() { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
        context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | read_only)
    }

    /// As [`mount`](Self::mount), with mount(2): Linux 6.6 knows data-only layers only in the one `lowerdir` string,
    /// which the new API cuts at 256 bytes.
    pub fn mount_legacy(&self, target: &Path) -> Result<()> {
        let escape = |path: &Path| {
            let mut escaped = Vec::new();
            for byte in path.as_os_str().as_bytes() {
                if matches!(byte, b':' | b',' | b'\\') {
                    escaped.push(b'\\');
                }
                escaped.push(*byte);
            }
            escaped
        };
        let mut options = b"lowerdir=".to_vec();
        options.extend(escape(&self.lower));
        for data in &self.data {
            options.extend_from_slice(b"::");
            options.extend(escape(data));
        }
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
        match &self.upper {
            Some((upper, work)) => {
                for (key, path) in [("upperdir", upper), ("workdir", work)] {
                    options.extend_from_slice(format!(",{key}=").as_bytes());
                    options.extend(escape(path));
                }
            }
            None => flags |= MountFlags::RDONLY,
        }
        for (key, value) in OVERLAY_OPTIONS {
            options.extend_from_slice(format!(",{key}={value}").as_bytes());
        }
        let options = std::ffi::CString::new(options)
            .map_err(|_| Error::Invalid { what: "overlay layers".into(), reason: "a path holds a zero byte".into() })?;
        sysmount::mount(self.name.as_str(), target, "overlay", flags, options.as_c_str()).at("mount overlay at", target)
    }
}

fn is_unknown_option(error: &Error) -> bool {
    error.io_kind() == Some(io::ErrorKind::InvalidInput) && error.to_string().contains("Unknown parameter")
}

/// Mounts the EROFS image `image` read-only at `target`: straight from the file where the kernel can (Linux 6.12),
/// else through a loop device.
pub fn mount_erofs(image: &Path, target: &Path) -> Result<()> {
    match erofs(image) {
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::NOTBLK.raw_os_error()) => {
            mount_erofs_through_loop(image, target)
        }
        other => attach(other?.as_fd(), target),
    }
}

/// As [`mount_erofs`], always through a loop device, which ends with the mount.
pub fn mount_erofs_through_loop(image: &Path, target: &Path) -> Result<()> {
    let file = File::open(image).at("open image", image)?;
    let (_device, path) = sys::loop_attach(&file, image, true).at("attach to a loop device", image)?;
    attach(erofs(&path)?.as_fd(), target)
}

/// The image mounted straight from its file, not yet at any place. Fails with ENOTBLK before Linux 6.12.
pub(crate) fn erofs(source: &Path) -> Result<OwnedFd> {
    let context = FsContext::open("erofs")?;
    context.set_path("source", source)?;
    sysmount::fsconfig_set_flag(&context.fd, "ro").map_err(|error| context.explain("ro", error))?;
    context
        .mount(MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// Lets a file system that was made read-only be written again.
pub(crate) fn remount_writable(target: &Path) -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    sysmount::mount_remount(target, flags, c"").at("remount", target)
}

/// What becomes of space that is freed on a btrfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Discard {
    /// The file system keeps it.
    Never,
    /// It goes back to whatever is below.
    Async,
    /// As the kernel thinks best for the device.
    Default,
}

/// Mounts the btrfs file system of `device` at `target`.
pub(crate) fn mount_btrfs(device: &Path, target: &Path, discard: Discard) -> Result<()> {
    let context = FsContext::open("btrfs")?;
    context.set_path("source", device)?;
    match discard {
        Discard::Never => sysmount::fsconfig_set_flag(&context.fd, "nodiscard")
            .map_err(|error| context.explain("nodiscard", error))?,
        Discard::Async => context.set("discard", b"async")?,
        Discard::Default => {}
    }
    // The pool's own data is already spread over many small files; access times would turn every read into a write.
    let mount = context.mount(
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOATIME,
    )?;
    attach(mount.as_fd(), target)
}

/// Mounts an empty tmpfs of at most `bytes` at `target`, for root alone.
pub(crate) fn mount_tmpfs(target: &Path, bytes: u64) -> Result<()> {
    let context = FsContext::open("tmpfs")?;
    context.set("size", bytes.to_string().as_bytes())?;
    context.set("mode", b"700")?;
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    attach(mount.as_fd(), target)
}

/// Makes what is mounted at (or lies at) `source` appear at `target` too, with `nosuid,nodev`; existing mounts below
/// `source` do not come along.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    let tree = sysmount::open_tree(
        CWD,
        source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_NO_AUTOMOUNT,
    )
    .at("clone mount", source)?;
    let hardened = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let read_only_flag = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let change = if read_only {
        MountChange { set: (hardened | read_only_flag).bits(), ..MountChange::default() }
    } else {
        // The clone inherits the flags of its source, which after a restart may be a pod's read-only mount.
        MountChange { set: hardened.bits(), clear: read_only_flag.bits(), ..MountChange::default() }
    };
    sys::mount_setattr(tree.as_fd(), change).at("set attributes of a mount of", source)?;
    attach(tree.as_fd(), target)
}

/// Makes the overlay at `target` forget in which layer it found contents that nobody has open: they are looked for anew,
/// in the order of the layers. Changes nothing else.
///
/// For an overlay that met a layer which failed, once the contents are in an earlier one.
pub fn rebind(target: &Path) -> Result<()> {
    // The kernel drops what it knows of a file system's names whenever that is configured anew.
    let context = sysmount::fspick(CWD, target, FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT)
        .at("pick the file system at", target)?;
    sysmount::fsconfig_reconfigure(&context).at("configure anew the overlay at", target)
}

/// Turns `directory` into a mount point of its own whose mounts are told to nobody else.
///
/// Thousands of session mounts would otherwise be copied into the mount namespace of every pod that has host
/// propagation.
pub fn isolate(directory: &Path) -> Result<()> {
    if find_mount(directory)?.is_none() {
        bind(directory, directory, false)?;
    }
    let mount = sysmount::open_tree(CWD, directory, OpenTreeFlags::OPEN_TREE_CLOEXEC).at("open mount", directory)?;
    let change = MountChange { propagation: libc::MS_PRIVATE, ..MountChange::default() };
    sys::mount_setattr(mount.as_fd(), change).at("make private the mount at", directory)
}

fn attach(mount: BorrowedFd<'_>, target: &Path) -> Result<()> {
    // Without MOVE_MOUNT_T_SYMLINKS a symbolic link planted as the target is refused, not followed.
    sysmount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).at("attach mount at", target)
}

/// Takes the mount at `target` out of the tree. Processes that still use it keep it until they are done. Nothing
/// mounted there is success.
pub fn unmount_lazy(target: &Path) -> Result<()> {
    unmount_with(target, UnmountFlags::DETACH)
}

/// How long to wait for users that are about to let go.
pub(crate) const PASSING_USE: Duration = Duration::from_millis(500);

/// Unmounts `target`; fails with EBUSY while it is used. Nothing mounted there is success.
///
/// A use that passes by itself is waited out: a child of this process holds its files between fork and exec, and who
/// reads a link in `/proc/PID/fd` holds the mount for that moment.
pub fn unmount(target: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        match unmount_with(target, UnmountFlags::empty()) {
            Err(Error::Io { source, .. })
                if source.kind() == std::io::ErrorKind::ResourceBusy && began.elapsed() < PASSING_USE =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Unmounts, lazily, everything at and below `directory` in this namespace.
pub fn unmount_below(directory: &Path) -> Result<()> {
    for entry in table()?.iter().rev().filter(|entry| entry.target.starts_with(directory)) {
        unmount_lazy(&entry.target)?;
    }
    Ok(())
}

/// Whether something is mounted at `path`, without reading the mount table. The file system there is asked nothing: no
/// field is wanted, and what it would have to fetch is not (a dead FUSE mount answers so).
pub(crate) fn is_mountpoint(path: &Path) -> Result<bool> {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    match rustix::fs::statx(CWD, path, flags, StatxFlags::empty()) {
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(Error::io("look at", path, error)),
    }
}

fn unmount_with(target: &Path, flags: UnmountFlags) -> Result<()> {
    match sysmount::unmount(target, flags | UnmountFlags::NOFOLLOW) {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io("unmount", target, error)),
    }
}

/// A file system being configured with fsconfig(2).
struct FsContext {
    fd: OwnedFd,
    kind: &'static str,
}

impl FsContext {
    fn open(kind: &'static str) -> Result<Self> {
        let fd = sysmount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
            Errno::NODEV => Error::Unsupported {
                what: format!("the {kind} file system"),
                remedy: format!("this kernel does not have it; load the module {kind} or use a kernel that has it"),
            },
            error => Error::io("open a mount context of", kind, error),
        })?;
        Ok(Self { fd, kind })
    }

    fn set(&self, key: &'static str, value: &[u8]) -> Result<()> {
        if value.len() >= OPTION_LIMIT {
            return Err(Error::Invalid {
                what: String::from_utf8_lossy(value).into_owned(),
                reason: format!(
                    "longer than the {} bytes that the mount API takes; use a shorter root directory",
                    OPTION_LIMIT - 1
                ),
            });
        }
        sysmount::fsconfig_set_string(&self.fd, key, value).map_err(|error| self.explain(key, error))
    }

    fn set_path(&self, key: &'static str, path: &Path) -> Result<()> {
        self.set(key, path.as_os_str().as_bytes())
    }

    fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd> {
        sysmount::fsconfig_create(&self.fd).map_err(|error| self.explain("create", error))?;
        sysmount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|error| self.explain("mount", error))
    }

    /// The kernel leaves its explanation in the context; without it EINVAL says nothing.
    fn explain(&self, step: &'static str, error: Errno) -> Error {
        let mut said = String::new();
        let mut line = [0_u8; 1024];
        while let Ok(n) = rustix::io::read(&self.fd, &mut line) {
            if n == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line[..n]);
            let text = text.trim_end();
            let text = ["e ", "w ", "i "].iter().find_map(|level| text.strip_prefix(level)).unwrap_or(text);
            said.push_str(if said.is_empty() { "" } else { "; " });
            said.push_str(text);
        }
        // The errno stays as it is: callers tell cases apart by it.
        let detail = if said.is_empty() { step.to_owned() } else { format!("{step}: {said}") };
        Error::io("configure a mount of", format!("{} ({detail})", self.kind), error)
    }
}

// ------------------------------------------------------------------------------------------------- what is mounted

/// One line of a mount table (`/proc/<pid>/mountinfo`, see proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique while the mount exists.
    pub id: u64,
    /// The mount it lies on.
    pub parent: u64,
    /// `major:minor` of its files.
    pub device: String,
    /// What part of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Options of this mount.
    pub options: String,
    /// `overlay`, `erofs`, `btrfs`, ...
    pub fs_type: String,
    /// What the mount was given as its source.
    pub source: PathBuf,
    /// Options of the file system.
    pub super_options: Vec<u8>,
}

impl MountEntry {
    /// `ro` is among this mount's options.
    pub fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }

    /// The value of a file system option that names a path, such as `upperdir`.
    pub fn super_option(&self, key: &str) -> Option<PathBuf> {
        split_options(&self.super_options).find_map(|option| {
            let value = option.strip_prefix(key.as_bytes())?.strip_prefix(b"=")?;
            Some(PathBuf::from(OsString::from_vec(unescape_option(value))))
        })
    }
}

/// Overlayfs escapes commas inside a value with a backslash.
fn split_options(options: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut escaped = false;
    options.split(move |byte| {
        let split = *byte == b',' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        split
    })
}

fn unescape_option(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        out.push(if *byte == b'\\' { *bytes.next().unwrap_or(byte) } else { *byte });
    }
    out
}

/// The mounts of this process's namespace, in the order in which they were made.
///
/// One read suffices: since Linux 5.8 the table is read by cursor, so that a mount that is there throughout is listed
/// exactly once whatever else comes and goes meanwhile.
pub fn table() -> Result<Vec<MountEntry>> {
    // Of the thread, which may have been given a namespace of its own.
    table_of(Path::new("/proc/thread-self/mountinfo"))
}

fn table_of(path: &Path) -> Result<Vec<MountEntry>> {
    let mut text = Vec::with_capacity(64 * 1024);
    File::open(path).and_then(|mut file| file.read_to_end(&mut text)).at("read mount table", path)?;
    Ok(parse_table(&text))
}

/// Lines that do not parse are left out: a table is also read while its process ends.
fn parse_table(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_entry).collect()
}

fn parse_entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || fields.next().map(|field| String::from_utf8_lossy(field).into_owned());
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let device = text()?;
    let root = unescape_path(fields.next()?);
    let target = unescape_path(fields.next()?);
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape_path(fields.next()?);
    let super_options = unescape_octal(fields.next().unwrap_or_default());
    Some(MountEntry { id, parent, device, root, target, options, fs_type, source, super_options })
}

fn unescape_path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape_octal(field)))
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
pub(crate) fn unescape_octal(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            digits
                .iter()
                .try_fold(0_u32, |sum, digit| matches!(digit, b'0'..=b'7').then(|| sum * 8 + u32::from(digit - b'0')))
        };
        match tail.get(..3).filter(|_| *first == b'\\').and_then(octal).and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// The mount that lies at `target` in this namespace, the topmost if several do.
pub fn find_mount(target: &Path) -> Result<Option<MountEntry>> {
    Ok(table()?.into_iter().rfind(|entry| entry.target == target))
}

/// What a path is, as far as can be told without asking a mounted file system anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nothing is there.
    Absent,
    /// A directory with nothing mounted on it.
    Directory,
    /// Something that is not a directory.
    Other,
    /// Something is mounted there.
    Mounted(Box<MountEntry>),
}

/// The path of a mount target as mount tables show it: without symbolic links, but for the last component, which may be
/// mounted on and is not touched.
pub(crate) fn resolve(target: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::Invalid { what: target.display().to_string(), reason: "is no place to mount at".into() });
    };
    match fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        // Nothing is mounted where nothing is.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(target.to_owned()),
        Err(error) => Err(Error::io("resolve", parent, error)),
    }
}

/// Classifies the target of a publish call. A mount is recognised without asking its file system anything, so that a
/// dead one behind it cannot hang the caller.
pub fn classify(target: &Path) -> Result<Target> {
    if let Some(entry) = mounted::at(target)? {
        return Ok(Target::Mounted(Box::new(entry)));
    }
    match fs::symlink_metadata(target) {
        Ok(metadata) if metadata.is_dir() => Ok(Target::Directory),
        Ok(_) => Ok(Target::Other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Target::Absent),
        Err(error) => Err(Error::io("look at", target, error)),
    }
}

/// Whether any overlay anywhere on this kernel writes to `upper`: in whatever mount namespace, and also one that was
/// unmounted lazily and is still in use.
///
/// The kernel marks the directory; with `index=on` it refuses a second user with EBUSY. A work directory on another
/// mount makes the attempt fail right after that check, before anything is written. (`ovl_get_upper` and
/// `ovl_get_workdir` in fs/overlayfs/super.c.) Mount tables could not tell: a path in them is only meaningful in the
/// namespace in which it was mounted.
pub fn upper_in_use(upper: &Path) -> Result<bool> {
    let context = FsContext::open("overlay")?;
    context.set("source", b"in-use?")?;
    context.set("lowerdir", b"/proc")?;
    context.set_path("upperdir", upper)?;
    context.set("workdir", b"/proc")?;
    context.set("index", b"on")?;
    match sysmount::fsconfig_create(&context.fd) {
        Err(Errno::BUSY) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(context.explain("create", error)),
        Ok(()) => Err(Error::Damaged {
            what: format!("the check whether {} is mounted", upper.display()),
            detail: "the kernel accepted a mount that it must refuse".into(),
        }),
    }
}

/// Processes whose mount table lists an overlay with this upper directory, with the place; for error messages.
pub fn holders(upper: &Path) -> Vec<String> {
    let mut namespaces = std::collections::HashSet::new();
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = process.path();
        if !process.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(namespace) = fs::read_link(path.join("ns/mnt")) else { continue };
        if !namespaces.insert(namespace) {
            continue;
        }
        for entry in table_of(&path.join("mountinfo")).unwrap_or_default() {
            if entry.fs_type == "overlay" && entry.super_option("upperdir").as_deref() == Some(upper) {
                found.push(format!("{} of process {}", entry.target.display(), process.file_name().display()));
            }
        }
    }
    found
}

// -------------------------------------------------------------------------------------------- paths and attributes

/// A path to the entry `name` of an open directory for calls that have no form relative to a descriptor; only the
/// last component is looked up, so nobody can redirect it by swapping a directory for a link.
pub fn entry_path(directory: BorrowedFd<'_>, name: &std::ffi::OsStr) -> PathBuf {
    use std::os::fd::AsRawFd;
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    path.push(name);
    path
}

/// All extended attributes of `path` itself (a symbolic link is not followed), names with their namespace prefix.
pub fn xattrs(path: &Path) -> Result<Vec<(OsString, Vec<u8>)>> {
    let names = grow(|buffer| rustix::fs::llistxattr(path, buffer)).at("list extended attributes of", path)?;
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = OsString::from_vec(name.to_vec());
        if let Some(value) = xattr(path, &name)? {
            found.push((name, value));
        }
    }
    Ok(found)
}

/// One extended attribute of `path` itself.
pub fn xattr(path: &Path, name: impl AsRef<std::ffi::OsStr>) -> Result<Option<Vec<u8>>> {
    match grow(|buffer| rustix::fs::lgetxattr(path, name.as_ref(), buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(Error::io("read an extended attribute of", path, error)),
    }
}

/// Sets one extended attribute of `path` itself.
pub fn set_xattr(path: &Path, name: impl AsRef<std::ffi::OsStr>, value: &[u8]) -> Result<()> {
    rustix::fs::lsetxattr(path, name.as_ref(), value, rustix::fs::XattrFlags::empty())
        .at("set an extended attribute of", path)
}

/// Calls with a larger buffer while the kernel says that the answer does not fit. The largest answer is 64 KiB.
fn grow(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < 128 * 1024 => buffer = vec![0; 128 * 1024],
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_with_optional_fields_and_escapes() {
        let text =
            b"36 35 98:0 /mnt1 /a\\040b\\134c rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
            40 36 0:50 / /m ro,nosuid - overlay s rw,lowerdir+=/i,datadir+=/o\\134,x,upperdir=/p/u\\040v,workdir=/p/w\n\
            broken line\n";
        let table = parse_table(text);
        assert_eq!(table.len(), 2);
        assert_eq!(table[0].target, Path::new("/a b\\c"));
        assert_eq!(table[0].root, Path::new("/mnt1"));
        assert_eq!(table[0].fs_type, "ext3");
        assert!(!table[0].is_read_only());
        assert!(table[1].is_read_only());
        assert_eq!(table[1].super_option("upperdir").unwrap(), Path::new("/p/u v"));
        assert_eq!(table[1].super_option("datadir+").unwrap(), Path::new("/o,x"));
        assert_eq!(table[1].super_option("work"), None);
    }

    #[test]
    fn own_table_lists_the_root_and_proc() {
        let table = table().unwrap();
        assert!(table.iter().any(|entry| entry.target == Path::new("/")));
        assert!(table.iter().any(|entry| entry.target == Path::new("/proc") && entry.fs_type == "proc"));
    }

    #[test]
    fn a_plain_directory_and_an_absent_path_are_classified() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(classify(directory.path()).unwrap(), Target::Directory);
        assert_eq!(classify(&directory.path().join("none")).unwrap(), Target::Absent);
        let file = directory.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(classify(&file).unwrap(), Target::Other);
        assert!(matches!(classify(Path::new("/proc")).unwrap(), Target::Mounted(_)));
    }
}
