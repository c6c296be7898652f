//! A new folder of a bucket that holds a tree: an object for each file, and one more, written last, that says what they are.
//!
//! A folder is the tree's that was first exported to it, and begins empty: the first object is a record of what is on its way,
//! which only one export can make. Whoever was interrupted goes on by it. Where an export is, no other begins, neither around
//! it nor within. So an object that was there before is never written; one of the tree itself that somebody has changed since is,
//! when the tree is exported to the same folder again. Beyond that a folder with the list in it never changes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::iter::successors;
use std::path::Path;
use std::time::{Duration, Instant};

use aether_cas::transfer::read_directories;
use aether_cas::tree::{Node, walk};
use aether_cas::{Blob, Store, StoreError};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{Certificate, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, WriteMultipart};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use super::{free, tree};
use crate::cli::S3;
use crate::crash::crash_point;
use crate::failure::{Failure, Reason};
use crate::losses::Losses;
use crate::report::Exported;

/// The list of what was exported, when that is all there.
const MANIFEST: &str = ".aether-export.json";
/// The same while it is not: of what is there by then.
const PROGRESS: &str = ".aether-export.partial.json";
/// How often that is written.
const PERIOD: Duration = Duration::from_secs(15);
/// Of version 1 were exports with repositories in them.
const VERSION: u32 = 2;
/// Where the service is taken to be when nobody says.
const REGION: &str = "us-east-1";
/// Contents up to this size are sent in one piece.
const PIECE: usize = 8 << 20;
/// Objects on their way at one time, and pieces of a large one.
const AT_ONCE: usize = 8;

const SYMLINK: &str = "symbolic links are left out, because a bucket has none";
const EXECUTABLE: &str = "modes are left out, because a bucket has none: of files that may be executed";
const FIFO: &str = "named pipes are left out, because a bucket has none";
const NAME: &str = "these names cannot be keys of a bucket, and are left out";

/// What an export wrote.
#[derive(Deserialize, Serialize)]
struct Manifest {
    version: u32,
    root: String,
    objects: BTreeMap<String, Written>,
}

/// An object, and what it was made of.
#[derive(Clone, Deserialize, Serialize)]
struct Written {
    content: Blob,
    etag: String,
}

/// Size and ETag of every object of a folder.
type Listing = HashMap<Key, (u64, Option<String>)>;

struct Bucket<'a> {
    asked: &'a S3,
    objects: AmazonS3,
    prefix: Key,
    spool: &'a Path,
}

