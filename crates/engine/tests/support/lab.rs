//! Two nodes with a pool of one kind each, and sessions on them as a pod sees them.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aether_cas::tree::Owner;
use aether_cas::{Blob, MemoryStore};
use aether_engine::error::Result;
use aether_engine::pool::{self, PoolConfig};
use aether_engine::scan;
use aether_engine::testing::Keep;
use aether_engine::{Config, Engine};

/// Owner of the sessions.
pub(crate) const OWNER: Owner = Owner { uid: 1000, gid: 1001 };

/// Where a pool lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    /// A btrfs image on the disk.
    Btrfs,
    /// Plain directories on the disk.
    Directory,
    /// A btrfs image in memory, beside one on the disk for contents.
    Memory,
}

/// Two nodes, a store between them, and a base.
pub(crate) struct Lab {
    /// Where its pools lie.
    pub(crate) medium: Medium,
    /// A directory for anything else, on the file system of the first node's pool.
    pub(crate) scratch: PathBuf,
    root: PathBuf,
    runtime: tokio::runtime::Runtime,
    node: Engine,
    other: Engine,
    store: MemoryStore,
    base: Blob,
    made: Cell<u32>,
}

impl Lab {
    /// Opens the nodes below `root`; their base is what `fill` writes into a directory as root.
    pub(crate) fn new(root: &Path, medium: Medium, fill: impl FnOnce(&Path)) -> Self {
        // Other users shall reach what is published.
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        let base = root.join("base");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o755)).unwrap();
        fill(&base);
        let store = MemoryStore::new();
        let options = scan::Options { owner: Owner { uid: 0, gid: 0 }, mtime: None, progress: None };
        let base = scan::scan(&base, options, &Keep(&store)).unwrap().root;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let [node, other] = ["node", "other"].map(|name| {
            let root = root.join(name);
            fs::create_dir(&root).unwrap();
            let pool = match medium {
                Medium::Directory => PoolConfig::Directory,
                Medium::Btrfs | Medium::Memory => PoolConfig::Image { bytes: 400 << 20 },
            };
            let memory = (medium == Medium::Memory).then_some(400 << 20);
            // Under load a freeze may take longer than anybody would want it to; what is tested here is what it keeps.
            let config = Config { pool, memory, freeze_limit: Duration::from_secs(60), ..Config::new(&root) };
            runtime.block_on(Engine::open(config)).unwrap()
        });
        let scratch = root.join(if medium == Medium::Memory { "node/memory/pool/.test" } else { "node/pool/.test" });
        fs::create_dir(&scratch).unwrap();
        Self { medium, scratch, root: root.to_owned(), runtime, node, other, store, base, made: Cell::new(0) }
    }

    fn wait<T>(&self, operation: impl Future<Output = Result<T>>) -> T {
        self.runtime.block_on(operation).unwrap()
    }

    fn unused(&self, kind: &str) -> String {
        self.made.set(self.made.get() + 1);
        format!("{kind}-{}", self.made.get())
    }

    /// A new session on the base, mounted and published.
    pub(crate) fn session(&self) -> Session<'_> {
        self.session_of(&self.node, self.base)
    }

    fn session_of<'a>(&'a self, engine: &'a Engine, root: Blob) -> Session<'a> {
        let id = self.unused("session");
        let image = self.wait(engine.ensure_image(root, OWNER, &self.store, &|_| {}));
        let medium = if self.medium == Medium::Memory { pool::Medium::Memory } else { pool::Medium::Disk };
        self.wait(engine.create_session_on(medium, &id, &image));
        self.published(engine, id)
    }

    fn published<'a>(&'a self, engine: &'a Engine, id: String) -> Session<'a> {
        let view = self.root.join("pods").join(&id);
        self.wait(engine.publish(&id, &view, false));
        Session { lab: self, engine, id, view }
    }

    /// What is wrong with the records and directories of both nodes.
    pub(crate) fn fsck(&self) -> Vec<String> {
        [&self.node, &self.other].into_iter().flat_map(|engine| self.wait(engine.fsck())).collect()
    }
}

/// A session that is published.
pub(crate) struct Session<'a> {
    lab: &'a Lab,
    engine: &'a Engine,
    id: String,
    view: PathBuf,
}

impl Session<'_> {
    /// Where a pod sees it.
    pub(crate) fn view(&self) -> &Path {
        &self.view
    }

    /// A path in it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.view.join(path)
    }

    /// A fork on the same node, as of now. Processes in `cgroups` are held still meanwhile.
    pub(crate) fn fork(&self, cgroups: &[PathBuf]) -> Self {
        let moment = self.snapshot(cgroups);
        let fork = self.fork_of(&moment);
        self.forget(&moment);
        fork
    }

    /// The same tree on another node: digested, stored, and mounted there from the store.
    pub(crate) fn elsewhere(&self) -> Self {
        let moment = self.snapshot(&[]);
        let session = self.elsewhere_of(&moment);
        self.forget(&moment);
        session
    }

    /// Takes a snapshot and says its name.
    pub(crate) fn snapshot(&self, cgroups: &[PathBuf]) -> String {
        let name = self.lab.unused("moment");
        let taken = self.lab.wait(self.engine.snapshot(&self.id, &name, cgroups, None));
        assert_eq!(taken.consistency, aether_engine::Consistency::PointInTime, "{:?}", taken.reason);
        name
    }

    /// A fork of a snapshot on the same node.
    pub(crate) fn fork_of(&self, moment: &str) -> Self {
        let id = self.lab.unused("fork");
        self.lab.wait(self.engine.fork_session(&id, moment));
        self.lab.published(self.engine, id)
    }

    /// The tree of a snapshot on another node.
    pub(crate) fn elsewhere_of(&self, moment: &str) -> Self {
        let root = self.lab.wait(self.engine.digest(moment)).root;
        self.lab.wait(self.engine.upload(root, &self.lab.store, &|_| {}));
        self.lab.session_of(&self.lab.other, root)
    }

    /// Deletes a snapshot.
    pub(crate) fn forget(&self, moment: &str) {
        self.lab.wait(self.engine.delete_snapshot(moment));
    }

    /// Makes it the base again while it is mounted.
    #[allow(dead_code, reason = "not every test of several files asks")]
    pub(crate) fn restore_to_base(&self) {
        let safety = format!("{}-before", self.id);
        self.lab.wait(self.engine.restore_in_place(&self.id, &safety, self.lab.base, &[], &self.lab.store));
        self.forget(&safety);
    }

    /// As when its pod ends and another begins: it is unmounted meanwhile.
    #[allow(dead_code, reason = "not every test of several files asks")]
    pub(crate) fn remount(&self) {
        self.lab.wait(self.engine.unpublish(&self.view));
        self.lab.wait(self.engine.unmount_session(&self.id));
        self.lab.wait(self.engine.publish(&self.id, &self.view, false));
    }

    fn remove(&self) -> Result<()> {
        self.lab.runtime.block_on(async {
            self.engine.unpublish(&self.view).await?;
            self.engine.delete_session(&self.id).await
        })
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        let removed = self.remove();
        // A test that fails may leave files open; its mounts go with its namespace.
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}
