//! Volumes: sessions that were made for a claim by the standard provisioner.

use std::collections::HashMap;

use aether_api::conditions::{self, READY, reason};
use aether_api::names::{self, INLINE_OWNER, INLINE_SOURCE};
use aether_api::session::{ClaimPolicy, Limits, Owner, SourceReference};
use aether_api::{AetherCheckpoint, AetherSession, AetherSessionSpec};
use aether_proto::csi::v1::CapacityRange;
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::PostParams;
use kube::{Api, ResourceExt as _};

use super::Controller;
use super::ids::{CSI_NAME_ANNOTATION, Id, object_name};
use crate::cluster::Patience;
use crate::failure::{Failure, Result, status_code};
use crate::moments::full_name;

/// Parameters of this prefix are the sidecar's.
const SIDECAR: &str = "csi.storage.k8s.io/";
/// The claim's namespace, which the provisioner sends with `--extra-create-metadata`.
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";

/// Annotation on sessions that this service made: the bytes that the claim asked for, a decimal number. They are granted, and
/// not set aside.
const CSI_CAPACITY_ANNOTATION: &str = "aether.dev/csi-capacity";

/// What a caller wants of a volume.
pub(super) struct Wanted<'a> {
    pub name: &'a str,
    pub bytes: CapacityRange,
    pub parameters: &'a HashMap<String, String>,
    pub content: Content,
}

/// What a new volume starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A source, as the parameters of its class say.
    Parameters,
    /// The checkpoint that a snapshot is.
    Snapshot(String),
    /// A moment of the session that another volume is.
    Volume(String),
}

/// Why a session that waits will not start, by the reason of its condition: it takes a person to change that.
const HOPELESS: [&str; 6] = [
    reason::INVALID,
    reason::SOURCE_NOT_FOUND,
    reason::REVISION_NOT_FOUND,
    reason::NAMESPACE_NOT_ALLOWED,
    reason::CHECKPOINT_NOT_FOUND,
    reason::SESSION_NOT_FOUND,
];

impl Controller {
    /// Makes the session that a volume of this name is, and waits until it is certain what it starts from.
    pub(super) async fn create_volume(&self, wanted: Wanted<'_>, patience: &Patience) -> Result<AetherSession> {
        let Wanted { name, bytes, parameters, content } = wanted;
        let namespace = parameters.get(CLAIM_NAMESPACE).filter(|namespace| !namespace.is_empty()).ok_or_else(|| {
            Failure::Invalid(format!(
                "a session is made in the namespace of its claim, but {CLAIM_NAMESPACE} was not sent: run the provisioner with --extra-create-metadata"
            ))
        })?;
        let mut spec = self.spec(namespace, parameters, content).await?;
        // As with the claims that the operator serves: what a claim asks for is what its session may write.
        spec.limits =
            (bytes.required_bytes > 0).then(|| Limits { bytes: Some(bytes.required_bytes.to_string()), inodes: None });
        let mut wanted = AetherSession::new(&object_name(name), spec);
        wanted.metadata.namespace = Some(namespace.clone());
        wanted.annotations_mut().extend([
            (CSI_NAME_ANNOTATION.to_owned(), name.to_owned()),
            (CSI_CAPACITY_ANNOTATION.to_owned(), bytes.required_bytes.to_string()),
        ]);
        let api: Api<AetherSession> = Api::namespaced(self.client.clone(), namespace);
        let full = full_name(&wanted);
        let session = match api.create(&PostParams::default(), &wanted).await {
            Ok(made) => made,
            Err(error) if status_code(&error) == Some(409) => {
                let there = api
                    .get_opt(&wanted.name_any())
                    .await
                    .map_err(Failure::api(|| format!("read session {full}")))?
                    .filter(|there| there.metadata.deletion_timestamp.is_none())
                    .ok_or_else(|| Failure::Aborted(format!("session {full} is being deleted: try again")))?;
                let has = capacity(&there);
                let fits = has >= bytes.required_bytes && (bytes.limit_bytes == 0 || has <= bytes.limit_bytes);
                let named = there.annotations().get(CSI_NAME_ANNOTATION).map(String::as_str) == Some(name);
                if !named || !fits || there.spec != wanted.spec {
                    return Err(Failure::Taken(format!(
                        "session {full} exists and is not what volume {name} asks for: delete it, or choose another name"
                    )));
                }
                there
            }
            Err(error) => return Err(Failure::api(|| format!("make session {full}"))(error)),
        };
        self.wait_for_start(session, patience).await
    }

