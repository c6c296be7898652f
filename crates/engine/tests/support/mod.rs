//! A small tree in a store, an engine, and a way to compare directories.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aether_cas::tree::{Attributes, Directory, Mtime, Name, Node, Owner};
use aether_cas::{Blob, Digest, MemoryStore, Store};
use aether_engine::pool::PoolConfig;
use aether_engine::{Config, Engine};

/// Owner of the sessions.
pub(crate) const OWNER: Owner = Owner { uid: 1000, gid: 1001 };

/// A tree in a store.
pub(crate) struct Source {
    /// Where it is.
    pub(crate) store: MemoryStore,
    /// Its root.
    pub(crate) root: Blob,
}

impl Source {
    /// `docs/readme`, `src/main.c`, `src/link` and forty files more.
    pub(crate) async fn new() -> Self {
        let mut files =
            vec![("docs/readme".to_owned(), b"read me\n".to_vec()), ("src/main.c".to_owned(), b"int main;\n".to_vec())];
        files.extend((0..40).map(|n| (format!("src/part-{n:02}"), vec![n; 1000 * usize::from(n)])));
        Self::of(MemoryStore::new(), &files).await
    }

    /// A tree of these files in `store`, two levels deep, some of them in `src`, and `src/link`.
    pub(crate) async fn of(store: MemoryStore, files: &[(String, Vec<u8>)]) -> Self {
        let mut folders: BTreeMap<&str, Directory> = BTreeMap::new();
        for (path, contents) in files {
            let (folder, file) = path.split_once('/').unwrap();
            let content = blob(contents);
            store.write(content, contents.clone().into()).await.unwrap();
            let node = Node::File { content, attributes: attributes(0o644), link_group: None };
            folders.entry(folder).or_insert_with(directory).entries.insert(name(file), node);
        }
        let link = Node::Symlink { target: b"main.c".to_vec(), attributes: attributes(0o777), link_group: None };
        folders.get_mut("src").unwrap().entries.insert(name("link"), link);
        let mut top = directory();
        for (folder, directory) in folders {
            let blob = directory.blob();
            store.write(blob, directory.encode()).await.unwrap();
            top.entries.insert(name(folder), Node::Directory(blob));
        }
        store.write(top.blob(), top.encode()).await.unwrap();
        Self { root: top.blob(), store }
    }

    /// What [`read_tree`] gives for it.
    pub(crate) fn expected(&self) -> BTreeMap<String, String> {
        let mut expected = BTreeMap::from([
            ("docs".to_owned(), "40755 7.000000009".to_owned()),
            ("docs/readme".to_owned(), format!("100644 7.000000009 {}", Digest::of(b"read me\n"))),
            ("src".to_owned(), "40755 7.000000009".to_owned()),
            ("src/link".to_owned(), "120777 7.000000009 main.c".to_owned()),
            ("src/main.c".to_owned(), format!("100644 7.000000009 {}", Digest::of(b"int main;\n"))),
        ]);
        for n in 0..40_u8 {
            let contents = vec![n; 1000 * usize::from(n)];
            expected.insert(format!("src/part-{n:02}"), format!("100644 7.000000009 {}", Digest::of(&contents)));
        }
        expected
    }
}

fn blob(bytes: &[u8]) -> Blob {
    Blob { digest: Digest::of(bytes), size: bytes.len() as u64 }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes().to_vec()).unwrap()
}

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, mtime: Mtime { seconds: 7, nanos: 9 }, ..Attributes::default() }
}

fn directory() -> Directory {
    Directory { attributes: attributes(0o755), entries: BTreeMap::new() }
}

/// Every path below a directory with its mode, time and contents, read as a process would.
pub(crate) fn read_tree(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root).min_depth(1) {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        let mut text = format!("{:o} {}.{:09}", metadata.mode(), metadata.mtime(), metadata.mtime_nsec());
        if metadata.is_file() {
            text += &format!(" {}", Digest::of(&fs::read(entry.path()).unwrap()));
        } else if metadata.is_symlink() {
            text += &format!(" {}", fs::read_link(entry.path()).unwrap().display());
        }
        let path = entry.path().strip_prefix(root).unwrap();
        all.insert(path.to_str().unwrap().to_owned(), text);
    }
    all
}

/// An engine in `root`.
pub(crate) async fn engine(root: &Path, pool: PoolConfig) -> Engine {
    Engine::open(Config { pool, ..Config::new(root) }).await.unwrap()
}
