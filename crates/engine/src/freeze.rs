//! Holds the processes of pods still while a snapshot is taken.
//!
//! Works with the freezer hierarchy of cgroup v1 and with `cgroup.freeze` of v2, whichever this node has. Promises:
//! whatever happens, processes run again: when the guard is dropped, when the time limit passes (a watchdog thaws
//! even if the snapshot hangs), and, since what is to be frozen is written down first, when the engine starts after a
//! crash. A cgroup that somebody else froze is left as it was.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// The mounted hierarchy that can freeze: v1's freezer, else v2.
///
/// # Errors
/// `Unsupported` where neither is mounted.
pub fn hierarchy() -> Result<PathBuf> {
    let table = crate::mount::table()?;
    let v1 = table.iter().find(|mount| {
        mount.fs_type == "cgroup" && mount.super_options.split(|byte| *byte == b',').any(|o| o == b"freezer")
    });
    v1.or_else(|| table.iter().find(|mount| mount.fs_type == "cgroup2")).map(|mount| mount.target.clone()).ok_or_else(
        || Error::Unsupported {
            what: "freezing pods".into(),
            remedy: "mount the cgroup v2 hierarchy or the v1 freezer where this process sees it".into(),
        },
    )
}

/// What is known of a pod's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodProcesses {
    /// All of them are below this cgroup.
    In(PathBuf),
    /// It has none: it has ended, or no container of it was ever started.
    None,
    /// It may have some that are not found; why, for people.
    Unknown(String),
}

/// Where the processes of pods are, by the pods' uids, in the order of `uids`.
///
/// `root` is the hierarchy, or the kubelet's `--cgroup-root` in it. The kubelet names a pod's cgroup `pod<uid>`
/// (cgroupfs driver) or `...-pod<uid with _ for ->.slice` (systemd driver), at most five levels down, below one that is
/// called `kubepods`. It makes the pod's cgroup before it starts anything in it, and no cgroup can be removed while a
/// process is in it: so a pod without one has no process, where the kubelet's tree is seen at all and no process of this
/// node says that it is in a cgroup of that pod elsewhere.
///
/// # Errors
/// `Io` if `root` or the processes cannot be listed.
pub fn pod_processes(root: &Path, uids: &[String]) -> Result<Vec<PodProcesses>> {
    find_processes(root, Path::new("/proc"), uids)
}

fn find_processes(root: &Path, proc: &Path, uids: &[String]) -> Result<Vec<PodProcesses>> {
    let mut wanted: HashMap<String, usize> = HashMap::new();
    for (index, uid) in uids.iter().enumerate() {
        wanted.insert(format!("pod{uid}"), index);
        wanted.insert(format!("pod{}.slice", uid.replace('-', "_")), index);
    }
    let mut found = vec![None; uids.len()];
    let mut kubelets = root.file_name().is_some_and(|name| is_kubelets(&name.to_string_lossy()));
    let mut level = vec![root.to_owned()];
    for _ in 0..5 {
        let mut next = Vec::new();
        for directory in level {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                // Cgroups come and go.
                Err(error) if directory != root && error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("list", &directory, error)),
            };
            for entry in entries.flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                let name = entry.file_name().to_string_lossy().into_owned();
                kubelets |= is_kubelets(&name);
                // "kubepods-burstable-pod1_2.slice" -> "pod1_2.slice"
                let pod = name.rfind("-pod").map_or(name.as_str(), |at| &name[at + 1..]);
                if let Some(index) = wanted.get(name.as_str()).or_else(|| wanted.get(pod)) {
                    found[*index] = Some(PodProcesses::In(entry.path()));
                } else if !name.starts_with("pod") && !name.contains("-pod") {
                    next.push(entry.path());
                }
            }
        }
        if found.iter().all(Option::is_some) {
            break;
        }
        level = next;
    }
    let elsewhere = if found.iter().all(Option::is_some) { String::new() } else { memberships(proc)? };
    let absent = |uid: &String| {
        if elsewhere.contains(uid.as_str()) || elsewhere.contains(&uid.replace('-', "_")) {
            PodProcesses::Unknown(format!("pod {uid} runs in a cgroup that is not below {}", root.display()))
        } else if kubelets {
            PodProcesses::None
        } else {
            PodProcesses::Unknown(format!(
                "no cgroup found for pod {uid}: the kubelet has none below {}",
                root.display()
            ))
        }
    };
    Ok(found.into_iter().zip(uids).map(|(found, uid)| found.unwrap_or_else(|| absent(uid))).collect())
}

