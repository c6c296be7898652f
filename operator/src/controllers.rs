//! Which objects wake which reconciler, and what happens when one fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::names::{
    self, CLAIM_SOURCE_ANNOTATION, COMMAND_LABEL, COMMIT_ANNOTATION, COMMIT_UID_LABEL, SESSION_UID_LABEL, SOURCE_LABEL,
};
use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherRestore, AetherSession, AetherSource,
};
use aether_runtime::metrics::{Counter, Labelled, Timer};
use aether_runtime::{CancellationToken, Metrics, label};
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, ResourceExt};

use crate::context::Context;
use crate::damage::Damage;
use crate::error::{Error, Result};
use crate::objects::Object;
use crate::{checkpoint, command, commit, provision, restore, session, signature, source, sweep};

label! {
    /// What is reconciled.
    pub enum Kind: "kind" {
        /// AetherSource.
        Source = "source",
        /// AetherSession.
        Session = "session",
        /// AetherCheckpoint.
        Checkpoint = "checkpoint",
        /// AetherRestore.
        Restore = "restore",
        /// AetherCommand.
        Command = "command",
        /// AetherCommit.
        Commit = "commit",
        /// A claim that asks for a session.
        Claim = "claim",
        /// A volume of a session.
        Volume = "volume",
    }
}

label! {
    /// How a reconcile ended.
    pub enum Outcome: "outcome" {
        /// As it should.
        Ok = "ok",
        /// The object changed meanwhile; it is looked at again at once.
        Conflict = "conflict",
        /// Something else failed; it is tried again.
        Error = "error",
    }
}

/// What is counted of the reconcilers.
#[derive(Clone)]
struct Counts {
    ended: Labelled<(Kind, Outcome), Counter>,
    took: Labelled<(Kind,), Timer>,
}

/// After how long a failed reconcile is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// The same for an object that changed meanwhile.
const RETRY_CONFLICT: Duration = Duration::from_millis(100);
/// When the first look for damage is, at the latest: the store may be starting too.
const FIRST_LOOK: Duration = Duration::from_secs(30);

/// Runs all controllers, the sweep and the look for damage until `stop`, and then until what they have begun is done.
///
/// # Errors
/// None so far: failures of single objects are logged, counted and tried again.
pub async fn run(
    context: Arc<Context>,
    damage: Damage,
    metrics: Metrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let counts = Counts {
        ended: metrics.counters("aether_reconciles", "Reconciles of one object that have ended"),
        took: metrics.timers("aether_reconcile", "Time that one reconcile of one object took"),
    };
    let drive = Drive { context: context.clone(), counts, stop: stop.clone() };
    tokio::join!(
        drive.run(sources(&context), Kind::Source, source::reconcile),
        drive.run(sessions(&context), Kind::Session, session::reconcile),
        drive.run(of_all::<AetherCheckpoint>(&context), Kind::Checkpoint, checkpoint::reconcile),
        drive.run(restores(&context), Kind::Restore, restore::reconcile),
        drive.run(commands(&context), Kind::Command, command::reconcile),
        drive.run(commits(&context), Kind::Commit, commit::reconcile),
        drive.run(of_all::<PersistentVolumeClaim>(&context), Kind::Claim, provision::reconcile),
        drive.run(volumes(&context), Kind::Volume, session::remains::reconcile),
        sweeps(&context, &stop),
        signature::keep(context.client.clone(), &context.config.namespace, &stop),
        looks(damage, &context, &stop),
    );
    Ok(())
}

fn all<K: Object>(context: &Context) -> Api<K> {
    Api::all(context.client.clone())
}

fn of_all<K: Object>(context: &Context) -> Controller<K> {
    Controller::new(all::<K>(context), watcher::Config::default())
}

fn sources(context: &Context) -> Controller<AetherSource> {
    of_all::<AetherSource>(context).owns(all::<Job>(context), watcher::Config::default().labels(SOURCE_LABEL))
}

