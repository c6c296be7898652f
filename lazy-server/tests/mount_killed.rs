//! The program as it runs on a node: its server is killed again and again while readers wait.

#[path = "../../crates/lazy/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aether_engine::mount;
use aether_engine::testing::isolated;
use rustix::process::{Pid, Signal, kill_process};
use support::World;

const FILES: usize = 400;
const READERS: usize = 4;
const KILLS: usize = 25;

/// The program; killed with the test if that fails.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(world: &World) -> Program {
    let program = Command::new(env!("CARGO_BIN_EXE_aether-lazy"))
        .arg("--state-dir")
        .arg(&world.root)
        .args(["--store", &world.uri, "--grace", "5"])
        .spawn()
        .unwrap();
    let program = Program(program);
    wait_for("the layer is mounted", || mount::find_mount(&world.places.mountpoint()).unwrap().is_some());
    program
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The child of the program that serves, if there is one now.
fn server_of(program: &Program) -> Option<Pid> {
    let id = program.0.id();
    let children = fs::read_dir(format!("/proc/{id}/task"))
        .ok()?
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let all: Vec<i32> =
        children.flat_map(|line| line.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    all.first().copied().and_then(Pid::from_raw)
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
                    if let Some(server) = server_of(&program)
                        && kill_process(server, Signal::KILL).is_ok()
                    {
                        kills += 1;
                    }
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
        end(&mut program);
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
        let server = server_of(&program).unwrap();
        kill_process(server, Signal::KILL).unwrap();
        wait_for("the next server asks again", || behaviour.whole.load(Ordering::SeqCst) == 2);
        assert_ne!(server_of(&program), Some(server));
        behaviour.hang(false);
        assert_eq!(reader.join().unwrap().unwrap(), world.files["one"]);
        end(&mut program);
    });
}

#[test]
fn what_is_missing_is_fetched_before_it_leaves() {
    isolated("what_is_missing_is_fetched_before_it_leaves", |root| {
        let files = (0..30).map(|n| (format!("f{n}"), vec![n; 3000])).collect();
        let world = World::new(root, files);
        let mut program = start(&world);
        let view = world.session("a");
        end(&mut program);
        assert!(mount::find_mount(&world.places.mountpoint()).unwrap().is_none());
        // The engine takes over what was fetched; this does it in its place.
        let fetched = world.places.fetched_now().unwrap();
        for (name, bytes) in &world.files {
            let path = aether_cas::Blob::of(bytes).digest.object_path();
            assert_eq!(&fs::read(fetched.join(&path)).unwrap(), bytes, "{name}");
            world.put_object(name);
        }
        mount::rebind(&view).unwrap();
        for (name, bytes) in &world.files {
            assert_eq!(&fs::read(view.join(name)).unwrap(), bytes, "{name}");
        }
    });
}

/// Asks the program to end, and sees that it does.
fn end(program: &mut Program) {
    kill_process(Pid::from_child(&program.0), Signal::TERM).unwrap();
    let status = program.0.wait().unwrap();
    assert!(status.success(), "{status}");
}
