//! Completion: static scripts for shells, and answers to kubectl's questions with names from the cluster.
//!
//! kubectl 1.26 and later asks the program `kubectl_complete-aether` what may follow, and expects one candidate a line,
//! a tab and a description, then `:` and a number that says how the shell should go on (cobra's `ShellCompDirective`).

use std::ffi::OsString;
use std::time::Duration;

use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherNote, AetherRestore, AetherSession,
    AetherSource,
};
use anyhow::Result;
use clap::CommandFactory;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::cli::{Cli, Connection, Shell};
use crate::cluster::Cluster;
use crate::kinds::Kind;
use crate::output::print;

/// cobra's `ShellCompDirectiveNoFileComp`: do not offer files.
const NO_FILES: &str = ":4\n";
/// cobra's `ShellCompDirectiveDefault`: offer files.
const FILES: &str = ":0\n";
/// A shell must not hang on a cluster that does not answer.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn script(shell: Shell) -> Result<()> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
        Shell::Kubectl => {
            return print(
                "#!/bin/sh\n# Completes `kubectl aether …`: kubectl runs this program by its name.\nexec kubectl-aether __complete \"$@\"\n",
            );
        }
    };
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command().bin_name("kubectl-aether"), "kubectl-aether", &mut out);
    print(&String::from_utf8(out)?)
}

/// Answers with what may stand in place of the last of `words`.
pub(crate) async fn answer(words: &[OsString]) -> Result<()> {
    let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let question = question(&words);
    let mut candidates = question.candidates.clone();
    if let Some((kind, slash)) = question.names {
        let names = tokio::time::timeout(PATIENCE, names(&question.connection, kind)).await;
        let prefix = if slash { format!("{}/", kind.word()) } else { String::new() };
        candidates.extend(names.ok().and_then(Result::ok).into_iter().flatten().map(|name| format!("{prefix}{name}")));
    }
    candidates.retain(|candidate| candidate.starts_with(&question.typed));
    let lines: String = candidates.iter().map(|candidate| format!("{candidate}\n")).collect();
    print(&format!("{lines}{}", if question.files { FILES } else { NO_FILES }))
}

#[derive(Debug, Default)]
struct Question {
    typed: String,
    candidates: Vec<String>,
    /// Names of this kind from the cluster; with the kind and a slash before them.
    names: Option<(Kind, bool)>,
    files: bool,
    connection: Connection,
}

fn question(words: &[String]) -> Question {
    let mut root = Cli::command();
    root.build();
    let (typed, before) = words.split_last().map(|(last, rest)| (last.clone(), rest)).unwrap_or_default();
    let mut question = Question { typed, ..Default::default() };
    let mut command = &root;
    let mut positionals: Vec<&str> = Vec::new();
    let mut open: Option<&clap::Arg> = None;
    for word in before {
        if word == "--" {
            question.files = true;
            return question;
        }
        if let Some(option) = open.take() {
            question.connection.take(option.get_id().as_str(), word);
        } else if let Some(option) = word.strip_prefix("--") {
            let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
            let found = command.get_arguments().find(|arg| arg.get_long() == Some(name));
            match (found, value) {
                (Some(arg), Some(value)) => question.connection.take(arg.get_id().as_str(), value),
                (Some(arg), None) => open = Some(arg).filter(|arg| arg.get_action().takes_values()),
                (None, _) => {}
            }
        } else if let Some(short) = word.strip_prefix('-').and_then(|rest| rest.chars().next()) {
            let found = command.get_arguments().find(|arg| arg.get_short() == Some(short));
            open = found.filter(|arg| arg.get_action().takes_values() && word.chars().count() == 2);
        } else if let Some(found) = command.find_subcommand(word).filter(|_| positionals.is_empty()) {
            command = found;
        } else {
            positionals.push(word);
        }
    }
    if let Some(option) = open {
        question.value(option);
    } else if question.typed.starts_with('-') {
        let options = command.get_arguments().filter(|arg| !arg.is_hide_set());
        question.candidates = options.filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect();
    } else if command.has_subcommands() {
        let visible = command.get_subcommands().filter(|sub| !sub.is_hide_set());
        question.candidates = visible.map(|sub| sub.get_name().to_owned()).collect();
    } else {
        question.positional(command, &positionals);
    }
    question
}

impl Connection {
    fn take(&mut self, option: &str, value: &str) {
        match option {
            "namespace" => self.namespace = Some(value.into()),
            "context" => self.context = Some(value.into()),
            "kubeconfig" => self.kubeconfig = Some(value.into()),
            "cluster" => self.cluster = Some(value.into()),
            "user" => self.user = Some(value.into()),
            _ => {}
        }
    }
}

