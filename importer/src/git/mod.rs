//! A commit by the git program: find out what the ref means, fetch, and make it fit to be a source.
//!
//! [`import`] reads the tree from git's objects where it can, and makes a working copy first where it cannot; [`clone`]
//! always makes one. The tree is the same either way.
//!
//! Nobody's configuration is read, nothing is asked on a terminal, and no hook or helper of the repository's runs.

mod objects;
mod reference;

use std::path::Path;
use std::sync::Arc;

use aether_cas::Store;
use aether_cas::tree::Mtime;
use aether_git::{Access, LFS_FILTER, Program, Remote};

use crate::cli::Git;
use crate::failure::{Failure, Reason};
use crate::report::{Phase, Reporter};
use crate::scan::{self, Stored};
use reference::Target;

/// What became of a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cloned {
    /// The working copy is there, at this commit.
    Commit(String),
    /// The ref still means the commit that is known already; nothing was fetched.
    Unchanged(String),
}

/// What became of an import.
#[derive(Clone, Debug)]
pub enum Imported {
    /// The tree of this commit is in the store.
    Commit(String, Stored),
    /// The ref still means the commit that is known already; nothing was fetched.
    Unchanged(String),
}

/// Stores the tree that a session gets: the commit's, with its repository. `worktree` must not exist; `scratch` is for keys, a
/// home and large files, and is not imported.
///
/// # Errors
/// With the reason for the source's conditions, and git's own words.
pub async fn import(
    asked: &Git,
    worktree: &Path,
    scratch: &Path,
    to: &dyn Store,
    reporter: Arc<Reporter>,
) -> Result<Imported, Failure> {
    let access = Access::prepare(&remote(asked), scratch)?;
    let progress = |done, all, bytes| reporter.progress(Phase::Cloning, done, Some(all), bytes);
    let git = Program::new(&access, scratch, &progress);
    let target = match find(&git, asked, scratch, &reporter).await? {
        Found::Known(commit) => return Ok(Imported::Unchanged(commit)),
        Found::New(target) => target,
    };
    fetch(&git, asked, &target, worktree).await?;
    let (commit, mtime) = head(&git, worktree).await?;
    let stored = if asked.lfs || asked.submodules {
        None
    } else {
        objects::store(&git, worktree, scratch, mtime, to, &reporter).await?
    };
    let stored = match stored {
        Some(stored) => stored,
        None => {
            check_out(&git, asked, mtime, worktree).await?;
            scan::store(worktree, to, reporter).await?
        }
    };
    Ok(Imported::Commit(commit, stored))
}

/// Makes a working copy at `worktree`, which must not exist. `scratch` is for keys and a home, and is not imported.
///
/// # Errors
/// With the reason for the source's conditions, and git's own words.
pub async fn clone(asked: &Git, worktree: &Path, scratch: &Path, reporter: &Reporter) -> Result<Cloned, Failure> {
    let access = Access::prepare(&remote(asked), scratch)?;
    let progress = |done, all, bytes| reporter.progress(Phase::Cloning, done, Some(all), bytes);
    let git = Program::new(&access, scratch, &progress);
    let target = match find(&git, asked, scratch, reporter).await? {
        Found::Known(commit) => return Ok(Cloned::Unchanged(commit)),
        Found::New(target) => target,
    };
    fetch(&git, asked, &target, worktree).await?;
    let (commit, mtime) = head(&git, worktree).await?;
    check_out(&git, asked, mtime, worktree).await?;
    Ok(Cloned::Commit(commit))
}

fn remote(asked: &Git) -> Remote<'_> {
    Remote {
        url: &asked.url,
        secret_dir: asked.secret_dir.as_deref(),
        secret_name: asked.secret_name.as_deref(),
        secret_field: "spec.git.secretRef",
    }
}

/// What a ref means.
enum Found {
    /// The commit that is known already.
    Known(String),
    /// Something to fetch.
    New(Target),
}

async fn find(git: &Program<'_>, asked: &Git, scratch: &Path, reporter: &Reporter) -> Result<Found, Failure> {
    reporter.progress(Phase::Cloning, 0, None, 0);
    let listing = git.output(scratch, &["ls-remote", "--symref", "--", &asked.url]).await?;
    let target = reference::resolve(&reference::parse(&listing), asked.reference.as_deref(), &asked.url)?;
    Ok(if asked.unless_commit.as_deref() == Some(target.commit()) {
        Found::Known(target.commit().to_owned())
    } else {
        Found::New(target)
    })
}

/// The commit that HEAD is, and its time. Everything of the tree gets this time: it is the same for every import of the
/// commit, and never in the future of a session.
async fn head(git: &Program<'_>, worktree: &Path) -> Result<(String, Mtime), Failure> {
    let commit = git.output(worktree, &["rev-parse", "--verify", "HEAD^{commit}"]).await?.trim().to_owned();
    let time = git.output(worktree, &["show", "--no-patch", "--format=%ct", "HEAD"]).await?;
    let seconds = time.trim().parse().map_err(|error| Failure::other("read the commit's time", error))?;
    Ok((commit, Mtime { seconds, nanos: 0 }))
}

