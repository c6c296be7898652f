//! A store that can be made to fail, an image of some files, and an overlay over both with the lazy layer below.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use aether_cas::lazy::{Places, append_to_catalog};
use aether_cas::remote::RemoteConfig;
use aether_cas::tree::{Attributes, Directory, MemoryDirectories, Name, Node, Owner};
use aether_cas::{Blob, RemoteStore};
use aether_engine::mount::{self, Overlay};
use aether_engine::{ImageId, image};
use aether_lazy::server::{self, Setup};
use aether_lazy::{Exchange, Launch, Limits, Metrics};
use bazel_remote_apis::google::bytestream::byte_stream_server::{ByteStream, ByteStreamServer};
use bazel_remote_apis::google::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest, WriteResponse,
};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Bytes of one piece of a stream.
const PIECE: usize = 256 * 1024;

/// What the store does with reads.
#[derive(Default)]
pub(crate) struct Behaviour {
    /// Does not answer.
    pub(crate) hang: AtomicBool,
    /// Turns a bit of each whole content.
    pub(crate) flip: AtomicBool,
    /// Turns a bit of each part.
    pub(crate) flip_parts: AtomicBool,
    /// Has no whole contents; parts go on.
    pub(crate) refuse: AtomicBool,
    /// Stops in the middle of whole contents; parts go on.
    pub(crate) stop_in_the_middle: AtomicBool,
    /// Milliseconds before each answer.
    pub(crate) delay: AtomicU64,
    /// Whole contents that were asked for.
    pub(crate) whole: AtomicU64,
    /// Parts that were asked for.
    pub(crate) parts: AtomicU64,
}

impl Behaviour {
    pub(crate) fn hang(&self, hang: bool) {
        self.hang.store(hang, Ordering::SeqCst);
    }
}

/// Reads of a store node, without writes.
#[derive(Clone, Default)]
pub(crate) struct Server {
    contents: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    pub(crate) behaviour: Arc<Behaviour>,
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

type Reply<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ByteStream for Server {
    type ReadStream = Reply<ReadResponse>;

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let behaviour = self.behaviour.clone();
        let whole = request.read_limit == 0;
        if whole { &behaviour.whole } else { &behaviour.parts }.fetch_add(1, Ordering::SeqCst);
        if whole && behaviour.refuse.load(Ordering::SeqCst) {
            return Err(Status::internal("no whole contents today"));
        }
        tokio::time::sleep(Duration::from_millis(behaviour.delay.load(Ordering::SeqCst))).await;
        let waiting = behaviour.clone();
        until(|| !waiting.hang.load(Ordering::SeqCst)).await;
        let hash = request.resource_name.split('/').rev().nth(1).unwrap_or_default().to_owned();
        let contents = self.contents.lock().unwrap();
        let content = contents.get(&hash).ok_or_else(|| Status::not_found("no such blob"))?;
        let offset = request.read_offset as usize;
        let end = if whole { content.len() } else { (offset + request.read_limit as usize).min(content.len()) };
        let mut data = content[offset..end].to_vec();
        drop(contents);
        if if whole { &behaviour.flip } else { &behaviour.flip_parts }.load(Ordering::SeqCst)
            && let Some(byte) = data.last_mut()
        {
            *byte ^= 1;
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            for (n, piece) in data.chunks(PIECE).enumerate() {
                if whole && n >= 2 {
                    until(|| !behaviour.stop_in_the_middle.load(Ordering::SeqCst)).await;
                }
                if sender.send(Ok(ReadResponse { data: piece.to_vec() })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn write(&self, _: Request<Streaming<WriteRequest>>) -> Result<Response<WriteResponse>, Status> {
        Err(Status::unimplemented("this store is only read"))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented("this store is only read"))
    }
}

impl Server {
    pub(crate) fn put(&self, bytes: &[u8]) -> Blob {
        let blob = Blob::of(bytes);
        self.contents.lock().unwrap().insert(blob.digest.to_string(), bytes.to_vec());
        blob
    }

    pub(crate) fn forget(&self, bytes: &[u8]) {
        self.contents.lock().unwrap().remove(&Blob::of(bytes).digest.to_string());
    }

    /// Serves on an address of its own, which it returns.
    pub(crate) fn start(&self, runtime: &Runtime) -> String {
        let server = ByteStreamServer::new(self.clone());
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let incoming = TcpListenerStream::new(listener);
            tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
            format!("http://{address}")
        })
    }
}

/// `name`d files in one directory, their image mounted, the store that has them, and the catalog.
pub(crate) struct World {
    pub(crate) root: PathBuf,
    pub(crate) places: Places,
    pub(crate) server: Server,
    pub(crate) uri: String,
    pub(crate) runtime: Runtime,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    lower: PathBuf,
}

impl World {
    /// The lazy layer of this node in this process.
    pub(crate) fn serve(&self, limits: Limits) -> (Exchange, Metrics) {
        start(&self.places, &self.uri, &self.runtime, limits)
    }

