//! What is sent, put before real git: contents, names, modes; and who gets it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use aether_api::session::Durability;
use aether_cas::tree::{Attributes, Directory, Mtime, Name, Node};
use aether_cas::{Blob, MemoryStore};
use aether_review::api::{FAST_IMPORT, Peer, router};
use aether_review::front_proxy::Trust;
use axum::Extension;
use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::ConfigMap;
use tokio::sync::Semaphore;
use tower::ServiceExt;

use crate::cluster;

pub(crate) fn attributes(mode: u32) -> Attributes {
    Attributes { mode, ..Default::default() }
}

pub(crate) fn file(store: &MemoryStore, data: impl Into<Bytes>, mode: u32) -> Node {
    Node::File { content: store.put(data), attributes: attributes(mode), link_group: None }
}

pub(crate) fn symlink(target: &str) -> Node {
    Node::Symlink { target: target.into(), attributes: attributes(0o777), link_group: None }
}

pub(crate) fn directory(store: &MemoryStore, entries: Vec<(&[u8], Node)>) -> Blob {
    let entries = entries.into_iter().map(|(name, node)| (Name::new(name).unwrap(), node)).collect();
    store.put_directory(&Directory { attributes: attributes(0o755), entries })
}

pub(crate) fn below(store: &MemoryStore, entries: Vec<(&[u8], Node)>) -> Node {
    Node::Directory(directory(store, entries))
}

fn trust() -> Trust {
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem();
    let data =
        [("requestheader-client-ca-file", pem), ("requestheader-username-headers", r#"["X-Remote-User"]"#.into())];
    let data = data.map(|(key, value)| (key.to_owned(), value)).into();
    Trust::of(&ConfigMap { data: Some(data), ..Default::default() }).unwrap()
}

async fn get(service: aether_review::api::Service, user: &str, path: &str) -> Response<Body> {
    get_of(service, user, &format!("checkpoints/{path}")).await
}

/// The answer for a path of the namespace.
pub(crate) async fn get_of(service: aether_review::api::Service, user: &str, path: &str) -> Response<Body> {
    let router = router(service).layer(Extension(Peer { trust: Arc::new(trust()), front_proxy: true }));
    let path = format!("/apis/review.aether.dev/v1alpha1/namespaces/demo/{path}");
    router.oneshot(Request::get(path).header("X-Remote-User", user).body(Body::empty()).unwrap()).await.unwrap()
}

pub(crate) async fn status(response: Response<Body>) -> (u16, serde_json::Value) {
    let code = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&body).unwrap())
}

fn git(repository: &Path, args: &[&str]) -> String {
    let mut command = Command::new("git");
    command.env("GIT_DIR", repository).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A repository that git made of the answer.
async fn imported(response: Response<Body>) -> tempfile::TempDir {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], FAST_IMPORT);
    let stream = response.into_body().collect().await.unwrap().to_bytes();
    let folder = tempfile::tempdir().unwrap();
    git(folder.path(), &["init", "--quiet", "--bare", folder.path().to_str().unwrap()]);
    let mut child = Command::new("git")
        .env("GIT_DIR", folder.path())
        .args(["fast-import", "--quiet", "--done"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &stream).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    git(folder.path(), &["fsck", "--strict"]);
    folder
}

