//! Claims that ask for a session of their own: any claim whose StorageClass has the provisioner `csi.aether.dev` and
//! whose annotation `aether.dev/source` names a source. The session is made here; it belongs to the claim and goes
//! with it, and its own reconciler makes the volume. What the claim asks for is the session's limit, and asking for more raises it.
//!
//! A class that says itself what its volumes start from, and a claim with a data source (a snapshot, another claim), are
//! left to the standard provisioner and the driver's CSI Controller service, so that no claim gets two volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use aether_api::conditions::{Wanted, reason};
use aether_api::names::{self, CLAIM_OWNER_ANNOTATION, CLAIM_SOURCE_ANNOTATION};
use aether_api::session::{ClaimPolicy, Limits, Owner, SourceReference};
use aether_api::{AetherSession, AetherSessionSpec, quantity};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::core::ObjectMeta;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::{Resource, ResourceExt};
use serde_json::json;

use crate::context::Context;
use crate::error::Result;
use crate::objects;

/// Makes the session of a claim that asks for one.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<PersistentVolumeClaim>, context: Arc<Context>) -> Result<Action> {
    if is_bound_to_us(&seen) {
        return expand(&seen, &context).await;
    }
    if !may_ask(&seen) {
        return Ok(Action::await_change());
    }
    let class = seen.spec.as_ref().and_then(|spec| spec.storage_class_name.clone()).unwrap_or_default();
    let class = objects::get::<StorageClass>(&objects::cluster(&context.client), &class).await?;
    if class.is_none_or(|class| class.provisioner != names::CSI_DRIVER || has_source(&class)) {
        return Ok(Action::await_change());
    }
    let session = match build(&seen) {
        Ok(session) => session,
        Err(message) => {
            context.warn(seen.as_ref(), &Wanted::no(aether_api::conditions::READY, reason::INVALID, message)).await;
            return Ok(Action::await_change());
        }
    };
    let sessions = objects::namespaced::<AetherSession>(&context.client, &seen.namespace().unwrap_or_default());
    let there = match objects::get(&sessions, &session.name_any()).await? {
        Some(there) => Some(there),
        None => objects::create(&sessions, &session).await?,
    };
    if there.is_some_and(|there| !objects::is_owned_by(&there, seen.as_ref())) {
        let name = session.name_any();
        let message = format!(
            "an AetherSession named {name} exists and is not of this claim: mount its own claim, or give this claim another name"
        );
        context.warn(seen.as_ref(), &Wanted::no(aether_api::conditions::READY, reason::NAME_TAKEN, message)).await;
    }
    Ok(Action::await_change())
}

/// Whether the claim has a volume of ours, and is of a class: other claims cannot be resized.
fn is_bound_to_us(claim: &PersistentVolumeClaim) -> bool {
    let spec = claim.spec.as_ref();
    claim.meta().deletion_timestamp.is_none()
        && spec.is_some_and(|spec| {
            spec.storage_class_name.as_deref().is_some_and(|class| !class.is_empty())
                && spec.volume_name.as_deref().is_some_and(|volume| volume.starts_with(names::VOLUME_PREFIX))
        })
}

/// Gives a claim what it asks for more than it has: first the session's limit, which the node that holds it applies at
/// once, then the volume's size, by which the kubelet knows that it must tell the claim.
async fn expand(claim: &PersistentVolumeClaim, context: &Context) -> Result<Action> {
    let Some(Ok(wanted)) = asked(claim) else { return Ok(Action::await_change()) };
    let volumes = objects::cluster::<PersistentVolume>(&context.client);
    let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
    let Some(volume) = objects::get(&volumes, &name).await? else { return Ok(Action::await_change()) };
    let has = volume.spec.as_ref().and_then(|spec| size(spec.capacity.as_ref())).unwrap_or(Ok(0));
    if has.is_ok_and(|has| has >= wanted) {
        return Ok(Action::await_change());
    }
    let text = requested(claim).map(|quantity| quantity.0.clone());
    let sessions = objects::namespaced::<AetherSession>(&context.client, &claim.namespace().unwrap_or_default());
    if let Some(session) = objects::get(&sessions, &claim.name_any()).await?
        && objects::is_owned_by(&session, claim)
    {
        let limit = session.spec.limits.as_ref().and_then(|limits| limits.parsed_bytes().ok()?);
        if limit.is_some_and(|limit| limit < wanted) {
            objects::merge(&sessions, &session, &json!({"spec": {"limits": {"bytes": text}}})).await?;
        }
        objects::merge(&volumes, &volume, &json!({"spec": {"capacity": {"storage": text}}})).await?;
        let note = format!("may write {} now", text.unwrap_or_default());
        context.tell(claim, EventType::Normal, "Expanded", &note).await;
    }
    Ok(Action::await_change())
}

