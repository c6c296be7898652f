//! The tree of a commit, read from git's objects: nothing is checked out, which would cost more than all the rest.
//!
//! The result is the tree that a checkout gives, to the byte. Where that takes more than copying what git keeps (line
//! endings, encodings and the like are converted, contents come from elsewhere) nothing is done, and the caller checks out.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_cas::digest::BlobHasher;
use aether_cas::transfer::{BATCH_BYTES, Object, upload_found};
use aether_cas::tree::{Attributes, Mtime, Node};
use aether_cas::{Blob, Store};
use aether_engine::git::index::{Id, Index};
use aether_git::Program;
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Child;
use tokio::sync::mpsc::Sender;
use tokio::task::JoinSet;

use crate::failure::{Failure, Reason};
use crate::folder::Folder;
use crate::report::{Phase, Reporter};
use crate::scan::{self, Found, Stored};

/// Attributes by which a checkout changes contents, or a word of them. (A filter does so only where it is configured.)
const CONVERTING: [&[u8]; 3] = [b"crlf", b"ident", b"encoding"];
const PIPE_BYTES: usize = 256 * 1024;
const SYMLINK: u32 = 0o120_000;
const GITLINK: u32 = 0o160_000;
const EXECUTABLE: u32 = 0o100_755;

/// What a repository holds under the name of an object.
struct Read {
    content: Blob,
    /// The bytes, if they were asked for.
    kept: Option<Bytes>,
}

type Contents = HashMap<Id, Read>;

/// Stores the tree of the commit that HEAD is of `worktree`, where nothing is checked out. `None`: it must be checked out.
///
/// # Errors
/// What git, the disk or the store said.
pub(super) async fn store(
    git: &Program<'_>,
    worktree: &Path,
    scratch: &Path,
    mtime: Mtime,
    to: &dyn Store,
    reporter: &Arc<Reporter>,
) -> Result<Option<Stored>, Failure> {
    git.run(worktree, &["read-tree", "HEAD"]).await?;
    let path = worktree.join(".git/index");
    let index = Index::read(&path).map_err(|error| Failure::other("read git's index", error))?;
    if let Some(index) = index
        && !converts(git, worktree, scratch, &index).await?
    {
        let (sender, found) = scan::found();
        let work = read_and_build(git, worktree, scratch, mtime, &index, sender, reporter);
        let (built, uploaded) = tokio::join!(work, upload_found(found, to));
        uploaded.map_err(|error| Failure::other("upload to the store", error))?;
        let built = built?;
        return scan::finish(built, to, reporter).await.map(Some);
    }
    std::fs::remove_file(&path).map_err(|error| Failure::other("remove git's index", error))?;
    Ok(None)
}

/// Whether the attributes say that a file of a working copy may differ from what git keeps.
async fn converts(git: &Program<'_>, worktree: &Path, scratch: &Path, index: &Index) -> Result<bool, Failure> {
    if worktree.join(".git/info/attributes").exists() {
        return Ok(true);
    }
    // A submodule may be called so too, and is no object of this repository.
    let attributes = index.entries().filter(|listed| {
        listed.mode != GITLINK && listed.path.split(|byte| *byte == b'/').next_back() == Some(b".gitattributes")
    });
    let ids: Vec<Id> = attributes.map(|listed| listed.id).collect();
    let contents = read(git, worktree, ids.clone(), ids.into_iter().collect(), None, scratch).await?;
    // One that is too large to be looked at may say anything.
    let converting =
        |text: &Bytes| CONVERTING.iter().any(|word| text.windows(word.len()).any(|window| window == *word));
    Ok(contents.values().any(|read| read.kept.as_ref().is_none_or(converting)))
}

async fn read_and_build(
    git: &Program<'_>,
    worktree: &Path,
    scratch: &Path,
    mtime: Mtime,
    index: &Index,
    found: Sender<Found>,
    reporter: &Arc<Reporter>,
) -> Result<scan::Built, Failure> {
    let listed: Vec<_> = index.entries().filter(|listed| listed.mode != GITLINK).collect();
    let targets = listed.iter().filter(|listed| listed.mode == SYMLINK).map(|listed| listed.id).collect();
    let mut once = HashSet::new();
    let ids: Vec<Id> = listed.iter().map(|listed| listed.id).filter(|id| once.insert(*id)).collect();
    reporter.progress(Phase::Scanning, 0, Some(listed.len() as u64), 0);
    let contents = read(git, worktree, ids, targets, Some(found.clone()), scratch).await?;

    let sizes: HashMap<Id, u64> = contents.iter().map(|(id, read)| (*id, read.content.size)).collect();
    let at = worktree.to_owned();
    tokio::task::spawn_blocking(move || aether_engine::git::prepare_unchecked(&at, mtime, |id| sizes.get(id).copied()))
        .await
        .map_err(|error| Failure::other("prepare the repository", error))?
        .map_err(|error| Failure::other("prepare the repository", error))?;
    let (repository, source) = scan::scan_into(&worktree.join(".git"), found, reporter).await?;

    // As a checkout would make them, with the same mask.
    let about = std::fs::metadata(worktree).map_err(|error| Failure::other("read the working copy", error))?;
    let shape = Shape { mode: about.permissions().mode() & 0o777, mtime };
    let mut root = Folder::new(mtime);
    root.insert(b".git", Node::Directory(repository.root))?;
    let mut counts = repository.counts;
    for listed in index.entries() {
        if listed.mode == GITLINK {
            // A submodule that is not fetched is an empty directory.
            root.folder(listed.path, mtime)?;
            continue;
        }
        let read = &contents[&listed.id];
        if listed.mode == SYMLINK {
            counts.symlinks += 1;
        } else {
            counts.files += 1;
            counts.bytes += read.content.size;
        }
        root.insert(listed.path, shape.leaf(listed.mode, read)?)?;
    }
    let root = root.finish(shape.mode, &source.directories, &mut counts)?;
    Ok(scan::Built { root, counts, source })
}

