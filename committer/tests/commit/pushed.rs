//! What is pushed is what was reviewed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use aether_importer::cli;
use aether_testkit::git_server::Server;
use aether_testkit::sshd::Sshd;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::world::{Session, World, mode, run, secret, write};

const PASSWORD: &str = "hunter22-correct";

/// Changes of every kind that git keeps.
fn edit(session: &Session) {
    session.write("README", "one\ntwo\nTHREE\nfour\nfive\nsix\nseven\n");
    session.write("new/deep/er/file", [0_u8, 159, 146, 150]);
    session.write("new/empty", "");
    session.write("with \"quotes\"\nand lines\\ä", "odd\n");
    // More than the store sends in a message, and more than git posts in one piece.
    let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    session.write("large.bin", &large);
    session.write("large.copy", &large);
    mode(&session.files.join("large.copy"), 0o755);
    session.remove("gone");
    fs::rename(session.files.join("src/main.c"), session.files.join("src/start.c")).unwrap();
    mode(&session.files.join("run.sh"), 0o644);
    mode(&session.files.join("src/start.c"), 0o755);
    // Kinds change: a file becomes a symlink, a directory a file, a symlink a directory.
    session.remove("src/deep");
    session.write("src/deep", "a file\n");
    session.remove("link");
    session.write("link/inside", "a directory\n");
    symlink("../nowhere", session.files.join("new/dangling")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_arrives_over_a_file_and_says_where_it_came_from() {
    let world = World::new().await;
    let session = world.session("session").await;
    edit(&session);
    let more = [
        ["--author-name", "Ada"],
        ["--author-email", "ada@example.org"],
        ["--trailer", "Aether-Session=demo/fix"],
        ["--trailer", "Approved-by=grace <grace@example.org>"],
        ["--trailer", "Approved-by=alan"],
        ["--date", "2026-01-31T12:00:00Z"],
    ];
    let done = world.commit(&session, "uid-1", &more.concat()).await;
    let result = done.done();
    world.compare("main", &session);
    let head = world.server(&["rev-parse", "main"]);
    assert_eq!(result["commit"], head);
    assert_eq!(result["tree"], world.server(&["rev-parse", "main^{tree}"]));
    assert_eq!((&result["parent"], &result["branch"]), (&session.commit.as_str().into(), &"main".into()));
    assert_eq!(world.server(&["rev-parse", "main^@"]), session.commit);
    assert_eq!(result.get("warnings"), None, "{result}");
    assert_eq!(result["files"], 16, "{result}");
    let written = fs::read_to_string(world.at("uid-1.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), *result);

    let message = world.server(&["log", "-1", "--format=%an <%ae>|%cn|%B", "main"]);
    let (said, trailers) = message.split_once("Aether-Session").unwrap();
    assert_eq!(said, "Ada <ada@example.org>|Aether|Change things\n\nFor a reason.\n\n");
    let trailers: Vec<&str> = trailers.lines().collect();
    assert_eq!(trailers[..3], [": demo/fix", "Approved-by: grace <grace@example.org>", "Approved-by: alan"]);
    assert!(trailers[3].starts_with("Aether-Root: ") && trailers[4] == "Aether-Commit: uid-1", "{message}");
    // Now is later than the day on which it was asked for; the base commit is of now, and never later than this.
    let times = world.server(&["log", "-2", "--format=%ct", "main"]);
    let times: Vec<i64> = times.lines().map(|time| time.parse().unwrap()).collect();
    assert!(times[0] >= times[1], "{times:?}");

    // Asked for again it is there, and nothing happens.
    let again = world.commit(&session, "uid-1", &more.concat()).await;
    assert_eq!((&again.done()["commit"], &again.result["found"]), (&head.as_str().into(), &true.into()));
    assert_eq!(world.server(&["rev-parse", "main"]), head);
    let left: Vec<_> = fs::read_dir(world.folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("aether-commit-")), "{left:?}");
}

const NAMES: [&str; 9] = ["a", "b.rs", "ä ö", "new\nline", "\"quoted\"", ".hidden", "a.b", "a-b", "back\\slash"];

/// Adds, changes, replaces and removes files and directories.
fn change(random: &mut StdRng, root: &Path) {
    for _ in 0..random.random_range(1..15) {
        let mut path = root.to_owned();
        for _ in 0..random.random_range(0..4) {
            path.push(NAMES[random.random_range(0..NAMES.len())]);
            if !path.is_dir() || path.is_symlink() {
                let _ = fs::remove_file(&path);
                fs::create_dir_all(&path).unwrap();
            }
        }
        path.push(NAMES[random.random_range(0..NAMES.len())]);
        // What is there may be of any kind.
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        match random.random_range(0..6) {
            0 => {}
            1 => symlink(format!("to/{}", random.random::<u16>()), &path).unwrap(),
            kind => {
                let length = if random.random_range(0..8) == 0 { 1_100_000 } else { random.random_range(0..3000) };
                fs::write(&path, vec![random.random(); length]).unwrap();
                mode(&path, if kind == 2 { 0o755 } else { 0o644 });
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_changes_arrive_as_they_are() {
    for seed in 0..5 {
        let world = World::new().await;
        let mut random = StdRng::seed_from_u64(seed);
        let mut committed = 0;
        for number in 0..4 {
            let session = world.session(&format!("session-{number}")).await;
            change(&mut random, &session.files);
            let done = world.commit(&session, &format!("uid-{number}"), &[]).await;
            if done.result["reason"] != "NothingToCommit" {
                done.done();
                committed += 1;
            }
            world.compare("main", &session);
        }
        assert!(committed > 1, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_may_name_its_objects_by_sha256() {
    let world = World::new().await;
    fs::remove_dir_all(world.at("app.git")).unwrap();
    fs::remove_dir_all(world.at("work/.git")).unwrap();
    let format = "--object-format=sha256";
    run(world.folder.path(), &["init", "--quiet", "--bare", format, "--initial-branch=main", "app.git"]);
    run(world.folder.path(), &["init", "--quiet", format, "--initial-branch=main", "work"]);
    assert_eq!(world.publish("first").len(), 64);
    let session = world.session("session").await;
    edit(&session);
    world.commit(&session, "uid-1", &[]).await.done();
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_opens_http_and_https_and_is_seen_nowhere() {
    let world = World::new().await;
    for (name, server) in [
        ("http", Server::http(world.folder.path(), Some(("me", PASSWORD)))),
        ("https", Server::https(world.folder.path(), Some(("me", PASSWORD)))),
    ] {
        // The server gives contents one by one, as large ones do: what a merge needs is fetched with the password too.
        world.server(&["config", "uploadpack.allowFilter", "true"]);
        let session = world.session(name).await;
        edit(&session);
        let mut files = vec![("username", "me"), ("password", PASSWORD)];
        files.extend(server.authority.as_deref().map(|authority| ("ca.crt", authority)));
        let secret = secret(&files);
        write(&world.at("work/README"), "one\ntwo\nthree\nfour\nfive\nsix\nSEVEN\n");
        world.publish("meanwhile");
        let url = server.url("app.git");
        let secret_dir = secret.path().to_str().unwrap();
        let more =
            ["--url", &url, "--secret-dir", secret_dir, "--secret-name", "platform/key", "--branch", name, "--rebase"];
        let done = world.commit(&session, &format!("uid-{name}"), &more).await;
        done.done();
        world.compare(name, &session);
        assert!(done.printed.contains("push --porcelain"), "the log was watched: {}", done.printed);
        let uid = format!("uid-{name}-main");
        let mut more = more;
        more[7] = "main";
        let rebased = world.commit(&session, &uid, &more).await;
        assert_eq!(rebased.done()["rebased"], true);
        let readme = world.server(&["cat-file", "blob", "main:README"]);
        assert_eq!(readme, "one\ntwo\nTHREE\nfour\nfive\nsix\nSEVEN");
        for printed in [&done.printed, &rebased.printed] {
            assert!(!printed.contains(PASSWORD), "{printed}");
        }
        // Back to where it was, for the next server.
        world.server(&["update-ref", "refs/heads/main", &session.commit]);
        run(&world.at("work"), &["reset", "--quiet", "--hard", &session.commit]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_ssh_also_for_a_session_of_a_commit_that_is_no_branch() {
    let world = World::new().await;
    let sshd = Sshd::start();
    let session = world.session("session").await;
    edit(&session);
    // This server speaks the old protocol, by which only branches are given.
    write(&world.at("work/other"), "other\n");
    let tip = world.publish("meanwhile");
    let key = sshd.private_key();
    let secret = secret(&[("ssh-privatekey", key.trim_end()), ("known_hosts", &sshd.known_hosts())]);
    let url = sshd.url(&world.at("app.git"));
    let secret_dir = secret.path().to_str().unwrap();
    let more = ["--url", &url, "--secret-dir", secret_dir, "--branch"];
    let done = world.commit(&session, "uid-1", &[&more[..], &["agent/fix"]].concat()).await;
    assert_eq!(done.done()["parent"], session.commit);
    world.compare("agent/fix", &session);
    let rebased = world.commit(&session, "uid-2", &[&more[..], &["main", "--rebase"]].concat()).await;
    assert_eq!(rebased.done()["parent"], tip);
    session.write("other", "other\n");
    world.compare("main", &session);
    assert!(!done.printed.contains("PRIVATE KEY") && !rebased.printed.contains("PRIVATE KEY"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_git_cannot_hold_is_told() {
    let world = World::new().await;
    run(&world.at("work"), &["update-index", "--add", "--cacheinfo", &format!("160000,{},module", "1".repeat(40))]);
    run(&world.at("work"), &["commit", "--quiet", "--message=module"]);
    run(&world.at("work"), &["push", "--quiet", "../app.git", "HEAD:refs/heads/main"]);
    let session = world.session("session").await;
    fs::create_dir_all(session.files.join("empty/inner")).unwrap();
    session.write("only/one", "");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        session.files.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    session.write("private", "p\n");
    mode(&session.files.join("private"), 0o600);
    session.write("vendor/x/file", "vendored\n");
    run(&session.files.join("vendor/x"), &["init", "--quiet"]);
    session.write("module/file", "in a submodule\n");
    session.remove("src/deep/er/file");
    // An agent that commits inside changes the repository in its tree, which is not a matter of the branch.
    run(&session.files, &["add", "only"]);
    run(&session.files, &["commit", "--quiet", "--message=inside"]);
    let done = world.commit(&session, "uid-1", &[]).await;
    let warnings = done.done()["warnings"].as_array().unwrap().clone();
    let text = warnings.iter().map(|line| line.as_str().unwrap()).collect::<Vec<_>>().join("\n");
    for told in [
        "named pipes are left out, because git does not keep them: 1 (pipe)",
        "may execute: 1 (private)",
        "because git does not keep them: 2 (empty/inner, src/deep/er)",
        "their histories are not: 1 (vendor/x)",
        "they are to be committed there: 1 (module/file)",
    ] {
        assert!(text.contains(told), "{told:?} is not in {text}");
    }
    assert_eq!(warnings.len(), 5, "{text}");
    let listed = world.server(&["ls-tree", "-r", "--format=%(objectmode) %(path)", "main"]);
    for (line, there) in [
        ("160000 module", true),
        ("100644 private", true),
        ("100644 vendor/x/file", true),
        ("100644 only/one", true),
        ("100644 src/deep/er/file", false),
    ] {
        assert_eq!(listed.lines().any(|listed| listed == line), there, "{line}: {listed}");
    }
    assert!(!listed.contains(".git") && !listed.contains("module/file") && !listed.contains("pipe"), "{listed}");
    assert_eq!(world.server(&["rev-list", "--count", &format!("{}..main", session.commit)]), "1");

    // A submodule goes with its directory.
    let session = world.session("later").await;
    session.remove("module");
    world.commit(&session, "uid-2", &[]).await.done();
    assert!(!world.server(&["ls-tree", "-r", "main"]).contains("160000"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_checkout_converts_goes_back_as_it_came() {
    let world = World::new().await;
    write(&world.at("work/.gitattributes"), "*.txt text eol=crlf\n*.unix text\n");
    write(&world.at("work/a.txt"), "one\ntwo\n");
    world.publish("lines");
    let session = world.session("session").await;
    assert_eq!(fs::read(session.files.join("a.txt")).unwrap(), b"one\r\ntwo\r\n");
    session.write("a.txt", "one\r\ntwo\r\nthree\r\n");
    session.write("new.unix", "one\ntwo\n");
    let done = world.commit(&session, "uid-1", &[]).await;
    assert_eq!(world.server(&["cat-file", "blob", "main:a.txt"]), "one\ntwo\nthree");
    let warning = done.done()["warnings"][0].as_str().unwrap().to_owned();
    assert!(warning.contains(".gitattributes says") && warning.ends_with(": 1 (a.txt)"), "{warning}");
    world.compare("main", &session);
}

#[tokio::test(flavor = "multi_thread")]
async fn git_lfs_gets_what_it_keeps() {
    let world = World::new().await;
    write(&world.at("work/.gitattributes"), "*.bin filter=lfs diff=lfs merge=lfs -text\n");
    world.publish("large files are kept elsewhere");
    let server = Server::http(world.folder.path(), Some(("me", PASSWORD)));
    let secret = secret(&[("username", "me"), ("password", PASSWORD)]);
    let asked = || cli::Git {
        url: server.url("app.git"),
        lfs: true,
        secret_dir: Some(secret.path().into()),
        ..cli::Git::default()
    };
    let session = world.session_of("session", asked()).await;
    let large = vec![7; 300_000];
    session.write("large.bin", &large);
    session.write("plain", "plain\n");
    let secret_dir = secret.path().to_str().unwrap();
    let url = server.url("app.git");
    let done = world.commit(&session, "uid-1", &["--url", &url, "--secret-dir", secret_dir, "--lfs"]).await;
    assert_eq!(done.done().get("warnings"), None, "a pointer is what Git LFS is for: {}", done.result);
    assert!(world.server(&["cat-file", "blob", "main:large.bin"]).starts_with("version https://git-lfs"));
    let next = world.session_of("next", asked()).await;
    assert!(fs::read(next.files.join("large.bin")).unwrap() == large, "other bytes");
    assert!(!done.printed.contains(PASSWORD), "{}", done.printed);
}
