//! A serving certificate and its authority: ours alone, made out to a Service, kept in one Secret for all replicas
//! ([`Kept`]).
//!
//! The authority's key stays in the Secret so that certificates can be renewed without the clients noticing. Before
//! the authority itself expires a new one is made; the old one stays in the bundle until its end, so that a replica
//! that still serves under it is believed.

mod kept;

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::{Span, Timestamp, tz::TimeZone};
use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use kept::Kept;

/// Keys of the Secret; its type is `kubernetes.io/tls`.
const CA: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Days that an authority is valid, and how many before its end a new one is made.
const AUTHORITY_DAYS: (i64, i64) = (3650, 365);
/// Days that a certificate is valid, and how many before its end a new one is made.
const CERTIFICATE_DAYS: (i64, i64) = (90, 30);

/// Why a certificate cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Secret lacks a key, or it is not what it should be.
    #[error("{0} of the Secret is missing or not usable")]
    Unusable(&'static str),
    /// The certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
}

/// A certificate with all that is needed to serve by it.
#[derive(Debug)]
pub struct Certificate {
    /// PEM of the authorities to be believed, the newest first.
    pub bundle: String,
    /// The chain to serve.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// From when on it should be replaced.
    pub renew_at: Timestamp,
}

/// What the Secret holds.
pub type Data = BTreeMap<String, ByteString>;

impl Certificate {
    /// Reads the Secret.
    ///
    /// # Errors
    /// The key that is wrong; so is a certificate for other names, which a renamed Service leaves behind.
    pub fn read(data: &Data, names: &[String]) -> Result<Self, Error> {
        let bundle = text(data, CA)?.to_owned();
        let authorities = certificates(&bundle, CA)?;
        let chain = certificates(text(data, CERTIFICATE)?, CERTIFICATE)?;
        let key = PrivateKeyDer::from_pem_slice(text(data, KEY)?.as_bytes()).map_err(|_| Error::Unusable(KEY))?;
        let (leaf, authority) = (&chain[0], &authorities[0]);
        if !names.iter().all(|name| is_for(leaf, name)) {
            return Err(Error::Unusable(CERTIFICATE));
        }
        let renew_at =
            earlier(end(leaf, CERTIFICATE)?, CERTIFICATE_DAYS.1).min(earlier(end(authority, CA)?, AUTHORITY_DAYS.1));
        Ok(Self { bundle, chain, key, renew_at })
    }

    /// Makes a certificate for `names` (of DNS, or addresses), by the authority of `old` if that lasts, and returns what the
    /// Secret is to hold. The authority calls itself `authority`, always the same for one Secret.
    ///
    /// # Errors
    /// Those of the cryptography.
    pub fn issue(old: Option<&Data>, authority: &str, names: &[String], now: Timestamp) -> Result<Data, Error> {
        let kept = old.and_then(|old| Authority::kept(old, authority, now));
        let (authority, bundle) = match kept {
            Some(authority) => {
                let bundle = authority.pem.clone();
                (authority, bundle)
            }
            None => {
                let authority = Authority::new(authority, now)?;
                let before =
                    old.and_then(|old| text(old, CA).ok()).map(|before| still_valid(before, now)).unwrap_or_default();
                let bundle = format!("{}{before}", authority.pem);
                (authority, bundle)
            }
        };
        // Authorities beside the first stay for as long as they are valid.
        let bundle = match old.and_then(|old| text(old, CA).ok()) {
            Some(before) if before.starts_with(&authority.pem) => still_valid(before, now),
            _ => bundle,
        };
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = named(&names[0]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, CERTIFICATE_DAYS.0);
        let key = KeyPair::generate()?;
        let ca_key = authority.key.serialize_pem();
        let certificate = params.signed_by(&key, &Issuer::new(authority.params, authority.key))?;
        let entries = [(CA, bundle), (CA_KEY, ca_key), (CERTIFICATE, certificate.pem()), (KEY, key.serialize_pem())];
        Ok(entries.into_iter().map(|(name, value)| (name.to_owned(), ByteString(value.into_bytes()))).collect())
    }
}

struct Authority {
    pem: String,
    params: CertificateParams,
    key: KeyPair,
}

impl Authority {
    fn new(name: &str, now: Timestamp) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let params = Self::params(name, now)?;
        Ok(Self { pem: params.self_signed(&key)?.pem(), params, key })
    }

    /// The authority of the Secret, if it has one that outlasts the certificates it is to sign.
    fn kept(old: &Data, name: &str, now: Timestamp) -> Option<Self> {
        let first = certificates(text(old, CA).ok()?, CA).ok()?.into_iter().next()?;
        if earlier(end(&first, CA).ok()?, AUTHORITY_DAYS.1) <= now {
            return None;
        }
        let key = KeyPair::from_pem(text(old, CA_KEY).ok()?).ok()?;
        // The name and key of an issuer are all that a signature needs of it; the key must be this authority's.
        let (_, parsed) = x509_parser::parse_x509_certificate(&first).ok()?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return None;
        }
        let pem = pem_of(&first);
        Some(Self { pem, params: Self::params(name, now).ok()?, key })
    }

    fn params(name: &str, now: Timestamp) -> Result<CertificateParams, Error> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = named(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, now, AUTHORITY_DAYS.0);
        Ok(params)
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn text<'a>(data: &'a Data, key: &'static str) -> Result<&'a str, Error> {
    data.get(key).and_then(|value| std::str::from_utf8(&value.0).ok()).ok_or(Error::Unusable(key))
}

