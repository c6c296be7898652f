//! The store node: a local store served over Bazel's Remote Execution API, with administration beside it.
//!
//! The binary is a thin shell around this library; tests run [`serve`] in their own process.

pub mod access;
pub mod commands;
pub mod config;
pub mod limits;
pub mod metrics;
pub mod page_token;
mod service;
pub mod tiered;
pub mod upkeep;

use std::time::Duration;

use aether_proto::store::v1::store_admin_server::StoreAdminServer;
use aether_runtime::CancellationToken;
use anyhow::Context;
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        capabilities_server::CapabilitiesServer, content_addressable_storage_server::ContentAddressableStorageServer,
    },
    google::bytestream::byte_stream_server::ByteStreamServer,
};
use tokio::net::TcpListener;
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    access::{Access, AccessLayer, Tls},
    limits::Places,
    metrics::StoreMetrics,
    service::{
        MAX_ANSWER_BYTES, admin::AdminService, bytestream::ByteStreamService, capabilities::CapabilitiesService,
        cas::CasService,
    },
    tiered::TieredStore,
};

/// Who may talk to the node, and how. By default everybody, in the clear: for trials on one machine.
#[derive(Default)]
pub struct Guard {
    /// By TLS only, when it is there.
    pub tls: Option<Tls>,
    /// Whoever this admits, when it is there.
    pub access: Option<Access>,
}

/// Serves `store` on `listener`, behind `guard`, until the token is cancelled, then finishes the calls that have begun.
///
/// # Errors
/// When accepting connections fails for good.
pub async fn serve(
    listener: TcpListener,
    store: impl Into<TieredStore>,
    metrics: StoreMetrics,
    guard: Guard,
    token: CancellationToken,
) -> anyhow::Result<()> {
    let store: TieredStore = store.into();
    let cas = CasService::new(store.clone(), metrics.clone());
    let bytes = ByteStreamService::new(store.clone(), metrics.clone());
    let collecting = bytes.collect();
    let admin = AdminService::new(store, metrics);
    let router = Server::builder()
        // First: who is refused takes no place from others.
        .layer(AccessLayer::new(guard.access))
        .layer(Places::new())
        .max_concurrent_streams(limits::STREAMS)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .add_service(
            CapabilitiesServer::new(CapabilitiesService).max_decoding_message_size(limits::QUESTION_MESSAGE_BYTES),
        )
        .add_service(
            ContentAddressableStorageServer::new(cas)
                .max_decoding_message_size(limits::CALL_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_ANSWER_BYTES),
        )
        .add_service(ByteStreamServer::new(bytes).max_decoding_message_size(limits::PIECE_MESSAGE_BYTES))
        .add_service(StoreAdminServer::new(admin).max_decoding_message_size(limits::ADMIN_MESSAGE_BYTES));
    let stop = token.cancelled_owned();
    let serving = async {
        match guard.tls {
            Some(tls) => router.serve_with_incoming_shutdown(tls.accept(listener), stop).await,
            None => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                router.serve_with_incoming_shutdown(incoming, stop).await
            }
        }
    };
    tokio::select! {
        served = serving => served.context("serving the store"),
        never = collecting => match never {},
    }
}
