//! Fifos, sockets and device nodes.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

use crate::lab::Lab;
use crate::tools::refusal;

pub(crate) fn fill(base: &Path) {
    fs::create_dir(base.join("special")).unwrap();
    mknodat(CWD, base.join("special/pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
}

pub(crate) fn fifos_are_kept(lab: &Lab) {
    let session = lab.session();
    mknodat(CWD, session.path("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        for path in ["pipe", "special/pipe"] {
            let path = view.path(path);
            assert!(fs::metadata(&path).unwrap().file_type().is_fifo());
            let writer = std::thread::spawn({
                let path = path.clone();
                move || fs::write(path, "through")
            });
            assert_eq!(fs::read_to_string(&path).unwrap(), "through");
            writer.join().unwrap().unwrap();
        }
    }
}

pub(crate) fn sockets_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let listener = UnixListener::bind(session.path("socket")).unwrap();
    let client = UnixStream::connect(session.path("socket")).unwrap();
    drop((listener.accept().unwrap(), client));
    let fork = session.fork(&[]);
    assert!(fs::metadata(fork.path("socket")).unwrap().file_type().is_socket());
    let refused = UnixStream::connect(fork.path("socket")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "nobody listens in the fork");
    assert!(!session.elsewhere().path("socket").exists());
    drop(listener);
}

pub(crate) fn devices_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let mode = Mode::from_raw_mode(0o666);
    mknodat(CWD, session.path("null"), FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
    assert_eq!(refusal(File::open(session.path("null"))), Errno::ACCESS, "mounts of sessions are nodev");
    let fork = session.fork(&[]);
    assert!(fs::metadata(fork.path("null")).unwrap().file_type().is_char_device());
    assert!(!session.elsewhere().path("null").exists());
}

pub(crate) fn the_device_0_0_cannot_be_made(lab: &Lab) {
    let session = lab.session();
    let made = mknodat(CWD, session.path("zero"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0));
    assert_eq!(made, Err(Errno::PERM));
}