    async fn spec(
        &self,
        namespace: &str,
        parameters: &HashMap<String, String>,
        content: Content,
    ) -> Result<AetherSessionSpec> {
        let known = [INLINE_SOURCE, INLINE_OWNER];
        if let Some(unknown) =
            parameters.keys().filter(|key| !key.starts_with(SIDECAR) && !known.contains(&key.as_str())).min()
        {
            return Err(Failure::Invalid(format!(
                "the class has parameter {unknown:?}, but only {} are known",
                known.join(" and ")
            )));
        }
        let owner =
            parameters.get(INLINE_OWNER).map(|text| text.parse::<Owner>()).transpose().map_err(Failure::Invalid)?;
        // The operator makes claims for the sessions that people make; here the claim is there already, and its volume is
        // the provisioner's to make.
        let mut spec = AetherSessionSpec { owner, claim: ClaimPolicy::None, ..AetherSessionSpec::default() };
        match content {
            Content::Parameters => spec.source = Some(source(parameters)?),
            Content::Snapshot(id) => {
                let found = self.checkpoint(&id).await?.ok_or_else(|| no_such("snapshot", &id))?;
                same_namespace("snapshot", &id, &found, namespace)?;
                spec.checkpoint = Some(found.name_any());
            }
            Content::Volume(id) => {
                let found = self.session(&id).await?.ok_or_else(|| no_such("volume", &id))?;
                same_namespace("volume", &id, &found, namespace)?;
                spec.session = Some(found.name_any());
            }
        }
        Ok(spec)
    }

    /// Waits until a session's start is stamped, which makes it immutable. A session that will never start is taken away.
    async fn wait_for_start(&self, session: AetherSession, patience: &Patience) -> Result<AetherSession> {
        let full = full_name(&session);
        let api: Api<AetherSession> = Api::namespaced(self.client.clone(), &session.namespace().unwrap_or_default());
        let stamped = |session: &AetherSession| {
            let status = session.status.as_ref()?;
            if status.base.is_some() {
                return Some(Ok(()));
            }
            let ready = conditions::get(&status.conditions, READY)?;
            HOPELESS.contains(&ready.reason.as_str()).then(|| {
                let text = format!("session {full} cannot start: {}", ready.message);
                Err(match ready.reason.as_str() {
                    reason::INVALID => Failure::Invalid(text),
                    reason::NAMESPACE_NOT_ALLOWED => Failure::Denied(text),
                    _ => Failure::NotFound(text),
                })
            })
        };
        let uid = session.uid();
        let (session, start) = self.wait_for(&api, session, stamped, patience).await?;
        if let Err(hopeless) = start {
            Self::delete(&api, &session.name_any(), uid).await?;
            return Err(hopeless);
        }
        Ok(session)
    }

    /// Deletes the session that a volume is. One that is not there is deleted.
    pub(super) async fn delete_volume(&self, id: &str) -> Result<()> {
        let Some(session) = self.session(id).await? else { return Ok(()) };
        if !session.annotations().contains_key(CSI_NAME_ANNOTATION) {
            return Err(Failure::NotYet(format!(
                "volume {id} is AetherSession {}, which the provisioner did not make: delete the session, or keep it and delete the volume's object alone",
                full_name(&session)
            )));
        }
        let api = Api::<AetherSession>::namespaced(self.client.clone(), &session.namespace().unwrap_or_default());
        Self::delete(&api, &session.name_any(), session.uid()).await
    }

