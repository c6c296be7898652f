//! The encoding of directories: pinned by golden files, reversible, and strict.

mod common;

use std::path::PathBuf;

use aether_cas::{
    Blob,
    testing::{bytes, directory, file},
    tree::{Attributes, Directory, MAX_ENTRIES, Name, Node, TreeError},
};
use bazel_remote_apis::build::bazel::remote::execution::v2 as reapi;
use proptest::prelude::*;
use prost::Message;

/// Compares an encoding with the file that pins it. A change here is a change of the format: it
/// needs a new format version, and a way to read the old one.
fn golden(name: &str, directory: &Directory, blob: &str) {
    let path = PathBuf::from(env!("AETHER_TOP")).join("crates/cas/tests/golden").join(name);
    let encoded = directory.encode();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &encoded).unwrap();
    }
    let pinned = std::fs::read(&path).unwrap();
    assert_eq!(encoded, pinned, "the encoding of {name} changed; see UPDATE_GOLDEN in this file");
    assert_eq!(Directory::decode(&pinned).unwrap(), *directory);
    assert_eq!(directory.blob().to_string(), blob, "{name}");
}

#[test]
fn golden_files_pin_the_encoding() {
    let empty = Directory { attributes: Attributes { mode: 0o755, ..Default::default() }, ..Default::default() };
    golden("empty.binpb", &empty, GOLDEN_EMPTY);
    golden("everything.binpb", &common::everything(), GOLDEN_EVERYTHING);
}

const GOLDEN_EMPTY: &str = "b4420df660ec12189bb6b388e1e6dd0458b87dd5a2cf10b411a6ea813449a961/29";
const GOLDEN_EVERYTHING: &str = "4b9a4762d22188e36eeda9215b75ce978465a7de9066e57efa3ae006ced7d53e/1486";

/// The message of a good directory, for tests that spoil it.
fn message() -> reapi::Directory {
    let good = directory([
        ("a", file(Blob::of(b"a"))),
        ("b", file(Blob::of(b"b"))),
        ("d", Node::Directory(Blob::of(b"d"))),
        ("l", Node::Symlink { target: b"t".to_vec(), attributes: Attributes::default(), link_group: None }),
    ]);
    reapi::Directory::decode(&good.encode()[..]).unwrap()
}

fn property(name: &str, value: &str) -> reapi::NodeProperty {
    reapi::NodeProperty { name: name.to_owned(), value: value.to_owned() }
}

#[test]
fn refuses_what_breaks_a_rule_and_says_which() {
    type Spoil = fn(&mut reapi::Directory);
    let spoils: &[(&str, Spoil)] = &[
        ("not in canonical form", |m| m.files.reverse()),
        ("two entries are named a", |m| m.files[1].name = "a".into()),
        ("two entries are named d", |m| m.symlinks[0].name = "d".into()),
        ("slash", |m| m.files[0].name = "x/y".into()),
        ("\"..\"", |m| m.directories[0].name = "..".into()),
        ("\".\"", |m| m.files[0].name = ".".into()),
        ("empty name", |m| m.files[0].name = String::new()),
        ("NUL", |m| m.files[0].name = "a\0".into()),
        ("256 bytes", |m| m.files[1].name = "b".repeat(256)),
        ("not an escaped name", |m| m.files[1].name = "b\\q".into()),
        ("not an escaped name", |m| m.files[1].name = "\\x62".into()),
        ("no digest", |m| m.files[0].digest = None),
        ("not a blob", |m| m.files[0].digest.as_mut().unwrap().hash.make_ascii_uppercase()),
        ("not a blob", |m| m.files[0].digest.as_mut().unwrap().size_bytes = -1),
        ("not a blob", |m| m.files[0].digest.as_mut().unwrap().size_bytes = 0),
        ("not in canonical form", |m| m.files[0].is_executable = true),
        ("no node properties", |m| m.files[0].node_properties = None),
        ("no mtime", |m| m.files[0].node_properties.as_mut().unwrap().mtime = None),
        ("no mode", |m| m.symlinks[0].node_properties.as_mut().unwrap().unix_mode = None),
        ("mode 10000 ", |m| {
            m.files[0].node_properties.as_mut().unwrap().unix_mode.as_mut().unwrap().value = 0o10000;
        }),
        ("1000000000 nanoseconds", |m| {
            m.files[0].node_properties.as_mut().unwrap().mtime.as_mut().unwrap().nanos = 1_000_000_000;
        }),
        ("negative nanoseconds", |m| {
            m.files[0].node_properties.as_mut().unwrap().mtime.as_mut().unwrap().nanos = -1;
        }),
        ("unknown property \"aether.new\"", |m| {
            m.files[0].node_properties.as_mut().unwrap().properties.push(property("aether.new", ""));
        }),
        ("not a number", |m| {
            m.files[0].node_properties.as_mut().unwrap().properties.push(property("aether.hardlink", "x"));
        }),
        ("not in canonical form", |m| {
            m.files[0].node_properties.as_mut().unwrap().properties.push(property("aether.hardlink", "01"));
        }),
        ("not in canonical form", |m| {
            let properties = &mut m.files[0].node_properties.as_mut().unwrap().properties;
            properties.push(property("aether.hardlink", "1"));
            properties.push(property("aether.hardlink", "2"));
        }),
        ("not uid:gid", |m| {
            m.files[0].node_properties.as_mut().unwrap().properties.push(property("aether.owner", "0"));
        }),
        ("fifo with contents", |m| {
            m.files[0].node_properties.as_mut().unwrap().properties.push(property("aether.fifo", ""));
        }),
        ("starts with user.", |m| {
            let name = "aether.xattr.security.capability";
            m.files[0].node_properties.as_mut().unwrap().properties.push(property(name, ""));
        }),
        ("1 to 4095 bytes", |m| m.symlinks[0].target = String::new()),
        ("1 to 4095 bytes", |m| m.symlinks[0].target = "t".repeat(4096)),
        ("1 to 4095 bytes", |m| m.symlinks[0].target = "t\0".into()),
        ("format \"2\"", |m| {
            m.node_properties.as_mut().unwrap().properties[0].value = "2".into();
        }),
        ("format \"\"", |m| m.node_properties = None),
        ("format \"\"", |m| m.node_properties.as_mut().unwrap().properties.clear()),
    ];
    assert!(Directory::decode(&message().encode_to_vec()).is_ok());
    for (n, (expected, spoil)) in spoils.iter().enumerate() {
        let mut message = message();
        spoil(&mut message);
        let error = Directory::decode(&message.encode_to_vec()).unwrap_err().to_string();
        assert!(error.contains(expected), "case {n}: expected {expected:?} in {error:?}");
    }
}

