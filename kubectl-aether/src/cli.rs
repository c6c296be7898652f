//! What can be typed: subcommands, flags, their help and their checks. Nothing is done here.

mod review;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;

use aether_api::session::{AutomaticCheckpoints, Owner};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::parse;

pub(crate) use review::{
    Approve, Commit, Compare, Log, Note, NoteAction, NoteAdd, NoteList, NoteName, Reject, Review, Show,
};

/// Writable copies of large repositories in milliseconds: make, fork, checkpoint, compare, restore and review sessions.
#[derive(Debug, Parser)]
#[command(name = "kubectl-aether", bin_name = "kubectl aether", version, about, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: Connection,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "Examples:
  kubectl aether create fix-login --source tools/linux
  kubectl aether get
  kubectl aether fork fix-login attempt --count 3
  kubectl aether run attempt-1 -- make test
  kubectl aether diff attempt-1 --stat
  kubectl aether checkpoint attempt-1 -m 'tests pass'
  kubectl aether commit attempt-1 --branch agents/fix-login -m 'login: wait for the port'
  kubectl aether review";

/// Which cluster, as whom. The same flags as kubectl's.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Connection {
    /// Namespace; the context's when absent
    #[arg(short, long, global = true, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Context of the kubeconfig; its current one when absent
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Kubeconfig file; $KUBECONFIG or ~/.kube/config when absent
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Cluster of the kubeconfig, instead of the context's
    #[arg(long, global = true, value_name = "NAME", hide_short_help = true)]
    pub(crate) cluster: Option<String>,
    /// User of the kubeconfig, instead of the context's
    #[arg(long, global = true, value_name = "NAME", hide_short_help = true)]
    pub(crate) user: Option<String>,
    /// Act as this user
    #[arg(long = "as", global = true, value_name = "USER", hide_short_help = true)]
    pub(crate) impersonate: Option<String>,
    /// Act as a member of this group, beside --as; may be repeated
    #[arg(long = "as-group", global = true, value_name = "GROUP", requires = "impersonate", hide_short_help = true)]
    pub(crate) impersonate_groups: Vec<String>,
    /// Say nothing about progress
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a session from a source or a checkpoint
    Create(Create),
    /// Show sessions as a tree: forks below what they were forked from
    Get(Get),
    /// Make sessions that start from this very moment of another one
    Fork(Fork),
    /// Keep the present state of a session
    Checkpoint(Checkpoint),
    /// List the checkpoints of a session, or all of them
    Checkpoints(Checkpoints),
    /// Show what changed in a session or checkpoint, as git shows it
    Diff(Diff),
    /// Take a session back to a checkpoint
    Restore(Restore),
    /// Ask for what a session has made to leave: to a branch, to a new revision, to S3 or a claim
    Commit(Commit),
    /// List the commits that wait for your approval
    Review(Review),
    /// Show all that a reviewer wants to know of a commit
    Show(Show),
    /// Approve exactly the tree that a commit shows
    Approve(Approve),
    /// Reject a commit
    Reject(Reject),
    /// Remark on lines of files
    Note(Note),
    /// Tell what became of a session: checkpoints, commits, decisions, notes
    Log(Log),
    /// Put several attempts side by side
    Compare(Compare),
    /// Run a command in a session and show its output
    Run(Run),
    /// Show the output of a command
    Logs(Logs),
    /// Show all about one object: state, conditions, lineage, events
    Describe(Describe),
    /// Delete sessions, checkpoints and other objects of Aether
    Delete(Delete),
    /// Print a script that completes what you type
    Completion(Completion),
    /// Answers kubectl's questions for completion (see `completion kubectl`)
    #[command(name = "__complete", hide = true)]
    Complete {
        /// The words so far.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
    /// kind/name, one a line
    Name,
    /// A table with more columns
    Wide,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ObjectFormat {
    /// The object as JSON
    Json,
    /// The object as YAML
    Yaml,
    /// kind/name
    Name,
}

#[derive(Args, Debug)]
pub(crate) struct PrintList {
    /// How to print
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,
}

#[derive(Args, Debug)]
pub(crate) struct PrintObject {
    /// Print what was made as an object instead of in a sentence
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<ObjectFormat>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Patience {
    /// Give up waiting after this long; what was asked for goes on
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::span)]
    pub(crate) timeout: std::time::Duration,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  # From the newest revision of source `linux` of namespace `tools`, files owned by 1000:1000
  kubectl aether create fix-login --source tools/linux
  # From a named revision, deleted after a working day, a checkpoint every 5 minutes of which the last 10 stay
  kubectl aether create fix-login --source tools/linux --revision r2 --ttl 8h --checkpoints 5m:10
  # From a checkpoint
  kubectl aether create again --checkpoint fix-login-before")]
#[group(id = "start", required = true, multiple = false, args = ["source", "checkpoint"])]
pub(crate) struct Create {
    /// The session's name; its claim has the same
    #[arg(value_parser = parse::name)]
    pub(crate) name: String,
    /// Start from a source, of this namespace or of another
    #[arg(long, value_name = "[NAMESPACE/]NAME", value_parser = parse::source)]
    pub(crate) source: Option<parse::Source>,
    /// Start from a checkpoint of this namespace
    #[arg(long, value_name = "NAME", value_parser = parse::name)]
    pub(crate) checkpoint: Option<String>,
    /// One of the source's revisions; the newest when absent
    #[arg(long, value_name = "NAME", conflicts_with = "checkpoint")]
    pub(crate) revision: Option<String>,
    /// Who owns the files; 1000:1000 when absent
    #[arg(long, value_name = "UID:GID")]
    pub(crate) owner: Option<Owner>,
    /// Delete the session so long after it was made
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub(crate) ttl: Option<kube::core::Duration>,
    /// Take a checkpoint this often while mounted, and keep so many
    #[arg(long, value_name = "TIME[:KEEP]", value_parser = parse::automatic)]
    pub(crate) checkpoints: Option<AutomaticCheckpoints>,
    /// Do not wait until pods can mount it
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether get
  kubectl aether get -A --checkpoints
  kubectl aether get fix-login -o yaml")]
pub(crate) struct Get {
    /// Only this session and, in a tree, what came from it
    pub(crate) name: Option<String>,
    /// Sessions of all namespaces
    #[arg(short = 'A', long, conflicts_with_all = ["name", "namespace"])]
    pub(crate) all_namespaces: bool,
    /// Checkpoints too, below their sessions
    #[arg(long)]
    pub(crate) checkpoints: bool,
    /// Only sessions with these labels
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub(crate) selector: Option<String>,
    #[command(flatten)]
    pub(crate) print: PrintList,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  # One fork, named by the cluster
  kubectl aether fork fix-login
  # attempt-1 to attempt-50, all from the same moment of the running session
  kubectl aether fork fix-login attempt --count 50")]
pub(crate) struct Fork {
    /// The session to fork; it may be mounted and written to
    pub(crate) parent: String,
    /// The fork's name; with --count the names are NAME-1, NAME-2, …
    #[arg(value_parser = parse::name)]
    pub(crate) name: Option<String>,
    /// How many forks
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) count: u16,
    /// Who owns the forks' files; the parent's owner when absent
    #[arg(long, value_name = "UID:GID")]
    pub(crate) owner: Option<Owner>,
    /// Delete the forks so long after they were made
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub(crate) ttl: Option<kube::core::Duration>,
    /// Do not wait until pods can mount them
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitFor {
    /// Not at all
    None,
    /// Until the moment is kept on its node
    Local,
    /// Until it is in the store, where it survives the loss of the node
    Durable,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether checkpoint fix-login -m 'before the big change'
  kubectl aether checkpoint fix-login --name fix-login-green --wait durable")]
pub(crate) struct Checkpoint {
    /// The session
    pub(crate) session: String,
    /// What to remember it by
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// The checkpoint's name; made from the session's when absent
    #[arg(long, value_name = "NAME", value_parser = parse::name)]
    pub(crate) name: Option<String>,
    /// Delete it with the session
    #[arg(long)]
    pub(crate) with_session: bool,
    /// What to wait for
    #[arg(long, value_enum, default_value = "local", value_name = "STATE")]
    pub(crate) wait: WaitFor,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether checkpoints fix-login
  kubectl aether checkpoints -o wide")]
pub(crate) struct Checkpoints {
    /// Only those of this session
    pub(crate) session: Option<String>,
    #[command(flatten)]
    pub(crate) print: PrintList,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl Color {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }

    /// Whether to colour what goes to stdout.
    pub(crate) fn wanted(self) -> bool {
        match self {
            Self::Auto => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "What follows -- is for git diff: options first, each one word (-U10, --diff-filter=AM), then paths;
another -- between the two removes all doubt. Contents of .git are not compared.

Exit code: git's. 0, or with --exit-code 1 when something changed; 2 when there was no diff to show.

Examples:
  # A session as it is now, against the revision it started from
  kubectl aether diff fix-login
  kubectl aether diff fix-login --stat
  # One file, in two columns
  kubectl aether diff fix-login --side-by-side -- src/login.rs
  kubectl aether diff fix-login -- --word-diff src/login
  # What a commit would take out, and what came since an earlier one
  kubectl aether diff fix-login-x7k2p
  kubectl aether diff fix-login-b5t9w fix-login-x7k2p
  # From one session to another
  kubectl aether diff attempt-1 attempt-2
  # A checkpoint, and one checkpoint against another
  kubectl aether diff --checkpoint fix-login-green
  kubectl aether diff --checkpoint fix-login-before --checkpoint fix-login-green"
)]
#[group(id = "what", required = true, multiple = false, args = ["objects", "checkpoint"])]
pub(crate) struct Diff {
    /// The session, commit or checkpoint (or KIND/NAME); two, from the first to the second. Of a session a checkpoint is
    /// taken for the time of the diff
    #[arg(num_args = 0..=2, value_name = "OBJECT")]
    pub(crate) objects: Vec<String>,
    /// A checkpoint instead of a session; given twice, from the first to the second
    #[arg(long, value_name = "NAME")]
    pub(crate) checkpoint: Vec<String>,
    /// Compare with this checkpoint (or KIND/NAME) instead of with where the session started
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) against: Option<String>,
    /// In two columns
    #[arg(short = 'y', long, conflicts_with_all = ["stat", "name_only"])]
    pub(crate) side_by_side: bool,
    /// Files and numbers of changed lines only
    #[arg(long)]
    pub(crate) stat: bool,
    /// Names of changed files only
    #[arg(long, conflicts_with = "stat")]
    pub(crate) name_only: bool,
    /// When to colour
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    pub(crate) color: Color,
    /// Exit with 1 when something changed
    #[arg(long)]
    pub(crate) exit_code: bool,
    /// Print at once, not through a pager
    #[arg(long)]
    pub(crate) no_pager: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    /// Options of git diff and paths
    #[arg(last = true, value_name = "GIT DIFF OPTIONS AND PATHS")]
    pub(crate) git: Vec<OsString>,
}

#[derive(Args, Debug)]
#[command(
    after_help = "The session's present state is kept first, as a safety checkpoint, whose name is printed: it is the way back.

Examples:
  kubectl aether restore fix-login fix-login-green
  kubectl aether restore fix-login fix-login-green --yes"
)]
pub(crate) struct Restore {
    /// The session; it may be mounted
    pub(crate) session: String,
    /// The checkpoint
    pub(crate) checkpoint: String,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Do not wait until it is done
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) print: PrintObject,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Exit code: the command's, as a shell would report it (124 when --timeout ended it); 125 when it could not be run.
Ctrl-C ends the command: TERM, then KILL after --grace. Ctrl-C again leaves it to itself.

Examples:
  kubectl aether run fix-login -- make test
  kubectl aether run fix-login --timeout 10m --checkpoint -- sh -c 'npm ci && npm test'
  kubectl aether run fix-login --image rust:1 --env CARGO_TERM_COLOR=always --resources cpu=2,memory=4Gi -- cargo test
  kubectl aether run fix-login --detach -- ./long-job"
)]
pub(crate) struct Run {
    /// The session
    pub(crate) session: String,
    /// Image to run in; the cluster's default when absent
    #[arg(long)]
    pub(crate) image: Option<String>,
    /// End the command after this long: TERM, exit code 124
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub(crate) timeout: Option<kube::core::Duration>,
    /// Time between TERM and KILL; 10s when absent
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub(crate) grace: Option<kube::core::Duration>,
    /// Give up when the command has not begun after this long
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::span)]
    pub(crate) start_timeout: std::time::Duration,
    /// Environment variable; without a value, the one it has here. May be repeated
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = parse::variable)]
    pub(crate) env: Vec<aether_api::command::Variable>,
    /// Directory to run in, relative to the session's root
    #[arg(short, long, value_name = "DIRECTORY")]
    pub(crate) workdir: Option<String>,
    /// What the pod asks for
    #[arg(long, value_name = "cpu=…,memory=…", value_parser = parse::quantities)]
    pub(crate) resources: Option<parse::Quantities>,
    /// What the pod may use at most
    #[arg(long, value_name = "cpu=…,memory=…", value_parser = parse::quantities)]
    pub(crate) limits: Option<parse::Quantities>,
    /// Keep the session's state afterwards, as a checkpoint named like the command
    #[arg(long)]
    pub(crate) checkpoint: bool,
    /// Delete the command, its pod and its output when it has ended and all was shown
    #[arg(long, conflicts_with = "detach")]
    pub(crate) rm: bool,
    /// Delete the command so long after it ended
    #[arg(long, value_name = "TIME", value_parser = parse::span, conflicts_with = "rm")]
    pub(crate) ttl: Option<std::time::Duration>,
    /// Print the command's name and leave it running
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) argv: Vec<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kubectl aether logs fix-login-x7k2p
  kubectl aether logs fix-login-x7k2p -f")]
