//! Times.

use std::fs;
use std::path::Path;

use crate::lab::Lab;
use crate::tools::{modified, set_times, stat};

const BASE: (i64, i64) = (1_234_567_890, 123_456_789);
const EARLY: (i64, i64) = (-1_000_000, 987_654_321);

pub(crate) fn fill(base: &Path) {
    fs::create_dir(base.join("times")).unwrap();
    fs::write(base.join("times/file"), "of the base").unwrap();
    set_times(base.join("times/file"), BASE, BASE);
}

pub(crate) fn modification_times_keep_nanoseconds(lab: &Lab) {
    let session = lab.session();
    assert_eq!(modified(session.path("times/file")), (BASE.0, BASE.1 as u64));
    fs::create_dir(session.path("directory")).unwrap();
    fs::write(session.path("directory/file"), "x").unwrap();
    std::os::unix::fs::symlink("target", session.path("directory/link")).unwrap();
    for path in ["directory/file", "directory/link", "directory"] {
        set_times(session.path(path), EARLY, EARLY);
    }
    for view in [session.elsewhere(), session.fork(&[]), session] {
        assert_eq!(modified(view.path("times/file")), (BASE.0, BASE.1 as u64));
        for path in ["directory/file", "directory/link", "directory"] {
            assert_eq!(modified(view.path(path)), (EARLY.0, EARLY.1 as u64), "{path}");
        }
    }
}

pub(crate) fn change_times_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let change = |path: &Path| (stat(path).st_ctime, stat(path).st_ctime_nsec);
    // An image has one time for a file.
    assert_eq!(change(&session.path("times/file")), (BASE.0, BASE.1 as u64));
    fs::write(session.path("new"), "x").unwrap();
    set_times(session.path("new"), BASE, BASE);
    let now = change(&session.path("new"));
    assert!(now.0 > BASE.0, "setting the modification time sets the change time to now");
    let elsewhere = session.elsewhere();
    assert_eq!(change(&elsewhere.path("new")), (BASE.0, BASE.1 as u64));
}

pub(crate) fn access_times_stay_on_the_node(lab: &Lab) {
    let session = lab.session();
    let access = |path: &Path| (stat(path).st_atime, stat(path).st_atime_nsec);
    // A base file is not copied up for a read of it.
    assert_eq!(fs::read_to_string(session.path("times/file")).unwrap(), "of the base");
    assert_eq!(access(&session.path("times/file")), (BASE.0, BASE.1 as u64));
    fs::write(session.path("new"), "x").unwrap();
    set_times(session.path("new"), EARLY, BASE);
    assert_eq!(access(&session.path("new")), (EARLY.0, EARLY.1 as u64));
    let elsewhere = session.elsewhere();
    assert_eq!(access(&elsewhere.path("new")), (BASE.0, BASE.1 as u64));
}
