//! Limits of sessions while they run, and the state of the pools under them.
//!
//! A session's limits are part of its record and are set in the kernel, so they hold while this process is down.
//! [`Engine::keep_limits`], called every few seconds, makes up for what the kernel cannot do by itself (see each pool).

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::engine::{Engine, Inner};
use crate::error::{Error, Result};
use crate::mount;
use crate::pool::{Limits, Medium, Reached, Space, Usage};
use crate::restore::Room;
use crate::state::{Session, State};

/// What a session takes up, of what it may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionUsage {
    /// What it takes up.
    #[serde(flatten)]
    pub usage: Usage,
    /// What it may.
    pub limits: Limits,
    /// The limit that stops its writers now.
    pub reached: Option<Reached>,
    /// Whether writers get EDQUOT at a limit; else it is only counted, and the text says why.
    pub counted_only: Option<String>,
    /// Space of the pool that it is in, which stops writers too.
    pub space: Space,
}

/// A pool that takes no writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolState {
    /// Whether the pool on disk, or the one in memory, is read-only.
    pub read_only: bool,
    /// Nothing is in the way of mounting it anew but this engine: open another in its place.
    pub reopen: bool,
    /// Why, as far as it is known, and the way out.
    pub message: String,
}

/// The sessions that have limits, so that looking after them does not read the records of all. Held while a limit changes, too.
pub(crate) struct Limited(Mutex<HashSet<String>>);

impl Limited {
    pub(crate) fn read(state: &State) -> Result<Self> {
        let sessions = state.sessions()?;
        let limited = sessions.into_iter().filter(|session| !session.limits.is_none()).map(|session| session.id);
        Ok(Self(Mutex::new(limited.collect())))
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Sets the limits of a session, whether it is mounted or not; writers that were refused go on when there is room.
    /// Less than it takes up already is no error: nothing more is written until it takes up less.
    ///
    /// # Errors
    /// `NotFound` without the session; `Invalid` for a limit of nothing.
    pub async fn set_limits(&self, id: &str, limits: Limits) -> Result<SessionUsage> {
        if limits.bytes == Some(0) || limits.inodes == Some(0) {
            return Err(Error::Invalid {
                what: format!("limits of session {id}"),
                reason: "a limit of 0 leaves no room to write anything; leave it out for none".into(),
            });
        }
        self.with_session(id, move |inner, id| {
            let session = inner.session(id)?;
            let mut limited = inner.limited.lock();
            if session.limits != limits {
                inner.state.put_session(&Session { limits, ..session.clone() })?;
            }
            if limits.is_none() {
                limited.remove(id);
            } else {
                limited.insert(id.to_owned());
            }
            let usage = inner.pool.keep(&session.directory, limits)?;
            inner.session_usage(&Session { limits, ..session }, usage)
        })
        .await
    }

    /// What a session takes up. A few calls to the kernel, however much that is, where limits are enforced.
    pub async fn usage(&self, id: &str) -> Result<SessionUsage> {
        let id = id.to_owned();
        self.run(move |inner| {
            let session = inner.session(&id)?;
            let usage = inner.pool.usage(&session.directory)?;
            inner.session_usage(&session, usage)
        })
        .await
    }

    /// What a snapshot, and a fork of it, is kept on.
    pub async fn snapshot_medium(&self, snapshot: &str) -> Result<Medium> {
        let snapshot = snapshot.to_owned();
        self.run(move |inner| Ok(inner.pool.medium_of_snapshot(&snapshot))).await
    }

    /// Looks after the limits of all sessions that have any, and returns those that have reached one. To be called
    /// every few seconds: that is how long a session can pass a limit that the kernel does not enforce to the byte.
    pub async fn keep_limits(&self) -> Result<Vec<(String, Reached)>> {
        self.run(|inner| {
            let ids: Vec<String> = inner.limited.lock().iter().cloned().collect();
            let mut reached = Vec::new();
            for id in ids {
                let mut limited = inner.limited.lock();
                let Some(session) = inner.state.session(&id)?.filter(|session| !session.deleting) else {
                    limited.remove(&id);
                    continue;
                };
                match inner.pool.keep(&session.directory, session.limits) {
                    Ok(usage) => reached.extend(session.limits.reached(&usage).map(|limit| (id, limit))),
                    // It is being deleted or reset, or was lost with the memory; whoever asks for it is told.
                    Err(error) if error.is_not_found() => {}
                    Err(error) => tracing::warn!(session = id, %error, "its limits could not be looked after"),
                }
            }
            Ok(reached)
        })
        .await
    }

    /// Whether the pools take writes. One call to the kernel for each.
    pub async fn pool_state(&self) -> Result<PoolState> {
        self.run(|inner| inner.pool_state()).await
    }

    /// Brings a pool that was made read-only back. Where the kernel itself did that, takes down the sessions that nobody
    /// uses; [`open`](Self::open) then mounts the pool anew, and the answer says that this is what remains to be done. What was
    /// on disk is there; what a session had written and not yet brought to disk when the disk failed is not. Nothing
    /// happens to a pool that is well.
    ///
    /// # Errors
    /// `Busy` names the places where sessions are published: their pods must end first.
    pub async fn recover_pool(&self) -> Result<PoolState> {
        self.run(|inner| {
            if !inner.pool_state()?.read_only {
                return inner.pool_state();
            }
            let _limited = inner.limited.lock();
            // What is looked at would make the unmounting wait.
            for session in inner.state.sessions()? {
                inner.warmer.stop(&session.id);
            }
            let vacated = std::cell::Cell::new(false);
            let result = inner.pool.remount(&|pool| {
                vacate(&inner.config.root, pool)?;
                vacated.set(true);
                Ok(())
            });
            match result {
                // The contents that this engine has open.
                Err(Error::Busy { .. }) if vacated.get() => Ok(PoolState { reopen: true, ..inner.pool_state()? }),
                other => other.and_then(|()| inner.pool_state()),
            }
        })
        .await
    }
}

impl Inner {
    /// What a session may still write, if anything limits it.
    pub(crate) fn room_left(&self, session: &Session) -> Result<Option<Room>> {
        if session.limits.is_none() {
            return Ok(None);
        }
        let usage = self.pool.usage(&session.directory)?;
        let left = |limit: Option<u64>, used| limit.map_or(u64::MAX, |limit| limit.saturating_sub(used));
        Ok(Some(Room {
            bytes: left(session.limits.bytes, usage.bytes),
            inodes: left(session.limits.inodes, usage.inodes.unwrap_or(0)),
        }))
    }

