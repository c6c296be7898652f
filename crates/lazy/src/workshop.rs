//! Where a server writes contents before they have their names: a folder of its own beside those that are finished,
//! locked as long as the server lives.
//!
//! A server that is killed leaves its folder behind. The next one that fetches anything finds it unlocked, and removes it.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::{TempDir, TempPath};

use crate::lock;

/// What folders of servers begin with; names of finished contents do not.
const PREFIX: &str = ".";

pub(crate) struct Workshop {
    fetched: PathBuf,
    own: Mutex<Option<Own>>,
    made: AtomicU64,
}

/// The folder of this server.
struct Own {
    folder: TempDir,
    /// Gone with the server, however that ends.
    _lock: File,
}

impl Workshop {
    /// Beside what is `fetched`.
    pub(crate) fn new(fetched: PathBuf) -> Self {
        Self { fetched, own: Mutex::default(), made: AtomicU64::new(0) }
    }

    /// A path at which nothing is yet; what is there when it is dropped is removed.
    pub(crate) fn path(&self) -> io::Result<TempPath> {
        let mut own = lock(&self.own);
        let own = match &mut *own {
            Some(own) => own,
            none => none.insert(self.open()?),
        };
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        TempPath::try_from_path(own.folder.path().join(number.to_string()))
    }

    fn open(&self) -> io::Result<Own> {
        // Not its parents: until the engine has mounted the pool, this is no place for contents.
        match fs::create_dir(&self.fetched) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Between making a folder and locking it, nobody may take it for one of the dead.
        let all = File::open(&self.fetched)?;
        all.lock()?;
        for entry in fs::read_dir(&self.fetched)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
                let path = entry.path();
                if File::open(&path)?.try_lock().is_ok() {
                    fs::remove_dir_all(&path)?;
                }
            }
        }
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&self.fetched)?;
        let lock = File::open(folder.path())?;
        lock.lock()?;
        Ok(Own { folder, _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_dead_are_removed_and_those_of_the_living_stay() {
        let place = tempfile::tempdir().unwrap();
        let fetched = place.path().join("boot");
        let living = Workshop::new(fetched.clone());
        let path = living.path().unwrap();
        fs::write(&path, "begun").unwrap();
        assert_ne!(living.path().unwrap().to_path_buf(), path.to_path_buf());
        let dead = fetched.join(".dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("0"), "left").unwrap();

        let next = Workshop::new(fetched.clone());
        fs::write(next.path().unwrap(), "dropped at once").unwrap();
        assert!(!dead.exists());
        assert_eq!(fs::read_to_string(&path).unwrap(), "begun");
        drop((living, next, path));
        assert_eq!(fs::read_dir(&fetched).unwrap().count(), 0);
    }

    #[test]
    fn there_is_no_place_before_the_pool_is_there() {
        let place = tempfile::tempdir().unwrap();
        let workshop = Workshop::new(place.path().join("pool/boot"));
        assert_eq!(workshop.path().unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(place.path().join("pool")).unwrap();
        workshop.path().unwrap();
    }
}
