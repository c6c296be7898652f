//! A branch that others push to.

use crate::world::{World, finish, write};

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_moved_is_left_alone_unless_a_rebase_is_wanted() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("README", "ONE\ntwo\nthree\nfour\nfive\nsix\nseven\n");
    session.write("new", "new\n");
    write(&world.at("work/README"), "one\ntwo\nthree\nfour\nfive\nsix\nSEVEN\n");
    write(&world.at("work/other"), "other\n");
    let tip = world.publish("meanwhile");

    let moved = world.commit(&session, "uid-1", &[]).await;
    let result = moved.failed("BranchMoved", "Permanent");
    assert_eq!(result["tip"], tip);
    assert!(moved.message().contains(&tip) && moved.message().contains(&session.commit), "{result}");
    assert_eq!(world.server(&["rev-parse", "main"]), tip);

    let root = world.root(&session).await;
    let rebased = world.commit(&session, "uid-1", &["--rebase", "--root", &root]).await;
    assert_eq!((&rebased.done()["parent"], &rebased.result["rebased"]), (&tip.as_str().into(), &true.into()));
    session.write("README", "ONE\ntwo\nthree\nfour\nfive\nsix\nSEVEN\n");
    session.write("other", "other\n");
    world.compare("main", &session);

    // Others go on from there; it is found all the same.
    let head = world.server(&["rev-parse", "main"]);
    crate::world::run(&world.at("work"), &["pull", "--quiet", "--rebase", "../app.git", "main"]);
    world.publish("later");
    let again = world.commit(&session, "uid-1", &["--rebase", "--root", &root]).await;
    assert_eq!((&again.done()["commit"], &again.result["found"]), (&head.into(), &true.into()));
    assert_eq!(world.count("main", "uid-1"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicts_are_named_and_nothing_is_pushed() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("README", "mine\n");
    session.write("src/main.c", "int mine;\n");
    session.write("run.sh", "#!/bin/bash\n");
    write(&world.at("work/README"), "theirs\n");
    std::fs::remove_file(world.at("work/src/main.c")).unwrap();
    let tip = world.publish("meanwhile");
    let conflict = world.commit(&session, "uid-1", &["--rebase"]).await;
    let result = conflict.failed("Conflict", "Permanent");
    assert_eq!(result["conflicts"], serde_json::json!(["README", "src/main.c"]));
    assert_eq!(result["tip"], tip);
    assert_eq!(world.server(&["rev-parse", "main"]), tip);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_is_made_where_there_is_none_and_nothing_is_committed_twice() {
    let world = World::new().await;
    let session = world.session("session").await;
    let nothing = world.commit(&session, "uid-0", &[]).await;
    nothing.failed("NothingToCommit", "Permanent");
    session.write("new", "new\n");
    // The base is no tip of the server's any more.
    write(&world.at("work/other"), "other\n");
    world.publish("meanwhile");
    let made = world.commit(&session, "uid-1", &["--branch", "agent/one"]).await;
    assert_eq!(
        (&made.done()["parent"], &made.result["branch"]),
        (&session.commit.as_str().into(), &"agent/one".into())
    );
    world.compare("agent/one", &session);
    // The same change for another request: the branch has it.
    let same = world.commit(&session, "uid-2", &["--branch", "agent/one", "--rebase"]).await;
    same.failed("NothingToCommit", "Permanent");
    // A branch that is behind the base, and nothing newer on it.
    world.server(&["update-ref", "refs/heads/old", &session.commit]);
    let other = world.session("other").await;
    other.write("third", "third\n");
    world.commit(&other, "uid-3", &["--branch", "old"]).await.failed("BranchMoved", "Permanent");
    world.commit(&other, "uid-3", &["--branch", "old", "--rebase"]).await.done();
    assert!(world.server(&["ls-tree", "--name-only", "old"]).lines().all(|name| name != "other"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_commit_once() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    // Both have looked before either has pushed.
    world.hook("pre-receive", "#!/bin/sh\nsleep 1\n");
    let started = [
        world.program(&session, "uid-1", &[]).await.spawn().unwrap(),
        world.program(&session, "uid-1", &["--date", "2999-01-01T00:00:00Z"]).await.spawn().unwrap(),
    ];
    let [one, two] = started.map(|child| tokio::spawn(finish(child)));
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    assert_eq!(one.done()["commit"], two.done()["commit"]);
    assert_eq!(world.count("main", "uid-1"), 1);
    assert_eq!(world.server(&["rev-list", "--count", &format!("{}..main", session.commit)]), "1");
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_push_while_we_do_is_kept() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    write(&world.at("work/other"), "other\n");
    crate::world::run(&world.at("work"), &["add", "--all"]);
    crate::world::run(&world.at("work"), &["commit", "--quiet", "--message=between"]);
    crate::world::run(&world.at("work"), &["push", "--quiet", "../app.git", "HEAD:refs/heads/between"]);
    // Somebody else's push comes in the middle of our first one.
    let between = world.server(&["rev-parse", "between"]);
    let script = format!(
        "#!/bin/sh\n[ -e \"$GIT_DIR/was\" ] || [ -e was ] || {{ touch was; env -u GIT_QUARANTINE_PATH git update-ref refs/heads/main {between}; }}\n"
    );
    world.hook("pre-receive", &script);
    let done = world.commit(&session, "uid-1", &["--rebase"]).await;
    assert_eq!(done.done()["parent"], between, "{}", done.printed);
    session.write("other", "other\n");
    world.compare("main", &session);
    assert_eq!(world.count("main", "uid-1"), 1);
}
