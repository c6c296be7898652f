//! fsx: random reads, writes, maps, truncations, holes and copies of one file, checked as they are made. Copies of a
//! session that are taken in between hold exactly what fsx had written at that moment.
//!
//! Before each operation fsx says in one line on standard error what it is about to do. That is a pipe of packets with
//! room for one here: when a packet waits and fsx waits to write the next, all that was announced is done and nothing is
//! under way. What the file holds after each operation is learnt from a run with the same seed on a file that nobody
//! copies.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aether_cas::Digest;
use aether_engine::testing::isolated;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;

use crate::cgroup::Cgroup;
use crate::installed::programs;
use crate::lab::{Lab, Medium, Session};
use crate::process::Running;

/// Every operation there is. Maps stay dirty.
const EVERYTHING: &str = r"
flen = 262144
nomsyncafterwrite = true
[weights]
close_open = 3
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 3
punch_hole = 5
sendfile = 2
posix_fadvise = 2
copy_file_range = 5
";

/// What changes the file in one system call, so that a process that is frozen has done all of it or nothing.
const IN_ONE_CALL: &str = r"
flen = 65536
[opsize]
max = 16384
[weights]
close_open = 3
mapread = 5
mapwrite = 0
read = 5
write = 20
truncate = 5
fsync = 0.3
punch_hole = 5
";

/// What to run.
#[derive(Clone, Copy)]
struct Plan<'a> {
    configuration: &'a Path,
    seed: u64,
    operations: u64,
}

/// fsx under way on one file.
struct Exercise {
    process: Running,
    packets: File,
    /// Operations that are done while it rests.
    done: u64,
    operations: u64,
}

impl Exercise {
    /// Starts it; it rests before its first operation.
    fn start(file: &Path, plan: Plan<'_>) -> Self {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::DIRECT | PipeFlags::CLOEXEC).unwrap();
        rustix::pipe::fcntl_setpipe_size(&reader, 4096).unwrap();
        let process = Command::new(programs().join("fsx"))
            .args(["-vv", "-f"])
            .arg(plan.configuration)
            .args(["-S", &plan.seed.to_string(), "-N", &plan.operations.to_string(), "-P"])
            .arg(plan.configuration.parent().unwrap())
            .arg(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::from(writer))
            .spawn()
            .unwrap();
        let mut fsx = Self { process: Running(process), packets: reader.into(), done: 0, operations: plan.operations };
        fsx.rest();
        fsx
    }

    /// Waits until it is held up by a packet that nobody reads, or has ended.
    ///
    /// A process that sleeps in a write while a packet waits sleeps for room: what it does after it has put a packet
    /// there never sleeps within that write.
    fn rest(&mut self) {
        let call = format!("/proc/{}/syscall", self.process.0.id());
        let writing = format!("{} 0x2 ", libc::SYS_write);
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let mut waiting = [PollFd::new(&self.packets, PollFlags::IN)];
            poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
            let full = waiting[0].revents().contains(PollFlags::IN);
            if full && fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&writing)) {
                return;
            }
            if self.process.0.try_wait().unwrap().is_some() {
                return;
            }
            assert!(Instant::now() < deadline, "fsx neither rests nor ends after {} operations", self.done);
            std::thread::yield_now();
        }
    }

    /// Reads one packet: the number that it announces, 0 for the first, which names the seed; `None` after the last.
    fn packet(&mut self) -> Option<u64> {
        let mut packet = [0; 4096];
        let length = self.packets.read(&mut packet).unwrap();
        let line = String::from_utf8_lossy(&packet[..length]).into_owned();
        let text = line.split_once("fsx] ").map_or("", |(_, text)| text.trim());
        match text.split(' ').next().unwrap_or_default().parse() {
            Ok(number) => Some(number),
            Err(_) if length == 0 => None,
            Err(_) if text.starts_with("Using seed") => Some(0),
            Err(_) => panic!("fsx says: {line}{}", self.packets_left()),
        }
    }

    fn packets_left(&mut self) -> String {
        let mut text = String::new();
        let _ = self.packets.read_to_string(&mut text);
        text
    }

    /// Lets it do one operation more.
    fn step(&mut self) {
        assert_eq!(self.packet(), Some(self.done), "each operation is announced once");
        self.rest();
        self.done += 1;
    }

    /// Lets it go on until `operations` are done.
    fn run_to(&mut self, operations: u64) {
        while self.done < operations {
            self.step();
        }
    }

    /// Lets it go on to its end, and expects that it found nothing wrong.
    fn finish(mut self) {
        while self.packet().is_some() {}
        let status = self.process.0.wait().unwrap();
        let mut said = String::new();
        self.process.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(status.success() && said.contains("A-OK"), "fsx ended with {status} and said: {said}");
    }
}

