//! Container images without a container engine: OCI archives written by our own code, imported into the nodes' containerd.
//!
//! All images but the sandbox's share one base layer (a Debian root file system); each adds a layer with its own programs.
//! Layers are deterministic, so an unchanged program has an unchanged digest, and a node that has it is left alone.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    command::{command, expect_success},
    node::{Node, SANDBOX_IMAGE},
    paths::Paths,
    third_party::{Programs, base_image, developer_image},
};

/// The registry and tag under which the test cluster knows the images.
pub const REGISTRY: &str = "docker.io/aether";
/// See [`REGISTRY`].
pub const TAG: &str = "dev";
/// Agents' pods in tests: git, python3, coreutils and a user with uid 1000.
pub const TOOLS: &str = "docker.io/aether/tools:dev";

/// As [`TOOLS`], with node, npm, cargo and a linker, and in `/opt` packages for them.
pub const DEVELOPER: &str = "docker.io/aether/developer:dev";

/// The product's images and their programs; the first is the entry point.
const COMPONENTS: [(&str, &[&str]); 7] = [
    ("operator", &["aether-operator"]),
    ("driver", &["aether-csi-driver", "aether-node"]),
    ("lazy", &["aether-lazy"]),
    ("store", &["aether-store-node"]),
    ("importer", &["aether-importer"]),
    ("committer", &["aether-committer"]),
    ("review", &["aether-review"]),
];
/// Parts that run as pods of the chart, and so must be rolled when their image is another one.
const RUNNING: [&str; 5] = ["operator", "driver", "lazy", "store", "review"];
/// Copied into any image, so it is linked statically; `make build` names the target for it.
const STATIC_WORKER: &str = "x86_64-unknown-linux-gnu/debug/aether-worker";

/// A layer: an uncompressed tar, named by its digest.
#[derive(Debug, Clone)]
struct Layer {
    file: PathBuf,
    digest: String,
    size: u64,
}

/// An image: layers, and the two documents that join them.
#[derive(Debug, Clone)]
pub struct Image {
    /// The full name, with registry and tag.
    pub name: String,
    /// The digest of its manifest, `sha256:…`.
    pub digest: String,
    layers: Vec<Layer>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

/// The image of every pod's sandbox, which a node needs before its first pod.
pub fn sandbox(paths: &Paths, programs: &Programs) -> Result<Image> {
    let layer = layer(paths, "pause", &[(Path::new(&programs.kubernetes("pause")), "pause")])?;
    image(SANDBOX_IMAGE, vec![layer], json!({"Entrypoint": ["/pause"], "User": "65535:65535"}))
}

/// The image of agents' pods in tests: the base alone.
pub async fn tools(paths: &Paths) -> Result<Image> {
    image(TOOLS, vec![base(paths).await?], json!({"Env": [PATH], "Cmd": ["/bin/bash"]}))
}

/// The image of a developer's pod.
pub async fn developer(paths: &Paths) -> Result<Image> {
    let layer = root_file_system(paths, developer_image().await?)?;
    image(DEVELOPER, vec![layer], json!({"Env": [PATH], "Cmd": ["/bin/bash"]}))
}

/// The product's images, of the programs that `make build` has built.
pub async fn product(paths: &Paths) -> Result<Vec<Image>> {
    let base = base(paths).await?;
    let target = target_folder();
    let mut images = Vec::new();
    for (name, programs) in COMPONENTS {
        let mut files = Vec::new();
        for program in programs {
            files.push((
                stripped(paths, &target.join("debug").join(program)).await?,
                format!("usr/local/bin/{program}"),
            ));
        }
        let files: Vec<(&Path, &str)> = files.iter().map(|(from, to)| (from.as_path(), to.as_str())).collect();
        let layer = layer(paths, name, &files)?;
        let entry = format!("/usr/local/bin/{}", programs[0]);
        images.push(image(
            &format!("{REGISTRY}/{name}:{TAG}"),
            vec![base.clone(), layer],
            json!({"Env": [PATH], "Entrypoint": [entry]}),
        )?);
    }
    let worker = stripped(paths, &target.join(STATIC_WORKER)).await?;
    let layer = layer(paths, "worker", &[(&worker, "worker")])?;
    images.push(image(&format!("{REGISTRY}/worker:{TAG}"), vec![layer], json!({"Entrypoint": ["/worker"]}))?);
    Ok(images)
}

/// The digests of the images of parts that run as pods of the chart, by part.
pub fn running(images: &[Image]) -> Vec<(&'static str, &str)> {
    let digest = |part: &str| images.iter().find(|image| image.name == format!("{REGISTRY}/{part}:{TAG}"));
    RUNNING.into_iter().filter_map(|part| Some((part, digest(part)?.digest.as_str()))).collect()
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Imports the images that a node does not have yet; gives their names.
pub async fn load(paths: &Paths, node: &Node, images: &[Image]) -> Result<Vec<String>> {
    let listing = node.run(&["ctr", "--namespace", "k8s.io", "images", "list"]).await?;
    let present: BTreeMap<&str, &str> = listing
        .lines()
        .filter_map(|line| {
            let mut columns = line.split_whitespace();
            Some((columns.next()?, columns.nth(1)?))
        })
        .collect();
    let missing: Vec<&Image> =
        images.iter().filter(|image| present.get(image.name.as_str()) != Some(&image.digest.as_str())).collect();
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let content = node.run(&["ctr", "--namespace", "k8s.io", "content", "list", "--quiet"]).await?;
    let archive = tempfile::NamedTempFile::new_in(paths.cluster())?;
    write_archive(archive.as_file(), &missing, |digest| content.lines().any(|line| line == digest))?;
    let file = archive.path().display().to_string();
    node.run(&["ctr", "--namespace", "k8s.io", "images", "import", "--snapshotter", "overlayfs", &file]).await?;
    Ok(missing.into_iter().map(|image| image.name.clone()).collect())
}

/// Writes an OCI image layout of several images; blobs that `present` knows are left out.
fn write_archive(archive: &File, images: &[&Image], present: impl Fn(&str) -> bool) -> Result<()> {
    let mut tar = tar::Builder::new(io::BufWriter::new(archive));
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": images.iter().map(|image| {
            let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &image.digest, image.manifest.len() as u64);
            entry["annotations"] = json!({"io.containerd.image.name": image.name});
            entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
            entry
        }).collect::<Vec<_>>(),
    });
    append(&mut tar, "index.json", &serde_json::to_vec(&index)?)?;
    let mut written = Vec::new();
    for image in images {
        append(&mut tar, &blob_path(&image.digest), &image.manifest)?;
        append(&mut tar, &blob_path(&digest_of(&image.config)), &image.config)?;
        for layer in &image.layers {
            if !present(&layer.digest) && !written.contains(&layer.digest) {
                tar.append_file(blob_path(&layer.digest), &mut File::open(&layer.file)?)?;
                written.push(layer.digest.clone());
            }
        }
    }
    Ok(tar.into_inner()?.flush()?)
}

