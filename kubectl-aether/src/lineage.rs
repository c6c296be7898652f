//! Sessions, their forks and their checkpoints as a tree, drawn as lines. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use aether_api::{AetherCheckpoint, AetherSession};
use kube::ResourceExt;

/// What a line of the tree stands for.
#[derive(Clone, Copy)]
pub(crate) enum Item<'a> {
    Session(&'a AetherSession),
    Checkpoint(&'a AetherCheckpoint),
}

/// One line: the branches in front of it and what it stands for.
pub(crate) struct Line<'a> {
    pub(crate) branches: String,
    pub(crate) item: Item<'a>,
}

/// The characters that branches are drawn with.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    tee: &'static str,
    corner: &'static str,
    bar: &'static str,
}

const UNICODE: Style = Style { tee: "├─ ", corner: "└─ ", bar: "│  " };
const ASCII: Style = Style { tee: "|- ", corner: "`- ", bar: "|  " };

impl Style {
    /// What the terminal can show, by the locale's variables; without any, everything.
    pub(crate) fn of_locale() -> Self {
        let set = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .filter_map(|name| std::env::var(name).ok())
            .find(|value| !value.is_empty());
        match set {
            Some(locale) if !locale.to_lowercase().replace('-', "").contains("utf8") => ASCII,
            _ => UNICODE,
        }
    }
}

/// The session that `session` came from: by the uid that was stamped, by name until then.
///
/// A session that has the parent's name but not its uid is another one, made after the parent was deleted.
pub(crate) fn parent<'a>(
    session: &AetherSession,
    sessions: &'a [AetherSession],
    checkpoints: &[AetherCheckpoint],
) -> Option<&'a AetherSession> {
    let namespace = session.namespace();
    let of_name = |name: &str, uid: Option<&str>| {
        sessions.iter().find(|other| {
            other.namespace() == namespace
                && other.name_any() == name
                && uid.is_none_or(|uid| other.uid().as_deref() == Some(uid))
        })
    };
    if let Some(name) = &session.spec.session {
        let stamped = session.status.as_ref().and_then(|status| status.forked_from.as_ref());
        return of_name(name, stamped.map(|forked| forked.uid.as_str()));
    }
    let name = session.spec.checkpoint.as_ref()?;
    let checkpoint =
        checkpoints.iter().find(|checkpoint| checkpoint.namespace() == namespace && checkpoint.name_any() == *name)?;
    of_name(&checkpoint.spec.session, checkpoint.status.as_ref().and_then(|status| status.session_uid.as_deref()))
}

/// The lines of the tree, parents first, siblings by age, then name. With `only`, the tree below that session.
pub(crate) fn lines<'a>(
    sessions: &'a [AetherSession],
    checkpoints: &'a [AetherCheckpoint],
    show_checkpoints: bool,
    only: Option<&str>,
    style: Style,
) -> Vec<Line<'a>> {
    let key = |session: &AetherSession| (session.namespace().unwrap_or_default(), session.name_any());
    let order = |session: &AetherSession| {
        (session.namespace(), session.metadata.creation_timestamp.clone().map(|time| time.0), session.name_any())
    };
    let mut children: HashMap<_, Vec<&AetherSession>> = HashMap::new();
    let mut roots = Vec::new();
    for session in sessions {
        match parent(session, sessions, checkpoints) {
            Some(parent) if !descends(parent, session, sessions, checkpoints) => {
                children.entry(key(parent)).or_default().push(session)
            }
            _ => roots.push(session),
        }
    }
    if let Some(name) = only {
        roots = sessions.iter().filter(|session| session.name_any() == name).collect();
    }
    roots.sort_by_key(|session| order(session));
    for list in children.values_mut() {
        list.sort_by_key(|session| order(session));
    }
    let mut kept: BTreeMap<_, Vec<&AetherCheckpoint>> = BTreeMap::new();
    if show_checkpoints {
        for checkpoint in checkpoints {
            kept.entry((checkpoint.namespace().unwrap_or_default(), checkpoint.spec.session.clone()))
                .or_default()
                .push(checkpoint);
        }
    }
    for list in kept.values_mut() {
        list.sort_by_key(|checkpoint| {
            (checkpoint.metadata.creation_timestamp.clone().map(|time| time.0), checkpoint.name_any())
        });
    }

    let mut lines = Vec::new();
    // What is still to be drawn, the next on top: the item, the branches of its children's lines, and its own.
    let mut todo: Vec<(Item<'a>, String, String)> =
        roots.iter().rev().map(|session| (Item::Session(session), String::new(), String::new())).collect();
    while let Some((item, below, branches)) = todo.pop() {
        lines.push(Line { branches, item });
        let Item::Session(session) = item else { continue };
        let own = kept.remove(&key(session)).unwrap_or_default().into_iter().map(Item::Checkpoint);
        let forks = children.remove(&key(session)).unwrap_or_default().into_iter().map(Item::Session);
        let below_items: Vec<Item<'a>> = own.chain(forks).collect();
        for (index, child) in below_items.iter().enumerate().rev() {
            let last = index + 1 == below_items.len();
            let own = format!("{below}{}", if last { style.corner } else { style.tee });
            let deeper = format!("{below}{}", if last { "   " } else { style.bar });
            todo.push((*child, deeper, own));
        }
    }
    if only.is_none() {
        // Checkpoints outlive their sessions.
        let orphans = kept
            .into_values()
            .flatten()
            .map(|checkpoint| Line { branches: String::new(), item: Item::Checkpoint(checkpoint) });
        lines.extend(orphans);
    }
    lines
}

