//! The gRPC services, and what they have in common: limits, and one map from errors to statuses.

pub(crate) mod admin;
pub(crate) mod bytestream;
pub(crate) mod capabilities;
pub(crate) mod cas;
pub(crate) mod collect;
pub(crate) mod integrity;

use std::io::ErrorKind;

use aether_cas::{Blob, StoreError};
use bazel_remote_apis::build::bazel::remote::execution::v2::{self as reapi, digest_function};
use tonic::Status;

/// Bytes of blobs in one batch: announced to clients, and enforced.
pub(crate) const MAX_BATCH_BYTES: u64 = aether_cas::transfer::BATCH_BYTES;
/// Bytes of one message, which has names beside the blobs.
pub(crate) const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// The status that tells a client of an error of the store.
pub(crate) fn status(error: StoreError) -> Status {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    match &error {
        StoreError::NotFound { .. } => Status::not_found(message),
        StoreError::Corrupt { .. } => Status::data_loss(message),
        StoreError::Mismatch { .. } | StoreError::Invalid(_) | StoreError::NotADirectory { .. } => {
            Status::invalid_argument(message)
        }
        StoreError::Closed(_) => Status::unavailable(message),
        StoreError::Bucket { transient: true, .. } => {
            tracing::warn!(error = message, "the durable tier does not do as asked");
            Status::unavailable(message)
        }
        StoreError::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Status::resource_exhausted(message)
        }
        StoreError::Io { .. }
        | StoreError::Index { .. }
        | StoreError::UnknownFormat { .. }
        | StoreError::Bucket { .. }
        | StoreError::Remote { .. } => {
            tracing::error!(error = message, "the store failed");
            Status::internal(message)
        }
    }
}

/// The one instance has no name.
pub(crate) fn check_instance(name: &str) -> Result<(), Status> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("there is no instance {name:?}; leave the instance name empty")))
}

/// BLAKE3 must be said: REAPI takes an unset function with digests of this length for SHA-256.
pub(crate) fn check_function(function: i32) -> Result<(), Status> {
    use digest_function::Value;
    match Value::try_from(function) {
        Ok(Value::Blake3) => Ok(()),
        Ok(Value::Unknown) => Err(Status::invalid_argument(
            "digest_function is not set, which means SHA256 for digests of this length; this store supports BLAKE3 only",
        )),
        Ok(other) => Err(Status::invalid_argument(format!(
            "digest function {} is not supported; this store supports BLAKE3 only",
            other.as_str_name()
        ))),
        Err(_) => Err(Status::invalid_argument(format!(
            "digest function number {function} is not known; this store supports BLAKE3 only"
        ))),
    }
}

pub(crate) fn parse_digest(digest: Option<&reapi::Digest>) -> Result<Blob, Status> {
    let digest = digest.ok_or_else(|| Status::invalid_argument("a digest is missing"))?;
    Blob::try_from(digest).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Runs work on the store on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(format!("the work was not finished: {error}")))
}
