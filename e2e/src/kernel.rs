//! What a node leaves in the machine's kernel outside its namespaces, made before and removed after: cgroups, loop
//! devices, and the kernel settings that a kubelet insists on.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::run;

const CGROUPS: &str = "/sys/fs/cgroup";
/// Written by every kubelet at its start, machine-wide.
const SETTINGS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Makes a node's cgroup in every hierarchy; its kubelet keeps all pods below it.
pub fn create_cgroup(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(name);
        match fs::create_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make cgroup {}", group.display()));
            }
            _ => {}
        }
        // A cpuset accepts no process until it says which processors and memory.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read(hierarchy.join(file)) {
                fs::write(group.join(file), value)?;
            }
        }
    }
    Ok(())
}

/// Thaws everything below a node's cgroup: a frozen process cannot be killed.
pub fn thaw(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        for group in below(&hierarchy.join(name)) {
            // Only the freezer's hierarchy has the file.
            if group.join("freezer.state").exists() {
                let _ = fs::write(group.join("freezer.state"), "THAWED");
            }
        }
    }
    Ok(())
}

/// Removes a node's cgroup with everything below, as soon as its last process has gone.
pub async fn remove_cgroup(name: &str) -> Result<()> {
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let mut left = None;
        for hierarchy in hierarchies()? {
            for group in below(&hierarchy.join(name)) {
                if let Err(error) = fs::remove_dir(&group)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    left = Some((group, error));
                }
            }
        }
        match left {
            None => return Ok(()),
            Some((group, error)) if tokio::time::Instant::now() > until => {
                bail!("cannot remove cgroup {}: {error}", group.display())
            }
            Some(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(CGROUPS).with_context(|| format!("cannot read {CGROUPS}"))?;
    // `unified`, the v2 hierarchy beside them, is among them: runc makes groups there too.
    let found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.join("cgroup.procs").exists()).collect();
    if !found.iter().any(|hierarchy| hierarchy.join("tasks").exists()) {
        bail!("Kubernetes 1.20 needs cgroup v1, and {CGROUPS} has no v1 hierarchy");
    }
    Ok(found)
}

/// A cgroup and all below it, deepest first.
fn below(group: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(entries) = fs::read_dir(group) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            found.extend(below(&entry.path()));
        }
        found.push(group.to_owned());
    }
    found
}

/// Keeps the kernel settings as they are now in a file, unless it is there already.
pub fn keep_settings(file: &Path) -> Result<()> {
    if file.exists() {
        return Ok(());
    }
    let now: BTreeMap<&str, String> = SETTINGS
        .iter()
        .filter_map(|name| Some((*name, fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?)))
        .collect();
    Ok(fs::write(file, serde_json::to_vec_pretty(&now)?)?)
}

/// Puts the kernel settings back as [`keep_settings`] found them.
pub fn restore_settings(file: &Path) -> Result<()> {
    let Ok(kept) = fs::read(file) else { return Ok(()) };
    for (name, value) in serde_json::from_slice::<BTreeMap<String, String>>(&kept)? {
        let path = Path::new("/proc/sys").join(&name);
        if fs::read_to_string(&path).is_ok_and(|now| now != value) {
            fs::write(&path, value).with_context(|| format!("cannot restore {}", path.display()))?;
        }
    }
    Ok(fs::remove_file(file)?)
}

/// Detaches loop devices whose files lie below a folder. Those that were mounted went with the node's mounts.
pub async fn detach_loops(folder: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Listing {
        loopdevices: Vec<Loop>,
    }
    #[derive(Deserialize)]
    struct Loop {
        name: String,
        #[serde(rename = "back-file")]
        file: Option<PathBuf>,
    }
    let listing = run("losetup", ["--list", "--json", "--output", "NAME,BACK-FILE"]).await?;
    if listing.trim().is_empty() {
        return Ok(());
    }
    for device in serde_json::from_str::<Listing>(&listing)?.loopdevices {
        if device.file.is_some_and(|file| file.starts_with(folder)) {
            run("losetup", ["--detach", &device.name]).await?;
        }
    }
    Ok(())
}