/// A session is woken by its claim and its volume, and while it has no start, by the source or checkpoint it names.
fn sessions(context: &Context) -> Controller<AetherSession> {
    let controller = of_all::<AetherSession>(context);
    let (by_source, by_checkpoint) = (controller.store(), controller.store());
    let startless = |session: &AetherSession| session.status.as_ref().is_none_or(|status| status.base.is_none());
    controller
        .watches(all::<PersistentVolumeClaim>(context), watcher::Config::default(), |claim| {
            let may_be = claim.labels().contains_key(SESSION_UID_LABEL)
                || claim.annotations().contains_key(CLAIM_SOURCE_ANNOTATION);
            may_be.then(|| ObjectRef::new(&claim.name_any()).within(&claim.namespace().unwrap_or_default()))
        })
        .watches(all::<PersistentVolume>(context), watcher::Config::default().labels(SESSION_UID_LABEL), |volume| {
            let claim = volume.spec?.claim_ref?;
            Some(ObjectRef::new(&claim.name?).within(&claim.namespace?))
        })
        .watches(all::<AetherSource>(context), watcher::Config::default(), move |source| {
            let (name, namespace) = (source.name_any(), source.namespace());
            let waits = |session: &AetherSession| {
                let wanted = session.spec.source.as_ref();
                startless(session)
                    && wanted.is_some_and(|wanted| {
                        wanted.name == name && wanted.namespace.clone().or_else(|| session.namespace()) == namespace
                    })
            };
            by_source
                .state()
                .iter()
                .filter(|session| waits(session))
                .map(|session| ObjectRef::from_obj(session.as_ref()))
                .collect::<Vec<_>>()
        })
        .watches(all::<AetherCheckpoint>(context), watcher::Config::default(), move |checkpoint| {
            let (name, namespace) = (checkpoint.name_any(), checkpoint.namespace());
            let waits = |session: &AetherSession| {
                startless(session)
                    && session.namespace() == namespace
                    && session.spec.checkpoint.as_ref() == Some(&name)
            };
            by_checkpoint
                .state()
                .iter()
                .filter(|session| waits(session))
                .map(|session| ObjectRef::from_obj(session.as_ref()))
                .collect::<Vec<_>>()
        })
}

/// A volume is woken by its session, whose end it outlives.
fn volumes(context: &Context) -> Controller<PersistentVolume> {
    Controller::new(all::<PersistentVolume>(context), watcher::Config::default().labels(SESSION_UID_LABEL)).watches(
        all::<AetherSession>(context),
        watcher::Config::default(),
        |session| session.uid().map(|uid| ObjectRef::new(&names::volume_name(&uid))),
    )
}

/// A restore is woken by its checkpoint and its safety checkpoint.
fn restores(context: &Context) -> Controller<AetherRestore> {
    let controller = of_all::<AetherRestore>(context);
    let restores = controller.store();
    controller.watches(all::<AetherCheckpoint>(context), watcher::Config::default(), move |checkpoint| {
        let (name, namespace) = (checkpoint.name_any(), checkpoint.namespace());
        let safety =
            |restore: &AetherRestore| restore.status.as_ref().and_then(|status| status.safety_checkpoint.clone());
        let waits = |restore: &AetherRestore| {
            !restore.finished()
                && restore.namespace() == namespace
                && (restore.spec.checkpoint == name || safety(restore).as_ref() == Some(&name))
        };
        restores
            .state()
            .iter()
            .filter(|restore| waits(restore))
            .map(|restore| ObjectRef::from_obj(restore.as_ref()))
            .collect::<Vec<_>>()
    })
}

fn commands(context: &Context) -> Controller<AetherCommand> {
    of_all::<AetherCommand>(context).owns(all::<Pod>(context), watcher::Config::default().labels(COMMAND_LABEL))
}

