//! Names: what a volume or snapshot is called in CSI, and what the object behind it is called in Kubernetes.
//!
//! A caller names a volume before it exists and gets the same one when it asks again, so the object's name follows from
//! the caller's. The id that the caller gets is `NAMESPACE/NAME` of the object. Volumes that the operator made have the
//! id `aether-<uid of the session>`.

use std::fmt;

use aether_cas::Digest;

/// Annotation on objects that this service made: the caller's name for them. Others it never deletes.
pub(super) const CSI_NAME_ANNOTATION: &str = "aether.dev/csi-name";

/// An object that a volume or a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id {
    pub namespace: String,
    pub name: String,
}

impl Id {
    /// Reads an id; `None` for what this service never gave out.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        let dotted = |name: &str| name.len() <= 253 && name.split('.').all(is_label);
        (is_label(namespace) && dotted(name)).then(|| Self { namespace: namespace.into(), name: name.into() })
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The object's name for what a caller calls `name`: the same where Kubernetes takes it, as it does what its own sidecars
/// say (`pvc-<uid>`, `snapshot-<uid>`). A session's name is a label value too.
pub(super) fn object_name(name: &str) -> String {
    if is_label(name) { name.to_owned() } else { format!("csi-{}", &Digest::of(name.as_bytes()).to_string()[..32]) }
}

/// A DNS label, as RFC 1123 has it.
fn is_label(text: &str) -> bool {
    let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| plain(&byte))
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written() {
        let id = Id { namespace: "team".into(), name: "pvc-1".into() };
        assert_eq!(Id::parse(&id.to_string()), Some(id));
        assert!(Id::parse("team/fix.v2").is_some());
        for other in ["", "team", "team/", "/fix", "team/fix/more", "team/../x", "Team/fix", "aether-6a3f", "a b/c"] {
            assert_eq!(Id::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn any_name_makes_a_name_that_kubernetes_takes() {
        assert_eq!(object_name("pvc-0f5e7a"), "pvc-0f5e7a");
        let long = "x".repeat(128);
        for name in ["Sanity Controller 1", "a/b", "ünïcode", "-x", long.as_str()] {
            let made = object_name(name);
            assert!(is_label(&made), "{name} -> {made}");
            assert_eq!(made, object_name(name), "the same again");
        }
        assert_ne!(object_name("A"), object_name("B"));
    }
}
