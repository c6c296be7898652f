//! Answers the kernel's questions about the file system.
//!
//! It keeps nothing that the next server would miss: the number of an inode is 1 for the root, 2 to 257 for the folders
//! `00` to `ff`, and 1024 and more for objects, by their number in the catalog.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aether_cas::lazy::{self, Catalog, Places};
use aether_cas::{Blob, Digest, RemoteStore, StoreError};
use aether_runtime::metrics::{Counter, Labelled};
use fuser::{
    BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    Request, Session, SessionACL,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::runtime::Handle;

use crate::exchange::Opens;
use crate::lock;
use crate::objects::{Content, Failure, Limits, Objects, Rest};
use crate::pace::Pace;
use crate::protocol::MOST_BYTES;

/// Names and attributes never change: a content has one name.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const ROOT: u64 = 1;
const FIRST_FOLDER: u64 = 2;
const FIRST_OBJECT: u64 = 1024;

aether_runtime::label! {
    /// What became of a fetch.
    pub enum Outcome: "outcome" {
        /// It arrived, verified.
        Ok = "ok",
        /// The store does not have it.
        Missing = "missing",
        /// What arrived was not what its name says.
        Wrong = "wrong",
        /// Anything else: the store does not answer, the disk is full.
        Failed = "failed",
    }
}

/// What the lazy layer counts. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    fetches: Labelled<(Outcome,), Counter>,
    fetched_bytes: Counter,
    opens: Counter,
    reads: Counter,
    errors: Counter,
}

impl Metrics {
    /// Rows of `table`.
    pub fn new(table: &aether_runtime::Metrics) -> Self {
        Self {
            fetches: table.counters("aether_lazy_fetches", "Contents fetched from the store because they were opened"),
            fetched_bytes: table.counter("aether_lazy_fetched_bytes", "Bytes fetched because they were read"),
            opens: table.counter("aether_lazy_opens", "Opens of contents through the lazy layer"),
            reads: table.counter("aether_lazy_reads", "Reads answered here; the kernel reads by itself where it can"),
            errors: table.counter("aether_lazy_errors", "Reads answered with EIO because a content could not be had"),
        }
    }

    /// Reads answered with EIO so far.
    pub fn errors(&self) -> u64 {
        self.errors.get()
    }

    /// Opens so far.
    pub fn opens(&self) -> u64 {
        self.opens.get()
    }

    /// Reads answered by a server so far, rather than by the kernel itself.
    pub fn reads(&self) -> u64 {
        self.reads.get()
    }

    /// Fetches that ended so far.
    pub fn fetches(&self, outcome: Outcome) -> u64 {
        self.fetches.of((outcome,)).get()
    }

    pub(crate) fn count_fetch(&self, blob: Blob, error: Option<&StoreError>) {
        let outcome = match error {
            None => Outcome::Ok,
            Some(StoreError::NotFound { .. }) => Outcome::Missing,
            Some(StoreError::Mismatch { .. } | StoreError::Corrupt { .. }) => Outcome::Wrong,
            Some(_) => Outcome::Failed,
        };
        self.fetches.of((outcome,)).inc();
        if error.is_none() {
            self.fetched_bytes.inc_by(blob.size);
        }
    }

    pub(crate) fn count_part(&self, bytes: usize) {
        self.fetched_bytes.inc_by(bytes as u64);
    }
}

/// What a server needs.
#[derive(Clone)]
pub struct Setup {
    /// Where the files of the node are.
    pub places: Places,
    /// Where contents come from.
    pub store: RemoteStore,
    /// Limits of fetching.
    pub limits: Limits,
    /// What to count in.
    pub metrics: Metrics,
}

/// Serves on `socket`, whose other end an [`Exchange`](crate::Exchange) holds, until that is closed. Blocks; fetches run
/// on `runtime`.
///
/// # Errors
/// When the other end does not say what it must, or a file of the node cannot be read.
pub fn serve(socket: OwnedFd, setup: Setup, runtime: Handle) -> io::Result<()> {
    let (device, opens) = take_over(&socket)?;
    let objects = Objects::new(&setup.places, setup.store, setup.limits, setup.metrics.clone())?;
    let layer = Layer(Arc::new(Inner {
        catalog: Mutex::new(Catalog::open(&setup.places.catalog())?),
        places: setup.places,
        objects,
        metrics: setup.metrics,
        runtime,
        device,
        passthrough: AtomicBool::new(true),
        opens: Mutex::new(opens),
        reading: Mutex::default(),
        noted: Mutex::default(),
    }));
    let session = Session::from_fd(layer, socket, SessionACL::Owner, Config::default())?;
    // How it ends says nothing: the other end was closed, which is no message that the session knows.
    let _ = session.run();
    Ok(())
}

/// Fetches what of the catalog is not on this node, at no more than `bytes_per_second` (0 for no bound); for a node on
/// which nobody will serve any more.
///
/// # Errors
/// When a file of the node cannot be read. What could not be fetched is in the answer.
pub async fn fetch_rest(setup: Setup, bytes_per_second: u64) -> io::Result<Rest> {
    let blobs = Catalog::open(&setup.places.catalog())?.blobs().to_vec();
    let objects = Objects::new(&setup.places, setup.store, setup.limits, setup.metrics)?;
    Ok(objects.fetch_all(blobs, &Pace::new(bytes_per_second)).await)
}

