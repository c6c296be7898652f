//! The cases and their order.
//!
//! Subjects take turns within each round, so that whatever disturbs the machine for a while disturbs all of them, and each
//! round begins with another one, so that none always follows the same. The first round of each is not counted. A subject
//! that has used up its time in a case takes part in no further round of it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::report::Measurements;
use crate::stage::{go_on, settle, used_bytes};
use crate::subject::{Idle, Subject, is_ours};
use crate::workload::{self, Neighbour, drop_caches, timed};

/// All cases, as they are shown.
pub(crate) const CASES: &[&str] = &[
    "create",
    "fork-live-0",
    "fork-live-100",
    "fork-live-20000",
    "fork-live-dirty",
    "fork-live-neighbour",
    "fork-50",
    "checkpoint-0",
    "checkpoint-100",
    "checkpoint-20000",
    "git-status-first",
    "git-status-warm",
    "find-cold",
    "find-warm",
    "grep-cold",
    "grep-warm",
    "untar",
    "small-writes-2000",
    "append-500",
    "rm-rf",
    "npm-install",
    "read-1g",
    "disk-per-copy",
    "memory-per-copy",
    "lazy-first-file",
    "lazy-usable",
    "lazy-first-file-20ms",
    "lazy-usable-20ms",
];

/// Work on data and metadata inside a copy.
pub(crate) fn is_work(case: &str) -> bool {
    let work = ["git-status-", "find-", "grep-", "untar", "small-writes-", "append-", "rm-rf", "npm-install", "read-"];
    work.iter().any(|prefix| case.starts_with(prefix))
}

/// Cases of one life of a copy, in the order in which they happen to it.
const LIFE: &[&str] = &[
    "create",
    "disk-per-copy",
    "git-status-first",
    "git-status-warm",
    "find-warm",
    "grep-warm",
    "find-cold",
    "grep-cold",
    "small-writes-2000",
    "append-500",
    "untar",
    "rm-rf",
    "npm-install",
    "read-1g",
];

/// What a run needs to know.
pub(crate) struct Plan {
    pub(crate) wanted: Vec<&'static str>,
    /// Counted rounds.
    pub(crate) rounds: usize,
    /// Measured time that a subject has for one case.
    pub(crate) patience: Duration,
    /// `tar` of the tree.
    pub(crate) archive: PathBuf,
    /// Directory of `package.json` and its lock, and the cache to install from.
    pub(crate) npm: Option<(PathBuf, PathBuf)>,
    /// Files of the tree, to change.
    pub(crate) files: Vec<PathBuf>,
}

type Subjects = [Box<dyn Subject>];

impl Plan {
    fn wants(&self, case: &str) -> bool {
        self.wanted.contains(&case)
    }

    fn wants_any(&self, cases: &[&str]) -> bool {
        cases.iter().any(|case| self.wants(case))
    }

    fn exhausted(&self, measured: &mut Measurements, case: &str, subject: &str) -> bool {
        measured.has_reason(case, subject) || measured.spent(case, subject) > self.patience.as_secs_f64() * 1e3
    }

    /// Whether this subject still has a round of this case before it.
    fn due(&self, measured: &mut Measurements, case: &str, subject: &dyn Subject) -> bool {
        let reference_only = subject.is_reference()
            && !(case == "create"
                || case.starts_with("fork-")
                || case.starts_with("checkpoint-")
                || case == "memory-per-copy");
        self.wants(case) && !reference_only && !self.exhausted(measured, case, subject.name())
    }

    /// Runs everything that is wanted.
    pub(crate) fn run(&self, subjects: &mut Subjects, measured: &mut Measurements) -> Result<()> {
        if self.wants_any(LIFE) {
            for round in 0..=self.rounds {
                for turn in turns(subjects.len(), round) {
                    go_on()?;
                    let subject = &mut subjects[turn];
                    say(&format!("round {round} of {}: a copy of {}", self.rounds, subject.name()));
                    self.life(&mut **subject, measured)?;
                }
            }
        }
        self.forks(subjects, measured)?;
        if self.wants("memory-per-copy") {
            for _ in 0..=2 {
                for subject in &mut *subjects {
                    go_on()?;
                    say(&format!("memory of {}", subject.name()));
                    let result = idle_memory(&mut **subject, measured);
                    self.settle_failure(&**subject, &["memory-per-copy"], result, measured)?;
                }
            }
        }
        Ok(())
    }

