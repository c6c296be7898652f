//! Sessions over the lazy layer on a real kernel, with a store that can be made to fail.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use aether_cas::Blob;
use aether_engine::mount;
use aether_engine::testing::isolated;
use aether_lazy::server::Outcome;
use aether_lazy::{Exchange, Launch, Limits};
use rustix::event::{PollFd, PollFlags, poll};
use support::{Threads, World, control, wait_for};

fn files(sizes: &[usize]) -> BTreeMap<String, Vec<u8>> {
    let bytes = |n: usize, size| (0..size).map(|at: usize| (at.wrapping_mul(31) >> 3) as u8 ^ n as u8).collect();
    sizes.iter().enumerate().map(|(n, size)| (format!("file-{n}"), bytes(n, *size))).collect()
}

/// Unmounts what a test mounted, and waits for the exchange to notice.
fn finish(world: World, exchange: Exchange) {
    mount::unmount_below(&world.root).unwrap();
    exchange.join();
}

fn kernel_reads_by_itself() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 9)
}

#[test]
fn a_missing_content_arrives_when_it_is_read() {
    isolated("a_missing_content_arrives_when_it_is_read", |root| {
        let world = World::new(root, files(&[1, 0, 4096, 100_000, 3_000_000]));
        let (exchange, metrics) = world.serve(Limits::default());
        let view = world.session("a");
        for (name, bytes) in &world.files {
            assert_eq!(fs::metadata(view.join(name)).unwrap().len(), bytes.len() as u64);
        }
        assert_eq!(metrics.opens(), 0, "names, sizes and times need no contents");
        for (name, bytes) in &world.files {
            assert_eq!(&fs::read(view.join(name)).unwrap(), bytes, "{name}");
        }
        assert_eq!(metrics.fetches(Outcome::Ok), 4, "the empty one is nobody's");
        if kernel_reads_by_itself() {
            assert_eq!(metrics.reads(), 0, "passthrough");
        }
        // Another session of the same image finds them.
        let other = world.session("b");
        for (name, bytes) in &world.files {
            assert_eq!(&fs::read(other.join(name)).unwrap(), bytes, "{name}");
        }
        assert_eq!(metrics.fetches(Outcome::Ok), 4);
        // Changed files: appended to, which copies the content up, and written anew.
        fs::OpenOptions::new().append(true).open(view.join("file-4")).unwrap().write_all(b"more").unwrap();
        assert!(fs::read(view.join("file-4")).unwrap() == [&world.files["file-4"][..], b"more"].concat());
        assert_eq!(&fs::read(other.join("file-4")).unwrap(), &world.files["file-4"]);
        fs::write(view.join("file-2"), "new").unwrap();
        assert_eq!(fs::read(view.join("file-2")).unwrap(), b"new");
        assert_eq!(&fs::read(other.join("file-2")).unwrap(), &world.files["file-2"]);

        let layer = world.places.mountpoint();
        let entry = mount::find_mount(&layer).unwrap().unwrap();
        for option in ["ro", "nosuid", "nodev"] {
            assert!(entry.options.split(',').any(|set| set == option), "{entry:?}");
        }
        assert!(!String::from_utf8_lossy(&entry.super_options).contains("allow_other"), "{entry:?}");
        let unknown = layer.join(Blob::of(b"never in the catalog").digest.object_path());
        assert_eq!(fs::metadata(&unknown).unwrap_err().raw_os_error(), Some(libc::EIO), "never ENOENT");
        let error = fs::metadata(layer.join("is-anybody-here")).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        let opened = aether_cas::lazy::read_opened(&world.places.opened()).unwrap();
        // The catalog is in order of name: file-1 is empty.
        assert_eq!(opened, [0, 2, 3, 4], "the order in which they were first opened");
        // And a session whose server never fetched anything.
        let (second, metrics) = world.serve(Limits::default());
        let view = world.session("c");
        for (name, bytes) in &world.files {
            assert_eq!(&fs::read(view.join(name)).unwrap(), bytes, "{name}");
        }
        assert_eq!((metrics.opens(), metrics.fetches(Outcome::Ok)), (4, 0));
        finish(world, exchange);
        second.join();
    });
}

#[test]
fn readers_of_one_content_share_its_fetch() {
    isolated("readers_of_one_content_share_its_fetch", |root| {
        let world = World::new(root, files(&[50_000]));
        let (exchange, metrics) = world.serve(Limits::default());
        let behaviour = world.server.behaviour.clone();
        behaviour.hang(true);
        let views: Vec<_> = (0..4).map(|n| world.session(&format!("s{n}"))).collect();
        let readers: Vec<_> = views
            .iter()
            .flat_map(|view| [view.join("file-0"), view.join("file-0")])
            .map(|path| thread::spawn(move || fs::read(path).unwrap()))
            .collect();
        wait_for("four sessions ask", || metrics.opens() >= 4);
        behaviour.hang(false);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), world.files["file-0"]);
        }
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 1);
        finish(world, exchange);
    });
}

