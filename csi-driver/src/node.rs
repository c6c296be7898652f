//! The CSI Node service: checks what a call says, hands it to [`crate::publish`], maps the result. Nothing is decided here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use aether_proto::csi::v1 as csi;
use csi::node_server::Node;
use csi::node_service_capability::rpc::Type as Capability;
use csi::volume_capability::AccessType;
use csi::volume_capability::access_mode::Mode;
use csi::volume_usage::Unit;
use tonic::{Request, Response, Status};

use crate::cluster::Patience;
use crate::config::patience;
use crate::driver::Driver;
use crate::failure::{Failure, Result};
use crate::metrics::Outcome;
use crate::publish::{Publish, Usage};
use crate::volume::Volume;

/// Answers the kubelet for one node.
pub(crate) struct NodeService {
    driver: Arc<Driver>,
}

impl NodeService {
    pub(crate) fn new(driver: Arc<Driver>) -> Self {
        Self { driver }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.driver.node().to_owned(),
            max_volumes_per_node: self.driver.config.max_volumes,
            accessible_topology: None,
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let served = [
            Capability::StageUnstageVolume,
            Capability::GetVolumeStats,
            Capability::VolumeCondition,
            Capability::ExpandVolume,
            // So that access mode ReadWriteOncePod is offered.
            Capability::SingleNodeMultiWriter,
        ];
        let capabilities = served.map(|capability| csi::NodeServiceCapability {
            r#type: Some(csi::node_service_capability::Type::Rpc(csi::node_service_capability::Rpc {
                r#type: capability.into(),
            })),
        });
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        path("staging_target_path", &request.staging_target_path)?;
        capability(request.volume_capability.as_ref())?;
        let driver = self.driver.clone();
        self.driver
            .to_the_end("stage", &request.volume_id, async move |_| driver.stage(&request.volume_context).await)
            .await?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        path("staging_target_path", &request.staging_target_path)?;
        // Stage leaves nothing at the path: images belong to trees, not to volumes.
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let begun = Instant::now();
        let timeout = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
        let deadline = begun + patience(timeout);
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        let publish = Publish {
            target: path("target_path", &request.target_path)?,
            read_only: capability(request.volume_capability.as_ref())? || request.readonly,
            volume: Volume::parse(&request.volume_context)?,
            volume_id: request.volume_id,
        };
        let driver = self.driver.clone();
        let id = publish.volume_id.clone();
        let result = self
            .driver
            .to_the_end("publish", &id, async move |cancelled| {
                driver.publish(publish, Patience { deadline, cancelled }).await
            })
            .await;
        self.driver.metrics.publish.of((Outcome::from(&result),)).observe(begun.elapsed().as_secs_f64());
        if let Err(failure) = &result {
            tracing::warn!(volume = id, error = crate::failure::chain(failure), "publish");
        }
        result?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let driver = self.driver.clone();
        self.driver.to_the_end("unpublish", &request.volume_id, async move |_| driver.unpublish(&target).await).await?;
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        let path = path("volume_path", &request.volume_path)?;
        let statistics = self.driver.statistics(&request.volume_id, &path).await?;
        let mut usage = vec![volume_usage(statistics.bytes, Unit::Bytes)];
        usage.extend(statistics.inodes.map(|inodes| volume_usage(inodes, Unit::Inodes)));
        Ok(Response::new(csi::NodeGetVolumeStatsResponse {
            usage,
            volume_condition: Some(csi::VolumeCondition {
                abnormal: statistics.abnormal.is_some(),
                message: statistics.abnormal.unwrap_or_else(|| "the session is mounted".into()),
            }),
        }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        volume_id(&request.volume_id)?;
        let path = path("volume_path", &request.volume_path)?;
        let wanted = request.capacity_range.map_or(0, |range| range.required_bytes);
        let wanted = u64::try_from(wanted)
            .map_err(|_| Failure::Invalid(format!("capacity_range.required_bytes {wanted} is negative")))?;
        let bytes = self.driver.expand(&request.volume_id, &path, wanted).await?;
        let capacity_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        Ok(Response::new(csi::NodeExpandVolumeResponse { capacity_bytes }))
    }
}