/// A commit is woken by its approvals, its Job, and while it waits, by its checkpoint, its source and commands of its namespace.
fn commits(context: &Context) -> Controller<AetherCommit> {
    let controller = of_all::<AetherCommit>(context);
    let (by_checkpoint, by_source, by_command) = (controller.store(), controller.store(), controller.store());
    type Store = kube::runtime::reflector::Store<AetherCommit>;
    let waiting = |store: &Store, wanted: &dyn Fn(&AetherCommit) -> bool| -> Vec<ObjectRef<AetherCommit>> {
        let waits = store.state().into_iter().filter(|commit| !commit.finished() && wanted(commit));
        waits.map(|commit| ObjectRef::from_obj(commit.as_ref())).collect()
    };
    controller
        .watches(all::<AetherApproval>(context), watcher::Config::default(), |approval| {
            Some(ObjectRef::new(&approval.spec.commit).within(&approval.namespace()?))
        })
        .watches(all::<Job>(context), watcher::Config::default().labels(COMMIT_UID_LABEL), |job| {
            let (namespace, name) = job.annotations().get(COMMIT_ANNOTATION)?.split_once('/')?;
            Some(ObjectRef::new(name).within(namespace))
        })
        .watches(all::<AetherCheckpoint>(context), watcher::Config::default(), move |checkpoint| {
            let (name, namespace) = (checkpoint.name_any(), checkpoint.namespace());
            waiting(&by_checkpoint, &|commit| commit.namespace() == namespace && commit.needs(&name))
        })
        .watches(all::<AetherSource>(context), watcher::Config::default(), move |source| {
            let uid = source.uid();
            waiting(&by_source, &|commit| {
                let of = commit.status.as_ref().and_then(|status| status.source.as_ref());
                of.is_some_and(|of| Some(&of.uid) == uid.as_ref())
            })
        })
        .watches(all::<AetherCommand>(context), watcher::Config::default(), move |command| {
            let namespace = command.namespace();
            waiting(&by_command, &|commit| command.finished() && commit.namespace() == namespace)
        })
}

/// What every controller is run with.
struct Drive {
    context: Arc<Context>,
    counts: Counts,
    stop: CancellationToken,
}

impl Drive {
    async fn run<K, F, Reconcile>(&self, controller: Controller<K>, kind: Kind, reconcile: Reconcile)
    where
        K: Object,
        F: Future<Output = Result<Action>> + Send + 'static,
        Reconcile: Fn(Arc<K>, Arc<Context>) -> F,
    {
        let counts = self.counts.clone();
        let counted = move |object: Arc<K>, context: Arc<Context>| {
            let (counts, begun) = (counts.clone(), Instant::now());
            reconcile(object, context).inspect(move |result| {
                counts.took.of((kind,)).observe(begun.elapsed().as_secs_f64());
                let outcome = match result {
                    Ok(_) => Outcome::Ok,
                    Err(error) if error.is_conflict() => Outcome::Conflict,
                    Err(_) => Outcome::Error,
                };
                counts.ended.of((kind, outcome)).inc();
            })
        };
        controller
            .with_config(controller::Config::default().concurrency(self.context.config.concurrency))
            .graceful_shutdown_on(self.stop.clone().cancelled_owned())
            .run(counted, on_error, self.context.clone())
            .for_each(|result| async move {
                match result {
                    // Already told by `on_error`; an object that is gone before its turn is nothing to tell.
                    Ok(_) | Err(controller::Error::ReconcilerFailed(..) | controller::Error::ObjectNotFound(_)) => {}
                    Err(error) => tracing::warn!("a watch failed and is begun anew: {error}"),
                }
            })
            .await;
    }
}

fn on_error<K: Object>(object: Arc<K>, error: &Error, _: Arc<Context>) -> Action {
    let (kind, name, namespace) = (K::kind(&()), object.name_any(), object.namespace());
    if error.is_conflict() {
        tracing::debug!(%kind, name, namespace, %error, "changed meanwhile");
        return Action::requeue(RETRY_CONFLICT);
    }
    if error.is_terminating_namespace() {
        tracing::debug!(%kind, name, namespace, "its namespace is being deleted");
        return Action::requeue(RETRY);
    }
    tracing::warn!(%kind, name, namespace, %error, "tried again in {} s", RETRY.as_secs());
    Action::requeue(RETRY)
}

async fn sweeps(context: &Arc<Context>, stop: &CancellationToken) {
    loop {
        let pause = match sweep::sweep(context).await {
            Ok(()) => sweep::PERIOD,
            Err(error) => {
                tracing::warn!(%error, "a sweep failed; it is tried again");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Looks for damage, the first time soon after this operator began to lead.
async fn looks(mut damage: Damage, context: &Arc<Context>, stop: &CancellationToken) {
    let Some(interval) = context.config.damage_interval.0 else { return };
    let mut pause = interval.min(FIRST_LOOK);
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        if let Err(error) = damage.look(context).await {
            tracing::warn!(%error, "what the store has lost could not be told; it is tried again");
        }
        pause = interval;
    }
}
