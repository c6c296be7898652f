//! What can be typed for review: commits, decisions on them, notes, history and comparisons.

use aether_api::commit::{Author, ExportTarget, History};
use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::{Color, Patience, PrintList, PrintObject};
use crate::parse;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepHistory {
    /// All that the session has changed becomes one commit
    #[default]
    Squash,
    /// Commits made inside the session stay
    Keep,
}

impl From<KeepHistory> for History {
    fn from(keep: KeepHistory) -> Self {
        match keep {
            KeepHistory::Squash => Self::Squash,
            KeepHistory::Keep => Self::Keep,
        }
    }
}

/// Targets that have nothing to do with git.
const NOT_GIT: [&str; 2] = ["promote", "export"];

#[derive(Args, Debug)]
#[command(
    after_help = "The commit runs when the review rule of the session's source is satisfied, and only with the tree that was approved.

Examples:
  # A commit on a branch of the source's repository
  kubectl aether commit fix-login --branch agents/fix-login -m 'login: wait for the port'
  # The same of a checkpoint; when the branch has moved on, on top of what is there now
  kubectl aether commit --checkpoint fix-login-green --branch main -m 'login: wait for the port' --rebase
  # A new revision of the source, at once usable by new sessions
  kubectl aether commit fix-login --promote
  # A copy of the tree in a place that the source has for it: in a folder with the commit's name, or in this one
  kubectl aether commit fix-login --export results
  kubectl aether commit fix-login --export results:logins/second-try"
)]
#[group(id = "from", required = true, multiple = false, args = ["session", "checkpoint"])]
#[command(group = ArgGroup::new("target").required(true).multiple(false).args(["branch", "promote", "export"]))]
pub(crate) struct Commit {
    /// The session; a checkpoint of it is taken first
    pub(crate) session: Option<String>,
    /// A checkpoint instead of a session
    #[arg(long, value_name = "NAME")]
    pub(crate) checkpoint: Option<String>,
    /// To this branch of the source's repository
    #[arg(long, value_name = "NAME", requires = "message")]
    pub(crate) branch: Option<String>,
    /// The message of the git commit
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = NOT_GIT)]
    pub(crate) message: Option<String>,
    /// Whose work it is; yours when absent
    #[arg(long, value_name = "NAME <ADDRESS>", value_parser = author, conflicts_with_all = NOT_GIT)]
    pub(crate) author: Option<Author>,
    /// When the branch has moved on, put the change on top of it, if nobody else has changed the same paths
    #[arg(long, conflicts_with_all = NOT_GIT)]
    pub(crate) rebase: bool,
    /// What becomes of commits that were made with git inside the session
    #[arg(long, value_enum, default_value = "squash", value_name = "WHAT", conflicts_with_all = NOT_GIT)]
    pub(crate) history: KeepHistory,
    /// To a new revision of the source
    #[arg(long)]
    pub(crate) promote: bool,
    /// To a new folder in a place of the source's spec.review.exports; the folder is called like the AetherCommit when not said
    #[arg(long, value_name = "PLACE[:PATH]", value_parser = export)]
    pub(crate) export: Option<ExportTarget>,
    /// The name of the AetherCommit; made from the session's when absent
    #[arg(long, value_name = "NAME", value_parser = parse::name)]
    pub(crate) name: Option<String>,
    /// Delete the AetherCommit so long after it finished; it stays as the record when absent
    #[arg(long, value_name = "TIME", value_parser = parse::span)]
    pub(crate) ttl: Option<std::time::Duration>,
    /// Wait until it is at its target; being rejected is a failure
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

fn author(text: &str) -> Result<Author, String> {
    let form = || format!("an author is 'NAME <ADDRESS>', not {text:?}");
    let (name, rest) = text.split_once('<').ok_or_else(form)?;
    let email = rest.trim_end().strip_suffix('>').ok_or_else(form)?;
    let (name, email) = (name.trim(), email.trim());
    if name.is_empty() || email.is_empty() || email.contains(['<', '>']) {
        return Err(form());
    }
    Ok(Author { name: name.into(), email: email.into() })
}

