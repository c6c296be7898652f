//! Inode and device numbers.

use std::fs;
use std::os::unix::fs::DirEntryExt;

use crate::lab::{Lab, Medium};
use crate::tools::{append, output, stat};

pub(crate) fn inode_numbers_of_the_base_stay(lab: &Lab) {
    let session = lab.session();
    let number = |path: &str| {
        let stat = stat(session.path(path));
        (stat.st_dev, stat.st_ino)
    };
    let (file, directory) = (number("links/alone"), number("names/full"));
    append(session.path("links/alone"), "x");
    fs::write(session.path("names/full/new"), "x").unwrap();
    assert_eq!((number("links/alone"), number("names/full")), (file, directory));
    fs::rename(session.path("links/alone"), session.path("names/elsewhere")).unwrap();
    fs::rename(session.path("names/full"), session.path("links/full")).unwrap();
    assert_eq!((number("names/elsewhere"), number("links/full")), (file, directory));
    let fork = session.fork(&[]);
    assert_eq!(stat(fork.path("names/elsewhere")).st_ino, file.1);
    // Directories are counted in the order in which they are first seen after a mount.
    for other in ["attributes", "contents", "names", "special", "times"] {
        stat(fork.path(other));
    }
    assert_ne!(stat(fork.path("links/full")).st_ino, directory.1);
}

pub(crate) fn inode_numbers_of_new_files_stay_in_forks_on_btrfs(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), "x").unwrap();
    let before = stat(session.path("new")).st_ino;
    fs::rename(session.path("new"), session.path("names/new")).unwrap();
    assert_eq!(stat(session.path("names/new")).st_ino, before);
    let after = stat(session.fork(&[]).path("names/new")).st_ino;
    assert_eq!(after == before, lab.medium != Medium::Directory, "{before} in the parent, {after} in the fork");
}

pub(crate) fn devices_differ_by_layer(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), "x").unwrap();
    let device = |path: &str| stat(session.path(path)).st_dev;
    assert_eq!(device("links"), device(""), "directories have the device of the mount");
    assert_ne!(device("links/alone"), device("links"), "files of the base have another");
    assert_ne!(device("new"), device("links"), "files of the session have another");
    let script = |script: &str| output("sh", &["-c", script], session.view());
    assert_eq!(script("cd \"$0\" && find . -xdev | sort"), script("cd \"$0\" && find . | sort"));
    let tar = |option: &str| script(&format!("tar -c {option} -f - -C \"$0\" . | tar -t | sort"));
    assert_eq!(tar("--one-file-system"), tar(""));
    let bytes = |options: &str| script(&format!("du {options} \"$0\" | cut -f1")).trim().parse::<u64>().unwrap();
    assert!(bytes("-sb") > 32 << 20, "the files of the base are counted");
    assert!(bytes("-sbx") < 1 << 20, "only directories are");
}

pub(crate) fn listings_and_stat_agree_on_inode_numbers_of_files(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("links/new"), "x").unwrap();
    append(session.path("links/one"), "x");
    for entry in fs::read_dir(session.path("links")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.ino(), stat(entry.path()).st_ino, "{}", entry.path().display());
    }
    let named = |entry: &fs::DirEntry| entry.file_name() == "full";
    let directory = fs::read_dir(session.path("names")).unwrap().map(Result::unwrap).find(named).unwrap();
    assert_ne!(directory.ino(), stat(directory.path()).st_ino, "directories of the base have a second number");
}
