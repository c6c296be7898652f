//! The one encoding of a [`Directory`]: REAPI v2's `Directory` message in canonical form.
//!
//! Version 1:
//!
//! - files, directories and symlinks sorted by their (escaped) name, each name once in all three;
//! - `DirectoryNode` carries name and digest only; a directory's attributes are in its own
//!   message's `node_properties`, which also carries property `aether.format` = `1`;
//! - `NodeProperties.mtime` and `.unix_mode` (permission bits only) are always there;
//!   `FileNode.is_executable` repeats the owner's execute bit for clients that know no modes;
//! - properties sorted by name: `aether.fifo` (empty) makes a fifo of a file node with the empty
//!   digest, `aether.hardlink` is the link group in decimal, `aether.owner` is `uid:gid`,
//!   `aether.xattr.<name>` is an extended attribute; names and values of xattrs, names of entries
//!   and targets of symlinks are escaped as [`super::name`] says;
//! - no other property, no other field, no default written out.
//!
//! [`Directory::decode`] accepts nothing else: what it read must encode to the same bytes. So a
//! directory has one digest, and a change of the format is a change of the version.

use std::collections::BTreeMap;

use bazel_remote_apis::{
    build::bazel::remote::execution::v2 as reapi,
    google::protobuf::{Timestamp, UInt32Value},
};
use bytes::Bytes;
use prost::Message;

use super::{
    Attributes, Directory, MAX_DIRECTORY_BYTES, MAX_ENTRIES, MAX_TARGET_BYTES, MAX_XATTR_NAME_BYTES,
    MAX_XATTR_VALUE_BYTES, Mtime, Name, NameError, Node, Owner,
    name::{escape, unescape},
};
use crate::Blob;

/// Version of the encoding that this program writes and reads.
pub const FORMAT_VERSION: &str = "1";

const FORMAT: &str = "aether.format";
const FIFO: &str = "aether.fifo";
const HARDLINK: &str = "aether.hardlink";
const OWNER: &str = "aether.owner";
const XATTR: &str = "aether.xattr.";

const NANOS_PER_SECOND: u32 = 1_000_000_000;

/// Why bytes are not a directory, or a directory breaks the rules of trees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// More bytes than a directory may have.
    #[error("the directory message has {0} bytes, more than {MAX_DIRECTORY_BYTES}")]
    TooLarge(usize),
    /// More entries than a directory may have.
    #[error("the directory has {0} entries, more than {MAX_ENTRIES}")]
    TooManyEntries(usize),
    /// Not protobuf.
    #[error("not a directory message: {0}")]
    Malformed(String),
    /// Written by another version.
    #[error("the directory message has format {found:?}, this program knows {FORMAT_VERSION:?} only")]
    UnknownFormat {
        /// What the message says; empty if it says nothing (another REAPI client's directory).
        found: String,
    },
    /// A name breaks the rules.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Two entries of one name.
    #[error("two entries are named {0}")]
    Duplicate(Name),
    /// An entry has a field that is missing, out of range or not known.
    #[error("{entry}: {problem}")]
    Entry {
        /// Name of the entry; `.` is the directory itself.
        entry: String,
        /// What is wrong.
        problem: String,
    },
    /// Valid, but not the one encoding.
    #[error("the directory message is not in canonical form")]
    NotCanonical,
}

impl Directory {
    /// The canonical encoding.
    ///
    /// A directory that breaks the limits encodes too, but nobody decodes it: see [`Directory::check`].
    pub fn encode(&self) -> Bytes {
        let mut message = reapi::Directory {
            node_properties: Some(properties(&self.attributes, [(FORMAT.to_owned(), FORMAT_VERSION.to_owned())])),
            ..Default::default()
        };
        for (name, node) in &self.entries {
            push_node(&mut message, escape(name.as_bytes()), node);
        }
        // The map is sorted by raw bytes; escapes sort differently.
        message.files.sort_by(|a, b| a.name.cmp(&b.name));
        message.directories.sort_by(|a, b| a.name.cmp(&b.name));
        message.symlinks.sort_by(|a, b| a.name.cmp(&b.name));
        message.encode_to_vec().into()
    }

    /// The name of this directory's tree.
    pub fn blob(&self) -> Blob {
        Blob::of(&self.encode())
    }

