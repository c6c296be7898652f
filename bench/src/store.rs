//! The store beside what it takes the place of: an import beside `git clone` and `cp -a`, bytes and requests beside plain
//! files, what is kept for many sessions and revisions beside copies, and the memory of its process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

use aether_cas::transfer::{Object, upload_found, upload_tree};
use aether_cas::tree::{Directories, Directory, Name, Node, walk};
use aether_cas::{Blob, MemoryStore, RemoteStore, Store, StoreError};
use aether_importer::cli::Git;
use aether_importer::git::Imported;
use aether_importer::report::Reporter;
use aether_importer::scan::Stored;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::cases::say;
use crate::report::{self, median, show};
use crate::stage::{self, Storage, go_on, profile, settle};
use crate::subject::{connect, start_store};
use crate::workload::timed;

/// Size of what everything lies on.
pub(crate) const GIB: u64 = 12;
/// Rounds of the imports and what they are compared with.
const ROUNDS: usize = 3;
/// Files that a revision changes.
const CHANGED: usize = 100;
/// Revisions that follow each other.
const REVISIONS: usize = 10;
/// Files that a session edits.
const EDITED: usize = 20;
/// Contents by which throughput is measured: so many files of so many bytes.
const LARGE: (usize, usize) = (4, 64 << 20);
const SMALL: (usize, usize) = (10_000, 4096);
/// Requests for one blob each, and how many are under way.
const REQUESTS: usize = 5_000;
const CLIENTS: usize = 16;

/// As in `store.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StoreReport {
    measures: Vec<Measure>,
    aims: Vec<Aim>,
    tree_files: u64,
    tree_bytes: u64,
    processors: usize,
    profile: String,
    kernel: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Measure {
    what: String,
    value: f64,
    /// `ms`, `bytes`, `MB/s`, `GB/s`, `/s` or `%`.
    unit: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Aim {
    what: String,
    value: String,
    met: bool,
}

/// A store node on the loopback.
struct StoreNode {
    address: String,
    data: PathBuf,
    child: Child,
}

impl StoreNode {
    fn start(home: &Path) -> Result<Self> {
        let (address, child) = start_store(home)?;
        Ok(Self { address, data: home.join("data"), child })
    }

    /// The most memory that it had.
    fn peak(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? * 1024)
    }

    fn stored(&self) -> Result<u64> {
        disk_bytes(&self.data)
    }
}

