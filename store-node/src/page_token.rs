//! Page tokens of GetTree: how many directories of a tree the client has.
//!
//! A token says all that is needed to go on, so it holds over restarts: a tree is immutable, and its directories come in an
//! order that depends only on which of them are there. Over one bucket these are the same on every node; but what is named by
//! SHA-256 is there on the node that was told the name, so a token of such a tree holds on the node that gave it.

use std::fmt;

use aether_cas::{
    ContentName,
    remote::resource::{Form, ReadName, parse_read},
};

const VERSION: &str = "1";

/// Where in a tree to go on. Displays as `1:<directories before>:<name of the root>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToken {
    /// The root of the tree.
    pub root: ContentName,
    /// Directories that came before.
    pub skip: u64,
}

impl PageToken {
    /// Reads what [`PageToken`] displays as, and nothing else.
    pub fn parse(text: &str) -> Option<Self> {
        let (skip, name) = text.strip_prefix(VERSION)?.strip_prefix(':')?.split_once(':')?;
        let root = parse_read(name).ok()?.content;
        let token = Self { root, skip: skip.parse().ok()? };
        (token.to_string() == text).then_some(token)
    }
}

impl fmt::Display for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = ReadName { instance: String::new(), form: Form::Plain, content: self.root };
        write!(f, "{VERSION}:{}:{name}", self.skip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_cas::{Blob, Sha256Blob};

    #[test]
    fn only_what_was_given_out_is_taken() {
        for root in [ContentName::Blake3(Blob::of(b"x")), ContentName::Sha256(Sha256Blob::of(b"x"))] {
            let token = PageToken { root, skip: 42 };
            let text = token.to_string();
            assert_eq!(PageToken::parse(&text), Some(token));
            for bad in [
                text.replace("42", "042"),
                text.replace("1:42", "2:42"),
                format!("{text}/x"),
                text.replace("blobs", "x/blobs"),
            ] {
                assert_eq!(PageToken::parse(&bad), None, "{bad}");
            }
        }
    }
}