    /// Decodes what [`Directory::encode`] made, and nothing else.
    ///
    /// # Errors
    /// [`TreeError`] says which rule the bytes break. No input panics or takes memory out of
    /// proportion to its length.
    pub fn decode(data: &[u8]) -> Result<Self, TreeError> {
        if data.len() > MAX_DIRECTORY_BYTES {
            return Err(TreeError::TooLarge(data.len()));
        }
        let message = reapi::Directory::decode(data).map_err(|e| TreeError::Malformed(e.to_string()))?;
        let count = message.files.len() + message.directories.len() + message.symlinks.len();
        if count > MAX_ENTRIES {
            return Err(TreeError::TooManyEntries(count));
        }
        let (attributes, mut named) = attributes(".", message.node_properties)?;
        let found = named.remove(FORMAT).unwrap_or_default();
        if found != FORMAT_VERSION {
            return Err(TreeError::UnknownFormat { found });
        }
        refuse_unknown(".", named)?;

        let mut directory = Self { attributes, entries: BTreeMap::new() };
        for file in message.files {
            let name = Name::new(unescape(&file.name)?)?;
            let node = file_node(&file.name, file.digest, file.node_properties)?;
            directory.insert(name, node)?;
        }
        for child in message.directories {
            let name = Name::new(unescape(&child.name)?)?;
            let node = Node::Directory(digest(&child.name, child.digest)?);
            directory.insert(name, node)?;
        }
        for link in message.symlinks {
            let name = Name::new(unescape(&link.name)?)?;
            let node = symlink_node(&link.name, &link.target, link.node_properties)?;
            directory.insert(name, node)?;
        }
        directory.check()?;
        if directory.encode() != data {
            return Err(TreeError::NotCanonical);
        }
        Ok(directory)
    }

    /// Checks the rules that the types do not: counts, lengths and ranges.
    ///
    /// # Errors
    /// [`TreeError`] names the entry and the rule.
    pub fn check(&self) -> Result<(), TreeError> {
        if self.entries.len() > MAX_ENTRIES {
            return Err(TreeError::TooManyEntries(self.entries.len()));
        }
        check_attributes(&|| ".".to_owned(), &self.attributes)?;
        for (name, node) in &self.entries {
            let entry = || name.to_string();
            if let Some(attributes) = node.attributes() {
                check_attributes(&entry, attributes)?;
            }
            if let Node::Symlink { target, .. } = node
                && (target.is_empty() || target.len() > MAX_TARGET_BYTES || target.contains(&0))
            {
                return Err(TreeError::Entry {
                    entry: entry(),
                    problem: format!("a symlink's target has 1 to {MAX_TARGET_BYTES} bytes and no NUL"),
                });
            }
        }
        Ok(())
    }

    fn insert(&mut self, name: Name, node: Node) -> Result<(), TreeError> {
        use std::collections::btree_map::Entry;
        match self.entries.entry(name) {
            Entry::Occupied(entry) => Err(TreeError::Duplicate(entry.key().clone())),
            Entry::Vacant(entry) => {
                entry.insert(node);
                Ok(())
            }
        }
    }
}

fn push_node(message: &mut reapi::Directory, name: String, node: &Node) {
    match node {
        Node::Directory(blob) => message.directories.push(reapi::DirectoryNode { name, digest: Some((*blob).into()) }),
        Node::File { content, attributes, link_group } => message.files.push(reapi::FileNode {
            name,
            digest: Some((*content).into()),
            is_executable: attributes.mode & 0o100 != 0,
            node_properties: Some(properties(attributes, link_property(*link_group))),
        }),
        Node::Fifo { attributes, link_group } => message.files.push(reapi::FileNode {
            name,
            digest: Some(Blob::EMPTY.into()),
            is_executable: attributes.mode & 0o100 != 0,
            node_properties: Some(properties(
                attributes,
                link_property(*link_group).chain([(FIFO.to_owned(), String::new())]),
            )),
        }),
        Node::Symlink { target, attributes, link_group } => message.symlinks.push(reapi::SymlinkNode {
            name,
            target: escape(target),
            node_properties: Some(properties(attributes, link_property(*link_group))),
        }),
    }
}

fn link_property(link_group: Option<u64>) -> impl Iterator<Item = (String, String)> {
    link_group.into_iter().map(|group| (HARDLINK.to_owned(), group.to_string()))
}

fn properties(attributes: &Attributes, more: impl IntoIterator<Item = (String, String)>) -> reapi::NodeProperties {
    let owner = attributes.owner.map(|owner| (OWNER.to_owned(), format!("{}:{}", owner.uid, owner.gid)));
    let xattrs = attributes.xattrs.iter().map(|(name, value)| (format!("{XATTR}{}", escape(name)), escape(value)));
    let mut properties: Vec<_> =
        owner.into_iter().chain(xattrs).chain(more).map(|(name, value)| reapi::NodeProperty { name, value }).collect();
    properties.sort_by(|a, b| a.name.cmp(&b.name));
    reapi::NodeProperties {
        properties,
        mtime: Some(Timestamp {
            seconds: attributes.mtime.seconds,
            nanos: i32::try_from(attributes.mtime.nanos).unwrap_or(i32::MAX),
        }),
        unix_mode: Some(UInt32Value { value: attributes.mode }),
    }
}

