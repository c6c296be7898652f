//! A reviewed tree as one commit on a branch.
//!
//! The commit's tree is the base commit's, with what the session changed; its parent is the base commit, or what the branch
//! has become since, if it may be rebased. It is pushed only from the very commit that the branch was seen at, and after
//! that fetched anew and compared. Its trailer holds the UID of the request: that is looked for before anything is done,
//! and again whenever a push did not go well, so that a branch never gets it twice.

mod content;
mod difference;
mod message;
mod push;
mod repository;

use std::fs;
use std::path::Path;

use aether_cas::Store;
use aether_git::{Access, Call, Program, Remote};

use crate::cli::{Git, History};
use crate::crash::crash_point;
use crate::failure::{Failure, Kind, Reason};
use crate::report::Committed;
use push::Pushed;
use repository::{Made, Repository, Seen};

/// How often a commit is put on a branch that others push to meanwhile.
const TRIES: u32 = 5;

/// Makes the commit and pushes it, unless that was done. `scratch` is for everything that is written meanwhile.
///
/// # Errors
/// With the reason for the request's status, and whether the same may succeed later.
pub async fn commit(asked: &Git, scratch: &Path, store: &dyn Store) -> Result<Committed, Failure> {
    check(asked)?;
    let home = scratch.join("home");
    fs::create_dir(&home).map_err(|error| Failure::other("make a home for git", error))?;
    let remote = Remote {
        url: &asked.url,
        secret_dir: asked.secret_dir.as_deref(),
        secret_name: asked.secret_name.as_deref(),
        secret_field: "spec.git.pushSecretRef or spec.git.secretRef",
    };
    let access = Access::prepare(&remote, &home)?;
    let git = Program::new(&access, &home, &|_, _, _| {});
    let reference = format!("refs/heads/{}", asked.branch);
    if !git.call(&home, &["check-ref-format", &reference], Call::default()).await?.status.success() {
        return Err(Failure::new(Reason::Invalid, format!("{:?} cannot be the name of a branch", asked.branch)));
    }
    let repository =
        Repository::create(git, scratch.join("repository"), &asked.url, &asked.branch, &asked.base_commit).await?;
    let since = repository.fetch_commit(&asked.base_commit).await?;
    crash_point!("git.based");
    let work = Work { asked, repository, since };
    let seen = work.look().await?;
    crash_point!("git.looked");
    if let Some(made) = seen.made {
        return Ok(work.committed(made, true));
    }
    work.may_go_on(&seen)?;
    let written = content::write(&work.repository, asked, scratch.join("files"), store).await?;
    crash_point!("git.written");
    if asked.lfs {
        work.repository.push_large().await?;
    }
    let committed = work.put(&written.tree, seen).await?;
    crash_point!("git.pushed");
    let committed = Committed { files: written.files, warnings: written.warnings, ..committed };
    work.verify(&committed, scratch).await?;
    crash_point!("git.verified");
    Ok(committed)
}

fn check(asked: &Git) -> Result<(), Failure> {
    let refuse = |why: String| Err(Failure::new(Reason::Invalid, why));
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if ![40, 64].contains(&asked.base_commit.len()) || !asked.base_commit.bytes().all(hex) {
        return refuse(format!("--base-commit {:?} is not the full id of a commit", asked.base_commit));
    }
    if asked.commit_uid.is_empty() || asked.commit_uid.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return refuse(format!("--commit-uid {:?} is not a UID", asked.commit_uid));
    }
    if asked.history == History::Keep {
        return refuse("commits that were made in the session cannot be kept yet: ask for history Squash".into());
    }
    Ok(())
}

/// One request under way.
struct Work<'a> {
    asked: &'a Git,
    repository: Repository<'a>,
    /// The time of the base commit, before which nobody committed this.
    since: i64,
}

