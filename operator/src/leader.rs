//! Leader election through a Lease: of several replicas one works and the others wait.
//!
//! The holder renews the Lease; a replica that sees it unchanged for as long as it lasts, by its own clock, takes it.
//! Whoever cannot renew in time must end its process at once, before another can have taken over. A replica that is
//! started again under the same identity (a container that was killed) goes on at once.

use std::time::{Duration, Instant};

use aether_api::names;
use anyhow::{Context, bail};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use tokio::time::{sleep, timeout_at};

/// The Lease's name.
pub const LEASE: &str = "aether-operator";

/// The times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long a Lease lasts without being renewed.
    pub lease: Duration,
    /// After how long without success the holder gives up; less than `lease`.
    pub deadline: Duration,
    /// The pause between tries.
    pub retry: Duration,
}

impl Default for Times {
    /// Those of Kubernetes' own controllers.
    fn default() -> Self {
        Self { lease: Duration::from_secs(15), deadline: Duration::from_secs(10), retry: Duration::from_secs(2) }
    }
}

/// One replica's part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    times: Times,
    /// The version of somebody else's Lease, and when it was first seen.
    seen: Option<(String, Instant)>,
}

impl Candidate {
    /// A candidate that has not asked yet.
    pub fn new(leases: Api<Lease>, identity: String, times: Times) -> Self {
        Self { leases, identity, times, seen: None }
    }

    /// Waits until this replica is the leader. Errors of the API server are waited out.
    pub async fn acquire(&mut self) {
        let mut told = None;
        loop {
            match self.attempt().await {
                Ok(None) => {
                    tracing::info!(identity = self.identity, "leading");
                    return;
                }
                Ok(Some(holder)) => {
                    if told.as_ref() != Some(&holder) {
                        tracing::info!(holder, "waiting: another replica leads");
                        told = Some(holder);
                    }
                }
                Err(error) => tracing::warn!("cannot ask for the leader's Lease: {error:#}"),
            }
            sleep(self.times.retry).await;
        }
    }

    /// Keeps the leadership. Comes back only when it is lost, and then the process must end.
    ///
    /// # Errors
    /// Why it was lost.
    pub async fn hold(&mut self) -> anyhow::Result<()> {
        let mut renewed = tokio::time::Instant::now();
        loop {
            sleep(self.times.retry).await;
            let give_up = renewed + self.times.deadline;
            let begun = tokio::time::Instant::now();
            let why = match timeout_at(give_up, self.attempt()).await {
                Ok(Ok(None)) => {
                    renewed = begun;
                    continue;
                }
                Ok(Ok(Some(holder))) => bail!("the leader's Lease was taken by {holder}"),
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "the API server does not answer".into(),
            };
            tracing::warn!("cannot renew the leader's Lease: {why}");
            if tokio::time::Instant::now() >= give_up {
                bail!("could not renew the leader's Lease for {} s: {why}", self.times.deadline.as_secs());
            }
        }
    }

    /// Gives the leadership back, so that the next replica need not wait for the Lease to run out.
    ///
    /// # Errors
    /// What the API server said; the Lease runs out by itself then.
    pub async fn release(&self) -> anyhow::Result<()> {
        let lease = self.leases.get(LEASE).await?;
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Ok(());
        }
        let spec = LeaseSpec { holder_identity: None, ..spec };
        self.leases.replace(LEASE, &parameters(), &Lease { spec: Some(spec), ..lease }).await?;
        Ok(())
    }

    /// Takes or renews the Lease if that is possible now; else says who holds it.
    async fn attempt(&mut self) -> anyhow::Result<Option<String>> {
        let Some(lease) = self.leases.get_opt(LEASE).await.context("read the Lease")? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(LEASE.into()), ..ObjectMeta::default() },
                spec: Some(self.spec(None)),
            };
            self.leases.create(&parameters(), &lease).await.context("create the Lease")?;
            return Ok(None);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if let Some(holder) =
            spec.holder_identity.clone().filter(|holder| !holder.is_empty() && *holder != self.identity)
        {
            let version = lease.metadata.resource_version.clone().unwrap_or_default();
            let since = match &self.seen {
                Some((seen, since)) if *seen == version => *since,
                _ => {
                    self.seen = Some((version, Instant::now()));
                    return Ok(Some(holder));
                }
            };
            let lasts = spec
                .lease_duration_seconds
                .map_or(self.times.lease, |seconds| Duration::from_secs(seconds.max(1) as u64));
            if since.elapsed() < lasts {
                return Ok(Some(holder));
            }
            tracing::info!(holder, "the leader's Lease has run out");
        }
        // The resource version that was read goes with it, so of two replicas one is refused.
        self.leases
            .replace(LEASE, &parameters(), &Lease { spec: Some(self.spec(Some(spec))), ..lease })
            .await
            .context("write the Lease")?;
        Ok(None)
    }

    fn spec(&self, old: Option<LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(jiff::Timestamp::now());
        let old = old.unwrap_or_default();
        let mine = old.holder_identity.as_deref() == Some(&self.identity);
        let taken_over = !mine && old.renew_time.is_some();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(self.times.lease.as_secs().max(1) as i32),
            acquire_time: if mine { old.acquire_time } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(old.lease_transitions.unwrap_or(0) + i32::from(taken_over)),
            ..LeaseSpec::default()
        }
    }
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PostParams::default() }
}
