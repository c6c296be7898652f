//! Reads everything a store holds, slowly, over and over, and drops what is damaged.
//!
//! The place is kept in the index every few seconds, so a restart goes on there. Blobs that come behind the place wait
//! for the next pass.

use std::{
    fs::File,
    io::{self, Read},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use rocksdb::ErrorKind;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{
    LocalStore,
    index::{Changes, Entry},
    tenure::now,
};
use crate::{Blob, Digest, StoreError, collect::Pace, store::Result};

const STATE: &str = "scrub";
/// Blobs looked up in one step.
const PAGE: usize = 128;
/// How much of the work is done again after a kill.
const KEEP_EVERY: Duration = Duration::from_secs(5);

/// Where the scrub is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubState {
    /// Passes that have ended.
    pub passes: u64,
    /// When this pass began, or the last one if none runs, in milliseconds since 1970; 0 before the first.
    pub began_at: u64,
    /// When the last pass ended; 0 before the first end.
    pub ended_at: u64,
    /// Copies read in this pass, or in the last one if none runs, and their bytes.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that were damaged.
    pub damaged: u64,
    /// Those of the damaged that another copy was found for.
    pub healed: u64,
    /// The last blob that was read; `None` when no pass runs.
    after: Option<Digest>,
}

impl ScrubState {
    /// Whether a pass has begun and not ended.
    pub fn is_running(&self) -> bool {
        self.after.is_some()
    }

    /// The begin of the pass after this one.
    pub(crate) fn next(&self) -> Self {
        Self { passes: self.passes, ended_at: self.ended_at, began_at: now(), ..Default::default() }
    }

    fn encode(&self) -> Vec<u8> {
        let numbers = [self.passes, self.began_at, self.ended_at, self.blobs, self.bytes, self.damaged, self.healed];
        let mut row: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        row.extend(self.after.iter().flat_map(|digest| digest.0));
        row
    }

    fn decode(row: &[u8]) -> Option<Self> {
        let (numbers, after) = row.split_at_checked(7 * 8)?;
        let mut numbers = numbers.chunks_exact(8).filter_map(|n| n.try_into().ok()).map(u64::from_be_bytes);
        let mut number = || numbers.next();
        Some(Self {
            passes: number()?,
            began_at: number()?,
            ended_at: number()?,
            blobs: number()?,
            bytes: number()?,
            damaged: number()?,
            healed: number()?,
            after: after.try_into().ok().map(Digest),
        })
    }
}

/// Brings a good copy of a blob from somewhere else, if there is one.
pub type Heal<'a> = &'a dyn Fn(&Blob) -> Result<bool>;

impl LocalStore {
    /// Where the scrub was when it last kept its place.
    ///
    /// # Errors
    /// Those of the index.
    pub fn scrub_state(&self) -> Result<ScrubState> {
        let row = self.shared.index.state(STATE)?;
        Ok(row.and_then(|row| ScrubState::decode(&row)).unwrap_or_default())
    }

    /// Reads what is left of a pass, at most at `pace` in bytes, or a whole one. What is damaged is dropped, and then
    /// brought from elsewhere if `heal` can. `watch` hears of each blob, and may break off between any two pieces.
    ///
    /// # Errors
    /// Those of the disk and of `heal`. Damage is no error.
    pub fn scrub(
        &self,
        mut pace: Pace,
        heal: Heal<'_>,
        watch: &mut dyn FnMut(&ScrubState) -> ControlFlow<()>,
    ) -> Result<ScrubState> {
        let mut state = self.scrub_state()?;
        if !state.is_running() {
            state = state.next();
        }
        let mut kept = Instant::now();
        loop {
            let page = self.shared.index.entries_after(state.after.as_ref(), PAGE)?;
            if page.is_empty() {
                state = ScrubState { passes: state.passes + 1, ended_at: now(), after: None, ..state };
                self.keep_place(&state)?;
                return Ok(state);
            }
            for (blob, entry) in page {
                let mut good = true;
                for form in entry.forms() {
                    let Some(whole) = self.read_paced(&blob, form, &mut pace, &mut || watch(&state))? else {
                        self.keep_place(&state)?;
                        return Ok(state);
                    };
                    good &= whole;
                    state.blobs += 1;
                    state.bytes += blob.size;
                }
                // What was deleted or replaced meanwhile is not damaged.
                if !good && self.drop_if_damaged(&blob)? {
                    state.damaged += 1;
                    state.healed += u64::from(heal(&blob)?);
                }
                state.after = Some(blob.digest);
                if kept.elapsed() > KEEP_EVERY {
                    self.keep_place(&state)?;
                    kept = Instant::now();
                }
            }
        }
    }