#[test]
fn what_cannot_be_had_is_an_error_in_time_and_can_be_had_later() {
    isolated("what_cannot_be_had_is_an_error_in_time_and_can_be_had_later", |root| {
        let world = World::new(root, files(&[10_000, 20_000, 30_000]));
        let limits = Limits { deadline: Duration::from_millis(300), ..Limits::default() };
        let (exchange, metrics) = world.serve(limits);
        let view = world.session("a");
        world.server.behaviour.hang(true);
        world.put_object("file-2");
        for name in ["file-0", "file-1"] {
            let error = fs::read(view.join(name)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
        }
        assert_eq!(metrics.errors(), 2, "each is counted");
        assert_eq!(fs::read(view.join("file-2")).unwrap(), world.files["file-2"], "what is here needs nobody");
        // The engine gets one of them, and the overlay is told to look again: nobody asks the lazy layer.
        world.put_object("file-0");
        mount::rebind(&view).unwrap();
        let before = metrics.opens();
        assert_eq!(fs::read(view.join("file-0")).unwrap(), world.files["file-0"]);
        assert_eq!(metrics.opens(), before);
        // The store is back: the other one needs nothing else.
        world.server.behaviour.hang(false);
        assert_eq!(fs::read(view.join("file-1")).unwrap(), world.files["file-1"]);
        finish(world, exchange);
    });
}

#[test]
fn a_fetch_goes_on_when_its_readers_have_given_up() {
    isolated("a_fetch_goes_on_when_its_readers_have_given_up", |root| {
        let world = World::new(root, files(&[1_000_000]));
        let (exchange, metrics) = world.serve(Limits { deadline: Duration::from_millis(200), ..Limits::default() });
        let view = world.session("a");
        let behaviour = world.server.behaviour.clone();
        behaviour.stop_in_the_middle.store(true, Ordering::SeqCst);
        for _ in 0..2 {
            assert_eq!(fs::read(view.join("file-0")).unwrap_err().raw_os_error(), Some(libc::EIO));
        }
        behaviour.stop_in_the_middle.store(false, Ordering::SeqCst);
        wait_for("it has arrived", || metrics.fetches(Outcome::Ok) == 1);
        assert!(fs::read(view.join("file-0")).unwrap() == world.files["file-0"]);
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 1, "one fetch for all of them");
        finish(world, exchange);
    });
}

/// A first server that reads nothing, and real ones after it.
struct StuckAtFirst {
    stuck: bool,
    then: Threads,
}

impl Launch for StuckAtFirst {
    fn launch(&mut self, socket: OwnedFd) -> io::Result<Box<dyn FnOnce() -> String + Send>> {
        if !std::mem::replace(&mut self.stuck, false) {
            return self.then.launch(socket);
        }
        let hangs_up = move || poll(&mut [PollFd::new(&socket, PollFlags::empty())], None);
        let thread = thread::spawn(hangs_up);
        Ok(Box::new(move || format!("{:?}", thread.join())))
    }
}

#[test]
fn a_server_that_does_not_read_is_replaced_and_holds_up_nobody_who_is_killed() {
    isolated("a_server_that_does_not_read_is_replaced_and_holds_up_nobody_who_is_killed", |root| {
        // More than its socket has room for.
        const QUESTIONS: usize = 600;
        let world = World::new(root, files(&[10_000]));
        let limit = Duration::from_secs(8);
        let (then, metrics) = Threads::new(&world.places, &world.uri, &world.runtime, Limits::default());
        let layer = world.places.mountpoint();
        let device = aether_lazy::mount(&layer).unwrap();
        let exchange = Exchange::start(device, limit, StuckAtFirst { stuck: true, then }).unwrap();
        let asked = control(&layer).join("waiting");
        let asked = || fs::read_to_string(&asked).unwrap().trim().parse::<usize>().unwrap();
        let began = Instant::now();
        let askers: Vec<_> = (0..QUESTIONS)
            .map(|n| layer.join(format!("nobody-{n}")))
            .map(|path| thread::spawn(move || fs::metadata(path).unwrap_err().raw_os_error()))
            .collect();
        wait_for("all have asked", || asked() >= QUESTIONS);
        let mut cat = Command::new("cat").arg(layer.join("one-more")).stderr(Stdio::null()).spawn().unwrap();
        wait_for("cat has asked", || asked() > QUESTIONS);
        cat.kill().unwrap();
        cat.wait().unwrap();
        assert!(began.elapsed() < limit, "it was let go, not waited out: {:?}", began.elapsed());
        let errors: Vec<_> = askers.into_iter().map(|asker| asker.join().unwrap()).collect();
        assert!(errors.contains(&Some(libc::EIO)), "after the limit");
        // Who has asked a little later than the first may be answered by the next server.
        assert!(errors.iter().all(|error| [Some(libc::EIO), Some(libc::ENOENT)].contains(error)));
        let view = world.session("a");
        assert_eq!(fs::read(view.join("file-0")).unwrap(), world.files["file-0"]);
        assert_eq!(metrics.errors(), 0);
        finish(world, exchange);
    });
}

