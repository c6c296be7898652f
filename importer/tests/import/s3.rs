//! Imports of a bucket of a real S3 service.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use aether_cas::tree::{Node, walk};
use aether_cas::{MemoryStore, Store};
use aether_importer::cli::S3;
use aether_importer::failure::{Failure, Reason};
use aether_importer::s3::{self, Imported};
use aether_importer::scan::Stored;
use aether_testkit::bucket::{BUCKET, Bucket, KEY, SECRET};
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use rustls::ServerConfig;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::counting::Counting;
use super::log;
use super::repository::{secret, silent};
use aether_testkit::git_server as server;

/// A service, and what is between it and the import.
struct World {
    service: Bucket,
    between: Arc<Between>,
    client: HttpClient,
    secret: TempDir,
    _folder: TempDir,
}

type Deed = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Passes bytes on, and remembers what was asked for.
struct Between {
    address: String,
    asked: Mutex<Vec<String>>,
    /// Done one after the other, each before a request that names this is passed on.
    before: Mutex<VecDeque<(String, Deed)>>,
}

impl Between {
    /// Speaks TLS with the import, if told how.
    async fn start(service: String, tls: Option<Arc<ServerConfig>>) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let address = format!("{scheme}://{}", listener.local_addr().unwrap());
        let between = Arc::new(Self { address, asked: Mutex::default(), before: Mutex::default() });
        let passing = between.clone();
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let to = TcpStream::connect(service.strip_prefix("http://").unwrap()).await.unwrap();
                let Some(tls) = tls.clone() else {
                    tokio::spawn(passing.clone().pass(from, to));
                    continue;
                };
                let passing = passing.clone();
                tokio::spawn(async move {
                    // Who does not believe our certificate goes away.
                    if let Ok(from) = TlsAcceptor::from(tls).accept(from).await {
                        passing.pass(from, to).await;
                    }
                });
            }
        });
        between
    }

    async fn pass(self: Arc<Self>, from: impl AsyncRead + AsyncWrite + Send + 'static, to: TcpStream) {
        let ((mut asks, mut hears), (mut answers, mut told)) = (tokio::io::split(from), to.into_split());
        let back = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut hears).await });
        let mut buffer = vec![0; 64 * 1024];
        // A client that has no body to send writes each request at once.
        while let Ok(read @ 1..) = asks.read(&mut buffer).await {
            let text = String::from_utf8_lossy(&buffer[..read]);
            let request = text.lines().next().unwrap_or_default().to_owned();
            let due = {
                let mut before = self.before.lock().unwrap();
                let is_due = before.front().is_some_and(|(name, _)| request.contains(name.as_str()));
                if is_due { before.pop_front() } else { None }
            };
            if let Some((_, deed)) = due {
                deed.await;
            }
            self.asked.lock().unwrap().push(request);
            if told.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
        back.abort();
    }

    fn before(&self, key: &str, deed: impl Future<Output = ()> + Send + 'static) {
        self.before.lock().unwrap().push_back((format!("/{BUCKET}/{key}"), Box::pin(deed)));
    }

    /// The keys that were read since this was asked last, in order.
    fn read(&self) -> Vec<String> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let key = |line: &String| line.strip_prefix(&format!("GET /{BUCKET}/"))?.split(' ').next().map(str::to_owned);
        let mut read: Vec<String> = asked.iter().filter_map(key).collect();
        read.sort();
        read
    }
}