impl Work<'_> {
    /// What the branch says now; a commit of this request is of the tree that was asked for.
    async fn look(&self) -> Result<Seen, Failure> {
        let seen = self.repository.look(self.since, &self.asked.commit_uid).await?;
        if let Some(made) = &seen.made {
            made.check(&self.asked.root.to_string())?;
        }
        Ok(seen)
    }

    /// Nothing is put on a branch that has moved, unless it may be.
    fn may_go_on(&self, seen: &Seen) -> Result<(), Failure> {
        let Git { base_commit: base, branch, rebase, .. } = self.asked;
        match &seen.tip {
            Some(tip) if tip != base && !rebase => {
                let message = format!(
                    "branch {branch} is at {tip}, and the session started from {base}: ask for a rebase, or start a session from there"
                );
                Err(Failure::new(Reason::BranchMoved, message).at(Some(tip)))
            }
            _ => Ok(()),
        }
    }

    /// Puts the change on the branch, wherever that goes meanwhile.
    async fn put(&self, tree: &str, mut seen: Seen) -> Result<Committed, Failure> {
        let base = self.asked.base_commit.as_str();
        let base_tree = self.repository.line(&["rev-parse", &format!("{base}^{{tree}}")]).await?;
        if base_tree == tree {
            return Err(nothing("the session changed nothing that git keeps"));
        }
        let change = self.commit_tree(tree, base).await?;
        let mut last = None;
        for _ in 0..TRIES {
            self.may_go_on(&seen)?;
            let made = self.on(seen.tip.as_deref().unwrap_or(base), tree, &change).await?;
            crash_point!("git.committed");
            if seen.tip.is_none() {
                // No branch of the server may tell it which commits it has.
                self.repository.configure("push.negotiate", "true").await?;
            }
            let pushed = push::push(&self.repository, &self.asked.branch, &made.commit, seen.tip.as_deref()).await?;
            let (failure, moved) = match pushed {
                Pushed::Done => return Ok(self.committed(made, false)),
                Pushed::Refused(failure) => return Err(failure),
                Pushed::Moved(failure) => (failure, true),
                Pushed::Failed(failure) => (failure, false),
            };
            tracing::warn!("{failure}");
            // The server may have done it all the same, or another run.
            seen = self.look().await?;
            if let Some(made) = seen.made {
                return Ok(self.committed(made, true));
            }
            if !moved {
                return Err(failure);
            }
            last = Some(failure);
        }
        Err(last.unwrap_or_else(|| Failure::new(Reason::CommitFailed, "others push to the branch all the time")))
    }

    /// The commit that brings the change to `parent`.
    async fn on(&self, parent: &str, tree: &str, change: &str) -> Result<Made, Failure> {
        let base = self.asked.base_commit.as_str();
        let (commit, tree) = if parent == base {
            (change.to_owned(), tree.to_owned())
        } else {
            let merged = self.repository.merge(base, parent, change).await?;
            if self.repository.line(&["rev-parse", &format!("{parent}^{{tree}}")]).await? == merged {
                return Err(nothing("the branch has all that the session changed").at(Some(parent)));
            }
            (self.commit_tree(&merged, parent).await?, merged)
        };
        Ok(Made { commit, tree, parent: parent.to_owned(), root: self.asked.root.to_string() })
    }

    async fn commit_tree(&self, tree: &str, parent: &str) -> Result<String, Failure> {
        let asked = self.asked;
        let Repository { git, path, .. } = &self.repository;
        let message = message::compose(asked, git, path).await?;
        // Later than the base in any case, because commits are looked for from there on.
        let time = asked.date.unwrap_or_else(jiff::Timestamp::now).as_second().max(self.since);
        let date = format!("@{time} +0000");
        let author = asked.author_name.as_deref().unwrap_or(&asked.committer_name);
        let environment = [
            ("GIT_AUTHOR_NAME", author),
            ("GIT_AUTHOR_EMAIL", asked.author_email.as_deref().unwrap_or(&asked.committer_email)),
            ("GIT_AUTHOR_DATE", &date),
            ("GIT_COMMITTER_NAME", &asked.committer_name),
            ("GIT_COMMITTER_EMAIL", &asked.committer_email),
            ("GIT_COMMITTER_DATE", &date),
        ];
        let call = Call { input: &message, environment: &environment };
        let id = git.ask(path, &["commit-tree", tree, "-p", parent, "-F", "-"], call).await?;
        Ok(String::from_utf8_lossy(&id).trim().to_owned())
    }

    /// Fetches the branch anew, into a repository that knows nothing of what was pushed, and compares.
    async fn verify(&self, committed: &Committed, scratch: &Path) -> Result<(), Failure> {
        let Git { url, branch, base_commit, .. } = self.asked;
        let again = Repository::create(self.repository.git, scratch.join("again"), url, branch, base_commit).await?;
        let seen = again.look(self.since, &self.asked.commit_uid).await?;
        let same = |made: &Made| made.commit == committed.commit && made.tree == committed.tree;
        if seen.made.as_ref().is_some_and(same) {
            return Ok(());
        }
        let tip = seen.tip.as_deref().unwrap_or("no commit");
        let message = format!("commit {} was pushed to {branch}, which is at {tip} now, without it", committed.commit);
        Err(Failure { kind: Kind::Permanent, ..Failure::new(Reason::CommitFailed, message).at(seen.tip.as_deref()) })
    }

    fn committed(&self, made: Made, found: bool) -> Committed {
        Committed {
            rebased: made.parent != self.asked.base_commit,
            commit: made.commit,
            tree: made.tree,
            branch: self.asked.branch.clone(),
            parent: made.parent,
            found,
            ..Committed::default()
        }
    }
}

fn nothing(why: &str) -> Failure {
    Failure::new(Reason::NothingToCommit, format!("there is nothing to commit: {why}"))
}