#[tokio::test]
async fn git_sees_what_changed_and_nothing_else() {
    let store = MemoryStore::new();
    let large: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
    let long: String = (0..100).map(|n| format!("line {n}\n")).collect();
    let base = directory(
        &store,
        vec![
            (b"same", file(&store, "same", 0o644)),
            (b"edited", file(&store, "one\ntwo\n", 0o644)),
            (b"gone", file(&store, "gone\n", 0o644)),
            (b"mode", file(&store, "#!/bin/sh\n", 0o644)),
            (b"kind", file(&store, "was a file\n", 0o644)),
            (b"link", symlink("same")),
            (b"old", below(&store, vec![(b"name", file(&store, long.clone(), 0o644))])),
            (b"untouched", below(&store, vec![(b"deep", file(&store, "deep", 0o644))])),
            (b".git", below(&store, vec![(b"HEAD", file(&store, "ref: a", 0o644))])),
            (b"touched", file(&store, "touched", 0o644)),
        ],
    );
    let touched = Node::File {
        content: store.put("touched"),
        attributes: Attributes { mode: 0o664, mtime: Mtime { seconds: 1, nanos: 2 }, ..Default::default() },
        link_group: Some(3),
    };
    let root = directory(
        &store,
        vec![
            (b"same", file(&store, "same", 0o644)),
            (b"edited", file(&store, "one\n2\n", 0o644)),
            (b"mode", file(&store, "#!/bin/sh\n", 0o755)),
            (b"kind", symlink("edited")),
            (b"link", symlink("edited")),
            (b"new", below(&store, vec![(b"name", file(&store, long, 0o644)), (b"empty", file(&store, "", 0o644))])),
            (b"untouched", below(&store, vec![(b"deep", file(&store, "deep", 0o644))])),
            (b".git", below(&store, vec![(b"HEAD", file(&store, "ref: b", 0o644))])),
            (b"large", file(&store, large.clone(), 0o600)),
            (b"caf\xe9 \"q\"\n", file(&store, "odd\n", 0o644)),
            (b"touched", touched),
            (b"pipe", Node::Fifo { attributes: attributes(0o644), link_group: None }),
            (b"nothing", below(&store, vec![])),
        ],
    );
    let (service, reviews) = cluster::service(&store, vec![cluster::checkpoint("k", base, root)]);
    let folder = imported(get(service, "ada", "k/changes").await).await;
    let shown = git(folder.path(), &["diff", "--name-status", "-M", "base", "head"]);
    let expected = [
        "A\t\"caf\\351 \\\"q\\\"\\n\"",
        "M\tedited",
        "D\tgone",
        "T\tkind",
        "A\tlarge",
        "M\tlink",
        "M\tmode",
        "A\tnew/empty",
        "R100\told/name\tnew/name",
    ];
    assert_eq!(shown.lines().collect::<Vec<_>>(), expected);
    let modes = git(folder.path(), &["diff", "--summary", "base", "head"]);
    assert!(modes.contains("mode change 100644 => 100755 mode"), "{modes}");
    assert!(git(folder.path(), &["diff", "base", "head", "--", "edited"]).contains("-two\n+2\n"));
    assert_eq!(git(folder.path(), &["cat-file", "-p", "head:link"]), "edited");
    assert_eq!(git(folder.path(), &["cat-file", "-s", "head:large"]).trim(), large.len().to_string());
    let id = git(folder.path(), &["rev-parse", "head:large"]);
    let on_disk = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(on_disk.path(), &large).unwrap();
    assert_eq!(git(folder.path(), &["hash-object", "--no-filters", on_disk.path().to_str().unwrap()]), id);

    let reviews = reviews.lock().unwrap();
    assert_eq!(reviews.len(), 1);
    let asked = &reviews[0]["resourceAttributes"];
    assert_eq!(
        (&asked["verb"], &asked["group"], &asked["resource"]),
        (&"get".into(), &"aether.dev".into(), &"aethercheckpoints".into())
    );
    assert_eq!((&asked["namespace"], &asked["name"]), (&"demo".into(), &"k".into()));
}

