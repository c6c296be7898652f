//! What a client may ask of this store.

use bazel_remote_apis::build::bazel::{
    remote::execution::v2::{
        ActionCacheUpdateCapabilities, CacheCapabilities, GetCapabilitiesRequest, ServerCapabilities,
        capabilities_server::Capabilities, compressor, digest_function, symlink_absolute_path_strategy,
    },
    semver::SemVer,
};
use tonic::{Request, Response, Status};

use super::{MAX_BATCH_BYTES, check_instance};

pub(crate) struct CapabilitiesService;

#[tonic::async_trait]
impl Capabilities for CapabilitiesService {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        check_instance(&request.get_ref().instance_name)?;
        let version = |minor| Some(SemVer { major: 2, minor, ..Default::default() });
        let compressors = vec![compressor::Value::Identity as i32, compressor::Value::Zstd as i32];
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                digest_functions: vec![digest_function::Value::Blake3 as i32, digest_function::Value::Sha256 as i32],
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities { update_enabled: false }),
                max_batch_total_size_bytes: i64::try_from(MAX_BATCH_BYTES).unwrap_or(i64::MAX),
                symlink_absolute_path_strategy: symlink_absolute_path_strategy::Value::Allowed as i32,
                supported_compressors: compressors.clone(),
                supported_batch_update_compressors: compressors,
                ..Default::default()
            }),
            low_api_version: version(0),
            high_api_version: version(3),
            ..Default::default()
        }))
    }
}
