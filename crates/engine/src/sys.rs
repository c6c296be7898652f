//! The system calls for which `rustix` has no safe form. All `unsafe` of this crate is here.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::ioctl::{self, Opcode, opcode};

/// `struct mount_attr` of `mount_setattr(2)`.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// What `mount_setattr(2)` shall change on one mount, or on a whole tree of mounts.
#[derive(Default, Clone, Copy)]
pub(crate) struct MountChange {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u32,
    /// `MOUNT_ATTR_*` to clear.
    pub(crate) clear: u32,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or 0.
    pub(crate) propagation: u64,
    /// The mounts below too.
    pub(crate) recursive: bool,
}

/// `mount_setattr(2)` on the mount that `mount` is the root of.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, change: MountChange) -> io::Result<()> {
    let attr =
        MountAttr { set: change.set.into(), clear: change.clear.into(), propagation: change.propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if change.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, `attr` lives through the call and its size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct mnt_id_req` (include/uapi/linux/mount.h), in its first version.
#[repr(C)]
struct MountRequest {
    size: u32,
    spare: u32,
    id: u64,
    wanted: u64,
}

/// Not in `libc` for every architecture; the number is the same on all but Alpha.
const SYS_STATMOUNT: libc::c_long = 457;

/// `statmount(2)` on the mount with this unique id: a `struct statmount` with its strings. Fails with ENOSYS before
/// Linux 6.8.
pub(crate) fn statmount(id: u64, wanted: u64) -> io::Result<Vec<u8>> {
    let request = MountRequest { size: size_of::<MountRequest>() as u32, spare: 0, id, wanted };
    let mut answer = vec![0_u8; 4096];
    loop {
        // SAFETY: the kernel reads one `MountRequest` of the size in it, and writes at most `answer.len()` bytes.
        let result = unsafe {
            libc::syscall(SYS_STATMOUNT, &raw const request, answer.as_mut_ptr(), answer.len(), 0 as libc::c_uint)
        };
        match io::Error::last_os_error() {
            _ if result == 0 => return Ok(answer),
            error if error.raw_os_error() == Some(libc::EOVERFLOW) && answer.len() < 256 * 1024 => {
                answer.resize(answer.len() * 4, 0);
            }
            error => return Err(error),
        }
    }
}

/// Makes `command` start in a mount namespace of its own.
pub(crate) fn with_own_mounts(command: &mut Command) -> &mut Command {
    let unshare = || {
        // SAFETY: a new mount namespace for a process that has one thread; no descriptor table changes.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.map_err(io::Error::from)
    };
    // SAFETY: between fork and exec this makes one system call and allocates nothing.
    unsafe { command.pre_exec(unshare) }
}

// ---------------------------------------------------------------------------------------------------------- btrfs

/// `struct btrfs_ioctl_vol_args_v2` (include/uapi/linux/btrfs.h).
#[repr(C)]
struct VolumeArgs {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

const _: () = assert!(size_of::<VolumeArgs>() == 4096);

const BTRFS: u8 = 0x94;
const SNAP_CREATE_V2: Opcode = opcode::write::<VolumeArgs>(BTRFS, 23);
const SUBVOL_CREATE_V2: Opcode = opcode::write::<VolumeArgs>(BTRFS, 24);
const SNAP_DESTROY_V2: Opcode = opcode::write::<VolumeArgs>(BTRFS, 63);
const SUBVOL_RDONLY: u64 = 1 << 1;

fn volume_args(name: &str) -> io::Result<Box<VolumeArgs>> {
    let mut args = Box::new(VolumeArgs { fd: 0, transid: 0, flags: 0, unused: [0; 4], name: [0; 4040] });
    if name.is_empty() || name.len() > 255 || name.contains(['/', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of a subvolume"));
    }
    args.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(args)
}

struct Volume<const CODE: Opcode>(Box<VolumeArgs>);

// SAFETY: the kernel reads one `VolumeArgs` and, for the two that create, writes `transid` back into it.
unsafe impl<const CODE: Opcode> ioctl::Ioctl for Volume<CODE> {
    type Output = ();
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        CODE
    }
    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        (&raw mut *self.0).cast()
    }
    unsafe fn output_from_ptr(_: ioctl::IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Makes an empty subvolume `name` in `parent`.
pub(crate) fn subvolume_create(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: see `Volume`.
    unsafe { ioctl::ioctl(parent, Volume::<SUBVOL_CREATE_V2>(volume_args(name)?)) }.map_err(Into::into)
}

/// Makes `name` in `parent`, a snapshot of the subvolume that `source` is the root of.
pub(crate) fn subvolume_snapshot(
    source: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    name: &str,
    read_only: bool,
) -> io::Result<()> {
    let mut args = volume_args(name)?;
    args.fd = source.as_raw_fd().into();
    args.flags = if read_only { SUBVOL_RDONLY } else { 0 };
    // SAFETY: see `Volume`; `source` stays open through the call.
    unsafe { ioctl::ioctl(parent, Volume::<SNAP_CREATE_V2>(args)) }.map_err(Into::into)
}

/// Deletes the subvolume `name` of `parent` with everything in it. Space comes back in the background.
pub(crate) fn subvolume_destroy(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: see `Volume`.
    unsafe { ioctl::ioctl(parent, Volume::<SNAP_DESTROY_V2>(volume_args(name)?)) }.map_err(Into::into)
}

const SYNC: Opcode = opcode::none(BTRFS, 8);

/// Commits what was changed and wakes the kernel's threads that give back the space of what was deleted.
pub(crate) fn btrfs_sync(root: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: BTRFS_IOC_SYNC takes no argument.
    unsafe { ioctl::ioctl(root, ioctl::NoArg::<SYNC>::new()) }.map_err(Into::into)
}

/// `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct QuotaControl {
    command: u64,
    status: u64,
}

const QUOTA_CTL: Opcode = opcode::read_write::<QuotaControl>(BTRFS, 40);
/// `BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA` (Linux 6.7).
const ENABLE_SIMPLE_QUOTA: u64 = 4;

/// Begins to charge every extent to the subvolume that writes it, on the file system of `root`.
pub(crate) fn quota_enable_simple(root: BorrowedFd<'_>) -> io::Result<()> {
    let mut control = QuotaControl { command: ENABLE_SIMPLE_QUOTA, status: 0 };
    // SAFETY: the kernel reads one `QuotaControl` and may write `status` back into it.
    unsafe { ioctl::ioctl(root, ioctl::Updater::<QUOTA_CTL, _>::new(&mut control)) }.map_err(Into::into)
}

/// `struct btrfs_ioctl_qgroup_limit_args`, with `struct btrfs_qgroup_limit` inside.
#[repr(C)]
struct QuotaLimit {
    group: u64,
    flags: u64,
    max_referenced: u64,
    max_exclusive: u64,
    reserved: [u64; 2],
}

const QGROUP_LIMIT: Opcode = opcode::read::<QuotaLimit>(BTRFS, 43);
/// `BTRFS_QGROUP_LIMIT_MAX_RFER`.
const LIMIT_REFERENCED: u64 = 1;
/// What takes a limit away again (`CLEAR_VALUE` in fs/btrfs/qgroup.c).
const NO_LIMIT: u64 = u64::MAX;

/// Bounds what may be charged to the subvolume `id` to so many bytes, or to nothing.
pub(crate) fn quota_limit(root: BorrowedFd<'_>, id: u64, bytes: Option<u64>) -> io::Result<()> {
    let limit = QuotaLimit {
        group: id,
        flags: LIMIT_REFERENCED,
        max_referenced: bytes.unwrap_or(NO_LIMIT),
        max_exclusive: 0,
        reserved: [0; 2],
    };
    // SAFETY: the kernel reads one `QuotaLimit`.
    unsafe { ioctl::ioctl(root, ioctl::Setter::<QGROUP_LIMIT, _>::new(limit)) }.map_err(Into::into)
}

/// `struct btrfs_ioctl_fs_info_args`, of which only the identifier is of interest here.
#[repr(C)]
struct FileSystemInfo {
    devices: [u64; 2],
    uuid: [u8; 16],
    rest: [u64; 124],
}

const _: () = assert!(size_of::<FileSystemInfo>() == 1024);

const FS_INFO: Opcode = opcode::read::<FileSystemInfo>(BTRFS, 31);

/// The identifier of a btrfs, by which sysfs names it.
pub(crate) fn btrfs_uuid(root: BorrowedFd<'_>) -> io::Result<uuid::Uuid> {
    // SAFETY: the kernel fills one `FileSystemInfo`.
    let info = unsafe { ioctl::ioctl(root, ioctl::Getter::<FS_INFO, FileSystemInfo>::new()) }?;
    let _ = (info.devices, info.rest);
    Ok(uuid::Uuid::from_bytes(info.uuid))
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct InodeLookup {
    tree: u64,
    object: u64,
    name: [u8; 4080],
}

const INO_LOOKUP: Opcode = opcode::read_write::<InodeLookup>(BTRFS, 18);

/// The number of the subvolume that `directory` is in.
pub(crate) fn subvolume_id(directory: BorrowedFd<'_>) -> io::Result<u64> {
    // 256 is the root directory of every subvolume; tree 0 is the one that the descriptor is in.
    let mut lookup = Box::new(InodeLookup { tree: 0, object: 256, name: [0; 4080] });
    // SAFETY: the kernel reads and fills one `InodeLookup`.
    unsafe { ioctl::ioctl(directory, ioctl::Updater::<INO_LOOKUP, _>::new(&mut *lookup)) }?;
    let _ = lookup.name;
    Ok(lookup.tree)
}

/// The key of an item in a btrfs tree; in the order of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) object: u64,
    pub(crate) kind: u8,
    pub(crate) offset: u64,
}

/// `struct btrfs_ioctl_search_key`.
#[repr(C)]
struct SearchKey {
    tree: u64,
    min_object: u64,
    max_object: u64,
    min_offset: u64,
    max_offset: u64,
    min_transaction: u64,
    max_transaction: u64,
    min_kind: u32,
    max_kind: u32,
    items: u32,
    unused: u32,
    more_unused: [u64; 4],
}

/// `struct btrfs_ioctl_search_args_v2`, up to its buffer.
#[repr(C)]
struct SearchHead {
    key: SearchKey,
    size: u64,
}

const SEARCH_BUFFER: usize = 64 << 10;

#[repr(C)]
struct Search {
    head: SearchHead,
    buffer: [u8; SEARCH_BUFFER],
}

const _: () = assert!(size_of::<SearchHead>() == 112);

// The size in the opcode is that of the structure without its buffer.
const TREE_SEARCH_V2: Opcode = opcode::read_write::<SearchHead>(BTRFS, 17);
/// `struct btrfs_ioctl_search_header`.
const SEARCH_HEADER: usize = 32;

/// Shows `each` every item of a tree between two keys, in order, until it returns false. Tree 0 is the subvolume that `within` is
/// in. What is changed meanwhile may or may not be seen.
pub(crate) fn tree_search(
    within: BorrowedFd<'_>,
    tree: u64,
    from: Key,
    to: Key,
    mut each: impl FnMut(Key, &[u8]) -> bool,
) -> io::Result<()> {
    let key = |from: Key| SearchKey {
        tree,
        min_object: from.object,
        max_object: to.object,
        min_offset: from.offset,
        max_offset: to.offset,
        min_transaction: 0,
        max_transaction: u64::MAX,
        min_kind: from.kind.into(),
        max_kind: to.kind.into(),
        items: u32::MAX,
        unused: 0,
        more_unused: [0; 4],
    };
    let mut search = Box::new(Search {
        head: SearchHead { key: key(from), size: SEARCH_BUFFER as u64 },
        buffer: [0; SEARCH_BUFFER],
    });
    loop {
        // SAFETY: the kernel reads the head, writes `items`, and fills at most `size` bytes of the buffer behind it.
        unsafe { ioctl::ioctl(within, ioctl::Updater::<TREE_SEARCH_V2, _>::new(&mut *search)) }?;
        if search.head.key.items == 0 {
            return Ok(());
        }
        let mut rest = search.buffer.as_slice();
        let mut last = from;
        for _ in 0..search.head.key.items {
            let Some((header, data)) = rest.split_at_checked(SEARCH_HEADER) else { break };
            let word = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().expect("eight bytes"));
            let half = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
            last = Key { object: word(8), kind: u8::try_from(half(24)).unwrap_or(u8::MAX), offset: word(16) };
            let Some((item, after)) = data.split_at_checked(half(28) as usize) else { break };
            if !each(last, item) {
                return Ok(());
            }
            rest = after;
        }
        let Some(next) = last.next().filter(|next| *next <= to) else { return Ok(()) };
        search.head.key = key(next);
    }
}

