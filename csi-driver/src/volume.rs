//! What a publish asks for, read from the attributes of its volume. Pure: nothing is looked up here.

use std::collections::HashMap;
use std::path::Path;

use aether_api::names;
use aether_api::session::{Limits, Owner};

use crate::failure::{Failure, Result};
use crate::records::Pod;

const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

/// Which session a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// One that exists.
    Session { namespace: String, name: String, uid: Option<String> },
    /// One of its own, made from a source, that lives and dies with the pod.
    Own { pod: Pod, source_namespace: String, source: String, owner: Owner, limits: Option<Limits> },
}

/// The attributes of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub wanted: Wanted,
    /// The pod, where the kubelet says which.
    pub pod: Option<Pod>,
}

impl Volume {
    /// Reads the attributes of a volume.
    ///
    /// # Errors
    /// [`Failure::Invalid`] names the attribute that is missing or wrong, [`Failure::Denied`] the namespace of a session that
    /// is not the pod's.
    pub(crate) fn parse(attributes: &HashMap<String, String>) -> Result<Self> {
        let pod = pod(attributes);
        if attributes.get(EPHEMERAL).is_some_and(|value| value == "true") {
            let pod = pod.ok_or_else(|| {
                Failure::Invalid(format!(
                    "an inline volume needs the pod's name, but the kubelet did not send it: set podInfoOnMount on CSIDriver {}",
                    names::CSI_DRIVER
                ))
            })?;
            return Ok(Self { wanted: inline(attributes, &pod)?, pod: Some(pod) });
        }
        let required = |key: &str| {
            attributes.get(key).filter(|value| !value.is_empty()).cloned().ok_or_else(|| {
                Failure::Invalid(format!("the volume lacks the attribute {key}: was it made by aether-operator?"))
            })
        };
        let (namespace, name) = (required(names::ATTRIBUTE_NAMESPACE)?, required(names::ATTRIBUTE_SESSION)?);
        let uid = Some(required(names::ATTRIBUTE_SESSION_UID)?);
        // Anybody who may make volumes could name any session in one.
        if let Some(pods) = attributes.get(POD_NAMESPACE).filter(|pods| !pods.is_empty() && **pods != namespace) {
            return Err(Failure::Denied(format!(
                "the volume is session {namespace}/{name}, which a pod in namespace {pods} may not mount: run the pod in {namespace}"
            )));
        }
        Ok(Self { wanted: Wanted::Session { namespace, name, uid }, pod })
    }
}

fn pod(attributes: &HashMap<String, String>) -> Option<Pod> {
    let value = |key: &str| attributes.get(key).filter(|value| !value.is_empty()).cloned();
    Some(Pod { namespace: value(POD_NAMESPACE)?, name: value(POD_NAME)?, uid: value(POD_UID)? })
}