    fn keep_place(&self, state: &ScrubState) -> Result<()> {
        let states = vec![(STATE, Some(state.encode()))];
        self.shared.index.apply(Changes { states, ..Default::default() })
    }

    /// Whether a copy is as it should be; `None` when it was broken off.
    fn read_paced(
        &self,
        blob: &Blob,
        form: Entry,
        pace: &mut Pace,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<bool>> {
        if form.inline {
            let good = self.shared.check_copy(blob, form)?.is_none();
            pace.wait(blob.size);
            return Ok(watch().is_continue().then_some(good));
        }
        let Some(file) = self.shared.files.open_object(&blob.digest)? else { return Ok(Some(false)) };
        let mut broken_off = false;
        let reader = Paced { file: file.take(blob.size + 1), pace, watch, broken_off: &mut broken_off };
        match Blob::of_reader(reader) {
            _ if broken_off => Ok(None),
            Ok(found) => Ok(Some(found == *blob)),
            Err(error) => {
                damage(StoreError::io("read", &self.object_path(&blob.digest))(error))?;
                Ok(Some(false))
            }
        }
    }

    /// Whether the blob has no good copy here any more.
    fn drop_if_damaged(&self, blob: &Blob) -> Result<bool> {
        match self.shared.drop_damaged(blob) {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(false),
            Err(StoreError::Corrupt { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// What is wrong with a copy of which reading failed so, if the fault is the copy's: where it lies, the disk cannot be
/// read any more. Any other error says nothing of the copy, and is given back. Not for errors of opening a file: then
/// the whole disk may be gone.
pub(super) fn damage(error: StoreError) -> Result<String> {
    let reason = match &error {
        StoreError::Io { source, .. }
            if Errno::from_io_error(source).is_some_and(|errno| UNREADABLE.contains(&errno)) =>
        {
            source.to_string()
        }
        StoreError::Index { source, .. } if is_damage(source.kind(), source.as_ref()) => source.to_string(),
        _ => return Err(error),
    };
    Ok(format!("it cannot be read: {reason}"))
}

/// What says that the disk cannot read what lies there.
const UNREADABLE: [Errno; 3] = [Errno::IO, Errno::BADMSG, Errno::UCLEAN];

/// The same for an error of the index. RocksDB keeps of an error of the system nothing but its words, at the end.
fn is_damage(kind: ErrorKind, text: &str) -> bool {
    let says = |errno: &Errno| {
        let words = io::Error::from(*errno).to_string();
        words.split_once(" (os error").is_some_and(|(words, _)| text.trim_end().ends_with(&format!(": {words}")))
    };
    kind == ErrorKind::Corruption || kind == ErrorKind::IOError && UNREADABLE.iter().any(says)
}

struct Paced<'a> {
    file: io::Take<File>,
    pace: &'a mut Pace,
    watch: &'a mut dyn FnMut() -> ControlFlow<()>,
    broken_off: &'a mut bool,
}

impl Read for Paced<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.watch)().is_break() {
            *self.broken_off = true;
            return Err(io::ErrorKind::Other.into());
        }
        let length = self.file.read(buffer)?;
        self.pace.wait(length as u64);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn only_what_cannot_be_read_any_more_is_damage() {
        let failed = |errno: Errno| damage(StoreError::io("read", Path::new("/objects/x"))(errno.into()));
        for errno in UNREADABLE {
            assert!(failed(errno).unwrap().starts_with("it cannot be read: "), "{errno}");
        }
        for errno in [Errno::ACCESS, Errno::MFILE, Errno::NOMEM, Errno::ISDIR, Errno::STALE] {
            assert!(matches!(failed(errno), Err(StoreError::Io { .. })), "{errno}");
        }
        assert!(damage(StoreError::Closed("here".to_owned())).is_err());
    }

    #[test]
    fn of_the_index_too() {
        let failed = |words: &str| format!("IO error: While pread offset 4096 len 4096: /index/000012.blob: {words}");
        for words in ["Input/output error", "Bad message", "Structure needs cleaning"] {
            assert!(is_damage(ErrorKind::IOError, &failed(words)), "{words}");
        }
        for words in ["Too many open files", "Stale file handle", "No such file or directory"] {
            assert!(!is_damage(ErrorKind::IOError, &failed(words)), "{words}");
        }
        assert!(is_damage(ErrorKind::Corruption, "Corruption: block checksum mismatch"));
        assert!(!is_damage(ErrorKind::Busy, &failed("Input/output error")));

        // That the words of a real error are where they are sought.
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("none");
        let real = rocksdb::DB::open_for_read_only(&rocksdb::Options::default(), &nowhere, false).unwrap_err();
        assert!(real.as_ref().trim_end().ends_with(": No such file or directory"), "{real}");
        assert_eq!(real.kind(), ErrorKind::IOError);
    }
}
