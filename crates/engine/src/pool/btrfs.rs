//! The btrfs pool: a session is a subvolume, a snapshot is one ioctl whatever the number of changed files.
//!
//! A snapshot ioctl commits the transaction that it is part of, so what it returns is on disk. Limits are in
//! [`quota`](super::quota).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::quota::Quotas;
use super::{Kind, Limits, Medium, Pool, Usage, dotted, make_layout, no_memory, walk_usage};
use crate::crash::crash_point;
use crate::error::{Context, Error, Result};
use crate::mount::Discard;
use crate::{kernel, mount, sys, writeback};

/// `BTRFS_SUPER_MAGIC` (include/uapi/linux/magic.h).
const MAGIC: u64 = 0x9123_683E;
/// The root directory of every subvolume has this inode number (`BTRFS_FIRST_FREE_OBJECTID`).
const SUBVOLUME_INODE: u64 = 256;
/// Below this btrfs spends most of the space on its own structures.
const MINIMUM_IMAGE: u64 = 256 << 20;
/// A read-only subvolume with an empty `upper` and `work`, of which every new session is a snapshot.
const TEMPLATE: &str = ".template";

/// How often, and how long apart, the kernel is asked to make room for metadata on a full pool.
const RECLAIM_ATTEMPTS: u32 = 10;
const RECLAIM_PAUSE: Duration = Duration::from_millis(100);

/// A pool on btrfs.
#[derive(Debug)]
pub struct Btrfs {
    root: PathBuf,
    /// Without them, why not.
    quotas: std::result::Result<Quotas, String>,
    /// How it was mounted, if that was done here.
    origin: Option<Origin>,
}

/// What a pool is mounted from.
#[derive(Debug, Clone)]
enum Origin {
    Image { image: PathBuf, discard: Discard },
    Device(PathBuf),
}

impl Origin {
    fn mount(&self, target: &Path) -> Result<()> {
        match self {
            Self::Image { image, discard } => {
                let (_device, path) = attach_image(image)?;
                mount_pool(&path, target, *discard)
            }
            Self::Device(device) => mount_pool(device, target, Discard::Default),
        }
    }
}

impl Btrfs {
    /// The pool in the image file `image`, made with `bytes` if it is not there, mounted at `target`.
    pub fn image(image: &Path, bytes: u64, target: &Path) -> Result<Self> {
        if !image.exists() {
            make_image(image, bytes)?;
        }
        // What was preallocated stays so: newer kernels discard by themselves.
        Self::mounted(Origin::Image { image: image.to_owned(), discard: Discard::Never }, target)
    }

    fn mounted(origin: Origin, target: &Path) -> Result<Self> {
        if !is_mounted(target)? {
            origin.mount(target)?;
        }
        Ok(Self { origin: Some(origin), ..Self::open(target)? })
    }

    /// The pool of at most `bytes` in the node's memory: an image on a tmpfs that is mounted at `directory`. It holds nothing
    /// after a reboot. Contents take their size twice, in the image and in the page cache, which the kernel can
    /// take back; space that is freed goes back to the node.
    pub fn memory(directory: &Path, bytes: u64) -> Result<Self> {
        let total = kernel::memory()?;
        if bytes < MINIMUM_IMAGE || bytes > total / 2 {
            return Err(Error::Unsupported {
                what: format!("a pool of {bytes} bytes in memory"),
                remedy: format!(
                    "it can have {MINIMUM_IMAGE} to {} bytes here, half of the node's memory, because contents take \
                     their size twice",
                    total / 2
                ),
            });
        }
        fs::create_dir_all(directory).at("create", directory)?;
        let (image, target) = (directory.join("pool.img"), directory.join("pool"));
        if !mount::is_mountpoint(directory)? {
            // A little more than the image, so that never the tmpfs is full under it.
            mount::mount_tmpfs(directory, bytes.saturating_add(1 << 20))?;
        }
        if !image.exists() {
            let unfinished = image.with_extension("img.new");
            let file = File::create(&unfinished).at("create", &unfinished)?;
            // Sparse: memory is taken as it is used.
            file.set_len(bytes).at("set the size of", &unfinished)?;
            format(&unfinished)?;
            fs::rename(&unfinished, &image).at("rename", &unfinished)?;
        }
        fs::create_dir_all(&target).at("create", &target)?;
        Self::memory_again(directory)
    }