/// Whether `session` is `ancestor` or came from it: specs can name each other in a circle, and a tree must still be drawn.
fn descends(
    session: &AetherSession,
    ancestor: &AetherSession,
    sessions: &[AetherSession],
    checkpoints: &[AetherCheckpoint],
) -> bool {
    let mut seen = HashSet::new();
    let mut next = Some(session);
    while let Some(session) = next {
        if std::ptr::eq(session, ancestor) {
            return true;
        }
        if !seen.insert(std::ptr::from_ref(session)) {
            return false;
        }
        next = parent(session, sessions, checkpoints);
    }
    false
}

#[cfg(test)]
mod tests {
    use aether_api::session::{Consistency, ForkedFrom, SourceReference};
    use aether_api::{AetherCheckpointSpec, AetherSessionSpec, AetherSessionStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn session(name: &str, parent: Option<(&str, &str)>) -> AetherSession {
        let spec = AetherSessionSpec {
            session: parent.map(|(name, _)| name.into()),
            source: parent.is_none().then(|| SourceReference { name: "linux".into(), ..Default::default() }),
            ..Default::default()
        };
        let mut session = AetherSession::new(name, spec);
        session.metadata.namespace = Some("demo".into());
        session.metadata.uid = Some(format!("uid-{name}"));
        session.status = parent.map(|(name, uid)| AetherSessionStatus {
            forked_from: Some(ForkedFrom {
                session: name.into(),
                uid: uid.into(),
                node: None,
                snapshot: None,
                time: Time("2026-01-01T00:00:00Z".parse().unwrap()),
                consistency: Consistency::PointInTime,
                frozen_microseconds: None,
                durable: true,
            }),
            ..Default::default()
        });
        session
    }

    fn checkpoint(name: &str, session: &str) -> AetherCheckpoint {
        let mut checkpoint =
            AetherCheckpoint::new(name, AetherCheckpointSpec { session: session.into(), ..Default::default() });
        checkpoint.metadata.namespace = Some("demo".into());
        checkpoint
    }

    fn draw(sessions: &[AetherSession], checkpoints: &[AetherCheckpoint], show: bool, only: Option<&str>) -> String {
        lines(sessions, checkpoints, show, only, UNICODE)
            .iter()
            .map(|line| match line.item {
                Item::Session(session) => format!("{}{}\n", line.branches, session.name_any()),
                Item::Checkpoint(checkpoint) => format!("{}*{}\n", line.branches, checkpoint.name_any()),
            })
            .collect()
    }

    #[test]
    fn forks_stand_below_their_parents() {
        let sessions = [
            session("b", Some(("a", "uid-a"))),
            session("a", None),
            session("c", Some(("b", "uid-b"))),
            session("d", Some(("a", "uid-a"))),
            session("z", None),
        ];
        assert_eq!(draw(&sessions, &[], false, None), "a\n├─ b\n│  └─ c\n└─ d\nz\n");
        assert_eq!(draw(&sessions, &[], false, Some("b")), "b\n└─ c\n");
        let kept = [checkpoint("k", "b"), checkpoint("orphan", "gone")];
        assert_eq!(draw(&sessions, &kept, true, None), "a\n├─ b\n│  ├─ *k\n│  └─ c\n└─ d\nz\n*orphan\n");
    }

    #[test]
    fn a_new_session_of_the_parents_name_is_not_the_parent() {
        let sessions = [session("a", None), session("b", Some(("a", "uid-of-the-deleted-a")))];
        assert_eq!(draw(&sessions, &[], false, None), "a\nb\n");
    }

    #[test]
    fn a_session_from_a_checkpoint_stands_below_the_checkpoints_session() {
        let mut again = session("again", None);
        again.spec.source = None;
        again.spec.checkpoint = Some("k".into());
        assert_eq!(draw(&[session("a", None), again], &[checkpoint("k", "a")], false, None), "a\n└─ again\n");
    }

    #[test]
    fn circles_are_drawn_once() {
        let mut a = session("a", Some(("b", "uid-b")));
        let mut b = session("b", Some(("a", "uid-a")));
        a.status = None;
        b.status = None;
        let text = draw(&[a, b], &[], false, None);
        assert_eq!((text.matches('a').count(), text.matches('b').count()), (1, 1), "{text}");
    }
}
