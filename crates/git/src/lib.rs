//! The git program, run against a repository that the files of a Secret open.
//!
//! [`Access`] makes configuration and environment of a Secret, [`Program`] runs git with them, and [`Failure`] says in a
//! person's words why git failed. Nobody's configuration is read, nothing is asked on a terminal, no hook of a repository
//! runs, and what is secret reaches no argument, no log and no message.

mod access;
mod failure;
mod program;

use std::path::Path;

pub use access::Access;
pub use failure::{Failure, Reason, classify};
pub use program::{Call, Output, Program};

/// How git stores and shows the files that Git LFS keeps, as `git lfs install` has it.
pub const LFS_FILTER: [(&str, &str); 4] = [
    ("filter.lfs.clean", "git-lfs clean -- %f"),
    ("filter.lfs.smudge", "git-lfs smudge -- %f"),
    ("filter.lfs.process", "git-lfs filter-process"),
    ("filter.lfs.required", "true"),
];

/// A repository elsewhere, and what opens it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Remote<'a> {
    /// https://, http://, ssh://, git://, file:// or user@host:path.
    pub url: &'a str,
    /// Directory with the keys of a Secret as files: username and password, or ssh-privatekey and known_hosts; ca.crt with
    /// either.
    pub secret_dir: Option<&'a Path>,
    /// What the Secret is called, as NAMESPACE/NAME: for messages.
    pub secret_name: Option<&'a str>,
    /// The field that names the Secret, such as spec.git.secretRef: for messages.
    pub secret_field: &'a str,
}
