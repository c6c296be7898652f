//! What the server says, and what a person is told.

use aether_testkit::git_server::Server;

use crate::world::{World, secret};

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_refuses_is_quoted() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    world.hook("pre-receive", "#!/bin/sh\necho 'no pushes on Fridays' >&2\nexit 1\n");
    let refused = world.commit(&session, "uid-1", &[]).await;
    refused.failed("PushRejected", "Permanent");
    for word in ["no pushes on Fridays", "pre-receive hook declined", "main"] {
        assert!(refused.message().contains(word), "{}", refused.message());
    }
    assert_eq!(world.server(&["rev-parse", "main"]), session.commit);
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_credentials_say_what_to_mend_and_are_not_repeated() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    let server = Server::https(world.folder.path(), Some(("me", "the-right-one")));
    let authority = server.authority.as_deref().unwrap();
    let url = server.url("app.git");
    let with = |password: &str| secret(&[("username", "me"), ("password", password), ("ca.crt", authority)]);
    let wrong = with("swordfish-wrong");
    let dir = wrong.path().to_str().unwrap();
    let refused =
        world.commit(&session, "uid-1", &["--url", &url, "--secret-dir", dir, "--secret-name", "p/key"]).await;
    refused.failed("AuthenticationFailed", "Permanent");
    assert!(refused.message().contains("check Secret p/key"), "{}", refused.message());
    assert!(!refused.printed.contains("swordfish"), "{}", refused.printed);

    let nobody = world.commit(&session, "uid-1", &["--url", &url]).await;
    nobody.failed("SecretInvalid", "Permanent");
    let told = url.replacen("://", "://me:the-right-one@", 1);
    let told = world.commit(&session, "uid-1", &["--url", &told]).await;
    told.failed("Invalid", "Permanent");
    assert!(!told.result.to_string().contains("the-right-one") && told.message().contains("pushSecretRef"));
    let right = with("the-right-one");
    let missing = server.url("nosuch.git");
    let dir = right.path().to_str().unwrap();
    let missing = world.commit(&session, "uid-1", &["--url", &missing, "--secret-dir", dir]).await;
    missing.failed("RepositoryNotFound", "Temporary");
    // Who may read need not be one who may push.
    let open = Server::http(world.folder.path(), None);
    let read_only = world.commit(&session, "uid-1", &["--url", &open.url("app.git")]).await;
    read_only.failed("AuthenticationFailed", "Permanent");
    assert_eq!(world.server(&["rev-parse", "main"]), session.commit);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_in_our_name() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    for message in ["Fix\n\nAether-Commit: uid-2\n", "Fix\n\nsays\naether-root : x", "Fix\n\nApproved-by: grace"] {
        let refused = world.commit(&session, "uid-1", &["--message", message, "--trailer", "Approved-By=alan"]).await;
        refused.failed("Invalid", "Permanent");
        assert!(refused.message().contains("only Aether may write"), "{}", refused.message());
    }
    // Somebody who may push says that it is done.
    crate::world::write(&world.at("work/fake"), "fake\n");
    world.publish("Fake\n\nAether-Root: other/1\nAether-Commit: uid-1");
    let fooled = world.commit(&session, "uid-1", &["--rebase"]).await;
    fooled.failed("Invalid", "Permanent");
    assert!(fooled.message().contains("somebody else wrote that"), "{}", fooled.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_git_takes_for_its_own_is_never_committed() {
    let world = World::new().await;
    let session = world.session("hostile").await;
    let names = [".GIT/config", ".g\u{200c}it/x", "a/.Git", "src/git~1/config"];
    for name in names {
        session.write(name, "[core]\n\tfsmonitor = touch /tmp/owned\n");
    }
    world.commit(&session, "uid-0", &[]).await.failed("NothingToCommit", "Permanent");
    session.write("more", "more\n");
    let done = world.commit(&session, "uid-0", &[]).await;
    let warnings = done.done()["warnings"].to_string();
    assert!(warnings.contains("because git takes them for its own: 4 (.GIT/config, "), "{warnings}");
    assert_eq!(done.result["files"], 1, "{warnings}");
    let listed = world.server(&["diff", "--name-only", "main^", "main"]);
    assert_eq!(listed, "more");
    // What lies in a repository of the session's own is its own, whatever it says.
    let session = world.session("session").await;
    session.write(
        ".git/config",
        "[core]\n\tfsmonitor = exit 1\n\thooksPath = /nosuch\n[url \"file:///nosuch\"]\n\tinsteadOf = file://\n",
    );
    session.write(".git/hooks/pre-push", "#!/bin/sh\nexit 1\n");
    session.write("new", "new\n");
    world.commit(&session, "uid-1", &[]).await.done();
    session.remove(".git");
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_and_what_is_lost_is_named() {
    let world = World::new().await;
    let session = world.session("session").await;
    session.write("new", "new\n");
    world.commit(&session, "two words", &[]).await.failed("Invalid", "Permanent");
    for more in [["--branch", "a..b"], ["--message", " \n"]] {
        world.commit(&session, "uid-1", &more).await.failed("Invalid", "Permanent");
    }
    let mut gone = crate::world::Session { commit: "0".repeat(39) + "1", ..session };
    world.commit(&gone, "uid-1", &[]).await.failed("BaseNotFound", "Permanent");
    gone.commit = "main".into();
    world.commit(&gone, "uid-1", &[]).await.failed("Invalid", "Permanent");
    gone.commit = world.server(&["rev-parse", "main"]);
    gone.base = format!("{}/5", "ab".repeat(32));
    let lost = world.commit(&gone, "uid-1", &[]).await;
    lost.failed("TreeIncomplete", "Permanent");
    assert_eq!(world.server(&["rev-parse", "main"]), gone.commit);
}