fn requested(claim: &PersistentVolumeClaim) -> Option<&Quantity> {
    claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage")
}

/// The bytes that a claim asks for.
fn asked(claim: &PersistentVolumeClaim) -> Option<std::result::Result<u64, String>> {
    requested(claim).map(|quantity| quantity::parse(&quantity.0))
}

fn size(capacity: Option<&BTreeMap<String, Quantity>>) -> Option<std::result::Result<u64, String>> {
    capacity?.get("storage").map(|quantity| quantity::parse(&quantity.0))
}

/// Whether a class says what its volumes start from.
fn has_source(class: &StorageClass) -> bool {
    class.parameters.as_ref().is_some_and(|parameters| parameters.contains_key(names::INLINE_SOURCE))
}

/// Whether it is worth asking for the claim's class: it names one, starts from nothing else, is not bound, and is not going.
fn may_ask(claim: &PersistentVolumeClaim) -> bool {
    let spec = claim.spec.as_ref();
    claim.meta().deletion_timestamp.is_none()
        && spec.is_some_and(|spec| {
            spec.storage_class_name.as_deref().is_some_and(|class| !class.is_empty())
                && spec.volume_name.as_deref().unwrap_or_default().is_empty()
                && spec.data_source.is_none()
                && spec.data_source_ref.is_none()
        })
}

