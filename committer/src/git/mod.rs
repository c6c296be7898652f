//! A reviewed tree as a commit on a branch.
//!
//! The commit's tree is the base commit's, with what the session changed; its parent is the base commit, or what the branch
//! has become since, if it may be rebased. Where commits that were made in the session are kept, it comes after them, or is
//! the last of them. It is pushed only from the very commit that the branch was seen at, and after that fetched anew and
//! compared. Its trailer holds the UID of the request: that is looked for before anything is done, and again whenever a push
//! did not go well, so that a branch never gets it twice.

mod content;
mod difference;
mod history;
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
use history::Author;
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
        let committed = work.found(made);
        // What the earlier run said of it nobody may have heard. The same is said again, if the store still has the trees.
        return Ok(match content::write(&work.repository, asked, scratch.join("files"), store).await {
            Ok(written) => Committed { files: written.files, warnings: written.warnings, ..committed },
            Err(failure) => {
                tracing::warn!("what the commit holds is not told: {failure}");
                committed
            }
        });
    }
    work.may_go_on(&seen)?;
    let written = content::write(&work.repository, asked, scratch.join("files"), store).await?;
    crash_point!("git.written");
    if asked.lfs {
        work.repository.push_large().await?;
    }
    let changes = work.changes(&written.tree, scratch, store).await?;
    let committed = work.put(&changes, seen).await?;
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
    message::of(asked).map(drop)
}

/// What a commit says, and who wrote it.
struct Words {
    message: Vec<u8>,
    author: Author,
}

/// A step from the base commit to the reviewed tree, as it was done in the session.
struct Change {
    commit: String,
    parent: String,
    tree: String,
    words: Words,
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

    /// What brings the base commit to `tree`.
    async fn changes(&self, tree: &str, scratch: &Path, store: &dyn Store) -> Result<Vec<Change>, Failure> {
        let asked = self.asked;
        let base = asked.base_commit.as_str();
        let mut at = self.tree(base).await?;
        if at == tree {
            return Err(nothing("the session changed nothing that git keeps"));
        }
        let mut changes = Vec::new();
        let mut parent = base.to_owned();
        let mut add = async |tree: &str, words: Words| {
            let commit = self.commit_tree(tree, &parent, &words.message, &words.author).await?;
            changes.push(Change {
                parent: std::mem::replace(&mut parent, commit.clone()),
                commit,
                tree: tree.to_owned(),
                words,
            });
            Ok::<_, Failure>(())
        };
        if asked.history == History::Keep {
            for kept in history::read(&self.repository, asked, scratch.join("session"), store).await? {
                add(&kept.tree, Words { message: kept.message, author: kept.author }).await?;
                at = kept.tree;
            }
        }
        if at != tree {
            let author = Author {
                name: asked.author_name.as_ref().unwrap_or(&asked.committer_name).clone(),
                email: asked.author_email.as_ref().unwrap_or(&asked.committer_email).clone(),
                date: self.date(),
            };
            add(tree, Words { message: message::of(asked)?, author }).await?;
        }
        Ok(changes)
    }

    /// Puts the changes on the branch, wherever that goes meanwhile.
    async fn put(&self, changes: &[Change], mut seen: Seen) -> Result<Committed, Failure> {
        let base = self.asked.base_commit.as_str();
        let mut last = None;
        for _ in 0..TRIES {
            self.may_go_on(&seen)?;
            let made = self.on(seen.tip.as_deref().unwrap_or(base), changes).await?;
            crash_point!("git.committed");
            if seen.tip.is_none() {
                // No branch of the server may tell it which commits it has.
                self.repository.configure("push.negotiate", "true").await?;
            }
            let pushed = push::push(&self.repository, &self.asked.branch, &made.commit, seen.tip.as_deref()).await?;
            let (failure, moved) = match pushed {
                Pushed::Done => {
                    let rebased = seen.tip.as_deref().is_some_and(|tip| tip != base);
                    return Ok(Committed { rebased, found: false, ..self.found(made) });
                }
                Pushed::Refused(failure) => return Err(failure),
                Pushed::Moved(failure) => (failure, true),
                Pushed::Failed(failure) => (failure, false),
            };
            tracing::warn!("{failure}");
            // The server may have done it all the same, or another run.
            seen = self.look().await?;
            if let Some(made) = seen.made {
                return Ok(self.found(made));
            }
            if !moved {
                return Err(failure);
            }
            last = Some(failure);
        }
        Err(last.unwrap_or_else(|| Failure::new(Reason::CommitFailed, "others push to the branch all the time")))
    }