fn problem(entry: &str, problem: impl Into<String>) -> TreeError {
    TreeError::Entry { entry: entry.to_owned(), problem: problem.into() }
}

fn digest(entry: &str, digest: Option<reapi::Digest>) -> Result<Blob, TreeError> {
    let digest = digest.ok_or_else(|| problem(entry, "has no digest"))?;
    Blob::try_from(&digest).map_err(|e| problem(entry, e.to_string()))
}

fn file_node(
    entry: &str,
    content: Option<reapi::Digest>,
    node_properties: Option<reapi::NodeProperties>,
) -> Result<Node, TreeError> {
    let content = digest(entry, content)?;
    let (attributes, mut named) = attributes(entry, node_properties)?;
    let link_group = link_group(entry, &mut named)?;
    let fifo = named.remove(FIFO).is_some();
    refuse_unknown(entry, named)?;
    match fifo {
        false => Ok(Node::File { content, attributes, link_group }),
        true if content.is_empty() => Ok(Node::Fifo { attributes, link_group }),
        true => Err(problem(entry, "is a fifo with contents")),
    }
}

fn symlink_node(entry: &str, target: &str, node_properties: Option<reapi::NodeProperties>) -> Result<Node, TreeError> {
    let (attributes, mut named) = attributes(entry, node_properties)?;
    let link_group = link_group(entry, &mut named)?;
    refuse_unknown(entry, named)?;
    Ok(Node::Symlink { target: unescape(target)?, attributes, link_group })
}

fn link_group(entry: &str, named: &mut BTreeMap<String, String>) -> Result<Option<u64>, TreeError> {
    named
        .remove(HARDLINK)
        .map(|group| group.parse().map_err(|_| problem(entry, format!("{HARDLINK} is {group:?}, not a number"))))
        .transpose()
}

/// Splits node properties into attributes and the named properties that are not attributes.
fn attributes(
    entry: &str,
    node_properties: Option<reapi::NodeProperties>,
) -> Result<(Attributes, BTreeMap<String, String>), TreeError> {
    let message = node_properties.ok_or_else(|| {
        if entry == "." {
            TreeError::UnknownFormat { found: String::new() }
        } else {
            problem(entry, "has no node properties")
        }
    })?;
    let mtime = message.mtime.ok_or_else(|| problem(entry, "has no mtime"))?;
    let mode = message.unix_mode.ok_or_else(|| problem(entry, "has no mode"))?;
    let mut attributes = Attributes {
        mode: mode.value,
        mtime: Mtime {
            seconds: mtime.seconds,
            nanos: u32::try_from(mtime.nanos).map_err(|_| problem(entry, "has negative nanoseconds in its mtime"))?,
        },
        ..Default::default()
    };
    let mut named = BTreeMap::new();
    for property in message.properties {
        if property.name == OWNER {
            attributes.owner = Some(owner(entry, &property.value)?);
        } else if let Some(name) = property.name.strip_prefix(XATTR) {
            attributes.xattrs.insert(unescape(name)?, unescape(&property.value)?);
        } else {
            named.insert(property.name, property.value);
        }
    }
    Ok((attributes, named))
}

fn owner(entry: &str, text: &str) -> Result<Owner, TreeError> {
    let parse = || {
        let (uid, gid) = text.split_once(':')?;
        Some(Owner { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    };
    parse().ok_or_else(|| problem(entry, format!("{OWNER} is {text:?}, not uid:gid")))
}

fn refuse_unknown(entry: &str, named: BTreeMap<String, String>) -> Result<(), TreeError> {
    match named.into_keys().next() {
        None => Ok(()),
        Some(name) => Err(problem(entry, format!("has unknown property {name:?}"))),
    }
}

fn check_attributes(entry: &dyn Fn() -> String, attributes: &Attributes) -> Result<(), TreeError> {
    let fail = |problem: String| Err(TreeError::Entry { entry: entry(), problem });
    if attributes.mode > 0o7777 {
        return fail(format!("mode {:o} is more than 7777", attributes.mode));
    }
    if attributes.mtime.nanos >= NANOS_PER_SECOND {
        return fail(format!("mtime has {} nanoseconds", attributes.mtime.nanos));
    }
    for (name, value) in &attributes.xattrs {
        let valid = name.len() > b"user.".len()
            && name.starts_with(b"user.")
            && name.len() <= MAX_XATTR_NAME_BYTES
            && !name.contains(&0);
        if !valid {
            return fail(format!(
                "xattr {:?} is not a name of 6 to {MAX_XATTR_NAME_BYTES} bytes that starts with user.",
                escape(name)
            ));
        }
        if value.len() > MAX_XATTR_VALUE_BYTES {
            return fail(format!(
                "xattr {:?} has {} bytes, more than {MAX_XATTR_VALUE_BYTES}",
                escape(name),
                value.len()
            ));
        }
    }
    Ok(())
}