/// Writes the tree, as far as it is not there. `scratch` is for contents that are on their way.
///
/// # Errors
/// With the reason for the request's status, and whether the same may succeed later.
pub async fn export(asked: &S3, scratch: &Path, store: &dyn Store) -> Result<Exported, Failure> {
    let bucket = Bucket::open(asked, scratch)?;
    let directories = read_directories(store, asked.root).await?;
    let mut losses = Losses::default();
    let mut files = BTreeMap::new();
    let root = tree::shown(&asked.root, &directories, &mut losses)?;
    walk(&root, &directories, |path, node| {
        use std::os::unix::ffi::OsStrExt;
        let bytes = path.as_os_str().as_bytes();
        match node {
            Node::Directory(_) => {}
            Node::Symlink { .. } => losses.add(SYMLINK, bytes),
            Node::Fifo { .. } => losses.add(FIFO, bytes),
            Node::File { content, attributes, .. } => {
                if attributes.mode & 0o111 != 0 {
                    losses.add(EXECUTABLE, bytes);
                }
                let named = |path: &&str| bucket.key(path).is_ok_and(|key| !is_record(&key));
                match path.to_str().filter(named) {
                    Some(path) => drop(files.insert(path.to_owned(), *content)),
                    None => losses.add(NAME, bytes),
                }
            }
        }
        Ok::<(), StoreError>(())
    })?;
    // First of all, because a service that refuses to be asked for an object says best why.
    let earlier = bucket.earlier().await?;
    let there = bucket.list().await?;
    let (earlier, complete) = match earlier {
        Some(earlier) => {
            bucket.alone(&there).await?;
            earlier
        }
        None => (bucket.begin(&there).await?, false),
    };
    crash_point!("export.s3.begun");
    let unchanged = |path: &str, content: Blob| {
        let written = earlier.get(path).filter(|written| written.content == content)?;
        let is = there.get(&bucket.key(path).ok()?)?;
        (is.1.as_ref() == Some(&written.etag) && is.0 == content.size).then(|| written.clone())
    };
    let (kept, new): (Vec<_>, Vec<_>) = files
        .iter()
        .map(|(path, content)| (path, *content, unchanged(path, *content)))
        .partition(|(.., kept)| kept.is_some());
    let objects = kept.into_iter().filter_map(|(path, _, written)| Some((path.clone(), written?))).collect();
    let mut manifest = Manifest { version: VERSION, root: asked.root.to_string(), objects };
    let written = new.len() as u64;
    let mut saved = Instant::now();
    let mut sent =
        stream::iter(new).map(|(path, content, _)| bucket.write(path, content, store)).buffer_unordered(AT_ONCE);
    while let Some((path, written)) = sent.try_next().await? {
        manifest.objects.insert(path, written);
        if saved.elapsed() > PERIOD {
            bucket.record(PROGRESS, &manifest, PutMode::Overwrite).await?;
            saved = Instant::now();
        }
    }
    drop(sent);
    crash_point!("export.s3.written");
    let found = complete && written == 0;
    if !found {
        bucket.record(MANIFEST, &manifest, PutMode::Overwrite).await?;
        crash_point!("export.s3.complete");
    }
    bucket.remove(PROGRESS).await?;
    crash_point!("export.s3.ended");
    Ok(Exported {
        root: asked.root.to_string(),
        place: bucket.place(),
        found,
        files: files.len() as u64,
        written,
        bytes: files.values().map(|content| content.size).sum(),
        warnings: losses.warnings(),
        milliseconds: 0,
    })
}

/// Whether this is the list of some export, complete or not.
fn is_record(key: &Key) -> bool {
    key.filename().is_some_and(|name| [MANIFEST, PROGRESS].contains(&name))
}

impl<'a> Bucket<'a> {
    /// Asks nothing yet.
    fn open(asked: &'a S3, spool: &'a Path) -> Result<Self, Failure> {
        // What is installed already, if anything, serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let invalid = |why: String| Failure::new(Reason::Invalid, why);
        let region = asked.region.as_deref().filter(|region| !region.is_empty()).unwrap_or(REGION);
        let prefix = asked.prefix.trim_matches('/');
        if prefix.is_empty() {
            return Err(invalid("an export needs a folder of its own in the bucket (--prefix)".into()));
        }
        free(&format!("--prefix {prefix}"), prefix.split('/').map(OsStr::new))?;
        let prefix = Key::parse(prefix).map_err(|error| invalid(format!("the prefix cannot be used: {error}")))?;
        let secret = Secret::read(asked)?;
        let endpoint = asked.endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
        let options = secret.authorities.into_iter().fold(
            ClientOptions::new()
                .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
                .with_connect_timeout(Duration::from_secs(10))
                .with_read_timeout(Duration::from_secs(30))
                // A large object may take its time, as long as something comes.
                .with_timeout_disabled(),
            ClientOptions::with_root_certificate,
        );
        let builder =
            AmazonS3Builder::new().with_bucket_name(&asked.bucket).with_region(region).with_client_options(options);
        let builder = endpoint.into_iter().fold(builder, AmazonS3Builder::with_endpoint);
        // Without a Secret nobody is asked for credentials: those of the node are not the source's.
        let builder = match secret.credential {
            None => builder.with_skip_signature(true),
            Some((key, secret, token)) => {
                let builder = builder.with_access_key_id(key).with_secret_access_key(secret);
                token.into_iter().fold(builder, AmazonS3Builder::with_token)
            }
        };
        let objects =
            builder.build().map_err(|error| invalid(format!("bucket {} cannot be used: {error}", asked.bucket)))?;
        Ok(Self { asked, objects, prefix, spool })
    }