impl Question {
    fn value(&mut self, option: &clap::Arg) {
        match option.get_id().as_str() {
            "checkpoint" | "against" => self.names = Some((Kind::Checkpoint, false)),
            "source" => self.names = Some((Kind::Source, false)),
            "parent" | "approve" => self.names = Some((Kind::Session, false)),
            "kubeconfig" => self.files = true,
            _ => {
                self.candidates = option.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect()
            }
        }
    }

    fn positional(&mut self, command: &clap::Command, before: &[&str]) {
        self.names = match (command.get_name(), before) {
            ("get" | "fork" | "checkpoint" | "checkpoints" | "restore" | "run" | "commit" | "log" | "list", [])
            | ("compare", _) => Some((Kind::Session, false)),
            ("approve" | "reject" | "show" | "add", []) => Some((Kind::Commit, false)),
            ("resolve" | "reopen", _) => Some((Kind::Note, false)),
            ("diff", [] | [_]) => match self.typed.split_once('/').and_then(|(kind, _)| Kind::of(kind)) {
                Some(kind) => Some((kind, true)),
                None => Some((Kind::Session, false)),
            },
            ("restore", [_]) => Some((Kind::Checkpoint, false)),
            ("logs", []) => Some((Kind::Command, false)),
            ("describe" | "delete", [kind, ..]) if Kind::of(kind).is_some() => Kind::of(kind).map(|kind| (kind, false)),
            ("describe", [_, ..]) => None,
            ("describe" | "delete", _) => match self.typed.split_once('/').and_then(|(kind, _)| Kind::of(kind)) {
                Some(kind) => Some((kind, true)),
                None => Some((Kind::Session, false)),
            },
            ("completion", []) => {
                let values = command.get_positionals().next().map(clap::Arg::get_possible_values).unwrap_or_default();
                self.candidates = values.iter().map(|value| value.get_name().to_owned()).collect();
                None
            }
            _ => None,
        };
    }
}

async fn names(connection: &Connection, kind: Kind) -> Result<Vec<String>> {
    let cluster = Cluster::connect(connection).await?;
    async fn list<K>(api: Api<K>) -> Result<Vec<String>>
    where
        K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        Ok(api
            .list_metadata(&ListParams::default().limit(500))
            .await?
            .items
            .iter()
            .map(ResourceExt::name_any)
            .collect())
    }
    match kind {
        Kind::Source => list(cluster.api::<AetherSource>()).await,
        Kind::Session => list(cluster.api::<AetherSession>()).await,
        Kind::Checkpoint => list(cluster.api::<AetherCheckpoint>()).await,
        Kind::Restore => list(cluster.api::<AetherRestore>()).await,
        Kind::Command => list(cluster.api::<AetherCommand>()).await,
        Kind::Commit => list(cluster.api::<AetherCommit>()).await,
        Kind::Approval => list(cluster.api::<AetherApproval>()).await,
        Kind::Note => list(cluster.api::<AetherNote>()).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[&str]) -> Question {
        question(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn commands_flags_and_values() {
        let commands = of(&[""]).candidates;
        assert!(commands.contains(&"fork".to_owned()) && !commands.contains(&"__complete".to_owned()), "{commands:?}");
        assert!(of(&["diff", "--"]).candidates.contains(&"--stat".to_owned()));
        assert!(of(&["diff", "--"]).candidates.contains(&"--namespace".to_owned()));
        assert_eq!(of(&["diff", "--color", ""]).candidates, ["auto", "always", "never"]);
        assert!(of(&["run", "a", "--", "ma"]).files);
        assert_eq!(of(&["completion", ""]).candidates, ["bash", "zsh", "fish", "kubectl"]);
    }

    #[test]
    fn names_are_asked_of_the_namespace_that_was_typed() {
        let fork = of(&["-n", "demo", "fork", "fix"]);
        assert_eq!((fork.names, fork.connection.namespace.as_deref()), (Some((Kind::Session, false)), Some("demo")));
        assert_eq!(of(&["restore", "a", ""]).names, Some((Kind::Checkpoint, false)));
        assert_eq!(of(&["diff", "--checkpoint", ""]).names, Some((Kind::Checkpoint, false)));
        assert_eq!(of(&["delete", "checkpoint/f"]).names, Some((Kind::Checkpoint, true)));
        assert_eq!(of(&["describe", "source", ""]).names, Some((Kind::Source, false)));
        assert_eq!(of(&["create", ""]).names, None);
        assert_eq!(of(&["approve", ""]).names, Some((Kind::Commit, false)));
        assert_eq!(of(&["diff", "commit/f"]).names, Some((Kind::Commit, true)));
        assert_eq!(of(&["compare", "a", ""]).names, Some((Kind::Session, false)));
        assert_eq!(of(&["note", ""]).candidates, ["add", "list", "resolve", "reopen", "help"]);
        assert_eq!(of(&["note", "resolve", ""]).names, Some((Kind::Note, false)));
    }
}
