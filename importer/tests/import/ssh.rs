//! Imports over ssh.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use aether_importer::cli::Git;
use aether_importer::failure::{Failure, Reason};

use crate::repository::{Repository, clone, of, run, secret, with_secret};
use aether_testkit::sshd::{Sshd, key, lock};

/// Why an import with this key and these known hosts fails.
async fn refusal(asked: Git, private_key: &str, known_hosts: &str) -> Failure {
    let secret = secret(&[("ssh-privatekey", private_key), ("known_hosts", known_hosts)]);
    let failure = clone(with_secret(&secret, asked)).await.failure().clone();
    assert!(!failure.message.contains("PRIVATE KEY"), "{failure}");
    failure
}

#[tokio::test]
async fn a_key_opens_a_repository_and_its_submodules_and_is_not_imported() {
    let root = tempfile::tempdir().unwrap();
    let (outer, inner) = (Repository::at(&root.path().join("outer")), Repository::at(&root.path().join("inner")));
    let sshd = Sshd::start();
    outer.add_submodule("beside", inner.path(), "../inner");
    outer.add_submodule("elsewhere", inner.path(), &sshd.url(inner.path()));
    let head = run(outer.path(), &["rev-parse", "HEAD"]);

    // As people paste it: without a last newline.
    let key = sshd.private_key();
    let secret = secret(&[("ssh-privatekey", key.trim_end()), ("known_hosts", &sshd.known_hosts())]);
    let url = sshd.url(outer.path());
    let imported = clone(with_secret(&secret, Git { submodules: true, ..of(&url, Some("main")) })).await;
    assert_eq!(imported.commit(), head);
    for name in ["README", "beside/README", "elsewhere/README"] {
        assert_eq!(imported.read(name), b"two\n", "{name}");
    }
    assert_eq!(imported.status_in_a_copy(&[]), "");
    let config = fs::read_to_string(imported.worktree().join(".git/config")).unwrap();
    assert!(config.contains(&url) && !config.contains("ssh-privatekey") && !config.contains("sshCommand"), "{config}");
    assert!(!imported.worktree().join("ssh-privatekey").exists());

    let shallow = clone(with_secret(&secret, Git { depth: Some(1), ..of(&url, Some("v1")) })).await;
    assert_eq!(shallow.commit(), outer.first);
}

#[tokio::test]
async fn each_refusal_says_what_to_mend() {
    let repository = Repository::new();
    let sshd = Sshd::start();
    let asked = || of(sshd.url(repository.path()), None);
    let (right, known) = (sshd.private_key(), sshd.known_hosts());
    let keys = tempfile::tempdir().unwrap();
    key(&keys.path().join("stranger"));
    let locked = keys.path().join("locked");
    fs::write(&locked, &right).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o600)).unwrap();
    lock(&locked, "a passphrase");
    let read = |name: &str| fs::read_to_string(keys.path().join(name)).unwrap();

    let stranger = refusal(asked(), &read("stranger"), &known).await;
    assert_eq!(stranger.reason, Reason::AuthenticationFailed, "{stranger}");
    assert!(stranger.message.contains("check Secret platform/key"), "{stranger}");

    for known_hosts in [String::new(), sshd.known_by(&read("stranger.pub"))] {
        let unknown = refusal(asked(), &right, &known_hosts).await;
        assert_eq!(unknown.reason, Reason::SecretInvalid, "{unknown}");
        for word in ["known_hosts", "ssh-keyscan", "platform/key"] {
            assert!(unknown.message.contains(word), "{unknown}");
        }
    }
    for unusable in ["not a key", &read("locked")] {
        let failure = refusal(asked(), unusable, &known).await;
        assert_eq!(failure.reason, Reason::SecretInvalid, "{failure}");
        assert!(failure.message.contains("ssh-privatekey of Secret platform/key"), "{failure}");
        assert_eq!(failure.message.contains("passphrase"), unusable != "not a key", "{failure}");
    }
    let elsewhere = of(sshd.url("/nosuch/repository".as_ref()), None);
    let missing = refusal(elsewhere, &right, &known).await;
    assert_eq!(missing.reason, Reason::RepositoryNotFound, "{missing}");
    assert!(missing.message.contains("/nosuch/repository"), "{missing}");
    let reference = refusal(Git { reference: Some("nosuch".into()), ..asked() }, &right, &known).await;
    assert_eq!(reference.reason, Reason::RefNotFound, "{reference}");
    // Nothing listens on port 1 of a machine's loopback.
    let closed = refusal(of("ssh://git@127.0.0.1:1/repository", None), &right, &known).await;
    assert_eq!(closed.reason, Reason::RepositoryNotFound, "{closed}");

    // Nobody is asked on a terminal, and no known host or key of whoever runs the importer is used.
    let anonymous = clone(asked()).await;
    assert_eq!(anonymous.failure().reason, Reason::SecretInvalid, "{}", anonymous.failure());
    assert!(anonymous.failure().message.contains("spec.git.secretRef"), "{}", anonymous.failure());
}
