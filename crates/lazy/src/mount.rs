//! The mount itself: root's alone, read-only, `nosuid,nodev`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

/// Mounts a new FUSE file system at `target` (made if absent) and returns its side of the connection. What an earlier
/// one left mounted there is taken away first.
///
/// Only root may use it: an overlay reads its layers with the credentials of whoever mounted it.
///
/// # Errors
/// Those of the kernel; without `/dev/fuse` or FUSE in the kernel nothing can be mounted.
pub fn mount(target: &Path) -> io::Result<OwnedFd> {
    detach(target)?;
    fs::create_dir_all(target)?;
    let device: File = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    fsconfig_set_string(context, "source", "aether-lazy")?;
    fsconfig_set_string(context, "fd", device.as_raw_fd().to_string())?;
    for (key, value) in [("rootmode", "40555"), ("user_id", "0"), ("group_id", "0")] {
        fsconfig_set_string(context, key, value)?;
    }
    // Else the kernel asks for every permission.
    fsconfig_set_flag(context, "default_permissions")?;
    fsconfig_create(context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(device.into())
}

/// Takes away everything that is mounted at `target`. Overlays that use it keep it.
///
/// # Errors
/// Those of umount2(2), but not that nothing is mounted there.
pub fn detach(target: &Path) -> io::Result<()> {
    loop {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