fn append(tar: &mut tar::Builder<impl Write>, path: &str, content: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    Ok(tar.append_data(&mut header, path, content)?)
}

fn image(name: &str, layers: Vec<Layer>, config: Value) -> Result<Image> {
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>()},
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &digest_of(&config), config.len() as u64),
        "layers": layers.iter().map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar", &layer.digest, layer.size)).collect::<Vec<_>>(),
    }))?;
    Ok(Image { name: name.to_owned(), digest: digest_of(&manifest), layers, config, manifest })
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": size})
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Writes a layer of executable files: no times and no owners, so that equal files make equal layers.
fn layer(paths: &Paths, name: &str, files: &[(&Path, &str)]) -> Result<Layer> {
    let folder = images_folder(paths)?;
    let file = folder.join(format!("{name}.tar"));
    let mut tar = tar::Builder::new(io::BufWriter::new(File::create(&file)?));
    for (from, to) in files {
        let source = File::open(from).with_context(|| format!("{} is not built", from.display()))?;
        let mut header = tar::Header::new_gnu();
        header.set_size(source.metadata()?.len());
        header.set_mode(0o755);
        tar.append_data(&mut header, to, source)?;
    }
    tar.into_inner()?.flush()?;
    let (digest, size) = hash(&file)?;
    Ok(Layer { file, digest, size })
}

/// The layer that all images of the product share.
async fn base(paths: &Paths) -> Result<Layer> {
    root_file_system(paths, base_image().await?)
}

/// A whole root file system as a layer. Its digest is kept: it is large and never changes under its name.
fn root_file_system(paths: &Paths, file: PathBuf) -> Result<Layer> {
    let size = fs::metadata(&file)?.len();
    let kept = images_folder(paths)?.join(format!("{}.digest", file.file_stem().unwrap_or_default().display()));
    let digest = match fs::read_to_string(&kept) {
        Ok(digest) => digest,
        Err(_) => {
            let (digest, _) = hash(&file)?;
            fs::write(&kept, &digest)?;
            digest
        }
    };
    Ok(Layer { file, digest, size })
}

fn hash(file: &Path) -> Result<(String, u64)> {
    let mut hasher = Sha256::new();
    let mut file = File::open(file)?;
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let read = io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            return Ok((format!("sha256:{}", hex::encode(hasher.finalize())), size));
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
}

/// A program without its debug information, which is most of its size; made again when the program is newer.
async fn stripped(paths: &Paths, program: &Path) -> Result<PathBuf> {
    let out = images_folder(paths)?.join(program.file_name().context("a program has a name")?);
    let built = fs::metadata(program).with_context(|| format!("{} is not built", program.display()))?.modified()?;
    if fs::metadata(&out).and_then(|out| out.modified()).is_ok_and(|made| made > built) {
        return Ok(out);
    }
    expect_success(&mut command("strip", [Path::new("--strip-debug"), Path::new("-o"), &out, program])).await?;
    Ok(out)
}

fn images_folder(paths: &Paths) -> Result<PathBuf> {
    let folder = paths.cache().join("images");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Where cargo puts what it builds.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn workspace() -> PathBuf {
    PathBuf::from(env!("AETHER_TOP"))
}
