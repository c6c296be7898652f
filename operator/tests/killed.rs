//! The operator as a process of its own, against a real API server and a real store, dies at each point of a commit and is started
//! again in the same environment: the commit ends as if it had not, with one checkpoint, one Job, or one revision. There are no
//! nodes: the driver's and the kubelet's part is played here.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::commit::CommitPhase;
use aether_api::identity::Identity;
use aether_api::names::COMMIT_UID_LABEL;
use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCommit, AetherCommitStatus, AetherSession, AetherSource, definitions,
};
use aether_cas::{Blob, LocalConfig, LocalStore, Store};
use aether_credentials::Credentials;
use aether_operator::admission::{Admission, Request};
use aether_operator::audit::{self, Audit, ClusterAnchor};
use aether_operator::crash::POINTS;
use aether_operator::events::Events;
use aether_operator::pins::Pins;
use aether_operator::signature::{self, Keyring, Keys};
use aether_runtime::{CancellationToken, Metrics};
use aether_store_node::metrics::StoreMetrics;
use aether_store_node::{Guard, serve};
use aether_testkit::control_plane::ControlPlane;
use bytes::Bytes;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

const NAMESPACE: &str = "agents";
const SYSTEM: &str = "aether-system";
const PROGRAM: &str = env!("CARGO_BIN_EXE_aether-operator");
const PATIENCE: Duration = Duration::from_secs(90);
/// What the kubelet says that the Job's program said.
const PUSHED: &str = r#"{"ok":true,"commit":"f00d","tree":"t","branch":"agents/fix"}"#;

struct World {
    control: ControlPlane,
    admission: Admission,
    folder: TempDir,
    store: String,
    /// The tree that everything is of: an empty one.
    root: Blob,
    stop: CancellationToken,
}

/// The process, which is started again when it ends, as a kubelet does it.
struct Operator {
    command: Command,
    process: Child,
    log: PathBuf,
    deaths: usize,
}

impl Operator {
    fn start(mut command: Command, log: PathBuf) -> Self {
        let process = command.spawn().unwrap();
        Self { command, process, log, deaths: 0 }
    }

