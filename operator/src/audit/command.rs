//! `aether-operator audit`: reads the log where the operator's credentials are; and gives up one that is lost.

use std::io::Write;

use aether_audit::{Entry, Error, Head, Held, Log, Seen};
use aether_credentials::Credentials;
use anyhow::Context as _;
use clap::{Args, CommandFactory, Parser, Subcommand};
use kube::Client;
use serde_json::json;

use super::anchor::{ClusterAnchor, NAME};
use crate::config::Config;
use crate::events::Events;
use crate::pins::Pins;

/// The exit code when the log is not what it was.
pub const BROKEN: i32 = 1;
/// The exit code when nothing can be said.
pub const UNKNOWN: i32 = 2;

/// Reads the audit log of commits, approvals and notes.
#[derive(Parser, Debug)]
#[command(name = "audit", after_help = EXAMPLES)]
pub struct Command {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    place: Place,
}

/// Where the log is.
#[derive(Args, Debug)]
struct Place {
    /// Address of the store, such as https://aether-store.aether-system.svc:8980.
    #[arg(long, env = "AETHER_STORE", global = true, default_value = "http://aether-store:8980", value_name = "URL")]
    store: String,
    /// The operator's namespace, which has the end of the log.
    #[arg(long, env = "POD_NAMESPACE", global = true, default_value = "aether-system", value_name = "NAME")]
    namespace: String,
    #[command(flatten)]
    credentials: Credentials,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Checks that the log is one chain from its first line on, which ends where ConfigMap aether-audit says; prints its end.
    ///
    /// Exit code 0: it is. 1: it is not, and the first line that is wrong is named. 2: it could not be read.
    Verify {
        /// An end that was printed before, and written down elsewhere: the log must have passed it. Repeat it for several.
        #[arg(long, value_name = "LINES:HASH")]
        expect: Vec<Head>,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Prints the lines, oldest first, and checks them as verify does.
    Show {
        /// Only of this namespace.
        #[arg(long, value_name = "NAME")]
        of: Option<String>,
        /// Only of this object; of a commit also what was said of it.
        #[arg(long, value_name = "KIND/NAME")]
        object: Option<String>,
    },
    /// Lets the store forget a log that cannot be mended, so that another one begins when ConfigMap aether-audit is deleted too.
    GiveUp {
        /// Where the log ends, as the ConfigMap says: its lines and hash.
        #[arg(value_name = "LINES:HASH")]
        end: Head,
    },
}

const EXAMPLES: &str = "\
Examples:
  kubectl exec -n aether-system deploy/aether-operator -- aether-operator audit verify
  kubectl exec -n aether-system deploy/aether-operator -- aether-operator audit verify --expect 142:5f0c…
  kubectl exec -n aether-system deploy/aether-operator -- aether-operator audit show --of agents --object AetherCommit/fix";

/// The operator's own command line, with this as a subcommand.
pub fn program() -> clap::Command {
    Config::command().subcommand_negates_reqs(true).subcommand(Command::command())
}

impl Place {
    fn anchor(&self, client: &Client) -> anyhow::Result<ClusterAnchor> {
        let pins = Pins::connect(&self.store, &self.credentials)?;
        Ok(ClusterAnchor::new(client, &self.namespace, pins, Events::new(client, "audit")))
    }
}

impl Command {
    /// Does it; the exit code.
    ///
    /// # Errors
    /// Output that cannot be written.
    pub async fn run(self, out: &mut impl Write) -> anyhow::Result<i32> {
        if let What::GiveUp { end } = self.what {
            let client = Client::try_default().await.context("no cluster")?;
            self.place.anchor(&client)?.forget(end).await.map_err(anyhow::Error::msg)?;
            writeln!(
                out,
                "the store need not keep the log that ends {end}; delete ConfigMap {NAME}, and another one begins"
            )?;
            return Ok(0);
        }
        let found = self.read().await;
        let (held, entries, verified) = match found {
            Ok(found) => found,
            Err(error) => {
                writeln!(out, "the audit log cannot be read: {error:#}")?;
                return Ok(UNKNOWN);
            }
        };
        match &self.what {
            What::Show { of, object } => {
                for (number, entry) in entries.iter().enumerate().filter(|(_, entry)| is_meant(entry, of, object)) {
                    writeln!(out, "{}", shown(number + 1, entry))?;
                }
            }
            What::Verify { json: true, .. } => {
                let answer = match &verified {
                    Ok(head) => json!({"whole": true, "lines": head.count, "end": head.to_string()}),
                    Err(Error::Broken(broken)) => {
                        json!({"whole": false, "line": broken.line, "problem": broken.problem, "end": held.head.to_string()})
                    }
                    Err(error) => json!({"whole": null, "problem": error.to_string(), "end": held.head.to_string()}),
                };
                writeln!(out, "{answer}")?;
            }
            What::Verify { .. } | What::GiveUp { .. } => {}
        }
        let quiet = matches!(self.what, What::Show { .. } | What::Verify { json: true, .. });
        match verified {
            Ok(head) if !quiet => {
                writeln!(out, "{} lines, one chain, which ends where ConfigMap {NAME} says:\n{head}", head.count)?;
            }
            Ok(_) => {}
            Err(error) => {
                if !matches!(self.what, What::Verify { json: true, .. }) {
                    writeln!(out, "{error}")?;
                }
                let broken = matches!(error, Error::Broken(_) | Error::Foreign(_));
                return Ok(if broken { BROKEN } else { UNKNOWN });
            }
        }
        Ok(0)
    }