    /// The key of a file. Its parts are what they are called, or there is none.
    fn key(&self, path: &str) -> Result<Key, object_store::path::Error> {
        Key::parse(format!("{}/{path}", self.prefix))
    }

    fn known(&self, path: &str) -> Result<Key, Failure> {
        self.key(path).map_err(|error| Failure::new(Reason::Invalid, format!("{path:?} cannot be a key: {error}")))
    }

    fn place(&self) -> String {
        format!("s3://{}/{}/", self.asked.bucket, self.prefix)
    }

    /// What an earlier export of this tree wrote, and whether that was all.
    async fn earlier(&self) -> Result<Option<(BTreeMap<String, Written>, bool)>, Failure> {
        // In this order, because another run may end meanwhile.
        let partial = self.manifest(PROGRESS).await?;
        let complete = self.manifest(MANIFEST).await?;
        let is_complete = complete.is_some();
        match complete.or(partial) {
            Some(found) if found.root == self.asked.root.to_string() => Ok(Some((found.objects, is_complete))),
            Some(_) => Err(self.taken("an export of another tree at")),
            None => Ok(None),
        }
    }

    /// Takes a folder in which nothing is. Of several that do so one succeeds; of folders within each other at most one.
    async fn begin(&self, there: &Listing) -> Result<BTreeMap<String, Written>, Failure> {
        if !there.is_empty() {
            return Err(self.taken("something else at"));
        }
        self.alone(there).await?;
        let begin = Manifest { version: VERSION, root: self.asked.root.to_string(), objects: BTreeMap::new() };
        self.record(PROGRESS, &begin, PutMode::Create).await?;
        // Whoever began around it or within by now is seen here, or will see this record.
        if let Err(refusal) = self.alone(&self.list().await?).await {
            self.remove(PROGRESS).await?;
            return Err(refusal);
        }
        Ok(begin.objects)
    }

    /// Refuses a folder around which there is an export, or within which: of two such each could write what is the other's.
    async fn alone(&self, there: &Listing) -> Result<(), Failure> {
        let own = [self.known(MANIFEST)?, self.known(PROGRESS)?];
        if there.keys().any(|key| is_record(key) && !own.contains(key)) {
            return Err(self.taken("another export within"));
        }
        let outer: Vec<Key> =
            successors(self.prefix.parent(), Key::parent).take_while(|outer| !outer.is_root()).collect();
        let mut asked = stream::iter(outer).map(|outer| self.is_export(outer)).buffer_unordered(AT_ONCE);
        while let Some(is_export) = asked.try_next().await? {
            if is_export {
                return Err(self.taken("another export around"));
            }
        }
        Ok(())
    }

    async fn is_export(&self, folder: Key) -> Result<bool, Failure> {
        // In this order, because it may end meanwhile.
        for name in [PROGRESS, MANIFEST] {
            match self.objects.head(&folder.clone().join(name)).await {
                Ok(_) => return Ok(true),
                // Above what the key opens nobody exports with it.
                Err(object_store::Error::NotFound { .. } | object_store::Error::PermissionDenied { .. }) => {}
                Err(error) => return Err(self.refused("look for an export around", "", error)),
            }
        }
        Ok(false)
    }

    fn taken(&self, by: &str) -> Failure {
        let message = format!("there is {by} {} already: export to another path, or have it removed", self.place());
        Failure::new(Reason::TargetExists, message)
    }

