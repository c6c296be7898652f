//! Single files, and where the lines of notes have gone.

use aether_cas::MemoryStore;
use serde_json::{Value, json};

use crate::changes::{below, directory, file, get_of, status, symlink};
use crate::cluster;

fn note(name: &str, checkpoint: &str, path: &str, lines: Option<(u32, u32)>) -> (&'static str, Value) {
    let mut spec = json!({"checkpoint": checkpoint, "path": path, "text": "why?"});
    if let Some((from, to)) = lines {
        spec["lines"] = json!({"from": from, "to": to});
    }
    let metadata = json!({"name": name, "namespace": "demo"});
    (
        "aethernotes",
        json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherNote", "metadata": metadata, "spec": spec}),
    )
}

fn session(name: &str, status: Value) -> (&'static str, Value) {
    let metadata = json!({"name": name, "namespace": "demo", "uid": "u"});
    (
        "aethersessions",
        json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": metadata, "spec": {"source": {"name": "linux"}}, "status": status}),
    )
}

#[tokio::test]
async fn a_file_is_found_by_its_path_only() {
    let store = MemoryStore::new();
    let text = file(&store, "one\ntwo\n", 0o755);
    let digest = text.content().unwrap().digest.to_string();
    let inner = vec![
        (&b"text"[..], text),
        (b"blob", file(&store, &b"a\0b\n"[..], 0o644)),
        (b"latin", file(&store, &b"caf\xe9\n"[..], 0o644)),
        (b"link", symlink("text")),
        (b"large", file(&store, vec![b'\n'; (1 << 20) + 1], 0o644)),
    ];
    let root = directory(&store, vec![(b"src", below(&store, inner)), (b"way", symlink("src"))]);
    let (service, reviews) = cluster::service(&store, vec![cluster::checkpoint("k", root, root)]);
    let (code, body) = status(get_of(service.clone(), "ada", "checkpoints/k/file?path=src%2Ftext").await).await;
    assert_eq!(code, 200, "{body}");
    assert_eq!((&body["kind"], &body["digest"]), (&json!("CheckpointFile"), &json!(digest)));
    assert_eq!((&body["lines"], &body["text"], &body["executable"]), (&json!(2), &json!("one\ntwo\n"), &json!(true)));
    assert_eq!(reviews.lock().unwrap()[0]["resourceAttributes"]["name"], "k");
    for (path, lines, size) in
        [("src/blob", json!(null), 4), ("src/large", json!(null), (1 << 20) + 1), ("src/latin", json!(1), 5)]
    {
        let (_, body) = status(get_of(service.clone(), "ada", &format!("checkpoints/k/file?path={path}")).await).await;
        assert_eq!((&body["lines"], &body["text"], &body["size"]), (&lines, &json!(null), &json!(size)), "{path}");
    }
    for path in
        ["src", "src/none", "src/link", "way/text", "/src/text", "src//text", "src/../src/text", "", "src/text/"]
    {
        let (code, body) =
            status(get_of(service.clone(), "ada", &format!("checkpoints/k/file?path={path}")).await).await;
        assert_eq!((code, &body["details"]["name"]), (404, &json!("k")), "{path}: the API itself is there");
    }
    assert_eq!(status(get_of(service.clone(), "ada", "checkpoints/k/file").await).await.0, 400);
    assert_eq!(status(get_of(service, "eve", "checkpoints/k/file?path=src/text").await).await.0, 403);
}

#[tokio::test]
async fn notes_follow_their_lines_into_the_head() {
    let store = MemoryStore::new();
    let old = directory(
        &store,
        vec![
            (b"moved", file(&store, "a\nb\nc\n", 0o644)),
            (b"same", file(&store, "x\n", 0o644)),
            (b"gone", file(&store, "y\n", 0o644)),
            (b"blob", file(&store, &b"\0"[..], 0o644)),
        ],
    );
    let new = directory(
        &store,
        vec![
            (b"moved", file(&store, "new\na\nB\nc\n", 0o644)),
            (b"same", file(&store, "x\n", 0o644)),
            (b"blob", file(&store, &b"\0\0"[..], 0o644)),
        ],
    );
    let mut foreign = cluster::checkpoint("foreign", old, old);
    foreign.spec.session = "t".into();
    let mut former = cluster::checkpoint("former", old, old);
    former.status.as_mut().unwrap().session_uid = Some("another".into());
    let head = |durability| json!({"head": {"root": new.to_string(), "durability": durability, "time": "2026-01-01T00:00:00Z"}});
    let others = vec![
        note("n1", "k", "moved", Some((1, 1))),
        note("n2", "k", "moved", Some((2, 2))),
        note("n3", "k", "same", Some((1, 1))),
        note("n4", "k", "gone", Some((1, 1))),
        note("n5", "k", "moved", None),
        note("n6", "k", "blob", Some((1, 1))),
        note("n7", "hidden", "same", Some((1, 1))),
        note("n8", "foreign", "same", None),
        note("n9", "former", "same", None),
        session("s", head("Durable")),
        session("local", head("Local")),
        session("hidden", head("Durable")),
    ];
    let checkpoints =
        vec![cluster::checkpoint("k", old, old), cluster::checkpoint("hidden", old, old), foreign, former];
    let (service, reviews) = cluster::service_with(&store, checkpoints, others);
    let (code, body) = status(get_of(service.clone(), "ada", "sessions/s/notes").await).await;
    assert_eq!(code, 200, "{body}");
    let mut items = body["items"].as_array().unwrap().clone();
    items.sort_by_key(|item| item["note"].as_str().unwrap().to_owned());
    assert_eq!(items.len(), 7, "of other sessions nothing is said: {body}");
    assert_eq!(items[0], json!({"note": "n1", "state": "Moved", "from": 2, "to": 2}));
    assert_eq!(items[1], json!({"note": "n2", "state": "Gone"}));
    assert_eq!(items[2], json!({"note": "n3", "state": "Same", "from": 1, "to": 1}));
    assert_eq!(items[3], json!({"note": "n4", "state": "Gone"}));
    assert_eq!(items[4], json!({"note": "n5", "state": "Changed"}));
    assert_eq!((&items[5]["state"], &items[6]["state"]), (&json!("Unknown"), &json!("Unknown")));
    assert!(items[6]["reason"].as_str().unwrap().contains("forbidden"), "{}", items[6]);
    let asked: Vec<(Value, Value)> = reviews
        .lock()
        .unwrap()
        .iter()
        .map(|it| (it["resourceAttributes"]["verb"].clone(), it["resourceAttributes"]["resource"].clone()))
        .collect();
    assert_eq!(asked[..2], [(json!("get"), json!("aethersessions")), (json!("list"), json!("aethernotes"))]);

    for (path, user, code) in
        [("sessions/s/notes", "eve", 403), ("sessions/hidden/notes", "ada", 403), ("sessions/none/notes", "ada", 404)]
    {
        assert_eq!(status(get_of(service.clone(), user, path).await).await.0, code, "{path} for {user}");
    }
    let (code, body) = status(get_of(service, "ada", "sessions/local/notes").await).await;
    assert_eq!((code, &body["root"], &body["items"]), (200, &json!(null), &json!([])));
}
