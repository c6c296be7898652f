//! pjdfstest: what POSIX asks of the calls, case by case. Every case that a plain overlay of this kernel passes, with
//! its upper on the same file system, passes in a session.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use aether_engine::mount::{bind, unmount};
use aether_engine::testing::isolated;
use rustix::mount::{MountFlags, mount};

use crate::installed::programs;
use crate::lab::{Lab, Medium};

/// Where in the session it works: a directory of the base, so that new names join old ones.
const INSIDE: &str = "directory/of the base";

/// The calls that Linux has. It sleeps for `naptime` seconds where times must differ; file systems here count in at
/// most 10 ms. The users are those that every Debian has.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.03
allow_remount = REMOUNT

[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Runs all of it in the directory of the base in `view` and returns what became of each case.
fn run(root: &Path, view: &Path, elsewhere: &Path) -> BTreeMap<String, Outcome> {
    // The path of a socket has at most 107 bytes.
    let short = root.join("p");
    fs::create_dir_all(&short).unwrap();
    bind(view, &short, false).unwrap();
    let place = short.join(INSIDE);
    let mut outcomes = pjdfstest(root, &place, elsewhere, false, &[]);
    // A remount to read-only is refused while the program still has open what an earlier case failed on.
    let remounted = pjdfstest(root, &place, elsewhere, true, &["::erofs_"]);
    assert!(remounted.keys().all(|case| matches!(outcomes[case], Outcome::Skipped(_))), "{outcomes:#?}");
    outcomes.extend(remounted);
    unmount(&short).unwrap();
    outcomes
}

fn pjdfstest(root: &Path, place: &Path, elsewhere: &Path, remount: bool, cases: &[&str]) -> BTreeMap<String, Outcome> {
    let configuration = root.join("pjdfstest.toml");
    fs::write(&configuration, CONFIGURATION.replace("REMOUNT", &remount.to_string())).unwrap();
    let output = Command::new(programs().join("pjdfstest"))
        .args(["--configuration-file".as_ref(), configuration.as_os_str()])
        .args(["--path".as_ref(), place.as_os_str()])
        .args(["--secondary-fs".as_ref(), elsewhere.as_os_str()])
        .args(cases)
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let mut outcomes = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [case, outcome] = words[..] else { continue };
        let mut why = || lines.peek().map_or(String::new(), |line| line.trim().to_owned());
        let outcome = match outcome {
            "ok" => Outcome::Passed,
            "skipped" => Outcome::Skipped(why()),
            "FAILED" => Outcome::Failed(why()),
            _ => continue,
        };
        assert_eq!(outcomes.insert(case.to_owned(), outcome), None, "{case} ran twice");
    }
    let total = text.lines().rev().find_map(|line| line.strip_suffix(" total")?.rsplit(' ').next()?.parse().ok());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(total, Some(outcomes.len()), "not all of this was understood:\n{text}\n{error}");
    outcomes
}

/// An overlay as mount(8) makes it, with the flags of a session.
fn plain_overlay(at: &Path) -> std::path::PathBuf {
    fs::create_dir_all(at.join("lower").join(INSIDE)).unwrap();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(at.join(name)).unwrap();
    }
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| at.join(name).display().to_string());
    let options = std::ffi::CString::new(format!("lowerdir={lower},upperdir={upper},workdir={work}")).unwrap();
    let merged = at.join("merged");
    mount("plain", &merged, "overlay", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).unwrap();
    merged
}

/// The cases that pass on the plain overlay and not in a session, each with its reason.
fn worse(plain: &BTreeMap<String, Outcome>, session: &BTreeMap<String, Outcome>) -> Vec<String> {
    let passed = plain.iter().filter(|(_, outcome)| **outcome == Outcome::Passed);
    passed
        .filter_map(|(case, _)| match session.get(case) {
            Some(Outcome::Passed) => None,
            other => Some(format!("{case}: {other:?}")),
        })
        .collect()
}

fn counts(outcomes: &BTreeMap<String, Outcome>) -> String {
    let mut counts = [0; 3];
    for outcome in outcomes.values() {
        counts[match outcome {
            Outcome::Passed => 0,
            Outcome::Failed(_) => 1,
            Outcome::Skipped(_) => 2,
        }] += 1;
    }
    format!("{} passed, {} failed, {} skipped", counts[0], counts[1], counts[2])
}

fn compare(root: &Path, medium: Medium) {
    let lab = Lab::new(root, medium, |base| {
        fs::create_dir_all(base.join(INSIDE)).unwrap();
        fs::write(base.join(INSIDE).join("file"), "of the base").unwrap();
    });
    let outside = root.join("outside");
    fs::create_dir(&outside).unwrap();
    mount("aether-test", &outside, "tmpfs", MountFlags::empty(), c"").unwrap();

    let plain = run(root, &plain_overlay(&lab.scratch), &outside);
    println!("pjdfstest, {medium:?}: plain overlay: {}", counts(&plain));
    assert!(plain.values().filter(|outcome| **outcome == Outcome::Passed).count() > 350, "most cases pass: {plain:#?}");
    let mut reasons = BTreeMap::<&str, Vec<&str>>::new();
    for (case, outcome) in &plain {
        if let Outcome::Failed(why) | Outcome::Skipped(why) = outcome {
            reasons.entry(why).or_default().push(case);
        }
    }
    for (why, cases) in reasons {
        println!("  not passed by the plain overlay either, {why}: {}", cases.join(" "));
    }

    let session = lab.session();
    let here = run(root, session.view(), &outside);
    println!("pjdfstest, {medium:?}: session: {}", counts(&here));
    // Once more where the upper is a copy and has seen a lot already.
    let fork = session.fork(&[]);
    let there = run(root, fork.view(), &outside);
    println!("pjdfstest, {medium:?}: fork: {}", counts(&there));
    for (subject, outcomes) in [("session", here), ("fork", there)] {
        let worse = worse(&plain, &outcomes);
        assert_eq!(worse, Vec::<String>::new(), "{medium:?}: fails in a {subject}, passes on a plain overlay");
    }
    // What it left is a tree like any other.
    let elsewhere = session.elsewhere();
    assert_eq!(fs::read_to_string(elsewhere.path(INSIDE).join("file")).unwrap(), "of the base");
    drop((session, fork, elsewhere));
    assert_eq!(lab.fsck(), Vec::<String>::new());
}

#[test]
fn no_call_fails_on_btrfs_that_a_plain_overlay_keeps() {
    isolated("pjdfstest::no_call_fails_on_btrfs_that_a_plain_overlay_keeps", |root| compare(root, Medium::Btrfs));
}

#[test]
fn no_call_fails_on_directories_that_a_plain_overlay_keeps() {
    isolated("pjdfstest::no_call_fails_on_directories_that_a_plain_overlay_keeps", |root| {
        compare(root, Medium::Directory);
    });
}

#[test]
fn no_call_fails_in_memory_that_a_plain_overlay_keeps() {
    isolated("pjdfstest::no_call_fails_in_memory_that_a_plain_overlay_keeps", |root| compare(root, Medium::Memory));
}
