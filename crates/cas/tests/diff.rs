//! What changed between two trees, and at what cost.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use aether_cas::{
    Blob, StoreError,
    testing::file,
    tree::{
        Attributes, Change, ChangeKind, Directories, Directory, MemoryDirectories, Mtime, Name, Node, diff, same_tree,
        summary, walk,
    },
};
use proptest::{collection, prelude::*};

/// A tree as plain data: what is at each path.
type Model = BTreeMap<PathBuf, Item>;

#[derive(Clone, Debug, PartialEq)]
enum Item {
    Directory(u32),
    Node(Node),
}

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, ..Default::default() }
}

/// Builds the directories of a model, whose key "" is the root.
fn build(model: &Model, into: &MemoryDirectories) -> Blob {
    fn at(model: &Model, path: &PathBuf, into: &MemoryDirectories) -> Blob {
        let Some(Item::Directory(mode)) = model.get(path) else { panic!("{path:?} is no directory") };
        let children = model.iter().filter(|(p, _)| p.parent() == Some(path.as_path()));
        let entries = children.map(|(p, item)| {
            let name = Name::try_from(p.file_name().unwrap()).unwrap();
            match item {
                Item::Directory(_) => (name, Node::Directory(at(model, p, into))),
                Item::Node(node) => (name, node.clone()),
            }
        });
        into.insert(Directory { attributes: attributes(*mode), entries: entries.collect() })
    }
    at(model, &PathBuf::new(), into)
}

fn content(text: &str) -> Item {
    Item::Node(file(Blob::of(text.as_bytes())))
}

fn base() -> Model {
    let mut model = Model::from([(PathBuf::new(), Item::Directory(0o755))]);
    for d in 0..20 {
        model.insert(format!("d{d:02}").into(), Item::Directory(0o755));
        for e in 0..10 {
            model.insert(format!("d{d:02}/e{e}").into(), Item::Directory(0o755));
            for f in 0..3 {
                model.insert(format!("d{d:02}/e{e}/f{f}").into(), content(&format!("{d}{e}{f}")));
            }
        }
    }
    model
}

struct Counting<'a>(&'a MemoryDirectories, AtomicUsize);

impl Directories for Counting<'_> {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.directory(blob)
    }
}

fn paths(changes: &[Change]) -> Vec<(&str, &str)> {
    changes
        .iter()
        .map(|change| {
            let kind = match change.kind {
                ChangeKind::Added => "A",
                ChangeKind::Removed => "R",
                ChangeKind::Modified { content: true, .. } => "C",
                ChangeKind::Modified { attributes: true, .. } => "M",
                ChangeKind::Modified { .. } => "L",
            };
            (kind, change.path.to_str().unwrap())
        })
        .collect()
}

#[test]
fn lists_each_kind_of_change_in_order() {
    let directories = MemoryDirectories::new();
    let old = base();
    let mut new = old.clone();
    new.insert("d00/e0/f0".into(), content("changed"));
    new.remove(&PathBuf::from("d00/e0/f1"));
    new.insert("d00/e0/f9".into(), content("new"));
    new.insert("d01/e3".into(), Item::Directory(0o700));
    // A directory becomes a file, a file becomes a directory.
    new.retain(|path, _| !path.starts_with("d02/e5"));
    new.insert("d02/e5".into(), content("file now"));
    new.insert("d03/e0/f2".into(), Item::Directory(0o755));
    new.insert("d03/e0/f2/inside".into(), content("x"));
    let Item::Node(Node::File { content: same, .. }) = old[&PathBuf::from("d04/e0/f0")].clone() else {
        panic!("a file")
    };
    new.insert(
        "d04/e0/f0".into(),
        Item::Node(Node::File { content: same, attributes: attributes(0o755), link_group: None }),
    );
    let (a, b) = (build(&old, &directories), build(&new, &directories));
    let changes = diff(&a, &b, &directories).unwrap();
    assert_eq!(
        paths(&changes),
        [
            ("C", "d00/e0/f0"),
            ("R", "d00/e0/f1"),
            ("A", "d00/e0/f9"),
            ("M", "d01/e3"),
            ("R", "d02/e5"),
            ("R", "d02/e5/f0"),
            ("R", "d02/e5/f1"),
            ("R", "d02/e5/f2"),
            ("A", "d02/e5"),
            ("R", "d03/e0/f2"),
            ("A", "d03/e0/f2"),
            ("A", "d03/e0/f2/inside"),
            ("M", "d04/e0/f0"),
        ]
    );
    for change in &changes {
        assert_eq!(change.old.is_none(), change.kind == ChangeKind::Added);
        assert_eq!(change.new.is_none(), change.kind == ChangeKind::Removed);
    }
    assert_eq!(diff(&a, &a, &directories).unwrap(), []);
}

#[test]
fn cost_follows_the_change() {
    let directories = MemoryDirectories::new();
    let old = base();
    let mut new = old.clone();
    new.insert("d07/e3/f1".into(), content("changed"));
    let (a, b) = (build(&old, &directories), build(&new, &directories));
    let counting = Counting(&directories, AtomicUsize::new(0));
    let changes = diff(&a, &b, &counting).unwrap();
    assert_eq!(paths(&changes), [("C", "d07/e3/f1")]);
    // Both sides of three directories on the way, each for attributes and for entries; of 221.
    let read = counting.1.load(Ordering::Relaxed);
    assert!(read <= 12, "{read} directories were read");
}

#[test]
fn a_missing_directory_is_named() {
    let directories = MemoryDirectories::new();
    let a = build(&base(), &directories);
    let gone = Blob::of(b"gone");
    let error = diff(&a, &gone, &directories).unwrap_err();
    assert!(error.to_string().contains(&gone.to_string()), "{error}");
}

