//! The repository that sessions start from and commits go to, on a git server behind TLS and a password; and what plain git
//! finds there afterwards.

use std::path::Path;

use aether_testkit::git_server::Server;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::{command, expect_success, run};
use crate::network::HOST;

/// By which the environment tells git which authorities to trust, instead of a repository's configuration.
pub const TRUST: &str = "GIT_SSL_CAINFO";
const USER: &str = "pusher";
/// What the push Secret holds. Nobody but the Jobs of the source's namespace may ever see it.
pub const PASSWORD: &str = "only-the-job-has-this-1f6b";

/// Of every file below the current folder but git's own: its mode as git has it, where a symlink goes, and the contents' digests.
pub const LISTING: &str = r"
    find . -path ./.git -prune -o -type l -printf '120000 %p -> %l\n' \
        -o -type f -perm -u+x -printf '100755 %p\n' -o -type f -printf '100644 %p\n' | LC_ALL=C sort
    find . -path ./.git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";

/// Files of all kinds that git knows.
const CONTENTS: &str = r"
    mkdir -p src deep/er; echo 'a line' >README.md; echo 'fn main() {}' >src/main.rs; echo deep >deep/er/file
    echo '#!/bin/sh' >run.sh; chmod 755 run.sh; echo '#!/bin/sh' >later.sh; echo gone >gone.txt; echo moved >before.txt
    ln -s README.md link; ln -s gone.txt dangling; head -c 300000 /dev/urandom >large
    mkdir test; printf '%s\n' '#!/bin/sh' '# The server needs a moment.' 'sleep 5' 'curl --fail http://localhost:8080/login' >test/login.sh";

/// The repository `app.git` with the branch `main`.
pub struct Repository {
    folder: TempDir,
    server: Server,
}

impl Repository {
    /// On a server that ends with this process.
    pub async fn serve() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let script = format!(
            "set -e; git init -q -b main work; cd work; {CONTENTS}; git add .
            git -c user.name=Team -c user.email=team@example.org commit -qm first; git clone -q --bare . ../app.git"
        );
        shell(folder.path(), &script).await?;
        let server = Server::https_at(HOST.parse()?, folder.path(), Some((USER, PASSWORD)));
        Ok(Self { folder, server })
    }

    /// Its address.
    pub fn url(&self) -> String {
        self.server.url("app.git")
    }

    /// What opens it, as a Secret.
    pub fn secret(&self, name: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/basic-auth",
            "stringData": {"username": USER, "password": PASSWORD, "ca.crt": self.server.authority},
        })
    }

    /// What git says of the repository itself.
    pub async fn git(&self, args: &[&str]) -> Result<String> {
        let repository = self.folder.path().join("app.git").display().to_string();
        Ok(run("git", ["--git-dir", &repository].iter().chain(args)).await?.trim().to_owned())
    }

    /// Whether it has a branch of this name.
    pub async fn has(&self, branch: &str) -> Result<bool> {
        Ok(!self.git(&["branch", "--list", branch]).await?.is_empty())
    }

    /// A clone from the server, as anybody with the password makes one, with the branch checked out. Its own configuration says whom
    /// it trusts: git must not have the variable that says otherwise.
    pub async fn clone(&self, branch: &str) -> Result<TempDir> {
        let authority = self.folder.path().join("ca.crt");
        std::fs::write(&authority, self.server.authority.as_deref().context("the server speaks TLS")?)?;
        let url = self.url().replacen("https://", &format!("https://{USER}:{PASSWORD}@"), 1);
        let clone = tempfile::tempdir_in(self.folder.path())?;
        let (trust, to) = (format!("http.sslCAInfo={}", authority.display()), clone.path().display().to_string());
        let mut git = command("git", ["clone", "-q", "--config", &trust, "--branch", branch, &url, &to]);
        expect_success(git.env_remove(TRUST)).await?;
        Ok(clone)
    }

    /// The [`LISTING`] of such a clone.
    pub async fn cloned(&self, branch: &str) -> Result<String> {
        shell(self.clone(branch).await?.path(), LISTING).await
    }

    /// Fails unless the branch is exactly one commit ahead of `main`, with these lines at the end of its message, in any order.
    pub async fn is_one_commit(&self, branch: &str, trailers: &[String]) -> Result<()> {
        let commits = self.git(&["rev-list", "--parents", &format!("main..{branch}")]).await?;
        ensure!(commits.lines().count() == 1, "{branch} is not one commit ahead of main: {commits}");
        let main = self.git(&["rev-parse", "main"]).await?;
        ensure!(commits.split(' ').skip(1).eq([main.as_str()]), "it stands on something else than {main}: {commits}");
        let said = self.git(&["log", "-1", "--format=%(trailers:only,unfold)", branch]).await?;
        for trailer in trailers {
            ensure!(said.lines().any(|line| line == trailer), "no line {trailer:?} in {said}");
        }
        Ok(())
    }
}

async fn shell(folder: &Path, script: &str) -> Result<String> {
    run("bash", ["-euc", &format!("cd '{}'; {script}", folder.display())]).await
}
