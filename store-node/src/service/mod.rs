//! The gRPC services, and what they have in common: limits, and one map from errors to statuses.

pub(crate) mod admin;
pub(crate) mod bytestream;
pub(crate) mod capabilities;
pub(crate) mod cas;
pub(crate) mod collect;
pub(crate) mod integrity;
mod tree;
mod uploads;
mod zstd;

use std::io::ErrorKind;

use aether_cas::{Blob, ContentName, StoreError, sha256::DigestFunction};
use bazel_remote_apis::build::bazel::remote::execution::v2::{self as reapi, digest_function};
use tonic::Status;

use crate::tiered::TieredStore;

/// Bytes of blobs in one batch: announced to clients, and enforced.
pub(crate) const MAX_BATCH_BYTES: u64 = aether_cas::transfer::BATCH_BYTES;
/// Bytes of one answer, which has names beside the blobs.
pub(crate) const MAX_ANSWER_BYTES: usize = 16 << 20;

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
        StoreError::Closed(_) | StoreError::Busy(_) => Status::unavailable(message),
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
pub(crate) fn check_function(function: i32) -> Result<DigestFunction, Status> {
    use digest_function::Value;
    let refused = |what: String| Status::invalid_argument(format!("{what}; this store supports BLAKE3 and SHA256"));
    match Value::try_from(function) {
        Ok(Value::Blake3) => Ok(DigestFunction::Blake3),
        Ok(Value::Sha256 | Value::Unknown) => Ok(DigestFunction::Sha256),
        Ok(other) => Err(refused(format!("digest function {} is not supported", other.as_str_name()))),
        Err(_) => Err(refused(format!("digest function number {function} is not known"))),
    }
}

pub(crate) fn parse_digest(function: DigestFunction, digest: Option<&reapi::Digest>) -> Result<ContentName, Status> {
    let digest = digest.ok_or_else(|| Status::invalid_argument("a digest is missing"))?;
    ContentName::parse(function, digest).map_err(|error| Status::invalid_argument(error.to_string()))
}

pub(crate) fn parse_digests(function: DigestFunction, digests: &[reapi::Digest]) -> Result<Vec<ContentName>, Status> {
    digests.iter().map(|digest| parse_digest(function, Some(digest))).collect()
}

/// The blobs that names stand for; `None` for contents that nobody has stored under that name.
pub(crate) async fn resolve(store: &TieredStore, names: Vec<ContentName>) -> Result<Vec<Option<Blob>>, Status> {
    let store = store.clone();
    blocking(move || store.resolve(&names)).await?.map_err(status)
}

/// Says again for which blobs these names stand, before it is answered that they are there: a collection may just be
/// forgetting a name because its blob was missing when it looked.
pub(crate) async fn name_again(store: &TieredStore, names: Vec<(ContentName, Blob)>) -> Result<(), Status> {
    let foreign = |(name, blob)| if let ContentName::Sha256(name) = name { Some((name, blob)) } else { None };
    let names: Vec<_> = names.into_iter().filter_map(foreign).collect();
    if names.is_empty() {
        return Ok(());
    }
    let store = store.clone();
    blocking(move || store.name(&names)).await?.map_err(status)
}

pub(crate) fn missing(name: &ContentName) -> Status {
    Status::not_found(format!("blob {name} is not in the store"))
}

/// Bytes that are not what they were said to be.
pub(crate) fn mismatch(name: &ContentName) -> Status {
    let hint = match name {
        ContentName::Blake3(_) => "",
        ContentName::Sha256(_) => " (a BLAKE3 digest needs its digest function to be named)",
    };
    Status::invalid_argument(format!("the data sent is not blob {name}{hint}"))
}

/// Runs work on the store on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(format!("the work was not finished: {error}")))
}
