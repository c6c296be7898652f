//! SQLite in WAL mode and git at work while their session is copied: every copy opens clean, holds all that was
//! acknowledged before it was taken, nothing that came later, and can be worked on.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use aether_engine::testing::isolated;

use crate::cgroup::Cgroup;
use crate::installed::programs;
use crate::lab::{Lab, Medium};
use crate::process::Running;

/// A program that works on its directory without end, and says after each piece of work how many are done.
struct Program {
    /// Waits for a line on standard input before it begins.
    work: &'static str,
    /// Fails if anything is wrong; prints how many pieces are there, then does one more.
    check: &'static str,
    /// What runs both.
    interpreter: [&'static str; 2],
}

const SQLITE: Program = Program {
    interpreter: ["python3", "-c"],
    work: r#"
import sqlite3, sys
sys.stdin.readline()
db = sqlite3.connect(sys.argv[1] + "/data.db", isolation_level=None)
assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
# Often enough that copies fall into them.
db.execute("PRAGMA wal_autocheckpoint = 20")
db.execute("CREATE TABLE piece (n INTEGER PRIMARY KEY, filling BLOB)")
db.execute("CREATE TABLE total (n INTEGER)")
db.execute("INSERT INTO total VALUES (0)")
n = 0
while True:
    n += 1
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO piece VALUES (?, randomblob(3000))", (n,))
    db.execute("UPDATE total SET n = n + 1")
    db.execute("COMMIT")
    print(n, flush=True)
"#,
    check: r#"
import sqlite3, sys
db = sqlite3.connect(sys.argv[1] + "/data.db", isolation_level=None, timeout=60)
assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
db.execute("BEGIN")
(total,), (count, last) = db.execute("SELECT n FROM total").fetchone(), db.execute("SELECT count(*), max(n) FROM piece").fetchone()
db.execute("COMMIT")
assert total == count == (last or 0), (total, count, last)
print(total)
if sys.argv[2] == "copy":
    db.execute("INSERT INTO piece VALUES (-1, '')")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
"#,
};

const GIT: Program = Program {
    interpreter: ["sh", "-euc"],
    work: r#"
read begin
cd "$0"
git init -q .
n=0
while :; do
    n=$((n + 1))
    mkdir -p "folder-$((n % 7))"
    echo "piece $n" >"folder-$((n % 7))/file-$n"
    git add .
    git commit -qm "piece $n"
    [ $((n % 10)) != 0 ] || git gc -q
    echo $n
done
"#,
    check: r#"
cd "$0"
count=$(git rev-list --count --all)
echo "$count"
# Of a repository that changes meanwhile git cannot say more.
[ "$1" = copy ] || exit 0
git fsck --full --strict --no-dangling >&2
for n in $(seq "$count"); do [ "$(git show "HEAD:folder-$((n % 7))/file-$n")" = "piece $n" ] || exit 1; done
# As after a crash of git: whoever is sure that no git runs here removes its locks.
find .git -name '*.lock' -delete
git status --short >&2
echo more >more
git add .
git commit -qm more
"#,
};

impl Program {
    fn run(&self, script: &str, at: &Path, role: &str) -> Command {
        let mut command = Command::new(self.interpreter[0]);
        command.args([self.interpreter[1], script]).arg(at).arg(role);
        // Whatever the machine's own configuration of git says, and whoever owns the files.
        for (key, value) in [
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_CONFIG_COUNT", "4"),
            ("GIT_CONFIG_KEY_0", "safe.directory"),
            ("GIT_CONFIG_VALUE_0", "*"),
            ("GIT_CONFIG_KEY_1", "user.name"),
            ("GIT_CONFIG_VALUE_1", "test"),
            ("GIT_CONFIG_KEY_2", "user.email"),
            ("GIT_CONFIG_VALUE_2", "test@example.com"),
            // It would go on behind a command that has ended, in a copy that is to be taken away then.
            ("GIT_CONFIG_KEY_3", "maintenance.auto"),
            ("GIT_CONFIG_VALUE_3", "false"),
        ] {
            command.env(key, value);
        }
        command
    }