    /// The commits that bring the changes to `parent`; the last one of them says whose request it is.
    async fn on(&self, parent: &str, changes: &[Change]) -> Result<Made, Failure> {
        let (mut tip, mut at, mut last) = (parent.to_owned(), self.tree(parent).await?, None);
        for change in changes {
            let is_next = tip == change.parent;
            let tree = if is_next {
                change.tree.clone()
            } else {
                self.repository.merge(&change.parent, &tip, &change.commit).await?
            };
            // What the branch has already, or was undone again in the session.
            if tree == at {
                continue;
            }
            let commit = if is_next {
                change.commit.clone()
            } else {
                self.commit_tree(&tree, &tip, &change.words.message, &change.words.author).await?
            };
            last = Some((std::mem::replace(&mut tip, commit), tree.clone(), &change.words));
            at = tree;
        }
        let Some((before, tree, words)) = last else {
            return Err(nothing("the branch has all that the session changed").at(Some(parent)));
        };
        let Repository { git, path, .. } = &self.repository;
        let message = message::sign(&words.message, self.asked, git, path).await?;
        let commit = self.commit_tree(&tree, &before, &message, &words.author).await?;
        // By this it is found again. What git would not find must not be pushed.
        let found = self.repository.line(&["log", "-1", &format!("--format={}", repository::uid()), &commit]).await?;
        if found != self.asked.commit_uid {
            let why =
                "git does not find the lines at the end of the message that Aether adds: begin it with a sentence";
            return Err(Failure::new(Reason::Invalid, why));
        }
        Ok(Made { commit, tree, parent: before, root: self.asked.root.to_string() })
    }

    async fn tree(&self, commit: &str) -> Result<String, Failure> {
        self.repository.line(&["rev-parse", &format!("{commit}^{{tree}}")]).await
    }

    /// When it was asked for, as git's environment has it.
    fn date(&self) -> String {
        // Later than the base in any case, because commits are looked for from there on.
        let time = self.asked.date.unwrap_or_else(jiff::Timestamp::now).as_second().max(self.since);
        format!("@{time} +0000")
    }

    async fn commit_tree(&self, tree: &str, parent: &str, message: &[u8], author: &Author) -> Result<String, Failure> {
        let Repository { git, path, .. } = &self.repository;
        let environment = [
            ("GIT_AUTHOR_NAME", author.name.as_str()),
            ("GIT_AUTHOR_EMAIL", &author.email),
            ("GIT_AUTHOR_DATE", &author.date),
            ("GIT_COMMITTER_NAME", &self.asked.committer_name),
            ("GIT_COMMITTER_EMAIL", &self.asked.committer_email),
            ("GIT_COMMITTER_DATE", &self.date()),
            // What is committed is here.
            repository::NO_FETCH,
        ];
        let call = Call { input: message, environment: &environment };
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

    /// What an earlier run did.
    fn found(&self, made: Made) -> Committed {
        Committed {
            // Where there is one commit for all, its parent tells.
            rebased: self.asked.history == History::Squash && made.parent != self.asked.base_commit,
            commit: made.commit,
            tree: made.tree,
            branch: self.asked.branch.clone(),
            parent: made.parent,
            found: true,
            ..Committed::default()
        }
    }
}

fn nothing(why: &str) -> Failure {
    Failure::new(Reason::NothingToCommit, format!("there is nothing to commit: {why}"))
}
