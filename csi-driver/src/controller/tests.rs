//! The service over a real socket, with an API server in memory: what a conformance suite asks of every driver, then
//! what is particular to ours. The operator and the nodes are played by the test.

use std::collections::HashMap;
use std::path::PathBuf;

use aether_api::conditions::{self, FAILED, READY, Wanted, reason};
use aether_api::session::{Base, ClaimPolicy, Durability, Owner};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus, AetherSession, names};
use aether_proto::csi::v1::controller_client::ControllerClient;
use aether_proto::csi::v1::identity_client::IdentityClient;
use aether_testkit::ApiServer;
use csi::volume_capability::access_mode::Mode;
use csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::*;

const GIBI: i64 = 1 << 30;

/// The service, and who calls it.
struct Setup {
    server: ApiServer,
    client: ControllerClient<Channel>,
    identity: IdentityClient<Channel>,
    /// Ends the service when dropped.
    _tasks: Tasks,
    _directory: tempfile::TempDir,
}

impl Setup {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("csi.sock");
        let (server, tasks) = (ApiServer::new(), Tasks::new());
        let controller = Controller::new(server.client(), tasks.token(Stage::Intake));
        serve(controller, Socket::bind(&path).unwrap(), Readiness::new(), &tasks);
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        let (client, identity) = (ControllerClient::new(channel.clone()), IdentityClient::new(channel));
        Self { server, client, identity, _tasks: tasks, _directory: directory }
    }

    /// From here on every session that is made starts at once, and every checkpoint is taken.
    fn all_goes_well(&self) {
        tokio::spawn(settle(self.server.clone()));
    }

    async fn create(&mut self, request: csi::CreateVolumeRequest) -> Result<csi::Volume, Status> {
        Ok(self.client.create_volume(request).await?.into_inner().volume.unwrap())
    }

    async fn snapshot(&mut self, name: &str, volume: &str) -> Result<csi::Snapshot, Status> {
        let request =
            csi::CreateSnapshotRequest { name: name.into(), source_volume_id: volume.into(), ..Default::default() };
        Ok(self.client.create_snapshot(request).await?.into_inner().snapshot.unwrap())
    }

    async fn list(&mut self, request: csi::ListSnapshotsRequest) -> Result<(Vec<String>, String), Status> {
        let answer = self.client.list_snapshots(request).await?.into_inner();
        let ids = answer.entries.into_iter().map(|entry| entry.snapshot.unwrap().snapshot_id).collect();
        Ok((ids, answer.next_token))
    }

    fn session(&self, volume: &str) -> Option<AetherSession> {
        let id = ids::Id::parse(volume).unwrap();
        self.server.get(&id.namespace, &id.name)
    }
}

/// What the operator and a node do, until the test ends.
async fn settle(server: ApiServer) {
    loop {
        for session in server.all::<AetherSession>() {
            if session.status.is_none() {
                server.change("team", &session.name_any(), |session: &mut AetherSession| {
                    session.status.get_or_insert_default().base = Some(base());
                });
            }
        }
        for checkpoint in server.all::<AetherCheckpoint>() {
            if checkpoint.status.is_none() {
                server.change("team", &checkpoint.name_any(), |checkpoint: &mut AetherCheckpoint| {
                    checkpoint.status = Some(taken(Durability::Local));
                });
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn base() -> Base {
    Base {
        root: Some("ab/1".into()),
        source_namespace: None,
        source_name: None,
        revision: None,
        revision_root: None,
        commit: None,
        owner: Owner { uid: 1000, gid: 1000 },
    }
}

fn taken(durability: Durability) -> AetherCheckpointStatus {
    AetherCheckpointStatus {
        durability: Some(durability),
        local_time: Some(Time(Timestamp::from_second(1_700_000_000).unwrap())),
        ..AetherCheckpointStatus::default()
    }
}

fn writable() -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

fn block() -> csi::VolumeCapability {
    csi::VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..writable() }
}

fn parameters(more: &[(&str, &str)]) -> HashMap<String, String> {
    let claim = [("csi.storage.k8s.io/pvc/namespace", "team"), ("csi.storage.k8s.io/pvc/name", "work")];
    claim.iter().chain(more).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn volume(name: &str) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 10 * GIBI, limit_bytes: 0 }),
        volume_capabilities: vec![writable()],
        parameters: parameters(&[("source", "platform/linux")]),
        ..Default::default()
    }
}

fn from(name: &str, content: csi::volume_content_source::Type) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        volume_content_source: Some(csi::VolumeContentSource { r#type: Some(content) }),
        parameters: parameters(&[]),
        ..volume(name)
    }
}