    /// A copy from its beginning to its end. A step that fails is missing; the next ones go on.
    fn life(&self, subject: &mut dyn Subject, measured: &mut Measurements) -> Result<()> {
        if !LIFE.iter().any(|case| self.due(measured, case, subject)) {
            return Ok(());
        }
        match self.begin_life(subject, measured) {
            Ok(path) => self.work_in(&path, subject, measured)?,
            Err(error) => self.settle_failure(subject, LIFE, Err(error), measured)?,
        }
        // Also what was made in part: the next one has the same name.
        let removed = subject.remove("life");
        self.settle_failure(subject, LIFE, removed, measured)
    }

    fn begin_life(&self, subject: &mut dyn Subject, measured: &mut Measurements) -> Result<PathBuf> {
        let name = subject.name();
        let file_system = subject.file_system();
        settle(&file_system)?;
        let before = used_bytes(&file_system)?;
        let (took, path) = timed(|| usable(subject.create("life")?))?;
        if self.due(measured, "create", subject) {
            measured.add("create", name, "ms", took);
        }
        if self.due(measured, "disk-per-copy", subject) {
            measured.add("disk-per-copy", name, "bytes", used_bytes(&file_system)?.saturating_sub(before) as f64);
        }
        // A copying subject has the tree in the page cache by now; read it once for the others too.
        let warm: &[&str] = &["git-status-first", "git-status-warm", "find-warm", "grep-warm"];
        if warm.iter().any(|case| self.due(measured, case, subject)) {
            workload::grep(&path)?;
        }
        Ok(path)
    }

