//! The rules of commits, approvals and notes, for people. The schemas say them too, but old API servers drop what they
//! cannot check. Pure.

use aether_api::commit::{ExportTarget, History};
use aether_api::{AetherApprovalSpec, AetherCommitSpec, AetherNoteSpec, AetherSourceSpec};

/// The longest path of an export, and the longest name in it.
const LONGEST_PATH: usize = 512;
const LONGEST_PART: usize = 200;
/// The longest name of a tree.
const LONGEST_ROOT: usize = 128;
/// How the committer calls a directory that is not complete, and begins its records in a bucket.
const PARTIAL: &str = ".partial";
const RECORD: &str = ".aether-export";

/// The first rule that a commit of this name breaks by itself.
pub fn commit(name: &str, spec: &AetherCommitSpec) -> Option<String> {
    match (&spec.checkpoint, &spec.session) {
        (None, None) => return Some("spec says not what to commit: say exactly one of checkpoint and session".into()),
        (Some(_), Some(_)) => {
            return Some("spec says both a checkpoint and a session: say exactly one of them".into());
        }
        (Some(name), None) | (None, Some(name)) if name.is_empty() => {
            return Some("the checkpoint or session to commit has an empty name".into());
        }
        _ => {}
    }
    let target = &spec.target;
    match [target.git.is_some(), target.promote.is_some(), target.export.is_some()].into_iter().filter(|it| *it).count()
    {
        0 => return Some("spec.target says not where to: say exactly one of git, promote and export".into()),
        1 => {}
        _ => {
            return Some(
                "spec.target says more than one place to go to: say exactly one of git, promote and export".into(),
            );
        }
    }
    if let Some(export) = &target.export {
        if export.to.is_empty() {
            return Some("spec.target.export.to is empty: name a place of the source's spec.review.exports".into());
        }
        return match export.path.as_deref() {
            Some(path) => folder(path).map(|why| format!("spec.target.export.path {path:?} {why}")),
            None => folder(name).map(|why| {
                format!(
                    "the commit's name is the folder of its export, but {name:?} {why}: say spec.target.export.path"
                )
            }),
        };
    }
    let git = target.git.as_ref()?;
    if git.message.trim().is_empty() {
        return Some("spec.target.git.message is empty: say what the commit does".into());
    }
    branch(&git.branch).map(|why| format!("spec.target.git.branch {:?} {why}", git.branch))
}

/// Why git would not take this as the short name of a branch; see git-check-ref-format(1).
fn branch(name: &str) -> Option<&'static str> {
    let bad = |c: char| c.is_control() || c == ' ' || "~^:?*[\\".contains(c);
    if name.is_empty() {
        return Some("is empty");
    }
    if name.starts_with("refs/") {
        return Some("begins with refs/: say the branch by its short name");
    }
    if name.starts_with('-') || name == "@" || name.contains(bad) || name.contains("..") || name.contains("@{") {
        return Some("is not a name that git takes for a branch");
    }
    let part = |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with('.') || part.ends_with(".lock");
    name.split('/').any(part).then_some("is not a name that git takes for a branch")
}

/// Why this is not the name of a folder in a place of exports. One that is not complete yet is called `.partial`, which has to fit too.
pub(crate) fn folder(path: &str) -> Option<&'static str> {
    if path.len() > LONGEST_PATH || path.split('/').any(|part| part.len() > LONGEST_PART) {
        return Some("is too long: 512 bytes are the most, and 200 between two slashes");
    }
    if path.split('/').any(|part| ["", ".", ".."].contains(&part)) || path.contains(char::is_control) {
        return Some("is not a folder: say names with one slash between them, relative and without ..");
    }
    path.split('/')
        .any(|part| part.ends_with(PARTIAL) || part.starts_with(RECORD))
        .then_some("has a name in it that Aether keeps for exports that are not complete yet")
}

/// The first rule that an approval breaks by itself.
pub fn approval(spec: &AetherApprovalSpec) -> Option<String> {
    if spec.commit.is_empty() {
        return Some("spec.commit is empty: name an AetherCommit of this namespace".into());
    }
    if spec.root.is_empty() {
        return Some("spec.root is empty: say status.root of the commit, the tree that you have seen".into());
    }
    (spec.root.len() > LONGEST_ROOT).then(|| {
        format!("spec.root is no tree, of which none has more than {LONGEST_ROOT} bytes: say status.root of the commit")
    })
}

/// The first rule that a note breaks by itself.
pub fn note(spec: &AetherNoteSpec) -> Option<String> {
    if spec.checkpoint.is_empty() || spec.path.is_empty() {
        return Some("a note says spec.checkpoint and spec.path".into());
    }
    if spec.text.trim().is_empty() {
        return Some("spec.text is empty: say what there is to say".into());
    }
    let lines = spec.lines.as_ref()?;
    (lines.from < 1 || lines.to < lines.from)
        .then(|| format!("spec.lines {}..{} are none: from is 1 or more, and not behind to", lines.from, lines.to))
}

