//! The real program with real commands, side by side with `timeout(1)`.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const WORKER: &str = env!("CARGO_BIN_EXE_aether-worker");
/// Generous: only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(30);

fn worker(arguments: &[&str]) -> Output {
    Command::new(WORKER).args(arguments).stdin(Stdio::null()).output().expect("the worker starts")
}

/// As a shell reports it.
fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("ended")
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("the worker still runs");
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Starts `script` under the worker and returns when it has printed its first line.
fn started(options: &[&str], script: &str) -> (Child, BufReader<impl Read>, String) {
    let mut child = Command::new("env")
        // A background job of a shell begins with INT ignored, and a shell cannot trap what it began ignoring.
        .args(["--default-signal", WORKER])
        .arg("run")
        .args(options)
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the worker starts");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    output.read_line(&mut line).expect("a line");
    (child, output, line.trim().to_owned())
}

#[test]
fn codes_are_those_of_timeout() {
    let cases: [(&str, &str, &[&str], i32); 12] = [
        ("10", "0", &["true"], 0),
        ("10", "0", &["false"], 1),
        ("10", "0", &["sh", "-c", "exit 7"], 7),
        ("10", "0", &["sh", "-c", "exit 255"], 255),
        ("0", "0", &["sh", "-c", "exit 3"], 3),
        ("10", "0", &["sh", "-c", "kill -KILL $$"], 137),
        ("10", "0", &["sh", "-c", "kill -TERM $$"], 143),
        ("0.2s", "0", &["sleep", "60"], 124),
        ("0.2s", "0", &["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.02; done"], 124),
        ("0.2s", "0.2s", &["sh", "-c", "trap '' TERM; while :; do sleep 0.02; done"], 137),
        ("10", "0", &["aether-no-such-command"], 127),
        ("10", "0", &["/etc"], 126),
    ];
    for (timeout, grace, argv, expected) in cases {
        let ours = worker(&[&["run", "--timeout", timeout, "--grace", grace, "--"], argv].concat());
        let theirs = Command::new("timeout")
            .args(["-k", grace, timeout])
            .args(argv)
            .stdin(Stdio::null())
            .output()
            .expect("timeout(1) is there");
        assert_eq!(code(theirs.status), expected, "timeout(1) with {argv:?}");
        assert_eq!(code(ours.status), expected, "{argv:?}: {}", String::from_utf8_lossy(&ours.stderr));
        assert_eq!(ours.stdout, theirs.stdout, "{argv:?}");
    }
}

#[test]
fn a_file_without_execute_permission_is_named() {
    let directory = scratch("not-executable");
    let script = directory.join("script");
    fs::write(&script, "#!/bin/sh\n").expect("written");
    let path = script.to_str().expect("text");
    let output = worker(&["run", "--", path]);
    assert_eq!(code(output.status), 126);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains(path) && message.contains("Permission denied"), "{message}");
    fs::remove_dir_all(directory).expect("removed");
}

