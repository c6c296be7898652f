//! Copies of a tree, in a directory and in a bucket.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use aether_committer::crash::POINTS;
use aether_testkit::bucket::{BUCKET, Bucket, KEY, SECRET};
use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::world::{Run, World, finish, mode, secret, write};

/// A directory with files of all kinds that a tree knows.
async fn tree(world: &World, name: &str) -> String {
    let at = world.at(name);
    write(&at.join("a/b"), "content\n");
    write(&at.join("a/twin"), "content\n");
    write(&at.join("large"), vec![9; 20 << 20]);
    write(&at.join("private"), "p");
    mode(&at.join("private"), 0o600);
    write(&at.join("run"), "#!/bin/sh\n");
    mode(&at.join("run"), 0o755);
    fs::hard_link(at.join("run"), at.join("a/same")).unwrap();
    symlink("../outside", at.join("a/link")).unwrap();
    fs::create_dir_all(at.join("empty/inner")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at.join("pipe"), rustix::fs::Mode::from_raw_mode(0o644)).unwrap();
    world.tree(&at).await
}

async fn folder(world: &World, root: &str, path: &str) -> Run {
    let claim = world.at("claim");
    let arguments = ["export", "folder", "--root", root, "--beneath", claim.to_str().unwrap(), "--path", path];
    finish(world.other(&arguments).spawn().unwrap()).await
}

