//! Prints what `git status` takes in sessions of a repository: the first one in a session and later ones.
//!
//!     cargo run -p aether-engine --example git_status -- --repository PATH
//!
//! `--cold` looks at sessions after the kernel's caches were dropped too. `--then COMMAND` runs a command in the shell
//! afterwards, with the engine's directory in `$ROOT`, for strace and perf. Everything happens in a mount namespace and a
//! temporary directory of its own. Needs root.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aether_cas::MemoryStore;
use aether_cas::tree::{Mtime, Owner};
use aether_engine::pool::PoolConfig;
use aether_engine::testing::{self, Keep};
use aether_engine::{Config, Engine, git, mount, scan};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const MTIME: Mtime = Mtime { seconds: 1_600_000_000, nanos: 0 };
const ROUNDS: usize = 7;

fn argument(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

fn main() {
    let repository = argument("--repository").expect("--repository names a git repository");
    let then = argument("--then");
    testing::isolated_main(|root| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(measure(root, &repository, then.as_deref()));
    });
}

async fn measure(root: &Path, repository: &str, then: Option<&str>) {
    let copy = root.join("copy");
    let cloned = Command::new("git").args(["clone", "-q", repository]).arg(&copy).status().expect("git runs");
    assert!(cloned.success(), "git clone: {cloned}");
    git::prepare(&copy, MTIME).expect("prepared");
    let store = MemoryStore::new();
    let options = scan::Options { owner: OWNER, mtime: None, progress: None };
    let tree = scan::scan(&copy, options, &Keep(&store)).expect("scanned").root;
    fs::remove_dir_all(&copy).expect("removed");

    let open = async |name: &str| {
        let pool = PoolConfig::Image { bytes: 2 << 30 };
        Engine::open(Config { pool, ..Config::new(root.join(name)) }).await.expect("the engine opens")
    };
    let engine = open("one").await;
    let image = engine.ensure_image(tree, OWNER, &store, &|_| {}).await.expect("the image is made");

    let session = async |id: &str| {
        engine.create_session(id, &image).await.expect("a session");
        engine.mount_session(id).await.expect("mounted")
    };
    let view = session("first").await;
    show("first session of the image, first", status(&view));
    show("  then", status(&view));
    // What a node does that has not looked at the image for long.
    let (mut cold, mut first, mut warm, mut find) = (vec![], vec![], vec![], vec![]);
    if std::env::args().any(|argument| argument == "--cold") {
        for n in 0..ROUNDS {
            let view = session(&format!("cold{n}")).await;
            forget();
            cold.push(status(&view));
        }
        show("caches dropped, first", median(cold));
    }
    for n in 0..ROUNDS {
        let view = session(&format!("s{n}")).await;
        first.push(status(&view));
        warm.push(status(&view));
        find.push(timed(Command::new("find").arg(&view).arg("-size").arg("-1c")));
    }
    show("new session, first", median(first));
    show("  then", median(warm));
    show("  find", median(find));
    let (mut walk, mut first, mut warm) = (vec![], vec![], vec![]);
    for n in 0..ROUNDS {
        let id = format!("published{n}");
        session(&id).await;
        let target = root.join("pod").join(&id);
        let started = Instant::now();
        engine.publish(&id, &target, false).await.expect("published");
        assert!(engine.wait_until_warm(&id).await.expect("an answer"), "there was no room to warm the session");
        walk.push(started.elapsed());
        first.push(status(&target));
        warm.push(status(&target));
    }
    show("publish, and wait until it is warm", median(walk));
    show("published session, first", median(first));
    show("  then", median(warm));

    fs::write(view.join("README.md"), "changed").expect("written");
    engine.snapshot("first", "snapshot", &[], None).await.expect("a snapshot");
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for n in 0..ROUNDS {
        let id = format!("fork{n}");
        engine.fork_session(&id, "snapshot").await.expect("a fork");
        let view = engine.mount_session(&id).await.expect("mounted");
        first.push(status(&view));
        second.push(status(&view));
    }
    show("fork, first", median(first));
    show("  then", median(second));
    engine.restore_in_place("first", "safety", tree, &[], &store).await.expect("restored");
    show("restored in place, first", status(&view));
    show("  then", status(&view));

    let there = open("two").await;
    let image = there.ensure_image(tree, OWNER, &store, &|_| {}).await.expect("the image is made");
    there.create_session("s", &image).await.expect("a session");
    let view = there.mount_session("s").await.expect("mounted");
    show("another node, first", status(&view));
    show("  then", status(&view));
    if let Some(then) = then {
        let done = Command::new("bash").arg("-c").arg(then).env("ROOT", root.join("one")).status().expect("a shell");
        println!("{done}");
    }
    mount::unmount_below(root).expect("unmounted");
}

/// As a shell in a pod does it.
fn status(view: &Path) -> Duration {
    timed(Command::new("git").args(["-c", "safe.directory=*", "-C"]).arg(view).args(["status", "--porcelain"]))
}

fn timed(command: &mut Command) -> Duration {
    let started = Instant::now();
    let status = command.stdout(Stdio::null()).status().expect("it runs");
    let took = started.elapsed();
    assert!(status.success(), "{status}");
    took
}

/// Everything that the kernel has cached.
fn forget() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("caches are dropped");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn show(what: &str, time: Duration) {
    println!("  {what:<44} {:>9.2} ms", time.as_secs_f64() * 1000.0);
}
