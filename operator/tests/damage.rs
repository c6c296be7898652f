//! What the store has lost is told on the objects that it concerns: an API server in memory, and a store that only says so.

mod common;

use aether_api::conditions::{self, INTACT, reason};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherSession, AetherSource};
use aether_operator::config::Config;
use aether_operator::damage::Damage;
use aether_operator::pins::{CHECKPOINT, SESSION_HEAD, SOURCE_REVISION};
use aether_proto::store::v1::Root;
use aether_testkit::Fate;
use clap::Parser;
use common::store::{Roots, root};
use common::{NAMESPACE, Operator, short};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

struct World {
    operator: Operator,
    damage: Damage,
}

impl World {
    /// An operator of a store with these nodes, and a source, a session and a checkpoint.
    async fn of(nodes: &[&Roots]) -> Self {
        let mut arguments: Vec<String> =
            ["aether-operator", "--store=http://store", "--importer-image=i", "--worker-image=w", "--command-image=c"]
                .map(Into::into)
                .into();
        for node in nodes {
            arguments.push(format!("--store-nodes={}", node.serve().await));
        }
        let operator = Operator::new();
        operator.put_source("linux");
        operator.put_session("fix", "linux");
        let mut checkpoint =
            AetherCheckpoint::new("before", AetherCheckpointSpec { session: "fix".into(), ..Default::default() });
        checkpoint.metadata.namespace = Some(NAMESPACE.into());
        operator.api.put(&checkpoint);
        Self { operator, damage: Damage::connect(&Config::parse_from(arguments)).unwrap() }
    }

    /// One look, and the writes that it took.
    async fn look(&mut self) -> Vec<String> {
        self.damage.look(&self.operator.context).await.unwrap();
        short(&self.operator.api.take_writes())
    }

    fn root_of_session(&self) -> Root {
        root(&self.operator.api.get::<AetherSession>(NAMESPACE, "fix").unwrap().uid().unwrap(), SESSION_HEAD)
    }

    fn session(&self) -> Option<Condition> {
        let session = self.operator.api.get::<AetherSession>(NAMESPACE, "fix").unwrap();
        conditions::get(&session.status.unwrap_or_default().conditions, INTACT).cloned()
    }

    fn events(&self) -> Vec<(String, String, String)> {
        let events = self.operator.api.all::<Event>().into_iter();
        let events = events.map(|event| {
            let regarding = event.regarding.unwrap();
            let name = format!("{}/{}", regarding.kind.unwrap(), regarding.name.unwrap());
            (event.type_.unwrap(), event.reason.unwrap(), name)
        });
        let mut events: Vec<_> = events.collect();
        events.sort();
        events
    }
}

fn event(type_: &str, reason: &str, object: &str) -> (String, String, String) {
    (type_.into(), reason.into(), object.into())
}

#[tokio::test]
async fn a_loss_is_told_once_and_so_is_its_end() {
    let store = Roots::default();
    let mut world = World::of(&[&store]).await;
    store.heal();
    assert!(world.look().await.is_empty(), "nobody is told that nothing happened");

    store.lose(world.root_of_session(), &["src/b.c", "src/a.c"]);
    assert_eq!(world.look().await, ["PATCH aethersessions/status", "POST events"]);
    let told = world.session().unwrap();
    assert_eq!((told.status.as_str(), told.reason.as_str()), ("False", reason::CONTENTS_LOST));
    assert!(told.message.contains("2 paths of its tree (src/a.c, src/b.c)"), "{}", told.message);
    assert_eq!(world.events(), [event("Warning", reason::CONTENTS_LOST, "AetherSession/fix")]);
    assert!(world.look().await.is_empty(), "it is told already");

    store.lose(world.root_of_session(), &["src/b.c"]);
    assert_eq!(world.look().await[0], "PATCH aethersessions/status");
    assert!(world.session().unwrap().message.contains("1 path of its tree (src/b.c)"));

    store.heal();
    assert_eq!(world.look().await[0], "PATCH aethersessions/status");
    let told = world.session().unwrap();
    assert_eq!((told.status.as_str(), told.reason.as_str()), ("True", reason::CONTENTS_BACK));
    assert!(world.events().contains(&event("Normal", reason::CONTENTS_BACK, "AetherSession/fix")));
    assert!(world.look().await.is_empty());
}

#[tokio::test]
async fn each_kind_is_told_and_a_new_operator_lifts_what_the_last_one_told() {
    let store = Roots::default();
    let mut world = World::of(&[&store]).await;
    let source = world.operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().uid().unwrap();
    let checkpoint = world.operator.api.get::<AetherCheckpoint>(NAMESPACE, "before").unwrap().uid().unwrap();
    store.lose(Root { name: "r1".into(), ..root(&source, SOURCE_REVISION) }, &[""]);
    assert_eq!(world.look().await[0], "PATCH aethersources/status");
    let told = world.operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().status.unwrap();
    let told = conditions::get(&told.conditions, INTACT).unwrap().message.clone();
    assert!(told.contains("1 path of revision r1 (/)"), "{told}");

    // Another operator leads now, and there is another loss.
    store.lose(root(&checkpoint, CHECKPOINT), &["a"]);
    let mut later = World { damage: World::of(&[&store]).await.damage, ..world };
    let mut writes = later.look().await;
    writes.sort();
    assert_eq!(writes, ["PATCH aethercheckpoints/status", "PATCH aethersources/status", "POST events", "POST events"]);
    let source = later.operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().status.unwrap();
    assert!(conditions::is_true(&source.conditions, INTACT));
}

#[tokio::test]
async fn nothing_is_lifted_before_every_node_was_heard() {
    let (one, other) = (Roots::default(), Roots::default());
    let mut world = World::of(&[&one, &other]).await;
    one.heal();
    other.lose(world.root_of_session(), &["a"]);
    assert_eq!(world.look().await[0], "PATCH aethersessions/status");
    other.hush();
    assert!(world.look().await.is_empty());
    assert_eq!(world.session().unwrap().status, "False");
    // What is heard is told, though not everybody says something.
    one.lose(world.root_of_session(), &["b"]);
    assert_eq!(world.look().await[0], "PATCH aethersessions/status");
    one.heal();
    other.heal();
    assert_eq!(world.look().await[0], "PATCH aethersessions/status");
    assert_eq!(world.session().unwrap().status, "True");
}

#[tokio::test]
async fn what_somebody_else_writes_meanwhile_stays() {
    let store = Roots::default();
    let mut world = World::of(&[&store]).await;
    store.lose(world.root_of_session(), &["a"]);
    let api = world.operator.api.clone();
    let mut raced = false;
    world.operator.api.before_writes(move |write| {
        if write.plural == "aethersessions" && !std::mem::replace(&mut raced, true) {
            api.change::<AetherSession>(NAMESPACE, "fix", |session| {
                session.status.get_or_insert_default().changed_files = Some(7);
            });
        }
        Fate::Answered
    });
    assert_eq!(world.look().await, ["PATCH aethersessions/status", "PATCH aethersessions/status", "POST events"]);
    assert_eq!(world.session().unwrap().status, "False");
    let session = world.operator.api.get::<AetherSession>(NAMESPACE, "fix").unwrap();
    assert_eq!(session.status.unwrap().changed_files, Some(7));
}
