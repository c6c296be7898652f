//! Names, paths and directories.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::lab::Lab;
use crate::tools::{output, refusal, stat};

/// A path of more than 256 bytes, which is where overlayfs stops to move directories unless told otherwise.
fn long() -> PathBuf {
    (0..6).map(|n| format!("{n}{}", "x".repeat(60))).collect::<PathBuf>()
}

pub(crate) fn fill(base: &Path) {
    fs::create_dir_all(base.join("names").join(long()).join("directory/sub")).unwrap();
    fs::write(base.join("names").join(long()).join("directory/sub/file"), "far down").unwrap();
    fs::write(base.join("names").join(long()).join("file"), "far down").unwrap();
    fs::create_dir_all(base.join("names/full/sub")).unwrap();
    fs::write(base.join("names/full/sub/file"), "of the base").unwrap();
    fs::write(base.join("names/lower"), "of the base").unwrap();
    fs::create_dir(base.join("names/deep")).unwrap();
    let (bottom, _) = down(&base.join("names/deep"), true);
    rustix::fs::mkdirat(&bottom, "inner", Mode::RWXU).unwrap();
}

pub(crate) fn names_differ_by_case(lab: &Lab) {
    let session = lab.session();
    assert!(!session.path("names/LOWER").exists());
    fs::write(session.path("names/LOWER"), "upper").unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(fs::read_to_string(view.path("names/lower")).unwrap(), "of the base");
        assert_eq!(fs::read_to_string(view.path("names/LOWER")).unwrap(), "upper");
    }
}

pub(crate) fn names_are_any_bytes_up_to_255(lab: &Lab) {
    let session = lab.session();
    let bytes: Vec<u8> = (1..=255).map(|byte| if byte == b'/' { b'_' } else { byte }).collect();
    assert_eq!(bytes.len(), 255);
    fs::write(session.view().join(OsStr::from_bytes(&bytes)), "x").unwrap();
    let longer = session.view().join("n".repeat(256));
    assert_eq!(refusal(fs::write(longer, "x")), Errno::NAMETOOLONG);
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(fs::read_to_string(view.view().join(OsStr::from_bytes(&bytes))).unwrap(), "x");
    }
}

/// Goes down by one name a hundred times, making the directories if asked to.
fn down(top: &Path, make: bool) -> (OwnedFd, PathBuf) {
    let name = "d".repeat(100);
    let (mut at, mut path) = (OwnedFd::from(File::open(top).unwrap()), top.to_owned());
    for _ in 0..100 {
        if make {
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
        }
        at = openat(&at, &name, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        path.push(&name);
    }
    (at, path)
}

pub(crate) fn trees_may_be_deeper_than_a_path(lab: &Lab) {
    let session = lab.session();
    let (bottom, path) = down(session.view(), true);
    rustix::fs::symlinkat("target", &bottom, "link").unwrap();
    drop(openat(&bottom, "file", OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR).unwrap());
    rustix::fs::linkat(&bottom, "file", &bottom, "second", rustix::fs::AtFlags::empty()).unwrap();
    drop(bottom);
    assert_eq!(refusal(fs::metadata(path)), Errno::NAMETOOLONG);
    for view in [session.elsewhere(), session.fork(&[])] {
        let (bottom, _) = down(view.view(), false);
        assert_eq!(rustix::fs::readlinkat(&bottom, "link", Vec::new()).unwrap().to_bytes(), b"target");
        let file = rustix::fs::statat(bottom.as_fd(), "file", rustix::fs::AtFlags::empty()).unwrap();
        assert_eq!(file.st_nlink, 2);
    }
}

pub(crate) fn base_directories_move_whole(lab: &Lab) {
    let session = lab.session();
    let from = session.path("names").join(long());
    let before = stat(from.join("directory")).st_ino;
    fs::rename(from.join("directory"), session.path("moved")).unwrap();
    fs::rename(session.path("names/full"), from.join("full")).unwrap();
    fs::hard_link(from.join("file"), session.path("linked")).unwrap();
    assert_eq!(stat(session.path("moved")).st_ino, before);
    for view in [session.elsewhere(), session.fork(&[]), session] {
        let from = view.path("names").join(long());
        assert_eq!(fs::read_to_string(view.path("moved/sub/file")).unwrap(), "far down");
        assert_eq!(fs::read_to_string(from.join("full/sub/file")).unwrap(), "of the base");
        assert_eq!(fs::read_to_string(view.path("linked")).unwrap(), "far down");
        assert!(!from.join("directory").exists() && !view.path("names/full").exists());
    }
}

pub(crate) fn directories_beyond_4096_bytes_move_only_by_copy(lab: &Lab) {
    let session = lab.session();
    let (bottom, _) = down(&session.path("names/deep"), false);
    let top = File::open(session.view()).unwrap();
    assert_eq!(rustix::fs::renameat(&bottom, "inner", &top, "moved"), Err(Errno::XDEV));
    rustix::fs::renameat(&bottom, "inner", &bottom, "renamed").unwrap();
    rustix::fs::mkdirat(&bottom, "new", Mode::RWXU).unwrap();
    rustix::fs::renameat(&bottom, "new", &top, "moved").unwrap();
    drop(bottom);
    for view in [session.elsewhere(), session.fork(&[])] {
        let (bottom, _) = down(&view.path("names/deep"), false);
        drop(openat(&bottom, "renamed", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap());
        assert!(view.path("moved").is_dir());
    }
}

pub(crate) fn directories_made_anew_hide_the_base(lab: &Lab) {
    let session = lab.session();
    fs::remove_dir_all(session.path("names/full")).unwrap();
    fs::create_dir(session.path("names/full")).unwrap();
    fs::write(session.path("names/full/new"), "x").unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(output("ls", &["-A"], &view.path("names/full")), "new\n");
    }
}

pub(crate) fn empty_directories_and_symlinks_are_kept(lab: &Lab) {
    let session = lab.session();
    fs::create_dir(session.path("empty")).unwrap();
    let target = OsStr::from_bytes(b"/no\xff/such place");
    symlink(target, session.path("dangling")).unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(fs::read_dir(view.path("empty")).unwrap().count(), 0);
        assert_eq!(fs::read_link(view.path("dangling")).unwrap().as_os_str(), target);
    }
}