#[test]
fn refuses_bytes_beside_the_message() {
    let good = directory([("a", file(Blob::of(b"a")))]).encode();
    // A field that REAPI does not have: protobuf skips it, we must not.
    let unknown = [&good[..], &[0x7a, 1, b'x']].concat();
    assert_eq!(Directory::decode(&unknown), Err(TreeError::NotCanonical));
    assert!(matches!(Directory::decode(b"no message"), Err(TreeError::Malformed(_))));
    assert!(matches!(Directory::decode(b""), Err(TreeError::UnknownFormat { .. })));
}

#[test]
fn too_many_entries_are_refused() {
    let message =
        reapi::Directory { directories: vec![reapi::DirectoryNode::default(); MAX_ENTRIES + 1], ..Default::default() };
    let error = Directory::decode(&message.encode_to_vec()).unwrap_err();
    assert_eq!(error, TreeError::TooManyEntries(MAX_ENTRIES + 1));
}

#[test]
fn random_mutations_never_panic_and_never_alias() {
    // Deterministic: flips, cuts, insertions and duplications of a message with every feature.
    let good = common::everything().encode();
    let mut accepted = 0;
    for seed in 0..20_000u64 {
        let random = bytes(seed, 64);
        let mut data = good.to_vec();
        for op in random.chunks(8).take(1 + usize::from(random[63]) % 3) {
            let at = usize::from(u16::from_le_bytes([op[0], op[1]])) % data.len().max(1);
            match op[2] % 4 {
                0 if !data.is_empty() => data[at] ^= 1 << (op[3] % 8),
                1 => data.truncate(at),
                2 => data.insert(at, op[3]),
                _ => {
                    let end = data.len().min(at + usize::from(op[3]));
                    let part = data[at.min(end)..end].to_vec();
                    data.splice(at..at, part);
                }
            }
        }
        if let Ok(directory) = Directory::decode(&data) {
            accepted += 1;
            assert_eq!(directory.encode(), data, "seed {seed}");
        }
    }
    // A flipped bit in a name or a digest is another valid message: the test does reach the decoder's end.
    assert!(accepted > 100, "{accepted}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn round_trip(directory in common::directory()) {
        let encoded = directory.encode();
        prop_assert_eq!(&Directory::decode(&encoded).unwrap(), &directory);
        prop_assert_eq!(directory.blob(), Blob::of(&encoded));
    }

    #[test]
    fn different_directories_have_different_digests(a in common::directory(), b in common::directory()) {
        prop_assert_eq!(a == b, a.blob() == b.blob());
    }

    #[test]
    fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(directory) = Directory::decode(&data) {
            prop_assert_eq!(directory.encode(), data);
        }
    }

    #[test]
    fn one_entry_less_is_another_tree(directory in common::directory(), pick in any::<prop::sample::Index>()) {
        prop_assume!(!directory.entries.is_empty());
        let mut less = directory.clone();
        let name: Name = pick.get(&directory.entries.keys().cloned().collect::<Vec<_>>()).clone();
        less.entries.remove(&name);
        prop_assert_ne!(less.blob(), directory.blob());
    }
}