pub(crate) struct Logs {
    /// The command, as `run` printed it
    pub(crate) command: String,
    /// Go on until the command has ended
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "N", conflicts_with = "follow")]
    pub(crate) tail: Option<u32>,
    /// The time before each line
    #[arg(long, conflicts_with = "follow")]
    pub(crate) timestamps: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Kinds: source, session, checkpoint, restore, command, commit, approval, note; session when absent.

Examples:
  kubectl aether describe fix-login
  kubectl aether describe checkpoint/fix-login-green
  kubectl aether describe source linux -n tools"
)]
pub(crate) struct Describe {
    /// NAME, KIND/NAME or KIND NAME
    #[arg(required = true, num_args = 1..=2, value_name = "OBJECT")]
    pub(crate) object: Vec<String>,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Kinds: source, session, checkpoint, restore, command, commit, approval, note; session when absent.
Deleting an approval withdraws it. Deleting a session deletes its files; its checkpoints stay unless they were made to go with it.

Examples:
  kubectl aether delete attempt-1 attempt-2
  kubectl aether delete checkpoint/fix-login-green
  kubectl aether delete checkpoint fix-login-green fix-login-before --yes"
)]
pub(crate) struct Delete {
    /// NAME…, KIND/NAME… or KIND NAME…
    #[arg(required = true, value_name = "OBJECT")]
    pub(crate) objects: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// It is no error when there is no such object
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
    /// Do not wait until they are gone
    #[arg(long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
    /// Wait until they are gone (this is the default)
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// For `kubectl-aether …` in bash
    Bash,
    /// For `kubectl-aether …` in zsh
    Zsh,
    /// For `kubectl-aether …` in fish
    Fish,
    /// The program `kubectl_complete-aether`, for `kubectl aether …` in any shell with kubectl's own completion
    Kubectl,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  # `kubectl aether …`, wherever kubectl itself completes (kubectl 1.26 and later)
  kubectl aether completion kubectl > ~/.local/bin/kubectl_complete-aether && chmod +x ~/.local/bin/kubectl_complete-aether
  # `kubectl-aether …`
  source <(kubectl aether completion bash)
  kubectl aether completion zsh > \"${fpath[1]}/_kubectl-aether\"
  kubectl aether completion fish > ~/.config/fish/completions/kubectl-aether.fish")]
pub(crate) struct Completion {
    /// For what
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("kubectl-aether").chain(words.iter().copied()))
    }

    #[test]
    fn the_definition_holds_together_and_every_command_has_examples() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n"), "{} has no examples", sub.get_name());
        }
    }

    #[test]
    fn create_wants_exactly_one_start() {
        assert!(parse(&["create", "a"]).is_err());
        assert!(parse(&["create", "a", "--source", "x", "--checkpoint", "y"]).is_err());
        assert!(parse(&["create", "a", "--checkpoint", "y", "--revision", "r1"]).is_err());
        let Command::Create(create) = parse(&[
            "create",
            "a",
            "--source",
            "tools/linux",
            "--owner",
            "1:2",
            "--checkpoints",
            "5m:10",
            "-n",
            "demo",
        ])
        .unwrap()
        .command
        else {
            panic!("not create")
        };
        assert_eq!(create.source, Some(parse::Source { namespace: Some("tools".into()), name: "linux".into() }));
        assert_eq!(create.owner, Some(Owner { uid: 1, gid: 2 }));
        assert_eq!(create.checkpoints.unwrap().keep, 10);
    }

    #[test]
    fn cluster_flags_stand_before_and_after_the_command() {
        for words in [["-n", "demo", "get"], ["get", "-n", "demo"]] {
            assert_eq!(parse(&words).unwrap().connection.namespace.as_deref(), Some("demo"));
        }
        assert!(parse(&["get", "-A", "-n", "demo"]).is_err());
    }

    #[test]
    fn run_passes_everything_after_the_dashes() {
        let Command::Run(run) =
            parse(&["run", "a", "--env", "X=1=2", "--", "sh", "-c", "exit 3", "--", "-n"]).unwrap().command
        else {
            panic!("not run")
        };
        assert_eq!(run.argv, ["sh", "-c", "exit 3", "--", "-n"]);
        assert_eq!((run.env[0].name.as_str(), run.env[0].value.as_str()), ("X", "1=2"));
        assert!(parse(&["run", "a"]).is_err());
        assert!(parse(&["run", "a", "--rm", "--detach", "--", "true"]).is_err());
    }

    #[test]
    fn diff_takes_a_session_or_checkpoints() {
        assert!(parse(&["diff"]).is_err());
        assert!(parse(&["diff", "a", "--checkpoint", "b"]).is_err());
        let Command::Diff(diff) =
            parse(&["diff", "--checkpoint", "a", "--checkpoint", "b", "--", "-U9", "--", "src"]).unwrap().command
        else {
            panic!("not diff")
        };
        assert_eq!(diff.checkpoint, ["a", "b"]);
        assert_eq!(diff.git, ["-U9", "--", "src"]);
    }

    #[test]
    fn bad_values_are_refused_with_a_reason() {
        for (words, reason) in [
            (&["create", "A_b", "--source", "x"][..], "lowercase"),
            (&["create", "a", "--source", "x", "--ttl", "8"], "unit"),
            (&["create", "a", "--source", "x", "--ttl=-8h"], "more than nothing"),
            (&["create", "a", "--source", "x", "--owner", "root"], "UID:GID"),
            (&["create", "a", "--source", "x", "--checkpoints", "5m:0"], "1 to 1000"),
            (&["create", "a", "--source", "a/b/c"], "NAMESPACE/NAME"),
            (&["fork", "a", "--count", "0"], "1..=1000"),
            (&["run", "a", "--resources", "cpu", "--", "true"], "cpu=1"),
        ] {
            let error = parse(words).unwrap_err().to_string();
            assert!(error.contains(reason), "{words:?}: {error}");
        }
    }
}
