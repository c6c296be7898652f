//! The options of the durable tier, and the store they ask for.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use aether_cas::{
    LocalStore,
    durable::{Durable, S3Config, Terms, collect::WASTE},
    store::Result,
};
use clap::{Args, ValueEnum};

use super::{Durability, TierConfig, TieredStore};

/// Folder of the index of a bucket, in the data folder.
const PACKS: &str = "packs";
/// The least limit of the disk.
const LEAST: u64 = 64 << 20;

/// A bucket as the durable tier, with the node's disk as its cache. Credentials come from the environment, as the AWS
/// tools take them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the web identity of AWS_WEB_IDENTITY_TOKEN_FILE).
#[derive(Clone, Debug, Args)]
pub struct TierArgs {
    /// Bucket of an S3 service, which must exist. Without it the disk is the durable tier.
    #[arg(long, env = "AETHER_S3_BUCKET", value_name = "NAME")]
    pub s3_bucket: Option<String>,
    /// Folder in the bucket.
    #[arg(long, env = "AETHER_S3_PREFIX", default_value = "", value_name = "FOLDER", requires = "s3_bucket")]
    pub s3_prefix: String,
    /// The S3 service, where it is not AWS.
    #[arg(long, env = "AETHER_S3_ENDPOINT", value_name = "URL", requires = "s3_bucket", value_parser = endpoint)]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket; AWS_REGION where it is not given.
    #[arg(long, env = "AETHER_S3_REGION", value_name = "REGION", requires = "s3_bucket")]
    pub s3_region: Option<String>,
    /// When an upload is acknowledged: when it is in the bucket, or when it is on the node's disk and on its way there.
    /// With `behind`, losing a node's disk loses what it had acknowledged and not brought to the bucket yet.
    #[arg(long, env = "AETHER_DURABILITY", default_value = "through", requires = "s3_bucket")]
    pub durability: When,
    /// How much of a pack in the bucket may be waste before what is needed of it is written anew, in percent.
    #[arg(long, env = "AETHER_GC_WASTE", default_value_t = WASTE, value_name = "PERCENT", requires = "s3_bucket",
          value_parser = clap::value_parser!(u64).range(0..=100))]
    pub gc_waste: u64,
    /// By how old a list of what is condemned a node answers, in milliseconds. For tests: all nodes of a bucket must agree.
    #[arg(long, hide = true, value_name = "MS", requires = "s3_bucket")]
    pub s3_view: Option<u64>,
    /// How much clocks may differ, in milliseconds. For tests.
    #[arg(long, hide = true, value_name = "MS", requires = "s3_bucket")]
    pub s3_skew: Option<u64>,
    /// What the disk may keep of the bucket, in bytes or as 100Gi; what was wanted longest ago goes first. No limit without it.
    #[arg(long, env = "AETHER_CACHE_LIMIT", value_name = "BYTES", requires = "s3_bucket", value_parser = bytes)]
    pub cache_limit: Option<u64>,
}

/// When an upload is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// When it is in the bucket.
    Through,
    /// When it is on the node's disk.
    Behind,
}

impl TierArgs {
    /// The store over `disk`; its index of the bucket is in `data_dir`.
    ///
    /// # Errors
    /// Those of opening the durable tier.
    pub async fn over(&self, disk: LocalStore, data_dir: &Path, lease: Duration) -> Result<TieredStore> {
        let Some(bucket) = &self.s3_bucket else {
            return Ok(disk.into());
        };
        let config = S3Config {
            bucket: bucket.clone(),
            prefix: self.s3_prefix.clone(),
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
        };
        let mut terms = Terms::new(lease);
        terms.view = self.s3_view.map_or(terms.view, Duration::from_millis);
        terms.skew = self.s3_skew.map_or(terms.skew, Duration::from_millis);
        let durable = Durable::open_s3(&config, &data_dir.join(PACKS), terms).await?;
        let durability = match self.durability {
            When::Through => Durability::Through,
            When::Behind => Durability::Behind,
        };
        Ok(TieredStore::over(
            durable,
            disk,
            TierConfig { durability, cache_limit: self.cache_limit, waste: self.gc_waste },
        ))
    }
}

/// The folder that says that the disk in `data_dir` is, or was, the cache of a bucket, where its pins are: without these
/// a collection would take everything for garbage.
pub fn trace_of_bucket(data_dir: &Path) -> Option<PathBuf> {
    Some(data_dir.join(PACKS)).filter(|packs| packs.exists())
}

fn endpoint(text: &str) -> Result<String, String> {
    match text.parse::<http::Uri>() {
        Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err("an address such as https://s3.example.com is expected".to_owned()),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    match aether_api::quantity::parse(text)? {
        bytes if bytes >= LEAST => Ok(bytes),
        _ => Err("it must be 64Mi or more, so that what is being worked on fits".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_units() {
        for (text, expected) in [("64Mi", 64 << 20), ("67108864", 64 << 20), ("1Ti", 1 << 40), ("100Gi", 100 << 30)] {
            assert_eq!(bytes(text), Ok(expected));
        }
        for bad in ["", "1", "63Mi", "-1Gi", "1.5Gi"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_service_is_an_address() {
        assert_eq!(endpoint("http://127.0.0.1:8333/"), Ok("http://127.0.0.1:8333".to_owned()));
        for bad in ["", "s3.example.com", "ftp://x", "/x"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