/// Checks HEAD out, with what is kept elsewhere.
async fn check_out(git: &Program<'_>, asked: &Git, mtime: Mtime, worktree: &Path) -> Result<(), Failure> {
    git.run(worktree, &["checkout", "--progress", "--force"]).await?;
    if asked.lfs {
        // Kept in the repository's configuration: without the filter git would take every such file for modified.
        for (key, value) in LFS_FILTER {
            git.run(worktree, &["config", key, value]).await?;
        }
        git.run(worktree, &["lfs", "pull"]).await.map_err(without_lfs)?;
    }
    if asked.submodules && worktree.join(".gitmodules").exists() {
        let depth = asked.depth.map(|depth| depth.to_string());
        let mut arguments = vec!["submodule", "update", "--init", "--recursive", "--progress"];
        if let Some(depth) = &depth {
            arguments.extend(["--depth", depth]);
        }
        git.run(worktree, &arguments).await?;
        if asked.lfs {
            let filter = LFS_FILTER.map(|(key, value)| format!("git config {key} '{value}'")).join(" && ");
            git.run(worktree, &["submodule", "foreach", "--recursive", &format!("{filter} && git lfs pull")]).await?;
        }
    }
    let directory = worktree.to_owned();
    tokio::task::spawn_blocking(move || aether_engine::git::prepare(&directory, mtime))
        .await
        .map_err(|error| Failure::other("prepare the working copy", error))?
        .map_err(|error| Failure::other("prepare the working copy", error))
}

/// Fetches what the target needs and makes it HEAD; nothing is checked out.
async fn fetch(git: &Program<'_>, asked: &Git, target: &Target, worktree: &Path) -> Result<(), Failure> {
    let directory = worktree
        .to_str()
        .ok_or_else(|| Failure::new(Reason::Invalid, "the directory for the working copy has no UTF-8 name"))?;
    let parent = worktree.parent().unwrap_or(Path::new("/"));
    let depth = asked.depth.map(|depth| format!("--depth={depth}"));
    let mut clone = vec!["clone", "--progress", "--no-checkout", "--origin=origin"];
    match (target, &depth) {
        // Branches and tags are what `clone` is for: the result is what anybody would have.
        (Target::Branch { name, .. } | Target::Tag { name, .. }, depth) => {
            clone.extend(depth.as_deref());
            clone.extend(["--branch", name, "--", &asked.url, directory]);
            git.run(parent, &clone).await?;
        }
        (Target::Commit { id }, None) => {
            clone.extend(["--", &asked.url, directory]);
            git.run(parent, &clone).await?;
            // It may be on no branch; servers that give it all the same are asked for it by name.
            if git.output(worktree, &["cat-file", "-e", &format!("{id}^{{commit}}")]).await.is_err() {
                fetch_one(git, None, id, worktree).await?;
            }
        }
        (Target::Ref { .. }, None) => {
            clone.extend(["--", &asked.url, directory]);
            git.run(parent, &clone).await?;
            fetch_one(git, None, target.wanted(), worktree).await?;
        }
        (Target::Commit { .. } | Target::Ref { .. }, Some(_)) => {
            git.run(parent, &["init", "--quiet", directory]).await?;
            git.run(worktree, &["remote", "add", "origin", &asked.url]).await?;
            fetch_one(git, depth.as_deref(), target.wanted(), worktree).await?;
        }
    }
    match target {
        Target::Branch { .. } => Ok(()),
        Target::Tag { commit, .. } | Target::Ref { commit, .. } | Target::Commit { id: commit } => {
            Ok(git.run(worktree, &["update-ref", "--no-deref", "HEAD", &format!("{commit}^{{commit}}")]).await?)
        }
    }
}

async fn fetch_one(git: &Program<'_>, depth: Option<&str>, wanted: &str, worktree: &Path) -> Result<(), Failure> {
    let mut arguments = vec!["fetch", "--progress", "--no-write-fetch-head"];
    arguments.extend(depth);
    arguments.extend(["origin", wanted]);
    git.run(worktree, &arguments).await.map_err(|failure| match failure.reason {
        // A server that does not know the commit says so in many ways.
        aether_git::Reason::Failed => Failure::new(Reason::RefNotFound, failure.message),
        _ => failure.into(),
    })
}

fn without_lfs(failure: aether_git::Failure) -> Failure {
    if failure.message.contains("'lfs' is not a git command") {
        return Failure::new(
            Reason::ImportFailed,
            "this importer's image has no git-lfs: use one that has it, or leave spec.git.lfs out",
        );
    }
    failure.into()
}
