//! The git program at work: a temporary repository filled by `git fast-import` and shown by `git diff`.
//!
//! The user's git configuration decides about colours, pager and algorithm. Programs that contents could choose
//! (external diffs, text conversion) are off unless asked for, because contents come from whoever worked in the session.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::Stdio;

use anyhow::{Context, Result, anyhow, bail};
use futures::{AsyncBufRead, AsyncBufReadExt};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::columns;
use crate::cli;

/// What of git's environment speaks of another repository (`git rev-parse --local-env-vars`), but its configuration.
const FOREIGN: [&str; 14] = [
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_OBJECT_DIRECTORY",
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_GRAFT_FILE",
    "GIT_INDEX_FILE",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_REPLACE_REF_BASE",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_ATTR_SOURCE",
];

/// How `git diff` is to show it.
#[derive(Debug, Default)]
pub(crate) struct View {
    options: Vec<OsString>,
    paths: Vec<OsString>,
    no_pager: bool,
    /// In two columns; whether in colour.
    columns: Option<bool>,
}

/// How many files differ, and by how many lines; what is binary has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) files: u64,
    pub(crate) added: u64,
    pub(crate) removed: u64,
}

impl View {
    pub(crate) fn of(args: &cli::Diff) -> Self {
        let columns = args.side_by_side.then(|| args.color.wanted());
        // In columns, colours are put on after git.
        let color = if columns.is_some() { "never" } else { args.color.as_str() };
        let mut options: Vec<OsString> = vec![format!("--color={color}").into()];
        options.extend(args.stat.then(|| "--stat".into()));
        options.extend(args.name_only.then(|| "--name-only".into()));
        options.extend(args.exit_code.then(|| "--exit-code".into()));
        let (own, paths) = split(&args.git);
        options.extend_from_slice(own);
        Self { options, paths: paths.to_vec(), no_pager: args.no_pager, columns }
    }
}

/// Options of git and paths: divided by `--`, else by the first word that is no option.
fn split(words: &[OsString]) -> (&[OsString], &[OsString]) {
    match words.iter().position(|word| word == "--") {
        Some(dashes) => (&words[..dashes], &words[dashes + 1..]),
        None => words
            .split_at(words.iter().position(|word| !word.as_encoded_bytes().starts_with(b"-")).unwrap_or(words.len())),
    }
}

/// Fails with the way out when there is no git.
pub(crate) async fn check() -> Result<()> {
    let mut command = Command::new("git");
    match command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("`git --version` ended with {status}: a diff needs a working git"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("a diff is made by git, and there is no git in PATH: install it (version 2.0 or later)")
        }
        Err(error) => Err(error).context("cannot run git, which makes the diff"),
    }
}

/// Why nothing was imported.
#[derive(Debug)]
pub(crate) enum ImportError {
    /// The stream broke off or could not be read: it may be whole the next time.
    Stream(std::io::Error),
    /// Git refused it.
    Git(anyhow::Error),
}

/// A bare repository with the branches `base` and `head`, gone with its last use.
pub(crate) struct Repository {
    directory: TempDir,
}

