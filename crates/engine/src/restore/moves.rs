//! Which directories of the new tree are directories of the old one that were moved.
//!
//! A wrong guess costs renames and never correctness: whatever is matched is compared afterwards like a directory that
//! stayed in its place.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_cas::Blob;
use aether_cas::tree::{Directory, Name, Node};

use super::plan::{Old, Trees};
use crate::error::Result;
use crate::walk::join;

/// An entry that more directories than this have in common says nothing about which is which.
const TOO_COMMON: usize = 16;

/// Moved directories.
#[derive(Default)]
pub(super) struct Moves {
    /// New path -> the old directory.
    sources: HashMap<PathBuf, Old>,
    /// Old paths of moved directories.
    taken: HashSet<PathBuf>,
    /// Old directories that a moved one is taken out of, at any depth.
    disturbed: HashSet<PathBuf>,
}

/// A directory on one side of the difference.
struct Side {
    path: PathBuf,
    blob: Blob,
    directory: Arc<Directory>,
    /// It is at the same path on the other side too.
    paired: bool,
    matched: bool,
}

impl Moves {
    /// Looks for moved directories in what differs between the trees.
    pub(super) fn find(trees: Trees<'_>) -> Result<Self> {
        let (mut old, mut new) = differing(trees)?;
        let mut matches: Vec<(usize, usize)> = Vec::new();
        let (mut old_seen, mut new_seen) = (0, 0);
        // Level by level, so that a directory that moved as a whole is matched without being read to its ends.
        while old_seen < old.len() || new_seen < new.len() {
            match_equal(&mut old, &mut new, &mut matches);
            let (old_end, new_end) = (old.len(), new.len());
            expand(trees, &mut old, old_seen)?;
            expand(trees, &mut new, new_seen)?;
            (old_seen, new_seen) = (old_end, new_end);
        }
        match_similar(&mut old, &mut new, &mut matches);
        Ok(Self::from_matches(&old, &new, matches))
    }

    fn from_matches(old: &[Side], new: &[Side], mut matches: Vec<(usize, usize)>) -> Self {
        matches.sort_by_key(|(_, new_number)| new[*new_number].path.components().count());
        let mut moves = Self::default();
        for (old_number, new_number) in matches {
            let (old, new) = (&old[old_number], &new[new_number]);
            // It follows its parent; parents come first here.
            let natural = moves.natural(&new.path);
            if natural.as_deref() == Some(old.path.as_path()) {
                continue;
            }
            moves.taken.insert(old.path.clone());
            moves.disturbed.extend(old.path.ancestors().skip(1).map(Path::to_owned));
            moves.sources.insert(new.path.clone(), Old { path: old.path.clone(), blob: old.blob });
        }
        moves
    }

    /// Where the old tree has what is at a new path, if it is not moved itself but goes with its parent.
    pub(super) fn natural(&self, path: &Path) -> Option<PathBuf> {
        let moved = path.ancestors().skip(1).find_map(|above| Some((above, self.sources.get(above)?)));
        match moved {
            None => Some(path.to_owned()),
            Some((above, old)) => Some(old.path.join(path.strip_prefix(above).ok()?)),
        }
    }

    /// The moved directory that belongs at a new path.
    pub(super) fn source(&self, path: &Path) -> Option<&Old> {
        self.sources.get(path)
    }

    /// Old paths of all moved directories.
    pub(super) fn sources(&self) -> impl Iterator<Item = &PathBuf> {
        self.taken.iter()
    }

    /// Whether the directory at an old path is moved.
    pub(super) fn takes(&self, old: &Path) -> bool {
        self.taken.contains(old)
    }

    /// Whether something is moved out of the directory at an old path.
    pub(super) fn disturbs(&self, old: &Path) -> bool {
        self.disturbed.contains(old)
    }
}

/// The directories that differ: at the same path in both trees, or at the top of what only one of them has.
fn differing(trees: Trees<'_>) -> Result<(Vec<Side>, Vec<Side>)> {
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let side = |path: &Path, blob: Blob, paired| -> Result<Side> {
        Ok(Side { path: path.to_owned(), blob, directory: trees.read(&blob)?, paired, matched: false })
    };
    let mut todo = vec![(PathBuf::new(), trees.from, trees.to)];
    while let Some((path, a, b)) = todo.pop() {
        let (a, b) = (side(&path, a, true)?, side(&path, b, true)?);
        let subdirectory = |directory: &Directory, name: &Name| match directory.entries.get(name.as_bytes()) {
            Some(Node::Directory(blob)) => Some(*blob),
            _ => None,
        };
        let names: BTreeSet<&Name> =
            a.directory.subdirectories().chain(b.directory.subdirectories()).map(|(name, _)| name).collect();
        for name in names {
            let below = join(&path, name.as_bytes());
            match (subdirectory(&a.directory, name), subdirectory(&b.directory, name)) {
                (Some(a), Some(b)) if a != b => todo.push((below, a, b)),
                (Some(a), None) => old.push(side(&below, a, false)?),
                (None, Some(b)) => new.push(side(&below, b, false)?),
                _ => {}
            }
        }
        // The root never moves.
        if path.as_os_str().is_empty() {
            continue;
        }
        old.push(a);
        new.push(b);
    }
    Ok((old, new))
}

