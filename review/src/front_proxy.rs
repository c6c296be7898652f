//! Whom to believe: the API server's front proxy, and through it the user it speaks for.
//!
//! The API server publishes in ConfigMap `kube-system/extension-apiserver-authentication` which authority signs its
//! client certificate, which common names that may have, and in which headers it names the user. Headers on a
//! connection without such a certificate mean nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::HeaderMap;
use k8s_openapi::api::core::v1::ConfigMap;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// The ConfigMap's namespace.
pub const NAMESPACE: &str = "kube-system";
/// The ConfigMap's name.
pub const NAME: &str = "extension-apiserver-authentication";

/// Why the ConfigMap is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key is missing.
    #[error(
        "ConfigMap {NAMESPACE}/{NAME} has no {0}: the API server runs without its aggregation layer (--requestheader-client-ca-file)"
    )]
    Missing(&'static str),
    /// A value is not what it should be.
    #[error("{key} of ConfigMap {NAMESPACE}/{NAME} is not usable: {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
}

const CA: &str = "requestheader-client-ca-file";
const ALLOWED: &str = "requestheader-allowed-names";
const USERS: &str = "requestheader-username-headers";
const UIDS: &str = "requestheader-uid-headers";
const GROUPS: &str = "requestheader-group-headers";
const EXTRAS: &str = "requestheader-extra-headers-prefix";

/// What the API server says about its front proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    authorities: Vec<CertificateDer<'static>>,
    /// Common names; empty means any.
    allowed: Vec<String>,
    users: Vec<String>,
    uids: Vec<String>,
    groups: Vec<String>,
    extras: Vec<String>,
}

/// A user as the API server has authenticated it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The name; never empty.
    pub user: String,
    /// The uid, if the API server passes it on.
    pub uid: Option<String>,
    /// The groups.
    pub groups: Vec<String>,
    /// Everything else the authenticator said.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Trust {
    /// Reads the ConfigMap.
    ///
    /// # Errors
    /// What is missing or wrong, by key.
    pub fn of(map: &ConfigMap) -> Result<Self, Error> {
        let data = map.data.as_ref();
        let get = |key: &'static str| data.and_then(|data| data.get(key)).filter(|value| !value.trim().is_empty());
        let list = |key: &'static str| -> Result<Vec<String>, Error> {
            let Some(text) = get(key) else { return Ok(Vec::new()) };
            serde_json::from_str(text).map_err(|error| Error::Invalid { key, problem: error.to_string() })
        };
        let pem = get(CA).ok_or(Error::Missing(CA))?;
        let authorities: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let authorities = authorities.map_err(|error| Error::Invalid { key: CA, problem: error.to_string() })?;
        if authorities.is_empty() {
            return Err(Error::Invalid { key: CA, problem: "it holds no certificate".into() });
        }
        let users = list(USERS)?;
        if users.is_empty() {
            return Err(Error::Missing(USERS));
        }
        Ok(Self {
            authorities,
            allowed: list(ALLOWED)?,
            users,
            uids: list(UIDS)?,
            groups: list(GROUPS)?,
            extras: list(EXTRAS)?,
        })
    }

    /// Checks client certificates against the authorities. A client without one may connect; it is nobody then.
    ///
    /// # Errors
    /// A certificate that is no authority's.
    pub fn verifier(&self, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        let invalid = |problem: String| Error::Invalid { key: CA, problem };
        let mut roots = RootCertStore::empty();
        for authority in &self.authorities {
            roots.add(authority.clone()).map_err(|error| invalid(error.to_string()))?;
        }
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .allow_unauthenticated()
            // Without a hint clients send what they have; a hint keeps some from sending a certificate that would do.
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| invalid(error.to_string()))
    }

    /// Whether a verified client certificate is the front proxy's.
    pub fn accepts(&self, certificate: &CertificateDer<'_>) -> bool {
        if self.allowed.is_empty() {
            return true;
        }
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
        let mut names = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        names.any(|name| self.allowed.iter().any(|allowed| allowed == name))
    }

    /// The user that the front proxy's headers name.
    pub fn identity(&self, headers: &HeaderMap) -> Option<Identity> {
        let all = |names: &[String]| -> Vec<String> {
            names.iter().flat_map(|name| headers.get_all(name.as_str())).filter_map(text).collect()
        };
        let user = all(&self.users).into_iter().find(|user| !user.is_empty())?;
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in headers {
            let found = self.extras.iter().find_map(|prefix| name.as_str().strip_prefix(&prefix.to_ascii_lowercase()));
            if let (Some(key), Some(value)) = (found.filter(|key| !key.is_empty()), text(value)) {
                extra.entry(unescape(key)).or_default().push(value);
            }
        }
        Some(Identity { user, uid: all(&self.uids).into_iter().next(), groups: all(&self.groups), extra })
    }
}

/// Header values are UTF-8 for Kubernetes, not only ASCII.
fn text(value: &http::HeaderValue) -> Option<String> {
    String::from_utf8(value.as_bytes().to_vec()).ok()
}

/// Keys of extras are percent-encoded, because header names take few characters (net/url's `PathUnescape`).
fn unescape(key: &str) -> String {
    let bytes = key.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let digits = (bytes[index] == b'%').then(|| bytes.get(index + 1..index + 3)).flatten();
        let value = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        out.push(value.unwrap_or(bytes[index]));
        index += if value.is_some() { 3 } else { 1 };
    }
    // What does not decode stays as it was sent.
    String::from_utf8(out).unwrap_or_else(|_| key.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config_map(ca: &str, allowed: &str) -> ConfigMap {
        let data = [
            (CA, ca),
            (ALLOWED, allowed),
            (USERS, r#"["X-Remote-User"]"#),
            (GROUPS, r#"["X-Remote-Group"]"#),
            (EXTRAS, r#"["X-Remote-Extra-"]"#),
        ];
        ConfigMap {
            data: Some(data.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
            ..Default::default()
        }
    }

    fn trust() -> Trust {
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem();
        Trust::of(&config_map(&pem, r#"["front-proxy-client"]"#)).unwrap()
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(Trust::of(&ConfigMap::default()).unwrap_err().to_string().contains(CA));
        assert!(Trust::of(&config_map("nonsense", "[]")).unwrap_err().to_string().contains("no certificate"));
        let mut map = config_map("", "");
        map.data.as_mut().unwrap().insert(CA.into(), trust_pem());
        map.data.as_mut().unwrap().insert(ALLOWED.into(), "not json".into());
        assert!(Trust::of(&map).unwrap_err().to_string().contains(ALLOWED));
    }

    fn trust_pem() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem()
    }

    #[test]
    fn identities_come_from_headers() {
        let mut headers = HeaderMap::new();
        assert_eq!(trust().identity(&headers), None);
        headers.insert("x-remote-user", "".parse().unwrap());
        assert_eq!(trust().identity(&headers), None, "an empty name is nobody's");
        headers.insert("x-remote-user", "ada".parse().unwrap());
        headers.append("x-remote-group", "reviewers".parse().unwrap());
        headers.append("x-remote-group", "system:authenticated".parse().unwrap());
        headers.append("x-remote-extra-acme.com%2fproject", "one".parse().unwrap());
        headers.append("x-remote-extra-acme.com%2fproject", "two".parse().unwrap());
        let identity = trust().identity(&headers).unwrap();
        assert_eq!((identity.user.as_str(), identity.uid), ("ada", None));
        assert_eq!(identity.groups, ["reviewers", "system:authenticated"]);
        assert_eq!(identity.extra["acme.com/project"], ["one", "two"]);
    }
}
