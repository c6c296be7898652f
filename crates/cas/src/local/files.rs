//! The object directory: one file per blob, named by digest, and the temporary files that become one.
//!
//! ```text
//! objects/ab/cdef…     a blob, mode 0444
//! objects/.tmp/        being written; emptied when the store is opened
//! objects/.marks/      the marks of a collection that is running
//! objects/.damaged/    copies that did not match their digest, kept for a person to look at
//! ```

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Blob, Digest, StoreError, digest::BlobHasher, store::Result};

const TEMPORARY: &str = ".tmp";
const DAMAGED: &str = ".damaged";
const COPY_BUFFER: usize = 256 * 1024;
const OBJECT_MODE: u32 = 0o444;

pub(super) struct Files {
    root: PathBuf,
    /// Open for `syncfs`, which then also reports write errors since it was opened.
    handle: File,
    counter: AtomicU64,
}

impl Files {
    /// Opens the object directory. Only the holder of the index's lock may do so: it empties `.tmp`.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let temporary = root.join(TEMPORARY);
        fs::create_dir_all(&temporary).map_err(StoreError::io("create", &temporary))?;
        for shard in 0..=u8::MAX {
            let shard = root.join(format!("{shard:02x}"));
            match fs::create_dir(&shard) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(StoreError::io("create", &shard)(e));
                }
                _ => {}
            }
        }
        let handle = File::open(root).map_err(StoreError::io("open", root))?;
        let files = Self { root: root.to_owned(), handle, counter: AtomicU64::new(0) };
        files.sweep(&temporary)?;
        files.sync()?;
        Ok(files)
    }

    /// Opens the object directory to look at it; changes nothing.
    pub(super) fn open_read_only(root: &Path) -> Result<Self> {
        let handle = File::open(root).map_err(StoreError::io("open", root))?;
        Ok(Self { root: root.to_owned(), handle, counter: AtomicU64::new(0) })
    }

    fn sweep(&self, temporary: &Path) -> Result<()> {
        for entry in fs::read_dir(temporary).map_err(StoreError::io("list", temporary))? {
            let path = entry.map_err(StoreError::io("list", temporary))?.path();
            fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(())
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.object_path())
    }

    /// A name in the temporary folder that nobody else gets.
    pub(super) fn temporary_path(&self) -> PathBuf {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.root.join(TEMPORARY).join(number.to_string())
    }

    pub(super) fn create_temporary(&self) -> Result<TemporaryFile> {
        let path = self.temporary_path();
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(OBJECT_MODE)
            .open(&path)
            .map_err(StoreError::io("create", &path))?;
        Ok(TemporaryFile { file, path: TemporaryPath(path) })
    }

    /// Makes everything written to the file system of the object directory durable.
    pub(super) fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.handle).map_err(|e| StoreError::io("sync the file system of", &self.root)(e.into()))
    }

    /// Gives a temporary file its final name.
    pub(super) fn install(&self, digest: &Digest, temporary: &Path) -> Result<()> {
        let path = self.path(digest);
        fs::rename(temporary, &path).map_err(StoreError::io("rename a temporary file to", &path))
    }

    pub(super) fn remove(&self, digest: &Digest) -> Result<()> {
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Moves a damaged copy out of the way.
    pub(super) fn set_aside(&self, digest: &Digest) -> Result<()> {
        let folder = self.root.join(DAMAGED);
        fs::create_dir_all(&folder).map_err(StoreError::io("create", &folder))?;
        let from = self.path(digest);
        match fs::rename(&from, folder.join(digest.to_string())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io("move aside", &from)(e)),
            _ => Ok(()),
        }
    }

    /// The size of a blob's file; `None` if there is none.
    pub(super) fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        let path = self.path(digest);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io("examine", &path)(e)),
        }
    }

    /// Opens a blob's file; `None` if there is none.
    pub(super) fn open_object(&self, digest: &Digest) -> Result<Option<File>> {
        let path = self.path(digest);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io("open", &path)(e)),
        }
    }

    /// Checks and prepares a file that somebody else wrote: right size, read-only.
    pub(super) fn prepare_foreign(&self, blob: &Blob, path: &Path) -> Result<()> {
        let metadata = fs::symlink_metadata(path).map_err(StoreError::io("examine", path))?;
        if !metadata.is_file() || metadata.len() != blob.size {
            return Err(StoreError::Invalid(format!(
                "{} cannot become blob {blob}: it has {} bytes",
                path.display(),
                metadata.len()
            )));
        }
        fs::set_permissions(path, Permissions::from_mode(OBJECT_MODE)).map_err(StoreError::io("make read-only", path))
    }

    /// Every file in the object directory that has the name of an object, and what is in the wrong place.
    pub(super) fn for_each(&self, mut visit: impl FnMut(Option<Digest>, &Path) -> Result<()>) -> Result<()> {
        for shard in 0..=u8::MAX {
            let prefix = format!("{shard:02x}");
            let folder = self.root.join(&prefix);
            for entry in fs::read_dir(&folder).map_err(StoreError::io("list", &folder))? {
                let entry = entry.map_err(StoreError::io("list", &folder))?;
                let digest = entry.file_name().to_str().and_then(|name| format!("{prefix}{name}").parse().ok());
                visit(digest, &entry.path())?;
            }
        }
        Ok(())
    }
}

/// A temporary path that is removed unless it is kept.
pub(super) struct TemporaryPath(PathBuf);

impl TemporaryPath {
    pub(super) fn take_over(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn as_path(&self) -> &Path {
        &self.0
    }

    /// Somebody else has the file now.
    pub(super) fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for TemporaryPath {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // Best effort: what is left is removed when the store is opened.
            let _ = fs::remove_file(&self.0);
        }
    }
}

pub(super) struct TemporaryFile {
    file: File,
    path: TemporaryPath,
}

impl TemporaryFile {
    pub(super) fn write(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(data).map_err(StoreError::io("write", self.path.as_path()))
    }

    /// Copies `source` to its end and returns the blob of what it was.
    pub(super) fn copy_from(&mut self, mut source: impl Read, from: &Path) -> Result<Blob> {
        let mut hasher = BlobHasher::new();
        let mut buffer = vec![0; COPY_BUFFER];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return Ok(hasher.finish()),
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    self.write(&buffer[..n])?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(StoreError::io("read", from)(e)),
            }
        }
    }

    pub(super) fn into_path(self) -> TemporaryPath {
        self.path
    }
}

/// Creates the file `path` for somebody outside the store and copies `source` into it.
pub(super) fn copy_to_new(mut source: impl Read, from: &Path, path: &Path) -> Result<Blob> {
    let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(StoreError::io("create", path))?;
    let mut target = TemporaryFile { file, path: TemporaryPath(path.to_owned()) };
    let blob = target.copy_from(&mut source, from)?;
    target.into_path().keep();
    Ok(blob)
}
