//! What the operator hears: progress as lines of JSON on stdout, and one result at the end.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::failure::Failure;

/// Where a container's last words go unless another file is named: Kubernetes' default.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes keeps 4096 bytes of the last words; what is around the message needs some of them.
const LONGEST_MESSAGE: usize = 2000;
/// The pause between two lines of one phase.
const PAUSE: Duration = Duration::from_millis(500);

/// What an import is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Phase {
    /// Git fetches and checks out; files are objects of git.
    Cloning,
    /// Files are read and hashed.
    Scanning,
    /// What the store does not have is sent.
    Uploading,
}

/// How far an import is.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    phase: Phase,
    files: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    files_total: Option<u64>,
}

/// Prints progress, and not more of it than people can read.
pub struct Reporter {
    out: Mutex<Out>,
}

struct Out {
    writer: Box<dyn Write + Send>,
    last: Option<(Phase, Instant)>,
}

impl Reporter {
    /// Prints to stdout.
    pub fn stdout() -> Self {
        Self::to(Box::new(io::stdout()))
    }

    /// Prints to this writer.
    pub fn to(writer: Box<dyn Write + Send>) -> Self {
        Self { out: Mutex::new(Out { writer, last: None }) }
    }

    /// So far so good. Lines are left out when they come too fast, except the first of a phase.
    pub fn progress(&self, phase: Phase, files: u64, files_total: Option<u64>, bytes: u64) {
        let mut out = self.out.lock().expect("no holder panics");
        let now = Instant::now();
        if out.last.is_some_and(|(last, then)| last == phase && now.duration_since(then) < PAUSE) {
            return;
        }
        out.last = Some((phase, now));
        let line = serde_json::to_string(&Line { phase, files, bytes, files_total }).expect("numbers and names only");
        // Nobody may be listening, which is no reason to stop.
        let _ = writeln!(out.writer, "{line}").and_then(|()| out.writer.flush());
    }
}

/// What was imported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// The tree; absent when nothing was imported because nothing changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The commit that was checked out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The digest of the bucket's listing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listing: Option<String>,
    /// How long it took.
    pub milliseconds: u64,
    /// The ref still means the commit that is known already, or the listing is the known one, so nothing was imported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unchanged: bool,
}

#[derive(Serialize)]
struct Succeeded<'a> {
    ok: bool,
    #[serde(flatten)]
    imported: &'a Imported,
}

#[derive(Serialize)]
struct Failed<'a> {
    ok: bool,
    reason: &'static str,
    message: &'a str,
}

/// The result as JSON.
pub fn result(outcome: &Result<Imported, Failure>) -> String {
    let encoded = match outcome {
        Ok(imported) => serde_json::to_string(&Succeeded { ok: true, imported }),
        Err(failure) => {
            let end = failure
                .message
                .char_indices()
                .map(|(at, c)| at + c.len_utf8())
                .take_while(|end| *end <= LONGEST_MESSAGE)
                .last()
                .unwrap_or(0);
            serde_json::to_string(&Failed {
                ok: false,
                reason: failure.reason.name(),
                message: &failure.message[..end],
            })
        }
    };
    encoded.expect("numbers, names and text only")
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
    use crate::failure::Reason;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_for_each_phase_and_few_within_one() {
        let shared = Shared::default();
        let reporter = Reporter::to(Box::new(shared.clone()));
        for files in 0..1000 {
            reporter.progress(Phase::Cloning, files, None, 0);
        }
        reporter.progress(Phase::Scanning, 1, Some(9), 5);
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() < 100, "{}", lines.len());
        assert_eq!(lines[0], r#"{"phase":"Cloning","files":0,"bytes":0}"#);
        assert_eq!(lines[lines.len() - 1], r#"{"phase":"Scanning","files":1,"bytes":5,"filesTotal":9}"#);
    }

    #[test]
    fn the_result_fits_a_termination_message() {
        let long = Err(Failure::new(Reason::RefNotFound, "ä".repeat(5000)));
        let text = result(&long);
        assert!(text.len() < 4096, "{}", text.len());
        assert!(text.starts_with(r#"{"ok":false,"reason":"RefNotFound","message":"ä"#));
        let imported =
            Imported { root: Some("ab/1".into()), files: 1, bytes: 2, milliseconds: 3, ..Imported::default() };
        assert_eq!(result(&Ok(imported)), r#"{"ok":true,"root":"ab/1","files":1,"bytes":2,"milliseconds":3}"#);
    }
}
