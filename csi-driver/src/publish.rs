//! What happens between a volume and a path: publish, unpublish, stage, statistics. Every operation may be called again;
//! unpublish always ends.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use aether_api::AetherSession;
use aether_engine::SessionUsage;
use aether_engine::pool::Limits;
use aether_runtime::{CancellationToken, Stage};
use kube::ResourceExt as _;
use tokio::sync::oneshot;

use crate::attach::{absent, owner, unresolved};
use crate::cluster::Patience;
use crate::driver::{Driver, parse_root};
use crate::failure::{Failure, Result};
use crate::moments::{epoch_of, full_name, newer};
use crate::records::{PublishRecord, Record as _, Upper};
use crate::target::{self, Target};
use crate::volume::{Volume, Wanted};
use crate::{inline, limits};

/// How the ids of engine sessions begin that are frozen views.
pub(crate) const VIEW: &str = "view-";

/// A publish, as the kubelet asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Publish {
    pub volume_id: String,
    pub target: PathBuf,
    pub read_only: bool,
    pub volume: Volume,
}

/// How much a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub total: u64,
    pub available: u64,
    pub used: u64,
}

/// Statistics of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Statistics {
    pub bytes: Usage,
    /// Absent where the file system makes inodes as needed.
    pub inodes: Option<Usage>,
    /// What is wrong with it.
    pub abnormal: Option<String>,
}

