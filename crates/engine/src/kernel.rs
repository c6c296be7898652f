//! What this node can do, found out by doing it, once at start.
//!
//! Versions say little: distributions backport, disable and patch. So each row of the table is an attempt, made in a
//! scratch directory with the same code that sessions use.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use aether_cas::tree::{Attributes, Directory, MemoryDirectories, Name, Node, Owner};
use aether_cas::{Blob, Digest};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::mount::{self, Overlay};
use crate::pool::{Kind, Pool};
use crate::state::ImageId;
use crate::{freeze, image};

/// How badly a feature is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Need {
    /// No session without it.
    Required,
    /// Sessions are slower or less exact without it.
    Recommended,
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Feature {
    /// What was tried.
    pub name: String,
    /// How badly it is needed.
    pub need: Need,
    /// It worked.
    pub works: bool,
    /// How it was found, or why it did not work and what follows from that.
    pub detail: String,
}

/// What was probed at start; prints as a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// `uname -r`.
    pub release: String,
    /// All rows.
    pub features: Vec<Feature>,
}

impl Report {
    /// Refuses to go on where a required feature is missing.
    ///
    /// # Errors
    /// `Unsupported` with every missing feature and its reason.
    pub fn require(&self) -> Result<()> {
        let missing: Vec<String> = self
            .features
            .iter()
            .filter(|feature| feature.need == Need::Required && !feature.works)
            .map(|feature| format!("{}: {}", feature.name, feature.detail))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: "serving sessions".into(),
            remedy: format!("Linux {} lacks {}; Linux 6.6 or later is needed", self.release, missing.join("; ")),
        })
    }

    /// Whether the feature of that name works.
    pub fn works(&self, name: &str) -> bool {
        self.features.iter().any(|feature| feature.name == name && feature.works)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Linux {}", self.release)?;
        let width = self.features.iter().map(|feature| feature.name.len()).max().unwrap_or(0);
        for feature in &self.features {
            let mark = match (feature.works, feature.need) {
                (true, _) => "yes",
                (false, Need::Required) => "NO ",
                (false, Need::Recommended) => "no ",
            };
            writeln!(f, "  {:width$}  {mark}  {}", feature.name, feature.detail)?;
        }
        Ok(())
    }
}

/// overlayfs refuses (EXDEV) to rename or link what needs a longer redirect than this. Its default is 256.
const REDIRECT_MAX: u32 = 4096;
const REDIRECT_MAX_FILE: &str = "/sys/module/overlay/parameters/redirect_max";

/// Bytes of memory that the node has.
pub(crate) fn memory() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).at("read", path)?;
    // "MemTotal:        8131572 kB"
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"));
    kilobytes
        .and_then(|number| Some(number.trim().parse::<u64>().ok()? << 10))
        .ok_or_else(|| Error::Damaged { what: path.display().to_string(), detail: "it does not say MemTotal".into() })
}

/// Probes everything, with scratch directories under `mounts` and in the pool. Raises overlayfs' `redirect_max`.
///
/// # Errors
/// Only where a scratch directory cannot be made; what the kernel cannot do is a row of the table.
pub fn probe(pool: &dyn Pool, mounts: &Path) -> Result<Report> {
    let scratch = Scratch::new(pool, mounts)?;
    let mut features = Vec::new();
    let mut row = |name: &str, need: Need, result: Result<String>| {
        let (works, detail) = match result {
            Ok(detail) => (true, detail),
            Err(error) => (false, error.to_string()),
        };
        features.push(Feature { name: name.into(), need, works, detail });
    };
    row("EROFS", Need::Required, scratch.erofs());
    row("EROFS from a file", Need::Recommended, scratch.erofs_from_file());
    row("overlay with data-only layers", Need::Required, scratch.overlay());
    row("upper in use is noticed", Need::Required, scratch.in_use());
    row("redirect_max", Need::Recommended, raise_redirect_max());
    row("rename and link on long paths", Need::Recommended, scratch.long_paths());
    row("clone (FICLONE) in the pool", Need::Recommended, scratch.clone());
    row(
        "snapshots of the pool",
        Need::Recommended,
        match pool.kind() {
            Kind::Btrfs => Ok("btrfs subvolumes".into()),
            Kind::Directory => Err(Error::Unsupported {
                what: "snapshot by one ioctl".into(),
                remedy: "the pool is a plain directory; snapshots walk and clone each file".into(),
            }),
        },
    );
    row("limits of sessions", Need::Recommended, pool.enforcement());
    row("freezer", Need::Recommended, freeze::hierarchy().map(|path| path.display().to_string()));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    Ok(Report { release, features })
}

/// Directories for the probes, and their mounts; gone when dropped.
struct Scratch {
    mounts: PathBuf,
    data: PathBuf,
}

const CONTENT: &[u8] = b"probe\n";
/// Deeper than the 256 bytes that a redirect may have by default.
const LONG: usize = 5;

