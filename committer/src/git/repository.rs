//! Our copy of as little of the repository as a commit takes, and what the branch says elsewhere.
//!
//! Histories are fetched only from the time of the base commit on, and contents only when git needs them, where the server
//! can do that; where it cannot, everything is fetched.

use std::path::PathBuf;

use aether_git::{Call, Program, Reason as Git};

use super::message::{COMMIT, ROOT};
use crate::failure::{Failure, Reason};

/// How wrong the clocks of those who commit may be, in seconds.
const SKEW: i64 = 7 * 24 * 3600;
/// Names that one command takes.
const MANY: usize = 1000;
/// Where a fetched branch is kept.
const TIP: &str = "refs/aether/tip";
/// Fetches no contents and no tags, and never asks submodules.
const FETCH: [&str; 6] = ["fetch", "--quiet", "--filter=blob:none", "--no-tags", "--no-write-fetch-head", "--force"];
/// Git looks for nothing elsewhere that is not here.
pub(super) const HERE: Call<'_> = Call { input: &[], environment: &[NO_FETCH] };
pub(super) const NO_FETCH: (&str, &str) = ("GIT_NO_LAZY_FETCH", "1");

/// A repository without files, of which `origin` is the one to push to.
pub(super) struct Repository<'a> {
    pub(super) git: Program<'a>,
    pub(super) path: PathBuf,
    /// `refs/heads/...`
    branch: String,
}

/// What the branch says.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The commit that it is at, if it is there.
    pub(super) tip: Option<String>,
    /// The commit of this request.
    pub(super) made: Option<Made>,
}

/// A commit that has the UID of a request in its trailer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) commit: String,
    pub(super) tree: String,
    pub(super) parent: String,
    /// The tree of the store that it says it is.
    pub(super) root: String,
}

impl<'a> Repository<'a> {
    /// Makes one at `path`. `example` is a commit of it, by which its format is known.
    pub(super) async fn create(
        git: Program<'a>,
        path: PathBuf,
        url: &str,
        branch: &str,
        example: &str,
    ) -> Result<Self, Failure> {
        std::fs::create_dir(&path).map_err(|error| Failure::other("make a repository", error))?;
        let format = if example.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        git.run(&path, &["init", "--quiet", "--bare", format]).await?;
        let repository = Self { git, path, branch: format!("refs/heads/{branch}") };
        repository.configure("remote.origin.url", url).await?;
        repository.configure("fetch.recurseSubmodules", "false").await?;
        // What is `.git` to any file system that this may be checked out on is not committed.
        repository.configure("core.protectHFS", "true").await?;
        repository.configure("core.protectNTFS", "true").await?;
        Ok(repository)
    }

    pub(super) async fn configure(&self, key: &str, value: &str) -> Result<(), Failure> {
        Ok(self.git.run(&self.path, &["config", key, value]).await?)
    }

    /// Runs git in it, and gives the one line that it prints.
    pub(super) async fn line(&self, arguments: &[&str]) -> Result<String, Failure> {
        Ok(self.git.output(&self.path, arguments).await?.trim().to_owned())
    }

    /// Fetches a commit with its tree, and gives its time.
    pub(super) async fn fetch_commit(&self, commit: &str) -> Result<i64, Failure> {
        let alone = [&FETCH[..], &["--depth=1", "origin", commit]].concat();
        match self.git.run(&self.path, &alone).await {
            Ok(()) => {}
            // A server that gives nothing but branches says so in many ways.
            Err(failure) if matches!(failure.reason, Git::Failed | Git::RefNotFound) => {
                tracing::info!("the server does not give a commit alone: {}", failure.message);
                let all = [&FETCH[..], &["origin", "+refs/heads/*:refs/aether/all/*"]].concat();
                self.git.run(&self.path, &all).await?;
            }
            Err(failure) => return Err(failure.into()),
        }
        let name = format!("{commit}^{{commit}}");
        if !self.git.call(&self.path, &["cat-file", "-e", &name], HERE).await?.status.success() {
            let message = format!("the repository does not have commit {commit}, from which the session started");
            return Err(Failure::new(Reason::BaseNotFound, message));
        }
        let time = self.line(&["log", "-1", "--format=%ct", commit]).await?;
        time.parse().map_err(|error| Failure::other("read the commit's time", error))
    }

