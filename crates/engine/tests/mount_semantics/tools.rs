//! Short names for what the tests do all the time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

/// lstat(2).
pub(crate) fn stat(path: impl AsRef<Path>) -> Stat {
    let path = path.as_ref();
    rustix::fs::lstat(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Sets both times, in seconds and nanoseconds.
pub(crate) fn set_times(path: impl AsRef<Path>, accessed: (i64, i64), modified: (i64, i64)) {
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
    rustix::fs::utimensat(CWD, path.as_ref(), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Modification time in seconds and nanoseconds.
pub(crate) fn modified(path: impl AsRef<Path>) -> (i64, u64) {
    let stat = stat(path);
    (stat.st_mtime, stat.st_mtime_nsec)
}

/// An extended attribute, if there is one.
pub(crate) fn attribute(path: impl AsRef<Path>, name: &str) -> Option<Vec<u8>> {
    let mut value = [0; 1024];
    match rustix::fs::lgetxattr(path.as_ref(), name, &mut value[..]) {
        Ok(length) => Some(value[..length].to_vec()),
        Err(Errno::NODATA) => None,
        Err(error) => panic!("{name} of {}: {error}", path.as_ref().display()),
    }
}

/// Sets an extended attribute.
pub(crate) fn set_attribute(path: impl AsRef<Path>, name: &str, value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path.as_ref(), name, value, XattrFlags::empty())
}

/// Adds to the end of a file; the first such write copies a base file up.
pub(crate) fn append(path: impl AsRef<Path>, text: &str) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

/// What the kernel says when it refuses.
pub(crate) fn refusal<T: std::fmt::Debug>(result: std::io::Result<T>) -> Errno {
    Errno::from_io_error(&result.unwrap_err()).unwrap()
}

/// Runs a program, which must succeed, and returns what it prints.
pub(crate) fn output(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The first page of a file, mapped shared.
pub(crate) struct Map(*mut libc::c_void);

/// The size of a page here.
const PAGE: usize = 4096;

impl Map {
    /// Maps it, for writing if the file was opened for that.
    pub(crate) fn new(file: &File, writable: bool) -> Self {
        use std::os::fd::AsRawFd;
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address that the kernel chooses, of an open file.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, file.as_fd().as_raw_fd(), 0)
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(at)
    }

    /// The bytes at its beginning.
    pub(crate) fn read(&self, length: usize) -> Vec<u8> {
        assert!(length <= PAGE);
        let mut bytes = vec![0; length];
        // SAFETY: the mapping has PAGE bytes and lives as long as this; the file is longer than what is asked for.
        unsafe { std::ptr::copy_nonoverlapping(self.0.cast::<u8>(), bytes.as_mut_ptr(), length) };
        bytes
    }

    /// Writes at its beginning.
    pub(crate) fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= PAGE);
        // SAFETY: as for reading; the mapping was made for writing.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.cast::<u8>(), bytes.len()) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and nothing refers into it.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}
