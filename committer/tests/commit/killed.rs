//! Killed anywhere, and started again: the branch gets exactly one commit.

use std::time::{Duration, Instant};

use aether_committer::crash::POINTS;

use crate::world::{World, finish};

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_it_commits_once() {
    for point in POINTS.iter().filter(|point| point.starts_with("git.")) {
        let world = World::new().await;
        let session = world.session("session").await;
        session.write("new", "new\n");
        std::fs::create_dir(session.files.join("empty")).unwrap();
        let mut program = world.program(&session, "uid-1", &[]).await;
        let killed = finish(program.env("AETHER_CRASH_AT", point).spawn().unwrap()).await;
        assert_eq!(killed.code, None, "{point}: {}", killed.printed);
        assert!(killed.printed.contains(&format!("crash point {point}")), "{}", killed.printed);
        let pushed = world.count("main", "uid-1");
        assert_eq!(pushed, usize::from(["git.pushed", "git.verified"].contains(point)), "{point}");
        let again = world.commit(&session, "uid-1", &[]).await;
        assert_eq!(again.done()["commit"], world.server(&["rev-parse", "main"]), "{point}");
        assert_eq!(again.result["found"] == true, pushed == 1, "{point}: {}", again.result);
        // Whoever did it, the same is told of it.
        assert_eq!(again.result["files"], 1, "{point}: {}", again.result);
        assert!(again.result["warnings"].to_string().contains("empty directories"), "{point}: {}", again.result);
        assert_eq!(world.server(&["rev-list", "--count", &format!("{}..main", session.commit)]), "1", "{point}");
        world.compare("main", &session);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_a_push_it_commits_once() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    world.hook("pre-receive", "#!/bin/sh\ntouch began\nsleep 1\n");
    let mut first = world.program(&session, "uid-1", &[]).await.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !world.at("app.git/began").exists() {
        assert!(Instant::now() < deadline, "no push began");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The server goes on; what the next one sees may be the one state or the other.
    first.kill().unwrap();
    first.wait().unwrap();
    let again = world.commit(&session, "uid-1", &[]).await;
    assert_eq!(again.done()["commit"], world.server(&["rev-parse", "main"]));
    assert_eq!(world.count("main", "uid-1"), 1);
    assert_eq!(world.server(&["rev-list", "--count", &format!("{}..main", session.commit)]), "1");
    world.compare("main", &session);
}