    /// Looks where the branch is, and for the commit of a request among those that are not older than `since`.
    pub(super) async fn look(&self, since: i64, uid: &str) -> Result<Seen, Failure> {
        let listed = self.line(&["ls-remote", "origin", &self.branch]).await?;
        let there = listed.lines().any(|line| line.split_once('\t').is_some_and(|(_, name)| name == self.branch));
        if !there {
            return Ok(Seen::default());
        }
        let refspec = format!("+{}:{TIP}", self.branch);
        let since = format!("--shallow-since=@{} +0000", since - SKEW);
        let recent = [&FETCH[..], &[&since, "origin", &refspec]].concat();
        if let Err(failure) = self.git.run(&self.path, &recent).await {
            // So says a server of which the branch is older than that, or that knows no times.
            if !matches!(failure.reason, Git::Failed) {
                return Err(failure.into());
            }
            let all = [&FETCH[..], &["origin", &refspec]].concat();
            self.git.run(&self.path, &all).await?;
        }
        let tip = self.line(&["rev-parse", TIP]).await?;
        Ok(Seen { made: self.find(uid).await?, tip: Some(tip) })
    }

    /// The commit of a request among those that were fetched of the branch.
    async fn find(&self, uid: &str) -> Result<Option<Made>, Failure> {
        let format = format!("--format=%H%n%T%n%P%n{}%x1f{}", self::uid(), trailer(ROOT));
        let log = self.git.ask(&self.path, &["log", "-z", &format, TIP], HERE).await?;
        let log = String::from_utf8_lossy(&log);
        let made = log.split('\0').find_map(|entry| {
            let mut lines = entry.splitn(4, '\n');
            let (commit, tree, parents, trailers) = (lines.next()?, lines.next()?, lines.next()?, lines.next()?);
            let (uids, roots) = trailers.split_once('\x1f')?;
            let root = uids.lines().any(|found| found == uid).then(|| roots.trim().to_owned())?;
            let parent = parents.split(' ').next().unwrap_or_default().to_owned();
            Some(Made { commit: commit.to_owned(), tree: tree.to_owned(), parent, root })
        });
        Ok(made)
    }

    /// Sends what Git LFS keeps of the files that were written. It is harmless without a commit.
    pub(super) async fn push_large(&self) -> Result<(), Failure> {
        let kept = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten();
        // lfs/objects/01/23/0123...
        let folders = kept(self.path.join("lfs/objects")).flat_map(|entry| kept(entry.path()));
        let files = folders.flat_map(|entry| kept(entry.path()));
        let names: Vec<String> = files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        for some in names.chunks(MANY) {
            let names = some.iter().map(String::as_str);
            let arguments: Vec<&str> = ["lfs", "push", "--object-id", "origin"].into_iter().chain(names).collect();
            self.git.run(&self.path, &arguments).await?;
        }
        Ok(())
    }

    /// Merges what `change` did to `base` into `tip`, and gives the tree.
    pub(super) async fn merge(&self, base: &str, tip: &str, change: &str) -> Result<String, Failure> {
        let base = format!("--merge-base={base}");
        let arguments = ["merge-tree", "--write-tree", "-z", "--name-only", "--no-messages", &base, tip, change];
        let call = Call { environment: &[("GIT_ATTR_SOURCE", tip)], ..Call::default() };
        let output = self.git.call(&self.path, &arguments, call).await?;
        let printed = String::from_utf8_lossy(&output.printed);
        let mut words = printed.split('\0').filter(|word| !word.is_empty());
        match (output.status.code(), words.next()) {
            (Some(0), Some(tree)) => Ok(tree.to_owned()),
            (Some(1), Some(_)) => {
                let mut conflicts: Vec<String> = words.map(str::to_owned).collect();
                conflicts.dedup();
                let message = format!(
                    "{} moved to {tip}, where {} that the session changed too: start a session from there, or take the change over by hand",
                    self.branch,
                    match conflicts.len() {
                        1 => "a path was changed".to_owned(),
                        count => format!("{count} paths were changed"),
                    }
                );
                Err(Failure { conflicts, ..Failure::new(Reason::Conflict, message).at(Some(tip)) })
            }
            _ => Err(self.git.failure(&arguments, &output).into()),
        }
    }
}

/// Git's format for what a message has at its end by this key.
fn trailer(key: &str) -> String {
    format!("%(trailers:key={key},valueonly,unfold)")
}

/// Git's format for the UIDs of requests in a message.
pub(super) fn uid() -> String {
    trailer(COMMIT)
}

impl Made {
    /// Whether it is the tree that was asked for.
    pub(super) fn check(&self, root: &str) -> Result<(), Failure> {
        if self.root == root {
            return Ok(());
        }
        let message = format!(
            "commit {} says that it is this request, but of tree {} and not of {root}: somebody else wrote that",
            self.commit, self.root
        );
        Err(Failure::new(Reason::Invalid, message))
    }
}