/// Only `source`, `session`, `owner` and `limit` may be said: a misspelt attribute must not be ignored.
fn inline(attributes: &HashMap<String, String>, pod: &Pod) -> Result<Wanted> {
    let known = [names::INLINE_SOURCE, names::INLINE_SESSION, names::INLINE_OWNER, names::INLINE_LIMIT];
    if let Some(unknown) =
        attributes.keys().filter(|key| !key.starts_with("csi.storage.k8s.io/") && !known.contains(&key.as_str())).min()
    {
        return Err(Failure::Invalid(format!(
            "volumeAttributes of pod {}/{} has {unknown:?}, but an inline volume knows {} only",
            pod.namespace,
            pod.name,
            known.join(", ")
        )));
    }
    let source = attributes.get(names::INLINE_SOURCE);
    let session = attributes.get(names::INLINE_SESSION);
    match (source, session) {
        (Some(source), None) => {
            let (source_namespace, source) = match source.split_once('/') {
                Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
                None => (pod.namespace.clone(), source.clone()),
            };
            if source.is_empty() || source_namespace.is_empty() || source.contains('/') {
                return Err(Failure::Invalid(format!(
                    "volumeAttributes of pod {}/{}: source must be NAME or NAMESPACE/NAME",
                    pod.namespace, pod.name
                )));
            }
            let owner = attributes.get(names::INLINE_OWNER).map_or_else(
                || Ok(Owner { uid: names::DEFAULT_OWNER.0, gid: names::DEFAULT_OWNER.1 }),
                |text| text.parse().map_err(Failure::Invalid),
            )?;
            let limits = attributes.get(names::INLINE_LIMIT).map(|text| limit(text, pod)).transpose()?;
            Ok(Wanted::Own { pod: pod.clone(), source_namespace, source, owner, limits })
        }
        (None, Some(session)) if attributes.contains_key(names::INLINE_OWNER) => Err(Failure::Invalid(format!(
            "volumeAttributes of pod {}/{}: session {session} has its owner already, so owner goes with source only",
            pod.namespace, pod.name
        ))),
        (None, Some(session)) if attributes.contains_key(names::INLINE_LIMIT) => Err(Failure::Invalid(format!(
            "volumeAttributes of pod {}/{}: session {session} has its limits in its spec, so limit goes with source only",
            pod.namespace, pod.name
        ))),
        (None, Some(session)) if !session.is_empty() && !session.contains('/') => {
            Ok(Wanted::Session { namespace: pod.namespace.clone(), name: session.clone(), uid: None })
        }
        (None, Some(session)) => Err(Failure::Invalid(format!(
            "volumeAttributes of pod {}/{}: session {session:?} is not the name of a session in the pod's namespace",
            pod.namespace, pod.name
        ))),
        _ => Err(Failure::Invalid(format!(
            "volumeAttributes of pod {}/{} must have exactly one of source and session",
            pod.namespace, pod.name
        ))),
    }
}

fn limit(text: &str, pod: &Pod) -> Result<Limits> {
    let limits = Limits { bytes: Some(text.to_owned()), inodes: None };
    match limits.parsed_bytes() {
        Ok(_) => Ok(limits),
        Err(why) => {
            Err(Failure::Invalid(format!("volumeAttributes of pod {}/{}: limit: {why}", pod.namespace, pod.name)))
        }
    }
}

/// The name of the session of an inline volume: the pod's name, so that a person finds it, and enough of the volume
/// id to tell the volumes of one pod, and of two pods of one name, apart.
pub(crate) fn inline_session_name(pod: &str, volume_id: &str) -> String {
    let hash = aether_cas::Digest::of(volume_id.as_bytes()).to_string();
    // Names of objects end at 253 characters, but the session's name is also a label value: 63.
    let mut stem: String = pod.chars().take(63 - 9).collect();
    while stem.ends_with(['-', '.']) {
        stem.pop();
    }
    format!("{stem}-{}", &hash[..8])
}

