//! The CSI Identity service: who this driver is, and whether it is ready.

use std::collections::HashMap;

use aether_api::names;
use aether_proto::csi::v1::identity_server::Identity;
use aether_proto::csi::v1::plugin_capability::{self, service};
use aether_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use aether_runtime::Readiness;
use tonic::{Request, Response, Status};

/// Answers for [`names::CSI_DRIVER`]. On a node it advertises no plugin capability: the Controller service is another process, and there
/// is no topology, because a session can be mounted anywhere.
#[derive(Clone, Debug)]
pub(crate) struct IdentityService {
    readiness: Readiness,
    controller: bool,
}

impl IdentityService {
    /// Ready when `readiness` is.
    #[must_use]
    pub(crate) fn new(readiness: Readiness) -> Self {
        IdentityService { readiness, controller: false }
    }

    /// With the Controller service beside it.
    #[must_use]
    pub(crate) fn with_controller(self) -> Self {
        Self { controller: true, ..self }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: names::CSI_DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| PluginCapability {
            r#type: Some(plugin_capability::Type::Service(plugin_capability::Service { r#type: kind.into() })),
        };
        let capabilities = self.controller.then(|| service(service::Type::ControllerService)).into_iter().collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.readiness.state().is_ready()) }))
    }
}