#[test]
fn summary_counts_everything() {
    let directories = MemoryDirectories::new();
    let root = build(&base(), &directories);
    let summary = summary(&root, &directories).unwrap();
    assert_eq!((summary.directories, summary.files, summary.others), (221, 600, 0));
    let mut bytes = 0;
    walk(&root, &directories, |_, node| {
        bytes += node.content().map_or(0, |c| c.size);
        Ok::<(), StoreError>(())
    })
    .unwrap();
    assert_eq!(summary.bytes, bytes);
}

#[test]
fn deep_trees_are_refused_without_recursion() {
    let directories = MemoryDirectories::new();
    let mut blob = directories.insert(Directory::default());
    let shallow = blob;
    for _ in 0..5000 {
        blob = directories.insert(Directory {
            entries: BTreeMap::from([(Name::try_from("d").unwrap(), Node::Directory(blob))]),
            ..Default::default()
        });
    }
    for error in [
        walk(&blob, &directories, |_, _| Ok::<(), StoreError>(())).unwrap_err(),
        diff(&shallow, &blob, &directories).unwrap_err(),
        same_tree(&shallow, &blob, &directories).unwrap_err(),
    ] {
        assert!(error.to_string().contains("deeper than"), "{error}");
    }
}

#[test]
fn same_tree_looks_at_membership_of_link_groups_only() {
    let directories = MemoryDirectories::new();
    let tree = |groups: [Option<u64>; 4]| {
        let mut model = Model::from([(PathBuf::new(), Item::Directory(0o755)), ("d".into(), Item::Directory(0o755))]);
        for (path, link_group) in ["a", "b", "d/c", "d/d"].into_iter().zip(groups) {
            let node = Node::File { content: Blob::of(b"x"), attributes: attributes(0o644), link_group };
            model.insert(path.into(), Item::Node(node));
        }
        build(&model, &directories)
    };
    let same = |a, b| same_tree(&tree(a), &tree(b), &directories).unwrap();
    assert!(same([Some(1), Some(2), Some(1), Some(2)], [Some(9), Some(1), Some(9), Some(1)]));
    assert!(!same([Some(1), Some(2), Some(1), Some(2)], [Some(1), Some(1), Some(2), Some(2)]));
    assert!(!same([Some(1), Some(1), None, None], [None, None, None, None]));
    // Alone in its group is not linked at all.
    assert!(same([Some(1), Some(2), None, None], [None, None, None, Some(3)]));
    assert!(!same([Some(1), Some(1), Some(1), None], [Some(1), Some(1), Some(1), Some(1)]));
}

#[test]
fn same_tree_sees_attributes_of_directories_and_times() {
    let directories = MemoryDirectories::new();
    let old = base();
    let a = build(&old, &directories);
    for path in ["", "d03", "d03/e0"] {
        let mut new = old.clone();
        new.insert(path.into(), Item::Directory(0o711));
        let b = build(&new, &directories);
        assert!(!same_tree(&a, &b, &directories).unwrap(), "{path}");
    }
    let mut touched = attributes(0o644);
    touched.mtime = Mtime { seconds: 1_700_000_000, nanos: 43 };
    let mut new = old.clone();
    new.insert(
        "d03/e0/f0".into(),
        Item::Node(Node::File { content: Blob::of(b"300"), attributes: touched, link_group: None }),
    );
    let b = build(&new, &directories);
    assert!(!same_tree(&a, &b, &directories).unwrap());
}

fn random_model() -> impl Strategy<Value = Model> {
    let path = collection::vec("[abc]", 1..4).prop_map(|parts| parts.iter().collect::<PathBuf>());
    collection::vec((path, 0..6u32), 0..25).prop_map(|wanted| {
        let mut model = Model::from([(PathBuf::new(), Item::Directory(0o755))]);
        for (path, kind) in wanted {
            // Whatever is on the way becomes a directory.
            for parent in path.ancestors().skip(1) {
                if !matches!(model.get(parent), Some(Item::Directory(_))) {
                    model.insert(parent.to_owned(), Item::Directory(0o755));
                }
            }
            let item = match kind {
                0 => Item::Directory(0o755),
                1 => Item::Directory(0o700),
                n => content(&n.to_string()),
            };
            if !matches!(item, Item::Directory(_)) {
                model.retain(|p, _| !p.starts_with(&path));
            }
            model.insert(path, item);
        }
        model
    })
}

proptest! {
    /// Applying the changes to the old tree gives the new one, and each change is needed.
    #[test]
    fn changes_lead_from_old_to_new(old in random_model(), new in random_model()) {
        let directories = MemoryDirectories::new();
        let (a, b) = (build(&old, &directories), build(&new, &directories));
        let mut model = old.clone();
        for change in diff(&a, &b, &directories).unwrap() {
            let attributes_of = |blob: &Blob| directories.directory(blob).unwrap().attributes.mode;
            let item = change.new.as_ref().map(|node| match node {
                Node::Directory(blob) => Item::Directory(attributes_of(blob)),
                node => Item::Node(node.clone()),
            });
            let before = match item {
                Some(item) => model.insert(change.path.clone(), item),
                None => model.remove(&change.path),
            };
            prop_assert_eq!(before.is_none(), change.old.is_none());
            prop_assert_ne!(before.as_ref(), model.get(&change.path), "no change of {:?}", change.path);
        }
        prop_assert_eq!(model, new);
        prop_assert_eq!(same_tree(&a, &b, &directories).unwrap(), a == b);
    }
}