#[test]
fn output_and_input_pass_through() {
    let mut child = Command::new(WORKER)
        .args(["--timeout", "30s", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the worker starts");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), b"through\n").expect("written");
    let output = child.wait_with_output().expect("ended");
    assert!(output.status.success());
    assert_eq!(output.stdout, b"through\n");
}

#[test]
fn signals_reach_the_command() {
    for (name, number) in [
        ("TERM", Signal::TERM),
        ("INT", Signal::INT),
        ("HUP", Signal::HUP),
        ("QUIT", Signal::QUIT),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
    ] {
        let script = format!("trap 'echo caught; exit 9' {name}; echo ready; while :; do sleep 0.02; done");
        let (mut child, mut output, line) = started(&[], &script);
        assert_eq!(line, "ready");
        signal(&child, number);
        let mut rest = String::new();
        output.read_to_string(&mut rest).expect("read");
        assert_eq!(rest.trim(), "caught", "{name}");
        assert_eq!(code(child.wait().expect("ended")), 9, "{name}");
    }
}

#[test]
fn a_forwarded_term_is_followed_by_kill() {
    let (mut child, _output, line) =
        started(&["--grace", "200ms"], "trap '' TERM; echo ready; while :; do sleep 0.02; done");
    assert_eq!(line, "ready");
    signal(&child, Signal::TERM);
    assert_eq!(code(child.wait().expect("ended")), 137);
}

#[test]
fn the_limit_ends_the_whole_group() {
    let (mut child, _output, line) = started(&["--timeout", "300ms"], "sleep 300 & echo $!; wait");
    let grandchild = Pid::from_raw(line.parse().expect("a pid")).expect("not zero");
    assert_eq!(code(child.wait().expect("ended")), 124);
    until("the grandchild is gone", || test_kill_process(grandchild).is_err() || is_zombie(grandchild));
}

/// Without a first process that reaps, an orphan stays a zombie; it is not running any more.
fn is_zombie(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
        .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

#[test]
fn a_stopped_command_is_woken_to_end() {
    let output = worker(&["run", "--timeout", "300ms", "--", "sh", "-c", "kill -STOP $$"]);
    assert_eq!(code(output.status), 124);
}

/// Runs the worker as first process of a namespace of its own.
fn as_first_process(arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--map-root-user", "--fork", "--pid", "--mount-proc", "--kill-child", WORKER])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Ends with 0 when the orphan it made has been reaped by process 1.
const ORPHAN: &str = "
    orphan=$(sh -c 'sleep 0.05 >/dev/null & echo $!')
    tries=0
    while [ -e /proc/$orphan ]; do
        tries=$((tries + 1)); [ $tries -lt 500 ] || exit 1
        sleep 0.02
    done
    [ \"$(cat /proc/1/comm)\" = aether-worker ] || exit 2
    exit 0";

#[test]
fn orphans_are_reaped_by_the_first_process() {
    let output = as_first_process(&["run", "--", "sh", "-c", ORPHAN]).output().expect("unshare(1) is there");
    assert_eq!(code(output.status), 0, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_first_process_obeys_term() {
    let mut child =
        as_first_process(&["run", "--", "sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.02; done"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1) is there");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    assert_eq!(line.trim(), "ready");
    signal_first(&child, Signal::TERM);
    assert_eq!(code(child.wait().expect("ended")), 4);
}

#[test]
fn pause_ends_on_term() {
    let mut child = as_first_process(&["pause"]).spawn().expect("unshare(1) is there");
    until("the first process sleeps", || first_of(&child).is_some_and(sleeps));
    // The first process of a namespace does not even see a signal that it has not prepared for.
    until("it has ended", || {
        first_of(&child).map(|pid| kill_process(pid, Signal::TERM));
        child.try_wait().expect("waited").is_some()
    });
    assert_eq!(code(child.wait().expect("ended")), 0);
}

/// The only child of `unshare`, which is process 1 within.
fn first_of(unshare: &Child) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", unshare.id())).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

fn signal_first(unshare: &Child, signal: Signal) {
    kill_process(first_of(unshare).expect("it runs"), signal).expect("it may be signalled");
}

/// Whether the process is the worker, at rest.
fn sleeps(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.contains("(aether-worker) S")
}

#[test]
fn an_installed_copy_runs_and_can_be_replaced() {
    let directory = scratch("install");
    let path = directory.to_str().expect("text");
    for _ in 0..2 {
        let output = worker(&["install", path]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let copy = directory.join("worker");
    assert_eq!(fs::metadata(&copy).expect("installed").permissions().mode() & 0o777, 0o755);
    let status = Command::new(&copy).args(["--timeout", "5s", "--grace", "10s", "--", "sh", "-c", "exit 6"]).status();
    assert_eq!(code(status.expect("the copy starts")), 6);
    assert_eq!(fs::read_dir(&directory).expect("listed").count(), 1, "no partial copy stays");
    fs::remove_dir_all(&directory).expect("removed");

    let output = worker(&["install", path]);
    assert_eq!(code(output.status), 125);
    assert!(String::from_utf8_lossy(&output.stderr).contains(path));
}

#[test]
fn help_has_examples_and_mistakes_exit_as_those_of_timeout() {
    let help = worker(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("Examples:"));
    assert_eq!(code(worker(&[]).status), 125);
    assert_eq!(code(worker(&["run", "--timeout", "soon", "true"]).status), 125);
}

fn scratch(name: &str) -> std::path::PathBuf {
    let directory = std::env::temp_dir().join(format!("aether-worker-{name}-{}", std::process::id()));
    fs::create_dir(&directory).expect("made");
    directory
}
