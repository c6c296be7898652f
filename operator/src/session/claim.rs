//! The claim contract: a claim first, then a volume that is reserved for exactly that claim.
//!
//! The order and the missing `volumeName` make the binder bind at once instead of at its next resync. The
//! volume carries the uid of the claim, so a claim of the same name that somebody makes later never gets the session.

use std::collections::BTreeMap;

use aether_api::AetherSession;
use aether_api::conditions::reason;
use aether_api::names;
use aether_api::session::ClaimPolicy;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PersistentVolumeSpec, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::{Resource, ResourceExt};

use super::base::Waiting;
use crate::objects;

/// Kubernetes demands a size of every claim; a session's limits are not said here.
const NOMINAL_SIZE: &str = "1Gi";
/// One node writes, and any number of them may read. The kubelet hands the first to the driver.
const ACCESS_MODES: [&str; 2] = ["ReadWriteOnce", "ReadOnlyMany"];

/// What to do next for a session's claim.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    CreateClaim,
    CreateVolume(Box<PersistentVolume>),
    DeleteVolume(Box<PersistentVolume>),
    Wait(Waiting),
    Bound,
}

/// Decides on the next step from what there is.
pub(super) fn next(
    session: &AetherSession,
    claim: Option<&PersistentVolumeClaim>,
    volume: Option<&PersistentVolume>,
) -> Step {
    let name = session.name_any();
    let Some(claim) = claim else {
        return match session.spec.claim {
            ClaimPolicy::Existing => Step::Wait(Waiting::quietly(
                reason::WAITING_FOR_CLAIM,
                format!("claim {name}, which asked for the session, is gone"),
            )),
            ClaimPolicy::Create | ClaimPolicy::None => Step::CreateClaim,
        };
    };
    if claim.meta().deletion_timestamp.is_some() {
        let message = format!(
            "claim {name} is being deleted and goes when no pod uses it any more; then there will be a new one"
        );
        return Step::Wait(Waiting::quietly(reason::WAITING_FOR_CLAIM, message));
    }
    if is_of_predecessor(claim, session) {
        let message = format!(
            "claim {name} is of a deleted session of this name and goes when no pod uses it any more; then there will be a new one"
        );
        return Step::Wait(Waiting::quietly(reason::WAITING_FOR_CLAIM, message));
    }
    if !belongs_to(claim, session) {
        let message = format!(
            "a claim named {name} exists and is not the session's: delete that claim, or make a session of another name"
        );
        return Step::Wait(Waiting::fatally(reason::NAME_TAKEN, message));
    }
    let Some(volume) = volume else { return Step::CreateVolume(Box::new(self::volume(session, claim))) };
    let volume_name = volume.name_any();
    if volume.meta().deletion_timestamp.is_some() {
        let message = format!("volume {volume_name} is being deleted; then there will be a new one");
        return Step::Wait(Waiting::quietly(reason::WAITING_FOR_CLAIM, message));
    }
    let reserved = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()?.uid.clone());
    if reserved != claim.uid() {
        return Step::DeleteVolume(Box::new(volume.clone()));
    }
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    let bound_to = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    match (phase, bound_to) {
        ("Bound", bound_to) if bound_to == volume_name => Step::Bound,
        ("Bound", other) => {
            let message =
                format!("claim {name} is bound to volume {other}, which is not the session's: delete the claim");
            Step::Wait(Waiting::fatally(reason::NAME_TAKEN, message))
        }
        _ => Step::Wait(Waiting::quietly(
            reason::WAITING_FOR_CLAIM,
            format!("claim {name} waits for Kubernetes to bind it to volume {volume_name}"),
        )),
    }
}

/// Whether claim and session belong together: the one that was there first owns the other.
pub(super) fn belongs_to(claim: &PersistentVolumeClaim, session: &AetherSession) -> bool {
    match session.spec.claim {
        ClaimPolicy::Create => objects::is_owned_by(claim, session),
        ClaimPolicy::Existing => objects::is_owned_by(session, claim),
        ClaimPolicy::None => false,
    }
}