/// Why the source takes no commit to this target.
pub fn fits(commit: &AetherCommitSpec, source: &AetherSourceSpec) -> Option<String> {
    if let Some(export) = &commit.target.export {
        return elsewhere(export, source);
    }
    let git = commit.target.git.as_ref()?;
    if source.git.is_none() {
        return Some("the source is no git repository: say spec.target.promote".into());
    }
    let rule = source.review.clone().unwrap_or_default();
    if git.history == History::Keep && !rule.keep_history {
        return Some(
            "the source takes no commits that were made in a session: say Squash in spec.target.git.history, or have spec.review.keepHistory set on the source"
                .into(),
        );
    }
    let allowed = &rule.branches;
    let takes = allowed.is_empty() || allowed.iter().any(|pattern| matches(pattern, &git.branch));
    (!takes)
        .then(|| format!("branch {:?} is not one that the source takes commits to: {}", git.branch, allowed.join(", ")))
}

/// Why the source does not let anything out to there.
fn elsewhere(export: &ExportTarget, source: &AetherSourceSpec) -> Option<String> {
    let places = source.review.as_ref().map_or(&[][..], |rule| &rule.exports);
    let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
    if names.contains(&export.to.as_str()) {
        return None;
    }
    let to = &export.to;
    Some(match names[..] {
        [] => format!(
            "the source lets nothing out by export: who keeps it has to add a place called {to} to its spec.review.exports, as {{name: {to}, claim: {{name: CLAIM}}}} or {{name: {to}, s3: {{bucket: BUCKET, secretRef: {{name: SECRET}}}}}}"
        ),
        _ => format!("{to:?} is not a place that the source has for exports: it has {}", names.join(", ")),
    })
}

/// Whether the pattern is good for the name: `**` for any text, `*` for any without `/`.
fn matches(pattern: &str, name: &str) -> bool {
    if let Some(rest) = pattern.strip_prefix("**") {
        return ends(name, true).any(|end| matches(rest, &name[end..]));
    }
    if let Some(rest) = pattern.strip_prefix('*') {
        return ends(name, false).any(|end| matches(rest, &name[end..]));
    }
    match pattern.chars().next() {
        None => name.is_empty(),
        Some(first) => name.strip_prefix(first).is_some_and(|name| matches(&pattern[first.len_utf8()..], name)),
    }
}

