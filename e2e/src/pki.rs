//! Certificates of the test cluster: a cluster authority, one for the aggregation layer, a key for service accounts, and
//! kubeconfigs for whoever a test wants to be.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

/// Who a certificate speaks for, and at which addresses.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The user's or server's name (CN).
    pub name: &'a str,
    /// The user's group (O); rcgen writes only one.
    pub group: Option<&'a str>,
    /// DNS names of a server.
    pub names: &'a [&'a str],
    /// Addresses of a server.
    pub addresses: &'a [IpAddr],
}

impl<'a> Subject<'a> {
    /// A client.
    pub fn user(name: &'a str, group: Option<&'a str>) -> Self {
        Self { name, group, names: &[], addresses: &[] }
    }
}

/// A certificate and its key as PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key, PKCS#8.
    pub key: String,
}

/// A folder of certificates.
#[derive(Debug, Clone)]
pub struct Pki {
    folder: PathBuf,
}

impl Pki {
    /// Opens the folder; [`Pki::create`] fills it.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Makes both authorities and the key that signs service accounts' tokens.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.folder)?;
        self.authority("ca")?;
        self.authority("front-proxy-ca")?;
        let key = KeyPair::generate()?;
        self.write("service-accounts.key", &key.serialize_pem())?;
        self.write("service-accounts.pub", &key.public_key_pem())
    }

    /// The path of a file of this folder.
    pub fn path(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }

    /// The PEM of an authority.
    pub fn authority_pem(&self, authority: &str) -> Result<String> {
        self.read(&format!("{authority}.crt"))
    }

    /// Issues a certificate, good for servers and clients, and writes it as `<file>.crt` and `<file>.key`.
    pub fn issue(&self, authority: &str, file: &str, subject: Subject<'_>) -> Result<Pair> {
        let pair = self.sign(authority, subject)?;
        self.write(&format!("{file}.crt"), &pair.certificate)?;
        self.write(&format!("{file}.key"), &pair.key)?;
        Ok(pair)
    }

    /// Issues a certificate without keeping it.
    pub fn sign(&self, authority: &str, subject: Subject<'_>) -> Result<Pair> {
        let authority_key = KeyPair::from_pem(&self.read(&format!("{authority}.key"))?)?;
        let issuer = Issuer::new(authority_params(authority), authority_key);
        let mut params =
            CertificateParams::new(subject.names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        params.subject_alt_names.extend(subject.addresses.iter().map(|address| SanType::IpAddress(*address)));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.name);
        if let Some(group) = subject.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// A kubeconfig, self-contained, for a user of the cluster whose API server is at `server`; who says no namespace means this.
    pub fn kubeconfig(&self, server: &str, subject: Subject<'_>, namespace: &str) -> Result<String> {
        let pair = self.sign("ca", subject)?;
        let encode = |pem: &str| BASE64_STANDARD.encode(pem);
        Ok(serde_yaml::to_string(&json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "aether", "cluster": {"server": server, "certificate-authority-data": encode(&self.authority_pem("ca")?)}}],
            "users": [{"name": subject.name, "user": {"client-certificate-data": encode(&pair.certificate), "client-key-data": encode(&pair.key)}}],
            "contexts": [{"name": "aether", "context": {"cluster": "aether", "user": subject.name, "namespace": namespace}}],
            "current-context": "aether",
        }))?)
    }

    /// Writes a kubeconfig for a component and gives its path.
    pub fn component(&self, server: &str, subject: Subject<'_>) -> Result<String> {
        let file = format!("{}.kubeconfig", subject.name.replace(':', "-"));
        self.write(&file, &self.kubeconfig(server, subject, "default")?)?;
        Ok(self.path(&file))
    }

    fn authority(&self, name: &str) -> Result<()> {
        let key = KeyPair::generate()?;
        let certificate = authority_params(name).self_signed(&key)?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.folder.join(file)).with_context(|| format!("cannot read {}", self.path(file)))
    }

    fn write(&self, file: &str, content: &str) -> Result<()> {
        write_private(&self.folder.join(file), content)
    }
}

/// What an authority's certificate says; its name and key are all that an issued certificate refers to.
fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("aether test cluster {name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// Writes a file that only its owner reads.
pub fn write_private(path: &Path, content: &str) -> Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let mut file = fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file.write_all(content.as_bytes())?)
}
