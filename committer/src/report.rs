//! What the operator hears: one result, as JSON, short enough for a termination message.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::failure::{Failure, Kind, Reason};

/// Where a container's last words go unless another file is named: Kubernetes' default.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes keeps 4096 bytes of the last words. A character takes up to twice its bytes in JSON, and the rest needs room.
const LONGEST_MESSAGE: usize = 800;
const LONGEST_LIST: usize = 1000;

/// What was committed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Committed {
    /// The commit, as the server has it.
    pub commit: String,
    /// Its tree.
    pub tree: String,
    /// The branch.
    pub branch: String,
    /// The commit before it.
    pub parent: String,
    /// It was there already: an earlier run had pushed it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub found: bool,
    /// The branch had moved, and this was put on top. Not told of an earlier run that kept commits of the session.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rebased: bool,
    /// Files and symlinks that were added, changed or removed.
    pub files: u64,
    /// What the commit does not say as the tree did, a sentence for each kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// How long it took.
    pub milliseconds: u64,
}

/// What was written somewhere as files or objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Exported {
    /// The tree.
    pub root: String,
    /// The directory, or the bucket and its folder.
    pub place: String,
    /// It was there already, all of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub found: bool,
    /// Regular files.
    pub files: u64,
    /// Of these, those that had to be written.
    pub written: u64,
    /// The bytes of all.
    pub bytes: u64,
    /// What the target does not hold as the tree does, a sentence for each kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// How long it took.
    pub milliseconds: u64,
}

/// What was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Done {
    /// A commit.
    Committed(Committed),
    /// A copy.
    Exported(Exported),
}

impl Done {
    /// With how long it took.
    pub fn after(mut self, time: Duration) -> Self {
        let taken = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match &mut self {
            Self::Committed(Committed { milliseconds, .. }) | Self::Exported(Exported { milliseconds, .. }) => {
                *milliseconds = taken;
            }
        }
        self
    }

    fn shortened(&self) -> Self {
        let mut done = self.clone();
        let (Self::Committed(Committed { warnings, .. }) | Self::Exported(Exported { warnings, .. })) = &mut done;
        warnings.truncate(fitting(warnings).len());
        done
    }
}

#[derive(Serialize)]
struct Succeeded {
    ok: bool,
    #[serde(flatten)]
    done: Done,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Failed<'a> {
    ok: bool,
    reason: Reason,
    kind: Kind,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tip: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    conflicts: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    conflicts_total: Option<usize>,
}

/// The result as JSON.
pub fn result(outcome: &Result<Done, Failure>) -> String {
    let encoded = match outcome {
        Ok(done) => serde_json::to_string(&Succeeded { ok: true, done: done.shortened() }),
        Err(failure) => {
            let conflicts = fitting(&failure.conflicts);
            serde_json::to_string(&Failed {
                ok: false,
                reason: failure.reason,
                kind: failure.kind,
                message: beginning(&failure.message),
                tip: failure.tip.as_deref(),
                conflicts,
                conflicts_total: (conflicts.len() < failure.conflicts.len()).then_some(failure.conflicts.len()),
            })
        }
    };
    encoded.expect("numbers, names and text only")
}

/// As much of a text as fits.
fn beginning(text: &str) -> &str {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    &text[..ends.take_while(|end| *end <= LONGEST_MESSAGE).last().unwrap_or(0)]
}

/// As many of the texts as fit.
fn fitting(texts: &[String]) -> &[String] {
    let sums = texts.iter().scan(0, |sum, text| {
        *sum += text.len();
        Some(*sum)
    });
    &texts[..sums.take_while(|sum| *sum <= LONGEST_LIST).count()]
}

/// Writes the result to `file`, or to Kubernetes' default if that is there.
///
/// # Errors
/// What the file system said.
pub fn write_result(result: &str, file: Option<&Path>) -> io::Result<()> {
    match file {
        Some(file) => std::fs::write(file, result),
        // A bind mount that the kubelet made; never made here.
        None if Path::new(TERMINATION_LOG).exists() => std::fs::write(TERMINATION_LOG, result),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_fits_a_termination_message() {
        let conflicts: Vec<String> = (0..500).map(|n| format!("a/\"path\"/{n}")).collect();
        let failure = Failure { conflicts, ..Failure::new(Reason::Conflict, "\"ä\"".repeat(5000)) };
        let text = result(&Err(failure));
        assert!(text.len() < 4096, "{}", text.len());
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&read["reason"], &read["kind"]), (&"Conflict".into(), &"Permanent".into()));
        assert_eq!((&read["conflicts"][0], &read["conflictsTotal"]), (&"a/\"path\"/0".into(), &500.into()));

        let warnings = (0..50).map(|n| format!("{n} {}", "\n".repeat(100))).collect();
        let committed = Committed { commit: "c".into(), warnings, ..Committed::default() };
        let text = result(&Ok(Done::Committed(committed)));
        assert!(text.len() < 4096 && text.starts_with(r#"{"ok":true,"commit":"c""#), "{text}");
    }
}
