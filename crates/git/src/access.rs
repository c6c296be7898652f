//! How git gets at a repository: configuration and environment made from the files of a Secret.
//!
//! The secret itself is in no argument, no environment variable and no configuration, only the path of its file; and the
//! password and the authority are given to the repository's own host alone, not to that of a submodule elsewhere.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Remote;
use crate::failure::{Failure, Reason};

/// Prints username and password from the Secret's files, when git asks for them. `sh` runs it; git says `get` or `store`.
const HELPER: &str = r#"!f() { test "$1" = get || exit 0; printf 'username=%s\n' "$(cat "$AETHER_SECRET/username" 2>/dev/null || echo git)"; printf 'password=%s\n' "$(cat "$AETHER_SECRET/password")"; }; f"#;

/// ssh as it is always run: nobody is asked, and nothing of whoever runs this program is used, neither configuration
/// nor agent nor keys.
const SSH: &str =
    "ssh -F /dev/null -o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=20";
/// What a Secret with a key adds takes the place of this.
const SSH_WITHOUT_KEY: &str = " -o UserKnownHostsFile=/dev/null -o IdentityFile=none";

/// Environment and configuration for git.
#[derive(Debug, Default)]
pub struct Access {
    /// Configuration, as `-c` would give it.
    pub(crate) settings: Vec<(String, String)>,
    /// Environment.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// The command that reaches a host by ssh.
    pub(crate) ssh: String,
    /// What the Secret is called, if one was given and has a name.
    secret_name: Option<String>,
    /// The field that names it.
    secret_field: String,
    /// What must not be seen in any message.
    secrets: Vec<String>,
}

impl Access {
    /// Reads the Secret's files. `scratch` keeps the key for ssh, and is nobody else's.
    ///
    /// # Errors
    /// A URL that holds a secret, and a Secret that lacks something.
    pub fn prepare(remote: &Remote<'_>, scratch: &Path) -> Result<Self, Failure> {
        if has_credentials(remote.url) {
            let message =
                "the URL has credentials in it, which everybody can read: put them into a Secret and name that in";
            let message = format!("{message} {} (here --secret-dir)", remote.secret_field);
            return Err(Failure::new(Reason::Invalid, message));
        }
        let mut access = Self {
            secret_name: remote.secret_name.map(Into::into),
            secret_field: remote.secret_field.into(),
            ssh: format!("{SSH}{SSH_WITHOUT_KEY}"),
            ..Self::default()
        };
        if remote.url.starts_with("file://") {
            // Submodules with relative URLs lie beside it. Others may be reached by their own protocols as always.
            access.settings.push(("protocol.file.allow".into(), "always".into()));
        }
        let Some(directory) = remote.secret_dir else { return Ok(access) };
        if !directory.is_dir() {
            return Err(Failure::new(
                Reason::SecretInvalid,
                format!("--secret-dir {} is not a directory", directory.display()),
            ));
        }
        if let Some(origin) = origin(remote.url) {
            access.http(&origin, directory)?;
        } else {
            access.ssh(directory, scratch)?;
        }
        Ok(access)
    }

    fn http(&mut self, origin: &str, directory: &Path) -> Result<(), Failure> {
        let authority = directory.join("ca.crt");
        if authority.is_file() {
            self.settings.push((format!("http.{origin}.sslCAInfo"), text(&authority)?));
        }
        let password = directory.join("password");
        if password.is_file() {
            self.hide(&password)?;
            self.environment.push(("AETHER_SECRET", text(directory)?));
            self.settings.push((format!("credential.{origin}.helper"), HELPER.into()));
        }
        Ok(())
    }

