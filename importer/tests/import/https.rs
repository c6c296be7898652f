//! Imports over http and https, with passwords and authorities of one's own.

use std::fs;

use aether_importer::cli::Git;
use aether_importer::failure::Reason;

use crate::log;
use crate::repository::{Repository, clone, of, run, secret, with_secret};
use aether_testkit::git_server::{Server, authority};

const PASSWORD: &str = "hunter22-correct";
const WRONG_PASSWORD: &str = "swordfish-wrong";

#[tokio::test]
async fn a_password_opens_what_is_closed_and_is_seen_nowhere() {
    let log = log::watched();
    let root = tempfile::tempdir().unwrap();
    let repository = Repository::at(&root.path().join("repository"));
    for server in
        [Server::http(root.path(), Some(("me", PASSWORD))), Server::https(root.path(), Some(("me", PASSWORD)))]
    {
        let url = server.url("repository");
        let authority = server.authority.clone().unwrap_or_default();
        let with = |password: &str| {
            let mut files = vec![("username", "me"), ("password", password)];
            files.extend((!authority.is_empty()).then_some(("ca.crt", authority.as_str())));
            secret(&files)
        };
        let (right, wrong) = (with(&format!("{PASSWORD}\n")), with(WRONG_PASSWORD));
        let refused = clone(with_secret(&wrong, of(&url, None))).await;
        assert_eq!(refused.failure().reason, Reason::AuthenticationFailed, "{}", refused.failure());
        assert!(refused.failure().message.contains("check Secret platform/key"), "{}", refused.failure());
        assert!(!refused.failure().message.contains(WRONG_PASSWORD), "{}", refused.failure());

        let let_in = clone(with_secret(&right, of(&url, Some("main")))).await;
        assert_eq!(let_in.commit(), repository.second);
        let config = fs::read_to_string(let_in.worktree().join(".git/config")).unwrap();
        assert!(config.contains(&url), "{config}");
        for leaked in [PASSWORD, "helper", "credential", "sslCAInfo"] {
            assert!(!config.contains(leaked), "{config}");
        }
        let missing = clone(with_secret(&right, of(server.url("nosuch"), None))).await;
        assert_eq!(missing.failure().reason, Reason::RepositoryNotFound, "{}", missing.failure());
        let shallow = clone(with_secret(&right, Git { depth: Some(1), ..of(&url, Some("v1")) })).await;
        assert_eq!(shallow.commit(), repository.first);

        // As a user would have it by habit; refused, and not repeated.
        let told = url.replacen("://", &format!("://me:{PASSWORD}@"), 1);
        let told = clone(of(told, None)).await;
        assert_eq!(told.failure().reason, Reason::Invalid);
        assert!(!told.failure().message.contains(PASSWORD), "{}", told.failure());
    }
    let log = log.text();
    assert!(log.contains("ls-remote"), "the log was watched: {log}");
    for leaked in [PASSWORD, WRONG_PASSWORD] {
        assert!(!log.contains(leaked), "{log}");
    }
}

#[tokio::test]
async fn no_password_is_a_refusal_too() {
    let root = tempfile::tempdir().unwrap();
    Repository::at(&root.path().join("repository"));
    let server = Server::http(root.path(), Some(("me", PASSWORD)));
    let anonymous = clone(of(server.url("repository"), None)).await;
    assert_eq!(anonymous.failure().reason, Reason::AuthenticationFailed, "{}", anonymous.failure());
    assert!(anonymous.failure().message.contains("spec.git.secretRef"), "{}", anonymous.failure());
}

#[tokio::test]
async fn only_the_right_authority_is_believed() {
    let root = tempfile::tempdir().unwrap();
    let repository = Repository::at(&root.path().join("repository"));
    let server = Server::https(root.path(), None);
    let asked = || of(server.url("repository"), None);
    let right = secret(&[("ca.crt", server.authority.as_deref().unwrap())]);
    assert_eq!(clone(with_secret(&right, asked())).await.commit(), repository.second);

    let (stranger, _) = authority();
    for wrong in [stranger.as_str(), "not a certificate"] {
        let failure = clone(with_secret(&secret(&[("ca.crt", wrong)]), asked())).await.failure().clone();
        assert_eq!(failure.reason, Reason::SecretInvalid, "{failure}");
        assert!(failure.message.contains("ca.crt of Secret platform/key"), "{failure}");
    }
    let unknown = clone(asked()).await.failure().clone();
    assert_eq!(unknown.reason, Reason::SecretInvalid, "{unknown}");
    assert!(unknown.message.contains("ca.crt") && unknown.message.contains("spec.git.secretRef"), "{unknown}");
}

#[tokio::test]
async fn submodules_of_the_same_host_are_opened_by_the_same_secret() {
    let root = tempfile::tempdir().unwrap();
    let (outer, inner) = (Repository::at(&root.path().join("outer")), Repository::at(&root.path().join("inner")));
    let server = Server::https(root.path(), Some(("me", PASSWORD)));
    outer.add_submodule("beside", inner.path(), "../inner");
    outer.add_submodule("elsewhere", inner.path(), &server.url("inner"));
    let secret =
        secret(&[("username", "me"), ("password", PASSWORD), ("ca.crt", server.authority.as_deref().unwrap())]);
    let asked = Git { submodules: true, ..of(server.url("outer"), None) };
    let imported = clone(with_secret(&secret, asked)).await;
    assert_eq!(imported.commit(), run(outer.path(), &["rev-parse", "HEAD"]));
    for name in ["beside/README", "elsewhere/README"] {
        assert_eq!(imported.read(name), b"two\n", "{name}");
    }
    assert_eq!(imported.status_in_a_copy(&[]), "");
    let left = run(&imported.worktree(), &["submodule", "foreach", "--quiet", "git config --list"]);
    for leaked in [PASSWORD, "credential", "sslcainfo"] {
        assert!(!left.contains(leaked), "{left}");
    }
}
