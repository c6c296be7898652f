//! The tree computed from an upper equals the merged view read file by file.
//!
//! Random operations run through a real overlay mount on a random base; then the tree that [`aether_engine::upper`]
//! computes from the upper alone is compared with what [`aether_engine::scan`] reads through the mount. Sessions are
//! unmounted and mounted again in between, and their result becomes the base of a next one.
//!
//! Each rule by which an upper is read is also replaced by a wrong one, and the comparison must notice.

use aether_engine::upper::Interpretation;
use aether_engine::upper::interpretation::{Marks, Origin, Shown};
use rustix::fs::FileType;

use crate::random;
use crate::random::scenario::{self, Failure, Habits};

/// Seeds within which each broken rule must be noticed.
const TEETH: u64 = 300;

const HABITS: Habits = Habits { checks: 1, restores: 0 };

#[test]
fn the_tree_of_an_upper_is_what_the_merged_view_shows() {
    scenario::must_hold(HABITS);
}

#[test]
fn an_overlooked_whiteout_is_noticed() {
    fn shown(marks: &Marks) -> Shown {
        if marks.kind == FileType::CharacterDevice { Shown::Lower } else { Shown::Upper }
    }
    must_notice("whiteouts are overlooked", Interpretation { shown, ..Default::default() });
}

#[test]
fn an_ignored_opaque_mark_is_noticed() {
    let directory = |marks: &Marks| (Interpretation::default().directory)(&Marks { opaque: false, ..marks.clone() });
    must_notice("opaque directories are merged", Interpretation { directory, ..Default::default() });
}

#[test]
fn an_ignored_redirect_is_noticed() {
    let directory = |marks: &Marks| {
        if marks.opaque { Origin::Nowhere } else { Origin::SameName }
    };
    must_notice("directories are looked up under their new name", Interpretation { directory, ..Default::default() });
}

#[test]
fn a_bare_redirect_taken_for_a_path_is_noticed() {
    let directory = |marks: &Marks| match (Interpretation::default().directory)(marks) {
        Origin::Sibling(name) => Origin::Path([b"/", name.as_slice()].concat()),
        origin => origin,
    };
    must_notice("a bare name starts at the root", Interpretation { directory, ..Default::default() });
}

#[test]
fn an_ignored_metacopy_mark_is_noticed() {
    must_notice(
        "a metacopy file's content is read from the upper",
        Interpretation { content: |_| Origin::Nowhere, ..Default::default() },
    );
}

#[test]
fn a_metacopy_file_without_its_redirect_is_noticed() {
    let content = |marks: &Marks| {
        if marks.metacopy { Origin::SameName } else { Origin::Nowhere }
    };
    must_notice("a metacopy file's redirect is ignored", Interpretation { content, ..Default::default() });
}

#[test]
fn a_leftover_redirect_taken_for_a_metacopy_is_noticed() {
    let content = |marks: &Marks| {
        let taken = Marks { metacopy: marks.metacopy || marks.redirect.is_some(), ..marks.clone() };
        (Interpretation::default().content)(&taken)
    };
    must_notice("a redirect alone makes a metacopy", Interpretation { content, ..Default::default() });
}

/// A wrong rule must make some seed fail, else the comparison proves nothing about the right one.
fn must_notice(rule: &str, wrong: Interpretation) {
    let found = first_failure(TEETH, wrong);
    let Some((seed, failure)) = found else { panic!("{rule}: {TEETH} seeds did not notice") };
    println!("{rule}: noticed at seed {seed}: {}", failure.why);
}

/// Runs seeds on every core until one fails.
fn first_failure(seeds: u64, interpretation: Interpretation) -> Option<(u64, Failure)> {
    random::search(seeds, |seed, scratch| scenario::run(seed, scratch, HABITS, interpretation))
}