    fn ssh(&mut self, directory: &Path, scratch: &Path) -> Result<(), Failure> {
        let key = directory.join("ssh-privatekey");
        if !key.is_file() {
            return Ok(());
        }
        let known_hosts = directory.join("known_hosts");
        if !known_hosts.is_file() {
            let secret = self.secret();
            return Err(Failure::new(
                Reason::SecretInvalid,
                format!(
                    "{secret} lacks known_hosts, without which no host can be trusted: add the output of ssh-keyscan HOST"
                ),
            ));
        }
        // ssh refuses a key that others may read, and one without a last newline.
        let mut contents = self.hide(&key)?;
        if !contents.ends_with('\n') {
            contents.push('\n');
        }
        let private = scratch.join("ssh-privatekey");
        let write = || {
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&private)?
                .write_all(contents.as_bytes())
        };
        write().map_err(|error| Failure::other("keep the key for ssh", error))?;
        check_key(&private, &self.secret())?;
        self.ssh = format!("{SSH} -o UserKnownHostsFile={} -i {}", quoted(&known_hosts)?, quoted(&private)?);
        Ok(())
    }

    /// The Secret, for messages.
    fn secret(&self) -> String {
        self.secret_name
            .as_ref()
            .map_or(format!("the Secret in {}", self.secret_field), |name| format!("Secret {name}"))
    }

    /// The Secret and where it is named, for messages.
    pub(crate) fn named_secret(&self) -> String {
        let named_by = || format!(", named by {}", self.secret_field);
        self.secret() + &self.secret_name.as_ref().map(|_| named_by()).unwrap_or_default()
    }

    /// Reads a secret file; its contents will not be seen in messages.
    fn hide(&mut self, file: &Path) -> Result<String, Failure> {
        let contents = fs::read_to_string(file).map_err(|error| {
            let message = format!("cannot read {} of {}: {error}", file.display(), self.secret());
            Failure::new(Reason::SecretInvalid, message)
        })?;
        let secret = contents.trim();
        // A word as short as this says nothing and may be part of any other.
        if secret.len() >= 4 {
            self.secrets.push(secret.to_owned());
        }
        Ok(contents)
    }

    /// The text without secrets.
    pub fn redact(&self, text: &str) -> String {
        let hidden = self.secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "***"));
        without_passwords(&hidden)
    }
}

/// Whether the key can be used. ssh itself would only say that the host refused it.
fn check_key(private: &Path, secret: &str) -> Result<(), Failure> {
    let checked = Command::new("ssh-keygen").args(["-y", "-P", "", "-f"]).arg(private).stdin(Stdio::null()).output();
    let checked = checked.map_err(|error| Failure::other("run ssh-keygen, which must be installed", error))?;
    if checked.status.success() {
        return Ok(());
    }
    let problem = if String::from_utf8_lossy(&checked.stderr).contains("passphrase") {
        "has a passphrase, which nobody is there to type: take it off with ssh-keygen -p, or make a key for this alone"
    } else {
        "is not a private key: put in what ssh-keygen made, from its BEGIN line to its END line"
    };
    Err(Failure::new(Reason::SecretInvalid, format!("ssh-privatekey of {secret} {problem}")))
}

/// Whether a URL holds a secret: over http a user alone may be a token; elsewhere it takes a password.
fn has_credentials(address: &str) -> bool {
    let Some((scheme, rest)) = address.split_once("://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let http = scheme.to_ascii_lowercase().starts_with("http");
    authority.rsplit_once('@').is_some_and(|(user, _)| http || user.contains(':'))
}

/// The text without secrets in URLs: no password, and over http no user either, because that may be a token.
fn without_passwords(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        let http = ["http://", "https://"].iter().any(|scheme| before.to_ascii_lowercase().ends_with(scheme));
        out.push_str(before);
        let end = after.find(|c: char| c.is_whitespace() || "/'\"".contains(c)).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                let user = if http { "***" } else { after[..at].split(':').next().unwrap_or_default() };
                out.push_str(user);
                &after[at..]
            }
            None => after,
        };
    }
    out + rest
}

/// Scheme, host and port of an http URL, as git compares them.
fn origin(address: &str) -> Option<String> {
    let address = url::Url::parse(address).ok().filter(|address| matches!(address.scheme(), "http" | "https"))?;
    Some(address.origin().ascii_serialization())
}

fn text(path: &Path) -> Result<String, Failure> {
    let path: PathBuf = path
        .canonicalize()
        .map_err(|error| Failure::new(Reason::SecretInvalid, format!("cannot read {}: {error}", path.display())))?;
    path.into_os_string().into_string().map_err(|_| Failure::new(Reason::Invalid, "a path has no UTF-8 name"))
}