/// Ends the entry in the table of publishes under way.
struct Underway<'a> {
    driver: &'a Driver,
    key: String,
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.driver.underway.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl Driver {
    /// Mounts a volume at a target.
    pub(crate) async fn publish(self: &Arc<Self>, request: Publish, patience: Patience) -> Result<()> {
        let key = request.target.to_string_lossy().into_owned();
        let _target = self.target_locks.lock(&key).await;
        self.underway.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), patience.cancelled.clone());
        let _underway = Underway { driver: self, key: key.clone() };

        let before = self.publishes.get(&key).filter(|record| !record.unpublished);
        match target::classify(&request.target)? {
            Target::Mounted => match &before {
                Some(record) if record.volume_id == request.volume_id && record.read_only == request.read_only => {
                    return Ok(());
                }
                Some(record) => {
                    return Err(Failure::Invalid(format!(
                        "{key} has volume {} already ({})",
                        record.volume_id,
                        if record.read_only { "read-only" } else { "writable" }
                    )));
                }
                None => return Err(Failure::Invalid(format!("something that is not ours is mounted at {key}"))),
            },
            Target::Other => return Err(Failure::Invalid(format!("{key} is neither a directory nor absent"))),
            Target::Dead => target::clear(&request.target)?,
            Target::Missing | Target::Directory => {}
        }

        // Another view is made for it, and the new record will name that.
        if let Some(before) = &before {
            self.take_view_away(before).await;
        }
        let mut record = PublishRecord {
            target: request.target.clone(),
            volume_id: request.volume_id.clone(),
            namespace: String::new(),
            session: String::new(),
            uid: None,
            read_only: request.read_only,
            view: None,
            pod: request.volume.pod.clone(),
            inline: false,
            unpublished: false,
        };
        let result = self.publish_volume(&request, &mut record, &patience).await;
        if result.is_err()
            && !record.inline
            && self.publishes.get(&key).is_some_and(|known| known.volume_id == record.volume_id)
        {
            // What an inline volume made stays recorded: its unpublish comes, or the next attempt finds it.
            self.take_away(&record).await;
            self.publishes.remove(&key).await?;
        }
        if result.is_err() && !record.session.is_empty() {
            // It may have taken the lease, which goes again when nobody here writes.
            self.poke(&record.namespace, &record.session);
        }
        self.count();
        result
    }

    async fn publish_volume(
        self: &Arc<Self>,
        request: &Publish,
        record: &mut PublishRecord,
        patience: &Patience,
    ) -> Result<()> {
        let (session, first) = match &request.volume.wanted {
            Wanted::Session { namespace, name, uid } => {
                record.namespace.clone_from(namespace);
                record.session.clone_from(name);
                (self.existing(namespace, name, uid.as_deref()).await?, None)
            }
            Wanted::Own { pod, source_namespace, source, owner, limits } => {
                if request.read_only {
                    return Err(Failure::Invalid(format!(
                        "an inline volume with source {source} is a session of its own, which readOnly makes useless: name a session instead"
                    )));
                }
                record.namespace.clone_from(&pod.namespace);
                record.session = inline::session_name(pod, &request.volume_id);
                record.inline = true;
                self.publishes.put(record.clone()).await?;
                let own = self
                    .own_session(record, pod, (source_namespace, source), (*owner, limits.as_ref()), patience)
                    .await?;
                (own.session, Some(own.first))
            }
        };
        record.uid = session.uid();
        if request.read_only {
            return self.publish_frozen(request, record, session, patience).await;
        }
        let attached = self.attach(session, first, record.pod.as_ref(), patience).await?;
        // Under the session's lock: from this record on, the session counts as written here.
        self.publishes.put(record.clone()).await?;
        let uid = record.uid.clone().unwrap_or_default();
        self.engine.publish(&uid, &request.target, false).await?;
        tracing::info!(session = full_name(&*attached.session), target = %request.target.display(), "published");
        Ok(())
    }

    /// The session that a volume names.
    async fn existing(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<Arc<AetherSession>> {
        let other = |session: &Arc<AetherSession>| uid.is_some() && session.uid().as_deref() != uid;
        let mut session = self.cluster.sessions.find(namespace, name).await?;
        if session.as_ref().is_some_and(other) {
            session = self.cluster.sessions.read(namespace, name).await?;
        }
        let session = session.ok_or_else(|| Failure::NotFound(format!("session {namespace}/{name} does not exist")))?;
        if other(&session) {
            return Err(Failure::NotFound(format!(
                "session {namespace}/{name} was deleted and made anew; this volume belongs to the old one"
            )));
        }
        Ok(session)
    }

    /// A frozen mount, without the lease: the last snapshot when this node has one, else the session's head.
    async fn publish_frozen(
        self: &Arc<Self>,
        request: &Publish,
        record: &mut PublishRecord,
        mut session: Arc<AetherSession>,
        patience: &Patience,
    ) -> Result<()> {
        let mut changes = self.cluster.sessions.changes();
        loop {
            let uid = session.uid().unwrap_or_default();
            let forked = session.status.as_ref().and_then(|status| status.forked_from.as_ref());
            let moment = forked
                .filter(|forked| forked.node.as_deref() == Some(self.node()))
                .and_then(|forked| forked.snapshot.clone());
            let held = self.sessions.get(&uid).filter(|local| local.upper == Upper::Dirty);
            let head = session.status.as_ref().and_then(|status| status.head.as_ref());
            let never_released = session.status.as_ref().is_none_or(|status| status.head.is_none());
            let last = self
                .engine
                .snapshots()
                .await?
                .into_iter()
                .filter(|snapshot| !snapshot.deleting && !snapshot.temporary)
                // Of the upper that is the session now, and newer than the head: the head is what others see.
                .filter(|snapshot| {
                    held.as_ref().is_some_and(|local| {
                        snapshot.session == uid
                            && epoch_of(&snapshot.id) == Some(local.epoch)
                            && newer(head, local.head_nanos, snapshot.taken_nanos)
                    }) || never_released && Some(&snapshot.id) == moment.as_ref()
                })
                // A snapshot that is in the store is the head, or older than it.
                .filter(|snapshot| {
                    snapshot
                        .digested
                        .as_ref()
                        .is_none_or(|digested| Some(digested.root.to_string().as_str()) != session.head_root())
                })
                .max_by_key(|snapshot| snapshot.taken_nanos)
                .filter(|snapshot| snapshot.image.id().owner() == owner(&session));
            if let Some(snapshot) = last {
                let view = format!("{VIEW}{}", uuid::Uuid::new_v4());
                record.view = Some(view.clone());
                self.publishes.put(record.clone()).await?;
                self.engine.fork_session(&view, &snapshot.id).await?;
                self.mount_session(&view, &session).await?;
                self.engine.publish(&view, &request.target, true).await?;
                return Ok(());
            }
            if let Some(root) = session.head_root() {
                let root = parse_root(root, &format!("session {}", full_name(&*session)))?;
                let image = self.image(root, owner(&session), &self.wanted(&session)).await?;
                self.publishes.put(record.clone()).await?;
                self.show_image(&image, &request.target, &session).await?;
                return Ok(());
            }
            let reason = unresolved(&session).to_string();
            patience.changed(&mut changes, &reason).await?;
            session = self.existing(&record.namespace, &record.session, Some(&uid)).await?;
        }
    }

    /// Takes a volume away from a target. Ends well whatever is there, or not there.
    pub(crate) async fn unpublish(self: &Arc<Self>, path: &Path) -> Result<()> {
        let key = path.to_string_lossy().into_owned();
        if let Some(publish) = self.underway.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            publish.cancel();
        }
        let _target = self.target_locks.lock(&key).await;
        let record = self.publishes.get(&key);
        // Without the mount table: with thousands of mounts, reading it is what takes long here.
        target::clear(path)?;
        let Some(record) = record else { return Ok(()) };
        self.take_view_away(&record).await;
        if record.inline {
            self.publishes.put(PublishRecord { unpublished: true, ..record.clone() }).await?;
            self.begin_end_own_session(record);
        } else {
            self.publishes.remove(&key).await?;
            tracing::info!(session = format!("{}/{}", record.namespace, record.session), target = key, "unpublished");
            self.poke(&record.namespace, &record.session);
            // For a session whose object is gone already.
            self.attached.send_modify(|version| *version += 1);
        }
        self.count();
        Ok(())
    }

    /// Takes away the mount of a record and the view behind it; failures are left to the housekeeping.
    async fn take_away(&self, record: &PublishRecord) {
        if let Err(error) = target::clear(&record.target) {
            tracing::warn!(target = %record.target.display(), %error, "unpublish");
        }
        self.take_view_away(record).await;
    }

    async fn take_view_away(&self, record: &PublishRecord) {
        if let Some(view) = &record.view {
            let gone = async {
                self.engine.unmount_session(view).await.or_else(absent)?;
                self.engine.delete_session(view).await.or_else(absent)
            };
            if let Err(error) = gone.await {
                tracing::warn!(view, %error, "frozen view stays for now");
            }
        }
    }

    /// Prepares for a publish that is to come: the image, but not the lease. What cannot be prepared yet is left to the
    /// publish, which can wait.
    pub(crate) async fn stage(&self, attributes: &HashMap<String, String>) -> Result<()> {
        let volume = Volume::parse(attributes)?;
        let Wanted::Session { namespace, name, uid } = &volume.wanted else { return Ok(()) };
        let session = self.existing(namespace, name, uid.as_deref()).await?;
        self.warm(&session).await
    }

    /// Statistics of a published volume.
    pub(crate) async fn statistics(&self, volume_id: &str, path: &Path) -> Result<Statistics> {
        let record = self
            .publishes
            .get(&path.to_string_lossy())
            .filter(|record| record.volume_id == volume_id && !record.unpublished)
            .ok_or_else(|| Failure::NotFound(format!("volume {volume_id} is not published at {}", path.display())))?;
        let abnormal = match target::classify(path)? {
            Target::Mounted => None,
            Target::Dead => Some("the mount does not answer".to_owned()),
            Target::Missing | Target::Directory | Target::Other => Some("the mount is gone".to_owned()),
        };
        let fenced = record
            .uid
            .as_ref()
            .and_then(|uid| self.sessions.get(uid))
            .is_some_and(|session| matches!(session.upper, Upper::Fenced { .. }))
            .then(|| "another node has taken the session over".to_owned());
        let engine_id = record.view.clone().or_else(|| record.uid.clone().filter(|_| !record.read_only));
        let usage = match engine_id {
            Some(id) => self.engine.usage(&id).await?,
            // A mount of an image: nothing of its own.
            None => SessionUsage {
                usage: aether_engine::pool::Usage::default(),
                limits: Limits::default(),
                reached: None,
                counted_only: None,
                space: self.engine.space().await?,
            },
        };
        let full = usage.reached.map(|limit| limits::said(limit).to_owned());
        let stuck = usage.space.read_only.then(|| "the node's pool is read-only: see the node driver's log".to_owned());
        Ok(Statistics { abnormal: fenced.or(abnormal).or(stuck).or(full), ..within(&usage) })
    }

    /// Forgets publishes whose pod is gone without an unpublish, as after a reboot, and goes on with what a kill
    /// interrupted.
    pub(crate) async fn tidy_publishes(self: &Arc<Self>) -> Result<()> {
        for record in self.publishes.all() {
            if record.unpublished {
                continue;
            }
            // `…/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount`: the kubelet removes `<name>` at the end.
            let abandoned =
                record.target.parent().is_some_and(|parent| matches!(target::classify(parent), Ok(Target::Missing)));
            if abandoned && self.underway.lock().unwrap_or_else(PoisonError::into_inner).get(&record.key()).is_none() {
                tracing::info!(target = %record.target.display(), "the pod of a mount is gone");
                self.unpublish(&record.target).await?;
            }
        }
        Ok(())
    }

    /// Goes on deleting the sessions of inline volumes that were unpublished before the last end of this process.
    pub(crate) fn resume_inline(self: &Arc<Self>) {
        for record in self.publishes.select(|record| record.unpublished && record.inline) {
            self.begin_end_own_session(record);
        }
    }
}