/// The session that the claim asks for, or what is wrong with the question.
fn build(claim: &PersistentVolumeClaim) -> std::result::Result<AetherSession, String> {
    let name = claim.name_any();
    let annotation =
        |key: &str| claim.annotations().get(key).map(|value| value.trim()).filter(|value| !value.is_empty());
    let Some(source) = annotation(CLAIM_SOURCE_ANNOTATION) else {
        return Err(format!(
            "claim {name} says not what to start from: annotate it with {CLAIM_SOURCE_ANNOTATION}: NAMESPACE/NAME of an AetherSource"
        ));
    };
    let (namespace, source) = match source.split_once('/') {
        None => (None, source),
        Some((namespace, source)) => (Some(namespace), source),
    };
    if source.is_empty() || source.contains('/') || namespace.is_some_and(str::is_empty) {
        return Err(format!(
            "annotation {CLAIM_SOURCE_ANNOTATION} of claim {name} must be NAMESPACE/NAME or NAME of an AetherSource"
        ));
    }
    let owner = annotation(CLAIM_OWNER_ANNOTATION)
        .map(str::parse::<Owner>)
        .transpose()
        .map_err(|wrong| format!("annotation {CLAIM_OWNER_ANNOTATION} of claim {name}: {wrong}"))?;
    if claim.spec.as_ref().is_some_and(|spec| spec.volume_mode.as_deref() == Some("Block")) {
        return Err(format!(
            "claim {name} asks for a block device, but a session is a directory: leave volumeMode out"
        ));
    }
    if let Some(Err(wrong)) = asked(claim) {
        return Err(format!("claim {name} asks for a size that cannot be the session's limit: {wrong}"));
    }
    let limits = requested(claim).map(|quantity| Limits { bytes: Some(quantity.0.clone()), inodes: None });
    Ok(AetherSession {
        metadata: ObjectMeta {
            name: claim.meta().name.clone(),
            namespace: claim.meta().namespace.clone(),
            owner_references: Some(objects::owned_by(claim)),
            ..ObjectMeta::default()
        },
        spec: AetherSessionSpec {
            source: Some(SourceReference { namespace: namespace.map(Into::into), name: source.into(), revision: None }),
            owner,
            limits,
            claim: ClaimPolicy::Existing,
            ..AetherSessionSpec::default()
        },
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{
        PersistentVolumeClaimSpec, TypedLocalObjectReference, VolumeResourceRequirements,
    };

    fn claim(annotations: &[(&str, &str)]) -> PersistentVolumeClaim {
        PersistentVolumeClaim {
            metadata: ObjectMeta {
                name: Some("work".into()),
                namespace: Some("agents".into()),
                uid: Some("c-1".into()),
                annotations: Some(annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()),
                ..Default::default()
            },
            spec: Some(PersistentVolumeClaimSpec { storage_class_name: Some("aether".into()), ..Default::default() }),
            status: None,
        }
    }

    #[test]
    fn the_annotation_names_the_source() {
        let session =
            build(&claim(&[(CLAIM_SOURCE_ANNOTATION, "platform/linux"), (CLAIM_OWNER_ANNOTATION, "1001:100")]))
                .unwrap();
        let source = session.spec.source.clone().unwrap();
        assert_eq!((source.namespace.as_deref(), source.name.as_str()), (Some("platform"), "linux"));
        assert_eq!(session.spec.owner, Some(Owner { uid: 1001, gid: 100 }));
        assert!(objects::is_owned_by(&session, &claim(&[])), "it goes with the claim");
        let own = build(&claim(&[(CLAIM_SOURCE_ANNOTATION, "linux")])).unwrap();
        assert_eq!(own.spec.source.unwrap().namespace, None);
    }

    #[test]
    fn what_the_claim_asks_for_is_the_limit() {
        let asking = |size: &str| {
            let mut claim = claim(&[(CLAIM_SOURCE_ANNOTATION, "linux")]);
            let requests = BTreeMap::from([("storage".to_owned(), Quantity(size.into()))]);
            claim.spec.as_mut().unwrap().resources =
                Some(VolumeResourceRequirements { requests: Some(requests), ..Default::default() });
            claim
        };
        let limits = build(&asking("7Gi")).unwrap().spec.limits.unwrap();
        assert_eq!(limits.parsed_bytes(), Ok(Some(7 << 30)));
        assert!(build(&asking("1e9")).unwrap_err().contains("1e9"));
        assert_eq!(build(&claim(&[(CLAIM_SOURCE_ANNOTATION, "linux")])).unwrap().spec.limits, None);
        let mut bound = asking("8Gi");
        assert!(!is_bound_to_us(&bound));
        bound.spec.as_mut().unwrap().volume_name = Some("aether-s-1".into());
        assert!(is_bound_to_us(&bound));
        bound.spec.as_mut().unwrap().storage_class_name = Some(String::new());
        assert!(!is_bound_to_us(&bound), "Kubernetes resizes no claim without a class");
    }

    #[test]
    fn a_wrong_annotation_is_answered_with_the_right_form() {
        for (bad, says) in [
            (&[][..], "annotate it with"),
            (&[(CLAIM_SOURCE_ANNOTATION, "a/b/c")], "NAMESPACE/NAME"),
            (&[(CLAIM_SOURCE_ANNOTATION, "/b")], "NAMESPACE/NAME"),
            (&[(CLAIM_SOURCE_ANNOTATION, "b"), (CLAIM_OWNER_ANNOTATION, "root")], "UID:GID"),
        ] {
            let message = build(&claim(bad)).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn only_an_unbound_claim_with_a_class_may_ask() {
        assert!(may_ask(&claim(&[])));
        let mut bound = claim(&[]);
        bound.spec.as_mut().unwrap().volume_name = Some("v".into());
        assert!(!may_ask(&bound));
        let mut ours = claim(&[]);
        ours.spec.as_mut().unwrap().storage_class_name = Some(String::new());
        assert!(!may_ask(&ours));
    }

    #[test]
    fn what_the_controller_service_makes_is_left_to_it() {
        let mut restored = claim(&[]);
        restored.spec.as_mut().unwrap().data_source = Some(TypedLocalObjectReference {
            api_group: Some("snapshot.storage.k8s.io".into()),
            kind: "VolumeSnapshot".into(),
            name: "yesterday".into(),
        });
        assert!(!may_ask(&restored));
        let mut class = StorageClass { provisioner: names::CSI_DRIVER.into(), ..Default::default() };
        assert!(!has_source(&class));
        class.parameters = Some([("source".into(), "platform/linux".into())].into());
        assert!(has_source(&class));
    }
}
