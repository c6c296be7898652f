//! The git tree of the reviewed one: the base commit's, with what changed written over it.
//!
//! Nothing but what changed is written to the disk, for git to read as it reads a working copy, so that line endings,
//! encodings and Git LFS go the way back that the import came.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path as FilePath, PathBuf};

use aether_cas::transfer::{Differing, Extent, batches, read_batch};
use aether_cas::{Blob, Store};
use aether_git::{Call, LFS_FILTER, Reason as Git};

use super::difference::{Difference, Object, Path, loss};
use super::repository::Repository;
use crate::cli;
use crate::failure::{Failure, Kind};

/// Contents up to this size are read into memory, several at a time.
const SMALL: u64 = 1 << 20;
const GITLINK: &[u8] = b"160000";

/// A tree of git.
pub(super) struct Written {
    /// Its id.
    pub(super) tree: String,
    /// How many paths differ from the base.
    pub(super) files: u64,
    /// What it does not say as the reviewed tree did.
    pub(super) warnings: Vec<String>,
}

/// A repository with files beside it.
struct Copy<'a> {
    repository: &'a Repository<'a>,
    files: PathBuf,
    environment: [(&'static str, String); 2],
}

/// Writes the tree into `repository`, which has the base commit. `files` must not exist.
pub(super) async fn write(
    repository: &Repository<'_>,
    asked: &cli::Git,
    files: PathBuf,
    store: &dyn Store,
) -> Result<Written, Failure> {
    fs::create_dir(&files).map_err(|error| Failure::other("make a directory for files", error))?;
    let text = |path: &FilePath| path.display().to_string();
    let environment = [("GIT_DIR", text(&repository.path)), ("GIT_WORK_TREE", text(&files))];
    let copy = Copy { repository, files, environment };
    if asked.lfs {
        for (key, value) in LFS_FILTER {
            repository.configure(key, value).await?;
        }
    }
    copy.git(&["read-tree", &asked.base_commit], &[]).await?;
    let listed = copy.index().await?;
    let submodules = listed.into_iter().filter(|(_, (mode, _))| mode == GITLINK).map(|(path, _)| path);
    let submodules: BTreeSet<Path> = submodules.collect();

    // Git has no place for what is called as its own.
    let extent = Extent { without: Some(b".git"), bytes: u64::MAX };
    let trees = Differing::read(store, asked.base_root, asked.root, extent).await?.unwrap_or_default();
    let mut difference = Difference::between(&trees, &asked.base_root, &asked.root, &submodules)?;
    copy.write(&difference.written, store).await?;
    // First, because what is removed may be in the way of what is written.
    copy.git(&["update-index", "-z", "--force-remove", "--stdin"], &joined(&difference.removed)).await?;
    copy.git(&["update-index", "-z", "--add", "--stdin"], &joined(difference.written.keys())).await?;
    copy.compare(&mut difference, asked.lfs).await?;
    // Contents of other files are not here.
    let tree = copy.git(&["write-tree", "--missing-ok"], &[]).await?;
    Ok(Written {
        tree: String::from_utf8_lossy(&tree).trim().to_owned(),
        files: difference.paths(),
        warnings: difference.losses.warnings(),
    })
}

impl Copy<'_> {
    async fn git(&self, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, Failure> {
        let environment = self.environment.each_ref().map(|(key, value)| (*key, value.as_str()));
        let call = Call { input, environment: &environment };
        self.repository.git.ask(&self.files, arguments, call).await.map_err(|failure| match failure.reason {
            // Such as a name that git takes for its own: it will say so again.
            Git::Failed => Failure { kind: Kind::Permanent, ..failure.into() },
            _ => failure.into(),
        })
    }

    /// All paths of the index, with mode and id.
    async fn index(&self) -> Result<Vec<(Path, (Vec<u8>, Vec<u8>))>, Failure> {
        let listed = self.git(&["ls-files", "--stage", "-z"], &[]).await?;
        let entry = |line: &[u8]| {
            let tab = line.iter().position(|byte| *byte == b'\t')?;
            let mut words = line[..tab].split(|byte| *byte == b' ');
            let (mode, id) = (words.next()?.to_owned(), words.next()?.to_owned());
            Some((line[tab + 1..].to_owned(), (mode, id)))
        };
        Ok(listed.split(|byte| *byte == 0).filter_map(entry).collect())
    }

    /// Writes files and symlinks.
    async fn write(&self, objects: &BTreeMap<Path, Object>, store: &dyn Store) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::other("write a file", error);
        let mut files: HashMap<Blob, Vec<(PathBuf, bool)>> = HashMap::new();
        for (path, object) in objects {
            let path = self.files.join(std::ffi::OsStr::from_bytes(path));
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            match object {
                Object::Symlink(target) => symlink(std::ffi::OsStr::from_bytes(target), &path).map_err(failed)?,
                Object::File { content, executable } => files.entry(*content).or_default().push((path, *executable)),
            }
        }
        let (small, large): (Vec<Blob>, Vec<Blob>) = files.keys().partition(|blob| blob.size <= SMALL);
        for batch in batches(small) {
            for (blob, data) in read_batch(batch, store).await? {
                for (path, executable) in &files[&blob] {
                    fs::write(path, &data).and_then(|()| allow(path, *executable)).map_err(failed)?;
                }
            }
        }
        for blob in large {
            let [(first, executable), others @ ..] = files[&blob].as_slice() else { continue };
            store.fetch_to(blob, first).await?;
            for (path, executable) in others {
                fs::copy(first, path).and_then(|_| allow(path, *executable)).map_err(failed)?;
            }
            allow(first, *executable).map_err(failed)?;
        }
        Ok(())
    }

    /// Notes what git leaves out without a word, and the files of which it keeps other bytes than were reviewed. Pointers
    /// are what Git LFS is for.
    async fn compare(&self, difference: &mut Difference, lfs: bool) -> Result<(), Failure> {
        let kept: HashMap<Path, (Vec<u8>, Vec<u8>)> = self.index().await?.into_iter().collect();
        let left_out: Vec<Path> = difference.written.keys().filter(|path| !kept.contains_key(*path)).cloned().collect();
        for path in left_out {
            difference.written.remove(&path);
            difference.losses.add(loss::NAME, &path);
        }
        let files = difference.written.iter().filter(|(_, object)| matches!(object, Object::File { .. }));
        let files: Vec<&Path> = files.map(|(path, _)| path).collect();
        // One name a line, so none is left as it is.
        let quoted =
            |path: &Path| format!("\"{}\"\n", path.iter().map(|byte| format!("\\{byte:03o}")).collect::<String>());
        let names: String = files.iter().map(|path| quoted(path)).collect();
        let plain = self.git(&["hash-object", "--no-filters", "--stdin-paths"], names.as_bytes()).await?;
        let plain = plain.split(|byte| *byte == b'\n');
        let converted = files.into_iter().zip(plain).filter(|(path, id)| kept[*path].1 != *id);
        let mut converted: BTreeSet<Path> = converted.map(|(path, _)| path.clone()).collect();
        if lfs && !converted.is_empty() {
            let filters = self.git(&["check-attr", "-z", "--stdin", "filter"], &joined(&converted)).await?;
            let words: Vec<&[u8]> = filters.split(|byte| *byte == 0).collect();
            for answer in words.chunks_exact(3).filter(|answer| answer[2] == b"lfs") {
                converted.remove(answer[0]);
            }
        }
        for path in converted {
            difference.losses.add(loss::CONVERTED, &path);
        }
        Ok(())
    }
}

/// Paths, each with a NUL behind it.
fn joined<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Vec<u8> {
    paths.into_iter().flat_map(|path| path.iter().copied().chain([0])).collect()
}

fn allow(path: &FilePath, executable: bool) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))
}
