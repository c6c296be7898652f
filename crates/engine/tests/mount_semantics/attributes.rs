//! Modes, owners, extended attributes and access lists.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::IFlags;
use rustix::io::Errno;

use crate::lab::{Lab, OWNER};
use crate::tools::{attribute, modified, set_attribute, set_times, stat};

pub(crate) fn fill(base: &Path) {
    fs::create_dir(base.join("attributes")).unwrap();
    for name in ["noted", "plain", "other"] {
        fs::write(base.join("attributes").join(name), "of the base").unwrap();
    }
    set_attribute(base.join("attributes/noted"), "user.note", b"of the base").unwrap();
    set_attribute(base.join("attributes/noted"), "user.gone", b"x").unwrap();
}

pub(crate) fn user_attributes_are_kept(lab: &Lab) {
    let session = lab.session();
    assert_eq!(attribute(session.path("attributes/noted"), "user.note").unwrap(), b"of the base");
    set_attribute(session.path("attributes/noted"), "user.more", b"a\0b").unwrap();
    rustix::fs::lremovexattr(session.path("attributes/noted"), "user.gone").unwrap();
    set_attribute(session.path("attributes"), "user.directory", b"").unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        let noted = view.path("attributes/noted");
        assert_eq!(attribute(&noted, "user.note").unwrap(), b"of the base");
        assert_eq!(attribute(&noted, "user.more").unwrap(), b"a\0b");
        assert_eq!(attribute(&noted, "user.gone"), None);
        assert_eq!(attribute(view.path("attributes"), "user.directory").unwrap(), b"");
    }
}

pub(crate) fn other_attributes_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let names = ["trusted.note", "security.note"];
    for name in names {
        set_attribute(session.path("attributes/plain"), name, b"x").unwrap();
    }
    let (fork, elsewhere) = (session.fork(&[]), session.elsewhere());
    for name in names {
        assert_eq!(attribute(fork.path("attributes/plain"), name).unwrap(), b"x");
        assert_eq!(attribute(elsewhere.path("attributes/plain"), name), None);
    }
}

const ACCESS_LIST: &str = "system.posix_acl_access";

/// `u::rw-,u:4242:rw-,g::r--,m::rw-,o::---` as `setfacl` passes it: version 2, then tag, permissions and id of each entry
/// (`include/uapi/linux/posix_acl_xattr.h`).
fn access_list() -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(0x01_u16, 6_u16, u32::MAX), (0x02, 6, 4242), (0x04, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 0, u32::MAX)]
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

pub(crate) fn access_lists_need_a_touch_and_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let file = session.path("attributes/other");
    assert_eq!(set_attribute(&file, ACCESS_LIST, &access_list()), Err(Errno::OPNOTSUPP));
    set_times(&file, (1, 0), (1, 0));
    set_attribute(&file, ACCESS_LIST, &access_list()).unwrap();
    fs::write(session.path("new"), "x").unwrap();
    set_attribute(session.path("new"), ACCESS_LIST, &access_list()).unwrap();
    let (fork, elsewhere) = (session.fork(&[]), session.elsewhere());
    for path in ["attributes/other", "new"] {
        assert_eq!(attribute(fork.path(path), ACCESS_LIST).unwrap(), access_list());
        // The mode is kept, whose group bits are the mask of the list.
        assert_eq!(stat(elsewhere.path(path)).st_mode & 0o777, 0o660);
    }
}

pub(crate) fn modes_are_kept_and_setuid_is_not_honoured(lab: &Lab) {
    let session = lab.session();
    let modes = [("setuid", 0o4755), ("setgid", 0o2755), ("sticky", 0o1777), ("none", 0), ("tool", 0o755)];
    for (name, mode) in modes {
        fs::copy("/usr/bin/id", session.path(name)).unwrap();
        chown(session.path(name), Some(0), Some(0)).unwrap();
        fs::set_permissions(session.path(name), Permissions::from_mode(mode)).unwrap();
    }
    for view in [session.elsewhere(), session.fork(&[]), session] {
        for (name, mode) in modes {
            assert_eq!(stat(view.path(name)).st_mode & 0o7777, mode, "{name}");
        }
        for (program, argument) in [("tool", "-u"), ("setuid", "-u"), ("setgid", "-g")] {
            let output = Command::new(view.path(program)).arg(argument).uid(4242).gid(4242).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "4242\n", "{program}");
        }
    }
}

pub(crate) fn owners_are_kept_where_they_differ(lab: &Lab) {
    let session = lab.session();
    let owner = |path: &Path| (stat(path).st_uid, stat(path).st_gid);
    assert_eq!(owner(&session.path("attributes/plain")), (OWNER.uid, OWNER.gid));
    chown(session.path("attributes/plain"), Some(70_000), Some(70_001)).unwrap();
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(owner(&view.path("attributes/plain")), (70_000, 70_001));
        assert_eq!(owner(&view.path("attributes/other")), (OWNER.uid, OWNER.gid));
    }
}

pub(crate) fn the_root_keeps_its_attributes(lab: &Lab) {
    let session = lab.session();
    assert_eq!(stat(session.view()).st_mode & 0o7777, 0o755);
    fs::set_permissions(session.view(), Permissions::from_mode(0o1770)).unwrap();
    set_attribute(session.view(), "user.note", b"root").unwrap();
    set_times(session.view(), (5, 6), (5, 6));
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(stat(view.view()).st_mode & 0o7777, 0o1770);
        assert_eq!(attribute(view.view(), "user.note").unwrap(), b"root");
        assert_eq!(modified(view.view()), (5, 6));
    }
}

pub(crate) fn immutable_files_do_not_hold_up_a_session(lab: &Lab) {
    let session = lab.session();
    for path in ["new", "attributes/plain"] {
        let path = session.path(path);
        fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let flags = rustix::fs::ioctl_getflags(&file).unwrap() | IFlags::IMMUTABLE;
        rustix::fs::ioctl_setflags(&file, flags).unwrap();
        assert_eq!(fs::write(&path, "y").unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    }
    let elsewhere = session.elsewhere();
    fs::write(elsewhere.path("new"), "y").unwrap();
    let fork = session.fork(&[]);
    assert_eq!(fs::read_to_string(fork.path("new")).unwrap(), "x");
}