    fn work_in(&self, path: &Path, subject: &dyn Subject, measured: &mut Measurements) -> Result<()> {
        let cold = |work: fn(&Path) -> Result<()>| {
            move |path: &Path| {
                drop_caches()?;
                timed(|| work(path)).map(|(took, ())| took)
            }
        };
        let plain = |work: fn(&Path) -> Result<()>| move |path: &Path| timed(|| work(path)).map(|(took, ())| took);
        type Step<'a> = (&'static str, Box<dyn Fn(&Path) -> Result<f64> + 'a>);
        let steps: Vec<Step<'_>> = vec![
            ("git-status-first", Box::new(plain(workload::git_status))),
            ("git-status-warm", Box::new(plain(workload::git_status))),
            ("find-warm", Box::new(|path: &Path| workload::find(path).and_then(|()| plain(workload::find)(path)))),
            ("grep-warm", Box::new(plain(workload::grep))),
            ("find-cold", Box::new(cold(workload::find))),
            ("grep-cold", Box::new(cold(workload::grep))),
            ("small-writes-2000", Box::new(plain(workload::small_writes))),
            (
                "append-500",
                Box::new(|path: &Path| {
                    let files = self.files.get(..500).context("the tree has fewer than 500 files to change")?;
                    timed(|| workload::append(path, files)).map(|(took, ())| took)
                }),
            ),
            ("untar", Box::new(|path: &Path| timed(|| workload::untar(&self.archive, path)).map(|(took, ())| took))),
            ("rm-rf", Box::new(plain(workload::rm_rf))),
            (
                "npm-install",
                Box::new(|path: &Path| {
                    let (manifest, cache) = self.npm.as_ref().context("nothing to install from")?;
                    timed(|| workload::npm_install(manifest, cache, path)).map(|(took, ())| took)
                }),
            ),
            (
                "read-1g",
                Box::new(|path: &Path| {
                    let file = path.join("bench-1g");
                    workload::write_big(&file, 1024)?;
                    drop_caches()?;
                    timed(|| workload::read_all(&file)).map(|(took, _)| took)
                }),
            ),
        ];
        for (case, step) in steps {
            go_on()?;
            // What a later step stands on is done even where it is not measured.
            let for_which = match case {
                _ if self.due(measured, case, subject) => case,
                "git-status-first" => "git-status-warm",
                "untar" => "rm-rf",
                _ => continue,
            };
            if !self.due(measured, for_which, subject) {
                continue;
            }
            let took = settle(&subject.file_system()).and_then(|()| step(path));
            let took = took.with_context(|| format!("{case} in a copy of {}", subject.name()));
            let result = took.map(|took| {
                if case == for_which {
                    measured.add(case, subject.name(), "ms", took);
                }
            });
            self.settle_failure(subject, &[for_which], result, measured)?;
        }
        Ok(())
    }

    /// Forks and checkpoints of a copy that is in use, with more and more changes.
    fn forks(&self, subjects: &mut Subjects, measured: &mut Measurements) -> Result<()> {
        let extra: &[&'static str] = &["fork-live-dirty", "fork-live-neighbour", "fork-50"];
        let stages: [(usize, Vec<&'static str>); 3] = [
            (0, vec!["fork-live-0", "checkpoint-0"]),
            (100, [&["fork-live-100", "checkpoint-100"], extra].concat()),
            (20_000, vec!["fork-live-20000", "checkpoint-20000"]),
        ];
        let mut live: Vec<Option<PathBuf>> = subjects.iter().map(|_| None).collect();
        let mut changed = vec![0; subjects.len()];
        for (changes, cases) in stages {
            if !self.wants_any(&cases) {
                continue;
            }
            for (index, subject) in subjects.iter_mut().enumerate() {
                go_on()?;
                say(&format!("{changes} changed files in a copy of {}", subject.name()));
                let result = self.prepare(&mut **subject, &mut live[index], changed[index]..changes);
                if result.is_ok() {
                    changed[index] = changes;
                }
                self.settle_failure(&**subject, &cases, result, measured)?;
            }
            for round in 0..=self.rounds {
                for turn in turns(subjects.len(), round) {
                    let (subject, Some(path)) = (&mut subjects[turn], &live[turn]) else { continue };
                    for case in &cases {
                        if !self.due(measured, case, &**subject) {
                            continue;
                        }
                        go_on()?;
                        say(&format!("round {round} of {}: {case} of {}", self.rounds, subject.name()));
                        let result = self.fork_case(case, &mut **subject, path, measured);
                        self.settle_failure(&**subject, &[case], result, measured)?;
                    }
                }
            }
        }
        for (subject, path) in subjects.iter_mut().zip(live) {
            if path.is_some() {
                let result = subject.remove("live");
                self.settle_failure(&**subject, &[], result, measured)?;
            }
        }
        Ok(())
    }

    fn prepare(
        &self,
        subject: &mut dyn Subject,
        live: &mut Option<PathBuf>,
        changes: std::ops::Range<usize>,
    ) -> Result<()> {
        let path = match live {
            Some(path) => path,
            None => live.insert(subject.create("live")?),
        };
        ensure!(self.files.len() >= changes.end, "the tree has only {} files to change", self.files.len());
        let deadline = Instant::now() + Duration::from_secs(180);
        for files in self.files[changes.start..changes.end].chunks(500) {
            ensure!(Instant::now() < deadline, "changing {} files took over three minutes", changes.len());
            workload::append(path, files)?;
        }
        settle(&subject.file_system())
    }

    fn fork_case(
        &self,
        case: &'static str,
        subject: &mut dyn Subject,
        live: &Path,
        measured: &mut Measurements,
    ) -> Result<()> {
        settle(&subject.file_system())?;
        let name = subject.name();
        let took = match case {
            "fork-50" => many_forks(subject)?,
            "fork-live-neighbour" => {
                let path = subject.create("neighbour")?;
                let took = Neighbour::start(&path).and_then(|_neighbour| one_fork(subject));
                let removed = subject.remove("neighbour");
                let took = took?;
                removed?;
                took
            }
            "fork-live-dirty" => {
                let big = live.join("bench-dirty");
                let took = workload::write_big(&big, 100).and_then(|()| one_fork(subject));
                let removed = std::fs::remove_file(big);
                let took = took?;
                removed?;
                took
            }
            case if case.starts_with("fork-live-") => one_fork(subject)?,
            case if case.starts_with("checkpoint-") => {
                let (took, ()) = timed(|| subject.checkpoint("live", "kept"))?;
                subject.drop_checkpoint("kept")?;
                took
            }
            other => bail!("no case is called {other}"),
        };
        measured.add(case, name, "ms", took);
        Ok(())
    }

    /// A peer that cannot do a case has no row in it; what Aether cannot do is an error of the run.
    fn settle_failure(
        &self,
        subject: &dyn Subject,
        cases: &[&'static str],
        result: Result<()>,
        measured: &mut Measurements,
    ) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        if is_ours(subject.name()) {
            return Err(error.context(format!("subject {}", subject.name())));
        }
        say(&format!("{} gives up: {error:#}", subject.name()));
        for case in cases.iter().filter(|case| self.wants(case)) {
            measured.missing(case, subject.name(), one_line(&error));
        }
        Ok(())
    }
}

/// An error as a cell of a table.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace(['\n', '|'], " ").chars().take(200).collect()
}

