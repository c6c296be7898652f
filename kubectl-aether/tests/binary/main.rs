//! The program as a person runs it: exit codes, output, signals; against an API server in this process.

mod api;
mod review;

use std::process::{Output, Stdio};

use api::{Behaviour, Server};
use tokio::process::{Child, Command};

const WHOLE: &str = "feature done\nblob\nmark :1\ndata 4\none\n\nblob\nmark :2\ndata 4\ntwo\n\n\
commit refs/heads/base\ncommitter A <a@b> 0 +0000\ndata 0\nM 100644 :1 file\n\n\
commit refs/heads/head\ncommitter A <a@b> 0 +0000\ndata 0\nM 100644 :2 file\n\ndone\n";

fn behaviour() -> Behaviour {
    Behaviour {
        durable: true,
        changes: WHOLE.into(),
        exit_code: Some(3),
        log: "one\ntwo\n",
        commits: vec![],
        everywhere: true,
        says_who: Some("authentication.k8s.io"),
    }
}

fn program(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-aether"));
    command
        .args(args)
        .env("KUBECONFIG", server.kubeconfig.path())
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn run(server: &Server, args: &[&str]) -> (i32, String, String) {
    told(program(server, args).output().await.unwrap())
}

fn told(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("it ended by itself"), text(output.stdout), text(output.stderr))
}

async fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().unwrap().to_string()]).status().await.unwrap();
    assert!(sent.success());
}

#[tokio::test]
async fn a_diff_of_a_session_leaves_no_checkpoint() {
    let server = Server::start(behaviour()).await;
    let (code, out, err) = run(&server, &["diff", "fix-login"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("--- a/file\n+++ b/file\n@@ -1 +1 @@\n-one\n+two\n"), "{out}");
    let seen = server.seen.borrow().clone();
    let name = seen.created[0]["metadata"]["name"].as_str().unwrap();
    assert_eq!(seen.created[0]["metadata"]["labels"]["aether.dev/origin"], "diff");
    assert_eq!(seen.deleted, [name]);
    let (code, out, _) = run(&server, &["diff", "fix-login", "--exit-code", "--name-only"]).await;
    assert_eq!((code, out.as_str()), (1, "file\n"));
}

#[tokio::test]
async fn a_diff_that_fails_leaves_no_checkpoint() {
    let server = Server::start(Behaviour { changes: WHOLE[..WHOLE.len() - 20].to_owned().into(), ..behaviour() }).await;
    let (code, out, err) = run(&server, &["diff", "fix-login"]).await;
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("broke off"), "{err}");
    assert_eq!(server.seen.borrow().deleted.len(), 1);
}

#[tokio::test]
async fn a_diff_that_is_interrupted_leaves_no_checkpoint() {
    let mut server = Server::start(Behaviour { durable: false, ..behaviour() }).await;
    let child = program(&server, &["diff", "fix-login"]).spawn().unwrap();
    server.until("the checkpoint", |seen| !seen.created.is_empty()).await;
    interrupt(&child).await;
    let (code, _, err) = told(child.wait_with_output().await.unwrap());
    assert_eq!(code, 130, "{err}");
    assert_eq!(server.seen.borrow().deleted.len(), 1);
}

#[tokio::test]
async fn a_diff_that_waits_too_long_leaves_no_checkpoint() {
    let server = Server::start(Behaviour { durable: false, ..behaviour() }).await;
    let (code, _, err) = run(&server, &["diff", "fix-login", "--timeout", "100ms"]).await;
    assert_eq!(code, 2);
    assert!(err.contains("to be in the store") && err.contains("--timeout"), "{err}");
    assert_eq!(server.seen.borrow().deleted.len(), 1);
}

#[tokio::test]
async fn without_git_nothing_is_asked_of_the_cluster() {
    let server = Server::start(behaviour()).await;
    let (code, _, err) =
        told(program(&server, &["diff", "fix-login"]).env("PATH", "/nonexistent").output().await.unwrap());
    assert_eq!(code, 2);
    assert!(err.contains("no git in PATH"), "{err}");
    assert!(server.seen.borrow().created.is_empty());
}

#[tokio::test]
async fn a_command_shows_its_output_and_exits_with_its_code() {
    let server = Server::start(behaviour()).await;
    let (code, out, err) =
        run(&server, &["run", "fix-login", "--rm", "--", "sh", "-c", "echo one; echo two; exit 3"]).await;
    assert_eq!((code, out.as_str()), (3, "one\ntwo\n"), "{err}");
    let seen = server.seen.borrow().clone();
    assert_eq!(seen.created[0]["spec"]["command"][2], "echo one; echo two; exit 3");
    assert_eq!(seen.deleted, ["fix-login-x"]);
}

#[tokio::test]
async fn an_interrupted_command_is_deleted_and_its_last_words_are_shown() {
    let mut server = Server::start(Behaviour { exit_code: None, log: "begun\n", ..behaviour() }).await;
    let child = program(&server, &["run", "fix-login", "--", "sleep", "600"]).spawn().unwrap();
    server.until("the output to be followed", |seen| seen.followed).await;
    interrupt(&child).await;
    let (code, out, err) = told(child.wait_with_output().await.unwrap());
    assert_eq!((code, out.as_str()), (130, "begun\nended\n"), "{err}");
    assert_eq!(server.seen.borrow().deleted, ["fix-login-x"]);
}

#[tokio::test]
async fn a_wrong_name_gets_the_right_one() {
    let server = Server::start(behaviour()).await;
    let (code, _, err) = run(&server, &["checkpoint", "fix-logn"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("session fix-logn does not exist in namespace demo; did you mean fix-login?"), "{err}");
    let (code, _, err) = run(&server, &["run", "other", "--", "true"]).await;
    assert_eq!(code, 125, "{err}");
}

#[tokio::test]
async fn completion_for_every_shell() {
    let server = Server::start(behaviour()).await;
    for (shell, part) in [
        ("bash", "complete -F _kubectl__aether"),
        ("zsh", "#compdef kubectl-aether"),
        ("fish", "complete -c kubectl-aether"),
        ("kubectl", "__complete"),
    ] {
        let (code, out, _) = run(&server, &["completion", shell]).await;
        assert!(code == 0 && out.contains(part), "{shell}: {out}");
    }
    assert_eq!(run(&server, &["__complete", "fork", "fix"]).await.1, "fix-login\n:4\n");
    assert_eq!(run(&server, &["__complete", "checkpoi"]).await.1, "checkpoint\ncheckpoints\n:4\n");
}

#[tokio::test]
async fn sessions_are_listed() {
    let server = Server::start(behaviour()).await;
    let (code, out, err) = run(&server, &["get"]).await;
    assert_eq!(code, 0, "{err}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NAME", "STATE", "AGE"]);
    assert_eq!(rows[1][..2], ["fix-login", "Bound"]);
    assert_eq!(run(&server, &["get", "-o", "name"]).await.1, "aethersession.aether.dev/fix-login\n");
}