/// The pod's uid as it stands in a target path: `…/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount`.
pub(crate) fn pod_uid_of_target(target: &Path) -> Option<String> {
    let mut parts = target.components().map(|part| part.as_os_str().to_string_lossy());
    while let Some(part) = parts.next() {
        if part == "pods" {
            let uid = parts.next()?.into_owned();
            return (parts.next()? == "volumes").then_some(uid);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(extra: &[(&str, &str)]) -> HashMap<String, String> {
        [
            (POD_NAME, "agent-7"),
            (POD_NAMESPACE, "team"),
            (POD_UID, "u-7"),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
        ]
        .iter()
        .chain(extra)
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
    }

    fn ephemeral(extra: &[(&str, &str)]) -> Result<Wanted> {
        let mut all = vec![(EPHEMERAL, "true")];
        all.extend(extra);
        Volume::parse(&attributes(&all)).map(|volume| volume.wanted)
    }

    #[test]
    fn a_volume_of_a_claim_names_its_session() {
        let volume = Volume::parse(&attributes(&[
            (EPHEMERAL, "false"),
            (names::ATTRIBUTE_NAMESPACE, "team"),
            (names::ATTRIBUTE_SESSION, "fix"),
            (names::ATTRIBUTE_SESSION_UID, "s-1"),
        ]))
        .unwrap();
        assert_eq!(
            volume.wanted,
            Wanted::Session { namespace: "team".into(), name: "fix".into(), uid: Some("s-1".into()) }
        );
        assert_eq!(volume.pod.unwrap().name, "agent-7");
        let message = Volume::parse(&attributes(&[(names::ATTRIBUTE_NAMESPACE, "team")])).unwrap_err().to_string();
        assert!(message.contains(names::ATTRIBUTE_SESSION), "{message}");
    }

    #[test]
    fn a_volume_names_one_session_of_the_pods_own_namespace() {
        let of = |namespace| [(names::ATTRIBUTE_NAMESPACE, namespace), (names::ATTRIBUTE_SESSION, "fix")];
        let with_uid = |namespace| [of(namespace).as_slice(), &[(names::ATTRIBUTE_SESSION_UID, "s-1")]].concat();
        let message = Volume::parse(&attributes(&of("team"))).unwrap_err().to_string();
        assert!(message.contains(names::ATTRIBUTE_SESSION_UID), "{message}");
        let forged = Volume::parse(&attributes(&with_uid("platform"))).unwrap_err();
        assert!(
            matches!(&forged, Failure::Denied(why) if why.contains("platform/fix") && why.contains("team")),
            "{forged}"
        );
        // A stage names no pod; the publish that follows does.
        let plain = with_uid("platform").into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        assert!(Volume::parse(&plain).is_ok());
    }

    #[test]
    fn an_inline_volume_is_a_source_or_a_session() {
        let own = |namespace: &str, uid, gid| Wanted::Own {
            pod: Pod { namespace: "team".into(), name: "agent-7".into(), uid: "u-7".into() },
            source_namespace: namespace.into(),
            source: "kubernetes".into(),
            owner: Owner { uid, gid },
            limits: None,
        };
        assert_eq!(ephemeral(&[("source", "kubernetes")]).unwrap(), own("team", 1000, 1000));
        assert_eq!(ephemeral(&[("source", "platform/kubernetes"), ("owner", "0:5")]).unwrap(), own("platform", 0, 5));
        let limited = ephemeral(&[("source", "kubernetes"), ("limit", "10Gi")]).unwrap();
        let Wanted::Own { limits: Some(limits), .. } = limited else { panic!("{limited:?}") };
        assert_eq!(limits.parsed_bytes(), Ok(Some(10 << 30)));
        assert_eq!(
            ephemeral(&[("session", "fix")]).unwrap(),
            Wanted::Session { namespace: "team".into(), name: "fix".into(), uid: None }
        );
    }

    #[test]
    fn what_is_wrong_with_an_inline_volume_is_said() {
        for (extra, word) in [
            (vec![], "exactly one"),
            (vec![("source", "a"), ("session", "b")], "exactly one"),
            (vec![("source", "a/b/c")], "NAMESPACE/NAME"),
            (vec![("source", "/b")], "NAMESPACE/NAME"),
            (vec![("source", "a"), ("owner", "me")], "UID:GID"),
            (vec![("session", "other/fix")], "pod's namespace"),
            (vec![("session", "fix"), ("owner", "1:1")], "source only"),
            (vec![("session", "fix"), ("limit", "1Gi")], "source only"),
            (vec![("source", "a"), ("limit", "much")], "limit"),
            (vec![("sorce", "a")], "sorce"),
        ] {
            let message = ephemeral(&extra).unwrap_err().to_string();
            assert!(message.contains(word), "{extra:?}: {message}");
            assert!(message.contains("agent-7") || message.contains("owner"), "{message}");
        }
    }

    #[test]
    fn inline_names_are_stable_distinct_and_valid() {
        let first = inline_session_name("agent-7", "csi-aa");
        assert_eq!(first, inline_session_name("agent-7", "csi-aa"));
        assert_ne!(first, inline_session_name("agent-7", "csi-bb"));
        assert!(first.starts_with("agent-7-"));
        let long = inline_session_name(&format!("{}.{}", "a".repeat(53), "b".repeat(80)), "csi-aa");
        assert!(long.len() <= 63 && !long.contains(".-"), "{long}");
    }

    #[test]
    fn a_target_tells_its_pod() {
        let target = Path::new("/var/lib/kubelet/pods/1-2-3/volumes/kubernetes.io~csi/pv/mount");
        assert_eq!(pod_uid_of_target(target).as_deref(), Some("1-2-3"));
        assert_eq!(pod_uid_of_target(Path::new("/var/lib/kubelet/plugins/x")), None);
    }
}
