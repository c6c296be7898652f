//! The CSI Controller service, for the standard sidecars: a volume is an AetherSession, a snapshot an AetherCheckpoint, a
//! clone a fork. It owns no state: everything is in the API server, so that any copy of it answers alike.
//!
//! Nobody needs it to use Aether: the operator makes the volumes of sessions, and of claims of a class without parameters.
//! The claims of a class with parameter `source`, and claims with a data source, are left to this service and the
//! provisioner beside it.

mod ids;
mod snapshots;
#[cfg(test)]
mod tests;
mod volumes;

use std::time::{Duration, Instant};

use aether_proto::csi::v1 as csi;
use aether_proto::csi::v1::identity_server::IdentityServer;
use aether_runtime::{CancellationToken, Readiness, Stage, Tasks, http};
use anyhow::Context as _;
use csi::controller_server::{Controller as Service, ControllerServer};
use csi::controller_service_capability::rpc::Type as Capability;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::cluster::{Kind, Patience};
use crate::config::{ControllerArguments, patience};
use crate::failure::{Failure, Result, status_code};
use crate::identity::IdentityService;
use crate::node::{capability, volume_id};
use crate::transport::Socket;
use volumes::{Content, Wanted};

/// Between two looks at an object that is waited for. Doubled each time, from the first to the last.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Answers the provisioner and the snapshotter.
pub(crate) struct Controller {
    client: Client,
    /// Cancelled when the process ends: who waits stops waiting.
    stop: CancellationToken,
}

/// Serves on a socket until `tasks` end.
///
/// # Errors
/// What keeps it from listening.
pub(crate) async fn start(arguments: ControllerArguments, tasks: &Tasks) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let (address, routes) = (arguments.http, http::routes(readiness.clone(), aether_runtime::Metrics::new()));
    tasks.essential(Stage::Foundation, "http", move |stop| http::serve(address, routes, stop));
    let client = Client::try_default().await.context("cannot find the Kubernetes API")?;
    let path = arguments.socket();
    let socket = Socket::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    serve(Controller::new(client, tasks.token(Stage::Intake)), socket, readiness, tasks);
    Ok(())
}

fn serve(controller: Controller, socket: Socket, readiness: Readiness, tasks: &Tasks) {
    let services = Server::builder()
        .add_service(IdentityServer::new(IdentityService::new(readiness).with_controller()))
        .add_service(ControllerServer::new(controller));
    tasks.essential(Stage::Intake, "csi", move |stop| async move {
        let (incoming, _file) = socket.into_incoming();
        services.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await.context("CSI socket")
    });
}

impl Controller {
    fn new(client: Client, stop: CancellationToken) -> Self {
        Self { client, stop }
    }

    /// Looks at an object until `done` has an answer.
    async fn wait_for<K, T>(
        &self,
        api: &Api<K>,
        mut object: K,
        done: impl Fn(&K) -> Option<T>,
        patience: &Patience,
    ) -> Result<(K, T)>
    where
        K: Kind,
    {
        let (name, uid) = (object.name_any(), object.uid());
        let describe = || format!("{} {}/{name}", K::kind(&()), object.namespace().unwrap_or_default());
        let what = describe();
        let mut pause = LOOKS.0;
        loop {
            if let Some(answer) = done(&object) {
                return Ok((object, answer));
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LOOKS.1),
                _ = patience.end("") => {
                    return Err(Failure::TimedOut(format!("{what} is made and is waited for: ask again")));
                }
            }
            object = api
                .get_opt(&name)
                .await
                .map_err(Failure::api(|| format!("read {what}")))?
                .filter(|object| object.uid() == uid)
                .ok_or_else(|| Failure::Aborted(format!("{what} was deleted by somebody else: try again")))?;
        }
    }

    /// Deletes the object of that uid and no other. Gone is deleted.
    async fn delete<K: Kind>(api: &Api<K>, name: &str, uid: Option<String>) -> Result<()> {
        let only = DeleteParams {
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..DeleteParams::background()
        };
        match api.delete(name, &only).await {
            Ok(_) => Ok(()),
            Err(error) if matches!(status_code(&error), Some(404 | 409)) => Ok(()),
            Err(error) => Err(Failure::api(|| format!("delete {} {name}", K::kind(&())))(error)),
        }
    }

    fn patience<T>(&self, request: &Request<T>) -> Patience {
        let timeout = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
        Patience { deadline: Instant::now() + patience(timeout), cancelled: self.stop.clone() }
    }
}

fn required(field: &str, value: &str) -> Result<()> {
    if value.is_empty() { Err(Failure::Invalid(format!("{field} is missing"))) } else { Ok(()) }
}

