//! What a reviewer does, from the list of what waits to the decision.

use serde_json::{Value, json};

use crate::api::{Behaviour, Server, commit};
use crate::{behaviour, program, run, told};

fn waiting(name: &str, by: &str) -> Value {
    let approvals = json!({"have": 0, "need": 2, "missing": ["2 more approvals"]});
    let status = json!({"phase": "AwaitingApproval", "root": "aaaabbbbccccdddd/7", "checkpoint": "k", "session": "fix-login", "approvals": approvals});
    commit(name, by, status)
}

async fn server(commits: Vec<Value>) -> Server {
    Server::start(Behaviour { commits, ..behaviour() }).await
}

#[tokio::test]
async fn a_commit_is_asked_for() {
    let server = server(vec![]).await;
    let (code, out, err) =
        run(&server, &["commit", "fix-login", "--branch", "agents/x", "-m", "why", "--rebase"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("commit fix-login-x of session fix-login to branch agents/x (rebased) asked for"), "{out}");
    let spec = server.seen.borrow().created[0]["spec"].clone();
    assert_eq!(
        spec["target"],
        json!({"git": {"branch": "agents/x", "message": "why", "rebase": true, "history": "Squash"}})
    );
    assert_eq!((&spec["session"], spec.get("checkpoint")), (&json!("fix-login"), None));
    let (code, _, err) = run(&server, &["commit", "fix-logn", "--promote"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("did you mean fix-login?"), "{err}");
}

#[tokio::test]
async fn a_wait_for_a_commit_ends_with_its_time() {
    let server = server(vec![]).await;
    let (code, _, err) = run(&server, &["commit", "fix-login", "--promote", "--wait", "--timeout", "100ms"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("commit fix-login-x to be at its target") && err.contains("--timeout"), "{err}");
}

#[tokio::test]
async fn what_waits_goes_away_when_it_is_decided_on() {
    let server = server(vec![waiting("c1", "bot"), waiting("c2", "ada")]).await;
    let (code, out, err) = run(&server, &["review"]).await;
    assert_eq!(code, 0, "{err}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..5], ["NAMESPACE", "COMMIT", "SESSION", "TO", "BY"]);
    assert_eq!(rows[1][..6], ["demo", "c1", "fix-login", "branch", "agents/x", "bot"]);
    assert_eq!(rows.len(), 2, "one's own does not wait for oneself: {out}");
    assert!(out.contains("0/2"), "{out}");

    let (code, out, err) = run(&server, &["approve", "c1", "-m", "reads well"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("commit c1 approved with tree aaaabbbbcccc"), "{out}");
    let made = server.seen.borrow().created[0].clone();
    // `names::approval_name("c1", "ada")`: everybody has one voice.
    assert!(made["metadata"]["name"].as_str().unwrap().starts_with("c1."), "{made}");
    assert_eq!(made["spec"]["root"], "aaaabbbbccccdddd/7");
    assert_eq!((&made["spec"]["decision"], &made["spec"]["text"]), (&json!("Approve"), &json!("reads well")));

    let (_, out, err) = run(&server, &["review"]).await;
    assert!(out.is_empty() && err.contains("nothing waits for you"), "{out}{err}");
    let (_, out, _) = run(&server, &["review", "--all"]).await;
    assert!(out.contains("c1") && out.contains("c2") && out.contains("Approve"), "{out}");

    // Saying it again changes nothing; saying something else withdraws it.
    run(&server, &["approve", "c1"]).await;
    assert_eq!(server.seen.borrow().created.len(), 1);
    let (code, out, err) = run(&server, &["reject", "c1", "-m", "no"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("c1 rejected"), "{out}");
    let seen = server.seen.borrow().clone();
    assert_eq!(seen.deleted, [made["metadata"]["name"].as_str().unwrap()]);
    assert_eq!(
        (&seen.created[1]["spec"]["decision"], &seen.created[1]["metadata"]["name"]),
        (&json!("Reject"), &made["metadata"]["name"])
    );
}

#[tokio::test]
async fn a_cluster_that_does_not_say_who_one_is_takes_decisions_too() {
    let server = Server::start(Behaviour { commits: vec![waiting("c1", "bot")], says_who: None, ..behaviour() }).await;
    let (code, out, err) = run(&server, &["approve", "c1"]).await;
    assert!(code == 0 && out.starts_with("commit c1 approved"), "{out}{err}");
    assert_eq!(server.seen.borrow().created[0]["metadata"]["generateName"], "c1-");
    let (_, out, err) = run(&server, &["review"]).await;
    assert!(out.contains("c1") && err.contains("does not say who you are"), "{out}{err}");
}

#[tokio::test]
async fn aether_says_who_one_is_where_the_cluster_does_not() {
    let says_who = Some("review.aether.dev");
    let server = Server::start(Behaviour { commits: vec![waiting("c1", "ada")], says_who, ..behaviour() }).await;
    let (_, out, err) = run(&server, &["review"]).await;
    assert!(out.is_empty() && err.contains("nothing waits for you"), "it is ada's own: {out}{err}");
}

#[tokio::test]
async fn who_may_not_look_everywhere_sees_the_namespace() {
    let server =
        Server::start(Behaviour { commits: vec![waiting("c1", "bot")], everywhere: false, ..behaviour() }).await;
    let (code, out, err) = run(&server, &["review"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("only those of demo are shown") && out.starts_with("COMMIT"), "{out}{err}");
}

#[tokio::test]
async fn what_cannot_be_decided_on_is_not() {
    let done = commit("done", "bot", json!({"phase": "Succeeded", "root": "r/1", "finished": "2026-01-01T00:00:06Z"}));
    let server = server(vec![done, commit("young", "bot", json!({"phase": "Pending"})), waiting("c1", "bot")]).await;
    for (words, why) in [
        (&["approve", "done"][..], "too late"),
        (&["approve", "young"], "no tree yet"),
        (&["approve", "c1", "--root", "other/7"], "not other/7"),
        (&["approve", "c2"], "did you mean c1?"),
        (&["reject", "c1"], "--message"),
    ] {
        let (code, _, err) = run(&server, words).await;
        assert!(code != 0 && err.contains(why), "{words:?}: {err}");
    }
    assert!(server.seen.borrow().created.is_empty());
}

#[tokio::test]
async fn a_commit_is_shown_with_its_files_and_its_notes() {
    let server = server(vec![waiting("c1", "bot")]).await;
    run(&server, &["checkpoint", "fix-login", "--name", "k", "--wait", "none"]).await;
    let (code, out, err) = run(&server, &["note", "add", "c1", "src/a:3-5", "-m", "why?"]).await;
    assert_eq!((code, out.as_str()), (0, "note c1-x on src/a:3-5\n"), "{err}");
    let note = server.seen.borrow().created.last().unwrap()["spec"].clone();
    assert_eq!(
        (&note["checkpoint"], &note["digest"], &note["lines"]),
        (&json!("k"), &json!("d1"), &json!({"from": 3, "to": 5}))
    );
    let asked = server.seen.borrow().reviewed.last().unwrap().clone();
    assert!(asked.ends_with("/checkpoints/k/file?path=src%2Fa"), "{asked}");
    let (code, _, err) = run(&server, &["note", "add", "c1", "src/a:3-10", "-m", "why?"]).await;
    assert!(code == 1 && err.contains("only 9 lines"), "{err}");

    let (code, out, err) = run(&server, &["show", "c1"]).await;
    assert_eq!(code, 0, "{err}");
    for part in
        ["Asked for by:           bot", "2 more approvals", "src/a:3-5  lines 20-22", " file | 2 +-", "approve c1"]
    {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }
    let asked = server.seen.borrow().reviewed.last().unwrap().clone();
    assert!(asked.ends_with("/commits/c1/changes"), "what is shown is what the commit names: {asked}");

    let (_, out, _) = run(&server, &["note", "list", "fix-login"]).await;
    assert!(out.contains("c1-x") && out.contains("lines 20-22"), "{out}");
    assert_eq!(run(&server, &["note", "resolve", "c1-x"]).await.1, "note c1-x resolved\n");
    assert_eq!(server.seen.borrow().patched, [json!({"spec": {"resolved": true}})]);
    let (_, out, err) = run(&server, &["note", "list", "fix-login"]).await;
    assert!(out.is_empty() && err.contains("no open notes"), "{out}{err}");
    assert!(run(&server, &["note", "list", "--all"]).await.1.contains("resolved"));
    assert_eq!(run(&server, &["note", "reopen", "c1-x"]).await.0, 0);

    let (code, out, err) = run(&server, &["log", "fix-login"]).await;
    assert_eq!(code, 0, "{err}");
    let whats: Vec<&str> = out.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)).collect();
    assert_eq!(whats, ["session", "commit", "note"], "{out}");
}

#[tokio::test]
async fn a_commit_that_promotes_says_what_no_diff_shows() {
    let mut promotes = waiting("c2", "bot");
    promotes["spec"]["target"] = json!({"promote": {}});
    let server = server(vec![waiting("c1", "bot"), promotes]).await;
    let said = async |name: &str| {
        let (code, out, err) = run(&server, &["show", name]).await;
        assert_eq!(code, 0, "{err}");
        out.contains(".git: no diff shows it, and it becomes part of the revision")
    };
    assert!(said("c2").await && !said("c1").await);
}

#[tokio::test]
async fn a_diff_of_a_commit_and_of_two_things() {
    let server = server(vec![waiting("c1", "bot")]).await;
    let (code, out, err) = run(&server, &["diff", "c1"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("-one\n+two\n"), "{out}");
    assert!(server.seen.borrow().created.is_empty(), "nothing is taken to show a commit");
    let (code, out, err) = run(&server, &["diff", "commit/c1", "fix-login", "--side-by-side"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.lines().any(|line| line.starts_with("one ") && line.contains("| two")), "{out}");
    let seen = server.seen.borrow().clone();
    assert!(seen.reviewed.last().unwrap().ends_with("/changes?against=k"), "{:?}", seen.reviewed);
    assert_eq!((seen.created.len(), seen.deleted.len()), (1, 1), "the checkpoint of the session is gone again");
    let (code, _, err) = run(&server, &["diff", "nothing"]).await;
    assert!(code == 2 && err.contains("session nothing does not exist"), "{err}");
}

#[tokio::test]
async fn attempts_side_by_side() {
    let server = server(vec![waiting("c1", "bot")]).await;
    let (code, out, err) = run(&server, &["compare", "fix-login"]).await;
    assert_eq!(code, 0, "{err}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["SESSION", "FILES", "ADDED", "REMOVED", "COMMANDS", "LAST", "EXIT", "COMMIT", "STATE"]);
    assert_eq!(
        rows[1],
        ["fix-login", "1", "+1", "-1", "0", "ok,", "1", "failed", "true", "3", "c1", "AwaitingApproval"]
    );
    let (code, out, err) = run(&server, &["compare", "fix-login", "--approve", "fix-login", "--close-others"]).await;
    assert_eq!((code, out.as_str()), (0, "commit c1 approved\n"), "{err}");
    let (code, _, err) = run(&server, &["compare", "fix-login", "--approve", "other"]).await;
    assert!(code == 1 && err.contains("not one of those"), "{err}");
    let (code, _, err) = run(&server, &["compare", "--parent", "fix-login"]).await;
    assert!(code == 1 && err.contains("no session was forked from fix-login"), "{err}");
}

#[tokio::test]
async fn a_session_without_a_commit_is_compared_as_it_is_now() {
    let server = server(vec![]).await;
    let (code, out, err) = told(program(&server, &["compare", "fix-login"]).output().await.unwrap());
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("+1") && !out.contains("COMMIT"), "{out}");
    let seen = server.seen.borrow().clone();
    assert_eq!((seen.created.len(), seen.deleted.len()), (1, 1));
}