fn contents(file: &Path) -> Digest {
    Digest::of(&fs::read(file).unwrap())
}

/// What a file holds after each number of operations.
fn history(scratch: &Path, plan: Plan<'_>) -> Vec<Digest> {
    let file = scratch.join(format!("history-{}", plan.seed));
    let mut fsx = Exercise::start(&file, plan);
    let mut states = vec![contents(&file)];
    while fsx.done < fsx.operations {
        fsx.step();
        states.push(contents(&file));
    }
    fsx.finish();
    assert_eq!(states.last(), Some(&contents(&file)));
    fs::remove_file(file).unwrap();
    states
}

/// A file of the base that fsx writes over, and a folder for new ones.
fn lab(root: &Path, medium: Medium) -> Lab {
    Lab::new(root, medium, |base| {
        fs::create_dir(base.join("folder")).unwrap();
        fs::write(base.join("folder/base"), vec![7; 300_000]).unwrap();
    })
}

fn configured(root: &Path, text: &str) -> std::path::PathBuf {
    let path = root.join("fsx.toml");
    fs::write(&path, text).unwrap();
    path
}

/// Copies taken at known operations.
fn at_known_operations(root: &Path, medium: Medium) {
    let lab = lab(root, medium);
    let configuration = configured(root, EVERYTHING);
    for (seed, name) in [(1, "folder/base"), (2, "folder/new")] {
        let plan = Plan { configuration: &configuration, seed, operations: 1200 };
        let states = history(&lab.scratch, plan);
        let other = Plan { seed: seed + 100, operations: 200, ..plan };
        let of_other = history(&lab.scratch, other);
        let session = lab.session();
        let mut fsx = Exercise::start(&session.path(name), plan);
        let mut random = StdRng::seed_from_u64(seed);
        let mut moments = Vec::new();
        for part in 0..6 {
            let at = part * 200 + random.random_range(1..=200);
            fsx.run_to(at);
            let wanted = states[usize::try_from(at).unwrap()];
            assert_eq!(contents(&session.path(name)), wanted, "{medium:?}, seed {seed}: session at {at}");
            let moment = session.snapshot(&[]);
            let fork = session.fork_of(&moment);
            assert_eq!(contents(&fork.path(name)), wanted, "{medium:?}, seed {seed}: fork at {at}");
            // Both are written to from now on, each by its own fsx, and neither notices.
            let mut second = Exercise::start(&fork.path(name), other);
            while second.done < second.operations {
                second.step();
                if fsx.done < (at + 50).min(fsx.operations) {
                    fsx.step();
                }
            }
            second.finish();
            let grandchild = fork.fork(&[]);
            assert_eq!(Some(&contents(&grandchild.path(name))), of_other.last(), "fork of a fork at {at}");
            moments.push((at, wanted, moment));
        }
        fsx.finish();
        assert_eq!(Some(&contents(&session.path(name))), states.last());
        // Digested long after, and read from the store on another node.
        for (at, wanted, moment) in moments {
            let elsewhere = session.elsewhere_of(&moment);
            assert_eq!(contents(&elsewhere.path(name)), wanted, "{medium:?}, seed {seed}: another node at {at}");
            session.forget(&moment);
        }
    }
    assert_eq!(lab.fsck(), Vec::<String>::new());
}

