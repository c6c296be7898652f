//! What the store has lost, told on the objects that it concerns: condition `Intact`, and an event whenever that changes.
//!
//! The store knows only the uids of those who pinned a tree. An object of which nothing was ever lost has no such
//! condition, and none is written while it says what there is to say. A condition is lifted only when every node of
//! the store was heard: what one of them misses says nothing of the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use aether_api::conditions::{self, INTACT, Wanted, reason};
use aether_api::{
    AetherCheckpoint, AetherCheckpointStatus, AetherSession, AetherSessionStatus, AetherSource, AetherSourceStatus,
};
use aether_credentials::Connection;
use aether_proto::store::v1::store_admin_client::StoreAdminClient;
use aether_proto::store::v1::{AffectedRoot, GetIntegrityRequest, Integrity};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::object::HasStatus;
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;

use crate::config::Config;
use crate::context::Context;
use crate::error::Result;
use crate::objects::{self, Object};
use crate::pins;

/// How long a node may take: it follows every pin when something is lost.
const DEADLINE: Duration = Duration::from_secs(120);
/// What an answer may take: some hundred bytes for each tree that misses something.
const ANSWER: usize = 64 << 20;
/// Paths of each tree, and trees of each object, that a message names.
const PATHS: usize = 3;
const TREES: usize = 5;
/// Characters of a path that a message shows.
const PATH_LENGTH: usize = 200;
/// How often a condition is tried when the object changes meanwhile.
const TRIES: usize = 3;

/// What is lost of one tree.
#[derive(Debug, Default, PartialEq)]
struct Lost {
    paths: BTreeSet<String>,
    more: u64,
}

/// What is lost, by the uid of whom it concerns, and by kind and name of the pin.
type Losses = BTreeMap<String, BTreeMap<(String, String), Lost>>;

/// Looks for damage in a store, and tells it.
pub struct Damage {
    nodes: Vec<StoreAdminClient<Connection>>,
    /// Whether an object may say that something is lost. It is not known at the begin.
    told: bool,
}

impl Damage {
    /// Of the store that these settings name. Connects when first needed.
    ///
    /// # Errors
    /// An address that is not one, or credentials that do not fit it.
    pub fn connect(config: &Config) -> anyhow::Result<Self> {
        let nodes = config.nodes().iter().map(|address| {
            let client = pins::client(address, &config.credentials, DEADLINE)?;
            Ok(client.max_decoding_message_size(ANSWER))
        });
        Ok(Self { nodes: nodes.collect::<anyhow::Result<_>>()?, told: true })
    }

    /// Asks the store, and writes what changed.
    ///
    /// # Errors
    /// A list that failed. An object that cannot be written keeps no other: the next look tries again.
    pub async fn look(&mut self, context: &Context) -> Result<()> {
        let (losses, everybody) = self.ask().await;
        if losses.is_empty() && !(self.told && everybody) {
            return Ok(());
        }
        self.told = true;
        let written = tell_all::<AetherSource>(context, &losses, everybody).await?
            & tell_all::<AetherSession>(context, &losses, everybody).await?
            & tell_all::<AetherCheckpoint>(context, &losses, everybody).await?;
        self.told = !(losses.is_empty() && written);
        Ok(())
    }

    /// What the nodes say is lost, and whether all of them said something.
    async fn ask(&self) -> (Losses, bool) {
        let answers = self.nodes.iter().map(|node| {
            let mut node = node.clone();
            async move { node.get_integrity(GetIntegrityRequest { paths: PATHS as u32 }).await }
        });
        let (mut losses, mut everybody) = (Losses::new(), true);
        for answer in futures::future::join_all(answers).await {
            match answer {
                Ok(answer) => gather(answer.into_inner(), &mut losses),
                Err(status) => {
                    everybody = false;
                    tracing::warn!(code = %status.code(), said = status.message(), "a node of the store does not say what it has lost");
                }
            }
        }
        (losses, everybody)
    }
}

fn gather(answer: Integrity, losses: &mut Losses) {
    for AffectedRoot { root, paths, more } in answer.affected {
        let Some(root) = root else { continue };
        let lost = losses.entry(root.owner_uid).or_default().entry((root.kind, root.name)).or_default();
        lost.paths.extend(paths.into_iter().map(|affected| affected.path));
        lost.more = lost.more.max(more);
    }
}

/// What all kinds here have in their status.
trait Conditions {
    fn conditions(&self) -> &[Condition];
    fn conditions_mut(&mut self) -> &mut Vec<Condition>;
}

macro_rules! has_conditions {
    ($($status:ty),*) => {$(
        impl Conditions for $status {
            fn conditions(&self) -> &[Condition] {
                &self.conditions
            }
            fn conditions_mut(&mut self) -> &mut Vec<Condition> {
                &mut self.conditions
            }
        }
    )*};
}
has_conditions!(AetherSourceStatus, AetherSessionStatus, AetherCheckpointStatus);

