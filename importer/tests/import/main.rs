//! Imports of real repositories over file, https and ssh, with submodules and Git LFS, and of a real S3 service, into a store in
//! memory.

mod counting;
mod https;
mod lfs;
mod log;
mod objects;
mod repository;
mod s3;
mod ssh;

use std::fs;
use std::process::Command;

use aether_cas::tree::Node;
use aether_cas::{MemoryStore, Store};
use aether_importer::cli::Git;
use aether_importer::failure::Reason;
use aether_importer::git::Cloned;
use aether_importer::scan;
use repository::{Repository, clone, directory, names, of, run, silent};

#[tokio::test]
async fn a_branch_becomes_a_clean_working_copy_and_a_complete_tree() {
    let repository = Repository::new();
    let clone = clone(of(repository.url(), None)).await;
    assert_eq!(clone.commit(), repository.second);
    let worktree = clone.worktree();
    assert_eq!(fs::read_to_string(worktree.join("README")).unwrap(), "two\n");
    assert_eq!(run(&worktree, &["symbolic-ref", "--short", "HEAD"]), "main");
    assert_eq!(run(&worktree, &["status", "--porcelain"]), "");
    assert_eq!(run(&worktree, &["rev-list", "--count", "HEAD"]), "2");
    assert_eq!(run(&worktree, &["config", "core.checkStat"]), "minimal");
    let packs = fs::read_dir(worktree.join(".git/objects/pack"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "pack"));
    assert_eq!(packs.count(), 1);

    let store = MemoryStore::new();
    let stored = scan::store(&worktree, &store, silent()).await.unwrap();
    let root = directory(&store, stored.root).await;
    assert_eq!(names(&root), [".git", "README", "src"]);
    assert!(root.attributes.owner.is_none(), "what the importer owns is a session owner's later");
    let Some(Node::File { content, .. }) = root.entries.values().nth(1) else { panic!("{root:?}") };
    assert_eq!(store.read(*content).await.unwrap(), "two\n");
    assert!(stored.counts.files > 2 && stored.counts.bytes > 10);
}

#[tokio::test]
async fn tags_commits_and_other_refs_are_checked_out() {
    let repository = Repository::new();
    for reference in ["v1", "side", "refs/pull/7/head", &repository.first] {
        for depth in [None, Some(1)] {
            let clone = clone(Git { depth, ..of(repository.url(), Some(reference)) }).await;
            assert_eq!(clone.commit(), repository.first, "{reference}");
            assert_eq!(fs::read_to_string(clone.worktree().join("README")).unwrap(), "one\n", "{reference}");
            assert_eq!(run(&clone.worktree(), &["status", "--porcelain"]), "", "{reference}");
        }
    }
    let shallow = clone(Git { depth: Some(1), ..of(repository.url(), Some("main")) }).await;
    assert_eq!(run(&shallow.worktree(), &["rev-list", "--count", "HEAD"]), "1");
}

#[tokio::test]
async fn a_known_commit_is_not_fetched_again() {
    let repository = Repository::new();
    let known = Git { unless_commit: Some(repository.second.clone()), ..of(repository.url(), Some("main")) };
    let unchanged = clone(known.clone()).await;
    assert_eq!(unchanged.outcome, Ok(Cloned::Unchanged(repository.second.clone())));
    assert!(!unchanged.worktree().exists());
    assert_eq!(clone(Git { reference: Some("side".into()), ..known }).await.commit(), repository.first);
}

#[tokio::test]
async fn submodules_come_along_when_asked() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| Repository::at(&root.path().join(name));
    let (outer, inner, innermost) = (at("outer"), at("inner"), at("innermost"));
    inner.add_submodule("deep", innermost.path(), "../innermost");
    outer.add_submodule("beside", inner.path(), "../inner");
    outer.add_submodule("elsewhere", innermost.path(), &innermost.url());
    let without = clone(of(outer.url(), None)).await;
    assert_eq!(fs::read_dir(without.worktree().join("beside")).unwrap().count(), 0);
    for depth in [None, Some(1)] {
        let with = clone(Git { submodules: true, depth, ..of(outer.url(), None) }).await;
        with.commit();
        for name in ["beside/README", "beside/deep/README", "elsewhere/README"] {
            assert_eq!(with.read(name), b"two\n", "{name}");
        }
        assert_eq!(with.status_in_a_copy(&[]), "");
    }
    fs::rename(innermost.path(), root.path().join("gone")).unwrap();
    let broken = clone(Git { submodules: true, ..of(outer.url(), None) }).await;
    assert_eq!(broken.failure().reason, Reason::RepositoryNotFound, "{}", broken.failure());
    assert!(broken.failure().message.contains("innermost"), "{}", broken.failure());
}

#[tokio::test]
async fn what_is_not_there_is_told_apart() {
    let repository = Repository::new();
    for reference in ["nosuch", "refs/heads/nosuch", "0123456789012345678901234567890123456789"] {
        let clone = clone(of(repository.url(), Some(reference))).await;
        assert_eq!(clone.failure().reason, Reason::RefNotFound, "{}", clone.failure());
        assert!(clone.failure().message.contains(reference), "{}", clone.failure());
    }
    let nowhere = clone(of("file:///nosuch/repository", None)).await;
    assert_eq!(nowhere.failure().reason, Reason::RepositoryNotFound, "{}", nowhere.failure());
    // Nothing listens on port 1 of a machine's loopback.
    let closed = clone(of("http://127.0.0.1:1/repository", None)).await;
    assert_eq!(closed.failure().reason, Reason::RepositoryNotFound, "{}", closed.failure());
    let empty = tempfile::tempdir().unwrap();
    run(empty.path(), &["init", "--quiet", "--bare"]);
    let empty = clone(of(format!("file://{}", empty.path().display()), None)).await;
    assert_eq!(empty.failure().reason, Reason::RefNotFound);
    assert!(empty.failure().message.contains("empty"), "{}", empty.failure());
}

#[tokio::test]
async fn a_directory_is_imported_as_it_is() {
    let claim = tempfile::tempdir().unwrap();
    fs::create_dir(claim.path().join("a")).unwrap();
    fs::write(claim.path().join("a/b"), "content").unwrap();
    std::os::unix::fs::symlink("a/b", claim.path().join("link")).unwrap();
    let store = MemoryStore::new();
    let stored = scan::store(claim.path(), &store, silent()).await.unwrap();
    assert_eq!(names(&directory(&store, stored.root).await), ["a", "link"]);
    assert_eq!((stored.counts.files, stored.counts.bytes, stored.counts.symlinks), (1, 7, 1));
    let again = scan::store(claim.path(), &store, silent()).await.unwrap();
    assert_eq!(again.root, stored.root);
    let failure = scan::store(&claim.path().join("nosuch"), &store, silent()).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Invalid);
    let failure = scan::store(&claim.path().join("a/b"), &store, silent()).await.unwrap_err();
    assert!(failure.message.contains("not a directory"), "{failure}");
}

#[test]
fn the_program_reports_why_it_failed_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let result = directory.path().join("result.json");
    let scratch = directory.path().join("tmp");
    fs::create_dir(&scratch).unwrap();
    let program = env!("CARGO_BIN_EXE_aether-importer");
    let output = Command::new(program)
        .env("TMPDIR", &scratch)
        .args(["empty", "--result"])
        .arg(&result)
        .env_remove("AETHER_STORE")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let written = fs::read_to_string(&result).unwrap();
    assert!(written.starts_with(r#"{"ok":false,"reason":"Invalid","message":"--store is missing"#), "{written}");
    assert!(String::from_utf8_lossy(&output.stdout).contains(&written));
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
}
