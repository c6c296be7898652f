//! Repositories to import, made by the git program, and the way a test imports them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aether_cas::tree::Directory;
use aether_cas::{Blob, MemoryStore, Store};
use aether_importer::cli::Git;
use aether_importer::failure::Failure;
use aether_importer::git::{self, Cloned};
use aether_importer::report::Reporter;
use tempfile::TempDir;

/// Runs git in `directory`, with nobody's configuration, and returns what it printed.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> String {
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
pub(crate) struct Repository {
    /// Where it is alone in a directory of its own.
    _directory: Option<TempDir>,
    path: PathBuf,
    pub(crate) first: String,
    pub(crate) second: String,
}

impl Repository {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        Self { _directory: Some(directory), ..Self::at(&path) }
    }

    /// The same in a directory that stays.
    pub(crate) fn at(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        run(path, &["init", "--quiet", "--initial-branch=main"]);
        fs::write(path.join("README"), "one\n").unwrap();
        fs::create_dir(path.join("src")).unwrap();
        fs::write(path.join("src/main.c"), "int main;\n").unwrap();
        run(path, &["add", "."]);
        run(path, &["commit", "--quiet", "--message=first"]);
        run(path, &["tag", "--annotate", "--message=v1", "v1"]);
        let first = run(path, &["rev-parse", "HEAD"]);
        run(path, &["branch", "side"]);
        fs::write(path.join("README"), "two\n").unwrap();
        run(path, &["commit", "--quiet", "--all", "--message=second"]);
        let second = run(path, &["rev-parse", "HEAD"]);
        run(path, &["update-ref", "refs/pull/7/head", &first]);
        Self { _directory: None, path: path.to_owned(), first, second }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.path.display())
    }

    /// Adds a submodule by a URL that `git submodule add` need not reach: what lies at `from` is its content.
    pub(crate) fn add_submodule(&self, name: &str, from: &Path, url: &str) {
        run(&self.path, &["submodule", "--quiet", "add", &from.display().to_string(), name]);
        run(&self.path, &["config", "--file=.gitmodules", &format!("submodule.{name}.url"), url]);
        run(&self.path, &["add", ".gitmodules"]);
        run(&self.path, &["commit", "--quiet", &format!("--message={name}")]);
    }

    /// Adds a file that Git LFS keeps.
    pub(crate) fn add_large(&self, name: &str, content: &[u8]) {
        run(&self.path, &["lfs", "install", "--local"]);
        run(&self.path, &["lfs", "track", name]);
        fs::write(self.path.join(name), content).unwrap();
        run(&self.path, &["add", ".gitattributes", name]);
        run(&self.path, &["commit", "--quiet", &format!("--message={name}")]);
        let kept = run(&self.path, &["cat-file", "blob", &format!("HEAD:{name}")]);
        assert!(kept.starts_with("version https://git-lfs"), "git itself keeps only a pointer: {kept}");
    }
}

/// Where a clone was made.
pub(crate) struct Clone {
    pub(crate) scratch: TempDir,
    pub(crate) outcome: Result<Cloned, Failure>,
}

impl Clone {
    pub(crate) fn worktree(&self) -> PathBuf {
        self.scratch.path().join("worktree")
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.worktree().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn commit(&self) -> &str {
        match &self.outcome {
            Ok(Cloned::Commit(commit)) => commit,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn failure(&self) -> &Failure {
        self.outcome.as_ref().expect_err("it fails")
    }

    /// What `git status` says where a session would have it: the same files and times, other inodes.
    pub(crate) fn status_in_a_copy(&self, settings: &[&str]) -> String {
        let copy = self.scratch.path().join("copy");
        let status = Command::new("cp").arg("-a").arg(self.worktree()).arg(&copy).status().expect("cp is there");
        assert!(status.success());
        let settings = settings.iter().flat_map(|setting| ["-c", setting]);
        let arguments: Vec<&str> = settings.chain(["status", "--porcelain"]).collect();
        let said = run(&copy, &arguments);
        fs::remove_dir_all(copy).unwrap();
        said
    }
}

pub(crate) async fn clone(asked: Git) -> Clone {
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().join("home");
    fs::create_dir(&home).unwrap();
    let outcome = git::clone(&asked, &scratch.path().join("worktree"), &home, &silent()).await;
    Clone { scratch, outcome }
}

pub(crate) fn of(url: impl Into<String>, reference: Option<&str>) -> Git {
    Git { url: url.into(), reference: reference.map(Into::into), ..Default::default() }
}

/// A Secret as the importer's pod sees it: its keys are files.
pub(crate) fn secret(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(directory.path().join(name), contents).unwrap();
    }
    directory
}

pub(crate) fn with_secret(secret: &TempDir, asked: Git) -> Git {
    Git { secret_dir: Some(secret.path().into()), secret_name: Some("platform/key".into()), ..asked }
}

pub(crate) fn silent() -> Arc<Reporter> {
    Arc::new(Reporter::to(Box::new(std::io::sink())))
}

pub(crate) async fn directory(store: &MemoryStore, blob: Blob) -> Directory {
    Directory::decode(&store.read(blob).await.unwrap()).unwrap()
}

pub(crate) fn names(directory: &Directory) -> Vec<String> {
    directory.entries.keys().map(ToString::to_string).collect()
}
