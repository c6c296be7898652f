//! What a target cannot hold, told in a sentence for each kind.

use std::collections::BTreeMap;

/// Paths that a warning names.
const NAMED: usize = 3;
/// Characters of a path that a warning names.
const NAMED_LENGTH: usize = 80;

/// What a target cannot hold, and where. A kind of loss is known by the sentence that tells it.
#[derive(Debug, Default)]
pub(crate) struct Losses(BTreeMap<&'static str, (u64, Vec<String>)>);

impl Losses {
    pub(crate) fn add(&mut self, sentence: &'static str, path: &[u8]) {
        let (count, named) = self.0.entry(sentence).or_default();
        *count += 1;
        if named.len() < NAMED {
            let text = String::from_utf8_lossy(path);
            let cut = text.char_indices().nth(NAMED_LENGTH).map(|(at, _)| format!("{}…", &text[..at]));
            named.push(cut.unwrap_or_else(|| text.into_owned()));
        }
    }

    /// One sentence for each kind, with how many there are, and the first of them.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let warning = |(sentence, (count, named)): (&&str, &(u64, Vec<String>))| {
            let more = if *count > named.len() as u64 { ", …" } else { "" };
            format!("{sentence}: {count} ({}{more})", named.join(", "))
        };
        self.0.iter().map(warning).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_counts_all_and_names_some() {
        let mut losses = Losses::default();
        for n in 0..5 {
            losses.add("pipes are left out", format!("p{n}").as_bytes());
        }
        losses.add("owners are left out", "ä".repeat(100).as_bytes());
        let long = format!("owners are left out: 1 ({}…)", "ä".repeat(NAMED_LENGTH));
        assert_eq!(losses.warnings(), [long.as_str(), "pipes are left out: 5 (p0, p1, p2, …)"]);
    }
}