/// Reads objects, on all cores; what is read goes to `found`, and is kept where `keep` says so.
async fn read(
    git: &Program<'_>,
    worktree: &Path,
    ids: Vec<Id>,
    keep: HashSet<Id>,
    found: Option<Sender<Found>>,
    scratch: &Path,
) -> Result<Contents, Failure> {
    let failed = |error: io::Error| Failure::other("read git's objects", error);
    let keep = Arc::new(keep);
    let parts = std::thread::available_parallelism().map_or(1, usize::from);
    let mut readers = JoinSet::new();
    // Neighbours in the tree are often neighbours in git's pack.
    for part in ids.chunks(ids.len().div_ceil(parts).max(1)) {
        let child = git.start(worktree, &["cat-file", "--batch", "--buffer"])?;
        let reader = Reader { keep: keep.clone(), found: found.clone(), scratch: scratch.to_owned() };
        readers.spawn(reader.read_all(child, part.to_vec()));
    }
    let mut contents = HashMap::new();
    while let Some(read) = readers.join_next().await {
        contents.extend(read.map_err(|error| Failure::other("read git's objects", error))?.map_err(failed)?);
    }
    Ok(contents)
}

struct Reader {
    keep: Arc<HashSet<Id>>,
    found: Option<Sender<Found>>,
    scratch: PathBuf,
}

impl Reader {
    async fn read_all(self, mut child: Child, ids: Vec<Id>) -> io::Result<Contents> {
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("git has no input or output"));
        };
        let names: String = ids.iter().map(|id| hex::encode(id) + "\n").collect();
        let ask = async move { stdin.write_all(names.as_bytes()).await };
        let answers = async {
            let mut stdout = BufReader::with_capacity(PIPE_BYTES, stdout);
            let mut contents = HashMap::with_capacity(ids.len());
            for id in ids {
                let read = self.read_one(&id, &mut stdout).await?;
                contents.insert(id, read);
            }
            Ok::<_, io::Error>(contents)
        };
        // What git says tells more than that it no longer listens.
        let (asked, contents) = tokio::join!(ask, answers);
        let contents = contents?;
        asked?;
        child.wait().await?;
        Ok(contents)
    }

    async fn read_one(&self, id: &Id, from: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Read> {
        let mut header = String::new();
        from.read_line(&mut header).await?;
        let name = hex::encode(id);
        let size = header.trim_end().strip_prefix(&name).and_then(|rest| rest.strip_prefix(" blob ")?.parse().ok());
        let Some(size) = size else {
            return Err(io::Error::other(format!("git said {:?} of object {name}", header.trim_end())));
        };
        let (content, object) = if size > BATCH_BYTES {
            let path = self.scratch.join(&name);
            (copy(&mut (&mut *from).take(size), &path).await?, Object::File(path))
        } else {
            let mut data = vec![0; size as usize];
            from.read_exact(&mut data).await?;
            (Blob::of(&data), Object::Bytes(data.into()))
        };
        // A newline follows.
        from.read_u8().await?;
        if content.size != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("git broke off in object {name}")));
        }
        let kept = match &object {
            Object::Bytes(data) if self.keep.contains(id) => Some(data.clone()),
            _ => None,
        };
        if let Some(found) = &self.found
            && !content.is_empty()
        {
            found.send((content, object)).await.map_err(|_| io::Error::other("the upload has ended"))?;
        }
        Ok(Read { content, kept })
    }
}

/// Copies to a new file, and says what it was.
async fn copy(from: &mut (impl tokio::io::AsyncRead + Unpin), path: &Path) -> io::Result<Blob> {
    let mut file = tokio::fs::File::create(path).await?;
    let mut hasher = BlobHasher::new();
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        match from.read(&mut buffer).await? {
            0 => break,
            read => {
                hasher.update(&buffer[..read]);
                file.write_all(&buffer[..read]).await?;
            }
        }
    }
    file.flush().await?;
    Ok(hasher.finish())
}

/// How everything of a fresh checkout looks.
struct Shape {
    /// Of directories, from which that of files follows.
    mode: u32,
    mtime: Mtime,
}

impl Shape {
    fn attributes(&self, mode: u32) -> Attributes {
        Attributes { mode, mtime: self.mtime, ..Attributes::default() }
    }

    fn leaf(&self, mode: u32, read: &Read) -> Result<Node, Failure> {
        if mode != SYMLINK {
            let mode = if mode == EXECUTABLE { self.mode } else { self.mode & 0o666 };
            return Ok(Node::File { content: read.content, attributes: self.attributes(mode), link_group: None });
        }
        let Some(target) = &read.kept else {
            return Err(Failure::new(Reason::Invalid, "the target of a symbolic link is longer than any path"));
        };
        Ok(Node::Symlink { target: target.to_vec(), attributes: self.attributes(0o777), link_group: None })
    }
}
