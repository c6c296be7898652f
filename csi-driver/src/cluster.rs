//! What this node sees of the cluster: one watch per kind, kept as a cache, that wakes whoever waits for a change and
//! feeds the queues of the control loops. Nothing polls.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use aether_api::{AetherCheckpoint, AetherRestore, AetherSession, AetherSource};
use aether_runtime::CancellationToken;
use futures::{StreamExt as _, TryStreamExt as _};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::failure::{Failure, Result};

/// A kind of object that can be cached.
pub(crate) trait Kind:
    Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// All objects of one kind in the cluster, as of the last event.
pub(crate) struct Cache<K: Kind> {
    client: Client,
    store: Store<K>,
    writer: Mutex<Option<reflector::store::Writer<K>>>,
    /// Grows with each event.
    version: watch::Sender<u64>,
    /// Whether the first list is complete. The store's own signal wakes only one of several waiters.
    listed: watch::Sender<bool>,
    queues: Mutex<Vec<mpsc::UnboundedSender<ObjectRef<K>>>>,
}

impl<K: Kind> Cache<K>
where
    ObjectRef<K>: Hash + Eq,
{
    pub(crate) fn new(client: Client) -> Self {
        let (store, writer) = reflector::store();
        Self {
            client,
            store,
            writer: Mutex::new(Some(writer)),
            version: watch::Sender::new(0),
            listed: watch::Sender::new(false),
            queues: Mutex::default(),
        }
    }

    /// Follows the cluster until `stop`; errors are logged and the watch begins again, with a growing delay.
    pub(crate) async fn follow(&self, stop: CancellationToken) {
        let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let kind = K::kind(&());
        let events =
            watcher(Api::<K>::all(self.client.clone()), watcher::Config::default()).default_backoff().reflect(writer);
        let mut events = std::pin::pin!(events.take_until(stop.cancelled_owned()));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(object) | watcher::Event::Delete(object)) => self.poke(&object),
                // The store shows a fresh list only when it is complete.
                Ok(watcher::Event::InitDone) => {
                    tracing::info!(%kind, objects = self.store.len(), "watch is up to date");
                    self.listed.send_replace(true);
                    self.store.state().iter().for_each(|object| self.poke(object.as_ref()));
                }
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
                Err(error) => {
                    tracing::warn!(%kind, %error, "watch failed, trying again");
                    continue;
                }
            }
            self.version.send_modify(|version| *version += 1);
        }
    }

    /// Does what the watch would do when it hears of `object`.
    #[cfg(test)]
    pub(crate) fn hear_of(&self, object: K) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.as_mut().expect("nobody follows").apply_watcher_event(&watcher::Event::Apply(object.clone()));
        self.poke(&object);
        self.version.send_modify(|version| *version += 1);
    }

    /// Puts an object into the queues of the control loops.
    pub(crate) fn poke(&self, object: &K) {
        self.poke_ref(&ObjectRef::from_obj(object));
    }

    /// As [`Self::poke`], by name.
    pub(crate) fn poke_name(&self, namespace: &str, name: &str) {
        self.poke_ref(&ObjectRef::new(name).within(namespace));
    }

    fn poke_ref(&self, reference: &ObjectRef<K>) {
        self.queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|queue| queue.send(reference.clone()).is_ok());
    }

    /// A queue of every object that changes or is poked from now on.
    pub(crate) fn queue(&self) -> UnboundedReceiverStream<ObjectRef<K>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        UnboundedReceiverStream::new(receiver)
    }

    pub(crate) fn store(&self) -> Store<K> {
        self.store.clone()
    }

    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.store.get(&ObjectRef::new(name).within(namespace))
    }

    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// The API of this kind in a namespace.
    pub(crate) fn api(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// The object as the API server has it now; `None` if it does not exist.
    pub(crate) async fn read(&self, namespace: &str, name: &str) -> Result<Option<Arc<K>>> {
        let found = self
            .api(namespace)
            .get_opt(name)
            .await
            .map_err(Failure::api(|| format!("read {} {namespace}/{name}", K::kind(&()))))?;
        Ok(found.map(Arc::new))
    }

    /// The cached object, or the API server's answer when the cache does not have it yet.
    pub(crate) async fn find(&self, namespace: &str, name: &str) -> Result<Option<Arc<K>>> {
        match self.get(namespace, name) {
            Some(object) => Ok(Some(object)),
            None => self.read(namespace, name).await,
        }
    }

    /// The object, if the API server lists it. Unlike the absence that [`Self::read`] reports, that of a list is an answer
    /// about this kind: a server that does not know the kind at this moment says so.
    pub(crate) async fn find_listed(&self, namespace: &str, name: &str) -> Result<Option<K>> {
        let parameters = kube::api::ListParams::default().fields(&format!("metadata.name={name}"));
        let describe = || format!("look for {} {namespace}/{name}", K::kind(&()));
        let list = self.api(namespace).list(&parameters).await.map_err(Failure::api(describe))?;
        Ok(list.items.into_iter().find(|object| object.name_any() == name))
    }

    /// Whether the first list is complete.
    pub(crate) async fn ready(&self) {
        // The sender lives as long as we do.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }

    /// Wakes at each change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

/// Until when, and for whom, a call waits.
#[derive(Clone, Debug)]
pub(crate) struct Patience {
    pub deadline: Instant,
    /// The caller went away, or the call was overtaken.
    pub cancelled: CancellationToken,
}

impl Patience {
    /// Waits for the next change of `changes`.
    ///
    /// # Errors
    /// [`Failure::NotYet`] with `reason` at the deadline, [`Failure::Aborted`] when nobody waits for the answer.
    pub(crate) async fn changed(&self, changes: &mut watch::Receiver<u64>, reason: &str) -> Result<()> {
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| Failure::Aborted("the driver is stopping".into())),
            end = self.end(reason) => Err(end),
        }
    }

    /// Waits for the end of patience.
    pub(crate) async fn end(&self, reason: &str) -> Failure {
        tokio::select! {
            () = tokio::time::sleep_until(self.deadline.into()) => Failure::NotYet(reason.to_owned()),
            () = self.cancelled.cancelled() => Failure::Aborted(format!("nobody waits any more: {reason}")),
        }
    }
}