impl Scratch {
    fn new(pool: &dyn Pool, mounts: &Path) -> Result<Self> {
        let scratch = Self { mounts: mounts.join("probe"), data: pool.root().join("images/.probe") };
        scratch.clear();
        for path in ["image", "view"].map(|name| scratch.mounts.join(name)) {
            fs::create_dir_all(&path).at("create", &path)?;
        }
        for path in ["objects", "upper", "work"].map(|name| scratch.data.join(name)) {
            fs::create_dir_all(&path).at("create", &path)?;
        }
        Ok(scratch)
    }

    fn clear(&self) {
        if let Err(error) = mount::unmount_below(&self.mounts) {
            tracing::warn!(%error, "a mount of the probes remains");
        }
        for path in [&self.mounts, &self.data] {
            if let Err(error) = fs::remove_dir_all(path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "the scratch directory of the probes remains");
            }
        }
    }

    /// A tree of one file below directories with long names.
    fn image(&self) -> Result<PathBuf> {
        let directories = MemoryDirectories::new();
        let content = Blob { digest: Digest::of(CONTENT), size: CONTENT.len() as u64 };
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let mut directory = Directory { attributes: attributes.clone(), ..Directory::default() };
        let name = |text: &str| Name::new(text.as_bytes().to_vec()).expect("a plain name");
        let file = Node::File { content, attributes: attributes.clone(), link_group: None };
        directory.entries.insert(name("file"), file);
        directory.entries.insert(
            name("moved"),
            Node::Directory(directories.insert(Directory { attributes: attributes.clone(), ..Directory::default() })),
        );
        for _ in 0..LONG {
            let below = directories.insert(directory);
            directory = Directory { attributes: attributes.clone(), ..Directory::default() };
            directory.entries.insert(name(&long_name()), Node::Directory(below));
        }
        let root = directories.insert(directory);
        let id = ImageId::new(root, Owner { uid: 0, gid: 0 });
        image::build(&self.data, id, &directories)?;
        let object = self.data.join("objects").join(content.digest.object_path());
        if let Some(parent) = object.parent() {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        fs::write(&object, CONTENT).at("write", &object)?;
        Ok(image::path(&self.data, id))
    }

    fn erofs(&self) -> Result<String> {
        mount::mount_erofs(&self.image()?, &self.mounts.join("image"))?;
        Ok("an image mounts".into())
    }

    fn erofs_from_file(&self) -> Result<String> {
        mount::erofs(&self.image()?)?;
        Ok("no loop device is needed".into())
    }

    fn deep(&self) -> PathBuf {
        let mut path = self.mounts.join("view");
        path.extend(std::iter::repeat_n(long_name(), LONG));
        path
    }

    fn overlay(&self) -> Result<String> {
        let overlay = Overlay {
            name: "probe".into(),
            lower: self.mounts.join("image").join(image::TREE),
            data: vec![self.data.join("objects")],
            upper: Some((self.data.join("upper"), self.data.join("work"))),
        };
        overlay.mount(&self.mounts.join("view"))?;
        let file = self.deep().join("file");
        let read = fs::read(&file).at("read", &file)?;
        if read != CONTENT {
            return Err(Error::Damaged {
                what: "a file read through the overlay".into(),
                detail: "other bytes".into(),
            });
        }
        Ok("a content is found through its redirect".into())
    }

    fn in_use(&self) -> Result<String> {
        let upper = self.data.join("upper");
        if mount::upper_in_use(&upper)? {
            Ok("a second mount of an upper is refused".into())
        } else {
            Err(Error::Unsupported {
                what: "noticing that an upper is mounted".into(),
                remedy: "overlayfs did not answer EBUSY; two mounts could write to one upper".into(),
            })
        }
    }

    fn long_paths(&self) -> Result<String> {
        let (deep, top) = (self.deep(), self.mounts.join("view"));
        fs::hard_link(deep.join("file"), top.join("linked")).at("link to a long path", &deep)?;
        fs::rename(deep.join("moved"), top.join("moved")).at("rename from a long path", &deep)?;
        Ok(format!("paths of {} bytes", deep.as_os_str().len()))
    }

    fn clone(&self) -> Result<String> {
        let (from, to) = (self.data.join("from"), self.data.join("to"));
        fs::write(&from, CONTENT).at("write", &from)?;
        let source = File::open(&from).at("open", &from)?;
        let target = File::create(&to).at("create", &to)?;
        rustix::fs::ioctl_ficlone(&target, &source).at("clone", &from)?;
        Ok("copying a file costs no space".into())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.clear();
    }
}

fn long_name() -> String {
    "long-".repeat(20)
}

fn raise_redirect_max() -> Result<String> {
    let path = Path::new(REDIRECT_MAX_FILE);
    let now =
        |path: &Path| -> Result<u32> { Ok(fs::read_to_string(path).at("read", path)?.trim().parse().unwrap_or(0)) };
    if now(path)? < REDIRECT_MAX {
        fs::write(path, REDIRECT_MAX.to_string()).at("raise", path)?;
    }
    Ok(now(path)?.to_string())
}