    /// A list of objects, if there is one of this name.
    async fn manifest(&self, name: &str) -> Result<Option<Manifest>, Failure> {
        let unreadable = |why: String| {
            let message = format!("{name} at {} cannot be read: {why}; export to another path", self.place());
            Failure::new(Reason::TargetExists, message)
        };
        let answer = match self.objects.get(&self.known(name)?).await {
            Ok(answer) => answer,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.refused("read", name, error)),
        };
        let text = answer.bytes().await.map_err(|error| self.refused("read", name, error))?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        if manifest.version != VERSION {
            return Err(unreadable(format!("it is of version {}", manifest.version)));
        }
        Ok(Some(manifest))
    }

    async fn list(&self) -> Result<Listing, Failure> {
        let listed = self.objects.list(Some(&self.prefix));
        let listed = listed.map_ok(|object| (object.location, (object.size, object.e_tag)));
        listed.try_collect().await.map_err(|error| self.refused("list", "", error))
    }

    async fn write(&self, path: &str, content: Blob, store: &dyn Store) -> Result<(String, Written), Failure> {
        let key = self.known(path)?;
        let refused = |error| self.refused("write", path, error);
        let result = if content.size <= PIECE as u64 {
            let data = store.read(content).await?;
            self.objects.put(&key, data.into()).await.map_err(refused)?
        } else {
            let spooled =
                tempfile::TempDir::new_in(self.spool).map_err(|error| Failure::other("keep a content", error))?;
            let file = spooled.path().join("content");
            // Verified before the first byte of it leaves.
            store.fetch_to(content, &file).await?;
            let unread = |error: std::io::Error| Failure::other("read a content", error);
            let mut file = tokio::fs::File::open(&file).await.map_err(unread)?;
            let upload = self.objects.put_multipart(&key).await.map_err(refused)?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, PIECE);
            let mut buffer = vec![0; 1 << 20];
            loop {
                match file.read(&mut buffer).await.map_err(unread)? {
                    0 => break,
                    read => upload.write(&buffer[..read]),
                }
                upload.wait_for_capacity(AT_ONCE).await.map_err(refused)?;
            }
            upload.finish().await.map_err(refused)?
        };
        let etag = result.e_tag.unwrap_or_default();
        Ok((path.to_owned(), Written { content, etag }))
    }

    async fn remove(&self, path: &str) -> Result<(), Failure> {
        match self.objects.delete(&self.known(path)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.refused("remove", path, error)),
        }
    }

    async fn record(&self, name: &str, manifest: &Manifest, mode: PutMode) -> Result<(), Failure> {
        let text = serde_json::to_vec(manifest).map_err(|error| Failure::other("write the list of objects", error))?;
        let written = self.objects.put_opts(&self.known(name)?, text.into(), mode.into()).await;
        written.map(drop).map_err(|error| self.refused("write", name, error))
    }

    fn refused(&self, action: &str, path: &str, error: object_store::Error) -> Failure {
        let reason = match &error {
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Reason::AuthenticationFailed
            }
            object_store::Error::NotFound { .. } => Reason::BucketNotFound,
            _ => Reason::CommitFailed,
        };
        let secret = match (reason, &self.asked.secret_name) {
            (Reason::AuthenticationFailed, Some(name)) => format!(" (check Secret {name})"),
            _ => String::new(),
        };
        let message = format!("cannot {action} s3://{}/{}/{path}{secret}: {error}", self.asked.bucket, self.prefix);
        Failure::new(reason, message)
    }
}

/// What the files of a Secret say.
#[derive(Default)]
struct Secret {
    /// Key, secret and token.
    credential: Option<(String, String, Option<String>)>,
    authorities: Vec<Certificate>,
}

impl Secret {
    fn read(asked: &S3) -> Result<Self, Failure> {
        let Some(directory) = &asked.secret_dir else { return Ok(Self::default()) };
        let name = asked.secret_name.as_ref().map_or("the Secret".into(), |name| format!("Secret {name}"));
        let invalid = |why: String| Failure::new(Reason::SecretInvalid, format!("{name} {why}"));
        let read = |key: &str| match fs::read_to_string(directory.join(key)) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(invalid(format!("cannot be read ({key}): {error}"))),
        };
        let authorities = match read("ca.crt")? {
            Some(text) => Certificate::from_pem_bundle(text.as_bytes())
                .ok()
                .filter(|authorities| !authorities.is_empty())
                .ok_or_else(|| invalid("has a ca.crt that is no PEM certificate".into()))?,
            None => Vec::new(),
        };
        let credential = match (read("AWS_ACCESS_KEY_ID")?, read("AWS_SECRET_ACCESS_KEY")?) {
            (Some(key), Some(secret)) => Some((key, secret, read("AWS_SESSION_TOKEN")?)),
            _ => return Err(invalid("lacks AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY".into())),
        };
        Ok(Self { credential, authorities })
    }
}
