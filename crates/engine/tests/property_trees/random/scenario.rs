//! A whole life of a session: a base, operations, unmounts, and further sessions on the result.

use std::fmt;
use std::fs;
use std::path::Path;

use aether_cas::tree::{diff, same_tree};
use aether_cas::{Blob, MemoryStore};
use aether_engine::restore;
use aether_engine::upper::Interpretation;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::operation::{self, Listing, Operation};
use super::session::{OWNER, Session, scanned};
use crate::random;

/// One step.
#[derive(Clone, Debug)]
pub(crate) enum Step {
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
    /// Compare, restore to the tree of an earlier comparison, and compare again.
    Restore(usize),
}

/// How often out of forty there is a step of another kind than an operation: in order to compare, and to restore.
#[derive(Clone, Copy)]
pub(crate) struct Habits {
    pub(crate) checks: u32,
    pub(crate) restores: u32,
}

/// What went wrong, and the steps that led there.
pub(crate) struct Failure {
    pub(crate) why: String,
    steps: Vec<Step>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.why)?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

/// Runs as many seeds as the environment asks for; a failure is shrunk and ends the test.
pub(crate) fn must_hold(habits: Habits) {
    let right = Interpretation::default();
    let failed = match random::number("AETHER_SEED") {
        Some(seed) => random::alone(|scratch| run(seed, scratch, habits, right)).map(|failure| (seed, failure)),
        None => {
            let seeds = random::number("AETHER_SEEDS").unwrap_or(2000);
            random::search(seeds, |seed, scratch| run(seed, scratch, habits, right))
        }
    };
    if let Some((seed, failure)) = failed {
        let shrunk = random::alone(|scratch| shrink(failure, scratch, right));
        panic!("AETHER_SEED={seed}: {shrunk}");
    }
}

/// Runs the scenario that a seed stands for.
pub(crate) fn run(seed: u64, scratch: &Path, habits: Habits, interpretation: Interpretation) -> Option<Failure> {
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
                    dice if dice < 2 + habits.checks => return Some(Step::Check),
                    dice if dice < 2 + habits.checks + habits.restores => {
                        return Some(Step::Restore(random.random_range(0..100)));
                    }
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
fn shrink(mut failure: Failure, scratch: &Path, interpretation: Interpretation) -> Failure {
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
    let mut trees = Vec::new();
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
        let at = session.take().unwrap_or_else(|| {
            trees.push(scanned(&base, &store).expect("scan the base").root);
            mounted(trees[0])
        });
        match &step {
            Some(Step::Base(_)) => unreachable!("handled above"),
            Some(Step::Do(operation)) => operation.run(&at.merged()),
            Some(Step::Remount) => at.remount(),
            Some(Step::Restore(number)) => {
                let target = trees[number % trees.len()];
                if let Err(why) = restore(&at, target, &store, interpretation) {
                    session = Some(at);
                    break Some(why);
                }
            }
            Some(Step::Check | Step::Next) | None => match compare(&at, &store, interpretation) {
                Ok(root) if matches!(step, Some(Step::Next)) => {
                    at.end();
                    let after = mounted(root);
                    let shown = scanned(&after.merged(), &store).expect("scan").root;
                    let same = same_tree(&root, &shown, &store).expect("compare");
                    let why =
                        format!("a session on the tree does not show it:\n{}", differences(&root, &shown, &store));
                    session = Some(after);
                    if !same {
                        break Some(why);
                    }
                    continue;
                }
                Ok(root) => trees.push(root),
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
        return Err(format!(
            "merged view (new) is not the upper's tree (old):\n{}",
            differences(&tree.root, &shown.root, store)
        ));
    }
    if tree.counts.skipped != shown.counts.skipped {
        return Err(format!("{} entries left out, {} by the scan", tree.counts.skipped, shown.counts.skipped));
    }
    Ok(tree.root)
}

/// Restores a session in place; it must then show the target.
fn restore(session: &Session, target: Blob, store: &MemoryStore, interpretation: Interpretation) -> Result<(), String> {
    let before = compare(session, store, interpretation)?;
    let plan = restore::plan(&before, &target, store).map_err(|error| format!("no plan: {error}"))?;
    plan.apply(&session.merged(), OWNER, store, None).map_err(|error| format!("not applied: {error}\n{plan:#?}"))?;
    let after = compare(session, store, interpretation)?;
    restore::verify(&after, &target, store).map_err(|error| {
        let differences = differences(&target, &after, store);
        format!("{error}\nrestored (new) is not the target (old):\n{differences}{plan:#?}")
    })
}

fn differences(a: &Blob, b: &Blob, store: &MemoryStore) -> String {
    let changes = diff(a, b, store).expect("compare");
    changes.iter().map(|change| format!("    {change:?}\n")).collect()
}