/// Agrees with the kernel on a new connection.
pub(crate) fn greet(device: OwnedFd) -> io::Result<()> {
    // Only its greeting is answered; the session is then forgotten without being run, and closes its descriptor alone.
    Session::from_fd(Greeter, device, SessionACL::Owner, Config::default()).map(drop)
}

fn agree(config: &mut KernelConfig) {
    let _ = config.set_max_write(MOST_BYTES);
    let _ = config.set_max_readahead(MOST_BYTES);
    let _ = config.set_max_background(64);
    // Lookups in one folder need not wait for each other.
    let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
    // Overlayfs lies on this file system, and this file system on none that lies on another.
    if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
        let _ = config.set_max_stack_depth(1);
    }
}

struct Greeter;

impl Filesystem for Greeter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        agree(config);
        Ok(())
    }
}

/// Receives what [`Exchange`](crate::Exchange) hands over.
fn take_over(socket: &OwnedFd) -> io::Result<(OwnedFd, HashMap<u64, Opens>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut greeting = [0; 16];
    recvmsg(socket, &mut [IoSliceMut::new(&mut greeting)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let Ok([device, memory]) = <[OwnedFd; 2]>::try_from(descriptors) else {
        return Err(io::Error::other("the other end of the socket is no exchange of a lazy layer"));
    };
    let mut bytes = Vec::new();
    let mut file = File::from(memory);
    io::Seek::rewind(&mut file)?;
    file.read_to_end(&mut bytes)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).unwrap_or_default();
    let opens = bytes
        .chunks_exact(16)
        .map(|record| {
            let node = record[..8].try_into().map(u64::from_ne_bytes).unwrap_or_default();
            (node, Opens { backing: word(&record[8..12]), count: word(&record[12..]) })
        })
        .collect();
    Ok((device, opens))
}

struct Layer(Arc<Inner>);

struct Inner {
    catalog: Mutex<Catalog>,
    places: Places,
    objects: Arc<Objects>,
    metrics: Metrics,
    runtime: Handle,
    device: OwnedFd,
    /// Until the kernel refuses it.
    passthrough: AtomicBool,
    opens: Mutex<HashMap<u64, Opens>>,
    /// Contents that are read through this process, by inode; what is not here is looked for again.
    reading: Mutex<HashMap<u64, Content>>,
    /// Numbers that this server has noted as opened.
    noted: Mutex<std::collections::HashSet<u64>>,
}

impl Filesystem for Layer {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        agree(config);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.find(parent.0, name) {
            Ok(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            Err(errno) => {
                if errno.code() == libc::EIO {
                    self.0.metrics.errors.inc();
                    let folder = parent.0.saturating_sub(FIRST_FOLDER);
                    tracing::error!(
                        pid = request.pid(),
                        "content {folder:02x}{} is not in the catalog: EIO",
                        name.display()
                    );
                }
                reply.error(errno);
            }
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.attributes(ino.0) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::EIO),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let (inner, pid) = (self.0.clone(), request.pid());
        self.0.runtime.spawn(async move { inner.open(ino.0, pid, reply).await });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (inner, pid) = (self.0.clone(), request.pid());
        inner.metrics.reads.inc();
        self.0.runtime.spawn(async move {
            match inner.read(ino.0, offset, u64::from(size)).await {
                Ok(data) => reply.data(&data),
                Err(failure) => {
                    inner.complain(ino.0, pid, &failure);
                    reply.error(Errno::EIO);
                }
            }
        });
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.release(ino.0);
        reply.ok();
    }

    /// Names are found, not listed.
    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, reply: ReplyDirectory) {
        reply.ok();
    }
}

impl Inner {
    fn find(&self, parent: u64, name: &OsStr) -> Result<FileAttr, Errno> {
        let name = name.to_str().ok_or(Errno::ENOENT)?;
        if parent == ROOT {
            // Anything else, such as the name by which it is asked whether anybody is here.
            let folder = (0..=u8::MAX).find(|folder| format!("{folder:02x}") == name).ok_or(Errno::ENOENT)?;
            return self.attributes(FIRST_FOLDER + u64::from(folder)).ok_or(Errno::EIO);
        }
        let folder = parent.checked_sub(FIRST_FOLDER).filter(|folder| *folder < 256).ok_or(Errno::ENOENT)?;
        let digest: Digest = format!("{folder:02x}{name}").parse().map_err(|_| Errno::ENOENT)?;
        let mut catalog = lock(&self.catalog);
        let number = match catalog.number(&digest) {
            Some(number) => Some(number),
            None => {
                if let Err(error) = catalog.refresh() {
                    tracing::error!(%error, "cannot read the catalog of the lazy layer");
                }
                catalog.number(&digest)
            }
        };
        drop(catalog);
        number.and_then(|number| self.attributes(FIRST_OBJECT + number)).ok_or(Errno::EIO)
    }

