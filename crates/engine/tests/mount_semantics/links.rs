//! Hard links.

use std::fs;
use std::path::Path;

use crate::lab::Lab;
use crate::tools::{append, stat};

pub(crate) fn fill(base: &Path) {
    fs::create_dir(base.join("links")).unwrap();
    fs::write(base.join("links/one"), "of the base").unwrap();
    fs::hard_link(base.join("links/one"), base.join("links/two")).unwrap();
    fs::write(base.join("links/alone"), "of the base").unwrap();
}

pub(crate) fn hard_links_made_in_the_session_stay(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("first"), "x").unwrap();
    fs::hard_link(session.path("first"), session.path("links/second")).unwrap();
    append(session.path("links/second"), "y");
    for view in [session.elsewhere(), session.fork(&[]), session] {
        let (first, second) = (stat(view.path("first")), stat(view.path("links/second")));
        assert_eq!((first.st_ino, first.st_nlink), (second.st_ino, 2));
        assert_eq!(fs::read_to_string(view.path("first")).unwrap(), "xy");
    }
}

pub(crate) fn hard_links_of_the_base_part_when_written(lab: &Lab) {
    let session = lab.session();
    let inode = |name: &str| stat(session.path(name)).st_ino;
    assert_eq!(inode("links/one"), inode("links/two"));
    // Unwritten they are one file on any node.
    let elsewhere = session.elsewhere();
    assert_eq!(stat(elsewhere.path("links/one")).st_ino, stat(elsewhere.path("links/two")).st_ino);
    append(session.path("links/one"), ", changed");
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(fs::read_to_string(view.path("links/one")).unwrap(), "of the base, changed");
        assert_eq!(fs::read_to_string(view.path("links/two")).unwrap(), "of the base");
    }
}

pub(crate) fn hard_links_to_base_files_hold(lab: &Lab) {
    let session = lab.session();
    fs::hard_link(session.path("links/alone"), session.path("again")).unwrap();
    append(session.path("again"), ", changed");
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(stat(view.path("again")).st_ino, stat(view.path("links/alone")).st_ino);
        assert_eq!(fs::read_to_string(view.path("links/alone")).unwrap(), "of the base, changed");
    }
}