    /// The pool that [`memory`](Self::memory) made at `directory`, as large as it was made.
    pub fn memory_again(directory: &Path) -> Result<Self> {
        let origin = Origin::Image { image: directory.join("pool.img"), discard: Discard::Async };
        Self::mounted(origin, &directory.join("pool"))
    }

    /// The pool on a block device that carries btrfs, mounted at `target`.
    pub fn device(device: &Path, target: &Path) -> Result<Self> {
        let origin = Origin::Device(device.to_owned());
        if !is_mounted(target)? {
            origin.mount(target).map_err(|error| Error::Unsupported {
                what: format!("a pool on {}", device.display()),
                remedy: format!("it does not mount as btrfs ({error}); make the file system with mkfs.btrfs first"),
            })?;
        }
        Self::mounted(origin, target)
    }

    /// The pool in a directory of a mounted btrfs.
    pub fn open(root: &Path) -> Result<Self> {
        if !is_btrfs(root)? {
            return Err(Error::Unsupported {
                what: format!("a btrfs pool in {}", root.display()),
                remedy: "it is not on btrfs; give a directory that is, or use the directory pool".into(),
            });
        }
        make_layout(root)?;
        let quotas = Quotas::enable(root).map_err(|error| error.to_string());
        let pool = Self { root: root.to_owned(), quotas, origin: None };
        pool.make_template()?;
        Ok(pool)
    }

    fn make_template(&self) -> Result<()> {
        let snapshots = self.snapshots();
        if snapshots.join(TEMPLATE).exists() {
            return Ok(());
        }
        let unfinished = format!("{TEMPLATE}.new");
        self.destroy(&snapshots, &unfinished)?;
        let parent = open(&snapshots)?;
        sys::subvolume_create(parent.as_fd(), &unfinished).at("create subvolume in", &snapshots)?;
        let path = snapshots.join(&unfinished);
        for name in ["upper", "work"] {
            fs::create_dir(path.join(name)).at("create", path.join(name))?;
        }
        crash_point!("pool.template.made");
        // The snapshot is the commit: it appears whole.
        sys::subvolume_snapshot(open(&path)?.as_fd(), parent.as_fd(), TEMPLATE, true).at("snapshot", &path)?;
        self.destroy(&snapshots, &unfinished)
    }

    fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    fn sessions(&self) -> PathBuf {
        self.root.join("sessions")
    }

    fn take(&self, from: &Path, parent: &Path, name: &str, read_only: bool) -> Result<()> {
        match sys::subvolume_snapshot(open(from)?.as_fd(), open(parent)?.as_fd(), name, read_only) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(Error::Full {
                what: format!("pool {}", self.root.display()),
                remedy: format!(
                    "there is no room for {}; remove files from sessions, or delete sessions and checkpoints that are \
                     not needed",
                    parent.join(name).display()
                ),
            }),
            other => other.at("make snapshot", parent.join(name)),
        }
    }

    fn destroy(&self, parent: &Path, name: &str) -> Result<()> {
        let path = parent.join(name);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("look at", &path, error)),
            Ok(metadata) if metadata.ino() != SUBVOLUME_INODE => {
                fs::remove_dir_all(&path).at("remove directory", &path)
            }
            Ok(_) => sys::subvolume_destroy(open(parent)?.as_fd(), name).at("delete subvolume", &path),
        }
    }
}