/// Where each beginning of the name ends that a star may stand for.
fn ends(name: &str, slashes: bool) -> impl Iterator<Item = usize> {
    let part = name.char_indices().take_while(move |(_, c)| slashes || *c != '/');
    std::iter::once(0).chain(part.map(|(at, c)| at + c.len_utf8()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::commit::{ExportTarget, GitTarget, PromoteTarget, Target};
    use aether_api::note::Lines;
    use aether_api::review::{ExportPlace, ReviewRule};
    use aether_api::source::GitSource;

    fn git(branch: &str) -> AetherCommitSpec {
        let git = GitTarget { branch: branch.into(), message: "mend".into(), ..GitTarget::default() };
        AetherCommitSpec {
            session: Some("fix".into()),
            target: Target { git: Some(git), ..Target::default() },
            ..AetherCommitSpec::default()
        }
    }

    fn to(place: &str, path: Option<&str>) -> Target {
        let export = ExportTarget { to: place.into(), path: path.map(Into::into) };
        Target { export: Some(export), ..Target::default() }
    }

    fn commit(spec: &AetherCommitSpec) -> Option<String> {
        super::commit("fix", spec)
    }

    #[test]
    fn a_commit_says_one_thing_and_one_place() {
        assert_eq!(commit(&git("main")), None);
        let broken = |change: fn(&mut AetherCommitSpec), word: &str| {
            let mut spec = git("main");
            change(&mut spec);
            let said = commit(&spec).expect(word);
            assert!(said.contains(word), "{said}");
        };
        broken(|spec| spec.checkpoint = Some("c".into()), "both");
        broken(|spec| spec.session = None, "exactly one of checkpoint and session");
        broken(|spec| spec.session = Some(String::new()), "empty name");
        broken(|spec| spec.target.git = None, "not where to");
        broken(|spec| spec.target.promote = Some(PromoteTarget {}), "more than one");
        broken(|spec| spec.target = to("", None), "export.to is empty");
        broken(|spec| spec.target = to("results", Some("../others")), "without ..");
        broken(|spec| spec.target.git.as_mut().unwrap().message = " \n".into(), "message");
    }

    #[test]
    fn an_export_goes_below_its_place() {
        let said = |path: &str| {
            commit(&AetherCommitSpec {
                target: to("results", Some(path)),
                session: Some("s".into()),
                ..Default::default()
            })
        };
        for good in ["fix", "team/one", "a.b/..c", "ä b", "-x", ".hidden", "a/".repeat(255).trim_end_matches('/')] {
            assert_eq!(said(good), None, "{good}");
        }
        let (long, longer) = ("a".repeat(201), "aa/".repeat(200));
        for bad in [
            "",
            "/",
            "/etc",
            "a/",
            "a//b",
            ".",
            "a/.",
            "..",
            "a/../b",
            "../a",
            "a\nb",
            "a\0b",
            "a.partial",
            "a.partial/b",
            ".aether-export.json",
            &long,
            &longer,
        ] {
            assert!(said(bad).is_some(), "{bad:?}");
        }
        // The folder is called like the commit when nobody says it.
        let by_name = |name: &str, path| {
            let spec =
                AetherCommitSpec { target: to("results", path), session: Some("s".into()), ..Default::default() };
            super::commit(name, &spec)
        };
        assert_eq!(by_name("results", None), None);
        let refused = by_name("results.partial", None).unwrap();
        assert!(refused.contains("results.partial") && refused.contains("say spec.target.export.path"), "{refused}");
        assert!(by_name(&long, None).is_some());
        assert_eq!(by_name("results.partial", Some("results")), None);
        assert_eq!(super::commit("results.partial", &git("main")), None);
    }

    #[test]
    fn a_source_says_to_which_places_it_lets_something_out() {
        let spec = |name: &str| AetherCommitSpec { target: to(name, None), ..AetherCommitSpec::default() };
        let mut source = AetherSourceSpec { git: Some(GitSource::default()), ..Default::default() };
        for said in [fits(&spec("results"), &source), {
            source.review = Some(ReviewRule::default());
            fits(&spec("results"), &source)
        }] {
            let said = said.unwrap();
            assert!(said.contains("spec.review.exports") && said.contains("name: results, claim:"), "{said}");
        }
        let place = ExportPlace { name: "results".into(), ..ExportPlace::default() };
        source.review.as_mut().unwrap().exports = vec![place];
        assert_eq!(fits(&spec("results"), &source), None);
        assert!(fits(&spec("result"), &source).unwrap().contains("it has results"));
    }

    #[test]
    fn a_branch_is_one_that_git_takes() {
        for good in ["main", "agents/fix-7", "a.b", "ä"] {
            assert_eq!(commit(&git(good)), None, "{good}");
        }
        for bad in
            ["", "refs/heads/main", "-f", "a..b", "a b", "a/.b", "a//b", "/a", "a/", "a.lock", "a:b", "a\nb", "@{x"]
        {
            assert!(commit(&git(bad)).is_some(), "{bad}");
        }
    }

    #[test]
    fn a_source_says_which_branches_it_takes() {
        let mut source = AetherSourceSpec { git: Some(GitSource::default()), ..Default::default() };
        assert_eq!(fits(&git("main"), &source), None);
        let branches = ["agents/*", "wip/**", "release-*"].map(String::from).to_vec();
        source.review = Some(ReviewRule { branches, ..ReviewRule::default() });
        for good in ["agents/a", "wip/a/b", "release-1", "release-"] {
            assert_eq!(fits(&git(good), &source), None, "{good}");
        }
        for bad in ["main", "agents/a/b", "xagents/a", "release-1/a", "wip"] {
            assert!(fits(&git(bad), &source).unwrap().contains("agents/*"), "{bad}");
        }
        let mut kept = git("agents/a");
        kept.target.git.as_mut().unwrap().history = History::Keep;
        assert!(fits(&kept, &source).unwrap().contains("keepHistory"));
        source.review.as_mut().unwrap().keep_history = true;
        assert_eq!(fits(&kept, &source), None);
        source.git = None;
        assert!(fits(&git("agents/a"), &source).unwrap().contains("no git repository"));
    }

    #[test]
    fn approvals_and_notes_name_what_they_speak_of() {
        let mut spec = AetherApprovalSpec { commit: "c".into(), ..Default::default() };
        assert!(approval(&spec).unwrap().contains("status.root"));
        spec.root = "aa/1".into();
        assert_eq!(approval(&spec), None);
        let mut spec =
            AetherNoteSpec { checkpoint: "c".into(), path: "a".into(), text: "why?".into(), ..Default::default() };
        assert_eq!(note(&spec), None);
        spec.lines = Some(Lines { from: 2, to: 1 });
        assert!(note(&spec).unwrap().contains("2..1"));
    }
}
