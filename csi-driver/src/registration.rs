//! Introduces the driver to the kubelet, which watches a directory for sockets that serve the Registration service.
//!
//! The kubelet asks for the driver's name and CSI socket, calls that, and tells how it went. The socket is bound last,
//! when the CSI socket already answers, and removed at the end, which takes the driver off the node. A kubelet that
//! restarts finds the socket by itself; a driver that restarts binds it anew, which the kubelet sees as a new plugin.

use std::path::{Path, PathBuf};
use std::time::Duration;

use aether_api::names::CSI_DRIVER;
use aether_proto::registration::registration_server::{Registration, RegistrationServer};
use aether_proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use anyhow::{Context, anyhow};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tracing::{error, info};

use crate::transport::Socket;

/// Type of a CSI plugin, as the kubelet spells it.
const PLUGIN_TYPE: &str = "CSIPlugin";

/// The version of CSI the kubelet looks for: it takes the highest whose major number it knows.
const CSI_VERSION: &str = "1.0.0";

/// How long an answer that has begun may still take when the server ends.
const LINGER: Duration = Duration::from_secs(2);

/// Where the kubelet looks for plugins and finds their sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paths {
    /// Serves Identity and Node, as this process sees it.
    pub csi: PathBuf,
    /// Serves Registration, as this process sees it.
    pub registration: PathBuf,
    /// The CSI socket as the kubelet sees it.
    pub endpoint: PathBuf,
}

impl Paths {
    /// For a kubelet whose root directory, usually `/var/lib/kubelet`, is at the same path here.
    #[must_use]
    pub(crate) fn below(kubelet: &Path) -> Paths {
        let csi = kubelet.join("plugins").join(CSI_DRIVER).join("csi.sock");
        let registration = kubelet.join("plugins_registry").join(format!("{CSI_DRIVER}-reg.sock"));
        Paths { endpoint: csi.clone(), csi, registration }
    }
}

/// Serves registration until the token is cancelled.
///
/// # Errors
/// When the socket cannot be bound, or the kubelet says that it did not take the driver: the process should end, so that
/// its restart is a new attempt.
pub(crate) async fn serve(paths: &Paths, token: CancellationToken) -> anyhow::Result<()> {
    let (incoming, file) = Socket::bind(&paths.registration)?.into_incoming();
    let (refused, mut refusal) = watch::channel(None);
    let service = Service { endpoint: paths.endpoint.display().to_string(), refused };
    let ended = token.child_token();
    let server = Server::builder()
        .add_service(RegistrationServer::new(service))
        .serve_with_incoming_shutdown(incoming, ended.clone().cancelled_owned());
    info!(socket = %file.path().display(), "waiting for the kubelet");
    tokio::pin!(server);
    let reason = tokio::select! {
        result = &mut server => return result.context("serving registration"),
        reason = refusal.wait_for(Option::is_some) => reason.ok().and_then(|reason| reason.clone()),
        () = token.cancelled() => None,
    };
    ended.cancel();
    // The kubelet keeps its connection as long as it likes; what counts is that it got its answer.
    let _ = tokio::time::timeout(LINGER, server).await;
    match reason {
        Some(reason) => Err(anyhow!("the kubelet refused to register {CSI_DRIVER}: {reason}")),
        None => Ok(()),
    }
}

struct Service {
    endpoint: String,
    /// Gets the reason of the kubelet's refusal.
    refused: watch::Sender<Option<String>>,
}

#[tonic::async_trait]
impl Registration for Service {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.into(),
            name: CSI_DRIVER.into(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![CSI_VERSION.into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            info!(driver = CSI_DRIVER, "registered with the kubelet");
        } else {
            error!(driver = CSI_DRIVER, "the kubelet refused to register the driver: {}", status.error);
            self.refused.send_replace(Some(status.error));
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
