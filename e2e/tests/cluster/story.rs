//! Each step of the story as a test of its own.

use aether_e2e::story::{MORE_STEPS, STEPS, Story};
use aether_e2e::testing::Test;
use anyhow::Result;

use crate::{alone_with_namespace, with_namespace};

async fn play(name: &str) -> Result<()> {
    let step = STEPS.iter().chain(MORE_STEPS).find(|step| step.name == name).expect("a step of the story");
    let body = async |test: &Test| {
        let line = (step.play)(&Story::new(test)).await?;
        eprintln!("{name}: {line}");
        Ok(())
    };
    if step.alone { alone_with_namespace(name, body).await } else { with_namespace(name, body).await }
}

macro_rules! steps {
    ($($test:ident $name:literal)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> Result<()> {
                play($name).await
            }
        )*

        #[test]
        fn every_step_is_a_test() {
            let tested = [$($name),*];
            let told: Vec<_> = STEPS.iter().chain(MORE_STEPS).map(|step| step.name).collect();
            assert_eq!(tested.as_slice(), told);
        }
    };
}

steps! {
    import "import"
    wrong_sources "wrong-sources"
    session "session"
    checkpoint "checkpoint"
    fork "fork"
    fifty_forks "fifty-forks"
    command "command"
    handoff "handoff"
    lost_node "lost-node"
    restore "restore"
    review "review"
    volumes "volumes"
    lazy "lazy"
    killed "killed"
    bind "bind"
    pod_start "pod-start"
    storage "storage"
    fifty_inline "fifty-inline"
    deletion "deletion"
    killed_node "killed-node"
    claim_source "claim-source"
    git_and_sqlite "git-and-sqlite"
    limits "limits"
    npm_and_cargo "npm-and-cargo"
    torn_copies "torn-copies"
}
