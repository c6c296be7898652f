//! Fills the kernel's caches of names and attributes for sessions that are shown to a pod.
//!
//! The first look at a file through an overlay costs the kernel two to three times what a later one does: it makes an
//! inode of the session's own and reads the marks of the image's. A tool that looks at every file, as the first `git
//! status` does, waits for that. So once a session is published, a thread of low priority looks at each name in it
//! while the pod starts. Only attributes are asked for: no content is opened, and none is fetched.
//!
//! Nothing is warmed while sessions are being published one after the other: fifty pods that start together need the
//! processor more, and niceness does not reach out of the driver's own control group. The warmer waits for a
//! [lull](LULL), and a session that waited for [longer](PATIENCE) is left alone: its pod looks at it by now.
//!
//! What the kernel then keeps is about a kilobyte a name, which it gives up under pressure like any cache. All sessions
//! together get a [share of memory](SHARE); whoever comes when that is used up is not warmed, and no worse off than
//! before. A session that is taken down gives its share back, and never waits for more than one directory's listing.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};

use crate::error::{Context, Result};
use crate::{kernel, walk};

/// The part of this machine's memory, one in so many, that all warmed sessions may take together.
const SHARE: u64 = 16;
/// A name in the kernel: `ovl_inode` (704 bytes on Linux 6.18), `dentry` (192) and what belongs to them.
const NAME_BYTES: u64 = 1024;
/// What a thread asks the scheduler for, so that it takes little from pods that start meanwhile. Not the idle class:
/// a thread that never runs would keep the directory that it lists locked.
const NICE: i32 = 10;
/// How long nothing is published before the warmer works. A pod that starts alone takes longer until it runs, so its
/// session is warm by then.
const LULL: Duration = Duration::from_millis(250);
/// How much longer a session may wait for its turn, or for the next lull.
const PATIENCE: Duration = Duration::from_secs(1);

/// Warms sessions one after the other.
pub(crate) struct Warmer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Names that all sessions together may take.
    room: u64,
    lull: Duration,
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(String, PathBuf)>,
    sessions: HashMap<String, Progress>,
    /// Names of all sessions.
    used: u64,
    /// When a session was published last.
    published: Option<Instant>,
    closed: bool,
}

struct Progress {
    stage: Stage,
    names: u64,
    published: Instant,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Waiting,
    Walking,
    /// Everything was looked at.
    Whole,
    /// The room was used up before that, or its time.
    Partial,
    /// Asked to end.
    Stopping,
}

impl Warmer {
    pub(crate) fn new() -> Result<Self> {
        Self::with(kernel::memory()? / SHARE / NAME_BYTES, LULL, PATIENCE)
    }

    fn with(room: u64, lull: Duration, patience: Duration) -> Result<Self> {
        let shared = Shared { room, lull, patience, state: Mutex::default(), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let work = shared.clone();
        let thread = std::thread::Builder::new()
            .name("warm".into())
            .spawn(move || work.run())
            .at("start a thread for", "warm")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes note that a session was published, and has its merged view at `view` looked at once there is a lull, if
    /// there is room. Asked already is no reason to do it again.
    pub(crate) fn published(&self, session: &str, view: PathBuf) {
        let mut state = self.shared.lock();
        let published = Instant::now();
        state.published = Some(published);
        if state.used < self.shared.room && !state.sessions.contains_key(session) {
            state.sessions.insert(session.to_owned(), Progress { stage: Stage::Waiting, names: 0, published });
            state.waiting.push_back((session.to_owned(), view));
            self.shared.changed.notify_all();
        }
    }

    /// Lets go of the session: when this returns nothing of it is open here.
    pub(crate) fn stop(&self, session: &str) {
        let mut state = self.shared.lock();
        state.waiting.retain(|(waiting, _)| waiting != session);
        while let Some(progress) = state.sessions.get_mut(session) {
            if matches!(progress.stage, Stage::Walking | Stage::Stopping) {
                progress.stage = Stage::Stopping;
                self.shared.changed.notify_all();
                state = self.shared.wait(state);
            } else {
                state.forget(session);
            }
        }
    }

    /// Waits until the session has been looked at. Returns whether all of it was.
    pub(crate) fn wait(&self, session: &str) -> bool {
        let mut state = self.shared.lock();
        loop {
            match state.sessions.get(session).map(|progress| &progress.stage) {
                Some(Stage::Whole) => return true,
                Some(Stage::Partial) | None => return false,
                Some(Stage::Waiting | Stage::Walking | Stage::Stopping) => state = self.shared.wait(state),
            }
        }
    }
}

impl Drop for Warmer {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that warms sessions panicked");
        }
    }
}

