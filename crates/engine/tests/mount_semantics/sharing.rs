//! Locks, watches, mounts on top, and what a restore in place does to who is at work.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::lab::Lab;
use crate::tools::{append, attribute, set_attribute, stat};

/// Takes a record lock of the open file (fcntl(2), F_OFD_SETLK) on all of it, for writing or reading.
fn record_lock(file: &File, kind: libc::c_int) -> Result<(), Errno> {
    // SAFETY: all bits zero is a lock from the beginning to the end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    // SAFETY: an open descriptor and a lock that lives through the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()) }
}

pub(crate) fn locks_hold_across_copy_up(lab: &Lab) {
    let session = lab.session();
    let path = session.path("links/alone");
    let (whole, record) = (File::open(&path).unwrap(), File::open(&path).unwrap());
    whole.lock().unwrap();
    record_lock(&record, libc::F_RDLCK).unwrap();
    append(&path, "copied up");
    let second = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(second.try_lock().is_err(), "flock");
    assert_eq!(record_lock(&second, libc::F_WRLCK), Err(Errno::AGAIN), "fcntl");
    drop((whole, record));
    second.try_lock().unwrap();
    record_lock(&second, libc::F_WRLCK).unwrap();
}

pub(crate) fn locks_are_not_shared_with_forks(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), "x").unwrap();
    let files = ["new", "links/alone"].map(|path| File::open(session.path(path)).unwrap());
    files.iter().for_each(|file| file.lock().unwrap());
    let fork = session.fork(&[]);
    for path in ["new", "links/alone"] {
        File::open(fork.path(path)).unwrap().try_lock().unwrap();
    }
}

/// What happened since the last call, as flags of any path.
fn events(watch: &impl std::os::fd::AsFd) -> inotify::ReadFlags {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let mut flags = inotify::ReadFlags::empty();
    loop {
        match reader.next() {
            Ok(event) => flags |= event.events(),
            Err(Errno::AGAIN) => return flags,
            Err(error) => panic!("{error}"),
        }
    }
}

pub(crate) fn watches_see_changes_across_copy_up(lab: &Lab) {
    let session = lab.session();
    let fork = session.fork(&[]);
    for watched in ["links/alone", "links"] {
        let session = session.fork(&[]);
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, session.path(watched), inotify::WatchFlags::MODIFY).unwrap();
        append(fork.path("links/alone"), "in the fork");
        assert_eq!(events(&watch), inotify::ReadFlags::empty(), "a fork is another file system");
        for _ in 0..2 {
            append(session.path("links/alone"), "here");
            assert_eq!(events(&watch), inotify::ReadFlags::MODIFY, "{watched}");
        }
    }
}

/// An overlay whose lower directory is `lower`.
fn overlay(at: &Path, lower: &Path) -> Result<std::path::PathBuf, Errno> {
    for name in ["upper", "work", "merged"] {
        fs::create_dir_all(at.join(name)).unwrap();
    }
    let text = |name: &str| at.join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), text("upper"), text("work"));
    let merged = at.join("merged");
    mount("test", &merged, "overlay", MountFlags::empty(), CString::new(options).unwrap().as_c_str())?;
    Ok(merged)
}

pub(crate) fn one_overlay_fits_on_top(lab: &Lab) {
    let session = lab.session();
    let at = lab.scratch.join("nesting");
    let merged = overlay(&at.join("first"), session.view()).unwrap();
    assert_eq!(fs::read_to_string(merged.join("links/alone")).unwrap(), "of the base");
    append(merged.join("links/alone"), ", changed on top");
    assert_eq!(fs::read_to_string(session.path("links/alone")).unwrap(), "of the base");
    assert_eq!(overlay(&at.join("second"), &merged), Err(Errno::INVAL), "a second one on top of that");
    unmount(&merged, UnmountFlags::empty()).unwrap();
    // The upper of an overlay cannot lie in a session.
    let inside = session.path("inside");
    fs::create_dir(&inside).unwrap();
    assert_eq!(overlay(&inside, &lab.scratch), Err(Errno::INVAL));
    fs::remove_dir_all(at).unwrap();
}

pub(crate) fn pods_come_and_go(lab: &Lab) {
    let session = lab.session();
    append(session.path("links/alone"), ", changed");
    fs::write(session.path("new"), "x").unwrap();
    set_attribute(session.path("new"), "trusted.note", b"x").unwrap();
    drop(UnixListener::bind(session.path("socket")).unwrap());
    let seen = || {
        ["links/alone", "new", "socket"].map(|path| {
            let stat = stat(session.path(path));
            let (modified, changed) = ((stat.st_mtime, stat.st_mtime_nsec), (stat.st_ctime, stat.st_ctime_nsec));
            (stat.st_mode, stat.st_ino, stat.st_size, modified, changed)
        })
    };
    let before = seen();
    session.remount();
    assert_eq!(seen(), before);
    assert_eq!(attribute(session.path("new"), "trusted.note").unwrap(), b"x");
    assert_eq!(fs::read_to_string(session.path("links/alone")).unwrap(), "of the base, changed");
}

pub(crate) fn a_restore_in_place_replaces_files(lab: &Lab) {
    let session = lab.session();
    append(session.path("links/alone"), ", changed");
    fs::write(session.path("new"), "x").unwrap();
    let open = File::open(session.path("links/alone")).unwrap();
    let directory = File::open(session.path("names/full")).unwrap();
    fs::rename(session.path("names/full"), session.path("moved")).unwrap();
    session.restore_to_base();
    assert_eq!(fs::read_to_string(session.path("links/alone")).unwrap(), "of the base");
    assert!(!session.path("new").exists() && !session.path("moved").exists());
    assert_eq!(std::io::read_to_string(open).unwrap(), "of the base, changed", "who has it open keeps it");
    let place = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd())).unwrap();
    assert_eq!(place, session.path("names/full"), "who works in it is where it was");
}