#[tokio::test]
async fn a_commit_is_compared_by_the_tree_that_it_names_itself() {
    let store = MemoryStore::new();
    let [base, approved, other] =
        ["1", "2", "3"].map(|text| directory(&store, vec![(b"a", file(&store, text, 0o644))]));
    let commit = |name: &str, status: serde_json::Value| {
        let spec = serde_json::json!({"checkpoint": "k", "target": {"promote": {}}});
        let metadata = serde_json::json!({"name": name, "namespace": "demo"});
        (
            "aethercommits",
            serde_json::json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommit", "metadata": metadata, "spec": spec, "status": status}),
        )
    };
    let whole =
        serde_json::json!({"root": approved.to_string(), "checkpoint": "k", "base": {"root": base.to_string()}});
    let others = vec![
        commit("c", whole.clone()),
        commit("hidden", whole),
        commit("young", serde_json::json!({})),
        commit("baseless", serde_json::json!({"root": approved.to_string()})),
    ];
    // Somebody has made another checkpoint of the name meanwhile.
    let (service, reviews) = cluster::service_with(&store, vec![cluster::checkpoint("k", base, other)], others);
    let folder = imported(get_of(service.clone(), "ada", "commits/c/changes").await).await;
    assert_eq!(git(folder.path(), &["cat-file", "-p", "head:a"]), "2");
    assert_eq!(git(folder.path(), &["cat-file", "-p", "base:a"]), "1");
    assert_eq!(reviews.lock().unwrap()[0]["resourceAttributes"]["resource"], "aethercommits");
    let folder = imported(get_of(service.clone(), "ada", "commits/baseless/changes?against=k").await).await;
    assert_eq!(git(folder.path(), &["cat-file", "-p", "base:a"]), "3");

    for (path, user, code, part) in [
        ("commits/young/changes", "ada", 409, "no tree yet"),
        ("commits/baseless/changes", "ada", 409, "against="),
        ("commits/c/changes", "eve", 403, "aethercommits"),
        ("commits/hidden/changes", "ada", 403, "aethercommits"),
        ("commits/missing/changes", "ada", 404, "not found"),
    ] {
        let (got, body) = status(get_of(service.clone(), user, path).await).await;
        assert_eq!(got, code, "{path}: {body}");
        assert!(body["message"].as_str().unwrap().contains(part), "{path}: {body}");
    }
}

#[tokio::test]
async fn no_change_is_two_empty_commits() {
    let store = MemoryStore::new();
    let root = directory(&store, vec![(b"a", file(&store, "a", 0o644))]);
    let (service, _) = cluster::service(&store, vec![cluster::checkpoint("k", root, root)]);
    let folder = imported(get(service, "ada", "k/changes").await).await;
    assert_eq!(git(folder.path(), &["diff", "base", "head"]), "");
}

#[tokio::test]
async fn against_another_checkpoint_and_with_git() {
    let store = MemoryStore::new();
    let one = directory(&store, vec![(b"a", file(&store, "1", 0o644)), (b".git", below(&store, vec![]))]);
    let two = directory(
        &store,
        vec![(b"a", file(&store, "2", 0o644)), (b".git", below(&store, vec![(b"HEAD", file(&store, "x", 0o644))]))],
    );
    let checkpoints = vec![
        cluster::checkpoint("one", one, one),
        cluster::checkpoint("two", two, two),
        cluster::checkpoint("hidden", one, one),
    ];
    let (service, reviews) = cluster::service(&store, checkpoints);
    let folder = imported(get(service.clone(), "ada", "two/changes?against=one").await).await;
    assert_eq!(git(folder.path(), &["diff", "--name-only", "base", "head"]), "a\n");
    assert_eq!(reviews.lock().unwrap().len(), 2, "both checkpoints are read, so both are asked for");

    let body = get(service.clone(), "ada", "two/changes?against=one&git=true")
        .await
        .into_body()
        .collect()
        .await
        .unwrap()
        .to_bytes();
    assert!(String::from_utf8_lossy(&body).contains(" .git/HEAD\n"));

    let (code, body) = status(get(service.clone(), "ada", "two/changes?against=hidden").await).await;
    assert_eq!((code, &body["reason"]), (403, &"Forbidden".into()));
    let (code, _) = status(get(service, "ada", "two/changes?gitt=true").await).await;
    assert_eq!(code, 400, "a misspelt parameter is not taken for its default");
}

#[tokio::test]
async fn who_may_not_read_learns_nothing() {
    let store = MemoryStore::new();
    let root = directory(&store, vec![]);
    let (service, _) = cluster::service(&store, vec![cluster::checkpoint("k", root, root)]);
    for name in ["k", "missing"] {
        let (code, body) = status(get(service.clone(), "eve", &format!("{name}/changes")).await).await;
        assert_eq!((code, &body["kind"]), (403, &"Status".into()));
        assert!(body["message"].as_str().unwrap().contains("eve"), "{body}");
    }
    let (code, body) = status(get(service, "ada", "missing/changes").await).await;
    assert_eq!((code, &body["details"]["name"]), (404, &"missing".into()));
}

