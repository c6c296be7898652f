//! What each method of the store asks for.

use std::fmt;
use std::str::FromStr;

/// What an account may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Read contents of known digests.
    Read,
    /// Bring contents, and ask which are missing.
    Write,
    /// Pin trees.
    Pin,
    /// Everything else: checks, collection, statistics.
    Admin,
}

const ALL: [(Permission, &str); 4] =
    [(Permission::Read, "read"), (Permission::Write, "write"), (Permission::Pin, "pin"), (Permission::Admin, "admin")];

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = ALL.iter().find(|(permission, _)| permission == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Permission {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = ALL.iter().find(|(_, name)| *name == text);
        found
            .map(|(permission, _)| *permission)
            .ok_or_else(|| format!("{text:?} is not one of read, write, pin, admin"))
    }
}

/// The permissions of which any one is enough for the method at `path`; none is needed when there are none.
///
/// What a client may bring it may also ask for: an import needs no more than `write`, and so reads nothing. A method that
/// is not known here needs `admin`.
pub(super) fn enough_for(path: &str) -> &'static [Permission] {
    use Permission::{Admin, Pin, Read, Write};
    match path.trim_start_matches('/') {
        "build.bazel.remote.execution.v2.Capabilities/GetCapabilities" => &[],
        "build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs" => &[Write, Read],
        "build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs"
        | "build.bazel.remote.execution.v2.ContentAddressableStorage/GetTree"
        | "google.bytestream.ByteStream/Read" => &[Read],
        "build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs"
        | "google.bytestream.ByteStream/Write"
        | "google.bytestream.ByteStream/QueryWriteStatus" => &[Write],
        "aether.store.v1.StoreAdmin/PinRoot"
        | "aether.store.v1.StoreAdmin/UnpinRoots"
        | "aether.store.v1.StoreAdmin/ListRoots" => &[Pin],
        // Whoever pins trees is to hear what was lost of them.
        "aether.store.v1.StoreAdmin/GetIntegrity" => &[Admin, Pin],
        _ => &[Admin],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_for_administrators() {
        for path in ["", "/", "/google.bytestream.ByteStream/read", "/aether.store.v1.StoreAdmin/Fsck", "/x/Read"] {
            assert_eq!(enough_for(path), [Permission::Admin], "{path}");
        }
        assert!(!enough_for("/google.bytestream.ByteStream/Read").contains(&Permission::Write));
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for (permission, name) in ALL {
            assert_eq!((name.parse(), permission.to_string().as_str()), (Ok(permission), name));
        }
        assert!("Read".parse::<Permission>().unwrap_err().contains("admin"));
    }
}
