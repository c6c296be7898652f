//! Copies this program to where another container can start it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Name of the copy inside the directory.
pub(crate) const NAME: &str = "worker";

/// Puts an executable copy of this program at `directory/worker` and returns that path. A copy that is there already is
/// replaced in one step, so a process that starts it meanwhile gets the old one or the new one, whole.
pub(crate) fn install(directory: &Path) -> Result<PathBuf, String> {
    let target = directory.join(NAME);
    let partial = directory.join(format!(".{NAME}.{}", std::process::id()));
    copy(&partial).and_then(|()| fs::rename(&partial, &target)).map_err(|error| {
        let _ = fs::remove_file(&partial);
        format!("cannot install {}: {error}", target.display())
    })?;
    Ok(target)
}

fn copy(partial: &Path) -> io::Result<()> {
    let mut from = File::open("/proc/self/exe")?;
    let mut to = File::create(partial)?;
    io::copy(&mut from, &mut to)?;
    to.set_permissions(fs::Permissions::from_mode(0o755))?;
    to.sync_all()
}