#[test]
fn a_content_that_is_not_what_its_name_says_is_refused() {
    isolated("a_content_that_is_not_what_its_name_says_is_refused", |root| {
        let world = World::new(root, files(&[10_000]));
        let (exchange, metrics) = world.serve(Limits::default());
        let view = world.session("a");
        world.server.behaviour.flip.store(true, Ordering::SeqCst);
        assert_eq!(fs::read(view.join("file-0")).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!((metrics.fetches(Outcome::Wrong), metrics.errors()), (1, 1));
        let kept = walkdir(&world.places.fetched());
        assert!(kept.is_empty(), "nothing of it stays: {kept:?}");
        world.server.behaviour.flip.store(false, Ordering::SeqCst);
        assert_eq!(fs::read(view.join("file-0")).unwrap(), world.files["file-0"]);
        finish(world, exchange);
    });
}

fn walkdir(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walkdir(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn a_reader_can_be_killed_while_it_waits_and_other_signals_do_it_no_harm() {
    isolated("a_reader_can_be_killed_while_it_waits_and_other_signals_do_it_no_harm", |root| {
        let mut files = files(&[10_000]);
        files.insert("text".into(), b"one line\n".to_vec());
        let world = World::new(root, files);
        let deadline = Duration::from_secs(60);
        let (exchange, metrics) = world.serve(Limits { deadline, ..Limits::default() });
        let view = world.session("a");
        world.server.behaviour.hang(true);
        let mut cat = Command::new("cat").arg(view.join("file-0")).stdout(Stdio::null()).spawn().unwrap();
        wait_for("cat asks", || metrics.opens() == 1);
        let began = Instant::now();
        cat.kill().unwrap();
        cat.wait().unwrap();
        assert!(began.elapsed() < deadline / 4, "it was let go, not waited out: {:?}", began.elapsed());

        // A shell that handles a signal while it opens a file.
        let script = r#"trap "echo signal" USR1; read -r line < "$0" && echo "$line""#;
        let shell =
            Command::new("bash").args(["-c", script]).arg(view.join("text")).stdout(Stdio::piped()).spawn().unwrap();
        wait_for("the shell asks", || metrics.opens() == 2);
        let pid = rustix::process::Pid::from_child(&shell);
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
        thread::sleep(Duration::from_millis(200));
        world.server.behaviour.hang(false);
        let output = shell.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "signal\none line\n");
        assert_eq!(metrics.errors(), 0);
        // What the killed one asked for is no burden: it can still be read, by the kernel itself.
        assert_eq!(fs::read(view.join("file-0")).unwrap(), world.files["file-0"]);
        finish(world, exchange);
    });
}

#[test]
fn a_large_content_is_read_in_parts_while_it_arrives() {
    isolated("a_large_content_is_read_in_parts_while_it_arrives", |root| {
        const SIZE: usize = 8 << 20;
        let world = World::new(root, files(&[SIZE]));
        let limits = Limits { large: 1 << 20, ..Limits::default() };
        let (exchange, metrics) = world.serve(limits);
        let view = world.session("a");
        let behaviour = world.server.behaviour.clone();
        behaviour.stop_in_the_middle.store(true, Ordering::SeqCst);
        let bytes = &world.files["file-0"];
        let mut file = File::open(view.join("file-0")).unwrap();
        let mut end = vec![0; 5000];
        file.read_exact_at(&mut end, (SIZE - 5000) as u64).unwrap();
        assert_eq!(end, bytes[SIZE - 5000..]);
        assert!(behaviour.parts.load(Ordering::SeqCst) > 0);
        assert_eq!(metrics.fetches(Outcome::Ok), 0, "the whole is still on its way");
        behaviour.stop_in_the_middle.store(false, Ordering::SeqCst);
        wait_for("the whole has arrived", || metrics.fetches(Outcome::Ok) == 1);
        let mut all = Vec::new();
        file.read_to_end(&mut all).unwrap();
        assert!(all == *bytes);
        drop(file);
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 1);
        let parts = behaviour.parts.load(Ordering::SeqCst);
        mount::rebind(&view).unwrap();
        assert!(fs::read(view.join("file-0")).unwrap() == *bytes);
        assert_eq!(behaviour.parts.load(Ordering::SeqCst), parts, "from the disk now");
        finish(world, exchange);
    });
}

#[test]
fn a_large_content_that_does_not_arrive_is_tried_once_for_each_open() {
    isolated("a_large_content_that_does_not_arrive_is_tried_once_for_each_open", |root| {
        const SIZE: usize = 8 << 20;
        let world = World::new(root, files(&[SIZE]));
        let (exchange, metrics) = world.serve(Limits { large: 1 << 20, ..Limits::default() });
        let path = world.session("a").join("file-0");
        let behaviour = world.server.behaviour.clone();
        let bytes = &world.files["file-0"];
        let read = |file: &File, at: usize| {
            let mut piece = vec![0; 5000];
            file.read_exact_at(&mut piece, at as u64).map(|()| assert!(piece == bytes[at..at + 5000], "at {at}"))
        };
        // The store does not give it as a whole: parts are what there is.
        behaviour.refuse.store(true, Ordering::SeqCst);
        let first = File::open(&path).unwrap();
        wait_for("the whole has failed", || metrics.fetches(Outcome::Failed) == 1);
        for at in [0, SIZE / 2, SIZE - 5000] {
            read(&first, at).unwrap();
        }
        assert_eq!((behaviour.whole.load(Ordering::SeqCst), metrics.errors()), (1, 0));
        // It gives another one: nothing more is read of it, by nobody.
        behaviour.refuse.store(false, Ordering::SeqCst);
        behaviour.flip.store(true, Ordering::SeqCst);
        let second = File::open(&path).unwrap();
        wait_for("the whole is wrong", || metrics.fetches(Outcome::Wrong) == 1);
        for file in [&first, &second, &first] {
            assert_eq!(read(file, SIZE / 4).unwrap_err().raw_os_error(), Some(libc::EIO));
        }
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 2);
        assert!(metrics.errors() >= 3, "each is counted: {}", metrics.errors());
        // It gives the right one.
        behaviour.flip.store(false, Ordering::SeqCst);
        assert!(fs::read(&path).unwrap() == *bytes);
        wait_for("the whole is here", || metrics.fetches(Outcome::Ok) == 1);
        for file in [&first, &second] {
            read(file, SIZE / 4).unwrap();
        }
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 3);
        drop((first, second));
        finish(world, exchange);
    });
}

