//! The rules of a source's spec, said again for API servers that drop CEL rules, and the checks of what it names.

use std::time::Duration;

use aether_api::AetherSourceSpec;
use aether_api::conditions::reason;
use aether_api::source::GitSource;
use k8s_openapi::api::core::v1::Secret;

/// The shortest refresh interval.
const MINIMUM_REFRESH: Duration = Duration::from_secs(10);

/// The first rule that the spec breaks, for people.
pub(super) fn violation(spec: &AetherSourceSpec) -> Option<String> {
    let kinds = [spec.git.is_some(), spec.claim.is_some(), spec.empty.is_some()];
    if kinds.into_iter().filter(|said| *said).count() != 1 {
        return Some("say exactly one of spec.git, spec.claim and spec.empty".into());
    }
    if let Some(git) = &spec.git
        && let Some(violation) = git_violation(git)
    {
        return Some(violation);
    }
    if let Some(claim) = &spec.claim {
        if claim.claim_name.is_empty() {
            return Some("spec.claim.claimName is empty: name a PersistentVolumeClaim".into());
        }
        if let Some(path) = &claim.path
            && (path.starts_with('/') || path.split('/').any(|part| part == ".."))
        {
            return Some(format!(
                "spec.claim.path {path:?} leaves the volume: say a directory relative to its root, without .."
            ));
        }
    }
    if spec.revisions_to_keep < 1 {
        return Some("spec.revisionsToKeep is 0: keep at least one revision".into());
    }
    if let Some(refresh) = spec.refresh
        && (refresh.is_negative() || Duration::from(refresh) < MINIMUM_REFRESH)
    {
        return Some(format!("spec.refresh is under {} s: say a duration such as 15m", MINIMUM_REFRESH.as_secs()));
    }
    None
}

fn git_violation(git: &GitSource) -> Option<String> {
    let url = git.url.as_str();
    let schemes = ["https://", "http://", "ssh://", "git://", "file://"];
    if let Some(violation) = credentials_violation(url) {
        return Some(violation);
    }
    if !(schemes.iter().any(|scheme| url.starts_with(scheme)) || is_scp_like(url)) || url.contains(char::is_whitespace)
    {
        return Some(format!(
            "spec.git.url {url:?} is not a repository's URL: say https://, ssh://, file:// or user@host:path"
        ));
    }
    if let Some(reference) = &git.reference
        && (reference.is_empty()
            || reference.starts_with('-')
            || reference.contains(|c: char| c.is_whitespace() || c.is_control() || "~^:?*[\\".contains(c)))
    {
        return Some(format!("spec.git.ref {reference:?} is not a branch, tag, ref or commit id"));
    }
    if git.depth == Some(0) {
        return Some("spec.git.depth is 0: leave it out for all of the history".into());
    }
    if git.secret_ref.as_ref().is_some_and(|secret| secret.name.is_empty()) {
        return Some("spec.git.secretRef.name is empty: name a Secret of the source's namespace".into());
    }
    None
}

/// Everybody who may see the source can read its URL, and so can whoever sees its Job: it must hold no credentials. Over
/// http a user alone may be a token; over ssh it is not secret. What is found is not repeated.
fn credentials_violation(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let (user, _) = authority.rsplit_once('@')?;
    if scheme.to_ascii_lowercase().starts_with("http") {
        return Some("spec.git.url has credentials in it, which everybody can read: put username and password into a Secret and name that in spec.git.secretRef".into());
    }
    user.contains(':').then(|| "spec.git.url has a password in it, which everybody can read: put a key into a Secret and name that in spec.git.secretRef".into())
}

/// Whether the URL has the form `user@host:path`.
fn is_scp_like(url: &str) -> bool {
    let Some((host, path)) = url.split_once(':') else { return false };
    !path.is_empty()
        && !path.starts_with("//")
        && !host.is_empty()
        && !host.contains('/')
        && !host.starts_with('-')
        && host.contains('@')
}

/// Whether the repository is reached through ssh.
fn is_ssh(git: &GitSource) -> bool {
    git.url.starts_with("ssh://") || is_scp_like(&git.url)
}

