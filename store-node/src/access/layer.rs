//! Every call passes here before it takes one of the places of those that are served.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service, ServiceExt};

use super::Access;

/// Lets pass whom [`Access`] admits; everybody when there is none.
#[derive(Clone)]
pub struct AccessLayer(Option<Arc<Access>>);

impl AccessLayer {
    /// A layer that asks `access`.
    #[must_use]
    pub fn new(access: Option<Access>) -> Self {
        Self(access.map(Arc::new))
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, access: self.0.clone() }
    }
}

/// A service behind the layer.
#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    access: Option<Arc<Access>>,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    /// Always: who has to wait is known when the call is admitted.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (inner, access) = (self.inner.clone(), self.access.clone());
        Box::pin(async move {
            if let Some(access) = access
                && let Err(status) = access.admit(request.uri().path(), request.headers()).await
            {
                return Ok(status.into_http());
            }
            inner.oneshot(request).await
        })
    }
}
