//! What a commit to a branch asks of the program.

use aether_api::commit::{GitTarget, History};
use aether_api::{AetherCommit, AetherSource};
use kube::ResourceExt;

use super::Work;

pub(super) fn work(commit: &AetherCommit, target: &GitTarget, source: &AetherSource) -> Option<Work> {
    let git = source.spec.git.as_ref()?;
    let status = commit.status.as_ref()?;
    let base = status.base.as_ref()?;
    let (name, namespace) = (commit.name_any(), commit.namespace().unwrap_or_default());
    let mut arguments: Vec<String> = vec!["git".into()];
    let mut option = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
    option("--url", &git.url);
    option("--branch", &target.branch);
    option("--base-commit", base.commit.as_deref()?);
    option("--base-root", &base.root);
    option("--root", status.root.as_deref()?);
    option("--commit-uid", &commit.uid()?);
    let asked = commit.spec.requested_by.as_ref()?;
    let (author, email) = match &target.author {
        Some(author) => (author.name.clone(), author.email.clone()),
        None => (line(&asked.username), address(&asked.username)),
    };
    if let Some(time) = commit.creation_timestamp() {
        option("--date", &time.0.to_string());
    }
    option("--history", if target.history == History::Keep { "keep" } else { "squash" });
    let mut trailer = |key: &str, value: &str| {
        if !line(value).is_empty() {
            arguments.push(format!("--trailer={key}={}", line(value)));
        }
    };
    if let Some(session) = &status.session {
        trailer("Aether-Session", &format!("{namespace}/{session}"));
    }
    if let Some(checkpoint) = &status.checkpoint {
        trailer("Aether-Checkpoint", &format!("{namespace}/{checkpoint}"));
    }
    trailer("Aether-Request", &format!("{namespace}/{name}"));
    trailer("Requested-by", &asked.username);
    for approver in status.approvals.iter().flat_map(|approvals| &approvals.by) {
        trailer("Approved-by", approver);
    }
    // With the sign of equality, for a message that begins like an option.
    arguments.extend([
        format!("--message={}", target.message),
        format!("--author-name={author}"),
        format!("--author-email={email}"),
    ]);
    arguments.extend(target.rebase.then(|| "--rebase".into()));
    arguments.extend(git.lfs.then(|| "--lfs".into()));
    let secret = git.push_secret_ref.as_ref().or(git.secret_ref.as_ref()).map(|reference| reference.name.clone());
    Some(Work { arguments, secret, volume: None })
}

/// One line of what may be any text, without what git keeps for itself.
fn line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !['<', '>'].contains(c)).collect::<String>().trim().to_owned()
}

/// An address of a user whose name may be one.
fn address(username: &str) -> String {
    let name = line(username).replace(' ', "-");
    if name.contains('@') { name } else { format!("{}@users.aether.invalid", name.replace(':', ".")) }
}
