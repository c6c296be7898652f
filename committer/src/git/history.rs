//! Commits that were made in the session: what its own repository says since the base commit.
//!
//! That repository is the agent's, who may have put anything into it. So of its files only objects, and where HEAD is, are
//! taken, and of the objects those that the session added, as long as these are enough; its settings, hooks and alternates are
//! never seen by a git. Every object is counted and checked anew (`index-pack --fsck-objects`) before our repository has it,
//! and all that the commits need beside the base commit must be among them: nothing is asked of the server on their word. What is
//! kept is one straight line from the base commit on: with anything else nobody could say which part of it was reviewed.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aether_cas::transfer::{Differing, Extent, read_directories};
use aether_cas::tree::{self, Change, Directory, Node, walk};
use aether_cas::{Blob, Store, StoreError};
use aether_git::{Call, Output};

use super::message;
use super::repository::{HERE, Repository};
use crate::cli;
use crate::failure::{Failure, Reason};

/// The most commits that are kept.
const MOST: usize = 1000;
/// The most bytes of objects that are taken: what fits on the disk of a node's pods.
const MOST_BYTES: u64 = 4 << 30;
/// The most bytes of HEAD, or of a branch.
const LONGEST_NAME: u64 = 4 << 10;
/// The most bytes of the names of all branches and tags.
const LONGEST_LIST: u64 = 64 << 20;

/// A commit as it was made in the session.
pub(super) struct Kept {
    pub(super) tree: String,
    pub(super) author: Author,
    /// As it was written, without what is added to the last one.
    pub(super) message: Vec<u8>,
}

/// Who wrote something, and when, as git's environment has it.
#[derive(Clone, Debug)]
pub(super) struct Author {
    pub(super) name: String,
    pub(super) email: String,
    /// `@1700000000 +0100`
    pub(super) date: String,
}

/// The commits from the base commit to the HEAD of the session's repository, the oldest first. `repository`, which has the base
/// commit, has them then. `scratch` must not exist.
pub(super) async fn read(
    repository: &Repository<'_>,
    asked: &cli::Git,
    scratch: PathBuf,
    store: &dyn Store,
) -> Result<Vec<Kept>, Failure> {
    let Some(new) = of(store, asked.root).await? else { return Ok(Vec::new()) };
    let Some(head) = head(store, new, &asked.base_commit).await? else { return Ok(Vec::new()) };
    if head == asked.base_commit {
        return Ok(Vec::new());
    }
    let old = of(store, asked.base_root).await?;
    let old = old.ok_or_else(|| refused("the session did not start with a repository"))?;
    let of_session = Session { repository, path: scratch };
    of_session.create(&asked.base_commit).await?;
    of_session.take_new(store, old, new).await?;
    let pack = match of_session.pack(&head, &asked.base_commit).await? {
        Ok(pack) => pack,
        Err(words) => {
            // What is as it was long ago, by a revert for one, git does not write again.
            tracing::info!(words, "the commits need more than the session has added: all objects are taken");
            of_session.take_all(store, new).await?;
            let packed = of_session.pack(&head, &asked.base_commit).await?;
            packed.map_err(|words| refused(format!("git cannot read {head}: {words}")))?
        }
    };
    of_session.bring(&pack, &head, &asked.base_commit).await?;
    list(repository, asked, &head).await
}

fn refused(why: impl AsRef<str>) -> Failure {
    let why = why.as_ref();
    let message = format!("the commits that were made in the session cannot be kept: {why}; ask for history Squash");
    Failure::new(Reason::Invalid, message)
}

/// The `.git` of a tree, if that is a directory.
async fn of(store: &dyn Store, root: Blob) -> Result<Option<Blob>, Failure> {
    Ok(match find(store, root, b".git").await? {
        Some(Node::Directory(found)) => Some(found),
        _ => None,
    })
}

/// What is at a path below a directory.
async fn find(store: &dyn Store, below: Blob, path: &[u8]) -> Result<Option<Node>, Failure> {
    let mut found = Node::Directory(below);
    for name in path.split(|byte| *byte == b'/') {
        let Node::Directory(blob) = found else { return Ok(None) };
        let data = store.read(blob).await?;
        let directory = Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob, source })?;
        let entry = directory.entries.iter().find(|(entry, _)| entry.as_bytes() == name);
        let Some((_, node)) = entry else { return Ok(None) };
        found = node.clone();
    }
    Ok(Some(found))
}

/// The text of a file below a directory; `None` when there is none of that name.
async fn text(store: &dyn Store, below: Blob, path: &str, longest: u64) -> Result<Option<String>, Failure> {
    let Some(Node::File { content, .. }) = find(store, below, path.as_bytes()).await? else { return Ok(None) };
    if content.size > longest {
        return Err(refused(format!(".git/{path} has {} bytes, which git does not write", content.size)));
    }
    Ok(Some(String::from_utf8_lossy(&store.read(content).await?).into_owned()))
}