/// The caches of all kinds that a node acts on.
pub(crate) struct Cluster {
    pub client: Client,
    pub sessions: Cache<AetherSession>,
    pub checkpoints: Cache<AetherCheckpoint>,
    pub restores: Cache<AetherRestore>,
    pub sources: Cache<AetherSource>,
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            sessions: Cache::new(client.clone()),
            checkpoints: Cache::new(client.clone()),
            restores: Cache::new(client.clone()),
            sources: Cache::new(client.clone()),
            client,
        }
    }

    /// Waits until every cache is filled.
    pub(crate) async fn ready(&self) {
        tokio::join!(self.sessions.ready(), self.checkpoints.ready(), self.restores.ready(), self.sources.ready());
    }
}

/// Changes the status of an object by compare-and-swap: `change` sees the newest version and gives what to merge into
/// its status, or `None` when there is nothing to do. Returns the object as it is afterwards.
///
/// # Errors
/// [`Failure::NotFound`] when the object is gone or another has its name.
pub(crate) async fn update_status<K: Kind>(
    api: &Api<K>,
    seen: Arc<K>,
    manager: &str,
    change: impl Fn(&K) -> Option<serde_json::Value>,
) -> Result<Arc<K>> {
    let name = seen.name_any();
    let describe = || format!("write status of {} {}/{name}", K::kind(&()), seen.namespace().unwrap_or_default());
    let parameters = kube::api::PatchParams { field_manager: Some(manager.to_owned()), ..Default::default() };
    let mut current = seen.clone();
    // Each round lost to another writer; so many in a row mean that something is wrong.
    for _ in 0..32 {
        let Some(status) = change(&current) else { return Ok(current) };
        let body = serde_json::json!({
            "metadata": {"resourceVersion": current.resource_version()},
            "status": status,
        });
        match api.patch_status(&name, &parameters, &kube::api::Patch::Merge(&body)).await {
            Ok(new) => return Ok(Arc::new(new)),
            Err(kube::Error::Api(response)) if response.code == 409 => {
                let newer = api.get_opt(&name).await.map_err(Failure::api(describe))?;
                current = newer
                    .filter(|newer| newer.uid() == seen.uid())
                    .map(Arc::new)
                    .ok_or_else(|| Failure::NotFound(format!("{} {name} is gone", K::kind(&()))))?;
            }
            Err(error) => return Err(Failure::api(describe)(error)),
        }
    }
    Err(Failure::Aborted(format!("cannot {}: others keep changing it", describe())))
}