    /// What is held, the lines as far as they are good, and what there is to say of them.
    async fn read(&self) -> anyhow::Result<(Held, Vec<Entry>, Result<Head, Error>)> {
        let Place { store, namespace, credentials } = &self.place;
        let client = Client::try_default().await.context("no cluster")?;
        let anchor = self.place.anchor(&client)?;
        let held = match anchor.look().await.map_err(anyhow::Error::msg)? {
            Some(held) => held,
            None => match anchor.pinned().await.map_err(anyhow::Error::msg)? {
                Some((head, _)) => anyhow::bail!(
                    "ConfigMap {namespace}/{NAME} is gone; the store has a log that ends {head}. The operator writes it again with the next line"
                ),
                None => Held::NOTHING,
            },
        };
        let store = super::store(store, credentials)?;
        let seen = Seen(held.clone());
        let expected = match &self.what {
            What::Verify { expect, .. } => expect.as_slice(),
            What::Show { .. } | What::GiveUp { .. } => &[],
        };
        let mut entries = Vec::new();
        let log = Log { store: store.as_ref(), anchor: &seen };
        let verified = log.verify(expected.iter().copied(), |entry| entries.push(entry)).await;
        Ok((held, entries, verified))
    }
}

/// Whether a line is one of those that are wanted.
fn is_meant(entry: &Entry, namespace: &Option<String>, object: &Option<String>) -> bool {
    let about = &entry.object;
    let of = namespace.as_ref().is_none_or(|namespace| about.namespace == *namespace);
    let object = object.as_ref().is_none_or(|wanted| {
        let (kind, name) = wanted.split_once('/').unwrap_or(("AetherCommit", wanted));
        about.is_of(kind, name)
    });
    of && object
}

fn shown(number: usize, entry: &Entry) -> String {
    let about = &entry.object;
    let root = entry.root.as_ref().map(|root| format!("  tree {root}")).unwrap_or_default();
    format!(
        "{number}  {}  {}  {:?}  {} {}/{}{root}",
        entry.time, entry.actor, entry.verb, about.kind, about.namespace, about.name
    )
}

#[cfg(test)]
mod tests {
    use aether_audit::{Object, Verb};
    use clap::FromArgMatches;

    use super::*;

    #[test]
    fn the_operator_needs_no_settings_to_read_its_log() {
        program().debug_assert();
        let matches = program().try_get_matches_from(["aether-operator", "audit", "verify", "--expect", "3:x"]);
        assert!(matches.unwrap_err().to_string().contains("LINES:HASH"));
        let head = Head { count: 3, hash: aether_cas::Digest::of(b"line") };
        let arguments =
            ["aether-operator", "audit", "verify", "--json", "--store", "http://s", "--expect", &head.to_string()];
        let matches = program().try_get_matches_from(arguments).unwrap();
        let command = Command::from_arg_matches(matches.subcommand_matches("audit").unwrap()).unwrap();
        assert!(matches!(command.what, What::Verify { expect, json: true } if expect == [head]));
        assert_eq!(command.place.store, "http://s");
        let bare = program().try_get_matches_from(["aether-operator"]).unwrap_err().to_string();
        assert!(bare.contains("--store"), "{bare}");
    }

    #[test]
    fn what_was_said_of_a_commit_is_shown_with_it() {
        let object = |kind: &str, name: &str| Object {
            kind: kind.into(),
            namespace: "agents".into(),
            name: name.into(),
            uid: "u".into(),
        };
        let meant = |kind: &str, name: &str, namespace: &str, wanted: &str| {
            let time = jiff::Timestamp::UNIX_EPOCH;
            let object = object(kind, name);
            let entry = Entry { time, actor: "a".into(), verb: Verb::Noted, object, root: None, occasion: 0 };
            is_meant(&entry, &Some(namespace.into()), &Some(wanted.into()))
        };
        assert!(meant("AetherCommit", "fix", "agents", "AetherCommit/fix"));
        assert!(meant("AetherCommit", "fix", "agents", "fix"));
        assert!(meant("AetherApproval", "fix.81f8", "agents", "aethercommit/fix"));
        assert!(!meant("AetherApproval", "fix.81f8", "other", "AetherCommit/fix"));
        assert!(!meant("AetherApproval", "fix.7.81f8", "agents", "AetherCommit/fix"));
        assert!(!meant("AetherNote", "fix", "agents", "AetherCommit/fix"));
        assert!(meant("AetherNote", "n", "agents", "AetherNote/n"));
    }
}