/// Bytes of disk that the files in a directory take.
fn disk_bytes(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in walkdir::WalkDir::new(directory) {
        match entry.and_then(|entry| entry.metadata()) {
            Ok(about) => bytes += about.blocks() * 512,
            // The index of a store drops files of its own while we look.
            Err(error) if error.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

impl Drop for StoreNode {
    fn drop(&mut self) {
        // It ends with the namespace in any case.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// A repository that people work on.
struct Changing {
    bare: PathBuf,
    copy: PathBuf,
    files: Vec<PathBuf>,
    revision: usize,
}

impl Changing {
    fn new(at: &Path, repository: &Path) -> Result<Self> {
        let files = crate::regular_files(repository)?;
        let made = Self { bare: at.join("changing.git"), copy: at.join("edit"), files, revision: 0 };
        git(at, &["clone", "--quiet", "--bare", text(repository)?, text(&made.bare)?])?;
        git(at, &["clone", "--quiet", text(&made.bare)?, text(&made.copy)?])?;
        Ok(made)
    }

    /// One more commit, in which [`CHANGED`] files differ.
    fn change(&mut self) -> Result<()> {
        for number in 0..CHANGED {
            let path = self.copy.join(&self.files[(self.revision * 7919 + number * 211) % self.files.len()]);
            let mut data = fs::read(&path)?;
            data.extend(format!("// revision {}\n", self.revision).bytes());
            fs::write(&path, data)?;
        }
        git(&self.copy, &["commit", "--quiet", "--all", &format!("--message=revision {}", self.revision)])?;
        git(&self.copy, &["push", "--quiet"])?;
        self.revision += 1;
        Ok(())
    }
}

fn git(at: &Path, arguments: &[&str]) -> Result<()> {
    let settings = ["-c", "user.name=bench", "-c", "user.email=bench@example.invalid", "-c", "gc.auto=0"];
    stage::run(Command::new("git").arg("-C").arg(at).args(settings).args(arguments)).map(drop)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is UTF-8")
}

struct Bench<'a> {
    runtime: &'a Runtime,
    /// Where everything lies.
    at: PathBuf,
    measures: Vec<Measure>,
    peak: u64,
}

/// Runs it on the stage `work`.
pub(crate) fn run(work: &Path, repository: &Path, out: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let at = Storage::make(work, "ext4", GIB)?.path;
    let mut bench = Bench { runtime: &runtime, at, measures: Vec::new(), peak: 0 };
    bench.hashing();
    let mut changing = Changing::new(&bench.at, repository)?;
    changing.change()?;
    let tree = bench.imports(repository, &changing.bare)?;
    bench.throughput()?;
    bench.sessions(repository)?;
    bench.revisions(repository, changing)?;
    let peak = bench.peak as f64;
    bench.add("memory of the store node, the most of all runs", peak, "bytes");
    let report = StoreReport {
        aims: bench.aims()?,
        measures: bench.measures,
        tree_files: tree.counts.files,
        tree_bytes: tree.counts.bytes,
        processors: std::thread::available_parallelism()?.get(),
        profile: profile(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
    };
    report::write_json(&out.join("store.json"), &report)?;
    println!("{}", report.markdown());
    say(&format!("the report is {}", out.join("store.json").display()));
    Ok(())
}

impl Bench<'_> {
    fn add(&mut self, what: impl Into<String>, value: f64, unit: &str) {
        let what = what.into();
        say(&format!("{what}: {}", show(value, unit)));
        self.measures.push(Measure { what, value, unit: unit.to_owned() });
    }

    fn value(&self, what: &str) -> Result<f64> {
        let found = self.measures.iter().find(|measure| measure.what == what);
        Ok(found.with_context(|| format!("{what} was not measured"))?.value)
    }

    /// A directory that is empty, whatever was there.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.at.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        settle(&self.at)?;
        Ok(path)
    }

    fn end(&mut self, node: StoreNode) -> Result<()> {
        self.peak = self.peak.max(node.peak()?);
        Ok(())
    }

    fn hashing(&mut self) {
        let buffer = noise(64 << 20, 0);
        let blob = Blob::of(&buffer);
        let rate = |threads: usize| {
            let began = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| (0..16).for_each(|_| assert_eq!(Blob::of(&buffer), blob)));
                }
            });
            (threads * 16 * buffer.len()) as f64 / began.elapsed().as_secs_f64() / 1e9
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (one, all) = (rate(1), rate(cores));
        self.add("hashing, one core", one, "GB/s");
        self.add("hashing, all cores", all, "GB/s");
    }

    fn import(&self, repository: &Path, asked: Git, store: &RemoteStore) -> Result<(f64, Imported)> {
        let scratch = self.fresh("import")?;
        let (home, worktree) = (scratch.join("home"), scratch.join("worktree"));
        fs::create_dir(&home)?;
        let asked = Git { url: format!("file://{}", repository.display()), ..asked };
        let reporter = Arc::new(Reporter::to(Box::new(std::io::sink())));
        timed(|| {
            let import = aether_importer::git::import(&asked, &worktree, &home, store, reporter);
            self.runtime.block_on(import).map_err(|error| anyhow!("import: {error}"))
        })
    }

    fn imports(&mut self, repository: &Path, changed: &Path) -> Result<Stored> {
        let mut times: [Vec<f64>; 6] = Default::default();
        let (mut tree, mut copy_bytes) = (None, 0);
        for round in 0..=ROUNDS {
            go_on()?;
            say(&format!("imports, round {round} of {ROUNDS}"));
            let copies = self.fresh("copies")?;
            let clone = |from: &Path, to: &str| {
                let mut command = Command::new("git");
                command.args(["clone", "--quiet"]).arg(format!("file://{}", from.display())).arg(copies.join(to));
                timed(|| stage::run(&mut command).map(drop))
            };
            let (cloned, ()) = clone(repository, "clone")?;
            settle(&self.at)?;
            let mut copy = Command::new("cp");
            copy.arg("-a").arg(copies.join("clone")).arg(copies.join("copy"));
            let (copied, ()) = timed(|| stage::run(&mut copy).map(drop))?;
            copy_bytes = disk_bytes(&copies.join("copy"))?;
            let node = StoreNode::start(&self.fresh("node")?)?;
            let store = self.runtime.block_on(connect(&node.address))?;
            let (cold, first) = self.import(repository, Git::default(), &store)?;
            let Imported::Commit(commit, stored) = first else { bail!("nothing was imported") };
            let known = Git { unless_commit: Some(commit), ..Git::default() };
            let (unchanged, outcome) = self.import(repository, known, &store)?;
            ensure!(matches!(outcome, Imported::Unchanged(_)), "an unchanged repository was imported");
            let (again, outcome) = self.import(repository, Git::default(), &store)?;
            let Imported::Commit(_, same) = outcome else { bail!("nothing was imported") };
            ensure!(same.root == stored.root, "the same commit gave another tree");
            let (some, outcome) = self.import(changed, Git::default(), &store)?;
            let Imported::Commit(_, other) = outcome else { bail!("nothing was imported") };
            ensure!(other.root != stored.root && other.counts.files >= stored.counts.files, "nothing changed");
            tree = Some(stored);
            self.end(node)?;
            // The first warms up.
            if round > 0 {
                for (times, time) in times.iter_mut().zip([cloned, copied, cold, unchanged, again, some]) {
                    times.push(time);
                }
            }
        }
        for name in ["copies", "import", "node"] {
            self.fresh(name)?;
        }
        for (what, mut times) in [CLONE, COPY, COLD, UNCHANGED, AGAIN, SOME].into_iter().zip(times) {
            times.sort_by(f64::total_cmp);
            self.add(what, median(&times), "ms");
        }
        self.add(COPY_BYTES, copy_bytes as f64, "bytes");
        tree.context("a tree was imported")
    }

    fn throughput(&mut self) -> Result<()> {
        go_on()?;
        let node = StoreNode::start(&self.fresh("node")?)?;
        let runtime = self.runtime;
        let store = runtime.block_on(connect(&node.address))?;
        for (what, (count, bytes)) in [("large", LARGE), ("small", SMALL)] {
            let from = self.fresh(&format!("from-{what}"))?;
            let mut found = Vec::new();
            for number in 0..count {
                let (path, data) = (from.join(number.to_string()), noise(bytes, number as u64 + 1));
                fs::write(&path, &data)?;
                found.push((Blob::of(&data), path));
            }
            settle(&self.at)?;
            let rate = |ms: f64| (count * bytes) as f64 / 1e3 / ms;
            let files = format!("{count} files of {} KiB", bytes >> 10);
            let copies = self.at.join(format!("copy-{what}"));
            let (copied, ()) = timed(|| {
                stage::run(Command::new("cp").arg("-a").arg(&from).arg(&copies))?;
                rustix::fs::sync();
                Ok(())
            })?;
            self.add(format!("{files}: cp -a and sync"), rate(copied), "MB/s");
            settle(&self.at)?;
            let objects = found.iter().map(|(blob, path)| (*blob, Object::File(path.clone()))).collect::<Vec<_>>();
            let (uploaded, moved) = timed(|| Ok(runtime.block_on(upload_found(stream::iter(objects), &store))?))?;
            ensure!(moved.files == count as u64, "{} of {count} were uploaded", moved.files);
            self.add(format!("{files}: upload"), rate(uploaded), "MB/s");
            let to = self.fresh(&format!("to-{what}"))?;
            let fetch = async {
                if bytes > aether_cas::transfer::BATCH_BYTES as usize {
                    let fetches = found.iter().enumerate().map(|(number, (blob, _))| {
                        let (store, path) = (&store, to.join(number.to_string()));
                        async move { store.fetch_to(*blob, &path).await }
                    });
                    stream::iter(fetches).buffer_unordered(CLIENTS).try_collect::<()>().await
                } else {
                    let blobs: Vec<Blob> = found.iter().map(|(blob, _)| *blob).collect();
                    let batches = blobs.chunks(500).map(<[Blob]>::to_vec).collect::<Vec<_>>();
                    let reads = batches.into_iter().map(|batch| {
                        let store = &store;
                        async move { store.read_batch(&batch).await.map(drop) }
                    });
                    stream::iter(reads).buffer_unordered(CLIENTS).try_collect::<()>().await
                }
            };
            let (downloaded, ()) = timed(|| Ok(runtime.block_on(fetch)?))?;
            self.add(format!("{files}: download"), rate(downloaded), "MB/s");
            if what == "small" {
                let paths: Vec<&PathBuf> = found.iter().map(|(_, path)| path).cycle().take(REQUESTS).collect();
                let (read, ()) = timed(|| Ok(paths.iter().try_for_each(|path| fs::read(path).map(drop))?))?;
                let blobs: Vec<Blob> = found.iter().map(|(blob, _)| *blob).cycle().take(REQUESTS).collect();
                let each = |read: bool| {
                    let requests = blobs.clone().into_iter().map(|blob| {
                        let store = &store;
                        async move {
                            if read {
                                return store.read(blob).await.map(drop);
                            }
                            store.find_missing(&[blob]).await.map(drop)
                        }
                    });
                    let all = stream::iter(requests).buffer_unordered(CLIENTS).try_collect::<()>();
                    timed(|| Ok(runtime.block_on(all)?))
                };
                let (asked, ()) = each(false)?;
                let (fetched, ()) = each(true)?;
                let per_second = |ms: f64| REQUESTS as f64 * 1e3 / ms;
                self.add("requests: a plain file of 4 KiB, in the page cache", per_second(read), "/s");
                self.add("requests: is one blob there", per_second(asked), "/s");
                self.add("requests: one blob of 4 KiB", per_second(fetched), "/s");
            }
            for path in [from, copies, to] {
                fs::remove_dir_all(path)?;
            }
        }
        self.end(node)
    }

    /// What is stored for sessions of one source.
    fn sessions(&mut self, repository: &Path) -> Result<()> {
        let node = StoreNode::start(&self.fresh("node")?)?;
        let store = self.runtime.block_on(connect(&node.address))?;
        let (_, outcome) = self.import(repository, Git::default(), &store)?;
        let Imported::Commit(_, stored) = outcome else { bail!("nothing was imported") };
        let local = MemoryStore::new();
        for (_, message) in self.runtime.block_on(store.read_tree(stored.root))? {
            local.put(message);
        }
        let mut files = Vec::new();
        walk(&stored.root, &local, |path, node| {
            if let Some(content) = node.content().filter(|_| !path.starts_with(".git")) {
                files.push((path.to_owned(), content));
            }
            Ok::<(), StoreError>(())
        })?;
        let (mut session, mut before) = (0, node.stored()? as f64);
        for count in [1, 10, 100] {
            go_on()?;
            let more = (count - session) as f64;
            while session < count {
                let mut root = stored.root;
                for number in 0..EDITED {
                    let (path, content) = &files[(session * 7919 + number * 1009) % files.len()];
                    let mut data = self.runtime.block_on(store.read(*content))?.to_vec();
                    data.extend(format!("// session {session}\n").bytes());
                    root = edit(&local, root, path, local.put(data))?;
                }
                let source = Arc::new(local.clone());
                self.runtime.block_on(upload_tree(root, source, &store, &|_| ()))?;
                session += 1;
            }
            let bytes = node.stored()? as f64;
            let copies = count as f64 * self.value(COPY_BYTES)?;
            self.add(format!("stored for a source and {count} sessions"), bytes, "bytes");
            self.add(saving(count), (1.0 - bytes / copies) * 100.0, "%");
            if count == 100 {
                self.add("of that each of the last 90 sessions", (bytes - before) / more, "bytes");
            }
            before = bytes;
        }
        self.end(node)
    }

    /// What is stored for revisions that follow each other.
    fn revisions(&mut self, repository: &Path, mut changing: Changing) -> Result<()> {
        let node = StoreNode::start(&self.fresh("node")?)?;
        let store = self.runtime.block_on(connect(&node.address))?;
        self.import(repository, Git::default(), &store)?;
        for _ in 1..REVISIONS {
            go_on()?;
            changing.change()?;
            let (_, outcome) = self.import(&changing.bare, Git::default(), &store)?;
            ensure!(matches!(outcome, Imported::Commit(..)), "nothing was imported");
        }
        let bytes = node.stored()? as f64;
        self.add(format!("stored for {REVISIONS} revisions, each with {CHANGED} changed files"), bytes, "bytes");
        let copies = REVISIONS as f64 * self.value(COPY_BYTES)?;
        self.add(format!("saved against {REVISIONS} copies"), (1.0 - bytes / copies) * 100.0, "%");
        self.end(node)
    }

    fn aims(&self) -> Result<Vec<Aim>> {
        let clone = self.value(CLONE)?;
        let ratio = |what: &str, least: f64| {
            let ratio = self.value(what)? / clone;
            Ok::<_, anyhow::Error>((format!("{ratio:.2} of it"), ratio <= least))
        };
        let (sessions, memory) = (self.value(&saving(100))?, self.peak as f64);
        let aims = [
            ("import within 1.5 times of `git clone`", ratio(COLD, 1.5)?),
            ("unchanged import under a tenth of it", ratio(UNCHANGED, 0.1)?),
            ("over 99 % saved for 100 sessions", (format!("{sessions:.2} %"), sessions > 99.0)),
            ("memory of the store node under 512 MiB", (show(memory, "bytes"), memory < f64::from(512 << 20))),
        ];
        Ok(aims.into_iter().map(|(what, (value, met))| Aim { what: what.to_owned(), value, met }).collect())
    }
}

