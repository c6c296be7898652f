//! Makes a git working copy fit to be a source: quick in its first `git status`, and without anything that belongs to
//! whoever cloned it.
//!
//! Git reads a file again when its stat data differs from the index. In a session the inode, device, owner and change
//! time always differ from those of the importer, so git is told to look at size and modification time alone
//! (`core.checkStat=minimal`, `core.trustctime=false`), every entry gets one fixed modification time, and the index is
//! refreshed against it. The index file itself is one second younger: git distrusts entries that are not older than
//! their index ("racily clean") and would read them all. What git does not look at any more is dropped from the index, so
//! that the same commit is the same tree each time ([`index`]).
//!
//! The scan that follows must keep modification times (`mtime: None`).
//!
//! Nothing need be checked out for this ([`prepare_unchecked`]): what the index should say of each file is known from git's
//! objects.
//!
//! What else git offers is left to the user. `core.untrackedCache` would spare the listing of directories, a third of a
//! warm status; but its cache names the place of the working copy, which every pod chooses, and where the two differ
//! and whenever a directory has changed git writes the whole index anew, which each session and each checkpoint would
//! then store. A file system monitor needs a process beside the files in every pod. Instead a session's names are in
//! the kernel's caches before a pod looks (`warm`).

pub mod index;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aether_cas::tree::Mtime;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::error::{Context, Error, Result};
use index::{Id, Index};

/// Sections of a repository's configuration that say how its cloner reached the remote, or that run programs.
const FOREIGN_SECTIONS: [&str; 5] = ["credential", "http", "include", "includeif", "url"];
/// Single settings of that kind.
const FOREIGN_KEYS: [&str; 5] =
    ["core.askpass", "core.fsmonitor", "core.gitproxy", "core.hookspath", "core.sshcommand"];

/// Prepares the working copy at `worktree` and those of its submodules.
///
/// Afterwards everything is packed, no hook and no credential is left in any of its git directories, every entry has
/// the modification time `mtime` (of which git compares whole seconds), and the indexes agree with that.
///
/// # Errors
/// `Invalid` if there is no git directory of its own at `worktree` (a linked worktree has none); `Io` with what git
/// said if it failed.
pub fn prepare(worktree: &Path, mtime: Mtime) -> Result<()> {
    let repositories = groom(worktree)?;
    set_times(worktree, mtime)?;
    let mut worktrees = vec![worktree.to_owned()];
    worktrees.extend(submodules(worktree)?);
    for worktree in &worktrees {
        // Fails if something is modified, which is as well: what matters is that the rest is refreshed.
        let _modified = git(worktree).args(["update-index", "-q", "--really-refresh"]).status();
    }
    finish(worktree, &repositories, mtime, |_| None)
}

/// As [`prepare`], of a working copy that has an index but none of its files: `size` says what size each will have. A file that
/// it does not know stays one that git reads again.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_unchecked(worktree: &Path, mtime: Mtime, size: impl Fn(&Id) -> Option<u64>) -> Result<()> {
    let repositories = groom(worktree)?;
    finish(worktree, &repositories, mtime, size)
}

/// Packs, cleans and configures the repository at `worktree` and those of its submodules, and returns their git directories.
fn groom(worktree: &Path) -> Result<BTreeSet<PathBuf>> {
    let git_directory = worktree.join(".git");
    if !fs::symlink_metadata(&git_directory).is_ok_and(|about| about.is_dir()) {
        return Err(Error::Invalid {
            what: worktree.display().to_string(),
            reason: "it is not the root of a git working copy".into(),
        });
    }
    let repositories = repositories(&git_directory)?;
    for repository in &repositories {
        pack(repository)?;
        clean(repository)?;
        for setting in ["core.checkStat=minimal", "core.trustctime=false"] {
            let (key, value) = setting.split_once('=').expect("a setting has a value");
            configure(repository, &[key, value])?;
        }
    }
    Ok(repositories)
}

/// Settles the indexes, and gives one time to what git has touched.
fn finish(
    worktree: &Path,
    repositories: &BTreeSet<PathBuf>,
    mtime: Mtime,
    size: impl Fn(&Id) -> Option<u64>,
) -> Result<()> {
    let indexes: Vec<PathBuf> =
        repositories.iter().map(|repository| repository.join("index")).filter(|index| index.exists()).collect();
    for path in &indexes {
        if let Some(mut index) = Index::read(path)? {
            index.expect(mtime.seconds, &size);
            index.forget_place();
            index.write(path)?;
        }
    }
    set_times(&worktree.join(".git"), mtime)?;
    let younger = Mtime { seconds: mtime.seconds + 1, ..mtime };
    for index in &indexes {
        set_time(index, younger)?;
    }
    set_time(worktree, mtime)
}

/// The git directory and those of submodules within it, checked out or not.
fn repositories(git_directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::from([git_directory.to_owned()]);
    let mut todo = vec![git_directory.join("modules")];
    while let Some(directory) = todo.pop() {
        let is_repository = directory.join("HEAD").is_file() && directory.join("objects").is_dir();
        if is_repository {
            todo.push(directory.join("modules"));
            found.insert(directory);
            continue;
        }
        match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            entries => {
                for entry in entries.at("list", &directory)? {
                    let entry = entry.at("list", &directory)?;
                    if entry.file_type().at("stat", entry.path())?.is_dir() {
                        todo.push(entry.path());
                    }
                }
            }
        }
    }
    Ok(found)
}