impl Key {
    fn next(self) -> Option<Self> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Self { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Self { kind, offset: 0, ..self });
        }
        Some(Self { object: self.object.checked_add(1)?, kind: 0, offset: 0 })
    }
}

// ----------------------------------------------------------------------------------------------------------- loop

/// `struct loop_config` (include/uapi/linux/loop.h), with `struct loop_info64` inside.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with the number of a device.
unsafe impl ioctl::Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;
    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }
    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }
    unsafe fn output_from_ptr(result: ioctl::IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(result)
    }
}

/// Opens the loop device `name`, such as `loop3`. A container's `/dev` has only the devices that there were when it
/// started; the node of a later one is made.
pub(crate) fn loop_open(name: &str, write: bool) -> io::Result<(File, PathBuf)> {
    let path = Path::new("/dev").join(name);
    let open = || File::options().read(true).write(write).open(&path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let number = std::fs::read_to_string(format!("/sys/block/{name}/dev"))?;
            let number = number
                .trim()
                .split_once(':')
                .and_then(|(major, minor)| Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)));
            let number = number.ok_or(io::ErrorKind::InvalidData)?;
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            match rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::BlockDevice, mode, number) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => open(),
                Err(error) => Err(error.into()),
            }
        }
        other => other,
    }
    .map(|device| (device, path.clone()))
}