/// Whether a cgroup is the one below which a kubelet keeps its pods: `kubepods`, `kubepods.slice`, and with
/// `--cgroup-root=/a` and the systemd driver `a-kubepods.slice`.
fn is_kubelets(name: &str) -> bool {
    name.strip_suffix(".slice").unwrap_or(name).rsplit('-').next() == Some("kubepods")
}

/// The cgroups that the processes of this node are in, as far as `proc` shows processes.
fn memberships(proc: &Path) -> Result<String> {
    let mut all = String::new();
    for entry in fs::read_dir(proc).at("list", proc)?.flatten() {
        if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit)
            // Processes come and go.
            && let Ok(text) = fs::read_to_string(entry.path().join("cgroup"))
        {
            // What has ended and was not waited for yet is shown in the cgroup in which it ended.
            all.extend(text.lines().filter(|line| !line.ends_with(" (deleted)")).flat_map(|line| [line, "\n"]));
        }
    }
    Ok(all)
}

/// Freezes cgroups for the sessions of one engine.
#[derive(Clone)]
pub struct Freezer {
    shared: Arc<Shared>,
}

struct Shared {
    /// One file per freeze in progress, with a cgroup in each line.
    ledger: PathBuf,
    /// How many freezes in progress hold each cgroup that we froze: a pod may have several sessions.
    held: Mutex<HashMap<PathBuf, usize>>,
}

impl Freezer {
    /// Thaws what a crash left frozen, as written down in the directory `ledger`.
    pub fn open(ledger: &Path) -> Result<Self> {
        fs::create_dir_all(ledger).at("create", ledger)?;
        for entry in fs::read_dir(ledger).at("list", ledger)? {
            let path = entry.at("list", ledger)?.path();
            for cgroup in fs::read_to_string(&path).at("read", &path)?.lines() {
                tracing::warn!(cgroup, "thawing what a crash left frozen");
                write_state(Path::new(cgroup), false)?;
            }
            fs::remove_file(&path).at("remove", &path)?;
        }
        Ok(Self { shared: Arc::new(Shared { ledger: ledger.to_owned(), held: Mutex::default() }) })
    }

    /// Freezes all processes of the cgroups, for at most `limit` from now.
    ///
    /// # Errors
    /// `Busy` if they are not still within the limit; by then they run again.
    pub fn freeze(&self, cgroups: &[PathBuf], limit: Duration) -> Result<Frozen> {
        let started = Instant::now();
        let record = self.shared.ledger.join(uuid::Uuid::new_v4().to_string());
        let inner = Arc::new(Inner {
            shared: self.shared.clone(),
            record: record.clone(),
            state: Mutex::new(Holding { cgroups: Vec::new(), open: true, expired: false }),
            ended: Condvar::new(),
        });
        // From here on the guard thaws, also when we return early.
        let mut frozen = Frozen { inner: inner.clone(), started, watchdog: None };
        if cgroups.is_empty() {
            return Ok(frozen);
        }
        let lines: String = cgroups.iter().map(|cgroup| format!("{}\n", cgroup.display())).collect();
        fs::write(&record, lines).at("write", &record)?;
        {
            let mut held = lock(&self.shared.held);
            for cgroup in cgroups {
                match held.get_mut(cgroup) {
                    Some(count) => *count += 1,
                    None if is_asked_to_freeze(cgroup)? => continue,
                    None => {
                        held.insert(cgroup.clone(), 1);
                        lock(&inner.state).cgroups.push(cgroup.clone());
                        write_state(cgroup, true)?;
                        continue;
                    }
                }
                lock(&inner.state).cgroups.push(cgroup.clone());
            }
        }
        frozen.watchdog = Some(
            thread::Builder::new()
                .name("thaw".into())
                .spawn(move || inner.watch(started + limit))
                .at("start a thread for", "thaw")?,
        );
        for cgroup in cgroups {
            wait_until_still(cgroup, started + limit)?;
        }
        Ok(frozen)
    }
}

