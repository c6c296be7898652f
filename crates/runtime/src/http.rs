//! The endpoints that the kubelet and Prometheus ask: `/healthz`, `/readyz`, `/metrics`.

use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{Metrics, Readiness};

/// Content type of the OpenMetrics text format 1.0.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The three routes, to be served here or merged into another router. `/healthz` answers as long as the process gets to
/// answer at all; `/readyz` answers 503 and names the parts that are not ready.
pub fn routes(readiness: Readiness, metrics: Metrics) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route(
            "/readyz",
            get(async move || {
                let state = readiness.state();
                let code = if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                (code, format!("{state}\n"))
            }),
        )
        .route("/metrics", get(async move || ([(header::CONTENT_TYPE, OPENMETRICS)], metrics.render()).into_response()))
}

/// Serves `router` on `address` until the token is cancelled, then finishes the requests that have begun.
///
/// # Errors
/// When the address cannot be bound, or accepting fails for good.
pub async fn serve(address: SocketAddr, router: Router, token: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    info!(address = %listener.local_addr().unwrap_or(address), "serving health and metrics");
    axum::serve(listener, router)
        .with_graceful_shutdown(token.cancelled_owned())
        .await
        .context("serving health and metrics")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt;

    async fn ask(router: &Router, path: &str) -> (StatusCode, String) {
        let response = router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn answers() {
        let (readiness, metrics) = (Readiness::new(), Metrics::new());
        let part = readiness.part("store");
        metrics.counter("aether_things", "Things done").inc();
        let router = routes(readiness, metrics);
        assert_eq!(ask(&router, "/healthz").await, (StatusCode::OK, "ok\n".into()));
        assert_eq!(ask(&router, "/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, "store: starting\n".into()));
        part.ready();
        assert_eq!(ask(&router, "/readyz").await, (StatusCode::OK, "ready\n".into()));
        assert!(ask(&router, "/metrics").await.1.contains("aether_things_total 1\n"));
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = serve(address, Router::new(), CancellationToken::new()).await.unwrap_err();
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }

    #[tokio::test]
    async fn ends_with_the_token() {
        let token = CancellationToken::new();
        token.cancel();
        serve("127.0.0.1:0".parse().unwrap(), Router::new(), token).await.unwrap();
    }
}