impl World {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = Bucket::start(folder.path());
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self {
            between: Between::start(service.endpoint(), None).await,
            client: ReqwestConnector::default()
                .connect(&object_store::ClientOptions::new().with_allow_http(true))
                .unwrap(),
            secret: secret(&[("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)]),
            service,
            _folder: folder,
        }
    }

    fn asked(&self, prefix: &str) -> S3 {
        S3 {
            bucket: BUCKET.into(),
            prefix: Some(prefix.into()),
            endpoint: Some(self.between.address.clone()),
            secret_dir: Some(self.secret.path().into()),
            secret_name: Some("platform/key".into()),
            ..S3::default()
        }
    }

    /// Writes an object under exactly this key; deletes it when there is nothing to write.
    fn put(&self, key: &str, data: Option<Vec<u8>>) -> impl Future<Output = ()> + Send + use<> {
        let (client, address) = (self.client.clone(), format!("{}/{BUCKET}/{key}", self.service.endpoint()));
        async move {
            let method = if data.is_some() { http::Method::PUT } else { http::Method::DELETE };
            let request = http::Request::builder().method(method).uri(&address);
            let mut request = request.body(data.unwrap_or_default().into()).unwrap();
            let credential = AwsCredential { key_id: KEY.into(), secret_key: SECRET.into(), token: None };
            AwsAuthorizer::new(&credential, "s3", "us-east-1").try_authorize(&mut request, None).unwrap();
            let answer = client.execute(request).await.unwrap();
            assert!(answer.status().is_success(), "{address}: {}", answer.status());
        }
    }

    async fn write(&self, key: &str, text: &str) {
        self.put(key, Some(text.into())).await;
    }
}

async fn import(asked: &S3, to: &dyn Store) -> Result<Imported, Failure> {
    let scratch = tempfile::tempdir().unwrap();
    let outcome = s3::import(asked, scratch.path(), to, silent()).await;
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
    outcome
}

async fn tree(asked: &S3, to: &dyn Store) -> (String, Stored) {
    match import(asked, to).await.unwrap() {
        Imported::Tree(listing, stored) => (listing, stored),
        Imported::Unchanged(listing) => panic!("{listing} is not known yet"),
    }
}

/// Paths with the contents of files, which must be in the store; folders end in a slash.
fn shown(stored: &Stored, store: &MemoryStore) -> Vec<(String, Vec<u8>)> {
    let mut shown = Vec::new();
    walk(&stored.root, store, |path, node| {
        let path = path.display().to_string();
        match node {
            Node::File { content, attributes, .. } => {
                assert_eq!(attributes.mode, 0o644, "{path}");
                assert!(attributes.mtime.seconds > 1_500_000_000 && attributes.mtime.nanos == 0, "{path}");
                shown.push((path, futures::executor::block_on(store.read(*content)).unwrap().to_vec()));
            }
            Node::Directory(_) if !path.is_empty() => shown.push((path + "/", Vec::new())),
            _ => {}
        }
        Ok::<(), aether_cas::StoreError>(())
    })
    .unwrap();
    shown
}

fn entry(path: &str, data: impl Into<Vec<u8>>) -> (String, Vec<u8>) {
    (path.to_owned(), data.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_becomes_a_tree_and_a_refresh_reads_what_changed() {
    let world = World::start().await;
    let large: Vec<u8> = (0..9_000_000_u32).map(|number| (number % 251) as u8).collect();
    world.put("team/large", Some(large.clone())).await;
    for (key, text) in
        [("team/a b+c.txt", "one"), ("team/deep/er/%C3%A4", "two"), ("team/empty", ""), ("other/x", "not this")]
    {
        world.write(&key.replace(' ', "%20").replace('+', "%2B"), text).await;
    }
    world.write("team/folder/", "").await;
    let store = Counting::default();
    let asked = world.asked("/team/");
    let (listing, first) = tree(&asked, &store).await;
    let expected = [
        entry("a b+c.txt", "one"),
        entry("deep/", ""),
        entry("deep/er/", ""),
        entry("deep/er/ä", "two"),
        entry("empty", ""),
        entry("folder/", ""),
        entry("large", large),
    ];
    assert_eq!(shown(&first, &store.store), expected);
    assert_eq!((first.counts.files, first.counts.bytes, first.counts.directories), (4, 9_000_006, 4));
    assert_eq!(world.between.read().len(), 3, "what is empty needs no reading");

    // The same bucket is the same tree.
    store.take_written();
    let (again, second) = tree(&asked, &store).await;
    assert_eq!((&again, second.root), (&listing, first.root));
    assert_eq!(store.take_written(), []);

    // A refresh of a bucket that did not change reads no object.
    world.between.read();
    let refresh = S3 { unless_listing: Some(listing.clone()), ..asked.clone() };
    assert!(matches!(import(&refresh, &store).await.unwrap(), Imported::Unchanged(known) if known == listing));
    assert!(world.between.read().is_empty());

    world.write("team/deep/er/%C3%A4", "three").await;
    let (changed, third) = tree(&refresh, &store).await;
    assert_ne!((&changed, third.root), (&listing, first.root));
    assert_eq!(shown(&third, &store.store)[3], entry("deep/er/ä", "three"));
    assert_eq!(store.take_written().len(), 4, "the content, its two folders and the root");

    // More than a page of a listing.
    let many = futures::future::join_all((0..1100).map(|number| world.put(&format!("many/{number}"), Some(vec![1]))));
    many.await;
    assert_eq!(tree(&world.asked("many"), &store).await.1.counts.files, 1100);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_it_is_read_is_never_mixed() {
    let world = World::start().await;
    for key in ["t/a", "t/b", "t/c"] {
        world.write(key, "old").await;
    }
    let store = MemoryStore::new();
    let asked = world.asked("t");
    // It is another one when it is asked for.
    let change = world.put("t/b", Some("new!".into()));
    world.between.before("t/b", change);
    let (_, stored) = tree(&asked, &store).await;
    assert_eq!(shown(&stored, &store), [entry("a", "old"), entry("b", "new!"), entry("c", "old")]);
    assert_eq!(world.between.read().iter().filter(|key| *key == "t/b").count(), 2);

    // One that was read already changes, and one goes, before the last is read.
    let (newer, gone) = (world.put("t/a", Some("newer".into())), world.put("t/c", None));
    let changes = async move {
        newer.await;
        gone.await;
    };
    world.between.before("t/b", changes);
    let (listing, stored) = tree(&asked, &store).await;
    assert_eq!(shown(&stored, &store), [entry("a", "newer"), entry("b", "new!")]);
    assert_eq!(tree(&asked, &store).await.0, listing);

    // Somebody writes without a pause: it is another one whenever it is asked for.
    for number in 0..100 {
        world.between.before("t/b", world.put("t/b", Some(format!("state {number}").into())));
    }
    let failure = import(&asked, &store).await.unwrap_err();
    assert!(failure.reason == Reason::ImportFailed && failure.message.contains("\"t/b\""), "{failure}");
    assert!(failure.message.contains("when nobody writes to it"), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imported_is_told_with_a_way_out_and_without_secrets() {
    let log = log::watched();
    let world = World::start().await;
    let store = MemoryStore::new();
    world.write("bad/a", "a file").await;
    world.write("bad/a/b", "and a folder").await;
    world.write("line/a%0Ab", "no name for people").await;
    for (prefix, key) in [("bad", "bad/a"), ("line", "line/a\\nb")] {
        let failure = import(&world.asked(prefix), &store).await.unwrap_err();
        assert!(failure.reason == Reason::Invalid && failure.message.contains(key), "{failure}");
    }

    let nothing = import(&world.asked("nosuch"), &store).await.unwrap_err();
    assert!(nothing.reason == Reason::Invalid && nothing.message.contains("s3://aether/nosuch/"), "{nothing}");
    assert!(nothing.message.contains("spec.s3.prefix"), "{nothing}");

    let missing = S3 { bucket: "missing".into(), ..world.asked("") };
    let failure = import(&missing, &store).await.unwrap_err();
    assert_eq!(failure.reason, Reason::BucketNotFound, "{failure}");
    assert!(failure.message.contains("bucket missing") && failure.message.contains("spec.s3.bucket"), "{failure}");

    let wrong = "hunter22-hunter22";
    let known = secret(&[("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", wrong)]);
    let unknown = secret(&[("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", wrong)]);
    for directory in [&known, &unknown] {
        let asked = S3 { secret_dir: Some(directory.path().into()), ..world.asked("bad") };
        let failure = import(&asked, &store).await.unwrap_err();
        assert_eq!(failure.reason, Reason::AuthenticationFailed, "{failure}");
        assert!(
            failure.message.contains("bucket aether") && failure.message.contains("check Secret platform/key"),
            "{failure}"
        );
        assert!(!failure.message.contains(wrong), "{failure}");
    }
    let unsigned = S3 { secret_dir: None, ..world.asked("bad") };
    let failure = import(&unsigned, &store).await.unwrap_err();
    assert_eq!(failure.reason, Reason::AuthenticationFailed, "{failure}");
    assert!(failure.message.contains("spec.s3.secretRef"), "{failure}");

    let half = secret(&[("AWS_ACCESS_KEY_ID", KEY)]);
    let asked = S3 { secret_dir: Some(half.path().into()), ..world.asked("bad") };
    let failure = import(&asked, &store).await.unwrap_err();
    assert!(failure.reason == Reason::SecretInvalid && failure.message.contains("AWS_SECRET_ACCESS_KEY"), "{failure}");

    // Nothing listens on port 1 of a machine's loopback.
    let asked = S3 { endpoint: Some("http://127.0.0.1:1".into()), ..world.asked("bad") };
    let failure = import(&asked, &store).await.unwrap_err();
    assert_eq!(failure.reason, Reason::BucketNotFound, "{failure}");
    assert!(failure.message.contains("spec.s3.endpoint"), "{failure}");

    world.write("good/a", "x").await;
    tree(&world.asked("good"), &store).await;
    let log = log.text();
    assert!(log.contains("cannot be reached"), "the log was watched: {log}");
    for leaked in [SECRET, wrong] {
        assert!(!log.contains(leaked), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_right_authority_of_a_service_is_believed() {
    let world = World::start().await;
    world.write("t/a", "x").await;
    let (authority, config) = server::tls();
    let between = Between::start(world.service.endpoint(), Some(config)).await;
    let keys = [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)];
    let with = |authority: Option<&str>| {
        let files: Vec<_> = keys.into_iter().chain(authority.map(|authority| ("ca.crt", authority))).collect();
        secret(&files)
    };
    let asked = |secret: &TempDir| S3 {
        endpoint: Some(between.address.clone()),
        secret_dir: Some(secret.path().into()),
        ..world.asked("t")
    };
    let store = MemoryStore::new();
    let right = with(Some(&authority));
    assert_eq!(shown(&tree(&asked(&right), &store).await.1, &store), [entry("a", "x")]);
    let (stranger, _) = server::authority();
    for wrong in [None, Some(stranger.as_str()), Some("not a certificate")] {
        let secret = with(wrong);
        let failure = import(&asked(&secret), &store).await.unwrap_err();
        assert_eq!(failure.reason, Reason::SecretInvalid, "{failure}");
        assert!(failure.message.contains("ca.crt") && failure.message.contains("Secret platform/key"), "{failure}");
    }
}