#[tokio::test]
async fn how_requests_end_is_counted() {
    let store = MemoryStore::new();
    let root = directory(&store, vec![]);
    let (mut service, _) = cluster::service(&store, vec![cluster::checkpoint("k", root, root)]);
    let table = aether_runtime::Metrics::new();
    service.metrics = aether_review::metrics::Metrics::new(&table);
    let body = get(service.clone(), "ada", "k/changes").await.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(status(get(service.clone(), "ada", "missing/changes").await).await.0, 404);
    assert_eq!(status(get(service, "eve", "k/changes").await).await.0, 403);
    let text = table.render();
    for line in [
        "aether_review_requests_total{outcome=\"sent\"} 1",
        "aether_review_requests_total{outcome=\"refused\"} 1",
        "aether_review_requests_total{outcome=\"denied\"} 1",
        "aether_review_streams 0",
        &format!("aether_review_sent_bytes_total {}", body.len()),
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_reader_that_takes_nothing_holds_up_nobody_and_is_not_told_that_it_has_all() {
    let store = MemoryStore::new();
    let large: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
    let base = directory(&store, vec![]);
    let root = directory(&store, vec![(b"large", file(&store, large.clone(), 0o644))]);
    let (mut service, _) = cluster::service(&store, vec![cluster::checkpoint("k", base, root)]);
    let table = aether_runtime::Metrics::new();
    service.metrics = aether_review::metrics::Metrics::new(&table);
    service.patience = Duration::from_millis(50);
    service.streams = Arc::new(Semaphore::new(1));
    let response = get(service.clone(), "ada", "k/changes").await;
    assert_eq!(response.status(), 200);
    // The only permit comes back although nobody reads.
    let permit = tokio::time::timeout(Duration::from_secs(60), service.streams.acquire()).await;
    drop(permit.expect("the stream was given up").unwrap());
    let text = table.render();
    for line in ["aether_review_requests_total{outcome=\"stalled\"} 1", "aether_review_streams 0"] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let (mut body, mut taken) = (response.into_body(), 0);
    let broken = loop {
        match body.frame().await.expect("the part does not end like the whole") {
            Ok(frame) => taken += frame.into_data().unwrap().len(),
            Err(error) => break error,
        }
    };
    assert!(taken > 0 && taken < large.len(), "{taken} bytes");
    assert!(format!("{broken:?}").contains("Stalled"), "{broken:?}");
}

#[tokio::test]
async fn what_cannot_be_read_is_an_error_before_the_stream() {
    let store = MemoryStore::new();
    let content = file(&store, "content", 0o644);
    let base = directory(&store, vec![]);
    let root = directory(&store, vec![(b"a", content.clone())]);
    let mut local = cluster::checkpoint("local", base, root);
    local.status.as_mut().unwrap().durability = Some(Durability::Local);
    let mut rootless = cluster::checkpoint("baseless", base, root);
    rootless.status.as_mut().unwrap().base = None;
    let (mut service, _) = cluster::service(&store, vec![local, rootless, cluster::checkpoint("k", base, root)]);
    let (code, body) = status(get(service.clone(), "ada", "local/changes").await).await;
    assert_eq!(code, 409);
    assert!(body["message"].as_str().unwrap().contains("not in the store yet"), "{body}");
    let (code, body) = status(get(service.clone(), "ada", "baseless/changes").await).await;
    assert_eq!(code, 409);
    assert!(body["message"].as_str().unwrap().contains("against="), "{body}");

    service.directory_bytes = 1;
    assert_eq!(status(get(service.clone(), "ada", "k/changes").await).await.0, 413);
    service.directory_bytes = 1 << 20;
    store.remove(&content.content().unwrap());
    let (code, body) = status(get(service, "ada", "k/changes").await).await;
    assert_eq!(code, 409);
    assert!(body["message"].as_str().unwrap().contains("not complete"), "{body}");
}
