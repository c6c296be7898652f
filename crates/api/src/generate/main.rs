//! Writes what is generated from the types of this crate: `crds/*.yaml`, the chart's copy of them, and
//! `docs/reference.md`. With `--check` it writes nothing and fails where a file is not what it would write.

mod reference;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

fn main() -> anyhow::Result<()> {
    let check = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--check") => true,
        Some(other) => bail!("unknown argument {other}; usage: aether-generate [--check]"),
    };
    let top = Path::new(env!("AETHER_TOP"));
    let mut stale = Vec::new();
    for (path, text) in files()? {
        let path = top.join(path);
        if fs::read_to_string(&path).ok().as_deref() == Some(text.as_str()) {
            continue;
        }
        if check {
            stale.push(path);
            continue;
        }
        fs::create_dir_all(path.parent().expect("every generated file lies in a folder"))?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if !stale.is_empty() {
        bail!("not fresh, run `make generate` and commit: {stale:?}");
    }
    Ok(())
}

fn files() -> anyhow::Result<Vec<(PathBuf, String)>> {
    let definitions = aether_api::definitions();
    let mut files = Vec::new();
    for definition in &definitions {
        let name = format!("{}.yaml", definition.spec.names.plural);
        let text = format!("# Generated from crates/api by `make generate`.\n{}", serde_yaml::to_string(definition)?);
        // Helm installs what lies in a chart's own crds folder and reaches no file outside the chart.
        for folder in ["crds", "charts/aether/crds"] {
            files.push((Path::new(folder).join(&name), text.clone()));
        }
    }
    files.push(("docs/reference.md".into(), reference::page(&definitions)));
    Ok(files)
}
