//! A whole life of a session: a base, operations, unmounts, and further sessions on the result.

use std::fmt;
use std::fs;
use std::path::Path;

use aether_cas::tree::{diff, same_tree};
use aether_cas::{Blob, MemoryStore};
use aether_engine::upper::Interpretation;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::operation::{self, Listing, Operation};
use super::session::{Session, scanned};

/// One step.
#[derive(Clone, Debug)]
pub enum Step {
    /// On the base, before there is a session.
    Base(Operation),
    /// In the session.
    Do(Operation),
    /// Unmount and mount again.
    Remount,
    /// Compare.
    Check,
    /// Compare, and start a session on the result.
    Next,
}

/// What went wrong, and the steps that led there.
pub struct Failure {
    why: String,
    steps: Vec<Step>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.why)?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

/// Runs the scenario that a seed stands for.
pub fn run(seed: u64, scratch: &Path, interpretation: Interpretation) -> Option<Failure> {
    let mut random = StdRng::seed_from_u64(seed);
    let (base, steps) = (random.random_range(5..30), random.random_range(5..35));
    let mut number = 0;
    let next = |root: &Path| {
        let listing = Listing::of(root);
        loop {
            number += 1;
            if number > base + steps {
                return None;
            }
            if number > base && number > 1 {
                match random.random_range(0..40) {
                    0 => return Some(Step::Next),
                    1 => return Some(Step::Remount),
                    2 => return Some(Step::Check),
                    _ => {}
                }
            }
            if let Some(operation) = operation::pick(&mut random, &listing) {
                return Some(if number <= base { Step::Base(operation) } else { Step::Do(operation) });
            }
        }
    };
    play(scratch, interpretation, next)
}

/// Takes steps out of a failure's list for as long as it still fails.
pub fn shrink(mut failure: Failure, scratch: &Path, interpretation: Interpretation) -> Failure {
    let mut size = failure.steps.len() / 2;
    while size > 0 {
        let mut from = 0;
        while from < failure.steps.len() {
            let mut fewer = failure.steps.clone();
            fewer.drain(from..(from + size).min(fewer.len()));
            let mut fewer = fewer.into_iter();
            match play(scratch, interpretation, |_| fewer.next()) {
                Some(smaller) => failure = smaller,
                None => from += size,
            }
        }
        size /= 2;
    }
    failure
}

/// Plays steps until there is none or a comparison fails.
fn play(
    scratch: &Path,
    interpretation: Interpretation,
    mut next: impl FnMut(&Path) -> Option<Step>,
) -> Option<Failure> {
    let store = MemoryStore::new();
    let base = scratch.join("base");
    fs::create_dir(&base).expect("make the base");
    let mut steps = Vec::new();
    let mut session: Option<Session> = None;
    let mut generation = 0;
    let mut mounted = |lower: Blob| {
        generation += 1;
        Session::new(&scratch.join(format!("session{generation}")), lower, &store)
    };

    let why = loop {
        let root = session.as_ref().map_or_else(|| base.clone(), Session::merged);
        let step = next(&root);
        steps.extend(step.clone());
        if let Some(Step::Base(operation)) = &step {
            operation.run(&base);
            continue;
        }
        let at = session.take().unwrap_or_else(|| mounted(scanned(&base, &store).expect("scan the base").root));
        match &step {
            Some(Step::Base(_)) => unreachable!("handled above"),
            Some(Step::Do(operation)) => operation.run(&at.merged()),
            Some(Step::Remount) => at.remount(),
            Some(Step::Check | Step::Next) | None => match compare(&at, &store, interpretation) {
                Ok(root) if matches!(step, Some(Step::Next)) => {
                    at.end();
                    let after = mounted(root);
                    let shown = scanned(&after.merged(), &store).expect("scan").root;
                    let same = same_tree(&root, &shown, &store).expect("compare");
                    let why = format!("a session on the tree does not show it:\n{}", differences(&root, &shown, &store));
                    session = Some(after);
                    if !same {
                        break Some(why);
                    }
                    continue;
                }
                Ok(_) => {}
                Err(why) => {
                    session = Some(at);
                    break Some(why);
                }
            },
        }
        session = Some(at);
        if step.is_none() {
            break None;
        }
    };
    if let Some(session) = session {
        session.end();
    }
    fs::remove_dir_all(&base).expect("remove the base");
    why.map(|why| Failure { why, steps })
}

/// Compares the tree of the upper with the merged view; returns it, or says in what they differ.
fn compare(session: &Session, store: &MemoryStore, interpretation: Interpretation) -> Result<Blob, String> {
    let tree = session.tree(store, interpretation).map_err(|error| format!("no tree of the upper: {error}"))?;
    let shown = scanned(&session.merged(), store).map_err(|error| format!("no tree of the merged view: {error}"))?;
    if !same_tree(&tree.root, &shown.root, store).expect("compare") {
        return Err(format!("merged view (new) is not the upper's tree (old):\n{}", differences(&tree.root, &shown.root, store)));
    }
    if tree.counts.skipped != shown.counts.skipped {
        return Err(format!("{} entries left out, {} by the scan", tree.counts.skipped, shown.counts.skipped));
    }
    Ok(tree.root)
}

fn differences(a: &Blob, b: &Blob, store: &MemoryStore) -> String {
    let changes = diff(a, b, store).expect("compare");
    changes.iter().map(|change| format!("    {change:?}\n")).collect()
}