/// The order in which so many take their turns.
fn turns(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| (turn + round) % count)
}

/// A copy counts as there when its directory can be listed.
fn usable(path: PathBuf) -> Result<PathBuf> {
    let mut entries = std::fs::read_dir(&path).with_context(|| format!("list {}", path.display()))?;
    entries.next().context("the copy is empty")??;
    Ok(path)
}

fn one_fork(subject: &mut dyn Subject) -> Result<f64> {
    let result = timed(|| usable(subject.fork("live", "fork")?));
    let removed = subject.remove("fork");
    let (took, _) = result?;
    removed.map(|()| took)
}

/// Fifty forks one after the other, all there at the end.
fn many_forks(subject: &mut dyn Subject) -> Result<f64> {
    const LIMIT: Duration = Duration::from_secs(15);
    let name = |n: usize| format!("fork-{n}");
    let began = Instant::now();
    let mut made = 0;
    let result = timed(|| {
        while made < 50 {
            ensure!(began.elapsed() < LIMIT, "{made} of 50 forks were there after {} s", LIMIT.as_secs());
            usable(subject.fork("live", &name(made))?)?;
            made += 1;
        }
        Ok(())
    });
    let removed = (0..made).try_for_each(|n| subject.remove(&name(n)));
    let (took, ()) = result?;
    removed.map(|()| took)
}

fn idle_memory(subject: &mut dyn Subject, measured: &mut Measurements) -> Result<()> {
    let case = "memory-per-copy";
    if measured.has_reason(case, subject.name()) {
        return Ok(());
    }
    let (count, has_processes) = match subject.idle() {
        Idle::Nothing => {
            measured.add(case, subject.name(), "bytes", 0.0);
            return Ok(());
        }
        Idle::Kernel(count) => (count, false),
        Idle::Processes(count, _) => (count, true),
    };
    let memory = |subject: &dyn Subject| -> Result<u64> {
        drop_caches()?;
        let mut total = workload::kernel_memory()?;
        if let (true, Idle::Processes(_, pids)) = (has_processes, subject.idle()) {
            for pid in pids {
                total += workload::resident(pid)?;
            }
        }
        Ok(total)
    };
    let name = |n: usize| format!("idle-{n}");
    let before = memory(subject)?;
    for n in 0..count {
        subject.create(&name(n))?;
    }
    let after = memory(subject)?;
    for n in 0..count {
        subject.remove(&name(n))?;
    }
    measured.add(case, subject.name(), "bytes", after.saturating_sub(before) as f64 / count as f64);
    Ok(())
}

/// One line of progress.
pub(crate) fn say(text: &str) {
    eprintln!("{}  {text}", jiff::Zoned::now().strftime("%H:%M:%S"));
}