impl Repository {
    pub(crate) async fn create() -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("kubectl-aether-diff-")
            .tempdir()
            .context("cannot make a temporary directory")?;
        let repository = Self { directory };
        // No template: hooks and exclusions of the user have no place here.
        let output = repository
            .git()
            .args(["init", "--quiet", "--bare", "--template="])
            .arg(repository.directory.path())
            .output()
            .await;
        let output = output.context("cannot run git init")?;
        if !output.status.success() {
            bail!("git init failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(repository)
    }

    /// Feeds a fast-import stream, to its `done`: one that ends before was cut off.
    pub(crate) async fn import(&self, mut stream: impl AsyncBufRead + Unpin) -> Result<(), ImportError> {
        let mut child = self
            .git()
            .args(["fast-import", "--quiet", "--done"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot run git fast-import")
            .map_err(ImportError::Git)?;
        let (Some(mut stdin), Some(mut stderr)) = (child.stdin.take(), child.stderr.take()) else {
            return Err(ImportError::Git(anyhow!("git fast-import has no pipes")));
        };
        let feed = async {
            let mut tail = Vec::new();
            loop {
                let data = stream.fill_buf().await.map_err(ImportError::Stream)?;
                if data.is_empty() {
                    break;
                }
                let count = data.len();
                tail.extend_from_slice(&data[count.saturating_sub(DONE.len())..]);
                tail.drain(..tail.len().saturating_sub(DONE.len()));
                // Git's own words, on stderr, say better why it hung up.
                if stdin.write_all(data).await.is_err() {
                    return Ok(true);
                }
                stream.consume_unpin(count);
            }
            let _ = stdin.shutdown().await;
            drop(stdin);
            Ok(tail == DONE)
        };
        let mut said = String::new();
        let (fed, read) = tokio::join!(feed, stderr.read_to_string(&mut said));
        // A broken stream ends git too, by `kill_on_drop`.
        let whole = fed?;
        read.context("cannot read what git fast-import says").map_err(ImportError::Git)?;
        let status = child.wait().await.context("git fast-import").map_err(ImportError::Git)?;
        if !whole {
            return Err(ImportError::Stream(std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                "the stream ended before it was whole",
            )));
        }
        if !status.success() {
            let fatal =
                said.lines().find(|line| line.starts_with("fatal") || line.starts_with("error")).unwrap_or(said.trim());
            return Err(ImportError::Git(anyhow!("git fast-import refused the changes: {fatal}")));
        }
        Ok(())
    }

    /// Runs `git diff` on this terminal; the result is its exit code.
    pub(crate) async fn show(&self, view: &View) -> Result<u8> {
        if let Some(color) = view.columns {
            return self.show_columns(view, color).await;
        }
        let status = self.diff(view).status().await.context("cannot run git diff")?;
        use std::os::unix::process::ExitStatusExt;
        let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(2);
        // Git says 128 and 129 for what it could not do; a pager that was left early is SIGPIPE, and no failure.
        Ok(match code {
            141 => 0,
            128 | 129 => 2,
            code => u8::try_from(code).unwrap_or(2),
        })
    }

    /// The same in two columns, through the pager that git would take.
    async fn show_columns(&self, view: &View, color: bool) -> Result<u8> {
        let output = self.diff(view).stderr(Stdio::inherit()).output().await.context("cannot run git diff")?;
        let code = match output.status.code() {
            Some(code @ (0 | 1)) => u8::from(code == 1),
            _ => return Ok(2),
        };
        let text = columns::render(&String::from_utf8_lossy(&output.stdout), columns::width(), color);
        if view.no_pager || text.is_empty() || !std::io::stdout().is_terminal() {
            crate::output::print(&text)?;
            return Ok(code);
        }
        let pager = self.git().args(["var", "GIT_PAGER"]).stderr(Stdio::inherit()).output().await;
        let pager = String::from_utf8_lossy(&pager.context("cannot run git var")?.stdout).trim().to_owned();
        let mut shell = Command::new("sh");
        shell.args(["-c", if pager.is_empty() { "cat" } else { &pager }]).stdin(Stdio::piped());
        if std::env::var_os("LESS").is_none() {
            // As git sets it.
            shell.env("LESS", "FRX");
        }
        let mut child = shell.spawn().with_context(|| format!("cannot run the pager {pager}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A pager that was left early reads no more, and that is no failure.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
        child.wait().await.context("the pager")?;
        Ok(code)
    }

    /// How much differs.
    pub(crate) async fn numbers(&self) -> Result<Numbers> {
        let text = self.text(&["--numstat", "--no-renames"]).await?;
        let mut numbers = Numbers::default();
        for line in text.lines() {
            let mut words = line.split('\t');
            let mut count = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            numbers.files += 1;
            numbers.added += count();
            numbers.removed += count();
        }
        Ok(numbers)
    }

    /// What `git diff` prints with these options.
    pub(crate) async fn text(&self, options: &[&str]) -> Result<String> {
        let view = View { options: options.iter().map(Into::into).collect(), no_pager: true, ..View::default() };
        let output = self.diff(&view).output().await.context("cannot run git diff")?;
        if !output.status.success() {
            bail!("git diff failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn diff(&self, view: &View) -> Command {
        let mut command = self.git();
        if view.no_pager {
            command.arg("--no-pager");
        }
        command.args(["diff", "--no-ext-diff", "--no-textconv"]);
        command.args(&view.options).args(["refs/heads/base", "refs/heads/head", "--"]).args(&view.paths);
        command
    }

    fn git(&self) -> Command {
        let mut command = Command::new("git");
        for name in FOREIGN {
            command.env_remove(name);
        }
        command.env("GIT_DIR", self.directory.path());
        command
    }
}

/// How a stream that was not cut off ends.
const DONE: &[u8] = b"done\n";

#[cfg(test)]
mod tests {
    use super::*;
    use futures::io::Cursor;

    /// One side of a stream: mode, path as fast-import quotes it, contents.
    type Side<'a> = &'a [(&'a str, &'a str, &'a [u8])];

    fn stream(base: Side<'_>, head: Side<'_>) -> Vec<u8> {
        let mut out = b"feature done\n".to_vec();
        let mut mark = 0;
        for (name, side) in [("base", base), ("head", head)] {
            let mut commit =
                format!("commit refs/heads/{name}\ncommitter Aether <aether@aether.dev> 0 +0000\ndata 0\n")
                    .into_bytes();
            for (mode, path, content) in side {
                mark += 1;
                out.extend(format!("blob\nmark :{mark}\ndata {}\n", content.len()).bytes());
                out.extend_from_slice(content);
                out.push(b'\n');
                commit.extend(format!("M {mode} :{mark} {path}\n").bytes());
            }
            out.extend(commit);
            out.push(b'\n');
        }
        out.extend(DONE);
        out
    }

    async fn shown(base: Side<'_>, head: Side<'_>, options: &[&str]) -> (String, i32) {
        let repository = Repository::create().await.unwrap();
        repository.import(Cursor::new(stream(base, head))).await.unwrap();
        let words: Vec<OsString> = options.iter().map(Into::into).collect();
        let (options, paths) = split(&words);
        let view = View { options: options.to_vec(), paths: paths.to_vec(), no_pager: true, columns: None };
        // What a developer's own configuration says must not decide a test.
        let output = repository
            .diff(&view)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
            .await
            .unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
    }

    #[tokio::test]
    async fn an_edit_is_a_unified_diff() {
        let (text, code) =
            shown(&[("100644", "src/a.rs", b"one\ntwo\n")], &[("100644", "src/a.rs", b"one\n2\n")], &[]).await;
        assert!(text.contains("--- a/src/a.rs\n+++ b/src/a.rs\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"), "{text}");
        assert_eq!(code, 0);
        let (_, code) = shown(&[("100644", "a", b"1")], &[("100644", "a", b"2")], &["--exit-code", "--quiet"]).await;
        assert_eq!(code, 1);
    }

    #[tokio::test]
    async fn nothing_changed_is_nothing_shown() {
        assert_eq!(shown(&[], &[], &["--exit-code"]).await, (String::new(), 0));
    }

    #[tokio::test]
    async fn renames_modes_symlinks_and_binaries_look_as_in_git() {
        let long: Vec<u8> = (0..50).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
        let (text, _) = shown(&[("100644", "old/name", &long)], &[("100644", "new/name", &long)], &[]).await;
        assert!(text.contains("similarity index 100%\nrename from old/name\nrename to new/name\n"), "{text}");
        let (text, _) = shown(&[("100644", "run", b"x")], &[("100755", "run", b"x")], &[]).await;
        assert!(text.contains("old mode 100644\nnew mode 100755\n"), "{text}");
        let (text, _) = shown(&[("100644", "link", b"was a file\n")], &[("120000", "link", b"target")], &[]).await;
        assert!(
            text.contains("deleted file mode 100644")
                && text.contains("new file mode 120000")
                && text.contains("+target"),
            "{text}"
        );
        let (text, _) = shown(&[("100644", "blob", b"\0\x01")], &[("100644", "blob", b"\0\x02")], &[]).await;
        assert!(text.contains("Binary files a/blob and b/blob differ"), "{text}");
    }

    #[tokio::test]
    async fn deletions_and_odd_names() {
        let (text, _) = shown(&[("100644", "gone", b"x\n")], &[], &["--name-status"]).await;
        assert_eq!(text, "D\tgone\n");
        let odd = [
            ("100644", r#""caf\351""#, &b"1\n"[..]),
            ("100644", r#""a\nb \"c\"""#, b"2\n"),
            ("100644", "with space", b"3\n"),
        ];
        let (text, _) = shown(&[], &odd, &["--name-only"]).await;
        assert_eq!(text, "\"a\\nb \\\"c\\\"\"\n\"caf\\351\"\nwith space\n");
    }

    #[tokio::test]
    async fn options_and_paths_reach_git() {
        let base: Side<'_> = &[("100644", "a/x", b"1\n"), ("100644", "b/x", b"1\n")];
        let head: Side<'_> = &[("100644", "a/x", b"2\n"), ("100644", "b/x", b"2\n")];
        assert_eq!(shown(base, head, &["--name-only", "a"]).await.0, "a/x\n");
        assert_eq!(shown(base, head, &["--name-only", "--", "b"]).await.0, "b/x\n");
        assert!(shown(base, head, &["--stat"]).await.0.contains("2 files changed, 2 insertions(+), 2 deletions(-)"));
    }

    #[tokio::test]
    async fn what_differs_is_counted() {
        let repository = Repository::create().await.unwrap();
        let base: Side<'_> = &[("100644", "a", b"1\n2\n"), ("100644", "gone", b"x\n"), ("100644", "blob", b"\0")];
        let head: Side<'_> = &[("100644", "a", b"1\n3\n4\n"), ("100644", "blob", b"\0\x01")];
        repository.import(Cursor::new(stream(base, head))).await.unwrap();
        assert_eq!(repository.numbers().await.unwrap(), Numbers { files: 3, added: 2, removed: 2 });
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_off_shows_nothing() {
        let whole = stream(&[("100644", "a", b"one\n")], &[("100644", "a", b"two\n")]);
        for cut in [0, 20, 60, whole.len() - DONE.len(), whole.len() - 1] {
            let repository = Repository::create().await.unwrap();
            let error = repository.import(Cursor::new(whole[..cut].to_vec())).await.unwrap_err();
            assert!(matches!(error, ImportError::Stream(_)), "cut at {cut}: {error:?}");
        }
    }

    #[tokio::test]
    async fn what_git_refuses_is_told_in_its_words() {
        let repository = Repository::create().await.unwrap();
        let error = repository.import(Cursor::new(b"nonsense\ndone\n".to_vec())).await.unwrap_err();
        assert!(matches!(&error, ImportError::Git(error) if error.to_string().contains("nonsense")), "{error:?}");
    }
}