    fn session_usage(&self, session: &Session, usage: Usage) -> Result<SessionUsage> {
        Ok(SessionUsage {
            usage,
            limits: session.limits,
            reached: session.limits.reached(&usage),
            counted_only: self.pool.enforcement_of(session.medium).err().map(|error| error.to_string()),
            space: self.pool.space_of(session.medium)?,
        })
    }

    fn pool_state(&self) -> Result<PoolState> {
        let mut stuck = Vec::new();
        for (medium, what) in [(Medium::Disk, "the pool"), (Medium::Memory, "the pool in memory")] {
            match self.pool.space_of(medium) {
                Ok(space) if space.read_only => stuck.push(what),
                Ok(_) | Err(Error::Unsupported { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(PoolState {
            read_only: !stuck.is_empty(),
            reopen: false,
            message: if stuck.is_empty() {
                "the pool takes writes".into()
            } else {
                format!(
                    "{} of {} is read-only: its disk failed or was full underneath (see dmesg); mend that, and end the \
                     pods that have sessions here: it is mounted anew when nothing uses it",
                    stuck.join(" and "),
                    self.config.root.display()
                )
            },
        })
    }
}

/// Takes down everything of the engine in `root` that keeps a pool mounted.
///
/// # Errors
/// `Busy` names where sessions are published.
pub(crate) fn vacate(root: &Path, pool: &Path) -> Result<()> {
    let table = mount::table()?;
    let uses = |entry: &&mount::MountEntry| {
        entry.fs_type == "overlay" && entry.super_option("upperdir").is_some_and(|upper| upper.starts_with(pool))
    };
    let own = root.join("mnt");
    let published: Vec<String> = table
        .iter()
        .filter(uses)
        .filter(|entry| !entry.target.starts_with(&own))
        .map(|entry| entry.target.display().to_string())
        .collect();
    if !published.is_empty() {
        let by = format!("published at {}", published.join(", "));
        return Err(Error::Busy { what: format!("pool {}", pool.display()), by });
    }
    for entry in table.iter().filter(uses) {
        mount::unmount(&entry.target)?;
    }
    for entry in table.iter().filter(|entry| entry.target.starts_with(own.join("image"))) {
        mount::unmount(&entry.target)?;
    }
    Ok(())
}