/// One pack instead of many files, and one file for all references.
fn pack(repository: &Path) -> Result<()> {
    let counts = text(bare(repository).args(["count-objects", "-v"]), repository)?;
    let count = |key: &str| counts.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
    if count("count:") != Some(0) || count("packs:").is_none_or(|packs| packs > 1) {
        run(bare(repository).args(["repack", "-a", "-d", "-q"]), repository)?;
        run(bare(repository).args(["prune-packed", "-q"]), repository)?;
    }
    run(bare(repository).args(["pack-refs", "--all"]), repository)
}

/// Removes hooks, and whatever its cloner's configuration left.
fn clean(repository: &Path) -> Result<()> {
    for name in ["hooks", "FETCH_HEAD"] {
        let path = repository.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.at("remove", &path)?,
        }
    }
    let listing = output(
        git(repository).args(["config", "--null", "--list", "--file"]).arg(repository.join("config")),
        repository,
    )?;
    for setting in listing.split(|byte| *byte == 0).filter(|setting| !setting.is_empty()) {
        let end = setting.iter().position(|byte| *byte == b'\n').unwrap_or(setting.len());
        let (key, value) = setting.split_at(end);
        let (key, value) = (OsStr::from_bytes(key), value.get(1..).unwrap_or_default());
        let lower = key.to_string_lossy().to_lowercase();
        let section = lower.split('.').next().unwrap_or_default();
        if FOREIGN_SECTIONS.contains(&section) || FOREIGN_KEYS.contains(&lower.as_str()) {
            // A key that is there twice is listed twice.
            let _gone_already = configure(repository, &[OsStr::new("--unset-all"), key]);
        } else if let Some(anonymous) = without_credentials(value) {
            let pattern = OsStr::new("--fixed-value");
            let (new, old) = (OsStr::from_bytes(&anonymous), OsStr::from_bytes(value));
            configure(repository, &[pattern, OsStr::new("--replace-all"), key, new, old])?;
        }
    }
    Ok(())
}

/// The URL without its password, or without its user where that may be a token; `None` if there is neither.
fn without_credentials(value: &[u8]) -> Option<Vec<u8>> {
    let scheme_end = value.windows(3).position(|window| window == b"://")? + 3;
    let (scheme, rest) = value.split_at(scheme_end);
    let host_end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let at = rest[..host_end].iter().rposition(|byte| *byte == b'@')?;
    let user = &rest[..at];
    let kept: &[u8] = if scheme.eq_ignore_ascii_case(b"ssh://") {
        // The user of an ssh URL is part of the address.
        let colon = user.iter().position(|byte| *byte == b':')?;
        &user[..colon]
    } else {
        b""
    };
    let separator: &[u8] = if kept.is_empty() { b"" } else { b"@" };
    Some([scheme, kept, separator, &rest[at + 1..]].concat())
}

/// Working copies of submodules that are checked out, at any depth.
fn submodules(worktree: &Path) -> Result<Vec<PathBuf>> {
    if !worktree.join(".gitmodules").exists() {
        return Ok(Vec::new());
    }
    let listing = output(
        git(worktree).args(["submodule", "--quiet", "foreach", "--recursive", "printf '%s\\0' \"$PWD\""]),
        worktree,
    )?;
    let paths = listing.split(|byte| *byte == 0).filter(|path| !path.is_empty());
    Ok(paths.map(|path| PathBuf::from(OsStr::from_bytes(path))).collect())
}

/// Gives everything below `directory`, and itself, one modification time.
fn set_times(directory: &Path, mtime: Mtime) -> Result<()> {
    for entry in walkdir::WalkDir::new(directory).follow_links(false) {
        let entry = entry.map_err(|error| Error::io("list", directory, error))?;
        set_time(entry.path(), mtime)?;
    }
    Ok(())
}

fn set_time(path: &Path, mtime: Mtime) -> Result<()> {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: i64::from(mtime.nanos) };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).at("set the modification time of", path)
}

/// Git in a directory, with nobody's configuration but the repository's, asking nobody and running no hook.
fn git(directory: &Path) -> Command {
    let mut command = Command::new("git");
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG_PARAMETERS"] {
        command.env_remove(variable);
    }
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_TERMINAL_PROMPT", "0");
    command.args(["-c", "safe.directory=*", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"]);
    command.arg("-C").arg(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Git on a repository rather than on its working copy, which a submodule that is not checked out does not have.
fn bare(repository: &Path) -> Command {
    let mut command = git(repository);
    command.arg("--git-dir").arg(repository).args(["-c", "core.bare=true"]);
    command
}

fn configure(repository: &Path, arguments: &[impl AsRef<OsStr>]) -> Result<()> {
    run(git(repository).arg("config").arg("--file").arg(repository.join("config")).args(arguments), repository)
}

fn run(command: &mut Command, at: &Path) -> Result<()> {
    output(command, at).map(drop)
}

fn text(command: &mut Command, at: &Path) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command, at)?).into_owned())
}

/// What git prints; its complaint if it fails.
fn output(command: &mut Command, at: &Path) -> Result<Vec<u8>> {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().at("run git in", at)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::io("run git in", at, io::Error::other(format!("{}: {}", output.status, said.trim()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_go_and_addresses_stay() {
        let without = |url: &str| without_credentials(url.as_bytes()).map(|url| String::from_utf8(url).unwrap());
        assert_eq!(without("https://token@host/a.git").as_deref(), Some("https://host/a.git"));
        assert_eq!(without("https://user:p@ss@host:8443/a@b").as_deref(), Some("https://host:8443/a@b"));
        assert_eq!(without("ssh://git:secret@host/a").as_deref(), Some("ssh://git@host/a"));
        for clean in ["https://host/a@b", "ssh://git@host/a", "git@host:a", "/srv/a", "true", "http://host?a@b"] {
            assert_eq!(without(clean), None, "{clean}");
        }
    }
}