/// At least one certificate.
fn certificates(pem: &str, key: &'static str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    parsed.ok().filter(|list| !list.is_empty()).ok_or(Error::Unusable(key))
}

fn pem_of(certificate: &CertificateDer<'_>) -> String {
    use std::fmt::Write;
    // PEM is base64 in lines of 64 (RFC 7468); the Kubernetes types already know how to write base64.
    let encoded = serde_json::to_value(ByteString(certificate.to_vec()))
        .ok()
        .and_then(|value| value.as_str().map(ToOwned::to_owned))
        .unwrap_or_default();
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in encoded.as_bytes().chunks(64) {
        let _ = writeln!(pem, "{}", String::from_utf8_lossy(line));
    }
    pem + "-----END CERTIFICATE-----\n"
}

/// The certificates of a bundle that have not expired.
fn still_valid(bundle: &str, now: Timestamp) -> String {
    let valid = |certificate: &CertificateDer<'_>| end(certificate, CA).is_ok_and(|end| end > now);
    certificates(bundle, CA).unwrap_or_default().iter().filter(|certificate| valid(certificate)).map(pem_of).collect()
}

fn end(certificate: &CertificateDer<'_>, key: &'static str) -> Result<Timestamp, Error> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| Error::Unusable(key))?;
    Timestamp::from_second(parsed.validity().not_after.timestamp()).map_err(|_| Error::Unusable(key))
}

fn is_for(certificate: &CertificateDer<'_>, name: &str) -> bool {
    use x509_parser::extensions::GeneralName;
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return false };
    let address = name.parse().map(|address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    });
    names.value.general_names.iter().any(|general| match (general, &address) {
        (GeneralName::DNSName(dns), Err(_)) => *dns == name,
        (GeneralName::IPAddress(bytes), Ok(address)) => bytes == address,
        _ => false,
    })
}

fn earlier(time: Timestamp, days: i64) -> Timestamp {
    time.checked_sub(Span::new().hours(days * 24)).unwrap_or(Timestamp::MIN)
}

fn later(time: Timestamp, days: i64) -> Timestamp {
    time.checked_add(Span::new().hours(days * 24)).unwrap_or(Timestamp::MAX)
}

/// Makes the certificate valid from yesterday, as clocks differ, and for so many days, by whole days.
fn set_validity(params: &mut CertificateParams, now: Timestamp, days: i64) {
    let date = |time: Timestamp| {
        let date = time.to_zoned(TimeZone::UTC).date();
        rcgen::date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    params.not_before = date(earlier(now, 1));
    params.not_after = date(later(now, days));
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUTHORITY: &str = "aether-review-ca";

    fn names() -> Vec<String> {
        ["aether-review.aether-system.svc", "10.96.0.7", "fd00::7"].map(Into::into).into()
    }

    #[test]
    fn a_certificate_is_renewed_under_the_same_authority_until_that_ends() {
        let start: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let first = Certificate::issue(None, AUTHORITY, &names(), start).unwrap();
        let read = Certificate::read(&first, &names()).unwrap();
        assert!(read.renew_at > later(start, 50) && read.renew_at < later(start, 70), "{}", read.renew_at);

        let second = Certificate::issue(Some(&first), AUTHORITY, &names(), read.renew_at).unwrap();
        let renewed = Certificate::read(&second, &names()).unwrap();
        assert_eq!(renewed.bundle, read.bundle, "the API server need not notice");
        assert_ne!(renewed.chain, read.chain);
        assert!(renewed.renew_at > read.renew_at);

        let old = later(start, AUTHORITY_DAYS.0 - 100);
        let third = Certificate::issue(Some(&second), AUTHORITY, &names(), old).unwrap();
        let bundle = Certificate::read(&third, &names()).unwrap().bundle;
        assert_eq!(certificates(&bundle, CA).unwrap().len(), 2, "both authorities are believed for a while");
        let fourth = Certificate::issue(Some(&third), AUTHORITY, &names(), later(old, 200)).unwrap();
        assert_eq!(certificates(&Certificate::read(&fourth, &names()).unwrap().bundle, CA).unwrap().len(), 1);
    }

    #[test]
    fn a_certificate_for_another_name_is_not_used() {
        let data = Certificate::issue(None, AUTHORITY, &names(), Timestamp::now()).unwrap();
        assert!(Certificate::read(&data, &["other.svc".into()]).is_err());
        assert!(Certificate::read(&data, &["10.96.0.8".into()]).is_err());
        assert!(Certificate::read(&Data::new(), &names()).is_err());
    }

    #[test]
    fn a_key_that_is_not_the_authoritys_makes_a_new_authority() {
        let now = Timestamp::now();
        let mut data = Certificate::issue(None, AUTHORITY, &names(), now).unwrap();
        data.insert(CA_KEY.into(), ByteString(KeyPair::generate().unwrap().serialize_pem().into_bytes()));
        let again = Certificate::issue(Some(&data), AUTHORITY, &names(), now).unwrap();
        assert_ne!(data[CA], again[CA]);
        assert_eq!(certificates(&Certificate::read(&again, &names()).unwrap().bundle, CA).unwrap().len(), 2);
    }
}
