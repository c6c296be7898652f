//! What a ref means in a repository. Pure.

use crate::failure::{Failure, Reason};

/// What to check out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A branch, by its short name.
    Branch { name: String, commit: String },
    /// A tag, by its short name. `commit` is the commit, not the tag object.
    Tag { name: String, commit: String },
    /// Any other ref, by its full name.
    Ref { name: String, commit: String },
    /// A commit, which no ref may name.
    Commit { id: String },
}

impl Target {
    /// The commit, as the remote told it or as it was asked for.
    pub(super) fn commit(&self) -> &str {
        match self {
            Self::Branch { commit, .. }
            | Self::Tag { commit, .. }
            | Self::Ref { commit, .. }
            | Self::Commit { id: commit } => commit,
        }
    }

    /// What to ask the remote for.
    pub(super) fn wanted(&self) -> &str {
        match self {
            Self::Branch { name, .. } | Self::Tag { name, .. } | Self::Ref { name, .. } => name,
            Self::Commit { id } => id,
        }
    }
}

/// What `git ls-remote --symref` listed.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The ref that HEAD is.
    head: Option<String>,
    /// (name, object); a peeled tag has its name twice, the second with `^{}`.
    refs: Vec<(String, String)>,
}

/// Reads what `git ls-remote --symref` printed.
pub(super) fn parse(text: &str) -> Listing {
    let mut listing = Listing::default();
    for line in text.lines() {
        let Some((left, name)) = line.split_once('\t') else { continue };
        match left.strip_prefix("ref: ") {
            Some(target) if name == "HEAD" => listing.head = Some(target.to_owned()),
            Some(_) => {}
            None => listing.refs.push((name.to_owned(), left.to_owned())),
        }
    }
    listing
}

impl Listing {
    fn object(&self, name: &str) -> Option<String> {
        self.refs.iter().find(|(listed, _)| listed == name).map(|(_, object)| object.clone())
    }

    /// The commit of a ref: what a tag object points at, else the object itself.
    fn commit(&self, name: &str) -> Option<String> {
        self.object(&format!("{name}^{{}}")).or_else(|| self.object(name))
    }
}

/// Decides what `reference` means: a full ref, a branch, a tag, or a commit id, in this order; HEAD when absent.
pub(super) fn resolve(listing: &Listing, reference: Option<&str>, url: &str) -> Result<Target, Failure> {
    let not_found = |message: String| Err(Failure::new(Reason::RefNotFound, message));
    if listing.refs.is_empty() {
        return not_found(format!("the repository {url} is empty: push something to it first"));
    }
    let Some(reference) = reference.filter(|reference| *reference != "HEAD") else {
        let target = listing.head.as_deref().and_then(|head| named(listing, head));
        let detached = || listing.object("HEAD").map(|id| Target::Commit { id });
        return match target.or_else(detached) {
            Some(target) => Ok(target),
            None => {
                not_found(format!("the repository {url} has no HEAD: name a branch, a tag or a commit in spec.git.ref"))
            }
        };
    };
    if reference.starts_with("refs/") {
        return match named(listing, reference) {
            Some(target) => Ok(target),
            None => not_found(format!("the repository {url} has no ref {reference}: check spec.git.ref")),
        };
    }
    let found = named(listing, &format!("refs/heads/{reference}"))
        .or_else(|| named(listing, &format!("refs/tags/{reference}")));
    if let Some(target) = found {
        return Ok(target);
    }
    let is_id = [40, 64].contains(&reference.len()) && reference.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id {
        return Ok(Target::Commit { id: reference.to_lowercase() });
    }
    not_found(format!(
        "the repository {url} has no branch or tag {reference}: check spec.git.ref (a commit is named by its full id)"
    ))
}

fn named(listing: &Listing, name: &str) -> Option<Target> {
    let commit = listing.commit(name)?;
    Some(if let Some(short) = name.strip_prefix("refs/heads/") {
        Target::Branch { name: short.into(), commit }
    } else if let Some(short) = name.strip_prefix("refs/tags/") {
        Target::Tag { name: short.into(), commit }
    } else {
        Target::Ref { name: name.into(), commit }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "ref: refs/heads/main\tHEAD\n\
        1111111111111111111111111111111111111111\tHEAD\n\
        2222222222222222222222222222222222222222\trefs/heads/both\n\
        1111111111111111111111111111111111111111\trefs/heads/main\n\
        5555555555555555555555555555555555555555\trefs/pull/7/head\n\
        3333333333333333333333333333333333333333\trefs/tags/both\n\
        4444444444444444444444444444444444444444\trefs/tags/v1\n\
        6666666666666666666666666666666666666666\trefs/tags/v1^{}\n";

    fn meaning(reference: Option<&str>) -> Result<Target, Failure> {
        resolve(&parse(LISTING), reference, "u")
    }

    #[test]
    fn a_ref_means_what_git_checkout_would_take_it_for() {
        let digits = |digit: &str| digit.repeat(40);
        let main = Target::Branch { name: "main".into(), commit: digits("1") };
        assert_eq!(meaning(None).unwrap(), main);
        assert_eq!(meaning(Some("HEAD")).unwrap(), main);
        assert_eq!(meaning(Some("refs/heads/main")).unwrap(), main);
        assert_eq!(meaning(Some("both")).unwrap(), Target::Branch { name: "both".into(), commit: digits("2") });
        assert_eq!(
            meaning(Some("v1")).unwrap(),
            Target::Tag { name: "v1".into(), commit: digits("6") },
            "the commit, not the tag object"
        );
        assert_eq!(
            meaning(Some("refs/pull/7/head")).unwrap(),
            Target::Ref { name: "refs/pull/7/head".into(), commit: digits("5") }
        );
        assert_eq!(meaning(Some(&digits("A"))).unwrap(), Target::Commit { id: digits("a") });
    }

    #[test]
    fn what_is_not_there_is_named() {
        for missing in ["nosuch", "refs/heads/nosuch", "1111"] {
            let failure = meaning(Some(missing)).unwrap_err();
            assert_eq!(failure.reason, Reason::RefNotFound);
            assert!(failure.message.contains(missing), "{}", failure.message);
        }
        assert!(resolve(&parse(""), None, "u").unwrap_err().message.contains("empty"));
    }
}
