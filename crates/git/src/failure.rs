//! Why git failed, and what a person can do about it.

use std::fmt;

/// What git's words mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The URL leads nowhere.
    RepositoryNotFound,
    /// The repository is there, the ref is not.
    RefNotFound,
    /// The repository refused the credentials, or wants some.
    AuthenticationFailed,
    /// The Secret lacks something or cannot be read as what it should be.
    SecretInvalid,
    /// What was asked for makes no sense.
    Invalid,
    /// Everything else.
    Failed,
}

/// Why git failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Failure {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    pub(crate) fn other(action: &str, error: impl fmt::Display) -> Self {
        Self::new(Reason::Failed, format!("cannot {action}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.reason, self.message)
    }
}

/// Words of git and of the programs that it runs, and what they mean. The first that occurs decides, so what is more
/// telling comes first: ssh says `Permission denied` and then git adds that the repository could not be read.
const WORDS: [(&str, Reason); 38] = [
    ("host key verification failed", Reason::SecretInvalid),
    ("load key ", Reason::SecretInvalid),
    ("error in libcrypto", Reason::SecretInvalid),
    ("invalid format", Reason::SecretInvalid),
    ("server certificate verification failed", Reason::SecretInvalid),
    ("ssl certificate problem", Reason::SecretInvalid),
    ("error adding trust anchors", Reason::SecretInvalid),
    ("error setting certificate", Reason::SecretInvalid),
    ("permission denied (publickey", Reason::AuthenticationFailed),
    ("permission denied, please try again", Reason::AuthenticationFailed),
    ("authentication failed", Reason::AuthenticationFailed),
    ("could not read username", Reason::AuthenticationFailed),
    ("could not read password", Reason::AuthenticationFailed),
    ("access denied", Reason::AuthenticationFailed),
    ("returned error: 401", Reason::AuthenticationFailed),
    ("returned error: 403", Reason::AuthenticationFailed),
    ("invalid credentials", Reason::AuthenticationFailed),
    ("couldn't find remote ref", Reason::RefNotFound),
    ("not found in upstream", Reason::RefNotFound),
    ("not our ref", Reason::RefNotFound),
    ("unadvertised object", Reason::RefNotFound),
    ("reference is not a tree", Reason::RefNotFound),
    ("bad object", Reason::RefNotFound),
    ("did not match any", Reason::RefNotFound),
    ("unable to find current revision in submodule", Reason::RefNotFound),
    ("could not resolve", Reason::RepositoryNotFound),
    ("failed to connect", Reason::RepositoryNotFound),
    ("could not connect", Reason::RepositoryNotFound),
    ("couldn't connect", Reason::RepositoryNotFound),
    ("connection refused", Reason::RepositoryNotFound),
    ("connection timed out", Reason::RepositoryNotFound),
    ("no route to host", Reason::RepositoryNotFound),
    ("network is unreachable", Reason::RepositoryNotFound),
    ("does not appear to be a git repository", Reason::RepositoryNotFound),
    ("returned error: 404", Reason::RepositoryNotFound),
    ("repository not found", Reason::RepositoryNotFound),
    ("' not found", Reason::RepositoryNotFound),
    ("does not exist", Reason::RepositoryNotFound),
];

/// What git's words mean.
pub fn classify(words: &str) -> Reason {
    let words = words.to_lowercase();
    WORDS.iter().find(|(text, _)| words.contains(text)).map_or(Reason::Failed, |(_, reason)| *reason)
}

/// What a person can do about it, when git failed with these words. `secret` is what the Secret is called.
pub(crate) fn way_out(reason: Reason, words: &str, secret: &str) -> Option<String> {
    let words = words.to_lowercase();
    match reason {
        Reason::RepositoryNotFound => Some("check spec.git.url, and that the cluster can reach it".into()),
        Reason::RefNotFound => Some("check spec.git.ref".into()),
        Reason::AuthenticationFailed => Some(format!("check {secret}")),
        Reason::SecretInvalid if words.contains("host key") => {
            Some(format!("put the output of ssh-keyscan HOST into known_hosts of {secret}, if that is the host's key"))
        }
        Reason::SecretInvalid if words.contains("certificate") || words.contains("trust anchors") => {
            Some(format!("put the PEM certificate of the server's authority into ca.crt of {secret}"))
        }
        Reason::SecretInvalid => {
            Some(format!("ssh-privatekey of {secret} must be a private key as ssh-keygen makes it, without passphrase"))
        }
        Reason::Invalid | Reason::Failed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_git_mean_what_people_would_say() {
        for (words, reason) in [
            ("fatal: Authentication failed for 'https://example.org/a/'", Reason::AuthenticationFailed),
            (
                "fatal: could not read Username for 'https://github.com': terminal prompts disabled",
                Reason::AuthenticationFailed,
            ),
            (
                "git@h: Permission denied (publickey).\nfatal: Could not read from remote repository.",
                Reason::AuthenticationFailed,
            ),
            ("Host key verification failed.\nfatal: Could not read from remote repository.", Reason::SecretInvalid),
            ("Load key \"/tmp/k\": error in libcrypto\ngit@h: Permission denied (publickey).", Reason::SecretInvalid),
            ("fatal: repository 'http://h/nosuch/' not found", Reason::RepositoryNotFound),
            ("remote: Repository not found.", Reason::RepositoryNotFound),
            ("fatal: unable to access 'https://h/': Could not resolve host: h", Reason::RepositoryNotFound),
            ("fatal: '/srv/nosuch' does not appear to be a git repository", Reason::RepositoryNotFound),
            ("fatal: couldn't find remote ref refs/pull/9/head", Reason::RefNotFound),
            ("fatal: remote error: upload-pack: not our ref 0123", Reason::RefNotFound),
            ("fatal: fetch-pack: invalid index-pack output", Reason::Failed),
        ] {
            assert_eq!(classify(words), reason, "{words}");
        }
    }
}
