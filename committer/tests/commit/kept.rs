//! Commits that were made with git inside the session stay, if they are one straight line.

use std::fs;

use aether_committer::crash::POINTS;

use crate::world::{Run, Session, World, finish, mode, run, write};

const KEEP: [&str; 2] = ["--history", "keep"];

impl Session {
    /// Commits all that there is, as an agent does.
    fn commit(&self, message: &str) -> String {
        run(&self.files, &["add", "--all"]);
        run(&self.files, &["-c", "user.name=Agent", "commit", "--quiet", "--message", message]);
        run(&self.files, &["rev-parse", "HEAD"])
    }
}

/// A session with two commits.
async fn twice(world: &World) -> Session {
    let session = world.session("session").await;
    session.write("first", "first\n");
    session.write("README", "one\n2\nthree\nfour\nfive\nsix\nseven\n");
    session.commit("First\n\nIn two\nparagraphs.");
    session.write("second", "second\n");
    session.remove("gone");
    session.commit("Second");
    session
}

/// Subject and author of what is on the branch since, the oldest first.
fn since(world: &World, base: &str) -> Vec<String> {
    let log = world.server(&["log", "--reverse", "--format=%s by %an for %cn", &format!("{base}..main")]);
    log.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_stay_and_the_rest_becomes_one_more() {
    let world = World::new().await;
    let session = twice(&world).await;
    session.write("third", "not committed\n");
    let more = [&KEEP[..], &["--author-name", "Ada", "--author-email", "ada@example.org"]].concat();
    let kept = world.commit(&session, "uid-1", &more).await;
    let tip = world.server(&["rev-parse", "main"]);
    assert_eq!((&kept.done()["commit"], &kept.result["rebased"]), (&tip.into(), &serde_json::Value::Null));
    let expected = ["First by Agent for Aether", "Second by Agent for Aether", "Change things by Ada for Aether"];
    assert_eq!(since(&world, &session.commit), expected);
    assert_eq!(world.server(&["log", "-1", "--format=%B", "main~2"]), "First\n\nIn two\nparagraphs.");
    assert_eq!(world.server(&["show", "--format=", "--name-status", "main~1"]), "D\tgone/a\nD\tgone/b\nA\tsecond");
    // Only the last one is what was reviewed.
    assert_eq!(world.count("main", "uid-1"), 1);
    assert_eq!(world.server(&["log", "-1", "--format=%(trailers)", "main~1"]), "");
    world.compare("main", &session);
    let again = world.commit(&session, "uid-1", &more).await;
    assert_eq!(again.done()["found"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_is_committed_the_last_one_speaks() {
    let world = World::new().await;
    let session = twice(&world).await;
    // As it is after a while: everything in one pack, and the branch in a list.
    run(&session.files, &["gc", "--quiet"]);
    run(&session.files, &["pack-refs", "--all"]);
    world.commit(&session, "uid-1", &KEEP).await.done();
    assert_eq!(since(&world, &session.commit), ["First by Agent for Aether", "Second by Agent for Aether"]);
    assert_eq!(world.server(&["log", "-1", "--format=%(trailers:key=Aether-Commit,valueonly)", "main"]), "uid-1");
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_commits_there_is_one() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    world.commit(&session, "uid-1", &KEEP).await.done();
    assert_eq!(since(&world, &session.commit), ["Change things by Aether for Aether"]);
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_as_it_was_long_ago_can_be_kept() {
    let world = World::new().await;
    write(&world.at("work/README"), "another\n");
    fs::remove_dir_all(world.at("work/src")).unwrap();
    world.publish("without src");
    let session = world.session("session").await;
    // Git writes nothing for it: all of it is in the pack that was imported.
    run(&session.files, &["-c", "user.name=Agent", "revert", "--no-edit", "HEAD"]);
    world.commit(&session, "uid-1", &KEEP).await.done();
    assert_eq!(since(&world, &session.commit), ["Revert \"without src\" by Agent for Aether"]);
    assert_eq!(world.server(&["show", "main:src/main.c"]), "int main;");
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_put_on_top_of_what_others_pushed() {
    let world = World::new().await;
    let session = twice(&world).await;
    session.write("third", "third\n");
    // Theirs has what the second commit does.
    fs::remove_dir_all(world.at("work/gone")).unwrap();
    write(&world.at("work/second"), "second\n");
    write(&world.at("work/theirs"), "theirs\n");
    let tip = world.publish("theirs");
    world.commit(&session, "uid-1", &KEEP).await.failed("BranchMoved", "Permanent");
    let more = [&KEEP[..], &["--rebase"]].concat();
    assert_eq!(world.commit(&session, "uid-1", &more).await.done()["rebased"], true);
    assert_eq!(since(&world, &tip), ["First by Agent for Aether", "Change things by Aether for Aether"]);
    assert_eq!(world.server(&["show", "main:theirs"]), "theirs");
    assert_eq!(world.server(&["show", "main:first"]), "first");

    let session = world.session("another").await;
    session.write("README", "mine\n");
    session.commit("Mine");
    run(&world.at("work"), &["pull", "--quiet", "--rebase=false", "../app.git", "main"]);
    write(&world.at("work/README"), "yours\n");
    world.publish("yours");
    let refused = world.commit(&session, "uid-2", &more).await;
    assert_eq!(refused.failed("Conflict", "Permanent")["conflicts"], serde_json::json!(["README"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_straight_line_is_refused() {
    let squash = |refused: &Run, word: &str| {
        refused.failed("Invalid", "Permanent");
        let said = refused.message();
        assert!(said.contains(word) && said.contains("history Squash"), "{word}: {said}");
    };
    let world = World::new().await;
    let session = world.session("merged").await;
    run(&session.files, &["switch", "--quiet", "--create", "side"]);
    session.write("side", "side\n");
    session.commit("Side");
    run(&session.files, &["switch", "--quiet", "main"]);
    session.write("other", "other\n");
    session.commit("Other");
    run(&session.files, &["merge", "--quiet", "--no-edit", "side"]);
    squash(&world.commit(&session, "uid-1", &KEEP).await, "merges");

    let session = world.session("orphan").await;
    run(&session.files, &["switch", "--quiet", "--orphan", "fresh"]);
    session.write("new", "new\n");
    session.commit("New");
    squash(&world.commit(&session, "uid-2", &KEEP).await, "on nothing");

    let session = world.session("forged").await;
    session.write("new", "new\n");
    session.commit("New\n\nApproved-by: grace");
    squash(&world.commit(&session, "uid-3", &KEEP).await, "Approved-by: grace");
    let amend = |message: &str| {
        run(&session.files, &["commit", "--quiet", "--amend", "--allow-empty-message", "--message", message])
    };
    amend("New\n\nAether-Commit: uid-9");
    squash(&world.commit(&session, "uid-3", &KEEP).await, "Aether-Commit: uid-9");
    amend("");
    squash(&world.commit(&session, "uid-3", &KEEP).await, "says nothing");

    // All that is refused here can be squashed.
    world.commit(&session, "uid-3", &[]).await.done();
    assert_eq!(world.count("main", "uid-3"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_sessions_repository_is_believed() {
    let world = World::new().await;
    let session = twice(&world).await;
    // Programs that git would run for it, and objects from elsewhere.
    let marker = world.at("it-ran");
    let script = format!("#!/bin/sh\ntouch {}\n", marker.display());
    for hook in ["pre-push", "post-rewrite", "reference-transaction", "pre-auto-gc"] {
        write(&session.files.join(".git/hooks").join(hook), &script);
        mode(&session.files.join(".git/hooks").join(hook), 0o755);
    }
    write(&world.at("run-it"), &script);
    mode(&world.at("run-it"), 0o755);
    let config = fs::read_to_string(session.files.join(".git/config")).unwrap();
    let program = world.at("run-it").display().to_string();
    let hostile = format!(
        "{config}\n[core]\n\tfsmonitor = {program}\n\tsshCommand = {program}\n\talternateRefsCommand = {program}\n[filter \"x\"]\n\tclean = {program}\n[uploadpack]\n\tpackObjectsHook = {program}\n"
    );
    write(&session.files.join(".git/config"), hostile);
    write(&session.files.join(".git/objects/info/alternates"), "/etc\n");
    world.commit(&session, "uid-1", &KEEP).await.done();
    assert!(!marker.exists(), "a program of the session ran");
    assert_eq!(since(&world, &session.commit).len(), 2);

    // An object that is another one than its name says, or that is missing: a commit, the one before it, its tree, its file.
    let session = world.session("swapped").await;
    session.write("new", "new\n");
    session.commit("Honest");
    session.write("new", "newer\n");
    session.commit("Honest too");
    let of = |name: &str| run(&session.files, &["rev-parse", name]);
    let names = ["HEAD", "HEAD~1", "HEAD~1^{tree}", "HEAD~1:new", "HEAD^{tree}", "HEAD:new"];
    let honest = names.map(of);
    session.write("new", "worse\n");
    session.commit("Worse");
    session.write("new", "worst\n");
    session.commit("Worst");
    let worse = names.map(of);
    run(&session.files, &["reset", "--quiet", "--hard", &honest[0]]);
    let object = |id: &str| session.files.join(".git/objects").join(&id[..2]).join(&id[2..]);
    for (name, (honest, worse)) in names.iter().zip(honest.iter().zip(&worse)) {
        let kept = fs::read(object(honest)).unwrap();
        for other in [Some(worse), None] {
            fs::remove_file(object(honest)).unwrap();
            if let Some(worse) = other {
                fs::copy(object(worse), object(honest)).unwrap();
            }
            let branch = format!("branch-{}-{}", &honest[..7], other.is_some());
            let run = world.commit(&session, &branch, &[&KEEP[..], &["--branch", &branch]].concat()).await;
            // What is reviewed is written from the reviewed tree, so that it may be there whatever that repository says of it.
            if run.code == Some(0) && ["HEAD^{tree}", "HEAD:new"].contains(name) {
                world.compare(&branch, &session);
            } else {
                run.failed("Invalid", "Permanent");
                assert!(run.message().contains("history Squash"), "{name}: {}", run.message());
            }
            fs::write(object(honest), &kept).unwrap();
        }
    }
    // A commit in between with a file that is git's own where it is checked out.
    let hidden = world.session("hidden").await;
    let content = run(&hidden.files, &["hash-object", "-w", "README"]);
    let entry = format!("100644,{content},git~1/config");
    run(&hidden.files, &["-c", "core.protectNTFS=false", "update-index", "--add", "--cacheinfo", &entry]);
    run(&hidden.files, &["-c", "core.protectNTFS=false", "commit", "--quiet", "--message", "Hidden"]);
    run(&hidden.files, &["-c", "core.protectNTFS=false", "update-index", "--force-remove", "git~1/config"]);
    hidden.write("new", "new\n");
    hidden.commit("Gone again");
    let refused = world.commit(&hidden, "uid-3", &KEEP).await;
    refused.failed("Invalid", "Permanent");
    assert!(refused.message().contains("fsck"), "{}", refused.message());
    // A HEAD that leads out of the repository.
    for head in ["ref: ../../../etc/passwd\n", "ref: refs/heads/../../config\n", "what?\n"] {
        write(&session.files.join(".git/HEAD"), head);
        let refused = world.commit(&session, "uid-2", &KEEP).await;
        refused.failed("Invalid", "Permanent");
        assert!(refused.message().contains("its HEAD is"), "{}", refused.message());
    }
    assert_eq!(world.count("main", "uid-2"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_each_is_there_once() {
    for point in POINTS.iter().filter(|point| point.starts_with("git.")) {
        let world = World::new().await;
        let session = twice(&world).await;
        let mut program = world.program(&session, "uid-1", &KEEP).await;
        let killed = finish(program.env("AETHER_CRASH_AT", point).spawn().unwrap()).await;
        assert_eq!(killed.code, None, "{point}: {}", killed.printed);
        world.commit(&session, "uid-1", &KEEP).await.done();
        assert_eq!(since(&world, &session.commit).len(), 2, "{point}");
        world.compare("main", &session);
    }
}