/// Takes one copy of a session in which fsx runs, and finds the operation at which it was held still.
fn caught(session: &Session<'_>, name: &str, announced: &AtomicU64, cgroup: &Cgroup, states: &[Digest]) -> u64 {
    let before = announced.load(Ordering::Relaxed);
    let fork = session.fork(std::slice::from_ref(&cgroup.0));
    // One packet may be read and not counted yet, and one wait in the pipe.
    let after = announced.load(Ordering::Relaxed) + 2;
    let range = before.saturating_sub(1)..=after.min(states.len() as u64 - 1);
    let found = contents(&fork.path(name));
    let at = range.clone().find(|at| states[usize::try_from(*at).unwrap()] == found);
    at.unwrap_or_else(|| panic!("the fork shows no state of operations {range:?}"))
}

/// Copies taken while it runs, held still by its cgroup.
fn at_any_moment(root: &Path, medium: Medium) {
    let lab = lab(root, medium);
    let configuration = configured(root, IN_ONE_CALL);
    let plan = Plan { configuration: &configuration, seed: 11, operations: 6000 };
    let states = history(&lab.scratch, plan);
    let session = lab.session();
    let cgroup = Cgroup::new(&format!("fsx-{medium:?}"));
    let mut under_way = Vec::new();
    let mut rounds = 0;
    // A run may end before the first copy of it is taken.
    while under_way.len() < 10 {
        rounds += 1;
        assert!(rounds < 100, "{medium:?}: fsx was caught under way only {} times", under_way.len());
        let name = format!("folder/round-{rounds}");
        let mut fsx = Exercise::start(&session.path(&name), plan);
        cgroup.add(&fsx.process);
        let announced = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while let Some(number) = fsx.packet() {
                    announced.store(number, Ordering::Relaxed);
                }
                fsx
            });
            while !reader.is_finished() {
                let at = caught(&session, &name, &announced, &cgroup, &states);
                if at > 0 && at < plan.operations {
                    under_way.push(at);
                }
            }
            reader.join().unwrap().finish();
        });
        assert_eq!(Some(&contents(&session.path(&name))), states.last());
    }
    println!("fsx, {medium:?}: caught after operations {under_way:?} in {rounds} runs");
    drop(session);
    assert_eq!(lab.fsck(), Vec::<String>::new());
}

#[test]
fn copies_at_known_operations_are_exact_on_btrfs() {
    isolated("fsx::copies_at_known_operations_are_exact_on_btrfs", |root| at_known_operations(root, Medium::Btrfs));
}

#[test]
fn copies_at_known_operations_are_exact_on_directories() {
    isolated("fsx::copies_at_known_operations_are_exact_on_directories", |root| {
        at_known_operations(root, Medium::Directory);
    });
}

#[test]
fn copies_at_known_operations_are_exact_in_memory() {
    isolated("fsx::copies_at_known_operations_are_exact_in_memory", |root| at_known_operations(root, Medium::Memory));
}

#[test]
fn copies_at_any_moment_are_exact_on_btrfs() {
    isolated("fsx::copies_at_any_moment_are_exact_on_btrfs", |root| at_any_moment(root, Medium::Btrfs));
}

#[test]
fn copies_at_any_moment_are_exact_on_directories() {
    isolated("fsx::copies_at_any_moment_are_exact_on_directories", |root| at_any_moment(root, Medium::Directory));
}

#[test]
fn copies_at_any_moment_are_exact_in_memory() {
    isolated("fsx::copies_at_any_moment_are_exact_in_memory", |root| at_any_moment(root, Medium::Memory));
}