pub(crate) fn volume_id(id: &str) -> Result<()> {
    if id.is_empty() { Err(Failure::Invalid("volume_id is missing".into())) } else { Ok(()) }
}

/// An absolute path without `..`.
fn path(field: &str, text: &str) -> Result<PathBuf> {
    let path = Path::new(text);
    let plain =
        path.components().all(|part| !matches!(part, std::path::Component::ParentDir | std::path::Component::CurDir));
    if text.is_empty() {
        Err(Failure::Invalid(format!("{field} is missing")))
    } else if !path.is_absolute() || !plain {
        Err(Failure::Invalid(format!("{field} {text:?} is not an absolute path without ..")))
    } else {
        Ok(path.to_owned())
    }
}

/// Whether the capability is one of a reader.
pub(crate) fn capability(capability: Option<&csi::VolumeCapability>) -> Result<bool> {
    let capability = capability.ok_or_else(|| Failure::Invalid("volume_capability is missing".into()))?;
    match &capability.access_type {
        Some(AccessType::Mount(mount)) => {
            if !matches!(mount.fs_type.as_str(), "" | "aether" | "ext4") {
                return Err(Failure::Invalid(format!(
                    "a session has no file system of type {:?}: leave fsType out",
                    mount.fs_type
                )));
            }
            if let Some(flag) = mount.mount_flags.first() {
                return Err(Failure::Invalid(format!(
                    "mount option {flag:?} cannot be chosen: leave mountOptions out"
                )));
            }
        }
        Some(AccessType::Block(_)) => {
            return Err(Failure::Invalid("a session is a directory: volumeMode Block is not possible".into()));
        }
        None => return Err(Failure::Invalid("volume_capability has no access type".into())),
    }
    let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, csi::volume_capability::AccessMode::mode);
    match mode {
        Mode::Unknown => Err(Failure::Invalid("volume_capability has no access mode".into())),
        Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly => Ok(true),
        // Whoever writes from a second node waits for the first to let go.
        Mode::SingleNodeWriter
        | Mode::SingleNodeSingleWriter
        | Mode::SingleNodeMultiWriter
        | Mode::MultiNodeSingleWriter
        | Mode::MultiNodeMultiWriter => Ok(false),
    }
}

fn volume_usage(usage: Usage, unit: Unit) -> csi::VolumeUsage {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    csi::VolumeUsage {
        available: signed(usage.available),
        total: signed(usage.total),
        used: signed(usage.used),
        unit: unit.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(access_type: Option<AccessType>, mode: Mode) -> Result<bool> {
        capability(Some(&csi::VolumeCapability {
            access_type,
            access_mode: Some(csi::volume_capability::AccessMode { mode: mode.into() }),
        }))
    }

    fn mount(fs_type: &str, flags: &[&str]) -> Option<AccessType> {
        Some(AccessType::Mount(csi::volume_capability::MountVolume {
            fs_type: fs_type.into(),
            mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            volume_mount_group: String::new(),
        }))
    }

    #[test]
    fn capabilities_are_checked() {
        assert!(!of(mount("", &[]), Mode::SingleNodeWriter).unwrap());
        assert!(!of(mount("ext4", &[]), Mode::MultiNodeMultiWriter).unwrap());
        assert!(of(mount("", &[]), Mode::MultiNodeReaderOnly).unwrap());
        for (capability, word) in [
            (of(mount("xfs", &[]), Mode::SingleNodeWriter), "xfs"),
            (of(mount("", &["noatime"]), Mode::SingleNodeWriter), "noatime"),
            (of(Some(AccessType::Block(csi::volume_capability::BlockVolume {})), Mode::SingleNodeWriter), "Block"),
            (of(None, Mode::SingleNodeWriter), "access type"),
            (of(mount("", &[]), Mode::Unknown), "access mode"),
        ] {
            let message = capability.unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn paths_are_checked() {
        assert!(path("target_path", "/var/lib/kubelet/pods/1/mount").is_ok());
        for text in ["", "relative", "/a/../b"] {
            assert!(path("target_path", text).unwrap_err().to_string().contains("target_path"));
        }
    }
}
