//! Copies of a tree, in a directory and in a bucket.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use aether_committer::crash::POINTS;
use aether_testkit::bucket::{BUCKET, Bucket, KEY, SECRET};
use futures::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{ObjectStore, ObjectStoreExt};
use tempfile::TempDir;

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

const REPOSITORIES: &str = "repositories (.git) are left out, because reviewers are not shown them";

/// What an agent may add to a tree without any reviewer being shown it.
fn repositories(at: &Path) {
    write(&at.join(".git/config"), "[core]\n\tfsmonitor = ./run\n");
    write(&at.join(".git/a/.git/b"), "below");
    write(&at.join("a/.git/hooks/post-checkout"), "#!/bin/sh\n");
    mode(&at.join("a/.git/hooks/post-checkout"), 0o755);
    write(&at.join("empty/.git"), "gitdir: ../elsewhere\n");
    symlink("../.git", at.join("empty/inner/.git")).unwrap();
    write(&at.join(".gitignore"), "no repository\n");
    fs::hard_link(at.join("private"), at.join("a/.git/private")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_reviewer_is_shown_is_not_in_a_directory() {
    let world = World::new().await;
    fs::create_dir(world.at("claim")).unwrap();
    tree(&world, "files").await;
    repositories(&world.at("files"));
    let root = world.tree(&world.at("files")).await;
    let done = folder(&world, &root, "one").await;
    assert_eq!((&done.done()["files"], &done.result["root"]), (&7.into(), &root.as_str().into()), "{}", done.result);
    let warning = format!("{REPOSITORIES}: 4 (.git, a/.git, empty/.git, …)");
    assert_eq!(done.result["warnings"], serde_json::json!([warning]));
    let same = folder(&world, &root, "one").await;
    assert_eq!((&same.done()["found"], &same.result["warnings"]), (&true.into(), &done.result["warnings"]));

    // It is all of the rest, for one that never had any is found there.
    for repository in [".git", "a/.git", "empty/.git", "empty/inner/.git"] {
        let at = world.at("files").join(repository);
        if at.is_symlink() || at.is_file() { fs::remove_file(at) } else { fs::remove_dir_all(at) }.unwrap();
    }
    let rest = world.tree(&world.at("files")).await;
    let found = folder(&world, &rest, "one").await;
    assert_eq!((&found.done()["found"], found.result.get("warnings")), (&true.into(), None), "{}", found.result);
    // Somebody else's repository there is no part of it.
    write(&world.at("claim/one/.git/config"), "");
    folder(&world, &root, "one").await.failed("TargetExists", "Permanent");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_the_directory_is_made_once() {
    let world = World::new().await;
    fs::create_dir(world.at("claim")).unwrap();
    let root = tree(&world, "files").await;
    let points: Vec<_> = POINTS.iter().filter(|point| point.starts_with("export.folder.")).collect();
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
            write(&partial.join(".git/config"), "junk");
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
    let kept = ["new.partial", "new.partial/in", ".aether-export.json"];
    for path in ["../outside/new", "a/../../outside/new", "/etc/new", "."].into_iter().chain(kept) {
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

/// A service with a bucket, and Secrets of it.
struct Remote {
    bucket: Bucket,
    service: AmazonS3,
}

impl Remote {
    fn start(world: &World) -> Self {
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
        Self { bucket, service }
    }

    fn program(&self, world: &World, root: &str, prefix: &str, secret: &TempDir) -> Command {
        let endpoint = self.bucket.endpoint();
        let mut arguments = vec!["export", "s3", "--root", root, "--bucket", BUCKET, "--prefix", prefix];
        arguments.extend(["--endpoint", &endpoint, "--secret-name", "p/key"]);
        arguments.extend(["--secret-dir", secret.path().to_str().unwrap()]);
        world.other(&arguments)
    }
}

fn keys(secret_key: &str) -> TempDir {
    secret(&[("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", secret_key)])
}

/// What a bucket has of the files of [`tree`].
fn files(world: &World, prefix: &str) -> BTreeMap<String, Vec<u8>> {
    let content = |path: &str| fs::read(world.at("files").join(path)).unwrap();
    let paths = ["a/b", "a/same", "a/twin", "large", "private", "run"];
    paths.map(|path| (format!("{prefix}/{path}"), content(path))).into()
}

const COMPLETE: &str = ".aether-export.json";
const PARTIAL: &str = ".aether-export.partial.json";

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_a_bucket_is_of_one_tree_and_begins_empty() {
    let world = World::new().await;
    let remote = Remote::start(&world);
    let service = &remote.service;
    let right = keys(SECRET);
    let export = async |root: &str, prefix: &str, secret: &TempDir| {
        finish(remote.program(&world, root, prefix, secret).spawn().unwrap()).await
    };
    service.put(&"team/theirs/file".into(), "theirs".into()).await.unwrap();
    let root = tree(&world, "files").await;
    let done = export(&root, "/team/one/", &right).await;
    assert_eq!((&done.done()["files"], &done.result["written"]), (&6.into(), &6.into()), "{}", done.result);
    assert_eq!(done.result["place"], "s3://aether/team/one/");
    let warnings = done.result["warnings"].to_string();
    for said in [
        "symbolic links are left out, because a bucket has none: 1 (a/link)",
        "named pipes are left out, because a bucket has none: 1 (pipe)",
        "of files that may be executed: 2 (a/same, run)",
    ] {
        assert!(warnings.contains(said), "{warnings}");
    }
    let mut all = objects(service).await;
    assert_eq!(all.remove("team/theirs/file").unwrap(), b"theirs");
    let manifest = all.remove(&format!("team/one/{COMPLETE}")).unwrap();
    assert!(String::from_utf8(manifest).unwrap().contains(&root));
    assert!(all == files(&world, "team/one"), "{:?}", all.keys());

    let same = export(&root, "team/one", &right).await;
    assert_eq!((&same.done()["found"], &same.result["written"]), (&true.into(), &0.into()), "{}", same.result);
    assert_eq!(same.result["warnings"], done.result["warnings"]);
    // What somebody changed of it becomes the tree's again; what they put beside it stays.
    service.put(&"team/one/run".into(), "meddled".into()).await.unwrap();
    service.put(&"team/one/beside".into(), "beside".into()).await.unwrap();
    let mended = export(&root, "team/one", &right).await;
    assert_eq!((mended.done().get("found"), &mended.result["written"]), (None, &1.into()), "{}", mended.result);
    let mut all = objects(service).await;
    assert_eq!(all.remove("team/one/beside").unwrap(), b"beside");
    all.retain(|key, _| key.starts_with("team/one/") && !key.ends_with(COMPLETE));
    assert!(all == files(&world, "team/one"), "{:?}", all.keys());

    // Nor does another tree go there, nor any where something is.
    let before = objects(service).await;
    write(&world.at("files/a/b"), "changed\n");
    let other = world.tree(&world.at("files")).await;
    for prefix in ["team/one", "team/theirs", "team"] {
        let refused = export(&other, prefix, &right).await;
        refused.failed("TargetExists", "Permanent");
        assert!(refused.message().contains("export to another path"), "{}", refused.message());
    }
    assert!(objects(service).await == before);
    write(&world.at("odd/[new] {file} ~ä"), "new\n");
    write(&world.at("odd").join(PARTIAL), "not ours\n");
    write(&world.at("odd/deep").join(COMPLETE), "not ours\n");
    let odd = export(&world.tree(&world.at("odd")).await, "odd", &right).await;
    assert_eq!(odd.done()["files"], 1);
    assert!(
        odd.result["warnings"].to_string().contains("cannot be keys of a bucket, and are left out: 2"),
        "{}",
        odd.result
    );
    let mut all = objects(service).await;
    all.retain(|key, _| key.starts_with("odd/"));
    assert_eq!(all.remove("odd/[new] {file} ~ä").unwrap(), b"new\n");
    assert!(all.into_keys().eq([format!("odd/{COMPLETE}")]));

    let wrong = keys("swordfish-wrong");
    let refused = export(&other, "other", &wrong).await;
    refused.failed("AuthenticationFailed", "Permanent");
    assert!(refused.message().contains("check Secret p/key"), "{}", refused.message());
    assert!(!refused.printed.contains("swordfish"), "{}", refused.printed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_reviewer_is_shown_is_not_in_a_bucket() {
    let world = World::new().await;
    let remote = Remote::start(&world);
    let right = keys(SECRET);
    tree(&world, "files").await;
    repositories(&world.at("files"));
    let root = world.tree(&world.at("files")).await;
    let run = async || finish(remote.program(&world, &root, "one", &right).spawn().unwrap()).await;
    let done = run().await;
    assert_eq!((&done.done()["files"], &done.result["root"]), (&7.into(), &root.as_str().into()), "{}", done.result);
    let warnings = done.result["warnings"].to_string();
    assert!(warnings.contains(&format!("{REPOSITORIES}: 4 (.git, a/.git, empty/.git, …)")), "{warnings}");
    assert!(warnings.contains("may be executed: 2 (a/same, run)"), "{warnings}");
    assert_eq!(run().await.done()["found"], true);
    let mut all = objects(&remote.service).await;
    let manifest: serde_json::Value = serde_json::from_slice(&all.remove(&format!("one/{COMPLETE}")).unwrap()).unwrap();
    let mut expected = files(&world, "one");
    expected.insert("one/.gitignore".into(), b"no repository\n".into());
    assert!(all == expected, "{:?}", all.keys());
    assert_eq!(manifest["objects"].as_object().unwrap().len(), expected.len(), "{manifest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_export_of_a_bucket_lies_in_another() {
    let world = World::new().await;
    let remote = Remote::start(&world);
    let right = keys(SECRET);
    let root = tree(&world, "files").await;
    let other = world.tree(&world.at("files/a")).await;
    let run = async |root: &str, prefix: &str, crash: &str| {
        let mut program = remote.program(&world, root, prefix, &right);
        finish(program.env("AETHER_CRASH_AT", crash).spawn().unwrap()).await
    };
    // One that has only begun, or is complete, around a folder in which nothing is; and one within.
    for point in ["export.s3.begun", "export.s3.ended"] {
        assert_eq!(run(&root, &format!("{point}/x"), point).await.code, None);
        let before = objects(&remote.service).await;
        for (prefix, why) in [("x/new", "around"), ("x/new/deep/er", "around"), ("", "something else")] {
            let refused = run(&other, format!("{point}/{prefix}").trim_end_matches('/'), "").await;
            refused.failed("TargetExists", "Permanent");
            assert!(refused.message().contains(why), "{}", refused.message());
        }
        assert!(objects(&remote.service).await == before, "{point}");
        run(&other, &format!("{point}/xx"), "").await.done();
        run(&root, &format!("{point}/x"), "").await.done();
    }
    // Killed when both had begun, and neither had seen the other.
    assert_eq!(run(&root, "both/in", "export.s3.begun").await.code, None);
    let record = objects(&remote.service).await.remove(&format!("both/in/{PARTIAL}")).unwrap();
    remote.service.put(&format!("both/{PARTIAL}").into(), record.into()).await.unwrap();
    let before = objects(&remote.service).await;
    for (prefix, why) in [("both", "another export within"), ("both/in", "another export around")] {
        let refused = run(&root, prefix, "").await;
        refused.failed("TargetExists", "Permanent");
        assert!(refused.message().contains(why), "{}", refused.message());
    }
    assert!(objects(&remote.service).await == before);
    for prefix in ["a.partial", "a.partial/b", ".aether-export"] {
        run(&root, prefix, "").await.failed("Invalid", "Permanent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_a_bucket_never_holds_half_that_looks_whole() {
    let world = World::new().await;
    let remote = Remote::start(&world);
    let right = keys(SECRET);
    let root = tree(&world, "files").await;
    let other = world.tree(&world.at("files/a")).await;
    let points: Vec<_> = POINTS.iter().filter(|point| point.starts_with("export.s3.")).collect();
    assert_eq!(points.len(), 4);
    for point in points {
        let run = async |root: &str, crash: &str| {
            let mut program = remote.program(&world, root, point, &right);
            finish(program.env("AETHER_CRASH_AT", crash).spawn().unwrap()).await
        };
        let killed = run(&root, point).await;
        assert_eq!(killed.code, None, "{point}: {}", killed.printed);
        let whole = ["export.s3.complete", "export.s3.ended"].contains(point);
        let there = objects(&remote.service).await;
        assert_eq!(there.contains_key(&format!("{point}/{COMPLETE}")), whole, "{point}: {:?}", there.keys());
        // Meanwhile nobody else gets it.
        run(&other, "").await.failed("TargetExists", "Permanent");
        let again = run(&root, "").await;
        assert_eq!(again.done()["found"] == true, whole, "{point}: {}", again.result);
        let mut all = objects(&remote.service).await;
        all.retain(|key, _| key.starts_with(point));
        assert!(
            all.remove(&format!("{point}/{COMPLETE}")).is_some() && all == files(&world, point),
            "{:?}",
            all.keys()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_at_once_write_the_same() {
    let world = World::new().await;
    let remote = Remote::start(&world);
    let right = keys(SECRET);
    fs::create_dir(world.at("claim")).unwrap();
    let root = tree(&world, "files").await;
    let start = || remote.program(&world, &root, "both", &right).spawn().unwrap();
    let (one, two) = (start(), start());
    let (one, two) = tokio::join!(finish(one), finish(two));
    assert!(one.code == Some(0) || two.code == Some(0), "{} {}", one.printed, two.printed);
    for run in [one, two].iter().filter(|run| run.code != Some(0)) {
        run.failed("CommitFailed", "Temporary");
    }
    let last = finish(start()).await;
    last.done();
    let mut all = objects(&remote.service).await;
    assert!(all.remove(&format!("both/{COMPLETE}")).is_some() && all == files(&world, "both"), "{:?}", all.keys());
    let (one, two) = tokio::join!(folder(&world, &root, "both"), folder(&world, &root, "both"));
    assert!(one.code == Some(0) || two.code == Some(0), "{} {}", one.printed, two.printed);
    for run in [one, two].iter().filter(|run| run.code != Some(0)) {
        run.failed("CommitFailed", "Temporary");
    }
    assert_eq!(world.tree(&world.at("claim/both")).await, root);
    assert_eq!(names(&world.at("claim")), ["both"]);
}
