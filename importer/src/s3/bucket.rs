//! A bucket: its listing with every key as it is, and reads of exactly what was listed.
//!
//! Objects are read by `object_store`. Its listings take `a/` for `a` and give up at the first key that has no place in its
//! own paths, so the listing is asked for here, signed by the same crate.

use std::fs;
use std::path::Path;
use std::time::Duration;

use aether_cas::tree::Mtime;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use object_store::aws::{AmazonS3, AmazonS3Builder, AwsAuthorizer, AwsCredential};
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequestBody, ReqwestConnector};
use object_store::{BackoffConfig, Certificate, ClientOptions, GetOptions, ObjectStore, RetryConfig};
use serde::Deserialize;
use url::Url;

use super::listing::{Listed, Listing};
use crate::cli::S3;
use crate::failure::{Failure, Reason};

/// Where the service is taken to be when nobody says.
const REGION: &str = "us-east-1";
/// How often a page of the listing is asked for.
const TRIES: u32 = 6;
/// Between the first two of them; it doubles.
const PAUSE: Duration = Duration::from_millis(200);

/// A folder of a bucket.
pub(super) struct Bucket {
    name: String,
    /// With a slash at its end, unless it is all of the bucket.
    prefix: String,
    endpoint: String,
    address: Url,
    region: String,
    credential: Option<AwsCredential>,
    secret_name: Option<String>,
    client: HttpClient,
    objects: AmazonS3,
}

/// One answer of a listing.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    #[serde(default)]
    contents: Vec<Content>,
    #[serde(default)]
    next_continuation_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Content {
    key: String,
    size: u64,
    last_modified: jiff::Timestamp,
    #[serde(rename = "ETag")]
    etag: Option<String>,
}

/// How a service says no.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Refusal {
    code: String,
    message: String,
}

/// Why a page of the listing did not come.
struct Trouble {
    failure: Failure,
    /// Whether it may come when it is asked for again.
    passing: bool,
}

impl Bucket {
    /// Asks nothing yet.
    pub(super) fn open(asked: &S3) -> Result<Self, Failure> {
        // What is installed already, if anything, serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let region = asked.region.as_deref().filter(|region| !region.is_empty()).unwrap_or(REGION).to_owned();
        let endpoint = match asked.endpoint.as_deref().filter(|endpoint| !endpoint.is_empty()) {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => format!("https://s3.{region}.amazonaws.com"),
        };
        let invalid = |why: String| Failure::new(Reason::Invalid, why);
        let address = Url::parse(&format!("{endpoint}/{}", asked.bucket))
            .map_err(|error| invalid(format!("spec.s3.endpoint {endpoint:?} is no URL: {error}")))?;
        let prefix = asked.prefix.as_deref().unwrap_or_default().trim_matches('/');
        let secret = Secret::read(asked)?;
        let options = secret.authorities.into_iter().fold(
            ClientOptions::new()
                .with_allow_http(endpoint.starts_with("http://"))
                .with_connect_timeout(Duration::from_secs(10))
                .with_read_timeout(Duration::from_secs(30))
                // A large object may take its time, as long as something comes.
                .with_timeout_disabled(),
            ClientOptions::with_root_certificate,
        );
        let builder = AmazonS3Builder::new()
            .with_bucket_name(&asked.bucket)
            .with_region(&region)
            .with_endpoint(&endpoint)
            .with_client_options(options.clone())
            .with_retry(RetryConfig {
                backoff: BackoffConfig { init_backoff: PAUSE, max_backoff: Duration::from_secs(5), base: 2. },
                max_retries: 8,
                retry_timeout: Duration::from_secs(60),
            });
        // Without a Secret nobody is asked for credentials: those of the node are not the source's.
        let builder = match &secret.credential {
            None => builder.with_skip_signature(true),
            Some(credential) => {
                let builder =
                    builder.with_access_key_id(&credential.key_id).with_secret_access_key(&credential.secret_key);
                credential.token.iter().fold(builder, AmazonS3Builder::with_token)
            }
        };
        let unusable = |error: object_store::Error| {
            invalid(format!("bucket {} at {endpoint} cannot be used: {error}", asked.bucket))
        };
        Ok(Self {
            name: asked.bucket.clone(),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            client: ReqwestConnector::default().connect(&options).map_err(unusable)?,
            objects: builder.build().map_err(unusable)?,
            address,
            endpoint,
            region,
            credential: secret.credential,
            secret_name: asked.secret_name.clone(),
        })
    }