    fn attributes(&self, node: u64) -> Option<FileAttr> {
        let (kind, size) = match node {
            ..FIRST_OBJECT => (FileType::Directory, 0),
            _ => (FileType::RegularFile, self.blob(node)?.size),
        };
        let directory = kind == FileType::Directory;
        Some(FileAttr {
            ino: INodeNo(node),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm: if directory { 0o555 } else { 0o444 },
            nlink: if directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// The object of an inode. An earlier server may have given the number out after this one read the catalog.
    fn blob(&self, node: u64) -> Option<Blob> {
        let number = node.checked_sub(FIRST_OBJECT)?;
        let mut catalog = lock(&self.catalog);
        if catalog.blob(number).is_none() {
            let _ = catalog.refresh();
        }
        catalog.blob(number)
    }

    async fn open(&self, node: u64, pid: u32, reply: ReplyOpen) {
        self.metrics.opens.inc();
        self.note(node);
        let content = match self.content(node).await {
            Ok(content) => content,
            Err(failure) => {
                self.complain(node, pid, &failure);
                return reply.error(Errno::EIO);
            }
        };
        match self.admit(node, &content) {
            Some(backing) => {
                // SAFETY: the number is open in this connection and stays so until the last release; `into_raw` below
                // keeps fuser, which knows only the socket, from closing it.
                let backing = unsafe { reply.wrap_backing(backing) };
                reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), &backing);
                backing.into_raw();
            }
            None => {
                // Parts are not verified: what the kernel keeps of them is not for those who come later.
                let verified = self.blob(node).is_some_and(|blob| !self.objects.comes_in_parts(blob));
                lock(&self.reading).insert(node, content);
                let flags = if verified { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                reply.opened(FileHandle(0), flags);
            }
        }
    }

    async fn content(&self, node: u64) -> Result<Content, Failure> {
        let unknown = || Failure::Disk {
            action: "find an inode in the catalog",
            source: Arc::new(io::ErrorKind::NotFound.into()),
        };
        let blob = self.blob(node).ok_or_else(unknown)?;
        self.objects.obtain(blob).await
    }

    /// Counts an open, and says by which file the kernel reads by itself. All opens of an inode at one time must agree.
    fn admit(&self, node: u64, content: &Content) -> Option<u32> {
        let mut all = lock(&self.opens);
        let opens = all.entry(node).or_insert_with(|| {
            let backing = match content {
                Content::Whole(file) if self.passthrough.load(Ordering::Relaxed) => self.back(file),
                _ => 0,
            };
            Opens { backing, count: 0 }
        });
        opens.count += 1;
        (opens.backing != 0).then_some(opens.backing)
    }

    fn back(&self, file: &File) -> u32 {
        match BackingId::create_raw(self.device.as_fd(), file) {
            Ok(backing) => backing,
            Err(error) => {
                // Before Linux 6.9, without the privilege, or where the pool lies on a stacked file system.
                tracing::warn!(%error, "no FUSE passthrough here: contents are read through the lazy layer");
                self.passthrough.store(false, Ordering::Relaxed);
                0
            }
        }
    }

    fn release(&self, node: u64) {
        let mut all = lock(&self.opens);
        let Some(opens) = all.get_mut(&node) else { return };
        opens.count = opens.count.saturating_sub(1);
        if opens.count > 0 {
            return;
        }
        let backing = opens.backing;
        all.remove(&node);
        lock(&self.reading).remove(&node);
        if backing != 0
            && let Err(error) = close_backing(&self.device, backing)
        {
            tracing::warn!(%error, "a content stays open in the kernel");
        }
    }

    async fn read(&self, node: u64, offset: u64, size: u64) -> Result<bytes::Bytes, Failure> {
        let known = lock(&self.reading).get(&node).cloned();
        let content = match known {
            Some(content) => content,
            // It was opened by an earlier server.
            None => {
                let content = self.content(node).await?;
                lock(&self.reading).insert(node, content.clone());
                content
            }
        };
        content.read(offset, size).await
    }

    /// Remembers the order in which contents are first opened: the next session of the source wants them in that order.
    fn note(&self, node: u64) {
        let Some(number) = node.checked_sub(FIRST_OBJECT) else { return };
        if lock(&self.noted).insert(number)
            && let Err(error) = lazy::note_opened(&self.places.opened(), number)
        {
            tracing::debug!(%error, "cannot note what was opened");
        }
    }

    fn complain(&self, node: u64, pid: u32, failure: &Failure) {
        self.metrics.errors.inc();
        let content = self.blob(node).map_or_else(|| format!("of inode {node}"), |blob| blob.to_string());
        let reader = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        tracing::error!(pid, reader = reader.trim(), error = %failure, "content {content} cannot be had: EIO");
    }
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`, `_IOW(229, 2, __u32)`; fuser closes only what it opened on its own descriptor.
fn close_backing(device: &OwnedFd, backing: u32) -> io::Result<()> {
    const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;
    // SAFETY: the kernel reads four bytes at the address, which are there for the time of the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE, &raw const backing) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
