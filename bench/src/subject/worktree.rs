//! `git-worktree`: a working tree of one shared repository.
//!
//! A fork or checkpoint of uncommitted work is a commit made through an index of its own, so that the work's own index
//! stays as it is. It leaves out what git ignores.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{Idle, Subject, clone_tree, directory};
use crate::stage::{Storage, run};

pub(crate) struct Worktree {
    storage: Storage,
    home: PathBuf,
}

impl Worktree {
    pub(crate) fn new(storage: &Storage, repository: &Path) -> Result<Self> {
        let home = directory(storage, "git-worktree")?;
        clone_tree(repository, &home.join("base"))?;
        Ok(Self { storage: storage.clone(), home })
    }

    fn git(&self, directory: &str) -> Command {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(self.home.join(directory))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null");
        for role in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{role}_NAME"), "bench").env(format!("GIT_{role}_EMAIL"), "bench@example.invalid");
        }
        command
    }

    fn add(&self, copy: &str, commit: &str) -> Result<PathBuf> {
        let path = self.home.join(copy);
        run(self.git("base").args(["worktree", "add", "--quiet", "--detach"]).arg(&path).arg(commit))?;
        Ok(path)
    }

    fn commit(&self, from: &str) -> Result<String> {
        let word = |out: Vec<u8>| Ok::<_, anyhow::Error>(String::from_utf8(out)?.trim().to_owned());
        let index = word(run(self.git(from).args(["rev-parse", "--path-format=absolute", "--git-path", "index"]))?)?;
        let scratch = self.home.join(format!("index-{from}"));
        fs::copy(index, &scratch)?;
        run(self.git(from).args(["add", "--all"]).env("GIT_INDEX_FILE", &scratch))?;
        let tree = word(run(self.git(from).arg("write-tree").env("GIT_INDEX_FILE", &scratch))?)?;
        fs::remove_file(&scratch)?;
        word(run(self.git(from).args(["commit-tree", "-p", "HEAD", "-m", "work", &tree]))?)
    }
}

impl Subject for Worktree {
    fn name(&self) -> &'static str {
        "git-worktree"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        self.add(copy, "HEAD")
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let commit = self.commit(from)?;
        self.add(copy, &commit)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        let commit = self.commit(from)?;
        run(self.git("base").args(["update-ref", &format!("refs/bench/{name}"), &commit]))?;
        Ok(())
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        let path = self.home.join(copy);
        if path.exists() {
            run(self.git("base").args(["worktree", "remove", "--force"]).arg(path))?;
        }
        Ok(())
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        run(self.git("base").args(["update-ref", "-d", &format!("refs/bench/{name}")]))?;
        Ok(())
    }

    fn file_system(&self) -> PathBuf {
        self.storage.path.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Nothing
    }
}