    /// How it is called.
    pub(super) fn place(&self) -> String {
        format!("s3://{}/{}", self.name, self.prefix)
    }

    /// Everything below the prefix.
    pub(super) async fn list(&self) -> Result<Listing, Failure> {
        let mut objects = Vec::new();
        let mut token = None;
        loop {
            let page = self.page(token.as_deref()).await?;
            for content in page.contents {
                // Some services list it without its quotes.
                let etag = content.etag.unwrap_or_default().trim_matches('"').to_owned();
                if etag.is_empty() {
                    let why = format!("the service lists {:?} without an ETag, which an import needs", content.key);
                    return Err(self.failed(&why));
                }
                let modified = Mtime { seconds: content.last_modified.as_second(), nanos: 0 };
                objects.push(Listed { key: content.key, etag, size: content.size, modified });
            }
            match page.next_continuation_token {
                Some(next) if token.as_ref() == Some(&next) => return Err(self.failed("its listing has no end")),
                Some(next) if !next.is_empty() => token = Some(next),
                _ => return Ok(Listing::new(&self.prefix, objects)),
            }
        }
    }

    async fn page(&self, token: Option<&str>) -> Result<Page, Failure> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            match self.try_page(token).await {
                Err(trouble) if trouble.passing => tracing::warn!("{}; it is tried again", trouble.failure),
                answer => return answer.map_err(|trouble| trouble.failure),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.try_page(token).await.map_err(|trouble| trouble.failure)
    }

    async fn try_page(&self, token: Option<&str>) -> Result<Page, Trouble> {
        let lasting = |failure| Trouble { failure, passing: false };
        let mut address = self.address.clone();
        address.query_pairs_mut().extend_pairs(token.map(|token| ("continuation-token", token)));
        address.query_pairs_mut().append_pair("list-type", "2").append_pair("prefix", &self.prefix);
        let mut request = http::Request::get(address.as_str())
            .body(HttpRequestBody::empty())
            .map_err(|error| lasting(self.failed(&error.to_string())))?;
        if let Some(credential) = &self.credential {
            AwsAuthorizer::new(credential, "s3", &self.region)
                .try_authorize(&mut request, None)
                .map_err(|error| lasting(self.failed(&error.to_string())))?;
        }
        let lost = |error| self.unreachable(error);
        let answer = self.client.execute(request).await.map_err(lost)?;
        let (head, body) = answer.into_parts();
        let text = body.bytes().await.map_err(lost)?;
        if head.status.is_success() {
            return quick_xml::de::from_reader(&text[..])
                .map_err(|error| lasting(self.failed(&format!("its answer to a listing is not that of S3: {error}"))));
        }
        let refusal = quick_xml::de::from_reader(&text[..]).unwrap_or_default();
        let passing = head.status.is_server_error() || [408, 429].contains(&head.status.as_u16());
        Err(Trouble { failure: self.refused(head.status.as_u16(), &refusal), passing })
    }

    fn unreachable(&self, error: HttpError) -> Trouble {
        let connected = error.kind() != HttpErrorKind::Connect;
        let why = format!("{:#}", anyhow::Error::from(error));
        let untrusted = why.contains("certificate");
        let (reason, way_out) = match &self.secret_name {
            Some(name) if untrusted => {
                (Reason::SecretInvalid, format!("put the PEM certificate of the service's authority into ca.crt of Secret {name}, named by spec.s3.secretRef"))
            }
            None if untrusted => {
                (Reason::SecretInvalid, "put the PEM certificate of the service's authority into ca.crt of a Secret and name that in spec.s3.secretRef".into())
            }
            _ => {
                let reason = if connected { Reason::ImportFailed } else { Reason::BucketNotFound };
                (reason, "check spec.s3.endpoint, and that the cluster can reach it".into())
            }
        };
        let message = format!("bucket {} at {} cannot be reached: {why} ({way_out})", self.name, self.endpoint);
        Trouble { failure: Failure::new(reason, message), passing: !untrusted }
    }

