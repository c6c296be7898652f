//! Imports of what Git LFS keeps, by the real `git-lfs`.

use std::fs;

use aether_cas::tree::Node;
use aether_cas::{MemoryStore, Store};
use aether_importer::cli::Git;
use aether_importer::failure::Reason;
use aether_importer::scan;

use crate::repository::{Repository, clone, directory, of, run, secret, silent, with_secret};
use aether_testkit::git_server::Server;

/// Settings of somebody who has no git-lfs: every use of the filter fails.
const WITHOUT_LFS: [&str; 3] = ["filter.lfs.process=", "filter.lfs.clean=false", "filter.lfs.smudge=false"];

/// Bytes of no text: any that are changed on the way are noticed.
fn content(seed: u8) -> Vec<u8> {
    (0..100_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

#[tokio::test]
async fn large_files_are_their_real_bytes_and_unmodified() {
    let root = tempfile::tempdir().unwrap();
    let repository = Repository::at(&root.path().join("outer"));
    let inner = Repository::at(&root.path().join("inner"));
    repository.add_large("large.bin", &content(1));
    inner.add_large("part.bin", &content(2));
    repository.add_submodule("inner", inner.path(), "../inner");
    let server = Server::https(root.path(), Some(("me", "hunter22")));
    let closed =
        secret(&[("username", "me"), ("password", "hunter22"), ("ca.crt", server.authority.as_deref().unwrap())]);
    let whole = |url: String| Git { lfs: true, submodules: true, depth: Some(1), ..of(url, None) };
    for asked in [whole(repository.url()), with_secret(&closed, whole(server.url("outer")))] {
        let imported = clone(asked).await;
        assert_eq!(imported.commit(), run(repository.path(), &["rev-parse", "HEAD"]));
        assert!(imported.read("large.bin") == content(1), "other bytes");
        assert!(imported.read("inner/part.bin") == content(2), "other bytes");
        assert_eq!(imported.status_in_a_copy(&[]), "");
        assert_eq!(imported.status_in_a_copy(&WITHOUT_LFS), "", "nothing is read anew");
        let config = fs::read_to_string(imported.worktree().join(".git/config")).unwrap();
        assert!(!config.contains("hunter22") && !config.contains("credential"), "{config}");

        let store = MemoryStore::new();
        let stored = scan::store(&imported.worktree(), &store, silent()).await.unwrap();
        let tree = directory(&store, stored.root).await;
        let large = tree.entries.iter().find(|(name, _)| name.to_string() == "large.bin").map(|(_, node)| node);
        let Some(Node::File { content: blob, .. }) = large else { panic!("{tree:?}") };
        assert!(store.read(*blob).await.unwrap() == content(1), "other bytes");

        // Whoever changes a file and takes it back has changed nothing: the filter is there for that.
        let file = imported.worktree().join("large.bin");
        fs::write(&file, "changed").unwrap();
        assert_eq!(run(&imported.worktree(), &["status", "--porcelain"]), "M large.bin");
        fs::write(&file, content(1)).unwrap();
        assert_eq!(run(&imported.worktree(), &["status", "--porcelain"]), "");
    }
}

#[tokio::test]
async fn pointers_stay_pointers_when_nobody_asks() {
    let repository = Repository::new();
    repository.add_large("large.bin", &content(3));
    let imported = clone(of(repository.url(), None)).await;
    imported.commit();
    assert!(imported.read("large.bin").starts_with(b"version https://git-lfs"));
    assert_eq!(imported.status_in_a_copy(&WITHOUT_LFS), "");
}

#[tokio::test]
async fn a_content_that_the_server_lost_is_a_failure_and_no_pointer() {
    let root = tempfile::tempdir().unwrap();
    let repository = Repository::at(&root.path().join("repository"));
    repository.add_large("large.bin", &content(4));
    fs::remove_dir_all(repository.path().join(".git/lfs/objects")).unwrap();
    let server = Server::http(root.path(), None);
    for url in [repository.url(), server.url("repository")] {
        let lost = clone(Git { lfs: true, ..of(url, None) }).await;
        assert_eq!(lost.failure().reason, Reason::ImportFailed, "{}", lost.failure());
        assert!(lost.failure().message.starts_with("git lfs failed"), "{}", lost.failure());
    }
}
