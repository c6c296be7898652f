//! What is at a path that a pod's mount is to be at, or was. Asked without any call that can hang: the kernel answers
//! from its own tables, no file system behind the path is asked, and no symlink is followed.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::failure::{Failure, Result};

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nothing.
    Missing,
    /// A directory that nothing is mounted on.
    Directory,
    /// Something is mounted on it.
    Mounted,
    /// Something is mounted on it that no longer answers.
    Dead,
    /// A file, a symlink or another thing that a volume cannot be mounted on.
    Other,
}

/// Looks at a path.
///
/// # Errors
/// What the kernel says, other than that the path is missing or dead.
pub(crate) fn classify(path: &Path) -> Result<Target> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    match statx(CWD, path, flags, StatxFlags::TYPE | StatxFlags::MODE) {
        Ok(found) => {
            let attributes = StatxAttributes::from_bits_retain(found.stx_attributes.bits());
            Ok(if attributes.contains(StatxAttributes::MOUNT_ROOT) {
                Target::Mounted
            } else if FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory {
                Target::Directory
            } else {
                Target::Other
            })
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(Target::Missing),
        Err(Errno::NOTCONN | Errno::STALE | Errno::IO | Errno::HOSTDOWN | Errno::CONNABORTED) => Ok(Target::Dead),
        Err(error) => Err(Failure::io("look at", path)(error.into())),
    }
}

/// Takes away everything that is mounted at a path, at once even when it is dead or in use, then the directory
/// itself. Ends well when nothing is there.
pub(crate) fn clear(path: &Path) -> Result<()> {
    // Mounts can be stacked; a bound keeps a mistake of ours from looping for ever.
    for _ in 0..64 {
        match classify(path)? {
            Target::Missing => return Ok(()),
            Target::Mounted | Target::Dead => {
                unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(|error| Failure::io("unmount", path)(error.into()))?;
            }
            Target::Directory => {
                return match std::fs::remove_dir(path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        Err(Failure::io("remove directory", path)(error))
                    }
                    _ => Ok(()),
                };
            }
            // Not ours: the kubelet made it, or somebody else did.
            Target::Other => return Ok(()),
        }
    }
    Err(Failure::Invalid(format!("{} has more than 64 mounts on top of each other", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let link = directory.path().join("link");
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("/proc", &link).unwrap();
        assert_eq!(classify(&directory.path().join("absent")).unwrap(), Target::Missing);
        assert_eq!(classify(&file.join("below")).unwrap(), Target::Missing);
        assert_eq!(classify(directory.path()).unwrap(), Target::Directory);
        assert_eq!(classify(&file).unwrap(), Target::Other);
        // /proc is a mount, the link to it is not followed.
        assert_eq!(classify(&link).unwrap(), Target::Other);
        assert_eq!(classify(Path::new("/proc")).unwrap(), Target::Mounted);
    }

    #[test]
    fn clearing_ends_where_nothing_is_mounted() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("mount");
        clear(&target).unwrap();
        std::fs::create_dir(&target).unwrap();
        clear(&target).unwrap();
        assert!(!target.exists());
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("precious"), "").unwrap();
        assert!(clear(&target).is_err(), "a directory with files in it is never emptied");
        assert!(target.join("precious").exists());
    }
}