fn labels(session: &AetherSession) -> BTreeMap<String, String> {
    BTreeMap::from([
        (names::SESSION_UID_LABEL.into(), session.uid().unwrap_or_default()),
        (names::SESSION_LABEL.into(), objects::label_value(&session.name_any())),
    ])
}

/// Whether the claim is of a session of the same name that was deleted.
fn is_of_predecessor(claim: &PersistentVolumeClaim, session: &AetherSession) -> bool {
    claim.owner_references().iter().any(|owner| {
        owner.controller == Some(true)
            && owner.kind == AetherSession::kind(&())
            && owner.name == session.name_any()
            && Some(&owner.uid) != session.meta().uid.as_ref()
    })
}

/// The claim by which pods mount the session.
pub(super) fn claim(session: &AetherSession) -> PersistentVolumeClaim {
    let selector = BTreeMap::from([(names::SESSION_UID_LABEL.into(), session.uid().unwrap_or_default())]);
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: session.meta().name.clone(),
            namespace: session.meta().namespace.clone(),
            labels: Some(labels(session)),
            owner_references: Some(objects::owned_by(session)),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(ACCESS_MODES.map(Into::into).to_vec()),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([("storage".into(), Quantity(NOMINAL_SIZE.into()))])),
                ..VolumeResourceRequirements::default()
            }),
            selector: Some(LabelSelector { match_labels: Some(selector), ..LabelSelector::default() }),
            // Empty, not absent: absent would mean the cluster's default class, which would provision a disk.
            storage_class_name: Some(String::new()),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// The volume that is reserved for `claim`.
