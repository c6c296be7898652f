//! Who may talk to the store: by TLS, with a token that Kubernetes gave to a service account for this store, and only
//! what the list grants to that account.
//!
//! Any creator of a pod can have a token for any audience made for the pod's own service account, so a good token says
//! who somebody is and nothing more; the list says what he may do. Whoever knows a digest does not get its content by it.
//! Every call is asked for its token; a call that has begun is finished.

mod cache;
mod claims;
mod grant;
mod layer;
mod permission;
mod reviews;
mod tls;

use aether_credentials::AUDIENCE;
use aether_runtime::Metrics;
use aether_runtime::metrics::{Counter, Labelled};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use tonic::{Code, Status};

pub use grant::Grant;
pub use layer::AccessLayer;
pub use permission::Permission;
pub use reviews::{Reviews, Times};
pub use tls::Tls;

aether_runtime::label! {
    /// Why a call was refused.
    pub enum Refusal: "reason" {
        /// It is not known who calls.
        Unauthenticated = "unauthenticated",
        /// The caller may not do this.
        Denied = "denied",
        /// Kubernetes could not be asked.
        Unavailable = "unavailable",
    }
}

/// Decides about calls.
pub struct Access {
    reviews: Reviews,
    grants: Vec<Grant>,
    refused: Labelled<(Refusal,), Counter>,
}

impl Access {
    /// Believes `reviews` about who calls, and `grants` about what he may do.
    #[must_use]
    pub fn new(reviews: Reviews, grants: Vec<Grant>, metrics: &Metrics) -> Self {
        let refused = metrics.counters("aether_store_refused_calls", "Calls that were refused for who made them.");
        Self { reviews, grants, refused }
    }

    /// Lets a call of the method at `path` pass, or says why not.
    async fn admit(&self, path: &str, headers: &HeaderMap) -> Result<(), Status> {
        let result = self.decide(path, headers).await;
        if let Err(status) = &result {
            let reason = match status.code() {
                Code::PermissionDenied => Refusal::Denied,
                Code::Unavailable => Refusal::Unavailable,
                _ => Refusal::Unauthenticated,
            };
            self.refused.of((reason,)).inc();
            tracing::debug!(path, code = %status.code(), said = status.message(), "refused a call");
        }
        result
    }

    async fn decide(&self, path: &str, headers: &HeaderMap) -> Result<(), Status> {
        let account = self.reviews.account(token(headers)?).await?;
        let enough = permission::enough_for(path);
        let granted = |permission: &Permission| self.grants.iter().any(|grant| grant.gives(*permission, &account));
        if enough.is_empty() || enough.iter().any(granted) {
            return Ok(());
        }
        let method = path.rsplit('/').next().unwrap_or(path);
        let needed = enough[0];
        Err(Status::permission_denied(format!(
            "{account} may not call {method} of this store: it has no permission {needed}. Who may is said by the store's --allow \
             (chart value store.access.allow), for example {account}={needed}"
        )))
    }
}

/// The token of `authorization: Bearer TOKEN`.
fn token(headers: &HeaderMap) -> Result<&str, Status> {
    let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() => Ok(token.trim()),
        _ => Err(Status::unauthenticated(format!(
            "this call shows no token: the store answers service accounts with `authorization: Bearer TOKEN`, a token for audience \
             {AUDIENCE} (--store-token of Aether's programs; `kubectl create token ACCOUNT --audience {AUDIENCE}` makes one)"
        ))),
    }
}
