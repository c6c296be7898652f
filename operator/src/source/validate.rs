//! The rules of a source's spec, said again for API servers that drop CEL rules, and the checks of what it names.

use std::collections::BTreeSet;
use std::time::Duration;

use aether_api::AetherSourceSpec;
use aether_api::conditions::reason;
use aether_api::review::ExportPlace;
use aether_api::source::{GitSource, S3Source};
use k8s_openapi::api::core::v1::Secret;

use crate::admission::rules;

/// The shortest refresh interval.
const MINIMUM_REFRESH: Duration = Duration::from_secs(10);

/// The first rule that the spec breaks, for people.
pub(super) fn violation(spec: &AetherSourceSpec) -> Option<String> {
    let kinds = [spec.git.is_some(), spec.s3.is_some(), spec.claim.is_some(), spec.empty.is_some()];
    if kinds.into_iter().filter(|said| *said).count() != 1 {
        return Some("say exactly one of spec.git, spec.s3, spec.claim and spec.empty".into());
    }
    if let Some(git) = &spec.git
        && let Some(violation) = git_violation(git)
    {
        return Some(violation);
    }
    if let Some(s3) = &spec.s3
        && let Some(violation) = s3_violation("spec.s3", s3)
    {
        return Some(violation);
    }
    if let Some((kind, secret)) = spec.secret()
        && secret.name.is_empty()
    {
        return Some(format!("spec.{kind}.secretRef.name is empty: name a Secret of the source's namespace"));
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
    if let Some(review) = &spec.review
        && let Some(violation) = exports_violation(&review.exports)
    {
        return Some(violation);
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
    None
}

/// What is wrong with the places that commits may export to.
fn exports_violation(places: &[ExportPlace]) -> Option<String> {
    let mut names = BTreeSet::new();
    places.iter().find_map(|place| {
        let name = &place.name;
        let field = format!("spec.review.exports[{name}]");
        if name.is_empty() || !names.insert(name) {
            return Some(format!("spec.review.exports has a place without a name, or {name:?} twice"));
        }
        match (&place.s3, &place.claim) {
            (Some(s3), None) => {
                let unnamed = s3.secret_ref.as_ref().is_some_and(|secret| secret.name.is_empty());
                s3_violation(&format!("{field}.s3"), s3).or_else(|| {
                    unnamed
                        .then(|| format!("{field}.s3.secretRef.name is empty: name a Secret of the source's namespace"))
                })
            }
            (None, Some(claim)) if claim.name.is_empty() => {
                Some(format!("{field}.claim.name is empty: name a PersistentVolumeClaim"))
            }
            (None, Some(claim)) => {
                let path = claim.path.as_deref()?;
                rules::folder(path).map(|why| format!("{field}.claim.path {path:?} {why}"))
            }
            _ => Some(format!("{field}: say exactly one of s3 and claim")),
        }
    })
}

fn s3_violation(field: &str, s3: &S3Source) -> Option<String> {
    let bucket = &s3.bucket;
    // It becomes a part of a URL.
    let in_a_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if bucket.is_empty() || !bucket.chars().all(in_a_name) || bucket.chars().all(|c| c == '.') {
        return Some(format!("{field}.bucket {bucket:?} is not the name of a bucket"));
    }
    let odd = |part: &str| ["", ".", ".."].contains(&part) || part.contains(char::is_control);
    if let Some(prefix) = &s3.prefix
        && prefix.trim_matches('/').split('/').any(odd)
        && !prefix.is_empty()
    {
        return Some(format!(
            "{field}.prefix {prefix:?} is not a folder of a bucket: say names with one slash between them"
        ));
    }
    if let Some(endpoint) = &s3.endpoint {
        let rest = ["https://", "http://"].iter().find_map(|scheme| endpoint.strip_prefix(scheme));
        if endpoint.contains('@') {
            return Some(format!(
                "{field}.endpoint has credentials in it, which everybody can read: put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into a Secret and name that in {field}.secretRef"
            ));
        }
        if rest.is_none_or(str::is_empty) || endpoint.contains(|c: char| c.is_whitespace() || "?#".contains(c)) {
            return Some(format!(
                "{field}.endpoint {endpoint:?} is not a service's URL: say https://HOST or http://HOST:PORT"
            ));
        }
    }
    if let Some(region) = &s3.region
        && (region.is_empty() || !region.chars().all(in_a_name))
    {
        return Some(format!("{field}.region {region:?} is not a region"));
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

/// What the Secret lacks for this repository or bucket: a reason and a message.
pub(super) fn secret_violation(spec: &AetherSourceSpec, name: &str, secret: &Secret) -> Option<(&'static str, String)> {
    let has =
        |key: &str| secret.data.as_ref().is_some_and(|data| data.get(key).is_some_and(|value| !value.0.is_empty()));
    let message = match &spec.git {
        Some(git) => repository_lacks(git, name, has),
        None => bucket_lacks(name, has),
    };
    message.map(|message| (reason::SECRET_INVALID, message))
}

fn bucket_lacks(name: &str, has: impl Fn(&str) -> bool) -> Option<String> {
    let keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
    let lacking: Vec<&str> = keys.into_iter().filter(|key| !has(key)).collect();
    if lacking.is_empty() || (lacking.len() == keys.len() && has("ca.crt")) {
        return None;
    }
    Some(format!("Secret {name} lacks {}, which the bucket needs", lacking.join(" and ")))
}

fn repository_lacks(git: &GitSource, name: &str, has: impl Fn(&str) -> bool) -> Option<String> {
    if is_ssh(git) {
        if !has("ssh-privatekey") {
            Some(format!("Secret {name} lacks the key ssh-privatekey, which {} needs", git.url))
        } else if !has("known_hosts") {
            Some(format!(
                "Secret {name} lacks the key known_hosts, without which no host can be trusted: add the output of ssh-keyscan HOST"
            ))
        } else {
            None
        }
    } else if !has("password") && !has("ca.crt") {
        Some(format!("Secret {name} lacks the key password (with username), which {} needs", git.url))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::review::{ClaimPlace, ReviewRule};
    use aether_api::source::{ClaimSource, EmptySource, SecretReference};
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

    fn s3(s3: S3Source) -> AetherSourceSpec {
        AetherSourceSpec { s3: Some(s3), revisions_to_keep: 1, ..Default::default() }
    }

    #[test]
    fn a_bucket_is_a_name_a_folder_and_a_service() {
        let good = S3Source {
            bucket: "my-bucket.1".into(),
            prefix: Some("/team/a b/".into()),
            endpoint: Some("http://10.0.0.1:9000".into()),
            region: Some("eu-central-1".into()),
            secret_ref: Some(SecretReference { name: "key".into() }),
        };
        assert_eq!(violation(&s3(good.clone())), None);
        let bare = S3Source { bucket: "b".into(), prefix: Some(String::new()), ..Default::default() };
        assert_eq!(violation(&s3(bare)), None);
        type Change = fn(&mut S3Source);
        let cases: [(&str, Change); 11] = [
            ("spec.s3.bucket", |s3| s3.bucket = String::new()),
            ("spec.s3.bucket", |s3| s3.bucket = "a/b".into()),
            ("spec.s3.bucket", |s3| s3.bucket = "..".into()),
            ("spec.s3.prefix", |s3| s3.prefix = Some("a//b".into())),
            ("spec.s3.prefix", |s3| s3.prefix = Some("a/../b".into())),
            ("spec.s3.endpoint", |s3| s3.endpoint = Some("s3.example.org".into())),
            ("spec.s3.endpoint", |s3| s3.endpoint = Some("https://".into())),
            ("spec.s3.endpoint", |s3| s3.endpoint = Some("https://h/?x".into())),
            ("spec.s3.secretRef", |s3| s3.endpoint = Some("https://key:hunter22@h".into())),
            ("spec.s3.region", |s3| s3.region = Some("a b".into())),
            ("spec.s3.secretRef.name", |s3| s3.secret_ref = Some(SecretReference::default())),
        ];
        for (field, change) in cases {
            let mut bad = good.clone();
            change(&mut bad);
            let message = violation(&s3(bad)).expect(field);
            assert!(message.contains(field) && !message.contains("hunter22"), "{message}");
        }
        let two = AetherSourceSpec { empty: Some(EmptySource {}), ..s3(good) };
        assert!(violation(&two).unwrap().contains("exactly one"));
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
    fn a_place_of_exports_is_one_that_can_be_reached_and_not_left() {
        let with = |places: Vec<ExportPlace>| {
            let mut spec = git("https://git/a");
            spec.review = Some(ReviewRule { exports: places, ..ReviewRule::default() });
            violation(&spec)
        };
        let claim = |name: &str, path: Option<&str>| ExportPlace {
            name: "results".into(),
            claim: Some(ClaimPlace { name: name.into(), path: path.map(Into::into) }),
            s3: None,
        };
        let bucket = S3Source { bucket: "b".into(), ..S3Source::default() };
        let s3 = |s3: S3Source| ExportPlace { name: "bucket".into(), claim: None, s3: Some(s3) };
        assert_eq!(with(vec![claim("data", None), s3(bucket.clone())]), None);
        assert_eq!(with(vec![claim("data", Some("of/agents"))]), None);
        let both = ExportPlace { s3: Some(bucket.clone()), ..claim("data", None) };
        let secret = S3Source { secret_ref: Some(SecretReference::default()), ..bucket.clone() };
        for (word, places) in [
            ("twice", vec![claim("data", None), claim("data", Some("other"))]),
            ("without a name", vec![ExportPlace { name: String::new(), ..claim("data", None) }]),
            ("exactly one", vec![both]),
            ("exactly one", vec![ExportPlace { claim: None, ..claim("data", None) }]),
            ("exports[results].claim.name", vec![claim("", None)]),
            ("exports[results].claim.path", vec![claim("data", Some("../x"))]),
            ("exports[results].claim.path", vec![claim("data", Some("/x"))]),
            ("exports[bucket].s3.bucket", vec![s3(S3Source::default())]),
            ("exports[bucket].s3.secretRef.name", vec![s3(secret)]),
        ] {
            let said = with(places).expect(word);
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    #[test]
    fn a_secret_must_fit_its_url() {
        let secret = |keys: &[&str]| Secret {
            data: Some(keys.iter().map(|key| ((*key).into(), ByteString(b"x".to_vec()))).collect()),
            ..Default::default()
        };
        let ssh = git("git@example.org:a");
        let https = git("https://example.org/a");
        assert!(secret_violation(&ssh, "key", &secret(&["password"])).unwrap().1.contains("ssh-privatekey"));
        assert!(secret_violation(&ssh, "key", &secret(&["ssh-privatekey"])).unwrap().1.contains("ssh-keyscan"));
        assert_eq!(secret_violation(&ssh, "key", &secret(&["ssh-privatekey", "known_hosts"])), None);
        assert!(secret_violation(&https, "key", &secret(&["ssh-privatekey"])).unwrap().1.contains("password"));
        assert_eq!(secret_violation(&https, "key", &secret(&["username", "password"])), None);
        let s3 = s3(S3Source { bucket: "b".into(), ..Default::default() });
        let both = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
        assert_eq!(secret_violation(&s3, "key", &secret(&both)), None);
        assert_eq!(secret_violation(&s3, "key", &secret(&["ca.crt"])), None, "a public bucket of a private service");
        let (_, message) = secret_violation(&s3, "key", &secret(&[both[0], "ca.crt"])).unwrap();
        assert!(message.contains("key lacks AWS_SECRET_ACCESS_KEY,"), "{message}");
    }
}
