//! The tree that is read from git's objects is the one that a checkout gives.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use aether_cas::transfer::Objects;
use aether_cas::tree::{diff, walk};
use aether_cas::{MemoryStore, Store};
use aether_importer::cli::Git;
use aether_importer::git::{self, Imported};
use aether_importer::scan::{self, Stored};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tempfile::TempDir;

use super::counting::Counting;
use super::repository::{Repository, clone, of, run, silent};

const SEEDS: u64 = 8;
const NAMES: [&str; 9] = ["a", "b.rs", "ä ö", "new\nline", "\"quoted\"", ".hidden", "a.b", "a-b", "zz"];

/// An import as the program makes it, and where.
async fn import(asked: &Git, to: &dyn Store) -> (TempDir, Stored) {
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().join("home");
    fs::create_dir(&home).unwrap();
    match git::import(asked, &scratch.path().join("worktree"), &home, to, silent()).await.unwrap() {
        Imported::Commit(_, stored) => (scratch, stored),
        Imported::Unchanged(commit) => panic!("{commit} is not known yet"),
    }
}

/// How many names there are beside the repository itself.
fn checked_out(scratch: &TempDir) -> usize {
    fs::read_dir(scratch.path().join("worktree")).unwrap().count() - 1
}

/// Compares with the full way.
async fn same_as_a_checkout(asked: &Git, context: &str) {
    let store = MemoryStore::new();
    let (scratch, stored) = import(asked, &store).await;
    assert_eq!(checked_out(&scratch), 0, "{context}: no file was needed");
    walk(&stored.root, &store, |path, node| {
        let missing = node.content().filter(|content| !content.is_empty() && store.object(content).is_err());
        assert_eq!(missing, None, "{context}: {} is in the store", path.display());
        Ok::<(), aether_cas::StoreError>(())
    })
    .unwrap();
    let full = clone(asked.clone()).await;
    let expected = scan::store(&full.worktree(), &store, silent()).await.unwrap();
    assert_eq!(diff(&expected.root, &stored.root, &store).unwrap(), [], "{context}");
    assert_eq!((stored.root, stored.counts), (expected.root, expected.counts), "{context}");
}

fn random_file(random: &mut StdRng, path: &Path) {
    // What is there may be of any kind.
    let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
    let length = match random.random_range(0..10) {
        0 => 0,
        1..=7 => random.random_range(1..3000),
        8 => random.random_range(3000..300_000),
        // More than one message to the store takes.
        _ => random.random_range(3_600_000..3_800_000),
    };
    match random.random_range(0..6) {
        0 => symlink(format!("to/{}", random.random::<u16>()), path).unwrap(),
        kind => {
            let mut data = vec![0; length];
            random.fill_bytes(&mut data);
            fs::write(path, data).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(if kind == 1 { 0o755 } else { 0o644 })).unwrap();
        }
    }
}

/// Adds, changes, replaces and removes files and directories.
fn change(random: &mut StdRng, root: &Path) {
    for _ in 0..random.random_range(1..12) {
        let mut path = root.to_owned();
        for _ in 0..random.random_range(0..4) {
            path.push(NAMES[random.random_range(0..NAMES.len())]);
            if !path.is_dir() || path.is_symlink() {
                let _ = fs::remove_file(&path);
                fs::create_dir_all(&path).unwrap();
            }
        }
        path.push(NAMES[random.random_range(0..NAMES.len())]);
        random_file(random, &path);
    }
}