    /// Opens an object, if it is still the one that was listed.
    pub(super) async fn read(
        &self,
        object: &Listed,
    ) -> Result<Option<BoxStream<'static, Result<Bytes, object_store::Error>>>, Failure> {
        let unreadable = |error: object_store::Error| {
            let reason = match error {
                object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                    Reason::AuthenticationFailed
                }
                _ => Reason::ImportFailed,
            };
            Failure::new(reason, format!("cannot read {:?} of bucket {}: {error}", object.key, self.name))
        };
        let path = object_store::path::Path::parse(&object.key).map_err(|error| unreadable(error.into()))?;
        let etag = format!("\"{}\"", object.etag);
        let options = GetOptions { if_match: Some(etag.clone()), ..GetOptions::default() };
        match self.objects.get_opts(&path, options).await {
            // A service may know no conditions.
            Ok(answer) if answer.meta.size == object.size && answer.meta.e_tag == Some(etag) => {
                Ok(Some(answer.into_stream().boxed()))
            }
            Ok(_) | Err(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(unreadable(error)),
        }
    }

    /// A failure in the middle of reading an object.
    pub(super) fn broke_off(&self, object: &Listed, error: &dyn std::fmt::Display) -> Failure {
        self.failed(&format!("reading {:?} broke off: {error}", object.key))
    }

    fn failed(&self, why: &str) -> Failure {
        Failure::new(Reason::ImportFailed, format!("bucket {} at {}: {why}", self.name, self.endpoint))
    }

    /// What the service means by that, and what to do about it.
    fn refused(&self, status: u16, refusal: &Refusal) -> Failure {
        let place = format!("bucket {} at {}", self.name, self.endpoint);
        let said = match (refusal.code.as_str(), refusal.message.as_str()) {
            ("", _) => format!("HTTP status {status}"),
            (code, "") => code.to_owned(),
            (code, message) => format!("{code}: {message}"),
        };
        let (reason, message) = match (status, refusal.code.as_str()) {
            (301 | 307 | 308, _) | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => (
                Reason::Invalid,
                format!("{place} is of another region than {} ({said}): check spec.s3.region", self.region),
            ),
            (404, _) | (_, "NoSuchBucket") => (
                Reason::BucketNotFound,
                format!("{place} does not exist ({said}): check spec.s3.bucket and spec.s3.endpoint"),
            ),
            (401 | 403, _) => {
                (Reason::AuthenticationFailed, format!("{place} may not be listed ({said}): {}", self.way_in()))
            }
            _ => (Reason::ImportFailed, format!("{place} cannot be listed ({said})")),
        };
        Failure::new(reason, message)
    }

    fn way_in(&self) -> String {
        match (&self.credential, &self.secret_name) {
            (None, _) => "name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in spec.s3.secretRef".into(),
            (Some(_), Some(name)) => format!(
                "check Secret {name}, named by spec.s3.secretRef, and that its key may list and read the bucket"
            ),
            (Some(_), None) => {
                "check the Secret in spec.s3.secretRef, and that its key may list and read the bucket".into()
            }
        }
    }
}

/// What the files of a Secret say.
#[derive(Default)]
struct Secret {
    credential: Option<AwsCredential>,
    authorities: Vec<Certificate>,
}

impl Secret {
    fn read(asked: &S3) -> Result<Self, Failure> {
        let Some(directory) = &asked.secret_dir else { return Ok(Self::default()) };
        let name = asked
            .secret_name
            .as_ref()
            .map_or("the Secret in spec.s3.secretRef".into(), |name| format!("Secret {name}"));
        let invalid = |why: String| Failure::new(Reason::SecretInvalid, format!("{name} {why}"));
        let read = |key: &str| match fs::read_to_string(directory.join(key)) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(invalid(format!("cannot be read ({key}): {error}"))),
        };
        if !Path::is_dir(directory) {
            return Err(Failure::new(
                Reason::SecretInvalid,
                format!("--secret-dir {} is not a directory", directory.display()),
            ));
        }
        let authorities = match read("ca.crt")? {
            Some(text) => Certificate::from_pem_bundle(text.as_bytes())
                .ok()
                .filter(|authorities| !authorities.is_empty())
                .ok_or_else(|| invalid("has a ca.crt that is no PEM certificate".into()))?,
            None => Vec::new(),
        };
        let credential = match (read("AWS_ACCESS_KEY_ID")?, read("AWS_SECRET_ACCESS_KEY")?) {
            (Some(key_id), Some(secret_key)) => {
                Some(AwsCredential { key_id, secret_key, token: read("AWS_SESSION_TOKEN")? })
            }
            (None, None) if !authorities.is_empty() => None,
            _ => return Err(invalid("lacks AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY".into())),
        };
        Ok(Self { credential, authorities })
    }
}
