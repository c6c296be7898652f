//! What a listing of a bucket says, and the files and folders that it means. Pure.

use std::collections::HashSet;

use aether_cas::digest::BlobHasher;
use aether_cas::tree::Mtime;

use crate::failure::{Failure, Reason};
use crate::folder;

/// Goes into every digest: another way to make trees of the same objects gets another one.
const VERSION: &[u8] = b"aether listing 1\0";

/// An object as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// The whole key.
    pub(super) key: String,
    /// Another for each content that the key ever has; without quotes.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
    /// When it was last written, in whole seconds: headers of an answer have no more.
    pub(super) modified: Mtime,
}

/// All objects whose keys begin with `prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    prefix: String,
    objects: Vec<Listed>,
}

/// Paths below the prefix, without slashes around them, and their objects.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Entries<'a> {
    pub(super) files: Vec<(&'a str, &'a Listed)>,
    pub(super) folders: Vec<(&'a str, &'a Listed)>,
}

impl Listing {
    pub(super) fn new(prefix: &str, mut objects: Vec<Listed>) -> Self {
        // Services list so, but not every one promises it.
        objects.sort_by(|one, other| one.key.cmp(&other.key));
        Self { prefix: prefix.to_owned(), objects }
    }

    /// The first key that is not the same in the other; nothing as long as the digests are the same.
    pub(super) fn difference<'a>(&'a self, other: &'a Self) -> Option<&'a str> {
        let same = |(one, other): &(&Listed, &Listed)| {
            (&one.key, &one.etag, one.size) == (&other.key, &other.etag, other.size)
        };
        let begin = self.objects.iter().zip(&other.objects).take_while(same).count();
        let ends = [self.objects.get(begin), other.objects.get(begin)];
        ends.into_iter().flatten().map(|object| object.key.as_str()).min()
    }

    /// The same as long as keys, ETags and sizes are.
    pub(super) fn digest(&self) -> String {
        let mut hasher = BlobHasher::new();
        hasher.update(VERSION);
        for object in &self.objects {
            for text in [self.path(object), &object.etag] {
                hasher.update(&(text.len() as u64).to_le_bytes());
                hasher.update(text.as_bytes());
            }
            hasher.update(&object.size.to_le_bytes());
        }
        hasher.finish().digest.to_string()
    }

    fn path<'a>(&self, object: &'a Listed) -> &'a str {
        object.key.strip_prefix(&self.prefix).unwrap_or(&object.key)
    }

    /// The tree that the keys mean. A key without bytes that ends in a slash is a folder, as consoles and file managers make them.
    pub(super) fn entries(&self) -> Result<Entries<'_>, Failure> {
        let mut entries = Entries::default();
        for object in &self.objects {
            let path = self.path(object);
            match path.strip_suffix('/') {
                // The folder that is imported.
                _ if path.is_empty() => continue,
                Some(path) if object.size == 0 => entries.folders.push((path, object)),
                _ => entries.files.push((path, object)),
            }
            check_names(path, object)?;
        }
        let files: HashSet<&str> = entries.files.iter().map(|(path, _)| *path).collect();
        if files.len() < entries.files.len() {
            let twice = entries.files.windows(2).find(|pair| pair[0].0 == pair[1].0).map_or("", |pair| pair[0].0);
            return Err(refused(twice, "it is listed twice"));
        }
        for (path, object) in entries.files.iter().chain(&entries.folders) {
            let mut above = path.match_indices('/').map(|(end, _)| &path[..end]);
            let folder = above.find(|above| files.contains(above));
            let itself = Some(*path).filter(|path| object.key.ends_with('/') && files.contains(path));
            if let Some(both) = folder.or(itself) {
                let key = format!("{}{both}", self.prefix);
                return Err(refused(&key, &format!("key {:?} makes it a folder too", object.key)));
            }
        }
        Ok(entries)
    }

    /// Whether there is nothing at all.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

