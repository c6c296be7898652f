//! The CSI Identity service: who this driver is, and whether it is ready.

use std::collections::HashMap;

use aether_proto::csi::v1::identity_server::Identity;
use aether_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    ProbeRequest, ProbeResponse,
};
use aether_runtime::Readiness;
use tonic::{Request, Response, Status};

/// Name of the driver, in CSIDriver objects, volumes and socket paths.
pub(crate) const DRIVER: &str = "csi.aether.dev";

/// Answers for [`DRIVER`]. It advertises no plugin capability: there is no Controller service, because the operator makes
/// volumes through the Kubernetes API and no sidecar is needed, and no topology, because a session can be mounted anywhere.
#[derive(Clone, Debug)]
pub(crate) struct IdentityService {
    readiness: Readiness,
}

impl IdentityService {
    /// Ready when `readiness` is.
    #[must_use]
    pub(crate) fn new(readiness: Readiness) -> Self {
        IdentityService { readiness }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities: Vec::new() }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.readiness.state().is_ready()) }))
    }
}