    /// The session that a volume is, whoever made it.
    pub(super) async fn session(&self, id: &str) -> Result<Option<AetherSession>> {
        let read = async |at: &Id| {
            let api = Api::<AetherSession>::namespaced(self.client.clone(), &at.namespace);
            api.get_opt(&at.name).await.map_err(Failure::api(|| format!("read session {at}")))
        };
        if let Some(at) = Id::parse(id) {
            return read(&at).await;
        }
        // The operator's volumes have the name of their id, and say whose they are.
        let Some(uid) = id.strip_prefix(&names::volume_name("")).filter(|uid| !uid.contains('/')) else {
            return Ok(None);
        };
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        let volume = volumes.get_opt(id).await.map_err(Failure::api(|| format!("read volume {id}")))?;
        let csi = volume.and_then(|volume| volume.spec?.csi).filter(|csi| csi.driver == names::CSI_DRIVER);
        let Some(attributes) = csi.and_then(|csi| csi.volume_attributes) else { return Ok(None) };
        let attribute = |key: &str| attributes.get(key).cloned().unwrap_or_default();
        let at = Id { namespace: attribute(names::ATTRIBUTE_NAMESPACE), name: attribute(names::ATTRIBUTE_SESSION) };
        Ok(read(&at).await?.filter(|session| session.uid().as_deref() == Some(uid)))
    }

    /// The checkpoint that a snapshot is.
    pub(super) async fn checkpoint(&self, id: &str) -> Result<Option<AetherCheckpoint>> {
        let Some(at) = Id::parse(id) else { return Ok(None) };
        let api = Api::<AetherCheckpoint>::namespaced(self.client.clone(), &at.namespace);
        api.get_opt(&at.name).await.map_err(Failure::api(|| format!("read checkpoint {at}")))
    }
}

/// The bytes that a session was made with, 0 if nobody said.
pub(super) fn capacity(session: &AetherSession) -> i64 {
    session.annotations().get(CSI_CAPACITY_ANNOTATION).and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// What a pod's mount of the volume needs to know.
pub(super) fn context(session: &AetherSession) -> HashMap<String, String> {
    HashMap::from([
        (names::ATTRIBUTE_NAMESPACE.into(), session.namespace().unwrap_or_default()),
        (names::ATTRIBUTE_SESSION.into(), session.name_any()),
        (names::ATTRIBUTE_SESSION_UID.into(), session.uid().unwrap_or_default()),
    ])
}

/// `NAMESPACE/NAME`, or `NAME` in the claim's namespace.
fn source(parameters: &HashMap<String, String>) -> Result<SourceReference> {
    let text = parameters.get(INLINE_SOURCE).filter(|text| !text.is_empty()).ok_or_else(|| {
        Failure::Invalid(format!(
            "the class has no parameter {INLINE_SOURCE} (NAMESPACE/NAME of an AetherSource), so its sessions are made by aether-operator, from the claim's annotation {}",
            names::CLAIM_SOURCE_ANNOTATION
        ))
    })?;
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name),
        None => (None, text.as_str()),
    };
    if name.is_empty() || name.contains('/') || namespace.as_ref().is_some_and(String::is_empty) {
        return Err(Failure::Invalid(format!(
            "parameter {INLINE_SOURCE} of the class is {text:?}: say NAMESPACE/NAME of an AetherSource"
        )));
    }
    Ok(SourceReference { namespace, name: name.into(), revision: None })
}

/// A session starts from checkpoints and sessions of its own namespace only.
fn same_namespace(kind: &str, id: &str, found: &impl kube::ResourceExt, namespace: &str) -> Result<()> {
    if found.namespace().as_deref() == Some(namespace) {
        return Ok(());
    }
    Err(Failure::Denied(format!(
        "{kind} {id} is {}, which a claim in namespace {namespace} cannot start from",
        full_name(found)
    )))
}

pub(super) fn no_such(kind: &str, id: &str) -> Failure {
    Failure::NotFound(format!("{kind} {id:?} does not exist"))
}