/// Frozen processes; they run again when this is dropped.
pub struct Frozen {
    inner: Arc<Inner>,
    started: Instant,
    watchdog: Option<JoinHandle<()>>,
}

impl Frozen {
    /// Whether the time limit has not passed yet.
    pub fn holds(&self) -> bool {
        lock(&self.inner.state).open
    }

    /// Thaws. Returns how long the processes were held, and whether they were held the whole time: `false` if the
    /// time limit passed first.
    pub fn thaw(mut self) -> (Duration, bool) {
        self.end();
        (self.started.elapsed(), !lock(&self.inner.state).expired)
    }

    fn end(&mut self) {
        self.inner.release(false);
        if let Some(watchdog) = self.watchdog.take()
            && watchdog.join().is_err()
        {
            tracing::error!("the watchdog of a freeze panicked");
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.end();
    }
}

struct Inner {
    shared: Arc<Shared>,
    record: PathBuf,
    state: Mutex<Holding>,
    ended: Condvar,
}

struct Holding {
    /// What this freeze has a hold on.
    cgroups: Vec<PathBuf>,
    open: bool,
    expired: bool,
}

impl Inner {
    fn watch(&self, deadline: Instant) {
        let mut state = lock(&self.state);
        while state.open {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                tracing::warn!("thawing because the time limit of a freeze passed");
                return self.release(true);
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn release(&self, expired: bool) {
        let mut held = lock(&self.shared.held);
        let mut state = lock(&self.state);
        if !state.open {
            return;
        }
        state.open = false;
        state.expired = expired;
        for cgroup in std::mem::take(&mut state.cgroups) {
            let count = held.get_mut(&cgroup).map_or(0, |count| {
                *count -= 1;
                *count
            });
            if count == 0 {
                held.remove(&cgroup);
                if let Err(error) = write_state(&cgroup, false) {
                    tracing::error!(%error, "a cgroup could not be thawed");
                }
            }
        }
        if let Err(error) = fs::remove_file(&self.record)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the record of a freeze could not be removed");
        }
        self.ended.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_v1(cgroup: &Path) -> bool {
    cgroup.join("freezer.state").exists()
}

/// A cgroup that is gone has no processes: nothing to do is success.
fn gone_is_fine(result: io::Result<()>, action: &'static str, path: &Path) -> Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        other => other.at(action, path),
    }
}

fn write_state(cgroup: &Path, freeze: bool) -> Result<()> {
    let (file, value) = match (is_v1(cgroup), freeze) {
        (true, true) => ("freezer.state", "FROZEN"),
        (true, false) => ("freezer.state", "THAWED"),
        (false, true) => ("cgroup.freeze", "1"),
        (false, false) => ("cgroup.freeze", "0"),
    };
    // Opened without create: a plain write would make a file where a cgroup has just gone.
    let write = fs::File::options()
        .write(true)
        .open(cgroup.join(file))
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    gone_is_fine(write, if freeze { "freeze" } else { "thaw" }, cgroup)
}

fn is_asked_to_freeze(cgroup: &Path) -> Result<bool> {
    let file = if is_v1(cgroup) { "freezer.self_freezing" } else { "cgroup.freeze" };
    let mut asked = false;
    let read = fs::read_to_string(cgroup.join(file)).map(|text| asked = text.trim() == "1");
    gone_is_fine(read, "read the freezer of", cgroup)?;
    Ok(asked)
}

fn wait_until_still(cgroup: &Path, deadline: Instant) -> Result<()> {
    let mut pause = Duration::from_micros(20);
    loop {
        let mut still = true;
        let read = if is_v1(cgroup) {
            fs::read_to_string(cgroup.join("freezer.state")).map(|text| still = text.trim() == "FROZEN")
        } else {
            fs::read_to_string(cgroup.join("cgroup.events"))
                .map(|text| still = text.lines().any(|line| line == "frozen 1"))
        };
        gone_is_fine(read, "read the freezer of", cgroup)?;
        if still {
            return Ok(());
        }
        if Instant::now() + pause >= deadline {
            return Err(Error::Busy {
                what: format!("cgroup {}", cgroup.display()),
                by: "a process in it did not stop within the time limit".into(),
            });
        }
        // The kernel gives no event for v1; this wait is microseconds unless a process sits in a system call. One that
        // began to wait for its vfork child after it was told to freeze sleeps on and is found only when told again.
        thread::sleep(pause);
        if is_v1(cgroup) {
            write_state(cgroup, true)?;
        }
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup hierarchy with these cgroups, and a `/proc` whose processes are in those.
    fn machine(cgroups: &[&str], processes: &[&str]) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (root, proc) = (directory.path().join("cgroup"), directory.path().join("proc"));
        for path in [&root, &proc] {
            fs::create_dir(path).unwrap();
        }
        for path in cgroups {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::create_dir_all(proc.join("sys/kernel")).unwrap();
        for (pid, cgroup) in processes.iter().enumerate() {
            fs::create_dir(proc.join(pid.to_string())).unwrap();
            fs::write(proc.join(pid.to_string()).join("cgroup"), format!("4:freezer:/\n0::{cgroup}\n")).unwrap();
        }
        (directory, root, proc)
    }

    fn uids(uids: &[&str]) -> Vec<String> {
        uids.iter().map(|uid| (*uid).to_owned()).collect()
    }

    #[test]
    fn pods_are_found_under_both_drivers_and_in_every_quality_class() {
        let paths = [
            "kubepods/pod1a-2b/container",
            "kubepods/burstable/pod3c-4d",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod5e_6f.slice",
            "kubepods/burstable/pod9",
        ];
        let (_machine, root, proc) = machine(&paths, &["/init.scope"]);
        let found = find_processes(&root, &proc, &uids(&["1a-2b", "3c-4d", "5e-6f", "7a-8b"])).unwrap();
        let at = |path: &str| PodProcesses::In(root.join(path));
        assert_eq!(found, [at("kubepods/pod1a-2b"), at(paths[1]), at(paths[2]), PodProcesses::None]);
    }

    #[test]
    fn a_pod_without_cgroup_has_no_process_only_where_the_kubelets_cgroups_are_seen() {
        let ask = |cgroups: &[&str], processes: &[&str]| {
            let (_machine, root, proc) = machine(cgroups, processes);
            find_processes(&root, &proc, &uids(&["1a-2b"])).unwrap().remove(0)
        };
        let known = |cgroups: &[&str], processes: &[&str]| ask(cgroups, processes) == PodProcesses::None;
        assert!(known(&["kubepods/besteffort/pod3c-4d"], &["/kubepods/besteffort/pod3c-4d/c"]), "it has ended");
        assert!(known(&["kubepods.slice"], &[]) && known(&["a.slice/a-kubepods.slice"], &[]));
        // It ended and its parent has not waited for it.
        assert!(known(&["kubepods"], &["/kubepods/pod1a-2b/c (deleted)"]));
        // A kubelet that makes no cgroups, or one whose cgroups are elsewhere: anything may run.
        assert!(matches!(ask(&["system.slice", "mykubepods"], &[]), PodProcesses::Unknown(_)));
        for elsewhere in ["/other/kubepods/pod1a-2b/c", "/../../kubepods.slice/kubepods-pod1a_2b.slice/c.scope"] {
            let PodProcesses::Unknown(why) = ask(&["kubepods"], &[elsewhere]) else { panic!("{elsewhere}") };
            assert!(why.contains("1a-2b"), "{why}");
        }
    }

    #[test]
    fn an_absent_cgroup_counts_as_still_and_leaves_no_record() {
        let directory = tempfile::tempdir().unwrap();
        let freezer = Freezer::open(directory.path()).unwrap();
        let gone = directory.path().join("gone");
        let frozen = freezer.freeze(&[gone], Duration::from_secs(5)).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let (_, whole) = frozen.thaw();
        assert!(whole);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