fn names(at: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_the_tree_and_is_never_half_of_it() {
    let world = World::new().await;
    fs::create_dir(world.at("claim")).unwrap();
    let root = tree(&world, "files").await;
    let done = folder(&world, &root, "results/one").await;
    let result = done.done();
    assert_eq!((&result["files"], &result["written"]), (&6.into(), &5.into()), "{result}");
    assert_eq!(result.get("warnings"), None);
    let at = world.at("claim/results/one");
    assert_eq!(world.tree(&at).await, root, "to the time of the last directory");
    assert_eq!(names(&world.at("claim/results")), ["one"]);

    let again = folder(&world, &root, "results/one").await;
    assert_eq!(again.done()["found"], true);
    write(&at.join("a/b"), "changed\n");
    folder(&world, &root, "results/one").await.failed("TargetExists", "Permanent");
    assert_eq!(fs::read(at.join("a/b")).unwrap(), b"changed\n", "it is not ours to mend");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_the_directory_is_made_once() {
    let world = World::new().await;
    fs::create_dir(world.at("claim")).unwrap();
    let root = tree(&world, "files").await;
    let points: Vec<_> = POINTS.iter().filter(|point| point.starts_with("export.")).collect();
    assert_eq!(points.len(), 3);
    for point in points {
        let claim = world.at("claim");
        let arguments = ["export", "folder", "--root", &root, "--beneath", claim.to_str().unwrap(), "--path", point];
        let killed = finish(world.other(&arguments).env("AETHER_CRASH_AT", point).spawn().unwrap()).await;
        assert_eq!(killed.code, None, "{point}: {}", killed.printed);
        // Somebody else's leavings are not part of the tree.
        let partial = claim.join(format!("{point}.partial"));
        if partial.exists() {
            write(&partial.join("junk/file"), "junk");
            let _ = fs::remove_file(partial.join("run"));
        }
        let again = folder(&world, &root, point).await;
        assert_eq!(again.done()["found"] == true, *point == "export.folder.renamed", "{point}: {}", again.result);
        assert_eq!(world.tree(&claim.join(point)).await, root, "{point}");
        assert!(!partial.exists(), "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leads_out_of_the_claim() {
    let world = World::new().await;
    for name in ["claim", "outside", "outside/there"] {
        fs::create_dir(world.at(name)).unwrap();
    }
    let root = tree(&world, "files").await;
    let (claim, outside) = (world.at("claim"), world.at("outside"));
    symlink(&outside, claim.join("way")).unwrap();
    symlink(&outside, claim.join("name")).unwrap();
    symlink(&outside, claim.join("other.partial")).unwrap();
    write(&claim.join("file"), "");
    for path in ["way/new", "way/there/new", "name", "other", "file", "file/new"] {
        folder(&world, &root, path).await.failed("TargetExists", "Permanent");
    }
    for path in ["../outside/new", "a/../../outside/new", "/etc/new", "."] {
        folder(&world, &root, path).await.failed("Invalid", "Permanent");
    }
    assert_eq!(names(&outside), ["there"]);
    assert_eq!(names(&outside.join("there")), [""; 0]);
    let lost = folder(&world, &format!("{}/5", "ab".repeat(32)), "new").await;
    lost.failed("TreeIncomplete", "Permanent");
    assert_eq!(names(&claim), ["file", "name", "other.partial", "way"]);
}

/// Every object of the bucket, by key.
async fn objects(service: &dyn ObjectStore) -> BTreeMap<String, Vec<u8>> {
    let listed: Vec<_> = service.list(None).try_collect().await.unwrap();
    let mut found = BTreeMap::new();
    for object in listed {
        let data = service.get(&object.location).await.unwrap().bytes().await.unwrap();
        found.insert(object.location.to_string(), data.to_vec());
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_gets_what_changed_and_keeps_what_is_not_ours() {
    let world = World::new().await;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let bucket = Bucket::start(world.folder.path());
    let service = AmazonS3Builder::new()
        .with_endpoint(bucket.endpoint())
        .with_allow_http(true)
        .with_bucket_name(BUCKET)
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET)
        .build()
        .unwrap();
    service.put(&"team/one/theirs".into(), "theirs".into()).await.unwrap();
    let endpoint = bucket.endpoint();
    let with = |key: &str| secret(&[("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", key)]);
    let right = with(SECRET);
    let export = async |root: String, secret: &Path| {
        let mut arguments = vec!["export", "s3", "--root", &root, "--bucket", BUCKET, "--prefix", "/team/one/"];
        arguments.extend(["--endpoint", &endpoint, "--secret-name", "p/key"]);
        arguments.extend(["--secret-dir", secret.to_str().unwrap()]);
        finish(world.other(&arguments).spawn().unwrap()).await
    };
    let root = tree(&world, "files").await;
    let done = export(root.clone(), right.path()).await;
    assert_eq!((&done.done()["files"], &done.result["written"]), (&6.into(), &6.into()), "{}", done.result);
    assert_eq!(done.result["place"], "s3://aether/team/one/");
    let warnings = done.result["warnings"].to_string();
    assert!(warnings.contains("symbolic links are left out, because a bucket has none: 1 (a/link)"), "{warnings}");
    assert!(warnings.contains("named pipes are left out, because a bucket has none: 1 (pipe)"), "{warnings}");
    let mut all = objects(&service).await;
    let manifest = all.remove("team/one/.aether-export.json").unwrap();
    assert!(String::from_utf8(manifest).unwrap().contains(&root));
    let expected = |change: &[(&str, Option<&str>)]| {
        let mut expected: BTreeMap<String, Vec<u8>> = BTreeMap::from([("team/one/theirs".into(), b"theirs".to_vec())]);
        for path in ["a/b", "a/same", "a/twin", "large", "private", "run"] {
            expected.insert(format!("team/one/{path}"), fs::read(world.at("files").join(path)).unwrap_or_default());
        }
        for (path, content) in change {
            let key = format!("team/one/{path}");
            match content {
                Some(content) => expected.insert(key, content.as_bytes().to_vec()),
                None => expected.remove(&key),
            };
        }
        expected
    };
    assert!(all == expected(&[]), "{:?}", all.keys());

    let same = export(root.clone(), right.path()).await;
    assert_eq!((&same.done()["found"], &same.result["written"]), (&true.into(), &0.into()), "{}", same.result);
    // One is changed in the session, one removed, one added; and one was changed in the bucket by somebody else.
    write(&world.at("files/a/b"), "changed\n");
    fs::remove_file(world.at("files/private")).unwrap();
    write(&world.at("files/[new] {file} ~ä"), "new\n");
    service.put(&"team/one/run".into(), "meddled".into()).await.unwrap();
    let root = world.tree(&world.at("files")).await;
    let next = export(root, right.path()).await;
    assert_eq!((&next.done()["files"], &next.result["written"]), (&6.into(), &3.into()), "{}", next.result);
    let mut all = objects(&service).await;
    all.remove("team/one/.aether-export.json").unwrap();
    let changed = [("a/b", Some("changed\n")), ("private", None), ("[new] {file} ~ä", Some("new\n"))];
    assert!(all == expected(&changed), "{:?}", all.keys());

    let wrong = with("swordfish-wrong");
    let refused = export(tree(&world, "third").await, wrong.path()).await;
    refused.failed("AuthenticationFailed", "Permanent");
    assert!(refused.message().contains("check Secret p/key"), "{}", refused.message());
    assert!(!refused.printed.contains("swordfish"), "{}", refused.printed);
}
