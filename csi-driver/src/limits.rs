//! What sessions may take up here: their limits follow the spec while they are in use, writers that reach one are
//! reported, and so is a pool that takes no writes, which is brought back as soon as nothing uses it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use aether_api::{AetherSession, session};
use aether_engine::pool::{Limits, Medium, Reached};
use aether_runtime::{CancellationToken, Part};
use kube::ResourceExt as _;
use kube::runtime::events::EventType;

use crate::attach::absent;
use crate::driver::Driver;
use crate::failure::{Failure, Result, chain};
use crate::moments::{full_name, uid};
use crate::records::Upper;

/// How often to look after limits: as long can a session pass one that the kernel does not enforce to the byte.
const PERIOD: Duration = Duration::from_secs(2);
/// A fork of a fork of a fork… inherits its medium from so many ancestors at most.
const GENERATIONS: usize = 64;

/// Runs until `stop`. `pool` is ready as long as the node can keep what sessions write.
///
/// # Errors
/// When the pool can be mounted anew by the next start of this process and nothing else is in the way.
pub(crate) async fn run(driver: Arc<Driver>, pool: Part, stop: CancellationToken) -> anyhow::Result<()> {
    let mut at_limit = HashSet::new();
    loop {
        match driver.engine.keep_limits().await {
            Ok(reached) => {
                driver.metrics.at_limit.set(i64::try_from(reached.len()).unwrap_or(i64::MAX));
                for (uid, limit) in &reached {
                    if at_limit.insert(uid.clone()) {
                        driver.tell_of_limit(uid, *limit).await;
                    }
                }
                at_limit.retain(|uid| reached.iter().any(|(other, _)| other == uid));
            }
            Err(error) => tracing::warn!(%error, "limits could not be looked after"),
        }
        match watch_pool(&driver, &pool).await {
            Ok(true) => {
                anyhow::bail!("the pool was read-only and nothing uses it: it is mounted anew at the next start")
            }
            Ok(false) => {}
            Err(failure) => pool.not_ready(chain(&failure)),
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
}

/// Reports the pool, and brings one that is read-only back. True when only this process keeps it from that.
async fn watch_pool(driver: &Driver, pool: &Part) -> Result<bool> {
    let mut state = driver.engine.pool_state().await?;
    if state.read_only && driver.metrics.pool_read_only.get() == 0 {
        tracing::error!("{}", state.message);
    }
    driver.metrics.pool_read_only.set(state.read_only.into());
    let space = driver.engine.space().await?;
    driver.metrics.pool_available.set(i64::try_from(space.available_bytes).unwrap_or(i64::MAX));
    if state.read_only {
        state = match driver.engine.recover_pool().await {
            Ok(state) => state,
            // Pods are in the way, or the disk still fails.
            Err(error) => {
                pool.not_ready(format!("{} ({error})", state.message));
                return Ok(false);
            }
        };
    }
    if state.read_only {
        pool.not_ready(state.message.clone());
    } else {
        driver.metrics.pool_read_only.set(0);
        pool.ready();
    }
    Ok(state.reopen)
}

/// The limits of a session as the engine takes them.
///
/// # Errors
/// [`Failure::Invalid`] names the field.
pub(crate) fn limits(session: &AetherSession) -> Result<Limits> {
    let Some(limits) = &session.spec.limits else { return Ok(Limits::default()) };
    let wrong = |what: String| Failure::Invalid(format!("session {}: {what}", full_name(session)));
    Ok(Limits {
        bytes: limits.parsed_bytes().map_err(|why| wrong(format!("spec.limits.bytes: {why}")))?,
        inodes: limits
            .inodes
            .map(|inodes| u64::try_from(inodes).ok().filter(|inodes| *inodes > 0))
            .map(|inodes| inodes.ok_or_else(|| wrong("spec.limits.inodes is under 1".into())))
            .transpose()?,
    })
}

impl Driver {
    /// What a session's changes are kept on: what it says, else its parent's medium.
    pub(crate) fn medium(&self, session: &AetherSession) -> Medium {
        let namespace = session.namespace().unwrap_or_default();
        let mut said = session.spec.medium;
        let mut parent = session.spec.session.clone();
        for _ in 0..GENERATIONS {
            let (None, Some(name)) = (said, &parent) else { break };
            let Some(next) = self.cluster.sessions.get(&namespace, name) else { break };
            said = next.spec.medium;
            parent.clone_from(&next.spec.session);
        }
        match said.unwrap_or_default() {
            session::Medium::Disk => Medium::Disk,
            session::Medium::Memory => Medium::Memory,
        }
    }

    /// Makes what the spec says hold for a session that is here for writing.
    pub(crate) async fn apply_limits(&self, session: &AetherSession) -> Result<()> {
        let wanted = limits(session)?;
        let uid = uid(session);
        let known = self.engine.session(&uid).await.map(Some).or_else(absent)?;
        if known.is_some_and(|known| known.limits != wanted) {
            self.engine.set_limits(&uid, wanted).await?;
            tracing::info!(session = full_name(session), ?wanted, "limits changed");
        }
        Ok(())
    }

    /// Makes room in a volume of class `aether` whose claim asks for more. The operator has put that into the session's
    /// spec. Returns the limit that holds.
    ///
    /// # Errors
    /// [`Failure::NotYet`] until the spec says so.
    pub(crate) async fn expand(&self, volume_id: &str, path: &std::path::Path, wanted: u64) -> Result<u64> {
        let record = self
            .publishes
            .get(&path.to_string_lossy())
            .filter(|record| record.volume_id == volume_id && !record.unpublished)
            .ok_or_else(|| Failure::NotFound(format!("volume {volume_id} is not published at {}", path.display())))?;
        let session = self.cluster.sessions.read(&record.namespace, &record.session).await?;
        let session = session
            .filter(|session| session.uid() == record.uid)
            .ok_or_else(|| Failure::NotFound(format!("session {}/{} was deleted", record.namespace, record.session)))?;
        let bytes = limits(&session)?.bytes;
        if bytes.is_some_and(|bytes| bytes < wanted) {
            return Err(Failure::NotYet(format!(
                "session {} may write {} bytes and its claim asks for {wanted}: raise spec.limits.bytes",
                full_name(&*session),
                bytes.unwrap_or_default()
            )));
        }
        if self.sessions.get(&uid(&*session)).is_some_and(|record| record.upper == Upper::Dirty) {
            self.apply_limits(&session).await?;
        }
        Ok(bytes.unwrap_or(wanted))
    }

    async fn tell_of_limit(&self, uid: &str, limit: Reached) {
        let Some(record) = self.sessions.get(uid) else { return };
        let Some(session) = self.cluster.sessions.get(&record.namespace, &record.name) else { return };
        tracing::info!(session = full_name(&*session), ?limit, "reached");
        self.events.on(&*session, EventType::Warning, "LimitReached", format!("{}; {WAY_OUT}", said(limit))).await;
    }
}

/// What helps a session at its limit.
const WAY_OUT: &str = "remove files or raise spec.limits, which takes effect at once";

/// That a limit is reached, for people.
pub(crate) fn said(limit: Reached) -> &'static str {
    match limit {
        Reached::Bytes => "spec.limits.bytes is reached: writes fail with EDQUOT",
        Reached::Inodes => "spec.limits.inodes is reached: new files fail with EDQUOT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::AetherSessionSpec;

    #[test]
    fn what_is_wrong_with_a_limit_is_said_with_the_sessions_name() {
        let session = |bytes: &str, inodes| {
            let limits = session::Limits { bytes: Some(bytes.into()), inodes };
            AetherSession::new("fix", AetherSessionSpec { limits: Some(limits), ..AetherSessionSpec::default() })
        };
        assert_eq!(limits(&session("1Gi", Some(7))).unwrap(), Limits { bytes: Some(1 << 30), inodes: Some(7) });
        for (session, word) in [(session("much", None), "much"), (session("1Gi", Some(0)), "inodes")] {
            let message = limits(&session).unwrap_err().to_string();
            assert!(message.contains("fix") && message.contains(word), "{message}");
        }
    }
}