impl Pool for Btrfs {
    fn kind(&self) -> Kind {
        Kind::Btrfs
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn create(&self, session: &str, medium: Medium) -> Result<()> {
        if medium == Medium::Memory {
            return Err(no_memory());
        }
        self.take(&self.snapshots().join(TEMPLATE), &self.sessions(), session, false)
    }

    /// A snapshot writes back the subvolume's dirty data before it is taken: take one and throw it away.
    fn flush(&self, session: &str, limits: Limits) -> Result<()> {
        let name = format!(".flush-{session}");
        let snapshots = self.snapshots();
        self.destroy(&snapshots, &name)?;
        let mut attempts = 0;
        while let Err(error) = self.take(&self.session_dir(session), &snapshots, &name, true) {
            // Of a pool that was full, space that was freed is not at once space for metadata.
            if !matches!(error, Error::Full { .. }) || attempts == RECLAIM_ATTEMPTS {
                return Err(error);
            }
            attempts += 1;
            sys::btrfs_sync(open(&self.root)?.as_fd()).at("sync", &self.root)?;
            std::thread::sleep(RECLAIM_PAUSE);
        }
        crash_point!("pool.flush.taken");
        self.destroy(&snapshots, &name)?;
        // After what was dirty was written, and so charged.
        if let Ok(quotas) = &self.quotas {
            quotas.before_snapshot(session, &self.session_dir(session), limits)?;
        }
        Ok(())
    }

    fn snapshot(&self, session: &str, snapshot: &str) -> Result<()> {
        self.take(&self.session_dir(session), &self.snapshots(), snapshot, true)
    }

    /// The ioctl has done it all.
    fn finish_snapshot(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn fork(&self, snapshot: &str, session: &str) -> Result<()> {
        self.take(&self.snapshots().join(snapshot), &self.sessions(), session, false)
    }

    fn delete_session(&self, session: &str) -> Result<()> {
        if let Ok(quotas) = &self.quotas {
            quotas.forget(session);
        }
        self.destroy(&self.sessions(), session)
    }

    fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.destroy(&self.snapshots(), snapshot)
    }

    fn enforcement(&self) -> Result<String> {
        match &self.quotas {
            Ok(_) => Ok("btrfs simple quotas; inodes are counted".into()),
            Err(why) => Err(Error::Unsupported {
                what: "enforcing limits of sessions".into(),
                remedy: format!("they are only counted: {why}"),
            }),
        }
    }

    fn remount(&self, vacate: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        if !self.space_of(Medium::Disk)?.read_only {
            return Ok(());
        }
        // Enough where somebody made it read-only; the kernel refuses it after an error.
        let refused = match mount::remount_writable(&self.root) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let Some(origin) = &self.origin else {
            return Err(Error::Unsupported {
                what: format!("mounting {} anew", self.root.display()),
                remedy: format!(
                    "it is a directory of a btrfs that something else mounted ({refused}); mount that anew"
                ),
            });
        };
        vacate(&self.root)?;
        match mount::unmount(&self.root) {
            Err(error) if error.io_kind() == Some(io::ErrorKind::ResourceBusy) => Err(Error::Busy {
                what: format!("pool {}", self.root.display()),
                by: "a process has a file of it open".into(),
            }),
            other => other,
        }?;
        origin.mount(&self.root)
    }

    fn usage(&self, session: &str) -> Result<Usage> {
        let path = self.session_dir(session);
        match &self.quotas {
            Ok(quotas) => quotas.usage(session, &path),
            Err(_) => walk_usage(&self.upper(session)).map(|(bytes, inodes)| Usage { bytes, inodes: Some(inodes) }),
        }
    }

    fn keep(&self, session: &str, limits: Limits) -> Result<Usage> {
        match &self.quotas {
            Ok(quotas) => quotas.keep(session, &self.session_dir(session), limits),
            Err(_) => self.usage(session),
        }
    }

    fn sweep(&self) -> Result<usize> {
        let mut swept = 0;
        for parent in [self.sessions(), self.snapshots()] {
            for name in dotted(&parent)? {
                if name != TEMPLATE {
                    self.destroy(&parent, &name)?;
                    swept += 1;
                }
            }
        }
        Ok(swept)
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).at("open", path)
}

/// Whether `path` lies on btrfs.
pub(super) fn is_btrfs(path: &Path) -> Result<bool> {
    let stat = rustix::fs::statfs(path).at("read the file system type of", path)?;
    Ok(u64::try_from(stat.f_type).ok() == Some(MAGIC))
}

/// Whether a btrfs image can be made and mounted here.
pub(super) fn is_available() -> bool {
    let kernel =
        fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.split_whitespace().any(|f| f == "btrfs"));
    kernel && Path::new("/dev/loop-control").exists() && mkfs("--version").is_ok()
}

