//! A Remote Execution API client that is not ours: BuildGrid's `bgd cas`, as it is on the Python registry. It knows
//! SHA-256 only.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use aether_cas::{Blob, Store, testing::bytes};
use common::Node;

/// The folder of BuildGrid's programs.
fn installed() -> PathBuf {
    let script = Path::new(env!("AETHER_TOP")).join("e2e/third-party/buildgrid.sh");
    let output = Command::new(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Runs `bgd cas`, which ends with 0 whatever becomes of single files.
async fn bgd(node: &Node, args: &[&str]) -> String {
    let mut command = tokio::process::Command::new(installed().join("bgd"));
    command.args(["cas", "--remote", &node.uri()]).args(args).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && !text.contains("Error"), "{args:?}: {text}");
    text
}

/// What a directory has, by path: a folder, where a symlink points, or a file's contents and whether it can be executed.
#[derive(Debug, PartialEq)]
enum Found {
    Folder,
    Symlink(PathBuf),
    File(Blob, bool),
}

fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, Found>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let what = if metadata.is_dir() {
            walk(root, &path, found);
            Found::Folder
        } else if metadata.is_symlink() {
            Found::Symlink(fs::read_link(&path).unwrap())
        } else {
            Found::File(Blob::of_file(&path).unwrap(), metadata.permissions().mode() & 0o100 != 0)
        };
        found.insert(path.strip_prefix(root).unwrap().to_owned(), what);
    }
}

fn contents(root: &Path) -> BTreeMap<PathBuf, Found> {
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

/// Files for single messages, for batches (more than one holds) and for streams; twins, an empty one, links, folders.
fn make(root: &Path) {
    for folder in ["many", "deep/er/and/deeper", "empty"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for n in 0..700 {
        fs::write(root.join(format!("many/file {n}")), bytes(n, 10 + n as usize)).unwrap();
    }
    for (path, data) in [
        ("none", vec![]),
        ("grüße.txt", b"a name beyond ASCII".to_vec()),
        ("deep/er/and/deeper/large", bytes(1, 9 << 20).to_vec()),
        ("deep/er/medium", bytes(2, 1_500_000).to_vec()),
        ("deep/twin", bytes(2, 1_500_000).to_vec()),
        ("run.sh", b"#!/bin/sh\nexit 0\n".to_vec()),
    ] {
        fs::write(root.join(path), data).unwrap();
    }
    fs::set_permissions(root.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../deep/er/medium", root.join("many/link")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    symlink("deep", root.join("to a folder")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_goes_up_and_comes_down() {
    let node = Node::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    make(&from);
    let text = bgd(&node, &["upload-dir", "--verify", from.to_str().unwrap()]).await;
    // The root comes last.
    let root = text.trim().rsplit_once("digest=[").unwrap().1.trim_end_matches(['"', ']']);
    let held = node.store.statistics();
    bgd(&node, &["download-dir", "--verify", root, to.to_str().unwrap()]).await;
    let expected = contents(&from);
    assert_eq!(contents(&to), expected);

    // Each content is there once, for clients with BLAKE3 too, and a second upload adds nothing.
    let remote = node.remote().await;
    let files: BTreeMap<Blob, &PathBuf> = expected
        .iter()
        .filter_map(|(path, found)| if let Found::File(blob, _) = found { Some((*blob, path)) } else { None })
        .collect();
    for (blob, path) in &files {
        assert_eq!(remote.read(*blob).await.unwrap(), fs::read(from.join(path)).unwrap());
    }
    let directories = 1 + expected.values().filter(|found| **found == Found::Folder).count() as u64;
    // All files but the empty one, and all directories but an empty one: it is the empty blob.
    assert_eq!(held.inline_blobs + held.file_blobs, files.len() as u64 - 1 + directories - 1);
    bgd(&node, &["upload-dir", from.to_str().unwrap()]).await;
    assert_eq!(node.store.statistics(), held);
    assert!(node.store.fsck(false).unwrap().is_healthy());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_so() {
    let node = Node::start().await;
    let folder = tempfile::tempdir().unwrap();
    let absent = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824/5";
    let to = folder.path().join("to");
    let output = tokio::process::Command::new(installed().join("bgd"))
        .args(["cas", "--remote", &node.uri(), "download-dir", absent, to.to_str().unwrap()])
        .output()
        .await
        .unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(!output.status.success() && text.contains("does not exist on remote"), "{text}");
    node.stop().await;
}
