//! Objects as typed: `NAME`, `KIND/NAME` or `KIND NAME…`, and the kinds' names.

use anyhow::{Result, bail};

/// The kinds that commands take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Source,
    Session,
    Checkpoint,
    Restore,
    Command,
    Commit,
    Approval,
    Note,
}

/// Every kind with its full, plural and short names beside its word.
const KINDS: [(Kind, &str, &str); 8] = [
    (Kind::Source, "source", "asrc"),
    (Kind::Session, "session", "asess"),
    (Kind::Checkpoint, "checkpoint", "ackpt"),
    (Kind::Restore, "restore", "arst"),
    (Kind::Command, "command", "acmd"),
    (Kind::Commit, "commit", "acmt"),
    (Kind::Approval, "approval", "aappr"),
    (Kind::Note, "note", "anote"),
];

impl Kind {
    pub(crate) fn word(self) -> &'static str {
        KINDS.iter().find(|(kind, ..)| *kind == self).map_or("", |(_, word, _)| word)
    }

    /// Takes `session`, `sessions`, `aethersession`, `aethersessions.aether.dev`, `asess`, …
    pub(crate) fn of(text: &str) -> Option<Self> {
        let text = text.to_lowercase();
        let bare = text.strip_suffix(".aether.dev").unwrap_or(&text);
        let bare = bare.strip_prefix("aether").unwrap_or(bare);
        let found = KINDS
            .iter()
            .find(|(_, word, short)| bare == *word || bare.strip_suffix('s') == Some(word) || text == *short);
        found.map(|(kind, ..)| *kind)
    }
}

/// The objects that were typed. A first word that is a kind speaks for all that follow it.
pub(crate) fn objects(words: &[String]) -> Result<Vec<(Kind, String)>> {
    let (common, words) = match words {
        [first, rest @ ..] if !rest.is_empty() && Kind::of(first).is_some() => (Kind::of(first), rest),
        _ => (None, words),
    };
    words
        .iter()
        .map(|word| match word.split_once('/') {
            Some((kind, name)) if common.is_none() && !name.is_empty() => match Kind::of(kind) {
                Some(kind) => Ok((kind, name.to_owned())),
                None => bail!(
                    "{kind:?} is no kind: say source, session, checkpoint, restore, command, commit, approval or note"
                ),
            },
            Some(_) => bail!("{word:?} is no object: say NAME, KIND/NAME or KIND NAME"),
            None => Ok((common.unwrap_or(Kind::Session), word.clone())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[&str]) -> Result<Vec<(Kind, String)>> {
        objects(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn forms_of_objects() {
        assert_eq!(of(&["a"]).unwrap(), [(Kind::Session, "a".into())]);
        // One word is a name even if it is also a kind.
        assert_eq!(of(&["source"]).unwrap(), [(Kind::Session, "source".into())]);
        assert_eq!(of(&["checkpoint/k", "a"]).unwrap(), [(Kind::Checkpoint, "k".into()), (Kind::Session, "a".into())]);
        assert_eq!(of(&["ackpt", "k", "l"]).unwrap(), [(Kind::Checkpoint, "k".into()), (Kind::Checkpoint, "l".into())]);
        assert_eq!(of(&["AetherSessions.aether.dev/a"]).unwrap(), [(Kind::Session, "a".into())]);
        for bad in [&["pod/a"][..], &["session/"], &["session", "session/a"]] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }
}