pub(super) fn volume(session: &AetherSession, claim: &PersistentVolumeClaim) -> PersistentVolume {
    let uid = session.uid().unwrap_or_default();
    let name = names::volume_name(&uid);
    let asked = claim.spec.clone().unwrap_or_default();
    let size = asked.resources.and_then(|resources| resources.requests?.get("storage").cloned());
    PersistentVolume {
        metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels(session)), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeSpec {
            access_modes: asked.access_modes,
            capacity: Some(BTreeMap::from([("storage".into(), size.unwrap_or_else(|| Quantity(NOMINAL_SIZE.into())))])),
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                namespace: claim.namespace(),
                name: Some(claim.name_any()),
                uid: claim.uid(),
                ..ObjectReference::default()
            }),
            csi: Some(CSIPersistentVolumeSource {
                driver: names::CSI_DRIVER.into(),
                volume_handle: name,
                volume_attributes: Some(BTreeMap::from([
                    (names::ATTRIBUTE_NAMESPACE.into(), session.namespace().unwrap_or_default()),
                    (names::ATTRIBUTE_SESSION.into(), session.name_any()),
                    (names::ATTRIBUTE_SESSION_UID.into(), uid),
                ])),
                ..CSIPersistentVolumeSource::default()
            }),
            persistent_volume_reclaim_policy: Some("Retain".into()),
            storage_class_name: asked.storage_class_name.filter(|class| !class.is_empty()),
            volume_mode: Some("Filesystem".into()),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PersistentVolumeClaimStatus;

    fn session() -> AetherSession {
        let mut session = AetherSession::new("fix", Default::default());
        session.metadata.namespace = Some("agents".into());
        session.metadata.uid = Some("s-1".into());
        session
    }

    fn made(session: &AetherSession, uid: &str) -> PersistentVolumeClaim {
        let mut claim = claim(session);
        claim.metadata.uid = Some(uid.into());
        claim
    }

    fn bound(mut claim: PersistentVolumeClaim, to: &str) -> PersistentVolumeClaim {
        claim.spec.as_mut().unwrap().volume_name = Some(to.into());
        claim.status = Some(PersistentVolumeClaimStatus { phase: Some("Bound".into()), ..Default::default() });
        claim
    }

    fn waits_for(step: Step) -> &'static str {
        let Step::Wait(waiting) = step else { panic!("{step:?}") };
        waiting.reason
    }

    #[test]
    fn the_claim_comes_first_then_the_volume_then_the_binder() {
        let session = session();
        assert_eq!(next(&session, None, None), Step::CreateClaim);
        let claim = made(&session, "c-1");
        let Step::CreateVolume(volume) = next(&session, Some(&claim), None) else { panic!("no volume") };
        assert_eq!(waits_for(next(&session, Some(&claim), Some(&volume))), reason::WAITING_FOR_CLAIM);
        assert_eq!(next(&session, Some(&bound(claim, "aether-s-1")), Some(&volume)), Step::Bound);
    }

    #[test]
    fn a_new_claim_gets_a_new_volume() {
        let session = session();
        let old = volume(&session, &made(&session, "c-1"));
        let renewed = made(&session, "c-2");
        assert_eq!(next(&session, None, Some(&old)), Step::CreateClaim);
        assert_eq!(next(&session, Some(&renewed), Some(&old)), Step::DeleteVolume(Box::new(old.clone())));
        let mut going = old;
        going.metadata.deletion_timestamp = Some(objects::now());
        assert_eq!(waits_for(next(&session, Some(&renewed), Some(&going))), reason::WAITING_FOR_CLAIM);
    }

    #[test]
    fn a_claim_of_somebody_else_is_left_alone() {
        let session = session();
        let mut foreign = made(&session, "c-1");
        foreign.metadata.owner_references = None;
        assert_eq!(waits_for(next(&session, Some(&foreign), None)), reason::NAME_TAKEN);
        let mine = made(&session, "c-1");
        let volume = volume(&session, &mine);
        assert_eq!(waits_for(next(&session, Some(&bound(mine, "disk")), Some(&volume))), reason::NAME_TAKEN);
    }

    #[test]
    fn what_a_deleted_session_of_the_name_leaves_is_waited_for() {
        let mut before = session();
        before.metadata.uid = Some("s-0".into());
        let left = made(&before, "c-0");
        assert_eq!(waits_for(next(&session(), Some(&left), None)), reason::WAITING_FOR_CLAIM);
        let mut foreign = made(&before, "c-0");
        foreign.metadata.owner_references = None;
        foreign.metadata.deletion_timestamp = Some(objects::now());
        assert_eq!(waits_for(next(&session(), Some(&foreign), None)), reason::WAITING_FOR_CLAIM);
    }

    #[test]
    fn an_existing_claim_owns_its_session_and_its_wishes_are_met() {
        let mut claim = PersistentVolumeClaim::default();
        claim.metadata.name = Some("fix".into());
        claim.metadata.namespace = Some("agents".into());
        claim.metadata.uid = Some("c-9".into());
        claim.spec = Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteMany".into()]),
            storage_class_name: Some("aether".into()),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([("storage".into(), Quantity("7Gi".into()))])),
                ..Default::default()
            }),
            ..Default::default()
        });
        let mut session = session();
        session.spec.claim = ClaimPolicy::Existing;
        assert_eq!(waits_for(next(&session, Some(&claim), None)), reason::NAME_TAKEN);
        session.metadata.owner_references = Some(objects::owned_by(&claim));
        let Step::CreateVolume(volume) = next(&session, Some(&claim), None) else { panic!("no volume") };
        let spec = volume.spec.unwrap();
        assert_eq!(spec.storage_class_name.as_deref(), Some("aether"));
        assert_eq!(spec.capacity.unwrap()["storage"].0, "7Gi");
        assert_eq!(spec.access_modes.unwrap(), ["ReadWriteMany"]);
        assert_eq!(spec.claim_ref.unwrap().uid.as_deref(), Some("c-9"));
        assert_eq!(
            waits_for(next(&session, None, None)),
            reason::WAITING_FOR_CLAIM,
            "it never makes that claim itself"
        );
    }
}
