//! A push that overwrites nothing, and what the server says to it.

use aether_git::{Call, Reason as Git};

use super::repository::Repository;
use crate::failure::{Failure, Reason};

/// What a server says, or git for it, when the branch is not at the commit that was expected.
const MOVED: [&str; 8] = [
    "stale info",
    "fetch first",
    "non-fast-forward",
    "failed to update ref",
    "cannot lock ref",
    "incorrect old value",
    "reference already exists",
    "unable to create",
];

/// What became of a push.
#[derive(Debug)]
pub(super) enum Pushed {
    /// The branch is at the commit.
    Done,
    /// It was not where it was expected, or somebody else was at it.
    Moved(Failure),
    /// The server does not take it.
    Refused(Failure),
    /// It is not known what became of it.
    Failed(Failure),
}

/// Brings the branch from `expected`, or from not being there, to `commit`.
pub(super) async fn push(
    repository: &Repository<'_>,
    branch: &str,
    commit: &str,
    expected: Option<&str>,
) -> Result<Pushed, Failure> {
    let lease = format!("--force-with-lease=refs/heads/{branch}:{}", expected.unwrap_or_default());
    let refspec = format!("{commit}:refs/heads/{branch}");
    let arguments = ["push", "--porcelain", "--no-verify", &lease, "origin", &refspec];
    let output = repository.git.call(&repository.path, &arguments, Call::default()).await?;
    if output.status.success() {
        return Ok(Pushed::Done);
    }
    let failure = repository.git.failure(&arguments, &output);
    let printed = String::from_utf8_lossy(&output.printed);
    let Some(verdict) = printed.lines().find_map(|line| line.strip_prefix("!\t")?.split('\t').nth(1)) else {
        return Ok(Pushed::Failed(failure.into()));
    };
    if MOVED.iter().any(|words| verdict.contains(words)) {
        return Ok(Pushed::Moved(Failure::new(Reason::CommitFailed, failure.message)));
    }
    if verdict.starts_with("[remote rejected]") || matches!(failure.reason, Git::Failed) {
        let message = format!("the server refuses the push to {branch}: {verdict}; {}", failure.message);
        return Ok(Pushed::Refused(Failure::new(Reason::PushRejected, message)));
    }
    Ok(Pushed::Failed(failure.into()))
}