/// What the Secret lacks for this repository: a reason and a message.
pub(super) fn secret_violation(git: &GitSource, name: &str, secret: &Secret) -> Option<(&'static str, String)> {
    let has =
        |key: &str| secret.data.as_ref().is_some_and(|data| data.get(key).is_some_and(|value| !value.0.is_empty()));
    let message = if is_ssh(git) {
        if !has("ssh-privatekey") {
            format!("Secret {name} lacks the key ssh-privatekey, which {} needs", git.url)
        } else if !has("known_hosts") {
            format!(
                "Secret {name} lacks the key known_hosts, without which no host can be trusted: add the output of ssh-keyscan HOST"
            )
        } else {
            return None;
        }
    } else if !has("password") && !has("ca.crt") {
        format!("Secret {name} lacks the key password (with username), which {} needs", git.url)
    } else {
        return None;
    };
    Some((reason::SECRET_INVALID, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::source::{ClaimSource, EmptySource};
    use k8s_openapi::ByteString;

    fn git(url: &str) -> AetherSourceSpec {
        AetherSourceSpec {
            git: Some(GitSource { url: url.into(), ..Default::default() }),
            revisions_to_keep: 1,
            ..Default::default()
        }
    }

    #[test]
    fn urls_that_git_knows_are_taken() {
        for good in [
            "https://example.org/a.git",
            "ssh://git@example.org/a",
            "git@example.org:team/a.git",
            "file:///srv/a",
            "http://10.0.0.1:8080/a",
        ] {
            assert_eq!(violation(&git(good)), None, "{good}");
        }
        for bad in ["", "example.org/a", "--upload-pack=x:y", "ext::sh -c x", "a b@c:d", "host:path"] {
            assert!(violation(&git(bad)).is_some(), "{bad}");
        }
        for told in [
            "https://me:secret@example.org/a",
            "https://secret@example.org/a",
            "HTTPS://me:secret@h/a",
            "ssh://git:secret@example.org/a",
            "ftp://me:secret@h",
        ] {
            let message = violation(&git(told)).unwrap();
            assert!(message.contains("secretRef") && !message.contains("secret@"), "{message}");
        }
        for good in ["https://example.org/a@b", "https://example.org/?a=b:c@d"] {
            assert_eq!(violation(&git(good)), None, "{good}");
        }
    }

    #[test]
    fn each_rule_names_its_field() {
        let mut two = git("file:///a");
        two.empty = Some(EmptySource {});
        assert!(violation(&two).unwrap().contains("exactly one"));
        let claim = AetherSourceSpec {
            claim: Some(ClaimSource { claim_name: "data".into(), path: Some("../x".into()) }),
            revisions_to_keep: 1,
            ..Default::default()
        };
        assert!(violation(&claim).unwrap().contains("spec.claim.path"));
        let mut none_kept = git("file:///a");
        none_kept.revisions_to_keep = 0;
        assert!(violation(&none_kept).unwrap().contains("revisionsToKeep"));
        let mut often = git("file:///a");
        often.refresh = Some(Duration::from_secs(1).into());
        assert!(violation(&often).unwrap().contains("refresh"));
        let mut reference = git("file:///a");
        reference.git.as_mut().unwrap().reference = Some("--help".into());
        assert!(violation(&reference).unwrap().contains("spec.git.ref"));
    }

    #[test]
    fn a_secret_must_fit_its_url() {
        let secret = |keys: &[&str]| Secret {
            data: Some(keys.iter().map(|key| ((*key).into(), ByteString(b"x".to_vec()))).collect()),
            ..Default::default()
        };
        let ssh = git("git@example.org:a").git.unwrap();
        let https = git("https://example.org/a").git.unwrap();
        assert!(secret_violation(&ssh, "key", &secret(&["password"])).unwrap().1.contains("ssh-privatekey"));
        assert!(secret_violation(&ssh, "key", &secret(&["ssh-privatekey"])).unwrap().1.contains("ssh-keyscan"));
        assert_eq!(secret_violation(&ssh, "key", &secret(&["ssh-privatekey", "known_hosts"])), None);
        assert!(secret_violation(&https, "key", &secret(&["ssh-privatekey"])).unwrap().1.contains("password"));
        assert_eq!(secret_violation(&https, "key", &secret(&["username", "password"])), None);
    }
}