/// Random commits, each imported in both ways.
async fn compare_ways(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let repository = Repository::new();
    let root = repository.path();
    // Two imports compare packs too, which are made by as many threads as there are.
    run(root, &["config", "pack.threads", "1"]);
    for number in 0..random.random_range(1..4) {
        change(&mut random, root);
        if seed % 4 == 1 {
            // A submodule that nobody asks for.
            run(root, &["update-index", "--add", "--cacheinfo", &format!("160000,{},sub/module", repository.first)]);
        }
        run(root, &["add", "--all", "--", ":!sub"]);
        run(root, &["commit", "--quiet", "--allow-empty", &format!("--message={number}")]);
    }
    let head = run(root, &["rev-parse", "HEAD"]);
    for reference in [None, Some("v1"), Some("refs/pull/7/head"), Some(head.as_str())] {
        let depth = if random.random() { Some(1) } else { None };
        let asked = Git { depth, ..of(repository.url(), reference) };
        same_as_a_checkout(&asked, &format!("seed {seed}, {reference:?}, {depth:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_commits_are_the_same_tree_either_way() {
    // At the same time, because most of it is to wait for git.
    let seeds: Vec<_> = (0..SEEDS).map(|seed| tokio::spawn(compare_ways(seed))).collect();
    for seed in seeds {
        seed.await.unwrap();
    }
}

#[tokio::test]
async fn what_a_checkout_converts_is_checked_out() {
    let repository = Repository::new();
    let root = repository.path();
    fs::write(root.join("README"), "one\ntwo\n").unwrap();
    fs::write(root.join(".gitattributes"), "README text eol=lf\n").unwrap();
    run(root, &["add", "."]);
    run(root, &["commit", "--quiet", "--message=plain"]);
    same_as_a_checkout(&of(repository.url(), None), "attributes that change nothing").await;

    fs::write(root.join("src/.gitattributes"), "*.c text eol=crlf\n").unwrap();
    run(root, &["add", "."]);
    run(root, &["commit", "--quiet", "--message=lines"]);
    let store = MemoryStore::new();
    let (scratch, stored) = import(&of(repository.url(), None), &store).await;
    assert_eq!(checked_out(&scratch), 3);
    assert_eq!(fs::read(scratch.path().join("worktree/src/main.c")).unwrap(), b"int main;\r\n");
    let full = clone(of(repository.url(), None)).await;
    assert_eq!(scan::store(&full.worktree(), &MemoryStore::new(), silent()).await.unwrap().root, stored.root);

    // Each word that converts does so by itself.
    for (attributes, text, shown) in [
        ("id.txt ident\n", "$Id$\n", "$Id: "),
        ("id.txt text working-tree-encoding=UTF-16LE-BOM\n", "\u{feff}plain\n", "\u{feff}plain\n"),
        ("[attr]dos text eol=crlf\nid.txt dos\n", "plain\n", "plain\r\n"),
    ] {
        fs::remove_file(root.join("src/.gitattributes")).unwrap_or_default();
        let utf16 = attributes.contains("UTF-16");
        let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        fs::write(root.join("id.txt"), if utf16 { wide(text) } else { text.into() }).unwrap();
        fs::write(root.join(".gitattributes"), attributes).unwrap();
        run(root, &["add", "."]);
        run(root, &["commit", "--quiet", "--message=converted"]);
        let (scratch, stored) = import(&of(repository.url(), None), &MemoryStore::new()).await;
        let seen = fs::read(scratch.path().join("worktree/id.txt")).unwrap();
        let shown = if utf16 { wide(shown) } else { shown.into() };
        assert!(seen.starts_with(&shown), "{attributes}: {seen:?}");
        let full = clone(of(repository.url(), None)).await;
        let scanned = scan::store(&full.worktree(), &MemoryStore::new(), silent()).await.unwrap();
        assert_eq!(scanned.root, stored.root, "{attributes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_import_uploads_what_changed() {
    let repository = Repository::new();
    let root = repository.path();
    for number in 0..300 {
        let folder = root.join(format!("d{}", number % 10));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(number.to_string()), format!("{number}\n")).unwrap();
    }
    run(root, &["add", "."]);
    run(root, &["commit", "--quiet", "--message=many"]);
    run(root, &["repack", "-a", "-d", "-q"]);
    let store = Counting::default();
    let (_, first) = import(&of(repository.url(), None), &store).await;
    assert!(store.take_written().len() > 300);

    store.take_written();
    let (_, again) = import(&of(repository.url(), None), &store).await;
    assert_eq!(again.root, first.root, "the same commit is the same tree");
    assert_eq!(store.take_written(), []);

    fs::write(root.join("d3/3"), "changed\n").unwrap();
    run(root, &["commit", "--quiet", "--all", "--message=one"]);
    let (_, changed) = import(&of(repository.url(), None), &store).await;
    assert_ne!(changed.root, first.root);
    let written = store.take_written().len();
    // Beside the file: its directory, the root, and the repository's own files and directories, of which git makes a few more or less.
    assert!(written < 60, "{written} of more than 600");
}