fn export(text: &str) -> Result<ExportTarget, String> {
    let (place, path) = text.split_once(':').map_or((text, None), |(place, path)| (place, Some(path)));
    if path.is_some_and(|path| path.split('/').any(|part| ["", ".", ".."].contains(&part))) {
        return Err("the path in a place is relative, with one '/' between names, and has no '..'".into());
    }
    Ok(ExportTarget { to: parse::name(place)?, path: path.map(Into::into) })
}

#[derive(Args, Debug)]
#[command(
    after_help = "An approval is of exactly the tree that the commit shows now. A rejection of your own is withdrawn by it.

Examples:
  kubectl aether approve fix-login-x7k2p
  kubectl aether approve fix-login-x7k2p -m 'reads well' --yes
  # Only if it is still what was looked at
  kubectl aether approve fix-login-x7k2p --root \"$root\" --yes"
)]
pub(crate) struct Approve {
    /// The commit
    pub(crate) commit: String,
    /// A text for people
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Fail unless the commit's tree is this one
    #[arg(long, value_name = "ROOT")]
    pub(crate) root: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Args, Debug)]
#[command(
    after_help = "A rejection keeps the commit from running until it is withdrawn: by `approve`, or by deleting it.

Examples:
  kubectl aether reject fix-login-x7k2p -m 'the timeout must be configurable'"
)]
pub(crate) struct Reject {
    /// The commit
    pub(crate) commit: String,
    /// Why
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: String,
    /// Fail unless the commit's tree is this one
    #[arg(long, value_name = "ROOT")]
    pub(crate) root: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Args, Debug)]
#[command(after_help = "Without --namespace, commits of all namespaces that you may list.

Examples:
  kubectl aether review
  kubectl aether review -n agents
  # Also what you asked for yourself and what you have decided on
  kubectl aether review --all -o wide")]
pub(crate) struct Review {
    /// Also your own commits, and those that you have decided on
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) print: PrintList,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether show fix-login-x7k2p
  kubectl aether show fix-login-x7k2p --no-files")]
pub(crate) struct Show {
    /// The commit
    pub(crate) commit: String,
    /// Do not fetch what changed
    #[arg(long)]
    pub(crate) no_files: bool,
    /// When to colour
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    pub(crate) color: Color,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether log fix-login")]
pub(crate) struct Log {
    /// The session
    pub(crate) session: String,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Each session is compared with where it started: by its unfinished commit if it has one, else as it is now.

Examples:
  kubectl aether compare attempt-1 attempt-2 attempt-3
  kubectl aether compare --parent fix-login
  # Take one and close the others
  kubectl aether compare --parent fix-login --approve attempt-2 --close-others"
)]
#[group(id = "attempts", required = true, multiple = false, args = ["sessions", "parent"])]
pub(crate) struct Compare {
    /// The sessions
    #[arg(value_name = "SESSION")]
    pub(crate) sessions: Vec<String>,
    /// All sessions that were forked from this one
    #[arg(long, value_name = "SESSION")]
    pub(crate) parent: Option<String>,
    /// Approve the commit of this one of them
    #[arg(long, value_name = "SESSION")]
    pub(crate) approve: Option<String>,
    /// Reject the commits of all others
    #[arg(long, requires = "approve")]
    pub(crate) close_others: bool,
    /// Do not ask
    #[arg(short, long, requires = "approve")]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether note add fix-login-x7k2p test/port_test.go:12-14 -m 'please give up after a minute'
  kubectl aether note list fix-login
  kubectl aether note resolve fix-login-x7k2p-b5t9w")]
pub(crate) struct Note {
    #[command(subcommand)]
    pub(crate) action: NoteAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NoteAction {
    /// Remark on lines of a file
    Add(NoteAdd),
    /// List notes, and where their lines are now
    List(NoteList),
    /// Say that a note has been dealt with
    Resolve(NoteName),
    /// Say that it has not
    Reopen(NoteName),
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether note add fix-login-x7k2p test/port_test.go:12-14 -m 'please give up after a minute'
  kubectl aether note add checkpoint/fix-login-green README.md -m 'say how it is configured'")]
pub(crate) struct NoteAdd {
    /// COMMIT, or checkpoint/NAME
    #[arg(value_name = "COMMIT")]
    pub(crate) object: String,
    /// The file from the tree's root on, and its lines; without lines, all of it
    #[arg(value_name = "PATH[:FROM[-TO]]", value_parser = place)]
    pub(crate) place: Place,
    /// The remark
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: String,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

/// Lines of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) lines: Option<(u32, u32)>,
}

fn place(text: &str) -> Result<Place, String> {
    let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number > 0);
    let split = text.rsplit_once(':').and_then(|(path, lines)| {
        let (from, to) = lines.split_once('-').unwrap_or((lines, lines));
        Some((path, number(from)?, number(to)?))
    });
    let (path, lines) = match split {
        Some((_, from, to)) if from > to => return Err(format!("line {from} is behind line {to}")),
        Some((path, from, to)) => (path, Some((from, to))),
        None => (text, None),
    };
    let path = path.strip_prefix("./").unwrap_or(path);
    if path.is_empty() || path.starts_with('/') {
        return Err("a path goes from the tree's root on, without a slash before it".into());
    }
    Ok(Place { path: path.into(), lines })
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether note list
  kubectl aether note list fix-login --all")]
pub(crate) struct NoteList {
    /// Only notes of this session; also says where their lines are in its head
    pub(crate) session: Option<String>,
    /// Also those that have been dealt with
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) print: PrintList,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether note resolve fix-login-x7k2p-b5t9w")]
pub(crate) struct NoteName {
    /// The notes
    #[arg(required = true, value_name = "NOTE")]
    pub(crate) names: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("kubectl-aether").chain(words.iter().copied()))
    }