/// What a session takes up, of its limit where it has one, else of its pool.
fn within(usage: &SessionUsage) -> Statistics {
    let of = |limit: Option<u64>, used: u64, total: u64, available: u64| match limit {
        Some(limit) => Usage { total: limit, available: available.min(limit.saturating_sub(used)), used },
        None => Usage { total, available, used },
    };
    let (limits, space) = (usage.limits, usage.space);
    let bytes = of(limits.bytes, usage.usage.bytes, space.total_bytes, space.available_bytes);
    let makes_inodes_as_needed = space.total_inodes == 0;
    let inodes = match usage.usage.inodes {
        Some(used) if makes_inodes_as_needed => limits.inodes.map(|limit| of(Some(limit), used, limit, limit)),
        Some(used) => Some(of(limits.inodes, used, space.total_inodes, space.available_inodes)),
        None => None,
    };
    Statistics { bytes, inodes, abnormal: None }
}

impl Driver {
    /// Runs the work of a call to its end, also when the caller goes away in the middle: then the token is cancelled, which
    /// ends waiting, but nothing is left half done.
    pub(crate) async fn to_the_end<T, Work>(
        &self,
        call: &str,
        owner: &str,
        work: impl FnOnce(CancellationToken) -> Work,
    ) -> Result<T>
    where
        T: Send + 'static,
        Work: Future<Output = Result<T>> + Send + 'static,
    {
        let cancelled = self.stop.child_token();
        let running = work(cancelled.clone());
        let _guard = cancelled.drop_guard();
        let (sender, receiver) = oneshot::channel();
        self.tasks.spawn(Stage::Work, call, owner, move |_| async move {
            // Nobody listens when the caller went away.
            let _ = sender.send(running.await);
            Ok(())
        });
        receiver.await.map_err(|_| Failure::Lost("the call"))?
    }
}