fn from_volume(name: &str, volume_id: &str) -> csi::CreateVolumeRequest {
    let volume_id = volume_id.into();
    from(name, csi::volume_content_source::Type::Volume(csi::volume_content_source::VolumeSource { volume_id }))
}

fn from_snapshot(name: &str, snapshot_id: &str) -> csi::CreateVolumeRequest {
    let snapshot_id = snapshot_id.into();
    from(name, csi::volume_content_source::Type::Snapshot(csi::volume_content_source::SnapshotSource { snapshot_id }))
}

fn limited<T>(message: T, milliseconds: u64) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_millis(milliseconds));
    request
}

/// The code and the text of a refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, word: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(word), "{status:?}");
}

#[tokio::test]
async fn the_plugin_says_what_it_serves() {
    let mut setup = Setup::new().await;
    let plugin =
        setup.identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(plugin.capabilities.len(), 1);
    let served = setup
        .client
        .controller_get_capabilities(csi::ControllerGetCapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner()
        .capabilities;
    assert_eq!(served.len(), 5);
    // Nothing that is not among them.
    refused(setup.client.list_volumes(csi::ListVolumesRequest::default()).await, Code::Unimplemented, "AetherSessions");
    let expand = csi::ControllerExpandVolumeRequest::default();
    refused(setup.client.controller_expand_volume(expand).await, Code::Unimplemented, "expanded");
}

#[tokio::test]
async fn what_a_call_lacks_is_named() {
    let mut setup = Setup::new().await;
    for (request, word) in [
        (volume(""), "name"),
        (csi::CreateVolumeRequest { volume_capabilities: vec![], ..volume("a") }, "volume_capabilities"),
        (csi::CreateVolumeRequest { volume_capabilities: vec![writable(), block()], ..volume("a") }, "Block"),
        (csi::CreateVolumeRequest { parameters: HashMap::new(), ..volume("a") }, "--extra-create-metadata"),
        (csi::CreateVolumeRequest { parameters: parameters(&[]), ..volume("a") }, "aether-operator"),
        (csi::CreateVolumeRequest { parameters: parameters(&[("source", "a/b/c")]), ..volume("a") }, "NAMESPACE/NAME"),
        (csi::CreateVolumeRequest { parameters: parameters(&[("sauce", "x")]), ..volume("a") }, "sauce"),
        (
            csi::CreateVolumeRequest { parameters: parameters(&[("source", "x"), ("owner", "me")]), ..volume("a") },
            "UID:GID",
        ),
    ] {
        refused(setup.create(request).await, Code::InvalidArgument, word);
    }
    let range = csi::CapacityRange { required_bytes: 2, limit_bytes: 1 };
    let impossible = csi::CreateVolumeRequest { capacity_range: Some(range), ..volume("a") };
    refused(setup.create(impossible).await, Code::OutOfRange, "capacity_range");
    refused(setup.client.delete_volume(csi::DeleteVolumeRequest::default()).await, Code::InvalidArgument, "volume_id");
    refused(setup.snapshot("", "team/a").await, Code::InvalidArgument, "name");
    refused(setup.snapshot("a", "").await, Code::InvalidArgument, "source_volume_id");
    let nothing = csi::DeleteSnapshotRequest::default();
    refused(setup.client.delete_snapshot(nothing).await, Code::InvalidArgument, "snapshot_id");
    let negative = csi::ListSnapshotsRequest { max_entries: -1, ..Default::default() };
    refused(setup.list(negative).await, Code::InvalidArgument, "max_entries");
    let validate = csi::ValidateVolumeCapabilitiesRequest::default();
    refused(setup.client.validate_volume_capabilities(validate).await, Code::InvalidArgument, "volume_id");
    let validate = csi::ValidateVolumeCapabilitiesRequest { volume_id: "team/a".into(), ..Default::default() };
    refused(setup.client.validate_volume_capabilities(validate).await, Code::InvalidArgument, "volume_capabilities");
    assert!(setup.server.all::<AetherSession>().is_empty() && setup.server.all::<AetherCheckpoint>().is_empty());
}

#[tokio::test]
async fn what_is_not_there_is_said_and_what_is_gone_is_deleted() {
    let mut setup = Setup::new().await;
    refused(setup.snapshot("s", "team/absent").await, Code::NotFound, "team/absent");
    refused(setup.create(from_volume("v", "team/absent")).await, Code::NotFound, "team/absent");
    refused(setup.create(from_snapshot("v", "no such id")).await, Code::NotFound, "no such id");
    let validate = csi::ValidateVolumeCapabilitiesRequest {
        volume_id: "team/absent".into(),
        volume_capabilities: vec![writable()],
        ..Default::default()
    };
    refused(setup.client.validate_volume_capabilities(validate).await, Code::NotFound, "team/absent");
    for id in ["team/absent", "aether-6a3f", "some other driver's"] {
        let request = csi::DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        setup.client.delete_volume(request).await.unwrap();
        let request = csi::DeleteSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
        setup.client.delete_snapshot(request).await.unwrap();
        let unknown = csi::ListSnapshotsRequest { snapshot_id: id.into(), ..Default::default() };
        assert_eq!(setup.list(unknown).await.unwrap(), (vec![], String::new()));
    }
}

#[tokio::test]
async fn a_volume_is_a_session_and_asking_again_changes_nothing() {
    let mut setup = Setup::new().await;
    setup.all_goes_well();
    let made = setup.create(volume("pvc-1")).await.unwrap();
    assert_eq!((made.volume_id.as_str(), made.capacity_bytes), ("team/pvc-1", 10 * GIBI));
    let session = setup.session(&made.volume_id).unwrap();
    let source = session.spec.source.clone().unwrap();
    assert_eq!((source.namespace.as_deref(), source.name.as_str()), (Some("platform"), "linux"));
    let limit = session.spec.limits.as_ref().and_then(|limits| limits.parsed_bytes().unwrap());
    assert_eq!(limit, Some(10 * GIBI.cast_unsigned()), "what a claim asks for is what its session may write");
    assert_eq!(session.spec.claim, ClaimPolicy::None, "the operator makes no second volume for the claim");
    // What the node's part of the driver reads.
    let read = crate::volume::Volume::parse(&made.volume_context).unwrap();
    let (namespace, name, uid) = ("team".into(), "pvc-1".into(), session.uid());
    assert_eq!(read.wanted, crate::volume::Wanted::Session { namespace, name, uid });

    assert_eq!(setup.create(volume("pvc-1")).await.unwrap(), made);
    let other = |range| csi::CreateVolumeRequest { capacity_range: Some(range), ..volume("pvc-1") };
    let larger = other(csi::CapacityRange { required_bytes: 20 * GIBI, limit_bytes: 0 });
    refused(setup.create(larger).await, Code::AlreadyExists, "team/pvc-1");
    let smaller = other(csi::CapacityRange { required_bytes: GIBI, limit_bytes: 2 * GIBI });
    refused(setup.create(smaller).await, Code::AlreadyExists, "team/pvc-1");
    let elsewhere =
        csi::CreateVolumeRequest { parameters: parameters(&[("source", "platform/bsd")]), ..volume("pvc-1") };
    refused(setup.create(elsewhere).await, Code::AlreadyExists, "team/pvc-1");
    // The name of a session that a person made.
    let mut own = AetherSession::new("mine", session.spec.clone());
    own.metadata.namespace = Some("team".into());
    setup.server.put(&own);
    refused(setup.create(volume("mine")).await, Code::AlreadyExists, "team/mine");
    let foreign = csi::DeleteVolumeRequest { volume_id: "team/mine".into(), ..Default::default() };
    refused(setup.client.delete_volume(foreign).await, Code::FailedPrecondition, "did not make");
    // Any name will do.
    let strange = setup.create(volume("Sanity Volume, ünïque")).await.unwrap();
    assert!(strange.volume_id.starts_with("team/csi-"), "{}", strange.volume_id);
    assert!(strange.volume_id.len() <= 128, "the specification's limit");

    let validate = |capability| csi::ValidateVolumeCapabilitiesRequest {
        volume_id: made.volume_id.clone(),
        volume_capabilities: vec![capability],
        ..Default::default()
    };
    let answer = setup.client.validate_volume_capabilities(validate(writable())).await.unwrap().into_inner();
    assert!(answer.confirmed.is_some());
    let answer = setup.client.validate_volume_capabilities(validate(block())).await.unwrap().into_inner();
    assert!(answer.confirmed.is_none() && answer.message.contains("Block"), "{answer:?}");

    for _ in 0..2 {
        let request = csi::DeleteVolumeRequest { volume_id: made.volume_id.clone(), ..Default::default() };
        setup.client.delete_volume(request).await.unwrap();
        assert!(setup.session(&made.volume_id).is_none());
    }
    assert!(setup.session("team/mine").is_some());
}

#[tokio::test]
async fn a_session_that_cannot_start_is_taken_away_and_one_that_takes_its_time_is_waited_for() {
    let mut setup = Setup::new().await;
    let server = setup.server.clone();
    // The operator has refused by the time the service looks again.
    let refuse = tokio::spawn(async move {
        while server.get::<AetherSession>("team", "pvc-1").is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.change("team", "pvc-1", |session: &mut AetherSession| {
            let why =
                Wanted::no(READY, reason::NAMESPACE_NOT_ALLOWED, "source platform/linux is not for namespace team");
            conditions::set(&mut session.status.get_or_insert_default().conditions, why, None);
        });
    });
    refused(setup.create(volume("pvc-1")).await, Code::PermissionDenied, "not for namespace team");
    refuse.await.unwrap();
    assert!(setup.session("team/pvc-1").is_none(), "nothing is left of it");

    // A source that is still imported: the provisioner's time is over first, and it asks again.
    let importing = setup.client.create_volume(limited(volume("pvc-2"), 400)).await;
    refused(importing, Code::DeadlineExceeded, "team/pvc-2");
    let session = setup.session("team/pvc-2").unwrap();
    setup.all_goes_well();
    let made = setup.create(volume("pvc-2")).await.unwrap();
    assert_eq!(setup.session(&made.volume_id).unwrap().uid(), session.uid(), "the same one");
}

#[tokio::test]
async fn a_snapshot_is_a_checkpoint_and_a_volume_can_start_from_it() {
    let mut setup = Setup::new().await;
    setup.all_goes_well();
    let parent = setup.create(volume("pvc-1")).await.unwrap();
    let snapshot = setup.snapshot("snapshot-1", &parent.volume_id).await.unwrap();
    assert_eq!((snapshot.snapshot_id.as_str(), snapshot.source_volume_id.as_str()), ("team/snapshot-1", "team/pvc-1"));
    assert!(!snapshot.ready_to_use, "it is on its node only");
    assert_eq!(snapshot.creation_time.map(|time| time.seconds), Some(1_700_000_000));
    assert_eq!(setup.snapshot("snapshot-1", &parent.volume_id).await.unwrap(), snapshot);
    setup.server.change("team", "snapshot-1", |checkpoint: &mut AetherCheckpoint| {
        checkpoint.status = Some(taken(Durability::Durable));
    });
    assert!(setup.snapshot("snapshot-1", &parent.volume_id).await.unwrap().ready_to_use);

    let clone = setup.create(from_volume("pvc-2", &parent.volume_id)).await.unwrap();
    assert!(clone.content_source.is_some());
    assert_eq!(setup.session(&clone.volume_id).unwrap().spec.session.as_deref(), Some("pvc-1"));
    refused(setup.snapshot("snapshot-1", &clone.volume_id).await, Code::AlreadyExists, "team/snapshot-1");
    let restored = setup.create(from_snapshot("pvc-3", &snapshot.snapshot_id)).await.unwrap();
    assert_eq!(setup.session(&restored.volume_id).unwrap().spec.checkpoint.as_deref(), Some("snapshot-1"));
    let mut foreign = from_snapshot("pvc-4", &snapshot.snapshot_id);
    foreign.parameters.insert("csi.storage.k8s.io/pvc/namespace".into(), "other".into());
    refused(setup.create(foreign).await, Code::PermissionDenied, "namespace other");

    let request = csi::DeleteSnapshotRequest { snapshot_id: snapshot.snapshot_id.clone(), ..Default::default() };
    for _ in 0..2 {
        setup.client.delete_snapshot(request.clone()).await.unwrap();
        assert!(setup.server.all::<AetherCheckpoint>().is_empty());
    }
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_nothing_and_one_without_time_is_asked_for_again() {
    let mut setup = Setup::new().await;
    let mut session = AetherSession::new("fix", Default::default());
    session.metadata.namespace = Some("team".into());
    setup.server.put(&session);
    let request =
        csi::CreateSnapshotRequest { name: "one".into(), source_volume_id: "team/fix".into(), ..Default::default() };
    refused(setup.client.create_snapshot(limited(request, 400)).await, Code::DeadlineExceeded, "team/one");
    setup.server.change("team", "one", |checkpoint: &mut AetherCheckpoint| {
        let failed = Wanted::yes(FAILED, reason::NODE_FAILED, "node a lost it");
        conditions::set(&mut checkpoint.status.get_or_insert_default().conditions, failed, None);
    });
    refused(setup.snapshot("one", "team/fix").await, Code::FailedPrecondition, "node a lost it");
    assert!(setup.server.all::<AetherCheckpoint>().is_empty());
}

#[tokio::test]
async fn snapshots_are_listed_page_by_page() {
    let mut setup = Setup::new().await;
    setup.all_goes_well();
    let (one, two) = (setup.create(volume("pvc-1")).await.unwrap(), setup.create(volume("pvc-2")).await.unwrap());
    for (name, volume) in [("s-1", &one), ("s-2", &two), ("s-3", &one), ("s-4", &two), ("s-5", &one)] {
        setup.snapshot(name, &volume.volume_id).await.unwrap();
    }
    let all = csi::ListSnapshotsRequest::default();
    let ids = |names: &[&str]| names.iter().map(|name| format!("team/{name}")).collect::<Vec<_>>();
    assert_eq!(setup.list(all.clone()).await.unwrap(), (ids(&["s-1", "s-2", "s-3", "s-4", "s-5"]), String::new()));
    let of_one = csi::ListSnapshotsRequest { source_volume_id: one.volume_id.clone(), ..all.clone() };
    assert_eq!(setup.list(of_one).await.unwrap().0, ids(&["s-1", "s-3", "s-5"]));
    let exactly = csi::ListSnapshotsRequest { snapshot_id: "team/s-4".into(), ..all.clone() };
    assert_eq!(setup.list(exactly).await.unwrap(), (ids(&["s-4"]), String::new()));

    let mut page = csi::ListSnapshotsRequest { max_entries: 2, ..all };
    let mut seen = Vec::new();
    loop {
        let (found, next) = setup.list(page.clone()).await.unwrap();
        assert!(found.len() <= 2);
        seen.extend(found);
        // One that is deleted between two pages moves no other.
        let gone = csi::DeleteSnapshotRequest { snapshot_id: "team/s-1".into(), ..Default::default() };
        setup.client.delete_snapshot(gone).await.unwrap();
        if next.is_empty() {
            break;
        }
        page.starting_token = next;
    }
    assert_eq!(seen, ids(&["s-1", "s-2", "s-3", "s-4", "s-5"]));
    page.starting_token = "nonsense".into();
    refused(setup.list(page).await, Code::Aborted, "nonsense");
}

/// The volume of a session's own claim, which the operator made, can be snapshotted and cloned like any other.
#[tokio::test]
async fn the_operators_volumes_are_known_and_never_deleted() {
    let mut setup = Setup::new().await;
    setup.all_goes_well();
    let mut session = AetherSession::new("fix", Default::default());
    session.metadata.namespace = Some("team".into());
    session.metadata.uid = Some("6a3f".into());
    setup.server.put(&session);
    let id = names::volume_name("6a3f");
    let volume: PersistentVolume = serde_json::from_value(json!({
        "metadata": {"name": id},
        "spec": {"csi": {"driver": names::CSI_DRIVER, "volumeHandle": id, "volumeAttributes": {
            names::ATTRIBUTE_NAMESPACE: "team", names::ATTRIBUTE_SESSION: "fix", names::ATTRIBUTE_SESSION_UID: "6a3f",
        }}},
    }))
    .unwrap();
    setup.server.put(&volume);

    let snapshot = setup.snapshot("snapshot-1", &id).await.unwrap();
    assert_eq!((snapshot.snapshot_id.as_str(), snapshot.source_volume_id.as_str()), ("team/snapshot-1", id.as_str()));
    let clone = setup.create(from_volume("pvc-2", &id)).await.unwrap();
    assert_eq!(setup.session(&clone.volume_id).unwrap().spec.session.as_deref(), Some("fix"));
    let request = csi::DeleteVolumeRequest { volume_id: id.clone(), ..Default::default() };
    refused(setup.client.delete_volume(request).await, Code::FailedPrecondition, "team/fix");
    assert!(setup.session("team/fix").is_some());

    // A checkpoint that a person took is a snapshot too, and theirs to delete.
    let mut own = AetherCheckpoint::new("mine", AetherCheckpointSpec { session: "fix".into(), ..Default::default() });
    own.metadata.namespace = Some("team".into());
    own.status = Some(AetherCheckpointStatus { session_uid: Some("6a3f".into()), ..taken(Durability::Durable) });
    setup.server.put(&own);
    let of_it = csi::ListSnapshotsRequest { source_volume_id: id.clone(), ..Default::default() };
    assert_eq!(setup.list(of_it).await.unwrap().0, ["team/mine", "team/snapshot-1"]);
    setup.create(from_snapshot("pvc-3", "team/mine")).await.unwrap();
    let delete = csi::DeleteSnapshotRequest { snapshot_id: "team/mine".into(), ..Default::default() };
    refused(setup.client.delete_snapshot(delete).await, Code::FailedPrecondition, "Retain");

    // Made anew under the same name, it is another volume.
    setup.server.remove::<AetherSession>("team", "fix");
    session.metadata.uid = Some("other".into());
    setup.server.put(&session);
    refused(setup.snapshot("snapshot-2", &id).await, Code::NotFound, &id);
}
