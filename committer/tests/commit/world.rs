//! A repository on a server, a store, a session's files, and the program that commits them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use aether_cas::{LocalConfig, LocalStore, RemoteStore};
use aether_importer::cli;
use aether_importer::report::Reporter;
use aether_importer::{git, scan};
use aether_runtime::{CancellationToken, Metrics};
use aether_store_node::metrics::StoreMetrics;
use aether_store_node::{Guard, serve};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_aether-committer");

/// Runs git in `directory`, with nobody's configuration, and returns what it printed.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> String {
    let output = plain(directory).args(arguments).output().expect("git is installed");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn plain(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(directory).args(["-c", "user.name=A", "-c", "user.email=a@example.org"]);
    command.args(["-c", "protocol.file.allow=always", "-c", "commit.gpgSign=false"]);
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("HOME", directory);
    command
}

/// A store and a repository.
pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) store: RemoteStore,
    address: String,
    stop: CancellationToken,
}

impl World {
    /// The repository `app.git` has a branch `main` with some files of all kinds that git knows.
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalStore::open(LocalConfig {
            objects: folder.path().join("objects"),
            index: folder.path().join("index"),
            inline_limit: 16 << 10,
        })
        .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, store, StoreMetrics::new(&Metrics::new()), Guard::default(), stop.clone()));
        let store = RemoteStore::connect(&address).await.unwrap();
        let world = Self { folder, store, address, stop };
        let work = world.at("work");
        run(world.folder.path(), &["init", "--quiet", "--bare", "--initial-branch=main", "app.git"]);
        run(world.folder.path(), &["init", "--quiet", "--initial-branch=main", "work"]);
        for (name, content) in [
            ("README", "one\ntwo\nthree\nfour\nfive\nsix\nseven\n"),
            ("src/main.c", "int main;\n"),
            ("src/deep/er/file", "deep\n"),
            ("gone/a", "a\n"),
            ("gone/b", "b\n"),
            ("run.sh", "#!/bin/sh\n"),
        ] {
            write(&work.join(name), content);
        }
        mode(&work.join("run.sh"), 0o755);
        std::os::unix::fs::symlink("README", work.join("link")).unwrap();
        world.publish("first");
        world
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Commits what is in `work`, and brings it to `main`.
    pub(crate) fn publish(&self, message: &str) -> String {
        run(&self.at("work"), &["add", "--all"]);
        run(&self.at("work"), &["commit", "--quiet", "--allow-empty", "--message", message]);
        run(&self.at("work"), &["push", "--quiet", "../app.git", "HEAD:refs/heads/main"]);
        run(&self.at("work"), &["rev-parse", "HEAD"])
    }

    pub(crate) fn server(&self, arguments: &[&str]) -> String {
        run(&self.at("app.git"), arguments)
    }

    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.at("app.git").display())
    }

    /// A hook of the server.
    pub(crate) fn hook(&self, name: &str, script: &str) {
        let hook = self.at("app.git/hooks").join(name);
        write(&hook, script);
        mode(&hook, 0o755);
    }

    /// A session of `main`, by the importer.
    pub(crate) async fn session(&self, name: &str) -> Session {
        self.session_of(name, cli::Git { url: self.url(), ..cli::Git::default() }).await
    }

    pub(crate) async fn session_of(&self, name: &str, asked: cli::Git) -> Session {
        let (files, home) = (self.at(name), self.at(&format!("{name}-home")));
        fs::create_dir(&home).unwrap();
        let git::Cloned::Commit(commit) = git::clone(&asked, &files, &home, &silent()).await.unwrap() else {
            panic!("nothing is known yet")
        };
        let base = scan::store(&files, &self.store, silent()).await.unwrap().root.to_string();
        Session { files, commit, base }
    }

    /// The tree of a session as it is now, in the store.
    pub(crate) async fn root(&self, session: &Session) -> String {
        self.tree(&session.files).await
    }

    /// The program, for a session as it is now.
    pub(crate) async fn program(&self, session: &Session, uid: &str, more: &[&str]) -> Command {
        let root = self.root(session).await;
        let mut command = Command::new(PROGRAM);
        command.env_remove("AETHER_STORE").env("TMPDIR", self.folder.path()).env("RUST_LOG", "trace");
        command.args(["git", "--store", &self.address, "--base-commit", &session.commit, "--base-root", &session.base]);
        command.args(["--commit-uid", uid, "--result"]).arg(self.at(&format!("{uid}.json")));
        let given = |option: &str| more.contains(&option);
        for (option, value) in [
            ("--url", self.url().as_str()),
            ("--branch", "main"),
            ("--message", "Change things\n\nFor a reason."),
            ("--root", &root),
        ] {
            if !given(option) {
                command.args([option, value]);
            }
        }
        command.args(more).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) async fn commit(&self, session: &Session, uid: &str, more: &[&str]) -> Run {
        finish(self.program(session, uid, more).await.spawn().unwrap()).await
    }

    /// The program, with these arguments.
    pub(crate) fn other(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env_remove("AETHER_STORE").env("TMPDIR", self.folder.path()).env("RUST_LOG", "debug");
        command.args(arguments).args(["--store", &self.address]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The tree of a directory as it is now, in the store.
    pub(crate) async fn tree(&self, directory: &Path) -> String {
        scan::store(directory, &self.store, silent()).await.unwrap().root.to_string()
    }

    /// Asserts that the branch holds what the session holds, beside empty directories.
    pub(crate) fn compare(&self, branch: &str, session: &Session) {
        let copy = tempfile::tempdir_in(self.folder.path()).unwrap();
        let to = copy.path().join("copy");
        run(copy.path(), &["clone", "--quiet", "--branch", branch, &self.url(), to.to_str().unwrap()]);
        assert_eq!(listing(&to), listing(&session.files));
        self.server(&["fsck", "--strict", "--no-dangling"]);
    }

    /// How many commits of the branch carry the UID.
    pub(crate) fn count(&self, branch: &str, uid: &str) -> usize {
        let log = self.server(&["log", "--format=%(trailers:key=Aether-Commit,valueonly)", branch]);
        log.lines().filter(|line| *line == uid).count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What an agent sees.
pub(crate) struct Session {
    pub(crate) files: PathBuf,
    pub(crate) commit: String,
    pub(crate) base: String,
}

impl Session {
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        write(&self.files.join(name), content);
    }

    pub(crate) fn remove(&self, name: &str) {
        let path = self.files.join(name);
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
}

/// How the program ended.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    /// The last line on stdout.
    pub(crate) result: Value,
    /// Everything that it printed.
    pub(crate) printed: String,
}

impl Run {
    pub(crate) fn done(&self) -> &Value {
        assert_eq!((self.code, &self.result["ok"]), (Some(0), &true.into()), "{}", self.printed);
        &self.result
    }

    pub(crate) fn failed(&self, reason: &str, kind: &str) -> &Value {
        let said = (&self.result["ok"], &self.result["reason"], &self.result["kind"]);
        assert_eq!(said, (&false.into(), &reason.into(), &kind.into()), "{}", self.printed);
        assert_eq!(self.code, Some(1), "{}", self.printed);
        &self.result
    }

    pub(crate) fn message(&self) -> &str {
        self.result["message"].as_str().unwrap_or_default()
    }
}

pub(crate) async fn finish(child: Child) -> Run {
    let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let result = out.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    Run { code: output.status.code(), result, printed: format!("{out}\n{err}") }
}

pub(crate) fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub(crate) fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A Secret as a pod sees it: its keys are files.
pub(crate) fn secret(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(directory.path().join(name), contents).unwrap();
    }
    directory
}

fn silent() -> Arc<Reporter> {
    Arc::new(Reporter::to(Box::new(std::io::sink())))
}

/// Every file and symlink: whether it may be executed, and its content.
fn listing(root: &Path) -> BTreeMap<PathBuf, (&'static str, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() == ".git" {
                continue;
            }
            let about = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_owned();
            if about.is_dir() {
                folders.push(path);
            } else if about.is_symlink() {
                use std::os::unix::ffi::OsStringExt;
                found.insert(name, ("120000", fs::read_link(path).unwrap().into_os_string().into_vec()));
            } else if about.is_file() {
                let mode = if about.mode() & 0o100 != 0 { "100755" } else { "100644" };
                found.insert(name, (mode, fs::read(path).unwrap()));
            }
        }
    }
    found
}
