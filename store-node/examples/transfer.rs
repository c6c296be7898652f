//! Measures how long a tree takes to a store node and back: `cargo run --example transfer -- --help`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, RemoteStore,
    transfer::{self, FileSource},
    tree::{Attributes, Directory, Name, Node, summary},
};
use anyhow::Context;
use clap::Parser;

/// Uploads a folder to a store node and fetches it into a new folder, as a node does before a session's first mount.
#[derive(Parser)]
struct Args {
    /// Address of the store node.
    #[arg(long, default_value = "http://127.0.0.1:8980")]
    store: String,
    /// Folder to upload; links and special files are left out.
    folder: PathBuf,
    /// New folder for the node's cache.
    #[arg(long)]
    cache: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut source = FileSource::default();
    let begin = Instant::now();
    let root = scan(&args.folder, &mut source)?;
    let summary = summary(&root, &source)?;
    println!("scan: {:?}, {summary:?}", begin.elapsed());

    let remote = RemoteStore::connect(&args.store).await?;
    let source = Arc::new(source);
    for what in ["upload", "upload again"] {
        let begin = Instant::now();
        let moved = transfer::upload_tree(root, source.clone(), &remote, &|_| {}).await?;
        println!("{what}: {:?}, {moved:?}", begin.elapsed());
    }
    let cache = LocalStore::open(LocalConfig {
        objects: args.cache.join("objects"),
        index: args.cache.join("index"),
        inline_limit: 0,
    })?;
    let begin = Instant::now();
    let moved = transfer::fetch_directories(root, &remote, &cache).await?;
    println!("fetch directories: {:?}, {moved:?}", begin.elapsed());
    for what in ["fetch objects", "fetch objects again"] {
        let begin = Instant::now();
        let moved = transfer::fetch_objects(root, &remote, &cache, &|_| {}).await?;
        println!("{what}: {:?}, {moved:?}", begin.elapsed());
    }
    Ok(())
}

fn scan(folder: &Path, source: &mut FileSource) -> anyhow::Result<Blob> {
    let mut directory =
        Directory { attributes: Attributes { mode: 0o755, ..Default::default() }, ..Default::default() };
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        let name = Name::try_from(entry.file_name().as_os_str())?;
        if kind.is_dir() {
            directory.entries.insert(name, Node::Directory(scan(&path, source)?));
        } else if kind.is_file() {
            let content = Blob::of_file(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let attributes = Attributes { mode: 0o644, ..Default::default() };
            source.files.insert(content, path);
            directory.entries.insert(name, Node::File { content, attributes, link_group: None });
        }
    }
    Ok(source.directories.insert(directory))
}