/// Tells it on all objects of a kind; whether each of them says now what it should.
async fn tell_all<K>(context: &Context, losses: &Losses, everybody: bool) -> Result<bool>
where
    K: Object + HasStatus + Resource<Scope = NamespaceResourceScope>,
    K::Status: Conditions + Serialize + Default + Clone,
{
    let mut written = true;
    for object in objects::list::<K>(&Api::all(context.client.clone()), "").await? {
        let misses = object.status().is_some_and(|status| {
            conditions::get(status.conditions(), INTACT).is_some_and(|intact| intact.status == "False")
        });
        let wanted = match object.uid().and_then(|uid| losses.get(&uid)) {
            Some(trees) => Wanted::no(INTACT, reason::CONTENTS_LOST, message(trees)),
            None if misses && everybody => {
                Wanted::yes(INTACT, reason::CONTENTS_BACK, "the store has all contents of it again")
            }
            None => continue,
        };
        let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
        if let Err(error) = tell(context, &namespace, object, &wanted).await {
            written = false;
            tracing::warn!(kind = %K::kind(&()), name, namespace, %error, "it could not be told that contents were lost, or are back");
        }
    }
    Ok(written)
}

/// Sets the condition, and tells people when that changed something.
async fn tell<K>(context: &Context, namespace: &str, seen: K, wanted: &Wanted) -> Result<()>
where
    K: Object + HasStatus + Resource<Scope = NamespaceResourceScope>,
    K::Status: Conditions + Serialize + Default + Clone,
{
    let api = objects::namespaced::<K>(&context.client, namespace);
    let (uid, mut object) = (seen.uid(), seen);
    for tries_left in (0..TRIES).rev() {
        let mut status = object.status().cloned().unwrap_or_default();
        // Nothing of the spec has a part in it: no generation is named, so that a new one is no reason to write.
        conditions::set(status.conditions_mut(), wanted.clone(), None);
        match objects::write_status(&api, &object, &status).await {
            Ok(None) => break,
            Ok(Some(written)) => {
                let type_ = if wanted.status { EventType::Normal } else { EventType::Warning };
                context.tell(&written, type_, &wanted.reason, &wanted.message).await;
                break;
            }
            Err(error) if error.is_not_found() => break,
            Err(error) if error.is_conflict() && tries_left > 0 => {
                match objects::get(&api, &object.name_any()).await?.filter(|newer| newer.uid() == uid) {
                    Some(newer) => object = newer,
                    None => break,
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is lost, for people.
fn message(trees: &BTreeMap<(String, String), Lost>) -> String {
    let mut parts: Vec<String> = trees
        .iter()
        .take(TREES)
        .map(|((kind, name), lost)| {
            let count = lost.paths.len() as u64 + lost.more;
            let paths = if count == 1 { "path" } else { "paths" };
            let mut shown: Vec<String> = lost.paths.iter().take(PATHS).map(|path| shown(path)).collect();
            if count > shown.len() as u64 {
                shown.push(format!("{} more", count - shown.len() as u64));
            }
            format!("{count} {paths} of {} ({})", tree(kind, name), shown.join(", "))
        })
        .collect();
    if trees.len() > TREES {
        parts.push(format!("of {} trees more", trees.len() - TREES));
    }
    format!("the store has no good copy of {}. How it comes back: docs/store-upkeep.md", parts.join("; "))
}

fn tree(kind: &str, name: &str) -> String {
    match (kind, name) {
        (pins::SOURCE_REVISION, revision) => format!("revision {revision}"),
        (pins::SESSION_HEAD | pins::CHECKPOINT, "") => "its tree".into(),
        (pins::SESSION_HEAD | pins::CHECKPOINT, "base") => "what its differences are shown against".into(),
        (kind, name) => format!("{kind} {name:?}"),
    }
}

/// A path, on one line and not too long. The root has the empty one.
fn shown(path: &str) -> String {
    let line: String = path.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(PATH_LENGTH).collect();
    match path {
        "" => "/".into(),
        _ if path.chars().count() > PATH_LENGTH => format!("{line}…"),
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(paths: &[&str], more: u64) -> Lost {
        Lost { paths: paths.iter().map(|path| (*path).to_owned()).collect(), more }
    }

    #[test]
    fn a_message_names_the_first_paths_of_the_first_trees_and_counts_the_rest() {
        let key = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
        let trees = BTreeMap::from([
            (key(pins::SESSION_HEAD, ""), lost(&["a", "b", "c", "d"], 100)),
            (key(pins::SESSION_HEAD, "base"), lost(&[""], 0)),
        ]);
        let said = message(&trees);
        assert!(said.contains("104 paths of its tree (a, b, c, 101 more)"), "{said}");
        assert!(said.contains("1 path of what its differences are shown against (/)"), "{said}");
        let many = (0..7).map(|n| (key(pins::SOURCE_REVISION, &format!("r{n}")), lost(&["a\nb"], 0))).collect();
        let said = message(&many);
        assert!(said.contains("revision r4 (a\u{fffd}b); of 2 trees more"), "{said}");
        assert_eq!(shown(&"x".repeat(300)).chars().count(), PATH_LENGTH + 1);
    }

    #[test]
    fn what_several_nodes_miss_is_counted_once() {
        use aether_proto::store::v1::{AffectedPath, Root};
        let answer = |paths: &[&str], more| Integrity {
            affected: vec![AffectedRoot {
                root: Some(Root { owner_uid: "u".into(), kind: "k".into(), ..Root::default() }),
                paths: paths.iter().map(|path| AffectedPath { path: (*path).into(), blob: "b".into() }).collect(),
                more,
            }],
            ..Integrity::default()
        };
        let mut losses = Losses::new();
        gather(answer(&["a", "b"], 4), &mut losses);
        gather(answer(&["b", "c"], 3), &mut losses);
        assert_eq!(losses["u"][&("k".to_owned(), String::new())], lost(&["a", "b", "c"], 4));
    }
}
