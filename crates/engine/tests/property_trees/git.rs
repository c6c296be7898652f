//! The first `git status` in a session reads no contents.
//!
//! Shown by taking the contents of the working copy away: whoever opens one meets an error, and git would report the file
//! as deleted or modified.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use aether_cas::MemoryStore;
use aether_cas::tree::{Mtime, Node, walk};
use aether_engine::git;

use crate::random;
use crate::random::session::{Session, scanned};

const MTIME: Mtime = Mtime { seconds: 1_600_000_000, nanos: 0 };

/// Git as somebody who has configured nothing.
fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .args(["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "protocol.file.allow=always"])
        .args(["-c", "init.defaultBranch=main"])
        .arg("-C")
        .arg(directory)
        .args(arguments)
        .output()
        .expect("git runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {arguments:?}: {error}");
    String::from_utf8(output.stdout).expect("output in UTF-8") + &error
}

/// A clone with loose objects, a submodule, a hook, and credentials in every place where git keeps some.
fn clone(scratch: &Path) -> std::path::PathBuf {
    for name in ["origin", "module"] {
        let origin = scratch.join(name);
        fs::create_dir(&origin).unwrap();
        git(&origin, &["init", "-q"]);
        for number in 0..20 {
            fs::create_dir_all(origin.join(format!("directory{}", number % 3))).unwrap();
            fs::write(origin.join(format!("directory{}/file{number}", number % 3)), format!("{name} {number}\n"))
                .unwrap();
        }
        git(&origin, &["add", "."]);
        git(&origin, &["commit", "-qm", "first"]);
    }
    let module = scratch.join("module");
    git(&scratch.join("origin"), &["submodule", "--quiet", "add", module.to_str().unwrap(), "vendor/module"]);
    git(&scratch.join("origin"), &["commit", "-qm", "a submodule"]);

    let copy = scratch.join("copy");
    let origin = scratch.join("origin");
    git(scratch, &["clone", "-q", "--recurse-submodules", origin.to_str().unwrap(), copy.to_str().unwrap()]);
    for repository in [&copy, &copy.join("vendor/module")] {
        git(repository, &["remote", "set-url", "origin", "https://user:hunter2@example.com/a.git"]);
        git(repository, &["config", "http.https://example.com/.extraHeader", "Authorization: hunter2"]);
        git(repository, &["config", "credential.helper", "store --file hunter2"]);
        git(repository, &["config", "core.sshCommand", "ssh -i hunter2"]);
        git(repository, &["config", "branch.main.description", "kept"]);
    }
    fs::create_dir_all(copy.join(".git/hooks")).unwrap();
    fs::write(copy.join(".git/hooks/post-checkout"), "#!/bin/sh\nexit 1\n").unwrap();
    copy
}

/// A session on the working copy whose files, those of git's own directories apart, have lost their contents.
fn session_without_contents(scratch: &Path, copy: &Path) -> Session {
    let store = MemoryStore::new();
    let root = scanned(copy, &store).unwrap().root;
    let session = Session::new(&scratch.join("session"), root, &store);
    let mut lost = 0;
    walk(&root, &store, |path, node| {
        // The `.git` file of a submodule and what tells git about submodules are git's own too.
        let own = path.components().any(|part| part.as_os_str().as_bytes().starts_with(b".git"));
        if let Node::File { content, .. } = node
            && !own
        {
            fs::remove_file(scratch.join("session/objects").join(content.digest.object_path())).unwrap();
            lost += 1;
        }
        Ok::<(), aether_cas::StoreError>(())
    })
    .unwrap();
    assert_eq!(lost, 40);
    session
}

#[test]
fn the_first_status_reads_no_contents() {
    random::alone(|scratch| {
        let copy = clone(scratch);
        git::prepare(&copy, MTIME).unwrap();
        let session = session_without_contents(scratch, &copy);
        let root = session.merged();
        assert!(fs::read(root.join("directory1/file1")).is_err(), "the contents are gone");
        for repository in [&root, &root.join("vendor/module")] {
            assert_eq!(git(repository, &["status", "--porcelain"]), "");
            assert_eq!(git(repository, &["diff", "--stat"]), "");
        }
        // Replaced as editors do it: truncating a file whose contents are gone fails.
        fs::remove_file(root.join("directory1/file1")).unwrap();
        fs::write(root.join("directory1/file1"), "changed\n").unwrap();
        assert_eq!(git(&root, &["status", "--porcelain"]).trim(), "M directory1/file1");
        assert_eq!(git(&root, &["log", "--format=%s", "-1"]).trim(), "a submodule");
        session.end();
    });
}

#[test]
fn without_preparation_it_does() {
    random::alone(|scratch| {
        let copy = clone(scratch);
        let session = session_without_contents(scratch, &copy);
        assert!(git(&session.merged(), &["status", "--porcelain"]).lines().count() >= 20);
        session.end();
    });
}

#[test]
fn nothing_of_its_cloner_is_left() {
    random::alone(|scratch| {
        let copy = clone(scratch);
        git::prepare(&copy, MTIME).unwrap();
        let secret = Command::new("grep").args(["-r", "hunter2"]).arg(&copy).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&secret.stdout), "");
        assert!(!copy.join(".git/hooks").exists());
        for repository in [&copy, &copy.join("vendor/module")] {
            assert_eq!(git(repository, &["remote", "get-url", "origin"]).trim(), "https://example.com/a.git");
            assert_eq!(git(repository, &["config", "branch.main.description"]).trim(), "kept");
            assert!(git(repository, &["count-objects", "-v"]).contains("count: 0\n"));
            git(repository, &["fsck", "--strict"]);
        }

        let store = MemoryStore::new();
        let root = scanned(&copy, &store).unwrap().root;
        let times = |tree: &aether_cas::Blob| {
            let mut times = Vec::new();
            walk(tree, &store, |path, node| {
                if let Some(attributes) = node.attributes() {
                    times.push((path.to_owned(), attributes.mtime.seconds - MTIME.seconds));
                }
                Ok::<(), aether_cas::StoreError>(())
            })
            .unwrap();
            times
        };
        let odd: Vec<_> = times(&root).into_iter().filter(|(_, late)| *late != 0).map(|(path, _)| path).collect();
        assert_eq!(odd, [Path::new(".git/index"), Path::new(".git/modules/vendor/module/index")]);
    });
}

#[test]
fn only_a_working_copy_can_be_prepared() {
    let directory = tempfile::tempdir().unwrap();
    let error = git::prepare(directory.path(), MTIME).unwrap_err();
    assert!(error.to_string().contains("not the root of a git working copy"), "{error}");
}