/// The commit at which a repository is; `None` before its first one. `example` is a commit of the same format.
async fn head(store: &dyn Store, repository: Blob, example: &str) -> Result<Option<String>, Failure> {
    if find(store, repository, b"reftable").await?.is_some() {
        return Err(refused("its branches are kept as reftable"));
    }
    let Some(head) = text(store, repository, "HEAD", LONGEST_NAME).await? else { return Ok(None) };
    let commit = match head.trim_end().strip_prefix("ref: ") {
        None => Some(head),
        Some(branch) if !branch.starts_with("refs/heads/") || branch.split('/').any(|part| part == "..") => {
            return Err(refused(format!("its HEAD is {branch:?}, which is no branch")));
        }
        Some(branch) => match text(store, repository, branch, LONGEST_NAME).await? {
            Some(commit) => Some(commit),
            None => {
                let packed = text(store, repository, "packed-refs", LONGEST_LIST).await?.unwrap_or_default();
                let mut lines = packed.lines().filter_map(|line| line.split_once(' '));
                lines.find(|(_, name)| *name == branch).map(|(commit, _)| commit.to_owned())
            }
        },
    };
    let Some(commit) = commit.map(|commit| commit.trim_end().to_owned()) else { return Ok(None) };
    if commit.len() != example.len() || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(refused(format!("its HEAD is {commit:?}, which is no commit")));
    }
    Ok(Some(commit))
}

/// A repository of ours with the objects that the session added, of which none is believed.
struct Session<'a> {
    repository: &'a Repository<'a>,
    path: PathBuf,
}

impl Session<'_> {
    async fn create(&self, example: &str) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::other("make a repository", error);
        fs::create_dir(&self.path).map_err(failed)?;
        let format = if example.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        self.repository.git.run(&self.path, &["init", "--quiet", "--bare", format]).await?;
        // What was there before, the base commit above all.
        let ours = self.repository.path.join("objects");
        fs::write(self.path.join("objects/info/alternates"), format!("{}\n", ours.display())).map_err(failed)
    }

    /// Takes the objects that one repository has and the other has not.
    async fn take_new(&self, store: &dyn Store, old: Blob, new: Blob) -> Result<(), Failure> {
        let extent = Extent { without: None, bytes: u64::MAX };
        let trees = Differing::read(store, old, new, extent).await?.unwrap_or_default();
        let changes = tree::diff(&old, &new, &trees)?.into_iter();
        let files = changes.filter_map(|change| match change {
            Change { path, new: Some(Node::File { content, .. }), .. } => Some((path, content)),
            _ => None,
        });
        self.take(store, files.collect()).await
    }

    /// Takes all objects of a repository.
    async fn take_all(&self, store: &dyn Store, repository: Blob) -> Result<(), Failure> {
        let directories = read_directories(store, repository).await?;
        let mut files = Vec::new();
        walk::walk(&repository, &directories, |path, node| {
            if let Node::File { content, .. } = node {
                files.push((path.to_owned(), *content));
            }
            Ok::<_, StoreError>(())
        })?;
        self.take(store, files).await
    }

    /// Takes those files that are objects.
    async fn take(&self, store: &dyn Store, mut files: Vec<(PathBuf, Blob)>) -> Result<(), Failure> {
        files.retain(|(path, _)| is_object(path) && !self.path.join(path).exists());
        let bytes: u64 = files.iter().map(|(_, content)| content.size).sum();
        if bytes > MOST_BYTES {
            return Err(refused(format!("its repository has {bytes} bytes of objects that are to be looked at")));
        }
        for (path, content) in files {
            let path = self.path.join(path);
            let failed = |error: io::Error| Failure::other("write an object", error);
            fs::create_dir_all(path.parent().unwrap_or(&self.path)).map_err(failed)?;
            store.fetch_to(content, &path).await?;
        }
        Ok(())
    }

    /// Packs the commits; the path of the pack, or what git says of the objects.
    async fn pack(&self, head: &str, base: &str) -> Result<Result<PathBuf, String>, Failure> {
        let git = self.repository.git;
        let wanted = format!("{head}\n^{base}\n");
        let arguments = ["pack-objects", "--quiet", "--revs", "brought"];
        let packed = git.call(&self.path, &arguments, Call { input: wanted.as_bytes(), ..HERE }).await?;
        if !packed.status.success() {
            return self.blame(&arguments, &packed).map(Err);
        }
        let name = String::from_utf8_lossy(&packed.printed).trim().to_owned();
        Ok(Ok(self.path.join(format!("brought-{name}.pack"))))
    }

    /// Brings a pack to our repository, each object under the name that it earns.
    async fn bring(&self, pack: &Path, head: &str, base: &str) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::other("move a pack", error);
        let to = self.repository.path.join("objects/pack");
        fs::create_dir_all(&to).map_err(failed)?;
        let to = to.join(pack.file_name().unwrap_or_default());
        fs::rename(pack, &to).map_err(failed)?;
        let to = to.display().to_string();
        let (since, all) = (format!("^{base}"), ["--objects", "--quiet"]);
        for arguments in
            [vec!["index-pack", "--fsck-objects", &to], [&["rev-list"], &all[..], &[head, &since]].concat()]
        {
            let checked = self.repository.git.call(&self.repository.path, &arguments, HERE).await?;
            if !checked.status.success() {
                return Err(refused(self.blame(&arguments, &checked)?));
            }
        }
        Ok(())
    }

    /// What git says, when it is what it was given that is wrong.
    fn blame(&self, arguments: &[&str], output: &Output) -> Result<String, Failure> {
        let failure = self.repository.git.failure(arguments, output);
        let words = output.words.to_lowercase();
        let ours =
            output.status.code().is_none() || ["no space left", "out of memory"].iter().any(|it| words.contains(it));
        if ours { Err(failure.into()) } else { Ok(failure.message) }
    }
}

