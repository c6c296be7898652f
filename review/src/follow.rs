//! Where lines of a file have gone in a later version of it. Pure.
//!
//! Lines that a diff finds unchanged are where the diff has them; what was put between them belongs to them from then on. Lines
//! that the diff does not find were touched, unless all of them stand together somewhere else, and nowhere else, in
//! either version: then they were moved. Of lines that a file has many times (`}`) a diff can only guess which is which.

use std::time::Instant;

use similar::{Algorithm, DiffOp, capture_diff_slices_deadline};

/// Where lines are; the first one is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// From this line to that one.
    At {
        /// The first.
        from: u32,
        /// The last.
        to: u32,
    },
    /// They were changed or removed.
    Gone,
}

/// Where the lines `from` to `to` of `old` are in `new`. After `deadline`, changes are found less finely.
pub fn follow(old: &[u8], new: &[u8], from: u32, to: u32, deadline: Instant) -> Place {
    let (old, new) = (lines(old), lines(new));
    let range = (from as usize).wrapping_sub(1)..to as usize;
    if range.start >= range.end || range.end > old.len() {
        return Place::Gone;
    }
    let ops = capture_diff_slices_deadline(Algorithm::Histogram, &old, &new, Some(deadline));
    let found = kept(&ops, range.clone()).or_else(|| moved(&old, &new, &old[range]));
    found.map_or(Place::Gone, |(first, last)| Place::At { from: number(first), to: number(last) })
}

/// How many lines a text has.
pub fn count(text: &[u8]) -> u32 {
    u32::try_from(lines(text).len()).unwrap_or(u32::MAX)
}

/// Lines without what ends them; what follows the last line feed is one if it is not empty.
fn lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    if lines.last().is_some_and(|last| last.is_empty()) {
        lines.pop();
    }
    lines
}

/// The first and last index in the new version, if a diff found all lines of the range unchanged.
fn kept(ops: &[DiffOp], range: std::ops::Range<usize>) -> Option<(usize, usize)> {
    let mut found = 0;
    let (mut first, mut last) = (usize::MAX, 0);
    for op in ops {
        let DiffOp::Equal { old_index, new_index, len } = *op else { continue };
        let start = range.start.max(old_index);
        let end = range.end.min(old_index + len);
        if start < end {
            found += end - start;
            first = first.min(new_index + start - old_index);
            last = new_index + end - 1 - old_index;
        }
    }
    (found == range.len()).then_some((first, last))
}

/// The first and last index of `block` in the new version, if it is there once and was there once.
fn moved(old: &[&[u8]], new: &[&[u8]], block: &[&[u8]]) -> Option<(usize, usize)> {
    if block.iter().all(|line| line.trim_ascii().is_empty()) {
        return None;
    }
    let once = |text: &[&[u8]]| {
        let mut places = text.windows(block.len()).enumerate().filter(|(_, window)| *window == block);
        let first = places.next()?.0;
        places.next().is_none().then_some(first)
    };
    once(old)?;
    once(new).map(|first| (first, first + block.len() - 1))
}

fn number(index: usize) -> u32 {
    u32::try_from(index + 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(old: &str, new: &str, from: u32, to: u32) -> Place {
        follow(old.as_bytes(), new.as_bytes(), from, to, Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn lines_are_followed_as_a_reviewer_expects() {
        let old = "use a;\n\nfn f() {\n    one();\n    two();\n}\n";
        assert_eq!(of(old, old, 4, 5), Place::At { from: 4, to: 5 });
        assert_eq!(of(old, &format!("// new\n{old}"), 4, 5), Place::At { from: 5, to: 6 });
        assert_eq!(of(old, &old.replace("one();\n", "one();\n    half();\n"), 4, 5), Place::At { from: 4, to: 6 });
        assert_eq!(of(old, &old.replace("two", "three"), 4, 5), Place::Gone);
        assert_eq!(of(old, "", 1, 1), Place::Gone);
        let moved = "fn f() {\n    one();\n    two();\n}\n\nfn g() {}\nfn h() {}\nfn i() {}\nuse a;\n";
        assert_eq!(of(old, moved, 1, 1), Place::At { from: 9, to: 9 });
    }

    #[test]
    fn a_line_feed_at_the_end_is_no_line() {
        assert_eq!(of("a\nb", "a\nb\n", 2, 2), Place::At { from: 2, to: 2 });
        assert_eq!((count(b""), count(b"a"), count(b"a\n"), count(b"a\n\n")), (0, 1, 1, 2));
    }

    #[test]
    fn lines_that_never_were_are_gone() {
        for (from, to) in [(0, 1), (2, 1), (1, 3), (3, 3), (0, 0), (u32::MAX, u32::MAX)] {
            assert_eq!(of("a\nb\n", "a\nb\n", from, to), Place::Gone, "{from}-{to}");
        }
    }

    #[test]
    fn what_is_there_twice_is_not_taken_for_what_was_moved() {
        assert_eq!(of("x\na\nb\n", "a\nb\nx\nx\n", 1, 1), Place::Gone);
        assert_eq!(of("\na\nb\nc\n", "a\nb\nc\n\n", 1, 1), Place::Gone, "an empty line says nothing");
    }
}