    /// Checks what is at `at`, and returns how many pieces of work are there.
    fn check(&self, at: &Path, role: &str) -> u64 {
        let output = self.run(self.check, at, role).output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "the {role} at {}: {out}{error}", at.display());
        out.trim().parse().unwrap()
    }
}

fn copies_are_clean(root: &Path, medium: Medium, program: &Program) {
    const COPIES: u64 = 4;
    // Brings git and Python too.
    programs();
    let lab = Lab::new(root, medium, |base| std::fs::create_dir(base.join("work")).unwrap());
    let session = lab.session();
    let place = session.path("work");
    let cgroup = Cgroup::new(&format!("{}-{medium:?}", program.interpreter[0]));
    let mut command = program.run(program.work, &place, "session");
    let mut worker = Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    // Before it has children, which are born into its cgroup.
    cgroup.add(&worker);
    worker.0.stdin.take().unwrap().write_all(b"begin\n").unwrap();
    let lines = BufReader::new(worker.0.stdout.take().unwrap()).lines();
    let done = AtomicU64::new(0);
    let mut moments = Vec::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            for line in lines {
                done.store(line.unwrap().parse().unwrap(), Ordering::Relaxed);
            }
        });
        let before = |at_least| {
            while done.load(Ordering::Relaxed) < at_least {
                assert!(!reader.is_finished(), "the program ended");
                std::thread::yield_now();
            }
            done.load(Ordering::Relaxed)
        };
        // The worker ends with this closure, also when a check fails, and the reader after it.
        let _worker = worker;
        for copy in 1..=COPIES {
            let before = before(copy * 5);
            let moment = session.snapshot(std::slice::from_ref(&cgroup.0));
            let fork = session.fork_of(&moment);
            let found = program.check(&fork.path("work"), "copy");
            let later = program.check(&place, "session");
            assert!((before..=later).contains(&found), "{before} before, {found} in the fork, {later} after");
            moments.push((moment, found));
        }
    });
    for (moment, found) in moments {
        let elsewhere = session.elsewhere_of(&moment);
        assert_eq!(program.check(&elsewhere.path("work"), "copy"), found, "the same moment on another node");
        session.forget(&moment);
    }
    drop(session);
    assert_eq!(lab.fsck(), Vec::<String>::new());
}

#[test]
fn copies_of_sqlite_at_work_are_clean_on_btrfs() {
    isolated("programs::copies_of_sqlite_at_work_are_clean_on_btrfs", |root| {
        copies_are_clean(root, Medium::Btrfs, &SQLITE);
    });
}

#[test]
fn copies_of_sqlite_at_work_are_clean_on_directories() {
    isolated("programs::copies_of_sqlite_at_work_are_clean_on_directories", |root| {
        copies_are_clean(root, Medium::Directory, &SQLITE);
    });
}

#[test]
fn copies_of_git_at_work_are_clean_on_btrfs() {
    isolated("programs::copies_of_git_at_work_are_clean_on_btrfs", |root| {
        copies_are_clean(root, Medium::Btrfs, &GIT);
    });
}

#[test]
fn copies_of_git_at_work_are_clean_on_directories() {
    isolated("programs::copies_of_git_at_work_are_clean_on_directories", |root| {
        copies_are_clean(root, Medium::Directory, &GIT);
    });
}

#[test]
fn copies_of_sqlite_at_work_are_clean_in_memory() {
    isolated("programs::copies_of_sqlite_at_work_are_clean_in_memory", |root| {
        copies_are_clean(root, Medium::Memory, &SQLITE);
    });
}

#[test]
fn copies_of_git_at_work_are_clean_in_memory() {
    isolated("programs::copies_of_git_at_work_are_clean_in_memory", |root| {
        copies_are_clean(root, Medium::Memory, &GIT);
    });
}
