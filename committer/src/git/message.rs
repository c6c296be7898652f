//! What a commit says, and the lines at its end by which it is known again.

use std::path::Path;

use aether_git::{Call, Program};

use crate::cli::Git;
use crate::failure::{Failure, Reason};

/// Holds the UID of the request: who finds it need not commit again.
pub(super) const COMMIT: &str = "Aether-Commit";
/// Holds the tree that was reviewed.
pub(super) const ROOT: &str = "Aether-Root";
/// Keys that nobody else may use: those that begin so, and what the operator says of people.
const OURS: &str = "aether-";
const OF_PEOPLE: [&str; 2] = ["approved-by", "requested-by"];

/// What is said of all that has no words of its own.
pub(super) fn of(asked: &Git) -> Result<Vec<u8>, Failure> {
    let said = match (&asked.message, &asked.message_file) {
        (Some(message), _) => message.clone(),
        (None, Some(file)) => std::fs::read_to_string(file)
            .map_err(|error| Failure::new(Reason::Invalid, format!("cannot read {}: {error}", file.display())))?,
        (None, None) => String::new(),
    };
    let refuse = |why: String| Failure::new(Reason::Invalid, why);
    if said.trim().is_empty() || said.contains('\0') {
        return Err(refuse("the message is empty, or no text".into()));
    }
    check(&said, asked).map_err(|why| refuse(format!("the message has {why}")))?;
    Ok(format!("{}\n", said.trim_end()).into_bytes())
}

/// The words of a commit that was made in the session.
///
/// # Errors
/// Why they cannot stay.
pub(super) fn kept(said: &str, asked: &Git) -> Result<Vec<u8>, String> {
    if said.trim().is_empty() {
        return Err("it says nothing".into());
    }
    check(said, asked).map_err(|why| format!("its message has {why}"))?;
    Ok(said.as_bytes().to_owned())
}

/// With the lines at its end.
pub(super) async fn sign(said: &[u8], asked: &Git, git: &Program<'_>, directory: &Path) -> Result<Vec<u8>, Failure> {
    let mut trailers: Vec<String> = asked.trailers.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    trailers.push(format!("{ROOT}: {}", asked.root));
    trailers.push(format!("{COMMIT}: {}", asked.commit_uid));
    let mut arguments = vec!["interpret-trailers", "--no-divider", "--if-exists=add", "--where=end"];
    arguments.extend(trailers.iter().flat_map(|trailer| ["--trailer", trailer]));
    Ok(git.ask(directory, &arguments, Call { input: said, ..Call::default() }).await?)
}

/// Nobody says in our name who approved, or that another request is done.
fn check(said: &str, asked: &Git) -> Result<(), String> {
    for line in said.lines() {
        let Some((key, _)) = line.split_once(':') else { continue };
        let key = key.trim().to_ascii_lowercase();
        if key.starts_with(OURS)
            || OF_PEOPLE.contains(&key.as_str())
            || asked.trailers.iter().any(|(ours, _)| ours.eq_ignore_ascii_case(&key))
        {
            return Err(format!("a line {line:?}, which only Aether may write: take it out"));
        }
    }
    Ok(())
}