/// The path as one word for a shell.
fn quoted(path: &Path) -> Result<String, Failure> {
    Ok(format!("'{}'", text(path)?.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELD: &str = "spec.git.secretRef";

    #[test]
    fn the_secret_is_named_with_the_field_that_names_it() {
        let named = |secret_name| {
            let remote = Remote { url: "u", secret_name, secret_field: FIELD, ..Remote::default() };
            Access::prepare(&remote, Path::new("/")).unwrap().named_secret()
        };
        assert_eq!(named(Some("platform/deploy-key")), "Secret platform/deploy-key, named by spec.git.secretRef");
        assert_eq!(named(None), "the Secret in spec.git.secretRef");
    }

    fn secret(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            fs::write(directory.path().join(name), contents).unwrap();
        }
        directory
    }

    fn remote<'a>(url: &'a str, secret: &'a tempfile::TempDir) -> Remote<'a> {
        Remote { url, secret_dir: Some(secret.path()), secret_name: None, secret_field: FIELD }
    }

    #[test]
    fn a_password_is_for_its_own_host_and_in_no_setting() {
        let secret = secret(&[("username", "me"), ("password", "hunter22\n"), ("ca.crt", "c")]);
        let access = Access::prepare(&remote("https://example.org:8443/a/b.git", &secret), secret.path()).unwrap();
        let keys: Vec<&str> = access.settings.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["http.https://example.org:8443.sslCAInfo", "credential.https://example.org:8443.helper"]);
        let shown = format!("{:?} {:?}", access.settings, access.environment);
        assert!(!shown.contains("hunter22"), "{shown}");
        assert_eq!(
            access.redact("fatal: https://me:hunter22@example.org/ refused hunter22"),
            "fatal: https://***@example.org/ refused ***"
        );
    }

    #[test]
    fn a_url_with_credentials_is_refused() {
        for told in ["https://token@h/x", "http://u:p@h/x", "ssh://git:p@h/y"] {
            let failure =
                Access::prepare(&Remote { url: told, secret_field: FIELD, ..Default::default() }, Path::new("/"))
                    .unwrap_err();
            assert!(
                failure.reason == Reason::Invalid
                    && failure.message.contains("secretRef")
                    && !failure.message.contains('@'),
                "{failure}"
            );
        }
        for good in ["https://h/x@y", "ssh://git@h/y", "git@h:y", "file:///srv/a@b"] {
            assert!(!has_credentials(good), "{good}");
        }
    }

    #[test]
    fn passwords_in_urls_are_not_shown() {
        assert_eq!(
            without_passwords("a https://u:p@h/x and ssh://git@h/y, z"),
            "a https://***@h/x and ssh://git@h/y, z"
        );
        assert_eq!(without_passwords("https://token@h/x ssh://git:p@h/y"), "https://***@h/x ssh://git@h/y");
        assert_eq!(without_passwords("no url: here@all"), "no url: here@all");
    }

    #[test]
    fn a_key_needs_known_hosts_and_is_kept_private() {
        use std::os::unix::fs::PermissionsExt;
        let made = tempfile::tempdir().unwrap();
        let key = made.path().join("key");
        let status = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        assert!(status.unwrap().success());
        let pasted = fs::read_to_string(&key).unwrap().trim_end().to_owned();
        let lonely = secret(&[("ssh-privatekey", &pasted)]);
        let named = Remote { secret_name: Some("platform/key"), ..remote("git@example.org:a", &lonely) };
        let failure = Access::prepare(&named, lonely.path()).unwrap_err();
        assert_eq!(failure.reason, Reason::SecretInvalid);
        assert!(failure.message.starts_with("Secret platform/key lacks known_hosts"), "{failure}");
        let secret = secret(&[("ssh-privatekey", &pasted), ("known_hosts", "h")]);
        let scratch = tempfile::tempdir().unwrap();
        let access = Access::prepare(&remote("git@example.org:a", &secret), scratch.path()).unwrap();
        assert!(
            access.ssh.contains("StrictHostKeyChecking=yes") && access.ssh.contains("known_hosts"),
            "{}",
            access.ssh
        );
        let key = scratch.path().join("ssh-privatekey");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(key).unwrap(), format!("{pasted}\n"));
    }
}