/// Matches directories that are equal to the last byte. Empty ones are cheaper made than moved.
fn match_equal(old: &mut [Side], new: &mut [Side], matches: &mut Vec<(usize, usize)>) {
    let mut available: HashMap<Blob, Vec<usize>> = HashMap::new();
    for (number, side) in old.iter().enumerate().rev() {
        if !side.matched && !side.directory.entries.is_empty() {
            available.entry(side.blob).or_default().push(number);
        }
    }
    for (new_number, wanted) in new.iter_mut().enumerate().filter(|(_, side)| !side.matched) {
        if let Some(old_number) = available.get_mut(&wanted.blob).and_then(Vec::pop) {
            wanted.matched = true;
            old[old_number].matched = true;
            matches.push((old_number, new_number));
        }
    }
}

/// Adds the subdirectories of those from `from` on that found no match and are at no common path.
fn expand(trees: Trees<'_>, sides: &mut Vec<Side>, from: usize) -> Result<()> {
    for number in from..sides.len() {
        if sides[number].matched || sides[number].paired {
            continue;
        }
        let (path, directory) = (sides[number].path.clone(), sides[number].directory.clone());
        for (name, blob) in directory.subdirectories() {
            let path = join(&path, name.as_bytes());
            sides.push(Side { path, blob, directory: trees.read(&blob)?, paired: false, matched: false });
        }
    }
    Ok(())
}

/// Matches directories that share at least half of their names, most alike first come first served from the top.
fn match_similar(old: &mut [Side], new: &mut [Side], matches: &mut Vec<(usize, usize)>) {
    let in_place: HashMap<PathBuf, usize> = old
        .iter()
        .enumerate()
        .filter(|(_, side)| side.paired)
        .map(|(number, side)| (side.path.clone(), number))
        .collect();
    let mut by_name: HashMap<&Name, Vec<usize>> = HashMap::new();
    let directories: Vec<Arc<Directory>> = old.iter().map(|side| side.directory.clone()).collect();
    for (number, directory) in directories.iter().enumerate() {
        directory.entries.keys().for_each(|name| by_name.entry(name).or_default().push(number));
    }

    // A directory that has something in common with the one in its place keeps that.
    let mut order: Vec<usize> = Vec::new();
    for (new_number, wanted) in new.iter_mut().enumerate().filter(|(_, side)| !side.matched) {
        let keeps = in_place.get(&wanted.path).copied().filter(|number| {
            let place = &old[*number];
            let empty = place.directory.entries.is_empty() || wanted.directory.entries.is_empty();
            !place.matched && (empty || likeness(&place.directory, &wanted.directory).0 > 0)
        });
        match keeps {
            Some(old_number) => {
                old[old_number].matched = true;
                wanted.matched = true;
            }
            None => order.push(new_number),
        }
    }
    order.sort_by_key(|number| new[*number].path.components().count());
    for new_number in order {
        let wanted = &new[new_number];
        let mut candidates: BTreeSet<usize> = BTreeSet::new();
        for name in wanted.directory.entries.keys() {
            let having = by_name.get(name).map_or(&[][..], Vec::as_slice);
            if having.len() <= TOO_COMMON {
                candidates.extend(having.iter().filter(|number| !old[**number].matched));
            }
        }
        let best = candidates
            .into_iter()
            .map(|number| (likeness(&old[number].directory, &wanted.directory), number))
            .filter(|((names, _), number)| {
                let larger = old[*number].directory.entries.len().max(wanted.directory.entries.len());
                names * 2 >= larger
            })
            .max_by_key(|((names, equal), number)| (*equal, *names, std::cmp::Reverse(*number)));
        if let Some((_, old_number)) = best {
            old[old_number].matched = true;
            new[new_number].matched = true;
            matches.push((old_number, new_number));
        }
    }
}

/// How many names two directories share, and how many equal entries.
fn likeness(a: &Directory, b: &Directory) -> (usize, usize) {
    let mut names = 0;
    let mut equal = 0;
    for (name, node) in &a.entries {
        if let Some(other) = b.entries.get(name.as_bytes()).filter(|other| other.same_kind(node)) {
            names += 1;
            equal += usize::from(other == node);
        }
    }
    (names, equal)
}