const CLONE: &str = "git clone";
const COPY: &str = "cp -a of the clone";
const COLD: &str = "import, nothing in the store";
const UNCHANGED: &str = "import, the ref means the commit that is known";
const AGAIN: &str = "import of the same commit again, all in the store";
const SOME: &str = "import, 100 files changed";
const COPY_BYTES: &str = "disk that a copy takes";

fn saving(sessions: usize) -> String {
    format!("saved against {sessions} copies, one a session")
}

/// Bytes that do not compress, the same for the same seed.
fn noise(bytes: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes.div_ceil(8)).flat_map(|_| next()).take(bytes).collect::<Vec<u8>>().into()
}

/// The tree with another content at `path`.
fn edit(store: &MemoryStore, root: Blob, path: &Path, content: Blob) -> Result<Blob> {
    let mut parts = path.components();
    let name = Name::try_from(parts.next().context("a path has a name")?.as_os_str())?;
    let mut directory: Directory = (*store.directory(&root)?).clone();
    let rest = parts.as_path();
    match directory.entries.get_mut(&name) {
        Some(Node::Directory(below)) => *below = edit(store, *below, rest, content)?,
        Some(Node::File { content: old, .. }) => *old = content,
        _ => bail!("{} is not in the tree", path.display()),
    }
    Ok(store.put_directory(&directory))
}

/// Reads `store.json`.
pub(crate) fn read(path: &Path) -> Result<StoreReport> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
}

impl StoreReport {
    /// For a person, and for `docs/benchmarks.md`.
    pub(crate) fn markdown(&self) -> String {
        let mut out = format!(
            "{} files, {} with the repository; {} cores, Linux {}, profile `{}`.\n\n| | |\n|---|--:|\n",
            self.tree_files,
            show(self.tree_bytes as f64, "bytes"),
            self.processors,
            self.kernel,
            self.profile
        );
        for measure in &self.measures {
            out += &format!("| {} | {} |\n", measure.what, show(measure.value, &measure.unit));
        }
        out += "\n| aim | measured | |\n|---|--:|---|\n";
        for aim in &self.aims {
            out += &format!("| {} | {} | {} |\n", aim.what, aim.value, if aim.met { "met" } else { "not met" });
        }
        out
    }
}
