//! The program as it runs on a node: its server is killed again and again while readers wait, and it leaves nothing
//! behind.

mod program;
#[path = "../../crates/lazy/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aether_cas::Blob;
use aether_engine::mount;
use aether_engine::testing::isolated;
use program::{Program, command};
use support::{World, wait_for};

const FILES: usize = 400;
const READERS: usize = 4;
const KILLS: usize = 25;

fn start(world: &World) -> Program {
    Program::start(&world.root, &world.uri, &["--grace", "20"])
}

/// What a test sees of the contents that were fetched.
fn fetched(world: &World, name: &str) -> Option<Vec<u8>> {
    let folder = world.places.fetched_now().unwrap();
    fs::read(folder.join(Blob::of(&world.files[name]).digest.object_path())).ok()
}

#[test]
fn readers_get_their_bytes_however_often_the_server_is_killed() {
    isolated("readers_get_their_bytes_however_often_the_server_is_killed", |root| {
        let files: BTreeMap<String, Vec<u8>> =
            (0..FILES).map(|n| (format!("f{n:03}"), vec![n as u8; 1000 + n * 200])).collect();
        let world = World::new(root, files);
        let mut program = start(&world);
        let view = world.session("a");
        // A file that is open all the time, over all servers.
        let first = fs::File::open(view.join("f000")).unwrap();
        let done = AtomicBool::new(false);
        let kills = thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|reader| {
                    let (world, view) = (&world, &view);
                    scope.spawn(move || {
                        for n in (reader..FILES).step_by(READERS) {
                            let name = format!("f{n:03}");
                            let read = fs::read(view.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
                            assert!(read == world.files[&name], "{name} has its bytes");
                            // So that the kills fall among the reads.
                            thread::sleep(Duration::from_millis(50));
                        }
                    })
                })
                .collect();
            let killer = scope.spawn(|| {
                let mut kills = 0;
                let mut random = 0x2545_f491_4f6c_dd1d_u64;
                while kills < KILLS && !done.load(Ordering::SeqCst) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    thread::sleep(Duration::from_millis((random >> 33) % 300));
                    kills += usize::from(program.kill_server());
                }
                kills
            });
            let results: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
            done.store(true, Ordering::SeqCst);
            let kills = killer.join().unwrap();
            for result in results {
                result.unwrap();
            }
            kills
        });
        println!("{kills} kills");
        assert!(kills >= KILLS);
        // Every content was fetched through the layer, and what was open is still the same file.
        let mut bytes = vec![0; 1000];
        std::os::unix::fs::FileExt::read_exact_at(&first, &mut bytes, 0).unwrap();
        assert_eq!(bytes, world.files["f000"]);
        assert_eq!(fs::read(view.join("f000")).unwrap(), world.files["f000"], "opened again beside the open one");
        drop(first);
        let folders = fs::read_dir(world.places.fetched_now().unwrap()).unwrap();
        let unfinished =
            folders.filter(|entry| entry.as_ref().unwrap().file_name().as_encoded_bytes().starts_with(b"."));
        assert!(unfinished.count() <= 1, "what the killed ones had begun is gone");
        program.end();
    });
}

#[test]
fn a_reader_that_is_blocked_across_a_kill_gets_its_bytes() {
    isolated("a_reader_that_is_blocked_across_a_kill_gets_its_bytes", |root| {
        let world = World::new(root, BTreeMap::from([("one".to_owned(), vec![7; 50_000])]));
        let mut program = start(&world);
        let view = world.session("a");
        let behaviour = world.server.behaviour.clone();
        behaviour.hang(true);
        let path = view.join("one");
        let reader = thread::spawn(move || fs::read(path));
        wait_for("the content is asked for", || behaviour.whole.load(Ordering::SeqCst) == 1);
        assert!(program.kill_server());
        wait_for("the next server asks again", || behaviour.whole.load(Ordering::SeqCst) == 2);
        assert!(program.server().is_some(), "another one");
        behaviour.hang(false);
        assert_eq!(reader.join().unwrap().unwrap(), world.files["one"]);
        program.end();
    });
}

/// Ends the program while its layer is needed; the test takes over what it fetches in the engine's place.
fn end_while_needed(world: &World, program: Program) {
    fs::write(world.places.needed(), []).unwrap();
    program.terminate();
    wait_for("everything is fetched", || world.files.keys().all(|name| fetched(world, name).is_some()));
    assert!(mount::find_mount(&world.places.mountpoint()).unwrap().is_some(), "it waits for the engine");
    for name in world.files.keys() {
        assert_eq!(fetched(world, name).as_ref(), Some(&world.files[name]), "{name}");
        world.put_object(name);
    }
    fs::remove_file(world.places.needed()).unwrap();
    program.join();
    assert!(mount::find_mount(&world.places.mountpoint()).unwrap().is_none());
}

#[test]
fn what_is_missing_is_fetched_before_it_leaves() {
    isolated("what_is_missing_is_fetched_before_it_leaves", |root| {
        let files = (0..30).map(|n| (format!("f{n}"), vec![n; 3000])).collect();
        let world = World::new(root, files);
        let program = start(&world);
        let view = world.session("a");
        end_while_needed(&world, program);
        mount::rebind(&view).unwrap();
        for (name, bytes) in &world.files {
            assert_eq!(&fs::read(view.join(name)).unwrap(), bytes, "{name}");
        }
    });
}

#[test]
fn nothing_is_fetched_before_it_leaves_when_nobody_needs_it() {
    isolated("nothing_is_fetched_before_it_leaves_when_nobody_needs_it", |root| {
        let world = World::new(root, BTreeMap::from([("one".to_owned(), vec![7; 50_000])]));
        start(&world).end();
        assert_eq!(world.server.behaviour.whole.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn the_bandwidth_of_the_background_is_not_that_of_readers() {
    isolated("the_bandwidth_of_the_background_is_not_that_of_readers", |root| {
        let mut files: BTreeMap<_, _> = (0..20).map(|n| (format!("f{n}"), vec![n; 5000])).collect();
        files.insert("read".into(), vec![99; 5_000_000]);
        let world = World::new(root, files);
        let program = Program::start(&world.root, &world.uri, &["--grace", "60", "--background-bandwidth", "50000"]);
        let began = Instant::now();
        assert!(fs::read(world.session("a").join("read")).unwrap() == world.files["read"]);
        assert!(began.elapsed() < Duration::from_secs(20), "100 s with the limit: {:?}", began.elapsed());
        let began = Instant::now();
        end_while_needed(&world, program);
        assert!(began.elapsed() >= Duration::from_millis(1900), "19 are paid for: {:?}", began.elapsed());
    });
}

#[test]
fn what_could_not_be_fetched_is_told() {
    isolated("what_could_not_be_fetched_is_told", |root| {
        let files = (0..5).map(|n| (format!("f{n}"), vec![n; 3000])).collect();
        let world = World::new(root, files);
        world.server.forget(&world.files["f1"]);
        world.server.forget(&world.files["f3"]);
        let output = command(&world.root, &world.uri).arg("fetch-rest").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{said}");
        assert!(said.contains("2 of 5 contents could not be fetched"), "{said}");
        let named = ["f1", "f3"].map(|name| Blob::of(&world.files[name]).to_string());
        assert!(named.iter().any(|blob| said.contains(blob)), "one of them is named: {said}");
        let there = world.files.keys().filter(|name| fetched(&world, name).is_some()).count();
        assert_eq!(there, 3, "the others are here");
    });
}
