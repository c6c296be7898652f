//! Real kernel: git in sessions of an engine, wherever a session may come from. It opens no unchanged content, waits
//! for no name that a published session has not been warmed for, and misses no edit that it sees elsewhere.

use std::collections::HashSet;
use std::fs::{self, File, FileTimes};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use aether_cas::tree::{Mtime, Node, Owner, walk};
use aether_cas::{Blob, MemoryStore};
use aether_engine::pool::PoolConfig;
use aether_engine::testing::{Keep, isolated_async};
use aether_engine::{Config, Engine, git, scan};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const DIRECTORIES: usize = 60;
const FILES: usize = 25;
const MTIME: Mtime = Mtime { seconds: 1_600_000_000, nanos: 0 };

async fn engine(root: &Path) -> Engine {
    let pool = PoolConfig::Image { bytes: 300 << 20 };
    Engine::open(Config { pool, ..Config::new(root) }).await.unwrap()
}

/// Git as somebody who has configured nothing.
fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .args(["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "safe.directory=*", "-C"])
        .arg(directory)
        .args(arguments)
        .output()
        .expect("git runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {arguments:?}: {error}");
    String::from_utf8(output.stdout).expect("output in UTF-8") + &error
}

fn status(view: &Path) -> String {
    git(view, &["status", "--porcelain"])
}

/// A working copy as the importer leaves it, in a store.
fn source(scratch: &Path) -> (MemoryStore, Blob) {
    let copy = scratch.join("copy");
    for directory in 0..DIRECTORIES {
        let path = copy.join(format!("directory-{directory:02}/inner"));
        fs::create_dir_all(&path).unwrap();
        for file in 0..FILES {
            fs::write(path.join(format!("file-{file:02}")), format!("{directory} {file}\n")).unwrap();
        }
    }
    git(&copy, &["init", "-q", "-b", "main"]);
    git(&copy, &["add", "."]);
    git(&copy, &["commit", "-qm", "first"]);
    git::prepare(&copy, MTIME).unwrap();
    let store = MemoryStore::new();
    let options = scan::Options { owner: OWNER, mtime: None, progress: None };
    let root = scan::scan(&copy, options, &Keep(&store)).unwrap().root;
    fs::remove_dir_all(&copy).unwrap();
    (store, root)
}

async fn session(engine: &Engine, store: &MemoryStore, root: Blob, id: &str) -> PathBuf {
    let image = engine.ensure_image(root, OWNER, store, &|_| {}).await.unwrap();
    engine.create_session(id, &image).await.unwrap();
    engine.mount_session(id).await.unwrap()
}

/// Takes every content from a node but those below `.git`: whoever opens one meets an error, which git would report.
fn forget_contents(engine_root: &Path, root: &Blob, store: &MemoryStore) {
    let mut contents = HashSet::new();
    walk(root, store, |path, node| {
        if let Node::File { content, .. } = node
            && !path.components().any(|part| part.as_os_str().as_bytes() == b".git")
        {
            contents.insert(*content);
        }
        Ok::<(), aether_cas::StoreError>(())
    })
    .unwrap();
    assert_eq!(contents.len(), DIRECTORIES * FILES);
    for content in contents {
        fs::remove_file(engine_root.join("pool/objects").join(content.digest.object_path())).unwrap();
    }
}

#[test]
fn status_opens_no_unchanged_content_wherever_the_session_comes_from() {
    isolated_async("status_opens_no_unchanged_content_wherever_the_session_comes_from", async |scratch| {
        let (store, root) = source(scratch);
        let one = engine(&scratch.join("one")).await;
        let edited = session(&one, &store, root, "edited").await;
        fs::write(edited.join("directory-03/inner/file-07"), "edited\n").unwrap();
        fs::write(edited.join("new"), "new\n").unwrap();
        let changes = " M directory-03/inner/file-07\n?? new\n";
        assert_eq!(status(&edited), changes);

        let fresh = session(&one, &store, root, "fresh").await;
        one.snapshot("edited", "taken", &[], None).await.unwrap();
        one.fork_session("fork", "taken").await.unwrap();
        let fork = one.mount_session("fork").await.unwrap();
        let restored = session(&one, &store, root, "restored").await;
        fs::write(restored.join("directory-05/inner/file-01"), "soon gone\n").unwrap();
        fs::rename(restored.join("directory-07"), restored.join("moved")).unwrap();
        git(&restored, &["add", "."]);
        one.restore_in_place("restored", "safety", root, &[], &store).await.unwrap();

        // Another node has it from the store.
        let tree = one.digest("taken").await.unwrap().root;
        let remote = MemoryStore::new();
        one.upload(tree, &remote, &|_| {}).await.unwrap();
        let two = engine(&scratch.join("two")).await;
        let elsewhere = session(&two, &remote, tree, "edited").await;
        let base_elsewhere = session(&two, &store, root, "fresh").await;

        for name in ["one", "two"] {
            forget_contents(&scratch.join(name), &root, &store);
        }
        assert!(fs::read(fresh.join("directory-01/inner/file-01")).is_err(), "the contents are gone");
        for (view, expected) in
            [(&fresh, ""), (&fork, changes), (&restored, ""), (&elsewhere, changes), (&base_elsewhere, "")]
        {
            assert_eq!(status(view), expected, "{}", view.display());
            assert_eq!(git(view, &["diff", "--cached", "--stat"]), "");
            let changed = git(view, &["diff", "--name-only", "--", "directory-00", "directory-01"]);
            assert_eq!(changed, "", "{}", view.display());
        }
        // Git takes the lock of its index in passing, which brings its directory up; nothing that a checkpoint would store.
        for upper in ["one/pool/sessions/fresh/upper", "two/pool/sessions/fresh/upper"] {
            let entries = walkdir::WalkDir::new(scratch.join(upper)).into_iter().map(|entry| entry.unwrap());
            let files: Vec<_> = entries.filter(|entry| !entry.file_type().is_dir()).collect();
            assert!(files.is_empty(), "{files:?}");
        }
    });
}

/// How many of these paths the kernel finds without asking a file system for any name.
fn at_hand(view: &Path, paths: &[PathBuf]) -> usize {
    let flags = OFlags::PATH | OFlags::NOFOLLOW;
    let root = rustix::fs::open(view, flags | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let is_known = |path: &&PathBuf| {
        // The kernel also says no when the names change elsewhere just now.
        (0..100).any(|_| match rustix::fs::openat2(&root, *path, flags, Mode::empty(), ResolveFlags::CACHED) {
            Ok(_) => true,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{}: {error}", path.display()),
        })
    };
    paths.iter().filter(is_known).count()
}

#[test]
fn a_published_session_has_every_name_at_hand_at_the_first_look() {
    isolated_async("a_published_session_has_every_name_at_hand_at_the_first_look", async |scratch| {
        let (store, root) = source(scratch);
        let engine = engine(&scratch.join("engine")).await;
        let mut paths = Vec::new();
        for directory in 0..DIRECTORIES {
            for file in 0..FILES {
                paths.push(PathBuf::from(format!("directory-{directory:02}/inner/file-{file:02}")));
            }
        }
        let cold = session(&engine, &store, root, "cold").await;
        assert_eq!(at_hand(&cold, &paths), 0, "nobody has looked");
        let mut looked_at = 0;
        for round in 0..50 {
            let id = format!("warm{round}");
            session(&engine, &store, root, &id).await;
            let target = scratch.join("pod").join(&id);
            engine.publish(&id, &target, false).await.unwrap();
            // On a machine that is too busy the engine gives up, and says so.
            if engine.wait_until_warm(&id).await.unwrap() {
                assert_eq!(at_hand(&target, &paths), paths.len());
                looked_at += 1;
            }
            engine.unpublish(&target).await.unwrap();
            engine.unmount_session(&id).await.unwrap();
            assert!(!engine.wait_until_warm(&id).await.unwrap(), "what is not mounted is not warm");
            if looked_at == 3 {
                return;
            }
        }
        panic!("of 50 sessions {looked_at} were warmed");
    });
}

#[test]
fn sessions_end_while_they_are_being_warmed() {
    isolated_async("sessions_end_while_they_are_being_warmed", async |scratch| {
        let (store, root) = source(scratch);
        let engine = engine(&scratch.join("engine")).await;
        let target = scratch.join("pod");
        for round in 0..20 {
            session(&engine, &store, root, "s").await;
            engine.publish("s", &target, false).await.unwrap();
            for _ in 0..round * 50 {
                std::thread::yield_now();
            }
            engine.unpublish(&target).await.unwrap();
            engine.delete_session("s").await.unwrap();
        }
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

/// Git trusts no entry that is as young as its index. That must not get lost on the way of a session.
#[test]
fn an_edit_of_the_same_size_in_the_same_second_is_seen_everywhere() {
    isolated_async("an_edit_of_the_same_size_in_the_same_second_is_seen_everywhere", async |scratch| {
        let (store, root) = source(scratch);
        let one = engine(&scratch.join("one")).await;
        let view = session(&one, &store, root, "s").await;
        let second = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let stamp = |path: &Path, nanos: u32| {
            let time = second + Duration::new(0, nanos);
            let times = FileTimes::new().set_accessed(time).set_modified(time);
            File::options().write(true).open(path).unwrap().set_times(times).unwrap();
        };
        let file = view.join("directory-00/inner/file-00");
        fs::write(&file, "one\n").unwrap();
        stamp(&file, 100);
        git(&view, &["add", "."]);
        stamp(&view.join(".git/index"), 200);
        fs::write(&file, "two\n").unwrap();
        stamp(&file, 300);
        let about = fs::metadata(&file).unwrap();
        assert_eq!((about.len(), about.mtime()), (4, 1_700_000_000));
        one.snapshot("s", "taken", &[], None).await.unwrap();
        let expected = "MM directory-00/inner/file-00\n";

        one.fork_session("fork", "taken").await.unwrap();
        assert_eq!(status(&one.mount_session("fork").await.unwrap()), expected);
        let tree = one.digest("taken").await.unwrap().root;
        let remote = MemoryStore::new();
        one.upload(tree, &remote, &|_| {}).await.unwrap();
        let two = engine(&scratch.join("two")).await;
        assert_eq!(status(&session(&two, &remote, tree, "s").await), expected);
        session(&one, &store, root, "restored").await;
        one.restore_in_place("restored", "safety", tree, &[], &remote).await.unwrap();
        assert_eq!(status(&one.mount_session("restored").await.unwrap()), expected);
        assert_eq!(status(&view), expected);

        // And an ordinary edit that keeps the size, of a file as it was imported.
        let fresh = session(&one, &store, root, "fresh").await;
        let imported = fresh.join("directory-01/inner/file-02");
        let size = fs::metadata(&imported).unwrap().len();
        fs::write(&imported, "x".repeat(size as usize)).unwrap();
        assert_eq!(status(&fresh), " M directory-01/inner/file-02\n");
    });
}