/// Puts `file` behind a free loop device, which frees itself at its last close. The caller keeps the returned
/// descriptor until the device is mounted.
pub(crate) fn loop_attach(file: &File, name: &Path, read_only: bool) -> io::Result<(File, PathBuf)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    // Somebody else may take the free device between the two calls: ask again.
    for _ in 0..64 {
        // SAFETY: see `GetFree`.
        let number = unsafe { ioctl::ioctl(&control, GetFree) }?;
        let (device, path) = loop_open(&format!("loop{number}"), !read_only)?;
        let mut config = LoopConfig {
            fd: u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX),
            block_size: 0,
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
            reserved: [0; 8],
        };
        // Shown by losetup, truncated by the kernel's own field.
        for (slot, byte) in config.file_name[..63].iter_mut().zip(name.as_os_str().as_encoded_bytes()) {
            *slot = *byte;
        }
        // SAFETY: the kernel reads one `LoopConfig`; `file` stays open through the call.
        match unsafe { ioctl::ioctl(device.as_fd(), ioctl::Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) } {
            Ok(()) => return Ok((device, path)),
            Err(rustix::io::Errno::BUSY) => continue,
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "no free loop device after 64 attempts"))
}

/// The fields of `struct loop_info64` that say which file is behind a device; the rest is padding to its size.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rest: [u64; 27],
}

const _: () = assert!(size_of::<LoopInfo>() == 232);

const LOOP_GET_STATUS64: Opcode = 0x4C05;

/// Device and inode number of the file behind a loop device; fails with ENXIO when there is none.
pub(crate) fn loop_backing(device: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    // SAFETY: LOOP_GET_STATUS64 fills one `struct loop_info64`, of which `LoopInfo` has the size.
    let info = unsafe { ioctl::ioctl(device, ioctl::Getter::<LOOP_GET_STATUS64, LoopInfo>::new()) }?;
    let _ = info.rest;
    Ok((info.device, info.inode))
}

/// Whether another open file description of the file `file` exists: a file that a mounted file system is on, for one.
pub(crate) fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    // fcntl(2): a write lease is given only to who has the file open alone.
    // SAFETY: the call takes two integers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
        // SAFETY: as above. A lease that stays would make the next opener wait until `file` is closed.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        return Ok(false);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(true) } else { Err(error) }
}