#[test]
fn what_was_read_in_parts_is_not_kept_for_the_next() {
    isolated("what_was_read_in_parts_is_not_kept_for_the_next", |root| {
        const SIZE: usize = 8 << 20;
        let world = World::new(root, files(&[SIZE]));
        let (exchange, metrics) = world.serve(Limits { large: 1 << 20, ..Limits::default() });
        let path = world.session("a").join("file-0");
        let behaviour = world.server.behaviour.clone();
        let end = |file: &File| {
            let mut end = vec![0; 5000];
            file.read_exact_at(&mut end, (SIZE - 5000) as u64).unwrap();
            end == world.files["file-0"][SIZE - 5000..]
        };
        behaviour.stop_in_the_middle.store(true, Ordering::SeqCst);
        behaviour.flip_parts.store(true, Ordering::SeqCst);
        let first = File::open(&path).unwrap();
        assert!(!end(&first), "nobody can tell that a part is wrong");
        behaviour.stop_in_the_middle.store(false, Ordering::SeqCst);
        wait_for("the whole has arrived", || metrics.fetches(Outcome::Ok) == 1);
        assert!(end(&File::open(&path).unwrap()), "while the first one is open, all are read through the server");
        drop(first);
        finish(world, exchange);
    });
}

#[test]
fn large_contents_come_one_after_the_other_and_hold_up_nobody() {
    isolated("large_contents_come_one_after_the_other_and_hold_up_nobody", |root| {
        const SIZE: usize = 4 << 20;
        let world = World::new(root, files(&[SIZE, SIZE, 10_000]));
        let (exchange, metrics) = world.serve(Limits { large: 1 << 20, concurrency: 1, ..Limits::default() });
        let view = world.session("a");
        let behaviour = world.server.behaviour.clone();
        behaviour.stop_in_the_middle.store(true, Ordering::SeqCst);
        let open: Vec<_> = ["file-0", "file-1"].map(|name| (name, File::open(view.join(name)).unwrap())).into();
        for (name, file) in &open {
            let mut end = vec![0; 5000];
            file.read_exact_at(&mut end, (SIZE - 5000) as u64).unwrap();
            assert!(end == world.files[*name][SIZE - 5000..], "{name}");
        }
        assert_eq!(fs::read(view.join("file-2")).unwrap(), world.files["file-2"]);
        assert_eq!(behaviour.whole.load(Ordering::SeqCst), 2, "one of the large ones, and the small one");
        behaviour.stop_in_the_middle.store(false, Ordering::SeqCst);
        wait_for("both have arrived", || metrics.fetches(Outcome::Ok) == 3);
        drop(open);
        finish(world, exchange);
    });
}
