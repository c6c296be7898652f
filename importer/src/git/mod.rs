//! A working copy by the git program: find out what the ref means, fetch, check out, and make it fit to be a source.
//!
//! Nobody's configuration is read, nothing is asked on a terminal, and no hook or helper of the repository's runs.

mod access;
mod program;
mod reference;

use std::path::Path;

use aether_cas::tree::Mtime;

use crate::cli::Git;
use crate::failure::{Failure, Reason};
use crate::report::{Phase, Reporter};
use access::Access;
use program::Program;
use reference::Target;

/// How git stores and shows the files that Git LFS keeps, as `git lfs install` has it.
const LFS_FILTER: [(&str, &str); 4] = [
    ("filter.lfs.clean", "git-lfs clean -- %f"),
    ("filter.lfs.smudge", "git-lfs smudge -- %f"),
    ("filter.lfs.process", "git-lfs filter-process"),
    ("filter.lfs.required", "true"),
];

/// What became of a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cloned {
    /// The working copy is there, at this commit.
    Commit(String),
    /// The ref still means the commit that is known already; nothing was fetched.
    Unchanged(String),
}

/// Makes a working copy at `worktree`, which must not exist. `scratch` is for keys and a home, and is not imported.
///
/// # Errors
/// With the reason for the source's conditions, and git's own words.
pub async fn clone(asked: &Git, worktree: &Path, scratch: &Path, reporter: &Reporter) -> Result<Cloned, Failure> {
    let access = Access::prepare(asked, scratch)?;
    let git = Program::new(&access, scratch, reporter);
    reporter.progress(Phase::Cloning, 0, None, 0);

    let listing = git.output(scratch, &["ls-remote", "--symref", "--", &asked.url]).await?;
    let target = reference::resolve(&reference::parse(&listing), asked.reference.as_deref(), &asked.url)?;
    if asked.unless_commit.as_deref() == Some(target.commit()) {
        return Ok(Cloned::Unchanged(target.commit().to_owned()));
    }
    fetch(&git, asked, &target, worktree).await?;
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
    let commit = git.output(worktree, &["rev-parse", "--verify", "HEAD^{commit}"]).await?.trim().to_owned();
    // As old as the commit: the same for every import of it, and never in the future of a session.
    let time = git.output(worktree, &["show", "--no-patch", "--format=%ct", "HEAD"]).await?;
    let seconds = time.trim().parse().map_err(|error| Failure::other("read the commit's time", error))?;
    let directory = worktree.to_owned();
    let prepared =
        tokio::task::spawn_blocking(move || aether_engine::git::prepare(&directory, Mtime { seconds, nanos: 0 }));
    prepared
        .await
        .map_err(|error| Failure::other("prepare the working copy", error))?
        .map_err(|error| Failure::other("prepare the working copy", error))?;
    Ok(Cloned::Commit(commit))
}

/// Fetches what the target needs and checks it out.
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
        Target::Branch { name, .. } => git.run(worktree, &["checkout", "--progress", "--force", name, "--"]).await,
        Target::Tag { commit, .. } | Target::Ref { commit, .. } | Target::Commit { id: commit } => {
            git.run(worktree, &["checkout", "--progress", "--force", "--detach", commit, "--"]).await
        }
    }
}

async fn fetch_one(git: &Program<'_>, depth: Option<&str>, wanted: &str, worktree: &Path) -> Result<(), Failure> {
    let mut arguments = vec!["fetch", "--progress", "--no-write-fetch-head"];
    arguments.extend(depth);
    arguments.extend(["origin", wanted]);
    git.run(worktree, &arguments).await.map_err(|failure| match failure.reason {
        // A server that does not know the commit says so in many ways.
        Reason::ImportFailed => Failure::new(Reason::RefNotFound, failure.message),
        _ => failure,
    })
}

fn without_lfs(failure: Failure) -> Failure {
    if failure.message.contains("'lfs' is not a git command") {
        return Failure::new(
            Reason::ImportFailed,
            "this importer's image has no git-lfs: use one that has it, or leave spec.git.lfs out",
        );
    }
    failure
}
