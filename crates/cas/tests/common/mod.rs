//! Directories made at random, and samples with every feature.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;

use aether_cas::{
    Blob,
    tree::{Attributes, Directory, Mtime, Name, Node, Owner},
};
use proptest::{collection, option, prelude::*};

pub(crate) fn name() -> impl Strategy<Value = Name> {
    let readable = "[a-zA-Z0-9._ é\\\\-]{1,20}".prop_map(String::into_bytes);
    let raw = collection::vec(any::<u8>(), 1..40);
    prop_oneof![3 => readable, 1 => raw].prop_filter_map("not a name", |bytes| Name::new(bytes).ok())
}

pub(crate) fn blob() -> impl Strategy<Value = Blob> {
    prop_oneof![
        1 => Just(Blob::EMPTY),
        9 => (any::<[u8; 8]>(), 1..=i64::MAX as u64).prop_map(|(seed, size)| Blob {
            digest: aether_cas::Digest::of(&seed),
            size,
        }),
    ]
}

pub(crate) fn attributes() -> impl Strategy<Value = Attributes> {
    let mtime = (any::<i64>(), 0..1_000_000_000u32).prop_map(|(seconds, nanos)| Mtime { seconds, nanos });
    let owner = option::weighted(0.2, (any::<u32>(), any::<u32>()))
        .prop_map(|owner| owner.map(|(uid, gid)| Owner { uid, gid }));
    let xattr_name = collection::vec(1..=u8::MAX, 1..20).prop_map(|rest| [b"user.".as_slice(), &rest].concat());
    let xattrs = collection::btree_map(xattr_name, collection::vec(any::<u8>(), 0..30), 0..3);
    (0..=0o7777u32, mtime, owner, xattrs).prop_map(|(mode, mtime, owner, xattrs)| Attributes {
        mode,
        mtime,
        owner,
        xattrs,
    })
}

pub(crate) fn node() -> impl Strategy<Value = Node> {
    let group = || option::weighted(0.2, any::<u64>());
    let target = collection::vec(1..=u8::MAX, 1..60);
    prop_oneof![
        2 => blob().prop_map(Node::Directory),
        5 => (blob(), attributes(), group())
            .prop_map(|(content, attributes, link_group)| Node::File { content, attributes, link_group }),
        1 => (target, attributes(), group())
            .prop_map(|(target, attributes, link_group)| Node::Symlink { target, attributes, link_group }),
        1 => (attributes(), group())
            .prop_map(|(attributes, link_group)| Node::Fifo { attributes, link_group }),
    ]
}

pub(crate) fn directory() -> impl Strategy<Value = Directory> {
    (attributes(), collection::btree_map(name(), node(), 0..12))
        .prop_map(|(attributes, entries)| Directory { attributes, entries })
}

/// A directory with everything that the format can say.
pub(crate) fn everything() -> Directory {
    let attributes =
        |mode| Attributes { mode, mtime: Mtime { seconds: 1_600_000_000, nanos: 123_456_789 }, ..Default::default() };
    let mut special = attributes(0o4755);
    special.owner = Some(Owner { uid: 0, gid: 42 });
    special.xattrs = BTreeMap::from([
        (b"user.comment".to_vec(), b"plain text".to_vec()),
        (b"user.binary".to_vec(), vec![0, 0xff, b'\\']),
        (b"user.\xfe".to_vec(), Vec::new()),
    ]);
    let mut before_epoch = attributes(0o600);
    before_epoch.mtime = Mtime { seconds: -1, nanos: 999_999_999 };
    let entries: [(&[u8], Node); 11] = [
        (b"README.md", Node::File { content: Blob::of(b"hello\n"), attributes: attributes(0o644), link_group: None }),
        (b"empty", Node::File { content: Blob::EMPTY, attributes: before_epoch, link_group: None }),
        (
            b"special",
            Node::File { content: Blob::of(b"#!/bin/sh\n"), attributes: special.clone(), link_group: Some(7) },
        ),
        (b"special-again", Node::File { content: Blob::of(b"#!/bin/sh\n"), attributes: special, link_group: Some(7) }),
        (b"src", Node::Directory(Blob::of(b"not really a directory"))),
        // Sorted before "src" by its bytes, and by its text.
        (b"src-gen", Node::Directory(Blob::of(b"nor this"))),
        (
            b"link",
            Node::Symlink { target: b"../elsewhere/\xff\\n".to_vec(), attributes: attributes(0o777), link_group: None },
        ),
        (b"pipe", Node::Fifo { attributes: attributes(0o620), link_group: Some(u64::MAX) }),
        (
            "grüße\u{1f980}".as_bytes(),
            Node::File { content: Blob::of(b"utf-8"), attributes: attributes(0o444), link_group: None },
        ),
        (
            // Raw bytes sort after "grüße", their escape before it.
            b"latin1-\xfc",
            Node::File { content: Blob::of(b"latin1"), attributes: attributes(0o444), link_group: None },
        ),
        (
            b"dev-disk-by\\x2dlabel.swap",
            Node::File { content: Blob::of(b"systemd"), attributes: attributes(0o444), link_group: None },
        ),
    ];
    let mut own = attributes(0o1777);
    own.xattrs.insert(b"user.on.directory".to_vec(), b"1".to_vec());
    Directory {
        attributes: own,
        entries: entries.into_iter().map(|(name, node)| (Name::new(name).unwrap(), node)).collect(),
    }
}