fn check_names(path: &str, object: &Listed) -> Result<(), Failure> {
    if path.ends_with('/') && object.size > 0 {
        return Err(refused(&object.key, "it ends in a slash like a folder, but has contents"));
    }
    let path = path.strip_suffix('/').unwrap_or(path);
    for part in path.split('/') {
        if part.is_empty() {
            return Err(refused(
                &object.key,
                "a name in it is empty: there is nothing before, after or between slashes",
            ));
        }
        folder::name(part.as_bytes()).map_err(|failure| refused(&object.key, &failure.message))?;
        if part.chars().any(|c| c.is_ascii_control()) {
            return Err(refused(&object.key, "there is a control character in it"));
        }
    }
    Ok(())
}

fn refused(key: &str, why: &str) -> Failure {
    let message =
        format!("the object with key {key:?} cannot be a file of a tree: {why}; rename it, or import another prefix");
    Failure::new(Reason::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str, size: u64) -> Listed {
        Listed { key: key.into(), etag: format!("e{size}"), size, modified: Mtime::default() }
    }

    fn listing(prefix: &str, keys: &[(&str, u64)]) -> Listing {
        Listing::new(prefix, keys.iter().map(|(key, size)| object(key, *size)).collect())
    }

    #[test]
    fn keys_below_the_prefix_are_files_and_folders() {
        let listing = listing("a/", &[("a/", 0), ("a/b/c", 3), ("a/empty", 0), ("a/d/", 0), ("a/b/", 0)]);
        let entries = listing.entries().unwrap();
        let paths = |of: &[(&str, &Listed)]| of.iter().map(|(path, _)| (*path).to_owned()).collect::<Vec<_>>();
        assert_eq!(paths(&entries.files), ["b/c", "empty"]);
        assert_eq!(paths(&entries.folders), ["b", "d"]);
    }

    #[test]
    fn what_cannot_be_a_file_is_named() {
        let long = "n".repeat(256);
        for (keys, named) in [
            (&[("a//b", 1)][..], "a//b"),
            (&[("/a", 1)], "/a"),
            (&[("a/./b", 1)], "a/./b"),
            (&[("../b", 1)], "../b"),
            (&[("x/..", 1)], "x/.."),
            (&[(long.as_str(), 1)], &long),
            (&[("folder/", 7)], "folder/"),
            (&[("a//", 0)], "a//"),
            (&[("a\nb", 1)], "a\\nb"),
            (&[("a", 1), ("a/b", 1)], "\"a\""),
            (&[("a", 0), ("a-b", 1), ("a/", 0)], "\"a\""),
            (&[("a/b", 1), ("a/b/c/d", 1)], "\"a/b\""),
        ] {
            let failure = listing("", keys).entries().expect_err(named);
            assert!(failure.reason == Reason::Invalid && failure.message.contains(named), "{keys:?}: {failure}");
        }
    }

    #[test]
    fn a_digest_tells_what_may_have_changed() {
        let known = listing("a/", &[("a/b", 1), ("a/c", 2)]);
        assert_eq!(known.digest(), listing("a/", &[("a/c", 2), ("a/b", 1)]).digest(), "the order is no change");
        assert_eq!(known.digest(), listing("z/", &[("z/b", 1), ("z/c", 2)]).digest(), "the same tree");
        let mut later = known.clone();
        later.objects[0].modified.seconds += 1;
        assert_eq!(known.digest(), later.digest());
        assert_eq!(known.difference(&later), None);
        let mut other = known.clone();
        other.objects[0].etag = "x".into();
        let cases = [
            (other, "a/b"),
            (listing("a/", &[("a/b", 1)]), "a/c"),
            (listing("a/", &[("a/b", 1), ("a/d", 2)]), "a/c"),
            (listing("a/", &[("a/a", 1), ("a/b", 1), ("a/c", 2)]), "a/a"),
        ];
        for (other, key) in cases {
            assert_ne!(known.digest(), other.digest());
            assert_eq!((known.difference(&other), other.difference(&known)), (Some(key), Some(key)));
        }
    }
}
