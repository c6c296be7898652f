//! The format: JSON lines, each with the BLAKE3 hash of the line before it. Pure.
//!
//! A line has one encoding, and a decoder takes no other, so that one hash stands for one meaning.

use std::fmt;
use std::str::FromStr;

use aether_cas::Digest;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The most bytes of one line.
pub const MAX_LINE: usize = 64 << 10;

/// What was done.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, Hash)]
pub enum Verb {
    /// A commit was asked for.
    Requested,
    /// A commit was approved.
    Approved,
    /// A commit was rejected.
    Rejected,
    /// A decision was withdrawn.
    Withdrawn,
    /// A commit was released.
    Released,
    /// A commit reached its target.
    Succeeded,
    /// A commit failed.
    Failed,
    /// A note was made.
    Noted,
    /// A note was resolved.
    Resolved,
    /// A note was opened again.
    Reopened,
}

/// To what it was done.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, Hash)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

impl Object {
    /// Whether this is the object of that kind and name, or what somebody says of it: an approval has the name of its commit
    /// before the last dot.
    pub fn is_of(&self, kind: &str, name: &str) -> bool {
        let commit = self.name.rsplit_once('.').map(|(commit, _)| commit);
        (self.kind.eq_ignore_ascii_case(kind) && self.name == name)
            || (kind.eq_ignore_ascii_case("AetherCommit") && self.kind == "AetherApproval" && commit == Some(name))
    }
}

/// One thing that happened.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, Hash)]
pub struct Entry {
    /// When.
    pub time: Timestamp,
    /// Who did it, as the API server had authenticated them.
    pub actor: String,
    /// What was done.
    pub verb: Verb,
    /// To what.
    pub object: Object,
    /// The tree that it was about.
    pub root: Option<String>,
    /// Tells apart what the same actor does to the same object more than once, such as to resolve a note again. It follows from
    /// the object, so that whoever has to write a line again gives it the same one.
    pub occasion: u64,
}

impl Entry {
    /// All that makes it this thing, whoever writes it down at whatever attempt: all but the time, which is that of the attempt
    /// where the object says none.
    pub fn identity(&self) -> Self {
        Self { time: Timestamp::UNIX_EPOCH, ..self.clone() }
    }

    /// Whether both tell of one thing.
    pub fn repeats(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

/// The end of a chain: how many lines there are, and the hash of the last one. As text, `LINES:HASH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// How many lines.
    pub count: u64,
    /// The hash of the last one; of nothing when there is none.
    pub hash: Digest,
}

impl Head {
    /// Of a chain without lines.
    pub const EMPTY: Self = Self { count: 0, hash: Digest::EMPTY };

    fn after(self, line: &[u8]) -> Self {
        Self { count: self.count + 1, hash: Digest::of(line) }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.count, self.hash)
    }
}

impl FromStr for Head {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(count, hash)| Some((count.parse().ok()?, hash.parse().ok()?)));
        parts
            .map(|(count, hash)| Self { count, hash })
            .ok_or_else(|| "LINES:HASH is expected, as it was printed".to_owned())
    }
}

/// Why something is no chain, and at which line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct Broken {
    /// The line, counted from 1.
    pub line: u64,
    /// What is wrong.
    pub problem: &'static str,
}

/// An entry that no line can hold. It says nothing of the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what is to be written of {kind} {namespace}/{name} takes {bytes} bytes, and a line has {MAX_LINE} at most", kind = of.kind, namespace = of.namespace, name = of.name)]
pub struct TooLong {
    /// What it is about.
    pub of: Object,
    /// How much it would take.
    pub bytes: usize,
}