/// Whether git keeps objects at this path of a repository.
fn is_object(path: &Path) -> bool {
    let parts: Vec<&[u8]> = path.iter().map(OsStrExt::as_bytes).collect();
    let hex = |text: &[u8]| text.iter().all(u8::is_ascii_hexdigit);
    match parts.as_slice() {
        [b"objects", b"pack", name] => {
            let stem = name.strip_suffix(b".pack").or_else(|| name.strip_suffix(b".idx"));
            stem.and_then(|stem| stem.strip_prefix(b"pack-")).is_some_and(hex)
        }
        [b"objects", folder, name] => folder.len() == 2 && hex(folder) && hex(name),
        _ => false,
    }
}

/// The commits, if they are one line from the base commit on.
async fn list(repository: &Repository<'_>, asked: &cli::Git, head: &str) -> Result<Vec<Kept>, Failure> {
    const FORMAT: &str = "--format=%H%n%T%n%P%n%an%n%ae%n%ad%n%B";
    let (base, most) = (asked.base_commit.as_str(), format!("--max-count={}", MOST + 1));
    let range = format!("{base}..{head}");
    let arguments = ["log", "-z", "--topo-order", "--date=raw", "--encoding=UTF-8", FORMAT, &most, &range];
    let log = repository.git.ask(&repository.path, &arguments, HERE).await?;
    let log = String::from_utf8_lossy(&log);
    let (mut kept, mut expected) = (Vec::new(), head);
    for entry in log.split('\0').filter(|entry| !entry.is_empty()) {
        let mut lines = entry.splitn(7, '\n');
        let mut line = || lines.next().ok_or_else(|| Failure::other("read git's log", "a line is missing"));
        let (commit, tree, parents, name, email, date) = (line()?, line()?, line()?, line()?, line()?, line()?);
        let message = line()?;
        if commit != expected || parents.contains(' ') {
            return Err(refused(format!("there are merges between {base} and {head}")));
        }
        expected = parents;
        if name.trim().is_empty() {
            return Err(refused(format!("commit {commit} does not say who wrote it")));
        }
        let message = message::kept(message, asked).map_err(|why| refused(format!("commit {commit}: {why}")))?;
        let author = Author { name: name.into(), email: email.into(), date: format!("@{date}") };
        kept.push(Kept { tree: tree.into(), author, message });
        if kept.len() > MOST {
            return Err(refused(format!("there are more than {MOST}")));
        }
    }
    if expected != base {
        return Err(refused(format!(
            "they do not stand on {base}, from which the session started, but on {}",
            if expected.is_empty() { "nothing" } else { expected }
        )));
    }
    kept.reverse();
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_objects_is_taken() {
        let (short, long) = ("0".repeat(38), "a".repeat(40));
        for good in [
            format!("objects/0f/{short}"),
            format!("objects/pack/pack-{long}.pack"),
            format!("objects/pack/pack-{long}.idx"),
        ] {
            assert!(is_object(Path::new(&good)), "{good}");
        }
        for bad in [
            "config",
            "hooks/pre-push",
            "objects/info/alternates",
            "objects/pack/pack-0.keep",
            "objects/pack/tmp_pack_x",
            "objects/pack/multi-pack-index",
            "objects/0f/tmp_obj_x",
            "objects/../config",
            "modules/a/objects/00/00",
        ] {
            assert!(!is_object(Path::new(bad)), "{bad}");
        }
    }
}