/// Feeds a control loop: reconciles each queued object, never twice at a time, again with a growing delay when it
/// fails, until `stop`.
pub(crate) async fn run<K, Context, Reconcile, Running>(
    name: &'static str,
    cache: &Cache<K>,
    context: Arc<Context>,
    reconcile: Reconcile,
    stop: CancellationToken,
) where
    K: Kind,
    Context: Send + Sync + 'static,
    Reconcile: Fn(Arc<K>, Arc<Context>) -> Running,
    Running: Future<Output = Result<()>> + Send + 'static,
{
    use kube::runtime::controller::{Action, Config, Error as Applied};
    let failures: Arc<Mutex<std::collections::HashMap<String, u32>>> = Arc::default();
    let uid = |object: &K| object.uid().unwrap_or_default();
    let after_failure = {
        let failures = failures.clone();
        move |object: Arc<K>, error: &Failure, _: Arc<Context>| {
            let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
            if error.is_gone() {
                failures.remove(&uid(&object));
                return Action::await_change();
            }
            let count = failures.entry(uid(&object)).or_default();
            *count += 1;
            // 0.5 s, doubled each time, up to a minute.
            let delay =
                std::time::Duration::from_millis(500 << (*count - 1).min(7)).min(std::time::Duration::from_secs(60));
            tracing::warn!(
                task = name,
                object = crate::moments::full_name(&*object),
                error = crate::failure::chain(error),
                ?delay,
                "will try again"
            );
            Action::requeue(delay)
        }
    };
    let queue = cache.queue().map(Ok::<_, std::convert::Infallible>).into_stream().take_until(stop.cancelled_owned());
    // What was there before the queue was.
    cache.all().iter().for_each(|object| cache.poke(object));
    let applied = kube::runtime::applier(
        move |object: Arc<K>, context: Arc<Context>| {
            let failures = failures.clone();
            let running = reconcile(object.clone(), context);
            Box::pin(async move {
                running.await?;
                failures.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid(&object));
                Ok::<_, Failure>(Action::await_change())
            })
        },
        after_failure,
        context,
        cache.store(),
        queue,
        Config::default(),
    );
    applied
        .for_each(|result| async move {
            // Failures of ours were logged by the policy above; a deleted object is no failure.
            if let Err(error @ (Applied::QueueError(_) | Applied::RunnerError(_))) = result {
                tracing::error!(task = name, %error, "control loop");
            }
        })
        .await;
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use aether_api::AetherSessionSpec;
    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// An API server for one session: refuses a patch whose resourceVersion is not the newest, as the real one does.
    fn server(object: Arc<Mutex<Value>>) -> Client {
        let service = tower::service_fn(move |request: Request<Body>| {
            let object = object.clone();
            async move {
                let (parts, body) = request.into_parts();
                let sent = body.collect_bytes().await.unwrap();
                let mut object = object.lock().unwrap();
                let (code, answer) = match parts.method {
                    Method::GET => (200, object.clone()),
                    Method::PATCH => {
                        assert!(
                            parts.uri.path().ends_with("/namespaces/team/aethersessions/fix/status"),
                            "{}",
                            parts.uri
                        );
                        assert!(parts.uri.query().unwrap_or_default().contains("fieldManager=driver"));
                        let patch: Value = serde_json::from_slice(&sent).unwrap();
                        if patch["metadata"]["resourceVersion"] == object["metadata"]["resourceVersion"] {
                            let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
                            object["metadata"]["resourceVersion"] = json!((version + 1).to_string());
                            for (key, value) in patch["status"].as_object().unwrap() {
                                object["status"][key] = value.clone();
                            }
                            (200, object.clone())
                        } else {
                            (
                                409,
                                json!({"kind": "Status", "status": "Failure", "reason": "Conflict", "message": "changed", "code": 409}),
                            )
                        }
                    }
                    other => panic!("{other} was not expected"),
                };
                Ok::<_, Infallible>(
                    Response::builder().status(code).body(Body::from(serde_json::to_vec(&answer).unwrap())).unwrap(),
                )
            }
        });
        Client::new(service, "default")
    }

    fn session(uid: &str, version: &str) -> Value {
        let mut session = AetherSession::new("fix", AetherSessionSpec::default());
        session.metadata.namespace = Some("team".into());
        session.metadata.uid = Some(uid.into());
        session.metadata.resource_version = Some(version.into());
        let mut value = serde_json::to_value(&session).unwrap();
        value["status"] = json!({});
        value
    }

    fn seen(value: &Value) -> Arc<AetherSession> {
        Arc::new(serde_json::from_value(value.clone()).unwrap())
    }

    #[tokio::test]
    async fn a_lost_race_is_decided_again_on_the_newest_version() {
        let object = Arc::new(Mutex::new(session("u", "7")));
        let old = seen(&session("u", "5"));
        object.lock().unwrap()["status"]["changedFiles"] = json!(3);
        let api = Api::namespaced(server(object.clone()), "team");
        let looks = Mutex::new(Vec::new());
        let after = update_status(&api, old.clone(), "driver", |session: &AetherSession| {
            let changed = session.status.as_ref().and_then(|status| status.changed_files);
            looks.lock().unwrap().push(changed);
            Some(json!({"ownBytes": 1}))
        })
        .await
        .unwrap();
        assert_eq!(*looks.lock().unwrap(), [None, Some(3)]);
        let status = after.status.clone().unwrap();
        assert_eq!((status.changed_files, status.own_bytes), (Some(3), Some(1)), "nothing of the other writer is lost");

        let unchanged = update_status(&api, after.clone(), "driver", |_| None).await.unwrap();
        assert_eq!(unchanged.resource_version(), after.resource_version(), "nothing to do writes nothing");
    }

    #[tokio::test]
    async fn an_object_made_anew_is_not_written() {
        let object = Arc::new(Mutex::new(session("another", "9")));
        let api = Api::namespaced(server(object.clone()), "team");
        let result =
            update_status(&api, seen(&session("u", "5")), "driver", |_: &AetherSession| Some(json!({"ownBytes": 1})))
                .await;
        assert!(result.unwrap_err().is_gone());
        assert_eq!(object.lock().unwrap()["status"], json!({}));
    }

    #[tokio::test]
    async fn a_call_waits_until_its_deadline_or_until_nobody_listens() {
        let (sender, mut changes) = watch::channel(0_u64);
        let mut patience = Patience { deadline: Instant::now(), cancelled: CancellationToken::new() };
        let end = patience.changed(&mut changes, "held by node b").await.unwrap_err();
        assert!(matches!(&end, Failure::NotYet(reason) if reason == "held by node b"));

        patience.deadline += std::time::Duration::from_secs(3600);
        sender.send(1).unwrap();
        patience.changed(&mut changes, "").await.unwrap();
        patience.cancelled.cancel();
        assert!(matches!(patience.changed(&mut changes, "").await, Err(Failure::Aborted(_))));
    }
}