/// Whether a session can be used in every one of these ways.
fn capabilities(all: &[csi::VolumeCapability]) -> Result<()> {
    if all.is_empty() {
        return Err(Failure::Invalid("volume_capabilities are missing".into()));
    }
    all.iter().try_for_each(|wanted| capability(Some(wanted)).map(drop))
}

#[tonic::async_trait]
impl Service for Controller {
    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let served = [
            Capability::CreateDeleteVolume,
            Capability::CreateDeleteSnapshot,
            Capability::ListSnapshots,
            Capability::CloneVolume,
            Capability::SingleNodeMultiWriter,
        ];
        let capabilities = served.map(|capability| csi::ControllerServiceCapability {
            r#type: Some(csi::controller_service_capability::Type::Rpc(csi::controller_service_capability::Rpc {
                r#type: capability.into(),
            })),
        });
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let patience = self.patience(&request);
        let request = request.into_inner();
        required("name", &request.name)?;
        capabilities(&request.volume_capabilities)?;
        let bytes = request.capacity_range.unwrap_or_default();
        if bytes.required_bytes < 0
            || bytes.limit_bytes < 0
            || bytes.limit_bytes > 0 && bytes.required_bytes > bytes.limit_bytes
        {
            let (least, most) = (bytes.required_bytes, bytes.limit_bytes);
            return Err(Status::out_of_range(format!("capacity_range from {least} to {most} bytes has nothing in it")));
        }
        let content = match request.volume_content_source.as_ref().map(|source| source.r#type.as_ref()) {
            None => Content::Parameters,
            Some(Some(csi::volume_content_source::Type::Snapshot(source))) => {
                Content::Snapshot(source.snapshot_id.clone())
            }
            Some(Some(csi::volume_content_source::Type::Volume(source))) => Content::Volume(source.volume_id.clone()),
            Some(None) => return Err(Status::invalid_argument("volume_content_source is of an unknown kind")),
        };
        let wanted = Wanted { name: &request.name, bytes, parameters: &request.parameters, content };
        let session = self.create_volume(wanted, &patience).await?;
        let volume = csi::Volume {
            capacity_bytes: volumes::capacity(&session),
            volume_id: ids::Id { namespace: session.namespace().unwrap_or_default(), name: session.name_any() }
                .to_string(),
            volume_context: volumes::context(&session),
            content_source: request.volume_content_source,
            accessible_topology: Vec::new(),
        };
        Ok(Response::new(csi::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        self.delete_volume(&request.volume_id).await?;
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        required("volume_capabilities", if request.volume_capabilities.is_empty() { "" } else { "given" })?;
        let session = self.session(&request.volume_id).await?;
        session.ok_or_else(|| volumes::no_such("volume", &request.volume_id))?;
        Ok(Response::new(match capabilities(&request.volume_capabilities) {
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(why) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message: why.to_string() },
        }))
    }

    async fn create_snapshot(
        &self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        let patience = self.patience(&request);
        let request = request.into_inner();
        required("name", &request.name)?;
        required("source_volume_id", &request.source_volume_id)?;
        let (name, volume) = (&request.name, &request.source_volume_id);
        let snapshot = self.create_snapshot(name, volume, &request.parameters, &patience).await?;
        Ok(Response::new(csi::CreateSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        required("snapshot_id", &request.snapshot_id)?;
        self.delete_snapshot(&request.snapshot_id).await?;
        Ok(Response::new(csi::DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        let request = request.into_inner();
        let most = usize::try_from(request.max_entries)
            .map_err(|_| Failure::Invalid(format!("max_entries {} is negative", request.max_entries)))?;
        let (found, next_token) =
            self.list_snapshots(&request.snapshot_id, &request.source_volume_id, &request.starting_token, most).await?;
        let entries = found
            .into_iter()
            .map(|snapshot| csi::list_snapshots_response::Entry { snapshot: Some(snapshot) })
            .collect();
        Ok(Response::new(csi::ListSnapshotsResponse { entries, next_token }))
    }

    async fn controller_publish_volume(
        &self,
        _: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        Err(unserved("a session is not attached to a node before a pod mounts it"))
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        Err(unserved("a session is not attached to a node before a pod mounts it"))
    }

    async fn list_volumes(
        &self,
        _: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        Err(unserved("list AetherSessions instead"))
    }

    async fn get_capacity(
        &self,
        _: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        Err(unserved("nothing is set aside for a session, so no capacity is counted"))
    }

    async fn controller_expand_volume(
        &self,
        _: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        Err(unserved("a session is not expanded through its claim"))
    }

    async fn controller_get_volume(
        &self,
        _: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        Err(unserved("read the AetherSession instead"))
    }

    async fn controller_modify_volume(
        &self,
        _: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        Err(unserved("change the AetherSession instead"))
    }
}

/// What is not among the capabilities.
fn unserved(why: &str) -> Status {
    Status::unimplemented(why)
}