    pub(crate) fn new(root: &Path, files: BTreeMap<String, Vec<u8>>) -> Self {
        let places = Places::new(root);
        for folder in [places.folder(), &places.objects(), &places.fetched(), &root.join("images"), &root.join("image")]
        {
            fs::create_dir_all(folder).unwrap();
        }
        let directories = MemoryDirectories::new();
        let server = Server::default();
        let attributes = |mode| Attributes { mode, ..Attributes::default() };
        let mut top = Directory { attributes: attributes(0o755), entries: BTreeMap::new() };
        let mut blobs = Vec::new();
        for (name, bytes) in &files {
            let content = Blob::of(bytes);
            let node = Node::File { content, attributes: attributes(0o644), link_group: None };
            top.entries.insert(Name::new(name.clone().into_bytes()).unwrap(), node);
            server.put(bytes);
            blobs.push(content);
        }
        append_to_catalog(&places.catalog(), blobs).unwrap();
        let id = ImageId::new(directories.insert(top), Owner { uid: 0, gid: 0 });
        image::build(&root.join("images"), id, &directories).unwrap();
        mount::mount_erofs(&image::path(&root.join("images"), id), &root.join("image")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let uri = server.start(&runtime);
        let lower = root.join("image").join(image::TREE);
        Self { root: root.to_owned(), places, server, uri, runtime, files, lower }
    }

    /// A session: an overlay of image, objects and lazy layer, with an upper. Returns where.
    pub(crate) fn session(&self, name: &str) -> PathBuf {
        let at = |part: &str| {
            let path = self.root.join(format!("{name}-{part}"));
            fs::create_dir_all(&path).unwrap();
            path
        };
        let overlay = Overlay {
            name: name.to_owned(),
            lower: self.lower.clone(),
            data: vec![self.places.objects(), self.places.mountpoint()],
            upper: Some((at("upper"), at("work"))),
        };
        let view = at("view");
        overlay.mount(&view).unwrap();
        view
    }

    /// Puts a content where the engine puts it.
    pub(crate) fn put_object(&self, name: &str) {
        let bytes = &self.files[name];
        let path = self.places.objects().join(Blob::of(bytes).digest.object_path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Runs servers in threads of this process.
pub(crate) struct Threads {
    setup: Setup,
    runtime: tokio::runtime::Handle,
}

impl Launch for Threads {
    fn launch(&mut self, socket: OwnedFd) -> std::io::Result<Box<dyn FnOnce() -> String + Send>> {
        let (setup, runtime) = (self.setup.clone(), self.runtime.clone());
        let thread = thread::spawn(move || server::serve(socket, setup, runtime));
        Ok(Box::new(move || format!("{:?}", thread.join())))
    }
}

impl Threads {
    /// Servers that get their contents from `uri`, and what they count in.
    pub(crate) fn new(places: &Places, uri: &str, runtime: &Runtime, limits: Limits) -> (Self, Metrics) {
        let metrics = Metrics::new(&aether_runtime::Metrics::new());
        let config = RemoteConfig { stall: Duration::from_secs(600), ..RemoteConfig::new(uri) };
        let _inside = runtime.enter();
        let store = RemoteStore::lazy(&config).unwrap();
        let setup = Setup { places: places.clone(), store, limits, metrics: metrics.clone() };
        (Self { setup, runtime: runtime.handle().clone() }, metrics)
    }
}

/// The lazy layer in this process.
pub(crate) fn start(places: &Places, uri: &str, runtime: &Runtime, limits: Limits) -> (Exchange, Metrics) {
    let (threads, metrics) = Threads::new(places, uri, runtime, limits);
    let device = aether_lazy::mount(&places.mountpoint()).unwrap();
    (Exchange::start(device, Duration::from_secs(120), threads).unwrap(), metrics)
}

/// Where the kernel tells of the connection of a FUSE file system and takes orders.
pub(crate) fn control(mountpoint: &Path) -> PathBuf {
    let device = mount::find_mount(mountpoint).unwrap().unwrap().device;
    let all = mountpoint.with_file_name("control");
    if mount::find_mount(&all).unwrap().is_none() {
        fs::create_dir_all(&all).unwrap();
        let mounted = std::process::Command::new("mount").args(["-t", "fusectl", "none"]).arg(&all).status().unwrap();
        assert!(mounted.success());
    }
    all.join(device.split(':').nth(1).unwrap())
}

pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