    fn revive(&mut self) {
        let Some(ended) = self.process.try_wait().unwrap() else { return };
        assert_eq!(ended.signal(), Some(6), "it ended by itself: {ended}: {}", self.said());
        self.deaths += 1;
        self.process = self.command.spawn().unwrap();
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Asks again until there is an answer; what went wrong last when there is none.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(why) => assert!(begun.elapsed() < PATIENCE, "{what}: {why}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl World {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
        let store = LocalStore::open(LocalConfig { objects, index, inline_limit: 16 << 10 }).unwrap();
        let root = Blob::of(b"");
        store.write(root, Bytes::new()).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (format!("http://{}", listener.local_addr().unwrap()), CancellationToken::new());
        tokio::spawn(serve(listener, store, StoreMetrics::new(&Metrics::new()), Guard::default(), stop.clone()));

        let control = ControlPlane::start().await;
        let client = control.client.clone();
        let kinds: Api<CustomResourceDefinition> = Api::all(client.clone());
        for definition in definitions() {
            kinds.create(&PostParams::default(), &definition).await.unwrap();
        }
        let namespaces: Api<Namespace> = Api::all(client.clone());
        for name in [NAMESPACE, SYSTEM] {
            let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            namespaces.create(&PostParams::default(), &namespace).await.unwrap();
        }
        signature::rotate(&client, SYSTEM, jiff::Timestamp::now()).await.unwrap();
        let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM);
        let keyring = Keyring::default();
        keyring.set(Keys::read(&secrets.get(signature::SECRET).await.unwrap()));
        let (nobody, events) = (Credentials::default(), Events::new(&client, "webhook"));
        let anchor = ClusterAnchor::new(&client, SYSTEM, Pins::connect(&address, &nobody).unwrap(), events.clone());
        let audit = Arc::new(Audit::new(audit::store(&address, &nobody).unwrap(), anchor));
        let admission = Admission { client, keyring, audit, events };
        let world = Self { admission, control, folder, store: address, root, stop };
        until("the kinds are served", async || world.list::<AetherCommit>("").await.map(drop)).await;
        world
    }

    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.control.client.clone(), NAMESPACE)
    }

    async fn list<K>(&self, labels: &str) -> Result<Vec<K>, String>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let listed = self.api::<K>().list(&ListParams::default().labels(labels)).await;
        listed.map(|list| list.items).map_err(|error| error.to_string())
    }

    /// Creates an object as this user, with the webhook in between.
    async fn create<K>(&self, who: &str, mut object: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        object["metadata"]["namespace"] = NAMESPACE.into();
        let user = Identity { username: who.into(), ..Identity::default() };
        let request: Request = serde_json::from_value(json!({
            "uid": "q", "kind": {"kind": K::kind(&())}, "operation": "CREATE", "namespace": NAMESPACE, "userInfo": user,
            "object": object,
        }))
        .unwrap();
        let changes = self.admission.mutate(&request).await.unwrap();
        for change in serde_json::to_value(changes).unwrap().as_array().unwrap() {
            let (parent, member) = change["path"].as_str().unwrap().rsplit_once('/').unwrap();
            object.pointer_mut(parent).unwrap()[member.replace("~1", "/")] = change["value"].clone();
        }
        let object: K = serde_json::from_value(object).unwrap();
        self.api().create(&PostParams::default(), &object).await.unwrap()
    }

    async fn patch<K>(&self, name: &str, change: Value)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    }

    async fn patch_status<K>(&self, name: &str, status: Value)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let patch = Patch::Merge(json!({"status": status}));
        self.api::<K>().patch_status(name, &PatchParams::default(), &patch).await.unwrap();
    }

    /// An operator that dies when it first gets to this point.
    fn operator(&self, point: &str) -> Operator {
        let at = |name: &str| -> PathBuf { self.folder.path().join(format!("{point}.{name}")) };
        let log = std::fs::File::create(at("log")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args([
            "--namespace",
            SYSTEM,
            "--identity",
            "operator",
            "--listen",
            "127.0.0.1:0",
            "--store",
            &self.store,
        ]);
        command.args([
            "--importer-image",
            "importer:1",
            "--committer-image",
            "committer:1",
            "--worker-image",
            "worker:1",
        ]);
        command.args(["--command-image", "tools:1", "--damage-interval", "off"]);
        command.env("KUBECONFIG", self.control.kubeconfig());
        command.env("AETHER_CRASH_AT", point).env("AETHER_CRASH_ONCE", at("crashed"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Operator::start(command, at("log"))
    }

    /// A source with a revision, and a session of it.
    async fn settle(&self) {
        let source = json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": "linux"}, "spec": {
            "git": {"url": "https://git.invalid/linux"}, "review": {"required": 1, "allowSelf": true}}});
        self.create::<AetherSource>("paula", source).await;
        let revision = json!({"name": "r1", "root": self.root.to_string(), "files": 1, "bytes": 1,
            "commit": "c0ffee", "time": "2026-01-01T00:00:00Z", "milliseconds": 1});
        self.patch_status::<AetherSource>("linux", json!({"latest": "r1", "revisions": [revision]})).await;
        let session = json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": {"name": "fix"},
            "spec": {"source": {"name": "linux"}, "claim": "None"}});
        self.create::<AetherSession>("agent", session).await;
    }

    /// A commit from its request to its end, with whatever the others do about it.
    async fn play(&self, point: &str) {
        let name = point.replace('.', "-");
        let promotes = point == "commit.promoted";
        let git = json!({"git": {"branch": format!("agents/{name}"), "message": "mend"}});
        let target = if promotes { json!({"promote": {}}) } else { git };
        let mut operator = self.operator(point);
        let commit = json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommit", "metadata": {"name": name},
            "spec": {"session": "fix", "target": target}});
        let commit: AetherCommit = self.create("agent", commit).await;
        let ours = format!("{COMMIT_UID_LABEL}={}", commit.uid().unwrap());
        let (mut approved, mut changed) = (false, false);
        let status = until(point, async || {
            operator.revive();
            let status = self.api::<AetherCommit>().get(&name).await.unwrap().status.unwrap_or_default();
            match status.phase {
                Some(CommitPhase::AwaitingApproval) if !approved => {
                    approved = true;
                    self.approve(&name, &status).await;
                }
                Some(CommitPhase::Running) => {
                    let jobs = self.list::<Job>(&ours).await?;
                    match jobs.iter().find(|job| job.uid() == status.job_uid) {
                        // The source is changed while the first Job runs, so that this is not believed any more.
                        Some(_) if point == "commit.job.deleted" && !changed => {
                            changed = true;
                            self.patch::<AetherSource>("linux", json!({"spec": {"git": {"lfs": true}}})).await;
                        }
                        Some(job) => self.run(job).await,
                        None => {}
                    }
                }
                Some(CommitPhase::Succeeded) if operator.deaths == 1 => return Ok(status),
                _ => {}
            }
            Err(format!("{} deaths, {:?} {:?}: {}", operator.deaths, status.phase, status.conditions, operator.said()))
        })
        .await;
        assert!(operator.said().contains(&format!("crash point {point}\n")), "{point}: {}", operator.said());

        let checkpoints = self.list::<AetherCheckpoint>(&ours).await.unwrap();
        assert_eq!(checkpoints.len(), 1, "{point}: checkpoints");
        assert_eq!((status.checkpoint, status.root.is_some()), (checkpoints[0].metadata.name.clone(), true), "{point}");
        assert_eq!(status.approvals.unwrap().by, ["jane"], "{point}");
        let jobs = self.list::<Job>(&ours).await.unwrap();
        assert_eq!(jobs.len(), usize::from(!promotes), "{point}: Jobs");
        assert_eq!(status.retries, changed.then_some(1), "{point}: more Jobs");
        let source = self.api::<AetherSource>().get("linux").await.unwrap().status.unwrap();
        let promoted = source
            .revisions
            .iter()
            .filter(|revision| revision.promoted.as_ref().is_some_and(|mark| mark.contains(&format!("/{name} "))))
            .count();
        if promotes {
            assert_eq!((promoted, status.revision), (1, source.latest), "{point}: revisions");
        } else {
            assert_eq!((promoted, status.commit.as_deref()), (0, Some("f00d")), "{point}");
        }
    }

    async fn approve(&self, commit: &str, status: &AetherCommitStatus) {
        let approval = json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherApproval",
            "metadata": {"generateName": format!("{commit}-")},
            "spec": {"commit": commit, "root": status.root, "decision": "Approve"}});
        self.create::<AetherApproval>("jane", approval).await;
    }

    /// What Kubernetes does with a Job that succeeds.
    async fn run(&self, job: &Job) {
        let template = job.spec.as_ref().unwrap().template.clone();
        let mut pod = Pod { metadata: template.metadata.unwrap_or_default(), spec: template.spec, ..Pod::default() };
        let name = format!("{}-x", job.name_any());
        pod.metadata.name = Some(name.clone());
        pod.labels_mut().insert("job-name".into(), job.name_any());
        pod.metadata.owner_references = job.controller_owner_ref(&()).map(|owner| vec![owner]);
        if self.api::<Pod>().get_opt(&name).await.unwrap().is_none() {
            self.api().create(&PostParams::default(), &pod).await.unwrap();
            let state = json!({"terminated": {"exitCode": 0, "message": PUSHED}});
            let ended = json!({"phase": "Succeeded", "containerStatuses": [{"name": "committer", "image": "", "imageID": "",
                "ready": false, "restartCount": 0, "state": state}]});
            self.patch_status::<Pod>(&name, ended).await;
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_it_goes_on() {
    let world = World::start().await;
    world.settle().await;
    for point in POINTS {
        world.play(point).await;
    }
}