    #[test]
    fn a_commit_has_one_start_and_one_target() {
        for bad in [
            &["commit", "a"][..],
            &["commit", "--branch", "b", "-m", "x"],
            &["commit", "a", "--checkpoint", "k", "--promote"],
            &["commit", "a", "--branch", "b"],
            &["commit", "a", "--branch", "b", "-m", "x", "--promote"],
            &["commit", "a", "--promote", "--rebase"],
            &["commit", "a", "--promote", "--export", "results"],
            &["commit", "a", "--export", "results", "-m", "x"],
            &["commit", "a", "--export", "results:"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        for good in [
            &["commit", "a", "--branch", "b", "-m", "x", "--rebase", "--history", "keep"][..],
            &["commit", "--checkpoint", "k", "--promote"],
            &["commit", "a", "--export", "results", "--wait"],
            &["commit", "--checkpoint", "k", "--export", "results:p/q"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn places_authors_and_targets() {
        let of = |path: &str, lines| Place { path: path.into(), lines };
        assert_eq!(place("a/b:12-14").unwrap(), of("a/b", Some((12, 14))));
        assert_eq!(place("./a:3").unwrap(), of("a", Some((3, 3))));
        assert_eq!(place("odd:name").unwrap(), of("odd:name", None));
        assert_eq!(place("a:0").unwrap(), of("a:0", None));
        for bad in ["a:4-3", "/a:1", "", ":1"] {
            assert!(place(bad).is_err(), "{bad}");
        }
        assert_eq!(author("Ada L <a@b>").unwrap(), Author { name: "Ada L".into(), email: "a@b".into() });
        for bad in ["Ada", "<a@b>", "Ada <>", "Ada <a"] {
            assert!(author(bad).is_err(), "{bad}");
        }
        assert_eq!(export("c").unwrap(), ExportTarget { to: "c".into(), path: None });
        assert_eq!(export("c:a/b:c").unwrap(), ExportTarget { to: "c".into(), path: Some("a/b:c".into()) });
        for bad in ["c:../x", "c:/x", "c:a//b", "c:", ":a", "C d", ""] {
            assert!(export(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn comparisons_name_sessions_or_their_parent() {
        assert!(parse(&["compare"]).is_err());
        assert!(parse(&["compare", "a", "--parent", "p"]).is_err());
        assert!(parse(&["compare", "a", "b", "--close-others"]).is_err());
        let Command::Compare(compare) =
            parse(&["compare", "a", "b", "--approve", "a", "--close-others"]).unwrap().command
        else {
            panic!("not compare")
        };
        assert_eq!(compare.sessions, ["a", "b"]);
    }
}
