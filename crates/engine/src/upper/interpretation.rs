//! What the marks that overlayfs leaves in an upper mean: the table of the data path's design as pure functions.
//!
//! Checked on Linux 6.18 against `fs/overlayfs/namei.c` (`ovl_lookup_single`, `ovl_check_redirect`) and by the property
//! test, which also runs with one rule at a time replaced by a wrong one and must notice.

use rustix::fs::FileType;

/// What overlayfs and the file system say about one entry of an upper.
#[derive(Clone, Debug)]
pub struct Marks {
    /// Type of the entry.
    pub kind: FileType,
    /// Device number, of device nodes.
    pub device: u64,
    /// `trusted.overlay.opaque` is `y`.
    pub opaque: bool,
    /// `trusted.overlay.redirect`.
    pub redirect: Option<Vec<u8>>,
    /// `trusted.overlay.metacopy` is there, of whatever size (a verity digest may be in it).
    pub metacopy: bool,
}

/// What shows in the merged view under a name that the upper has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Nothing: the entry says that the lower one is gone.
    Nothing,
    /// The upper's entry.
    Upper,
    /// The lower's entry. The kernel never does this; a reader that overlooks whiteouts would.
    Lower,
}

/// Where in the image the lower half of an upper entry lies. The image, never the merged view: two swapped directories
/// depend on that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It has none.
    Nowhere,
    /// Under its own name in the lower directory of its parent.
    SameName,
    /// Under another name in the lower directory of its parent.
    Sibling(Vec<u8>),
    /// At a path from the image's root.
    Path(Vec<u8>),
}

/// The rules by which an upper is read.
///
/// They are values so that the property test can prove its teeth by breaking one; everybody else uses the default.
#[derive(Clone, Copy)]
pub struct Interpretation {
    /// What shows under the entry's name.
    pub shown: fn(&Marks) -> Shown,
    /// Where a directory's lower half lies.
    pub directory: fn(&Marks) -> Origin,
    /// Where a regular file's content lies; nowhere means in the upper itself.
    pub content: fn(&Marks) -> Origin,
}

impl Default for Interpretation {
    fn default() -> Self {
        Self { shown, directory, content }
    }
}

/// A whiteout is a character device 0:0. (The other form, an empty file with `trusted.overlay.whiteout`, the kernel
/// reads in lower layers but never writes.)
fn shown(marks: &Marks) -> Shown {
    if marks.kind == FileType::CharacterDevice && marks.device == 0 { Shown::Nothing } else { Shown::Upper }
}

/// An opaque directory has no lower half, whatever redirect it carries.
fn directory(marks: &Marks) -> Origin {
    if marks.opaque { Origin::Nowhere } else { redirected(marks) }
}

/// Without the metacopy mark the content is in the upper, and a redirect is left over from before it was.
fn content(marks: &Marks) -> Origin {
    if marks.metacopy { redirected(marks) } else { Origin::Nowhere }
}

fn redirected(marks: &Marks) -> Origin {
    match &marks.redirect {
        None => Origin::SameName,
        Some(path) if path.starts_with(b"/") => Origin::Path(path.clone()),
        Some(name) => Origin::Sibling(name.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(kind: FileType) -> Marks {
        Marks { kind, device: 0, opaque: false, redirect: None, metacopy: false }
    }

    #[test]
    fn only_the_null_device_is_a_whiteout() {
        assert_eq!(shown(&marks(FileType::CharacterDevice)), Shown::Nothing);
        assert_eq!(shown(&Marks { device: 0x103, ..marks(FileType::CharacterDevice) }), Shown::Upper);
        assert_eq!(shown(&marks(FileType::BlockDevice)), Shown::Upper);
        assert_eq!(shown(&marks(FileType::RegularFile)), Shown::Upper);
    }

    #[test]
    fn an_opaque_directory_ignores_its_redirect() {
        let moved = Marks { redirect: Some(b"/a/b".to_vec()), ..marks(FileType::Directory) };
        assert_eq!(directory(&moved), Origin::Path(b"/a/b".to_vec()));
        assert_eq!(directory(&Marks { opaque: true, ..moved }), Origin::Nowhere);
        assert_eq!(directory(&marks(FileType::Directory)), Origin::SameName);
    }

    #[test]
    fn a_redirect_without_metacopy_is_left_over() {
        let left = Marks { redirect: Some(b"old".to_vec()), ..marks(FileType::RegularFile) };
        assert_eq!(content(&left), Origin::Nowhere);
        assert_eq!(content(&Marks { metacopy: true, ..left }), Origin::Sibling(b"old".to_vec()));
    }
}
