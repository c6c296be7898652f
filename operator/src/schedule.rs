//! When to look at an object again, and the end of requests (restores and commands), which are deleted when their
//! time to live after their end is over.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::runtime::controller::Action;

use crate::error::Result;
use crate::objects::{self, Object};

/// After how long to look again; `None` when an event will tell.
pub type Again = Option<Duration>;

/// The earlier of the two.
pub fn sooner(again: Again, after: Duration) -> Again {
    Some(again.map_or(after, |again| again.min(after)))
}

/// What the controller is to do.
pub fn action(again: Again) -> Action {
    again.map_or_else(Action::await_change, Action::requeue)
}

/// Deletes `request` if it finished `ttl` seconds ago, else asks to be called again then. Never without a `ttl`.
///
/// # Errors
/// The delete that failed.
pub async fn collect<K: Object>(api: &Api<K>, request: &K, finished: Option<Time>, ttl: Option<u32>) -> Result<Action> {
    let (Some(finished), Some(ttl)) = (finished, ttl) else { return Ok(Action::await_change()) };
    let left = Duration::from_secs(ttl.into()).saturating_sub(objects::since(&finished));
    if left.is_zero() {
        objects::delete(api, request).await?;
        return Ok(Action::await_change());
    }
    Ok(Action::requeue(left))
}
