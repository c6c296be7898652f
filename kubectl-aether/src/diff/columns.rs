//! A unified diff in two columns: what was on the left, what is on the right. Pure but for the terminal's width.
//!
//! Lines that git prints outside of hunks (names, modes, renames) stay as they are. Within a hunk, a run of removed
//! lines stands beside the run of added lines that follows it.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The width where there is no terminal to ask.
const WIDTH: usize = 130;
/// Columns from one tab stop to the next.
const TAB: usize = 4;

const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const CYAN: &str = "\x1b[36m";
const BOLD: &str = "\x1b[1m";
const RESET: &str = "\x1b[m";

/// The width of the terminal, or what is usual.
pub(super) fn width() -> usize {
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    said.or_else(terminal).unwrap_or(WIDTH)
}

/// The two columns of `diff`, `width` wide together.
pub(super) fn render(diff: &str, width: usize, color: bool) -> String {
    let mut page = Page { out: String::new(), half: width.saturating_sub(3).max(20) / 2, color };
    let (mut removed, mut added): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    // Lines that the hunk still has, old and new: a line of a file may look like anything.
    let (mut old, mut new) = (0u64, 0u64);
    for line in diff.lines() {
        let kind = line.as_bytes().first().copied();
        if old == 0 && new == 0 {
            if kind == Some(b'\\') {
                continue;
            }
            page.pairs(&mut removed, &mut added);
            if let Some((before, after)) = hunk(line) {
                (old, new) = (before, after);
                page.whole(line, CYAN);
            } else {
                page.whole(line, BOLD);
            }
            continue;
        }
        let text = line.get(1..).unwrap_or_default();
        match kind {
            Some(b'-') => {
                if !added.is_empty() {
                    page.pairs(&mut removed, &mut added);
                }
                removed.push(text);
                old = old.saturating_sub(1);
            }
            Some(b'+') => {
                added.push(text);
                new = new.saturating_sub(1);
            }
            // "No newline at end of file" speaks of the line before it.
            Some(b'\\') => {}
            _ => {
                page.pairs(&mut removed, &mut added);
                page.row(Some(text), Some(text), false);
                (old, new) = (old.saturating_sub(1), new.saturating_sub(1));
            }
        }
    }
    page.pairs(&mut removed, &mut added);
    page.out
}

/// The numbers of old and new lines that a hunk's head announces.
fn hunk(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("@@ -")?.split(' ');
    let count = |range: &str| match range.split_once(',') {
        Some((_, count)) => count.parse().ok(),
        None => Some(1),
    };
    Some((count(words.next()?)?, count(words.next()?.strip_prefix('+')?)?))
}

struct Page {
    out: String,
    half: usize,
    color: bool,
}

impl Page {
    fn whole(&mut self, line: &str, color: &str) {
        let line = visible(line);
        self.painted(&line, color);
        self.out.push('\n');
    }

    fn pairs(&mut self, removed: &mut Vec<&str>, added: &mut Vec<&str>) {
        for index in 0..removed.len().max(added.len()) {
            self.row(removed.get(index).copied(), added.get(index).copied(), true);
        }
        removed.clear();
        added.clear();
    }

    /// One pair of lines, as often broken as the longer one needs.
    fn row(&mut self, left: Option<&str>, right: Option<&str>, changed: bool) {
        let mark = match (left, right) {
            _ if !changed => ' ',
            (Some(_), Some(_)) => '|',
            (Some(_), None) => '<',
            _ => '>',
        };
        let left = left.map(|text| pieces(&visible(text), self.half)).unwrap_or_default();
        let right = right.map(|text| pieces(&visible(text), self.half)).unwrap_or_default();
        for index in 0..left.len().max(right.len()) {
            let piece = left.get(index).map_or("", String::as_str);
            let filling = " ".repeat(self.half - piece.width().min(self.half));
            self.painted(piece, if changed { RED } else { "" });
            let other = right.get(index).map_or("", String::as_str);
            let space = if other.is_empty() { "" } else { " " };
            self.out.push_str(&format!("{filling} {mark}{space}"));
            self.painted(other, if changed { GREEN } else { "" });
            let end = self.out.trim_end_matches(' ').len();
            self.out.truncate(end);
            self.out.push('\n');
        }
    }

    fn painted(&mut self, text: &str, color: &str) {
        if self.color && !color.is_empty() && !text.is_empty() {
            self.out.push_str(&format!("{color}{text}{RESET}"));
        } else {
            self.out.push_str(text);
        }
    }
}

/// Tabs as spaces, and no characters that would command the terminal.
fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        if c == '\t' {
            let spaces = TAB - column % TAB;
            out.extend(std::iter::repeat_n(' ', spaces));
            column += spaces;
        } else {
            let c = if c.is_control() { '\u{fffd}' } else { c };
            column += c.width().unwrap_or(0);
            out.push(c);
        }
    }
    out
}

/// The text in pieces of at most `width` columns; one piece of an empty text.
fn pieces(text: &str, width: usize) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut column = 0;
    for c in text.chars() {
        let wide = c.width().unwrap_or(0);
        if column + wide > width {
            pieces.push(String::new());
            column = 0;
        }
        if let Some(last) = pieces.last_mut() {
            last.push(c);
        }
        column += wide;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIFF: &str = "diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1,4 +1,4 @@ fn\n same\n-one\n-two\n+1\n+-- 2\n+3\n-\tlast\n\\ No newline at end of file\n";

    #[test]
    fn removed_stands_beside_added() {
        let text = render(DIFF, 43, false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..4], ["diff --git a/f b/f", "--- a/f", "+++ b/f", "@@ -1,4 +1,4 @@ fn"]);
        assert_eq!(lines[4], format!("{:20}   {}", "same", "same"));
        assert_eq!(lines[5], format!("{:20} | {}", "one", "1"));
        assert_eq!(lines[6], format!("{:20} | {}", "two", "-- 2"));
        assert_eq!(lines[7], format!("{:20} > {}", "", "3"));
        assert_eq!(lines[8], format!("{:20} <", "    last"));
        assert_eq!(lines.len(), 9);
    }

    #[test]
    fn long_lines_are_broken_and_wide_characters_count_twice() {
        let text = render(&format!("@@ -0,0 +1 @@\n+{}\n", "x".repeat(25)), 43, false);
        assert_eq!(text.lines().skip(1).map(|line| line.trim_start().len()).collect::<Vec<_>>(), [22, 7]);
        assert_eq!(pieces("漢字漢", 4), ["漢字", "漢"]);
    }

    #[test]
    fn contents_cannot_command_the_terminal() {
        let text = render("@@ -0,0 +1 @@\n+\x1b[2Jx\n", 80, true);
        assert!(!text.contains("\x1b[2J") && text.contains("\u{fffd}[2Jx"), "{text:?}");
        assert!(text.contains(GREEN));
    }
}
