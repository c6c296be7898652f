//! Imports of real repositories, over file:// and over http with a password, into a store in memory.

mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aether_cas::tree::{Directory, Node};
use aether_cas::{Blob, MemoryStore, Store};
use aether_importer::cli::Git;
use aether_importer::failure::{Failure, Reason};
use aether_importer::git::{self, Cloned};
use aether_importer::report::Reporter;
use aether_importer::scan;
use server::Server;
use tempfile::TempDir;

fn run(directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("git");
    command.current_dir(directory).args([
        "-c",
        "user.name=A",
        "-c",
        "user.email=a@example.org",
        "-c",
        "protocol.file.allow=always",
        "-c",
        "commit.gpgSign=false",
    ]);
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("HOME", directory);
    let output = command.args(arguments).output().expect("git is installed");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A repository with two commits on `main`, a branch `side`, a tag `v1` of the first commit and a ref of another kind.
struct Repository {
    directory: TempDir,
    first: String,
    second: String,
}

impl Repository {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        run(at, &["init", "--quiet", "--initial-branch=main"]);
        fs::write(at.join("README"), "one\n").unwrap();
        fs::create_dir(at.join("src")).unwrap();
        fs::write(at.join("src/main.c"), "int main;\n").unwrap();
        run(at, &["add", "."]);
        run(at, &["commit", "--quiet", "--message=first"]);
        run(at, &["tag", "--annotate", "--message=v1", "v1"]);
        let first = run(at, &["rev-parse", "HEAD"]);
        run(at, &["branch", "side"]);
        fs::write(at.join("README"), "two\n").unwrap();
        run(at, &["commit", "--quiet", "--all", "--message=second"]);
        let second = run(at, &["rev-parse", "HEAD"]);
        run(at, &["update-ref", "refs/pull/7/head", &first]);
        run(at, &["update-server-info"]);
        Self { directory, first, second }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }
}

/// Where a clone was made.
struct Clone {
    scratch: TempDir,
    outcome: Result<Cloned, Failure>,
}

impl Clone {
    fn worktree(&self) -> PathBuf {
        self.scratch.path().join("worktree")
    }

    fn commit(&self) -> &str {
        match &self.outcome {
            Ok(Cloned::Commit(commit)) => commit,
            other => panic!("{other:?}"),
        }
    }

    fn failure(&self) -> &Failure {
        self.outcome.as_ref().expect_err("it fails")
    }
}

async fn clone(asked: Git) -> Clone {
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().join("home");
    fs::create_dir(&home).unwrap();
    let reporter = Reporter::to(Box::new(std::io::sink()));
    let outcome = git::clone(&asked, &scratch.path().join("worktree"), &home, &reporter).await;
    Clone { scratch, outcome }
}

fn of(url: impl Into<String>, reference: Option<&str>) -> Git {
    Git { url: url.into(), reference: reference.map(Into::into), ..Default::default() }
}

fn silent() -> Arc<Reporter> {
    Arc::new(Reporter::to(Box::new(std::io::sink())))
}

async fn directory(store: &MemoryStore, blob: Blob) -> Directory {
    Directory::decode(&store.read(blob).await.unwrap()).unwrap()
}

fn names(directory: &Directory) -> Vec<String> {
    directory.entries.keys().map(ToString::to_string).collect()
}

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
    let (inner, outer) = (Repository::new(), Repository::new());
    run(outer.path(), &["submodule", "--quiet", "add", &inner.url(), "inner"]);
    run(outer.path(), &["commit", "--quiet", "--message=inner"]);
    let without = clone(of(outer.url(), None)).await;
    assert_eq!(fs::read_dir(without.worktree().join("inner")).unwrap().count(), 0);
    let with = clone(Git { submodules: true, ..of(outer.url(), None) }).await;
    with.commit();
    assert_eq!(fs::read_to_string(with.worktree().join("inner/README")).unwrap(), "two\n");
    assert_eq!(run(&with.worktree(), &["status", "--porcelain"]), "");
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

fn secret(username: &str, password: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("username"), username).unwrap();
    fs::write(directory.path().join("password"), format!("{password}\n")).unwrap();
    directory
}

#[tokio::test]
async fn a_password_opens_what_is_closed_and_is_seen_nowhere() {
    let repository = Repository::new();
    let server = Server::start(repository.path().join(".git"), "me", "hunter22");
    let url = server.url("repository.git");
    let anonymous = clone(of(&url, None)).await;
    assert_eq!(anonymous.failure().reason, Reason::AuthenticationFailed, "{}", anonymous.failure());
    let wrong = secret("me", "wrong-password");
    let refused = clone(Git { secret_dir: Some(wrong.path().into()), ..of(&url, None) }).await;
    assert_eq!(refused.failure().reason, Reason::AuthenticationFailed, "{}", refused.failure());
    assert!(!refused.failure().message.contains("wrong-password"), "{}", refused.failure());

    let right = secret("me", "hunter22");
    let let_in = clone(Git { secret_dir: Some(right.path().into()), ..of(&url, Some("main")) }).await;
    assert_eq!(let_in.commit(), repository.second);
    let config = fs::read_to_string(let_in.worktree().join(".git/config")).unwrap();
    assert!(config.contains(&url), "{config}");
    for leaked in ["hunter22", "helper", "credential"] {
        assert!(!config.contains(leaked), "{config}");
    }
    let missing = clone(Git { secret_dir: Some(right.path().into()), ..of(server.url("nosuch.git"), None) }).await;
    assert_eq!(missing.failure().reason, Reason::RepositoryNotFound, "{}", missing.failure());
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