impl State {
    fn forget(&mut self, session: &str) {
        if let Some(progress) = self.sessions.remove(session) {
            self.used -= progress.names;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        // Linux has a niceness for each thread.
        if let Err(error) = rustix::process::nice(NICE) {
            tracing::warn!(%error, "sessions are warmed at the priority of everything else");
        }
        let mut state = self.lock();
        while !state.closed {
            let Some((session, view)) = state.waiting.pop_front() else {
                state = self.wait(state);
                continue;
            };
            self.set(&mut state, &session, Stage::Walking);
            drop(state);
            let whole = self.look(&session, &view);
            state = self.lock();
            let asked = state.sessions.get(&session).is_none_or(|progress| progress.stage == Stage::Stopping);
            match whole {
                _ if asked => state.forget(&session),
                Ok(true) => self.set(&mut state, &session, Stage::Whole),
                Ok(false) => self.set(&mut state, &session, Stage::Partial),
                Err(error) => {
                    tracing::warn!(session, %error, "a session is not warmed");
                    state.forget(&session);
                }
            }
            self.changed.notify_all();
        }
        state.waiting.clear();
        state.sessions.clear();
        self.changed.notify_all();
    }

    fn set(&self, state: &mut State, session: &str, stage: Stage) {
        if let Some(progress) = state.sessions.get_mut(session) {
            progress.stage = stage;
        }
    }

    /// Looks at every name below `view`, a directory at a time, until asked to end or out of room. Directories that go
    /// meanwhile are no loss.
    fn look(&self, session: &str, view: &Path) -> Result<bool> {
        let root = walk::open_root(view)?;
        let mut directories = vec![PathBuf::new()];
        while let Some(path) = directories.pop() {
            if !self.may_go_on(session) {
                return Ok(false);
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
            let Ok(directory) = walk::open_beneath(root.as_fd(), &path, flags) else { continue };
            let Ok(names) = walk::names(directory.as_fd()) else { continue };
            for name in &names {
                let found = walk::stat(directory.as_fd(), name);
                if found.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
                    directories.push(walk::join(&path, name));
                }
            }
            self.count(session, names.len() as u64);
        }
        Ok(true)
    }

    /// Waits for a lull. Returns whether the session is to be looked at then: nobody asked to end, there is room, and
    /// it has not waited too long.
    fn may_go_on(&self, session: &str) -> bool {
        let mut state = self.lock();
        loop {
            let Some(progress) = state.sessions.get(session) else { return false };
            if state.closed || progress.stage != Stage::Walking || state.used >= self.room {
                return false;
            }
            let pause = state.published.map_or(Duration::ZERO, |last| self.lull.saturating_sub(last.elapsed()));
            let late = progress.published.elapsed() + pause > self.lull + self.patience;
            if late && (progress.names == 0 || !pause.is_zero()) {
                return false;
            }
            if pause.is_zero() {
                return true;
            }
            state = self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Charges names to a session.
    fn count(&self, session: &str, names: u64) {
        let mut state = self.lock();
        if let Some(progress) = state.sessions.get_mut(session) {
            progress.names += names;
            state.used += names;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(directories: usize) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in 0..directories {
            let path = root.path().join(format!("{directory}/below"));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("file"), "").unwrap();
        }
        root
    }

    const LONG: Duration = Duration::from_secs(3600);

    fn at_once(room: u64) -> Warmer {
        Warmer::with(room, Duration::ZERO, LONG).unwrap()
    }

    #[test]
    fn sessions_that_come_one_after_the_other_are_left_alone() {
        let (warmer, root) = (Warmer::with(1000, LONG, LONG).unwrap(), tree(20));
        warmer.published("a", root.path().to_owned());
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(warmer.shared.lock().used, 0, "there was no lull yet");
        warmer.stop("a");

        let warmer = Warmer::with(1000, Duration::from_secs(1), Duration::from_millis(800)).unwrap();
        warmer.published("late", root.path().to_owned());
        std::thread::sleep(Duration::from_millis(900));
        warmer.published("last", root.path().to_owned());
        assert!(!warmer.wait("late"), "its turn would come after its time");
        assert!(warmer.wait("last"));
        assert_eq!(warmer.shared.lock().used, 60);
    }

    #[test]
    fn every_name_is_looked_at_once_and_counted_until_the_session_goes() {
        let (warmer, root) = (at_once(1000), tree(20));
        assert!(!warmer.wait("a"), "nobody asked");
        for _ in 0..2 {
            warmer.published("a", root.path().to_owned());
            assert!(warmer.wait("a"));
            assert_eq!(warmer.shared.lock().used, 60);
        }
        warmer.published("gone", root.path().join("gone"));
        assert!(!warmer.wait("gone"));
        warmer.stop("a");
        warmer.stop("a");
        assert_eq!(warmer.shared.lock().used, 0);
    }

    #[test]
    fn sessions_share_the_room_and_give_it_back() {
        let (warmer, root) = (at_once(50), tree(20));
        warmer.published("a", root.path().to_owned());
        assert!(!warmer.wait("a"), "60 names do not fit");
        warmer.published("b", root.path().to_owned());
        assert!(!warmer.shared.lock().sessions.contains_key("b"), "no room was left");
        warmer.stop("a");
        let small = tree(1);
        warmer.published("b", small.path().to_owned());
        assert!(warmer.wait("b"));
    }

    #[test]
    fn stopping_waits_for_the_walk_and_leaves_nothing_open() {
        let (warmer, root) = (at_once(u64::MAX), tree(500));
        let path = std::fs::canonicalize(root.path()).unwrap();
        for round in 0..50 {
            warmer.published("a", root.path().to_owned());
            for _ in 0..round * 10 {
                std::thread::yield_now();
            }
            warmer.stop("a");
            let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let ours = open.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(&path)));
            assert_eq!(ours.count(), 0);
            assert_eq!(warmer.shared.lock().used, 0);
        }
        warmer.published("a", path);
        drop(warmer);
    }
}