fn is_mounted(target: &Path) -> Result<bool> {
    match mount::find_mount(target)? {
        Some(entry) if entry.fs_type == "btrfs" => Ok(true),
        Some(entry) if entry.source == target => Ok(false),
        Some(entry) => Err(Error::AlreadyExists {
            kind: "mount",
            name: target.display().to_string(),
            detail: format!("it is {} and not the pool's btrfs; unmount it", entry.fs_type),
        }),
        None => Ok(false),
    }
}

fn mkfs(argument: &str) -> io::Result<String> {
    let output = Command::new("mkfs.btrfs").arg(argument).output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

/// Preallocates the image: a sparse one on a host disk that fills up would turn the pool read-only for everybody.
fn make_image(image: &Path, bytes: u64) -> Result<()> {
    let parent = image.parent().unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(parent).at("read the free space of", parent)?;
    let free = stat.f_bavail * stat.f_frsize;
    let bytes = if bytes == 0 { free / 2 } else { bytes };
    if bytes < MINIMUM_IMAGE || bytes > free {
        return Err(Error::Unsupported {
            what: format!("a pool image of {bytes} bytes in {}", parent.display()),
            remedy: format!(
                "{free} bytes are free and at least {MINIMUM_IMAGE} are needed; free space or set its size"
            ),
        });
    }
    let unfinished = image.with_extension("img.new");
    let file = File::create(&unfinished).at("create", &unfinished)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).at("preallocate", &unfinished)?;
    crash_point!("pool.image.allocated");
    format(&unfinished)?;
    file.sync_all().at("sync", &unfinished)?;
    fs::rename(&unfinished, image).at("rename", &unfinished)?;
    open(parent)?.sync_all().at("sync", parent)
}

/// Makes the file a btrfs. No discard: it would give preallocated space back. One copy of metadata: both would lie on one disk.
fn format(image: &Path) -> Result<()> {
    let output = Command::new("mkfs.btrfs")
        .args(["--quiet", "--nodiscard", "--metadata", "single", "--data", "single", "--label", "aether-pool"])
        .arg(image)
        .output()
        .at("run mkfs.btrfs (package btrfs-progs) on", image)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::io("run mkfs.btrfs on", image, io::Error::other(said)))
}

/// The loop device of `image`: the one that it has (two devices on one image would destroy it), else a new one.
fn attach_image(image: &Path) -> Result<(File, PathBuf)> {
    let file = File::options().read(true).write(true).open(image).at("open", image)?;
    let metadata = file.metadata().at("look at", image)?;
    for entry in fs::read_dir("/sys/block").at("list", "/sys/block")?.flatten() {
        if !entry.path().join("loop/backing_file").exists() {
            continue;
        }
        let Ok((device, path)) = sys::loop_open(&entry.file_name().to_string_lossy(), true) else { continue };
        if sys::loop_backing(device.as_fd()).is_ok_and(|backing| backing == (metadata.dev(), metadata.ino())) {
            return Ok((device, path));
        }
    }
    sys::loop_attach(&file, image, false).at("attach to a loop device", image)
}

fn mount_pool(device: &Path, target: &Path, discard: Discard) -> Result<()> {
    mount::mount_btrfs(device, target, discard)?;
    if let Err(error) = writeback::bound(device) {
        tracing::warn!(%error, "the pool may hold much back from disk");
    }
    Ok(())
}