/// What is written: an entry and its place in the chain. The order of the members is the order on the line.
#[derive(Deserialize, Serialize)]
struct Line {
    sequence: u64,
    previous: Digest,
    time: Timestamp,
    actor: String,
    verb: Verb,
    object: Object,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    root: Option<String>,
    #[serde(default, skip_serializing_if = "is_first")]
    occasion: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_first(occasion: &u64) -> bool {
    *occasion == 0
}

/// Adds the line of `entry` to `segment`, which ends at `head`; the new end.
///
/// # Errors
/// An entry that is larger than a line can be.
pub fn append(segment: &mut Vec<u8>, head: Head, entry: &Entry) -> Result<Head, TooLong> {
    let line = Line {
        sequence: head.count + 1,
        previous: head.hash,
        time: entry.time,
        actor: entry.actor.clone(),
        verb: entry.verb,
        object: entry.object.clone(),
        root: entry.root.clone(),
        occasion: entry.occasion,
    };
    let text = serde_json::to_vec(&line).expect("string keys only");
    if text.len() > MAX_LINE {
        return Err(TooLong { of: line.object, bytes: text.len() });
    }
    segment.extend_from_slice(&text);
    segment.push(b'\n');
    Ok(head.after(&text))
}

/// Whether a line can hold it.
///
/// # Errors
/// That none can.
pub fn fits(entry: &Entry) -> Result<(), TooLong> {
    append(&mut Vec::new(), Head::EMPTY, entry).map(drop)
}

/// Follows a chain from its beginning, segment by segment, and looks out for heads that somebody has written down.
#[derive(Clone, Debug)]
pub struct Verifier {
    head: Head,
    /// Heads that must be passed.
    awaited: Vec<Head>,
}

impl Default for Verifier {
    fn default() -> Self {
        Self::awaiting([])
    }
}

impl Verifier {
    /// One that must pass all of these.
    pub fn awaiting(heads: impl IntoIterator<Item = Head>) -> Self {
        Self::from(Head::EMPTY, heads)
    }

    fn from(head: Head, heads: impl IntoIterator<Item = Head>) -> Self {
        Self { head, awaited: heads.into_iter().filter(|awaited| *awaited != head).collect() }
    }

    /// The entries of the next segment.
    ///
    /// # Errors
    /// The first line that does not follow from the one before it.
    pub fn segment(&mut self, segment: &[u8]) -> Result<Vec<Entry>, Broken> {
        let mut entries = Vec::new();
        let mut rest = segment;
        while !rest.is_empty() {
            let broken = |problem| Broken { line: self.head.count + 1, problem };
            let end = rest.iter().take(MAX_LINE + 1).position(|byte| *byte == b'\n');
            let end = end.ok_or_else(|| broken("it does not end"))?;
            let (text, after) = (&rest[..end], &rest[end + 1..]);
            rest = after;
            let line: Line = serde_json::from_slice(text).map_err(|_| broken("it is no line of an audit log"))?;
            if serde_json::to_vec(&line).ok().as_deref() != Some(text) {
                return Err(broken("it is not written as it is written here"));
            }
            if line.sequence != self.head.count + 1 {
                return Err(broken("it has the number of another line"));
            }
            if line.previous != self.head.hash {
                return Err(broken("it does not follow from the line before it"));
            }
            self.head = self.head.after(text);
            let head = self.head;
            if self.awaited.iter().any(|awaited| awaited.count == head.count && awaited.hash != head.hash) {
                return Err(Broken { line: head.count, problem: "it was another when it was written down elsewhere" });
            }
            self.awaited.retain(|awaited| *awaited != head);
            entries.push(Entry {
                time: line.time,
                actor: line.actor,
                verb: line.verb,
                object: line.object,
                root: line.root,
                occasion: line.occasion,
            });
        }
        Ok(entries)
    }

    /// The end, when all segments were shown.
    ///
    /// # Errors
    /// That a head was awaited which lies behind the end.
    pub fn end(self) -> Result<Head, Broken> {
        match self.awaited.iter().map(|awaited| awaited.count).max() {
            Some(_) => Err(Broken { line: self.head.count + 1, problem: "it is missing: there were more lines once" }),
            None => Ok(self.head),
        }
    }
}

/// Where a segment begins and ends by its own word, and its entries: for whoever writes behind it.
///
/// # Errors
/// A line that is none, or does not follow from the one before it in this segment.
pub(crate) fn tail(segment: &[u8]) -> Result<(Head, Head, Vec<Entry>), Broken> {
    let first = segment.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let broken = Broken { line: 1, problem: "the segment has no first line" };
    let first: Line = serde_json::from_slice(&first[..first.len().min(MAX_LINE)]).map_err(|_| broken.clone())?;
    let count = first.sequence.checked_sub(1).ok_or(broken)?;
    let begin = Head { count, hash: first.previous };
    let mut verifier = Verifier::from(begin, []);
    let entries = verifier.segment(segment)?;
    Ok((begin, verifier.head, entries))
}

/// Checks the promises of the decoder on any bytes, for fuzzing: what it accepts has one encoding.
///
/// # Panics
/// When a promise is broken.
pub fn check(input: &[u8]) {
    let Ok(entries) = Verifier::default().segment(input) else { return };
    let (mut again, mut head) = (Vec::new(), Head::EMPTY);
    for entry in &entries {
        head = append(&mut again, head, entry).expect("what was read can be written");
    }
    assert_eq!(again, input, "a chain has one encoding");
}
